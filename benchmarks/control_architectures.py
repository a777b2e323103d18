"""Which control architecture keeps an arm moving while its policy thinks, and how well it follows.

    python benchmarks/control_architectures.py --virtual                # 0 and 800 ms, moving and still scene; seconds
    python benchmarks/control_architectures.py --latency_ms 0 measured:bench_policy.json

A recording of a pick and place, made up, is the task; a policy that knows it by heart answers each observation with the next actions, after a delay
and with an error of its own per chunk. The product's control loop, pacer and controllers move an arm with a first-order lag. Architectures: `sync`,
`threaded` and the baseline `naive_async` (a FIFO of chunks, each played from its first action). `floor` is the recording itself sent to the same
arm: no delay, no error.

What comparisons of this kind commonly get wrong, and what is done here: one trial (here several, seeds paired); stale chunks played from index 0
(here a baseline that is called so); an invented fixed delay (here also measured distributions); errors at equal instants only, which charge a delay
as an error (here also with the tracking delay taken out); one kind of scene (in a moving one a pause is an error, in a still one it costs time).

The arm has one axis more than the recording: the *marker*, whose target is the moment of the recording that an action is from. It travels with the
actions like any joint, so at every tick it is known which moment was played; and its reading tells the policy where in the recording it is.
Degrees throughout; a gripper may be in per cent. Axis alphabet: T samples, J joints of the recording (the arm has J + 1), H horizon, N targets sent,
G instants of a regular grid.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib.latency import Latency, VirtualClock, VirtualWorker, needed_actions, parse_latency, play_until
from benchmarks.lib.program import Flags, drawing, finish, in_processes, markdown_table, provenance, read_flags
from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.contracts import SO100_JOINTS, ActionChunk, CameraSpec, Clock, JointUnit, LandingReport, ModalityConfig, Observation, Policy
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.worker import ThreadWorker, Worker
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.planner import DueTarget, Planner, PlannerOptions, PolicyRunner

Architecture = Literal["sync", "threaded", "naive_async"]
SceneKind = Literal["moving", "still"]

# --- the recording -------------------------------------------------------------------------------------------------------------------------

MARKER = "recording_time_s"
_EVEN_S = 1e-9
# A made-up pick and place in the angles of an SO-100 (last: gripper, per cent open).
_HOME = (0.0, -50.0, 50.0, 70.0, -90.0, 10.0)
_OVER_OBJECT = (25.0, -10.0, 25.0, 75.0, -80.0, 60.0)
_AT_OBJECT = (25.0, 12.0, 21.0, 63.0, -80.0, 60.0)
_OVER_BOWL = (-35.0, -15.0, 20.0, 80.0, -100.0, 5.0)
_SHUT, _OPEN = 5.0, 60.0
_DWELL_S, _MEAN_SPEED_DEG_S, _SHORTEST_S, _SAMPLE_HZ = 0.3, 60.0, 0.5, 100.0  # a brisk hand guiding the arm: a choice


@dataclass(frozen=True)
class Recording:
    """times_s float64 (T,), from 0, increasing; values float64 (T, J) in degrees."""

    joint_names: tuple[str, ...]
    times_s: np.ndarray
    values: np.ndarray

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1])

    def at(self, times_s: np.ndarray) -> np.ndarray:
        """Return the pose (..., J) at each of `times_s` (...,): linear in between, the first and last pose held outside."""
        return np.stack([np.interp(times_s, self.times_s, column) for column in self.values.T], axis=-1)


def pick_and_place(seconds: float) -> Recording:
    """At most so long: poses joined by minimum-jerk moves, with a dwell where the gripper works."""
    poses = np.array([_HOME, _OVER_OBJECT, _AT_OBJECT, _AT_OBJECT, _OVER_OBJECT, _OVER_BOWL, _OVER_BOWL, _HOME])
    poses[[3, 4, 5], -1], poses[6, -1] = _SHUT, _OPEN
    times_s, values, now_s = [], [], 0.0
    for begin, end in pairwise(poses):
        lasts_s = max(_SHORTEST_S, float(np.abs(end - begin).max()) / _MEAN_SPEED_DEG_S)
        phase = np.arange(0, lasts_s, 1 / _SAMPLE_HZ) / lasts_s
        shape = phase**3 * (10 - 15 * phase + 6 * phase**2)  # minimum jerk: at rest, and without acceleration, at both ends
        times_s.append(now_s + phase * lasts_s)
        values.append(begin + shape[:, None] * (end - begin))
        now_s += lasts_s + (_DWELL_S if end[-1] != begin[-1] else 0.0)
    told_s, told = np.append(np.concatenate(times_s), now_s), np.concatenate([*values, poses[-1:]])
    return Recording(SO100_JOINTS, told_s[told_s <= seconds], told[told_s <= seconds])


# --- the policy ---------------------------------------------------------------------------------------------------------------------------

CAMERA = "front"
_START_OF_ERROR = 0.5  # how much of the error at a chunk's end its begin has: predictions further ahead are worse


class DelayedReplay(Policy):
    """A `Policy`. Sees the recording's time in the observation and answers what the recording does next: row i is due i ticks after it.

    It WAITS as long as an inference would take instead of computing; a network on the processor that runs the loop would also slow the loop.
    Each chunk is wrong in its own way, as those of a network are: a random offset per joint that grows towards the chunk's end, there with a
    standard deviation of `chunk_noise_deg`. Call k of an episode errs alike, and takes as long, in every architecture.
    """

    def __init__(self, recording: Recording, config: Config, cell: Cell, trial: int, clock: Clock) -> None:
        self._recording, self._config, self._cell, self._trial, self._clock = recording, config, cell, trial, clock
        self.reset()

    def reset(self) -> None:
        self._errors, self._delays = (np.random.default_rng([self._config.seed, self._trial, stream]) for stream in (0, 1))

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        """Return `action.joints` (H, J) and `action.<MARKER>` (H, 1)."""
        ends_s = self._clock.now_s() + self._cell.delay.sample_s(self._delays)
        times_s = float(observation[f"state.{MARKER}"][0, 0]) + np.arange(self._cell.horizon) / self._config.fps  # (H,)
        begin, end = self._errors.normal(0.0, self._config.chunk_noise_deg, (2, len(self._recording.joint_names)))  # (J,) each
        share = np.linspace(0.0, 1.0, self._cell.horizon)[:, None]
        actions = self._recording.at(times_s) + (1 - share) * _START_OF_ERROR * begin + share * end
        self._clock.sleep_until_s(ends_s)
        return {"action.joints": actions.astype(np.float32), f"action.{MARKER}": times_s[:, None].astype(np.float32)}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return {
            "video": ModalityConfig([0], [f"video.{CAMERA}"]),
            "state": ModalityConfig([0], ["state.joints", f"state.{MARKER}"]),
            "action": ModalityConfig(list(range(self._cell.horizon)), ["action.joints", f"action.{MARKER}"]),
            "language": ModalityConfig([0], ["annotation.human.task_description"]),
        }


QUEUE_DEPTH = 5  # of the buffered loop that this baseline stands for


class FifoPlanner:
    """In place of a Planner. Thinks whenever the queue has room; what waited in the queue is played although the world has moved on."""

    limit_s = tell_after_s = math.inf
    instruction = ""

    @property
    def buffer(self) -> FifoPlanner:
        return self

    def __init__(self, policy: Policy, binding: RobotBinding, clock: Clock, worker: Worker, depth: int = QUEUE_DEPTH) -> None:
        self._runner, self._worker, self._depth = PolicyRunner(policy, binding, "", clock), worker, depth
        self._call: Future[tuple[int, ActionChunk]] | None = None
        self._queue: deque[tuple[int, ActionChunk]] = deque()  # tick of the observation, chunk
        self._playing: tuple[int, ActionChunk] | None = None
        self._row = 0

    def warm_up(self) -> None:
        self._runner.policy.warm_up("")

    def reset(self) -> None:
        self._runner.policy.reset()
        self._queue.clear()
        self._playing, self._row = None, 0

    def expire(self) -> None:
        """It looks at nothing but its queue."""

    def remember(self, observation: Observation) -> None:
        """Nor at the past."""

    def arrived(self, tick: int, holding: bool) -> ActionChunk | None:
        if self._call is not None and self._call.done():
            call, self._call = self._call, None
            self._queue.append(call.result())
        if self._queue and (self._playing is None or self._row >= len(self._playing[1].targets)):
            self._playing, self._row = self._queue.popleft(), 0
            return self._playing[1]
        return None

    def due(self, tick: int) -> DueTarget | None:
        if self._playing is None or self._row >= len(self._playing[1].targets):
            return None
        self._row += 1
        return DueTarget(self._playing[1].targets[self._row - 1], tick - self._playing[0])

    def ahead(self, tick: int, rows: int) -> np.ndarray:
        return self._playing[1].targets[self._row :][:rows]

    def want_inference(self, tick: int) -> bool:
        return self._call is None and len(self._queue) < self._depth

    def ask(self, observation: Observation, tick: int) -> None:
        self._call = self._worker.submit(lambda: (tick, self._runner.infer(observation)[0]))

    def close(self, timeout_s: float) -> bool:
        return self._worker.close(timeout_s)


# --- the arm and its scene ----------------------------------------------------------------------------------------------------------------

# Not measured on an arm: a plain figure for a small position-controlled servo under load. The row `floor` shows what it costs by itself.
DEFAULT_TIME_CONSTANT_S = 0.06
_PICTURE = (480, 640, 3)


class Scene:
    """Where in the recording the world is. A `moving` one goes on, whatever the arm does (a conveyor, a person): its time runs from the first target
    on. A `still` one waits for the arm (a cube on a table): its time is the moment last played, and one tick later the arm is there."""

    def __init__(self, kind: SceneKind, period_s: float) -> None:
        self._moving, self._period_s = kind == "moving", period_s
        self._changes: list[tuple[float, float]] = []  # instant, moment played from then on

    def sent(self, played_s: float, now_s: float) -> None:
        """played_s: the moment that the arm was last told to be at; a target that is held moves nothing."""
        if not self._changes or (not self._moving and played_s != self._changes[-1][1]):
            self._changes.append((now_s, played_s))

    def at(self, instants_s: np.ndarray) -> np.ndarray:
        """The scene's time (G,) at each of `instants_s` (G,)."""
        if not self._changes:
            return np.zeros_like(instants_s)
        since_s, played_s = np.array(self._changes).T
        index = np.maximum(np.searchsorted(since_s, instants_s + _EVEN_S, side="right") - 1, 0)
        passed_s = instants_s - since_s[index]
        return passed_s if self._moving else played_s[index] + np.minimum(passed_s, self._period_s)


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

    @property
    def joint_limits(self) -> np.ndarray:
        return np.tile([-1e4, 1e4], (len(self.joint_names), 1))

    @property
    def units_per_deg(self) -> np.ndarray:
        return np.ones(len(self.joint_names))

    def keep_alive(self) -> None:
        """Nothing is powered."""

    def connect(self) -> None:
        """Nothing to open."""

    def lower_if_killed(self, pose: object) -> None:
        pass

    def reset(self, seed: int | None = None) -> None:
        """Stands at the recording's first pose."""
        self.sends.clear()

    def observe(self, with_frames: bool = True) -> Observation:
        now_s = self._clock.now_s()
        joints = np.append(self.poses(np.array([now_s]))[0], self._scene.at(np.array([now_s])))
        return Observation(joints, {CAMERA: np.zeros(_PICTURE, np.uint8)}, now_s)

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
class Trial:
    """What came of one: its figures (`_FIGURES`), and at the instants grid_s (G,) since the first target the arm's pose (G, J) and the recording at
    the scene's moment (G, J)."""

    figures: dict[str, float]
    grid_s: np.ndarray
    arm: np.ndarray
    reference: np.ndarray


