"""Where targets come from. The loop asks for one target per tick and does not know whether inference overlaps the motion.

`SyncController` looks, thinks and then plays the chunk. A controller that thinks while the arm moves fits the same protocol: it starts with
`needs_observation` true once, and receives every later observation through `see` (threaded.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.worker import ThreadWorker, Worker, value_of, wait_alive
from gr00t_fast.errors import ConfigError, InferenceTimeoutError, UnsafeActionError

# How long the arm holds its pose because no action is left: said when it lasts, ended when it lasts too long.

# A sound inference is as quick as those before it. One that hangs shall not leave the arm under power: torque is off within three seconds, half a
# second of actions still to play included.
DEFAULT_MAX_HOLD_S = 2.0
# Where inference takes seconds (a CPU), the arm waits so many times the slowest one so far: garbage, a busy machine, a cold cache.
SLOWEST_TIMES = 3.0
_TELL_AFTER_S = 2.0  # a person wonders by then; a late chunk or two are over


class HoldLimit:
    """Follows the ticks of a run. Without an end, an inference that hangs would leave the arm under power for as long as the program runs."""

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
        self._told = False

    def __call__(self, tick: int, starved: bool) -> None:
        """After each tick's target. Raises InferenceTimeoutError when the arm has held for `limit_s`; ticks that were missed count as time."""
        if not starved:
            self.reset()
            return
        self._since = tick if self._since is None else self._since
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
    """How the last target came about: ticks since the observation behind it, whether it was only held because no action was left, and the
    chunk that it is the first of, if that came in while the arm moved."""

    age_ticks: int = 0
    starved: bool = False
    entered: ActionChunk | None = None


class Controller(Protocol):
    """Source of targets for the control loop. One thread calls it. Ticks are the pacer's, counted from the episode's begin."""

    note: TickNote  # on the target last returned

    @property
    def needs_observation(self) -> bool:
        """True when the next target can only come from a new observation: the loop observes and calls `plan` before the next target."""

    def warm_up(self) -> None:
        """Pay first-call costs, in the thread that will run the policy."""

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
        """Stop thinking; called once the arm has landed. Never raises. False when an inference still runs after `timeout_s`."""


@dataclass(frozen=True)
class PolicyRunner:
    """A policy with what turns its answer into targets for one arm and one instruction."""

    policy: Policy
    binding: RobotBinding
    instruction: str
    clock: Clock

    def warm_up(self, **options: Any) -> Mapping[str, float]:
        """Policies that have nothing to warm up lack the method: it is no part of the protocol. `options` go to it. Returns what the last call
        cost by stage, in ms, where the policy tells."""
        warm_up: Callable[..., Any] | None = getattr(self.policy, "warm_up", None)
        return {} if warm_up is None else warm_up(self.instruction, **options) or {}

    def summary(self) -> dict[str, Any]:
        """What the policy has to say in the report, if anything (a client: how its server was reached)."""
        summary: Callable[[], dict[str, Any]] | None = getattr(self.policy, "summary", None)
        return {} if summary is None else summary()

    def infer(self, observation: Observation, **options: Any) -> tuple[ActionChunk, dict[str, np.ndarray]]:
        """One inference: the chunk in robot order, and the policy's answer as it came. `options` go to `get_action`."""
        began_s = self.clock.now_s()
        actions = self.policy.get_action(self.binding.policy_observation(observation, self.instruction), **options)
        inference_ms = 1000 * (self.clock.now_s() - began_s)
        return self.binding.action_chunk(actions, inference_ms, getattr(self.policy, "last_timing", {})), actions


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

    The policy runs in a worker's thread all the same: the loop's thread must hear signals, and show that it lives, whatever native code does.
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
        self._targets = np.empty((0, 0), np.float32)
        self._next = 0
        self._last: np.ndarray | None = None
        self._starved = False
        self._reset_policy = False
        self._lost_inferences = 0
        self.note = TickNote()

    @property
    def needs_observation(self) -> bool:
        return self._next >= len(self._targets)

    def warm_up(self) -> None:
        self._worker.submit(self._runner.warm_up)
        timing_ms = value_of(wait_alive(self._worker, self._clock, None))
        self._watch.inferred(timing_ms.get("total", 0.0) / 1000)

    def reset(self) -> None:
        self._reset_policy = True
        self._targets, self._next, self._last = self._targets[:0], 0, None

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk | None:
        """Raises a recoverable error too at the first chunk of an episode: there is nothing to hold yet. Raises InferenceTimeoutError when the arm
        has waited for too long."""
        try:
            chunk = self._chunk(observation, keep_alive)
        except self._recoverable:
            if self._last is None:
                raise
            self._lost_inferences += 1
            self._targets, self._next, self._starved = self._last[None], 0, True
            return None
        self._watch.inferred(chunk.inference_ms / 1000)
        check_length(chunk, self._horizon)
        self._targets, self._next, self._starved = chunk.targets[: self._horizon], 0, False
        return chunk

    def _chunk(self, observation: Observation, keep_alive: Callable[[], None]) -> ActionChunk:
        if self._worker.busy and wait_alive(self._worker, self._clock, self._watch.limit_s, keep_alive) is None:  # of an episode that is over
            raise timed_out(self._watch.limit_s or 0.0, "an inference of the last episode still runs")
        reset, self._reset_policy = self._reset_policy, False

        def think() -> ActionChunk:
            if reset:
                self._runner.policy.reset()
            return self._runner.infer(observation)[0]

        self._worker.submit(think)
        outcome = wait_alive(self._worker, self._clock, self._watch.limit_s, keep_alive)
        if outcome is None:
            raise timed_out(self._watch.limit_s or 0.0, "the next chunk is not there")
        return value_of(outcome)

    def see(self, observation: Observation, tick: int) -> None:
        """Nothing to do: the next plan brings its own observation."""

    def next_target(self, tick: int) -> np.ndarray:
        """Rows in order, whatever the tick: the arm waits for each chunk, so none is late."""
        self.note = TickNote(age_ticks=self._next, starved=self._starved)
        self._next += 1
        self._last = self._targets[self._next - 1]
        return self._last

    def summary(self) -> dict[str, Any]:
        figures = {"lost_inferences": self._lost_inferences, "inference_left_running": self._left_running}
        return {"kind": "sync", **figures, **self._runner.summary()}

    def close(self, timeout_s: float) -> bool:
        ended = self._worker.close(timeout_s)
        self._left_running = not ended
        return ended
