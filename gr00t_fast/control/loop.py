"""The control loop: observe, infer, send, wait - and always land.

It knows neither the network nor the servo bus: targets come from a Controller, the arm is a Robot, time is a Clock.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, Observation, Robot
from gr00t_fast.control.camera_watch import CameraFault, CameraWatch
from gr00t_fast.control.controller import Controller
from gr00t_fast.control.pacer import Pacer
from gr00t_fast.control.safety import SafetyFilter, SafetyOptions
from gr00t_fast.control.signals import StopRequested, StopSignals
from gr00t_fast.control.trace import Progress, RunTrace, dry_run_table

_REMEMBERED_PLANS = 8  # about two seconds of chunks: a spike is forgotten soon
_LEAD_MARGIN_S = 0.001
_LONGEST_SLEEP_S = 0.25
_OUTAGES = ("reconnect", "torque_restored")  # events of an arm that was out of our hands for a while
# How long a finished run waits for an inference still under way; the arm has landed by then. Longer ones are left to end with the program.
_JOIN_TIMEOUT_S = 2.0


class Observer(Protocol):
    """Looks on at every tick (video recorder, live view). Must be quick and must not raise for reasons of its own."""

    def see(self, observation: Observation) -> None: ...


@dataclass(frozen=True)
class LoopOptions:
    """`timeout_s` per episode (None: until stopped); `dry_run` infers once and sends nothing; `seed` varies with the episode.

    `reset_time_s`: how long the arm holds its pose between two episodes.
    `camera_fault`: what to do about a camera that shows nothing (CameraWatch; None: nothing).
    """

    fps: float
    episodes: int = 1
    timeout_s: float | None = None
    seed: int | None = None
    dry_run: bool = False
    safety: SafetyOptions = field(default_factory=SafetyOptions)
    reset_time_s: float = 0.0
    camera_fault: CameraFault | None = "warn"


class _EpisodeOver(Exception):  # noqa: N818 - no error: the time was up in the middle of an inference
    pass


class ControlLoop:
    """One run on one arm. `trace` and `pacer` hold the figures, also after an error."""

    def __init__(
        self,
        robot: Robot,
        controller: Controller,
        options: LoopOptions,
        clock: Clock,
        stop: StopSignals | None = None,
        on_connected: Callable[[Observation], None] = lambda observation: None,
        observers: Sequence[Observer] = (),
        echo: Callable[[str], None] = print,
    ) -> None:
        """`on_connected` gets the first observation and raises to refuse the run (the arm has not moved then).

        Without `stop` the loop handles Ctrl-C and SIGTERM itself while it runs.
        """
        self.robot, self.controller, self.options, self.clock = robot, controller, options, clock
        self.stop = stop or StopSignals()
        self._signals = nullcontext() if stop else self.stop  # the owner of `stop` has installed the handlers
        self.on_connected, self.observers, self.echo = on_connected, observers, echo
        self._sleeps = _ShortSleeps(clock, robot.keep_alive)
        self.pacer = Pacer(options.fps, self._sleeps)
        self.cameras = None if options.camera_fault is None else CameraWatch(options.camera_fault, echo)
        self.trace = RunTrace(robot.joint_names, clock)
        self._progress = Progress(self.trace, self.pacer, clock, echo)
        self.safety: SafetyFilter | None = None  # needs the calibrated limits, known once connected
        self._end_s = float("inf")
        self._loop_began_s: float | None = None
        self._outages = 0
        self._plans_s: deque[float] = deque(maxlen=_REMEMBERED_PLANS)

    def run(self) -> RunTrace:
        """Connect, play all episodes, land. Returns normally when done or stopped; raises, after landing, what arm or policy raised."""
        with self._signals:
            try:
                with self.stop.armed(), _few_garbage_collections():
                    self._connect()
                    self._play()
                    self.trace.ended_by = "done"
            except StopRequested as request:
                self.trace.ended_by = request.reason
            except Exception as error:
                if not _interrupted(error):
                    raise
                self.trace.ended_by = str(self.stop.reason)
            finally:
                self.trace.landing = self.robot.land()  # outside `armed`: no signal can cut it short
                self.trace.ended_s = self.clock.now_s()
                self.controller.close(_JOIN_TIMEOUT_S)
                self.trace.events = dict(self.robot.events) | (dict(self.cameras.events) if self.cameras else {})
                self.trace.episodes_solved = getattr(self.robot, "episodes_solved", None)  # only a simulation can tell
        return self.trace

    def _connect(self) -> None:
        self.robot.connect()
        self.robot.keep_alive()
        self.safety = SafetyFilter(
            self.robot.joint_limits,
            self.robot.joint_names,
            self.options.safety,
            fps=self.options.fps,
            units_per_deg=self.robot.units_per_deg,
            echo=self.echo,
        )
        self.on_connected(self.robot.observe())
        self.trace.began_s = self.clock.now_s()

    def _play(self) -> None:
        if self.options.dry_run:
            self._dry_run()
            return
        for episode in range(self.options.episodes):
            if episode and self.options.reset_time_s:
                self._hold_between(episode)
            if self.options.episodes > 1:
                self.echo(f"Episode {episode + 1} of {self.options.episodes}")
            self._episode(episode)

    def _hold_between(self, played: int) -> None:
        """Time for somebody to put things back: the arm keeps its last target, onlookers and the watch over the arm go on."""
        hold_s = self.options.reset_time_s
        self.echo(f"Episode {played} of {self.options.episodes} is over. The arm holds its pose for {hold_s:g} s: put things back.")
        end_s = self.clock.now_s() + hold_s
        while (now_s := self.clock.now_s()) < end_s:
            self.robot.keep_alive()
            with self.stop.atomic():
                observation = self.robot.observe()
            for observer in self.observers:
                observer.see(observation)
            self._sleeps.sleep_until_s(min(end_s, now_s + self.pacer.period_s))
            self.stop.check()

    def _episode(self, index: int) -> None:
        """Play until the episode's time is up. A simulated scene is rearranged by the seed; a real arm goes on where it stands."""
        self.robot.reset(None if self.options.seed is None else self.options.seed + index)
        self.controller.reset()
        self.safety.start(self.robot.observe().joints)
        self.trace.episodes += 1
        self._loop_began_s = None
        if self.options.timeout_s is not None:  # half a tick early: rounding must not decide whether a tick due at the end still runs
            self._end_s = self.clock.now_s() + self.options.timeout_s - 0.5 * self.pacer.period_s
        self.pacer.start()
        self._progress.begin()
        with suppress(_EpisodeOver):
            while self.clock.now_s() < self._end_s:
                self._tick()
        self._close_loop()

    def _tick(self) -> None:
        self.robot.keep_alive()
        if self.controller.needs_observation:  # the chunk is played out: look, think, then move
            self._close_loop()
            self._loop_began_s = self.clock.now_s()
            observation = self._observe()
            chunk = self._infer(observation)
            if chunk is None:  # this tick holds, and the next one looks again
                self._loop_began_s = None
            else:
                self._plans_s.append(self.clock.now_s() - self._loop_began_s)
            self._resume(chunk)
            sent = self._send()
        else:  # the move is due now: send first, so that its instant does not depend on the cameras
            if self._outage_count() != self._outages:  # the arm was out of our hands since the last look: first see where it is
                self._observe()
            sent = self._send()
            observation = self._observe()
            self.controller.see(observation, self.pacer.tick)
        note = self.controller.note
        self.trace.add_tick(observation.joints, *sent, note.age_ticks, note.starved)
        for observer in self.observers:
            observer.see(observation)
        self._progress()
        with self.trace.timed("wait"):
            self.pacer.wait(self._plan_lead_s() if self.controller.needs_observation else 0.0)
        self.stop.check()

    def _plan_lead_s(self) -> float:
        """How long before its deadline the next plan must begin to be ready: as long as the slowest of the last few took.

        Looking and thinking then fit into the pause between two ticks where they are short enough, and the observation is no older
        than it has to be.
        """
        return max(self._plans_s, default=0.0) + _LEAD_MARGIN_S

    def _observe(self) -> Observation:
        with self.trace.timed("observe"), self.stop.atomic():
            observation = self.robot.observe()
        outages = self._outage_count()
        if outages != self._outages:  # the arm may have sagged meanwhile: step on from where it is, not from the last target
            self._outages = outages
            self.safety.start(observation.joints)
        self.safety.measured(observation.joints)
        if self.cameras is not None:
            self.cameras(observation)
        return observation

    def _outage_count(self) -> int:
        return sum(self.robot.events.get(name, 0) for name in _OUTAGES)

    def _still_time(self) -> None:
        """While an inference is waited for. The first one of an episode has limits of its own (a server that is away): nothing has moved yet."""
        self.robot.keep_alive()
        if self.pacer.tick > 0 and self.clock.now_s() >= self._end_s:
            raise _EpisodeOver

    def _infer(self, observation: Observation) -> ActionChunk | None:
        with self.trace.timed("infer"):
            chunk = self.controller.plan(observation, self._still_time)
        if chunk is not None:
            self.echo(f"Direct inference time: {chunk.inference_ms / 1000:.3f}s")
        return chunk

    def _resume(self, chunk: ActionChunk | None) -> None:
        with self.trace.timed("wait"):
            pause_s = self.pacer.resume()
        if chunk is not None:
            self.trace.add_chunk(chunk, pause_s)

    def _send(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return what the policy wanted and what was sent, each (J,), and when."""
        target = self.controller.next_target(self.pacer.tick)
        commanded = self.safety(target)
        if self.controller.note.entered is not None:
            self.trace.add_chunk(self.controller.note.entered, 0.0, overlapped=True)
        self.trace.moved = True
        with self.trace.timed("send"), self.stop.atomic():
            self.robot.send(commanded)
        return target, commanded, self.clock.now_s()

    def _close_loop(self) -> None:
        """Report the loop that just ended: one inference and its chunk, played to the end."""
        if self._loop_began_s is None or not self.controller.needs_observation:
            return
        total_s = self.clock.now_s() - self._loop_began_s
        self._loop_began_s = None
        self.trace.stages_ms["loop"].append(1000 * total_s)
        self.echo(f"Loop {len(self.trace.stages_ms['loop'])}: {total_s:.3f}s total")

    def _dry_run(self) -> None:
        """One observation and one inference, checked but not sent."""
        self.controller.reset()
        observation = self._observe()
        self.safety.start(observation.joints)
        self._resume(self._infer(observation))
        target = self.controller.next_target(self.pacer.tick)
        limited = self.safety(target)
        self.trace.episodes += 1
        self.echo(dry_run_table(self.robot.joint_names, observation.joints, target, limited))


def _interrupted(error: BaseException) -> bool:
    """Whether it came from unwinding a StopRequested: a library's lock that the signal handler interrupted is released twice, for example."""
    context = error.__context__
    return context is not None and (isinstance(context, StopRequested) or _interrupted(context))


class _ShortSleeps:
    """A clock whose long sleeps (below 4 Hz) are interrupted by signs of life."""

    def __init__(self, clock: Clock, keep_alive: Callable[[], None]) -> None:
        self._clock, self._keep_alive = clock, keep_alive
        self.now_s = clock.now_s

    def sleep_until_s(self, deadline_s: float) -> None:
        while deadline_s - self.now_s() > _LONGEST_SLEEP_S:
            self._clock.sleep_until_s(self.now_s() + _LONGEST_SLEEP_S)
            self._keep_alive()
        self._clock.sleep_until_s(deadline_s)


@contextmanager
def _few_garbage_collections() -> Iterator[None]:
    """A full collection walks every object of torch and lerobot (about 100 ms, three ticks): what is there now is exempt during the run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