def run_trial(recording: Recording, config: Config, cell: Cell, trial: int) -> Trial:
    """Play the recording once. Raises Gr00tFastError when the setting cannot work."""
    clock = VirtualClock() if config.virtual else MonotonicClock()
    scene = Scene(cell.scene, 1 / config.fps)
    arm = FollowerArm(recording, scene, clock, config.fps, config.arm_time_constant_s)
    controller = make_controller(config, cell, DelayedReplay(recording, config, cell, trial, clock), arm, clock)
    limit_s = (_PATIENCE if cell.scene == "still" else 1.0) * recording.duration_s + cell.delay.values_s[-1] + _SPARE_S
    safety = SafetyOptions(max_speed_deg_s=config.max_speed_deg_s, max_following_error_deg=None)
    end_s = recording.duration_s - 0.5 / config.fps
    options = LoopOptions(config.fps, timeout_s=limit_s, safety=safety, camera_fault=None)
    loop = play_until(lambda observation: observation.joints[-1] >= end_s, FINISHED, arm, controller, options, clock)
    return measure(recording, loop, arm, scene, 1 / config.fps)


def make_controller(config: Config, cell: Cell, policy: Policy, arm: FollowerArm, clock: Clock) -> Planner | FifoPlanner:
    """The product's controller as its users get them, and the one baseline."""
    worker: Worker = VirtualWorker(clock) if isinstance(clock, VirtualClock) else ThreadWorker()
    widths = {"joints": len(arm.joint_names) - 1, MARKER: 1}
    binding = RobotBinding(policy.get_modality_config(), widths, widths, arm.joint_names, {CAMERA: CAMERA})
    if cell.architecture == "naive_async":
        return FifoPlanner(policy, binding, clock, worker)
    options = PlannerOptions("sync" if cell.architecture == "sync" else "threaded", max_hold_s=None)
    return Planner(policy, binding, _INSTRUCTION, clock, config.fps, options, worker)


