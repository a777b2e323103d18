"""Which action of which chunk is due at a tick: the decisions of overlapped inference, without threads and clocks.

Time is counted in control ticks. A chunk knows the tick of its observation, `observed`; its row i is for tick `observed + i`. While the network
was running the arm moved on, so a chunk that arrives d ticks later is entered at row d: the action that is due now, not the first one.
A tick for which no row is left is an *underrun*: the last target is held, and the tick is counted.

Axis alphabet of this file: H horizon (rows of a chunk), J joints of the arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.contracts import ActionChunk


@dataclass(frozen=True)
class TimedChunk:
    """A chunk and where it belongs. `actions` is the policy's own answer, rows aligned with `chunk.targets`: the next inference may continue it.
    `horizon`: how many rows may play; None: all."""

    chunk: ActionChunk
    observed: int
    actions: Mapping[str, np.ndarray] = field(default_factory=dict)
    horizon: int | None = None

    def __len__(self) -> int:
        return len(self.chunk.targets) if self.horizon is None else self.horizon


@dataclass(frozen=True)
class DueTarget:
    """The target (J,) of a tick and how it came about: ticks since the observation behind it, whether it is only the last one held, its row in the
    playing chunk, and the chunk that it is the first of, if that came in while the arm moved."""

    target: np.ndarray
    age_ticks: int = 0
    underrun: bool = False
    row: int = 0
    entered: ActionChunk | None = None


class ChunkBuffer:
    """Plays the chunk of the newest observation, each row at its tick. Pure bookkeeping: the same calls give the same answers.

    underrun_ticks: ticks at which the last target was held. entered, expired: chunks that played, and that came when every row was over.
    """

    def __init__(self, resume: bool = False) -> None:
        """`resume`: ticks for which no row was left do not count as elapsed, so that a chunk is entered where the arm stopped when it had to hold:
        in a scene that waits for the arm nothing of the plan is left out or done twice. While rows are left it is the same as without `resume`,
        also where the pacer missed ticks: the rows of those are passed over.
        """
        self.underrun_ticks = self.entered = self.expired = 0
        self._resume = resume
        self.reset()

    def reset(self) -> None:
        """Begin an episode: nothing of the last one plays any more."""
        self._chunk: TimedChunk | None = None  # the one that plays
        self._origin = 0  # tick of its row 0; its `observed` unless the arm held since
        self._last_tick = -math.inf
        self._held: list[range] = []  # ticks without a row before the newest chunk entered, as far as a later chunk may need them
        self._last_target: np.ndarray | None = None

    @property
    def empty(self) -> bool:
        """True until the first chunk of the episode."""
        return self._chunk is None

    def offer(self, chunk: TimedChunk, tick: int) -> bool:
        """A chunk of a later observation than those before is there and may play from `tick` on. Returns whether a row of it is left then."""
        elapsed = self._elapsed(chunk, tick)
        if elapsed >= len(chunk):
            self.expired += 1
            return False
        self.entered += 1
        self._held = [held for held in self._held_before(tick) if held.stop > chunk.observed]  # later chunks saw later ticks
        self._chunk, self._origin = chunk, tick - elapsed
        return True

    def _elapsed(self, chunk: TimedChunk, tick: int) -> int:
        """Rows of the chunk that are over at `tick`."""
        elapsed = tick - chunk.observed
        if self._resume:
            elapsed -= sum(len(range(max(held.start, chunk.observed), held.stop)) for held in self._held_before(tick))
        return elapsed

    def _held_before(self, tick: int) -> list[range]:
        """Stretches for which there was no row, ticks that the pacer missed meanwhile included: the arm stood still in them all the same."""
        out_since = tick if self._chunk is None else self._origin + len(self._chunk)
        return [*self._held, range(out_since, tick)] if out_since < tick else self._held

    def due(self, tick: int) -> DueTarget:
        """The target of `tick`. Ticks must increase. Raises RuntimeError before the first chunk of an episode, or for a tick that is over."""
        if self._chunk is None:
            raise RuntimeError("no chunk yet: the first one of an episode must be planned before the first target")
        if tick <= self._last_tick:
            raise RuntimeError(f"tick {tick} was asked for after tick {self._last_tick}: targets go out in order")
        self._last_tick = tick
        row = tick - self._origin
        underrun = row >= len(self._chunk)
        if underrun:
            self.underrun_ticks += 1
            if self._last_target is None:  # the chunk ran out before anything was sent; its end is the nearest to the present
                self._last_target = self._chunk.chunk.targets[len(self._chunk) - 1]
        else:
            self._last_target = self._chunk.chunk.targets[row]
        return DueTarget(self._last_target, tick - self._chunk.observed, underrun, row)

    def leftover(self, tick: int) -> dict[str, np.ndarray]:
        """What the playing chunk holds from `tick` on, as the policy's own arrays; empty when it has run out."""
        if self._chunk is None or not self.rows_left(tick):
            return {}
        return {key: values[tick - self._origin :] for key, values in self._chunk.actions.items()}

    def rows_left(self, tick: int) -> int:
        """How many rows are left from `tick` on."""
        return 0 if self._chunk is None else max(self._origin + len(self._chunk) - tick, 0)
