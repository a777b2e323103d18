"""Joint values to the network's padded state vector, and its padded actions back to absolute joint values, in the reference's arithmetic.

Axis alphabet: B batch, T times, H horizon, D values of a part, P padded width of one time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gr00t_fast.errors import ObservationError
from gr00t_fast.inputs.embodiment import Arithmetic, Embodiment, Part, Pose


class Normaliser:
    """One part's map between joint values and what the network reads, from the checkpoint's statistics.

    min_max, q99: [-1, 1]; mean_std: around 0; binary: 0 or 1; sin_cos: all sines, then all cosines (radians); none: the values as they are.
    """

    def __init__(self, part: Part, arithmetic: Arithmetic) -> None:
        self.part, self._arithmetic = part, arithmetic

    def forward(self, values: np.ndarray) -> np.ndarray:
        """(..., D) in joint units -> (..., network_width), as training saw them."""
        scaled = self._scaled(values.astype(self._arithmetic.forward))
        return np.clip(scaled, -1.0, 1.0) if self.part.clip else scaled

    def exact(self, values: np.ndarray) -> np.ndarray:
        """(..., H, D) -> float64 (..., H, D): not clipped, so that `inverse` gives the values back."""
        return self._scaled(values.astype(np.float64))

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """float32 (..., H, D) as the network gives them -> (..., H, D) in joint units. Not for sin_cos, which DataConfig allows states only."""
        arithmetic, mode = self._arithmetic, self.part.mode
        if mode == "none":
            return values
        if mode == "binary":
            return (values > 0.5).astype(np.float32)
        low: np.ndarray
        high: np.ndarray
        low, high = (statistics.astype(arithmetic.inverse) for statistics in self._statistics(values))
        if mode == "mean_std":
            restored = (values * high + low).astype(np.float32)
            return (np.where(high != 0, restored, values) if arithmetic.keep_constant else restored).astype(arithmetic.inverse)
        values = np.clip(values, -1.0, 1.0) if arithmetic.clip_actions else values
        return (values + np.float32(1)) / np.float32(2) * (high - low) + low

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """In the type of `values`: differences are formed in float64 and their quotient is rounded once."""
        mode = self.part.mode
        if mode == "none":
            return values
        if mode == "sin_cos":
            return np.concatenate([np.sin(values), np.cos(values)], axis=-1)
        if mode == "binary":
            return (values > 0.5).astype(values.dtype)
        low, high = self._statistics(values)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if mode == "mean_std":
                return np.where(high != 0, ((values - low) / high).astype(values.dtype), values)
            scaled = 2.0 * ((values - low) / (high - low)).astype(values.dtype) - 1.0
        constant = np.isclose(high, low) if self._arithmetic.close else high == low
        return np.where(constant, values if mode == "q99" else np.zeros_like(values), scaled)

    def _statistics(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a relative action those of the first steps, as many as there are values."""
        part = self.part
        return (part.low[: values.shape[-2]], part.high[: values.shape[-2]]) if part.low.ndim == 2 else (part.low, part.high)


class StateTransform:
    """State parts in, the network's padded state vector out."""

    def __init__(self, embodiment: Embodiment) -> None:
        self._embodiment = embodiment
        self._parts = [Normaliser(part, embodiment.arithmetic) for part in embodiment.state]

    def __call__(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        """`state.<part>` (B, T, D) -> float32 (B, T x P). Raises ObservationError for values that overflow."""
        joined = np.concatenate([each.forward(state[each.part.key]) for each in self._parts], axis=-1)  # (B, T, together)
        padded = np.zeros((*joined.shape[:-1], self._embodiment.state_width), np.float32)
        with np.errstate(over="ignore"):
            if not self._embodiment.exclude_state:
                padded[..., : joined.shape[-1]] = joined
        if not np.isfinite(padded).all():
            raise ObservationError("state: values of this size are no joint positions: they overflow when normalised. Check the units.")
        return padded.reshape(len(padded), -1)


class ActionTransform:
    """The network's padded actions in, action parts in joint units out; relative ones are counted from the state."""

    def __init__(self, embodiment: Embodiment) -> None:
        self._parts = [Normaliser(part, embodiment.arithmetic) for part in embodiment.action]

    def __call__(self, actions: np.ndarray, state: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """(B, H, padded width) and the raw `state.<part>` (B, T, D), of which the last time counts -> `action.<part>` float32 (B, H, D), absolute.

        Raises ObservationError where actions are relative to a part that `state` lacks.
        """
        result: dict[str, np.ndarray] = {}
        start = 0
        for each in self._parts:
            part = each.part
            values = each.inverse(actions[..., start : start + part.width].astype(np.float32))
            if part.reference is not None:
                values = _absolute(values, _present(part.reference, state).astype(np.float32), part.pose)
            result[part.key] = values.astype(np.float32)
            start += part.width
        return result

    def normalised(self, actions: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> np.ndarray:
        """The way back: `action.<part>` (B, L, D), absolute, of which row 0 is due at the observation -> float32 (B, L, widths together), not padded.

        Relative parts are counted from `state`, the observation's own: a chunk is continued from where the arm is now. Values beyond the statistics
        stay beyond: training saw them clipped, but these were really sent.
        """
        joined = []
        for each in self._parts:
            part = each.part
            values: np.ndarray = actions[part.key].astype(np.float64)
            if part.reference is not None:
                values = _relative(values, _present(part.reference, state).astype(np.float64), part.pose)
            joined.append(each.exact(values))
        return np.concatenate(joined, axis=-1, dtype=np.float32)


def _present(reference: str, state: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """(B, D) of a state (B, T, D)."""
    if state is None or reference not in state:
        raise ObservationError(f"actions are relative to {reference}, which was not given; expected it under 'state'.")
    return state[reference][:, -1]


# Relative actions


def _absolute(values: np.ndarray, reference: np.ndarray, pose: Pose | None) -> np.ndarray:
    """values (B, H, D), reference (B, D)."""
    if pose is None:
        return values + reference[:, None]
    base, move = _matrix(reference[:, None].astype(np.float64), pose), _matrix(values, pose)
    rotation = base[..., :3, :3] @ move[..., :3, :3]
    place = (base[..., :3, :3] @ move[..., :3, 3:])[..., 0] + base[..., :3, 3]
    return np.concatenate([place, _rotation_values(rotation, pose)], axis=-1)


def _relative(values: np.ndarray, reference: np.ndarray, pose: Pose | None) -> np.ndarray:
    if pose is None:
        return values - reference[:, None]
    base, goal = _matrix(reference[:, None], pose), _matrix(values, pose)
    back = np.swapaxes(base[..., :3, :3], -1, -2)
    place = (back @ (goal[..., :3, 3:] - base[..., :3, 3:]))[..., 0]
    return np.concatenate([place, _rotation_values(back @ goal[..., :3, :3], pose)], axis=-1)


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
