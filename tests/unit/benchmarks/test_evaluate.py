"""Closed-loop evaluation: a whole run, which goes on where it was stopped; episodes that depend on nothing but their settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from benchmarks import evaluate
from benchmarks.evaluate import Cell, Config, Outcome, figures_of, play

CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "so100-sim-reach"
SETTINGS = Config(CHECKPOINT, episode_s=3.0)
LATE = Cell("moving", "sync", 200, 1, 8)


def run(out: Path, *flags: str) -> tuple[int, dict]:
    common = ("--episode_s=3", "--scenes=moving", "--controllers", "sync", "threaded", "--action_horizon=16", "--denoising_steps=1", "--jobs=2")
    code = evaluate.main([*common, *flags, f"--out={out}"])
    return code, json.loads((out / "evaluate.json").read_text()) if code == 0 else {}


@pytest.mark.slow
def test_a_whole_run_and_one_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, whole = run(tmp_path / "whole", "--latency_ms", "200", "800", "--episodes=3")
    assert code == 0
    played = {(row["controller"], row["latency_ms"]): row for row in whole["rows"]}
    assert played["threaded", 200]["mean_time_s"] < played["sync", 200]["mean_time_s"]
    assert "16 actions" in played["threaded", 800]["refused"]
    table = capsys.readouterr().out
    assert "cannot run" in table
    assert (tmp_path / "whole" / "evaluate.md").read_text().strip() in table

    assert run(tmp_path / "cut", "--latency_ms", "200", "800", "--episodes=1")[0] == 0
    with (tmp_path / "cut" / "episodes.jsonl").open("a") as log:
        log.write('{"cell": {"scene"')  # killed while it wrote
    assert run(tmp_path / "cut", "--latency_ms", "200", "800", "--episodes=3")[1]["rows"] == whole["rows"]

    assert run(tmp_path / "cut", "--latency_ms=200", "--block_speed_m_s=0.02")[0] == 2  # other conditions
    assert "episodes.jsonl" in capsys.readouterr().err


def test_an_episode_is_the_same_whatever_was_played_before() -> None:
    first = play(SETTINGS, LATE, (3,))
    play(SETTINGS, Cell("moving", "threaded", 50, 1, 16), (8,))
    assert play(SETTINGS, LATE, (3,)) == first


def test_figures_count_failures_as_whole_episodes() -> None:
    figures = figures_of({seed: Outcome(seed, None if seed == 1 else 2.0 + seed, 4, 0) for seed in (3, 2, 1)}, 10.0, [4.0])
    assert figures["success"]["successes"] == 2
    assert figures["within"]["4"]["successes"] == 1
    assert figures["mean_time_s"] == pytest.approx(np.mean([10, 4, 5]), abs=1e-3)
    assert figures["failed_seeds"] == [1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--action_horizon=17"], "16"),
        (["--study=steps", "--latency_ms=3"], "--study"),
        (["--first_seed=999999"], "1000000"),
        (["--servo_lag_ms=5", "--latency_ms=0"], "102.6 ms"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([*flags, f"--out={tmp_path / 'out'}", "--jobs=1"]) == 2
    assert named in capsys.readouterr().err
