"""`gr00t-fast eval`: figures by hand, and verdicts on real recordings of the demo's trained network, right and deliberately wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.cli import eval as program
from gr00t_fast.cli.eval import CAMERAS, FINE, MODEL, RATE, TIMING, UNITS, Chunk, Episode, Finding, Recorded, judge
from gr00t_fast.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import LeRobotFrames

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "so100-sim-reach"
NAMES = ("pan", "gripper")
NO_SHIFT = {"frames": 0, "mae": 0.0}


def episode(number: int, actions: list[list[float]]) -> Episode:
    """The state is where the action was one frame before."""
    array = np.array(actions, np.float64)
    return Episode(number, 0, np.concatenate([array[:1], array[:-1]]), array)


def test_errors_and_baselines_by_hand() -> None:
    ramp, other = episode(0, [[t, 0] for t in range(6)]), episode(1, [[10, 2], [20, 4], [30, 6]])
    chunks = [Chunk(ramp, 0, ramp.actions[:4] + [1, 0]), Chunk(ramp, 4, np.array([[4.0, 3], [5, 3], [9, 9], [9, 9]]))]
    compared = program.compare(Recorded({"arm": 1, "gripper": 1}, NAMES, [ramp, other], {}), chunks, 4)
    assert compared.lead.tolist() == [0, 1, 2, 3, 0, 1]
    found = program.figures(compared, NAMES, np.array([140.0, 80.0]))
    pan, gripper = found["joints"]["pan"], found["joints"]["gripper"]
    assert (pan["mae"], gripper["mae"]) == (pytest.approx(4 / 6, abs=1e-3), 1.0)
    assert found["mse"] == pytest.approx((4 + 18) / 12, abs=1e-3)
    assert pan["hold_mae"] == pytest.approx((0 + 1 + 2 + 3 + 1 + 2) / 6)  # states 0 and 3 are held
    assert pan["replay_mae"] == pytest.approx((10 + 19 + 28 + 27 + 26 + 25) / 6)  # the other episode, its last action held
    assert gripper["r2"] is None  # it did not move
    assert program.by_lead(compared)["mae"] == pytest.approx([1.0, 1.0, 0.5, 0.5])
    late = [Chunk(ramp, start, ramp.actions[np.minimum(np.arange(start, start + 4) + 2, 5)]) for start in (0, 1)]
    assert program.best_shift(late, 4) == {"frames": 2, "mae": 0.0}


def summary(mae: float, hold_mae: float, trained_range: float = 140.0, bias: float = 0.0) -> dict[str, Any]:
    """Every joint alike."""
    joint = {"mae": mae, "hold_mae": hold_mae, "ratio_to_hold": mae / hold_mae, "trained_range": trained_range, "bias": bias}
    joint |= {"same_sign": 1.0 if bias else 0.5, "bias_spread": 1.0 if bias else 9.0, "mae_without_bias": 2.0 if bias else 40.0}
    return joint | {"joints": dict.fromkeys(NAMES, joint)}


SLOW = Finding(RATE, "recorded at another rate")


@pytest.mark.parametrize(
    ("found", "shift", "findings", "kind"),
    [
        (summary(0.8, 0.4, 2.4), NO_SHIFT, [], MODEL),  # radians: 46 degrees off
        (summary(0.8, 0.4), NO_SHIFT, [], FINE),  # degrees, and nothing moves
        (summary(2.7, 1.8), NO_SHIFT, [], MODEL),  # small, but the arm moved and holding still was better
        (summary(3.0, 6.0), {"frames": 3, "mae": 1.6}, [], FINE),  # a shift is only told
        (summary(6.3, 6.0), {"frames": 2, "mae": 4.5}, [], MODEL),  # shifted, still bad
        (summary(5.9, 6.0), {"frames": -4, "mae": 1.7}, [SLOW], RATE),  # another rate shifts predictions too
        (summary(5.9, 6.0), {"frames": -4, "mae": 1.7}, [], TIMING),
        (summary(10.0, 8.0, bias=10.0), {"frames": 3, "mae": 0.5}, [], TIMING),  # a delay in steady motion looks like an offset
        (summary(10.0, 8.0, bias=10.0), {"frames": 3, "mae": 4.0}, [], UNITS),
    ],
)
def test_verdicts_on_figures(found: dict[str, Any], shift: dict[str, Any], findings: list[Finding], kind: str) -> None:
    verdict, evidence = judge(found, shift, findings)
    assert verdict == kind
    assert not shift["frames"] or any(str(abs(shift["frames"])) in each.text for each in evidence if each.kind == TIMING)


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


def evaluate(dataset: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert program.main([f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={out}", "--episodes=all", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_trained_network_predicts_held_out_episodes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(dataset, tmp_path, capsys)
    assert result["verdict"]["kind"] == FINE
    assert result["ratio_to_hold"] < 0.7
    assert result["mae"] < result["replay_mae"]
    assert len(result["leads"]["mae"]) == 16
    assert result["verdict"]["rests_on"].items() >= {"episodes": 3, "few": True}.items()
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    assert "Fewer than 5 episodes" in (tmp_path / "eval.md").read_text()


@pytest.mark.parametrize(
    ("joints", "kind", "words"),
    [
        (lambda seen, column: np.concatenate([seen[:1].repeat(5, 0), seen[:-5]]) if column == "action" else seen, TIMING, "ahead of the recorded"),
        (lambda seen, column: seen * np.r_[np.full(5, np.pi / 180), 0.01], UNITS, "radians against"),
        (lambda seen, column: seen + np.array([30, 0, 0, 0, 0, 0]), UNITS, "shoulder_pan"),
        (lambda seen, column: seen + np.array([0, 20, 0, 0, 0, 0]) * (column == "action"), UNITS, "shoulder_lift: predictions are off by -"),
    ],
)
def test_mistakes_in_the_joints_are_told(
    joints: Callable, kind: str, words: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = evaluate(variant(dataset, tmp_path / "data", joints), tmp_path / "out", capsys)["verdict"]
    assert verdict["kind"] == kind, verdict
    assert any(words in each["text"] for each in verdict["evidence"]), verdict


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (lambda picture: np.full_like(picture, 9), "shows nothing"),
        (lambda picture: np.ascontiguousarray(picture[:, :, ::-1]), "mirrored the error falls"),
    ],
)
def test_mistakes_with_a_camera_are_told(
    shown: Callable, words: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LeRobotFrames.__getitem__

    def changed(self: LeRobotFrames, index: int) -> dict[str, Any]:
        observation = read(self, index)
        return observation | {"video.webcam": shown(observation["video.webcam"])}

    monkeypatch.setattr(LeRobotFrames, "__getitem__", changed)
    verdict = evaluate(dataset, tmp_path, capsys)["verdict"]
    assert verdict["kind"] == CAMERAS, verdict
    assert any(words in each["text"] for each in verdict["evidence"]), verdict


def test_an_untrained_network_is_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    network = tmp_path / "untrained"
    shutil.copytree(CHECKPOINT, network)
    weights = load_file(network / "model.safetensors")
    weights = {name: values * 0 if "action_decoder" in name else values for name, values in weights.items()}  # actions stay noise
    save_file(weights, network / "model.safetensors")
    result = evaluate(dataset, tmp_path / "out", capsys, f"--model_path={network}")
    assert result["ratio_to_hold"] > 1
    assert result["verdict"]["kind"] == MODEL


def open_frames(path: Path) -> LeRobotFrames:
    return LeRobotFrames(path, DATA_CONFIGS["so100"], read_policy_metadata(CHECKPOINT, "new_embodiment", "so100"), {})


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
        (_remove("meta/tasks.parquet"), "the tasks are missing"),
        (_overwrite("data/**/*.parquet"), "lerobot cannot open it"),
        (_overwrite("videos/**/*.mp4"), "frame 0 cannot be decoded"),
        (lambda path: (path / "meta/info.json").write_text("{"), r"info\.json: cannot be read"),
        (_edit("meta/info.json", lambda info: info.update(codebase_version="v2.1")), r"v2\.1, expected v3.* --repo-id=damaged --push"),
        (_another_robot, r"lerobot cannot open it.*meta/info\.json describes other columns"),
        (_edit("meta/modality.json", lambda told: told["state"].pop("gripper")), r"no place for state\.gripper.*says nothing"),
        (_edit("meta/modality.json", lambda told: told["state"]["gripper"].update(end=9)), r"state\.gripper.*'end': 9"),
        (_edit("meta/modality.json", lambda told: told["video"]["webcam"].update(original_key="observation.images.top")), "says 'top'.*has front"),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_reason(damage: Callable[[Path], object], told: str, dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(dataset, path)
    damage(path)

    def read_a_little() -> None:
        frames = open_frames(path)
        frames.columns("action", range(3))
        frames[0]

    with pytest.raises(ConfigError, match=told):
        read_a_little()


def test_episodes_out_of_order_are_refused(dataset: Path) -> None:
    frames = open_frames(dataset)
    meta = frames._data.meta
    meta.episodes = meta.episodes.select([1, 0, 2])
    with pytest.raises(ConfigError, match=r"lists the episodes as \[1, 0, 2\]"):
        _ = frames.episodes


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        (f"--dataset={CHECKPOINT}", "meta/info.json is missing"),
        ("--episodes=7", "there is no episode '7'"),
        ("--action_horizon=17", "16"),
        ("--data_config=so100_dualcam", "--data_config=so100"),
        ("--embodiment_tag=gr1", "gr1"),
    ],
)
def test_wrong_flags_are_refused_with_the_way_out(flag: str, told: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={tmp_path}", flag]) == 2
    assert told in capsys.readouterr().err


def test_a_recording_without_task_text_needs_an_instruction(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(LeRobotFrames, "tasks_of", lambda self, number: [])
    flags = [f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={tmp_path}"]
    assert program.main(flags) == 2
    assert "--lang_instruction" in capsys.readouterr().err
    assert evaluate(dataset, tmp_path, capsys, "--lang_instruction=Reach the block")["instructions"] == ["Reach the block"]
