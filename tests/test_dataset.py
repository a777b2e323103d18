"""Observations for calibration and verification: spread over all episodes, checked, and the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from random_networks import PICTURE, write_network

from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.contracts import PolicyMetadata
from gr00t_fast.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import MIN_EPISODES, RandomFrames, draw, open_frames, read, textured_picture

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
    last = frames[7]
    assert last["video.webcam"].shape == (1, PICTURE[1], PICTURE[0], 3)
    assert last["video.webcam"].max() == 1
    assert last["state.gripper"].tolist() == [[4.0]]
    assert last[CONFIG.language_key] == ["task 1"]
    assert frames[2]["state.gripper"].tolist() == [[2.0]]
    assert frames[2][CONFIG.language_key] == ["task 0"]


def test_frames_are_drawn_from_everywhere(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [40] * 10)), CONFIG, metadata)
    sample = draw(frames, 128, seed=3, allow_few=False)
    assert len(set(sample.indices)) == 128
    assert sample.episodes == 10
    assert not sample.warnings
    places = np.array(sample.indices) % 40
    assert places.min() < 5
    assert places.max() > 34
    assert abs(places.mean() - 19.5) < 4
    assert draw(frames, 128, seed=3, allow_few=False) == sample != draw(frames, 128, seed=4, allow_few=False)


def test_too_little_is_refused_or_said(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [60, 60, 60])), CONFIG, metadata)
    with pytest.raises(ConfigError, match=f"3 episodes, expected at least {MIN_EPISODES}"):
        draw(frames, 128, seed=0, allow_few=False)
    with pytest.raises(ConfigError, match="20 frames, expected at least 128"):
        draw(frames, 20, seed=0, allow_few=False)
    sample = draw(frames, 20, seed=0, allow_few=True)
    assert len(sample.warnings) == 2
    assert sample.describe()["frames"] == 20


def test_joints_of_another_robot_are_refused(tmp_path: Path, metadata: PolicyMetadata) -> None:
    frames = open_frames(str(_record(tmp_path, metadata, [6, 6], shift=2000.0)), CONFIG, metadata)
    sample = draw(frames, 12, seed=0, allow_few=True)
    with pytest.raises(ConfigError, match="far outside the checkpoint's training range"):
        list(read(frames, sample, metadata))


def test_a_recording_without_a_camera_is_refused(tmp_path: Path, metadata: PolicyMetadata) -> None:
    np.savez(tmp_path / "a.npz", **{"state.single_arm": np.zeros((2, 5))})
    with pytest.raises(ConfigError, match=r"video\.webcam, state\.gripper.* missing"):
        open_frames(str(tmp_path), CONFIG, metadata)
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=r"not a readable \.npz"):
        open_frames(str(tmp_path), CONFIG, metadata)


@pytest.mark.parametrize("source", ["random:", "random:-1", "random:x", "nowhere"])
def test_other_sources_are_refused(source: str, metadata: PolicyMetadata) -> None:
    with pytest.raises(ConfigError):
        open_frames(source, CONFIG, metadata)


def test_synthetic_observations_are_textured_within_range_and_say_what_they_are(metadata: PolicyMetadata) -> None:
    frames = RandomFrames(5, CONFIG, metadata)
    one, again, other = frames[0], RandomFrames(5, CONFIG, metadata)[0], frames[1]
    assert (one["video.webcam"] == again["video.webcam"]).all()
    assert (one["video.webcam"] != other["video.webcam"]).any()
    picture = textured_picture(np.random.default_rng(0), 64, 48).astype(np.float64)
    neighbours = np.abs(np.diff(picture, axis=1)).mean()
    assert picture.std() > 20
    assert 1 < neighbours < picture.std()
    for part, statistics in metadata.state_statistics.items():
        assert (one[f"state.{part}"] >= statistics.min).all()
        assert (one[f"state.{part}"] <= statistics.max).all()
    sample = draw(frames, 128, seed=0, allow_few=False)
    assert sample.synthetic
    assert any("synthetic" in warning for warning in sample.warnings)


class _Table(list):
    """Stands in for a LeRobotDataset: rows, and the lengths of episodes."""

    def __init__(self, rows: list[dict], lengths: list[int]) -> None:
        super().__init__(rows)
        self.meta = type("Meta", (), {"episodes": {"length": lengths}})


@pytest.fixture
def lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    from gr00t_fast.inputs import dataset

    rows = [
        {
            "observation.images.front": torch.full((3, 4, 6), t / 255),
            "observation.images.side": torch.full((3, 4, 6), 1.0),
            "observation.state": torch.arange(6.0) + t,
            "task": f"do {t}",
        }
        for t in range(4)
    ]
    module = type("Module", (), {"LeRobotDataset": staticmethod(lambda *_, **__: _Table(rows, [2, 2]))})
    monkeypatch.setattr(dataset, "require", lambda *_: module)
    features = {name: {} for name in rows[0] if name.startswith("observation")}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "features": features}))
    return tmp_path


def test_a_lerobot_data_set_in_the_policys_keys(lerobot: Path, metadata: PolicyMetadata) -> None:
    with pytest.raises(ConfigError, match=r"no camera for 'webcam'.*front, side.*--camera_map"):
        open_frames(str(lerobot), CONFIG, metadata)
    frames = open_frames(str(lerobot), CONFIG, metadata, {"front": "webcam"})
    third = frames[3]
    assert third["video.webcam"].shape == (1, 4, 6, 3)
    assert third["video.webcam"].dtype == np.uint8
    assert (third["video.webcam"] == 3).all()
    assert third["state.single_arm"].tolist() == [[3, 4, 5, 6, 7]]
    assert third["state.gripper"].tolist() == [[8]]
    assert third[CONFIG.language_key] == ["do 3"]
    assert frames.episode_lengths == [2, 2]


def test_nvidias_modality_file_says_which_columns_and_cameras(lerobot: Path, metadata: PolicyMetadata) -> None:
    told = {"state": {"single_arm": {"start": 1, "end": 6}, "gripper": {"start": 0, "end": 1}}}
    told["video"] = {"webcam": {"original_key": "observation.images.side"}}
    (lerobot / "meta" / "modality.json").write_text(json.dumps(told))
    first = open_frames(str(lerobot), CONFIG, metadata)[0]
    assert first["state.gripper"].tolist() == [[0]]
    assert first["state.single_arm"].tolist() == [[1, 2, 3, 4, 5]]
    assert (first["video.webcam"] == 255).all()


def test_an_old_data_set_is_refused(lerobot: Path, metadata: PolicyMetadata) -> None:
    (lerobot / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1", "features": {}}))
    with pytest.raises(ConfigError, match=r"v2\.1, expected v3"):
        open_frames(str(lerobot), CONFIG, metadata)
