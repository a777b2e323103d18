"""Server and client over ZeroMQ: NVIDIA-style partners in both directions, queues, hostile messages, and lost partners."""

from __future__ import annotations

import contextlib
import logging
import os
import random
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
from serving_fakes import HORIZON, ArithmeticPolicy, Mutator, ServerProcess, assert_same, observation, running

from gr00t_fast.contracts import ActionPrefix, ModalityConfig
from gr00t_fast.errors import ConfigError, ObservationError, ServerError, ServerUnreachableError, WireError
from gr00t_fast.serving import HttpPolicyServer, PolicyClient, PolicyServer
from gr00t_fast.serving.service import RequestLog, Service, check_free

FUZZ_MESSAGES = int(os.environ.get("GR00T_FAST_FUZZ_MESSAGES") or 500)
FUZZ_BATCH = 100
MAX_GROWTH_BYTES = 24e6
DUALCAM = ("front", "wrist")


@pytest.fixture
def policy() -> ArithmeticPolicy:
    return ArithmeticPolicy()


@pytest.fixture
def server(policy: ArithmeticPolicy) -> Iterator[PolicyServer]:
    with running(PolicyServer(policy, port=0)) as started:
        yield started


# --- the reference's client and our server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_config", "cameras"), [("so100", ("webcam",)), ("so100_dualcam", DUALCAM)])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_reference_client_gets_the_actions_of_our_policy(data_config: str, cameras: tuple[str, ...], batch: int | None) -> None:
    seen = observation(batch, cameras)
    if batch == 3:
        seen["annotation.human.task_description"] = np.array(seen["annotation.human.task_description"])
    with running(PolicyServer(ArithmeticPolicy(data_config), port=0)) as server, reference.Client(server.port) as client:
        assert client.call("ping", requires_input=False) == {"status": "ok", "message": "Server is running"}
        config = client.call("get_modality_config", requires_input=False)
        assert config["video"] == reference.Modality([0], [f"video.{name}" for name in cameras])
        assert config["action"].delta_indices == list(range(HORIZON))
        actions = client.get_action(seen)
    assert_same(actions, ArithmeticPolicy(data_config).get_action(seen))
    assert actions["action.single_arm"].shape == ((HORIZON, 5) if batch is None else (batch, HORIZON, 5))


def test_a_missing_endpoint_means_get_action_and_missing_data_is_explained(server: PolicyServer) -> None:
    with reference.Client(server.port) as client:
        client.socket.send(reference.pack({"data": observation()}))
        assert set(reference.unpack(client.socket.recv())) == {"action.single_arm", "action.gripper"}
        with pytest.raises(RuntimeError, match=r"video\.webcam.*missing"):
            client.call("get_action", requires_input=False)
        for data in (None, [1], "text"):
            with pytest.raises(RuntimeError, match="expected a map"):
                client.call("get_action", data)


def test_refusals_reach_the_client_and_the_server_goes_on(server: PolicyServer, policy: ArithmeticPolicy, caplog: pytest.LogCaptureFixture) -> None:
    with reference.Client(server.port) as client:
        with pytest.raises(RuntimeError, match="Unknown endpoint: dance"):
            client.call("dance")
        with pytest.raises(RuntimeError, match="uint8"):
            client.get_action(observation(**{"video.webcam": np.zeros((1, 4, 4, 3))}))
        for _ in range(3):
            with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
                client.get_action(observation(**{"annotation.human.task_description": ["bug"]}))
        client.get_action(observation())
    assert len([record for record in caplog.records if record.exc_info]) == 1  # the bug's traceback once, the user's mistakes without
    assert len(policy.threads) == 1