# --- figures of a trial -------------------------------------------------------------------------------------------------------------------

_DELAY_STEP_S = 0.01
_ONE_TICK = 1.5  # a step of more than this many periods in the recording leaves something out; less is the jitter of the ticks
_LONGEST_DELAY = 0.5  # of the motion; beyond, too little is left to compare
# Figure -> its heading, and digits. frozen_ticks: deadlines at which the arm got nothing new because the network was not ready. velocity_jump: the
# largest change of a body joint's commanded velocity from tick to tick. mae_raw compares arm and recording at equal instants, mae_aligned at the
# delay at which they are closest.
_FIGURES = {
    "frozen_ticks": ("frozen ticks", 1),
    "velocity_jump_deg_s": ("velocity's jump, deg/s", 0),
    "tracking_delay_s": ("tracking delay, s", 2),
    "mae_raw": ("MAE, same instant", 2),
    "mae_aligned": ("MAE, delay out", 2),
    "went_back_s": ("went back, s", 2),
    "never_played_s": ("never played, s", 2),
    "duration_s": ("took, s", 1),
    "missed_ticks": ("missed ticks", 1),
}


def measure(recording: Recording, loop: ControlLoop, arm: FollowerArm, scene: Scene, period_s: float) -> Trial:
    """All figures of a run that has ended. Raises ConfigError for one without a target."""
    data, missed = loop.trace.arrays(), loop.pacer.missed_ticks
    if not len(data["time_s"]):
        raise ConfigError("the run ended before its first target; use a longer recording.")
    instants = np.array([instant for instant, _, _ in arm.sends])[: len(data["time_s"])]  # a signal may have come between sending and noting
    ticks = np.maximum(1, np.rint(np.diff(instants) / period_s)).astype(np.int64)  # (N - 1,) until the next target
    grid_s = np.arange(0.0, instants[-1] - instants[0] + period_s / 2, period_s)
    pose, reference = arm.poses(instants[0] + grid_s), recording.at(scene.at(instants[0] + grid_s))
    body = [index for index, name in enumerate(recording.joint_names) if "gripper" not in name]
    commanded = np.repeat(data["target"][:, :-1], np.append(ticks, 1), axis=0)[:, body]  # at every deadline; those of pauses are held
    delays_s = np.arange(0.0, _LONGEST_DELAY * grid_s[-1] + _DELAY_STEP_S, _DELAY_STEP_S)
    errors = [mean_error(grid_s, pose, reference, delay_s) for delay_s in delays_s]
    steps_s = np.diff(data["target"][:, -1])  # of the moment played
    figures = {
        "frozen_ticks": max(0, int(data["underrun"].sum() + (ticks - 1).sum()) - missed),
        "velocity_jump_deg_s": np.abs(np.diff(commanded, n=2, axis=0) / period_s).max(initial=0.0),
        "tracking_delay_s": delays_s[np.argmin(errors)],
        "mae_raw": errors[0],
        "mae_aligned": min(errors),
        "went_back_s": np.maximum(-steps_s, 0).sum(),
        "never_played_s": (steps_s - period_s)[steps_s > _ONE_TICK * period_s].sum(),
        "duration_s": grid_s[-1] + period_s,
        "missed_ticks": missed,
        "finished": loop.trace.ended_by == FINISHED,
    }
    return Trial({name: float(value) for name, value in figures.items()}, grid_s, pose, reference)


