"""The HTTP twin: json_numpy clients, refusals, and clients that misbehave."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import nvidia_style_service as reference
import pytest
from serving_fakes import ArithmeticPolicy, Mutator, assert_same, observation, running

from gr00t_fast.serving import HttpPolicyServer

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
    for headers, expected in (({"Content-Length": "999999999999"}, 413), ({"Content-Length": "-1"}, 411), ({"Transfer-Encoding": "chunked"}, 411)):
        connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=10)
        connection.putrequest("POST", "/act")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (expected, "close")
    assert reference.http_post(act, {"observation": observation()})[0] == 200
    assert len(policy.threads) == 1


def test_http_token() -> None:
    with running(HttpPolicyServer(ArithmeticPolicy(), port=0, api_token="secret")) as server:
        for headers, expected in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer secret"}, 200)):
            assert reference.http_post(f"{server.address}/act", {"observation": observation()}, headers)[0] == expected


def test_http_survives_fuzz_vanishing_clients_and_fifty_at_once(http_server: HttpPolicyServer) -> None:
    body = reference.json_numpy_text({"observation": observation()}).encode()
    request = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
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
