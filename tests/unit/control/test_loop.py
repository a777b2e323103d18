"""The control loop in virtual time; its stopping and landing also with real signals in a process of its own."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from control_fakes import TICK_S, Bench
from waiting import PATIENCE_S, until

from gr00t_fast.base.errors import ArmAwayError, RobotError, UnsafeActionError
from gr00t_fast.base.signals import FURTHER_AFTER_S, PRESSED_ANEW_S, StopRequested, StopSignals
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S, HOME_SPEED_DEG_S, MAX_HELD_TICKS, Poses
from gr00t_fast.control.planner import PlannerOptions
from gr00t_fast.record.progress import dry_run_table
from gr00t_fast.record.report import build_report, tracking_error

STEP = DEFAULT_MAX_SPEED_DEG_S * TICK_S  # how far a target may go in a tick


@pytest.mark.parametrize(("horizon", "played"), [(8, [*range(8), *range(1, 9), *range(1, 9)]), (None, [*range(16), *range(1, 9)])])
def test_executes_the_first_actions_of_each_chunk_in_order_and_then_looks_again(horizon: int | None, played: list[int]) -> None:
    """A chunk whose observation was made with the last target of the one before goes on with its second row, a tick later."""
    bench = Bench(horizon=horizon)
    bench.policy.on_action = lambda targets: np.arange(16)[:, None] + np.zeros(6)  # the index of the action in its chunk
    bench.loop.run()
    assert bench.loop.trace.arrays()["target"][:24, 0].tolist() == played
    last = (horizon or 16) - 1
    assert [seen["state.single_arm"][0, 0] for seen in bench.policy.seen] == ([0, last - 1, last, last] if horizon else [0, last - 1])
    assert bench.policy.seen[0]["annotation.human.task_description"] == ["pick: the cube"]


def test_a_quick_inference_is_ready_when_its_action_is_due() -> None:
    bench = Bench(inference_s=0.01, timeout_s=3.0)
    bench.loop.run()
    assert np.allclose(np.diff(bench.times()), TICK_S)
    assert bench.underrun == bench.loop.pacer.missed_ticks == 0
    assert [chunk.pause_ms for chunk in bench.loop.trace.chunks] == [0.0] * len(bench.policy.seen)
    assert bench.loop.trace.arrays()["age_ticks"].max() == 8


def with_servos(bench: Bench, deg_s: float, blocked: int | None = None) -> list[tuple[float, np.ndarray]]:
    """Joints turn at most so fast; one may stand still. Returns a list that fills with how far goals are ahead, and when, 100 times a second."""
    ahead: list[tuple[float, np.ndarray]] = []
    robot, clock, at_s = bench.robot, bench.clock, [bench.clock.now_s()]

    def move() -> None:
        while robot.sent and at_s[0] + 0.01 <= clock.now_s():
            at_s[0] += 0.01
            way = np.clip(robot.sent[-1][1] - robot.pose, -0.01 * deg_s, 0.01 * deg_s)
            robot.pose = robot.pose + np.where(np.arange(6) == blocked, 0, way)
            ahead.append((at_s[0], np.abs(robot.sent[-1][1] - robot.pose)))
        if not robot.sent:
            at_s[0] = clock.now_s()

    robot.move = move
    return ahead


@pytest.mark.parametrize("fps", [2.0, 5.0, 10.0])
def test_at_low_rates_a_blocked_joint_has_its_goal_near_and_a_free_one_is_not_slowed(fps: float) -> None:
    bench = Bench(fps=fps, timeout_s=4.0, inference_s=0.01)
    bench.policy.on_action = lambda targets: np.full_like(targets, 100.0)
    ahead = with_servos(bench, 300.0, blocked=2)
    bench.loop.run()
    assert max(errors[2] for _, errors in ahead) == pytest.approx(15.0)
    began_s = bench.times()[0]
    arrived_s = next(when for when, errors in ahead if errors[0] < 1.0 and when > began_s + 0.2 and bench.sent()[bench.times() <= when][-1][0] == 100)
    assert arrived_s - began_s < 0.7 + 1 / fps + 0.15  # the speed limit grows from 30 to 350 deg/s in a second, and lets a tick's step out at a time


def test_while_an_inference_runs_the_goal_of_a_blocked_joint_comes_back() -> None:
    """Blocked at speed as the chunk's last goal went out."""
    bench = Bench(inference_s=1.9, timeout_s=4.0, poses=Poses(home_speed_deg_s=180.0))
    bench.policy.on_action = lambda targets: targets[:1] + 10.0 * np.arange(16)[:, None]  # 300 deg/s
    with_servos(bench, 80.0)
    move = bench.robot.move

    def blocked_from_the_eighth() -> None:
        before = bench.robot.pose.copy()
        move()
        if len(bench.robot.sent) >= 8:
            bench.robot.pose = before

    bench.robot.move = blocked_from_the_eighth
    bench.loop.run()
    last_s = bench.times()[7]
    goals = {when: np.abs(goal - bench.robot.pose).max() for when, goal in bench.robot.sent if last_s <= when < last_s + 1.9}
    assert goals[last_s] > 30.0
    assert max(ahead_deg for when, ahead_deg in goals.items() if when > last_s + 0.45) < 15.1
    assert goals[max(goals)] == pytest.approx(15.0)


