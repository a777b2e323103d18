"""The table of modes, walked; its picture in CONTRIBUTING.md; and that the core waits, sends and beats in one place."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from arm_bench import raising
from control_fakes import TICK_S, Bench

from gr00t_fast.base.errors import ArmAwayError, BusFault, InferenceTimeoutError, MissedReadingError
from gr00t_fast.control.limits import Poses
from gr00t_fast.control.loop import GAP_S, PATIENCE_S
from gr00t_fast.control.modes import BEFORE, ENDS, TABLE, Event, Mode, after
from gr00t_fast.control.planner import PlannerOptions

ROOT = Path(__file__).resolve().parents[3]
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "gr00t_fast" / "control").glob("*.py")}


def reachable(begin: Mode) -> set[Mode]:
    """Modes that some row of events leads to from `begin`."""
    found, grown = {begin}, True
    while grown:
        more = {after(mode, event, before) for mode, event, before in product(found, Event, found)}
        found, grown = found | more, not more <= found
    return found


def test_every_mode_and_event_has_an_outcome_and_every_mode_comes_to_an_end() -> None:
    assert set(TABLE) == set(Mode)
    for mode, event, before in product(Mode, Event, set(Mode) - ENDS):
        assert isinstance(after(mode, event, before), Mode)
    for mode in Mode:
        assert reachable(mode) & ENDS
        assert mode in ENDS or after(mode, Event.FAULT, mode) is Mode.RELEASED, "a bus that is no good is let go from anywhere"
        assert mode in ENDS or after(mode, Event.STOP, mode) in (Mode.PUT_DOWN, Mode.HELD), "what stops the run puts the arm down"
        assert mode not in ENDS or all(after(mode, event, Mode.PLAY) is mode for event in Event)
    assert reachable(Mode.APART) == set(Mode)


def test_nothing_planned_before_a_gap_or_a_pause_plays_after_it() -> None:
    for mode, event in product(Mode, Event):
        if TABLE[mode].get(event) == BEFORE:
            assert after(mode, event, Mode.PLAY) is Mode.HOLD
    assert {mode for mode in Mode if Event.CHUNK in TABLE[mode]} == {Mode.HOLD}


def drawn() -> str:
    """The table as a picture: events that lead from nearly everywhere to one place are drawn once."""
    lines = ["stateDiagram-v2", "    [*] --> APART"]
    for mode, outcomes in TABLE.items():
        lines += [
            f"    {mode.name} --> {outcome.name}: {event.name}"
            for event, outcome in outcomes.items()
            if isinstance(outcome, Mode) and event not in (Event.LOST, Event.STOP, Event.FAULT)
        ]
        lines += [f"    {mode.name} --> before_{mode.name}: {event.name}" for event, outcome in outcomes.items() if outcome == BEFORE]
    lines += [f"    anywhere --> {mode.name}: {event.name}" for event, mode in ((Event.LOST, Mode.AWAY), (Event.STOP, Mode.PUT_DOWN))]
    lines += [f"    anywhere --> RELEASED: {Event.FAULT.name}", *(f"    {mode.name} --> [*]" for mode in Mode if mode in ENDS)]
    return "\n".join(lines)


def test_the_picture_in_contributing_is_the_table() -> None:
    picture = re.search(r"```mermaid\n(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert picture is not None
    assert picture[1] == drawn(), f"replace it by:\n{drawn()}"


@pytest.mark.parametrize(
    ("call", "where"), [(".send(", "loop.py"), (".keep_alive(", "loop.py"), ("pacer.wait(", "loop.py"), ("sleep_until_s(", "pacer.py")]
)
def test_the_core_sends_beats_and_waits_in_one_place(call: str, where: str) -> None:
    calls = {name: len(re.findall(rf"(?<!def ){re.escape(call)}", text)) for name, text in SOURCES.items()}
    once = 2 if call == ".keep_alive(" else 1  # once as soon as the arm is connected, then in each tick
    assert calls.pop(where) == once
    assert not any(calls.values())
    assert not [name for name, text in SOURCES.items() if "time.sleep(" in text or ".wait(" in text.replace("pacer.wait(", "")]


# What the loop makes of it, in virtual time


def pausing(bench: Bench, at_s: float, for_s: float) -> list[Mode]:
    """Space is pressed twice; returns a list that fills with the mode at each goal that is sent."""
    modes: list[Mode] = []
    times = [bench.clock.now_s() + at_s, bench.clock.now_s() + at_s + for_s]

    def look() -> None:
        if times and bench.clock.now_s() >= times[0]:
            times.pop(0)
            bench.loop.session.pause = True

    bench.robot.on_observe, bench.robot.on_send = look, lambda: modes.append(bench.loop.mode)
    return modes


@pytest.mark.parametrize("controller", ["sync", "threaded"])
def test_space_pauses_the_arm_and_it_goes_on_with_a_fresh_look(controller: str) -> None:
    bench = Bench(inference_s=0.1, policy_horizon=50, control=PlannerOptions(controller), timeout_s=3.0)
    modes = pausing(bench, 1.0, 5.0)
    bench.loop.run()
    assert modes.count(Mode.PAUSED) == pytest.approx(150, abs=2)
    paused = np.array([mode is Mode.PAUSED for mode in modes])
    assert np.ptp(bench.sent()[paused], axis=0).max() == 0, "it holds its pose"
    assert np.abs(np.diff(bench.sent(), axis=0)).max() < 2.1, "and goes on from there"
    assert bench.loop.trace.episodes == 1
    assert bench.clock.now_s() - 100 == pytest.approx(3.0 + 5.0, abs=0.2), "a pause is no part of the episode's time"
    assert bench.underrun < 10, "nor of its rows"


@pytest.mark.parametrize("mode", [Mode.MOVE, Mode.PAUSED, Mode.BETWEEN, Mode.PUT_DOWN])
def test_an_outage_in_any_mode_goes_back_to_it(mode: Mode) -> None:
    poses = Poses((40.0, 0, 0, 0, 0, 50), (-40.0, 0, 0, 0, 0, 50), 30.0)
    bench = Bench(episodes=2, reset_time_s=2.0, timeout_s=2.0, poses=poses)
    modes = pausing(bench, 2.5, 4.0) if mode is Mode.PAUSED else []
    out, look = [], bench.robot.on_observe

    def lose() -> None:
        look()
        if bench.loop.mode is mode and not out:
            out.append(bench.clock.now_s() + 2.0)
        if out and bench.clock.now_s() < out[0]:
            raise ArmAwayError("the port is lost.", 5.0)

    bench.robot.on_observe = lose
    assert bench.loop.run().ended_by == "done"
    assert out
    assert modes is not None
    assert bench.loop.trace.episodes == 2
    np.testing.assert_allclose(bench.sent()[-1], poses.rest, atol=1e-6)
    assert np.abs(np.diff(bench.sent(), axis=0)).max() * 30 < 60


def test_an_arm_that_stays_away_ends_the_run_when_its_time_is_over() -> None:
    bench = Bench(timeout_s=60.0)

    def lose() -> None:
        if len(bench.robot.sent) >= 20:
            raise ArmAwayError("the port is lost.", 5.0)

    bench.robot.on_observe = lose
    with pytest.raises(BusFault, match=r"\b5 s\b"):
        bench.loop.run()
    assert bench.clock.now_s() - bench.times()[-1] == pytest.approx(5.0, abs=0.1)
    assert bench.loop.mode is Mode.RELEASED


@pytest.mark.parametrize("for_s", [0.3, 0.7])
def test_readings_that_are_missed_for_a_while_are_survived_and_then_the_bus_is_no_good(for_s: float) -> None:
    bench, until_s = Bench(timeout_s=3.0), []

    def miss() -> None:
        if len(bench.robot.sent) >= 20:
            until_s.append(bench.clock.now_s() + for_s)
        if until_s and bench.clock.now_s() < until_s[0]:
            raise MissedReadingError("no plausible joint reading.")

    bench.robot.on_observe = miss
    if for_s < PATIENCE_S:
        bench.loop.run()
        assert np.abs(np.diff(bench.sent(), axis=0)).max() * 30 < 350
    else:
        with pytest.raises(BusFault, match="no plausible joint reading"):
            bench.loop.run()
        assert bench.loop.mode is Mode.RELEASED


def test_what_was_planned_before_a_gap_in_a_hold_is_dropped_but_the_wait_is_not_counted() -> None:
    """An inference of 1.9 s is under way as the program is held up for 1 s: it begins anew, and the arm may hold for 2 s from then on."""
    bench = Bench(inference_s=1.9, timeout_s=8.0)
    bench.robot.on_observe = lambda: bench.clock.advance(1.0) if 100.99 < bench.clock.now_s() < 100.99 + TICK_S else None
    assert bench.loop.run().ended_by == "done"
    assert bench.times()[0] > 100 + 1.0 + GAP_S + 1.9


def test_a_hold_that_lasts_too_long_puts_the_arm_down() -> None:
    bench = Bench(timeout_s=30.0, poses=Poses(None, (5.0, 0, 0, 0, 0, 50), 30.0))
    bench.robot.on_send = lambda: len(bench.robot.sent) == 20 and setattr(bench.policy, "inference_s", 1e6)
    with pytest.raises(InferenceTimeoutError):
        bench.loop.run()
    np.testing.assert_allclose(bench.sent()[-1], [5, 0, 0, 0, 0, 50])
    assert bench.loop.mode is Mode.RELEASED


@pytest.mark.parametrize("fps", [1.0, 10.0, 25.0, 50.0])
def test_a_slow_policy_has_several_ticks_to_an_action(fps: float) -> None:
    bench = Bench(fps=fps, timeout_s=4.0, policy_horizon=16)
    bench.loop.run()
    tick_hz = bench.loop.pacer.fps
    assert 30 <= tick_hz <= max(fps, 60)
    assert tick_hz % fps == 0
    assert len(bench.loop.trace) == pytest.approx(4 * fps, abs=2)
    assert bench.robot.beats >= 3.5 * tick_hz
    targets = bench.loop.trace.arrays()["target"][:, 0]
    assert np.allclose(np.diff(targets[:8]), 1.0)


def test_an_arm_that_was_lost_while_the_program_was_held_up_is_not_waited_for_for_ever() -> None:
    """The gap leads to AWAY first, and has no deadline of its own."""
    bench = Bench(timeout_s=600.0)

    def happen() -> None:
        if len(bench.robot.sent) == 20:
            bench.clock.advance(0.8)
            bench.robot.on_observe = raising(ArmAwayError("the port is lost.", 5.0))

    bench.robot.on_send = happen
    with pytest.raises(BusFault, match="did not come back"):
        bench.loop.run()
    assert bench.clock.now_s() - bench.times()[-1] < 7.0


def test_two_pauses_in_a_row_drop_two_plans() -> None:
    """What was asked for before a pause never plays after it, however long ago that was."""
    bench = Bench(inference_s=1.5, timeout_s=20.0)
    presses = [104.0, 104.8, 106.2, 166.0]

    def look() -> None:
        if presses and bench.clock.now_s() >= presses[0]:
            presses.pop(0)
            bench.loop.session.pause = True

    bench.robot.on_observe = look
    bench.loop.run()
    data = bench.loop.trace.arrays()
    seen_s = data["time_s"] - data["age_ticks"] * TICK_S
    after = (data["time_s"] > 66.0) & ~data["underrun"]
    assert after.any()
    assert seen_s[after].min() > 60.0


def test_a_look_without_pictures_is_neither_recorded_nor_does_it_accept_the_run() -> None:
    bench, first = Bench(timeout_s=3.0, fps=10.0), [True]
    recorded, met = [], []
    bench.loop.session.see = lambda observation, commanded, underrun: recorded.append(bool(observation.frames))
    bench.loop.on_connected = lambda observation: met.append(bool(observation.frames))

    def lose() -> None:
        if first or len(bench.robot.sent) == 40:
            first.clear()
            bench.robot.sent.append((bench.clock.now_s(), bench.robot.pose.copy()))
            raise ArmAwayError("the port is lost.", 5.0)

    bench.robot.on_observe = lose
    bench.loop.run()
    assert met == [True]
    assert recorded
    assert all(recorded)


def test_a_goal_that_did_not_leave_moves_no_limit() -> None:
    """For 0.4 s nothing can be sent; then the goal goes on from the last one that arrived."""
    bench = Bench(timeout_s=4.0, policy_horizon=50, horizon=50)
    bench.policy.on_action = lambda targets: targets[:1] + 4.0 * np.arange(50)[:, None]
    until_s: list[float] = []

    def fail() -> None:
        if len(bench.robot.sent) == 30 and not until_s:
            until_s.append(bench.clock.now_s() + 0.4)
        if until_s and bench.clock.now_s() < until_s[0]:
            raise MissedReadingError("the goal could not be sent.")

    bench.robot.on_send = fail
    bench.loop.run()
    assert until_s
    assert np.abs(np.diff(bench.sent(), axis=0)).max() <= 350 / 30 + 1e-6


def test_an_instruction_is_not_waited_for_for_ever_behind_an_inference_that_hangs() -> None:
    bench = Bench(episodes=2, reset_time_s=1.0, timeout_s=2.0)
    bench.robot.on_send = lambda: len(bench.robot.sent) == 40 and setattr(bench.policy, "inference_s", 1e6)
    typed = ["lift it"]
    bench.robot.on_observe = lambda: setattr(bench.loop.session, "instruction", typed.pop()) if typed and bench.loop.mode is Mode.BETWEEN else None
    with pytest.raises(InferenceTimeoutError):
        bench.loop.run()
    assert bench.clock.now_s() - 100 < 700


def test_an_outage_on_a_slow_move_begins_it_anew_from_where_the_arm_is() -> None:
    bench = Bench(timeout_s=2.0, poses=Poses(None, (-40.0, 0, 0, 0, 0, 50), 30.0))
    sagged: list[int] = []

    def lose() -> None:
        if bench.loop.mode is Mode.PUT_DOWN and not sagged:
            sagged.append(len(bench.robot.sent))
            bench.robot.pose = bench.robot.pose + 12.0
            bench.robot.sent.append((bench.clock.now_s(), bench.robot.pose.copy()))  # where it stays
            raise ArmAwayError("the port is lost.", 5.0)

    bench.robot.on_observe = lose
    bench.loop.run()
    after = bench.sent()[sagged[0] :]
    assert np.abs(np.diff(after[:, 0])).max() <= 1.0 + 1e-6
    np.testing.assert_allclose(after[-1], [-40, 0, 0, 0, 0, 50], atol=1e-6)
