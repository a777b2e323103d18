"""Which control architecture keeps an arm moving while its policy thinks, and how well it follows.

    python benchmarks/control_architectures.py --virtual                # a made-up recording, 0 and 800 ms, moving and still scene; seconds
    python benchmarks/control_architectures.py --recording=DATASET --episode=3 --latency_ms 0 measured:bench_policy.json

A recording is the task; a policy that knows it by heart answers each observation with the next actions, after a delay and with an error of its own
per chunk. The product's control loop, pacer and controllers move an arm with a first-order lag. Architectures: `sync`, `threaded`, `server`
(threaded, the policy in another process behind ZeroMQ), `threaded_resume` (--when_late=resume) and the baseline `naive_async` (a FIFO of chunks,
each played from its first action). `floor` is the recording itself sent to the same arm: no delay, no error.

What comparisons of this kind commonly get wrong, and what is done here: one trial (here several, seeds paired); stale chunks played from index 0
(here a baseline that is called so); an invented fixed delay (here also measured distributions); errors at equal instants only, which charge a delay
as an error (here also with the tracking delay taken out); one kind of scene (in a moving one a pause is an error, in a still one it costs time).

The arm has one axis more than the recording: the *marker*, whose target is the moment of the recording that an action is from. It travels with the
actions like any joint, so at every tick it is known which moment was played; and its reading tells the policy where in the recording it is.
Degrees throughout; a gripper may be in per cent. Axis alphabet: T samples, J joints of the recording (the arm has J + 1), H horizon, N targets sent,
G instants of a regular grid.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib.latency import Latency, VirtualWorker, needed_actions, parse_latency, play_until
from benchmarks.lib.program import (
    Flags,
    check_counts,
    drawing,
    finish,
    in_processes,
    markdown_table,
    provenance,
    read_flags,
    show_progress,
)
from benchmarks.lib.served_policy import ServedPolicy
from gr00t_fast.contracts import SO100_JOINTS, ActionChunk, CameraSpec, Clock, JointUnit, LandingReport, ModalityConfig, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import ChunkController, ControllerOptions, PolicyRunner, TickNote
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock, VirtualClock
from gr00t_fast.control.worker import CallResult, ThreadWorker, Worker
from gr00t_fast.errors import ConfigError, ObservationError, closest, require

Architecture = Literal["sync", "threaded", "server", "threaded_resume", "naive_async"]
SceneKind = Literal["moving", "still"]

# --- the recording -------------------------------------------------------------------------------------------------------------------------

MARKER = "recording_time_s"  # no joint may be called so
_EVEN_S = 1e-9
# A made-up pick and place in the angles of an SO-100 (last: gripper, per cent open), and how long each pose is held.
_HOME = (0.0, -50.0, 50.0, 70.0, -90.0, 10.0)
_ABOVE_OBJECT = (25.0, -10.0, 25.0, 75.0, -80.0, 60.0)
_ABOVE_BOWL = (-35.0, -15.0, 20.0, 80.0, -100.0, 5.0)
_DOWN = (0.0, 22.0, -4.0, -12.0, 0.0, 0.0)
_GRIPPER_SHUT, _GRIPPER_OPEN = 5.0, 60.0
_DWELL_S, _MEAN_SPEED_DEG_S, _SHORTEST_S = 0.3, 60.0, 0.5  # a brisk hand guiding the arm: a choice
_SPREAD_DEG = 5.0


@dataclass(frozen=True)
class Recording:
    """times_s float64 (T,), from 0, increasing; values float64 (T, J) in degrees. `source` says where it is from, without machine paths."""

    joint_names: tuple[str, ...]
    times_s: np.ndarray
    values: np.ndarray
    source: str

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.times_s), len(self.joint_names)) or len(self.times_s) < 2:
            raise ConfigError(f"{self.source}: expected at least two samples of {len(self.joint_names)} joints, got an array of {self.values.shape}.")
        if not (np.isfinite(self.times_s).all() and np.isfinite(self.values).all()):
            raise ConfigError(f"{self.source}: times or joints are not finite (NaN or infinite). Cut those rows out, or use --start_s and --seconds.")
        if (backward := np.flatnonzero(np.diff(self.times_s) <= 0)).size:
            raise ConfigError(f"{self.source}: time must increase, but does not after {self.times_s[backward[0]]:g} s ({backward.size} places).")
        if len(set(self.joint_names)) < len(self.joint_names) or MARKER in self.joint_names:
            raise ConfigError(f"{self.source}: joint names must differ from each other and from '{MARKER}', got {', '.join(self.joint_names)}.")

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1])

    def at(self, times_s: np.ndarray) -> np.ndarray:
        """Return the pose (..., J) at each of `times_s` (...,): linear in between, the first and last pose held outside."""
        return np.stack([np.interp(times_s, self.times_s, column) for column in self.values.T], axis=-1)

    def cut(self, start_s: float, seconds: float | None) -> Recording:
        """The part from `start_s` on, at most `seconds` long, with its time from 0. Raises ConfigError when nothing is left."""
        end_s = self.duration_s if seconds is None else min(self.duration_s, start_s + seconds)
        if not 0 <= start_s < end_s:
            raise ConfigError(f"--start_s={start_s:g} --seconds={seconds}: the recording lasts {self.duration_s:.2f} s, nothing of it is left.")
        inner = self.times_s[(self.times_s > start_s + _EVEN_S) & (self.times_s < end_s - _EVEN_S)]
        times_s = np.concatenate([[start_s], inner, [end_s]])
        return Recording(self.joint_names, times_s - start_s, self.at(times_s), self.source)


def load_recording(path: Path | None, episode: int = 0, column: str = "action", seed: int = 0) -> Recording:
    """One episode of a LeRobotDataset v3 in the units it was recorded in; without `path`, one made up from `seed`. Raises ConfigError for a directory
    that is missing, of another format, or damaged; MissingExtraError without pyarrow."""
    if path is None:
        return made_up(seed)
    try:
        info = json.loads((path / "meta" / "info.json").read_text(encoding="utf-8"))
        version, feature = str(info["codebase_version"]), info["features"].get(column, {})
        names = [str(name).removesuffix(".pos") for name in feature.get("names") or ()]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"--recording={path}: expected a LeRobotDataset v3 (meta/info.json cannot be read: {error}).") from error
    if not version.startswith("v3") or not names:
        had = ", ".join(info["features"])
        raise ConfigError(f"{path.name}: expected format v3 with joints in {column}, got {version} with {had}.{closest(column, info['features'])}")
    parquet, chosen = require("pyarrow.parquet", "recordings"), [("episode_index", "==", episode)]
    tables = [parquet.read_table(file, columns=["timestamp", column], filters=chosen) for file in sorted((path / "data").rglob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]  # an episode may cross files
    if not rows:
        raise ConfigError(f"{path.name} has no rows of episode {episode}. Choose another one with --episode (they count from 0).")
    times_s, values = (np.array([row[name] for row in rows], np.float64) for name in ("timestamp", column))
    return Recording(tuple(names), times_s - times_s[0], values, f"LeRobotDataset {path.name}, episode {episode}, column {column}")


def made_up(seed: int, sample_hz: float = 100.0) -> Recording:
    """Pick and place of nobody: poses around fixed ones, drawn with `seed`, joined by minimum-jerk moves, with a dwell where the gripper works."""
    poses = _pick_and_place(np.random.default_rng(seed))
    times_s, values, now_s = [], [], 0.0
    for begin, end in zip(poses, poses[1:], strict=False):
        lasts_s = max(_SHORTEST_S, float(np.abs(end - begin).max()) / _MEAN_SPEED_DEG_S)
        phase = np.arange(0, lasts_s, 1 / sample_hz) / lasts_s
        shape = phase**3 * (10 - 15 * phase + 6 * phase**2)  # minimum jerk: at rest, and without acceleration, at both ends
        times_s.append(now_s + phase * lasts_s)
        values.append(begin + shape[:, None] * (end - begin))
        now_s += lasts_s
        if end[-1] != begin[-1]:  # the gripper has worked: wait, as everybody does
            now_s += _DWELL_S
    times_s.append(np.array([now_s]))
    values.append(poses[-1][None])
    return Recording(SO100_JOINTS, np.concatenate(times_s), np.concatenate(values), f"made up: minimum-jerk pick and place, seed {seed}")


def _pick_and_place(generator: np.random.Generator) -> list[np.ndarray]:
    spread = np.array([_SPREAD_DEG] * 5 + [0.0])
    above_object, above_bowl = (np.array(pose) + spread * generator.uniform(-1, 1, 6) for pose in (_ABOVE_OBJECT, _ABOVE_BOWL))
    held = np.array([0.0] * 5 + [1.0])

    def gripper(pose: np.ndarray, opening: float) -> np.ndarray:
        return pose * (1 - held) + opening * held

    at_object = above_object + np.array(_DOWN)
    shut, bowl = gripper(at_object, _GRIPPER_SHUT), gripper(above_bowl, _GRIPPER_SHUT)
    home = np.array(_HOME)
    return [home, above_object, at_object, shut, gripper(above_object, _GRIPPER_SHUT), bowl, gripper(bowl, _GRIPPER_OPEN), home]


# --- the policy ---------------------------------------------------------------------------------------------------------------------------

CAMERA = "front"
_START_OF_ERROR = 0.5  # how much of the error at a chunk's end its begin has: predictions further ahead are worse


@dataclass(frozen=True)
class ReplaySpec:
    """All that a DelayedReplay is made of; travels to another process."""

    recording: Recording
    fps: float
    horizon: int
    delay: Latency
    chunk_noise_deg: float
    seed: tuple[int, ...]

    def build(self, clock: Clock) -> DelayedReplay:
        return DelayedReplay(self, clock)


class DelayedReplay(Policy):
    """A `Policy`. Sees the recording's time in the observation and answers what the recording does next: row i is due i ticks after it.

    It WAITS as long as an inference would take instead of computing; a network on the processor that runs the loop would also slow the loop.
    Each chunk is wrong in its own way, as those of a network are: a random offset per joint that grows towards the chunk's end, there with a
    standard deviation of `chunk_noise_deg`. Call k of an episode errs alike, and takes as long, in every architecture.
    """

    def __init__(self, spec: ReplaySpec, clock: Clock) -> None:
        if spec.horizon < 1 or spec.chunk_noise_deg < 0:
            raise ConfigError(f"a chunk needs at least one action and no negative noise, got {spec.horizon} and {spec.chunk_noise_deg}.")
        self._spec, self._clock = spec, clock
        self.reset()

    def reset(self) -> None:
        self._errors, self._delays = (np.random.default_rng([*self._spec.seed, stream]) for stream in (0, 1))

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        """Return `action.joints` (H, J) and `action.<MARKER>` (H, 1). Raises ObservationError without the time of the recording."""
        if noise is not None:
            raise ConfigError("a recording has no noise to start from; leave `noise` out.")
        if f"state.{MARKER}" not in observation:
            raise ObservationError(f"the observation lacks state.{MARKER}; it has {', '.join(observation)}.")
        ends_s = self._clock.now_s() + self._spec.delay.sample_s(self._delays)
        began_s = float(np.asarray(observation[f"state.{MARKER}"])[0, 0])
        times_s = began_s + np.arange(self._spec.horizon) / self._spec.fps  # (H,)
        actions = self._spec.recording.at(times_s) + self._error()
        self._clock.sleep_until_s(ends_s)
        return {"action.joints": actions.astype(np.float32), f"action.{MARKER}": times_s[:, None].astype(np.float32)}

    def _error(self) -> np.ndarray:
        """(H, J): an offset at the begin and another at the end of the chunk, linear in between."""
        begin, end = self._errors.normal(0.0, self._spec.chunk_noise_deg, (2, len(self._spec.recording.joint_names)))  # (J,) each
        share = np.linspace(0.0, 1.0, self._spec.horizon)[:, None]
        return (1 - share) * _START_OF_ERROR * begin + share * end

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return {
            "video": ModalityConfig([0], [f"video.{CAMERA}"]),
            "state": ModalityConfig([0], ["state.joints", f"state.{MARKER}"]),
            "action": ModalityConfig(list(range(self._spec.horizon)), ["action.joints", f"action.{MARKER}"]),
            "language": ModalityConfig([0], ["annotation.human.task_description"]),
        }


QUEUE_DEPTH = 5  # of the buffered loop that this baseline stands for


class FifoController:
    """In place of a ChunkController. Thinks whenever the queue has room; what waited in the queue is played although the world has moved on."""

    def __init__(self, policy: Policy, binding: RobotBinding, clock: Clock, worker: Worker, depth: int = QUEUE_DEPTH) -> None:
        self._runner, self._worker, self._depth = PolicyRunner(policy, binding, "", clock), worker, depth
        self.note, self.instruction = TickNote(), ""
        self._queue: deque[tuple[int, ActionChunk]] = deque()  # tick of the observation, chunk
        self._playing: tuple[int, ActionChunk] | None = None
        self._row = 0
        self._underrun_ticks = 0

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
        underrun = self._row >= len(chunk.targets)
        self._underrun_ticks += underrun
        self.note = TickNote(tick - observed, underrun, entered)
        target = chunk.targets[min(self._row, len(chunk.targets) - 1)]
        self._row += 1
        return target

    def summary(self) -> dict[str, Any]:
        return {"kind": "fifo", "underrun_ticks": self._underrun_ticks}

    def close(self, timeout_s: float) -> bool:
        return self._worker.close(timeout_s)

    def _submit(self, observation: Observation, tick: int) -> None:
        self._worker.submit(lambda: (tick, self._runner.infer(observation)[0]))

    def _take(self, outcome: CallResult) -> None:
        if outcome.error is not None:
            raise outcome.error
        self._queue.append(outcome.value)


# --- the arm and its scene ----------------------------------------------------------------------------------------------------------------

# Not measured on an arm: a plain figure for a small position-controlled servo under load. The row `floor` shows what it costs by itself.
DEFAULT_TIME_CONSTANT_S = 0.06
_PICTURE = (480, 640, 3)  # as large as a usual camera's, so that the server's transport carries what it would
_BEYOND_DEG = 60.0


class Scene:
    """Where in the recording the world is. A `moving` one goes on, whatever the arm does (a conveyor, a person): its time runs from the first target
    on. A `still` one waits for the arm (a cube on a table): its time is the moment last played, and one tick later the arm is there."""

    def __init__(self, kind: SceneKind, period_s: float) -> None:
        self._moving, self._period_s = kind == "moving", period_s
        self._played_s, self._since_s = 0.0, None

    def sent(self, played_s: float, now_s: float) -> None:
        """played_s: the moment that the arm was last told to be at; a target that is held moves nothing."""
        if self._since_s is None or (not self._moving and played_s != self._played_s):
            self._played_s, self._since_s = played_s, now_s

    def time_s(self, now_s: float) -> float:
        if self._since_s is None:
            return 0.0
        passed_s = now_s - self._since_s
        return passed_s if self._moving else self._played_s + min(passed_s, self._period_s)


class FollowerArm:
    """A `Robot`. Every joint approaches its last target exponentially; nothing else acts on it. `sends`: instant, targets (J + 1,) and pose (J,)."""

    name = "follower"
    events: Mapping[str, int] = {}
    episodes_solved = success = rest_pose = max_step = None
    stays_powered = False

    def __init__(self, recording: Recording, scene: Scene, clock: Clock, fps: float, time_constant_s: float) -> None:
        self.joint_names = (*recording.joint_names, MARKER)
        self.cameras = {CAMERA: CameraSpec(_PICTURE[1], _PICTURE[0], fps)}
        self.sends: list[tuple[float, np.ndarray, np.ndarray]] = []
        self.joint_unit: JointUnit = "degrees"
        self._recording, self._scene, self._clock, self._lag_s = recording, scene, clock, time_constant_s
        self._picture = np.random.default_rng(0).integers(0, 256, _PICTURE, np.uint8)
        self._picture.setflags(write=False)

    @property
    def joint_limits(self) -> np.ndarray:
        values = self._recording.values
        low, high = values.min(0) - _BEYOND_DEG, values.max(0) + _BEYOND_DEG
        marker = 2 * self._recording.duration_s + 60.0
        return np.column_stack([np.append(low, -marker), np.append(high, marker)])

    @property
    def units_per_deg(self) -> np.ndarray:
        return np.ones(len(self.joint_names))

    def keep_alive(self) -> None:
        """Nothing is powered."""

    def connect(self) -> None:
        """Nothing to open."""

    def reset(self, seed: int | None = None) -> None:
        """Stands at the recording's first pose."""
        self.sends.clear()

    def observe(self, with_frames: bool = True) -> Observation:
        now_s = self._clock.now_s()
        joints = np.append(self.poses(np.array([now_s]))[0], self._scene.time_s(now_s))
        return Observation(joints, {CAMERA: self._picture}, now_s)

    def send(self, targets: np.ndarray) -> None:
        now_s = self._clock.now_s()
        self.sends.append((now_s, targets.copy(), self.poses(np.array([now_s]))[0]))
        self._scene.sent(float(targets[-1]), now_s)

    def poses(self, times_s: np.ndarray) -> np.ndarray:
        """The pose (G, J) at each of `times_s` (G,), exact."""
        if not self.sends:
            return np.repeat(self._recording.values[:1], len(times_s), axis=0)
        recent = self.sends if len(times_s) > 1 else self.sends[-1:]
        instants = np.array([instant for instant, _, _ in recent])
        index = np.searchsorted(instants, times_s, side="right") - 1
        before = np.where(index < 0, 0, index)
        targets = np.stack([target[:-1] for _, target, _ in recent])[before]  # (G, J)
        starts = np.stack([pose for _, _, pose in recent])[before]  # (G, J)
        passed_s = np.where(index < 0, 0.0, times_s - instants[before])
        return targets + (starts - targets) * np.exp(-passed_s / self._lag_s)[:, None]

    def land(self, as_found: bool = False) -> LandingReport:
        return LandingReport(port_closed=True, cameras_closed=True)


