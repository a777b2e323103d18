"""experiment_cfg/metadata.json: what the training data looked like (statistics, camera resolution, frame rate) per embodiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX
from gr00t_fast.errors import CheckpointError, ConfigError, closest

# Row of the per-embodiment weights that each tag selects (NVIDIA's EMBODIMENT_TAG_MAPPING).
EMBODIMENT_ROWS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}
_STATISTICS = ("min", "max", "mean", "std", "q01", "q99")


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
        statistics = {
            f"{modality}.{part}": _part_statistics(values)
            for modality in ("state", "action")
            for part, values in entry["statistics"][modality].items()
        }
        cameras = {f"video.{name}": _camera(values) for name, values in entry["modalities"]["video"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"experiment_cfg/metadata.json: the entry '{tag}' is incomplete or damaged ({error!r}).") from error
    return EmbodimentMetadata(tag, statistics, cameras)


def _part_statistics(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {name: np.atleast_1d(np.asarray(values[name], dtype=np.float64)) for name in _STATISTICS if name in values}
    if "min" not in arrays or "max" not in arrays:
        raise ValueError("statistics without min and max")
    if not arrays["min"].size:
        raise ValueError("statistics of no values")
    for name, array in arrays.items():
        if array.shape != arrays["min"].shape or array.ndim != 1 or not np.isfinite(array).all():
            raise ValueError(f"statistic {name} is not {arrays['min'].shape} finite numbers")
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in arrays and high in arrays and (arrays[low] > arrays[high]).any():
            raise ValueError(f"statistic {low} exceeds {high}")
    return arrays


def _camera(values: Mapping[str, Any]) -> CameraMetadata:
    width, height = values["resolution"]
    fps = float(values["fps"])
    fits = min(width, height) >= MIN_FRAME_PX and max(width, height) <= MAX_FRAME_PX and width * height <= MAX_PIXELS
    if not (fits and 0 < fps < float("inf")) or (int(width), int(height)) != (width, height):
        limits = f"{MIN_FRAME_PX} to {MAX_FRAME_PX} each way and at most {MAX_PIXELS} in all"
        raise ValueError(f"camera resolution {width}x{height} at {fps} fps; expected whole pixels, {limits}")
    return CameraMetadata(int(width), int(height), fps)
