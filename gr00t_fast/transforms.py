"""What happens to pictures and joint values before the network, and to its answer after it.

Each step repeats the reference's evaluation transform; the order is: resize to what training saw, centre crop, resize to the tower's size,
truncate to bytes, scale to [-1, 1]. Axis alphabet: B batch, C cameras, H and W height and width, D joint values, P padded width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import EmbodimentMetadata
from gr00t_fast.checkpoint.embodiment import check_std
from gr00t_fast.data_config import DataConfig
from gr00t_fast.errors import CheckpointError, ConfigError, ObservationError

_CONSTANT_STATE = {"min_max": 0.0}  # a constant dimension becomes 0; the other modes leave the raw value (reference Normalizer)
_STATISTICS_OF = {"min_max": ("min", "max"), "q99": ("q01", "q99"), "mean_std": ("mean", "std")}  # low and high, or mean and deviation


def to_trained_size(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 (B, H, W, 3) of any size -> (B, height, width, 3): what a camera of the training videos' resolution would have delivered.

    The reference refuses other sizes, so the kernel is our choice: area averaging where pixels are lost, bilinear elsewhere.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    import cv2  # here, because importing it changes the environment of the process

    shrinks = frames.shape[1] > height and frames.shape[2] > width
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (width, height), interpolation=kernel) for frame in frames])


def reference_inputs(ids: np.ndarray, lengths: np.ndarray, pixels: Tensor, state: np.ndarray, state_width: int, row: int) -> dict[str, Tensor]:
    """A network's inputs by the names that the reference has for them.

    ids int64 (B, S) padded on the right, lengths (B,), pixels fp32 (B, C, 3, h, w), state fp32 (B, P) of which `state_width` values are no padding.
    Returns state (B, 1, P) and state_mask, eagle_input_ids (B, S) padded on the left (with 0) and eagle_attention_mask, eagle_pixel_values
    (B x C, 3, h, w) and eagle_image_sizes (B x C, 2), embodiment_id (B,).
    """
    batch, longest = ids.shape
    pictures, states = pixels.flatten(0, 1), torch.from_numpy(state)[:, None]
    left_padded = np.stack([np.roll(each, longest - length) for each, length in zip(ids, lengths, strict=True)])
    return {
        "state": states,
        "state_mask": (torch.arange(states.shape[-1]) < state_width).expand_as(states),
        "eagle_input_ids": torch.from_numpy(left_padded),
        "eagle_attention_mask": torch.from_numpy((np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)),
        "eagle_pixel_values": pictures,
        "eagle_image_sizes": torch.tensor(pictures.shape[-2:]).expand(len(pictures), 2),
        "embodiment_id": torch.full((batch,), row),
    }


class Normaliser:
    """One part's map between joint values and what the network reads, from the checkpoint's statistics.

    min_max, q99: [-1, 1]; mean_std: around 0; binary: 0 or 1; sin_cos: all sines, then all cosines (radians); none: the values as they are.
    """

    def __init__(self, mode: str, statistics: Mapping[str, np.ndarray], key: str) -> None:
        """Raises ConfigError when the checkpoint lacks the statistics the mode needs, CheckpointError when they hold NaN."""
        self.mode = mode
        names = _STATISTICS_OF.get(mode, ("min", "max"))  # the other modes compute without them, and take the width from them
        absent = [name for name in names if name not in statistics]
        if absent:
            raise ConfigError(f"{key}: normalisation '{mode}' needs the statistics {', '.join(absent)}, which metadata.json does not have.")
        self._low: np.ndarray
        self._high: np.ndarray
        self._low, self._high = (statistics[name].astype(np.float64) for name in names)  # for mean_std: mean and std
        check_std(key, self._high)
        self._varies = self._high != (0.0 if mode == "mean_std" else self._low)

    @property
    def width(self) -> int:
        """Number of joint values D."""
        return len(self._low)

    @property
    def network_width(self) -> int:
        """Number of values that the network reads of them."""
        return 2 * self.width if self.mode == "sin_cos" else self.width

    def forward(self, values: np.ndarray) -> np.ndarray:
        """float64 (..., D) in joint units -> float64 (..., network_width), as training saw them."""
        scaled = self.exact(values)
        return np.clip(scaled, -1.0, 1.0) if self.mode == "q99" else scaled

    def exact(self, values: np.ndarray) -> np.ndarray:
        """The same without q99's clipping, so that `inverse` gives the values back."""
        if self.mode == "none":
            return values
        if self.mode == "sin_cos":
            return np.concatenate([np.sin(values), np.cos(values)], axis=-1)
        if self.mode == "binary":
            return (values > 0.5).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.mode == "mean_std":
                scaled = (values - self._low) / self._high
            else:
                scaled = 2.0 * ((values - self._low) / (self._high - self._low)) - 1.0
        return np.where(self._varies, scaled, _CONSTANT_STATE.get(self.mode, values))

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """(..., D) as the network gives them -> float32 (..., D) in joint units. Not for sin_cos, which DataConfig allows states only."""
        if self.mode == "none":
            return values.astype(np.float32)
        if self.mode == "binary":
            return (values > 0.5).astype(np.float32)
        values = values.astype(np.float32)
        low: np.ndarray = self._low.astype(np.float32)
        high: np.ndarray = self._high.astype(np.float32)
        if self.mode == "mean_std":
            return values * high + low
        return (values + np.float32(1.0)) / np.float32(2.0) * (high - low) + low


