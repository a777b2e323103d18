"""Virtual time for a loop and the inference that overlaps it: nothing waits, and the same run has the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.worker import Outcome

_ROUNDING_S = 1e-9  # a call that ends at a tick is in time for it, whatever the sums of floats say


class VirtualWorker:
    """A `Worker` beside a loop on the same VirtualClock: a call runs at once on time of its own, and its outcome is there when that has passed."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._outcome: Outcome | None = None
        self._ready_s = 0.0

    @property
    def busy(self) -> bool:
        return self._outcome is not None

    def submit(self, call: Callable[[], Any]) -> None:
        if self.busy:
            raise RuntimeError("the inference is busy; take its outcome first")
        began_s = self._clock.now_s()
        try:
            self._outcome = Outcome(value=call())
        except Exception as error:  # noqa: BLE001 - handed over, as a thread does
            self._outcome = Outcome(error=error)
        self._ready_s, self._clock.time_s = self._clock.now_s(), began_s

    def poll(self) -> Outcome | None:
        return self.wait() if self.busy and self._clock.now_s() >= self._ready_s - _ROUNDING_S else None

    def wait(self, timeout_s: float | None = None) -> Outcome:
        if self._outcome is None:
            raise RuntimeError("nothing was submitted")
        self._clock.sleep_until_s(self._ready_s)
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self, timeout_s: float) -> bool:
        return True