# --- a trial ------------------------------------------------------------------------------------------------------------------------------

FINISHED = "the recording is over"
_PATIENCE = 2.0  # a still scene waits for the arm, but not for more than this many times the recording's length
# The loop's time limit includes waiting for the first chunk, the scene's time does not; the goal ends a run that gets there.
_SPARE_S = 2.0
_INSTRUCTION = "replay the recording"


@dataclass(frozen=True)
class Cell:
    """One setting of the study; trials repeat it with other seeds."""

    scene: SceneKind
    architecture: Architecture
    horizon: int
    delay: Latency


@dataclass(frozen=True)
class Setup:
    """What all cells share."""

    recording: Recording
    fps: float
    chunk_noise_deg: float
    arm_time_constant_s: float
    max_speed_deg_s: float | None
    seed: int
    virtual: bool


@dataclass(frozen=True)
class Motion:
    """What happened, in seconds since the first target, in degrees.

    sent_s (N,), targets (N, J) as the policy wanted them, before the safety limits; played_s (N,): the moment of the recording each is from.
    underrun (N,): the target before was held because no action was left. entries: indices of the first target of each chunk; waited (of those): the
    arm stood still for it. grid_s (G,) at the control rate; arm (G, J) its pose; reference (G, J) the recording at the scene's moment.
    """

    period_s: float
    joint_names: tuple[str, ...]
    sent_s: np.ndarray
    targets: np.ndarray
    played_s: np.ndarray
    underrun: np.ndarray
    entries: np.ndarray
    waited: np.ndarray
    grid_s: np.ndarray
    arm: np.ndarray
    reference: np.ndarray
    missed_ticks: int
    speed_limited: int
    finished: bool


