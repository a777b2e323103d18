"""Joint values to the network's padded state vector, and its padded actions back to absolute joint values, in the reference's arithmetic.

Axis alphabet: B batch, T times, H horizon, D values of a part, P padded width of one time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gr00t_fast.base.errors import ObservationError
from gr00t_fast.inputs.embodiment import Arithmetic, Embodiment, Part


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
        """Those of the first steps of a relative action, as many as there are values."""
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
                values = values + _present(part.reference, state).astype(np.float32)[:, None]
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
                values = values - _present(part.reference, state).astype(np.float64)[:, None]
            joined.append(each.exact(values))
        return np.concatenate(joined, axis=-1, dtype=np.float32)


def _present(reference: str, state: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """(B, D) of a state (B, T, D)."""
    if state is None or reference not in state:
        raise ObservationError(f"actions are relative to {reference}, which was not given; expected it under 'state'.")
    return state[reference][:, -1]
