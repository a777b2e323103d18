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
    """One inference: the tick whose action was its first, its cost, and how long the arm waited for it."""

    first_tick: int
    inference_ms: float
    pause_ms: float


class RunTrace:
    """Columns of a run, filled by the control loop and read by report, plots and tests."""

    def __init__(self, joint_names: tuple[str, ...], clock: Clock) -> None:
        self.joint_names = joint_names
        self.stages_ms: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self.chunks: list[ChunkRecord] = []
        self.episodes = 0
        self.ended_by = "error"
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

    def add_chunk(self, chunk: ActionChunk, pause_s: float) -> None:
        """Note an inference whose first action is sent at the coming tick; its inner stages become `infer/<stage>`."""
        self.chunks.append(ChunkRecord(len(self), chunk.inference_ms, 1000 * pause_s))
        for stage, value_ms in chunk.stages_ms.items():
            self.stages_ms[f"infer/{stage}"].append(value_ms)

    def add_tick(self, measured: np.ndarray, target: np.ndarray, commanded: np.ndarray, sent_s: float) -> None:
        """Note what the policy wanted and what was sent (J,), and the pose (J,) measured at the same tick (not yet moved by it)."""
        columns = self._columns
        columns.time_s.append(sent_s - self.began_s)
        columns.episode.append(self.episodes - 1)
        columns.measured.extend(measured.tolist())
        columns.target.extend(target.tolist())
        columns.commanded.extend(commanded.tolist())

    def __len__(self) -> int:
        return len(self._columns.time_s)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return time_s float64 (T,), episode int64 (T,), measured, target, commanded float64 (T, J), chunk_starts int64."""
        columns, joints = self._columns, len(self.joint_names)
        table = {name: np.array(getattr(columns, name)).reshape(-1, joints) for name in ("measured", "target", "commanded")}
        return {
            "time_s": np.array(columns.time_s),
            "episode": np.array(columns.episode, np.int64),
            **table,
            "chunk_starts": np.array([chunk.first_tick for chunk in self.chunks if chunk.first_tick < len(self)], np.int64),
        }

    def tracking_error(self) -> np.ndarray:
        """Return |commanded at a tick - measured one tick later| (T', J), pairs within one episode.

        Pairs that end at the first tick of a chunk are left out: there the pose is measured before the network runs, so less than a tick later.
        """
        data = self.arrays()
        comparable = np.diff(data["episode"]) == 0
        comparable[data["chunk_starts"][data["chunk_starts"] > 0] - 1] = False
        return np.abs(data["commanded"][:-1] - data["measured"][1:])[comparable]


@dataclass
class _Columns:
    time_s: array[float] = field(default_factory=lambda: array("d"))
    episode: array[int] = field(default_factory=lambda: array("q"))
    measured: array[float] = field(default_factory=lambda: array("d"))
    target: array[float] = field(default_factory=lambda: array("d"))
    commanded: array[float] = field(default_factory=lambda: array("d"))