def mean_error(grid_s: np.ndarray, pose: np.ndarray, reference: np.ndarray, delay_s: float) -> float:
    """Mean distance of the arm from where the recording was `delay_s` earlier, over joints and the instants that have an earlier one."""
    later_s = grid_s[grid_s >= delay_s - _EVEN_S]
    earlier = np.stack([np.interp(later_s - delay_s, grid_s, column) for column in reference.T], axis=1)
    return float(np.abs(pose[-len(later_s) :] - earlier).mean())


def summarise(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """Mean and worst over trials of every figure."""
    values = {name: [trial.figures[name] for trial in trials] for name in trials[0].figures}
    return {name: {"mean": round(float(np.mean(each)), 4), "max": round(float(np.max(each)), 4)} for name, each in values.items()}


# --- the result ----------------------------------------------------------------------------------------------------------------------------

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
        f"A minimum-jerk pick and place, made up, {recording['seconds']:.1f} s, {len(recording['joints'])} joints. {result['fps']:g} Hz, chunk error "
        f"{result['chunk_noise_deg']:g} deg, arm time constant {result['arm_time_constant_s']:g} s, mean of {result['trials']} trials, "
        f"{result['time']} time."
    )
    columns = ("scene", "delay", "actions per chunk", "needed", "architecture", *(heading for heading, _ in _FIGURES.values()))
    return "\n\n".join([regime, markdown_table(columns, [_line(row) for row in result["rows"]], 5), "\n".join(f"* {note}" for note in _NOTES)])


