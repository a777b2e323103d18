"""The control loop: one state machine that ticks from the first connection until the arm is let go.

Every tick, at its absolute deadline: what has come in, the target of the present mode, the limits, one send, one observation; then the planner, those
who look on, and one wait. Whatever the arm waits for (an inference, a cable, a person, a recording that is saved) is a mode, see modes.py.

It knows neither the network nor the servo bus: targets come from a Planner, the arm is a Robot, time is a Clock.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from gr00t_fast.base.contracts import ActionChunk, Clock, Observation, Robot
from gr00t_fast.base.errors import ArmAwayError, BusFault, ConfigError, MissedReadingError, ObservationError, UnsafeActionError
from gr00t_fast.base.signals import StopRequested, StopSignals
from gr00t_fast.control.camera_watch import CameraFault, CameraWatch
from gr00t_fast.control.limits import ARRIVED_DEG, Limits, Move, Pose, Poses, SafetyOptions
from gr00t_fast.control.modes import ENDS, Event, Mode, after
from gr00t_fast.control.pacer import Pacer
from gr00t_fast.control.planner import DueTarget, Planner
from gr00t_fast.control.trace import RunTrace, TickRecord

TICK_HZ = 30.0  # at least: a policy of a lower rate has several ticks to an action, so that keys, limits and watchdog keep theirs
# A loop that was held up for so long (a program that was stopped, a camera that hung) looks at the arm anew, and what was planned before is over.
GAP_S = 0.5
# Without a reading or a send that worked for so long, and so often (on a machine that is held up one attempt lasts), the bus counts as faulty. The
# arm holds its last goal meanwhile.
PATIENCE_S, _MISSES = 0.5, 4
_SKIPPED_S = 0.15  # more missed ticks in a row than this: the speed limit grows anew
_TROUBLES = 3  # of the bus's surroundings (a watchdog that has ended, a hot servo) that the move down survives
# How long a finished run waits for an inference still under way; the arm has landed by then. Longer ones are left to end with the program.
_JOIN_TIMEOUT_S = 2.0
_LONGEST_TIMES = 2  # what the move down may take, if it has to begin anew on its way
_SHOWN_ROWS = 64  # of a chunk, to those who look on; a recording that is replayed is one of thousands


class Observer(Protocol):
    """Looks on at every tick (video, live view, page, progress). Must be quick and must not raise for reasons of its own."""

    def see(self, observation: Observation, tick: TickRecord | None = None, mode: Mode = Mode.HOLD) -> None:
        """`tick` is None where no policy drives the arm, as between episodes. Without pictures while the arm is out of reach (its last joints then)
        and while it is put down."""


class Session(Protocol):
    """The person and the recording beside a run (record/session.py), asked at each tick; nothing here waits.

    over: the episode, or the pause after it, is to end now. again: the episode does not count. pause: the arm is to hold, or to go on. instruction:
    typed for the episodes to come. The loop takes the last two.
    """

    over: bool
    again: bool
    pause: bool
    instruction: str | None
    typing: bool  # whether an instruction is being typed
    waits: bool  # whether the next episode is to wait although the pause is over

    def poll(self) -> None:
        """Take note of what was pressed."""

    def begin(self, instruction: str) -> None:
        """An episode begins."""

    def see(self, observation: Observation, commanded: np.ndarray, underrun: bool) -> None:
        """A tick of it."""

    def end(self, ended_by: str, solved: bool | None) -> None:
        """Its last tick has been."""

    def settle(self) -> bool:
        """The pause is over, or the run. Returns whether the episode is to be played again. May be called again."""


@dataclass(frozen=True)
class LoopOptions:
    """`timeout_s` per episode (None: until stopped); `dry_run` infers once and sends nothing; `seed` varies with the episode.

    `reset_time_s`: how long the arm holds its pose between two episodes.
    `poses`: where the arm goes before and between episodes, and before its torque goes off.
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
    poses: Poses = field(default_factory=Poses)


