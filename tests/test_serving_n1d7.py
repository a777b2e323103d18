"""N1.7's wire, both ways: partners written from the description of NVIDIA's N1.7 service, beside N1.5's on one socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import nvidia_style_service as n1d5
import pytest
from serving_fakes import HORIZON, ArithmeticPolicy, assert_same, observation, running

from benchmarks.lib.random_checkpoint import write_random_checkpoint
from gr00t_fast import load_policy
from gr00t_fast.cli.run import main as run
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.errors import WireError
from gr00t_fast.inputs.observation import flat_observation, nested_observation
from gr00t_fast.serving import HttpPolicyServer, PolicyClient, PolicyServer
from gr00t_fast.serving.remote import connect
from gr00t_fast.serving.wire import decode, encode


def pack(message: Any) -> bytes:
    def special(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}
        raise TypeError(type(value))

    return msgpack.packb(message, default=special)


def unpack(data: bytes) -> Any:
    def special(value: dict[Any, Any]) -> Any:
        if b"nd" not in value:
            return value
        assert value[b"kind"] == b"", "an object array"
        return np.frombuffer(value[b"data"], np.dtype(value[b"type"])).reshape(value[b"shape"])

    return msgpack.unpackb(data, object_hook=special)


class Client(n1d5.Client):
    """NVIDIA's N1.7 client."""

    pack, unpack = staticmethod(pack), staticmethod(unpack)


class Server(n1d5.Server):
    """NVIDIA's N1.7 server around a flat policy, strict about what it gets."""

    pack, unpack = staticmethod(pack), staticmethod(unpack)

    def __init__(self, policy: ArithmeticPolicy) -> None:
        super().__init__(policy)
        self.policy = policy
        self.endpoints |= {"reset": (dict, False), "get_action": (self._act, True), "get_modality_config": (self._configs, False)}

    def _configs(self) -> dict[str, Any]:
        unset = dict.fromkeys(("sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"))
        found = {}
        for name, config in self.policy.get_modality_config().items():
            keys = [key.removeprefix(f"{name}.") for key in config.modality_keys]
            found[name] = {"__ModalityConfig__": True, "as_json": {"delta_indices": config.delta_indices, "modality_keys": keys, **unset}}
        return found

    def _act(self, data: dict[str, Any]) -> list[Any]:
        seen = data["observation"]
        assert set(data) == {"observation", "options"}
        assert all(value.dtype == np.uint8 and value.ndim == 5 for value in seen["video"].values())
        assert all(value.dtype == np.float32 and value.ndim == 3 for value in seen["state"].values())
        assert all(isinstance(text, str) for texts in seen["language"].values() for (text,) in texts)
        actions = self.policy.get_action(flat_observation(seen))
        return [{key.removeprefix("action."): value for key, value in actions.items()}, {}]


def served(data_config: str = "so100") -> ArithmeticPolicy:
    policy = ArithmeticPolicy(data_config)
    policy.nested = True
    return policy


@pytest.mark.parametrize("batch", [None, 2])
def test_nvidia_s_client_gets_the_actions_of_our_policy(batch: int | None) -> None:
    seen = observation(batch, ("front", "wrist"))
    nested, _ = nested_observation(seen)
    with running(PolicyServer(served("so100_dualcam"), port=0)) as server, Client(server.port) as nvidias:
        assert nvidias.call("ping", requires_input=False)["status"] == "ok"
        config = nvidias.call("get_modality_config", requires_input=False)
        assert config["video"] == {"__ModalityConfig__": True, "as_json": {"delta_indices": [0], "modality_keys": ["front", "wrist"]}}
        actions, info = nvidias.call("get_action", {"observation": nested, "options": None})
        assert nvidias.call("reset", {"options": None}) == {"status": "ok"}
        with pytest.raises(RuntimeError, match=r"state\.gripper"):
            nvidias.call("get_action", {"observation": {**nested, "state": {}}, "options": None})
        with pytest.raises(RuntimeError, match=r"video\.front.*missing.*got observation, options"):
            nvidias.call("get_action", {"observation": seen, "options": None})
    assert info == {}
    expected = ArithmeticPolicy("so100_dualcam").get_action(flat_observation(nested))
    assert {f"action.{key}" for key in actions} == set(expected)
    for key, value in actions.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[f"action.{key}"])


def test_both_dialects_on_one_socket() -> None:
    seen = observation(None, ("webcam",))
    with running(PolicyServer(served(), port=0)) as server, Client(server.port) as nvidias, n1d5.Client(server.port) as older:
        actions, _ = nvidias.call("get_action", {"observation": nested_observation(seen)[0], "options": {}})
        flat = older.get_action(seen)
    np.testing.assert_allclose(actions["gripper"][0], flat["action.gripper"], rtol=1e-5)


@pytest.mark.parametrize("batch", [None, 2])
def test_our_client_gets_the_actions_of_nvidia_s_server(batch: int | None) -> None:
    seen = observation(batch, ("webcam",))
    with Server(served()) as server, PolicyClient(port=server.port) as unasked, PolicyClient(port=server.port) as client:
        first = [unasked.get_action(seen), unasked.get_action(nested_observation(seen)[0])]
        assert [request["endpoint"] for request in server.requests] == ["get_modality_config", "get_action", "get_action"]
        assert client.get_modality_config() == ArithmeticPolicy().get_modality_config()
        assert client.get_metadata() is None
        client.reset()
        actions = client.get_action(seen)
    expected = ArithmeticPolicy().get_action({key: np.float32(value) if key.startswith("state.") else value for key, value in seen.items()})
    assert_same(actions, expected)
    assert_same(first[0], expected)
    assert_same({key: value if batch else value[0] for key, value in first[1].items()}, expected)
    assert actions["action.single_arm"].shape == ((HORIZON, 5) if batch is None else (batch, HORIZON, 5))