def run_trial(setup: Setup, cell: Cell, trial: int) -> Motion:
    """Play the recording once. Raises Gr00tFastError when the setting cannot work."""
    clock = VirtualClock() if setup.virtual else MonotonicClock()
    arm = FollowerArm(setup.recording, Scene(cell.scene, 1 / setup.fps), clock, setup.fps, setup.arm_time_constant_s)
    recipe = ReplaySpec(setup.recording, setup.fps, cell.horizon, cell.delay, setup.chunk_noise_deg, (setup.seed, trial))
    with ExitStack() as stack:
        policy = stack.enter_context(ServedPolicy(recipe)) if cell.architecture == "server" else recipe.build(clock)
        worker: Worker = VirtualWorker(clock) if isinstance(clock, VirtualClock) else ThreadWorker()
        controller = make_controller(setup, cell, policy, arm, clock, worker)
        limit_s = (_PATIENCE if cell.scene == "still" else 1.0) * setup.recording.duration_s + cell.delay.values_s[-1] + _SPARE_S
        options = LoopOptions(
            setup.fps, timeout_s=limit_s, safety=SafetyOptions(max_speed_deg_s=setup.max_speed_deg_s, max_following_error_deg=None), camera_fault=None
        )
        end_s = setup.recording.duration_s - 0.5 / setup.fps
        loop = play_until(lambda observation: observation.joints[-1] >= end_s, FINISHED, arm, controller, options, clock)
    return _motion(setup, cell, loop, arm)


