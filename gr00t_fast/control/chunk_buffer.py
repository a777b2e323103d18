"""Which action of which chunk is due at a tick: the decisions of overlapped inference, without threads and clocks.

Time is counted in control ticks. A chunk knows the tick of its observation, `observed`; its row i was meant for tick `observed + i` (or later, where
the policy was told of a later pose: `begins + i`). While the network was running the arm moved on, so a chunk that arrives d ticks later is entered
at row d: the action that is due now, not the first one.
A tick for which no row is left is *starved*: the last target is held, and the tick is counted.

Axis alphabet of this file: H horizon (rows of a chunk), J joints of the arm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from gr00t_fast.contracts import ActionChunk

# Zhao et al. 2023 (ACT, arXiv 2304.13705): the weight of the k-th oldest prediction is exp(-0.01 k).
ENSEMBLE_DECAY = 0.01
# A spike must not count for long (about 20 chunks: seconds), and, at this quantile, one or two in the window not at all.
DELAY_WINDOW, DELAY_QUANTILE = 20, 0.9


@dataclass(frozen=True)
class TimedChunk:
    """A chunk and where it belongs. `actions` is the policy's own answer, rows aligned with `chunk.targets`: the next inference may continue it.
    `rolled`: so many ticks after the observation its row 0 is due, because the policy was given the joints of that tick."""

    chunk: ActionChunk
    observed: int
    episode: int
    actions: Mapping[str, np.ndarray] = field(default_factory=dict)
    rolled: int = 0

    def __len__(self) -> int:
        return len(self.chunk.targets)

    @property
    def begins(self) -> int:
        """The tick that row 0 was meant for."""
        return self.observed + self.rolled


@dataclass(frozen=True)
class DueTarget:
    """The target (J,) of a tick, ticks since the observation behind it, whether it is only the last one held, and its row in the newest chunk."""

    target: np.ndarray
    age_ticks: int
    starved: bool
    row: int = 0


class Admission(Enum):
    ENTERED = "plays from the tick it was offered for"
    STALE = "from an older observation than the chunk that plays, or from another episode"
    EXPIRED = "every row was due earlier"


class ChunkBuffer:
    """Plays the chunk of the newest observation, each row at its tick. Pure bookkeeping: the same calls give the same answers.

    starved_ticks: ticks at which the last target was held. admissions: how many chunks got which admission.
    """

    def __init__(self, ensemble: bool = False, resume: bool = False) -> None:
        """`ensemble`: average the predictions of all chunks that cover a tick (temporal ensembling) instead of playing the newest.

        `resume`: ticks for which no row was left do not count as elapsed, so that a chunk is entered where the arm stopped when it had to hold: in a
        scene that waits for the arm nothing of the plan is left out or done twice. While rows are left it is the same as without `resume`, also
        where the pacer missed ticks: the rows of those are passed over.
        """
        self.episode = 0
        self.starved_ticks = 0
        self.admissions = dict.fromkeys(Admission, 0)
        self._ensemble, self._resume = ensemble, resume
        self._forget()

    def reset(self) -> None:
        """Begin an episode: nothing of the last one plays any more."""
        self.episode += 1
        self._forget()

    def _forget(self) -> None:
        self._chunks: list[TimedChunk] = []  # the newest last; the older ones only when they are averaged
        self._origin = 0  # tick of the newest chunk's row 0; its `observed` unless the arm held since
        self._last_tick = -math.inf
        self._held: list[range] = []  # ticks without a row before the newest chunk entered, as far as a later chunk may need them
        self._last_target: np.ndarray | None = None

    @property
    def empty(self) -> bool:
        """True until the first chunk of the episode."""
        return not self._chunks

    def offer(self, chunk: TimedChunk, tick: int) -> Admission:
        """A chunk is there and may play from `tick` on. Raises RuntimeError where its first row is not due yet."""
        if tick < chunk.begins and chunk.episode == self.episode:
            raise RuntimeError(f"offered for tick {tick}, and the first row is due at {chunk.begins}: offer it then")
        admission = self._admission(chunk, tick)
        self.admissions[admission] += 1
        if admission is Admission.ENTERED:
            elapsed = self._elapsed(chunk, tick)
            self._held = [held for held in self._held_before(tick) if held.stop > chunk.observed]  # later chunks saw later ticks
            self._origin = tick - elapsed
            self._chunks = [*self._chunks, chunk] if self._ensemble else [chunk]
        return admission

    def _admission(self, chunk: TimedChunk, tick: int) -> Admission:
        if chunk.episode != self.episode or (self._chunks and chunk.observed < self._chunks[-1].observed):
            return Admission.STALE
        return Admission.EXPIRED if self._elapsed(chunk, tick) >= len(chunk) else Admission.ENTERED

    def _elapsed(self, chunk: TimedChunk, tick: int) -> int:
        """Rows of the chunk that are over at `tick`."""
        elapsed = tick - chunk.begins
        if self._resume:
            elapsed -= sum(len(range(max(held.start, chunk.observed), held.stop)) for held in self._held_before(tick))
        return elapsed

    def _held_before(self, tick: int) -> list[range]:
        """Stretches for which there was no row, ticks that the pacer missed meanwhile included: the arm stood still in them all the same."""
        out_since = self._origin + len(self._chunks[-1]) if self._chunks else tick
        return [*self._held, range(out_since, tick)] if out_since < tick else self._held

    def due(self, tick: int) -> DueTarget:
        """The target of `tick`. Ticks must increase. Raises RuntimeError before the first chunk of an episode, or for a tick that is over."""
        if not self._chunks:
            raise RuntimeError("no chunk yet: the first one of an episode must be planned before the first target")
        if tick <= self._last_tick:
            raise RuntimeError(f"tick {tick} was asked for after tick {self._last_tick}: targets go out in order")
        self._last_tick = tick
        newest = self._chunks[-1]
        row = tick - self._origin
        starved = row >= len(newest)
        if starved:
            self.starved_ticks += 1
            if self._last_target is None:  # the chunk ran out before anything was sent; its end is the nearest to the present
                self._last_target = newest.chunk.targets[-1]
        else:
            self._last_target = self._average(tick) if self._ensemble else newest.chunk.targets[row]
        return DueTarget(self._last_target, tick - newest.observed, starved, row)

    def _average(self, tick: int) -> np.ndarray:
        """Of the finite predictions: one chunk with NaN must not spoil its neighbours. Without any the newest, for the safety filter to judge."""
        self._chunks = [chunk for chunk in self._chunks if tick - chunk.observed < len(chunk)]
        rows = np.stack([chunk.chunk.targets[tick - chunk.observed] for chunk in self._chunks])  # (chunks, J), the oldest first
        finite = rows[np.isfinite(rows).all(axis=1)]
        if not len(finite):
            return rows[-1]
        weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(finite)))
        return (weights @ finite / weights.sum()).astype(np.float32)

    def planned(self, tick: int) -> np.ndarray:
        """The target (J,) of a tick to come, as far as is known: the last row where the playing chunk ends before. Raises RuntimeError when empty."""
        if not self._chunks:
            raise RuntimeError("no chunk yet: nothing is planned")
        targets = self._chunks[-1].chunk.targets
        return targets[min(tick - self._origin, len(targets) - 1)]

    def rows_left(self, tick: int) -> int:
        """How many ticks after `tick` have a row."""
        return max(0, self._origin + len(self._chunks[-1]) - 1 - tick) if self._chunks else 0

    def fraction_left(self, tick: int) -> float:
        """The same as part of the chunk, 0..1."""
        return self.rows_left(tick) / len(self._chunks[-1]) if self._chunks else 0.0

    def leftover(self, tick: int) -> dict[str, np.ndarray]:
        """What the playing chunk holds from `tick` on, as the policy's own arrays; empty when it has run out."""
        row = tick - self._origin
        if not self._chunks or row >= len(self._chunks[-1]):
            return {}
        return {key: values[row:] for key, values in self._chunks[-1].actions.items()}


class DelayEstimate:
    """Ticks from an observation to the tick its chunk is there: a high quantile of the last few, so that a spike is forgotten.

    (An all-time maximum, by contrast, is inflated for ever by one slow call.)
    """

    def __init__(self, quantile: float = DELAY_QUANTILE) -> None:
        """`quantile` 1: the maximum of the window, where an answer that is later than estimated costs more than one that is earlier."""
        self._window: deque[int] = deque(maxlen=DELAY_WINDOW)
        self._quantile = quantile

    def add(self, ticks: int) -> None:
        self._window.append(ticks)

    @property
    def ticks(self) -> int:
        """Nearest-rank quantile; 0 before the first measurement. Of fewer than ten measurements 0.9 is the maximum."""
        if not self._window:
            return 0
        return sorted(self._window)[math.ceil(self._quantile * len(self._window)) - 1]
