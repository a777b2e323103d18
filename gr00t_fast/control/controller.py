"""Sources of targets for the control loop, which asks for one target per tick, whether or not inference overlaps the motion.

`SyncController` observes, infers and then plays the chunk. `ThreadedController` (threaded.py), which infers while the arm moves, has the same
protocol: `needs_observation` is true once, and every later observation comes through `see`. Both run the policy in a `ThreadWorker`; `AutoController`
(auto.py) chooses between them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.errors import ConfigError, InferenceTimeoutError, UnsafeActionError

# How long the arm may hold its pose because no action is left. With half a second of actions still to play, an inference that hangs leads to
# torque off within three seconds.
DEFAULT_MAX_HOLD_S = 2.0
_WARM_UP_LIMIT_S = 600.0  # for another instruction: engines that compile take minutes
# Where inference takes seconds (a CPU), the arm waits so many times the slowest one so far: garbage, a busy machine, a cold cache.
SLOWEST_TIMES = 3.0
_TELL_AFTER_S = 2.0  # longer than one or two late chunks last
# A loop that was held up for so long (a cable that was out, a program that was stopped) looks at the arm anew, and what was planned before is over.
GAP_S = 0.5
_STALE_S = GAP_S + 1 / FPS_RANGE[0]  # a chunk may wait for its tick


class HoldLimit:
    """Ends a run whose arm has held its pose for too long because no action is left (an inference hangs or is too slow)."""

    def __init__(self, fps: float, max_hold_s: float | None, echo: Callable[[str], None] | None) -> None:
        """`max_hold_s` None: no end. `echo` None: says nothing. Raises ConfigError unless the time is positive and finite."""
        if max_hold_s is not None and not (math.isfinite(max_hold_s) and max_hold_s > 0):
            raise ConfigError(f"max_hold_s must be a positive number of seconds (or null for no limit), got {max_hold_s}.")
        self._fps, self._max_hold_s, self._echo = fps, max_hold_s, echo
        self._slowest_s = 0.0
        self.reset()

    @property
    def limit_s(self) -> float | None:
        """How long the arm may hold its pose for want of actions: `max_hold_s`, or longer where inferences take long. None: for ever."""
        return None if self._max_hold_s is None else max(self._max_hold_s, SLOWEST_TIMES * self._slowest_s)

    def inferred(self, duration_s: float) -> None:
        """An inference has taken so long."""
        self._slowest_s = max(self._slowest_s, duration_s)

    def reset(self) -> None:
        """An episode begins."""
        self._since: int | None = None
        self._last = 0
        self._told = False

    def __call__(self, tick: int, starved: bool) -> None:
        """After each tick's target. Raises InferenceTimeoutError when the arm has held for `limit_s`. Missed ticks count as time, but a gap of more
        than GAP_S does not: then it was not the inference that held up the arm."""
        if not starved:
            self.reset()
            return
        gap = max(0, tick - self._last - 1)
        self._since = tick if self._since is None else self._since + (gap if gap > GAP_S * self._fps else 0)
        self._last = tick
        held_s = (tick - self._since) / self._fps
        limit_s = self.limit_s
        if limit_s is not None and held_s >= limit_s:
            raise timed_out(limit_s, "no action is left to play")
        if held_s >= (_TELL_AFTER_S if limit_s is None else min(_TELL_AFTER_S, limit_s / 2)) and not self._told:
            self._told = True
            self._tell(held_s)

    def _tell(self, held_s: float) -> None:
        if self._echo is not None:
            end = "" if self.limit_s is None else f", at most {self.limit_s:.1f} s (--max_hold_s)"
            self._echo(f"WARNING: no action has been left for {held_s:.1f} s: inference hangs or is too slow. The arm holds its pose and waits{end}.")


def timed_out(limit_s: float, why: str) -> InferenceTimeoutError:
    """The error that ends the run."""
    return InferenceTimeoutError(
        f"the arm has held its pose for {limit_s:.1f} s, as long as --max_hold_s and {SLOWEST_TIMES:g} times the slowest inference so far allow: "
        f"{why}, because inference hangs or comes too late. Check the device (nvidia-smi, dmesg); for one that pauses now and then give a longer "
        "--max_hold_s, or null for no limit."
    )


@dataclass(frozen=True)
class TickNote:
    """How the last target came about: ticks since the observation behind it, whether it was only held because no action was left, the chunk
    that it is the first of, if that came in while the arm moved, and its row in the playing chunk."""

    age_ticks: int = 0
    starved: bool = False
    entered: ActionChunk | None = None
    row: int = 0


class Controller(Protocol):
    """Source of targets for the control loop. One thread calls it. Ticks are the pacer's, counted from the episode's begin."""

    note: TickNote  # on the target last returned

    @property
    def needs_observation(self) -> bool:
        """True when the next target can only come from a new observation: the loop observes and calls `plan` before the next target."""

    def warm_up(self) -> Mapping[str, float]:
        """Pay first-call costs, in the thread that will run the policy; returns what `Policy.warm_up` does."""

    @property
    def instruction(self) -> str:
        """What the robot shall do."""

    def instruct(self, instruction: str, keep_alive: Callable[[], None] = lambda: None) -> None:
        """Another instruction for the episodes to come; between episodes only. Pays the first-call costs of it, `keep_alive` as in `plan`."""

    def reset(self) -> None:
        """Forget the last episode."""

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk | None:
        """Make targets from an observation; may take as long as an inference. `keep_alive` is called several times a second meanwhile; what it raises
        ends the wait. Returns the chunk that comes next; None when the policy failed in
        a way that may pass: the next target holds the last one."""

    def see(self, observation: Observation, tick: int) -> None:
        """Take note of an observation made at `tick`, after its target, while targets are still left."""

    def next_target(self, tick: int) -> np.ndarray:
        """The target (J,) of this tick. Raises what the policy raised in the meantime."""

    def summary(self) -> dict[str, Any]:
        """Figures for the report, JSON-ready; `kind` names the controller."""

    def close(self, timeout_s: float) -> bool:
        """Take no more observations; called once the arm has landed. Never raises. False when an inference still runs after `timeout_s`."""


@dataclass(frozen=True)
class PolicyRunner:
    """A policy with what turns its answer into targets for one arm and one instruction."""

    policy: Policy
    binding: RobotBinding
    instruction: str
    clock: Clock

    def warm_up(self, prefix_method: str | None = None) -> Mapping[str, float]:
        """As `Policy.warm_up`, with the run's instruction."""
        return self.policy.warm_up(self.instruction, prefix_method)

    def instructed(
        self, instruction: str, worker: Worker, limit_s: float | None, keep_alive: Callable[[], None], prefix_method: str | None = None
    ) -> PolicyRunner:
        """The same with another instruction, warmed up in `worker`, where an inference may be under way that ends within `limit_s`. Raises
        InferenceTimeoutError when it does not, or when the warm-up takes longer than ten minutes."""
        if worker.busy and wait_with_keep_alive(worker, self.clock, limit_s, keep_alive) is None:
            raise timed_out(limit_s or 0.0, "an inference of the last episode still runs")
        runner = dataclasses.replace(self, instruction=instruction)
        worker.submit(lambda: runner.warm_up(prefix_method))
        if (result := wait_with_keep_alive(worker, self.clock, _WARM_UP_LIMIT_S, keep_alive)) is None:
            raise timed_out(_WARM_UP_LIMIT_S, "the policy still makes itself ready for the new instruction")
        value_of(result)
        return runner

    def infer(self, observation: Observation, **options: Any) -> tuple[ActionChunk, dict[str, np.ndarray]]:
        """One inference: the chunk in robot order, and the policy's answer as it came. `options` go to `get_action`."""
        began_s = self.clock.now_s()
        actions = self.policy.get_action(self.binding.policy_observation(observation, self.instruction), **options)
        inference_ms = 1000 * (self.clock.now_s() - began_s)
        return self.binding.action_chunk(actions, inference_ms, self.policy.last_timing), actions


