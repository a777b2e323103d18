"""What happens to pictures and joint values before the network, and to its answer after it.

Each step repeats the reference's evaluation transform; the order is: resize to what training saw, centre crop, resize to the tower's size,
truncate to bytes, scale to [-1, 1]. Axis alphabet: B batch, C cameras, H and W height and width, D joint values, P padded width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.errors import CheckpointError, ConfigError, ObservationError
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import ActionPart, EmbodimentMetadata, EmbodimentN1d7, StatePart, check_std

_CONSTANT_STATE = {"min_max": 0.0}  # a constant dimension becomes 0; the other modes leave the raw value (reference Normalizer)
_STATISTICS_OF = {"min_max": ("min", "max"), "q99": ("q01", "q99"), "mean_std": ("mean", "std")}  # low and high, or mean and deviation


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


class StateTransformN1d7:
    def __init__(self, embodiment: EmbodimentN1d7) -> None:
        self._embodiment = embodiment

    @property
    def widths(self) -> dict[str, int]:
        """Key -> number of values."""
        return {f"state.{part.name}": part.width for part in self._embodiment.state}

    @property
    def modes(self) -> dict[str, str]:
        """Key -> what its values become."""
        return {f"state.{part.name}": part.mode for part in self._embodiment.state}

    def __call__(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        """`state.<part>` (B, T, D) -> float32 (B, T x P). Raises ObservationError for values that overflow."""
        embodiment = self._embodiment
        parts = [_normalised_state(state[f"state.{part.name}"].astype(np.float32), part, embodiment.clip_state) for part in embodiment.state]
        joined = np.concatenate(parts, axis=-1)  # (B, T, together)
        padded = np.zeros((*joined.shape[:2], embodiment.state_dim), np.float32)
        if not embodiment.exclude_state:
            padded[..., : joined.shape[-1]] = joined
        if not np.isfinite(padded).all():
            raise ObservationError("state: values of this size are no joint positions: they overflow when normalised. Check the units.")
        return padded.reshape(len(padded), -1)


def _normalised_state(values: np.ndarray, part: StatePart, clip: bool) -> np.ndarray:
    """float32 (B, T, D) -> float32 (B, T, D), of sin_cos (B, T, 2 D). Differences are formed in float64 and rounded once, as the reference does."""
    if part.mode == "sin_cos":
        return np.concatenate([np.sin(values), np.cos(values)], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if part.mode == "mean_std":
            return np.where(part.high != 0, ((values - part.low) / part.high).astype(np.float32), values)
        varies = ~np.isclose(part.high, part.low)
        scaled = np.float32(2) * ((values - part.low) / (part.high - part.low)).astype(np.float32) - np.float32(1)
    scaled = np.where(varies, scaled, np.float32(0))
    return np.clip(scaled, -1.0, 1.0) if clip else scaled


class ActionTransformN1d7:
    def __init__(self, embodiment: EmbodimentN1d7) -> None:
        self._embodiment = embodiment

    @property
    def widths(self) -> dict[str, int]:
        return {f"action.{part.name}": part.width for part in self._embodiment.action}

    def __call__(self, actions: np.ndarray, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """(B, at most H, padded width) and the raw `state.<part>` (B, T, D) -> `action.<part>` float32 (B, at most H, D), absolute.

        Relative parts count from the state at the last time.
        """
        result: dict[str, np.ndarray] = {}
        start = 0
        for part in self._embodiment.action:
            values = _restored(actions[..., start : start + part.width].astype(np.float32), part)  # float64 (B, H, D)
            if part.reference is not None:
                values = _absolute(values, state[f"state.{part.reference}"][:, -1].astype(np.float32), part)
            result[f"action.{part.name}"] = values.astype(np.float32)
            start += part.width
        return result

    def normalised(self, actions: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> np.ndarray:
        """The way back: `action.<part>` (B, L, D), absolute, of which row 0 is due at the observation -> float32 (B, L, widths together), not padded.

        Relative parts are counted from `state`, the observation's own: a chunk is continued from where the arm is now. Values beyond the statistics
        stay beyond, as training saw them clipped but a chunk in progress is a fact.
        """
        joined = []
        for part in self._embodiment.action:
            values: np.ndarray = actions[f"action.{part.name}"].astype(np.float64)
            if part.reference is not None:
                values = _relative(values, state[f"state.{part.reference}"][:, -1].astype(np.float64), part)
            low, high = _rows(part, values.shape[1])
            with np.errstate(divide="ignore", invalid="ignore"):
                if part.mode == "mean_std":
                    joined.append(np.where(high != 0, (values - low) / high, values))
                else:
                    joined.append(np.where(np.isclose(high, low), 0.0, 2.0 * (values - low) / (high - low) - 1.0))
        return np.concatenate(joined, axis=-1, dtype=np.float32)


def _rows(part: ActionPart, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics of the first `length` steps."""
    return (part.low[:length], part.high[:length]) if part.low.ndim == 2 else (part.low, part.high)


