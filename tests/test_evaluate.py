"""Closed-loop evaluation: pairing, simulated latency, statistics, and a run that goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from benchmarks import evaluate
from benchmarks.closed_loop import Cell, Job, Outcome, Report, Settings, play, reports, runner_of
from benchmarks.evaluate import EpisodeLog, difference, newcombe_interval
from benchmarks.lib.random_checkpoint import write_random_checkpoint
from gr00t_fast.errors import ConfigError

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


def test_servos_that_lag_as_real_ones_take_longer() -> None:
    own, lagging = (play(Job(replace(SETTINGS, servo_lag_ms=lag_ms), Cell("still", "sync", 0, 1, 8), (3,))).outcomes[0] for lag_ms in (None, 200.0))
    assert own.solved_s is not None
    assert lagging.solved_s is not None
    assert 0.05 < lagging.solved_s - own.solved_s < 1.5


def test_the_server_gives_what_the_process_gives() -> None:
    cell = Cell("moving", "threaded", 200, 1, 16)
    policies, _ = runner_of(SETTINGS)
    with policies:
        assert played(replace(cell, controller="server")) == played(cell)


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


def test_differences_are_paired_by_seed() -> None:
    ours = [outcome(0, 1.0), outcome(1, None), outcome(2, 2.0), outcome(9, 1.0)]
    theirs = [outcome(2, 1.0), outcome(1, 1.0), outcome(0, 1.0)]
    found = difference(ours, theirs, 10.0)
    assert found is not None
    assert (found["seeds"], found["lost"], found["won"]) == (3, 1, 0)
    assert found["mean_time_s"] == round((0 + 9 + 1) / 3, 3)
    assert difference(ours, [outcome(77, 1.0)], 10.0) is None


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--study", "steps", "--latency_ms", "3"], "settings of its own"),
        (["--full", "--controllers", "sync"], "settings of its own"),
        (["--latency_ms", "-1"], "not be negative"),
        (["--denoising_steps", "0"], "at least 1"),
        (["--engines", ":fp32"], "names no engine"),
        (["--episodes", "0"], "held out"),
        (["--first_seed", "999999", "--episodes", "2"], "held out"),
        (["--deadlines_s", "0"], "deadlines_s"),
        (["--episode_s", "0.01"], "episode_s must be"),
        (["--seed", "-1"], "not negative"),
        (["--action_horizon", "8", "32"], "predicts 16 actions"),
        (["--model_path", "/nowhere"], "nowhere"),
        (["--block_speed_m_s", "7"], "must be above 0"),
        (["--servo_lag_ms", "50"], "servos' lag must be above"),
        (["--denoising_steps", "100000", "--scenes", "still", "--episodes", "1"], "denoising_steps must be"),
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
    command = [*words, "--seeds=2", "--jobs=1", "--json", "--episode_s=2", "--videos=1", f"--out={tmp_path}"]
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
