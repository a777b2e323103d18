"""Overlapped inference: a million virtual ticks against an independent account of them, the loop around it, and the real thread."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from control_fakes import FakeClock, FakePolicy, FakeRobot, modality_config, policy_metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_worker import VirtualWorker

from gr00t_fast.contracts import SO100_JOINTS, ActionPrefix, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import ChunkController, ControllerOptions, HoldLimit
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock, StopSignals
from gr00t_fast.control.report import as_text, build_report
from gr00t_fast.control.worker import ThreadWorker, thread_left_running
from gr00t_fast.errors import ConfigError, InferenceTimeoutError

# `GR00T_FAST_VIRTUAL_TICKS=1000000 pytest tests/test_threaded.py` is the full count, under a minute.
TICKS = int(os.environ.get("GR00T_FAST_VIRTUAL_TICKS", "40000"))
TICKS_PER_EXAMPLE = 1000
FPS = 30.0


class UnreachableError(ConnectionError):
    """What a policy on a server raises while the server restarts."""


class ScriptedPolicy(Policy):
    """Answers chunks whose numbers say where they come from: joint 0 the observation, joint 1 the row, joint 2 the policy's own episode,
    joint 3 whether joint 4 is NaN.

    `script`: what each call does, repeated for ever: "ok", "lost" (UnreachableError), "crash" (a bug), "nan".
    """

    continues = frozenset({"rtc", "prefix"})

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


def binding() -> RobotBinding:
    known = policy_metadata()
    return RobotBinding(modality_config(), known.state_widths, known.action_widths, SO100_JOINTS, {"front": "webcam"})


FRAMES = {"front": np.zeros((2, 2, 3), np.uint8)}


def observation(tick: int) -> Observation:
    return Observation(np.array([tick, 0, 0, 0, 0, 0], float), FRAMES, 0.0)


def overlapping(policy: Policy, options: ControllerOptions | None = None, worker: VirtualWorker | None = None) -> ChunkController:
    return ChunkController(policy, binding(), "go", FakeClock(), FPS, options or ControllerOptions("threaded"), worker, (UnreachableError,))


def play_ticks(controller: ChunkController, worker: VirtualWorker, ticks: int) -> None:
    """A target at the beginning of each tick, an observation in its middle."""
    for tick in range(ticks):
        worker.now = 2 * tick
        controller.next_target(tick)
        worker.now += 1
        controller.see(observation(tick), tick)


@dataclass
class Account:
    """What must happen, kept apart from the code under test: the observation behind what plays, and when the arm had nothing to do."""

    horizon: int
    origin: int | None = None
    underrun: int = 0
    ticks: int = 0
    resumes: bool = False
    row: int = 0  # that was last due, on the way through missed ticks too
    tick: int = 0
    held: set[int] = field(default_factory=set)

    def enter(self, observed: int, tick: int) -> None:
        """A chunk came in between two targets and plays from `tick` on, be that tick missed or not."""
        self.row = self.row_at(observed, tick) - 1

    def row_at(self, observed: int, tick: int) -> int:
        return tick - observed - (sum(observed <= held < tick for held in self.held) if self.resumes else 0)

    def pass_over(self, tick: int) -> None:
        """Ticks between the last target and this one were missed: their rows are over, and where there was none the arm held."""
        for missed in range(self.tick + 1, tick):
            self.row += 1
            if self.row >= self.horizon:
                self.held.add(missed)
        self.tick = tick


def play(
    script: list[str], delays: list[int], skips: list[int], resets: list[int], horizon: int, options: ControllerOptions, ticks: int
) -> tuple[Account, ChunkController]:
    """Run `ticks` targets in virtual time and check each one. Restarts (of the episode, or after a crash) go on with the same objects."""
    policy, worker, clock = ScriptedPolicy(script, horizon), VirtualWorker(delays), FakeClock()
    controller = ChunkController(policy, binding(), "go", clock, FPS, options, worker, (UnreachableError,))
    account, skip, gap = Account(horizon, resumes=options.when_late == "resume"), itertools.cycle(skips), itertools.cycle(resets)
    controller.reset()
    tick, next_reset, newest = 0, next(gap), -1
    last: np.ndarray | None = None
    while account.ticks < ticks:
        try:
            if account.ticks >= next_reset:
                controller.reset()
                next_reset, last = account.ticks + next(gap), None
            if controller.needs_observation:
                worker.now = 2 * tick
                while True:
                    try:
                        controller.plan(observation(tick))
                        break
                    except (UnreachableError, ZeroDivisionError) as error:
                        policy.recognise(error)
                newest, first = tick, True
            else:
                first = False
            worker.now = 2 * tick
            target = controller.next_target(tick)
            check(account, controller, target, tick, newest if first else None, last, policy)
            last, account.ticks = target, account.ticks + 1
            worker.now = 2 * tick + 1
            controller.see(observation(tick), tick)
            if controller._entered is not None:
                account.enter(int(controller._entered.targets[0, 0]), tick + 1)
            assert worker.busy, "nobody thinks: the arm would stand for ever"
        except ZeroDivisionError as error:
            policy.recognise(error)
            controller.reset()
            last = None
        tick += next(skip)
    return account, controller


def check(account: Account, controller: ChunkController, target: np.ndarray, tick: int, planned: int | None, last: np.ndarray | None, policy) -> None:
    note = controller.note
    if planned is not None:
        assert (target[0], target[1], note.underrun) == (planned, 0, False)  # the arm waited for it: it begins at its first action
        account.origin, account.row, account.tick, account.held = tick, 0, tick, set()
        return
    account.pass_over(tick)
    if note.underrun:
        account.underrun += 1
        account.row = account.horizon
        account.held.add(tick)
        assert np.array_equal(target, last, equal_nan=True)
        assert note.age_ticks >= account.horizon
        return
    observed = tick - note.age_ticks
    assert observed >= account.origin, "an older observation than the one that played before"
    account.origin = observed
    account.row = account.row_at(observed, tick)
    assert target[2] == pytest.approx(policy.resets), "from an episode that is over"
    assert (target[0], target[1]) == (observed, account.row), "not the action that is due now"
    assert np.isfinite(target).all() == (target[3] == 0)


EVENT = st.sampled_from(["ok"] * 12 + ["lost", "lost", "crash", "nan"])
DELAY = st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(20, 150))
SKIP = st.sampled_from([1] * 10 + [2, 7])
OVERLAP = st.builds(
    lambda join: ControllerOptions("threaded", *join, max_hold_s=None),
    st.sampled_from([("none", "hold"), ("none", "resume"), ("rtc", "hold"), ("prefix", "hold")]),
)


def test_a_million_virtual_ticks() -> None:
    """Random delays, spikes, lost and crashed inferences, episode restarts, skipped ticks: no stop, no action out of order, none unaccounted."""
    total = Account(0)

    @settings(max_examples=max(1, TICKS // TICKS_PER_EXAMPLE), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        script=st.lists(EVENT, min_size=1, max_size=30).filter(lambda script: "ok" in script),
        delays=st.lists(DELAY, min_size=1, max_size=30),
        skips=st.lists(SKIP, min_size=1, max_size=20),
        resets=st.lists(st.integers(1, 500), min_size=1, max_size=5),
        horizon=st.sampled_from([1, 2, 8, 16, 50]),
        options=OVERLAP,
    )
    def scenario(**drawn: object) -> None:
        account, controller = play(ticks=TICKS_PER_EXAMPLE, **drawn)
        assert controller.summary()["underrun_ticks"] == account.underrun
        total.ticks += account.ticks
        total.underrun += account.underrun

    scenario()
    print(f"{total.ticks} virtual ticks, {total.underrun} of them underruns")
    assert total.ticks >= TICKS
    assert 0 < total.underrun < total.ticks


def test_a_prefix_is_what_plays_from_the_observation_on() -> None:
    policy, worker = ScriptedPolicy(["ok"], 16), VirtualWorker([5])
    controller = overlapping(policy, ControllerOptions("threaded", smoothing="rtc"), worker)
    controller.reset()
    controller.plan(observation(0))
    play_ticks(controller, worker, 60)
    observed, prefix = policy.prefixes[-1]
    rows = prefix.actions["action.single_arm"]
    assert (rows[:, 0] + rows[:, 1]).tolist() == [observed + i for i in range(len(rows))]
    assert prefix.inference_delay == 3  # what is seen in one tick arrives five half ticks later
    assert len(rows) == 13
    assert prefix.method == "rtc"


def test_a_prefix_commits_to_the_longest_of_the_last_delays() -> None:
    """Before anything has been measured, to what continuing a chunk took at warm-up: the first chunk of all continues none."""

    class Warmed(ScriptedPolicy):
        def warm_up(self, instruction: str, prefix_method: str) -> dict[str, float]:
            return {"total": 120.0}

    policy, worker = Warmed(["ok"], 16), VirtualWorker([0, 0, *[5] * 6, 13, *[5] * 50])
    controller = overlapping(policy, ControllerOptions("threaded", smoothing="rtc"), worker)
    controller.warm_up()
    controller.reset()
    controller.plan(observation(0))
    play_ticks(controller, worker, 160)
    committed = [prefix.inference_delay for _, prefix in policy.prefixes]
    assert committed[0] == 4  # 0.12 s
    assert 7 in committed[7:9]
    assert committed[9:25] == [7] * 16
    assert committed[-1] == 3


def test_nothing_to_rely_on_gives_no_prefix() -> None:
    policy, worker = ScriptedPolicy(["nan"], 16), VirtualWorker([2])
    controller = overlapping(policy, ControllerOptions("threaded", smoothing="prefix"), worker)
    controller.plan(observation(0))
    play_ticks(controller, worker, 9)
    assert worker.calls > 3
    assert policy.prefixes == []


class ThreadedBench:
    """The control loop around a ChunkController whose worker follows the loop's virtual clock."""

    def __init__(self, delay_s: float, horizon: int = 16, overlap: ControllerOptions | None = None, **options: object) -> None:
        self.clock = FakeClock()
        self.robot, self.policy = FakeRobot(self.clock), FakePolicy(FakeClock(), 0.0, horizon)
        self.worker = ClockWorker(self.clock, delay_s)
        self.said: list[str] = []
        overlap = overlap or ControllerOptions("threaded")
        controller = ChunkController(self.policy, binding(), "go", self.clock, FPS, overlap, self.worker, echo=self.said.append)
        options.setdefault("timeout_s", 3.0)
        self.stop = StopSignals()
        self.loop = ControlLoop(self.robot, controller, LoopOptions(FPS, **options), self.clock, self.stop, echo=self.said.append)


