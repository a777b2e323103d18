"""An export on ONNX Runtime, on any CPU; or on OpenVINO, the fastest way to run on a CPU, in 8 bits above all.

OpenVINO runs what `gr00t-fast quantise --target=openvino` makes, and fp32 ONNX exports as they are. What goes in and out of its stages is fp32; the
number format of the arithmetic (of layers that are not in 8 bits) is chosen when the export is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.engine.exported import ExportedEngine, check_precision
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, read_manifest, remedy_for
from gr00t_fast.errors import ConfigError, EngineError, require

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
_ERRORS_ONLY = 3
_FORMATS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # OpenVINO's words; in its device property OPTIMIZATION_CAPABILITIES ours, in capitals


class OnnxRuntimeEngine(ExportedEngine):
    name = ONNXRUNTIME

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it.

        Raises MissingExtraError without onnxruntime, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or
        cannot run here, ConfigError for a device or precision that it does not have.
        """
        ort = require("onnxruntime", "export")
        _check_device(self.name, device)
        remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={'fp32' if precision == 'auto' else precision}")
        manifest = check_manifest(directory, "onnx", target, remedy)
        check_precision(manifest, precision, target.command("to_onnx.py", f"--out={directory}", f"--precision={precision}", "--overwrite"))
        _check_runnable(self.name, manifest, directory, target, ("fp32", "fp16"))
        super().__init__(OrtStages(ort, directory, manifest, remedy), directory, manifest, remedy)


class OrtStages:
    """A session per stage; torch tensors are read in place."""

    device = torch.device("cpu")

    def __init__(self, ort: ModuleType, directory: Path, manifest: Manifest, remedy: str) -> None:
        """Raises EngineError when ONNX Runtime refuses a file."""
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = _ERRORS_ONLY
        # threads that spin for work took a third more CPU time, no less wall time, and the control loop and cameras live in this process
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions = {}
        for stage, file in manifest.stage_files.items():
            path = directory / file
            try:
                self._sessions[stage] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its exception classes have no common base
                advice = f"Install the onnxruntime version that the export names in manifest.json, or run: {remedy}"
                raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {path}: {error}. {advice}") from error

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        arrays = {name: value.detach().numpy() for name, value in inputs.items()}
        return tuple(map(torch.from_numpy, self._sessions[stage, batch].run(wanted, arrays)))


class OpenVinoEngine(ExportedEngine):
    name = OPENVINO

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it. `precision`: of the arithmetic; `auto` is bf16 where this CPU computes in it, else fp32.

        Raises MissingExtraError without openvino, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or not
        for this runtime, ConfigError for a device or precision that it does not have.
        """
        openvino = require("openvino", "openvino")
        _check_device(self.name, device)
        remedy = remedy_for(directory, target, "to_onnx.py", "--precision=fp32")  # one command; INT8 needs this one first
        kind = read_manifest(directory, remedy).kind
        manifest = check_manifest(directory, "onnx" if kind == "onnx" else OPENVINO, target, remedy)
        _check_runnable(self.name, manifest, directory, target, ("fp32",))
        core = openvino.Core()
        arithmetic = choose_arithmetic(precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        super().__init__(OpenVinoStages(openvino, core, directory, manifest, arithmetic, remedy), directory, manifest, remedy)
        self.precision = self.precision or arithmetic


class OpenVinoStages:
    """One compiled model and one inference request per stage; torch tensors are read in place."""

    device = torch.device("cpu")

    def __init__(self, openvino: ModuleType, core: Any, directory: Path, manifest: Manifest, arithmetic: str, remedy: str) -> None:
        """Raises EngineError when OpenVINO refuses a file."""
        self._openvino, self._requests = openvino, {}
        options = {
            "INFERENCE_PRECISION_HINT": _FORMATS[arithmetic],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,  # one observation at a time: all threads work on it
            "PERFORMANCE_HINT": "LATENCY",
        }
        for stage, file in manifest.stage_files.items():
            path = directory / file
            try:
                self._requests[stage] = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
            except RuntimeError as error:
                raise EngineError(f"OpenVINO {openvino.__version__} cannot open {path}: {error}. Run: {remedy}") from error

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        request = self._requests[stage, batch]
        for name, value in inputs.items():  # they outlive the call, and with it the request's view of them
            request.set_tensor(name, self._openvino.Tensor(value.detach().numpy(), shared_memory=True))
        request.infer()
        outputs = tuple(torch.from_numpy(request.get_tensor(name).data) for name in wanted)
        # large outputs may stay where the request has them; a step's are the next step's inputs
        return tuple(output.clone() for output in outputs) if stage == "denoise_step" else outputs


def choose_arithmetic(precision: str, capabilities: list[str]) -> str:
    """`precision` of the command line to fp32, bf16 or fp16. Raises ConfigError for one that this CPU does not compute in."""
    able = [name for name in _FORMATS if name.upper() in capabilities]
    if precision == "auto":
        return "bf16" if "bf16" in able else "fp32"
    if precision not in able:
        raise ConfigError(f"--precision={precision}: OpenVINO computes in {', '.join(able)} on this CPU. Expected auto or one of these.")
    return precision


def _check_device(name: str, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ConfigError(
            f"device '{device}' is not supported by the engine '{name}', which runs on CPUs. Expected auto or cpu. On a GPU use "
            "--engine=cuda_graph, or --engine=tensorrt."
        )


def _check_runnable(name: str, manifest: Manifest, directory: Path, target: Target, precisions: tuple[str, ...]) -> None:
    """Raises EngineError for files that are quantised for another runtime, or in a number format that this one does not run."""
    quantisation = manifest.quantisation or {}
    runtime = quantisation.get("runtime", name)
    if runtime != name:
        flags = (f"--target={name}", "--onnx=<fp32 export>", "--observations=<data set>", "--out=<directory>")
        raise EngineError(
            f"the {quantisation.get('format')} files in {directory} are made for '{runtime}'. Use --engine={runtime}, or quantise for this engine: "
            f"{target.command('quantise.py', *flags)}"
        )
    if manifest.precision not in precisions:
        raise EngineError(
            f"{directory} holds a {manifest.precision} export; the engine '{name}' runs {' and '.join(precisions)} ones. Use --engine=eager, or run: "
            f"{target.command('to_onnx.py', f'--out={directory}', '--precision=fp32', '--overwrite')}"
        )
