"""`gr00t-fast trials`: figures against published tables and simulated studies, and whole studies on the simulated arm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from control_fakes import Bench
from person import Person
from waiting import PATIENCE_S, until

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, UnsafeActionError
from gr00t_fast.base.keyboard import ENTER, ESCAPE, LEFT, RIGHT
from gr00t_fast.base.measurement import wilson_interval
from gr00t_fast.cli import run, trials
from gr00t_fast.cli.main import main
from gr00t_fast.control.limits import Poses
from gr00t_fast.evaluation.compare import RecordedRun, seam_jerk
from gr00t_fast.evaluation.trials import TrialSession, mean_of, newcombe_interval, order_of, trials_needed

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "checkpoints" / "so100-sim-reach"
SIM = ["--robot.type=so100_sim", "--robot.task=reach", "--robot.cameras={front: {type: sim, width: 64, height: 48}}", "--timeout=0.6"]
SIM += [f"--model_path={CHECKPOINT}", "--lang_instruction=Reach the block", "--device=cpu"]
RESULTS = ROOT / "benchmarks" / "results" / "trials"


# Statistics


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_differences_of_newcombes_table(first: tuple[int, int], second: tuple[int, int], low: float, high: float) -> None:
    """Statistics in Medicine 17, 873-890 (1998), table II, method 10."""
    assert newcombe_interval(first, second) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("solved", "of", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_rates_of_newcombes_table(solved: int, of: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, 857-872 (1998), table I, method 3."""
    assert wilson_interval(solved, of) == pytest.approx((low, high), abs=1e-4)


def test_intervals_cover_the_truth_in_95_of_100_studies() -> None:
    """10,000 studies of 20 trials of each setting, at rates from 0.1 to 0.9."""
    n, rng = 20, np.random.default_rng(0)
    of_rate = np.array([wilson_interval(solved, n) for solved in range(n + 1)])
    of_difference = np.array([[newcombe_interval((first, n), (second, n)) for second in range(n + 1)] for first in range(n + 1)])
    rates = rng.uniform(0.1, 0.9, (2, 10_000))
    solved = rng.binomial(n, rates)
    difference, found = rates[0] - rates[1], of_difference[solved[0], solved[1]]
    covered = {
        "Wilson": np.mean((of_rate[solved, 0] <= rates) & (rates <= of_rate[solved, 1])),
        "Newcombe": np.mean((found[:, 0] <= difference) & (difference <= found[:, 1])),
    }
    print(covered)
    assert all(0.94 <= share <= 0.965 for share in covered.values()), covered