class ClockWorker(VirtualWorker):
    """Outcomes after `delay_s` of the loop's virtual time; waiting for one lets it pass."""

    def __init__(self, clock: FakeClock, delay_s: float) -> None:
        super().__init__([0])
        self.clock, self.delay_s, self.ready_s = clock, delay_s, 0.0

    def submit(self, call) -> None:
        super().submit(call)
        self.ready_s = self.clock.now_s() + self.delay_s

    def poll(self):
        return super().wait() if self.busy and self.clock.now_s() >= self.ready_s else None

    def wait(self, timeout_s: float | None = None):
        self.clock.sleep_until_s(self.ready_s)
        return super().wait()


def test_the_loop_never_pauses_after_the_first_plan() -> None:
    bench = ThreadedBench(delay_s=0.2)
    trace = bench.loop.run()
    times = np.array([time_s for time_s, _ in bench.robot.sent])
    assert np.allclose(np.diff(times), 1 / FPS)
    data = trace.arrays()
    assert not data["underrun"].any()
    assert data["age_ticks"].max() <= 14
    assert data["age_ticks"][30:].min() >= 6  # 0.2 s are six ticks: those rows are dropped
    assert bench.worker.closed


def test_the_report_counts_underruns() -> None:
    bench = ThreadedBench(delay_s=0.4)  # twelve ticks; a chunk of sixteen leaves four
    bench.loop.run()
    report = build_report(bench.loop, {})
    figures = report["controller"]
    assert figures["underrun_ticks"] == bench.loop.trace.arrays()["underrun"].sum() > 20
    assert figures["delay_ticks"]["p50"] == 12
    assert figures["target_age_ticks"]["max"] <= 15
    assert report["stages_ms"]["infer"]["count"] == report["run"]["inferences"] == figures["chunks_entered"]
    text = as_text(report)
    assert "underrun ticks" in text
    assert "delay" in text
    assert max(map(len, text.splitlines())) < 120