@pytest.mark.parametrize("inference_s", [0.01, 0.2])
@pytest.mark.parametrize("controller", ["sync", "threaded"])
@pytest.mark.parametrize("gap", ["held up", "outage"])
def test_nothing_planned_before_a_gap_plays_after_it(gap: str, controller: str, inference_s: float) -> None:
    """Nor what an inference makes that was under way."""
    bench = Bench(inference_s=inference_s, policy_horizon=50, control=PlannerOptions(controller), timeout_s=6.0)

    def happen() -> None:
        if len(bench.robot.sent) == 20 and not seen:
            seen.append(len(bench.policy.seen))
            bench.clock.advance(0.8 if gap == "held up" else 0.3)
            if gap == "outage":
                raise ArmAwayError("the port is lost.", 5.0)

    seen: list[int] = []
    bench.robot.on_send = happen
    bench.loop.run()
    assert np.diff(bench.sent(), axis=0).max() < 2.1, "each plan begins where the arm was seen, and goes on by about a degree a tick"
    after = bench.policy.seen[seen[0] + (controller == "threaded" and inference_s > 0.1)]  # one was under way
    assert after["state.single_arm"][0, 0] >= bench.sent()[19, 0] - 1.1, "it looks again"


def test_an_inference_that_holds_up_the_program_itself_is_not_made_for_ever() -> None:
    """Native code that keeps the interpreter's lock: each is a gap, and only one plan in a row is made anew for that."""
    bench = Bench(timeout_s=8.0)
    sleep, asked = bench.clock.sleep_until_s, [0]

    def held_up(deadline_s: float) -> None:
        sleep(deadline_s)
        if len(bench.policy.seen) > asked[0]:
            asked[0] += 1
            bench.clock.advance(0.7)

    bench.clock.sleep_until_s = held_up
    assert bench.loop.run().ended_by == "done"
    assert bench.robot.sent


@pytest.mark.parametrize("skipped_s", [0.1, 0.4])
def test_rows_that_missed_ticks_left_out_are_not_made_up_for_at_once(skipped_s: float) -> None:
    bench = Bench(policy_horizon=50, horizon=50, timeout_s=3.0)
    bench.policy.on_action = lambda targets: targets + np.arange(50)[:, None]  # 60 degrees a second
    bench.robot.on_send = lambda: bench.clock.advance(skipped_s) if len(bench.robot.sent) == 35 else None
    bench.loop.run()
    assert np.diff(bench.sent()[34:40, 0]).max() * 30 < (350 if skipped_s < 0.2 else 120)


def test_an_ordinary_inference_and_not_the_slowest_says_how_long_the_arm_may_hold() -> None:
    bench = Bench()
    for duration_s, allowed_s in ((0.1, 2.0), (1.9, 2.0), (5.6, 5.7), (5.6, 5.7), (5.6, 16.8)):
        bench.policy.warm_up = lambda *_, total=1000 * duration_s: {"total": total}
        bench.planner.warm_up()
        assert bench.planner.limit_s == pytest.approx(allowed_s)