def test_token_is_asked_for_and_kill_ends_the_server(policy: ArithmeticPolicy) -> None:
    server = PolicyServer(policy, port=0, api_token="geheim-ä")
    thread = threading.Thread(target=server.run)
    thread.start()
    for token in (None, "falsch", "geheim"):
        for endpoint in ("ping", "get_action", "get_modality_config", "kill"):
            with reference.Client(server.port, token) as client, pytest.raises(RuntimeError, match="Unauthorized: Invalid API token"):
                client.call(endpoint, observation())
    assert policy.calls == 0
    with reference.Client(server.port, "geheim-ä") as client:
        client.get_action(observation())
        assert client.call("kill", requires_input=False)["status"] == "ok"
    thread.join(5)
    assert not thread.is_alive()


def test_tokens_of_any_type_are_compared() -> None:
    service = Service(ArithmeticPolicy(), "x", 0)
    service.check_token("x")
    for given in (None, "", "y", "xx", b"x", 1, ["x"], "\ud800"):
        with pytest.raises(ServerError, match="Unauthorized"):
            service.check_token(given)


# --- our client and the reference's server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_config", "cameras"), [("so100", ("webcam",)), ("so100_dualcam", DUALCAM)])
@pytest.mark.parametrize("batch", [None, 2])
def test_our_client_gets_the_actions_of_the_reference_server(data_config: str, cameras: tuple[str, ...], batch: int | None) -> None:
    seen, policy = observation(batch, cameras), ArithmeticPolicy(data_config)
    with reference.Server(policy) as server, PolicyClient(port=server.port) as client:
        assert client.continues == {"rtc", "prefix"}
        assert client.ping()
        assert client.get_modality_config()["video"] == ModalityConfig([0], [f"video.{name}" for name in cameras])
        assert_same(client.get_action(seen), ArithmeticPolicy(data_config).get_action(seen))
        assert set(client.last_timing) == {"encode", "server", "decode"}
        client.reset()  # the reference has no such endpoint and nothing to reset
        with pytest.raises(ServerError, match="Unknown endpoint"):
            client.get_action(seen, noise=np.zeros((1, 16, 32)))  # ignoring the noise silently would be worse
        with pytest.raises(ServerError, match="missing"):
            client.get_action({})
        client.kill()  # answered with nil
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert not {"data", "api_token"} & set(server.requests[0])
    with reference.Server(policy, api_token="secret") as server, PolicyClient(port=server.port, api_token="secret") as client:
        assert client.ping()


DAMAGES = (lambda data: data[:-3], lambda data: b"", lambda data: b"\x93" * 2000, lambda data: b"\xc0", lambda data: b"\x80")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_answer_is_an_error_and_the_client_goes_on(damage: Any) -> None:
    with reference.Server(ArithmeticPolicy(), damage=damage) as server, PolicyClient(port=server.port) as client:
        for _ in range(2):
            with pytest.raises(WireError):
                client.get_action(observation())


@pytest.mark.parametrize("answer", [{"action.x": "text"}, {"action.x": np.zeros(())}, {"action.x": np.zeros((2, 2), int)}])
def test_answers_that_are_no_actions_are_refused(answer: dict[str, Any], policy: ArithmeticPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "get_action", lambda seen: answer)
    with reference.Server(policy) as server, PolicyClient(port=server.port) as client, pytest.raises(WireError, match=r"action\.x"):
        client.get_action(observation())


@pytest.mark.parametrize("batch", [None, 3])
def test_an_instruction_travels_as_a_list(batch: int | None) -> None:
    handling = reference.InputHandling(ArithmeticPolicy())
    with reference.Server(handling) as server, PolicyClient(port=server.port) as client:
        actions = client.get_action(observation(batch, **{"annotation.human.task_description": "pick: the cube"}))
        assert server.requests[-1]["data"]["annotation.human.task_description"] == ["pick: the cube"] * (batch or 1)
    assert_same(actions, ArithmeticPolicy().get_action(observation(batch)))
    assert handling.prompts == ["['pick: the cube']" if batch is None else "pick: the cube"]


