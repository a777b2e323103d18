"""One trial: an architecture plays the recording once, through the product's own control loop, and what came of it.

Axis alphabet of this file: N targets sent, G instants of a regular grid, J joints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.replay_study.delay import Delay
from benchmarks.replay_study.fifo import FifoController
from benchmarks.replay_study.follower import FollowerArm, MovingScene, SceneKind, StillScene
from benchmarks.replay_study.policy import CAMERA, ReplaySpec
from benchmarks.replay_study.recording import MARKER, Recording
from benchmarks.replay_study.virtual_time import VirtualWorker
from benchmarks.served_policy import ServedPolicy
from gr00t_fast.contracts import Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import Controller, SyncController
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock, VirtualClock
from gr00t_fast.control.safety import SafetyOptions
from gr00t_fast.control.signals import StopSignals
from gr00t_fast.control.threaded import OverlapOptions, Smoothing, ThreadedController, WhenLate
from gr00t_fast.control.worker import ThreadWorker, Worker
from gr00t_fast.errors import ConfigError

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
    delay: Delay


@dataclass(frozen=True)
class Setup:
    """What all cells share."""

    recording: Recording
    fps: float
    chunk_threshold: float
    smoothing: Smoothing
    when_late: WhenLate
    chunk_noise_deg: float
    time_constant_s: float
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
    scene = MovingScene() if cell.scene == "moving" else StillScene(1 / setup.fps)
    arm = FollowerArm(setup.recording, scene, clock, setup.fps, setup.time_constant_s)
    stop = StopSignals()
    with _policy(setup, cell, trial, clock) as policy:
        worker: Worker = VirtualWorker(clock) if isinstance(clock, VirtualClock) else ThreadWorker()
        controller = make_controller(setup, cell, policy, arm, clock, worker)
        limit_s = (_PATIENCE if cell.scene == "still" else 1.0) * setup.recording.duration_s + cell.delay.values_s[-1] + _SPARE_S
        options = LoopOptions(
            setup.fps, timeout_s=limit_s, safety=SafetyOptions(max_speed_deg_s=setup.max_speed_deg_s, max_following_error_deg=None), camera_fault=None
        )
        goal = _Goal(setup.recording.duration_s - 0.5 / setup.fps, stop)
        loop = ControlLoop(arm, controller, options, clock, stop, observers=[goal], echo=lambda line: None)
        with stop:
            loop.run()
        if stop.exit_code:  # Ctrl-C ended the loop in good order; it is to end the study too
            raise KeyboardInterrupt
    return _motion(setup, cell, loop, arm)


class _Goal:
    """An observer of the loop that ends it when the recording is over."""

    def __init__(self, end_s: float, stop: StopSignals) -> None:
        self._end_s, self._stop = end_s, stop

    def see(self, observation: Observation) -> None:
        if observation.joints[-1] >= self._end_s:
            self._stop.request(FINISHED)


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
    options = OverlapOptions(setup.chunk_threshold, "none" if when_late == "resume" else setup.smoothing, when_late, max_hold_s=None)
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
