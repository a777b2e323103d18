"""What happened in a run, kept compactly: about 150 bytes per tick, so that hours fit in memory.

Axis alphabet of this file: T ticks, J joints of the arm.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, LandingReport


@dataclass
class ChunkRecord:
    """One inference: the tick whose action was its first, its cost, how long the arm waited for it, and whether it came while the arm moved."""

    first_tick: int
    inference_ms: float
    pause_ms: float
    overlapped: bool = False


class RunTrace:
    """Columns of a run, filled by the control loop and read by report, plots and tests."""

    def __init__(self, joint_names: tuple[str, ...], clock: Clock) -> None:
        self.joint_names = joint_names
        self.stages_ms: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self.chunks: list[ChunkRecord] = []
        self.episodes = 0
        self.episodes_solved: int | None = None  # None: the arm cannot tell (a real one)
        self.ended_by = "error"
        self.moved = False  # whether a target was on its way to the arm, however little of it arrived
        self.events: dict[str, int] = {}
        self.landing: LandingReport | None = None
        self.began_s = clock.now_s()
        self.ended_s = self.began_s
        self._clock = clock
        self._columns = _Columns()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the duration of a block under `stage`. A block that raises is recorded too."""
        began_s = self._clock.now_s()
        try:
            yield
        finally:
            self.stages_ms[stage].append(1000 * (self._clock.now_s() - began_s))

    def add_chunk(self, chunk: ActionChunk, pause_s: float, overlapped: bool = False) -> None:
        """Note an inference whose first action is sent at the coming tick; its inner stages become `infer/<stage>`."""
        self.chunks.append(ChunkRecord(len(self), chunk.inference_ms, 1000 * pause_s, overlapped))
        if overlapped:  # nobody timed it from outside
            self.stages_ms["infer"].append(chunk.inference_ms)
        for stage, value_ms in chunk.stages_ms.items():
            self.stages_ms[f"infer/{stage}"].append(value_ms)

    def add_tick(
        self, measured: np.ndarray, target: np.ndarray, commanded: np.ndarray, sent_s: float, age_ticks: int = 0, starved: bool = False
    ) -> None:
        """Note what the policy wanted and what was sent (J,), and the pose (J,) measured at the same tick (not yet moved by it).

        `age_ticks`: ticks since the observation behind the target. `starved`: it was only the last one held.
        """
        columns = self._columns
        columns.time_s.append(sent_s - self.began_s)
        columns.episode.append(self.episodes - 1)
        columns.measured.extend(measured.tolist())
        columns.target.extend(target.tolist())
        columns.commanded.extend(commanded.tolist())
        columns.age_ticks.append(age_ticks)
        columns.starved.append(starved)

    def __len__(self) -> int:
        return len(self._columns.time_s)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return time_s float64 (T,), episode and age_ticks int64 (T,), starved bool (T,), measured, target, commanded float64 (T, J), chunk_starts
        int64."""
        columns, joints = self._columns, len(self.joint_names)
        table = {name: np.array(getattr(columns, name)).reshape(-1, joints) for name in ("measured", "target", "commanded")}
        return {
            "time_s": np.array(columns.time_s),
            "episode": np.array(columns.episode, np.int64),
            "age_ticks": np.array(columns.age_ticks, np.int64),
            "starved": np.array(columns.starved, bool),
            **table,
            "chunk_starts": np.array([chunk.first_tick for chunk in self.chunks if chunk.first_tick < len(self)], np.int64),
        }

    def tracking_error(self) -> np.ndarray:
        """Return |commanded at a tick - measured one tick later| (T', J), pairs within one episode.

        Pairs that end at the first tick of a chunk the arm waited for are left out: there the pose is measured before the network runs, so less
        than a tick later.
        """
        data = self.arrays()
        comparable = np.diff(data["episode"]) == 0
        waited_for = [chunk.first_tick - 1 for chunk in self.chunks if not chunk.overlapped and 0 < chunk.first_tick < len(self)]
        comparable[waited_for] = False
        return np.abs(data["commanded"][:-1] - data["measured"][1:])[comparable]


@dataclass
class _Columns:
    time_s: array[float] = field(default_factory=lambda: array("d"))
    episode: array[int] = field(default_factory=lambda: array("q"))
    measured: array[float] = field(default_factory=lambda: array("d"))
    target: array[float] = field(default_factory=lambda: array("d"))
    commanded: array[float] = field(default_factory=lambda: array("d"))
    age_ticks: array[int] = field(default_factory=lambda: array("q"))
    starved: array[int] = field(default_factory=lambda: array("b"))
