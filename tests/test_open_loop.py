"""The dry run on recorded data: figures by hand, and verdicts on real recordings of the demo's trained network, right and deliberately wrong."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import open_loop
from benchmarks import open_loop_verdict as metrics
from benchmarks.open_loop_verdict import (
    CAMERAS,
    FINE,
    MODEL,
    RATE,
    TIMING,
    UNITS,
    Chunk,
    Episode,
    Finding,
    Layout,
    Recorded,
    judge,
)
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.dataset import LeRobotFrames
from gr00t_fast.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "so100-sim-reach"
NAMES = ("pan", "gripper")
RANGE = np.array([140.0, 80.0])  # trained


# Figures


def episode(number: int, actions: list[list[float]], first_row: int = 0) -> Episode:
    """The state is where the action was one frame before."""
    array = np.array(actions, np.float64)
    return Episode(number, first_row, np.concatenate([array[:1], array[:-1]]), array)


def recorded(*episodes: Episode) -> Recorded:
    return Recorded(Layout({"arm": 1, "gripper": 1}, NAMES), episodes)


RAMP = episode(0, [[t, 0] for t in range(6)])


def test_errors_and_baselines_by_hand() -> None:
    other = episode(1, [[10, 2], [20, 4], [30, 6]])
    chunks = [Chunk(RAMP, 0, RAMP.actions[:4] + [1, 0], 1.0), Chunk(RAMP, 4, np.array([[4, 3], [5, 3], [9, 9], [9, 9]]), 1.0)]
    compared = metrics.compare(recorded(RAMP, other), chunks, horizon=4)
    assert compared.frame.tolist() == [0, 1, 2, 3, 4, 5]
    assert compared.lead.tolist() == [0, 1, 2, 3, 0, 1]
    found = metrics.summary(compared, NAMES, RANGE)
    assert found["joints"]["pan"]["mae"] == pytest.approx(4 / 6, abs=1e-3)
    assert found["joints"]["gripper"]["mae"] == pytest.approx(1)
    assert found["mse"] == pytest.approx((4 + 18) / 12, abs=1e-3)
    assert found["joints"]["pan"]["hold_mae"] == pytest.approx((0 + 1 + 2 + 3 + 1 + 2) / 6)  # states 0 and 3 are held
    assert found["joints"]["pan"]["replay_mae"] == pytest.approx((10 + 19 + 28 + 27 + 26 + 25) / 6)  # the other episode, its last action held
    assert found["joints"]["gripper"]["r2"] is None  # it did not move
    assert found["worst"] == {"episode": 0, "frame": 4, "row_of_chunk": 0, "joint": "gripper", "predicted": 3.0, "recorded": 0.0}
    assert metrics.boundary_jumps(compared)["predicted"]["max"] == pytest.approx(3)
    assert metrics.boundary_jumps(compared)["recorded"]["max"] == pytest.approx(1)
    leads = metrics.by_lead(compared)
    assert leads["chunks"] == [2, 2, 1, 1]
    assert leads["mae"] == pytest.approx([1.0, 1.0, 0.5, 0.5])


# Verdicts on figures

STEADY = {name: {"bias": 0.0, "same_sign": 0.5, "spread": 9.0, "mae_without_bias": 40.0} for name in NAMES}


def summary(mae: float, hold_mae: float, trained_range: float = 140.0) -> dict[str, Any]:
    """Every joint alike."""
    joint = {"mae": mae, "hold_mae": hold_mae, "ratio_to_hold": mae / hold_mae}
    return joint | {"joints": dict.fromkeys(NAMES, joint | {"trained_range": trained_range})}


def test_a_shift_is_only_a_hint_where_it_does_not_explain() -> None:
    for poor in ({"frames": 2, "mae": 4.5}, {"frames": 2, "mae": 5.0}):  # still bad, hardly better
        verdict = judge(summary(mae=6.3, hold_mae=6.0), STEADY, [], None, poor)
        assert verdict.kind == MODEL
        assert any("2 frames" in line for line in verdict.evidence)
    good = judge(summary(mae=3.0, hold_mae=6.0), STEADY, [], None, {"frames": 3, "mae": 1.6})
    assert good.kind == FINE
    assert "trained with actions ahead" in good.evidence[-1]
    slow = judge(summary(mae=5.94, hold_mae=6.0), STEADY, [Finding(RATE, "recorded at another rate")], None, {"frames": -4, "mae": 1.7})
    assert slow.kind == RATE


@pytest.mark.parametrize(("shifted_mae", "kind"), [(0.5, TIMING), (4.0, UNITS)])
def test_a_delay_in_steady_motion_is_not_taken_for_an_offset(shifted_mae: float, kind: str) -> None:
    offset = {"bias": 10.0, "same_sign": 1.0, "spread": 1.0, "mae_without_bias": 2.0}
    verdict = judge(summary(mae=10.0, hold_mae=8.0), dict.fromkeys(NAMES, offset), [], None, {"frames": 3, "mae": shifted_mae})
    assert verdict.kind == kind


@pytest.mark.parametrize(
    ("mae", "hold_mae", "trained_range", "kind"),
    [
        (0.8, 0.4, 2.4, MODEL),  # radians: 46 degrees off
        (0.8, 0.4, 140.0, FINE),  # degrees, and nothing moves
        (2.7, 1.8, 140.0, MODEL),  # small, but the arm moved and holding still was better
        (0.04, 0.045, 2.4, FINE),
        (0.5, 1.0, 2.4, FINE),
    ],
)
def test_small_is_a_share_of_the_trained_range(mae: float, hold_mae: float, trained_range: float, kind: str) -> None:
    assert judge(summary(mae, hold_mae, trained_range), STEADY, [], None, {"frames": 0, "mae": mae}).kind == kind


# Real recordings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of layouts that training never drew."""
    pytest.importorskip("lerobot")
    pytest.importorskip("mujoco")
    from training import record

    path = tmp_path_factory.mktemp("recorded") / "held_out"
    assert record.main(["--episodes=3", "--first_layout=700", "--resolution=320x240", f"--out={path}"]) == 0
    return path


