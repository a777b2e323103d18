"""One episode: the product's own control loop, a real policy and the simulated arm, in simulated time.

Simulated time stands still while the network computes and passes by the injected latency instead, so that a result depends on neither the machine nor
what else it does. Targets, chunks and controllers are those of `so100_inference_optimized.py`. Axis alphabet: N ticks, J joints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.closed_loop.cells import Cell
from benchmarks.replay_study.virtual_time import VirtualWorker
from gr00t_fast.contracts import ActionPrefix, Clock, LandingReport, Observation
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.controller import Controller, SyncController
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.signals import StopSignals
from gr00t_fast.control.threaded import OverlapOptions, ThreadedController
from gr00t_fast.errors import ConfigError
from gr00t_fast.robots.config import SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.robot import SimArm
from gr00t_fast.robots.so100_sim.simulation import TICK_S, Simulation

_SOLVED, _TAIL_S = "solved", 0.5  # an episode goes on for a moment after success
Onlooker = Callable[[Simulation], None]
_MOVING_DEG = 0.1  # per tick, by any joint: 3 degrees per second
_BODY = slice(0, 5)  # all joints but the gripper, which is in per cent


@dataclass(frozen=True)
class Outcome:
    """How an episode went. solved_s: simulated time of success, None without one within the episode. jerk_rms_deg_s3: of the five joints in degrees,
    measured at 30 Hz until success, over the ticks in which the arm moves, so that waiting does not count as smooth; None where that was not noted.
    tip_path_m: how far the finger tips travelled. starved_ticks: targets held for want of actions. Those and the distance include the tail."""

    seed: int
    solved_s: float | None
    end_distance_m: float
    jerk_rms_deg_s3: float | None
    tip_path_m: float
    inferences: int
    starved_ticks: int


class LatePolicy:
    """A ContinuingPolicy whose answers take `latency_ms` of simulated time. Inference k of an episode starts from the same noise in every cell."""

    def __init__(self, policy: Any, noise_shape: tuple[int, int], clock: VirtualClock, latency_ms: float, noise_seed: int) -> None:
        self._policy, self._noise_shape, self._clock, self._latency_s, self._noise_seed = policy, noise_shape, clock, latency_ms / 1000, noise_seed
        self.inferences = 0
        self.begin(0)

    def begin(self, seed: int) -> None:
        self._rng, self.inferences = np.random.default_rng([seed, self._noise_seed]), 0

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        drawn = self._rng.standard_normal((1, *self._noise_shape), np.float32) if noise is None else noise
        continued = {} if prefix is None else {"prefix": prefix}
        actions = self._policy.get_action(observation, noise=drawn, **continued)
        self.inferences += 1
        self._clock.time_s += self._latency_s
        return actions

    def get_modality_config(self) -> Any:
        return self._policy.get_modality_config()

    def reset(self) -> None:
        self._policy.reset()


class LazyFrames(Mapping[str, np.ndarray]):
    """Pictures drawn when they are looked at: most ticks need none. The scene must not move on before; in simulated time it does not, since whoever
    asks for an inference gets it at once."""

    def __init__(self, arm: SimArm) -> None:
        self._arm = arm

    def __getitem__(self, name: str) -> np.ndarray:
        camera = self._arm.config.cameras[name]
        return self._arm.simulation.render(camera.view, camera.width, camera.height)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arm.config.cameras)

    def __len__(self) -> int:
        return len(self._arm.config.cameras)


class ConnectedArm:
    """A Robot over an arm that stays connected from episode to episode: building the world takes longer than playing in it."""

    name = "so100_sim"

    def __init__(self, clock: Clock, resolutions: Mapping[str, tuple[int, int]], block_speed_m_s: float) -> None:
        """resolutions: (width, height) of the checkpoint's one camera. Raises ConfigError when it has more."""
        if len(resolutions) != 1:
            raise ConfigError(f"the evaluation shows one camera, from the front; this checkpoint wants {len(resolutions)}: {', '.join(resolutions)}.")
        cameras = {"front": SimCameraConfig(*next(iter(resolutions.values())))}
        self.arm = SimArm(SO100SimConfig(task="reach", cameras=cameras, block_speed_m_s=block_speed_m_s), clock)
        self.arm.connect()
        self.joint_names, self.joint_unit = self.arm.joint_names, self.arm.joint_unit
        self.joint_limits, self.cameras, self.events = self.arm.joint_limits, self.arm.cameras, self.arm.events
        self.watch: Callable[[], None] | None = None  # of the episode that comes

    def connect(self) -> None:
        """Connected already."""

    @property
    def units_per_deg(self) -> np.ndarray:
        return self.arm.units_per_deg

    def keep_alive(self) -> None:
        """Nothing is powered."""

    def reset(self, seed: int | None = None) -> None:
        self.arm.reset(seed)
        self.arm.simulation.watch = self.watch  # not before: what is left of the episode before is none of its business

    def observe(self, with_frames: bool = True) -> Observation:
        seen = self.arm.observe(with_frames=False)
        return Observation(seen.joints, LazyFrames(self.arm) if with_frames else {}, seen.time_s)

    def send(self, targets: np.ndarray) -> None:
        self.arm.send(targets)

    def land(self) -> LandingReport:
        return LandingReport()