class StateTransform:
    """State parts in, the network's padded state vector out."""

    def __init__(self, config: DataConfig, metadata: EmbodimentMetadata, padded_width: int) -> None:
        self._parts = _normalisers(config.state_keys, config, metadata, padded_width)
        self._padded_width = padded_width

    @property
    def widths(self) -> dict[str, int]:
        """Key -> number of values."""
        return {key: part.width for key, part in self._parts.items()}

    @property
    def modes(self) -> dict[str, str]:
        """Key -> how it is normalised."""
        return {key: part.mode for key, part in self._parts.items()}

    @property
    def network_width(self) -> int:
        """How many values of the padded state are no padding."""
        return sum(part.network_width for part in self._parts.values())

    def __call__(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        """`state.<part>` (B, D) -> float32 (B, P). Raises ObservationError for values that overflow."""
        parts = [part.forward(state[key]) for key, part in self._parts.items()]
        joined = np.concatenate(parts, axis=-1)
        padded = np.zeros((joined.shape[0], self._padded_width), dtype=np.float32)
        with np.errstate(over="ignore"):
            padded[:, : joined.shape[-1]] = joined
        if not np.isfinite(padded).all():
            raise ObservationError(f"state: values like {np.abs(joined).max():.3g} times the training range are no joint positions. Check the units.")
        return padded


class ActionTransform:
    """The network's padded actions in, action parts in joint units out."""

    def __init__(self, config: DataConfig, metadata: EmbodimentMetadata, padded_width: int) -> None:
        self._parts = _normalisers(config.action_keys, config, metadata, padded_width)

    @property
    def widths(self) -> dict[str, int]:
        return {key: part.width for key, part in self._parts.items()}

    def __call__(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """(B, horizon, P) -> `action.<part>` float32 (B, horizon, D)."""
        result, start = {}, 0
        for key, part in self._parts.items():
            result[key] = part.inverse(actions[..., start : start + part.width])
            start += part.width
        return result

    def normalised(self, actions: Mapping[str, np.ndarray]) -> np.ndarray:
        """The way back: `action.<part>` (B, L, D) -> float32 (B, L, widths together), not padded."""
        return np.concatenate([part.exact(actions[key].astype(np.float64)) for key, part in self._parts.items()], axis=-1, dtype=np.float32)


def _normalisers(keys: Sequence[str], config: DataConfig, metadata: EmbodimentMetadata, padded_width: int) -> dict[str, Normaliser]:
    unknown = [key for key in keys if key not in metadata.statistics]
    if unknown:
        known = ", ".join(sorted(metadata.statistics))
        raise ConfigError(
            f"the data config reads {', '.join(unknown)}, but this checkpoint has statistics for {known} only. "
            "Choose the data_config it was trained with."
        )
    for key in keys:
        if key in metadata.unsupported:
            raise CheckpointError(f"experiment_cfg/metadata.json: of {key}, {metadata.unsupported[key]}.")
    parts = {key: Normaliser(config.normalisation_of(key), metadata.statistics[key], key) for key in keys}
    if (total := sum(part.network_width for part in parts.values())) > padded_width:
        raise ConfigError(f"the data config's {', '.join(keys)} have {total} values together; the network takes {padded_width}.")
    return parts