def _restored(values: np.ndarray, part: ActionPart) -> np.ndarray:
    """Normalised float32 (B, H, D) -> float64 (B, H, D), a relative part still relative."""
    low, high = _rows(part, values.shape[1])
    if part.mode == "mean_std":
        return np.where(high != 0, (values * high + low).astype(np.float32), values).astype(np.float64)
    return (np.clip(values, -1.0, 1.0) + np.float32(1)) / np.float32(2) * (high - low) + low


def _absolute(values: np.ndarray, reference: np.ndarray, part: ActionPart) -> np.ndarray:
    """values (B, H, D), reference (B, D)."""
    if part.pose is None:
        return values + reference[:, None]
    base, move = _matrix(reference[:, None].astype(np.float64), part.pose), _matrix(values, part.pose)
    rotation = base[..., :3, :3] @ move[..., :3, :3]
    place = (base[..., :3, :3] @ move[..., :3, 3:])[..., 0] + base[..., :3, 3]
    return np.concatenate([place, _rotation_values(rotation, part.pose)], axis=-1)


def _relative(values: np.ndarray, reference: np.ndarray, part: ActionPart) -> np.ndarray:
    if part.pose is None:
        return values - reference[:, None]
    base, goal = _matrix(reference[:, None], part.pose), _matrix(values, part.pose)
    back = np.swapaxes(base[..., :3, :3], -1, -2)
    place = (back @ (goal[..., :3, 3:] - base[..., :3, 3:]))[..., 0]
    return np.concatenate([place, _rotation_values(back @ goal[..., :3, :3], part.pose)], axis=-1)


def _matrix(values: np.ndarray, pose: str) -> np.ndarray:
    """(..., 9) or (..., 6) -> (..., 3, 4): rotation and place."""
    rotation = _from_rot6d(values[..., 3:]) if pose == "XYZ_ROT6D" else _from_rotvec(values[..., 3:])
    return np.concatenate([rotation, values[..., :3, None]], axis=-1)


def _rotation_values(rotation: np.ndarray, pose: str) -> np.ndarray:
    """(..., 3, 3) -> the first two rows (..., 6), or axis times angle (..., 3)."""
    return rotation[..., :2, :].reshape(*rotation.shape[:-2], 6) if pose == "XYZ_ROT6D" else _to_rotvec(rotation)


def _from_rot6d(values: np.ndarray) -> np.ndarray:
    """(..., 6), two rows -> (..., 3, 3): made orthonormal (Zhou et al. 2019)."""
    first, second = values[..., :3], values[..., 3:]
    first = first / np.linalg.norm(first, axis=-1, keepdims=True)
    second = second - (first * second).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _from_rotvec(values: np.ndarray) -> np.ndarray:
    """(..., 3) -> (..., 3, 3), Rodrigues' formula."""
    angle = np.linalg.norm(values, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(values, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*values.shape[:-1], 3, 3)
    return np.eye(3) + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (cross @ cross)


def _to_rotvec(rotation: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> (..., 3), by way of the quaternion's largest component, so that half turns are exact too."""
    diagonal, trace = np.diagonal(rotation, axis1=-2, axis2=-1), np.trace(rotation, axis1=-2, axis2=-1)
    flat, result = rotation.reshape(-1, 3, 3), []
    for matrix, entries, total in zip(flat, diagonal.reshape(-1, 3), np.ravel(trace), strict=True):
        largest = int(np.argmax([*entries, total]))
        if largest == 3:
            q = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1], 1 + total])
        else:
            i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
            q = np.empty(4)
            q[i], q[j], q[k] = 1 - total + 2 * matrix[i, i], matrix[j, i] + matrix[i, j], matrix[k, i] + matrix[i, k]
            q[3] = matrix[k, j] - matrix[j, k]
        q = q / np.linalg.norm(q) * (-1 if q[3] < 0 else 1)
        sine = np.linalg.norm(q[:3])
        result.append(q[:3] * (2 * np.arctan2(sine, q[3]) / sine if sine > 1e-12 else 2.0))
    return np.stack(result).reshape(*rotation.shape[:-2], 3)