def make_controller(setup: Setup, cell: Cell, policy: Policy, arm: FollowerArm, clock: Clock, worker: Worker) -> ChunkController | FifoController:
    """The product's controller as its users get them, and the one baseline."""
    widths = {"joints": len(setup.recording.joint_names), MARKER: 1}
    binding = RobotBinding(policy.get_modality_config(), widths, widths, arm.joint_names, {CAMERA: CAMERA})
    if cell.architecture == "naive_async":
        return FifoController(policy, binding, clock, worker)
    when_late = "resume" if cell.architecture == "threaded_resume" else "hold"
    options = ControllerOptions("sync" if cell.architecture == "sync" else "threaded", when_late=when_late, max_hold_s=None)
    return ChunkController(policy, binding, _INSTRUCTION, clock, setup.fps, options, worker)


def _motion(setup: Setup, cell: Cell, loop: ControlLoop, arm: FollowerArm) -> Motion:
    data, period_s = loop.trace.arrays(), 1 / setup.fps
    if not len(data["time_s"]):
        raise ConfigError("the run ended before its first target; use a longer recording.")
    instants = np.array([instant for instant, _, _ in arm.sends])
    sent_s = instants - instants[0]
    count = len(data["time_s"])  # a signal may have come between sending and noting
    grid_s = np.arange(0.0, sent_s[-1] + period_s / 2, period_s)
    chunks = [chunk for chunk in loop.trace.chunks if chunk.first_tick < count]
    return Motion(
        period_s,
        setup.recording.joint_names,
        sent_s[:count],
        data["target"][:, :-1],
        data["target"][:, -1],
        data["underrun"],
        np.array([chunk.first_tick for chunk in chunks], np.int64),
        np.array([not chunk.overlapped for chunk in chunks], bool),
        grid_s,
        arm.poses(instants[0] + grid_s),
        setup.recording.at(_scene_time(cell, grid_s, sent_s[:count], data["target"][:, -1], period_s)),
        loop.pacer.missed_ticks,
        int(loop.safety.speed_limited[:-1].sum()),
        loop.trace.ended_by == FINISHED,
    )


