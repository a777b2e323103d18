"""Servers and client: NVIDIA-style partners in both directions, hostile traffic, lost partners, and what the detour costs."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attackers
import numpy as np
import nvidia_style_service as reference
import psutil
import pytest
import zmq
from serving_fakes import HORIZON, ArithmeticPolicy, EchoProcess, Mutator, ServerProcess, assert_same, observation, running

from gr00t_fast.contracts import ActionPrefix, ModalityConfig
from gr00t_fast.errors import ConfigError, ObservationError, ServerError, ServerUnreachableError, WireError
from gr00t_fast.serving import HttpPolicyServer, PolicyClient, PolicyServer
from gr00t_fast.serving.connections import Connection, check_port_free
from gr00t_fast.serving.service import (
    MAX_PER_CLIENT,
    MAX_REASON_CHARACTERS,
    MAX_WAITING,
    SHUTTING_DOWN,
    InferenceQueue,
    RequestLog,
    same_token,
)
from gr00t_fast.serving.wire import encode

FUZZ_MESSAGES = int(os.environ.get("GR00T_FAST_FUZZ_MESSAGES") or 5000)
FUZZ_BATCH = 500
MAX_GROWTH_BYTES = 24e6
MAX_OVERHEAD_MS = 2.0
MAX_OVERHEAD_ECHOES = 5.0
DUALCAM = ("front", "wrist")


def ignore(*_: object) -> None:
    """A connection, or an answer, that nobody looks at."""


HERE = Connection("here", ignore)


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
    with running(PolicyServer(ArithmeticPolicy(data_config), port=0)) as server, reference.Client(server.port) as client:
        assert client.call("ping", requires_input=False) == {"status": "ok", "message": "Server is running"}
        config = client.call("get_modality_config", requires_input=False)
        assert config["video"] == reference.Modality([0], [f"video.{name}" for name in cameras])
        assert config["action"].delta_indices == list(range(HORIZON))
        actions = client.get_action(seen)
    assert_same(actions, ArithmeticPolicy(data_config).get_action(seen))
    assert actions["action.single_arm"].shape == ((HORIZON, 5) if batch is None else (batch, HORIZON, 5))


def test_instructions_may_be_an_array_of_text(server: PolicyServer) -> None:
    with reference.Client(server.port) as client:
        client.get_action(observation(2, **{"annotation.human.task_description": np.array(["pick", "place it"])}))


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


def test_kill_needs_a_token(server: PolicyServer) -> None:
    with reference.Client(server.port) as client:
        with pytest.raises(RuntimeError, match="kill is disabled"):
            client.call("kill", requires_input=False)
        client.call("ping", requires_input=False)


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
    assert same_token(None, None)
    assert same_token("x", "x")
    assert not any(same_token(given, "x") for given in (None, "", "y", "xx", b"x", 1, ["x"], "\ud800"))


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
    assert "data" not in server.requests[0]
    assert "api_token" not in server.requests[0]


def test_our_client_sends_its_token() -> None:
    with reference.Server(ArithmeticPolicy(), api_token="secret") as server:
        with PolicyClient(port=server.port, api_token="secret") as client:
            assert client.ping()
        with PolicyClient(port=server.port, api_token="wrong") as client, pytest.raises(ServerError, match="Unauthorized"):
            client.ping()


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
        with pytest.raises(ServerError, match="cannot serve on host"):
            kind(policy, host="no.such.host.invalid", port=0)
    with pytest.raises(ServerError, match="from 0 to 65535"):
        PolicyServer(policy, port=70000)
    with pytest.raises(ServerError, match="cannot listen"):
        check_port_free("127.0.0.1", server.port)
    with pytest.raises(ConfigError, match="cannot connect"):
        PolicyClient(address="carrier-pigeon://nest")
    for timeout_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="timeout_s"):
            PolicyClient(timeout_s=timeout_s)


# --- many, slow and vanishing partners ---------------------------------------------------------------------------------------------------


def waiting(seconds: float) -> dict[str, Any]:
    return observation(**{"annotation.human.task_description": [f"wait {seconds}"]})


def test_fifty_clients_at_once_get_their_own_answers(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    def three_calls(number: int) -> None:
        with reference.Client(server.port) as client:
            for call in range(3):
                seen = observation(**{"state.gripper": np.array([[100.0 * number + call]])})
                assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(three_calls, range(50)))
    assert policy.calls == 150
    assert len(policy.threads) == 1


def test_pings_are_answered_during_an_inference(server: PolicyServer) -> None:
    with reference.Client(server.port) as slow, PolicyClient(port=server.port) as quick:
        slow.socket.send(reference.pack({"endpoint": "get_action", "data": waiting(4.0)}))
        time.sleep(0.1)
        began_s = time.monotonic()
        assert quick.ping()
        quick.get_modality_config()
        assert time.monotonic() - began_s < 3
        assert "action.gripper" in reference.unpack(slow.socket.recv())


def test_a_client_killed_in_the_middle_of_its_request_harms_nobody(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    code = "import sys, zmq; s = zmq.Context().socket(zmq.REQ); s.connect(sys.argv[1]); s.send(sys.stdin.buffer.read()); s.recv()"
    victim = subprocess.Popen([sys.executable, "-c", code, server.address], stdin=subprocess.PIPE)
    victim.stdin.write(reference.pack({"endpoint": "get_action", "data": waiting(0.3)}))
    victim.stdin.close()
    deadline_s = time.monotonic() + 10
    while not policy.calls and time.monotonic() < deadline_s:
        time.sleep(0.01)
    victim.kill()
    victim.wait(5)
    with PolicyClient(port=server.port) as client:
        client.get_action(observation())
    assert policy.calls == 2


def test_a_time_out_is_kept_and_a_late_answer_is_not_taken_for_the_next_one(server: PolicyServer) -> None:
    with PolicyClient(port=server.port, timeout_s=1.0) as client:
        began_s = time.monotonic()
        with pytest.raises(ServerUnreachableError, match="longer than an inference"):
            client.get_action(waiting(2.0))
        assert time.monotonic() - began_s < 1.9
        time.sleep(1.2)
        seen = observation(**{"state.gripper": np.array([[77.0]])})
        assert_same(client.get_action(seen), ArithmeticPolicy().get_action(seen))


def _reset(connection: socket.socket) -> None:
    """A partner whose connections break at once."""


def _speak_http(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def _speak_half(connection: socket.socket) -> None:
    """The greeting of ZeroMQ, and then nothing that follows from it: ZeroMQ gives such a connection up for good."""
    connection.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 50)


def _answer_all(listener: socket.socket, speak: Any) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            with connection:
                speak(connection)
        except OSError:  # the partner has closed, or the test is over
            if listener.fileno() < 0:
                return


@pytest.mark.parametrize("speak", ["nobody listens", None, _reset, _speak_http, _speak_half])
def test_the_client_never_hangs(speak: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if speak == "nobody listens":
            listener.close()
        elif speak is not None:  # None: takes connections and never says a word
            threading.Thread(target=_answer_all, args=(listener, speak), daemon=True).start()
        began_s = time.monotonic()
        with PolicyClient(port=port, timeout_s=0.3) as client:
            for _ in range(2):
                with pytest.raises(ServerUnreachableError, match=f"127.0.0.1:{port}"):
                    client.get_action(observation())
            assert not client.ping(timeout_s=0.2)
        for call in range(30):  # closed in the middle of whatever ZeroMQ's thread is doing
            with PolicyClient(port=port) as client:
                assert not client.ping(timeout_s=0.001 * call)
        assert time.monotonic() - began_s < 5
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
        assert client.reconnects


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
    with ServerProcess() as server, reference.Client(server.port) as probe:
        sender = zmq.Context.instance().socket(zmq.DEALER)
        sender.setsockopt(zmq.LINGER, 0)
        sender.setsockopt(zmq.RCVTIMEO, 20_000)
        sender.connect(f"tcp://127.0.0.1:{server.port}")
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
        sender.close()
        assert memory().rss - settled_bytes < MAX_GROWTH_BYTES


def test_connections_that_speak_no_protocol_or_send_strange_frames(server: PolicyServer) -> None:
    generator = random.Random(0)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(generator.choice((b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\1\x7f", b"")) + generator.randbytes(200))
    silent = socket.create_connection(("127.0.0.1", server.port))
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(server.address)
    for frames in ([b"x"], [b"x"] * 500, [b"\0"]):  # nobody waits for a reply to these
        dealer.send_multipart(frames)
    dealer.send_multipart([b"proxy", b"", reference.pack({"endpoint": "ping"})])  # as a chain of ROUTER-DEALER proxies sends it
    with PolicyClient(port=server.port) as client:
        client.get_action(observation())
    assert dealer.recv_multipart()[:2] == [b"proxy", b""]
    dealer.close(0)
    silent.close()


def test_a_request_in_several_parts_is_refused_and_not_left_without_an_answer(server: PolicyServer) -> None:
    ping = reference.pack({"endpoint": "ping"})
    for parts in ([ping, b"x"], [b"", ping], [b"", b""], [ping] * 100):
        with reference.Client(server.port) as client:
            client.socket.send_multipart(parts)
            assert f"one part, got {len(parts)}" in reference.unpack(client.socket.recv())["error"]
            client.call("ping", requires_input=False)
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVTIMEO, 20_000)
    dealer.connect(server.address)
    for frames in ([b"proxy", b"", ping, b"x"], [b""]):
        dealer.send_multipart(frames)
        *route, reply = dealer.recv_multipart()
        assert route == frames[: frames.index(b"") + 1]
        assert "one part" in reference.unpack(reply)["error"]
    dealer.close(0)


@pytest.mark.parametrize("endpoint", [np.array(["ping", "kill"]), np.array(["ping"]), 3, ["ping"], None])
def test_an_endpoint_is_text(server: PolicyServer, endpoint: Any) -> None:
    with reference.Client(server.port) as client, pytest.raises(RuntimeError, match="endpoint: expected text"):
        client.call(endpoint)


@pytest.mark.parametrize("method", [np.array(["rtc", "prefix"]), np.array(["rtc"]), "x" * 50_000])
def test_the_method_of_a_prefix_is_text(server: PolicyServer, method: Any) -> None:
    request = {"observation": observation(), "prefix": {"actions": {}, "delay": 0, "method": method}}
    with reference.Client(server.port) as client, pytest.raises(RuntimeError, match="rtc or prefix as method") as caught:
        client.call("get_action_with_options", request)
    assert len(str(caught.value)) < 300


LONG = "x" * 60_000
LARGE = {
    "NaN in a large state": {"state.single_arm": np.full((100_000, 1, 5), np.nan)},
    "a long instruction in a list": {"annotation.human.task_description": [LONG, 3]},
    "text that UTF-8 cannot hold": {"annotation.human.task_description": np.array(["\udc80" + LONG]).astype(object).tolist()},
}


@pytest.mark.parametrize("case", ["NaN in a large state", "a long instruction in a list"])
def test_the_reason_of_a_refusal_does_not_grow_with_the_request(server: PolicyServer, case: str, caplog: pytest.LogCaptureFixture) -> None:
    with reference.Client(server.port) as client, pytest.raises(RuntimeError) as caught:
        client.get_action(observation(**LARGE[case]))
    assert len(str(caught.value)) < 500
    assert max((len(record.getMessage()) for record in caplog.records), default=0) < 2000


@pytest.mark.parametrize("case", LARGE)
def test_errors_about_an_observation_show_the_beginning_of_a_value(policy: ArithmeticPolicy, case: str) -> None:
    with pytest.raises(ObservationError) as caught:
        policy.get_action(observation(**LARGE[case]))
    assert len(str(caught.value)) < 500


def test_errors_about_names_show_some_of_them(policy: ArithmeticPolicy) -> None:
    with pytest.raises(ObservationError, match=r"webcam' is missing.*; got a0+, .* and 1988 more") as caught:
        policy.get_action({f"a{number:0100}": 0 for number in range(2000)})
    assert len(str(caught.value)) < 1500


def test_whatever_a_policy_raises_travels_in_short(server: PolicyServer, policy: ArithmeticPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyError, ObservationError):

        def fail(seen: Any, error: type[Exception] = error) -> None:
            raise error("x" * 1_000_000)

        monkeypatch.setattr(policy, "get_action", fail)
        with reference.Client(server.port) as client, pytest.raises(RuntimeError, match=r"xxx \.\.\.$") as caught:
            client.get_action(observation())
        assert len(str(caught.value)) < MAX_REASON_CHARACTERS + 50


def test_a_client_that_sends_ahead_waits_and_another_one_is_served(server: PolicyServer, policy: ArithmeticPolicy) -> None:
    """Of one connection so many requests are read before their answers; each gets its answer in the end."""
    ahead = 20
    eager = zmq.Context.instance().socket(zmq.DEALER)
    eager.setsockopt(zmq.RCVTIMEO, 20_000)
    eager.connect(server.address)
    for _ in range(ahead):
        eager.send_multipart([b"", reference.pack({"endpoint": "get_action", "data": waiting(0.1)})])
    assert "action.gripper" in reference.unpack(eager.recv_multipart()[1])
    with PolicyClient(port=server.port) as polite:
        before = policy.calls
        assert_same(polite.get_action(observation()), ArithmeticPolicy().get_action(observation()))
    assert policy.calls - before <= MAX_PER_CLIENT + 2
    for _ in range(ahead - 1):
        assert "action.gripper" in reference.unpack(eager.recv_multipart()[1])
    assert policy.calls == ahead + 1
    eager.close(0)


@pytest.mark.parametrize("kind", ["zmq", "http"])
def test_requests_of_clients_that_have_hung_up_are_not_computed(policy: ArithmeticPolicy, kind: str) -> None:
    """Twice as many as may wait, during one inference: an honest client is served right after it. One of them stays."""
    with running((HttpPolicyServer if kind == "http" else PolicyServer)(policy, port=0)) as server:
        if kind == "http":
            text = reference.json_numpy_text({"observation": waiting(1.0)}).encode()
            first, count = attackers.http_request(text), 1
            open_one = lambda: socket.create_connection(("127.0.0.1", server.port), timeout=30)  # noqa: E731
            honest = lambda: reference.http_post(f"{server.address}/act", {"observation": observation()})[0] == 200  # noqa: E731
        else:
            first, count = attackers.request({"endpoint": "get_action", "data": waiting(1.0)}), MAX_PER_CLIENT
            open_one = lambda: attackers.zeromq(server.port)  # noqa: E731
            honest = lambda: "action.gripper" in reference.Client(server.port).get_action(observation())  # noqa: E731
        with open_one() as stays:
            stays.sendall(first)
            while not policy.calls:
                time.sleep(0.01)
            for _ in range(2 * MAX_WAITING):
                with open_one() as one:
                    one.sendall(first * count)
            assert honest()
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
    busy = sum("bytes are waiting" in str(reply.get("error")) for reply in replies)
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


def test_the_queue_is_bounded_and_old_requests_are_not_computed() -> None:
    work, outcomes = InferenceQueue(RequestLog(), 10, max_waiting=2, max_wait_s=0.05), []
    work.submit(lambda: 1, outcomes.append, HERE)
    work.submit(lambda: work.stop(), outcomes.append, HERE)
    with pytest.raises(ServerError, match="busy"):
        work.submit(lambda: 2, outcomes.append, HERE)
    time.sleep(0.1)
    work.stop()
    work.run()
    assert [outcome.error is not None and outcome.fault for outcome in outcomes] == [True, True]
    with pytest.raises(ServerError, match="shutting down"):
        work.submit(lambda: 3, outcomes.append, HERE)
    late = InferenceQueue(RequestLog(), 10, max_wait_s=0.01)
    late.submit(lambda: 4, outcomes.append, HERE)
    late.submit(lambda: late.stop(), outcomes.append, HERE)
    time.sleep(0.05)
    threading.Timer(0.2, late.stop).start()
    late.run()
    assert all("waited longer" in outcome.error for outcome in outcomes[2:])


def test_a_call_submitted_while_the_queue_ends_is_answered() -> None:
    """Behind the sentinel: `submit` had found the queue open before `stop` came."""
    work, outcomes = InferenceQueue(RequestLog(), 10), []
    put = work._wake.put

    def stop_first(token: None) -> None:
        work._wake = wake
        work.stop()
        put(token)

    wake = work._wake
    work._wake = SimpleNamespace(put=stop_first)
    work.submit(lambda: 1, outcomes.append, HERE, size_bytes=10)
    work.stop()
    work.run()
    assert [outcome.error for outcome in outcomes] == [SHUTTING_DOWN]


def test_submitting_and_stopping_at_once_loses_no_call() -> None:
    for _ in range(50):
        work, outcomes, taken = InferenceQueue(RequestLog(), 10), [], []
        runner = threading.Thread(target=work.run)

        def submit_all(work: InferenceQueue = work, outcomes: list[Any] = outcomes, taken: list[int] = taken) -> None:
            with contextlib.suppress(ServerError):  # it ends, or is full
                while True:
                    work.submit(lambda: 1, outcomes.append, HERE)
                    taken.append(1)

        submitters = [threading.Thread(target=submit_all) for _ in range(3)]
        for thread in (runner, *submitters):
            thread.start()
        work.stop()
        for thread in (runner, *submitters):
            thread.join(10)
        assert len(outcomes) == len(taken)


def test_requests_of_clients_that_were_refused_wait_for_those_of_others() -> None:
    work, done, suspect = InferenceQueue(RequestLog(), 10), [], Connection("here", ignore, refused_s=time.monotonic())
    for number in range(3):
        work.submit(lambda number=number: done.append(f"suspect {number}"), ignore, suspect)
        work.submit(lambda number=number: done.append(f"honest {number}"), ignore, HERE)
    work.submit(work.stop, ignore, suspect)
    work.run()
    assert done == [f"{kind} {number}" for kind in ("honest", "suspect") for number in range(3)]


def test_no_client_holds_more_than_its_share() -> None:
    """A full queue gives places to the host, or else the connection, that has fewer; then hosts take turns."""
    work, done, refused = InferenceQueue(RequestLog(), 100, max_waiting=6), [], []
    greedy, other, third = [Connection("greedy", ignore) for _ in range(3)], Connection("other", ignore), Connection("third", ignore)

    def submit(name: str, client: Connection, size_bytes: int = 0) -> None:
        def call() -> None:
            done.append(name)
            if len(done) == 6:
                work.stop()

        work.submit(call, lambda outcome: outcome.error and refused.append(name), client, size_bytes)

    for number in range(6):
        submit(f"greedy {number}", greedy[number // 3])
    submit("greedy's third connection", greedy[2])
    for number in range(2):
        submit(f"other {number}", other)
    with pytest.raises(ServerError, match="busy"):
        submit("no more than the others", greedy[0])
    submit("large", third, 60)
    with pytest.raises(ServerError, match="busy: .* 60 bytes"):
        submit("another large one", other, 60)
    work.run()
    assert refused == ["greedy 2", "greedy 5", "greedy 1", "greedy 4"]
    assert done == ["greedy 0", "other 0", "large", "greedy 3", "other 1", "greedy's third connection"]


def test_a_host_that_always_waits_has_its_turns_beside_hosts_that_ask_again_at_once() -> None:
    """A robot thinks for as long as one inference of another takes."""
    work, served, thinking = InferenceQueue(RequestLog(), 100), Counter(), []
    hosts = {name: Connection(name[0], ignore) for name in ("a1", "a2", "b", "c")}

    def ask(name: str) -> None:
        def answer(outcome: object) -> None:
            served[name] += 1
            thinking.append(name)
            if served.total() == 60:
                work.stop()
            elif served.total() < 60 and len(thinking) > 1:
                ask(thinking.pop(0))

        work.submit(lambda: None, answer, hosts[name])

    for name in hosts:
        ask(name)
    work.run()
    assert served["a1"] + served["a2"] >= 18, served
    assert min(served["b"], served["c"]) >= 18, served


def test_the_budget_is_given_back() -> None:
    work, outcomes = InferenceQueue(RequestLog(), 10), []
    for _ in range(3):
        work.submit(lambda: 1 / 0, outcomes.append, HERE, size_bytes=5)
        work.submit(lambda: 1, outcomes.append, HERE, size_bytes=5)
        with pytest.raises(ServerError, match="busy: 2 requests of 10 bytes"):
            work.submit(lambda: 1, outcomes.append, HERE, size_bytes=1)
        work.submit(work.stop, outcomes.append, HERE)
        work.run()
        work._stopping.clear()
    assert len(outcomes) == 9


def test_the_log_has_one_line_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    traffic = RequestLog(every_s=0.1)
    for _ in range(1000):
        traffic.refused("garbage")
    assert len(caplog.records) <= 2
    time.sleep(0.11)
    traffic.served(5.0)
    assert "1 requests served, p50 5.0 ms" in caplog.records[-1].message
    assert "refused, the last one because: 'garbage'" in caplog.records[-1].message


# --- what it costs -----------------------------------------------------------------------------------------------------------------------


def overhead_ms(calls: int = 100, size: tuple[int, int] = (480, 640)) -> np.ndarray:
    """(calls, 2): additional time of a call through a server in another process, and a round trip of the same bytes with nothing done to them.
    In process, through the server, echo, in turn and on the same observation."""
    seen, direct, times_ms = observation(size=size), ArithmeticPolicy(), np.empty((calls, 3))
    message = encode({"endpoint": "get_action", "data": seen})
    with ServerProcess() as server, PolicyClient(port=server.port) as client, EchoProcess() as echo:
        ways = (lambda: direct.get_action(seen), lambda: client.get_action(seen), lambda: echo(message))
        for row in [*np.empty((10, 3)), *times_ms]:
            for column, call in enumerate(ways):
                began_s = time.perf_counter()
                call()
                row[column] = 1000 * (time.perf_counter() - began_s)
    return np.stack((times_ms[:, 1] - times_ms[:, 0], times_ms[:, 2]), axis=1)


def test_the_detour_over_the_server_costs_little() -> None:
    """At most 2 ms, or what a slow machine makes of that: the bare echo takes a third of a millisecond on a quiet one. Of the undisturbed calls: each
    needs two processes to be woken in turn, and beside a busy neighbour most of them wait for a core."""
    seen = []
    for _ in range(4):
        overhead, echo = np.percentile(overhead_ms(), 10, axis=0)
        seen.append((round(float(overhead), 2), round(float(echo), 2)))
        if overhead <= max(MAX_OVERHEAD_MS, MAX_OVERHEAD_ECHOES * echo):
            return
    pytest.fail(f"10th percentile of (overhead, echo) {seen} ms; expected at most {MAX_OVERHEAD_MS} ms or {MAX_OVERHEAD_ECHOES} echoes")
