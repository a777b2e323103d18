"""The HTTP twin: json_numpy clients, refusals, and clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import nvidia_style_service as reference
import pytest
from serving_fakes import ArithmeticPolicy, Mutator, assert_same, instructed, observation, running
from waiting import until

from gr00t_fast.serving import HttpPolicyServer
from gr00t_fast.serving import http as module

DUALCAM = ("front", "wrist")


@pytest.fixture
def policy() -> ArithmeticPolicy:
    return ArithmeticPolicy()


@pytest.fixture
def http_server(policy: ArithmeticPolicy) -> Iterator[HttpPolicyServer]:
    with running(HttpPolicyServer(policy, port=0)) as started:
        yield started


@pytest.mark.parametrize(("data_config", "cameras"), [("so100", ("webcam",)), ("so100_dualcam", DUALCAM)])
@pytest.mark.parametrize("batch", [None, 2])
def test_json_numpy_clients_are_served(data_config: str, cameras: tuple[str, ...], batch: int | None) -> None:
    seen = observation(batch, cameras)
    with running(HttpPolicyServer(ArithmeticPolicy(data_config), port=0)) as server:
        assert server.address == f"http://127.0.0.1:{server.port}"
        expected = ArithmeticPolicy(data_config).get_action(seen)
        for message in ({"observation": seen}, {"encoded": reference.json_numpy_text({"observation": seen})}):
            status, actions = reference.http_post(f"{server.address}/act", message)
            assert status == 200
            assert_same(actions, expected)


def test_http_health_and_refusals(http_server: HttpPolicyServer, policy: ArithmeticPolicy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=10)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b'{"status":"healthy","model":"GR00T"}')
    connection.request("GET", "/other")  # on the same connection
    response = connection.getresponse()
    assert (response.status, response.read()[:9]) == (404, b'{"detail"')
    act = f"{http_server.address}/act"
    assert reference.http_post(f"{http_server.address}/other", {})[0] == 404
    for message in (b"", b"{", b"[1]", {"x": 1}, {"observation": 3}, {"encoded": "{"}, {"encoded": "\ud800"}):
        assert reference.http_post(act, message)[0] == 400
    status, reply = reference.http_post(act, {"observation": {}})
    assert (status, "video.webcam" in reply["detail"]) == (400, True)
    bug = observation(**{"annotation.human.task_description": ["bug"]})
    assert reference.http_post(act, {"observation": bug}) == (500, {"detail": "ZeroDivisionError: a bug"})
    for length, expected in (("999999999999", 413), ("-1", 400)):
        connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=10)
        connection.putrequest("POST", "/act")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (expected, "close")
    assert reference.http_post(act, {"observation": observation()})[0] == 200
    assert len(policy.threads) == 1


def test_a_client_that_connects_anew_for_each_request_is_counted_as_one(http_server: HttpPolicyServer) -> None:
    for seen in (observation(), {}):
        for _ in range(3):
            reference.http_post(f"{http_server.address}/act", {"observation": seen})
    with urllib.request.urlopen(f"{http_server.address}/metrics") as reply:
        figures = reply.read().decode()
    assert 'gr00t_requests_served_total{client="127.0.0.1"} 3.0' in figures
    assert 'gr00t_requests_refused_total{client="127.0.0.1"} 3.0' in figures
    assert http_server.service.status()["clients"] == 1


def test_http_token() -> None:
    """UTF-8 outside ASCII."""
    body = reference.json_numpy_text({"observation": observation()}).encode()
    tokens = {b"": 401, b"Bearer wrong": 401, "Bearer geheim-äÅ".encode("latin-1"): 401, "Bearer geheim-äÅ".encode(): 200}
    with running(HttpPolicyServer(ArithmeticPolicy(), port=0, api_token="geheim-äÅ")) as server:
        for token, expected in tokens.items():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
                connection.request("POST", "/act", body, {"Authorization": token} if token else {})
                assert connection.getresponse().status == expected


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another byte now and then buys no time."""
    monkeypatch.setattr(module, "BODY_S", 0.3)
    with running(HttpPolicyServer(ArithmeticPolicy(), port=0)) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(10):
            time.sleep(0.1)
            with contextlib.suppress(OSError):  # closed
                slow.sendall(b"x")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_silent_connections_are_closed_and_the_server_answers_again(http_server: HttpPolicyServer, policy: ArithmeticPolicy) -> None:
    """More than it takes, with nothing sent, or a part of a header. One whose request is computed for longer than that stays."""
    place, act = ("127.0.0.1", http_server.port), f"{http_server.address}/act"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(reference.http_post, act, {"observation": instructed("wait 12")})
        until(lambda: policy.calls)
        silent = [stack.enter_context(socket.create_connection(place, timeout=60)) for _ in range(module.MAX_CONNECTIONS + 4)]
        for connection in silent[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert reference.http_post(act, {"observation": observation()})[0] == 503
        until(lambda: reference.http_post(act, {})[0] == 400, "the end of silent connections", patience_s=30)
        assert slow.result(60)[0] == 200
        assert [connection.recv(100) for connection in silent[:3]] == [b""] * 3


@pytest.mark.parametrize("message", [{}, [], {"observations": {}}])
def test_a_body_without_an_observation_is_answered_with_the_form(message: object) -> None:
    with running(HttpPolicyServer(ArithmeticPolicy(), port=0)) as server:
        status, answer = reference.http_post(f"{server.address}/act", message)
    assert status == 400
    assert '"observation"' in answer["detail"]


@pytest.mark.parametrize("length", [0, 1000])
def test_a_connection_is_closed_where_no_further_request_comes_in_a_shortened_time(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """A byte now and then, of a header or of the body of a request that was answered without it, buys no time."""
    monkeypatch.setattr(module, "IDLE_S", 0.3)
    with running(HttpPolicyServer(ArithmeticPolicy(), port=0)) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        for size in (0, 0, 0, length):
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
            answer = b""
            while b"healthy" not in answer:
                answer += slow.recv(1000)
        until(lambda: not _takes_a_byte(slow), "the end of the connection", patience_s=20)


def _takes_a_byte(connection: socket.socket) -> bool:
    time.sleep(0.1)
    with contextlib.suppress(ConnectionError):
        return connection.send(b"x") == 1
    return False


def test_what_is_announced_and_not_sent_takes_no_room(http_server: HttpPolicyServer) -> None:
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % module.MAX_BODY_BYTES
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", http_server.port), timeout=20)).sendall(head)
        for _ in range(20):
            assert reference.http_post(f"{http_server.address}/act", {"observation": observation()})[0] == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:5555"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "192.168.0.7:5555"}, 200),
        ({"Host": "[::1]:5555"}, 200),
        ({"Host": socket.gethostname()}, 200),
        ({"Host": "robot.lab"}, 200),
    ],
)
def test_web_pages_cannot_reach_the_server_through_a_browser(headers: dict[str, str], expected: int, policy: ArithmeticPolicy) -> None:
    """Neither a cross-site POST nor a page whose own name was made to point here."""
    with running(HttpPolicyServer(policy, port=0, host_names=("robot.lab",))) as server:
        assert reference.http_post(f"{server.address}/act", {"observation": observation()}, headers)[0] == expected
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("GET", "/health", headers=headers)
            assert connection.getresponse().status == expected
    assert policy.calls == (expected == 200)


def test_bodies_in_chunks_are_bounded_as_they_arrive(http_server: HttpPolicyServer) -> None:
    body = reference.json_numpy_text({"observation": observation()}).encode()
    for text, expected in ((body, 200), (bytes(module.MAX_BODY_BYTES + 1), 413)):
        connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=10)
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.request("POST", "/act", iter([text[:100], text[100:]]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert connection.getresponse().status == expected
        connection.close()


def test_http_survives_fuzz_vanishing_clients_and_fifty_at_once(http_server: HttpPolicyServer) -> None:
    body = reference.json_numpy_text({"observation": observation()}).encode()
    request = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    mutator = Mutator([request])
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", http_server.port), timeout=10) as raw:
            raw.sendall(mutator.next())
    act = f"{http_server.address}/act"
    with ThreadPoolExecutor(50) as pool:
        seen = [observation(**{"state.gripper": np.array([[100.0 * number]])}) for number in range(50)]
        for one, (status, actions) in zip(seen, pool.map(lambda one: reference.http_post(act, {"observation": one}), seen), strict=True):
            assert status == 200
            assert_same(actions, ArithmeticPolicy().get_action(one))
