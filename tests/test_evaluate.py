"""Closed-loop evaluation: pairing, simulated latency, statistics, and a run that goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mujoco")

from benchmarks import evaluate
from benchmarks.closed_loop import cells as grid
from benchmarks.closed_loop.cells import Cell
from benchmarks.closed_loop.episode import Outcome, jerk_rms
from benchmarks.closed_loop.episode_log import EpisodeLog
from benchmarks.closed_loop.statistics import difference, figures_of, newcombe_interval
from benchmarks.closed_loop.workers import Job, Report, Settings, play, reports, runner_of
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import wilson_interval
from gr00t_fast.random_checkpoint import write_random_checkpoint

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "so100-sim-reach"
SETTINGS = Settings(str(CHECKPOINT), "Reach the block", 0.06, 3.0, 0, "cpu")
LATE = Cell("moving", "sync", 200, 1, 8)


def played(cell: Cell, seed: int = 3) -> Outcome:
    (outcome,) = play(Job(SETTINGS, cell, (seed,))).outcomes
    return outcome


def outcome(seed: int, solved_s: float | None) -> Outcome:
    return Outcome(seed, solved_s, 0.01, 1000.0 + seed, 0.3, 4, 0)


# --- episodes -----------------------------------------------------------------------------------------------------------------------------


def test_an_episode_is_the_same_whatever_was_played_before() -> None:
    first = played(LATE)
    played(Cell("moving", "threaded", 50, 1, 16), seed=8)
    assert played(LATE) == first


def test_the_server_gives_what_the_process_gives() -> None:
    cell = Cell("moving", "threaded", 200, 1, 16)
    policies, _ = runner_of(SETTINGS)
    with policies:
        assert played(replace(cell, controller="server")) == played(cell)


def test_latency_costs_a_waiting_loop_time_and_hidden_latency_does_not() -> None:
    def waited_s(controller: grid.ControllerName, horizon: int) -> float:
        return sum(played(Cell("moving", controller, 200, 1, horizon), seed).solved_s or 3.0 for seed in range(3))

    prompt_s = sum(played(Cell("moving", "sync", 0, 1, 8), seed).solved_s or 3.0 for seed in range(3))
    assert waited_s("sync", 8) > prompt_s + 3 * 2 * 0.2  # two inferences at the least, each 0.2 s
    assert waited_s("threaded", 16) < waited_s("sync", 8)


def test_success_is_timed_by_the_world_and_not_by_the_loop() -> None:
    """With 0.8 s of latency the loop ticks seldom; the first chunk still begins to play at 0.8 s."""
    slow, prompt = played(Cell("still", "sync", 800, 1, 16)), played(Cell("still", "sync", 0, 1, 16))
    assert prompt.solved_s is not None
    assert slow.solved_s == pytest.approx(prompt.solved_s + 0.8, abs=0.07)


def test_success_after_the_time_is_up_does_not_count() -> None:
    """A tick that began in time infers to its end; the block is reached at about 1.2 s."""
    assert played(Cell("still", "sync", 800, 1, 16)).solved_s is not None
    short = play(Job(replace(SETTINGS, episode_s=1.1), Cell("still", "sync", 800, 1, 16), (3,))).outcomes[0]
    assert short.solved_s is None


def test_waiting_is_not_smooth() -> None:
    moving = np.random.default_rng(0).normal(size=(30, 5)).cumsum(axis=0)
    waiting = np.concatenate([moving[:15], np.repeat(moving[14:15], 60, axis=0), moving[15:]])
    assert jerk_rms(waiting) == pytest.approx(jerk_rms(moving), rel=0.2)
    assert jerk_rms(np.zeros((20, 5))) is None


def test_steps_and_noise_reach_the_policy() -> None:
    assert played(Cell(denoising_steps=1)).jerk_rms_deg_s3 != played(Cell(denoising_steps=4)).jerk_rms_deg_s3
    other = play(Job(replace(SETTINGS, noise_seed=1), Cell(denoising_steps=1), (3,))).outcomes[0]
    assert other.jerk_rms_deg_s3 != played(Cell(denoising_steps=1)).jerk_rms_deg_s3


def test_a_chunk_that_is_over_before_it_arrives_is_refused_with_the_reason() -> None:
    report = play(Job(SETTINGS, Cell("still", "threaded", 800, 1, 16), (0, 1)))
    assert not report.outcomes
    assert "16 actions" in (report.refused or "")


def test_processes_give_what_one_gives() -> None:
    jobs = [Job(SETTINGS, LATE, (3,)), Job(SETTINGS, replace(LATE, scene="still"), (4,))]
    found = {report.cell: report.outcomes for report in reports(jobs, 2)}
    assert found == {job.cell: play(job).outcomes for job in jobs}


def test_ray_gives_what_one_process_gives() -> None:
    pytest.importorskip("ray")
    jobs = [Job(SETTINGS, LATE, (3,)), Job(SETTINGS, replace(LATE, scene="still"), (4,))]
    found = {report.cell: report.outcomes for report in reports(jobs, 1, "local")}
    assert found == {job.cell: play(job).outcomes for job in jobs}


# --- statistics ---------------------------------------------------------------------------------------------------------------------------


def test_figures_count_failures_as_whole_episodes() -> None:
    figures = figures_of([outcome(0, 0.5), outcome(1, 1.5), outcome(2, None), outcome(3, None)], 10.0, [1.0])
    assert figures["success"]["successes"] == 2
    assert figures["within"]["1"]["successes"] == 1
    assert figures["mean_time_s"] == 5.5
    assert figures["median_time_s"] is None
    assert figures["failed_seeds"] == [2, 3]
    low, high = figures["mean_time_95_s"]
    assert 0.5 <= low < 5.5 < high <= 10


def test_differences_are_paired_by_seed() -> None:
    ours = [outcome(0, 1.0), outcome(1, None), outcome(2, 2.0), outcome(9, 1.0)]
    theirs = [outcome(2, 1.0), outcome(1, 1.0), outcome(0, 1.0)]
    found = difference(ours, theirs, 10.0)
    assert found is not None
    assert (found["seeds"], found["lost"], found["won"]) == (3, 1, 0)
    assert found["mean_time_s"] == round((0 + 9 + 1) / 3, 3)
    assert difference(ours, [outcome(77, 1.0)], 10.0) is None


def test_paired_intervals() -> None:
    low, high = newcombe_interval(200, 200, 0, 0, 200)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(1 - wilson_interval(200, 200)[0])
    assert newcombe_interval(100, 100, 0, 0, 200)[1] > 0.005
    low, high = newcombe_interval(48, 38, 2, 12, 50)
    assert (low, high) == pytest.approx(tuple(-bound for bound in reversed(newcombe_interval(38, 48, 12, 2, 50))))
    assert low < 0.2 < high
    unpaired = newcombe_interval(25, 25, 12, 12, 50)[1]
    assert newcombe_interval(25, 25, 1, 1, 50)[1] < unpaired  # what agrees pair by pair is known more exactly


def test_paired_intervals_cover_the_truth() -> None:
    """Correlated coins with known rates: 95 intervals of 100 hold the true difference, within what 400 trials can tell."""
    rng, held, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        base = rng.random(60) < 0.9
        ours, theirs = base & (rng.random(60) < 0.9), base | (rng.random(60) < 0.2)
        low, high = newcombe_interval(int(ours.sum()), int(theirs.sum()), int((theirs & ~ours).sum()), int((ours & ~theirs).sum()), 60)
        held += low <= 0.81 - 0.92 <= high
    assert held / trials > 0.92


# --- settings -----------------------------------------------------------------------------------------------------------------------------


def arguments(*words: str) -> Any:
    return evaluate._parser().parse_args(words)


def test_cells_are_those_asked_for() -> None:
    asked = evaluate.cells_of(arguments("--latency_ms", "0", "100", "--controllers", "sync", "threaded", "--scenes", "moving"))
    assert {(cell.controller, cell.latency_ms) for cell in asked} == {("sync", 0), ("threaded", 0), ("sync", 100), ("threaded", 100)}
    assert len(asked) == 4
    assert {cell.scene for cell in asked} == {"moving"}
    assert {cell.denoising_steps for cell in asked} == {4}
    everything = evaluate.cells_of(arguments("--full", "--engines", "openvino:int8=exports"))
    assert len(everything) == len(set(everything))
    assert {cell.engine for cell in everything} == {"eager:fp32", "eager:bf16", "openvino:int8=exports"}
    assert {(cell.denoising_steps, cell.action_horizon) for cell in everything} >= {(steps, h) for steps in grid.STEPS for h in grid.HORIZONS}
    assert all(grid.reference_of(cell) in everything for cell in everything)
    assert grid.reference_of(Cell("moving", "threaded", 200)) == Cell("moving", "sync", 200)
    assert {cell.engine for cell in evaluate.cells_of(arguments("--engines", "eager:bf16"))} == {"eager:bf16"}
    product = ["--denoising_steps", "1", "2", "--action_horizon", "4", "8", "--controllers", *grid.CONTROLLERS, "--latency_ms", "0", "50"]
    assert len(evaluate.cells_of(arguments(*product, "--engines", "eager:fp32", "eager:bf16"))) == 2 * 2 * 2 * len(grid.CONTROLLERS) * 2 * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--study", "steps", "--latency_ms", "3"], "settings of its own"),
        (["--full", "--controllers", "sync"], "settings of its own"),
        (["--latency_ms", "-1"], "not be negative"),
        (["--denoising_steps", "0"], "at least 1"),
        (["--engines", ":fp32"], "names no engine"),
        (["--seeds", "0"], "held out"),
        (["--first_seed", "999999", "--seeds", "2"], "held out"),
        (["--deadlines_s", "0"], "deadlines_s"),
        (["--deadlines_s", "11"], "deadlines_s"),
        (["--episode_s", "0.01"], "episode_s must be"),
        (["--episode_s", "nan"], "episode_s must be"),
        (["--episode_s", "inf"], "episode_s must be"),
        (["--seed", "-1"], "not negative"),
        (["--action_horizon", "8", "32"], "predicts 16 actions"),
        (["--model_path", "/nowhere"], "nowhere"),
        (["--block_speed_m_s", "7"], "must be above 0"),
        (["--denoising_steps", "100000", "--scenes", "still", "--seeds", "1"], "denoising_steps must be"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([*words, "--jobs=1", f"--out={tmp_path}"]) == 1
    assert said in capsys.readouterr().err


# --- what stays on disk -------------------------------------------------------------------------------------------------------------------


def test_a_network_of_other_cameras_is_refused_before_processes_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = write_random_checkpoint(tmp_path / "two", "tiny", "so100_dualcam")
    monkeypatch.setattr(evaluate, "reports", lambda *_: pytest.fail("a process would begin"))
    assert evaluate.main([f"--model_path={two}", "--jobs=1", f"--out={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr().err
    assert "trained with cameras video.front, video.wrist. evaluate plays one-camera networks" in told
    assert "--data_config" not in told
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert evaluate.main(["--jobs=1", f"--out={tmp_path / 'taken'}"]) == 1
    assert "expected a directory to write to, but it is a file" in capsys.readouterr().err


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    conditions = {"speed": 1}
    log = EpisodeLog(tmp_path, conditions, "abc")
    log.add(Report(LATE, (outcome(0, 1.0), outcome(1, None))))
    log.add(Report(Cell(), (), "too late"))
    with open(log.path, "a") as stream:
        stream.write('{"cell": {"sce')  # killed while it wrote
    again = EpisodeLog(tmp_path, conditions)
    assert again.missing([LATE, Cell(), Cell("moving")], [0, 1, 2]) == [(LATE, [2]), (Cell("moving"), [0, 1, 2])]
    assert again.outcomes(LATE, [0, 1, 2]) == [outcome(0, 1.0), outcome(1, None)]
    assert again.refused == {Cell(): "too late"}
    again.add(Report(LATE, (outcome(2, 1.0),)))
    third = EpisodeLog(tmp_path, conditions, "def")
    assert third.missing([LATE], [0, 1, 2]) == []
    assert third.commits == ["abc", None]
    with pytest.raises(ConfigError, match="other speed"):
        EpisodeLog(tmp_path, {"speed": 2})
    log.path.write_text(log.path.read_text() + "nonsense\n")
    with pytest.raises(ConfigError, match="damaged"):
        EpisodeLog(tmp_path, conditions)


def test_other_statistics_are_another_checkpoint(tmp_path: Path) -> None:
    copy = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    assert evaluate.digests_of(copy) == evaluate.digests_of(CHECKPOINT)
    metadata = copy / "experiment_cfg" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("1", "2", 1))
    assert evaluate.digests_of(copy) != evaluate.digests_of(CHECKPOINT)


def test_the_program_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--latency_ms", "0", "800", "--controllers", "sync", "threaded", "--scenes", "still", "--denoising_steps", "1", "--action_horizon", "8"]
    command = [*words, "--seeds=2", "--jobs=1", "--episode_s=2", "--videos=1", f"--out={tmp_path}"]
    assert evaluate.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "evaluate.json").read_text())
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    rows = {(row["controller"], row["latency_ms"]): row for row in result["rows"]}
    assert rows["sync", 0]["success"]["successes"] == 2
    assert "refused" in rows["threaded", 800]
    assert rows["sync", 800]["mean_time_s"] > rows["sync", 0]["mean_time_s"] + 0.7
    table = (tmp_path / "evaluate.md").read_text()
    assert table.count("cannot run") == 1
    assert "Cannot run: an inference takes" in table
    assert len(list(csv.DictReader((tmp_path / "evaluate.csv").open()))) == 3
    assert (tmp_path / "latency.png").stat().st_size > 5000
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    log = (tmp_path / "episodes.jsonl").read_text()
    assert evaluate.main(command) == 0
    assert (tmp_path / "episodes.jsonl").read_text() == log
