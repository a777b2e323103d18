"""A BASELINE, with the mistakes that home-made asynchronous control loops make: chunks wait in a queue and each is played from its first action."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import PolicyRunner, TickNote
from gr00t_fast.control.worker import Outcome, Worker

QUEUE_DEPTH = 5  # of the buffered loop that this baseline stands for


class FifoController:
    """A Controller. Thinks whenever the queue has room; what waited in the queue is played although the world has moved on."""

    def __init__(self, policy: Policy, binding: RobotBinding, clock: Clock, worker: Worker, depth: int = QUEUE_DEPTH) -> None:
        self._runner, self._worker, self._depth = PolicyRunner(policy, binding, "", clock), worker, depth
        self.note = TickNote()
        self._queue: deque[tuple[int, ActionChunk]] = deque()  # tick of the observation, chunk
        self._playing: tuple[int, ActionChunk] | None = None
        self._row = 0
        self._starved_ticks = 0

    @property
    def needs_observation(self) -> bool:
        return self._playing is None and not self._queue

    def warm_up(self) -> None:
        self._runner.warm_up()

    def reset(self) -> None:
        self._runner.policy.reset()
        self._queue.clear()
        self._playing, self._row = None, 0

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk:
        self._submit(observation, 0)
        self._take(self._worker.wait())
        return self._queue[0][1]

    def see(self, observation: Observation, tick: int) -> None:
        if not self._worker.busy and len(self._queue) < self._depth:
            self._submit(observation, tick)

    def next_target(self, tick: int) -> np.ndarray:
        outcome = self._worker.poll()
        if outcome is not None:
            self._take(outcome)
        entered = None
        if self._queue and (self._playing is None or self._row >= len(self._playing[1].targets)):
            entered = None if self._playing is None else self._queue[0][1]  # the loop itself notes the first one
            self._playing, self._row = self._queue.popleft(), 0
        observed, chunk = self._playing
        starved = self._row >= len(chunk.targets)
        self._starved_ticks += starved
        self.note = TickNote(tick - observed, starved, entered)
        target = chunk.targets[min(self._row, len(chunk.targets) - 1)]
        self._row += 1
        return target

    def summary(self) -> dict[str, Any]:
        return {"kind": "fifo", "starved_ticks": self._starved_ticks}

    def close(self, timeout_s: float) -> bool:
        return self._worker.close(timeout_s)

    def _submit(self, observation: Observation, tick: int) -> None:
        self._worker.submit(lambda: (tick, self._runner.infer(observation)[0]))

    def _take(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            raise outcome.error
        self._queue.append(outcome.value)
