"""What a checkpoint says about the robot it was trained on, from its small files: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.checkpoint import EmbodimentMetadata, open_checkpoint
from gr00t_fast.contracts import PartStatistics, PolicyFacts
from gr00t_fast.data_config import DataConfig, check_trained_cameras, load_data_config
from gr00t_fast.transforms import ActionTransform, StateTransform

_STATISTICS = (("min", "min"), ("max", "max"), ("q01", "min"), ("q99", "max"))  # name, and what stands for it in files that lack it


def read_facts(model_path: str | Path, embodiment_tag: str, data_config: str | DataConfig, revision: str | None = None) -> PolicyFacts:
    """Facts of a checkpoint whose network runs elsewhere. Raises ConfigError and CheckpointError as loading it would; weights may be absent."""
    checkpoint, config = open_checkpoint(model_path, with_weights=False, revision=revision), load_data_config(data_config)
    metadata, head = checkpoint.embodiment(embodiment_tag), checkpoint.config.head
    check_cameras(metadata, config)
    state, action = StateTransform(config, metadata, head.state_dim), ActionTransform(config, metadata, head.action_dim)
    return facts_of(metadata, config, state.widths, action.widths, head.action_horizon)


def check_cameras(metadata: EmbodimentMetadata, config: DataConfig) -> None:
    """Raises ConfigError when the data configuration reads cameras that training did not have."""
    check_trained_cameras(config, metadata.cameras)


def facts_of(
    metadata: EmbodimentMetadata, config: DataConfig, state_widths: Mapping[str, int], action_widths: Mapping[str, int], trained_horizon: int
) -> PolicyFacts:
    """The facts for the pre-flight check. Widths by key (`state.gripper`)."""
    cameras = {key: metadata.cameras[key] for key in config.video_keys}
    return PolicyFacts(
        embodiment_tag=metadata.tag,
        fps=next(iter(cameras.values())).fps,
        resolutions={_bare(key): (camera.width, camera.height) for key, camera in cameras.items()},
        state_widths={_bare(key): width for key, width in state_widths.items()},
        action_widths={_bare(key): width for key, width in action_widths.items()},
        state_statistics={_bare(key): _part(metadata.statistics[key]) for key in config.state_keys},
        action_statistics={_bare(key): _part(metadata.statistics[key]) for key in config.action_keys},
        trained_horizon=trained_horizon,
    )


def _bare(key: str) -> str:
    """`video.webcam` -> `webcam`."""
    return key.split(".", 1)[1]


def _part(statistics: Mapping[str, np.ndarray]) -> PartStatistics:
    return PartStatistics(*(statistics.get(name, statistics[instead]) for name, instead in _STATISTICS))
