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

from gr00t_fast.engine.eight_bit.linear import FORMATS, InputScale
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, describe_files, remedy_for
from gr00t_fast.errors import EngineError

KIND = "eight_bit"
SCALES_NAME = "scales.safetensors"
PROGRAM = "calibrate.py"
_LARGEST, _SMOOTHING = "largest", "smoothing"


@dataclass(frozen=True)
class Calibration:
    """scales: layer -> how its input is rounded; layers that read one tensor have one InputScale. denoising_steps: the counts it was made with."""

    format: str
    per_token: bool
    scales: Mapping[str, InputScale]
    denoising_steps: tuple[int, ...]


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
        denoising_steps=calibration.denoising_steps,
        stages={},
        files=describe_files(directory),
        versions=versions,
        command=command,
        quantisation={"format": calibration.format, "runtime": "torch", "per_token": calibration.per_token, "calibration": dict(data)},
        details={"inputs": {name: groups[id(scale)] for name, scale in calibration.scales.items()}},
        program=PROGRAM,
        flags=tuple(flags),
    )
    manifest.write(directory)
    return manifest


def read_calibration(directory: Path, format: str, target: Target) -> Calibration:
    """Raises EngineError when there is none for `format` in `directory` or it is damaged, and StaleEngineError when it was made for other weights,
    statistics, cameras or data configuration. Every message names the command that makes it."""
    remedy = remedy_for(directory, target, PROGRAM, f"--format={format}", "--calibration=DATASET")
    manifest = check_manifest(directory, KIND, target, remedy)
    found = manifest.quantisation or {}
    if found.get("format") != format:
        own = directory.parent / format
        raise EngineError(
            f"{directory} holds a calibration for {found.get('format')}, expected {format}. Run it with --engine={found.get('format')}, or: "
            f"{target.command(PROGRAM, f'--out={own}', f'--format={format}', '--calibration=DATASET')}"
        )
    try:
        return _parsed(manifest, load_file(str(directory / SCALES_NAME)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{directory} cannot be read ({error!r}). Run: {remedy}") from error


def _parsed(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Calibration:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is not a calibration."""
    inputs, told = dict(manifest.details["inputs"]), manifest.quantisation
    scales = {
        group: InputScale(float(tensors[f"{group}.{_LARGEST}"]), tensors.get(f"{group}.{_SMOOTHING}")) for group in dict.fromkeys(inputs.values())
    }
    for group, scale in scales.items():
        positive = scale.smoothing is None or bool((torch.isfinite(scale.smoothing) & (scale.smoothing > 0)).all())
        if not (0 <= scale.largest < float("inf") and positive):
            raise ValueError(f"the scale of {group} is no positive number")
    if told["format"] not in FORMATS or not isinstance(told["per_token"], bool):
        raise ValueError("format or per_token")
    return Calibration(told["format"], told["per_token"], {name: scales[group] for name, group in inputs.items()}, tuple(manifest.denoising_steps))