def _scene_time(cell: Cell, grid_s: np.ndarray, sent_s: np.ndarray, played_s: np.ndarray, period_s: float) -> np.ndarray:
    """The scene's time (G,) at each instant of the grid, as the policy would have seen it."""
    if cell.scene == "moving":
        return grid_s
    changed = np.flatnonzero(np.diff(played_s, prepend=np.nan) != 0)  # a target that is held moves nothing
    index = changed[np.searchsorted(sent_s[changed], grid_s + 1e-9, side="right") - 1]
    return played_s[index] + np.minimum(grid_s - sent_s[index], period_s)


# --- figures of a trial -------------------------------------------------------------------------------------------------------------------

_LAG_STEP_S = 0.01
_ONE_TICK = 1.5  # a step of more than this many periods in the recording leaves something out; less is the jitter of the ticks
_LONGEST_LAG = 0.5  # of the motion; beyond, too little is left to compare


def measure(motion: Motion) -> dict[str, Any]:
    """All figures of one trial. `mae` and `rmse` are dicts by joint; "raw" compares equal instants, "aligned" after taking the delay out."""
    body = [index for index, name in enumerate(motion.joint_names) if "gripper" not in name]
    delay_s = tracking_delay_s(motion)
    gaps = {kind: np.subtract(*aligned(motion, by_s)) for kind, by_s in (("raw", 0.0), ("aligned", delay_s))}
    return {
        "frozen_ticks": frozen_ticks(motion),
        "freeze_s": freeze_s(motion),
        **boundary_jumps(motion, body),
        "jerk_rms_deg_s3": jerk_rms(motion, body),
        "tracking_delay_s": delay_s,
        "target_lag_s": float(np.median(motion.sent_s - motion.played_s)),
        "went_back_s": float(np.maximum(-np.diff(motion.played_s), 0).sum()),
        "never_played_s": never_played_s(motion),
        "duration_s": float(motion.sent_s[-1] + motion.period_s),
        "finished": float(motion.finished),
        "missed_ticks": float(motion.missed_ticks),
        "speed_limited": float(motion.speed_limited),
        **{f"mae_{kind}": float(np.abs(gap).mean()) for kind, gap in gaps.items()},
    }


