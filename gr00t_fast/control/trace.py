"""What happened at each tick of a run. It takes about 150 bytes per tick, so that hours fit in memory.

Axis alphabet of this file: H horizon (rows of a chunk), J joints of the arm, T ticks.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gr00t_fast.base.contracts import ActionChunk, Clock, LandingReport, Observation


@dataclass
class ChunkRecord:
    """One inference: the row of the trace whose action was its first, its cost, how long the arm stood still for it, and whether it came while the
    arm moved."""

    first_row: int
    inference_ms: float
    pause_ms: float
    overlapped: bool


@dataclass(frozen=True)
class TickRecord:
    """A tick of an episode as those see it who look on.

    time_s: when its target was sent, since the run began. target, commanded (J,): what the policy wanted, what was sent. ahead (L, J): the next rows
    of the playing chunk from this tick's on, L 0 when it has run out. inference_ms: of that chunk. stood: the arm stood still for it. underrun: no
    row was due, the last goal was held. tick_error_ms: how late the tick was. inferences, missed_ticks: so far.
    """

    number: int
    episode: int
    time_s: float
    target: np.ndarray
    commanded: np.ndarray
    ahead: np.ndarray
    inference_ms: float
    stood: bool
    age_ticks: int
    underrun: bool
    tick_error_ms: float
    inferences: int
    missed_ticks: int


class RunTrace:
    """Rows of a run, filled by the control loop and read by report, plots and tests."""

    def __init__(self, joint_names: tuple[str, ...], clock: Clock) -> None:
        self.joint_names = joint_names
        self.stages_ms: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self.chunks: list[ChunkRecord] = []
        self.episodes = 0
        self.episodes_solved: int | None = None  # None: the arm cannot tell (a real one)
        self.ended_by = "error"
        self.dry_run: tuple[Observation, np.ndarray, np.ndarray] | None = None  # of a dry run: what it saw, the target, what would have been sent
        self.moved = False  # whether a target was on its way to the arm, however little of it arrived
        self.events: dict[str, int] = {}
        self.landing: LandingReport | None = None
        self.began_s = clock.now_s()
        self.ended_s = self.began_s
        self._clock = clock
        joints = "f8", (len(joint_names),)
        vectors = [(name, *joints) for name in ("measured", "target", "commanded")]
        self._row: np.dtype = np.dtype([("time_s", "f8"), ("episode", "i8"), *vectors, ("age_ticks", "i8"), ("underrun", "?")])
        self._rows = bytearray()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the duration of a block under `stage`. A block that raises is recorded too."""
        began_s = self._clock.now_s()
        try:
            yield
        finally:
            self.stages_ms[stage].append(1000 * (self._clock.now_s() - began_s))

    def add_chunk(self, chunk: ActionChunk, pause_s: float, overlapped: bool) -> None:
        """Note an inference whose first action is sent at the coming tick; its inner stages become `infer/<stage>`."""
        self.chunks.append(ChunkRecord(len(self), chunk.inference_ms, 1000 * pause_s, overlapped))
        self.stages_ms["infer"].append(chunk.inference_ms)
        for stage, value_ms in chunk.stages_ms.items():
            self.stages_ms[f"infer/{stage}"].append(value_ms)

    def add_tick(self, measured: np.ndarray, target: np.ndarray, commanded: np.ndarray, sent_s: float, age_ticks: int, underrun: bool) -> None:
        """Note what the policy wanted and what was sent (J,), and the pose (J,) measured at the same tick (not yet moved by it).

        `age_ticks`: ticks since the observation behind the target. `underrun`: no row was due (Mode.HOLD), and the last goal was held.
        """
        row = (sent_s - self.began_s, self.episodes - 1, measured, target, commanded, age_ticks, underrun)
        self._rows += np.array(row, self._row).tobytes()

    def __len__(self) -> int:
        return len(self._rows) // self._row.itemsize

    def arrays(self) -> dict[str, np.ndarray]:
        """Return time_s float64 (T,), episode and age_ticks int64 (T,), underrun bool (T,), measured, target, commanded float64 (T, J), chunk_starts
        int64."""
        table = np.frombuffer(bytes(self._rows), self._row)
        starts = np.array([chunk.first_row for chunk in self.chunks if chunk.first_row < len(self)], np.int64)
        return {**{name: table[name].copy() for name in self._row.names or ()}, "chunk_starts": starts}
