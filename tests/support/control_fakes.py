"""Fakes for control tests: a virtual clock, an arm made of numbers, and a policy that answers a fixed pattern. No real time passes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.lib.latency import VirtualWorker
from gr00t_fast.base.contracts import (
    SO100_JOINTS,
    CameraSpec,
    Clock,
    LandingReport,
    ModalityConfig,
    Observation,
    PartStatistics,
    Policy,
    PolicyMetadata,
)
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.base.worker import ThreadWorker, Worker
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.planner import Planner, PlannerOptions
from gr00t_fast.record.session import Session

LIMITS = np.array([[-110.0, 110.0]] * 5 + [[0.0, 100.0]])
TICK_S = 1 / 30


class FakeClock:
    """Virtual time: moves only when someone sleeps or says so."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.oversleep_s = 0.0
        self.asleep_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_until_s(self, deadline_s: float) -> None:
        self.time_s = max(self.time_s, deadline_s) + self.oversleep_s

    def suspended_s(self) -> float:
        return self.asleep_s

    def advance(self, seconds: float) -> None:
        self.time_s += seconds


class FakeRobot:
    """An arm that is at its last target one tick later. `on_observe`, `on_frames`, `on_send` may raise or let time pass."""

    name = "fake"
    joint_names = SO100_JOINTS
    joint_limits = LIMITS
    units_per_deg = np.ones(6)
    episodes_solved = success = rest_pose = max_step = None
    stays_powered = False

    def __init__(self, clock: FakeClock, cameras: dict[str, tuple[int, int]] | None = None, unit: str = "degrees") -> None:
        self.clock = clock
        self.joint_unit = unit
        self.cameras = {name: CameraSpec(w, h, 30.0) for name, (w, h) in (cameras or {"front": (40, 32)}).items()}
        self.events = {"read_retry": 2}
        self.pose = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 50.0])
        self.sent: list[tuple[float, np.ndarray]] = []
        self.calls: list[str] = []
        self.beats = 0
        self.seeds: list[int | None] = []
        self.on_connect: Callable[[], Any] = lambda: None
        self.on_observe: Callable[[], Any] = lambda: None
        self.on_frames: Callable[[], Any] = lambda: None
        self.on_send: Callable[[], Any] = lambda: None
        self.stopped_at: Callable[[np.ndarray], np.ndarray] = lambda pose: pose  # what joints that hit something make of a pose
        self.landing = LandingReport(dict.fromkeys(SO100_JOINTS, "off"), True, True)

    def keep_alive(self) -> None:
        self.beats += 1

    def connect(self) -> None:
        self.calls.append("connect")
        self.on_connect()

    def reset(self, seed: int | None = None) -> None:
        self.calls.append("reset")
        self.seeds.append(seed)

    def lower_if_killed(self, pose: Any) -> None:
        self.lowered_to = pose

    def observe(self, with_frames: bool = True) -> Observation:
        self.on_observe()
        self.move()
        if with_frames:
            self.on_frames()
        frames = {name: np.zeros((spec.height, spec.width, 3), np.uint8) for name, spec in self.cameras.items() if with_frames}
        return Observation(self.pose.copy(), frames, self.clock.now_s())

    def send(self, targets: np.ndarray) -> None:
        self.on_send()
        self.move()
        self.sent.append((self.clock.now_s(), targets.copy()))

    def move(self) -> None:
        if self.sent and self.clock.now_s() - self.sent[-1][0] > 0.5 * TICK_S:
            self.pose = self.stopped_at(self.sent[-1][1].copy())

    def land(self, as_found: bool = False) -> LandingReport:
        self.left_as_found = as_found
        self.calls.append("land")
        return self.landing


def joints(limits: np.ndarray = LIMITS, units_per_deg: np.ndarray | None = None, max_step: np.ndarray | None = None) -> Any:
    """What limits ask of a robot."""
    scale = np.ones(6) if units_per_deg is None else units_per_deg
    return SimpleNamespace(joint_limits=limits, joint_names=SO100_JOINTS, units_per_deg=scale, max_step=max_step)


