"""A further network is one file: this one describes a toy, and runs it through load_policy, eager, ONNX and the server.

Its checkpoints have a configuration, names of weights, a file about the robot and a chat template of their own; the layers are those of N1.5.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import make_export
from safetensors.torch import save_file
from serving_fakes import running

from gr00t_fast import load_policy
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import Arithmetic, Camera, Embodiment, Part
from gr00t_fast.inputs.prompt import PromptForm
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.networks import NETWORKS, n1d5
from gr00t_fast.networks.spec import read_object, rows
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

# The description, which would be gr00t_fast/networks/toy.py

_ARITHMETIC = Arithmetic(forward=np.float32, inverse=np.float32, close=False, clip_actions=True, keep_constant=True)


@dataclass(frozen=True)
class RobotFile:
    """robot.json: one robot, its cameras and the range of each joint."""

    raw: Mapping[str, Any]
    config: ModelConfig

    @property
    def tags(self) -> Collection[str]:
        return (self.raw["robot"],)

    def row_of(self, tag: str) -> int:
        if tag not in self.tags:
            raise ConfigError(f"unknown embodiment_tag '{tag}'. This checkpoint has: {self.raw['robot']}.")
        return 0

    def embodiment(self, tag: str, data_config: DataConfig | None) -> Embodiment:
        cameras = {f"video.{name}": Camera(*size, fps=30.0) for name, size in self.raw["cameras"].items()}
        state, action = (tuple(self._part(f"{kind}.{name}", limits) for name, limits in self.raw["joints"].items()) for kind in ("state", "action"))
        keys = [tuple(part.key for part in parts) for parts in (state, action)]
        head = self.config.head
        return Embodiment(
            tag,
            self.row_of(tag),
            DataConfig(tuple(cameras), *keys),
            cameras,
            state,
            action,
            _ARITHMETIC,
            head.action_horizon,
            head.state_dim,
            self.raw,
        )

    @staticmethod
    def _part(key: str, limits: Mapping[str, list[float]]) -> Part:
        statistics = {name: np.array(limits[name]) for name in ("min", "max")}
        return Part(key, "min_max", statistics["min"], statistics["max"], statistics)


TOY = replace(
    n1d5.N1D5,
    name="toy",
    model_type="toy_vla",
    read_config=lambda config, backbone: n1d5.read_config(config["sizes"], config["tower"]),
    weights={name: rows(f"toy.{name}") for name in n1d5.WEIGHTS},
    unused_weights=(),
    read_files=lambda path, config, sizes, letterbox: RobotFile(read_object(path / "robot.json"), sizes),
    prompt=PromptForm(
        n1d5.IMAGE_TOKEN, lambda words, images, tokens: f"{n1d5.IMAGE_TOKEN * tokens * images}{words}!", False, ("words",), "toy/toy", "toy"
    ),
    download=("robot.json",),
)

# What a user does with it


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint of the toy's."""
    published, directory = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("toy")
    write_random_checkpoint(published, "tiny", dtype=torch.float32)
    model = load_model(open_checkpoint(published), "new_embodiment", torch.device("cpu"), torch.float32)
    sizes, tower = (json.loads((published / file).read_text()) for file in (n1d5.CONFIG_FILE, n1d5.BACKBONE_FILE))
    joints = {"single_arm": {"min": [-90.0] * 5, "max": [90.0] * 5}, "gripper": {"min": [0.0], "max": [100.0]}}
    (directory / "config.json").write_text(json.dumps({"model_type": "toy_vla", "sizes": sizes, "tower": tower}))
    (directory / "robot.json").write_text(json.dumps({"robot": "toy_arm", "cameras": {"top": [64, 48]}, "joints": joints}))
    (directory / "words").mkdir()
    (published / "eagle2_hg_model" / "tokenizer.json").rename(directory / "words" / "tokenizer.json")
    save_file(_published(model), directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, TOY.model_type, TOY)
        yield directory


def _published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the toy's names."""
    return {f"toy.{name}": parameter.contiguous() for name, parameter in model.named_parameters()}


def seen() -> dict[str, Any]:
    frame = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8)
    return {
        "video.top": frame,
        "state.single_arm": np.zeros((1, 5)),
        "state.gripper": np.full((1, 1), 50.0),
        "annotation.human.task_description": ["pick"],
    }


@pytest.mark.slow
def test_a_network_of_its_own_runs_everywhere(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("zmq")
    from gr00t_fast.serving.client import PolicyClient
    from gr00t_fast.serving.server import PolicyServer

    options = {"embodiment_tag": "toy_arm", "device": "cpu", "precision": "fp32"}
    policy = load_policy(toy, **options, denoising_steps=3)
    assert (policy.checkpoint.network, policy.metadata.resolutions, policy.action_horizon) == (TOY, {"top": (64, 48)}, 16)
    noise = np.random.default_rng(1).standard_normal((1, *policy.chunk_shape)).astype(np.float32)
    eager = policy.get_action(seen(), noise=noise)
    assert {key: value.shape for key, value in eager.items()} == {"action.single_arm": (16, 5), "action.gripper": (16, 1)}
    assert all(np.ptp(value) > 0 and np.abs(value).max() <= 100.0 for value in eager.values())

    export = make_export(toy, tmp_path / "onnx", data_config=None, tag="toy_arm")
    exported = load_policy(toy, **options, engine="onnxruntime", engine_path=export, denoising_steps=3)
    for key, value in exported.get_action(seen(), noise=noise).items():
        np.testing.assert_allclose(value, eager[key], atol=1e-2)

    with running(PolicyServer(policy, port=0)) as server, PolicyClient("127.0.0.1", server.port) as client:
        assert client.get_modality_config() == policy.get_modality_config()
        for key, value in client.get_action(seen(), noise=noise).items():
            np.testing.assert_array_equal(value, eager[key])
