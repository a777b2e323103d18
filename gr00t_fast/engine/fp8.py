"""The engine `fp8`: the fused model with linear layers in 8 bits, as one CUDA graph.

It is compiled, as the engine `compiled` is: rounding activations costs a kernel per layer where nothing fuses it with what comes before; with scales
from calibration it is element-wise, and goes into the kernel of the norm or activation function before it. A denoising step reads weights and
computes little: its products read 8-bit weights and multiply in 16 bits (engine/fp8_kernel.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from gr00t_fast.engine.calibration import Calibration, read_calibration
from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.fused import compiled, fused_model
from gr00t_fast.engine.graph import GraphEngine
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.quantized import round_layers
from gr00t_fast.errors import EngineError
from gr00t_fast.model import Gr00t

NAME = "fp8"
_CAPABILITY = (8, 9)  # from which tensor cores have the format


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
