"""The control loop: observe, infer, send, wait - then put the arm down and release it.

It knows neither the network nor the servo bus: targets come from a Controller, the arm is a Robot, time is a Clock.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gr00t_fast.base.contracts import ActionChunk, Clock, Observation, Robot
from gr00t_fast.base.errors import BusFault, ConfigError, ObservationError, RobotError, UnsafeActionError
from gr00t_fast.control.camera_watch import CameraFault, CameraWatch
from gr00t_fast.control.chunk_buffer import RunTrace, TickRecord
from gr00t_fast.control.controller import GAP_S, ChunkController
from gr00t_fast.control.limits import ARRIVED_DEG, MOVE_HZ, Move, Pose, Poses, SafetyFilter, SafetyOptions
from gr00t_fast.control.pacer import Pacer, StopRequested, StopSignals
from gr00t_fast.control.session import ProgressLine, Session, dry_run_table

_REMEMBERED_PLANS = 8  # about two seconds of chunks: a spike is forgotten soon
_LEAD_MARGIN_S = 0.001
_LOOK_EVERY_S = 0.04  # at rates below 13 Hz
_STILL_LOOK_S = 0.2  # while an inference is waited for: the arm has come to rest, or something blocks it
_OUTAGES = ("reconnect", "torque_restored")  # events of an arm that was out of our hands for a while
# How long a finished run waits for an inference still under way; the arm has landed by then. Longer ones are left to end with the program.
_JOIN_TIMEOUT_S = 2.0
_SKIPPED_S = 0.15  # more missed ticks in a row than this: the speed limit grows anew
_SHOWN_ROWS = 64  # of a chunk, to those who look on; a recording that is replayed is one of thousands
_DRY_RUN_LOOK_S = 2.0  # what a video of a dry run shows


class Observer(Protocol):
    """Looks on at every tick (video recorder, live view). Must be quick and must not raise for reasons of its own."""

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        """`tick` is None where no policy drives the arm: it holds its pose between episodes, or moves to a pose that was asked for."""


@dataclass(frozen=True)
class LoopOptions:
    """`timeout_s` per episode (None: until stopped); `dry_run` infers once and sends nothing; `seed` varies with the episode.

    `reset_time_s`: how long the arm holds its pose between two episodes.
    `poses`: where the arm goes before and between episodes, and before its torque goes off.
    `camera_fault`: what to do about a camera that shows nothing (CameraWatch; None: nothing).
    `tell_inferences`: say how long each inference and its chunk took.
    """

    fps: float
    episodes: int = 1
    timeout_s: float | None = None
    seed: int | None = None
    dry_run: bool = False
    safety: SafetyOptions = field(default_factory=SafetyOptions)
    reset_time_s: float = 0.0
    camera_fault: CameraFault | None = "warn"
    poses: Poses = field(default_factory=Poses)
    tell_inferences: bool = True


class _EpisodeOver(Exception):  # noqa: N818 - no error: the time was up in the middle of an inference
    pass


class ControlLoop:
    """One run on one arm. `trace` and `pacer` hold the figures, also after an error."""

    def __init__(
        self,
        robot: Robot,
        controller: ChunkController,
        options: LoopOptions,
        clock: Clock,
        stop: StopSignals | None = None,
        on_connected: Callable[[Observation], None] = lambda observation: None,
        observers: Sequence[Observer] = (),
        echo: Callable[[str], None] = print,
        session: Session | None = None,
    ) -> None:
        """`on_connected` gets the first observation and raises to refuse the run (the arm has not moved then). `session` ends episodes early and
        records them.

        Without `stop` the loop handles Ctrl-C and SIGTERM itself while it runs.
        """
        self.robot, self.controller, self.options, self.clock = robot, controller, options, clock
        self.stop = stop or StopSignals()
        self._signals = nullcontext() if stop else self.stop  # the owner of `stop` has installed the handlers
        self.on_connected, self.observers, self.echo = on_connected, observers, echo
        self.session = session or Session(self.stop)
        robot.check_stop = self.stop.check
        self._sleeps = _ShortSleeps(clock, self._look_between)
        self.pacer = Pacer(options.fps, self._sleeps)
        self.cameras = None if options.camera_fault is None else CameraWatch(options.camera_fault, echo)
        self.trace = RunTrace(robot.joint_names, clock)
        self._progress = ProgressLine(self.trace, self.pacer, clock, echo)
        self.safety: SafetyFilter | None = None  # needs the calibrated limits, known once connected
        self._end_s = float("inf")
        self._loop_began_s: float | None = None
        self._putting_down = False
        self._outages = 0
        self._lost = False  # after a gap: the arm holds the pose that was measured then, until the new plan is there
        self._tick_before = 0  # of the last target
        self._looked_s, self._suspended_s = clock.now_s(), clock.suspended_s()
        self._again_due = False  # the goal is to be another one than the motors know
        self._chunk = ActionChunk(np.empty((0, len(robot.joint_names)), np.float32))  # the one that plays
        self._plans_s: deque[float] = deque(maxlen=_REMEMBERED_PLANS)

    def run(self) -> RunTrace:
        """Connect, play all episodes, put the arm down, land. Returns normally when done or stopped; raises, after landing, what arm or policy
        raised."""
        with self._signals:
            as_found = False
            try:
                try:
                    self._until_stopped()
                except BaseException as error:
                    as_found = self._put_down(error)
                    raise
                as_found = self._put_down()
            finally:
                self.trace.landing = self.robot.land(as_found)
                self.trace.ended_s = self.clock.now_s()
                self.session.end(self.trace.ended_by, self.robot.success)
                self.session.settle()
                self.controller.close(_JOIN_TIMEOUT_S)
                self.trace.events = dict(self.robot.events) | (dict(self.cameras.events) if self.cameras else {})
                self.trace.episodes_solved = self.robot.episodes_solved
        return self.trace

    def _until_stopped(self) -> None:
        try:
            with _few_garbage_collections():
                self._connect()
                self._play()
                self.trace.ended_by = "done"
        except StopRequested as request:
            self.trace.ended_by = request.reason

    def _put_down(self, error: BaseException | None = None) -> bool:
        """Whatever ended the run: hold, and move slowly to where the arm can be let go. Needs the bus alone, neither policy nor pictures. A fault of
        the bus, and a deliberate further stop: the torque goes off at once. Returns whether an arm that was found powered is to be left so."""
        self.stop.obeyed()
        self.echo = _unfailing(self.echo)
        if isinstance(error, BusFault):
            return False
        pose = self._rest_pose
        try:
            self.stop.check()
            if pose is None or not self.trace.moved:
                return True
            self._putting_down = True
            self.safety.protect()
            self._say_put_down(error)
            self._lower(tuple(pose))
        except StopRequested:
            self.echo(f"stopped once more: {self._at_once}, where the arm is")
        except Exception as trouble:
            if error is None and not isinstance(trouble, UnsafeActionError):
                raise
            self.echo(f"WARNING: the arm did not get there, {self._at_once}: {trouble}")
        return False

    def _lower(self, pose: Pose) -> None:
        """The move down. What is wrong but leaves the bus sound (a watchdog that has ended, a hot servo) is raised once each, said, and the move goes
        on."""
        what = "the pose in which it lay before its torque went on" if self.options.poses.rest == "start" else "the rest pose"
        for more in (2, 1, 0):
            try:
                return self._go_to(pose, what, last=True)
            except RobotError as error:
                if isinstance(error, BusFault) or not more:
                    raise
                self.echo(f"WARNING: {error}")

    @property
    def _rest_pose(self) -> Pose | None:
        """Where the arm is put down; None: nowhere."""
        rest = self.options.poses.rest
        return self.robot.rest_pose if rest == "start" else rest  # type: ignore[return-value]  # resolved: no other words

    @property
    def _at_once(self) -> str:
        return "it stops and stays powered" if self.robot.stays_powered else "the torque goes off at once"

    def _say_put_down(self, error: BaseException | None) -> None:
        cause = self.stop.reason or ("" if error is None else f"{type(error).__name__}: {str(error).partition('. ')[0]}")
        ending = f"the run ends ({cause})" if cause else "the run ends"
        further = "another Ctrl-C, a second from now or later," if self.stop.reason else "Ctrl-C, twice and a second apart,"
        self.echo(f"{ending}: the arm is put down. After {further} {self._at_once}, wherever the arm is.")

    def _go_to(self, pose: Pose | None, what: str, last: bool = False) -> None:
        """Move slowly, tick by tick as in an episode, without the network. Raises StopRequested, what the arm and the safety limits raise, and
        UnsafeActionError when a joint is blocked on the way. The `last` move takes no pictures, and a blocked joint does not keep the others."""
        if pose is None:
            return
        observation, stalls = self._observe(), self.safety.blocked.count.copy()
        move = Move(pose, self.safety.last, self.robot, min(self.options.poses.home_speed_deg_s, self.safety.max_speed_deg_s))
        pacer = Pacer(MOVE_HZ, self._sleeps)  # of its own: the report's figures are the episodes'
        if move.ticks:
            self.echo(f"moving to {what} ({move.ticks / MOVE_HZ:.1f} s)")
        self.safety.fps = MOVE_HZ
        while not move.over(self.safety.last, observation.joints, self.safety.blocked.held):
            self.robot.keep_alive()
            self._command(move.next_target(self.safety.last))
            observation = self._observe()
            for observer in () if last else self.observers:
                observer.see(observation)
            if (blocked := self.safety.blocked.count > stalls).any() and not last:
                names = self._names(blocked)
                raise UnsafeActionError(f"joint {names} is blocked on the way to {what}. Clear the way, or move the arm by hand, and start again.")
            with suppress(Exception) if last else nullcontext():  # a closed terminal: no reason to let go half-way
                self.session.poll()
            pacer.wait()
            self.stop.check()
        if (away := move.away(observation.joints)).any():
            self.echo(f"WARNING: the arm has not quite reached {what}: {self._names(away)}. Is something in its way?")

    def _names(self, which: np.ndarray) -> str:
        return ", ".join(np.array(self.robot.joint_names)[which])

    def _connect(self) -> None:
        with self.stop.at_once():
            self.robot.connect()
        self.robot.keep_alive()
        self.safety = SafetyFilter(
            self.robot.joint_limits,
            self.robot.joint_names,
            self.options.safety,
            fps=self.options.fps,
            units_per_deg=self.robot.units_per_deg,
            slow_deg_s=self.options.poses.home_speed_deg_s,
            max_step=self.robot.max_step,
            echo=lambda line: self.echo(line),
        )
        self.options.poses.check(self.robot.joint_limits, self.robot.joint_names, self.robot.units_per_deg)
        observation = self.robot.observe()
        with self.stop.at_once():
            self.on_connected(observation)
        if observation.loads is None and self.options.safety.finds_stalls:
            self.echo(f"no stall protection: {self.robot.name} does not measure how hard its motors push (--stall_after_s)")
        self.trace.began_s, self._suspended_s = self.clock.now_s(), self.clock.suspended_s()

    def _play(self) -> None:
        if self.options.dry_run:
            self._dry_run()
            return
        episode = 0
        while episode < self.options.episodes:
            if self.options.episodes > 1:
                self.echo(f"Episode {episode + 1} of {self.options.episodes}")
            self._episode(episode)
            more = episode + 1 < self.options.episodes or self.session.again
            if more and self.options.reset_time_s:
                self._hold_between(episode + 1)
            episode += not self.session.settle()
            if episode < self.options.episodes:
                self._hold_while(lambda: self.session.waits)
                while self.session.instruction is not None:  # another one may be typed while the network makes itself ready for this one
                    self._take_instruction(self.session.instruction)
                    self._hold_while(lambda: self.session.waits)

    def _hold_between(self, played: int) -> None:
        """The pause in which the scene is put back."""
        hold_s = self.options.reset_time_s
        self._go_to(self.options.poses.home, "the home pose")
        self.echo(f"Episode {played} of {self.options.episodes} is over. The arm holds its pose for {hold_s:g} s: put things back.")
        end_s = self.clock.now_s() + hold_s
        self._hold_while(lambda: self.session.typing or (self.clock.now_s() < end_s and not self.session.over), end_s)

    def _hold_while(self, waits: Callable[[], bool], end_s: float = math.inf) -> None:
        """The arm keeps its last target; observers, keys, signals and the watchdog go on. Looks again at `end_s` at the latest."""
        while waits():
            now_s = self.clock.now_s()
            self._look_on()
            next_s = now_s + self.pacer.period_s
            self._sleeps.sleep_until_s(end_s if now_s < end_s < next_s else next_s)
            self.stop.check()

    def _look_on(self) -> None:
        observation = self._look_between()  # raises for whatever is wrong with a servo or a camera
        for observer in self.observers:
            observer.see(observation)
        self.session.poll()
        self.stop.check()

    def _take_instruction(self, instruction: str) -> None:
        """The one that was typed in the pause: the network makes itself ready for it, for minutes where it compiles, while the arm keeps its last
        target."""
        self.session.instruction = None
        try:
            self.controller.instruct(instruction, self._look_on)
        except (ObservationError, ConfigError) as error:  # too long, or with words that the network reserves
            self.echo(f"the instruction stays {self.controller.instruction!r}: {error}")

    def _episode(self, index: int) -> None:
        """Play until the episode's time is up. A simulated scene is rearranged by the seed; a real arm goes on where it stands."""
        before = self._observe().joints if self.trace.moved else None
        self.robot.reset(None if self.options.seed is None else self.options.seed + index)
        self.robot.lower_if_killed(self._rest_pose)
        self.controller.reset()
        joints = self.robot.observe().joints
        held = before is not None and not (np.abs(joints - before) > ARRIVED_DEG * self.robot.units_per_deg).any()  # the simulated arm leaps home
        self.safety.start(joints, self.safety.last if held and self._outage_count() == self._outages else None)
        self._go_to(self.options.poses.home, "the home pose")
        self.safety.speed_up_anew()
        self.safety.fps = self.options.fps
        self.trace.episodes += 1
        self._loop_began_s = None
        if self.options.timeout_s is not None:  # half a tick early: rounding must not decide whether a tick due at the end still runs
            self._end_s = self.clock.now_s() + self.options.timeout_s - 0.5 * self.pacer.period_s
        self.session.begin(self.controller.instruction)
        self.pacer.start()
        self._tick_before = 0
        self._progress.begin()
        played = len(self.trace)
        with suppress(_EpisodeOver):
            while self.clock.now_s() < self._end_s and not self.session.over:
                self._tick()
        if len(self.trace) == played and not self.session.over:
            self.echo("WARNING: the time limit was over before the episode's first inference was: nothing was sent. Give a longer --timeout.")
        self.session.end("a key" if self.session.over else "the time limit", self.robot.success)
        self._close_loop()

    def _tick(self) -> None:
        self.robot.keep_alive()
        planned = False
        if self._held_up() and not self.controller.needs_observation:  # first see where the arm is; the rows up to now are over
            self.controller.see(self._observe(), self.pacer.tick - 1)
        while self.controller.needs_observation:  # the chunk is played out: observe, infer, then move
            observation, planned = self._plan(), True
        ticks, self._tick_before = self.pacer.tick - self._tick_before, self.pacer.tick
        if not planned and ticks > _SKIPPED_S * self.options.fps + 1:  # rows of missed ticks are over: not at once to the present one
            self.safety.speed_up_anew()
        sent = self._send()  # the move is due now: send first, so that its instant does not depend on the cameras
        if not planned:
            observation = self._observe()
            self.controller.see(observation, self.pacer.tick)
        note = self.controller.note
        self.trace.add_tick(observation.joints, *sent, note.age_ticks, note.underrun)
        if self.observers:
            record = self._record(*sent)
            for observer in self.observers:
                observer.see(observation, record)
        self.session.see(observation, sent[1], note.underrun)
        self._progress()
        with self.trace.timed("wait"):
            self.pacer.wait(self._plan_lead_s() if self.controller.needs_observation else 0.0)
        self.stop.check()

    def _plan(self) -> Observation:
        """What the next chunk comes from."""
        self._close_loop()
        began_s = self.clock.now_s()
        observation = self._observe()
        self._send_again()
        self._infer(observation, began_s)
        return observation

    def _record(self, target: np.ndarray, commanded: np.ndarray, sent_s: float) -> TickRecord:
        """The tick that has just been traced, for the observers."""
        note, errors_s = self.controller.note, self.pacer.tick_errors_s
        return TickRecord(
            number=len(self.trace) - 1,
            episode=self.trace.episodes - 1,
            time_s=sent_s - self.trace.began_s,
            target=target,
            commanded=commanded,
            ahead=self._chunk.targets[len(self._chunk.targets) if note.underrun else note.row :][:_SHOWN_ROWS],
            inference_ms=self._chunk.inference_ms,
            age_ticks=note.age_ticks,
            underrun=note.underrun,
            tick_error_ms=1000 * errors_s[-1] if errors_s else 0.0,
            missed_ticks=self.pacer.missed_ticks,
        )

    def _plan_lead_s(self) -> float:
        """How long before its deadline the next plan must begin to be ready: as long as the slowest of the last few took.

        Observation and inference then fit into the pause between two ticks where they are short enough, and the observation is no older
        than it has to be.
        """
        return max(self._plans_s, default=0.0) + _LEAD_MARGIN_S

    def _observe(self) -> Observation:
        with self.trace.timed("observe"):
            observation = self._look()
        for name, age_s in observation.frame_ages_s.items():
            self.trace.stages_ms[f"frame age/{name}"].append(1000 * age_s)
        if self.cameras is not None:
            self.cameras(observation)
        return observation

    def _look(self) -> Observation:
        observation = self.robot.observe(not self._putting_down)
        if self._held_up():  # the arm may have sagged meanwhile: step on from where it is, not from the last target, with a new plan
            self._outages, self._lost = self._outage_count(), True
            self.safety.start_anew(observation.joints)
            self.controller.expire()
        self._looked_s = self.clock.now_s()
        self._again_due |= self.safety.measured(observation.joints, observation.time_s, observation.loads)
        return observation

    def _held_up(self) -> bool:
        """Whether the connection was lost since the last look, or that was long ago. Raises UnsafeActionError when the machine was suspended: the arm
        is put down then."""
        suspended_s, self._suspended_s = self._suspended_s, self.clock.suspended_s()
        if (slept_s := self._suspended_s - suspended_s) > GAP_S and not self._putting_down:
            raise UnsafeActionError(
                f"the machine was suspended for {slept_s:.0f} s in the middle of the run, and what was planned before is over. Look at the scene "
                "and start again; 'systemd-inhibit gr00t-fast run ...' keeps a laptop awake."
            )
        return self._outage_count() != self._outages or self.clock.now_s() - self._looked_s > GAP_S

    def _look_between(self) -> Observation:
        """Where no target is due soon: a goal that is too far ahead of its joint comes back, one that was held back goes on."""
        self.robot.keep_alive()
        observation = self._look()
        self._send_again()
        self.stop.check()
        return observation

    def _send_again(self) -> None:
        if self._again_due and self.trace.moved:
            self._transmit(self.safety.again())

    def _outage_count(self) -> int:
        return sum(self.robot.events.get(name, 0) for name in _OUTAGES)

    def _still_time(self) -> None:
        if self.clock.now_s() - self._looked_s >= _STILL_LOOK_S:
            self._look_between()
        else:
            self.robot.keep_alive()
        self.session.poll()
        self.stop.check()
        self._check_over()

    def _check_over(self) -> None:
        if self.session.over or self.clock.now_s() >= self._end_s:
            raise _EpisodeOver

    def _infer(self, observation: Observation, plan_began_s: float) -> None:
        began_s = self.clock.now_s()
        chunk = self.controller.plan(observation, self._still_time)
        if chunk is not None:  # else this tick holds, and the next one looks again
            if self.options.tell_inferences:
                self.echo(f"Direct inference time: {chunk.inference_ms / 1000:.3f}s")
            self.stop.check()
            self._check_over()
            now_s = self.clock.now_s()
            self.trace.stages_ms["infer"].append(1000 * (now_s - began_s))
            self._loop_began_s = plan_began_s
            self._plans_s.append(now_s - plan_began_s)
        with self.trace.timed("wait"):
            pause_s = self.pacer.resume()
        if chunk is not None:
            self._chunk = chunk
            self.trace.add_chunk(chunk, pause_s)

    def _send(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return what the policy wanted and what was sent, each (J,), and when."""
        target = self.controller.next_target(self.pacer.tick)
        self._lost &= self.controller.note.underrun
        if self._lost:
            target = self.safety.last
            self.safety.speed_up_anew()
        if self.controller.note.entered is not None:
            self._chunk = self.controller.note.entered
            self.trace.add_chunk(self.controller.note.entered, 0.0, overlapped=True)
        return target, self._command(target), self.clock.now_s()

    def _command(self, target: np.ndarray) -> np.ndarray:
        """Limit a target (J,) and send it; returns what was sent."""
        commanded = self.safety(target)
        with self.trace.timed("send"):
            self._transmit(commanded)
        return commanded

    def _transmit(self, commanded: np.ndarray) -> None:
        self.trace.moved, self._again_due = True, False
        self.robot.send(commanded)

    def _close_loop(self) -> None:
        """Report the loop that just ended: one inference and its chunk, played to the end."""
        if self._loop_began_s is None or not self.controller.needs_observation:
            return
        total_s = self.clock.now_s() - self._loop_began_s
        self._loop_began_s = None
        self.trace.stages_ms["loop"].append(1000 * total_s)
        if self.options.tell_inferences:
            self.echo(f"Loop {len(self.trace.stages_ms['loop'])}: {total_s:.3f}s total")

    def _dry_run(self) -> None:
        """One observation and one inference, checked but not sent."""
        self.controller.reset()
        while self.controller.needs_observation:
            observation = self._observe()
            self.safety.start(observation.joints)
            self._infer(observation, self.clock.now_s())
        target = self.controller.next_target(self.pacer.tick)
        limited = self.safety(target)
        self.trace.episodes += 1
        table = dry_run_table(self.robot.joint_names, observation.joints, target, limited)
        self.trace.dry_run = table, dict(observation.frames)
        self.echo(table)
        if self.observers:
            end_s = self.clock.now_s() + _DRY_RUN_LOOK_S
            self._hold_while(lambda: self.clock.now_s() < end_s, end_s)


def _unfailing(echo: Callable[[str], None]) -> Callable[[str], None]:
    """For words while the arm is put down: a closed terminal is told of when the program ends."""

    def tell(line: str) -> None:
        with suppress(Exception):
            echo(line)

    return tell


class _ShortSleeps:
    """A clock whose long sleeps (below 13 Hz) are interrupted, for a look at the arm."""

    def __init__(self, clock: Clock, look: Callable[[], object]) -> None:
        self._clock, self._look = clock, look
        self.now_s, self.suspended_s = clock.now_s, clock.suspended_s

    def sleep_until_s(self, deadline_s: float) -> None:
        while deadline_s - self.now_s() > 2 * _LOOK_EVERY_S:  # a look takes 4 ms or more: none shortly before the deadline
            self._clock.sleep_until_s(self.now_s() + _LOOK_EVERY_S)
            self._look()
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
