"""An ONNX export on ONNX Runtime, on any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.base import PRECISIONS
from gr00t_fast.engine.exported import STAGES, ExportedEngine, check_precision
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, prompt_tokens_of, remedy_for, varying_sizes
from gr00t_fast.errors import ConfigError, EngineError, require

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such type
_ELEMENTS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: _BFLOAT16}
_ERRORS_ONLY = 3


class OnnxRuntimeEngine(ExportedEngine):
    name = "onnxruntime"

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it.

        Raises MissingExtraError without onnxruntime, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or
        cannot run here, ConfigError for a device or precision that it does not have.
        """
        ort = require("onnxruntime", "export")
        if device not in ("auto", "cpu"):
            raise ConfigError(
                f"device '{device}' is not supported by the engine 'onnxruntime', which runs on CPUs. Expected auto or cpu. On a GPU use "
                "--engine=cuda_graph, or --engine=tensorrt."
            )
        remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={'fp32' if precision == 'auto' else precision}")
        manifest = check_manifest(directory, "onnx", target, remedy)
        check_precision(manifest, precision, target.command("to_onnx.py", f"--out={directory}", f"--precision={precision}", "--overwrite"))
        _check_quantisation(manifest, directory)
        super().__init__(OrtStages(ort, directory, manifest, target), directory, manifest, remedy)


class OrtStages:
    """Sessions of the stages, fed with torch tensors in place: nothing is copied on the way in or out."""

    device = torch.device("cpu")

    def __init__(self, ort: ModuleType, directory: Path, manifest: Manifest, target: Target) -> None:
        """Raises EngineError when ONNX Runtime refuses a file."""
        self._dtype, self._stages, self._shapes = PRECISIONS[manifest.precision], manifest.stages, manifest.shapes
        self._sessions = {stage: self._open(ort, directory, stage, manifest.precision, target) for stage in STAGES}
        self._kept: dict[tuple[str, int, tuple[str, ...]], tuple[Tensor, ...]] = {}

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        session = self._sessions[stage]
        binding = session.io_binding()
        for name, value in inputs.items():
            self._bind(binding.bind_input, name, value)
        outputs = self._outputs(stage, prompt_tokens_of(self._stages[stage], inputs, self._shapes) or 0, wanted)
        for name, value in zip(wanted, outputs, strict=True):
            self._bind(binding.bind_output, name, value)
        session.run_with_iobinding(binding)
        return outputs

    def _bind(self, bind: Any, name: str, value: Tensor) -> None:
        bind(name, "cpu", 0, _ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr())

    def _outputs(self, stage: str, tokens: int, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Memory for the outputs: the large ones kept per prompt length, the small ones of denoise_step fresh, since one call feeds the next."""
        if stage == "denoise_step":
            return self._allocate(stage, tokens, wanted)
        key = (stage, tokens, wanted)
        if key not in self._kept:
            self._kept = {kept: outputs for kept, outputs in self._kept.items() if kept[0] != stage}  # one length at a time
            self._kept[key] = self._allocate(stage, tokens, wanted)
        return self._kept[key]

    def _allocate(self, stage: str, tokens: int, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        sizes = varying_sizes(self._shapes, tokens)
        shapes = ([sizes.get(size, size) for size in self._stages[stage]["outputs"][name]] for name in wanted)
        return tuple(torch.empty(shape, dtype=self._dtype) for shape in shapes)

    def _open(self, ort: ModuleType, directory: Path, stage: str, precision: str, target: Target) -> Any:
        path = directory / self._stages[stage]["file"]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = _ERRORS_ONLY
        # threads that spin for work took a third more CPU time, no less wall time, and the control loop and cameras live in this process
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes have no common base
            if precision == "bf16":
                command = target.command("to_onnx.py", f"--out={directory}", "--precision=fp32", "--overwrite")
                advice = f"Its CPU kernels do not compute bf16. Use --engine=eager, or run: {command}"
            else:
                advice = "Install the onnxruntime version that the export names in manifest.json, or export again."
            raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {path}: {error}. {advice}") from error


def _check_quantisation(manifest: Manifest, directory: Path) -> None:
    runtime = (manifest.quantisation or {}).get("runtime", OnnxRuntimeEngine.name)
    if runtime != OnnxRuntimeEngine.name:
        raise EngineError(
            f"the {manifest.quantisation.get('format')} files in {directory} are made for '{runtime}'; ONNX Runtime would run them slower than fp32, "
            f"or not at all. Use --engine={runtime}, or quantise for ONNX Runtime: gr00t-fast quantise --help"
        )
