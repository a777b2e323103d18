"""Which waiting requests are computed next: the one whose chunk must be there first, and with it as many others as still let it be there in time.

A GPU computes four observations in little more time than one, a CPU does not: how long each size of batch takes is measured before anybody is served,
and again by each batch that is.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
SIZES = (1, 2, 4, 8)  # of batches: few, because some engines prepare themselves for each
PATIENCE_S = 1.0  # the place in the queue of a request without a deadline is that of one with so much time
_REFINED_BY = 0.1  # how much of a newly measured time goes into the known one
_MEASURE_S = 10.0  # a size that would take longer than this to measure is not used


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks: an observation, the options of `Policy.get_action`, and when its answer is to be there (monotonic; None: it does not say).

    client: its name, for people. since_s: since when this client waits, this request's or an earlier one's, of which this takes the place.
    """

    observation: Mapping[str, Any]
    options: Mapping[str, Any]
    answer: Future[dict[str, np.ndarray]]
    client: str
    arrived_s: float
    since_s: float
    deadline_s: float | None
    size_bytes: int

    @property
    def due_s(self) -> float:
        """By which requests are ordered."""
        return self.since_s + PATIENCE_S if self.deadline_s is None else self.deadline_s

    @property
    def form(self) -> Hashable:
        """Equal for requests that one inference can compute. A request of a batch is computed alone."""
        if batch_of(self.observation) > 1:
            return id(self)
        prefix = self.options.get("prefix")
        pictures = sorted((key, value.shape) for key, value in self.observation.items() if isinstance(value, np.ndarray) and value.ndim > 2)
        return tuple(pictures), None if prefix is None else prefix.method


def batch_of(observation: Mapping[str, Any]) -> int:
    """How many observations one is, by its pictures: NVIDIA's have an axis of times, lerobot's none."""
    pictures = ((value, 5 if key.startswith("video.") else 4) for key, value in observation.items() if isinstance(value, np.ndarray))
    return max((len(value) for value, axes in pictures if value.ndim == axes), default=1)


def _seconds_of(infer: Callable[[int], object], size: int) -> float:
    began_s = time.monotonic()
    infer(size)
    return time.monotonic() - began_s


class BatchTimes:
    """Seconds that a batch of each size takes. A size that was not measured is not used, but for one."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def measure(self, infer: Callable[[int], object], most: int) -> None:
        """infer: computes a batch of a size, up to `most`. The fastest call after the first counts: what else a machine does only adds to it."""
        for size in SIZES:
            if size > most or 4 * self.seconds.get(size // 2, 0.0) > _MEASURE_S:
                return
            try:
                first_s = _seconds_of(infer, size)
                self.seconds[size] = min(_seconds_of(infer, size) for _ in range(4 if first_s < _MEASURE_S / 10 else 1))
            except RuntimeError as error:  # torch's, when memory is short
                log.warning("%d requests cannot be computed together: %s", size, error)
                return

    def refine(self, size: int, seconds: float) -> None:
        known = self.seconds.get(size, seconds)
        self.seconds[size] = known + _REFINED_BY * (seconds - known)

    def size_for(self, requests: Sequence[Request], now_s: float) -> int:
        """How many of `requests`, the first ones, are computed together: the most whose deadlines are met, as far as they can be, and who together
        take less time than one after the other. Where none has a deadline: as far as the mean of their waiting becomes shorter."""
        alone_s = self.seconds.get(1, math.inf)
        for size in reversed(SIZES):
            if 1 < size <= len(requests) and size in self.seconds:
                takes_s = self.seconds[size]
                told_s = [request.deadline_s for request in requests[:size] if request.deadline_s is not None]
                in_time = all(now_s + takes_s <= deadline_s for deadline_s in told_s if now_s + alone_s <= deadline_s)
                if in_time and takes_s < alone_s * (size if told_s else (size + 1) / 2):
                    return size
        return 1


class Queue:
    """Requests that wait, one of each client. Not thread-safe."""

    def __init__(self, times: BatchTimes) -> None:
        self.times = times
        self.waiting: dict[Hashable, Request] = {}
        self._computed: list[Hashable] = []  # clients whose requests were taken last
        self._served_s: dict[Hashable, float] = {}  # when clients got their last answer, as far as somebody has waited since before that

    def take(self, now_s: float) -> list[Request]:
        """The next to be computed together, which leave the queue; none when nobody waits. Who got an answer while another client waited already lets
        that one go first: nobody waits longer than for what is computed, because of a client that is always in a hurry."""
        if not self.waiting:
            return []
        in_order = sorted(self.waiting, key=lambda client: self.waiting[client].due_s)
        oldest_s = min(request.since_s for request in self.waiting.values())
        self._served_s = {client: served_s for client, served_s in self._served_s.items() if served_s > oldest_s}
        first = next((client for client in in_order if client not in self._served_s), in_order[0])  # all were served together
        alike = [client for client in in_order if client != first and self.waiting[client].form == self.waiting[first].form]
        size = self.times.size_for([self.waiting[client] for client in (first, *alike)], now_s)
        self._computed = [first, *alike][:size]
        return [self.waiting.pop(client) for client in self._computed]

    def served(self, now_s: float) -> None:
        """Those who were taken last have their answers."""
        self._served_s |= dict.fromkeys(self._computed, now_s)
