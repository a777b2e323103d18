"""Server and client over ZeroMQ: NVIDIA-style partners of N1.5 and N1.7 in both directions, queues, hostile messages, and lost partners."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import nvidia_style_service as reference
import psutil
import pytest
import zmq
from serving_fakes import HORIZON, ArithmeticPolicy, Mutator, ServerProcess, assert_same, instructed, observation, running
from waiting import until

from gr00t_fast import load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import ConfigError, ObservationError, ServerError, ServerUnreachableError, WireError
from gr00t_fast.cli.run import main as run
from gr00t_fast.inputs.observation import flat_observation, nested_observation
from gr00t_fast.serving import HttpPolicyServer, PolicyClient, PolicyServer
from gr00t_fast.serving.remote import RemotePolicy
from gr00t_fast.serving.service import Figures, Service, check_free
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

FUZZ_MESSAGES = int(os.environ.get("GR00T_FAST_FUZZ_MESSAGES") or 500)
FUZZ_BATCH = 100
MAX_GROWTH_BYTES = 24e6
CAMERAS = {"so100": ("webcam",), "so100_dualcam": ("front", "wrist")}
PARTNERS = [("so100", None), ("so100", 1), ("so100_dualcam", None), ("so100_dualcam", 3)]  # data config and batch


@pytest.fixture
def policy() -> ArithmeticPolicy:
    return ArithmeticPolicy()


@pytest.fixture
def server(policy: ArithmeticPolicy) -> Iterator[PolicyServer]:
    with running(PolicyServer(policy, port=0)) as started:
        yield started
        policy.released.set()


def nested_policy(data_config: str, network: str) -> ArithmeticPolicy:
    policy = ArithmeticPolicy(data_config)
    policy.protocol = network
    return policy


# --- NVIDIA's clients and our server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_config", "batch"), PARTNERS)
def test_n1d5_clients_get_the_actions_of_our_policy(data_config: str, batch: int | None) -> None:
    seen = observation(batch, CAMERAS[data_config])
    if batch == 3:
        seen["annotation.human.task_description"] = np.array(seen["annotation.human.task_description"])
    with running(PolicyServer(ArithmeticPolicy(data_config), port=0)) as server, reference.Client(server.port) as client:
        assert client.call("ping", requires_input=False) == {"status": "ok", "message": "Server is running"}
        config = client.call("get_modality_config", requires_input=False)
        assert config["video"] == reference.Modality([0], [f"video.{name}" for name in CAMERAS[data_config]])
        assert config["action"].delta_indices == list(range(HORIZON))
        actions = client.get_action(seen)
    assert_same(actions, ArithmeticPolicy(data_config).get_action(seen))
    assert actions["action.single_arm"].shape == ((HORIZON, 5) if batch is None else (batch, HORIZON, 5))


@pytest.mark.parametrize("network", ["n1.6", "n1.7"])
@pytest.mark.parametrize(("data_config", "batch"), PARTNERS)
def test_n1d6_and_n1d7_clients_get_the_actions_of_our_policy_beside_those_of_n1d5(data_config: str, batch: int | None, network: str) -> None:
    cameras = CAMERAS[data_config]
    seen = observation(batch, cameras)
    nested, _ = nested_observation(seen)
    own, other = (reference.ClientN1d6, reference.ClientN1d7)[:: 1 if network == "n1.6" else -1]
    with (
        running(PolicyServer(nested_policy(data_config, network), port=0)) as server,
        own(server.port) as client,
        other(server.port) as stranger,
        reference.Client(server.port) as older,
    ):
        config, told = client.call("get_modality_config", requires_input=False), {"delta_indices": [0], "modality_keys": [*cameras]}
        assert config["video"] == (told if network == "n1.6" else {"__ModalityConfig__": True, "as_json": told})
        assert_same(*(each.get_action(nested) for each in (stranger, client)))
        actions = {f"action.{key}": value for key, value in client.get_action(nested).items()}
        assert client.call("reset", {"options": None}) == {"status": "ok"}
        for given, said in (({**nested, "state": {}}, r"state\.gripper"), (seen, f"video.{cameras[0]}")):  # the second: N1.5's keys
            with pytest.raises(RuntimeError, match=said):
                client.get_action(given)
        assert_same(older.get_action(seen), ArithmeticPolicy(data_config).get_action(seen))
    assert_same(actions, ArithmeticPolicy(data_config).get_action(flat_observation(nested)))


def test_refusals_reach_the_client_and_the_server_goes_on(server: PolicyServer, policy: ArithmeticPolicy, caplog: pytest.LogCaptureFixture) -> None:
    refused = [
        ("dance", None, "Unknown endpoint: dance"),
        ("get_action", {}, r"video\.webcam.*missing"),
        ("get_action", observation(**{"video.webcam": np.zeros((1, 4, 4, 3))}), "uint8"),
        *(("get_action", data, "expected a map") for data in (None, [1], "text")),
        *[("get_action", instructed("bug"), "ZeroDivisionError: a bug")] * 3,
    ]
    for value in (np.array(["ping", "kill"]), np.array(["prefix"]), "rtc", 3, ["ping"], None, "x" * 50_000):
        request = {"observation": observation(), "prefix": {"actions": {}, "delay": 0, "method": value}}
        refused += [(value, observation(), "endpoint"), ("get_action_with_options", request, "prefix as method")]
    large = {f"a{number:0100}": 0 for number in range(1000)}
    refused += [
        ("get_action", observation(**{"state.single_arm": np.full((100_000, 1, 5), np.nan)}), r"state\.single_arm"),
        ("get_action", observation(**{"annotation.human.task_description": ["x" * 60_000, 3]}), "annotation"),
        ("get_action", large, "missing"),
    ]
    with reference.Client(server.port) as client:
        for endpoint, data, said in refused:
            with pytest.raises(RuntimeError, match=said) as caught:
                client.call(endpoint, data)
            assert len(str(caught.value)) < (1500 if data is large else 300), "it grows with the request"
        client.socket.send(reference.pack({"data": observation()}))  # no endpoint: get_action
        assert_same(reference.unpack(client.socket.recv()), ArithmeticPolicy().get_action(observation()))
    assert max(len(record.getMessage()) for record in caplog.records) < 2000
    assert len([record for record in caplog.records if record.exc_info]) == 1  # the bug's traceback once, the user's mistakes without
    assert len(policy.threads) == 1


def test_token_is_asked_for_and_kill_ends_the_server(policy: ArithmeticPolicy) -> None:
    with running(PolicyServer(policy, port=0, api_token="geheim-ä")) as server:
        for token in (None, "falsch", "geheim"):
            for endpoint in ("ping", "get_action", "get_modality_config", "kill"):
                with reference.Client(server.port, token) as client, pytest.raises(RuntimeError, match="Unauthorized: Invalid API token"):
                    client.call(endpoint, observation())
        assert policy.calls == 0
        with reference.Client(server.port, "geheim-ä") as client:
            client.get_action(observation())
            assert client.call("kill", requires_input=False)["status"] == "ok"
        until(lambda: "policy-server" not in str(threading.enumerate()), "the end of the server")


# --- our client and NVIDIA's servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_config", "batch"), PARTNERS)
def test_our_client_gets_the_actions_of_an_n1d5_server(data_config: str, batch: int | None) -> None:
    seen, policy = observation(batch, CAMERAS[data_config]), ArithmeticPolicy(data_config)
    with reference.Server(policy, api_token="secret") as server, PolicyClient(port=server.port, api_token="secret") as client:
        assert client.continues
        assert client.ping()
        assert client.get_modality_config() == policy.get_modality_config()
        assert client.get_metadata() is None
        assert_same(client.get_action(seen), ArithmeticPolicy(data_config).get_action(seen))
        assert set(client.last_timing) == {"encode", "server", "decode"}
        client.reset()  # the reference has no such endpoint and nothing to reset
        with pytest.raises(ServerError, match="Unknown endpoint"):
            client.get_action(seen, noise=np.zeros((1, 16, 32)))  # ignoring the noise silently would be worse
        with pytest.raises(ServerError, match="missing"):
            client.get_action({})
        client.kill()  # answered with nil
        until(lambda: not server.thread.is_alive(), "the end of the server")


@pytest.mark.parametrize("network", ["n1.6", "n1.7"])
@pytest.mark.parametrize(("data_config", "batch"), PARTNERS)
def test_our_client_gets_the_actions_of_an_n1d6_or_n1d7_server(data_config: str, batch: int | None, network: str) -> None:
    policy, seen = nested_policy(data_config, network), observation(batch, CAMERAS[data_config])
    server_of = {"n1.6": reference.ServerN1d6, "n1.7": reference.ServerN1d7}[network]
    with server_of(policy) as server, PolicyClient(port=server.port) as client:
        flat, nested = client.get_action(seen), client.get_action(nested_observation(seen)[0])
        assert [request["endpoint"] for request in server.requests] == ["get_modality_config", "get_action", "get_action"]
        assert client.get_modality_config() == policy.get_modality_config()
        assert client.get_metadata() is None
        client.reset()
    expected = ArithmeticPolicy(data_config).get_action(
        {key: np.float32(value) if key.startswith("state.") else value for key, value in seen.items()}
    )
    assert_same(flat, expected)
    assert_same({key: value if batch else value[0] for key, value in nested.items()}, expected)


DAMAGES = (lambda data: data[:-3], lambda data: b"", lambda data: b"\x93" * 2000, lambda data: b"\xc0", lambda data: b"\x80")
NO_ACTIONS = ({"action.x": "text"}, {"action.x": np.zeros(())}, {"action.x": np.zeros((2, 2), int)})


@pytest.mark.parametrize("damage", [*DAMAGES, *NO_ACTIONS])
def test_an_answer_that_makes_no_sense_is_an_error_and_the_client_goes_on(damage: Any) -> None:
    policy = ArithmeticPolicy()
    if isinstance(damage, dict):
        policy.get_action = lambda seen: damage
    with reference.Server(policy, damage=bytes if isinstance(damage, dict) else damage) as server, PolicyClient(port=server.port) as client:
        for _ in range(2):
            with pytest.raises(WireError, match=r"action\.x" if isinstance(damage, dict) else None):
                client.get_action(observation())


@pytest.mark.parametrize("batch", [None, 3])
def test_what_an_observation_becomes_on_its_way_to_an_n1d5_server(batch: int | None) -> None:
    """Texts travel as lists and states as float64: a service that has seen one type takes no other until it is started again."""
    seen, policy = observation(batch), ArithmeticPolicy()
    handling = reference.InputHandling(policy)
    with reference.Server(handling) as server, PolicyClient(port=server.port) as client, reference.Client(server.port) as nvidias:
        for change in (np.float32, np.int64, np.ndarray.tolist, np.asarray):
            changed = {key: change(value) for key, value in seen.items() if key.startswith("state.")}
            client.get_action({**seen, **changed, "annotation.human.task_description": "pick: the cube"})
        assert set(handling.prompts) == {"['pick: the cube']" if batch is None else "pick: the cube"}
        assert_same(nvidias.get_action(seen), ArithmeticPolicy().get_action(seen))
        calls = policy.calls
        for value in ("up", [[1.0], [2.0, 3.0]]):
            with pytest.raises(ObservationError, match=r"state\.gripper"):
                client.get_action(observation(**{"state.gripper": value}))
        assert policy.calls == calls


# --- our client and our server -----------------------------------------------------------------------------------------------------------


def test_client_and_server_are_a_policy(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    seen, noise = observation(), np.full((1, 16, 32), 0.25, np.float32)
    with PolicyClient(port=server.port) as client:
        assert client.get_modality_config() == policy.get_modality_config()
        assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))
        assert_same(client.get_action(seen, noise=noise), ArithmeticPolicy().get_action(seen, noise))
        prefix = ActionPrefix({"action.gripper": np.full((4, 1), -5, np.float32)}, inference_delay=3)
        continued = client.get_action(seen, prefix=prefix)
        assert_same(continued, ArithmeticPolicy().get_action(seen, prefix=prefix))
        assert (continued["action.gripper"][:, 0] == -5).sum() == 3
        client.reset()
        assert policy.resets == 0, "the policy is all clients'"
        with pytest.raises(ServerError, match="kill is disabled"):
            client.kill()
        with pytest.raises(WireError, match="not object"):
            client.get_action({"video.webcam": object()})
        policy.get_action = lambda seen: {"action.x": object()}
        with pytest.raises(ServerError, match="not object"):  # what a policy returns must be able to travel
            client.get_action(seen)
        assert client.ping()
    with pytest.raises(ServerError, match="closed"):
        client.ping()


def test_our_own_ends_with_an_n1d7_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metadata, history, noise and a prefix travel as ever, both forms of observations over HTTP, and it is the policy of a run."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", frame_offsets=(-2, 0))
    policy, ours = (load_policy(checkpoint, device="cpu", precision="fp32", seed=3) for _ in range(2))
    generator = np.random.default_rng(0)
    seen = {
        "video.webcam": generator.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8),
        "state.single_arm": generator.uniform(-30, 30, (1, 5)).astype(np.float32),
        "state.gripper": np.full((1, 1), 20, np.float32),
        "annotation.human.task_description": ["pick"],
    }
    nested = nested_observation(seen)[0]
    with running(HttpPolicyServer(policy, port=0)) as server:
        for given in (seen, nested):
            status, actions = reference.http_post(f"{server.address}/act", {"observation": given})
            assert status == 200
            assert_same(actions, ours.get_action(given))
    noise = generator.standard_normal((1, *ours.chunk_shape)).astype(np.float32)
    expected = ours.get_action(seen, noise=noise)
    known = ActionPrefix({key: value[4:] for key, value in expected.items()}, 2)
    with running(PolicyServer(policy, address=f"ipc://{tmp_path}/socket")) as server, PolicyClient(address=server.address) as client:
        with contextlib.closing(RemotePolicy(server.address, None, 20.0, 1.0, echo=lambda _: None)) as remote:
            assert remote.metadata.state_widths == ours.metadata.state_widths
            assert (remote.metadata.fps, remote.metadata.resolutions) == (None, {"webcam": None})
        assert client.get_modality_config() == ours.get_modality_config()
        assert [each["rep"] for each in client.get_modality_config()["action"].action_configs] == ["RELATIVE", "ABSOLUTE"]
        assert_same(client.get_action(seen, noise=noise), expected)
        assert_same({key: value[0] for key, value in client.get_action(nested, noise=noise).items()}, expected)
        assert_same(client.get_action(seen, noise=noise, prefix=known), ours.get_action(seen, noise=noise, prefix=known))
        pytest.importorskip("mujoco")
        camera = "--robot.cameras={front: {type: sim, width: 64, height: 48}}"
        argv = ["--robot.type=so100_sim", camera, "--lang_instruction=pick", "--timeout=1", f"--server={server.address}"]
        assert run([*argv, f"--out={tmp_path / 'out'}"]) == 0
        assert "does not say at which rate" in capsys.readouterr().out
        assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["ticks"] >= 5
        two = "--robot.cameras={top: {type: sim, width: 64, height: 48}, side: {type: sim, width: 64, height: 48}}"
        assert run([*argv, two]) == 1
        assert "webcam" in capsys.readouterr().err


def test_only_this_machine_is_served_unless_told(server: PolicyServer, policy: ArithmeticPolicy, caplog: pytest.LogCaptureFixture) -> None:
    assert server.address == f"tcp://127.0.0.1:{server.port}"
    PolicyServer(policy, host="localhost", port=0).close()
    assert not caplog.records
    for host, token in (("0.0.0.0", "secret"), ("*", None)):
        PolicyServer(policy, host=host, port=0, api_token=token).close()
        HttpPolicyServer(policy, host=host, port=0, api_token=token).close()
    assert ["no api_token is asked for" in record.message for record in caplog.records] == [True, True]


def test_addresses_that_cannot_be_used(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    for kind in (PolicyServer, HttpPolicyServer):
        for place in ({"port": server.port}, {"host": "no.such.host.invalid", "port": 0}, {"port": 70000}):
            with pytest.raises(ServerError, match="cannot listen"):
                kind(policy, **place)
    with pytest.raises(ServerError, match="cannot listen"):
        check_free(server.address)
    with pytest.raises(ConfigError, match="cannot connect"):
        PolicyClient(address="carrier-pigeon://nest")
    for timeout_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="timeout_s"):
            PolicyClient(timeout_s=timeout_s)


# --- many, slow and vanishing partners ---------------------------------------------------------------------------------------------------


def test_a_time_out_is_kept_and_a_late_answer_is_not_taken_for_the_next_one(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    with PolicyClient(port=server.port) as client, PolicyClient(port=server.port) as quick:
        client.get_modality_config()
        client.timeout_s = 0.3
        with pytest.raises(ServerUnreachableError, match="longer than an inference"):
            client.get_action(instructed("hold"))
        assert quick.ping(timeout_s=60)  # during the inference
        quick.get_modality_config()
        policy.released.set()
        client.timeout_s = 60.0
        seen = observation(**{"state.gripper": np.array([[77.0]])})
        assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))
        assert policy.calls == 2


def _answer_all(listener: socket.socket, words: bytes) -> None:
    while listener.fileno() >= 0:
        with contextlib.suppress(OSError):  # the partner has closed, or the test is over
            connection, _ = listener.accept()
            with connection:
                connection.sendall(words)


GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 50  # and nothing that follows from it: ZeroMQ gives such a connection up for good
WORDS = {"nobody listens": None, "silence": None, "breaks at once": b"", "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n", "greeting": GREETING}


@pytest.mark.parametrize("partner", WORDS)
def test_the_client_never_hangs(partner: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # alone, it refuses connections, and no other program gets the port
        port = listener.getsockname()[1]
        if partner != "nobody listens":
            listener.listen()
        if (words := WORDS[partner]) is not None:
            threading.Thread(target=_answer_all, args=(listener, words), daemon=True).start()
        began_s = time.monotonic()
        with PolicyClient(port=port, timeout_s=0.1) as client:
            for _ in range(2):
                with pytest.raises(ServerUnreachableError, match=f"127.0.0.1:{port}"):
                    client.get_action(observation())
            for _ in range(40):  # while sockets that were given up are still being closed
                assert not client.ping(timeout_s=0.005)
        for call in range(15):  # closed in the middle of whatever ZeroMQ's thread is doing
            with PolicyClient(port=port) as client:
                assert not client.ping(timeout_s=0.001 * call)
        assert time.monotonic() - began_s < 60
        listener.close()


def test_a_server_killed_and_started_again_under_a_waiting_client_and_between_calls() -> None:
    with ServerProcess() as first, PolicyClient(port=first.port) as client, ThreadPoolExecutor(1) as pool:
        client.get_action(observation())
        client.timeout_s = 60.0
        slow = pool.submit(client.get_action, instructed("wait 0.5"))
        time.sleep(0.1)
        first.kill()  # SIGKILL in the middle of the inference
        with ServerProcess(port=first.port) as second:
            assert_same(slow.result(), ArithmeticPolicy().get_action(instructed("wait 0")))
            assert client.connection > 0
            second.kill()
            client.timeout_s = 0.3
            with pytest.raises(ServerUnreachableError):
                client.get_action(observation())
        with ServerProcess(port=first.port):
            client.timeout_s = 60.0
            client.get_action(observation())


def test_each_client_has_one_place_whose_later_request_takes_that_of_an_earlier_one(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    with dealer_of(server) as eager, ThreadPoolExecutor(1) as pool, PolicyClient(port=server.port) as polite:
        for number in range(20):
            eager.send_multipart([b"", reference.pack({"endpoint": "get_action", "data": instructed("hold")})])
            if number == 0:
                until(lambda: policy.calls)
        replies = [reference.unpack(eager.recv_multipart()[1]) for _ in range(18)]
        assert {reply.get("code") for reply in replies} == {ServerError.REPLACED}
        answer = pool.submit(polite.get_action, observation())
        policy.released.set()
        assert all("action.gripper" in reference.unpack(eager.recv_multipart()[1]) for _ in range(2))
        assert_same(answer.result(), ArithmeticPolicy().get_action(observation()))
    assert policy.calls == 3


@pytest.mark.parametrize("kind", [PolicyServer, HttpPolicyServer])
def test_requests_of_clients_that_hang_up_while_they_wait_are_not_computed(policy: ArithmeticPolicy, kind: Any) -> None:
    """An honest client is served right after the inference that is in progress."""
    body, count = reference.json_numpy_text({"observation": instructed("hold")}).encode(), 50
    with running(kind(policy, port=0)) as server, contextlib.ExitStack() as clients:
        waiting = server.service.queue.waiting
        for _ in range(1 + count):
            if kind is HttpPolicyServer:
                client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                client.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            else:
                client = clients.enter_context(reference.Client(server.port))
                client.socket.send(reference.pack({"endpoint": "get_action", "data": instructed("hold")}))
            until(lambda: policy.calls)
        until(lambda: len(waiting) == count)
        clients.close()  # the one whose inference runs too
        until(lambda: not server.service.queue.waiting)
        policy.released.set()
        if kind is HttpPolicyServer:
            assert reference.http_post(f"{server.address}/act", {"observation": observation()})[0] == 200
        else:
            with PolicyClient(port=server.port) as honest:
                honest.get_action(observation())
        assert policy.calls == 2


# --- hostile traffic ---------------------------------------------------------------------------------------------------------------------


def test_mutated_messages_never_end_the_server_and_leave_no_memory_behind() -> None:
    """GR00T_FAST_FUZZ_MESSAGES=100000 for the long run. A valid request is answered after each batch; the process does not grow."""
    seeds = [reference.pack({"endpoint": "get_action", "data": observation(batch)}) for batch in (None, 2)]
    seeds += [reference.pack({"endpoint": name}) for name in ("ping", "kill", "get_modality_config", "reset", "dance")]
    seeds.append(reference.pack({"endpoint": "get_action", "data": observation(), "api_token": "x"}))
    mutator = Mutator(seeds)
    with ServerProcess() as server, reference.Client(server.port) as probe, dealer_of(server) as sender:
        memory = psutil.Process(server.process.pid).memory_info
        settled_bytes = 0
        for batch in range(max(FUZZ_MESSAGES // FUZZ_BATCH, 4)):
            for _ in range(FUZZ_BATCH):
                sender.send_multipart([b"", mutator.next()])
            for _ in range(FUZZ_BATCH):  # each gets exactly one reply
                assert len(sender.recv_multipart()) == 2
            seen = observation(**{"state.gripper": np.array([[float(batch)]])})
            assert_same(probe.get_action(seen), ArithmeticPolicy().get_action(seen))
            if batch == 1:
                settled_bytes = memory().rss
        assert memory().rss - settled_bytes < MAX_GROWTH_BYTES


@contextlib.contextmanager
def dealer_of(server: Any) -> Iterator[zmq.Socket]:
    with zmq.Context.instance().socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        dealer.connect(f"tcp://127.0.0.1:{server.port}")
        yield dealer


def test_oversized_messages_get_a_reason_and_huge_ones_lose_their_connection(policy: ArithmeticPolicy) -> None:
    with running(PolicyServer(policy, port=0, max_message_bytes=20_000)) as server:
        with PolicyClient(port=server.port) as client:
            with pytest.raises(ServerError, match="at most 20000"):
                client.get_action(observation(size=(100, 100)))
            client.timeout_s = 0.3
            with pytest.raises(ServerUnreachableError):
                client.get_action(observation(size=(400, 400)))
            client.timeout_s = 60.0
            client.get_action(observation())
        with PolicyClient(port=server.port, timeout_s=0.3, max_message_bytes=10) as client, pytest.raises(ServerUnreachableError):
            client.get_modality_config()


# --- the service without a socket --------------------------------------------------------------------------------------------------------


class Work(ArithmeticPolicy):
    """A service and its outcomes by client: the result, or the error's code. Its policy does what an observation holds."""

    def __init__(self, **limits: Any) -> None:
        super().__init__()
        self.service = Service(self, None, limits.pop("limit_bytes", 100), **limits)
        self.outcomes: list[tuple[str, Any]] = []

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: Any = None) -> Any:
        return observation["call"]()

    def submit(self, client: str, call: Any = lambda: "done", size_bytes: int = 0) -> None:
        def note(answer: Any) -> None:
            error = answer.exception()
            self.outcomes.append((client, answer.result() if error is None else getattr(error, "code", type(error).__name__)))

        self.service.ask({"call": call}, client, size_bytes).add_done_callback(note)

    def run(self) -> list[tuple[str, Any]]:
        self.submit("last", self.service.stop)
        self.service.run()
        return self.outcomes


