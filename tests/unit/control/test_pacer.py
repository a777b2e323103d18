"""Pacing on absolute deadlines, in virtual time; one test runs on the real clock for a quarter of a second."""

from __future__ import annotations

import numpy as np
import pytest
from control_fakes import TICK_S, FakeClock

from gr00t_fast.control.pacer import Pacer


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pacer(clock: FakeClock) -> Pacer:
    return Pacer(30, clock)


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


def test_after_an_oversleep_the_tick_is_the_one_that_is_due_and_nothing_bursts(clock: FakeClock, pacer: Pacer) -> None:
    """A program that was stopped for 10 s in its sleep."""
    pacer.wait()
    clock.oversleep_s = 10.0
    pacer.wait()
    clock.oversleep_s = 0.0
    assert (pacer.tick, pacer.missed_ticks) == (302, 300)
    assert max(pacer.tick_errors_s) == pytest.approx(10.0)
    before = clock.now_s()
    pacer.wait()
    assert (pacer.tick, pacer.missed_ticks) == (303, 300)
    assert clock.now_s() - before == pytest.approx(TICK_S)
