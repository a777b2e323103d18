"""Overlapped inference: a million virtual ticks against an independent account of them, the loop around it, and the real thread."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_fakes import Bench, FakeClock, binding, modality_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_worker import VirtualWorker
from waiting import PATIENCE_S, until

from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.contracts import ActionPrefix, Observation, Policy
from gr00t_fast.base.errors import ConfigError, InferenceTimeoutError
from gr00t_fast.base.worker import thread_left_running
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.planner import DueTarget, Planner, PlannerOptions
from gr00t_fast.record.report import build_report, sections, text_of

ROOT = Path(__file__).resolve().parents[3]
# `GR00T_FAST_VIRTUAL_TICKS=1000000 pytest tests/unit/control/test_threaded.py` is the full count, under a minute.
TICKS = int(os.environ.get("GR00T_FAST_VIRTUAL_TICKS", "40000"))
TICKS_PER_EXAMPLE = 1000
FPS = 30.0
STEP = DEFAULT_MAX_SPEED_DEG_S / FPS + 1e-6  # how far a target may go in a tick


class UnreachableError(ConnectionError):
    """What a policy on a server raises while the server restarts."""


class ScriptedPolicy(Policy):
    """Answers chunks whose numbers say where they come from: joint 0 the observation, joint 1 the row, joint 2 the policy's own episode,
    joint 3 whether joint 4 is NaN.

    `script`: what each call does, repeated for ever: "ok", "lost" (UnreachableError), "crash" (a bug), "nan".
    """

    continues = True

    def __init__(self, script: list[str], horizon: int) -> None:
        self._script, self._horizon = itertools.cycle(script), horizon
        self.resets = 0
        self.prefixes: list[tuple[int, ActionPrefix]] = []
        self.unusable: set[int] = set()  # observations that were answered with NaN
        self.last_error: Exception | None = None

    def get_action(self, observation: dict, noise: object = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        observed = int(observation["state.single_arm"][0, 0])
        if prefix is not None:
            self.prefixes.append((observed, prefix))
        what = next(self._script)
        if what in ("lost", "crash"):
            self.last_error = UnreachableError("no answer") if what == "lost" else ZeroDivisionError("a bug")
            raise self.last_error
        arm = np.zeros((self._horizon, 5), np.float32)
        arm[:, 0], arm[:, 1], arm[:, 2] = observed, np.arange(self._horizon), self.resets
        if what == "nan":
            arm[:, 3], arm[:, 4] = 1, np.nan
            self.unusable.add(observed)
        return {"action.single_arm": arm, "action.gripper": np.zeros((self._horizon, 1), np.float32)}

    def recognise(self, error: Exception) -> None:
        """What surfaced must be the very object that was raised."""
        assert error is self.last_error

    def get_modality_config(self) -> dict:
        return modality_config()

    def reset(self) -> None:
        self.resets += 1


FRAMES = {"front": np.zeros((2, 2, 3), np.uint8)}


def observation(tick: int) -> Observation:
    return Observation(np.array([tick, 0, 0, 0, 0, 0], float), FRAMES, 0.0)


def overlapping(policy: Policy, options: PlannerOptions | None = None, worker: VirtualWorker | None = None) -> Planner:
    return Planner(policy, binding(), "go", FakeClock(), FPS, options or PlannerOptions("threaded"), worker, (UnreachableError,))


def play_ticks(planner: Planner, worker: VirtualWorker, ticks: int) -> None:
    """A target at the beginning of each tick, an observation in its middle."""
    holding = True
    for tick in range(ticks):
        worker.now = 2 * tick
        planner.arrived(tick, holding)
        holding = planner.buffer.due(tick) is None
        worker.now += 1
        if planner.want_inference(tick):
            planner.ask(observation(tick), tick)


@dataclass
class Account:
    """What must happen, kept apart from the code under test: the observation behind what plays, the tick of its first row, and when nothing was
    due."""

    horizon: int
    observed: int | None = None
    origin: int = 0
    idle: set[int] = field(default_factory=set)  # observations with which no row was left
    underrun: int = 0
    ticks: int = 0

    def begin(self) -> None:
        """An episode."""
        self.observed = None
        self.idle.clear()

    def left(self, tick: int) -> int:
        """Rows from `tick` on."""
        return 0 if self.observed is None else max(0, self.origin + self.horizon - tick)

    def enter(self, observed: int, tick: int, holding: bool) -> None:
        assert self.observed is None or observed > self.observed, "an older observation than the one that played before"
        self.observed, self.origin = observed, tick if holding and observed in self.idle else observed


def play(
    script: list[str], delays: list[int], skips: list[int], resets: list[int], horizon: int, options: PlannerOptions, ticks: int
) -> tuple[Account, Planner]:
    """Run `ticks` targets in virtual time and check each one. Restarts (of the episode, or after a crash) go on with the same objects."""
    policy, worker = ScriptedPolicy(script, horizon), VirtualWorker(delays)
    planner = overlapping(policy, options, worker)
    account, skip, gap = Account(horizon), itertools.cycle(skips), itertools.cycle(resets)
    planner.reset()
    tick, next_reset, holding = 0, next(gap), True
    while account.ticks < ticks:
        try:
            if account.ticks >= next_reset:
                planner.reset()
                account.begin()
                next_reset, holding = account.ticks + next(gap), True
            worker.now = 2 * tick
            entered = planner.arrived(tick, holding)
            if entered is not None:
                account.enter(int(entered.targets[0, 0]), tick, holding)
            due = planner.buffer.due(tick)
            check(account, due, tick, policy)
            holding, account.ticks = due is None, account.ticks + 1
            worker.now = 2 * tick + 1
            if planner.want_inference(tick):
                planner.ask(observation(tick), tick)
                account.idle |= set() if account.left(tick + 1) else {tick}
            else:
                assert planner._call is not None, "nobody thinks: the arm would stand for ever"
        except (UnreachableError, ZeroDivisionError) as error:
            policy.recognise(error)
            planner.reset()
            account.begin()
            holding = True
        tick += next(skip)
    return account, planner


def check(account: Account, due: DueTarget | None, tick: int, policy: ScriptedPolicy) -> None:
    if due is None:
        account.underrun += 1
        assert account.left(tick) == 0
        return
    assert (due.target[0], due.target[1]) == (account.observed, tick - account.origin), "not the action that is due now"
    assert due.age_ticks == tick - account.observed
    assert due.target[2] == pytest.approx(policy.resets), "from an episode that is over"
    assert np.isfinite(due.target).all() == (due.target[3] == 0)


EVENT = st.sampled_from(["ok"] * 12 + ["lost", "lost", "crash", "nan"])
DELAY = st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(20, 150))
SKIP = st.sampled_from([1] * 10 + [2, 7])
OVERLAP = st.builds(lambda join: PlannerOptions("threaded", join, max_hold_s=None), st.sampled_from(["none", "prefix"]))


def test_a_million_virtual_ticks() -> None:
    """Random delays, spikes, lost and crashed inferences, episode restarts, skipped ticks: no stop, no action out of order, none unaccounted."""
    total = Account(0)

    @settings(max_examples=max(1, TICKS // TICKS_PER_EXAMPLE), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        script=st.lists(EVENT, min_size=1, max_size=30).filter(lambda script: "ok" in script),
        delays=st.lists(DELAY, min_size=1, max_size=30),
        skips=st.lists(SKIP, min_size=1, max_size=20),
        resets=st.lists(st.integers(1, 500), min_size=1, max_size=5),
        horizon=st.sampled_from([16, 50]),
        options=OVERLAP,
    )
    def scenario(**drawn: object) -> None:
        account, _ = play(ticks=TICKS_PER_EXAMPLE, **drawn)
        total.ticks += account.ticks
        total.underrun += account.underrun

    scenario()
    print(f"{total.ticks} virtual ticks, {total.underrun} of them underruns")
    assert total.ticks >= TICKS
    assert 0 < total.underrun < total.ticks


def test_a_prefix_is_what_plays_from_the_observation_on_and_none_where_that_is_nan() -> None:
    for answer in ("ok", "nan"):
        policy, worker = ScriptedPolicy([answer], 16), VirtualWorker([5])
        controller = overlapping(policy, PlannerOptions("threaded", smoothing="prefix"), worker)
        controller.reset()
        play_ticks(controller, worker, 60)
        assert worker.calls > 3
        if answer == "ok":
            observed, prefix = policy.prefixes[-1]
        else:
            assert policy.prefixes == []
    rows = prefix.actions["action.single_arm"]
    assert (rows[:, 0] + rows[:, 1]).tolist() == [observed + i for i in range(len(rows))]
    assert (len(rows), prefix.inference_delay) == (13, 3)  # what is seen in one tick arrives five half ticks later


def test_a_prefix_commits_to_the_longest_of_the_last_delays() -> None:
    """Before anything has been measured, to what continuing a chunk took at warm-up: the first chunk of all continues none."""

    class Warmed(ScriptedPolicy):
        def warm_up(self, instruction: str, continuing: bool) -> dict[str, float]:
            return {"total": 120.0}

    policy, worker = Warmed(["ok"], 16), VirtualWorker([0, 0, *[5] * 6, 13, *[5] * 50])
    controller = overlapping(policy, PlannerOptions("threaded", smoothing="prefix"), worker)
    controller.warm_up()
    controller.reset()
    play_ticks(controller, worker, 160)
    committed = [prefix.inference_delay for _, prefix in policy.prefixes]
    assert committed[0] == 4  # 0.12 s
    assert 7 in committed[7:9]
    assert committed[9:25] == [7] * 16
    assert committed[-1] == 3


def test_a_server_is_told_how_long_the_actions_that_play_last() -> None:
    """And nothing while the arm stands still, waiting."""
    told: list[tuple[int, float | None]] = []

    class Served(ScriptedPolicy):
        takes_deadline = True

        def get_action(self, observation: dict, deadline_s: float | None = None) -> dict[str, np.ndarray]:  # type: ignore[override]
            told.append((int(observation["state.single_arm"][0, 0]), deadline_s))
            return super().get_action(observation)

    policy, worker = Served(["ok"], 16), VirtualWorker([5, 5, 60])
    controller = overlapping(policy, worker=worker)
    controller.reset()
    play_ticks(controller, worker, 60)
    assert told[0] == (0, None)
    playing = 3  # the tick of row 0 of the chunk that plays when the next is asked for: the first one was waited for
    for tick, deadline_s in told[1:]:
        assert (deadline_s or 0.0) == pytest.approx(max(playing + 16 - (tick + 1), 0) / FPS)
        playing = tick + 3 if deadline_s is None else tick  # that chunk is waited for too
    assert len({deadline_s for _, deadline_s in told}) > 2


def bench(inference_s: float, timeout_s: float = 3.0, horizon: int = 16, episodes: int = 1, **options: Any) -> Bench:
    """A loop whose arm moves while the next chunk is computed, in virtual time."""
    control = PlannerOptions(**{"controller": "threaded", **options})
    return Bench(inference_s, policy_horizon=horizon, control=control, timeout_s=timeout_s, episodes=episodes, camera_fault=None)


def test_the_loop_never_pauses_after_the_first_plan_of_an_episode() -> None:
    run = bench(0.2, episodes=2)
    data = run.loop.run().arrays()
    for episode in (0, 1):
        assert np.allclose(np.diff(data["time_s"][data["episode"] == episode]), 1 / FPS)
    assert not data["underrun"].any()
    assert data["age_ticks"].max() <= 14
    assert data["age_ticks"][30:80].min() >= 6  # 0.2 s are six ticks: those rows are dropped
    assert data["age_ticks"][np.flatnonzero(np.diff(data["episode"], prepend=-1))].tolist() == [6, 6]
    assert run.policy.resets == 2


@pytest.mark.parametrize("max_hold_s", [5.0, None])
def test_an_inference_that_hangs_does_not_hold_the_arm_for_ever(max_hold_s: float | None) -> None:
    run = bench(0.1, timeout_s=20.0, max_hold_s=max_hold_s)
    run.robot.on_send = lambda: len(run.robot.sent) == 60 and setattr(run.policy, "inference_s", 1e6)
    with contextlib.nullcontext() if max_hold_s is None else pytest.raises(InferenceTimeoutError, match="--max_hold_s"):
        run.loop.run()
    assert run.loop.trace.ended_by == ("done" if max_hold_s is None else "error")
    assert run.robot.calls[-1] == "land"
    held_s = run.underrun / FPS
    assert held_s > 10 if max_hold_s is None else held_s == pytest.approx(5.0, abs=0.1)
    (warning,) = [line for line in run.said if line.startswith("WARNING")]
    assert "2.0 s" in warning


@pytest.mark.parametrize("underrun", [False, True], ids=["while a chunk plays", "while the arm holds"])
def test_a_cable_that_was_out_is_no_inference_that_hangs(underrun: bool) -> None:
    """For 3 s, with an inference of 13 ticks and 16 actions; the arm has sagged when it is back, and waits for a new chunk."""
    run = bench(0.42, timeout_s=8.0, max_hold_s=2.0)
    robot, out, sagged = run.robot, [], []

    def unplug() -> None:
        if not out and len(robot.sent) > 60 and (run.loop.mode is Mode.HOLD) is underrun:
            out.append(len(robot.sent))
            run.clock.advance(3.0)
            robot.pose = robot.pose - 18.0
            robot.move = lambda: None
            sagged.append(robot.pose)

    robot.on_observe = unplug
    trace = run.loop.run()
    assert trace.ended_by == "done"
    commanded = trace.arrays()["commanded"][out[0] :]
    assert np.abs(commanded[0] - sagged[0]).max() <= STEP
    assert np.abs(np.diff(commanded[:10], axis=0)).max() <= 2.0, "a new plan, from where it is"
    assert run.loop.pacer.missed_ticks >= 89


def test_an_inference_longer_than_a_chunk_is_refused_before_the_arm_moves() -> None:
    run = bench(1.0, horizon=8)
    with pytest.raises(ConfigError, match="--controller=sync"):
        run.loop.run()
    assert run.robot.sent == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"controller": "sync", "smoothing": "prefix"}, "--smoothing=prefix"),
        ({"max_hold_s": 0.0}, "--max_hold_s"),
        ({"action_horizon": 0}, "--action_horizon"),
        ({"smoothing": "prefix"}, "FakePolicy"),  # cannot continue a chunk
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        bench(0.0, **options)


# --controller=auto: what it chooses, that the choice keeps the arm moving, and that it gives way when inferences turn out longer.


def auto(
    inference_ms: float, told_ms: float | None, horizon: int = 16, timeout_s: float = 20.0, slow: tuple = (0.0, lambda number: False), **options
) -> Bench:
    """A run whose policy takes `inference_ms`, says at warm-up that it takes `told_ms`, and takes `slow[0]` seconds where `slow[1]` says so of the
    number of an inference."""
    run = bench(inference_ms / 1000, timeout_s, controller="auto", action_horizon=horizon, **options)
    run.policy.warm_up = lambda *_: {} if told_ms is None else {"total": told_ms}
    answer = run.policy.get_action

    def get_action(*args: Any, **options: Any) -> dict[str, np.ndarray]:
        run.policy.inference_s = slow[0] if slow[1](len(run.policy.seen)) else inference_ms / 1000
        return answer(*args, **options)

    run.policy.get_action = get_action
    run.planner.warm_up()
    return run


def choices(run: Bench) -> list[str]:
    return [line for line in run.said if line.startswith("controller:")]


def assert_no_leap(run: Bench) -> None:
    assert np.abs(np.diff(run.sent(), axis=0)).max() <= STEP


@pytest.mark.parametrize("number", [0, 5])
def test_one_slow_inference_changes_nothing(number: int) -> None:
    run = auto(180, 180, slow=(0.7, lambda asked: asked == number), episodes=2)
    underrun = run.loop.run().arrays()["underrun"]
    assert run.planner.summary()["kind"] == "threaded"
    assert ["the arm moves" in line for line in choices(run)] == [True]
    assert underrun.sum() <= 21, "while it runs"
    assert not underrun[100:].any()
    assert_no_leap(run)
    assert run.policy.resets == 2, "an episode goes on: the policy keeps what it remembers of it"


@pytest.mark.parametrize(
    ("inference_ms", "told_ms", "kind", "why"),
    [(224, 13, "threaded", "bridge it"), (400, 13, "sync", "do not bridge"), (700, 40, "sync", "do not bridge")],
    ids=["longer than a tick", "longer than a chunk bridges", "longer than a chunk, at the first one"],
)
def test_inferences_that_take_longer_than_at_warm_up_are_chosen_for_again(inference_ms: int, told_ms: int, kind: str, why: str) -> None:
    run = auto(inference_ms, told_ms)
    underrun = run.loop.run().arrays()["underrun"]
    assert run.loop.trace.ended_by == "done"
    assert (run.planner.summary()["kind"], len(choices(run))) == (kind, 1 + (kind == "sync"))
    assert why in choices(run)[-1]
    assert_no_leap(run)
    late = underrun[len(underrun) // 2 :]
    assert late.any() == (kind == "sync")
    if kind == "sync":  # each of its rows plays
        begins = np.flatnonzero(np.diff(late.astype(int)) == -1)
        assert set(np.diff(begins)) == {16 + math.ceil(inference_ms / 1000 * FPS) - 1}


class TestThread:
    """The real thread, in real time."""

    def test_an_error_surfaces_in_the_main_thread_at_the_next_tick_as_it_was(self) -> None:
        policy, threads = ScriptedPolicy(["ok", "crash"], 16), []
        policy.warm_up = lambda *_: threads.append(threading.current_thread()) or {}
        policy.reset = lambda: threads.append(threading.current_thread())
        planner = overlapping(policy)
        planner.warm_up()
        planner.reset()
        planner.ask(observation(0), 0)
        until(lambda: planner.arrived(1, True), "the first chunk")
        planner.ask(observation(1), 1)
        with pytest.raises(ZeroDivisionError, match="a bug") as caught:
            until(lambda: planner.arrived(2, False), "the error")
        assert caught.value is policy.last_error
        assert len(set(threads)) == 1, "warm-up, reset and inference share a thread: libraries' handles belong to one"
        assert threads[0] is not threading.main_thread()
        assert planner.close(PATIENCE_S)

    def test_landing_does_not_wait_for_an_inference_that_hangs(self) -> None:
        release = threading.Event()
        run = Bench(control=PlannerOptions("threaded"), clock=MonotonicClock(), timeout_s=0.3)
        run.policy.on_action = lambda targets: release.wait(PATIENCE_S) and targets if len(run.policy.seen) > 1 else targets
        run.loop.run()
        assert run.robot.calls[-1] == "land"
        report = build_report(run.loop, {})
        assert report["controller"]["inference_left_running"]
        assert "still running" in text_of(sections(report))
        assert thread_left_running()
        release.set()
        assert run.planner.close(PATIENCE_S)

    def test_an_episode_does_not_wait_for_ever_for_its_first_chunk(self) -> None:
        release = threading.Event()
        run = Bench(control=PlannerOptions("threaded", max_hold_s=0.1), clock=MonotonicClock())
        run.policy.on_action = lambda targets: release.wait(PATIENCE_S) and targets
        with pytest.raises(InferenceTimeoutError, match="--max_hold_s"):
            run.loop.run()
        release.set()
        assert run.planner.close(PATIENCE_S)

    def test_a_hanging_inference_does_not_hold_up_the_end_of_the_program(self) -> None:
        program = """
import time
from gr00t_fast.cli.main import leave
from gr00t_fast.base.worker import ThreadWorker
worker = ThreadWorker()
worker.submit(lambda: time.sleep(1000))
assert not worker.close(0.1)
print("said")
leave(3)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")
