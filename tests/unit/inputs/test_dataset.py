"""Observations for calibration and verification: spread over all episodes, checked, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_networks import PICTURE, write_network

from gr00t_fast.base.contracts import PolicyMetadata
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import MIN_EPISODES, draw, open_frames, read

CONFIG = DATA_CONFIGS["so100"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> PolicyMetadata:
    return read_policy_metadata(write_network(tmp_path_factory.mktemp("checkpoint")), "new_embodiment", "so100")


def _record(directory: Path, metadata: PolicyMetadata, lengths: list[int], shift: float = 0.0) -> Path:
    """Frame t of episode e is flat grey of value e, and its gripper is at t."""
    directory.mkdir(parents=True, exist_ok=True)
    for episode, length in enumerate(lengths):
        arm = metadata.state_statistics["single_arm"]
        np.savez_compressed(
            directory / f"{episode:03d}.npz",
            **{
                "video.webcam": np.full((length, PICTURE[1], PICTURE[0], 3), episode, np.uint8),
                "state.single_arm": np.tile((arm.min + arm.max) / 2 + shift, (length, 1)),
                "state.gripper": np.arange(length, dtype=np.float64)[:, None],
                CONFIG.language_key: np.array(f"task {episode}"),
            },
        )
    return directory


def test_recordings_come_back_frame_by_frame(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [3, 5])), CONFIG, metadata)
    assert frames.episode_lengths == [3, 5]
    assert (frames[7]["video.webcam"].shape, frames[7]["video.webcam"].max()) == ((1, PICTURE[1], PICTURE[0], 3), 1)
    assert [frames[row]["state.gripper"].tolist() for row in (2, 7)] == [[[2.0]], [[4.0]]]
    assert [frames[row][CONFIG.language_key] for row in (2, 7)] == [["task 0"], ["task 1"]]


def test_too_little_is_refused_or_said(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [60, 60, 60])), CONFIG, metadata)
    for count, named in ((128, f"3 episodes.*{MIN_EPISODES}"), (20, "20 frames.*128")):
        with pytest.raises(ConfigError, match=named):
            draw(frames, count, seed=0, allow_few=False)
    sample = draw(frames, 20, seed=0, allow_few=True)
    assert len(sample.warnings) == 2
    assert sample.describe()["frames"] == 20


def test_joints_of_another_robot_are_refused(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [6, 6], shift=2000.0)), CONFIG, metadata)
    sample = draw(frames, 12, seed=0, allow_few=True)
    with pytest.raises(ConfigError, match="far outside"):
        list(read(frames, sample, metadata))


def test_sources_that_cannot_be_used_are_refused(tmp_path: Path, metadata: PolicyMetadata) -> None:
    (tmp_path / "lacking").mkdir()
    np.savez(tmp_path / "lacking" / "a.npz", **{"state.single_arm": np.zeros((2, 5))})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.npz").write_bytes(b"PK nothing")
    named = {"lacking": r"video\.webcam, state\.gripper", "damaged": r"a\.npz", "nowhere": "nowhere"}
    sources = {str(tmp_path / name): words for name, words in named.items()} | dict.fromkeys(("random:", "random:-1", "random:x"), "random:SEED")
    for source, words in sources.items():
        with pytest.raises(ConfigError, match=words):
            open_frames(source, CONFIG, metadata)
