"""What happens to pictures and joint values before the network, and to its answer after it.

Each step repeats the reference's evaluation transform; the order is: resize to what training saw, centre crop, resize to the tower's size,
truncate to bytes, scale to [-1, 1]. Axis alphabet: B batch, C cameras, H and W height and width, D joint values, P padded width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gr00t_fast.checkpoint import EmbodimentMetadata
from gr00t_fast.data_config import DataConfig
from gr00t_fast.errors import ConfigError, ObservationError

_CROP_SCALE = 0.95  # NVIDIA's VideoCrop in every SO-100 data configuration
_PIXEL_MEAN = 127.5  # mean and deviation of Eagle's image processor, 0.5 of 255, folded as its fast path does: another order rounds differently
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


def pixel_values(frames: Tensor, image_size: int) -> Tensor:
    """uint8 (B, H, W, 3) RGB at the training videos' resolution -> fp32 (B, 3, image_size, image_size) in [-1, 1], on the frames' device.

    Cropping bytes before they become floats gives the same numbers as the reference's order, with less to convert.
    """
    x = _centre_crop(frames.permute(0, 3, 1, 2), _CROP_SCALE).contiguous().float().div_(255.0)  # (B, 3, h, w)
    if x.shape[-2:] != (image_size, image_size):
        # bilinear with antialias: what torchvision's resize does to a float tensor
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=True)
    x = (x * 255.0).to(torch.uint8).float()  # truncation, as the reference's conversion to bytes does
    return (x - _PIXEL_MEAN) / _PIXEL_MEAN


def _centre_crop(x: Tensor, scale: float) -> Tensor:
    height, width = x.shape[-2:]
    crop_height, crop_width = int(height * scale), int(width * scale)
    top = round((height - crop_height) / 2.0)  # torchvision's CenterCrop rounds to even as Python does
    left = round((width - crop_width) / 2.0)
    return x[..., top : top + crop_height, left : left + crop_width]


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
        """Raises ConfigError when the checkpoint lacks the statistics the mode needs."""
        self.mode = mode
        names = _STATISTICS_OF.get(mode, ("min", "max"))  # the other modes compute without them, and take the width from them
        absent = [name for name in names if name not in statistics]
        if absent:
            raise ConfigError(f"{key}: normalisation '{mode}' needs the statistics {', '.join(absent)}, which metadata.json does not have.")
        self._low, self._high = (statistics[name].astype(np.float64) for name in names)  # for mean_std: mean and std
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
        low, high, values = self._low.astype(np.float32), self._high.astype(np.float32), values.astype(np.float32)
        if self.mode == "mean_std":
            return values * high + low
        return (values + np.float32(1.0)) / np.float32(2.0) * (high - low) + low

    def inverse_table(self) -> np.ndarray:
        """float32 (5, D): offset, factor, span, low, binary. `inverse` is `(values + offset) * factor * span + low`, or a threshold where binary.

        Halving is exact as a product too, and adding 0 or multiplying by 1 rounds nothing.
        """
        low, high, ones = self._low.astype(np.float32), self._high.astype(np.float32), np.ones(self.width, np.float32)
        if self.mode == "mean_std":
            rows = (0 * ones, ones, high, low, 0 * ones)
        elif self.mode == "none":
            rows = (0 * ones, ones, ones, 0 * ones, 0 * ones)
        else:
            rows = (ones, 0.5 * ones, high - low, low, (self.mode == "binary") * ones)
        return np.stack(rows).astype(np.float32)


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
        return {key: self._parts[key].inverse(values) for key, values in self.split(actions).items()}

    def split(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """(B, horizon, P) -> `action.<part>` (B, horizon, D), the values as they are: for actions that `on` made joint units of."""
        result, start = {}, 0
        for key, part in self._parts.items():
            result[key] = actions[..., start : start + part.width].copy()
            start += part.width
        return result

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The same arithmetic for tensors on `device`: actions fp32 (B, H, P) -> (B, H, P) in joint units, the padding as it is.

        Bit for bit what `__call__` gives (one rounded operation after the other, in the same order), without waiting for the device.
        """
        rows = torch.cat([torch.from_numpy(part.inverse_table()) for part in self._parts.values()], dim=1)
        width = rows.shape[1]
        offset, factor, span, low, binary = rows.to(device)
        has_binary = bool(rows[-1].any())
        binary = binary.bool()

        def to_joints(actions: Tensor) -> Tensor:
            values, padding = actions.split((width, actions.shape[-1] - width), dim=-1)
            joints = (values + offset) * factor * span + low
            joints = torch.where(binary, (values > 0.5).to(joints.dtype), joints) if has_binary else joints
            return torch.cat((joints, padding), dim=-1)

        return to_joints

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
    parts = {key: Normaliser(config.normalisation_of(key), metadata.statistics[key], key) for key in keys}
    if (total := sum(part.network_width for part in parts.values())) > padded_width:
        raise ConfigError(f"the data config's {', '.join(keys)} have {total} values together; the network takes {padded_width}.")
    return parts
