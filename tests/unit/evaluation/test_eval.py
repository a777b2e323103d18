"""`gr00t-fast eval`: figures by hand, and verdicts on real recordings of the demo's trained network, right and deliberately wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.cli.eval import main
from gr00t_fast.evaluation import eval as program
from gr00t_fast.evaluation.eval import CAMERAS, FINE, MODEL, RATE, TIMING, UNITS, Chunk, Episode, Finding, Recorded, judge
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import LeRobotFrames

CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "so100-sim-reach"
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
    assert (pan["mae"], gripper["mae"], gripper["r2"]) == (pytest.approx(4 / 6, abs=1e-3), 1.0, None)  # the gripper did not move
    assert found["mse"] == pytest.approx((4 + 18) / 12, abs=1e-3)
    assert pan["hold_mae"] == pytest.approx((0 + 1 + 2 + 3 + 1 + 2) / 6)  # states 0 and 3 are held
    assert pan["replay_mae"] == pytest.approx((10 + 19 + 28 + 27 + 26 + 25) / 6)  # the other episode, its last action held
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
        (summary(3.0, 6.0), {"frames": 3, "mae": 1.6}, [], FINE),  # a shift is only told
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


def evaluate(dataset: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main([f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={out}", "--episodes=all", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_trained_network_predicts_held_out_episodes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(dataset, tmp_path, capsys)
    assert result["verdict"]["kind"] == FINE
    assert result["ratio_to_hold"] < 0.7
    assert result["mae"] < result["replay_mae"]
    assert len(result["leads"]["mae"]) == 16
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    assert "Fewer than 5 episodes" in (tmp_path / "eval.md").read_text()


def same(seen: np.ndarray, kind: str = "") -> np.ndarray:
    return seen


@pytest.mark.parametrize(
    ("joints", "picture", "kind", "words"),
    [
        (lambda seen, kind: seen if kind == "state" else np.r_[seen[:1].repeat(3, 0), seen[:-3]], same, TIMING, "ahead of the recorded"),
        (lambda seen, kind: seen * np.r_[np.full(5, np.pi / 180), 0.01], same, UNITS, "radians against"),
        (lambda seen, kind: seen + [30, 0, 0, 0, 0, 0], same, UNITS, "shoulder_pan"),
        (lambda seen, kind: seen + np.array([0, 20 * (kind == "action"), 0, 0, 0, 0]), same, UNITS, "shoulder_lift: predictions are off by -"),
        (same, lambda picture: np.full_like(picture, 9), CAMERAS, "shows nothing"),
        (same, lambda picture: np.ascontiguousarray(picture[:, :, ::-1]), CAMERAS, "mirrored the error falls"),
    ],
)
def test_mistakes_of_a_recording_are_told(
    joints: Callable, picture: Callable, kind: str, words: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """joints: what becomes of the values (T, 6) of states and actions. picture: of each."""
    columns, frame = LeRobotFrames.columns, LeRobotFrames.__getitem__

    def changed_columns(self: LeRobotFrames, kind: str, rows: range) -> dict[str, np.ndarray]:
        parts = columns(self, kind, rows)
        values = joints(np.concatenate(list(parts.values()), axis=1), kind)
        return dict(zip(parts, np.split(values, [5], axis=1), strict=True))

    def changed_frame(self: LeRobotFrames, index: int) -> dict[str, Any]:
        observation, state = frame(self, index), self.columns("state", range(index, index + 1))
        return observation | {f"state.{part}": values for part, values in state.items()} | {"video.webcam": picture(observation["video.webcam"])}

    monkeypatch.setattr(LeRobotFrames, "columns", changed_columns)
    monkeypatch.setattr(LeRobotFrames, "__getitem__", changed_frame)
    verdict = evaluate(dataset, tmp_path, capsys)["verdict"]
    assert verdict["kind"] == kind, verdict
    assert any(words in each["text"] for each in verdict["evidence"]), verdict


def open_frames(path: Path) -> LeRobotFrames:
    return LeRobotFrames(path, DATA_CONFIGS["so100"], read_policy_metadata(CHECKPOINT, "new_embodiment", "so100"), {})


def _edit(file: str, edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = json.loads((path / file).read_text())
        edit(content)
        (path / file).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: shutil.rmtree(path / "videos"), r"the videos of observation\.images\.front are missing, expected videos/"),
        (lambda path: next(path.rglob("data/**/*.parquet")).write_bytes(b"nothing"), "lerobot cannot open it"),
        (lambda path: next(path.rglob("videos/**/*.mp4")).write_bytes(b"nothing"), "frame 0 cannot be decoded"),
        (_edit("meta/info.json", lambda info: info.update(codebase_version="v2.1")), r"v2\.1, expected v3.* --repo-id=damaged --push"),
        (_edit("meta/modality.json", lambda told: told["state"].pop("gripper")), r"no place for state\.gripper.*says nothing"),
        (_edit("meta/modality.json", lambda told: told["video"]["webcam"].update(original_key="observation.images.top")), "says 'top'.*has front"),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_reason(damage: Callable[[Path], object], told: str, dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(dataset, path)
    damage(path)
    with pytest.raises(ConfigError, match=told):
        _ = open_frames(path)[0]


def test_what_does_not_fit_is_refused_with_the_way_out(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    wrong = {f"--dataset={CHECKPOINT}": "info.json is missing", "--episodes=7": "no episode '7'"}
    monkeypatch.setattr(LeRobotFrames, "tasks_of", lambda self, number: [])
    for flag, told in (wrong | {"--seed=0": "--lang_instruction"}).items():
        assert main([f"--model_path={CHECKPOINT}", f"--dataset={dataset}", f"--out={tmp_path}", flag]) == 2
        assert told in capsys.readouterr().err
    assert evaluate(dataset, tmp_path, capsys, "--lang_instruction=Reach the block")["instructions"] == ["Reach the block"]