@pytest.mark.parametrize("other", [np.float32, np.int64, list])
def test_states_travel_as_float64(other: type) -> None:
    """A service that has seen one type takes no other until it is started again."""
    seen = observation()
    changed = {key: value.tolist() if other is list else value.astype(other) for key, value in seen.items() if key.startswith("state.")}
    with reference.Server(reference.InputHandling(ArithmeticPolicy())) as server, PolicyClient(port=server.port) as client:
        client.get_action({**seen, **changed})
        client.get_action(seen)
        with reference.Client(server.port) as nvidias:
            assert_same(nvidias.get_action(seen), ArithmeticPolicy().get_action(seen))


def test_a_state_without_numbers_is_not_sent() -> None:
    policy = ArithmeticPolicy()
    with reference.Server(policy) as server, PolicyClient(port=server.port) as client:
        for value in ("up", [[1.0], [2.0, 3.0]]):
            with pytest.raises(ObservationError, match="state.gripper"):
                client.get_action(observation(**{"state.gripper": value}))
    assert policy.calls == 0


# --- our client and our server -----------------------------------------------------------------------------------------------------------


def test_client_and_server_are_a_policy(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    seen, noise = observation(), np.full((1, 16, 32), 0.25, np.float32)
    with PolicyClient(port=server.port) as client:
        assert client.get_modality_config() == policy.get_modality_config()
        assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))
        assert_same(client.get_action(seen, noise=noise), ArithmeticPolicy().get_action(seen, noise))
        prefix = ActionPrefix({"action.gripper": np.full((4, 1), -5, np.float32)}, inference_delay=3, method="prefix")
        continued = client.get_action(seen, prefix=prefix)
        assert_same(continued, ArithmeticPolicy().get_action(seen, prefix=prefix))
        assert (continued["action.gripper"][:, 0] == -5).sum() == 3
        with pytest.raises(ServerError, match="rtc or prefix as method"):
            client.get_action(seen, prefix=ActionPrefix({}, inference_delay=0, method="magic"))
        client.reset()
        assert policy.resets == 0, "the policy is all clients'"
        with pytest.raises(ServerError, match="kill is disabled"):
            client.kill()
        with pytest.raises(WireError, match="not object"):
            client.get_action({"video.webcam": object()})
        assert client.ping()
    with pytest.raises(ServerError, match="closed"):
        client.ping()


def test_unix_sockets(tmp_path: Path, policy: ArithmeticPolicy) -> None:
    with running(PolicyServer(policy, address=f"ipc://{tmp_path}/policy.sock")) as server, PolicyClient(address=server.address) as client:
        assert_same(client.get_action(observation()), ArithmeticPolicy().get_action(observation()))


def test_what_a_policy_returns_must_be_able_to_travel(server: PolicyServer, policy: ArithmeticPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "get_action", lambda seen: {"action.x": object()})
    with PolicyClient(port=server.port) as client:
        with pytest.raises(ServerError, match="not object"):
            client.get_action(observation())
        assert client.ping()


def test_only_this_machine_is_served_unless_told(server: PolicyServer, policy: ArithmeticPolicy, caplog: pytest.LogCaptureFixture) -> None:
    assert server.address == f"tcp://127.0.0.1:{server.port}"
    assert not caplog.records
    PolicyServer(policy, host="localhost", port=0).close()
    assert not caplog.records
    for host, token in (("0.0.0.0", "secret"), ("*", None)):
        PolicyServer(policy, host=host, port=0, api_token=token).close()
        HttpPolicyServer(policy, host=host, port=0, api_token=token).close()
    assert [record.message.endswith("no api_token is asked for") for record in caplog.records] == [True, True]


def test_addresses_that_cannot_be_used(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    for kind in (PolicyServer, HttpPolicyServer):
        with pytest.raises(ServerError, match="cannot listen"):
            kind(policy, port=server.port)
        with pytest.raises(ServerError, match="cannot listen on .*no.such.host"):
            kind(policy, host="no.such.host.invalid", port=0)
    with pytest.raises(ServerError, match="cannot listen"):
        PolicyServer(policy, port=70000)
    with pytest.raises(ServerError, match="cannot listen"):
        check_free(server.address)
    with pytest.raises(ConfigError, match="cannot connect"):
        PolicyClient(address="carrier-pigeon://nest")
    for timeout_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="timeout_s"):
            PolicyClient(timeout_s=timeout_s)


