"""`gr00t-fast compare`: figures of two runs whose times are known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from control_fakes import Bench

from gr00t_fast.cli.main import main
from gr00t_fast.control.outputs import save_run, write_report
from gr00t_fast.control.report import build_report


def recorded(directory: Path, bench: Bench, **settings: object) -> Path:
    bench.loop.run()
    report = build_report(bench.loop, {"out": str(directory), **settings})
    write_report(report, directory)
    if len(bench.loop.trace):
        save_run(bench.loop.trace, directory)
    return directory


def shaken(targets: np.ndarray) -> np.ndarray:
    return targets + np.where(np.arange(len(targets)) % 2, 2.0, 0.0)[:, None]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    slow = Bench(inference_s=0.2, timeout_s=2.0)
    rough = Bench(inference_s=0.0, timeout_s=2.0, episodes=2)
    rough.policy.on_action = shaken
    robot = {"type": "fake", "port": "/dev/a"}
    return (
        recorded(tmp_path / "slow", slow, denoising_steps=4, robot=robot),
        recorded(tmp_path / "rough", rough, denoising_steps=2, robot={**robot, "port": "/dev/b"}, seed=1),
    )


def compare(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["compare", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_report_itself_may_be_named(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs[0]), str(runs[1] / "report.json")]
    assert compare(*words, capsys=capsys) == compare(*map(str, runs), capsys=capsys)


def test_figures_and_settings_that_differ(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = compare(*map(str, runs), "--json", capsys=capsys)
    assert code == 0
    found = json.loads(out)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    assert found["runs"] == [str(run) for run in runs]
    assert found["settings"] == {"denoising_steps": [4, 2], "robot.port": ["/dev/a", "/dev/b"], "seed": [None, 1]}
    figures = found["figures"]
    assert figures["outcome"]["episodes"] == [1, 2]
    assert figures["timing"]["ticks"] == [report["run"]["ticks"] for report in reports]
    assert figures["timing"]["missed ticks"] == [0, 0]
    assert figures["timing"]["ticks waiting for inference"][0] == reports[0]["pacing"]["waiting_for_inference_ticks"] > 0
    assert figures["timing"]["pause per chunk p50 (ms)"][1] == pytest.approx(0, abs=0.01)
    assert figures["safety"]["speed-limited steps"] == [sum(report["safety"]["speed_limited"].values()) for report in reports]
    assert figures["motion"]["largest step (units/tick)"] == pytest.approx([1.0, 3.0])
    smooth, rough = figures["motion"]["jerk of commands, rms (units/s^3)"]
    assert rough > 3 * smooth
    assert "missed ticks" in err, "the table goes to standard error"


def test_jerk_of_known_motion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Third differences of +1, -1, +1 ... units are +-4 units a tick cubed, at 30 Hz 4 * 30^3."""
    run = recorded(tmp_path / "run", Bench(timeout_s=1.0))
    with np.load(run / "run.npz") as data:
        arrays = dict(data)
    zigzag = np.where(np.arange(len(arrays["time_s"])) % 2, 0.5, -0.5)
    arrays["commanded"] = np.repeat(zigzag[:, None], 6, axis=1)
    arrays["commanded"][:, -1] = np.random.default_rng(0).uniform(0, 100, len(zigzag))  # the gripper does not count
    np.savez(run / "run.npz", **arrays)
    _, out, _ = compare(str(run), str(run), "--json", capsys=capsys)
    assert json.loads(out)["figures"]["motion"]["jerk of commands, rms (units/s^3)"] == pytest.approx([4 * 30**3] * 2)


def test_the_table_is_for_people(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compare("--runs", *map(str, runs), capsys=capsys)
    assert code == 0
    for word in ("missed ticks", "denoising_steps:  4 -> 2", "not set -> 1", "machine: the same", "speed-limited steps"):
        assert word in out
    code, out, _ = compare(*map(str, runs), "--quiet", capsys=capsys)
    assert len(out.splitlines()) == 1
    assert "3 settings differ" in out


def test_a_run_that_played_nothing_can_be_compared(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = recorded(tmp_path / "dry", Bench(dry_run=True))
    code, out, _ = compare(str(dry), str(runs[0]), "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["figures"]["motion"]["largest step (units/tick)"][0] is None


def test_what_is_no_run_is_said(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(runs[0])
    (tmp_path / "other").mkdir()
    assert "report.json" in compare(good, str(tmp_path / "other"), capsys=capsys)[2]
    (tmp_path / "other" / "report.json").write_text('{"schema": "something.else"}')
    assert "gr00t_fast.run_report" in compare(good, str(tmp_path / "other"), capsys=capsys)[2]
    (tmp_path / "other" / "report.json").write_text("{")
    assert "report.json" in compare(good, str(tmp_path / "other"), capsys=capsys)[2]
    (runs[1] / "run.npz").write_bytes(b"PK\x03\x04 half a file")
    code, out, err = compare(good, str(runs[1]), capsys=capsys)
    assert (code, out) == (2, "")
    assert "run.npz" in err


@pytest.mark.parametrize("words", [[], ["one"], ["one", "two", "three"]])
def test_two_runs_are_needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = compare(*words, capsys=capsys)
    assert code == 2
    assert "RUN RUN" in err
