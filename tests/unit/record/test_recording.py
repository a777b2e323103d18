"""Runs as data sets: what a recording leaves when all is well, when the disk is full, when a camera changes and when the program is killed.

tests/realtime/test_recorded_circle.py goes the whole circle with the real program on the simulated arm.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recorded import entries, info, left_beside, read_back
from waiting import beside, is_there, until

from gr00t_fast.base.contracts import SO100_JOINTS, Observation
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import is_running
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.cli import replay
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import draw, open_frames, read
from gr00t_fast.record import recorder as recording
from gr00t_fast.record.recorder import ROLLOUTS, SUCCESS, DatasetRecorder, dataset_directory, modality_of
from gr00t_fast.record.session import Session

pytest.importorskip("lerobot")
ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "checkpoints" / "so100-sim-reach"
SIZE = (48, 64, 3)


def seen(tick: int, size: tuple[int, ...] = SIZE) -> Observation:
    """Joints and a picture that tell the tick."""
    return Observation(np.arange(6.0) + tick, {"front": np.full(size, 10 + 4 * tick, np.uint8)}, 0.0)


def recorder_in(out: Path, said: list[str], append: bool = False) -> DatasetRecorder:
    return DatasetRecorder(out, append, SO100_JOINTS, said.append)


def opened(recorder: DatasetRecorder, fps: float = 30.0) -> DatasetRecorder:
    recorder.set_rate(fps)
    recorder.wait_until_ready()
    parts = {"single_arm": 5, "gripper": 1}
    recorder.open(seen(0), "so100_follower", "degrees", modality_of(parts, parts, SO100_JOINTS, {"front": "webcam"}), {"model_path": "here"})
    return recorder


def play(recorder: DatasetRecorder, ticks: int, task: str = "lift", **outcome: object) -> None:
    recorder.begin(task)
    for tick in range(ticks):
        recorder.add(seen(tick), np.arange(6.0) - tick)
        time.sleep(0.005)
    recorder.end(success=None, ended_by="the time limit")
    recorder.save(**{"success": None, "ended_by": "the time limit", **outcome})


def settled(recorder: DatasetRecorder) -> None:
    until(lambda: not recorder.busy)


@pytest.mark.slow
def test_rows_and_outcomes_come_back_by_lerobots_loader(tmp_path: Path) -> None:
    out, said = tmp_path / "data", []
    with recorder_in(out, said) as recorder:
        opened(recorder)
        play(recorder, 12, "lift", success=True)
        settled(recorder)
        play(recorder, 20, "forgotten")
        recorder.begin("forgotten too")
        recorder.add(seen(3), np.zeros(6))
        recorder.discard()
        play(recorder, 1, "too short for lerobot")
        settled(recorder)
        play(recorder, 7, "put down", success=False)
    assert (recorder.failure, recorder.episodes, recorder.lost_ticks) == (None, [0, 1, 2], 0)
    assert sum("one frame" in line for line in said) == 1, said
    rows = read_back(out)
    assert [int(row["episode_index"]) for row in rows] == [0] * 12 + [1] * 20 + [2] * 7
    assert [row["task"] for row in rows[::12]] == ["lift", "forgotten", "forgotten", "put down"]
    assert [bool(row[SUCCESS]) for row in rows] == [index == 11 for index in range(39)]
    for tick, row in [*enumerate(rows[:12]), *enumerate(rows[32:])]:
        assert np.allclose(row["observation.state"], np.arange(6.0) + tick)
        assert np.allclose(row["action"], np.arange(6.0) - tick)
        assert abs(float(row["observation.images.front"].mean()) * 255 - (10 + 4 * tick)) < 3  # compressed
    assert [entry["success"] for entry in entries(out)] == [True, None, False]
    assert info(out)["robot_type"] == "so100_follower"
    assert left_beside(out) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "data"
    with recorder_in(out, []) as recorder:
        play(opened(recorder), 6)
        play(recorder, 5, task="")
    return out


@pytest.fixture
def two_episodes(whole: Path, tmp_path: Path) -> Path:
    """A data set of 11 rows; the second episode does not say what was done."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.mark.slow
def test_a_data_set_that_exists_is_kept_or_continued(two_episodes: Path) -> None:
    for taken in (two_episodes / "meta" / "info.json", two_episodes / "data"):  # a file, other files
        with pytest.raises(ConfigError, match="--record"):
            recorder_in(taken, [], append=True)
    with pytest.raises(ConfigError, match="--record_append"):
        recorder_in(two_episodes, [])
    with pytest.raises(ConfigError, match="frames a second"):
        recorder_in(two_episodes, [], append=True).set_rate(50.0)
    with pytest.raises(ConfigError, match=r"observation\.state is 6"):
        DatasetRecorder(two_episodes, True, ("left", "right"), print).set_rate(30.0)
    with recorder_in(two_episodes, [], append=True) as recorder:
        recorder.set_rate(30.0)
        with pytest.raises(ConfigError, match=r"images\.front is 48 x 64 x 3"):
            recorder.open(seen(0, (24, 32, 3)), "so100_follower", "degrees", None, {})
        play(opened(recorder), 6)
    assert [int(row["episode_index"]) for row in read_back(two_episodes)] == [0] * 6 + [1] * 5 + [2] * 6