def never_played_s(motion: Motion) -> float:
    """How much of the recording was jumped over, forward."""
    steps_s = np.diff(motion.played_s)
    return float((steps_s - motion.period_s)[steps_s > _ONE_TICK * motion.period_s].sum())


def _gaps(motion: Motion) -> np.ndarray:
    """(N,) ticks from the target before; 1 for the first."""
    steps = np.diff(motion.sent_s, prepend=motion.sent_s[0] - motion.period_s) / motion.period_s
    return np.maximum(1, np.rint(steps)).astype(np.int64)


def _waits(motion: Motion) -> np.ndarray:
    """Indices of the targets that the arm stood still for, without the first chunk's: nothing had moved yet."""
    return motion.entries[motion.waited & (motion.entries > 0)]


def frozen_ticks(motion: Motion) -> int:
    """Deadlines after the first target at which the arm got nothing new because the network was not ready; missed ones are counted apart."""
    return int(motion.underrun.sum() + (_gaps(motion)[_waits(motion)] - 1).sum())


def freeze_s(motion: Motion) -> float:
    """The same in seconds: held ticks, and what the pauses lasted beyond one period."""
    waits = _waits(motion)
    pauses_s = motion.sent_s[waits] - motion.sent_s[waits - 1] - motion.period_s
    return float(motion.underrun.sum() * motion.period_s + np.maximum(pauses_s, 0).sum())


