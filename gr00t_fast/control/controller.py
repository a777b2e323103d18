"""Source of targets for the control loop, which asks for one per tick: when to infer, and whether the arm moves meanwhile.

The policy runs in a worker's thread. Where inference and motion overlap, the worker makes the next chunk while the arm plays one; else the arm plays
its chunk, and waits for the next. Which row is due is decided in chunk_buffer.py. Time is counted in control ticks.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median_low
from typing import Any, Literal, Protocol

import numpy as np

from gr00t_fast.contracts import ActionChunk, ActionPrefix, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.chunk_buffer import ChunkBuffer, DueTarget, TimedChunk
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.errors import ConfigError, InferenceTimeoutError, UnsafeActionError, check_ranges
from gr00t_fast.measurement import percentiles

# How long the arm may hold its pose because no action is left. With half a second of actions still to play, an inference that hangs leads to
# torque off within three seconds.
DEFAULT_MAX_HOLD_S = 2.0
_WARM_UP_LIMIT_S = 600.0  # for another instruction: engines that compile take minutes
# Where inference takes seconds (a CPU), the arm waits so many times the median of the last ones: garbage, a busy machine, a cold cache. Not times the
# slowest, of which each slow one would allow a slower one.
USUAL_TIMES = 3.0
_TELL_AFTER_S = 2.0  # longer than one or two late chunks last
# A loop that was held up for so long (a cable that was out, a program that was stopped) looks at the arm anew, and what was planned before is over.
GAP_S = 0.5
_STALE_S = GAP_S + 1 / FPS_RANGE[0]  # a chunk may wait for its tick
# `auto` chooses again after so many inferences in a row that speak for another choice. Once it has gone over to waiting, to move again takes more of
# them, well within what a chunk bridges, and each time twice as many, so that a machine that is busy now and then does not change the way the arm
# moves again and again.
_IN_A_ROW, _IN_A_ROW_AGAIN, _WELL_WITHIN = 3, 4, 0.75
_DELAY_WINDOW = 20  # chunks, some seconds: a spike must not count for longer

Length = Literal["short", "bridged", "long"]  # of an inference: within a tick, within what a chunk bridges, longer
KEEP_ALIVE_EVERY_S = 0.1
_in_a_call: set[threading.Thread] = set()


class Worker(Protocol):
    """Where inference runs, one call at a time. Tests and simulations of slow networks use one without a thread."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Start a call; the one before has ended. Of the answer `done`, `exception` and `result` are asked."""

    def close(self, timeout_s: float) -> bool:
        """Take no more calls and wait for the running one, at most `timeout_s`. True when it has ended."""


class ThreadWorker:
    """A daemon thread, started with the first call: a call may hang for ever (a driver, a network connection) and must not keep the program from
    ending, as one of a ThreadPoolExecutor would."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gr00t_fast-inference", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def close(self, timeout_s: float) -> bool:
        self._calls.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            _in_a_call.add(threading.current_thread())
            try:
                result, error = call(), None
            except BaseException as raised:  # noqa: BLE001 - not handled here but handed over: the other thread raises it
                result, error = None, raised
            _in_a_call.discard(threading.current_thread())
            future.set_result(result) if error is None else future.set_exception(error)
            del item, future, call, result, error  # they hold an observation


def thread_left_running() -> bool:
    """Whether some inference still runs in a thread that could not be joined."""
    return bool(_in_a_call)


@dataclass(frozen=True)
class ControllerOptions:
    """Whether and how inference and motion overlap; fields are flags. The defaults play each action at its tick.

    controller: sync: the arm waits for each inference; threaded: it moves meanwhile; auto: threaded where that helps and a chunk bridges it.
    smoothing: how a chunk joins the one before: the policy continues it (see Policy.continues).
    when_late: hold: an action plays at its tick or not at all, and the arm holds when none is left. resume: after that it goes on where it stopped,
    see ChunkBuffer.
    max_hold_s: how long the arm may hold its pose for want of actions before the run ends, or USUAL_TIMES an ordinary inference where that is longer
    (HoldLimit); None: no limit (the policy has one of its own).
    action_horizon: rows of a chunk that may play; None: all the policy returns.
    """

    controller: Literal["auto", "sync", "threaded"] = "auto"
    smoothing: Literal["none", "prefix"] = "none"
    when_late: Literal["hold", "resume"] = "hold"
    max_hold_s: float | None = DEFAULT_MAX_HOLD_S
    action_horizon: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what excludes each other or makes no sense."""
        check_ranges(self, max_hold_s=(0.05, 3600.0), action_horizon=(1, 1e6))
        if self.when_late == "resume" and self.smoothing != "none":
            raise ConfigError(f"--when_late=resume and --smoothing={self.smoothing} exclude each other: smoothing joins actions of one tick.")
        if self.controller == "sync" and (name := self.overlap_asked):
            raise ConfigError(f"--{name}={getattr(self, name)} needs --controller=auto or threaded: only there inference overlaps the motion.")

    @property
    def overlap_asked(self) -> str | None:
        """The flag, if one is given, that only means something while inference and motion overlap."""
        return "smoothing" if self.smoothing != "none" else "when_late" if self.when_late != "hold" else None

    @property
    def continuing(self) -> bool:
        return self.smoothing != "none"


