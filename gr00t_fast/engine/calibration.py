"""What calibration found, on the disk: a scale per input of the chosen layers, and the manifest that says which checkpoint, robot and data it is for.

The manifest is that of an export (engine/manifest.py), so a calibration of other weights, statistics or cameras is refused in the same words. Weights
are not in it: they are rounded from the checkpoint when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, describe_files, remedy_for
from gr00t_fast.engine.quantized import InputScale
from gr00t_fast.errors import EngineError

KIND = "fp8"
SCALES_NAME = "scales.safetensors"
PROGRAM = "calibrate.py"
_LARGEST, _SMOOTHING = "largest", "smoothing"


@dataclass(frozen=True)
class Calibration:
    """scales: layer -> how its input is rounded (of the DiT's nothing but the name counts); layers that read one tensor have one InputScale."""

    scales: Mapping[str, InputScale]


def write_calibration(
    directory: Path,
    calibration: Calibration,
    identity: Mapping[str, Any],
    data: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
    flags: Sequence[str],
) -> Manifest:
    """Into a directory that is there. data: what it was calibrated with, a digest of the observations among it; flags: as `Manifest.flags`."""
    groups = {id(scale): name for name, scale in reversed(calibration.scales.items())}  # named after their first layer
    tensors = {}
    for scale in calibration.scales.values():
        group = groups[id(scale)]
        tensors[f"{group}.{_LARGEST}"] = torch.tensor(scale.largest, dtype=torch.float32)
        if scale.smoothing is not None:
            tensors[f"{group}.{_SMOOTHING}"] = scale.smoothing.float().cpu().contiguous()
    save_file(tensors, str(directory / SCALES_NAME))
    manifest = Manifest(
        kind=KIND,
        precision="auto",
        identity=identity,
        shapes={},
        denoising_steps=(),
        stages={},
        files=describe_files(directory),
        versions=versions,
        command=command,
        quantisation={"format": "fp8", "runtime": "torch", "calibration": dict(data)},
        details={"inputs": {name: groups[id(scale)] for name, scale in calibration.scales.items()}},
        program=PROGRAM,
        flags=tuple(flags),
    )
    manifest.write(directory)
    return manifest


def read_calibration(directory: Path, target: Target) -> Calibration:
    """Raises EngineError when there is none in `directory` or it is damaged, and StaleEngineError when it was made for other weights, statistics,
    cameras or data configuration. Every message names the command that makes it."""
    remedy = remedy_for(directory, target, PROGRAM, "--observations=DATASET")
    manifest = check_manifest(directory, KIND, target, remedy)
    try:
        return Calibration(_parsed(manifest, load_file(str(directory / SCALES_NAME))))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{directory} cannot be read ({error!r}). Run: {remedy}") from error


def _parsed(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> dict[str, InputScale]:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is not a calibration."""
    inputs = dict(manifest.details["inputs"])
    scales = {
        group: InputScale(float(tensors[f"{group}.{_LARGEST}"]), tensors.get(f"{group}.{_SMOOTHING}")) for group in dict.fromkeys(inputs.values())
    }
    for group, scale in scales.items():
        positive = scale.smoothing is None or bool((torch.isfinite(scale.smoothing) & (scale.smoothing > 0)).all())
        if not (0 <= scale.largest < float("inf") and positive):
            raise ValueError(f"the scale of {group} is no positive number")
    return {name: scales[group] for name, group in inputs.items()}