def test_recorded_frames_in_the_policys_keys(two_episodes: Path) -> None:
    """As calibration and verification read them."""
    metadata, config = read_policy_metadata(CHECKPOINT, "new_embodiment", "so100"), DATA_CONFIGS["so100"]
    frames = open_frames(str(two_episodes), config, metadata)
    assert frames.episode_lengths == [6, 5]
    assert frames[2][config.language_key] == ["lift"]
    for row, tick in ((2, 2), (8, 2), (10, 4)):
        found = frames[row]
        assert (found["video.webcam"].shape, found["video.webcam"].dtype) == ((1, *SIZE), np.uint8)
        assert abs(found["video.webcam"].mean() - (10 + 4 * tick)) < 3
        assert (found["state.single_arm"].tolist(), found["state.gripper"].tolist()) == ([list(range(tick, tick + 5))], [[tick + 5]])
    with pytest.raises(ConfigError, match="episode 1.*task"):
        list(read(frames, draw(frames, 11, seed=0, allow_few=True), metadata))
    told = {"state": {"single_arm": {"start": 1, "end": 6}, "gripper": {"start": 0, "end": 1}}}
    (two_episodes / "meta" / "modality.json").write_text(json.dumps(told))
    first = open_frames(str(two_episodes), config, metadata, {"front": "webcam"})[0]
    assert (first["state.single_arm"].tolist(), first["state.gripper"].tolist()) == ([[1, 2, 3, 4, 5]], [[0]])
    with pytest.raises(ConfigError, match=r"no camera for 'webcam'.*front.*--camera_map"):
        open_frames(str(two_episodes), config, metadata, {"side": "webcam"})


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda out: [shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink() for name in names] and None


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda out: (out / name).write_text(text) and None