# --- many, slow and vanishing partners ---------------------------------------------------------------------------------------------------


def waiting(seconds: float) -> dict[str, Any]:
    return observation(**{"annotation.human.task_description": [f"wait {seconds}"]})


def test_pings_are_answered_during_an_inference(server: PolicyServer) -> None:
    with reference.Client(server.port) as slow, PolicyClient(port=server.port) as quick:
        slow.socket.send(reference.pack({"endpoint": "get_action", "data": waiting(3.0)}))
        time.sleep(0.1)
        began_s = time.monotonic()
        assert quick.ping()
        quick.get_modality_config()
        assert time.monotonic() - began_s < 2
        assert "action.gripper" in reference.unpack(slow.socket.recv())


def test_a_time_out_is_kept_and_a_late_answer_is_not_taken_for_the_next_one(server: PolicyServer) -> None:
    with PolicyClient(port=server.port, timeout_s=1.0) as client:
        began_s = time.monotonic()
        with pytest.raises(ServerUnreachableError, match="longer than an inference"):
            client.get_action(waiting(2.0))
        assert time.monotonic() - began_s < 1.9
        time.sleep(1.2)
        seen = observation(**{"state.gripper": np.array([[77.0]])})
        assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))


def _answer_all(listener: socket.socket, words: bytes) -> None:
    while listener.fileno() >= 0:
        with contextlib.suppress(OSError):  # the partner has closed, or the test is over
            connection, _ = listener.accept()
            with connection:
                connection.sendall(words)


GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 50  # and nothing that follows from it: ZeroMQ gives such a connection up for good


