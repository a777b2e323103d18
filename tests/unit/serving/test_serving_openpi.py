"""openpi's own client against our server, and what else speaks WebSocket to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_fakes import ArithmeticPolicy, instructed, observation, running
from waiting import until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from gr00t_fast import load_policy
from gr00t_fast.serving import http
from gr00t_fast.serving.http import MAX_BODY_BYTES, MAX_WEBSOCKETS, HttpPolicyServer
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint


@pytest.fixture
def policy() -> ArithmeticPolicy:
    return ArithmeticPolicy()


@pytest.fixture
def server(policy: ArithmeticPolicy) -> Iterator[HttpPolicyServer]:
    with running(HttpPolicyServer(policy, port=0)) as server:
        yield server


def uri(server: HttpPolicyServer) -> str:
    return f"ws://127.0.0.1:{server.port}"


def test_openpi_s_client_gets_the_actions_of_our_policy(server: HttpPolicyServer, policy: ArithmeticPolicy) -> None:
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    told = client.get_server_metadata()
    assert told["keys"]["video"] == ["video.webcam"]
    assert told["action_widths"] == {"single_arm": 5, "gripper": 1}
    for _ in range(2):
        answer = client.infer(observation())
        for key, rows in ArithmeticPolicy().get_action(observation()).items():
            np.testing.assert_array_equal(answer[key], rows)
    assert answer["actions"].shape == (16, 6)
    assert answer["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
    seen = observation()
    seen["prompt"] = seen.pop("annotation.human.task_description")[0]
    np.testing.assert_array_equal(client.infer({**seen, "deadline_s": np.float32(5.0)})["actions"], answer["actions"])
    assert server.service.status()["deadlines_missed"] == 0


@pytest.mark.parametrize("picture", ["observation/images/webcam", "observation/image"])
def test_a_network_is_asked_in_openpi_s_spelling_of_lerobot_s_names(tmp_path: Path, picture: str) -> None:
    policy = load_policy(write_random_checkpoint(tmp_path, "tiny", "so100"), device="cpu", precision="fp32", seed=0)
    seen = policy.example_observation("pick it up")
    state = np.concatenate([seen["state.single_arm"][0], seen["state.gripper"][0]])
    with running(HttpPolicyServer(policy, port=0)) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        answer = client.infer({picture: seen["video.webcam"][0], "observation/state": state, "prompt": "pick it up"})
    policy.reset()
    expected = policy.get_action(seen)
    np.testing.assert_array_equal(answer["actions"], np.concatenate([*expected.values()], axis=-1))


def test_a_single_picture_for_two_cameras_is_refused() -> None:
    with running(HttpPolicyServer(ArithmeticPolicy("so100_dualcam"), port=0)) as server, connect(uri(server), compression=None) as socket:
        socket.recv()
        socket.send(msgpack_numpy.packb({"observation/image": np.zeros((32, 40, 3), np.uint8), "observation/state": np.zeros(6), "prompt": "go"}))
        assert "observation.images.front" in socket.recv()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (msgpack_numpy.packb({"video.webcam": np.zeros((1, 32, 40, 3), np.uint8)}), "is missing"),
        (msgpack_numpy.packb(observation(**{"state.gripper": np.full((1, 1), np.nan)})), "state.gripper"),
        (msgpack_numpy.packb(observation(deadline_s=-1.0)), "deadline_s"),
        (msgpack_numpy.packb([1, 2]), "observation"),
        (msgpack.packb({"video.webcam": {b"__ndarray__": True, b"data": b"123", b"dtype": "<f4", b"shape": [2**40]}}), "array"),
        (msgpack.packb({"video.webcam": {b"__ndarray__": True, b"data": b"12345678", b"dtype": "|O", b"shape": [1]}}), "dtype"),
        (b"\xc1", "msgpack"),
        ("text", "binary"),
    ],
    ids=["keys", "NaN", "deadline", "list", "size", "objects", "garbage", "text"],
)
def test_a_refused_request_leaves_the_connection(server: HttpPolicyServer, message: Any, said: str) -> None:
    with connect(uri(server), compression=None) as socket:
        socket.recv()
        socket.send(message)
        answer = socket.recv()
        assert isinstance(answer, str)
        assert said in answer
        socket.send(msgpack_numpy.packb(observation()))
        assert msgpack_numpy.unpackb(socket.recv())["actions"].shape == (16, 6)
    assert server.service.status()["refused"] == 1


def test_a_message_that_is_too_large_ends_its_connection_only(server: HttpPolicyServer) -> None:
    honest = WebsocketClientPolicy("127.0.0.1", server.port)
    with connect(uri(server), compression=None) as socket:
        socket.recv()
        with contextlib.suppress(ConnectionClosed):
            socket.send(bytes(MAX_BODY_BYTES + 1))
        with pytest.raises(ConnectionClosed):
            socket.recv()
    assert honest.infer(observation())["actions"].shape == (16, 6)


def test_who_may_connect(policy: ArithmeticPolicy) -> None:
    with running(HttpPolicyServer(policy, port=0, api_token="secret")) as server:
        assert WebsocketClientPolicy("127.0.0.1", server.port, api_key="secret").infer(observation())["actions"].shape == (16, 6)
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Api-Key secret", "Origin": "http://evil.example"}):
            with pytest.raises(InvalidStatus, match="403"):
                connect(uri(server), additional_headers=headers)


def test_connections_are_bounded_and_given_back(server: HttpPolicyServer) -> None:
    open_ones = [connect(uri(server)) for _ in range(MAX_WEBSOCKETS)]
    with pytest.raises(InvalidStatus, match="403"):
        connect(uri(server))
    for each in open_ones:
        each.close()
    until(lambda: server.application.websockets == 0)
    assert WebsocketClientPolicy("127.0.0.1", server.port).infer(observation())["actions"].shape == (16, 6)


def test_a_websocket_outlasts_the_shortened_limits_of_silent_connections(policy: ArithmeticPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_S", 0.3)
    monkeypatch.setattr(http, "IDLE_S", 0.3)
    with running(HttpPolicyServer(policy, port=0)) as server, connect(uri(server)) as socket:
        socket.recv()
        time.sleep(1.0)
        socket.send(msgpack_numpy.packb(observation()))
        assert msgpack_numpy.unpackb(socket.recv())["actions"].shape == (16, 6)


def test_a_request_whose_client_is_gone_is_not_computed(server: HttpPolicyServer, policy: ArithmeticPolicy) -> None:
    with connect(uri(server)) as first, connect(uri(server)) as second:
        first.send(msgpack_numpy.packb(instructed("hold")))
        until(lambda: policy.calls)
        second.send(msgpack_numpy.packb(observation()))
        until(lambda: server.service.queue.waiting)
        second.close()
        until(lambda: not server.service.queue.waiting)
        policy.released.set()
    assert policy.calls == 1