def _edit(**values: object) -> Callable[[Path], None]:
    return lambda out: (out / "meta" / "info.json").write_text(json.dumps({**info(out), **values})) and None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_edit(total_episodes=1, total_frames=6), "info.json counts 1 episodes"),
        (_edit(total_frames=9), "info.json counts 9 rows"),
        (_edit(features=["action"]), "info.json"),
        (_write("meta/info.json", "{"), "JSON"),
        (lambda out: next((out / "data").rglob("*.parquet")).write_bytes(b"PAR1"), "Parquet|parquet|magic"),
        (lambda out: next((out / "data").rglob("*.parquet")).unlink(), "data/"),
        (lambda out: next((out / "videos").rglob("*.mp4")).unlink(), "videos/"),
        (lambda out: sorted((out / "meta" / "episodes").rglob("*.parquet"))[-1].unlink(), "meta/episodes has 1"),
        (_remove("meta/tasks.parquet"), "tasks.parquet"),
        (_write(ROLLOUTS, '{"episodes": [1]}'), "rollouts.json"),
    ],
)
def test_a_damaged_data_set_is_not_continued(two_episodes: Path, damage: Callable[[Path], None], named: str) -> None:
    """Before the checkpoint is loaded, and nothing in it is changed."""
    out = two_episodes
    recorder_in(out, [], append=True)
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"--record_append: .*data is damaged.*({named}).*another directory"):
        recorder_in(out, [], append=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_writing_process_that_hangs_is_told_and_ended(two_episodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a network directory that is gone: neither the pause between episodes nor the end of the run waits for ever."""
    said: list[str] = []
    monkeypatch.setattr(recording, "SILENT_S", 1.0)
    with recorder_in(two_episodes, said, append=True) as recorder:
        opened(recorder)
        stop = StopSignals()
        session = Session(stop, None, recorder, said.append)
        process = beside()
        os.kill(process, signal.SIGSTOP)
        play(recorder, 3)
        until(lambda: not session.waits)
        assert "not answered for 1 s" in (stop.reason or "")
        assert stop.exit_code == 1
    assert any(recorder.failure in line for line in said)
    until(lambda: not is_running(process))
    assert len(read_back(two_episodes)) == 11


def test_a_run_that_is_refused_waits_for_no_writer(tmp_path: Path) -> None:
    said: list[str] = []
    with recorder_in(tmp_path / "data", said) as recorder:
        process = beside()
    assert (said, recorder.failure, is_running(process)) == ([], None, False)


def test_names_of_data_sets_are_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_LEROBOT_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, place in {"HOME": "{}/.cache/huggingface/lerobot", "XDG_CACHE_HOME": "{}/huggingface/lerobot", "HF_HOME": "{}/lerobot"}.items():
        monkeypatch.setenv(name, str(tmp_path / name))
        assert dataset_directory("me/pick") == Path(place.format(tmp_path / name)) / "me" / "pick"
        inquiry = [sys.executable, "-c", "from lerobot.utils.constants import HF_LEROBOT_HOME as home; print(home)"]
        assert str(dataset_directory("me/pick").parents[1]) == subprocess.check_output(inquiry, text=True).strip(), "where lerobot looks"
    monkeypatch.setenv("HF_LEROBOT_HOME", "/cache")
    assert dataset_directory("me/pick") == Path("/cache/me/pick")
    assert dataset_directory("./me/pick") == Path("me/pick")
    (tmp_path / "me").mkdir()
    assert dataset_directory("me/pick") == Path("me/pick")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux to limit the files of another process")
def test_a_full_disk_costs_one_episode(two_episodes: Path) -> None:
    """Files of the writing process cannot grow any more: as on a disk that is full, in the middle of an episode."""
    said: list[str] = []
    with recorder_in(two_episodes, said, append=True) as recorder:
        opened(recorder).begin("lift")
        for tick in range(10):
            recorder.add(seen(tick), np.zeros(6))
        until(lambda: any(is_there(place, "*.mp4") for place in left_beside(two_episodes)))
        resource.prlimit(beside(), resource.RLIMIT_FSIZE, (200, 200))
        recorder.end(success=None, ended_by="the time limit")
        recorder.save(success=None, ended_by="the time limit")
        until(lambda: recorder.failure or not recorder.busy)
    assert "full" in recorder.failure
    assert any(recorder.failure in line for line in said)
    assert len(read_back(two_episodes)) == 11
    assert left_beside(two_episodes) == []


@pytest.mark.slow
def test_what_an_episode_lasted_and_a_camera_that_changes_size(tmp_path: Path) -> None:
    """What was recorded until then is kept."""
    out, said = tmp_path / "data", []
    with recorder_in(out, said) as recorder:
        opened(recorder).begin("lift")
        for tick in range(9):
            recorder.add(Observation(np.zeros(6), seen(tick).frames, tick / 10), np.zeros(6))
        recorder.end(success=None, ended_by="the time limit")
        recorder.save(success=None, ended_by="the time limit")
        recorder.begin("lift")
        for size in (SIZE, SIZE, (24, 32, 3), SIZE):
            recorder.add(seen(0, size), np.zeros(6))
    assert any("9 frames" in line and "0.3 s" in line and "0.8 s" in line for line in said), said
    assert "'front' delivers 32x24" in recorder.failure
    assert len(read_back(out)) == 9 + 2
    assert entries(out)[0]["duration_s"] == 0.8
    assert "front" in entries(out)[1]["ended_by"]


@pytest.mark.slow
def test_a_writing_process_that_dies_is_told_and_costs_one_episode(two_episodes: Path) -> None:
    with recorder_in(two_episodes, [], append=True) as recorder:
        opened(recorder).begin("lift")
        recorder.add(seen(0), np.zeros(6))
        until(lambda: left_beside(two_episodes))
        os.kill(beside(), signal.SIGKILL)
        until(lambda: recorder.failure)
        recorder.add(seen(1), np.zeros(6))  # does nothing
    assert "has ended" in recorder.failure
    assert len(read_back(two_episodes)) == 11
    assert left_beside(two_episodes) != []
    with recorder_in(two_episodes, [], append=True) as recorder:
        play(opened(recorder), 4)
    assert len(read_back(two_episodes)) == 15
    assert left_beside(two_episodes) == []


@pytest.mark.parametrize(
    "flags",
    [["--episode=0"], ["--dataset=d", "--episode=-1"], ["--dataset=d", "--approach_deg_s=0"], ["--dataset=d", "--record_append=true"]],
)
def test_flags_of_replay_that_make_no_sense(flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        replay.main.parse(["--robot.type=so100_sim", *flags])


def test_a_replay_takes_the_file_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "robot: {type: so101_follower, port: /dev/ttyACM0, id: black}\nlang_instruction: go\nmodel_path: anywhere\n"
        f"max_speed_deg_s: 100\nstall_after_s: null\nrecord: {tmp_path}/of_the_run\nout: {tmp_path}/out\noverwrite: true\n"
    )
    config = replay.main.parse([f"--config_path={file}", "--dataset=d"])
    assert (config.robot.port, config.robot.id, config.safety.max_speed_deg_s, config.safety.stall_after_s) == ("/dev/ttyACM0", "black", 100, None)
    assert (config.record, config.out, config.overwrite) == ("", None, False)
    file.write_text("robot: {type: so100_sim}\nmax_speed_deg_s: auto\nlang_instructoin: go\n")
    with pytest.raises(ConfigError, match="lang_instruction"):
        replay.main.parse([f"--config_path={file}", "--dataset=d"])
