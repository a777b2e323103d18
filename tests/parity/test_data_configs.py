"""States and actions of every data configuration against NVIDIA's transforms: recorded figures, and live where the gr00t package is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import data_configs as golden
from random_networks import write_json, write_network

from gr00t_fast import load_policy
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.inputs.data_config import DATA_CONFIGS, load_data_config
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.networks.n1d5 import MetadataFile

cases = pytest.mark.parametrize(("name", "seed"), golden.SEEDS.items(), ids=list(golden.SEEDS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("configs"))


def _ours(checkpoint: Path, name: str, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """State and actions."""
    config = golden.CASES[name]
    statistics = golden.statistics_of(config, seed)
    states, output = golden.values_of(config, statistics, seed)
    sizes = open_checkpoint(checkpoint).config
    sizes = replace(sizes, head=replace(sizes.head, state_dim=64, action_dim=golden.WIDTH))
    embodiment = MetadataFile({"new_embodiment": golden.metadata_of(config, statistics)}, sizes).embodiment("new_embodiment", config)
    return StateTransform(embodiment)(states), ActionTransform(embodiment)(output)


@cases
def test_equal_to_the_recorded_figures(checkpoint: Path, seed: int, name: str) -> None:
    """Bit for bit: the reference computes states in float64 and rounds them to the network's type, actions in float32."""
    state, actions = _ours(checkpoint, name, seed)
    with np.load(golden.FIGURES) as figures:
        theirs = figures[f"{name}/state"][:, 0].astype(np.float32)
        np.testing.assert_array_equal(state[:, : theirs.shape[1]], theirs)
        assert not state[:, theirs.shape[1] :].any(), "what is beyond the state is padding"
        assert theirs.any()
        for key in golden.CASES[name].action_keys:
            np.testing.assert_array_equal(actions[key], figures[f"{name}/{key}"])


@cases
def test_through_a_policy(checkpoint: Path, seed: int, name: str) -> None:
    """From an observation to what the network reads, and from its output to the parts, batched."""
    config = golden.CASES[name]
    statistics = golden.statistics_of(config, seed)
    states, output = golden.values_of(config, statistics, seed)
    write_json(checkpoint / "experiment_cfg" / "metadata.json", {"new_embodiment": golden.metadata_of(config, statistics)})
    policy = load_policy(checkpoint, data_config=config if name == "every_mode" else name, device="cpu", precision="fp32")
    frames = {key: np.full((golden.BATCH, 1, 480, 640, 3), 90, np.uint8) for key in config.video_keys}
    observation = {**frames, **states, config.language_key: ["go"] * golden.BATCH}
    inputs, actions = policy.apply_transforms(observation), policy.get_action(observation)
    assert {key: rows.shape for key, rows in actions.items()} == {key: (golden.BATCH, 16, golden.width_of(config, key)) for key in config.action_keys}
    with np.load(golden.FIGURES) as figures:
        theirs = figures[f"{name}/state"].astype(np.float32)
        np.testing.assert_array_equal(inputs["state"][:, :, : theirs.shape[2]], theirs)
        np.testing.assert_array_equal(inputs["state_mask"].sum(-1), np.full((golden.BATCH, 1), theirs.shape[2]))
        for key, rows in policy.unapply_transforms({"action": torch.from_numpy(output)}).items():
            np.testing.assert_array_equal(rows, figures[f"{name}/{key}"])


@cases
def test_the_figures_are_what_the_installed_package_computes(seed: int, name: str) -> None:
    pytest.importorskip("gr00t.data.transform.concat")
    with np.load(golden.FIGURES) as figures:
        for key, values in golden.reference(golden.CASES[name], seed).items():
            np.testing.assert_array_equal(values, figures[f"{name}/{key}"])


def test_the_installed_packages_own_classes_are_read_as_the_built_in_names() -> None:
    theirs = pytest.importorskip("gr00t.experiment.data_config")
    for name in theirs.DATA_CONFIG_MAP.keys() & DATA_CONFIGS.keys():
        assert load_data_config(theirs.DATA_CONFIG_MAP[name]) == DATA_CONFIGS[name]