def per_tick(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Targets (K, J) at every deadline, those of pauses held, and boundary (K,)."""
    gaps = _gaps(motion)
    ticks = np.cumsum(gaps) - 1  # of each target
    targets = np.repeat(motion.targets, np.append(gaps[1:], 1), axis=0)  # (K, J)
    boundary = np.zeros(len(targets), bool)
    boundary[ticks[motion.entries[motion.entries > 0]]] = True
    freeze_begins = motion.underrun & ~np.roll(motion.underrun, 1)
    boundary[ticks[freeze_begins]] = True
    waits = _waits(motion)
    boundary[ticks[waits - 1][gaps[waits] > 1] + 1] = True
    return targets, boundary


def boundary_jumps(motion: Motion, body: Sequence[int]) -> dict[str, float]:
    """The largest change of a joint's commanded velocity at a boundary, and the largest step there in one tick.

    The tick after a boundary counts as well: a jump's way back is part of it."""
    targets, boundary = per_tick(motion)
    at = np.flatnonzero(boundary)
    at = np.unique(np.concatenate([at, at + 1]))
    at = at[(at >= 2) & (at < len(targets))]
    if not at.size:
        return {"boundary_jump_deg_s": 0.0, "boundary_step_deg": 0.0}
    step = np.diff(targets[:, body], axis=0)  # (K - 1, J): entry k is the step into tick k + 1
    change = np.abs(step[at - 1] - step[at - 2]) / motion.period_s
    return {"boundary_jump_deg_s": float(change.max()), "boundary_step_deg": float(np.abs(step[at - 1]).max())}


def jerk_rms(motion: Motion, body: Sequence[int]) -> float:
    """Root mean square over instants and joints of the third difference of the arm's pose at the control rate, in degrees per second cubed."""
    if len(motion.arm) < 4:
        return math.nan
    return float(np.sqrt((np.diff(motion.arm[:, body], 3, axis=0) ** 2).mean()) / motion.period_s**3)


def aligned(motion: Motion, delay_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Arm and reference, (G', J) each, the reference taken `delay_s` earlier; instants before that are left out."""
    grid_s = motion.grid_s[motion.grid_s >= delay_s - 1e-9]
    reference = np.stack([np.interp(grid_s - delay_s, motion.grid_s, column) for column in motion.reference.T], axis=1)
    return motion.arm[-len(grid_s) :], reference


def tracking_delay_s(motion: Motion) -> float:
    """The delay at which arm and reference correlate best (cross-correlation, mean over the joints that move), from 0 to half the motion."""
    moving = np.flatnonzero((motion.reference.std(0) > 1e-6) & (motion.arm.std(0) > 1e-6))
    if not moving.size:
        return 0.0

    def correlation(delay_s: float) -> float:
        arm, reference = (poses[:, moving] - poses[:, moving].mean(0) for poses in aligned(motion, delay_s))
        power = np.sqrt((arm**2).sum(0) * (reference**2).sum(0))
        return float(((arm * reference).sum(0) / np.maximum(power, 1e-12)).mean())

    return float(max(np.arange(0.0, _LONGEST_LAG * motion.grid_s[-1], _LAG_STEP_S), key=correlation, default=0.0))


def summarise(trials: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and worst over trials of every figure."""
    values = {name: [trial[name] for trial in trials] for name in trials[0]}
    return {name: {"mean": round(float(np.mean(each)), 4), "max": round(float(np.max(each)), 4)} for name, each in values.items()}


# --- the result ----------------------------------------------------------------------------------------------------------------------------

_COLUMNS = (  # heading, figure, digits
    ("frozen ticks", "frozen_ticks", 1),
    ("freeze, s", "freeze_s", 2),
    ("boundary jump, deg/s", "boundary_jump_deg_s", 0),
    ("step there, deg", "boundary_step_deg", 1),
    ("jerk, deg/s^3", "jerk_rms_deg_s3", 0),
    ("target lag, s", "target_lag_s", 2),
    ("tracking delay, s", "tracking_delay_s", 2),
    ("MAE, same instant", "mae_raw", 2),
    ("MAE, delay out", "mae_aligned", 2),
    ("went back, s", "went_back_s", 2),
    ("never played, s", "never_played_s", 2),
    ("took, s", "duration_s", 1),
    ("missed ticks", "missed_ticks", 1),
)
_NOTES = (
    "A chunk must hold twice the delay and a margin (`needed`), or a controller that drops elapsed actions runs out of them.",
    "The policy replays a recording and waits: it stands for a network's delay and for chunks that disagree, not for a network's mistakes.",
    "In the still scene the task waits for the arm, so a pause costs time, not accuracy: compare `took`.",
    "naive_async is a baseline with known mistakes (first in, first out, from index 0); no controller of gr00t_fast works like that.",
)


def as_table(result: Mapping[str, Any]) -> str:
    """One row per setting and architecture, means over the trials."""
    recording = result["recording"]
    regime = (
        f"Recording: {recording['source']}, {recording['seconds']:.1f} s, {len(recording['joints'])} joints. {result['fps']:g} Hz, chunk error "
        f"{result['chunk_noise_deg']:g} deg, arm time constant {result['arm_time_constant_s']:g} s, mean of {result['trials']} trials, "
        f"{result['time']} time."
    )
    columns = ("scene", "delay", "actions per chunk", "needed", "architecture", *(heading for heading, _, _ in _COLUMNS))
    return "\n\n".join([regime, markdown_table(columns, [_line(row) for row in result["rows"]], 5), "\n".join(f"* {note}" for note in _NOTES)])


def _line(row: Mapping[str, Any]) -> list[object]:
    figures = row["figures"]
    texts = {name: f"{figures[name]['mean']:.{digits}f}" for _, name, digits in _COLUMNS}
    if row["scene"] == "still":  # its time is the arm's own: a lag behind it has no meaning
        texts["target_lag_s"] = texts["tracking_delay_s"] = ""
    if not figures["finished"]["mean"]:
        texts["duration_s"] = "not done"
    return [
        row["scene"],
        *(row.get(name, "") for name in ("delay", "actions_per_chunk", "needed_actions_per_chunk")),
        row["architecture"],
        *texts.values(),
    ]


def plot(motions: Mapping[tuple[Cell, int], Motion], path: Path) -> None:
    """The joint that moves most, first trials at the longest delay, a panel per scene."""
    first = {cell: motion for (cell, trial), motion in motions.items() if trial == 0}
    slowest = max(first, key=lambda cell: (cell.delay.ticks(1000), -cell.horizon))
    shown = {cell: motion for cell, motion in first.items() if (cell.delay, cell.horizon) == (slowest.delay, slowest.horizon)}
    scenes, joint = list(dict.fromkeys(cell.scene for cell in shown)), int(np.ptp(first[slowest].reference, axis=0).argmax())
    title = f"{first[slowest].joint_names[joint]} (degrees), delay {slowest.delay.label}, {slowest.horizon} actions per chunk"
    with drawing(path, title, 1, len(scenes), (7 * len(scenes), 4), sharey=True) as axes:
        for axis, scene in zip(axes[0], scenes, strict=True):
            mine = {cell: motion for cell, motion in shown.items() if cell.scene == scene}
            if scene == "moving":  # a still scene has no time of its own
                motion = next(iter(mine.values()))
                axis.plot(motion.grid_s, motion.reference[:, joint], "k", linewidth=2.2, alpha=0.45, label="recording")
            for cell, motion in mine.items():
                axis.plot(motion.grid_s, motion.arm[:, joint], linewidth=1.1, label=cell.architecture)
            axis.set_title(f"{scene} scene")
            axis.set_xlabel("time since the first target (s)")
            axis.legend(fontsize=7)


# --- the program ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(Flags):
    device: Literal["cpu"] = "cpu"  # no network runs here
    recording: Path | None = None  # LeRobotDataset v3, joints in degrees; default: made up
    episode: int = 0  # of it
    column: str = "action"  # of it: action or observation.state
    start_s: float = 0.0  # where in the recording to begin
    seconds: float = 10.0  # how much of the recording to play, at most
    architectures: list[Architecture] | None = None  # default: all (with --virtual: all but server)
    scenes: list[SceneKind] = field(default_factory=lambda: ["moving", "still"])  # moves on by itself, or waits for the arm
    latency_ms: list[str] = field(default_factory=lambda: ["0", "800"])  # of an inference, or measured:FILE[#PLACE] (percentiles in ms in a JSON)
    fps: float = 50.0  # control rate
    actions_per_chunk: list[int] = field(default_factory=lambda: [50, 100])  # the further ones run where the one before cannot bridge the latency
    chunk_noise_deg: float = 1.0  # standard deviation of a chunk's error at its end (a choice, not measured)
    arm_time_constant_s: float = DEFAULT_TIME_CONSTANT_S  # of the arm's first-order lag
    max_speed_deg_s: float = 300.0  # the loop's own limit; 6 degrees per tick at 50 Hz
    rounds: int = 4  # trials of each setting, with seeds of their own
    jobs: int = 4  # trials at the same time; more than the machine can bear shows as missed ticks
    virtual: bool = False  # virtual time: seconds instead of minutes, exact; without the server
    out: Path = Path("outputs/control_architectures")  # directory for JSON, table and plot


def main(argv: Sequence[str] | None = None) -> int:
    motions: dict[tuple[Cell, int], Motion] = {}
    config = read_flags(Config, argv, __doc__)
    return finish("control_architectures", config, lambda given: run(given, motions), as_table, lambda result, path: plot(motions, path))


def run(config: Config, motions: dict[tuple[Cell, int], Motion]) -> dict[str, Any]:
    """Leaves what the arm did in `motions`. Raises ConfigError."""
    check_counts(config, "rounds", "jobs", "actions_per_chunk")
    check_counts(config, "fps", "arm_time_constant_s", least=1e-3)
    recording = load_recording(config.recording, config.episode, config.column, config.seed).cut(config.start_s, config.seconds)
    settings = {each.name: getattr(config, each.name) for each in fields(Setup) if each.name != "recording"}
    setup, cells = Setup(recording, **settings), cells_of(config)
    motions |= play_all(setup, cells, config.rounds, config.jobs)
    rows = []
    for scene in dict.fromkeys(cell.scene for cell in cells):
        rows.append({"scene": scene, "architecture": "floor", "figures": summarise([measure(floor_of(setup, scene))])})
        for cell in (cell for cell in cells if cell.scene == scene):
            figures = summarise([measure(motions[cell, trial]) for trial in range(config.rounds)])
            told = {
                "delay": cell.delay.label,
                "actions_per_chunk": cell.horizon,
                "needed_actions_per_chunk": needed_actions(cell.delay.ticks(config.fps)),
            }
            rows.append({"scene": scene, "architecture": cell.architecture, **told, "figures": figures})
    return {
        "benchmark": "control_architectures",
        "recording": {"source": recording.source, "seconds": round(recording.duration_s, 3), "joints": list(recording.joint_names)},
        **settings,
        "time": "virtual" if config.virtual else "real",
        "trials": config.rounds,
        "rows": rows,
        **provenance(config.seed),
    }


def cells_of(config: Config) -> list[Cell]:
    """Every architecture at every delay with the first chunk length; with longer ones where the length before is too short to bridge the delay.
    `threaded_resume` differs from `threaded` only where the chunk is too short, and is run there. Raises ConfigError."""
    if config.virtual and "server" in (config.architectures or ()):
        raise ConfigError("a server in another process runs in real time only: leave out --virtual, or server.")
    architectures = config.architectures or [name for name in get_args(Architecture) if not (config.virtual and name == "server")]
    cells = []
    for scene in config.scenes:
        for delay in map(parse_latency, config.latency_ms):
            needed = needed_actions(delay.ticks(config.fps))
            for before, horizon in zip([0, *config.actions_per_chunk], config.actions_per_chunk, strict=False):
                if before < needed:
                    cells += [Cell(scene, name, horizon, delay) for name in architectures if name != "threaded_resume" or horizon < needed]
    if not cells:
        raise ConfigError("nothing to run: threaded_resume alone differs from threaded only where a chunk is shorter than twice the delay.")
    return cells


def play_all(setup: Setup, cells: list[Cell], trials: int, jobs: int) -> dict[tuple[Cell, int], Motion]:
    """All trials; several at a time, in an order in which the architectures take turns. Raises what a trial raises."""
    work = [(setup, cell, trial) for trial in range(trials) for cell in random.Random(setup.seed + trial).sample(cells, len(cells))]
    alone = jobs == 1 or setup.virtual
    motions = {}
    for job, motion in ((job, run_trial(*job)) for job in work) if alone else in_processes(run_trial, work, jobs):
        motions[job[1:]] = motion
        show_progress("trial", len(motions), len(work))
    return motions


def floor_of(setup: Setup, scene: SceneKind) -> Motion:
    """The recording itself, tick by tick, to the same arm: what no architecture can beat."""
    perfect = replace(setup, chunk_noise_deg=0.0, virtual=True)
    return run_trial(perfect, Cell(scene, "sync", max(2, round(setup.fps)), parse_latency("0")), 0)


if __name__ == "__main__":
    sys.exit(main())
