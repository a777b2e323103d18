"""Which action of which chunk is due at a tick, the decisions of overlapped inference without threads and clocks; and what happened at each tick.

Time is counted in control ticks. A chunk knows the tick of its observation, `observed`; its row i is for tick `observed + i`. While the network
was running the arm moved on, so a chunk that arrives d ticks later is entered at row d: the action that is due now, not the first one.
A tick for which no row is left is an *underrun*: the last target is held, and the tick is counted.

The trace of a run takes about 150 bytes per tick, so that hours fit in memory.

Axis alphabet of this file: H horizon (rows of a chunk), J joints of the arm, T ticks.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.base.contracts import ActionChunk, Clock, LandingReport


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

    def __init__(self, resume: bool = False, in_order: bool = False) -> None:
        """`resume`: ticks for which no row was left do not count as elapsed, so that a chunk is entered where the arm stopped when it had to hold:
        in a scene that waits for the arm nothing of the plan is left out or done twice. While rows are left it is the same as without `resume`,
        also where the pacer missed ticks: the rows of those are passed over. `in_order`: not even those; a recording is not about the present.
        """
        self.underrun_ticks = self.entered = self.expired = 0
        self._resume, self._in_order = resume, in_order
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
        """True until the first chunk of the episode, and from `expire` to the next chunk."""
        return self._chunk is None

    def expire(self) -> None:
        """No row of the chunk that plays is for a tick to come: it is as before the first one, but for the last target, which can be held."""
        self._chunk, self._held = None, []

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
        if tick <= self._last_tick:
            raise RuntimeError(f"tick {tick} was asked for after tick {self._last_tick}: targets go out in order")
        if self._chunk is None:
            if self._last_target is None:
                raise RuntimeError("no chunk yet: the first one of an episode must be planned before the first target")
            self._last_tick = tick
            self.underrun_ticks += 1
            return DueTarget(self._last_target, underrun=True)
        if self._in_order and self._origin <= self._last_tick:
            self._origin += tick - int(self._last_tick) - 1
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

    @property
    def next_tick(self) -> int:
        """The one after the last target."""
        return 0 if math.isinf(self._last_tick) else int(self._last_tick) + 1

    def leftover(self, tick: int) -> dict[str, np.ndarray]:
        """What the playing chunk holds from `tick` on, as the policy's own arrays; empty when it has run out."""
        if self._chunk is None or not self.rows_left(tick):
            return {}
        return {key: values[tick - self._origin :] for key, values in self._chunk.actions.items()}

    def rows_left(self, tick: int) -> int:
        """How many rows are left from `tick` on."""
        return 0 if self._chunk is None else max(self._origin + len(self._chunk) - tick, 0)


@dataclass
class ChunkRecord:
    """One inference: the tick whose action was its first, its cost, how long the arm waited for it, and whether it came while the arm moved."""

    first_tick: int
    inference_ms: float
    pause_ms: float
    overlapped: bool = False


@dataclass(frozen=True)
class TickRecord:
    """A tick as those see it who look on.

    time_s: when its target was sent, since the run began. target, commanded (J,): what the policy wanted, what was sent. ahead (L, J): the next rows
    of the playing chunk from this tick's on, L 0 when it has run out. inference_ms: of that chunk. tick_error_ms: how late the last tick was that
    had a deadline. missed_ticks: so far.
    """

    number: int
    episode: int
    time_s: float
    target: np.ndarray
    commanded: np.ndarray
    ahead: np.ndarray
    inference_ms: float
    age_ticks: int
    underrun: bool
    tick_error_ms: float
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
        self.dry_run: tuple[str, dict[str, np.ndarray]] | None = None  # of a dry run: its table, and the pictures that it saw by camera
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

    def add_chunk(self, chunk: ActionChunk, pause_s: float, overlapped: bool = False) -> None:
        """Note an inference whose first action is sent at the coming tick; its inner stages become `infer/<stage>`."""
        self.chunks.append(ChunkRecord(len(self), chunk.inference_ms, 1000 * pause_s, overlapped))
        if overlapped:  # the loop did not time it
            self.stages_ms["infer"].append(chunk.inference_ms)
        for stage, value_ms in chunk.stages_ms.items():
            self.stages_ms[f"infer/{stage}"].append(value_ms)

    def add_tick(
        self, measured: np.ndarray, target: np.ndarray, commanded: np.ndarray, sent_s: float, age_ticks: int = 0, underrun: bool = False
    ) -> None:
        """Note what the policy wanted and what was sent (J,), and the pose (J,) measured at the same tick (not yet moved by it).

        `age_ticks`: ticks since the observation behind the target. `underrun`: it was only the last one held.
        """
        row = (sent_s - self.began_s, self.episodes - 1, measured, target, commanded, age_ticks, underrun)
        self._rows += np.array(row, self._row).tobytes()

    def __len__(self) -> int:
        return len(self._rows) // self._row.itemsize

    def arrays(self) -> dict[str, np.ndarray]:
        """Return time_s float64 (T,), episode and age_ticks int64 (T,), underrun bool (T,), measured, target, commanded float64 (T, J), chunk_starts
        int64."""
        table = np.frombuffer(bytes(self._rows), self._row)
        starts = np.array([chunk.first_tick for chunk in self.chunks if chunk.first_tick < len(self)], np.int64)
        return {**{name: table[name].copy() for name in self._row.names or ()}, "chunk_starts": starts}

    def intervals_s(self) -> np.ndarray:
        """Return the times between successive sends (T - 1,); NaN across episodes."""
        data = self.arrays()
        return np.where(np.diff(data["episode"]) == 0, np.diff(data["time_s"]), np.nan)

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