def check_horizon(action_horizon: int | None) -> None:
    """Raises ConfigError when it is not positive."""
    if action_horizon is not None and action_horizon < 1:
        raise ConfigError(f"action_horizon must be at least 1, got {action_horizon}.")


def check_length(chunk: ActionChunk, action_horizon: int | None) -> None:
    """Raises UnsafeActionError when the policy returned fewer actions than are to be executed."""
    if action_horizon is not None and len(chunk.targets) < action_horizon:
        raise UnsafeActionError(
            f"the policy returned {len(chunk.targets)} actions, fewer than the {action_horizon} to be executed (--action_horizon). "
            "Load the policy with the same action horizon."
        )


class SyncController:
    """Executes the first `action_horizon` actions of a chunk, then infers again while the arm waits.

    The policy runs in a worker's thread: the loop's thread handles signals and feeds the watchdog while native code runs.
    """

    def __init__(
        self,
        policy: Policy,
        binding: RobotBinding,
        instruction: str,
        clock: Clock,
        action_horizon: int | None = None,
        recoverable: tuple[type[Exception], ...] = (),
        max_hold_s: float | None = DEFAULT_MAX_HOLD_S,
        worker: Worker | None = None,
    ) -> None:
        """`action_horizon=None` plays all the policy returns; `recoverable` and `max_hold_s` as in OverlapOptions. Raises ConfigError when a number
        makes no sense."""
        check_horizon(action_horizon)
        self._runner = PolicyRunner(policy, binding, instruction, clock)
        self._horizon, self._recoverable = action_horizon, recoverable
        self._worker, self._clock = worker or ThreadWorker(), clock
        self._watch = HoldLimit(1.0, max_hold_s, None)
        self._left_running = False
        self._targets: np.ndarray = np.empty((0, 0), np.float32)
        self._next = 0
        self._first_tick = 0  # of the first target
        self._planned_s = 0.0
        self._last: np.ndarray | None = None
        self._starved = False
        self._reset_policy = False
        self._lost_inferences = 0
        self.note = TickNote()

    @property
    def needs_observation(self) -> bool:
        return self._next >= len(self._targets) or (self._next == 0 and self._clock.now_s() - self._planned_s > _STALE_S)

    def warm_up(self) -> Mapping[str, float]:
        self._worker.submit(self._runner.warm_up)
        timing_ms = value_of(wait_with_keep_alive(self._worker, self._clock, None))  # type: ignore[arg-type]  # without a limit there is an outcome
        self.expect(timing_ms.get("total", 0.0) / 1000)
        return timing_ms

    def expect(self, inference_s: float) -> None:
        """An inference has been seen to take so long: the arm will wait accordingly."""
        self._watch.inferred(inference_s)

    def take_over(self, target: np.ndarray) -> None:
        """In the middle of an episode, from a controller of the same worker: the next target needs an observation; `target` (J,) was the last one."""
        self._targets, self._next, self._last = self._targets[:0], 0, target

    @property
    def instruction(self) -> str:
        return self._runner.instruction

    def instruct(self, instruction: str, keep_alive: Callable[[], None] = lambda: None) -> None:
        self._runner = self._runner.instructed(instruction, self._worker, self._watch.limit_s, keep_alive)

    def reset(self) -> None:
        self._reset_policy = True
        self._runner.binding.reset()
        self._targets, self._next, self._last = self._targets[:0], 0, None

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk | None:
        """Raises a recoverable error too at the first chunk of an episode: there is nothing to hold yet. Raises InferenceTimeoutError when the arm
        has waited for too long."""
        self._runner.binding.remember(observation)
        try:
            chunk = self._chunk(observation, keep_alive)
        except self._recoverable:
            if self._last is None:
                raise
            self._lost_inferences += 1
            self._targets, self._next, self._starved, self._planned_s = self._last[None], 0, True, self._clock.now_s()
            return None
        self._watch.inferred(chunk.inference_ms / 1000)
        check_length(chunk, self._horizon)
        self._targets, self._next, self._starved, self._planned_s = chunk.targets[: self._horizon], 0, False, self._clock.now_s()
        return chunk

    def _chunk(self, observation: Observation, keep_alive: Callable[[], None]) -> ActionChunk:
        if (
            self._worker.busy and wait_with_keep_alive(self._worker, self._clock, self._watch.limit_s, keep_alive) is None
        ):  # of an episode that is over
            raise timed_out(self._watch.limit_s or 0.0, "an inference of the last episode still runs")
        reset, self._reset_policy = self._reset_policy, False

        def infer() -> ActionChunk:
            if reset:
                self._runner.policy.reset()
            return self._runner.infer(observation)[0]

        self._worker.submit(infer)
        outcome = wait_with_keep_alive(self._worker, self._clock, self._watch.limit_s, keep_alive)
        if outcome is None:
            raise timed_out(self._watch.limit_s or 0.0, "the next chunk is not there")
        return value_of(outcome)

    def see(self, observation: Observation, tick: int) -> None:
        """Only remembered: the next plan brings its own observation. The rows up to `tick` are over."""
        self._runner.binding.remember(observation)
        if self._next > 0:
            self._next = max(self._next, tick + 1 - self._first_tick)

    def next_target(self, tick: int) -> np.ndarray:
        """The first row when the arm has waited for it, then one a tick. Those of missed ticks are over; where all are, the last target is held."""
        if self._next == 0:
            self._first_tick = tick
        row = tick - self._first_tick
        self._next = row + 1
        over = row >= len(self._targets)
        self.note = TickNote(age_ticks=row, starved=self._starved or over, row=row)
        if not over or self._last is None:
            self._last = self._targets[min(row, len(self._targets) - 1)]
        return self._last

    def summary(self) -> dict[str, Any]:
        figures = {"lost_inferences": self._lost_inferences, "inference_left_running": self._left_running}
        return {"kind": "sync", **figures, **self._runner.policy.summary()}

    def close(self, timeout_s: float) -> bool:
        ended = self._worker.close(timeout_s)
        self._left_running = not ended
        return ended


