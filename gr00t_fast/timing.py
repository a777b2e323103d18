"""Named stages of one call, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageTimer:
    """Collects stage durations of one call. `synchronise` is called at each stage's end, so that asynchronous GPU work is counted where it ran."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.stages_ms: dict[str, float] = {}
        self._synchronise = synchronise or (lambda: None)
        self._start_s = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self._synchronise()
        self.stages_ms[name] = self.stages_ms.get(name, 0.0) + (time.perf_counter() - start_s) * 1e3

    def finish(self) -> dict[str, float]:
        """The stages and their `total`, which includes what lay between them."""
        self._synchronise()
        return {**self.stages_ms, "total": (time.perf_counter() - self._start_s) * 1e3}
