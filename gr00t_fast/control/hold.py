"""How long the arm holds its pose because no action is left: said when it lasts, ended when it lasts too long."""

from __future__ import annotations

import math
from collections.abc import Callable

from gr00t_fast.errors import ConfigError, InferenceTimeoutError

# The same patience as for a policy server that is away (--server_reconnect_s): a driver that recovers does so sooner.
DEFAULT_MAX_HOLD_S = 30.0
_TELL_AFTER_S = 2.0  # a person wonders by then; a late chunk or two are over


class HoldWatch:
    """Follows the ticks of a run. Without an end, an inference that hangs would leave the arm under power for as long as the program runs."""

    def __init__(self, fps: float, max_hold_s: float | None, echo: Callable[[str], None] | None) -> None:
        """`max_hold_s` None: no end. `echo` None: says nothing. Raises ConfigError unless the time is positive and finite."""
        if max_hold_s is not None and not (math.isfinite(max_hold_s) and max_hold_s > 0):
            raise ConfigError(f"max_hold_s must be a positive number of seconds (or null for no limit), got {max_hold_s}.")
        self._fps, self._max_hold_s, self._echo = fps, max_hold_s, echo
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self._since: int | None = None
        self._told = False

    def __call__(self, tick: int, starved: bool) -> None:
        """After each tick's target. Raises InferenceTimeoutError when the arm has held for `max_hold_s`; ticks that were missed count as time."""
        if not starved:
            self.reset()
            return
        self._since = tick if self._since is None else self._since
        held_s = (tick - self._since) / self._fps
        if self._max_hold_s is not None and held_s >= self._max_hold_s:
            raise timed_out(self._max_hold_s, "no action is left to play")
        if held_s >= _TELL_AFTER_S and not self._told:
            self._told = True
            self._tell(held_s)

    def _tell(self, held_s: float) -> None:
        if self._echo is not None:
            end = "" if self._max_hold_s is None else f", at most {self._max_hold_s:g} s (--max_hold_s)"
            self._echo(f"WARNING: no action has been left for {held_s:.1f} s: inference hangs or is too slow. The arm holds its pose and waits{end}.")


def timed_out(max_hold_s: float, why: str) -> InferenceTimeoutError:
    """The error that ends the run."""
    return InferenceTimeoutError(
        f"the arm has held its pose for {max_hold_s:g} s, as long as --max_hold_s allows: {why}, because inference hangs or comes too late. "
        "Check the device (nvidia-smi, dmesg); for a device that is merely slow use --controller=sync or --max_hold_s=null."
    )