# One thread that runs one call at a time, and hands back what came of it.


THREAD_NAME = "gr00t_fast-inference"
KEEP_ALIVE_EVERY_S = 0.1
_in_a_call: set[threading.Thread] = set()


@dataclass(frozen=True)
class CallResult:
    """What a call returned, or what it raised."""

    value: Any = None
    error: BaseException | None = None


class Worker(Protocol):
    """Where inference runs. Tests and simulations of slow networks use one without a thread."""

    @property
    def busy(self) -> bool:
        """True from `submit` until the outcome has been taken by `poll` or `wait`."""

    def submit(self, call: Callable[[], Any]) -> None:
        """Start a call. Raises RuntimeError while busy."""

    def poll(self) -> CallResult | None:
        """The outcome if it is there; never waits."""

    def wait(self, timeout_s: float | None = None) -> CallResult | None:
        """Wait for the outcome; None when it is not there after `timeout_s` (the call goes on, and the worker stays busy)."""

    def close(self, timeout_s: float) -> bool:
        """Take no more calls and wait for the running one, at most `timeout_s`. True when it has ended."""


class ThreadWorker:
    """A daemon thread, started with the first call. All methods belong to one other thread.

    Daemon, because a call may hang for ever (a driver, a network connection) and must not keep the program from ending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[CallResult] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.busy = False

    def submit(self, call: Callable[[], Any]) -> None:
        if self.busy or self._closed:
            raise RuntimeError("the inference thread is " + ("closed" if self._closed else "busy; take its outcome first"))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
            self._thread.start()
        self.busy = True
        self._calls.put(call)

    def poll(self) -> CallResult | None:
        if not self.busy:
            return None
        try:
            outcome = self._results.get_nowait()
        except Empty:
            return None
        self.busy = False
        return outcome

    def wait(self, timeout_s: float | None = None) -> CallResult | None:
        """A signal handler may raise out of this; the call then goes on and `close` waits for it."""
        if not self.busy:
            raise RuntimeError("nothing was submitted to the inference thread")
        try:
            outcome = self._results.get(timeout=timeout_s)
        except Empty:
            return None
        self.busy = False
        return outcome

    def close(self, timeout_s: float) -> bool:
        if not self._closed:
            self._closed = True
            self._calls.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            _in_a_call.add(threading.current_thread())
            outcome = _result_of(call)
            _in_a_call.discard(threading.current_thread())
            self._results.put(outcome)
            del call, outcome  # they hold an observation


def wait_with_keep_alive(worker: Worker, clock: Clock, limit_s: float | None, keep_alive: Callable[[], None] = lambda: None) -> CallResult | None:
    """Wait for the worker's outcome at most `limit_s` of `clock` (None: for ever), with `keep_alive` called several times a second. None when it is
    not there by then."""
    end_s = math.inf if limit_s is None else clock.now_s() + limit_s
    while True:
        keep_alive()
        outcome = worker.wait(max(0.0, min(KEEP_ALIVE_EVERY_S, end_s - clock.now_s())))
        if outcome is not None or clock.now_s() >= end_s:
            return outcome


def value_of(outcome: CallResult) -> Any:
    """What the call returned. Raises what it raised."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _result_of(call: Callable[[], Any]) -> CallResult:
    try:
        return CallResult(value=call())
    except BaseException as error:  # noqa: BLE001 - not handled here but handed over: the other thread raises it
        return CallResult(error=error)


def thread_left_running() -> bool:
    """Whether some inference still runs in a thread that could not be joined."""
    return bool(_in_a_call)
