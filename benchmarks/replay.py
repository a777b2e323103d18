"""The parts of control_architectures.py that play: a recorded joint trajectory (LeRobotDataset v3, CSV, ROS 1 bag, or made up), a policy that knows
it by heart and answers late, an arm that follows with a first-order lag in a scene that moves on or waits, and one trial through the product's loop.

The arm has one axis more than the recording: the *marker*, whose target is the moment of the recording that an action is from. It travels with the
actions like any joint, so at every tick it is known which moment was played; and its reading tells the policy where in the recording it is.
Degrees throughout; a gripper may be in per cent. Axis alphabet: T samples, J joints of the recording (the arm has J + 1), H horizon, N targets sent,
G instants of a regular grid.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.lib.latency import Latency, VirtualWorker, play_until
from benchmarks.lib.served_policy import ServedPolicy
from gr00t_fast.contracts import SO100_JOINTS, ActionChunk, CameraSpec, Clock, JointUnit, LandingReport, ModalityConfig, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import CallResult, Controller, PolicyRunner, SyncController, ThreadWorker, TickNote, Worker
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock, VirtualClock
from gr00t_fast.control.threaded import OverlapOptions, ThreadedController, WhenLate
from gr00t_fast.errors import ConfigError, ObservationError, closest, require

_JOINT_STATE = "sensor_msgs/msg/JointState"  # rosbags' spelling of sensor_msgs/JointState
Columns = tuple[tuple[str, ...], np.ndarray, np.ndarray]


def read_lerobot(root: Path, episode: int, column: str) -> Columns:
    """Names (without lerobot's `.pos`), seconds (T,) and values (T, J) of one episode, in the units it was recorded in.

    Those are degrees (and per cent for the gripper) where the driver ran with `use_degrees`, which the file does not say. Raises ConfigError.
    """
    names = _lerobot_names(root, column)
    parquet = require("pyarrow.parquet", "recordings")
    files = sorted((root / "data").rglob("*.parquet"))
    if not files:
        raise ConfigError(f"{root.name}: there is no data/*/*.parquet. Was the dataset finalized, or copied without its data?")
    times, values = [], []
    for file in files:  # an episode may cross files
        try:
            table = parquet.read_table(file, columns=["timestamp", column], filters=[("episode_index", "==", episode)])
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
            raise ConfigError(f"{root.name}/{file.relative_to(root)} cannot be read: {error}") from error
        times += table["timestamp"].to_pylist()
        values += table[column].to_pylist()
    if not times:
        raise ConfigError(f"{root.name} has no episode {episode}. Choose another one with --episode (they count from 0).")
    return names, np.array(times, np.float64), np.array(values, np.float64)


def _lerobot_names(root: Path, column: str) -> tuple[str, ...]:
    info_file = root / "meta" / "info.json"
    if not info_file.is_file():
        raise ConfigError(f"'{root.name}' is no LeRobotDataset: meta/info.json is missing.")
    try:
        info = json.loads(info_file.read_text(encoding="utf-8"))
        version, features = str(info["codebase_version"]), dict(info["features"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root.name}/meta/info.json is damaged: {error!r}.") from error
    if not version.startswith("v3"):
        raise ConfigError(f"{root.name} has format {version}, expected v3. lerobot converts older ones (datasets/v30/convert_dataset_v21_to_v30.py).")
    vectors = {name: feature for name, feature in features.items() if feature.get("names") and feature.get("dtype", "").startswith("float")}
    if column not in vectors:
        raise ConfigError(f"--column={column}: {root.name} has {', '.join(vectors) or 'no joint columns'}.{closest(column, vectors)}")
    names = vectors[column]["names"]
    if not isinstance(names, list):
        raise ConfigError(f"{root.name}: the names of {column} must be a list of joints, got {names!r}.")
    return tuple(str(name).removesuffix(".pos") for name in names)


def read_bag(path: Path, topic: str | None) -> Columns:
    """Names, seconds (T,) and degrees (T, J) from the JointState messages of `topic` (None: the only such topic). Radians are converted.

    Time is the messages' stamp, or when they were recorded where they carry none. Raises ConfigError.
    """
    rosbag1, typesys = require("rosbags.rosbag1", "bags"), require("rosbags.typesys", "bags")
    types = typesys.get_typestore(typesys.Stores.ROS1_NOETIC)
    stamps_ns, positions, names = [], [], None
    try:
        with rosbag1.Reader(path) as reader:
            connections = _joint_connections(path, reader.connections, topic)
            for connection, recorded_ns, raw in reader.messages(connections):
                message = types.deserialize_ros1(raw, connection.msgtype)
                names = names or tuple(message.name)
                positions.append(_in_order(path, message, names))
                stamp = message.header.stamp
                stamps_ns.append(stamp.sec * 10**9 + stamp.nanosec or recorded_ns)
    except rosbag1.ReaderError as error:
        raise ConfigError(f"{path.name} is no readable ROS 1 bag: {error}. Bags of ROS 2 are not read.") from error
    if not names:
        raise ConfigError(f"{path.name}: the topic {connections[0].topic} has no message with joint names.")
    stamps = np.array(stamps_ns, np.int64)
    return names, (stamps - stamps[0]) / 1e9, np.degrees(np.array(positions, np.float64))


def _joint_connections(path: Path, connections: list[Any], topic: str | None) -> list[Any]:
    topics = {connection.topic for connection in connections if connection.msgtype == _JOINT_STATE}
    if topic is None and len(topics) == 1:
        topic = next(iter(topics))
    if topic not in topics:
        said = "--topic is needed" if topic is None and topics else f"--topic={topic}" if topic else "nothing to replay"
        listed = ", ".join(sorted(topics)) or "none at all"
        raise ConfigError(f"{path.name}: {said}: its topics of sensor_msgs/JointState are: {listed}.{closest(topic or '', topics)}")
    return [connection for connection in connections if connection.topic == topic and connection.msgtype == _JOINT_STATE]


def _in_order(path: Path, message: Any, names: tuple[str, ...]) -> list[float]:
    by_name: Mapping[str, float] = dict(zip(message.name, message.position, strict=False))
    if by_name.keys() != set(names):
        raise ConfigError(
            f"{path.name}: every message must hold the positions of {', '.join(names)}; one holds those of {', '.join(by_name) or 'none'}."
        )
    return [by_name[name] for name in names]


MARKER = "recording_time_s"  # the replay's own extra axis, see follower.py; no joint may be called so
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


def load_recording(path: Path | None, episode: int = 0, column: str = "action", topic: str | None = None, seed: int = 0) -> Recording:
    """Read a LeRobotDataset directory (`episode`, `column`), a .csv, or a .bag (`topic`); without `path`, make one up from `seed`.

    Raises ConfigError for a file that is missing, of another kind, or damaged; MissingExtraError without what reads it.
    """
    if path is None:
        return made_up(seed)
    if not path.exists():
        raise ConfigError(f"--recording: there is no '{path}'. Expected a LeRobotDataset directory, a .csv or a ROS 1 .bag file.")
    if path.is_dir():
        names, times_s, values = read_lerobot(path, episode, column)
        source = f"LeRobotDataset {path.name}, episode {episode}, column {column}"
    elif path.suffix == ".csv":
        (names, times_s, values), source = read_csv(path), f"CSV {path.name}"
    elif path.suffix == ".bag":
        (names, times_s, values), source = read_bag(path, topic), f"ROS 1 bag {path.name}"
    else:
        raise ConfigError(f"--recording: '{path.name}' is neither a directory (LeRobotDataset) nor a .csv nor a ROS 1 .bag file.")
    return Recording(names, times_s - times_s[:1], values, source)


def read_csv(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """A header `time_s,<joint>,<joint>,...` and one row of numbers per sample: seconds, degrees. Returns names, (T,), (T, J)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    names = tuple(name.strip() for name in header)
    if len(names) < 2 or names[0] != "time_s":
        raise ConfigError(f"{path.name}: the first line must name the columns, time_s and then the joints; it is: {','.join(header)[:80]!r}.")
    values = np.array([_numbers(path, number, row, len(names)) for number, row in enumerate(rows, 2) if row]).reshape(-1, len(names))
    return names[1:], values[:, 0], values[:, 1:]


def _numbers(path: Path, line: int, row: list[str], width: int) -> list[float]:
    try:
        numbers = [float(cell) for cell in row]
    except ValueError as error:
        raise ConfigError(f"{path.name}, line {line}: {error}. Every cell must be a number: seconds, then degrees.") from error
    if len(numbers) != width:
        raise ConfigError(f"{path.name}, line {line}: {len(numbers)} numbers for {width} columns.")
    return numbers


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
    """A Controller. Thinks whenever the queue has room; what waited in the queue is played although the world has moved on."""

    def __init__(self, policy: Policy, binding: RobotBinding, clock: Clock, worker: Worker, depth: int = QUEUE_DEPTH) -> None:
        self._runner, self._worker, self._depth = PolicyRunner(policy, binding, "", clock), worker, depth
        self.note, self.instruction = TickNote(), ""
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

    def _take(self, outcome: CallResult) -> None:
        if outcome.error is not None:
            raise outcome.error
        self._queue.append(outcome.value)


SceneKind = Literal["moving", "still"]
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
    episodes_solved = success = rest_pose = None

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


Architecture = Literal["sync", "threaded", "server", "threaded_resume", "naive_async"]
ARCHITECTURES: tuple[Architecture, ...] = ("sync", "threaded", "server", "threaded_resume", "naive_async")
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
    when_late: WhenLate
    chunk_noise_deg: float
    arm_time_constant_s: float
    max_speed_deg_s: float | None
    seed: int
    virtual: bool

    def replay(self, cell: Cell, trial: int) -> ReplaySpec:
        return ReplaySpec(self.recording, self.fps, cell.horizon, cell.delay, self.chunk_noise_deg, (self.seed, trial))


@dataclass(frozen=True)
class Motion:
    """What happened, in seconds since the first target, in degrees.

    sent_s (N,), targets (N, J) as the policy wanted them, before the safety limits; played_s (N,): the moment of the recording each is from.
    starved (N,): the target before was held because no action was left. entries: indices of the first target of each chunk; waited (of those): the
    arm stood still for it. grid_s (G,) at the control rate; arm (G, J) its pose; reference (G, J) the recording at the scene's moment.
    """

    period_s: float
    joint_names: tuple[str, ...]
    sent_s: np.ndarray
    targets: np.ndarray
    played_s: np.ndarray
    starved: np.ndarray
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
    with _policy(setup, cell, trial, clock) as policy:
        worker: Worker = VirtualWorker(clock) if isinstance(clock, VirtualClock) else ThreadWorker()
        controller = make_controller(setup, cell, policy, arm, clock, worker)
        limit_s = (_PATIENCE if cell.scene == "still" else 1.0) * setup.recording.duration_s + cell.delay.values_s[-1] + _SPARE_S
        options = LoopOptions(
            setup.fps, timeout_s=limit_s, safety=SafetyOptions(max_speed_deg_s=setup.max_speed_deg_s, max_following_error_deg=None), camera_fault=None
        )
        end_s = setup.recording.duration_s - 0.5 / setup.fps
        loop = play_until(lambda observation: observation.joints[-1] >= end_s, FINISHED, arm, controller, options, clock)
    return _motion(setup, cell, loop, arm)


@contextmanager
def _policy(setup: Setup, cell: Cell, trial: int, clock: Clock) -> Iterator[Policy]:
    spec = setup.replay(cell, trial)
    with ExitStack() as stack:
        yield stack.enter_context(ServedPolicy(spec)) if cell.architecture == "server" else spec.build(clock)


def make_controller(setup: Setup, cell: Cell, policy: Policy, arm: FollowerArm, clock: Clock, worker: Worker) -> Controller:
    """The product's controllers as their users get them, and the one baseline."""
    widths = {"joints": len(setup.recording.joint_names), MARKER: 1}
    binding = RobotBinding(policy.get_modality_config(), widths, widths, arm.joint_names, {CAMERA: CAMERA})
    if cell.architecture == "sync":
        return SyncController(policy, binding, _INSTRUCTION, clock, max_hold_s=None, worker=worker)
    if cell.architecture == "naive_async":
        return FifoController(policy, binding, clock, worker)
    when_late: WhenLate = "resume" if cell.architecture == "threaded_resume" else setup.when_late
    options = OverlapOptions(when_late=when_late, max_hold_s=None)
    return ThreadedController(policy, binding, _INSTRUCTION, clock, setup.fps, options, worker=worker)


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
        data["starved"],
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