def test_our_own_ends_with_an_n1d7_checkpoint(tmp_path: Path) -> None:
    """Metadata, history, noise and a prefix travel as ever; over HTTP both forms of observations."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", frame_offsets=(-2, 0))
    policy = load_policy(checkpoint, device="cpu", precision="fp32")
    generator = np.random.default_rng(0)
    seen = {
        "video.webcam": generator.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8),
        "state.single_arm": generator.uniform(-30, 30, (1, 5)).astype(np.float32),
        "state.gripper": np.full((1, 1), 20, np.float32),
        "annotation.human.task_description": ["pick"],
    }
    noise = generator.standard_normal((1, *policy.chunk_shape)).astype(np.float32)
    expected = policy.get_action(seen, noise=noise)
    known = ActionPrefix({key: value[4:] for key, value in expected.items()}, 2, "prefix")
    continued = policy.get_action(seen, noise=noise, prefix=known)
    with running(PolicyServer(policy, port=0)) as server:
        remote = connect(f"tcp://127.0.0.1:{server.port}", None, 20.0, 1.0, echo=lambda _: None)
        assert remote.metadata.state_widths == policy.metadata.state_widths
        assert (remote.metadata.fps, remote.metadata.resolutions) == (None, {"webcam": None})
        assert remote.get_modality_config()["video"].delta_indices == [-2, 0]
        remote.close()
        with PolicyClient(port=server.port) as client, Client(server.port) as nvidias:
            actions = client.get_modality_config()["action"].action_configs
            assert (
                actions
                == policy.get_modality_config()["action"].action_configs
                == nvidias.call("get_modality_config", requires_input=False)["action"]["as_json"]["action_configs"]
            )
            assert [each["rep"] for each in actions] == ["RELATIVE", "ABSOLUTE"]
            assert client.get_action(seen)["action.single_arm"].shape == (16, 5)
            assert_same(client.get_action(seen, noise=noise), expected)
            nested = nested_observation(seen)[0]
            assert_same({key: value[0] for key, value in client.get_action(nested, noise=noise).items()}, expected)
            assert_same(client.get_action(seen, noise=noise, prefix=known), continued)
    seeded = [load_policy(checkpoint, device="cpu", precision="fp32", seed=3) for _ in range(2)]
    with running(HttpPolicyServer(seeded[0], port=0)) as server:
        for given in (seen, nested_observation(seen)[0]):
            status, actions = n1d5.http_post(f"{server.address}/act", {"observation": given})
            assert status == 200
            assert_same(actions, seeded[1].get_action(given))


def test_a_server_with_an_n1d7_checkpoint_is_the_policy_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the simulated arm; of one on the virtual bus: tests/test_end_to_end.py. The pre-flight knows what the server's checkpoint was trained on."""
    pytest.importorskip("mujoco")
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", frame_offsets=(-5, 0))
    policy = load_policy(checkpoint, device="cpu", precision="fp32", seed=0)
    camera = "--robot.cameras={front: {type: sim, width: 64, height: 48}}"
    with running(PolicyServer(policy, port=0)) as server:
        argv = ["--robot.type=so100_sim", camera, "--lang_instruction=pick", "--timeout=1", f"--server=tcp://127.0.0.1:{server.port}"]
        assert run([*argv, f"--out={tmp_path / 'out'}"]) == 0
        assert "does not say at which rate" in capsys.readouterr().out
        assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["ticks"] >= 5
        two = "--robot.cameras={top: {type: sim, width: 64, height: 48}, side: {type: sim, width: 64, height: 48}}"
        assert run([*argv, two]) == 1
        assert "webcam" in capsys.readouterr().err


@pytest.mark.parametrize(
    "array",
    [
        {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"pickle"},
        {b"nd": True, b"type": "|O", b"kind": b"", b"shape": [1], b"data": b"\0" * 8},
        {b"nd": True, b"type": [["a", "<f4"]], b"kind": b"V", b"shape": [1], b"data": b"\0" * 4},
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": b"\0" * 4},
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [-1], b"data": b""},
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": "2", b"data": b"\0" * 8},
        {b"nd": True},
        {"__ModalityConfig__": True, "as_json": {"delta_indices": ["0"], "modality_keys": []}},
        {"__ModalityConfig__": True},
    ],
)
def test_what_no_client_sends_is_refused(array: Any) -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb({"data": array}))


def test_arrays_survive_in_the_form_of_n1d7() -> None:
    for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3)), np.array(["a", "bc"]), np.arange(6).reshape(2, 3).T, np.float64(3)):
        for made in (decode(encode({"a": np.asarray(array)}, n1d7=True))["a"], decode(pack({"a": np.asarray(array)}))["a"]):
            assert np.array_equal(made, array)
            assert made.dtype == np.asarray(array).dtype
    assert unpack(encode([{"a": np.arange(3)}, {}], n1d7=True))[0]["a"].tolist() == [0, 1, 2]
    with pytest.raises(WireError, match="not dtype object"):
        encode({"a": np.array([object()])}, n1d7=True)