def _line(row: Mapping[str, Any]) -> list[object]:
    figures = row["figures"]
    texts = {name: f"{figures[name]['mean']:.{digits}f}" for name, (_, digits) in _FIGURES.items()}
    if row["scene"] == "still":  # its time is the arm's own: a lag behind it has no meaning
        texts["tracking_delay_s"] = ""
    if not figures["finished"]["mean"]:
        texts["duration_s"] = "not done"
    setting = (row.get(name, "") for name in ("scene", "delay", "actions_per_chunk", "needed_actions_per_chunk", "architecture"))
    return [*setting, *texts.values()]


def plot(trials: Mapping[tuple[Cell, int], Trial], joints: Sequence[str], path: Path) -> None:
    """The joint that moves most, first trials at the longest delay, a panel per scene."""
    first = {cell: trial for (cell, number), trial in trials.items() if number == 0}
    slowest = max(first, key=lambda cell: (cell.delay.ticks(1000), -cell.horizon))
    shown = {cell: trial for cell, trial in first.items() if (cell.delay, cell.horizon) == (slowest.delay, slowest.horizon)}
    scenes, joint = list(dict.fromkeys(cell.scene for cell in shown)), int(np.ptp(first[slowest].reference, axis=0).argmax())
    title = f"{joints[joint]} (degrees), delay {slowest.delay.label}, {slowest.horizon} actions per chunk"
    with drawing(path, title, 1, len(scenes), (7 * len(scenes), 4), sharey=True) as axes:
        for axis, scene in zip(axes[0], scenes, strict=True):
            mine = {cell: trial for cell, trial in shown.items() if cell.scene == scene}
            if scene == "moving":  # a still scene has no time of its own
                trial = next(iter(mine.values()))
                axis.plot(trial.grid_s, trial.reference[:, joint], "k", linewidth=2.2, alpha=0.45, label="recording")
            for cell, trial in mine.items():
                axis.plot(trial.grid_s, trial.arm[:, joint], linewidth=1.1, label=cell.architecture)
            axis.set_title(f"{scene} scene")
            axis.set_xlabel("time since the first target (s)")
            axis.legend(fontsize=7)


