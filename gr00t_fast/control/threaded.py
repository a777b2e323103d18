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
from gr00t_fast.measurement import percentiles

Smoothing = Literal["none", "rtc", "prefix"]
WhenLate = Literal["hold", "resume"]


@dataclass(frozen=True)
class OverlapOptions:
    """How inference and motion overlap. The defaults infer all the time and play each action at its tick.

    smoothing: how a chunk joins the one before. rtc and prefix: the policy continues it (see Policy.continues).
    when_late: hold: an action plays at its tick or not at all, and the arm holds when none is left. resume: after that it goes on where it stopped,
    see ChunkBuffer.
    recoverable: errors of the policy after which the arm holds and the next observation is tried (a server that restarts); others end the run.
    max_hold_s: how long the arm may hold its pose for want of actions before the run ends, or SLOWEST_TIMES the slowest inference so far where that
    is longer (HoldLimit); None: no limit (the policy has one of its own).
    """

    smoothing: Smoothing = "none"
    when_late: WhenLate = "hold"
    recoverable: tuple[type[Exception], ...] = ()
    max_hold_s: float | None = DEFAULT_MAX_HOLD_S

    def __post_init__(self) -> None:
        if self.when_late == "resume" and self.smoothing != "none":
            raise ConfigError(
                f"smoothing '{self.smoothing}' joins actions that are due at the same tick; with when_late 'resume' they are not. Leave one out."
            )

    @property
    def continues(self) -> bool:
        return self.smoothing != "none"


class ThreadedController:
    """A Controller. The policy, its reset included, runs in the worker only."""

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
                "Use --engine=eager, or --smoothing=none."
            )
        self.note = TickNote()
        self._runner = PolicyRunner(policy, binding, instruction, clock)
        self._fps, self._horizon, self._clock = fps, action_horizon, clock
        self._worker = worker or ThreadWorker()
        self._buffer = ChunkBuffer(resume=self.options.when_late == "resume")
        # A row that plays but was not committed is a jump; one committed too many only fades a little later. Black et al. take a maximum, too.
        self._delay = DelayEstimate(1.0 if self.options.continues else DELAY_QUANTILE)
        self._watch = HoldLimit(fps, self.options.max_hold_s, echo)
        self._first: TimedChunk | None = None  # planned while the arm stood still: its time begins when it plays
        self._entered: ActionChunk | None = None
        self._reset_policy = False
        self._lost_inferences = 0
        self._delays, self._estimates = array("q"), array("q")
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
        self._first = self._entered = None
        self._reset_policy = True

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk:
        """The first chunk of an episode, waited for: the arm stands still. Raises what the policy raises, recoverable or not: there is nothing
        to hold yet. Raises InferenceTooLongError when the very first one takes so long that nothing of a later chunk would be left to play, and
        InferenceTimeoutError when none comes within `max_hold_s`."""
        self._runner.binding.remember(observation)
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
        self._entered = None
        self._first = TimedChunk(dataclasses.replace(chunk, targets=chunk.targets[: self._horizon]), 0, self._buffer.episode)
        self._note_delay(self._ticks_of(chunk.inference_ms))

    def see(self, observation: Observation, tick: int) -> None:
        self._runner.binding.remember(observation)
        self._collect(tick + 1)  # this tick's target is out
        if not self._worker.busy:
            self._submit(observation, tick, self._prefix(tick))

    def next_target(self, tick: int) -> np.ndarray:
        if self._first is not None:
            self._buffer.offer(dataclasses.replace(self._first, observed=tick), tick)
            self._first = None
        self._collect(tick)
        due = self._buffer.due(tick)
        self._watch(tick, due.starved)
        self.note = TickNote(due.age_ticks, due.starved, self._entered, due.row)
        self._entered = None
        return due.target

    def summary(self) -> dict[str, Any]:
        admissions = self._buffer.admissions
        return {
            "kind": "threaded",
            "smoothing": self.options.smoothing,
            "when_late": self.options.when_late,
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

    def _submit(self, observation: Observation, tick: int, prefix: ActionPrefix | None) -> None:
        episode, reset, self._reset_policy = self._buffer.episode, self._reset_policy, False
        options = {} if prefix is None else {"prefix": prefix}

        def infer() -> TimedChunk:
            if reset:
                self._runner.policy.reset()
            chunk, actions = self._runner.infer(observation, **options)
            check_length(chunk, self._horizon)
            chunk = dataclasses.replace(chunk, targets=chunk.targets[: self._horizon])
            return TimedChunk(chunk, tick, episode, {key: values[: self._horizon] for key, values in actions.items()})

        self._worker.submit(infer)

    def _prefix(self, tick: int) -> ActionPrefix | None:
        """What the new chunk shall continue; None when that is nothing, or nothing to rely on (the policy returned NaN)."""
        left = self._buffer.leftover(tick) if self.options.continues else {}
        if not left or not all(np.isfinite(values).all() for values in left.values()):
            return None
        rows = min(len(values) for values in left.values())
        return ActionPrefix(left, min(self._delay.ticks, rows), self.options.smoothing)

    def _collect(self, tick: int) -> None:
        """Take what the worker has finished; it may play from `tick` on. Raises the policy's error."""
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
        if self._buffer.offer(timed, tick) is Admission.ENTERED:
            self._entered = timed.chunk

    def _note_delay(self, ticks: int) -> None:
        self._delay.add(ticks)
        self._delays.append(ticks)
        self._estimates.append(self._delay.ticks)

    def _check_in_time(self, ticks: int, horizon: int) -> None:
        if self.options.when_late == "hold" and ticks >= horizon:
            raise InferenceTooLongError(
                f"an inference takes {ticks} ticks at {self._fps:g} Hz, but a chunk has {horizon} actions: all would be over when it "
                "arrives. Leave --action_horizon out if it was given, or use --controller=sync or auto (the arm waits), --when_late=resume (it "
                "stops and goes on), a lower --fps or a faster device.",
                ticks,
            )