def variant(dataset: Path, out: Path, joints: Callable[[np.ndarray, str], np.ndarray]) -> Path:
    """A copy whose joint columns went through `joints(values (T, 6), column)`."""
    import pyarrow
    from pyarrow import parquet

    shutil.copytree(dataset, out)
    for file in (out / "data").rglob("*.parquet"):
        table = parquet.read_table(file)
        for column in ("observation.state", "action"):
            field = table.schema.field(column)
            values = joints(np.array(table[column].to_pylist(), np.float64), column).astype(np.float32)
            table = table.set_column(table.schema.get_field_index(column), field, pyarrow.array(values.tolist(), type=field.type))
        parquet.write_table(table, file)
    return out


def dry_run(dataset: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    episodes = [] if "--episodes" in more else ["--episodes", "all"]
    flags = [f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={out}", "--probe_frames=6", "--json", *episodes, *more]
    assert open_loop.main(flags) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_trained_network_predicts_held_out_episodes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = dry_run(dataset, tmp_path, capsys, "--denoising_steps", "1", "4", "--episodes", "2", "0", "--stride=4")
    assert result["dataset"]["episodes"] == [2, 0]
    assert result["verdict"]["kind"] == FINE
    for run in result["runs"].values():
        assert run["chunks"]["ratio_to_hold"] < 0.7
        assert run["chunks"]["mae"] < run["chunks"]["replay_mae"]
        assert run["chunks"]["frames"] == result["dataset"]["frames"]
        assert len(run["leads"]["mae"]) == 16
        assert run["leads"]["mae"][-1] < 0.5 * run["leads"]["hold_mae"][-1]
    table, rests = (tmp_path / "open_loop.md").read_text(), result["verdict"]["rests_on"]
    assert rests["frames"] == result["dataset"]["frames"]
    assert f"This rests on 2 episodes, {rests['chunks']} chunks, {rests['frames']} frames; ratio to holding by episode: 0." in table
    assert "Fewer than 5 episodes" in table
    recording = result["dataset"]["recording"]
    assert recording["layouts"] == [700, 701, 702]
    assert max(recording["layouts"]) < recording["training_layouts_from"]
    assert "layouts 702, 700;" in (tmp_path / "open_loop.md").read_text()
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    assert str(tmp_path) not in json.dumps(result)
    for name in ("open_loop.json", "open_loop.md", "open_loop.png", "open_loop.csv"):
        assert (tmp_path / name).stat().st_size > 0, name
    with (tmp_path / "open_loop.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * result["dataset"]["frames"]
    errors = [abs(float(row["gripper_predicted"]) - float(row["gripper_recorded"])) for row in rows if row["denoising_steps"] == "4"]
    assert np.mean(errors) == pytest.approx(result["runs"]["4"]["chunks"]["joints"]["gripper"]["mae"], abs=0.01)


def _radians(values: np.ndarray, column: str) -> np.ndarray:
    return values * np.r_[np.full(5, np.pi / 180), 0.01]


def _shifted(values: np.ndarray, column: str) -> np.ndarray:
    return values + np.array([30, 0, 0, 0, 0, 0])


def _leader_shifted(values: np.ndarray, column: str) -> np.ndarray:
    return values + np.array([0, 20 if column == "action" else 0, 0, 0, 0, 0])


def test_actions_recorded_late_are_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def late(values: np.ndarray, column: str) -> np.ndarray:
        return values if column == "observation.state" else np.concatenate([values[:1].repeat(5, 0), values[:-5]])

    result = dry_run(variant(dataset, tmp_path / "data", late), tmp_path / "out", capsys)
    assert result["verdict"]["kind"] == TIMING, result["verdict"]
    assert result["runs"][str(result["verdict"]["denoising_steps"])]["best_shift"]["frames"] >= 5


def _exchanged(values: np.ndarray, column: str) -> np.ndarray:
    return values[:, [0, 3, 2, 1, 4, 5]]


@pytest.mark.parametrize(
    ("joints", "words"),
    [(_radians, "radians?"), (_shifted, "shoulder_pan: predictions are off by -"), (_leader_shifted, "shoulder_lift: predictions are off by -"),
     (_exchanged, "with wrist_flex and shoulder_lift exchanged the error falls")],
)  # fmt: skip
def test_other_units_and_orders_are_told(joints: Callable, words: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = dry_run(variant(dataset, tmp_path / "data", joints), tmp_path / "out", capsys)["verdict"]
    assert verdict["kind"] == UNITS
    assert any(words in line for line in verdict["evidence"]), verdict["evidence"]


def test_a_mirrored_camera_is_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = LeRobotFrames.__getitem__

    def mirrored(self: LeRobotFrames, index: int) -> dict[str, Any]:
        observation = read(self, index)
        return observation | {"video.webcam": np.ascontiguousarray(observation["video.webcam"][:, :, ::-1])}

    monkeypatch.setattr(LeRobotFrames, "__getitem__", mirrored)
    verdict = dry_run(dataset, tmp_path, capsys)["verdict"]
    assert verdict["kind"] == CAMERAS
    assert any("video.webcam mirrored the error falls" in line for line in verdict["evidence"]), verdict["evidence"]


def test_a_covered_camera_is_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = LeRobotFrames.__getitem__
    monkeypatch.setattr(
        LeRobotFrames, "__getitem__", lambda self, index: read(self, index) | {"video.webcam": np.full((1, 240, 320, 3), 9, np.uint8)}
    )
    verdict = dry_run(dataset, tmp_path, capsys, "--probe_frames=0")["verdict"]
    assert verdict["kind"] == CAMERAS
    assert any("shows nothing" in line for line in verdict["evidence"])


def test_an_untrained_network_is_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    network = tmp_path / "untrained"
    shutil.copytree(CHECKPOINT, network)
    weights = load_file(network / "model.safetensors")
    weights = {name: values * 0 if "action_decoder" in name else values for name, values in weights.items()}  # actions stay noise
    save_file(weights, network / "model.safetensors")
    result = dry_run(dataset, tmp_path / "out", capsys, f"--model_path={network}")
    assert result["runs"]["4"]["chunks"]["ratio_to_hold"] > 1
    assert result["verdict"]["kind"] == MODEL


# Wrong inputs


def open_frames(path: Path, camera_map: dict[str, str] | None = None) -> LeRobotFrames:
    return LeRobotFrames(path, DATA_CONFIGS["so100"], read_policy_metadata(CHECKPOINT, "new_embodiment", "so100"), camera_map or {})


def _remove(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def _edit(file: str, edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = json.loads((path / file).read_text())
        edit(content)
        (path / file).write_text(json.dumps(content))

    return change


def _overwrite(pattern: str) -> Callable[[Path], object]:
    return lambda path: next(path.rglob(pattern)).write_bytes(b"nothing")


def _another_robot(path: Path) -> None:
    """Its info.json, beside the files and the modality.json of ours."""
    _edit("meta/info.json", lambda info: [info["features"][column].update(shape=[7]) for column in ("action", "observation.state")])(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_remove("videos"), r"the videos of observation\.images\.front are missing, expected videos/"),
        (_remove("data"), "the joints are missing, expected data/"),
        (_remove("meta/tasks.parquet"), "the tasks are missing"),
        (_remove("meta/episodes"), "the lengths of episodes are missing"),
        (_overwrite("data/**/*.parquet"), "lerobot cannot open it"),
        (_overwrite("videos/**/*.mp4"), "frame 0 cannot be decoded"),
        (lambda path: (path / "meta/info.json").write_text("{"), r"info\.json: cannot be read"),
        (_edit("meta/info.json", lambda info: info.update(codebase_version="v2.1")), r"v2\.1, expected v3.* --repo-id=damaged --push"),
        (_edit("meta/info.json", lambda info: info.update(codebase_version="v2.0")), "bring it to v2.1 first"),
        (_another_robot, r"lerobot cannot open it.*meta/info\.json describes other columns"),
        (_edit("meta/info.json", lambda info: info["features"].pop("observation.state")), r"no column 'observation\.state' for state\.single_arm"),
        (_edit("meta/modality.json", lambda told: told["state"].pop("gripper")), "names no state part 'gripper'"),
        (_edit("meta/modality.json", lambda told: told["state"]["gripper"].update(end=9)), r"state\.gripper at 5 to 9"),
        (_edit("meta/modality.json", lambda told: told["action"].pop("single_arm")), "names no action part 'single_arm'"),
        (_edit("meta/modality.json", lambda told: told["video"]["webcam"].update(original_key="observation.images.top")), "says 'top'.*has front"),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_reason(damage: Callable[[Path], object], told: str, dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(dataset, path)
    damage(path)
    with pytest.raises(ConfigError, match=told):
        _read_a_little(path)


def _read_a_little(path: Path) -> None:
    frames = open_frames(path)
    frames.columns("action", range(3))
    frames[0]


def test_episodes_out_of_order_are_refused(dataset: Path) -> None:
    frames = open_frames(dataset)
    meta = frames._data.meta
    meta.episodes = meta.episodes.select([1, 0, 2])
    with pytest.raises(ConfigError, match=r"lists the episodes as \[1, 0, 2\]"):
        _ = frames.episodes


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset=/nowhere/at/all"], "does not exist"),
        ([f"--dataset={CHECKPOINT}"], "is no LeRobotDataset: meta/info.json is missing"),
        (["--episodes", "7"], "there is no episode '7'. The data set has 3, from 0 to 2"),
        (["--action_horizon=17"], "action_horizon must be from 1 to 16"),
        (["--action_horizon=0"], "--action_horizon=0"),
        (["--stride=0"], "--stride=0"),
        (["--denoising_steps", "4", "0"], "--denoising_steps=0"),
        (["--data_config=so100_dualcam"], "Use --data_config=so100"),
        (["--embodiment_tag=gr1"], "no statistics for embodiment_tag 'gr1'"),
    ],
)
def test_wrong_flags_are_refused_with_the_way_out(
    flags: list[str], told: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_loop.main([f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={tmp_path}", *flags]) == 1
    assert told in capsys.readouterr().err


def test_the_data_set_is_looked_at_before_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(open_loop, "load_policy", lambda *_, **__: pytest.fail("weights would be read"))
    assert open_loop.main([f"--model_path={CHECKPOINT}", "--dataset=/nowhere/at/all", f"--out={tmp_path}"]) == 1
    old = tmp_path / "my set"
    (old / "meta").mkdir(parents=True)
    (old / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1", "features": {}}))
    assert open_loop.main([f"--model_path={CHECKPOINT}", f"--dataset={old}", f"--out={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr().err
    assert f"convert_dataset_v21_to_v30 --root={tmp_path} --repo-id='my set' --push-to-hub=false" in told
    (tmp_path / "taken").write_text("")
    assert open_loop.main([f"--model_path={CHECKPOINT}", f"--dataset={old}", f"--out={tmp_path / 'taken'}"]) == 1
    assert "expected a directory to write to, but it is a file" in capsys.readouterr().err


def test_a_recording_without_task_text_needs_an_instruction(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(LeRobotFrames, "tasks_of", lambda self, number: [])
    flags = [f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={tmp_path}"]
    assert open_loop.main(flags) == 1
    assert "--lang_instruction" in capsys.readouterr().err
    assert open_loop.main([*flags, "--lang_instruction=Reach the block"]) == 0
    assert json.loads((tmp_path / "open_loop.json").read_text())["dataset"]["instructions"] == ["Reach the block"]
