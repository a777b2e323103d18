"""An export on OpenVINO: the fastest way to run on a CPU, in 8 bits above all.

Runs what `gr00t-fast quantise --target=openvino` makes, and fp32 ONNX exports as they are. What goes in and out of the stages is fp32; the number
format of the arithmetic (of layers that are not in 8 bits) is chosen when the export is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.engine.exported import STAGES, ExportedEngine
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, read_manifest, remedy_for
from gr00t_fast.errors import ConfigError, EngineError, require

KIND = "openvino"
_ARITHMETIC = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}  # names in the device property OPTIMIZATION_CAPABILITIES


class OpenVinoEngine(ExportedEngine):
    name = "openvino"

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it. `precision`: of the arithmetic; `auto` is bf16 where this CPU computes in it, else fp32.

        Raises MissingExtraError without openvino, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or not
        for this runtime, ConfigError for a device or precision that it does not have.
        """
        openvino = require("openvino", "openvino")
        if device not in ("auto", "cpu"):
            raise ConfigError(f"device '{device}' is not supported by the engine 'openvino'. Expected auto or cpu.")
        remedy = remedy_for(directory, target, "to_onnx.py", "--precision=fp32")  # one command; INT8 needs this one first
        kind = read_manifest(directory, remedy).kind
        manifest = check_manifest(directory, "onnx" if kind == "onnx" else KIND, target, remedy)
        _check_runnable(manifest, directory, target)
        core = openvino.Core()
        arithmetic = choose_arithmetic(precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        super().__init__(OpenVinoStages(openvino, core, directory, manifest, arithmetic, remedy), directory, manifest, remedy)
        self.precision = self.precision or arithmetic


class OpenVinoStages:
    """One compiled model and one inference request per stage; torch tensors are read in place."""

    device = torch.device("cpu")

    def __init__(self, openvino: ModuleType, core: Any, directory: Path, manifest: Manifest, arithmetic: str, remedy: str) -> None:
        """Raises EngineError when OpenVINO refuses a file."""
        self._openvino = openvino
        self._options = {
            "INFERENCE_PRECISION_HINT": _ARITHMETIC[arithmetic],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,  # one observation at a time: all threads work on it
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._requests = {stage: self._open(core, directory / manifest.stages[stage]["file"], remedy) for stage in STAGES}

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        request = self._requests[stage]
        for name, value in inputs.items():  # they outlive the call, and with it the request's view of them
            request.set_tensor(name, self._openvino.Tensor(value.detach().numpy(), shared_memory=True))
        request.infer()
        outputs = tuple(torch.from_numpy(request.get_tensor(name).data) for name in wanted)
        # large outputs may stay where the request has them; a step's are the next step's inputs
        return tuple(output.clone() for output in outputs) if stage == "denoise_step" else outputs

    def _open(self, core: Any, path: Path, remedy: str) -> Any:
        try:
            return core.compile_model(core.read_model(str(path)), "CPU", self._options).create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO {self._openvino.__version__} cannot open {path}: {error}. Run: {remedy}") from error


def choose_arithmetic(precision: str, capabilities: list[str]) -> str:
    """`precision` of the command line to fp32, bf16 or fp16. Raises ConfigError for one that this CPU does not compute in."""
    able = [name for name, capability in _CAPABILITY.items() if capability in capabilities]
    if precision == "auto":
        return "bf16" if "bf16" in able else "fp32"
    if precision not in able:
        raise ConfigError(f"--precision={precision}: OpenVINO computes in {', '.join(able)} on this CPU. Expected auto or one of these.")
    return precision


def _check_runnable(manifest: Manifest, directory: Path, target: Target) -> None:
    runtime = (manifest.quantisation or {}).get("runtime", KIND)
    if runtime != KIND:
        flags = ("--target=openvino", "--onnx=<fp32 export>", "--observations=<data set>", "--out=<directory>")
        raise EngineError(
            f"the {manifest.quantisation.get('format')} files in {directory} are made for '{runtime}'. Use --engine={runtime}, or quantise for "
            f"OpenVINO: {target.command('quantise.py', *flags)}"
        )
    if manifest.precision != "fp32":
        raise EngineError(
            f"{directory} holds a {manifest.precision} export; OpenVINO runs fp32 ones, in the arithmetic that --precision names. Run: "
            f"{target.command('to_onnx.py', f'--out={directory}', '--precision=fp32', '--overwrite')}"
        )
