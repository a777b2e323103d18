"""What a checkpoint says about the robot it was trained on, from its small files: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.checkpoint.load import Checkpoint, open_checkpoint
from gr00t_fast.checkpoint.processor_n1d7 import EmbodimentN1d7
from gr00t_fast.contracts import PartStatistics, PolicyMetadata
from gr00t_fast.errors import ConfigError
from gr00t_fast.inputs.data_config import DataConfig, check_trained_cameras, load_data_config
from gr00t_fast.inputs.embodiment import EmbodimentMetadata
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform

_STATISTICS = (("min", "min"), ("max", "max"), ("q01", "min"), ("q99", "max"))  # name, and what stands for it in files that lack it


def read_policy_metadata(
    model_path: str | Path,
    embodiment_tag: str,
    data_config: str | DataConfig | None = None,
    revision: str | None = None,
    letterbox: str = "auto",
) -> PolicyMetadata:
    """Metadata of a checkpoint whose network runs elsewhere. Raises ConfigError and CheckpointError as loading it would; weights may be absent."""
    checkpoint = open_checkpoint(model_path, with_weights=False, revision=revision, letterbox=letterbox)
    config = checked_data_config(checkpoint, embodiment_tag, data_config)
    if checkpoint.processor is not None:
        return policy_metadata_of_n1d7(checkpoint.embodiment_n1d7(embodiment_tag))
    metadata, head = checkpoint.embodiment(embodiment_tag), checkpoint.config.head
    check_trained_cameras(config, metadata.cameras)
    state, action = StateTransform(config, metadata, head.state_dim), ActionTransform(config, metadata, head.action_dim)
    return policy_metadata_of(metadata, config, state.widths, action.widths, head.action_horizon)


def checked_data_config(checkpoint: Checkpoint, embodiment_tag: str, given: str | DataConfig | None) -> DataConfig:
    """What the checkpoint reads: an N1.5 one what is given, by default so100; an N1.7 one says it itself. Raises ConfigError, also for what
    contradicts that, and CheckpointError."""
    if checkpoint.processor is None:
        return load_data_config(given)
    own = data_config_of(checkpoint.embodiment_n1d7(embodiment_tag))
    if given is not None:
        check_data_config(load_data_config(given), own)
    return own


def policy_metadata_of(
    metadata: EmbodimentMetadata, config: DataConfig, state_widths: Mapping[str, int], action_widths: Mapping[str, int], trained_horizon: int
) -> PolicyMetadata:
    """Metadata for the pre-flight check. Widths by key (`state.gripper`)."""
    cameras = {key: metadata.cameras[key] for key in config.video_keys}
    return PolicyMetadata(
        embodiment_tag=metadata.tag,
        fps=next(iter(cameras.values())).fps,
        resolutions={_bare(key): (camera.width, camera.height) for key, camera in cameras.items()},
        state_widths={_bare(key): width for key, width in state_widths.items()},
        action_widths={_bare(key): width for key, width in action_widths.items()},
        state_statistics={_bare(key): _part(metadata.statistics[key]) for key in config.state_keys},
        action_statistics={_bare(key): _part(metadata.statistics[key]) for key in config.action_keys},
        trained_horizon=trained_horizon,
    )


def policy_metadata_of_n1d7(embodiment: EmbodimentN1d7) -> PolicyMetadata:
    """N1.7's files say neither the rate nor the resolution of the recordings."""

    def statistics(modality: str, names: list[str]) -> dict[str, PartStatistics]:
        return {name: _part(embodiment.statistics[f"{modality}.{name}"]) for name in names}

    return PolicyMetadata(
        embodiment_tag=embodiment.tag,
        fps=None,
        resolutions=dict.fromkeys(embodiment.cameras),
        state_widths={part.name: part.width for part in embodiment.state},
        action_widths={part.name: part.width for part in embodiment.action},
        state_statistics=statistics("state", [part.name for part in embodiment.state]),
        action_statistics=statistics("action", [part.name for part in embodiment.action]),
        trained_horizon=embodiment.action_steps,
        letterbox=embodiment.letterbox,
    )


def data_config_of(embodiment: EmbodimentN1d7) -> DataConfig:
    """The key lists of processor_config.json in the form that N1.5's have."""
    return DataConfig(
        video_keys=tuple(f"video.{camera}" for camera in embodiment.cameras),
        state_keys=tuple(f"state.{part.name}" for part in embodiment.state),
        action_keys=tuple(f"action.{part.name}" for part in embodiment.action),
        language_key=embodiment.language_key,
        action_indices=tuple(range(embodiment.action_steps)),
        video_indices=embodiment.frame_offsets,
        state_indices=embodiment.state_offsets,
    )


def check_data_config(given: DataConfig, own: DataConfig) -> None:
    """Raises ConfigError when a data configuration that was given contradicts the checkpoint's own."""
    lists = {"video": "video_keys", "state": "state_keys", "action": "action_keys"}
    wrong = [
        f"{modality} {', '.join(getattr(given, name))} (the checkpoint: {', '.join(getattr(own, name))})"
        for modality, name in lists.items()
        if set(getattr(given, name)) != set(getattr(own, name))
    ]
    if given.language_key != own.language_key:
        wrong.append(f"language {given.language_key} (the checkpoint: {own.language_key})")
    if wrong:
        raise ConfigError(f"the data config contradicts processor_config.json: {'; '.join(wrong)}. Leave --data_config out.")


def _bare(key: str) -> str:
    """`video.webcam` -> `webcam`."""
    return key.split(".", 1)[1]


def _part(statistics: Mapping[str, np.ndarray]) -> PartStatistics:
    return PartStatistics(*(statistics.get(name, statistics[instead]) for name, instead in _STATISTICS))
