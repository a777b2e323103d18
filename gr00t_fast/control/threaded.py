"""Inference overlaps the motion: while the arm plays a chunk, a worker makes the next one.

This file decides when to infer and passes results on; which action is due is decided in chunk_buffer.py, the thread is in controller.py.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gr00t_fast.contracts import ActionChunk, ActionPrefix, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.chunk_buffer import DELAY_QUANTILE, Admission, ChunkBuffer, DelayEstimate, TimedChunk
from gr00t_fast.control.controller import (
    DEFAULT_MAX_HOLD_S,
    CallResult,
    HoldLimit,
    PolicyRunner,
    ThreadWorker,
    TickNote,
    Worker,
    check_horizon,
    check_length,
    timed_out,
    value_of,
    wait_with_keep_alive,
)
from gr00t_fast.errors import ConfigError, InferenceTooLongError
from gr00t_fast.history import History
from gr00t_fast.measurement import percentiles

Smoothing = Literal["none", "rtc", "prefix", "ensemble"]
WhenLate = Literal["hold", "resume"]
_ARRIVAL_MARGIN_TICKS = 1  # the quantile of the delay is exceeded now and then


@dataclass(frozen=True)
class OverlapOptions:
    """How inference and motion overlap. The defaults infer all the time and play each action at its tick.

    chunk_threshold: infer again when this part of the chunk is left, 0..1 (but always early enough to be in time, as far as the estimated
    delay tells); None: as soon as the last inference is done.
    smoothing: how a chunk joins the one before. rtc and prefix: the policy continues it (see Policy.continues); ensemble: average.
    when_late: hold: an action plays at its tick or not at all, and the arm holds when none is left. resume: after that it goes on where it stopped,
    see ChunkBuffer.
    recoverable: errors of the policy after which the arm holds and the next observation is tried (a server that restarts); others end the run.
    max_hold_s: how long the arm may hold its pose for want of actions before the run ends, or SLOWEST_TIMES the slowest inference so far where that
    is longer (HoldLimit); None: no limit (the policy has one of its own).
    roll_forward: the policy is given the joints where the arm will be when its chunk begins (VLASH, arXiv 2512.01031), see ThreadedController;
    servo_lag_s: how far its joints trail their targets.
    """

    chunk_threshold: float | None = None
    smoothing: Smoothing = "none"
    when_late: WhenLate = "hold"
    recoverable: tuple[type[Exception], ...] = ()
    max_hold_s: float | None = DEFAULT_MAX_HOLD_S
    roll_forward: bool = False
    servo_lag_s: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk_threshold is not None and not 0 <= self.chunk_threshold <= 1:
            raise ConfigError(f"chunk_threshold must be from 0 to 1, the part of a chunk that is left; got {self.chunk_threshold}.")
        if self.when_late == "resume" and self.smoothing != "none":
            raise ConfigError(
                f"smoothing '{self.smoothing}' joins actions that are due at the same tick; with when_late 'resume' they are not. Leave one out."
            )
        if self.roll_forward and (self.smoothing != "none" or self.when_late != "hold"):
            other = f"smoothing '{self.smoothing}'" if self.smoothing != "none" else "when_late 'resume'"
            raise ConfigError(
                f"roll_forward and {other} exclude each other: a chunk that begins at the pose that the arm will have leaves nothing to join, "
                "and none of its rows are over when it arrives. Leave one out."
            )

    @property
    def continues(self) -> bool:
        return self.smoothing in ("rtc", "prefix")


class ThreadedController:
    """A Controller. The policy, its reset included, runs in the worker only.

    With `roll_forward` a chunk that is expected d ticks after its observation begins d - 1 ticks after it, and the policy is given the joints as they
    will be then: those measured, plus what the targets under way move them until then. Joints trail their targets by `servo_lag_s`, so these are the
    targets from that long ago on. The chunk then is what a network that needs no time would answer, but for the pictures. One that comes sooner
    waits for its first row, while there is something to play; one that comes later is entered at the row that is due.
    """

    def __init__(
        self,
        policy: Policy,
        binding: RobotBinding,
        instruction: str,
        clock: Clock,
        fps: float,
        options: OverlapOptions | None = None,
        action_horizon: int | None = None,
        worker: Worker | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        """`action_horizon`: rows of a chunk that may play; None: all the policy returns. `echo` is told when the arm holds for long, unless the
        policy tells that itself (None). Raises ConfigError."""
        check_horizon(action_horizon)
        self.options = options or OverlapOptions()
        if self.options.continues and self.options.smoothing not in policy.continues:
            raise ConfigError(
                f"smoothing '{self.options.smoothing}' needs a policy that can continue a chunk; {type(policy).__name__} cannot. "
                "Use --engine=eager, or --smoothing=none or ensemble."
            )
        if self.options.roll_forward and binding.reads_earlier("state"):
            raise ConfigError(
                f"roll_forward needs a policy that reads the present joints only; {type(policy).__name__} reads earlier ones too, which would not "
                "fit a pose to come. Leave it out."
            )
        self.note = TickNote()
        self._runner = PolicyRunner(policy, binding, instruction, clock)
        self._fps, self._horizon, self._clock = fps, action_horizon, clock
        self._worker = worker or ThreadWorker()
        self._buffer = ChunkBuffer(ensemble=self.options.smoothing == "ensemble", resume=self.options.when_late == "resume")
        # A row that plays but was not committed is a jump; one committed too many only fades a little later. Black et al. take a maximum, too.
        self._delay = DelayEstimate(1.0 if self.options.continues else DELAY_QUANTILE)
        self._watch = HoldLimit(fps, self.options.max_hold_s, echo)
        self._first: TimedChunk | None = None  # planned while the arm stood still: its time begins when it plays
        self._entered: ActionChunk | None = None
        self._early: TimedChunk | None = None  # its first row is not due yet
        self._lag_ticks = round(self.options.servo_lag_s * fps)
        self._sent: History[np.ndarray] = History((-self._lag_ticks,), 0.0)  # targets by tick, as far back as the joints have yet to follow
        self._reset_policy = False
        self._lost_inferences = 0
        self._delays, self._estimates, self._rolled = array("q"), array("q"), array("q")
        self._left_running = False

    # The Controller protocol

    @property
    def needs_observation(self) -> bool:
        return self._buffer.empty and self._first is None

    def warm_up(self) -> Mapping[str, float]:
        """In the worker's thread: thread pools and library handles belong to a thread. Raises what the policy raises.

        The first chunk continues none and is cheaper to make than those after it: the delay of these is taken from here."""
        self._worker.submit(lambda: self._runner.warm_up(self.options.smoothing if self.options.continues else None))
        timing_ms = value_of(wait_with_keep_alive(self._worker, self._clock, None))
        self._watch.inferred(timing_ms.get("total", 0.0) / 1000)
        if self.options.continues and "total" in timing_ms:
            self._delay.add(self._ticks_of(timing_ms["total"]))
        return timing_ms

    def usual_delay_ticks(self, count: int) -> int:
        """The smallest of the last `count` delays; 0 before there were so many."""
        return min(self._delays[-count:]) if len(self._delays) >= count else 0

    @property
    def instruction(self) -> str:
        return self._runner.instruction

    def instruct(self, instruction: str, keep_alive: Callable[[], None] = lambda: None) -> None:
        method = self.options.smoothing if self.options.continues else None
        self._runner = self._runner.instructed(instruction, self._worker, self._watch.limit_s, keep_alive, method)

    def reset(self) -> None:
        """What the last episode left in the worker ends there and is dropped on arrival; the policy is reset before its next call."""
        self._buffer.reset()
        self._runner.binding.reset()
        self._watch.reset()
        self._first = self._entered = self._early = None
        self._reset_policy = True

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk:
        """The first chunk of an episode, waited for: the arm stands still. Raises what the policy raises, recoverable or not: there is nothing
        to hold yet. Raises InferenceTooLongError when the very first one takes so long that nothing of a later chunk would be left to play, and
        InferenceTimeoutError when none comes within `max_hold_s`."""
        self._runner.binding.remember(observation)
        self._sent.clear()
        self._sent.add(-math.inf, observation.joints)  # the arm stands there until the first target
        if self._worker.busy:
            self._take(self._waited_for(keep_alive), tick=0)  # of the episode before: dropped as stale
        self._submit(observation, tick=0, prefix=None)
        self._first = value_of(self._waited_for(keep_alive))
        self._watch.inferred(self._first.chunk.inference_ms / 1000)
        ticks = self._ticks_of(self._first.chunk.inference_ms)
        if not self._delays:  # later ones are no reason to end a run: a spike passes
            self._check_in_time(ticks, len(self._first))
        self._note_delay(ticks)
        return self._first.chunk

    def take_over(self, chunk: ActionChunk) -> None:
        """In the middle of an episode, from a controller of the same worker, which is idle: `chunk` plays from the next target on."""
        self._buffer.reset()
        self._watch.reset()
        self._entered = self._early = None
        self._sent.clear()  # the arm has waited for the chunk, and so stands about where it begins
        self._first = TimedChunk(dataclasses.replace(chunk, targets=chunk.targets[: self._horizon]), 0, self._buffer.episode)
        self._note_delay(self._ticks_of(chunk.inference_ms))

    def see(self, observation: Observation, tick: int) -> None:
        self._runner.binding.remember(observation)
        self._collect(tick + 1)  # this tick's target is out
        if not self._worker.busy and self._early is None and self._is_time(tick):
            self._submit(observation, tick, self._prefix(tick))

    def next_target(self, tick: int) -> np.ndarray:
        if self._first is not None:
            self._buffer.offer(dataclasses.replace(self._first, observed=tick), tick)
            self._first = None
        self._collect(tick)
        due = self._buffer.due(tick)
        self._watch(tick, due.starved)
        self._sent.add(tick, due.target)
        self.note = TickNote(due.age_ticks, due.starved, self._entered, due.row)
        self._entered = None
        return due.target

    def summary(self) -> dict[str, Any]:
        admissions = self._buffer.admissions
        return {
            "kind": "threaded",
            "smoothing": self.options.smoothing,
            "when_late": self.options.when_late,
            "roll_forward": self.options.roll_forward,
            "rolled_forward_ticks": percentiles(self._rolled),
            "starved_ticks": self._buffer.starved_ticks,
            "chunks_entered": admissions[Admission.ENTERED],
            "chunks_stale": admissions[Admission.STALE],
            "chunks_expired": admissions[Admission.EXPIRED],
            "lost_inferences": self._lost_inferences,
            "delay_ticks": percentiles(self._delays),
            "delay_estimate_ticks": percentiles(self._estimates),
            "inference_left_running": self._left_running,
            **self._runner.policy.summary(),
        }

    def close(self, timeout_s: float) -> bool:
        ended = self._worker.close(timeout_s)
        self._left_running = not ended
        return ended

    # Inference

    def _waited_for(self, keep_alive: Callable[[], None]) -> CallResult:
        limit_s = self._watch.limit_s
        outcome = wait_with_keep_alive(self._worker, self._clock, limit_s, keep_alive)
        if outcome is None:
            raise timed_out(limit_s or 0.0, "the first chunk of the episode is not there")
        return outcome

    def _ticks_of(self, duration_ms: float) -> int:
        return math.ceil(duration_ms / 1000 * self._fps)

    def _is_time(self, tick: int) -> bool:
        if self.options.chunk_threshold is None or self._buffer.empty:
            return True
        in_time = self._buffer.rows_left(tick) <= self._delay.ticks + _ARRIVAL_MARGIN_TICKS
        return in_time or self._buffer.fraction_left(tick) <= self.options.chunk_threshold

    def _submit(self, observation: Observation, tick: int, prefix: ActionPrefix | None) -> None:
        episode, reset, self._reset_policy = self._buffer.episode, self._reset_policy, False
        options = {} if prefix is None else {"prefix": prefix}
        observation, rolled = self._rolled_forward(observation, tick)

        def infer() -> TimedChunk:
            if reset:
                self._runner.policy.reset()
            chunk, actions = self._runner.infer(observation, **options)
            check_length(chunk, self._horizon)
            chunk = dataclasses.replace(chunk, targets=chunk.targets[: self._horizon])
            return TimedChunk(chunk, tick, episode, {key: values[: self._horizon] for key, values in actions.items()}, rolled)

        self._worker.submit(infer)

    def _rolled_forward(self, observation: Observation, tick: int) -> tuple[Observation, int]:
        """What the policy shall see instead of an observation of `tick`, and by how many ticks its joints are ahead of it."""
        ticks = self._delay.ticks - 1
        if not self.options.roll_forward or self._buffer.empty or ticks <= 0:
            return observation, 0
        moved = self._followed(tick + ticks, tick) - self._followed(tick, tick)
        if not np.isfinite(moved).all():  # the policy returned NaN: the arm holds then
            return observation, 0
        self._rolled.append(ticks)
        return dataclasses.replace(observation, joints=observation.joints + moved), ticks

    def _followed(self, tick: int, now: int) -> np.ndarray:
        """The target (J,) that the joints follow at `tick`: one that was sent up to the tick `now`, or that is planned."""
        followed = tick - self._lag_ticks
        return self._sent.at(tick)[0] if followed <= now else self._buffer.planned(followed)

    def _prefix(self, tick: int) -> ActionPrefix | None:
        """What the new chunk shall continue; None when that is nothing, or nothing to rely on (the policy returned NaN)."""
        left = self._buffer.leftover(tick) if self.options.continues else {}
        if not left or not all(np.isfinite(values).all() for values in left.values()):
            return None
        rows = min(len(values) for values in left.values())
        return ActionPrefix(left, min(self._delay.ticks, rows), self.options.smoothing)

    def _collect(self, tick: int) -> None:
        """Take what the worker has finished; it may play from `tick` on, or when its first row is due. Raises the policy's error."""
        early, self._early = self._early, None
        if early is not None:
            self._offer(early, tick)
        outcome = self._worker.poll()
        if outcome is not None:
            self._take(outcome, tick)

    def _take(self, outcome: CallResult, tick: int) -> None:
        if isinstance(outcome.error, self.options.recoverable):
            self._lost_inferences += 1
            return
        timed: TimedChunk = value_of(outcome)
        self._watch.inferred(timed.chunk.inference_ms / 1000)
        if timed.episode == self._buffer.episode:
            self._note_delay(tick - timed.observed)
        self._offer(timed, tick)

    def _offer(self, timed: TimedChunk, tick: int) -> None:
        if timed.episode == self._buffer.episode and tick < timed.begins:
            if self._buffer.rows_left(tick - 1):
                self._early = timed
                return
            timed = dataclasses.replace(timed, rolled=tick - timed.observed)  # nothing left to play: the arm stands where it will stand then
        if self._buffer.offer(timed, tick) is Admission.ENTERED:
            self._entered = timed.chunk

    def _note_delay(self, ticks: int) -> None:
        self._delay.add(ticks)
        self._delays.append(ticks)
        self._estimates.append(self._delay.ticks)

    def _check_in_time(self, ticks: int, horizon: int) -> None:
        if self.options.when_late == "hold" and not self.options.roll_forward and ticks >= horizon:
            raise InferenceTooLongError(
                f"an inference takes {ticks} ticks at {self._fps:g} Hz, but a chunk has {horizon} actions: all would be over when it "
                "arrives. Leave --action_horizon out if it was given, or use --controller=sync or auto (the arm waits), --when_late=resume (it "
                "stops and goes on), a lower --fps or a faster device.",
                ticks,
            )
