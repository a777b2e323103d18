"""An ONNX export on ONNX Runtime: on any CPU, and on CUDA where the installed package has that provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.device import PRECISIONS, select_device
from gr00t_fast.engine.exported import STAGES, ExportedEngine, check_precision
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, prompt_tokens_of, remedy_for, varying_sizes
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.optional import require

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such type
_ELEMENTS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: _BFLOAT16}
_ERRORS_ONLY = 3  # it warns of nodes that it places on the CPU on purpose


class OnnxRuntimeEngine(ExportedEngine):
    name = "onnxruntime"

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it.

        Raises MissingExtraError without onnxruntime, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or
        cannot run here, ConfigError for a device or precision that it does not have.
        """
        ort = require("onnxruntime", "export")
        where, provider = choose_provider(ort, device)
        remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={'fp32' if precision == 'auto' else precision}")
        manifest = check_manifest(directory, "onnx", target, remedy)
        check_precision(manifest, precision, target.command("to_onnx.py", f"--out={directory}", f"--precision={precision}", "--overwrite"))
        _check_quantisation(manifest, directory)
        super().__init__(OrtStages(ort, directory, manifest, where, provider, target), directory, manifest, remedy)


class OrtStages:
    """Sessions of the stages, fed with torch tensors in place: nothing is copied on the way in or out."""

    def __init__(self, ort: ModuleType, directory: Path, manifest: Manifest, device: torch.device, provider: str, target: Target) -> None:
        """Raises EngineError when ONNX Runtime refuses a file or the provider does not start."""
        self.device = device
        self._dtype, self._stages, self._shapes = PRECISIONS[manifest.precision], manifest.stages, manifest.shapes
        self._options = {} if provider == _CPU else {"device_id": str(device.index or 0)}
        self._sessions = {stage: self._open(ort, directory, stage, provider, manifest.precision, target) for stage in STAGES}
        self._kept: dict[tuple[str, int, tuple[str, ...]], tuple[Tensor, ...]] = {}

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        session = self._sessions[stage]
        binding = session.io_binding()
        for name, value in inputs.items():
            self._bind(binding.bind_input, name, value)
        outputs = self._outputs(stage, prompt_tokens_of(self._stages[stage], inputs, self._shapes) or 0, wanted)
        for name, value in zip(wanted, outputs, strict=True):
            self._bind(binding.bind_output, name, value)
        if self.device.type == "cuda":  # its kernels run on a stream of their own
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)
        return outputs

    def _bind(self, bind: Any, name: str, value: Tensor) -> None:
        bind(name, self.device.type, self.device.index or 0, _ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr())

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
        return tuple(torch.empty(shape, dtype=self._dtype, device=self.device) for shape in shapes)

    def _open(self, ort: ModuleType, directory: Path, stage: str, provider: str, precision: str, target: Target) -> Any:
        path = directory / self._stages[stage]["file"]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = _ERRORS_ONLY
        # threads that spin for work took a third more CPU time, no less wall time, and the control loop and cameras live in this process
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, self._options), *([] if provider == _CPU else [_CPU])])
        except Exception as error:  # its exception classes have no common base
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot open {path}: {error}. {_advice(provider, precision, directory, target)}"
            ) from error
        if provider not in session.get_providers():  # it falls back silently when a library of the provider does not load
            raise EngineError(
                f"ONNX Runtime {ort.__version__} has {provider}, but it did not start here (it runs on {', '.join(session.get_providers())}): CUDA "
                "or cuDNN is missing or of another version. Install what that version of onnxruntime-gpu needs, or use --device=cpu."
            )
        return session


def choose_provider(ort: ModuleType, device: str) -> tuple[torch.device, str]:
    """`auto` takes the GPU where torch and ONNX Runtime both can. Raises ConfigError and EngineError for a device that they cannot use."""
    there = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if _CUDA in there and torch.cuda.is_available() else "cpu"
    where = select_device(device)
    if where.type == "cpu":
        return where, _CPU
    if where.type != "cuda":
        raise ConfigError(f"device '{device}' is not supported by this engine. Expected auto, cpu, cuda or cuda:N.")
    if _CUDA not in there:
        raise EngineError(
            f"the installed onnxruntime {ort.__version__} has no {_CUDA} (it has {', '.join(there)}). Install onnxruntime-gpu in its place, "
            "or use --engine=onnxruntime --device=cpu."
        )
    return where, _CUDA


def _check_quantisation(manifest: Manifest, directory: Path) -> None:
    runtime = (manifest.quantisation or {}).get("runtime", OnnxRuntimeEngine.name)
    if runtime != OnnxRuntimeEngine.name:
        raise EngineError(
            f"the {manifest.quantisation.get('format')} files in {directory} are made for '{runtime}'; ONNX Runtime would run them slower than fp32, "
            f"or not at all. Use --engine={runtime}, or quantise for ONNX Runtime: gr00t-fast quantise --help"
        )


def _advice(provider: str, precision: str, directory: Path, target: Target) -> str:
    if provider == _CPU and precision == "bf16":
        command = target.command("to_onnx.py", f"--out={directory}", "--precision=fp32", "--overwrite")
        return f"Its CPU kernels do not compute bf16. Use --engine=eager, or run: {command}"
    return "Install the onnxruntime version that the export names in manifest.json, or export again."