def test_how_many_trials_are_needed() -> None:
    """R's power.prop.test: (.50, .75, power .90) in its documentation, n = 76.7; (.65, .50): n = 169.3."""
    assert trials_needed(0.5, 0.75, power=0.9) == 77
    assert trials_needed(0.65, 0.5) == trials_needed(0.5, 0.65) == 170
    assert trials_needed(0.5, 0.5) is None


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(10.0, 2.0, 400)
    found, half = mean_of(values.tolist()), 1.96 * values.std() / 20
    assert found["bootstrap_95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)
    assert mean_of([]) == {"count": 0, "mean": None, "bootstrap_95": None}
    assert mean_of([2.0]) == {"count": 1, "mean": 2.0, "bootstrap_95": None}


def test_jerk_at_seams_is_that_of_the_ticks_about_a_new_chunk() -> None:
    def found(step_at: int, chunk_starts: list[int]) -> float | None:
        commanded = np.zeros((40, 6))
        commanded[step_at:, 0] = 1.0
        arrays = {"commanded": commanded, "joint_names": np.array(SO100_JOINTS), "episode": np.zeros(40, int), "chunk_starts": np.array(chunk_starts)}
        return seam_jerk(RecordedRun(Path(), {"run": {"target_hz": 10.0}}, arrays))

    assert found(20, [0, 20]) == pytest.approx(1000 * np.sqrt((1 + 4 + 1) / (3 * 5)), abs=0.1)  # third differences 1, -2, 1; five joints
    assert found(20, [0, 30]) == 0.0
    assert found(20, [0]) is None, "the first chunk joins nothing"


@pytest.mark.parametrize("runs", [1, 2, 7, 20])
def test_the_order_is_random_balanced_and_that_of_its_seed(runs: int) -> None:
    orders = [order_of(runs, ["a", "b"], seed) for seed in range(200)]
    assert order_of(runs, ["a", "b"], 3) == orders[3]
    assert all(Counter(order) == {"a": runs, "b": runs} for order in orders)
    for end in range(4, 2 * runs + 1, 4):
        assert all(Counter(order[end - 4 : end]) == {"a": 2, "b": 2} for order in orders), "each block is balanced"
    shares = np.mean([[name == "a" for name in order] for order in orders], axis=0)
    assert shares == pytest.approx(np.full(2 * runs, 0.5), abs=0.15), "no place in the order is one setting's"
    assert order_of(runs, ["a"], 0) == ["a"] * runs


# A person's keys


def judged(pressed: dict[int, list[str]], solved_at: int | None = None) -> tuple[TrialSession, Bench]:
    """A trial of a second, 30 ticks; keys by the number of the look at the keyboard."""
    bench, looks = Bench(timeout_s=1.0, poses=Poses(rest=[0.0, 0.0, 0.0, 0.0, 0.0, 50.0])), iter(range(1, 10_000))
    keys = SimpleNamespace(poll=lambda: pressed.get(next(looks), []))
    began: list[float] = []
    bench.robot.success = None if solved_at is None else False

    def solve() -> None:
        bench.robot.success = bench.robot.success or len(bench.robot.sent) >= solved_at

    if solved_at is not None:
        bench.robot.on_observe = solve
    bench.loop.session = TrialSession(
        bench.stop, keys, None, bench.said.append, bench.clock.now_s, robot=bench.robot, on_begin=lambda: began.append(bench.clock.now_s())
    )
    bench.loop.run()
    assert len(began) == bench.loop.trace.episodes
    return bench.loop.session, bench


@pytest.mark.parametrize(
    ("pressed", "success", "excluded", "least_s"),
    [
        ({15: ["s"]}, True, "", 0.2),
        ({15: ["f"]}, False, "", 0.2),
        ({15: [RIGHT]}, None, "", None),
        ({}, None, "", None),
        ({15: [LEFT]}, None, "left out by a person", None),
        ({15: ["s"], 17: [LEFT]}, True, "left out by a person", 0.2),
        ({15: [ESCAPE]}, None, "stopped", None),
        ({12: [ENTER], 15: ["t", "s"]}, True, "", 0.2),
    ],
    ids=["s", "f", "right arrow", "time limit", "left arrow", "left arrow afterwards", "Esc", "no instruction is typed"],
)
def test_keys_end_a_trial(pressed: dict[int, list[str]], success: bool | None, excluded: str, least_s: float | None) -> None:
    session, bench = judged(pressed)
    assert (session.success, session.excluded, session.stopped) == (success, excluded, excluded == "stopped")
    assert bench.loop.trace.episodes == 1, "nothing is played again"
    assert (session.time_s is None) == (least_s is None)
    assert least_s is None or least_s <= session.time_s <= 0.6
    if pressed:
        assert len(bench.loop.trace) < 20, "and not at its time limit"


def test_an_arm_that_can_tell_judges_itself() -> None:
    session, bench = judged({}, solved_at=10)
    assert (session.success, session.excluded) == (True, "")
    assert session.time_s == pytest.approx(10 / 30, abs=0.1)
    assert len(bench.loop.trace) < 15
    session, _ = judged({}, solved_at=1000)
    assert (session.success, session.excluded, session.time_s) == (False, "", None)


# Bad input


BAD = {
    "flag of a": (["--a=--denoising_stepz=2"], ("--a=", "--denoising_steps")),
    "value of b": (["--b=--denoising_steps=x"], ("--b=", "denoising_steps")),
    "range of b": (["--b=--denoising_steps=0"], ("--b=", "denoising_steps")),
    "quotes of a": (["--a=--lang_instruction='go"], ("--a=", "quotation")),
    "flag of both": (["--denoising_stepz=2"], ("--denoising_steps",)),
    "study's flag in a": (["--a=--runs=3"], ("--a=", "--runs")),
    "place in b": (["--b=--out=elsewhere"], ("--b=", "--out")),
    "recording": (["--record=data"], ("--record",)),
    "episodes": (["--episodes=3"], ("--episodes",)),
    "no trial": (["--runs=0"], ("--runs",)),
    "no time limit": (["--timeout=null"], ("--timeout",)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, told = BAD[name]
    assert main(["trials", *SIM, f"--out={tmp_path / 'study'}", *words]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in told), said
    assert ("--a=" in said, "--b=" in said) == ("--a=" in told, "--b=" in told), "whose it is"
    assert not (tmp_path / "study").exists()


def test_what_a_run_misses_may_be_in_a_and_b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*(word for word in SIM if "model_path" not in word), f"--out={tmp_path}", f"--a=--model_path={CHECKPOINT}"]
    assert list(trials.main.parse(words).settings) == ["a"], "without --b there is one setting"
    assert main(["trials", *words, "--b=--seed=1"]) == 2
    assert "--model_path" in capsys.readouterr().err
    assert main(["trials", *SIM]) == 2
    assert "--out" in capsys.readouterr().err


# Policies


def test_a_policy_is_loaded_once_where_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[Any] = []

    def load(config: run.RunConfig) -> Any:
        loaded.append(SimpleNamespace(denoising_steps=config.denoising_steps or 4, action_horizon=config.action_horizon or 16, seed=config.seed))
        return loaded[-1]

    def settings(*flags: str) -> list[run.RunConfig]:
        return list(trials.main.parse([*SIM, f"--out={tmp_path}", *flags]).settings.values())

    said: list[str] = []
    first, second = settings("--a=--denoising_steps=2", "--b=--action_horizon=8")
    policies = trials.Policies([first, second], load, said.append)
    for config, asked in ((first, (2, 16)), (second, (4, 8)), (first, (2, 16))):
        policy = policies(config)
        assert (policy.denoising_steps, policy.action_horizon) == asked
    assert len(loaded) == 1

    loaded.clear()
    pair = settings("--a=--seed=1", "--b=--seed=2")
    policies = trials.Policies(pair, load, said.append)
    assert [policies(pair[which]).seed for which in (0, 1, 0)] == [1, 2, 1]
    assert (len(loaded), said) == (2, []), "both fit into this machine"

    loaded.clear()
    monkeypatch.setattr(trials, "linux_says", lambda *_: "1000 kB")
    policies = trials.Policies(pair, load, said.append)
    before = len(loaded)
    assert [policies(pair[which]).seed for which in (0, 0, 1, 1)] == [1, 1, 2, 2]
    assert len(loaded) == before + 4, "the wait tells nothing"
    assert "one after the other" in said[0]


# Whole studies


def study_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "study.json").read_text())