@dataclass(frozen=True)
class PolicyRunner:
    """A policy with what turns its answer into targets for one arm and one instruction."""

    policy: Policy
    binding: RobotBinding
    instruction: str
    clock: Clock

    def infer(self, observation: Observation, **options: Any) -> tuple[ActionChunk, dict[str, np.ndarray]]:
        """One inference: the chunk in robot order, and the policy's answer as it came. `options` go to `get_action`."""
        began_s = self.clock.now_s()
        actions = self.policy.get_action(self.binding.policy_observation(observation, self.instruction), **options)
        inference_ms = 1000 * (self.clock.now_s() - began_s)
        return self.binding.action_chunk(actions, inference_ms, self.policy.last_timing), actions


class ChunkController:
    """One thread calls it. Ticks are the pacer's, counted from the episode's begin. The policy, its reset included, runs in the worker only.

    note: on the target last returned. overlaps: whether inference goes on while the arm moves.
    """

    def __init__(
        self,
        policy: Policy,
        binding: RobotBinding,
        instruction: str,
        clock: Clock,
        fps: float,
        options: ControllerOptions | None = None,
        worker: Worker | None = None,
        recoverable: tuple[type[Exception], ...] = (),
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`recoverable`: errors of the policy after which the arm holds and the next observation is tried (a server that restarts, which tells of
        waiting itself); others end the run. `echo` is told what `auto` chooses and why, and when the arm holds for long. Raises ConfigError."""
        self.options = options or ControllerOptions()
        if self.options.continuing and not policy.continues:
            raise ConfigError(
                f"--smoothing={self.options.smoothing} needs a policy that can continue a chunk; {type(policy).__name__} cannot. "
                "Use --engine=eager, or --smoothing=none."
            )
        self.note = DueTarget(np.empty(0))
        self.overlaps = self.options.controller == "threaded"
        self._runner = PolicyRunner(policy, binding, instruction, clock)
        self._fps, self._clock, self._recoverable, self._echo = fps, clock, recoverable, echo
        self._worker = worker or ThreadWorker()
        self._call: Future[Any] | None = None  # what runs, or has ended and was not taken yet
        self._buffer = ChunkBuffer(resume=self.options.when_late == "resume", in_order=not policy.computes)
        self._recent_ticks: deque[int] = deque([0], maxlen=_DELAY_WINDOW)  # from an observation to the tick its chunk is there
        self._watch = HoldLimit(fps, self.options.max_hold_s, None if recoverable else echo)
        self._first: TimedChunk | None = None  # planned while the arm stood still: its time begins when it plays
        self._dropped = self._replanned = False  # whether what the call that runs makes is over already, and that of the call before was
        self._rest: Mapping[str, np.ndarray] = {}  # of a recording that was interrupted
        self._planned_s: float | None = None  # when, until the next target
        self._tick = 0  # of the last target, or the last observation since
        self._entered: ActionChunk | None = None
        self._reset_policy = False
        self._lost_inferences = 0
        self._delays, self._estimates = array("q"), array("q")
        self._left_running = False
        # of `auto`
        self._reason = ""
        self._length: Length | None = None  # of inferences, by which it chose
        self._others_ticks: list[float] = []  # inferences in a row that are of another length
        self._gave_way = 0  # times that it went over to waiting

    @property
    def needs_observation(self) -> bool:
        """True when the next target can only come from a new observation: the loop observes and calls `plan` before the next target."""
        if self._planned_s is not None:
            return self._clock.now_s() - self._planned_s > _STALE_S
        return self._buffer.empty or (not self.overlaps and not self._buffer.rows_left(self._tick + 1))

    @property
    def instruction(self) -> str:
        """What the robot shall do."""
        return self._runner.instruction

    def warm_up(self) -> Mapping[str, float]:
        """Pay first-call costs in the worker's thread, for thread pools and library handles belong to a thread; returns what `Policy.warm_up` does,
        and raises what it raises.

        The first chunk continues none and is cheaper to make than those after it: the delay of these is taken from here."""
        timing_ms = self._warmed_up(self.instruction, lambda: None, math.inf)
        self._watch.inferred(timing_ms.get("total", 0.0) / 1000)
        if self.options.continuing and "total" in timing_ms:
            self._recent_ticks.append(self._ticks_of(timing_ms["total"]))
        if self.options.controller == "auto":
            self._choose_at_warm_up(timing_ms.get("total"))
        return timing_ms

    def instruct(self, instruction: str, keep_alive: Callable[[], None] = lambda: None) -> None:
        """Another instruction for the episodes to come; between episodes only. Pays the first-call costs of it, `keep_alive` as in `plan`. Raises
        InferenceTimeoutError when that takes longer than ten minutes."""
        self._drop_what_runs(keep_alive)
        self._warmed_up(instruction, keep_alive, _WARM_UP_LIMIT_S)
        self._runner = dataclasses.replace(self._runner, instruction=instruction)

    def reset(self) -> None:
        """An episode begins, with `plan`, which drops what the last one left in the worker; the policy is reset before its next call."""
        self._buffer.reset()
        self._runner.binding.reset()
        self._watch.reset()
        self._first = self._planned_s = self._entered = None
        self._reset_policy, self._rest = True, {}

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk | None:
        """Make targets from an observation, while the arm stands still; may take as long as an inference. `keep_alive` is called several times a
        second meanwhile; what it raises ends the wait. Returns the chunk that comes next; None when the policy failed in a way that may pass: the
        next target holds the last one (the first of an episode raises: there is nothing to hold yet); None also when it is over already, `expire`.

        Raises what the policy raises, InferenceTimeoutError when no chunk comes within `max_hold_s`, and, where the arm is to move meanwhile,
        ConfigError when the very first inference takes so long that nothing of a later chunk would be left to play."""
        self._runner.binding.remember(observation)
        self._drop_what_runs(keep_alive)
        self._dropped = False
        rest, self._rest = self._rest, {}
        self._submit(observation, tick=0, prefix=ActionPrefix(rest, 0) if rest else None)
        try:
            timed: TimedChunk = self._waited_for(keep_alive, self._watch.limit_s, "the next chunk is not there")
        except self._recoverable:
            if not self._buffer.next_tick:
                raise
            self._lost_inferences += 1
            self._planned_s, self._others_ticks = self._clock.now_s(), []
            return None
        self._replanned = self._dropped and not self._replanned  # once: an inference that itself holds up the program is not made for ever
        if self._replanned:
            self._rest = rest
            self._reset_policy |= not self._buffer.next_tick  # it has played nothing
            return None
        self._first, self._planned_s = timed, self._clock.now_s()
        chunk = timed.chunk
        self._watch.inferred(chunk.inference_ms / 1000)
        ticks = self._ticks_of(chunk.inference_ms)
        overlapped = self.overlaps
        if not overlapped:
            self._reconsider(chunk.inference_ms / 1000 * self._fps)
        elif not self._delays and self.options.when_late == "hold" and ticks >= len(timed):  # later ones do not end a run: a spike passes
            self._too_late(ticks, len(timed))
        if overlapped or self.overlaps:
            self._note_delay(ticks)
        return chunk

    def see(self, observation: Observation, tick: int) -> None:
        """Take note of an observation made at `tick`, after its target, while targets are still left."""
        self._runner.binding.remember(observation)
        self._tick = max(self._tick, tick)
        if self.overlaps and not self._buffer.empty:
            self._collect(tick + 1)  # this tick's target is out; `auto` may have gone over to waiting by it
            if self.overlaps and self._call is None:
                self._submit(observation, tick, self._prefix(tick), self._buffer.rows_left(tick + 1) / self._fps)

    def expire(self) -> None:
        """The arm was out of reach for a while: what was planned before is over, also what an inference under way makes of it, and `plan` comes next.
        What was recorded goes on where it stopped: the next call of such a policy gets the rest to continue."""
        if not self._runner.policy.computes:
            left = self._first.actions if self._first is not None else self._buffer.leftover(self._buffer.next_tick)
            self._rest = left or self._rest
        self._buffer.expire()
        self._first = self._planned_s = None
        self._dropped = True

    def next_target(self, tick: int) -> np.ndarray:
        """The target (J,) of this tick: the first row when the arm has waited for a chunk, then one a tick. Rows of missed ticks are over; where all
        are, the last target is held. Raises what the policy raised in the meantime, and InferenceTimeoutError."""
        if self._first is not None:
            self._buffer.offer(dataclasses.replace(self._first, observed=tick), tick)
            self._first = None
        self._planned_s, self._tick = None, tick
        if self.overlaps:
            self._collect(tick)
        due = self._buffer.due(tick)
        if self._entered is not None:
            due, self._entered = dataclasses.replace(due, entered=self._entered), None
        self.note = due
        if self.overlaps:
            self._watch(tick, due.underrun)
        return due.target

    def summary(self) -> dict[str, Any]:
        """Figures for the report, JSON-ready; `kind` says whether the arm waits for inferences (sync) or moves meanwhile (threaded)."""
        return {
            "kind": "threaded" if self.overlaps else "sync",
            "smoothing": self.options.smoothing,
            "when_late": self.options.when_late,
            "underrun_ticks": self._buffer.underrun_ticks,
            "chunks_entered": self._buffer.entered,
            "chunks_expired": self._buffer.expired,
            "lost_inferences": self._lost_inferences,
            "delay_ticks": percentiles(self._delays),
            "delay_estimate_ticks": percentiles(self._estimates),
            "inference_left_running": self._left_running,
            **({"chosen_because": self._reason} if self.options.controller == "auto" else {}),
            **self._runner.policy.summary(),
        }

    def close(self, timeout_s: float) -> bool:
        """Take no more observations; called once the arm has landed. Never raises. False when an inference still runs after `timeout_s`."""
        ended = self._worker.close(timeout_s)
        self._left_running = not ended
        return ended

    # Inference

    def _warmed_up(self, instruction: str, keep_alive: Callable[[], None], limit_s: float) -> Mapping[str, float]:
        self._call = self._worker.submit(lambda: self._runner.policy.warm_up(instruction, self.options.continuing))
        timing_ms: Mapping[str, float] = self._waited_for(keep_alive, limit_s, "the policy still makes itself ready for the instruction")
        return timing_ms

    def _waited_for(self, keep_alive: Callable[[], None], limit_s: float, why: str) -> Any:
        """What the call that runs returns. Raises what it raises, and InferenceTimeoutError when it still runs after `limit_s`."""
        call, end_s = self._call, self._clock.now_s() + limit_s
        assert call is not None
        while True:
            keep_alive()
            try:
                call.exception(max(0.0, min(KEEP_ALIVE_EVERY_S, end_s - self._clock.now_s())))
            except TimeoutError:
                if self._clock.now_s() >= end_s:
                    raise timed_out(limit_s, why) from None
                continue
            self._call = None
            return call.result()

    def _drop_what_runs(self, keep_alive: Callable[[], None]) -> None:
        """An inference of an episode that is over, or one that took too long."""
        if self._call is not None:
            with suppress(*self._recoverable):
                self._waited_for(keep_alive, self._watch.limit_s, "an inference of the last episode still runs")

    def _ticks_of(self, duration_ms: float) -> int:
        return math.ceil(duration_ms / 1000 * self._fps)

    def _submit(self, observation: Observation, tick: int, prefix: ActionPrefix | None, deadline_s: float | None = None) -> None:
        """deadline_s: until the arm has no action left."""
        runner, reset, self._reset_policy = self._runner, self._reset_policy, False
        options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        if deadline_s is not None and runner.policy.takes_deadline:
            options["deadline_s"] = deadline_s
        horizon = self.options.action_horizon

        def infer() -> TimedChunk:
            if reset:
                runner.policy.reset()
            chunk, actions = runner.infer(observation, **options)
            if horizon is not None and len(chunk.targets) < horizon:
                raise UnsafeActionError(
                    f"the policy returned {len(chunk.targets)} actions, fewer than the {horizon} to be executed (--action_horizon). "
                    "Load the policy with the same action horizon."
                )
            return TimedChunk(chunk, tick, {key: values[:horizon] for key, values in actions.items()}, horizon)

        self._call = self._worker.submit(infer)

    def _prefix(self, tick: int) -> ActionPrefix | None:
        """What the new chunk shall continue; None when that is nothing, or nothing to rely on (the policy returned NaN)."""
        left = self._buffer.leftover(tick) if self.options.continuing else {}
        if not left or not all(np.isfinite(values).all() for values in left.values()):
            return None
        rows = min(len(values) for values in left.values())
        return ActionPrefix(left, min(self._expected_ticks, rows))

    def _collect(self, tick: int) -> None:
        """Take what the worker has finished; it may play from `tick` on. Raises the policy's error."""
        if self._call is None or not self._call.done():
            return
        call, self._call = self._call, None
        try:
            timed: TimedChunk = call.result()
        except self._recoverable:
            self._lost_inferences += 1
            return
        self._watch.inferred(timed.chunk.inference_ms / 1000)
        self._note_delay(tick - timed.observed)
        self._reconsider(tick - timed.observed)
        if self._buffer.offer(timed, tick):
            self._entered = timed.chunk

    def _note_delay(self, ticks: int) -> None:
        self._recent_ticks.append(ticks)
        self._delays.append(ticks)
        self._estimates.append(self._expected_ticks)

    @property
    def _expected_ticks(self) -> int:
        """A row that plays but was not committed is a jump; one committed too many only fades a little later: the longest (as Black et al.)."""
        return max(self._recent_ticks)

    def _too_late(self, ticks: int, horizon: int) -> None:
        if self.options.controller == "auto":
            self._choose(ticks, "an inference took")
            return
        raise ConfigError(
            f"an inference takes {ticks} ticks at {self._fps:g} Hz, but a chunk has {horizon} actions: all would be over when it "
            "arrives. Leave --action_horizon out if it was given, or use --controller=sync or auto (the arm waits), --when_late=resume (it "
            "stops and goes on), a lower --fps or a faster device."
        )

    # What `auto` chooses: after warm-up, from how long an inference takes, and again when several in a row take another time.

    def _choose_at_warm_up(self, inference_ms: float | None) -> None:
        if (asked := self.options.overlap_asked) is not None:
            self._chosen(True, f"--{asked} asks for it")
        elif inference_ms is None:
            self._length = "bridged"
            self._chosen(True, "how long an inference takes is not known yet; should chunks come too late, the arm will wait for them")
        else:
            self._choose(inference_ms / 1000 * self._fps, "at warm-up an inference took")

    def _choose(self, ticks: float, took: str) -> None:
        self._length, tick_ms = self._length_of(ticks), 1000 / self._fps
        took = f"{took} {ticks * tick_ms:.0f} ms"
        reasons = {
            "short": f"{took}, less than a tick of {tick_ms:.0f} ms: with the cameras' time a pause of a tick at most is to be expected",
            "bridged": f"{took}, longer than a tick of {tick_ms:.0f} ms, and {self._horizon} actions per chunk bridge it",
            "long": f"{took}, which {self._too_short(math.ceil(ticks))}",
        }
        self._gave_way += self._length == "long" and self.overlaps
        self._chosen(self._length == "bridged", reasons[self._length])

    def _chosen(self, overlaps: bool, reason: str) -> None:
        self.overlaps, self._reason, self._others_ticks = overlaps, reason, []
        does = "the arm moves while the next chunk is computed" if overlaps else "the arm waits for each inference"
        self._echo(f"controller: {does}, because {reason} (--controller=auto)")

    def _length_of(self, ticks: float, share: float = 1.0) -> Length:
        return "short" if ticks <= 1 else "bridged" if ticks <= math.ceil(share * self._bridged_ticks) else "long"

    def _reconsider(self, ticks: float) -> None:
        """After each inference; `ticks` until its chunk was there."""
        if self._length is None:  # nothing to choose
            return
        again = self._gave_way and not self.overlaps
        length = self._length_of(ticks, _WELL_WITHIN if again else 1.0)
        same = length == self._length or (self.overlaps and length == "short")  # what moves goes on
        self._others_ticks = [] if same else [*self._others_ticks, ticks]
        if len(self._others_ticks) == (_IN_A_ROW_AGAIN * 2 ** (self._gave_way - 1) if again else _IN_A_ROW):
            self._choose(max(self._others_ticks), f"the last {len(self._others_ticks)} inferences took up to")

    @property
    def _trained_horizon(self) -> int:
        metadata = self._runner.policy.metadata
        return 0 if metadata is None else metadata.trained_horizon

    @property
    def _horizon(self) -> int:
        """Actions of a chunk that may play."""
        return self.options.action_horizon or self._runner.policy.action_horizon or self._trained_horizon

    @property
    def _bridged_ticks(self) -> int:
        """The longest inference that chunks bridge: as many actions are over when a chunk arrives as play until the next does."""
        return self._horizon // 2

    def _too_short(self, ticks: int) -> str:
        short = f"a chunk of {self._horizon} actions does not bridge ({ticks} ticks; {2 * ticks} actions would)"
        return f"{short}; leave out --action_horizon" if ticks <= self._trained_horizon // 2 else short


class HoldLimit:
    """Ends a run whose arm has held its pose for too long because no action is left (an inference hangs or is too slow).

    limit_s: how long it may: `max_hold_s`, or USUAL_TIMES the median of the last inferences where that is longer; infinite without a limit.
    """

    def __init__(self, fps: float, max_hold_s: float | None, echo: Callable[[str], None] | None) -> None:
        """`max_hold_s` None: no end. `echo` None: says nothing."""
        self._fps, self._echo = fps, echo
        self.limit_s = self._least_s = math.inf if max_hold_s is None else max_hold_s
        self._lasted_s: deque[float] = deque(maxlen=_DELAY_WINDOW)
        self.reset()

    def inferred(self, duration_s: float) -> None:
        """An inference has taken so long."""
        self._lasted_s.append(duration_s)
        self.limit_s = max(self._least_s, USUAL_TIMES * median_low(self._lasted_s))

    def reset(self) -> None:
        """An episode begins."""
        self._since: int | None = None
        self._last = 0
        self._told = False

    def __call__(self, tick: int, underrun: bool) -> None:
        """After each tick's target. Raises InferenceTimeoutError when the arm has held for `limit_s`. Missed ticks count as time, but a gap of more
        than GAP_S does not: then it was not the inference that held up the arm."""
        if not underrun:
            self.reset()
            return
        gap = max(0, tick - self._last - 1)
        self._since = tick if self._since is None else self._since + (gap if gap > GAP_S * self._fps else 0)
        self._last = tick
        held_s = (tick - self._since) / self._fps
        if held_s >= self.limit_s:
            raise timed_out(self.limit_s, "no action is left to play")
        if held_s >= min(_TELL_AFTER_S, self.limit_s / 2) and not self._told and self._echo is not None:
            self._told = True
            end = f", at most {self.limit_s:.1f} s (--max_hold_s)" if math.isfinite(self.limit_s) else ""
            self._echo(f"WARNING: no action has been left for {held_s:.1f} s: inference hangs or is too slow. The arm holds its pose and waits{end}.")


def timed_out(limit_s: float, why: str) -> InferenceTimeoutError:
    """The error that ends the run."""
    return InferenceTimeoutError(
        f"the arm has held its pose for {limit_s:.1f} s, as long as --max_hold_s and {USUAL_TIMES:g} times an ordinary inference allow: "
        f"{why}, because inference hangs or comes too late. Check the device (nvidia-smi, dmesg); for one that pauses now and then give a longer "
        "--max_hold_s, or null for no limit."
    )