def test_places_and_bytes_are_bounded_and_given_back() -> None:
    work = Work(limit_bytes=10, max_waiting=3)
    for client, size_bytes in (("a", 4), ("b", 4)):
        work.submit(client, lambda: 1 / 0, size_bytes)
    for client, size_bytes in (("c", 3), ("a", 7)):
        with pytest.raises(ServerError, match="busy: 2 requests") as caught:
            work.submit(client, size_bytes=size_bytes)
        assert caught.value.code == ServerError.BUSY
    work.submit("a", size_bytes=6)
    work.submit("c")
    with pytest.raises(ServerError, match="busy: 3"):
        work.submit("d")
    work.service.forget(lambda client: client == "c")
    answered = work.service.queue.waiting["a"].answer
    answered.add_done_callback(lambda _: work.submit("a", size_bytes=6))  # whoever has an answer may send the next request
    assert work.run() == [("a", ServerError.REPLACED), ("a", "done"), ("b", "ZeroDivisionError"), ("last", None), ("a", ServerError.STOPPING)]
    with pytest.raises(ServerError, match="shutting down"):
        work.submit("late")


def test_old_requests_are_not_computed_and_those_that_wait_at_the_end_are_refused() -> None:
    old, ended = Work(max_wait_s=-1), Work()
    old.submit("a")
    old.service.queue.waiting["a"].answer.add_done_callback(lambda _: old.service.stop())
    old.service.run()
    assert old.outcomes == [("a", ServerError.BUSY)]
    for client in ("a", "b"):
        ended.submit(client, ended.service.stop)
    assert ended.run() == [("a", None), ("b", ServerError.STOPPING), ("last", ServerError.STOPPING)]


def test_asking_and_stopping_at_once_loses_no_answer() -> None:
    for _ in range(50):
        work, taken = Work(), []

        def submit_all(work: Work = work, taken: list[str] = taken) -> None:
            with contextlib.suppress(ServerError):  # it ends
                while True:
                    work.submit(client := str(len(taken)))
                    taken.append(client)

        threads = [threading.Thread(target=target) for target in (work.service.run, submit_all, submit_all)]
        for thread in threads:
            thread.start()
        work.service.stop()
        for thread in threads:
            thread.join(10)
        assert len(work.outcomes) == len(taken)


def test_clients_that_connect_anew_for_each_request_do_not_fill_the_memory() -> None:
    figures = Figures()
    for number in range(1000):
        figures.refused(WireError("garbage"), str(number))
    assert figures.status()["clients"] < 100
    assert figures.exposition().count(b"gr00t_requests_refused_total{") < 100
    assert b'gr00t_requests_refused_total{client="others"}' in figures.exposition()
