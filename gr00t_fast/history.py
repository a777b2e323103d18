"""What was seen some time ago, for policies that read more than the present."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class History(Generic[T]):
    """Remembers values by time and finds those that a policy's offsets ask for. Time is in any unit. One thread may add while another looks."""

    def __init__(self, offsets: Sequence[float], tolerance: float) -> None:
        """offsets: 0 and before it, ascending. tolerance: by how much a value may be later than an offset says, and still be taken for it."""
        self._offsets, self._tolerance = tuple(offsets), tolerance
        self._lock, self._kept = threading.Lock(), deque[tuple[float, T]]()

    @property
    def size(self) -> int:
        return len(self._offsets)

    def add(self, time: float, value: T) -> None:
        """Times ascend; a value for a time that is already there replaces it. What no offset can reach any more is forgotten."""
        with self._lock:
            while self._kept and self._kept[-1][0] >= time:
                self._kept.pop()
            self._kept.append((time, value))
            while len(self._kept) > 1 and self._kept[1][0] <= time + self._offsets[0]:
                self._kept.popleft()

    def at(self, time: float) -> list[T]:
        """One value for each offset: the latest not after `time` + offset, or the first one. Raises IndexError for an empty history."""
        with self._lock:
            kept = list(self._kept)
        return [next((value for when, value in reversed(kept) if when <= time + offset + self._tolerance), kept[0][1]) for offset in self._offsets]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