PAIR = ["--a=--controller=sync --denoising_steps=1", "--b=--controller=threaded --denoising_steps=3", "--order_seed=1"]


@pytest.mark.slow
def test_nothing_tells_which_setting_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is said of a trial, and how its files are called, is the same for A and B but for number and outcome."""
    pytest.importorskip("mujoco")
    assert main(["trials", *SIM, *PAIR, "--runs=3", f"--out={tmp_path}"]) == 0
    during, _, after = capfd.readouterr().out.partition("\nA  --controller=sync")
    assert "threaded" in after, "in the end it is said"
    begin, *told = re.split(r"^(?=trial \d+ of 6$)", during, flags=re.MULTILINE)
    assert not re.search(r"sync|threaded|denoising|--[ab]|inference|\d ms|\bA\b|\bB\b", begin + "".join(told)), during
    alike = [re.sub(r"success|failure", "OUTCOME", re.sub(r"trial \d", "trial N", each)).strip() for each in told]
    assert len(alike) == 6
    assert len(set(alike)) == 1, during
    found = study_of(tmp_path)
    names = {tuple(sorted(path.name for path in (tmp_path / trial["directory"]).iterdir())) for trial in found["trials"]}
    assert [trial["directory"] for trial in found["trials"]] == [f"trial_{number:02d}" for number in range(1, 7)]
    assert len(names) == 1
    played = [json.loads((tmp_path / trial["directory"] / "report.json").read_text())["settings"] for trial in found["trials"]]
    assert [{"sync": "a", "threaded": "b"}[each["controller"]] for each in played] == found["order"] == order_of(3, ["a", "b"], 1)
    assert [each["denoising_steps"] for each in played] == [{"a": 1, "b": 3}[name] for name in found["order"]]
    assert len({each["seed"] for each in played}) == 6, "each trial has a layout of its own"
    for name in ("study.txt", "study.html", "study.png"):
        assert (tmp_path / name).stat().st_size > 200
    result = found["result"]
    for name in "ab":
        counted = [trial["success"] for trial, which in zip(found["trials"], found["order"], strict=True) if which == name]
        assert (result["settings"][name]["trials"], result["settings"][name]["successes"]) == (3, sum(counted))
    assert "fewer than 10" in after


def started(directory: Path, *flags: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "gr00t_fast", "trials", *SIM, *PAIR, "--runs=2", f"--out={directory}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=environment)


def begun(directory: Path, count: int) -> bool:
    return (directory / "study.json").exists() and len(study_of(directory)["trials"]) >= count


@pytest.mark.slow
def test_a_study_goes_on_after_kill_9_and_after_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    with started(tmp_path) as killed:
        until(lambda: begun(tmp_path, 2), "the second trial")
        killed.send_signal(signal.SIGKILL)
    during = study_of(tmp_path)
    assert during["trials"][-1]["excluded"] == "cut off"
    assert "order" not in during, "the key does not lie open"
    with started(tmp_path, "--resume") as stopped:
        until(lambda: begun(tmp_path, len(during["trials"]) + 1), "the trial after it")
        stopped.send_signal(signal.SIGINT)
        said = stopped.communicate(timeout=PATIENCE_S)[0]
    assert stopped.returncode == 130, said
    assert "--resume" in said
    assert "A  --controller" not in said, "what is not complete stays blinded"
    with started(tmp_path, "--resume") as last:
        said = last.communicate(timeout=PATIENCE_S)[0]
    assert last.returncode == 0, said
    found = study_of(tmp_path)
    counted = [trial for trial in found["trials"] if not trial["excluded"]]
    assert sorted(trial["number"] for trial in counted) == list(range(4))
    assert Counter(trial["excluded"] for trial in found["trials"] if trial["excluded"]) == {"cut off": 1, "stopped": 1}
    assert sum((Counter(row["excluded"]) for row in found["result"]["settings"].values()), Counter()) == {"cut off": 1, "stopped": 1}
    assert len({trial["directory"] for trial in found["trials"]}) == 6
    assert re.search(r"cut off +[01]", said)
    assert (found["order_seed"], found["conditions"]) == (during["order_seed"], during["conditions"])

    for flags, told in (
        (["--a=--denoising_steps=2", PAIR[1]], ("denoising_steps", "2", "1")),
        ([*PAIR[:2], "--runs=4"], ("runs", "2", "4")),
        (PAIR[:1], ("flags.b",)),
        ([*PAIR[:2], "--order_seed=2"], ("order_seed",)),
    ):
        assert main(["trials", *SIM, "--runs=2", *flags, f"--out={tmp_path}", "--resume"]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in ("another study", *told)), said
    assert main(["trials", *SIM, *PAIR, "--runs=2", f"--out={tmp_path}"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["trials", *SIM, *PAIR, "--runs=2", f"--out={tmp_path / 'none'}", "--resume"]) == 2
    assert "none" in capsys.readouterr().err
    assert study_of(tmp_path) == found


@pytest.mark.slow
def test_a_crash_is_counted_and_the_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    begun, crashed = [], []

    def load(config: run.RunConfig) -> Any:
        policy = run.load(config)
        reset, infer = policy.reset, policy.get_action

        def get_action(*arguments: Any, **options: Any) -> Any:
            if len(begun) == 2 and not crashed:
                crashed.append(True)
                raise UnsafeActionError("the network answered NaN")
            return infer(*arguments, **options)

        def noted() -> None:
            begun.append(True)
            reset()

        policy.reset, policy.get_action = noted, get_action
        return policy

    config = trials.main.parse([*SIM, "--runs=2", "--b=", f"--out={tmp_path}", "--json"])
    assert trials.work(config, load) == 0
    said = capsys.readouterr()
    assert "WARNING: the network answered NaN" in said.err
    assert "the same setting" in said.err
    result = json.loads(said.out)
    assert result == study_of(tmp_path)["result"]
    rows = result["settings"].values()
    assert sum(row["trials"] for row in rows) == 3
    assert [row["excluded"] for row in rows if row["excluded"]] == [{"crash: UnsafeActionError": 1}]
    assert "crash: UnsafeActionError" in (tmp_path / "study.txt").read_text()


def test_what_ends_a_run_before_it_begins_leaves_no_study(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")

    def load(config: run.RunConfig) -> Any:
        policy = run.load(config)
        policy.warm_up = lambda *_: (_ for _ in ()).throw(ConfigError("it does not fit"))
        return policy

    with pytest.raises(ConfigError, match="it does not fit"):
        trials.work(trials.main.parse([*SIM, f"--out={tmp_path / 'study'}"]), load)
    assert not (tmp_path / "study" / "study.json").exists(), "the next command needs no --resume"


@pytest.mark.parametrize(("name", "tells"), [("sync_or_threaded", True), ("threaded_twice", False)])
def test_the_committed_studies_say_what_their_trials_do(name: str, tells: bool) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert order_of(found["conditions"]["runs"], ["a", "b"], found["order_seed"]) == found["order"]
    solved = [sum(bool(trial["success"]) for trial in found["trials"] if found["order"][trial["number"]] == which) for which in "ab"]
    low, high = newcombe_interval((solved[0], 20), (solved[1], 20))
    assert found["result"]["difference"]["newcombe_95"] == pytest.approx([low, high], abs=1e-4)
    assert (low > 0 or high < 0) is tells
    assert (found["conditions"]["settings"]["a"] != found["conditions"]["settings"]["b"]) is tells


@pytest.mark.slow
def test_a_person_arranges_and_judges_a_real_arm(tmp_path: Path) -> None:
    """On the virtual bus, at a terminal."""
    pytest.importorskip("mujoco")
    pytest.importorskip("lerobot")
    words = [sys.executable, "-m", "gr00t_fast", "bus", f"--link={tmp_path / 'port'}", f"--write_calibration={tmp_path}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as bus:
        assert "Virtual servo bus" in bus.stdout.readline()
        arm = ["--robot.type=so100_follower", f"--robot.port={tmp_path / 'port'}", "--robot.id=virtual", f"--robot.calibration_dir={tmp_path}"]
        flags = [*arm, *SIM[2:], "--preflight=warn", "--runs=3", "--a=--denoising_steps=1", f"--out={tmp_path / 'study'}", "--timeout=60"]
        person = Person([sys.executable, "-m", "gr00t_fast", "trials", *flags])
        for number, keys, answer in ((1, b"s", b""), (2, b"\x1b[C", b"f"), (3, b"\x1b[C", b"x")):
            person.wait_for(f"trial {number} of 3: put things in their places")
            person.press(b"\r")
            until(lambda: begun(tmp_path / "study", number), "its begin")  # noqa: B023 - called at once
            person.press(keys)
            if answer:
                person.wait_for("how did it end?")
                person.press(answer)
        assert person.process.wait(PATIENCE_S) == 0
        bus.terminate()
    found = study_of(tmp_path / "study")
    assert [(trial["success"], trial["excluded"]) for trial in found["trials"]] == [(True, ""), (False, ""), (None, "not judged")]
    assert [trial["time_s"] is None for trial in found["trials"]] == [False, True, True]
    assert found["result"]["settings"]["a"]["excluded"] == {"not judged": 1}
    assert found["result"]["settings"]["a"]["time_s"]["count"] == 1
