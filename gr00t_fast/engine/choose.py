"""From the words of the command line (`auto`, `cuda`, `bf16`, `eager`) to a device, a number format and an engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from gr00t_fast.base.errors import ConfigError, closest
from gr00t_fast.engine.cuda_graph import check_device, compiled_engine, cuda_graph_engine
from gr00t_fast.engine.eager import PRECISIONS, EagerEngine, Engine
from gr00t_fast.engine.exported import ExportedEngine, OnnxRuntimeEngine, OpenVinoEngine
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.packed import FusedEngine, packing_obstacle
from gr00t_fast.engine.tensorrt import TensorRTEngine
from gr00t_fast.model import Gr00t

log = logging.getLogger(__name__)
# Engines over the torch model, and over exported files, which read no torch weights.
ENGINES: dict[str, Callable[[Gr00t], Engine]] = {
    "eager": EagerEngine,
    "fused": FusedEngine,
    "cuda_graph": cuda_graph_engine,
    "compiled": compiled_engine,
}
EXPORTED: dict[str, type[ExportedEngine]] = {"onnxruntime": OnnxRuntimeEngine, "tensorrt": TensorRTEngine, "openvino": OpenVinoEngine}


def make_engine(name: str, model: Gr00t) -> Engine:
    """An engine over the torch model. Raises ConfigError for another one, or a device or compiler that it cannot use.

    `auto` is `fused` on a CPU where its packed weights work, else `eager`.
    """
    check_engine(name)
    if name not in ("auto", *ENGINES):
        raise ConfigError(f"engine '{name}' needs files besides the torch model: load_policy opens it. Expected one of: {', '.join(ENGINES)}.")
    if name == "auto":
        obstacle = packing_obstacle(model.dtype) if model.device.type == "cpu" else ""
        name = "fused" if model.device.type == "cpu" and not obstacle else "eager"
        if obstacle:
            log.warning("engine 'auto' is 'eager' here, and not 'fused': weights of %s cannot be packed: %s", model.dtype, obstacle)
    return ENGINES[name](model)


def prepare_engine(name: str, device: torch.device) -> Callable[[Gr00t], Engine]:
    """`make_engine` in two parts: the GPU and the compiler are checked now, before weights are read, and what is returned makes the engine.

    Raises ConfigError for a device or compiler that the engine cannot use.
    """
    check_device(name, device)
    return functools.partial(make_engine, name)


def open_engine(name: str, engine_path: str | Path | None, target: Target, device: str, precision: str) -> ExportedEngine:
    """An engine over exported files in `engine_path`, or where exports lie by default: `<checkpoint>/exports/<engine>`.

    Raises EngineError and StaleEngineError, naming the command to run, MissingExtraError, and ConfigError for a device or precision that the
    export does not have.
    """
    directory = target.checkpoint.path / "exports" / name if engine_path is None else Path(engine_path).expanduser()
    return EXPORTED[name](directory, target, device, precision)  # type: ignore[arg-type]


def check_engine(name: str, engine_path: str | Path | None = None) -> None:
    """Raises ConfigError for an unknown name, or a path for an engine that takes none: to be asked before gigabytes are read."""
    known = (*ENGINES, *EXPORTED)
    if name not in ("auto", *known):
        raise ConfigError(f"unknown engine '{name}'.{closest(name, known)} Expected auto or one of: {', '.join(known)}.")
    if engine_path is not None and name not in EXPORTED:
        raise ConfigError(f"engine_path={engine_path} is for an engine with files of its own ({', '.join(EXPORTED)}); engine is '{name}'.")


def select_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    expected = "Expected auto, cuda, cuda:N, cpu or mps."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'.{closest(name, ('auto', 'cuda', 'cpu', 'mps'))} {expected}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{name}' was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs. Use --device=cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device 'mps' was asked for, but torch {torch.__version__} has no MPS here. Use --device=cpu.")
    if device.type not in ("cuda", "cpu", "mps"):
        raise ConfigError(f"device '{name}' is not supported. {expected}")
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16, the format NVIDIA trains and runs in, where the device computes in it; else fp32."""
    if name == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"unknown precision '{name}'.{closest(name, PRECISIONS)} Expected auto or one of: {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # on a CPU without bf16 dot products the conversion costs more than the saved bandwidth
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
