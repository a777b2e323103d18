"""The random numbers and pictures that the recordings were made of, once more from their seeds.

NumPy alone: results of torch and OpenCV differ in the last bit from version to version and from processor to processor. What is computed here is a
prediction, so it need not be exact: `restore.py` adds what was stored of the difference. Axis alphabet: H and W height and width, h and w those of
a result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

_UNIT = 16  # torch fills a tensor in blocks of that many


class TorchNormals:
    """`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`, one tensor after the other: torch's generator is the Mersenne Twister,
    its transform Box and Muller's (aten/src/ATen/native/cpu/DistributionTemplates.h, normal_fill)."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self._second: float | None = None

    def draw(self, shape: tuple[int, ...], rows: np.ndarray | None = None) -> np.ndarray:
        """float64 of that shape, or of its `rows` alone."""
        size = math.prod(shape)
        if size < _UNIT:
            whole = np.array([self._one() for _ in range(size)]).reshape(shape)
            return whole if rows is None else whole[rows]
        uniform = self._raw(size)
        last = self._raw(_UNIT) if size % _UNIT else uniform[size - _UNIT :]
        width = size // shape[0]
        places = np.arange(size) if rows is None else (rows[:, None] * width + np.arange(width)).ravel()
        made = _box_muller(uniform, places)
        at_the_end = places >= size - _UNIT
        made[at_the_end] = _box_muller(last, places[at_the_end] - (size - _UNIT))
        return made.reshape(-1 if rows is None else len(rows), *shape[1:]) if len(shape) > 1 else made

    def _raw(self, count: int) -> np.ndarray:
        return self._random.randint(0, 1 << 32, count, dtype=np.uint32) & 0xFFFFFF

    def _one(self) -> float:
        """Of a tensor with less than 16 values: double precision, two at a time."""
        if self._second is not None:
            value, self._second = self._second, None
            return value
        words = self._random.randint(0, 1 << 32, 4, dtype=np.uint32).astype(np.uint64)
        first, second = (((high << np.uint64(32) | low) & np.uint64((1 << 53) - 1)) * 2.0**-53 for high, low in words.reshape(2, 2))
        radius, angle = math.sqrt(-2 * math.log1p(-second)), 2 * math.pi * first
        self._second = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of blocks of 16 whole numbers below 2^24 the values at `places`."""
    first = places - places % _UNIT + places % (_UNIT // 2)
    radius = np.sqrt(-2 * np.log(1 - np.take(uniform, first, mode="clip") * 2.0**-24))
    angle = 2 * np.pi * 2.0**-24 * np.take(uniform, first + _UNIT // 2, mode="clip")
    return radius * np.where(places % _UNIT < _UNIT // 2, np.cos(angle), np.sin(angle))


def spread(name: str, shape: tuple[int, ...], program: str) -> tuple[float, float]:
    """(mean, deviation) that a recording's `program` gave a parameter, so that every term of the network matters."""
    last = name.rpartition(".")[2]
    if len(shape) == 1:
        is_scale = last == "weight" and ("norm" in name.lower() or "vlln" in name or name.endswith("mlp1.0.weight"))
        return (1, 0.2) if is_scale else (0, 0.1)
    fan_in = 1 / math.sqrt(shape[1] if len(shape) == 3 else math.prod(shape[1:]))
    if program == "n1d5":
        is_table = last == "weight" and ("embed" in name or "future_tokens" in name)
        return 0, 0.5 if is_table else 0.3 * fan_in if name.endswith("action_decoder.layer2.W") else fan_in
    if last == "b":
        return 0, 0.1
    is_table = len(shape) == 2 and ("embed" in name or "future_tokens" in name)
    if is_table and "timestep_embedder" not in name and "patch_embedding" not in name:
        return 0, 0.5
    if name.endswith("state_encoder.layer1.W"):  # few of the padded inputs are used
        return 0, 4 * fan_in
    return 0, 0.6 * fan_in if name.endswith("action_decoder.layer2.W") and program != "n1d7" else fan_in


# --- pictures


