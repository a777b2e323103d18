"""What goes into every linear layer while the calibration observations run, and how each layer is best rounded to 8 bits.

Axis alphabet: R kept rows, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.export.linear_layers import LinearLayer
from gr00t_fast.export.qdq import LARGEST, LayerPlan, quantised_weight, rounded
from gr00t_fast.export.stage_chain import Arrays

_ROWS = 192  # per tensor: enough to rank a handful of choices, little enough to hold those of a whole stage
_ROWS_PER_RUN = 4
_COLUMNS = 384  # of the weights take part in the search: one scale per column makes them alike
# Exponents of SmoothQuant (Xiao et al. 2023, section 4): how much of the activations' spread moves into the weights. None: no balancing.
_BALANCES = (None, 0.35, 0.5, 0.65)
_CLIPS = {"int8": (1.0, 0.9, 0.8, 0.65, 0.5), "fp8": (1.0,)}  # of the largest value seen; FP8's relative precision gains nothing from clipping
_WORTH = 0.75  # another choice must lower the error at least to this, or the plainer one stays: a range fitted closely clips what was not seen
_SMALLEST = 1e-5


@dataclass
class InputStatistics:
    """Of one tensor: largest |value| per channel (K,), how many rows a run has, and rows (R, K): the largest of each run and some at random."""

    largest: np.ndarray
    rows_per_run: int
    rows: list[np.ndarray] = field(default_factory=list)

    @property
    def sample(self) -> np.ndarray:
        return np.concatenate(self.rows)


class InputRecorder:
    """Collects `InputStatistics` of the inputs of `layers`, run by run."""

    def __init__(self, layers: Sequence[LinearLayer], runs: int, seed: int) -> None:
        """`runs`: how often the stage will run; rows are kept from as many of them as there is room for."""
        self.tensors = list(dict.fromkeys(layer.input for layer in layers))
        self.statistics: dict[str, InputStatistics] = {}
        self._per_run = max(_ROWS_PER_RUN, -(-_ROWS // runs))  # few runs: more of each, so that the search has something to go by
        self._every = max(1, runs * self._per_run // _ROWS)
        self._generator = np.random.default_rng(seed)
        self._seen = 0

    def see(self, arrays: Arrays) -> None:
        for name in self.tensors:
            values = arrays[name].reshape(-1, arrays[name].shape[-1])  # (rows, K)
            sizes = np.abs(values)
            entry = self.statistics.setdefault(name, InputStatistics(np.zeros(values.shape[-1], np.float32), len(values)))
            np.maximum(entry.largest, sizes.max(axis=0), out=entry.largest)
            if self._seen % self._every == 0:
                picked = self._generator.integers(0, len(values), self._per_run - 1)
                entry.rows.append(values[[int(sizes.max(axis=1).argmax()), *picked]])
        self._seen += 1


@dataclass(frozen=True)
class PlanReport:
    """How a group of layers that read one tensor will be rounded, and what that does to their outputs (relative L2, kept rows)."""

    balance: float | None
    clip: float
    error: float
    error_plain: float  # without balancing and clipping

    def describe(self) -> dict[str, float | None]:
        return {"balance": self.balance, "clip": self.clip, "relative_error": round(self.error, 5), "plain": round(self.error_plain, 5)}


def plan_inputs(
    statistics: InputStatistics, weights: Mapping[str, np.ndarray], scheme: str, balance: bool = True
) -> tuple[dict[str, LayerPlan], PlanReport]:
    """Plans (label -> LayerPlan) for the layers `weights` (label -> (K, N)) that read one tensor: of all choices the one with the least error."""
    rows, joined = statistics.sample, np.concatenate(list(weights.values()), axis=1).astype(np.float32)  # (R, K), (K, N)
    spread = np.abs(joined).max(axis=1)  # (K,), of all columns
    joined = np.ascontiguousarray(joined[:, :: max(1, joined.shape[1] // _COLUMNS)])
    truth = rows @ joined  # (R, N)
    size = max(float(np.linalg.norm(truth)), _SMALLEST)
    best: tuple[float, float | None, float, LayerPlan] | None = None
    plain = 0.0
    for exponent in _BALANCES if balance else (None,):
        smoothing = None if exponent is None else _smoothing(statistics.largest, spread, exponent)
        scaled = joined if smoothing is None else joined * smoothing[:, None]
        values, scales = quantised_weight(scaled, scheme)
        approximate = values * scales
        inputs = rows if smoothing is None else rows / smoothing
        largest = float((statistics.largest if smoothing is None else statistics.largest / smoothing).max())
        for clip in _CLIPS[scheme]:
            limit = max(largest * clip, _SMALLEST)
            error = float(np.linalg.norm(_round_inputs(inputs, limit, scheme) @ approximate - truth)) / size
            plain = plain or error
            if best is None or error < best[0] * _WORTH:
                best = (error, exponent, clip, LayerPlan(limit, smoothing))
    error, exponent, clip, plan = best
    return dict.fromkeys(weights, plan), PlanReport(exponent, clip, error, plain)


def _smoothing(inputs: np.ndarray, weights: np.ndarray, exponent: float) -> np.ndarray:
    """Largest |input| and |weight| per channel (K,) -> what the channel is divided by, and its weights multiplied with; geometric mean 1."""
    ratio = np.maximum(inputs, _SMALLEST) ** exponent / np.maximum(weights, _SMALLEST) ** (1 - exponent)
    return (ratio / np.exp(np.log(ratio).mean())).astype(np.float32)


def _round_inputs(rows: np.ndarray, limit: float, scheme: str) -> np.ndarray:
    scale = np.float32(limit / LARGEST[scheme])
    return rounded(rows / scale, scheme) * scale