class ControlLoop:
    """One run on one arm. `trace` and `pacer` hold the figures, also after an error; `mode` is the present one."""

    def __init__(
        self,
        robot: Robot,
        planner: Planner,
        options: LoopOptions,
        clock: Clock,
        stop: StopSignals,
        session: Session,
        on_connected: Callable[[Observation], object] = lambda observation: None,
        observers: Sequence[Observer] = (),
        echo: Callable[[str], None] = print,
    ) -> None:
        """`stop` is installed by the caller. `on_connected` gets the first observation and raises to refuse the run (the arm has not moved then)."""
        self.robot, self.planner, self.options, self.clock = robot, planner, options, clock
        self.stop, self.session = stop, session
        self.on_connected, self.observers, self.echo = on_connected, observers, echo
        robot.check_stop = self.stop.check
        self._ticks_per_step = max(1, math.ceil(TICK_HZ / options.fps))  # of the policy
        self.pacer = Pacer(self._ticks_per_step * options.fps, clock)
        self.cameras = None if options.camera_fault is None else CameraWatch(options.camera_fault, echo)
        self.trace = RunTrace(robot.joint_names, clock)
        self.limits: Limits | None = None  # needs the calibrated limits, known once connected
        self.mode = Mode.APART
        self._before = dict.fromkeys((Mode.AWAY, Mode.PAUSED), Mode.APART)  # what led to them
        self._move: Move | None = None  # of MOVE, BETWEEN, PUT_DOWN: while it goes on
        self._what, self._stalls = "", np.zeros(len(robot.joint_names), np.int64)  # where to, and how often joints were blocked before
        self._began_s, self._until_s = clock.now_s(), math.inf  # the present mode; and when a pause between episodes ends
        self._told = False  # whether a line about its waiting was said
        self._episode, self._episode_end_s, self._first_row = 0, math.inf, 0
        self._due: DueTarget | None = None
        self._commanded = np.empty(0)  # the last goal that was sent (J,)
        self._playing: ActionChunk | None = None
        self._news: tuple[Observation, TickRecord | None] | None = None  # of the present tick, for those who look on
        self._held_steps = 0  # of the policy, since the last row played
        self._seen: Observation | None = None  # the last look
        self._seen_s, self._missed_s, self._misses = clock.now_s(), math.inf, 0  # the last reading, the first since that failed, and how many
        self._suspended_s = clock.suspended_s()
        self._last_step, self._is_step = -1, True  # of the policy's ticks
        self._error: BaseException | None = None  # the one that ended the run
        self._troubles, self._engaged = 0, False
        self._ticks_left = 0  # of the move down, outages and hold-ups on the way included

    def run(self) -> RunTrace:
        """Connect, play all episodes, put the arm down, land. Returns normally when done or stopped; raises, after landing, what arm or policy
        raised."""
        with _few_garbage_collections():
            try:
                self._guarded(self._connect)
                while self.mode not in ENDS:
                    self._guarded(self._tick)
                    self._guarded(self._show)
                    if self.mode not in ENDS:  # an arm that is to be let go is not kept waiting
                        with self.trace.timed("wait"):
                            self.pacer.wait()
            finally:
                self.trace.landing = self.robot.land(self.mode is Mode.HELD)
                self.trace.ended_s = self.clock.now_s()
                self.trace.events = dict(self.robot.events) | (dict(self.cameras.events) if self.cameras else {})
                self.trace.episodes_solved = self.robot.episodes_solved
                self.planner.close(_JOIN_TIMEOUT_S)
            try:
                self.session.end(self.trace.ended_by, self.robot.success)
                self.session.settle()
            except Exception as error:  # noqa: BLE001 - what ended the run comes first
                self._error = self._error or error
        if self._error is not None:
            raise self._error
        return self.trace

    def _guarded(self, work: Callable[[], None]) -> None:
        """What goes wrong in a tick is an event."""
        try:
            work()
        except StopRequested as request:
            if self.trace.ended_by == "error" and self._error is None:
                self.trace.ended_by = request.reason
            if self.stop.shutting_down:
                self.echo(f"stopped once more: {self._at_once}, where the arm is")
            self._happen(Event.STOP_AGAIN if self.stop.shutting_down else Event.STOP)
        except ArmAwayError as error:
            self._happen(Event.LOST)
            self.planner.expire(forget=True)
            if self.mode is not Mode.AWAY:  # not connected yet
                self._fail(error)
            elif self.clock.now_s() - self._began_s >= error.patience_s:
                self._fail(BusFault(f"{error} It did not come back within {error.patience_s:g} s."))
        except MissedReadingError as error:
            self._missed_s, self._misses = min(self._missed_s, self.clock.now_s()), self._misses + 1
            if self._misses >= _MISSES and self.clock.now_s() - self._missed_s >= PATIENCE_S:
                self._fail(BusFault(f"{error} So for {PATIENCE_S:g} s. Check cables and power of the servos."))
        except BaseException as error:  # noqa: BLE001 - raised again once the arm has landed
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        fatal = isinstance(error, BusFault)
        if self.stop.shutting_down:  # said, and the way down goes on
            self._troubles += 1
            fatal |= self._troubles >= _TROUBLES
            self.echo(f"WARNING: {error}")
        if fatal or not self.stop.shutting_down:
            self._error = self._error or error
        self._happen(Event.FAULT if fatal else Event.STOP)

    # From mode to mode

    def _happen(self, event: Event) -> None:
        """Go to the mode that follows, and begin it."""
        before, self.mode = self.mode, after(self.mode, event, self._before.get(self.mode, self.mode))
        if self.mode is before:
            return
        self._began_s, self._until_s, self._told = self.clock.now_s(), math.inf, False
        if event is Event.DONE:
            self.trace.ended_by = "done"
        if event is Event.LOST or (event is Event.PAUSE and self.mode is Mode.PAUSED):
            self._before[self.mode] = before
        if event is Event.PAUSE and self.mode is Mode.PAUSED:
            self._pause()
        elif event in (Event.BACK, Event.PAUSE) and self.mode is not Mode.PAUSED:
            self._go_on(event)
        elif event is Event.ARRIVED and self.mode is Mode.HOLD:
            self._begin_episode()
        elif event is Event.OVER:
            self._end_episode()
        elif event is Event.LOST:
            self.planner.expire()
        elif self.mode in (Mode.PUT_DOWN, *ENDS) and not self.stop.shutting_down:
            self._shut_down()

    def _prepare_episode(self) -> None:
        """Switch the torque on, if it is not; a simulated scene is rearranged by the seed, a real arm goes on where it stands."""
        if self.options.dry_run:
            self.limits.start(self.robot.observe().joints)
            self._happen(Event.ARRIVED)
            return
        if self.options.episodes > 1:
            self.echo(f"Episode {self._episode + 1} of {self.options.episodes}")
        goal = self.limits.last if self.trace.moved else None
        self.robot.reset(None if self.options.seed is None else self.options.seed + self._episode)
        self._engaged = True
        if goal is None:  # an arm that is to be put down before the next look succeeds moves from there
            self.limits.start(self._seen.joints if self.robot.rest_pose is None else self.robot.rest_pose)
        self.robot.lower_if_killed(self._rest_pose)
        joints = self.robot.observe(False).joints
        near = goal is not None and not (np.abs(joints - self._seen.joints) > ARRIVED_DEG * self.robot.units_per_deg).any()
        self.limits.start(joints, goal if near else None)  # else the simulated arm has leapt home
        self._refresh()
        self._begin_move(self.options.poses.home, "the home pose")
        if self._move is None:
            self._happen(Event.ARRIVED)

    def _begin_episode(self) -> None:
        self.planner.reset()
        self.limits.slow_start()
        self.trace.episodes += 1
        self._first_row, self._held_steps, self._playing = len(self.trace), 0, None
        if self.options.timeout_s is not None:  # half a tick early: rounding must not decide whether a tick due at the end still runs
            self._episode_end_s = self.clock.now_s() + self.options.timeout_s - 0.5 / self.options.fps
        self.session.begin(self.planner.instruction)

    def _end_episode(self) -> None:
        """The scene is put back, while the arm holds its pose; or it was the last one."""
        if len(self.trace) == self._first_row and not self.session.over:
            self.echo("WARNING: the time limit was over before the episode's first inference was: nothing was sent. Give a longer --timeout.")
        self.session.end("a key" if self.session.over else "the time limit", self.robot.success)
        self.limits.stay()
        more, hold_s = self._episode + 1 < self.options.episodes or self.session.again, self.options.reset_time_s
        if not more:
            self._happen(Event.DONE)
        elif hold_s:
            self._begin_move(self.options.poses.home, "the home pose")
            self.echo(f"Episode {self._episode + 1} of {self.options.episodes} is over. The arm holds its pose for {hold_s:g} s: put things back.")

    def _pause(self) -> None:
        self.limits.stay()
        self._paused_s = self.clock.now_s()
        self.echo("paused: the arm holds its pose. Space: go on.")

    def _go_on(self, event: Event) -> None:
        """After a pause, or an outage: nothing that was planned before plays."""
        if event is Event.PAUSE:
            self._episode_end_s += self.clock.now_s() - self._paused_s
        self.planner.expire(forget=event is Event.PAUSE)
        self.limits.slow_start()
        self._held_steps = 0
        if self._move is not None:
            self._begin_move(self._move.pose, self._what, say=False)

    def _shut_down(self) -> None:
        """Whatever ended the run: hold, and move slowly to where the arm can be let go. Needs the bus alone, neither policy nor pictures."""
        self.stop.begin_shutdown()
        self.echo = _unfailing(self.echo)
        if self.mode is not Mode.PUT_DOWN:
            return
        pose, start = self._rest_pose, self.options.poses.rest == "start"
        # Before its first target an arm is where it lay, but not at a pose that was named: it may have been held up.
        if pose is None or not (self.trace.moved or (self._engaged and not start)):
            self._happen(Event.KEPT)
            return
        self.limits.protect()
        self.limits.stay()
        self._say_put_down()
        self._begin_move(pose, "the pose in which it lay before its torque went on" if start else "the rest pose")
        self._ticks_left = _LONGEST_TIMES * self._move.most_ticks

    @property
    def _rest_pose(self) -> Pose | None:
        """Where the arm is put down; None: nowhere."""
        rest = self.options.poses.rest
        return self.robot.rest_pose if rest == "start" else rest  # type: ignore[return-value]  # resolved: no other words

    @property
    def _at_once(self) -> str:
        return "it stops and stays powered" if self.robot.stays_powered else "the torque goes off at once"

    def _say_put_down(self) -> None:
        error = self._error
        cause = self.stop.reason or ("" if error is None else f"{type(error).__name__}: {str(error).partition('. ')[0]}")
        ending = f"the run ends ({cause})" if cause else "the run ends"
        further = "another Ctrl-C, a second from now or later," if self.stop.reason else "Ctrl-C, twice and a second apart,"
        self.echo(f"{ending}: the arm is put down. After {further} {self._at_once}, wherever the arm is.")

    def _connect(self) -> None:
        with self.stop.raise_at_once():
            self.robot.connect()
        self.robot.keep_alive()
        slow_deg_s = self.options.poses.home_speed_deg_s
        self.limits = Limits(self.robot, self.options.safety, self.pacer.period_s, slow_deg_s, lambda line: self.echo(line))
        self.options.poses.check(self.robot.joint_limits, self.robot.joint_names, self.robot.units_per_deg)
        self._happen(Event.READY)
        self._refresh()

    def _meet(self, observation: Observation) -> None:
        """The first look, before the torque goes on: the run may be refused."""
        with self.stop.raise_at_once():
            self.on_connected(observation)
        if observation.loads is None and self.options.safety.stall_after_s is not None:
            self.echo(f"no stall protection: {self.robot.name} does not measure how hard its motors push (--stall_after_s)")
        self.trace.began_s = self.clock.now_s()
        self._happen(Event.READY)
        self._refresh()

    def _refresh(self) -> None:
        """After work that was meant to take longer than a tick."""
        self.pacer.restart()
        self._seen_s, self._suspended_s = self.clock.now_s(), self.clock.suspended_s()

    # A tick

    def _tick(self) -> None:
        self._news = None
        self.robot.keep_alive()
        steps, self._last_step = self._step - self._last_step, self._step
        self._is_step = steps > 0
        self._take_in(steps)
        if self.mode in ENDS:
            return
        target, unsent = self._target(), None
        if self.mode is not Mode.AWAY and (target is not None or self.trace.moved) and not self.options.dry_run:
            unsent = self._send(target)
        began, sent_s = self.mode, self.clock.now_s()
        pictures = (self._is_step or began is Mode.CONNECTED) and began not in (Mode.PUT_DOWN, Mode.AWAY)
        observation = self._observe(pictures)
        if unsent is not None:
            raise unsent
        self._missed_s, self._misses = math.inf, 0
        if began is Mode.AWAY or self.mode is Mode.AWAY:  # the next tick goes on
            return
        if self._move is not None:
            self._judge_move(observation)
        if began is Mode.CONNECTED:
            self._meet(observation)
        elif pictures:
            if began in (Mode.HOLD, Mode.PLAY) and self.mode in (Mode.HOLD, Mode.PLAY):
                self._plan(observation)
            self._note(observation, target, sent_s)

    def _send(self, target: np.ndarray | None) -> MissedReadingError | None:
        """The only way to the arm. Returns why the goal did not leave, if it did not: the look that follows says whether the bus is sound."""
        last, self._commanded = self.limits.last, self.limits.apply(target)
        self.trace.moved = True
        try:
            with self.trace.timed("send"):
                self.robot.send(self._commanded)
        except MissedReadingError as error:
            self.limits.take_back(last)
            return error
        return None

    @property
    def _step(self) -> int:
        """The policy's tick."""
        return self.pacer.tick // self._ticks_per_step

    def _take_in(self, steps: int) -> None:
        """What has come in since the last tick: stops, gaps, keys, the end of a time, a chunk."""
        self.stop.check()
        self._notice_gap()
        with suppress(Exception) if self.stop.shutting_down else nullcontext():  # a closed terminal is no reason to let go half-way
            self.session.poll()
        if self.session.pause:
            self.session.pause = False
            self._happen(Event.PAUSE)
        now_s = self.clock.now_s()
        playing = self.mode in (Mode.HOLD, Mode.PLAY)
        paused = self.mode is Mode.PAUSED and self._before[Mode.PAUSED] in (Mode.HOLD, Mode.PLAY)
        if (playing and now_s >= self._episode_end_s) or (self.session.over and (playing or paused)):
            self._happen(Event.OVER)
        elif self.mode is Mode.BETWEEN and self._ready(now_s):
            self._happen(Event.READY)
        elif self.mode is Mode.MOVE and self._move is None:
            self._prepare_episode()
        elif playing and self._is_step:
            if steps > _SKIPPED_S * self.options.fps + 1:  # rows of missed ticks are over: not at once to the present one
                self.limits.slow_start()
            self._next_row()

    def _notice_gap(self) -> None:
        """Raises UnsafeActionError when the machine was suspended: the arm is put down then."""
        suspended_s, self._suspended_s = self._suspended_s, self.clock.suspended_s()
        if (slept_s := self._suspended_s - suspended_s) > GAP_S and not self.stop.shutting_down:
            raise UnsafeActionError(
                f"the machine was suspended for {slept_s:.0f} s in the middle of the run, and what was planned before is over. Look at the scene "
                "and start again; 'systemd-inhibit gr00t-fast run ...' keeps a laptop awake."
            )
        if self.mode is not Mode.AWAY and self.clock.now_s() - self._seen_s > GAP_S:
            self._happen(Event.LOST)

    def _ready(self, now_s: float) -> bool:
        """Whether the pause before an episode is over: its time, what a person types, the recording of the last one, the network."""
        if self._move is not None:
            return False
        if math.isinf(self._until_s):
            self._until_s = now_s + self.options.reset_time_s
        if (now_s < self._until_s and not self.session.over) or self.session.typing:
            return False
        again = self.session.settle()
        if self.session.waits:
            return False
        if self.session.instruction is not None:
            self.planner.instruct(self.session.instruction)
            self.session.instruction = None
        try:
            if self.planner.getting_ready():
                return False
        except (ObservationError, ConfigError) as error:  # too long, or with words that the network reserves
            self.echo(f"the instruction stays {self.planner.instruction!r}: {error}")
        self._episode += not again
        return True

    def _next_row(self) -> None:
        """Take the chunk that has arrived, if one has, and the row that is due."""
        chunk = self.planner.arrived(self._step, holding=self.mode is Mode.HOLD)
        self._due = self.planner.buffer.due(self._step)
        if chunk is not None:
            pause_s = self._held_steps / self.options.fps if self._playing else 0.0
            self.trace.add_chunk(chunk, pause_s, overlapped=self.mode is Mode.PLAY)
            self._playing = chunk
        if self._due is None:
            self._happen(Event.UNDERRUN)
            self._check_hold()
        elif self.options.dry_run:  # one observation and one inference, checked but not sent
            self.trace.dry_run = self._asked, self._due.target, self.limits.apply(self._due.target)
            self._happen(Event.DONE)
        else:
            self._happen(Event.CHUNK)

    def _check_hold(self) -> None:
        """Raises InferenceTimeoutError when the arm has held its pose for too long for want of actions."""
        held_s, limit_s = self.clock.now_s() - self._began_s, self.planner.limit_s
        if held_s >= limit_s:
            raise self.planner.timed_out(limit_s, "the next chunk is not there")
        if held_s >= self.planner.tell_after_s and not self._told:
            self._told = True
            end = f", at most {limit_s:.1f} s (--max_hold_s)" if math.isfinite(limit_s) else ""
            self.echo(f"WARNING: no action has been left for {held_s:.1f} s: inference hangs or is too slow. The arm holds its pose and waits{end}.")

    def _target(self) -> np.ndarray | None:
        """Where the mode wants the arm (J,); None: at its last goal."""
        if self._move is not None and self.mode in (Mode.MOVE, Mode.BETWEEN, Mode.PUT_DOWN):
            return self._move.next_target(self.limits.last)
        return self._due.target if self.mode is Mode.PLAY and self._is_step else None

    def _observe(self, pictures: bool) -> Observation:
        """One look. Raises MissedReadingError and ArmAwayError where it fails in a way that may pass."""
        away = self.mode is Mode.AWAY
        with self.trace.timed("observe"):
            observation = self.robot.observe(pictures)
        self._notice_gap()
        self._seen, self._seen_s = observation, self.clock.now_s()
        if away:  # it may have sagged meanwhile: on from where it is, not from the last goal
            if self.trace.moved:
                self.limits.start_anew(observation.joints)
            self._happen(Event.BACK)
        self.limits.read(observation.joints, observation.time_s, observation.loads)
        for name, age_s in observation.frame_ages_s.items():
            self.trace.stages_ms[f"frame age/{name}"].append(1000 * age_s)
        if self.cameras is not None:
            self.cameras(observation)
        return observation

    def _plan(self, observation: Observation) -> None:
        self.planner.remember(observation)
        if self.planner.want_inference(self._step):
            self._asked = observation
            self.planner.ask(observation, self._step)

    def _note(self, observation: Observation, target: np.ndarray | None, sent_s: float) -> None:
        """The tick to the trace and the recording."""
        record = None
        self._held_steps = 0 if self.mode is Mode.PLAY else self._held_steps + 1
        if self.mode is Mode.PLAY or (self.mode is Mode.HOLD and len(self.trace) > self._first_row):
            underrun = self.mode is Mode.HOLD
            wanted, commanded = self.limits.wanted if target is None else target, self._commanded
            age = 0 if self._due is None else self._due.age_ticks
            self.trace.add_tick(observation.joints, wanted, commanded, sent_s, age, underrun)
            record = self._record(wanted, commanded, sent_s, age, underrun) if self.observers else None
            self.session.see(observation, commanded, underrun)
        self._news = observation, record

    def _show(self) -> None:
        """The tick to those who look on."""
        if not self._is_step or self._seen is None:
            return
        observation, record = self._news or (replace(self._seen, frames={}), None)
        for observer in self.observers:
            with suppress(Exception) if self.stop.shutting_down else nullcontext():  # nobody who looks on keeps the arm from being put down
                observer.see(observation, record, self.mode)

    def _record(self, target: np.ndarray, commanded: np.ndarray, sent_s: float, age_ticks: int, underrun: bool) -> TickRecord:
        return TickRecord(
            number=len(self.trace) - 1,
            episode=self.trace.episodes - 1,
            time_s=sent_s - self.trace.began_s,
            target=target,
            commanded=commanded,
            ahead=self.planner.buffer.ahead(self._step, _SHOWN_ROWS),
            inference_ms=self._playing.inference_ms,
            stood=not self.trace.chunks[-1].overlapped,
            age_ticks=age_ticks,
            underrun=underrun,
            tick_error_ms=1000 * self.pacer.tick_errors_s[-1] if self.pacer.tick_errors_s else 0.0,
            inferences=len(self.trace.chunks),
            missed_ticks=self.pacer.missed_ticks,
        )

    # Slow moves

    def _begin_move(self, pose: Pose | None, what: str, say: bool = True) -> None:
        if pose is None:
            return
        speed_deg_s = min(self.options.poses.home_speed_deg_s, self.limits.max_speed_deg_s)
        self._move = Move(pose, self.limits.last, self.robot, speed_deg_s, self.pacer.period_s)
        self._what, self._stalls = what, self.limits.blocked.count.copy()
        if self._move.ticks and say:
            self.echo(f"moving to {what} ({self._move.ticks * self.pacer.period_s:.1f} s)")

    def _judge_move(self, observation: Observation) -> None:
        """Has it ended? Raises UnsafeActionError when a joint is blocked on the way, but for the way down: there it does not keep the others."""
        move = self._move
        if (blocked := self.limits.blocked.count > self._stalls).any() and self.mode is not Mode.PUT_DOWN:
            names = self._names(blocked)
            raise UnsafeActionError(f"joint {names} is blocked on the way to {self._what}. Clear the way, or move the arm by hand, and start again.")
        over = move.over(self.limits.last, observation.joints, self.limits.blocked.held)
        if self.mode is Mode.PUT_DOWN:
            self._ticks_left -= 1
            over |= self._ticks_left <= 0
        if self.mode not in (Mode.MOVE, Mode.BETWEEN, Mode.PUT_DOWN) or not over:
            return
        self._move = None
        if (away := move.away(observation.joints)).any():
            self.echo(f"WARNING: the arm has not quite reached {self._what}: {self._names(away)}. Is something in its way?")
        if self.mode is not Mode.BETWEEN:
            self._happen(Event.ARRIVED)

    def _names(self, which: np.ndarray) -> str:
        return ", ".join(np.array(self.robot.joint_names)[which])


def _unfailing(echo: Callable[[str], None]) -> Callable[[str], None]:
    """For words while the arm is put down: that a terminal was closed is said when the program ends."""

    def tell(line: str) -> None:
        with suppress(Exception):
            echo(line)

    return tell


@contextmanager
def _few_garbage_collections() -> Iterator[None]:
    """A full collection walks every object of torch and lerobot (about 100 ms, three ticks): what is there now is exempt during the run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
