"""Pacing on absolute deadlines, in virtual time; one test measures the real clock for a quarter of a second."""

from __future__ import annotations

import time

import numpy as np
import pytest
from control_fakes import TICK_S, FakeClock

from gr00t_fast.control.pacer import MonotonicClock, Pacer
from gr00t_fast.errors import ConfigError


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pacer(clock: FakeClock) -> Pacer:
    pacer = Pacer(30, clock)
    pacer.start()
    return pacer


def test_ticks_do_not_drift_with_work_or_oversleep(clock: FakeClock, pacer: Pacer) -> None:
    clock.oversleep_s = 0.001
    begin = clock.now_s()
    for work_s in np.tile([0.0, 0.010, 0.030], 100):
        clock.advance(work_s)
        pacer.wait()
    assert clock.now_s() - begin == pytest.approx(300 * TICK_S + 0.001)
    assert pacer.missed_ticks == 0
    assert np.allclose(pacer.tick_errors_s, 0.001)


@pytest.mark.parametrize(("late_periods", "missed"), [(0.2, 0), (0.49, 0), (0.6, 1), (1.2, 2), (5.5, 6)])
def test_overrun_skips_to_the_grid_and_never_bursts(clock: FakeClock, pacer: Pacer, late_periods: float, missed: int) -> None:
    begin = clock.now_s()
    clock.advance((1 + late_periods) * TICK_S)
    pacer.wait()
    if missed:
        assert clock.now_s() == pytest.approx(begin + (1 + missed) * TICK_S)  # on the grid
    assert pacer.missed_ticks == missed
    assert pacer.tick_errors_s[-1] == pytest.approx(0 if missed else late_periods * TICK_S)
    before = clock.now_s()
    pacer.wait()
    assert clock.now_s() - before >= 0.5 * TICK_S  # the next one is not crowded
    assert (clock.now_s() - begin) / TICK_S == pytest.approx(round((clock.now_s() - begin) / TICK_S))


@pytest.mark.parametrize("early_plan", [False, True])
def test_after_an_oversleep_the_tick_is_the_one_that_is_due_and_nothing_bursts(clock: FakeClock, pacer: Pacer, early_plan: bool) -> None:
    """A program that was stopped for 10 s in its sleep."""
    pacer.wait()
    if early_plan:
        pacer.wait(lead_s=0.010)
        clock.oversleep_s = 10.0
        pacer.resume()
    else:
        clock.oversleep_s = 10.0
        pacer.wait()
    clock.oversleep_s = 0.0
    assert (pacer.tick, pacer.missed_ticks) == (302, 300)
    assert max(pacer.tick_errors_s) == pytest.approx(10.0)
    before = clock.now_s()
    pacer.wait()
    assert (pacer.tick, pacer.missed_ticks) == (303, 300)
    assert clock.now_s() - before == pytest.approx(TICK_S)


def test_a_long_pause_begins_a_new_grid_and_is_not_a_miss(clock: FakeClock, pacer: Pacer) -> None:
    pacer.wait()
    clock.advance(0.25)
    assert pacer.resume() == pytest.approx(0.25)
    sent = clock.now_s()
    pacer.wait()
    assert clock.now_s() - sent == pytest.approx(TICK_S)
    assert (pacer.missed_ticks, pacer.waiting_ticks) == (0, 7)


def test_a_short_pause_keeps_the_grid(clock: FakeClock, pacer: Pacer) -> None:
    pacer.wait()
    begin = clock.now_s()
    clock.advance(0.005)
    pacer.resume()
    pacer.wait()
    assert clock.now_s() - begin == pytest.approx(TICK_S)
    assert pacer.waiting_ticks == 0


def test_the_first_plan_of_an_episode_pauses_nothing(clock: FakeClock, pacer: Pacer) -> None:
    clock.advance(2.0)
    assert pacer.resume() == 0
    begin = clock.now_s()
    pacer.wait()
    assert clock.now_s() - begin == pytest.approx(TICK_S)
    assert pacer.waiting_ticks == pacer.missed_ticks == 0


def test_an_early_plan_waits_for_its_deadline(clock: FakeClock, pacer: Pacer) -> None:
    begin = clock.now_s()
    pacer.wait(lead_s=0.010)
    assert clock.now_s() - begin == pytest.approx(TICK_S - 0.010)
    clock.advance(0.006)
    assert pacer.resume() == 0
    assert clock.now_s() - begin == pytest.approx(TICK_S)
    assert list(pacer.tick_errors_s) == pytest.approx([0])


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_refuses_impossible_rates(fps: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Pacer(fps, FakeClock())


def test_the_real_clock_wakes_in_time_without_burning_a_core() -> None:
    clock = MonotonicClock()
    pacer = Pacer(100, clock)
    pacer.start()
    cpu_s = time.process_time()
    for _ in range(25):
        pacer.wait()
    assert np.median(pacer.tick_errors_s) < 0.002
    assert min(pacer.tick_errors_s) >= 0
    assert time.process_time() - cpu_s < 0.15  # of 0.25 s