class EpisodeTrace:
    """Notes what happens at every tick of the simulation, whatever the loop is doing."""

    def __init__(self, arm: ConnectedArm, episode_s: float, onlooker: Onlooker | None = None) -> None:
        self._simulation, self._episode_s, self._onlooker = arm.arm.simulation, episode_s, onlooker
        self.joints_deg: list[np.ndarray] = []
        self.tips_m: list[np.ndarray] = []
        self.solved_s: float | None = None

    def __call__(self) -> None:
        self.tips_m.append(self._simulation.tcp_m)
        if self.solved_s is None:
            self.joints_deg.append(self._simulation.joints_deg)
            # a loop that waits may finish its last inference after the time is up: the world is still judged by its own clock
            if self._simulation.success and self._simulation.time_s <= self._episode_s:
                self.solved_s = self._simulation.time_s
        if self._onlooker is not None:
            self._onlooker(self._simulation)


class _Goal:
    """An observer of the loop that ends it a moment after success."""

    def __init__(self, trace: EpisodeTrace, arm: ConnectedArm, stop: StopSignals) -> None:
        self._trace, self._arm, self._stop = trace, arm, stop

    def see(self, observation: Observation) -> None:
        solved_s = self._trace.solved_s
        if solved_s is not None and self._arm.arm.simulation.time_s >= solved_s + _TAIL_S:
            self._stop.request(_SOLVED)


