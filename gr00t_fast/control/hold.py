"""How long the arm holds its pose because no action is left: said when it lasts, ended when it lasts too long."""

from __future__ import annotations

import math
from collections.abc import Callable

from gr00t_fast.errors import ConfigError, InferenceTimeoutError

# A sound inference is as quick as those before it. One that hangs shall not leave the arm under power: torque is off within three seconds, half a
# second of actions still to play included.
DEFAULT_MAX_HOLD_S = 1.5
# Where inference takes seconds (a CPU), the arm waits so many times the slowest one so far: garbage, a busy machine, a cold cache.
SLOWEST_TIMES = 3.0
_TELL_AFTER_S = 2.0  # a person wonders by then; a late chunk or two are over


class HoldWatch:
    """Follows the ticks of a run. Without an end, an inference that hangs would leave the arm under power for as long as the program runs."""

    def __init__(self, fps: float, max_hold_s: float | None, echo: Callable[[str], None] | None) -> None:
        """`max_hold_s` None: no end. `echo` None: says nothing. Raises ConfigError unless the time is positive and finite."""
        if max_hold_s is not None and not (math.isfinite(max_hold_s) and max_hold_s > 0):
            raise ConfigError(f"max_hold_s must be a positive number of seconds (or null for no limit), got {max_hold_s}.")
        self._fps, self._max_hold_s, self._echo = fps, max_hold_s, echo
        self._slowest_s = 0.0
        self.reset()

    @property
    def limit_s(self) -> float | None:
        """How long the arm may hold its pose for want of actions: `max_hold_s`, or longer where inferences take long. None: for ever."""
        return None if self._max_hold_s is None else max(self._max_hold_s, SLOWEST_TIMES * self._slowest_s)

    def inferred(self, duration_s: float) -> None:
        """An inference has taken so long."""
        self._slowest_s = max(self._slowest_s, duration_s)

    def reset(self) -> None:
        """An episode begins."""
        self._since: int | None = None
        self._told = False

    def __call__(self, tick: int, starved: bool) -> None:
        """After each tick's target. Raises InferenceTimeoutError when the arm has held for `limit_s`; ticks that were missed count as time."""
        if not starved:
            self.reset()
            return
        self._since = tick if self._since is None else self._since
        held_s = (tick - self._since) / self._fps
        limit_s = self.limit_s
        if limit_s is not None and held_s >= limit_s:
            raise timed_out(limit_s, "no action is left to play")
        if held_s >= (_TELL_AFTER_S if limit_s is None else min(_TELL_AFTER_S, limit_s / 2)) and not self._told:
            self._told = True
            self._tell(held_s)

    def _tell(self, held_s: float) -> None:
        if self._echo is not None:
            end = "" if self.limit_s is None else f", at most {self.limit_s:.1f} s (--max_hold_s)"
            self._echo(f"WARNING: no action has been left for {held_s:.1f} s: inference hangs or is too slow. The arm holds its pose and waits{end}.")


def timed_out(limit_s: float, why: str) -> InferenceTimeoutError:
    """The error that ends the run."""
    return InferenceTimeoutError(
        f"the arm has held its pose for {limit_s:.1f} s, as long as --max_hold_s and {SLOWEST_TIMES:g} times the slowest inference so far allow: "
        f"{why}, because inference hangs or comes too late. Check the device (nvidia-smi, dmesg); for one that pauses now and then give a longer "
        "--max_hold_s, or null for no limit."
    )
