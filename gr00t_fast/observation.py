"""The raw observation dict becomes one typed value here, once; every mistake in it is found here.

Axis alphabet: B batch, T time (always 1), H and W height and width, D joint values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.data_config import DataConfig
from gr00t_fast.errors import ObservationError, closest


@dataclass(frozen=True)
class PolicyInput:
    """A checked observation. frames: key -> uint8 (B, H, W, 3); state: key -> float64 (B, D); one instruction per item."""

    frames: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    instructions: list[str]
    batched: bool

    @property
    def batch(self) -> int:
        return len(self.instructions)


def parse_observation(observation: Mapping[str, Any], config: DataConfig, state_widths: Mapping[str, int]) -> PolicyInput:
    """Check and convert. Raises ObservationError that names the key, what was expected, and what came."""
    needed = [*config.video_keys, *config.state_keys, config.language_key]
    for key in needed:
        if key not in observation:
            have = ", ".join(sorted(observation)) or "nothing"
            raise ObservationError(f"observation: '{key}' is missing.{closest(key, observation)} Expected {', '.join(needed)}; got {have}.")
    frames = {key: _frames(key, observation[key]) for key in config.video_keys}
    state = {key: _state(key, observation[key], state_widths[key]) for key in config.state_keys}
    batched = _agree({**{k: v[1] for k, v in frames.items()}, **{k: v[1] for k, v in state.items()}}, "batched or unbatched alike")
    batch = _agree({**{k: len(v[0]) for k, v in frames.items()}, **{k: len(v[0]) for k, v in state.items()}}, "of one batch size")
    instructions = _instructions(config.language_key, observation[config.language_key], batch)
    return PolicyInput({k: v[0] for k, v in frames.items()}, {k: v[0] for k, v in state.items()}, instructions, batched)


def _frames(key: str, value: Any) -> tuple[np.ndarray, bool]:
    """-> (B, H, W, 3) and whether it came batched."""
    array = np.asarray(value)
    if array.dtype != np.uint8:
        raise ObservationError(f"{key}: expected uint8 RGB pixels 0..255, got {array.dtype}. Convert the frame before passing it.")
    batched = array.ndim == 5
    if array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise ObservationError(f"{key}: expected shape (1, height, width, 3), or (batch, 1, height, width, 3); got {array.shape}.")
    return _drop_time(key, array if batched else array[None]), batched


def _state(key: str, value: Any, width: int) -> tuple[np.ndarray, bool]:
    """-> float64 (B, D) and whether it came batched."""
    try:
        array = np.asarray(value)
        numeric = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    except ValueError as error:  # ragged nested lists
        raise ObservationError(f"{key}: expected numbers of shape (1, {width}), got something irregular ({error}).") from error
    if not numeric:
        raise ObservationError(f"{key}: expected numbers of shape (1, {width}), got dtype {array.dtype}.")
    if array.ndim not in (2, 3) or array.shape[-1] != width:
        raise ObservationError(f"{key}: expected shape (1, {width}), or (batch, 1, {width}); got {array.shape}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ObservationError(f"{key}: expected finite joint values, got {array.ravel().tolist()}. Check the robot's readings and calibration.")
    batched = array.ndim == 3
    return _drop_time(key, array if batched else array[None]), batched


def _drop_time(key: str, array: np.ndarray) -> np.ndarray:
    if array.shape[1] != 1:
        raise ObservationError(f"{key}: expected one time step, got {array.shape[1]}. The published data configurations observe the present only.")
    return array[:, 0]


def _instructions(key: str, value: Any, batch: int) -> list[str]:
    items = [value] if isinstance(value, str) else np.asarray(value, dtype=object).ravel().tolist()
    if not items or not all(isinstance(item, str) for item in items):
        raise ObservationError(f"{key}: expected an instruction (str, or a list of {batch} str), got {value!r}.")
    if len(items) == 1:
        items = items * batch
    if len(items) != batch:
        raise ObservationError(f"{key}: expected {batch} instructions for a batch of {batch}, got {len(items)}.")
    for item in items:
        if not item.strip():
            raise ObservationError(f"{key}: the instruction is empty. Say what the robot shall do.")
    return [str(item) for item in items]


def _agree(values: Mapping[str, Any], what: str) -> Any:
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        raise ObservationError(f"observation: expected all pictures and states {what}, got {dict(values)}.")
    return first
