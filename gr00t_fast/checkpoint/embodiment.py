"""experiment_cfg/metadata.json: what the training data looked like (statistics, camera resolution, frame rate) per embodiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gr00t_fast.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX
from gr00t_fast.errors import CheckpointError, ConfigError, closest, shown

# Row of the per-embodiment weights that each tag selects (NVIDIA's EMBODIMENT_TAG_MAPPING).
EMBODIMENT_ROWS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}
STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
# Smaller ones come first. The tolerance, a share of the larger of |min| and |max|, is for figures that were rounded or estimated; the absolute one
# for a joint that was always 0: quantiles that lerobot estimates from a histogram are then some 1e-14.
_ORDER = (("min", "q01"), ("q99", "max"))
_ORDER_TOLERANCE = 1e-3
_ORDER_SLACK = 1e-6
_LARGEST = 1e6  # no joint value in any unit; a chosen limit


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


def parse_metadata(raw: Mapping[str, Any], tag: str) -> EmbodimentMetadata:
    """Read the entry of `tag`. Raises ConfigError for an unknown tag, CheckpointError for a damaged file."""
    if tag not in raw or tag not in EMBODIMENT_ROWS:  # only what this checkpoint has would help: the other tags are no way out
        usable = [name for name in raw if name in EMBODIMENT_ROWS]
        has = ", ".join(f"--embodiment_tag={name}" for name in usable) or f"none that is known, only {', '.join(raw) or 'nothing'}"
        what = "this checkpoint has no statistics for embodiment_tag" if tag in EMBODIMENT_ROWS else "unknown embodiment_tag"
        raise ConfigError(f"{what} '{tag}'.{closest(tag, usable)} This checkpoint has: {has}.")
    try:
        entry = raw[tag]
        parts = [(kind, part, values) for kind in ("state", "action") for part, values in entry["statistics"][kind].items()]
        statistics = {f"{kind}.{part}": part_statistics(f"{kind}.{part}", values) for kind, part, values in parts}
        told = {(kind, part): entry["modalities"].get(kind, {}).get(part, {}) for kind, part, _ in parts}
        unsupported = {
            f"{kind}.{part}": why
            for (kind, part), told_of_part in told.items()
            if (why := _unsupported(kind, told_of_part, len(statistics[f"{kind}.{part}"]["min"])))
        }
        cameras = {f"video.{name}": _camera(values) for name, values in entry["modalities"]["video"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"experiment_cfg/metadata.json: the entry '{tag}' is incomplete or damaged ({error!r}).") from error
    return EmbodimentMetadata(tag, statistics, cameras, unsupported)


def _unsupported(kind: str, told: Mapping[str, Any], width: int) -> str:
    if kind == "action" and told.get("absolute", True) is not True:
        return f"absolute is {shown(told['absolute'])}, expected true: an arm may not get differences as positions"
    if told.get("rotation_type") is not None:
        return f"rotation_type is {shown(told['rotation_type'])}: rotations are not computed here"
    if told.get("shape", [width]) != [width]:
        return f"shape is {shown(told['shape'])}, but its statistics have {width} values"
    return ""


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


def _camera(values: Mapping[str, Any]) -> CameraMetadata:
    width, height = values["resolution"]
    fps = float(values["fps"])
    fits = min(width, height) >= MIN_FRAME_PX and max(width, height) <= MAX_FRAME_PX and width * height <= MAX_PIXELS
    if not (fits and 0 < fps < float("inf")) or (int(width), int(height)) != (width, height):
        limits = f"{MIN_FRAME_PX} to {MAX_FRAME_PX} each way and at most {MAX_PIXELS} in all"
        raise ValueError(f"camera resolution {width}x{height} at {fps} fps; expected whole pixels, {limits}")
    return CameraMetadata(int(width), int(height), fps)
