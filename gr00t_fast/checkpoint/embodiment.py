"""experiment_cfg/metadata.json: what the training data looked like (statistics, camera resolution, frame rate) per embodiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gr00t_fast.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX
from gr00t_fast.errors import CheckpointError, ConfigError, closest, shown
from gr00t_fast.inputs.embodiment import CameraMetadata, EmbodimentMetadata, part_statistics

# Row of the per-embodiment weights that each tag selects (NVIDIA's EMBODIMENT_TAG_MAPPING).
EMBODIMENT_ROWS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}


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


def _camera(values: Mapping[str, Any]) -> CameraMetadata:
    width, height = values["resolution"]
    fps = float(values["fps"])
    fits = min(width, height) >= MIN_FRAME_PX and max(width, height) <= MAX_FRAME_PX and width * height <= MAX_PIXELS
    if not (fits and 0 < fps < float("inf")) or (int(width), int(height)) != (width, height):
        limits = f"{MIN_FRAME_PX} to {MAX_FRAME_PX} each way and at most {MAX_PIXELS} in all"
        raise ValueError(f"camera resolution {width}x{height} at {fps} fps; expected whole pixels, {limits}")
    return CameraMetadata(int(width), int(height), fps)