def test_who_looks_on_sees_the_next_rows_of_a_long_chunk_and_not_thousands() -> None:
    seen: list[np.ndarray] = []
    bench = Bench(policy_horizon=4000, horizon=4000)
    bench.loop.observers = [type("Watching", (), {"see": lambda self, observation, tick, mode: tick and seen.append(tick.ahead)})()]
    bench.loop.run()
    assert len(pickle.dumps(seen[0])) < 1 << 13


def test_auto_throws_no_inference_away_when_it_gives_up_overlap() -> None:
    bench = Bench(inference_s=0.1, control=PlannerOptions("auto"), timeout_s=20.0, recoverable=())
    bench.policy.warm_up = lambda *_: {"total": 100.0}
    bench.planner.warm_up()
    bench.policy.on_action = lambda targets: (setattr(bench.policy, "inference_s", 0.4 if bench.clock.now_s() > 105 else 0.1), targets)[1]
    trace = bench.loop.run()
    assert [line for line in bench.said if "the arm waits for each inference" in line]
    assert len(bench.policy.seen) - len(trace.chunks) <= 1  # what runs as the time is up


def test_episodes_reset_robot_and_policy_with_their_own_seed() -> None:
    bench = Bench(episodes=3, timeout_s=0.5, seed=7)
    trace = bench.loop.run()
    assert bench.robot.seeds == [7, 8, 9]
    assert (bench.policy.resets, trace.episodes) == (3, 3)
    assert np.bincount(trace.arrays()["episode"]).tolist() == [14, 14, 14]  # the first tick of each sees, the second plays
    assert tracking_error(trace.arrays()).shape == (39, 6)  # no pair across two episodes, none that ends at a new chunk


@pytest.mark.parametrize(
    ("options", "answer", "named", "sent"),
    [
        ({}, np.nan, "NaN", MAX_HELD_TICKS),
        ({"horizon": 16, "policy_horizon": 8}, 1.0, "--action_horizon", 0),
    ],
    ids=["NaN is held, and then ends the run", "too few actions"],
)
def test_unusable_actions(options: dict, answer: float, named: str, sent: int) -> None:
    bench = Bench(**options)
    bench.policy.on_action = lambda targets: targets * answer
    with pytest.raises(UnsafeActionError, match=named):
        bench.loop.run()
    assert len(bench.robot.sent) == sent
    assert np.isfinite(bench.sent()).all()
    assert (bench.robot.calls[-1], bench.loop.trace.ended_by) == ("land", "error")