def test_resuming_executes_more_of_each_chunk_where_chunks_are_too_short() -> None:
    """An inference of 12 ticks and 16 actions: catching up leaves out what was due while the arm held."""
    summaries = {}
    for when_late in ("hold", "resume"):
        bench = ThreadedBench(delay_s=0.4, overlap=ControllerOptions("threaded", when_late=when_late), timeout_s=6.0)
        bench.loop.run()
        summaries[when_late] = bench.loop.controller.summary()
    assert summaries["hold"]["underrun_ticks"] > 80
    assert summaries["resume"]["underrun_ticks"] < 0.7 * summaries["hold"]["underrun_ticks"]
    assert summaries["resume"]["when_late"] == "resume"


@pytest.mark.parametrize("max_hold_s", [5.0, None])
def test_an_inference_that_hangs_does_not_hold_the_arm_for_ever(max_hold_s: float | None) -> None:
    bench = ThreadedBench(delay_s=0.1, overlap=ControllerOptions("threaded", max_hold_s=max_hold_s), timeout_s=20.0)
    bench.robot.on_send = lambda: len(bench.robot.sent) == 60 and setattr(bench.worker, "delay_s", 1e9)
    if max_hold_s is None:
        bench.loop.run()
    else:
        with pytest.raises(InferenceTimeoutError, match="--max_hold_s"):
            bench.loop.run()
    trace = bench.loop.trace
    assert trace.ended_by == ("done" if max_hold_s is None else "error")
    assert bench.robot.calls[-1] == "land"
    held_s = trace.arrays()["underrun"].sum() / FPS
    assert held_s > 10 if max_hold_s is None else held_s == pytest.approx(5.0, abs=0.1)
    warnings = [line for line in bench.said if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "2.0 s" in warnings[0]


@pytest.mark.parametrize("underrun", [False, True], ids=["while a chunk plays", "while the arm holds"])
def test_a_cable_that_was_out_is_no_inference_that_hangs(underrun: bool) -> None:
    """For 3 s, with an inference of 13 ticks and 16 actions; the arm has sagged when it is back, and holds there until there is a new chunk."""
    bench = ThreadedBench(delay_s=0.42, overlap=ControllerOptions("threaded", max_hold_s=2.0), timeout_s=8.0)
    robot, out, sagged = bench.robot, [], []

    def unplug() -> None:
        if not out and len(robot.sent) > 60 and bench.loop.controller.note.underrun is underrun:
            out.append(len(robot.sent))
            bench.clock.advance(3.0)
            robot.events["reconnect"] = 1
            robot.pose = robot.pose - 18.0
            robot._move = lambda: None
            sagged.append(robot.pose)

    robot.on_observe = unplug
    trace = bench.loop.run()
    assert trace.ended_by == "done"
    data = trace.arrays()
    held = [row for row in data["commanded"][out[0] :] if not np.abs(row - sagged[0]).max() > 1e-9]
    assert len(held) >= 5
    assert np.abs(data["commanded"][out[0]] - sagged[0]).max() <= DEFAULT_MAX_SPEED_DEG_S / FPS + 1e-9
    assert bench.loop.pacer.missed_ticks >= 89


def test_every_time_the_arm_holds_counts_by_itself() -> None:
    """Missed ticks count as time, a loop that was held up for long does not; a target in between begins anew."""
    said: list[str] = []
    watch = HoldLimit(FPS, 4.0, said.append)
    for begin in (0, 1000):
        for tick in range(begin, begin + 119, 7):
            watch(tick, underrun=True)
        watch(begin + 130, underrun=False)
    assert len(said) == 2
    watch(2000, underrun=True)
    for tick in range(2120, 2239, 7):  # the cable was out for four seconds
        watch(tick, underrun=True)
    with pytest.raises(InferenceTimeoutError):
        watch(2245, underrun=True)


def test_missed_ticks_drop_their_actions_too() -> None:
    bench = ThreadedBench(delay_s=0.01, timeout_s=2.0)
    bench.policy.on_action = lambda targets: np.zeros((16, 6)) + np.arange(16)[:, None]
    bench.robot.on_send = lambda: bench.clock.advance(0.09 if len(bench.robot.sent) == 20 else 0.0)
    trace = bench.loop.run()
    assert bench.loop.pacer.missed_ticks == 2
    data = trace.arrays()
    assert np.array_equal(data["target"][:, 0], data["age_ticks"])


def test_an_inference_longer_than_a_chunk_is_refused_before_the_arm_moves() -> None:
    bench = ThreadedBench(delay_s=0.0, horizon=8)
    bench.policy.clock, bench.policy.inference_s = bench.clock, 1.0
    with pytest.raises(ConfigError, match="--controller=sync"):
        bench.loop.run()
    assert bench.robot.sent == []


def test_episodes_start_afresh() -> None:
    bench = ThreadedBench(delay_s=0.1, episodes=3, timeout_s=0.5, seed=1)
    trace = bench.loop.run()
    assert (trace.episodes, bench.policy.resets) == (3, 3)
    starts = np.flatnonzero(np.diff(trace.arrays()["episode"], prepend=-1))
    assert trace.arrays()["age_ticks"][starts].tolist() == [0, 0, 0]


def test_a_lost_inference_is_survived_only_where_that_was_said() -> None:
    for recoverable, survives in (((), False), ((UnreachableError,), True)):
        policy, worker = ScriptedPolicy(["ok", "lost", "lost", "ok"], 4), VirtualWorker([2])
        controller = ChunkController(policy, binding(), "go", FakeClock(), FPS, ControllerOptions("threaded"), worker, recoverable)
        controller.plan(observation(0))

        with contextlib.nullcontext() if survives else pytest.raises(UnreachableError):
            play_ticks(controller, worker, 12)
        assert (controller.summary()["lost_inferences"] > 1) is survives


class PlainPolicy(FakePolicy):
    """Cannot continue a chunk."""


@pytest.mark.parametrize("smoothing", ["rtc", "prefix"])
def test_a_policy_that_cannot_continue_is_refused(smoothing: str) -> None:
    clock = FakeClock()
    with pytest.raises(ConfigError, match="PlainPolicy"):
        ChunkController(PlainPolicy(clock), binding(), "go", clock, FPS, ControllerOptions("threaded", smoothing=smoothing))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"when_late": "resume", "smoothing": "rtc"}, "--when_late=resume"),
        ({"controller": "sync", "smoothing": "rtc"}, "--smoothing=rtc"),
        ({"max_hold_s": 0.0}, "--max_hold_s"),
        ({"action_horizon": 0}, "--action_horizon"),
    ],
)
def test_options_that_make_no_sense(options: dict, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        ControllerOptions(**options)


class TestThread:
    """The real thread, in real time."""

    def test_order_and_account_hold(self) -> None:
        policy = ScriptedPolicy(["ok"] * 20 + ["lost"], 40)
        slow = np.random.default_rng(0)

        class Sleepy(ScriptedPolicy):
            def get_action(self, *args, **kwargs):
                assert threading.current_thread() is not threading.main_thread()
                time.sleep(slow.uniform(0, 0.004))
                try:
                    return policy.get_action(*args, **kwargs)
                except (
                    UnreachableError
                ):  # how far the script is when an episode begins is up to the thread, and a first chunk that is lost ends the run
                    if args[0]["state.single_arm"][0, 0] % 700:
                        raise
                    return policy.get_action(*args, **kwargs)

            def reset(self):
                policy.reset()

        sleepy = Sleepy(["ok"], 40)
        controller = overlapping(sleepy)
        account, last = Account(40), None
        for tick in range(3000):
            if tick % 700 == 0:
                controller.reset()
            first = controller.needs_observation
            if first:
                controller.plan(observation(tick))
            target = controller.next_target(tick)
            check(account, controller, target, tick, tick if first else None, last, policy)
            last = target
            controller.see(observation(tick), tick)
            time.sleep(0.0002)
        assert controller.summary()["underrun_ticks"] == account.underrun
        assert controller.summary()["chunks_entered"] > 50
        assert controller.close(2.0)
        assert not thread_left_running()

    def test_an_error_surfaces_in_the_main_thread_at_the_next_tick_as_it_was(self) -> None:
        policy = ScriptedPolicy(["ok", "crash"], 16)
        controller = overlapping(policy)
        controller.reset()
        controller.plan(observation(0))
        controller.next_target(0)
        controller.see(observation(0), 0)
        give_up_s = time.monotonic() + 5
        while policy.last_error is None and time.monotonic() < give_up_s:
            time.sleep(0.001)
        time.sleep(0.02)
        with pytest.raises(ZeroDivisionError, match="a bug") as caught:
            controller.next_target(1)
        assert caught.value is policy.last_error
        assert controller.close(1.0)

    def test_warm_up_and_policy_share_one_thread(self) -> None:
        seen = []

        class Watched(FakePolicy):
            def warm_up(self, instruction=None, prefix_method=None):
                seen.append(threading.current_thread())
                return {}

            def get_action(self, *args, **kwargs):
                seen.append(threading.current_thread())
                return super().get_action(*args, **kwargs)

            def reset(self):
                seen.append(threading.current_thread())

        controller = ChunkController(Watched(FakeClock()), binding(), "go", FakeClock(), FPS, ControllerOptions("threaded"))
        controller.warm_up()
        controller.reset()
        controller.plan(observation(0))
        assert len(seen) == 3
        assert len(set(seen)) == 1
        assert seen[0] is not threading.main_thread()
        controller.close(1.0)

    def test_landing_does_not_wait_for_an_inference_that_hangs(self) -> None:
        release, clock = threading.Event(), MonotonicClock()
        robot, policy = FakeRobot(FakeClock()), FakePolicy(FakeClock())
        landed_s: list[float] = []
        land = robot.land
        robot.land = lambda *_: landed_s.append(time.monotonic()) or land()
        policy.on_action = lambda targets: release.wait(60) and targets if len(policy.seen) > 1 else targets
        controller = ChunkController(policy, binding(), "go", clock, FPS, ControllerOptions("threaded"))
        loop = ControlLoop(robot, controller, LoopOptions(FPS, timeout_s=0.3), clock, StopSignals(), echo=lambda line: None)
        began_s = time.monotonic()
        loop.run()
        assert landed_s[0] - began_s < 20  # the inference hangs for 60 s; a busy machine may take its time
        assert time.monotonic() - began_s < 25
        report = build_report(loop, {})
        assert report["controller"]["inference_left_running"]
        assert "still running" in as_text(report)
        assert thread_left_running()
        release.set()
        assert controller.close(5.0)

    def test_an_episode_does_not_wait_for_ever_for_its_first_chunk(self) -> None:
        release = threading.Event()
        policy = FakePolicy(FakeClock())
        policy.on_action = lambda targets: release.wait(20) and targets
        controller = ChunkController(policy, binding(), "go", MonotonicClock(), FPS, ControllerOptions("threaded", max_hold_s=0.1))
        for _ in range(2):  # the second meets what the first left behind
            controller.reset()
            with pytest.raises(InferenceTimeoutError, match="--max_hold_s"):
                controller.plan(observation(0))
        release.set()
        assert controller.close(5.0)

    def test_a_hanging_inference_does_not_hold_up_the_end_of_the_program(self) -> None:
        program = """
import sys, threading, time
from gr00t_fast.cli.main import leave
from gr00t_fast.control.controller import ThreadWorker
worker = ThreadWorker()
worker.submit(lambda: time.sleep(60))
assert not worker.close(0.1)
print("said")
leave(3)
"""
        began_s = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent.parent)
        assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")
        assert time.monotonic() - began_s < 20

    def test_a_closed_worker_takes_nothing(self) -> None:
        worker = ThreadWorker()
        assert worker.close(0.1)
        with pytest.raises(RuntimeError, match="closed"):
            worker.submit(int)
        with pytest.raises(RuntimeError, match="nothing was submitted"):
            worker.wait()
