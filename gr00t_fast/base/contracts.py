"""The types that cross a boundary: what a robot saw, what a policy answers, and the protocols both sides implement.

Axis alphabet of this file: H horizon (actions in a chunk), J joints of the arm (six on an SO-100).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

# Motor order of lerobot's SO-100 driver (ids 1..6); the same order as state.single_arm + state.gripper in NVIDIA's SO-100 data configs.
SO100_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")

# What pictures may be, each way and of one call together. Below, nothing is left to see after the crop; no camera delivers more; 64 pictures of
# 640x480 or 16 pairs of 1280x720 are less. Chosen figures: NVIDIA's code has no such limits.
MIN_FRAME_PX, MAX_FRAME_PX, MAX_PIXELS = 32, 8192, 2**25

# How body joints are expressed; the gripper is 0..100 (per cent open) in both.
JointUnit = Literal["degrees", "range_m100_100"]
NetworkName = Literal["n1.5", "n1.6", "n1.7"]


@dataclass(frozen=True)
class ModalityConfig:
    """Which keys of a modality the policy reads, and at which time offsets (NVIDIA's `ModalityConfig`, same field names).

    action_configs: how a checkpoint of N1.6 or N1.7 gives each action key: rep, type, format, state_key. `get_action` always returns absolute
    positions.
    """

    delta_indices: list[int]
    modality_keys: list[str]
    action_configs: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class PartStatistics:
    """Range of one state or action part in the training data, from the checkpoint's metadata. Each float64 (D,), in the data's units."""

    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray


@dataclass(frozen=True)
class Letterbox:
    """Whether N1.6 or N1.7 first pads every picture to a square with black.

    why: which file or key decided it.
    known: False if the files do not say whether the code that made the checkpoint padded pictures.
    """

    pads: bool
    why: str
    known: bool


@dataclass(frozen=True)
class PolicyMetadata:
    """What a checkpoint says about the robot it was trained on; the pre-flight check compares it with the arm at hand.

    Names are without their modality prefix: camera `webcam`, part `single_arm`. Parts are in the order of the modality configuration.
    A policy server that says nothing about its checkpoint leaves tag and resolutions None, and the statistics empty.
    """

    embodiment_tag: str | None
    resolutions: Mapping[str, tuple[int, int] | None]  # camera -> (width, height) of the training frames
    fps: float | None  # of the training data; None when the metadata does not carry it
    state_widths: Mapping[str, int]
    action_widths: Mapping[str, int]
    state_statistics: Mapping[str, PartStatistics]
    action_statistics: Mapping[str, PartStatistics]
    trained_horizon: int
    letterbox: Letterbox | None = None  # of N1.6 and N1.7
    n_action_steps: int | None = None  # how many actions of a chunk a run plays by default; None: all
    fingerprint: str | None = None  # of a policy on our server: what each of its answers carries


@dataclass(frozen=True)
class ActionPrefix:
    """The actions that are left of the chunk that plays now. The next chunk continues them.

    actions: `action.<part>` in joint units, (L, D), or (B, L, D) for a batch. Row 0 is due at the observation's own tick.
    inference_delay: how many rows will have been executed when the new chunk arrives (0 <= inference_delay <= L). These come back exactly as they
    were given. Later rows may change, the more the later they are due. A chunk that arrives later than expected joins at a row that could change.
    """

    actions: Mapping[str, np.ndarray]
    inference_delay: int


@runtime_checkable
class Policy(Protocol):
    """Everything that yields actions: in-process network, exported engine, server client, or a test's fake.

    Programs call all members. A class of one's own derives from this one and writes the first three; the rest have defaults.
    """

    metadata: PolicyMetadata | None = None  # what its checkpoint was trained on, where that is known
    protocol: NetworkName = "n1.5"  # which NVIDIA's clients of it speak: flat (N1.5's), or nested with N1.5's arrays (N1.6's) or its own (N1.7's)
    action_horizon: int | None = None  # how many actions a call returns; None: not known before the first one
    continues: bool = False  # whether `get_action` takes an ActionPrefix
    computes: bool = True  # False: it plays what was recorded, and there are no inferences to speak of
    last_timing: Mapping[str, float] = MappingProxyType({})  # stages of the last call in ms, `total` among them
    max_batch: int = 1  # how many calls `get_actions` computes at once
    equal_prompts: bool = False  # whether only those with prompts of one length are, the others one after the other
    takes_deadline: bool = False  # whether `get_action` takes `deadline_s`, too: in how many seconds the answer must be there

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        """NVIDIA-style observation dict in, `action.<part>` float32 (H, D) arrays out (batched if the input was).

        noise: makes the call reproducible. prefix: actions to continue, where `continues`; one of no rows is the same as none.
        Raises ObservationError for what cannot be used, and UnsafeActionError instead of returning NaN or infinity. What a server answers comes as
        it is: the control loop sends no such target.
        """

    def get_actions(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray] | Exception]:
        """Several calls of `get_action`, each by its arguments and with the answer or the error that it would have alone. They are computed together:
        pictures of one size. Raises what ends all of them."""
        return [self.get_action(**call) for call in calls]

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Modality name (`video`, `state`, `action`, `language`) -> its keys and offsets."""

    def fingerprint(self) -> str:
        """A digest of the checkpoint's content, so the same for a copy of it; empty where there is none, or it is not known."""
        return ""

    def reset(self) -> None:
        """Forget whatever one episode left behind."""

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Camera -> (width, height) of the frames to come: what `warm_up` is made for. Raises ObservationError for sizes that cannot be used."""
        return None  # as in `close`

    def warm_up(self, instruction: str, continuing: bool = False) -> Mapping[str, float]:
        """Pay first-call costs, with `continuing` those of continuing a chunk too; -> `last_timing` of a call such as those to come, or
        nothing where that is not known."""
        return {}

    def describe(self) -> list[str]:
        """What runs, for a line before the start: engine and device, number format, denoising steps."""
        return []

    def summary(self) -> dict[str, Any]:
        """For a run's report, JSON-ready."""
        return {}

    def close(self) -> None:
        """Release what it holds: connections, memory. Nothing else is called afterwards."""
        return None  # with a body of its own, it is not abstract to a type checker


@dataclass(frozen=True)
class CameraSpec:
    """What a robot's camera delivers."""

    width: int
    height: int
    fps: float


@dataclass(frozen=True)
class MotorLoads:
    """How hard each motor pushed when it was last asked; they are not all asked at the same time. NaN: not known.

    percent: float64 (J,), the share of the supply voltage that drives the motor, 0 to 100. current_ma: float64 (J,). Neither has a sign.
    time_s: float64 (J,), when that was, on the clock of `Observation.time_s`.
    """

    percent: np.ndarray
    current_ma: np.ndarray
    time_s: np.ndarray


@dataclass(frozen=True)
class Observation:
    """What the robot saw at one instant.

    joints: float64 (J,), in the robot's `joint_unit`, order of `joint_names`.
    frames: camera name -> uint8 RGB (height, width, 3). Read-only to the receiver.
    time_s: monotonic time of the joint reading.
    loads: None where the robot does not measure them.
    frame_ages_s: camera name -> seconds since its frame came into this program; cameras of which that is not known are left out.
    """

    joints: np.ndarray
    frames: Mapping[str, np.ndarray]
    time_s: float
    loads: MotorLoads | None = None
    frame_ages_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionChunk:
    """Joint targets from one inference: float32 (H, J), robot joint order and units, one row per control tick."""

    targets: np.ndarray
    inference_ms: float = 0.0
    stages_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass
class LandingReport:
    """How the arm was left. `problems` is empty when everything that could be switched off was."""

    torque: dict[str, Literal["off", "held", "unknown"]] = field(default_factory=dict)  # per joint
    port_closed: bool = False
    cameras_closed: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def safe(self) -> bool:
        """True when torque is as configured on every joint, and port and cameras are closed."""
        return self.port_closed and self.cameras_closed and "unknown" not in self.torque.values()


@runtime_checkable
class Robot(Protocol):
    """An arm with cameras. One thread only. `connect` first, `land` last, whatever happened in between."""

    name: str
    joint_names: tuple[str, ...]
    joint_unit: JointUnit
    cameras: Mapping[str, CameraSpec]
    events: Mapping[str, int]  # faults survived so far, by name: {"read_retry": 3, "reconnect": 1}
    episodes_solved: int | None  # of those that are over; None: the arm cannot tell (a real one)
    success: bool | None  # whether the task is solved now, or was when the arm landed; None: the arm cannot tell
    check_stop: Callable[[], object]  # raises where the run is to end; called in every wait and between tries. The loop sets it
    rest_pose: np.ndarray | None  # (J,) where it lay before its torque went on; None: not known, or the torque stays on or does not matter
    max_step: np.ndarray | None  # (J,) in `joint_unit`, how far from where a joint is the arm lets its goal be; None: anywhere
    stays_powered: bool  # whether it holds when the run is over, as configured

    @property
    def joint_limits(self) -> np.ndarray:
        """(J, 2) lowest and highest safe target from the arm's calibration, in `joint_unit`. Valid after `connect`."""

    @property
    def units_per_deg(self) -> np.ndarray:
        """(J,) how much each joint's reading changes when its shaft turns by a degree. Valid after `connect`."""

    def keep_alive(self) -> None:
        """The control loop's heartbeat, several times a second from `connect` to `land`. Raises RobotError when the run must end."""

    def connect(self) -> None:
        """Open bus and cameras, switch torque on. Raises RobotError, never prompts; on error everything is closed again."""

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode. A real arm does nothing; a simulation rearranges its scene from `seed`."""

    def lower_if_killed(self, pose: Sequence[float] | None) -> None:
        """Where (J,) the arm is to be put down if this program is killed while the torque is on; None: the torque goes off where it is."""

    def observe(self, with_frames: bool = True) -> Observation:
        """Read joints and newest frames; without frames cameras may have failed. One attempt, which looks for a connection that is lost, too. Raises
        MissedReadingError and ArmAwayError where the next one may succeed, BusFault where the arm cannot be relied on, a CameraError where only a
        camera is to blame, another RobotError where the arm can still be put down."""

    def send(self, targets: np.ndarray) -> None:
        """Send goal positions (J,), finite and already limited by the caller. One attempt; raises as `observe`."""

    def land(self, as_found: bool = False) -> LandingReport:
        """Release (or hold, as configured) torque, close port and cameras. `as_found`: an arm that was powered before the run is held. One that the
        run has not switched on is left as it is. Never raises; calling it again is harmless."""


class Clock(Protocol):
    """Monotonic time; tests pass a virtual one."""

    def now_s(self) -> float: ...

    def sleep_until_s(self, deadline_s: float) -> None: ...

    def suspended_s(self) -> float:
        """How long the machine has been suspended since it was started; 0 where that cannot be known (not Linux)."""
