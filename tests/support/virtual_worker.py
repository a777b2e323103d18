"""A worker without a thread: a call's outcome is there when its time has come, counted in half ticks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from benchmarks.lib.latency import VirtualCall


class Call(VirtualCall):
    """Waiting for it lets its time pass in one step."""

    def done(self) -> bool:
        return self._clock.now_s() >= self._ready_s

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._clock.sleep_until_s(self._ready_s)
        return Future.exception(self, 0)


class VirtualWorker:
    """Half tick 2 k is where tick k takes its target, 2 k + 1 where it sees. `delays`: half ticks per call, repeated for ever."""

    def __init__(self, delays: Iterable[int]) -> None:
        self.now = 0
        self.calls = 0
        self._delays = itertools.cycle(delays)

    def now_s(self) -> float:
        return self.now

    def sleep_until_s(self, deadline_s: float) -> None:
        """Waiting takes no time here."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        self.calls += 1
        return Call(call).at(self.now + next(self._delays), self)

    def close(self, timeout_s: float) -> bool:
        return True