class FakePolicy(Policy):
    """Sixteen actions that move every joint by one degree per tick from where it stands; inference takes `inference_s` of virtual time."""

    def __init__(self, clock: FakeClock, inference_s: float = 0.0, horizon: int = 16, cameras: tuple[str, ...] = ("webcam",)) -> None:
        self.clock, self.inference_s, self.horizon, self.camera_names = clock, inference_s, horizon, cameras
        self.seen: list[dict[str, Any]] = []
        self.resets = 0
        self.last_timing = {"preprocess": 1.0, "network": 4.0, "total": 5.0}
        self.on_action: Callable[[np.ndarray], np.ndarray] = lambda targets: targets
        self.warmed_up: str | None = None
        self.metadata = policy_metadata(cameras=dict.fromkeys(cameras, (40, 32)))

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        self.seen.append(observation)
        self.clock.advance(self.inference_s)
        pose = np.concatenate([observation["state.single_arm"][0], observation["state.gripper"][0]])
        targets = self.on_action(pose + np.arange(1, self.horizon + 1)[:, None] * np.ones(6)).astype(np.float32)
        return {"action.single_arm": targets[:, :5], "action.gripper": targets[:, 5:]}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return modality_config(self.camera_names)

    def reset(self) -> None:
        self.resets += 1

    def warm_up(self, instruction: str | None = None, continuing: bool = False) -> dict[str, float]:
        self.warmed_up = instruction
        return {}


def modality_config(cameras: tuple[str, ...] = ("webcam",)) -> dict[str, ModalityConfig]:
    return {
        "video": ModalityConfig([0], [f"video.{name}" for name in cameras]),
        "state": ModalityConfig([0], ["state.single_arm", "state.gripper"]),
        "action": ModalityConfig(list(range(16)), ["action.single_arm", "action.gripper"]),
        "language": ModalityConfig([0], ["annotation.human.task_description"]),
    }


def policy_metadata(
    cameras: dict[str, tuple[int, int]] | None = None,
    low: list[float] | None = None,
    high: list[float] | None = None,
    fps: float | None = 30.0,
    tag: str = "new_embodiment",
    widths: dict[str, int] | None = None,
) -> PolicyMetadata:
    """Metadata of an SO-100 checkpoint in degrees; every argument replaces one of them."""
    lows = np.array(low or [-90.0, -95.0, -80.0, -70.0, -60.0, 0.0])
    highs = np.array(high or [90.0, 60.0, 85.0, 80.0, 65.0, 99.0])
    widths = widths or {"single_arm": 5, "gripper": 1}
    statistics, first = {}, 0
    for part, width in widths.items():
        part_low, part_high = lows[first : first + width], highs[first : first + width]
        statistics[part] = PartStatistics(part_low, part_high, part_low, part_high)
        first += width
    return PolicyMetadata(tag, cameras or {"webcam": (40, 32)}, fps, widths, widths, statistics, statistics, 16)


def binding(cameras: dict[str, str] | None = None) -> RobotBinding:
    """Between the fake arm and the fake policy."""
    known, cameras = policy_metadata(), {"front": "webcam"} if cameras is None else cameras
    return RobotBinding(modality_config(tuple(cameras.values())), known.state_widths, known.action_widths, SO100_JOINTS, cameras)


class Bench:
    """A loop with its fakes at hand. Virtual time, unless a `clock` is given; the fakes then have a clock of their own."""

    def __init__(
        self,
        inference_s: float = 0.0,
        horizon: int | None = 8,
        policy_horizon: int = 16,
        worker: Worker | None = None,
        recoverable: tuple = (),
        control: PlannerOptions | None = None,
        clock: Clock | None = None,
        **options: object,
    ) -> None:
        """`control` replaces a controller that waits for inferences and plays `horizon` actions; `options` are LoopOptions."""
        self.clock = FakeClock()
        self.robot = FakeRobot(self.clock)
        self.policy = FakePolicy(self.clock, inference_s, policy_horizon)
        self.said: list[str] = []
        self.stop = StopSignals()
        fps, control = options.pop("fps", 30.0), control or PlannerOptions("sync", action_horizon=horizon)
        worker = worker or (VirtualWorker(self.clock) if clock is None else ThreadWorker())
        clock = clock or self.clock
        self.planner = Planner(self.policy, binding(), "pick: the cube", clock, fps, control, worker, recoverable, echo=self.said.append)
        asked = LoopOptions(fps, **{"timeout_s": 1.0, **options})
        self.loop = ControlLoop(self.robot, self.planner, asked, clock, self.stop, Session(self.stop), echo=self.said.append)

    def sent(self) -> np.ndarray:
        return np.array([targets for _, targets in self.robot.sent])

    def times(self) -> np.ndarray:
        return np.array([time_s for time_s, _ in self.robot.sent])

    @property
    def underrun(self) -> int:
        """Ticks at which the last target was held."""
        return int(self.loop.trace.arrays()["underrun"].sum())
