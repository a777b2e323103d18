"""What happened in a run, kept compactly: about 150 bytes per tick, so that hours fit in memory.

Axis alphabet of this file: T ticks, J joints of the arm.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, LandingReport, Policy
from gr00t_fast.control.pacer import Pacer


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

    time_s: when its target was sent, since the run began. target, commanded (J,): what the policy wanted, what was sent. ahead (L, J): the rows of
    the playing chunk from this tick's on, L 0 when it has run out. inference_ms: of that chunk. tick_error_ms: how late the last tick was that had a
    deadline. missed_ticks: so far.
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


# What a run says on the terminal while it goes on: what is about to happen, how far it is, and what a dry run would have sent.


PROGRESS_EVERY_S = 5.0  # often enough to see that it lives, seldom enough to leave the warnings in sight
_WIDTH = 16


class ProgressLine:
    """A line every few seconds, whatever the controller: one that infers while the arm moves has no other sign of life."""

    def __init__(self, trace: RunTrace, pacer: Pacer, clock: Clock, echo: Callable[[str], None]) -> None:
        self._trace, self._pacer, self._clock, self._echo = trace, pacer, clock, echo
        self.begin()

    def begin(self) -> None:
        """The arm begins to move now."""
        self._due_s = self._clock.now_s() + PROGRESS_EVERY_S

    def __call__(self) -> None:
        """After each tick; says something when it is time."""
        now_s = self._clock.now_s()
        if now_s >= self._due_s:
            self._due_s = now_s + PROGRESS_EVERY_S
            self._echo(self._line(now_s))

    def _line(self, now_s: float) -> str:
        trace = self._trace
        last = f", the last took {trace.chunks[-1].inference_ms:.0f} ms" if trace.chunks else ""
        ticks = f"{len(trace)} ticks ({self._pacer.missed_ticks} missed, {self._pacer.waiting_ticks} waiting for inference)"
        return f"{now_s - trace.began_s:.0f} s: {ticks}, {len(trace.chunks)} inferences{last}"


def dry_run_table(names: Sequence[str], present: np.ndarray, wanted: np.ndarray, sent: np.ndarray) -> str:
    """The first target by joint, each array (J,): where the arm stands, what the policy asked for, and what clamping and step limit make of it."""
    lines = ["Dry run: nothing was sent. By joint: the pose now, the policy's first target, and what would have been sent."]
    lines.append(f"{'':<{_WIDTH}}{'present':>12}{'policy':>12}{'to be sent':>12}")
    rows = zip(names, present, wanted, sent, strict=True)
    return "\n".join(lines + [f"{name:<{_WIDTH}}{now:>12.1f}{target:>12.1f}{limited:>12.1f}" for name, now, target, limited in rows])


def summary(policy: Policy, robot_name: str, fps: float, action_horizon: int | None, instruction: str) -> str:
    """One line about what is going to run."""
    trained = policy.metadata.trained_horizon  # type: ignore[union-attr]  # known once a run has its policy
    played = action_horizon or policy.action_horizon or trained
    inference = [f"{played} of {trained} actions per inference"] if policy.computes else []
    what = [*policy.describe(), *inference, f"{fps:g} Hz", f"{robot_name}, instruction: {instruction!r}"]
    return "ready: " + ", ".join(what)
