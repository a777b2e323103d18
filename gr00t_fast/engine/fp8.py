"""The engine `fp8`, and calibrations on the disk.

The fused model with linear layers in 8 bits (engine/quantized.py), as one CUDA graph. It is compiled, as the engine `compiled` is: rounding
activations costs a kernel per layer where nothing fuses it with what comes before; with scales from calibration it is element-wise, and goes into the
kernel of the norm or activation function before it. A denoising step reads weights and computes little: its products read 8-bit weights and multiply
in 16 bits (engine/fp8_kernel.py).

A calibration is a scale per input of the chosen layers, and a manifest as of an export (engine/manifest.py), so one of other weights, statistics or
cameras is refused in the same words. Weights are not in it: they are rounded from the checkpoint when it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr00t_fast.engine.cuda_graph import GraphEngine, check_compiler, compiled
from gr00t_fast.engine.fused import fused_model
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, describe_files, remedy_for
from gr00t_fast.engine.quantized import InputScale, round_layers
from gr00t_fast.errors import EngineError
from gr00t_fast.model import Gr00t

NAME = KIND = "fp8"
_CAPABILITY = (8, 9)  # from which tensor cores have the format
SCALES_NAME = "scales.safetensors"
PROGRAM = "calibrate.py"
_LARGEST, _SMOOTHING = "largest", "smoothing"


def prepare(name: str, directory: Path, target: Target, device: torch.device) -> Callable[..., GraphEngine]:
    """What makes the engine from the model; GPU and calibration are checked here, before weights are read.

    Raises EngineError and StaleEngineError, naming the command to run.
    """
    check_gpu(device)
    check_compiler(NAME, device.type)
    return functools.partial(fp8_engine, calibration=read_calibration(directory, target))


def fp8_engine(model: Gr00t, calibration: Calibration) -> GraphEngine:
    """`model` itself gets 8-bit layers, one after the other, so that its 16-bit weights are never held beside all of the 8-bit ones.

    Raises EngineError for a GPU that lacks the format, or a calibration of another network; MissingExtraError without triton, ConfigError without a
    C compiler.
    """
    check_gpu(model.device)
    check_compiler(NAME, model.device.type)
    round_layers(model, calibration.scales)
    fused = fused_model(model)
    engine = GraphEngine(NAME, fused, compiled(fused.stages()), frozenset({"prefix"}))
    engine.precision = NAME
    return engine


def check_gpu(device: torch.device) -> None:
    """Raises EngineError where `device` is no GPU with tensor cores for FP8."""
    needs = "engine 'fp8' needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise EngineError(f"{needs}, but the device is {device}. Use --device=cuda, or --engine=eager; for INT8 on a CPU --engine=openvino.")
    if not has_product(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise EngineError(f"{needs}; {torch.cuda.get_device_name(device)} has {found}. Use --engine=cuda_graph, or --engine=tensorrt with INT8.")


def has_product(device: torch.device) -> bool:
    """Whether torch multiplies in FP8 on `device` as fast as it should; elsewhere the product is written out. A CPU's is emulation too, six times as
    slow as fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


# --- on the disk


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