def raising(error: BaseException):
    def hook(*_: object) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [RobotError("camera died"), ValueError("a bug"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("place", ["on_connect", "on_connected", "on_observe", "on_send", "infer"])
def test_always_lands(place: str, error: BaseException) -> None:
    bench = Bench()
    if place == "infer":
        bench.policy.on_action = raising(error)
    else:
        setattr(bench.loop if place == "on_connected" else bench.robot, place, raising(error))  # a refused preflight among them
    with pytest.raises(type(error)):
        bench.loop.run()
    assert bench.robot.sent == []
    assert bench.robot.calls[-1] == "land"
    assert bench.loop.trace.landing.safe
    assert bench.loop.trace.events == {"read_retry": 2}


def test_a_dry_run_sends_nothing_and_shows_by_joint_what_would_have_been_sent() -> None:
    bench = Bench(dry_run=True)
    bench.policy.on_action = lambda targets: targets + np.array([56.2000001, 0, 0, 0, 0, 0])
    assert bench.loop.run().ended_by == "done"
    assert bench.robot.sent == []
    assert len(bench.policy.seen) == 1
    assert bench.robot.calls == ["connect", "land"]
    seen, target, limited = bench.loop.trace.dry_run
    table = dry_run_table(bench.robot.joint_names, seen.joints, target, limited)
    assert "nothing was sent" in table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    step = HOME_SPEED_DEG_S / 30 + (STEP - HOME_SPEED_DEG_S / 30) / 30
    assert rows["shoulder_pan"] == ["0.0", "57.2", f"{step:.1f}"]  # the policy's wish is a leap: one slow step of it would have gone out
    assert rows["gripper"] == ["50.0", "51.0", "51.0"]
    assert not bench.loop.trace.moved


def test_a_policy_that_is_away_is_asked_again_at_every_tick_while_the_arm_holds() -> None:
    """But for the first chunk: there is nothing to hold yet."""
    bench = Bench(timeout_s=2.0, recoverable=(ConnectionError,))
    plain, away = bench.policy.on_action, range(3, 13)

    def lost_between(targets: np.ndarray) -> np.ndarray:
        if len(bench.policy.seen) in away:
            bench.clock.advance(0.05)
            raise ConnectionError("away")
        return plain(targets)

    bench.policy.on_action = lost_between
    trace = bench.loop.run()
    data, sent = trace.arrays(), bench.sent()
    first, last = np.flatnonzero(data["underrun"])[[0, -1]]
    assert data["underrun"].sum() == last - first + 1
    assert (sent[first - 1 : last + 1] == sent[first - 1]).all()
    assert (np.diff(sent[last:, 0])[1:] == 1).all()
    report = build_report(bench.loop, {})
    assert (report["pacing"]["waiting_for_inference_ticks"], report["controller"]["lost_inferences"]) == (bench.underrun, 10)
    first = Bench(recoverable=(ConnectionError,))
    first.policy.on_action = raising(ConnectionError())
    with pytest.raises(ConnectionError):
        first.loop.run()


@pytest.mark.parametrize("overslept", [False, True])
def test_a_program_that_was_stopped_plays_nothing_old_and_steps_on_from_where_the_arm_is(overslept: bool) -> None:
    """For 10 s, in the sleep between two ticks or in the middle of one, while somebody has moved the arm."""
    bench = Bench(timeout_s=20.0, horizon=16)
    bench.policy.on_action = lambda targets: targets[:1] + np.arange(16)[:, None]
    robot, sleep, stopped = bench.robot, bench.clock.sleep_until_s, []

    def stop() -> None:
        if len(robot.sent) == 5 and not stopped:
            stopped.append(len(robot.sent))
            bench.clock.advance(10.0)
            robot.pose = robot.pose + 40.0

    if overslept:
        bench.clock.sleep_until_s = lambda deadline_s: (sleep(deadline_s), stop())
    else:
        robot.on_observe = stop
    robot.move = lambda: setattr(robot, "pose", robot.sent[-1][1].copy()) if robot.sent and not stopped else None
    bench.loop.run()
    (index,) = stopped
    after_s, after = robot.sent[index]
    assert np.abs(after - robot.pose).max() <= 1.0, "it is held there, or a new plan begins"
    assert bench.loop.pacer.missed_ticks >= 299
    assert robot.sent[index + 1][0] - after_s >= 0.5 * TICK_S


def test_a_machine_that_was_suspended_ends_the_run_before_the_next_goal() -> None:
    bench = Bench(timeout_s=5.0)
    sleep = bench.clock.sleep_until_s

    def close_the_lid(deadline_s: float) -> None:
        sleep(deadline_s)
        bench.clock.asleep_s = 60.0 if len(bench.robot.sent) >= 20 else 0.0

    bench.clock.sleep_until_s = close_the_lid
    with pytest.raises(UnsafeActionError, match="suspended for 60 s"):
        bench.loop.run()
    assert len(bench.loop.trace) == 20


@pytest.mark.parametrize("moment", ["observe", "send"])
def test_after_an_outage_steps_are_limited_from_where_the_arm_is(moment: str) -> None:
    """It sags when it is looked at, or between two looks, with the first target of a chunk, which is lost."""
    bench = Bench(timeout_s=2.0)
    robot, sagged, send = bench.robot, [], bench.robot.send

    def sag() -> None:
        if len(robot.sent) == 8 and not sagged:
            sagged.append(robot.pose - 18.0)
            robot.pose, robot.move = sagged[0], lambda: None  # it stays where it sagged to
            raise ArmAwayError("the port is lost.", 5.0)

    if moment == "observe":
        robot.on_observe = sag
    else:
        robot.send = lambda targets: (sag(), send(targets))
    bench.loop.run()
    assert np.abs(robot.sent[8][1] - sagged[0]).max() <= STEP + 1e-9


class TestStopSignals:
    """Signals raised in this process."""

    @pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGQUIT", 131), ("SIGTSTP", 148), ("SIGHUP", 129)])
    def test_a_signal_is_remembered_and_seen_by_who_looks(self, name: str, code: int) -> None:
        number = getattr(signal, name)
        before = signal.getsignal(number)
        with StopSignals() as stop:
            stop.check()
            signal.raise_signal(number)
            with pytest.raises(StopRequested) as caught:
                stop.check()
        assert (caught.value.exit_code, caught.value.reason, stop.exit_code) == (code, name, code)
        assert signal.getsignal(number) is before

    def test_nohup_is_obeyed(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.reason is None
        finally:
            signal.signal(signal.SIGHUP, before)

    @pytest.mark.parametrize("when", ["inside", "before", "swallowed"])
    def test_while_nothing_is_powered_it_raises_at_once(self, when: str) -> None:
        done = []

        def load(stop: StopSignals) -> None:
            if when == "before":
                signal.raise_signal(signal.SIGINT)
            with stop.raise_at_once():
                done.append("began")
                with contextlib.suppress(KeyboardInterrupt) if when == "swallowed" else contextlib.nullcontext():
                    signal.raise_signal(signal.SIGINT)
            done.append("went on")

        with StopSignals() as stop:
            with pytest.raises(StopRequested):
                load(stop)
            assert done == ([] if when == "before" else ["began"])
            signal.raise_signal(signal.SIGINT)  # outside nothing is raised

    @pytest.mark.parametrize("first", ["signal", "request", "none"])
    def test_a_deliberate_further_stop_cuts_the_orderly_end_short_and_nothing_else_does(self, first: str) -> None:
        """Not a lost terminal, a key that is held down, or what comes within a second; nor the first stop of all, after the run's own end."""
        with StopSignals() as stop:
            if first == "signal":
                signal.raise_signal(signal.SIGHUP)
            elif first == "request":
                stop.request("the disk is full", 1, by_person=True)
            stop.request("and again", 1) if first != "none" else None
            stop.begin_shutdown()
            signal.raise_signal(signal.SIGINT)
            time.sleep(FURTHER_AFTER_S + 0.05)
            for number in (signal.SIGHUP, signal.SIGINT):  # the second within PRESSED_ANEW_S
                signal.raise_signal(number)
            stop.request("Esc")
            stop.check()
            time.sleep(PRESSED_ANEW_S + 0.05)
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(StopRequested):
                stop.check()
        known = {"request": ("the disk is full", 1), "signal": ("SIGHUP", 129), "none": ("SIGINT", 130)}
        assert (stop.reason, stop.exit_code) == known[first]


ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests" / "support"
BACKGROUND_JOB = ("sh", "-c", 'trap "" INT QUIT; exec "$@"', "sh")  # as a shell starts one of a script


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("mode", "number", "launcher", "code", "ends"),
    [
        ("infer", signal.SIGINT, BACKGROUND_JOB, 130, ["landed", "ended by SIGINT"]),
        ("send", signal.SIGTERM, (), 143, ["sent", "landed", "ended by SIGTERM"]),
    ],
    ids=["in an inference, background job", "a transfer is finished first"],
)
def test_a_signal_lands_the_arm(tmp_path: Path, mode: str, number: int, launcher: tuple[str, ...], code: int, ends: list[str]) -> None:
    """In a process of its own, tests/support/signal_arm.py."""
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)])}
    command = [*launcher, sys.executable, str(SUPPORT / "signal_arm.py"), str(log), mode]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        until(lambda: log.exists() and mode in log.read_text().splitlines(), "the signal's moment")
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code
    finally:
        process.kill()
    events = log.read_text().splitlines()
    assert events[-len(ends) :] == ends
    assert (mode == "infer") == ("inferred" not in events), "the inference would have taken a minute"
