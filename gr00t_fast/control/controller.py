"""Where targets come from. The loop asks for one target per tick and does not know whether inference overlaps the motion.

`SyncController` looks, thinks and then plays the chunk. A controller that thinks while the arm moves fits the same protocol: it starts with
`needs_observation` true once, and receives every later observation through `see`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gr00t_fast.contracts import ActionChunk, Clock, Observation, Policy
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.errors import ConfigError, UnsafeActionError


class Controller(Protocol):
    """Source of targets for the control loop. One thread calls it."""

    @property
    def needs_observation(self) -> bool:
        """True when the next target can only come from a new observation: the loop observes and calls `plan` before the next target."""

    def reset(self) -> None:
        """Forget the last episode."""

    def plan(self, observation: Observation) -> ActionChunk:
        """Make targets from an observation; may take as long as an inference. Returns the chunk that comes next."""

    def see(self, observation: Observation) -> None:
        """Take note of an observation made while targets are still left."""

    def next_target(self) -> np.ndarray:
        """The target (J,) of this tick."""


class SyncController:
    """Executes the first `action_horizon` actions of a chunk, then infers again while the arm waits."""

    def __init__(self, policy: Policy, binding: RobotBinding, instruction: str, clock: Clock, action_horizon: int | None = None) -> None:
        """`action_horizon=None` plays all the policy returns. Raises ConfigError when it is not positive."""
        if action_horizon is not None and action_horizon < 1:
            raise ConfigError(f"action_horizon must be at least 1, got {action_horizon}.")
        self._policy, self._binding, self._instruction, self._clock = policy, binding, instruction, clock
        self._horizon = action_horizon
        self._targets = np.empty((0, 0), np.float32)
        self._next = 0

    @property
    def needs_observation(self) -> bool:
        return self._next >= len(self._targets)

    def reset(self) -> None:
        self._policy.reset()
        self._targets, self._next = self._targets[:0], 0

    def plan(self, observation: Observation) -> ActionChunk:
        began_s = self._clock.now_s()
        actions = self._policy.get_action(self._binding.policy_observation(observation, self._instruction))
        inference_ms = 1000 * (self._clock.now_s() - began_s)
        chunk = self._binding.action_chunk(actions, inference_ms, getattr(self._policy, "last_timing", {}))
        if self._horizon is not None and len(chunk.targets) < self._horizon:
            raise UnsafeActionError(
                f"the policy returned {len(chunk.targets)} actions, fewer than the {self._horizon} to be executed (--action_horizon). "
                "Load the policy with the same action horizon."
            )
        self._targets, self._next = chunk.targets[: self._horizon], 0
        return chunk

    def see(self, observation: Observation) -> None:
        """Nothing to do: the next plan brings its own observation."""

    def next_target(self) -> np.ndarray:
        self._next += 1
        return self._targets[self._next - 1]
