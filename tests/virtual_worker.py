"""A worker without a thread: a call's outcome is there when its time has come, counted in half ticks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from gr00t_fast.control.worker import CallResult


class VirtualWorker:
    """Half tick 2 k is where tick k takes its target, 2 k + 1 where it sees. `delays`: half ticks per call, repeated for ever."""

    def __init__(self, delays: Iterable[int]) -> None:
        self.now = 0
        self.calls = 0
        self.closed = False
        self._delays = itertools.cycle(delays)
        self._call: Callable[[], Any] | None = None
        self._due = 0

    @property
    def busy(self) -> bool:
        return self._call is not None

    def submit(self, call: Callable[[], Any]) -> None:
        if self.busy or self.closed:
            raise RuntimeError("busy or closed")
        self.calls += 1
        self._call, self._due = call, self.now + next(self._delays)

    def poll(self) -> CallResult | None:
        return self.wait() if self.busy and self.now >= self._due else None

    def wait(self, timeout_s: float | None = None) -> CallResult:
        call, self._call = self._call, None
        try:
            return CallResult(value=call())
        except Exception as error:  # noqa: BLE001 - handed over, as the thread does
            return CallResult(error=error)

    def close(self, timeout_s: float) -> bool:
        self.closed = True
        return not self.busy