class EpisodeRunner:
    """The simulated arm before a block that lies still or moves, for policies to drive. `facts` are those of the checkpoint."""

    def __init__(self, facts: Any, noise_shape: tuple[int, int], instruction: str, block_speed_m_s: float, episode_s: float) -> None:
        """noise_shape: trained horizon and padded action width. block_speed_m_s: in the moving scene."""
        self._facts, self._noise_shape, self._instruction = facts, noise_shape, instruction
        self._speed_m_s, self._episode_s = block_speed_m_s, episode_s
        self._arms: dict[str, tuple[VirtualClock, ConnectedArm]] = {}

    def prepare(self, cell: Cell) -> None:
        """Build the world of a cell, once. Raises ConfigError for a world that cannot be."""
        self._arm(cell)

    def play(self, policy: Any, cell: Cell, seed: int, noise_seed: int = 0, onlooker: Onlooker | None = None) -> Outcome:
        """One episode. `onlooker` sees the world at every tick of simulated time. Raises ConfigError where a controller cannot bridge the latency."""
        clock, arm = self._arm(cell)
        clock.time_s = 0.0  # the same instants, to the last bit, whatever was played before
        late = LatePolicy(policy, self._noise_shape, clock, cell.latency_ms, noise_seed)
        late.begin(seed)
        stop, trace = StopSignals(), EpisodeTrace(arm, self._episode_s, onlooker)
        options = LoopOptions(self._facts.fps, timeout_s=self._episode_s, seed=seed, camera_fault=None)  # pictures are drawn when they are looked at
        controller, goal = self._controller(cell, late, arm, clock), _Goal(trace, arm, stop)
        loop = ControlLoop(arm, controller, options, clock, stop, observers=[goal], echo=lambda line: None)
        arm.watch = trace
        try:
            with stop:
                loop.run()
        finally:
            arm.watch = arm.arm.simulation.watch = None
        if stop.exit_code:  # Ctrl-C ended the loop in good order; it is to end the evaluation too
            raise KeyboardInterrupt
        starved = int(loop.trace.arrays()["starved"].sum())
        return _outcome(seed, trace, arm, late.inferences, starved)

    def _arm(self, cell: Cell) -> tuple[VirtualClock, ConnectedArm]:
        if cell.scene not in self._arms:
            clock = VirtualClock()
            self._arms[cell.scene] = clock, ConnectedArm(clock, self._facts.resolutions, self._speed_m_s if cell.scene == "moving" else 0.0)
        return self._arms[cell.scene]

    def _controller(self, cell: Cell, policy: LatePolicy, arm: ConnectedArm, clock: VirtualClock) -> Controller:
        facts = self._facts
        cameras = resolve_camera_map(arm.cameras, facts.resolutions, None)
        binding = RobotBinding(policy.get_modality_config(), facts.state_widths, facts.action_widths, arm.joint_names, cameras)
        if cell.controller == "sync":
            return SyncController(policy, binding, self._instruction, clock, cell.action_horizon, max_hold_s=None, worker=VirtualWorker(clock))
        overlap = OverlapOptions(
            smoothing="rtc" if cell.controller == "rtc" else "none",
            when_late="resume" if cell.controller == "resume" else "hold",
            max_hold_s=None,
        )
        return ThreadedController(policy, binding, self._instruction, clock, facts.fps, overlap, cell.action_horizon, VirtualWorker(clock))


def _outcome(seed: int, trace: EpisodeTrace, arm: ConnectedArm, inferences: int, starved_ticks: int) -> Outcome:
    simulation, tips = arm.arm.simulation, np.array(trace.tips_m)  # (N, 3)
    return Outcome(
        seed,
        None if trace.solved_s is None else round(trace.solved_s, 4),
        float(np.linalg.norm(simulation.tcp_m - simulation.block_m)),
        jerk_rms(np.array(trace.joints_deg)[:, _BODY]),
        float(np.linalg.norm(np.diff(tips, axis=0), axis=1).sum()),
        inferences,
        starved_ticks,
    )


def jerk_rms(joints_deg: np.ndarray) -> float | None:
    """Of poses (N, J), one per tick: root mean square of the third difference (deg/s^3) where the arm moves. None where it never does."""
    moving = (np.abs(np.diff(joints_deg, axis=0)) > _MOVING_DEG).any(axis=1)  # (N - 1,)
    jerk = np.diff(joints_deg, n=3, axis=0) / TICK_S**3  # (N - 3, J)
    counted = jerk[moving[:-2] | moving[1:-1] | moving[2:]]
    return float(np.sqrt(np.mean(counted**2))) if len(counted) else None


def reach_for_still_blocks(policy: Any, noise_shape: tuple[int, int], seeds: Iterable[int], action_horizon: int = 8) -> list[Outcome]:
    """Does a policy do the task at all? Episodes of 2.5 s without latency, the block at rest."""
    runner = EpisodeRunner(policy.facts, noise_shape, "Reach the block", 0.0, episode_s=2.5)
    return [runner.play(policy, Cell(action_horizon=action_horizon), seed) for seed in seeds]