# --- the program ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(Flags):
    device: Literal["cpu"] = "cpu"  # no network runs here
    seconds: float = 10.0  # how much of the recording to play, at most
    architectures: list[Architecture] | None = None  # default: all
    scenes: list[SceneKind] = field(default_factory=lambda: ["moving", "still"])  # moves on by itself, or waits for the arm
    latency_ms: list[str] = field(default_factory=lambda: ["0", "800"])  # of an inference, or measured:FILE[#PLACE] (percentiles in ms in a JSON)
    fps: float = 50.0  # control rate
    actions_per_chunk: list[int] = field(default_factory=lambda: [50, 100])  # the further ones run where the one before cannot bridge the latency
    chunk_noise_deg: float = 1.0  # standard deviation of a chunk's error at its end (a choice, not measured)
    arm_time_constant_s: float = DEFAULT_TIME_CONSTANT_S  # of the arm's first-order lag
    max_speed_deg_s: float = 300.0  # the loop's own limit; 6 degrees per tick at 50 Hz
    rounds: int = 4  # trials of each setting, with seeds of their own
    jobs: int = 4  # trials at the same time; more than the machine can bear shows as missed ticks
    virtual: bool = False  # virtual time: seconds instead of minutes, exact
    out: Path = Path("outputs/control_architectures")  # directory for JSON, table and plot


def main(argv: Sequence[str] | None = None) -> int:
    trials: dict[tuple[Cell, int], Trial] = {}
    config = read_flags(Config, argv, __doc__)

    def draw(result: Mapping[str, Any], path: Path) -> None:
        plot(trials, result["recording"]["joints"], path)

    return finish("control_architectures", config, lambda given: run(given, trials), as_table, draw)


def run(config: Config, trials: dict[tuple[Cell, int], Trial]) -> dict[str, Any]:
    """Leaves what the arm did in `trials`. Raises ConfigError."""
    check_ranges(config, **dict.fromkeys(("rounds", "jobs", "actions_per_chunk"), (1, math.inf)))
    check_ranges(config, fps=(1e-3, math.inf), arm_time_constant_s=(1e-3, math.inf))
    check_ranges(config, chunk_noise_deg=(0, math.inf))
    check_ranges(config, seconds=(1, math.inf))
    recording = pick_and_place(config.seconds)
    cells = cells_of(config)
    shuffled = [(cell, number) for number in range(config.rounds) for cell in random.Random(number).sample(cells, len(cells))]  # they take turns
    work = [(recording, config, cell, number) for cell, number in shuffled]
    alone = config.jobs == 1 or config.virtual
    with progress_bar("trials", len(work)) as tick:
        for job, trial in ((job, run_trial(*job)) for job in work) if alone else in_processes(run_trial, work, config.jobs):
            trials[job[2:]] = trial
            tick()
    rows = []
    perfect = replace(config, chunk_noise_deg=0.0, virtual=True)
    for scene in config.scenes:
        floor = Cell(scene, "sync", max(2, round(config.fps)), parse_latency("0"))  # the recording itself, tick by tick: what nothing can beat
        rows.append({"scene": scene, "architecture": "floor", "figures": summarise([run_trial(recording, perfect, floor, 0)])})
        for cell in (cell for cell in cells if cell.scene == scene):
            setting = {"scene": scene, "architecture": cell.architecture, "delay": cell.delay.label, "actions_per_chunk": cell.horizon}
            setting["needed_actions_per_chunk"] = needed_actions(cell.delay.ticks(config.fps))
            rows.append(setting | {"figures": summarise([trials[cell, number] for number in range(config.rounds)])})
    return {
        "benchmark": "control_architectures",
        "recording": {
            "source": "made up: a minimum-jerk pick and place",
            "seconds": round(recording.duration_s, 3),
            "joints": list(recording.joint_names),
        },
        **{name: getattr(config, name) for name in ("fps", "chunk_noise_deg", "arm_time_constant_s", "max_speed_deg_s")},
        "time": "virtual" if config.virtual else "real",
        "trials": config.rounds,
        "rows": rows,
        **provenance(config.seed),
    }


def cells_of(config: Config) -> list[Cell]:
    """Every architecture at every delay with the first chunk length; with longer ones where the length before is too short to bridge the delay."""
    cells = []
    for scene in config.scenes:
        for delay in map(parse_latency, config.latency_ms):
            needed = needed_actions(delay.ticks(config.fps))
            for before, horizon in zip([0, *config.actions_per_chunk], config.actions_per_chunk, strict=False):
                if before < needed:
                    names = config.architectures or get_args(Architecture)
                    cells += [Cell(scene, name, horizon, delay) for name in names]
    return cells


if __name__ == "__main__":
    sys.exit(main())
