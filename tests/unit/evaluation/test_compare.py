"""`gr00t-fast compare`: figures of two runs whose times are known exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from control_fakes import Bench

from gr00t_fast.cli.main import main
from gr00t_fast.control.planner import PlannerOptions
from gr00t_fast.record.report import build_report, contents, write_files

JERK = "jerk of commands, rms (units/s^3)"


def recorded(directory: Path, bench: Bench, **settings: object) -> Path:
    bench.loop.run()
    write_files(directory, contents(bench.loop.trace, build_report(bench.loop, {"out": str(directory), **settings})))
    return directory


def shaken(targets: np.ndarray) -> np.ndarray:
    return targets + np.where(np.arange(len(targets)) % 2, 2.0, 0.0)[:, None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tmp_path = tmp_path_factory.mktemp("runs")
    slow, rough = Bench(inference_s=0.2, timeout_s=2.0), Bench(inference_s=0.0, timeout_s=2.0, episodes=2)
    rough.policy.on_action = shaken
    recorded(tmp_path / "slow", slow, denoising_steps=4, robot={"type": "fake", "port": "/dev/a"})
    recorded(tmp_path / "rough", rough, denoising_steps=2, robot={"type": "fake", "port": "/dev/b"}, seed=1)
    return [str(tmp_path / "slow"), str(tmp_path / "rough")]


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> tuple[int, str, str]:
        code = main(["compare", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_figures_and_settings_that_differ(runs: list[str], compare) -> None:
    code, out, err = compare(*runs, "--json")
    found = json.loads(out)
    reports = [json.loads((Path(run) / "report.json").read_text()) for run in runs]
    assert (code, found["runs"]) == (0, runs)
    assert found["settings"] == {"denoising_steps": [4, 2], "robot.port": ["/dev/a", "/dev/b"], "seed": [None, 1]}
    figures = found["figures"]
    assert figures["outcome"]["episodes"] == [1, 2]
    assert figures["timing"]["ticks"] == [report["run"]["ticks"] for report in reports]
    assert figures["timing"]["missed ticks"] == [0, 0]
    assert figures["timing"]["ticks waiting for inference"][0] == reports[0]["pacing"]["waiting_for_inference_ticks"] > 0
    assert figures["safety"]["speed-limited steps"] == [sum(report["safety"]["speed_limited"].values()) for report in reports]
    assert figures["motion"]["largest step (units/tick)"] == pytest.approx([1.0, 5.0])
    smooth, rough = figures["motion"][JERK]
    assert rough > 3 * smooth
    assert "missed ticks" in err, "the table goes to standard error"
    assert compare(runs[0], f"{runs[1]}/report.json", "--json")[1] == out, "the report itself may be named"


def test_what_auto_chose_is_a_setting(tmp_path: Path, compare) -> None:
    for name, mode in (("sync", "sync"), ("threaded", "threaded"), ("again", "sync")):
        recorded(tmp_path / name, Bench(inference_s=0.1, timeout_s=1.0, control=PlannerOptions(mode)), controller="auto")
    found = json.loads(compare(tmp_path / "sync", tmp_path / "threaded", "--json")[1])
    assert found["settings"] == {"controller": ["auto, sync", "auto, threaded"]}
    assert json.loads(compare(tmp_path / "sync", tmp_path / "again", "--json")[1])["settings"] == {}


def test_the_table_is_for_people(runs: list[str], compare) -> None:
    out = compare("--runs", *runs)[1]
    for word in ("missed ticks", "denoising_steps:  4 -> 2", "not set -> 1", "machine: the same", "speed-limited steps"):
        assert word in out
    assert len(compare(*runs, "--quiet")[1].splitlines()) == 1


def test_a_run_that_played_nothing_can_be_compared(runs: list[str], tmp_path: Path, compare) -> None:
    out = compare(recorded(tmp_path / "dry", Bench(dry_run=True)), runs[0], "--json")[1]
    assert json.loads(out)["figures"]["motion"]["largest step (units/tick)"][0] is None


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("report.json", None, "report.json"),
        ("report.json", b'{"schema": "something.else"}', "gr00t_fast.run_report"),
        ("run.npz", b"PK\x03\x04 half a file", "run.npz"),
    ],
)
def test_what_is_no_run_is_said(runs: list[str], tmp_path: Path, compare, file: str, content: bytes | None, named: str) -> None:
    bad = Path(shutil.copytree(runs[1], tmp_path / "bad"))
    (bad / file).unlink() if content is None else (bad / file).write_bytes(content)
    code, out, err = compare(runs[0], bad)
    assert (code, out, named in err) == (2, "", True), err


def test_two_runs_are_needed(compare) -> None:
    code, _, err = compare("one", "two", "three")
    assert (code, "RUN RUN" in err) == (2, True)
