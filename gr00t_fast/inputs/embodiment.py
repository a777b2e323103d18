"""What one embodiment's observations and actions look like, as its checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gr00t_fast.contracts import Letterbox
from gr00t_fast.errors import CheckpointError

STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
# Smaller ones come first. The tolerance, a share of the larger of |min| and |max|, is for figures that were rounded or estimated; the absolute one
# for a joint that was always 0: quantiles that lerobot estimates from a histogram are then some 1e-14.
_ORDER = (("min", "q01"), ("q99", "max"))
_ORDER_TOLERANCE = 1e-3
_ORDER_SLACK = 1e-6
_LARGEST = 1e6  # no joint value in any unit; a chosen limit


Pose = Literal["XYZ_ROT6D", "XYZ_ROTVEC"]
Statistics = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class CameraMetadata:
    """Resolution and rate that training saw."""

    width: int
    height: int
    fps: float


@dataclass(frozen=True)
class EmbodimentMetadata:
    """One embodiment's entry. Statistics are float64 (D,), by key (`state.single_arm`, `action.gripper`, ...) and name (`min`, `q99`, ...)."""

    tag: str
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    cameras: Mapping[str, CameraMetadata]  # by key: `video.webcam`
    unsupported: Mapping[str, str] = field(default_factory=dict)  # by key: what `modalities` says of the part that is not computed here

    def width_of(self, key: str) -> int:
        """Number of dimensions of a state or action part."""
        return len(self.statistics[key]["min"])


@dataclass(frozen=True)
class PictureSettings:
    """How a frame becomes the picture that the network's processor gets.

    letterbox: padded to a square first. albumentations: area averaging, crop by `crop_fraction`, shorter side `edge`; else torchvision's bilinear,
    crop to `crop_size`, size `target_size`, both (height, width).
    """

    letterbox: bool
    albumentations: bool
    edge: int
    crop_fraction: float
    crop_size: tuple[int, int] | None
    target_size: tuple[int, int] | None


@dataclass(frozen=True)
class StatePart:
    """name without prefix; width D; mode: what the values become. low and high, or mean and deviation, float64 (D,); none for sin_cos."""

    name: str
    width: int
    mode: Literal["min_max", "mean_std", "sin_cos"]
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class ActionPart:
    """name without prefix; width D. low and high, or mean and deviation, float64 (D,), of a relative part (horizon, D).

    reference: the state part that a relative action counts from, None for an absolute one. pose: a relative action that is a pose, composed with the
    reference's; None: it is added.
    """

    name: str
    width: int
    mode: Literal["min_max", "mean_std"]
    low: np.ndarray
    high: np.ndarray
    reference: str | None = None
    pose: Pose | None = None


@dataclass(frozen=True)
class EmbodimentN1d7:
    """One embodiment of an N1.7 checkpoint. Names are without prefix; `statistics` by key (`state.gripper`), float64 (D,)."""

    tag: str
    row: int
    cameras: tuple[str, ...]
    frame_offsets: tuple[int, ...]  # steps before the observation, 0 the observation itself
    state_offsets: tuple[int, ...]
    state: tuple[StatePart, ...]
    action: tuple[ActionPart, ...]
    action_steps: int
    language_key: str
    pictures: PictureSettings
    letterbox: Letterbox
    formalize_language: bool
    clip_state: bool
    exclude_state: bool
    state_dim: int  # padded width of one time step
    statistics: Mapping[str, Statistics]
    action_configs: list[dict[str, Any]] | None = None  # as the file has them

    @property
    def pictures_per_observation(self) -> int:
        return len(self.cameras) * len(self.frame_offsets)


def part_statistics(where: str, values: Mapping[str, Any], dimensions: int = 1) -> dict[str, np.ndarray]:
    """Name -> float64 of one shape, of those in STATISTICS that are there: finite, but for std, which the reference's merging of data sets makes NaN
    for a joint that never moves. Raises ValueError for a part without min and max, and for figures that contradict each other."""
    arrays = {name: np.atleast_1d(np.asarray(values[name])) for name in STATISTICS if name in values}
    if "min" not in arrays or "max" not in arrays:
        raise ValueError(f"{where}: statistics without min and max")
    if not arrays["min"].size:
        raise ValueError(f"{where}: statistics of no values")
    for name, array in arrays.items():
        numbers = array.dtype.kind in "if" and array.shape == arrays["min"].shape and array.ndim == dimensions
        if not numbers or not (np.isfinite(array) | (np.isnan(array) & (name == "std"))).all():
            raise ValueError(f"{where}.{name} is no list of finite numbers of the shape that min has")
        if (np.abs(array) > _LARGEST).any():
            raise ValueError(f"{where}.{name} exceeds {_LARGEST:g}: no joint value")
    if "std" in arrays and (arrays["std"] < 0).any():
        raise ValueError(f"{where}.std is negative")
    slack = _ORDER_SLACK + _ORDER_TOLERANCE * np.maximum(np.abs(arrays["min"]), np.abs(arrays["max"]))
    for low, high, tolerance in (("min", "max", 0.0), ("q01", "q99", 0.0), *((*pair, slack) for pair in _ORDER)):
        if low in arrays and high in arrays and (arrays[low] > arrays[high] + tolerance).any():
            raise ValueError(f"{where}.{low} exceeds {where}.{high}")
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def check_std(where: str, std: np.ndarray) -> np.ndarray:
    """`std` of a part that is normalised with it. Raises CheckpointError where it holds NaN."""
    if np.isnan(std).any():
        raise CheckpointError(
            f"{where} is normalised by mean and std, and its std holds NaN. Expected finite numbers: NVIDIA's merging of data sets writes NaN for a "
            "joint that never moves. Compute the statistics of the data again, and train with them."
        )
    return std
