"""When the control loop acts: absolute deadlines.

Deadlines are `origin + k * period`, so an early or late tick never shifts the ones after it (a sleep of one period per tick drifts by the
work done in it). A deadline that has gone by is skipped, not caught up: two targets in quick succession would be a jump.
"""

from __future__ import annotations

import math
from array import array

from gr00t_fast.base.contracts import Clock
from gr00t_fast.base.errors import ConfigError

# A tick that is late by less than this part of a period still runs (and shows in the tick error); beyond, it would crowd the next one.
MISS_AFTER_PERIODS = 0.5
FPS_RANGE = (1.0, 200.0)  # Hz; six servos take about 4 ms for one read and one write
ROUNDING = 1e-6  # periods; a pause of exactly n periods counts as n


class Pacer:
    """Ticks at `fps` on a fixed grid, from the first to the last: `wait` at the end of each, and `restart` after work that was meant to take longer.

    tick: number of the present one: deadlines since the beginning, those that were missed included.
    tick_errors_s: how late each tick began after its deadline. missed_ticks: deadlines at which nothing could be done because a tick overran.
    """

    def __init__(self, fps: float, clock: Clock) -> None:
        """Raises ConfigError unless fps is positive and finite."""
        if not (math.isfinite(fps) and fps > 0):
            raise ConfigError(f"the control rate must be a positive number of ticks per second, got {fps}.")
        self.fps = float(fps)
        self.period_s = 1.0 / self.fps
        self.tick_errors_s = array("d")
        self.missed_ticks = self.tick = 0
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """The present tick is due now, and the next one a period later."""
        self._origin_s = self._clock.now_s() - self.tick * self.period_s

    def wait(self) -> None:
        """Sleep until the next deadline of the grid.

        Overrun deadlines are counted and skipped, so ticks never come in a burst. After a sleep that was too long (a program that was stopped, a
        machine that swaps) the grid begins anew, at the tick whose time it is.
        """
        late_periods = self._periods_since(self.tick + 1)
        if late_periods > MISS_AFTER_PERIODS:
            self._skip(math.ceil(late_periods))
        self.tick += 1
        self._clock.sleep_until_s(self._origin_s + self.tick * self.period_s)
        late_periods = self._periods_since(self.tick)
        self.tick_errors_s.append(late_periods * self.period_s)
        if late_periods > MISS_AFTER_PERIODS:
            self._skip(math.floor(late_periods + ROUNDING))
            self.restart()

    def _skip(self, ticks: int) -> None:
        self.missed_ticks += ticks
        self.tick += ticks

    def _periods_since(self, tick: int) -> float:
        """How long ago the deadline of `tick` was, in periods; negative when it is still to come."""
        return (self._clock.now_s() - self._origin_s) * self.fps - tick