def frame(random: np.random.Generator, height: int, width: int, noise: int) -> np.ndarray:
    """uint8 (H, W, 3): random colours, a knot every 40 pixels, enlarged as OpenCV's INTER_CUBIC does, and noise of so many levels."""
    colours = random.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = resampled(colours, _cubic(height // 40, height), _cubic(width // 40, width))
    return np.clip(smooth + random.integers(-noise, noise + 1, (height, width, 3), dtype=np.int16), 0, 255).astype(np.uint8)


def by_area(image: np.ndarray, letterbox: bool, edge: int = 256, kept: float = 0.95) -> np.ndarray:
    """uint8 (H, W, 3) -> (h, w, 3): padded to a square or not, the shorter side `edge`, its centre, that side again; INTER_AREA."""
    if letterbox:
        side, (height, width) = max(image.shape[:2]), image.shape[:2]
        top, left = (side - height) // 2, (side - width) // 2
        image = np.pad(image, ((top, side - height - top), (left, side - width - left), (0, 0)))
    whole = _with_edge(image, edge)
    (top, height), (left, width) = (((side - int(side * kept)) // 2, int(side * kept)) for side in whole.shape[:2])
    return _with_edge(whole[top : top + height, left : left + width], edge)


def _with_edge(image: np.ndarray, edge: int) -> np.ndarray:
    height, width = (round(side * edge / min(image.shape[:2])) for side in image.shape[:2])
    return resampled(image, _area(image.shape[0], height), _area(image.shape[1], width))


def by_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (h, w, 3), as Pillow and torch do with antialias: each row first, rounded to bytes."""
    return resampled(resampled(image, None, _weighted(image.shape[1], width, _bicubic)), _weighted(image.shape[0], height, _bicubic), None)


def cropped(image: np.ndarray, edge: int = 224, kept: float = 0.95) -> np.ndarray:
    """N1.5's: uint8 (H, W, 3) -> (edge, edge, 3) of its centre, linear with antialias."""
    (top, height), (left, width) = (((side - int(side * kept)) // 2, int(side * kept)) for side in image.shape[:2])
    return resampled(image[top : top + height, left : left + width], _weighted(height, edge, _linear), _weighted(width, edge, _linear))


def squashed(image: np.ndarray, edge: int = 256, kept: int | None = 230) -> np.ndarray:
    """lerobot's: uint8 (H, W, 3) -> (edge, edge, 3), and its centre of side `kept` again."""
    whole = by_bicubic(image, edge, edge)
    if kept is None:
        return whole
    start = (edge - kept) // 2
    return by_bicubic(whole[start : start + kept, start : start + kept], edge, edge)


def resampled(image: np.ndarray, down: np.ndarray | None, across: np.ndarray | None) -> np.ndarray:
    """uint8 (H, W, 3), weights (h, H) and (w, W), None: as it is -> uint8 (h, w, 3). Halves go up, and so does what is as good as one."""
    found = np.ascontiguousarray(image.transpose(0, 2, 1), np.float64)  # (H, 3, W)
    if across is not None:
        found = (found.reshape(-1, found.shape[2]) @ across.T).reshape(len(found), 3, -1)
    if down is not None:
        found = (down @ found.reshape(len(found), -1)).reshape(len(down), 3, -1)
    return np.floor(found + (0.5 + 1e-6)).clip(0, 255).astype(np.uint8).transpose(0, 2, 1)


@functools.cache
def _cubic(have: int, want: int) -> np.ndarray:
    """(want, have): OpenCV's weights."""
    place = (np.arange(want) + 0.5) * have / want - 0.5
    first, a = np.floor(place).astype(int), -0.75
    x = place - first
    near = [((a + 2) * y - (a + 3)) * y * y + 1 for y in (x, 1 - x)]
    far = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    return _table(have, first - 1, np.stack([far, *near, 1 - far - near[0] - near[1]]))


@functools.cache
def _area(have: int, want: int) -> np.ndarray:
    """(want, have): how much of each pixel lies in the new one; where it enlarges, between the two nearest."""
    scale, places = have / want, np.arange(want)
    if scale >= 1:
        pixels = np.arange(have)
        shared = np.minimum(pixels + 1, (places[:, None] + 1) * scale) - np.maximum(pixels, places[:, None] * scale)
        return shared.clip(0) / scale
    first = np.floor(places * scale).astype(int)
    x = (places + 1) - (first + 1) / scale
    x = np.where(x <= 0, 0, x - np.floor(x))
    return _table(have, first, np.stack([1 - x, x]))


@functools.cache
def _weighted(have: int, want: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(want, have): by the distance from the new pixel's centre, in units of the larger of both pixels."""
    scale = have / want
    centre = (np.arange(want)[:, None] + 0.5) * scale
    weights = kernel(np.abs((np.arange(have) + 0.5 - centre) / max(scale, 1.0)))
    return weights / weights.sum(1, keepdims=True)


def _linear(x: np.ndarray) -> np.ndarray:
    return (1 - x).clip(0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))


def _table(have: int, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(want, have) of weights (taps, want) from pixel `first` on; what would lie outside is the border's."""
    table = np.zeros((len(first), have))
    for tap, each in enumerate(weights):
        np.add.at(table, (np.arange(len(first)), (first + tap).clip(0, have - 1)), each)
    return table