@pytest.mark.parametrize("words", ["nobody listens", None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", GREETING])
def test_the_client_never_hangs(words: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # alone, it refuses connections, and no other program gets the port
        port = listener.getsockname()[1]
        if words != "nobody listens":
            listener.listen()
        if isinstance(words, bytes):  # None: takes connections and never says a word; b"": breaks them at once
            threading.Thread(target=_answer_all, args=(listener, words), daemon=True).start()
        began_s = time.monotonic()
        with PolicyClient(port=port, timeout_s=0.3) as client:
            for _ in range(2):
                with pytest.raises(ServerUnreachableError, match=f"127.0.0.1:{port}"):
                    client.get_action(observation())
            for _ in range(100):  # while sockets that were given up are still being closed
                assert not client.ping(timeout_s=0.005)
        for call in range(30):  # closed in the middle of whatever ZeroMQ's thread is doing
            with PolicyClient(port=port) as client:
                assert not client.ping(timeout_s=0.001 * call)
        assert time.monotonic() - began_s < 20
        listener.close()


def test_a_server_killed_and_started_again_under_a_waiting_client() -> None:
    with ServerProcess() as first, PolicyClient(port=first.port, timeout_s=20) as client, ThreadPoolExecutor(1) as pool:
        client.get_action(observation())
        slow = pool.submit(client.get_action, waiting(1.0))
        time.sleep(0.3)
        first.kill()  # SIGKILL in the middle of the inference
        with ServerProcess(port=first.port):
            began_s = time.monotonic()
            assert_same(slow.result(), ArithmeticPolicy().get_action(waiting(0)))
            assert time.monotonic() - began_s < 8
            client.get_action(observation())
        assert client.connection > 0


def test_a_server_that_stays_away_is_an_error_within_the_time_out_and_between_calls_it_may_restart() -> None:
    with ServerProcess() as first, PolicyClient(port=first.port, timeout_s=1.0) as client:
        client.get_action(observation())
        first.kill()
        began_s = time.monotonic()
        with pytest.raises(ServerUnreachableError):
            client.get_action(observation())
        assert time.monotonic() - began_s < 5
        with ServerProcess(port=first.port):
            client.timeout_s = 10.0
            client.get_action(observation())


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


def test_connections_that_speak_no_protocol_or_send_strange_frames(server: PolicyServer) -> None:
    generator, ping = random.Random(0), reference.pack({"endpoint": "ping"})
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(generator.choice((b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\1\x7f", b"")) + generator.randbytes(200))
    with socket.create_connection(("127.0.0.1", server.port)), dealer_of(server) as dealer:
        for frames in ([b"x"], [b"x"] * 500, [b"\0"]):  # nobody waits for a reply to these
            dealer.send_multipart(frames)
        for frames in ([b"proxy", b"", ping], [b"", ping, b"x"], [b""], [b"", b"", b""]):  # the first as a chain of proxies sends it
            dealer.send_multipart(frames)
            *route, reply = dealer.recv_multipart()
            assert route == frames[: frames.index(b"") + 1]
            assert ("one part" in reply.decode("latin-1")) is (frames[0] != b"proxy")


@contextlib.contextmanager
def dealer_of(server: Any) -> Iterator[zmq.Socket]:
    with zmq.Context.instance().socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 20_000)
        dealer.connect(f"tcp://127.0.0.1:{server.port}")
        yield dealer


@pytest.mark.parametrize("value", [np.array(["ping", "kill"]), np.array(["rtc"]), 3, ["ping"], None, "x" * 50_000])
def test_an_endpoint_and_the_method_of_a_prefix_are_text(server: PolicyServer, value: Any) -> None:
    request = {"observation": observation(), "prefix": {"actions": {}, "delay": 0, "method": value}}
    with reference.Client(server.port) as client:
        with pytest.raises(RuntimeError, match="endpoint"):
            client.call(value)
        with pytest.raises(RuntimeError, match="rtc or prefix as method") as caught:
            client.call("get_action_with_options", request)
    assert len(str(caught.value)) < 300


LONG = "x" * 60_000
LARGE = {
    "NaN in a large state": {"state.single_arm": np.full((100_000, 1, 5), np.nan)},
    "a long instruction in a list": {"annotation.human.task_description": [LONG, 3]},
    "text that UTF-8 cannot hold": {"annotation.human.task_description": np.array(["\udc80" + LONG]).astype(object).tolist()},
    "many names": {f"a{number:0100}": 0 for number in range(1000)},
}


@pytest.mark.parametrize("case", LARGE)
def test_the_reason_of_a_refusal_does_not_grow_with_the_request(
    server: PolicyServer, policy: ArithmeticPolicy, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = LARGE[case] if case == "many names" else observation(**LARGE[case])
    with pytest.raises(ObservationError) as caught:
        policy.get_action(seen)
    assert len(str(caught.value)) < 1500
    if "UTF-8" not in case:  # which cannot be sent
        with reference.Client(server.port) as client, pytest.raises(RuntimeError) as caught:
            client.get_action(seen)
        assert len(str(caught.value)) < 1500
    assert max((len(record.getMessage()) for record in caplog.records), default=0) < 2000


def test_each_client_has_one_place_whose_later_request_takes_that_of_an_earlier_one(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    with dealer_of(server) as eager, ThreadPoolExecutor(1) as pool, PolicyClient(port=server.port) as polite:
        for number in range(20):
            eager.send_multipart([b"", reference.pack({"endpoint": "get_action", "data": waiting(0.3)})])
            while number == 0 and not policy.calls:
                time.sleep(0.01)
        answer = pool.submit(polite.get_action, observation())
        replies = [reference.unpack(eager.recv_multipart()[1]) for _ in range(20)]
        assert_same(answer.result(), ArithmeticPolicy().get_action(observation()))
    assert policy.calls == 3
    assert sum("action.gripper" in reply for reply in replies) == 2
    assert sum(reply.get("code") == ServerError.REPLACED for reply in replies) == 18


@pytest.mark.parametrize("kind", ["zmq", "http"])
def test_requests_of_clients_that_hang_up_while_they_wait_are_not_computed(policy: ArithmeticPolicy, kind: str) -> None:
    """An honest client is served right after the inference that is in progress."""
    count = 50
    with running((HttpPolicyServer if kind == "http" else PolicyServer)(policy, port=0)) as server, contextlib.ExitStack() as clients:
        waits = []
        for _ in range(1 + count):
            if kind == "http":
                body = reference.json_numpy_text({"observation": waiting(2.0)}).encode()
                client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                client.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            else:
                client = clients.enter_context(reference.Client(server.port))
                client.socket.send(reference.pack({"endpoint": "get_action", "data": waiting(2.0)}))
            waits.append(client)
            while not policy.calls:
                time.sleep(0.01)
        time.sleep(1.0)  # their requests have been read
        for client in waits:  # the one whose inference runs too
            client.close()
        if kind == "http":
            assert reference.http_post(f"{server.address}/act", {"observation": observation()})[0] == 200
        else:
            with PolicyClient(port=server.port) as honest:
                honest.get_action(observation())
        assert policy.calls == 2


def test_requests_that_wait_take_a_bounded_number_of_bytes() -> None:
    """Many clients, each with a large request: some are told to come again, and the server does not grow by what all of them sent."""
    policy, large = ArithmeticPolicy(), {"junk": np.zeros(4_000_000, np.uint8)}
    request = reference.pack({"endpoint": "get_action", "data": waiting(1.0) | large})
    with running(PolicyServer(policy, port=0, max_message_bytes=5_000_000)) as server:
        clients = [reference.Client(server.port) for _ in range(12)]
        for client in clients:
            client.socket.send(request)
        replies = [reference.unpack(client.socket.recv()) for client in clients]
        for client in clients:
            client.close()
        with reference.Client(server.port) as client:
            client.get_action(observation(**large))
    busy = sum(reply.get("code") == ServerError.BUSY for reply in replies)
    assert 4 <= busy <= 12 - 2  # 10 MB hold two requests at once; a slow machine may send the last ones when the first is answered
    assert policy.calls == 12 - busy + 1


def test_oversized_messages_get_a_reason_and_huge_ones_lose_their_connection(policy: ArithmeticPolicy) -> None:
    with running(PolicyServer(policy, port=0, max_message_bytes=20_000)) as server:
        with PolicyClient(port=server.port, timeout_s=0.5) as client:
            with pytest.raises(ServerError, match="at most 20000"):
                client.get_action(observation(size=(100, 100)))
            with pytest.raises(ServerUnreachableError):
                client.get_action(observation(size=(400, 400)))
            client.get_action(observation())
        with PolicyClient(port=server.port, timeout_s=0.5, max_message_bytes=10) as client, pytest.raises(ServerUnreachableError):
            client.get_modality_config()


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


def test_clients_take_turns_in_the_order_in_which_they_came() -> None:
    work = Work(max_waiting=5)
    for client in ("a", "b", "a", "c", "a"):
        work.submit(client)
    work.service.forget(lambda client: client == "c")
    assert work.run() == [("a", ServerError.REPLACED), ("a", ServerError.REPLACED), ("a", "done"), ("b", "done"), ("last", None)]


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
    assert work.run() == [("a", ServerError.REPLACED), ("a", "done"), ("b", "ZeroDivisionError"), ("last", None)]
    with pytest.raises(ServerError, match="shutting down"):
        work.submit("late")


def test_old_requests_are_not_computed_and_those_that_wait_at_the_end_are_refused() -> None:
    old, ended = Work(max_wait_s=-1), Work()
    old.submit("a")
    threading.Timer(0.2, old.service.stop).start()
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


def test_the_log_has_one_line_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    traffic = RequestLog(every_s=0.1)
    for _ in range(1000):
        traffic.refused(WireError("garbage"))
    assert len(caplog.records) <= 2
    time.sleep(0.11)
    traffic.served(5.0)
    assert "1 requests served, p50 5.0 ms" in caplog.records[-1].message
    assert "refused, the last one because: 'garbage'" in caplog.records[-1].message
