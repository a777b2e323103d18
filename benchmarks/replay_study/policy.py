"""A policy that knows the recording by heart and answers late: in a network's place, so that only the control architecture differs between runs.

Axis alphabet of this file: H horizon (actions in a chunk), J joints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.replay_study.delay import Delay
from benchmarks.replay_study.recording import MARKER, Recording
from gr00t_fast.contracts import Clock, ModalityConfig
from gr00t_fast.errors import ConfigError, ObservationError

CAMERA = "front"
_START_OF_ERROR = 0.5  # how much of the error at a chunk's end its begin has: predictions further ahead are worse


@dataclass(frozen=True)
class ReplaySpec:
    """All that a DelayedReplay is made of; travels to another process."""

    recording: Recording
    fps: float
    horizon: int
    delay: Delay
    chunk_noise_deg: float
    seed: tuple[int, ...]

    def build(self, clock: Clock) -> DelayedReplay:
        return DelayedReplay(self, clock)


class DelayedReplay:
    """A `Policy`. Sees the recording's time in the observation and answers what the recording does next: row i is due i ticks after it.

    It WAITS as long as an inference would take instead of computing; a network on the processor that runs the loop would also slow the loop.
    Each chunk is wrong in its own way, as those of a network are: a random offset per joint that grows towards the chunk's end, there with a
    standard deviation of `chunk_noise_deg`. Call k of an episode errs alike, and takes as long, in every architecture.
    """

    def __init__(self, spec: ReplaySpec, clock: Clock) -> None:
        if spec.horizon < 1 or spec.chunk_noise_deg < 0:
            raise ConfigError(f"a chunk needs at least one action and no negative noise, got {spec.horizon} and {spec.chunk_noise_deg}.")
        self._spec, self._clock = spec, clock
        self.reset()

    def reset(self) -> None:
        self._errors, self._delays = (np.random.default_rng([*self._spec.seed, stream]) for stream in (0, 1))

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        """Return `action.joints` (H, J) and `action.<MARKER>` (H, 1). Raises ObservationError without the time of the recording."""
        if noise is not None:
            raise ConfigError("a recording has no noise to start from; leave `noise` out.")
        if f"state.{MARKER}" not in observation:
            raise ObservationError(f"the observation lacks state.{MARKER}; it has {', '.join(observation)}.")
        ends_s = self._clock.now_s() + self._spec.delay.sample_s(self._delays)
        began_s = float(np.asarray(observation[f"state.{MARKER}"])[0, 0])
        times_s = began_s + np.arange(self._spec.horizon) / self._spec.fps  # (H,)
        actions = self._spec.recording.at(times_s) + self._error()
        self._clock.sleep_until_s(ends_s)
        return {"action.joints": actions.astype(np.float32), f"action.{MARKER}": times_s[:, None].astype(np.float32)}

    def _error(self) -> np.ndarray:
        """(H, J): an offset at the begin and another at the end of the chunk, linear in between."""
        begin, end = self._errors.normal(0.0, self._spec.chunk_noise_deg, (2, len(self._spec.recording.joint_names)))  # (J,) each
        share = np.linspace(0.0, 1.0, self._spec.horizon)[:, None]
        return (1 - share) * _START_OF_ERROR * begin + share * end

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return {
            "video": ModalityConfig([0], [f"video.{CAMERA}"]),
            "state": ModalityConfig([0], ["state.joints", f"state.{MARKER}"]),
            "action": ModalityConfig(list(range(self._spec.horizon)), ["action.joints", f"action.{MARKER}"]),
            "language": ModalityConfig([0], ["annotation.human.task_description"]),
        }
