"""NVIDIA's nested form of observations and actions (N1.7) and the flat one (N1.5 and ours), each from the other.

nested    {"video": {cam: uint8 (B, T, H, W, 3)}, "state": {part: float32 (B, T, D)}, "language": {key: [[str]] * B}}; {part: (B, H, D)}
flat      {"video.<cam>": ..., "state.<part>": ..., key: [str] * B}, batched or not; {"action.<part>": ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MODALITIES = ("video", "state", "language")


def is_nested(observation: Any) -> bool:
    return isinstance(observation, Mapping) and all(isinstance(observation.get(modality), Mapping) for modality in _MODALITIES)


def flat_observation(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Of a nested one. What makes no sense is left for the policy to name."""
    flat = {f"{modality}.{key}": value for modality in ("video", "state") for key, value in observation[modality].items()}
    for key, value in observation["language"].items():
        one_each = isinstance(value, list | tuple) and all(isinstance(item, list | tuple) and len(item) == 1 for item in value)
        flat[key] = [item[0] for item in value] if one_each else value
    return flat


def nested_observation(observation: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], bool]:
    """Of a flat one, and whether that was batched; states as float32, as NVIDIA's strict check wants them."""
    nested: dict[str, dict[str, Any]] = {modality: {} for modality in _MODALITIES}
    batched = any(key.startswith("state.") and np.ndim(value) == 3 for key, value in observation.items())
    for key, value in observation.items():
        modality, _, name = key.partition(".")
        if modality in ("video", "state"):
            array = np.asarray(value, np.float32) if modality == "state" else np.asarray(value)
            nested[modality][name] = array if batched else array[None]
        else:
            nested["language"][key] = [[str(text)] for text in ([value] if isinstance(value, str) else _texts(value))]
    return nested, batched


def _texts(value: Any) -> Sequence[Any]:
    return np.asarray(value).ravel().tolist()


def nested_actions(actions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("action."): value for key, value in actions.items()}


def flat_actions(actions: Mapping[str, Any], batched: bool) -> dict[str, Any]:
    return {f"action.{key}": value if batched or np.ndim(value) != 3 else value[0] for key, value in actions.items()}
