"""Recorded observations through the policy.

Axis alphabet: H horizon, J joints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.open_loop_study.recorded import Episode, Recorded
from benchmarks.program import show_progress
from gr00t_fast.errors import CheckpointError
from gr00t_fast.export.observations import LeRobotFrames

Observation = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """What the policy said at frame `start`: targets float64 (trained horizon, J)."""

    episode: Episode
    start: int
    targets: np.ndarray
    inference_ms: float


class Rollout:
    """Asks the policy at recorded frames. The noise of a frame depends on the seed and its row alone: equal for all settings that are compared."""

    def __init__(
        self, policy: Any, frames: LeRobotFrames, recorded: Recorded, noise_shape: tuple[int, int], seed: int, instruction: str | None
    ) -> None:
        """noise_shape: trained horizon and padded action width. `instruction` None: the data set's own."""
        self.policy, self.recorded = policy, recorded
        self._frames, self._noise_shape, self._seed = frames, noise_shape, seed
        self._instruction = instruction
        self.language_key = policy.get_modality_config()["language"].modality_keys[0]

    def observation(self, episode: Episode, frame: int) -> Observation:
        """The policy's own dictionary. Raises ConfigError when a picture cannot be decoded."""
        found = self._frames[episode.first_row + frame]
        return found if self._instruction is None else found | {self.language_key: [self._instruction]}

    def with_joints(self, observation: Observation, joints: np.ndarray) -> Observation:
        """The same with the state (J,) replaced."""
        return observation | {f"state.{part}": values[None] for part, values in self.recorded.layout.split(joints).items()}

    def targets(self, observation: Observation, episode: Episode, frame: int) -> np.ndarray:
        """(trained horizon, J). Raises CheckpointError when they are not finite."""
        noise = np.random.default_rng([self._seed, episode.first_row + frame]).standard_normal((1, *self._noise_shape), np.float32)
        actions = self.policy.get_action(observation, noise=noise)
        found = self.recorded.layout.joined({part: actions[f"action.{part}"] for part in self.recorded.layout.widths}).astype(np.float64)
        if not np.isfinite(found).all():
            raise CheckpointError(f"the policy answers NaN or infinity to frame {frame} of episode {episode.number}. Try --precision=fp32.")
        return found

    def chunks(self, episodes: Sequence[Episode], starts: Callable[[Episode], Sequence[int]], steps: Sequence[int]) -> dict[int, list[Chunk]]:
        """Denoising steps -> chunks. Each frame is read once, and the step counts take turns on it."""
        found: dict[int, list[Chunk]] = {count: [] for count in steps}
        places = [(episode, start) for episode in episodes for start in starts(episode)]
        for number, (episode, start) in enumerate(places):
            observation = self.observation(episode, start)
            turn = number % len(steps)  # whoever comes first after a picture was decoded finds the caches full of it
            for count in (*steps[turn:], *steps[:turn]):
                self.policy.denoising_steps = count
                began_s = time.perf_counter()
                targets = self.targets(observation, episode, start)
                found[count].append(Chunk(episode, start, targets, 1000 * (time.perf_counter() - began_s)))
            show_progress("frames", number + 1, len(places))
        return found
