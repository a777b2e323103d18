"""Compile kernels for a GPU that is not there: the same launches, with tensors that have no memory, end in machine code instead of running.

What a launch would be specialised for (dtypes, alignment, strides of one, tile sizes, warps) is what is compiled. The compiler then says what the
interpreter cannot: whether the program is one for that GPU at all, its registers, its shared memory, and what spilled.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.engine.kernels import attention, gemm
from gr00t_fast.engine.kernels.launch import Processor
from gr00t_fast.engine.quantized import Fp8WeightLinear, linear_layers, part_of, with_layers
from gr00t_fast.model import Gr00tN1d5, ModelInputs

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Gpu:
    capability: int
    processor: Processor


# Shared memory that one program may have: CUDA programming guide, table of compute capabilities.
GPUS = {
    "H200": Gpu(90, Processor(132, 227 * 1024)),
    "RTX 4090": Gpu(89, Processor(128, 99 * 1024)),
    "RTX 3090": Gpu(86, Processor(82, 99 * 1024)),
    "RTX 5090": Gpu(120, Processor(170, 99 * 1024)),
    "A100": Gpu(80, Processor(108, 163 * 1024)),
}


@dataclass(frozen=True)
class Compiled:
    name: str
    options: str  # what it was specialised for
    registers: int  # per thread
    stack_bytes: int  # per thread: arrays and spilled registers
    shared_bytes: int  # per program
    ptx: str


@contextlib.contextmanager
def compiling_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """Every kernel launched inside is compiled for `gpu` and added to the list, once per specialisation."""
    found: dict[int, Compiled] = {}
    stand_in = SimpleNamespace(
        get_current_device=lambda: gpu.capability,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", gpu.capability, 32),
    )
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in found:
            found[id(kernel)] = _compiled(kernel, {key: value for key, value in options.items() if key not in ("debug", "instrumentation_mode")})

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (gemm, attention):
        monkeypatch.setattr(module, "processor_of", lambda _: gpu.processor)
    before = driver._active
    driver.set_active(stand_in)
    compiled: list[Compiled] = []
    try:
        yield compiled
    finally:
        driver._active = before
        compiled.extend(found.values())


def _compiled(kernel: Any, options: dict[str, Any]) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"])
    described = ", ".join(f"{key}={value}" for key, value in options.items())
    return Compiled(kernel.metadata.name, described, usage["REG"], usage["STACK"], kernel.metadata.shared, kernel.asm["ptx"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """From a line as ` Function _norm_kernel:\\n  REG:32 STACK:0 SHARED:32 LOCAL:0 ...` of cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [BINARIES / "cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def with_8_bit_steps(model: Gr00tN1d5) -> Gr00tN1d5:
    """As the engine `fp8` runs the denoising steps."""
    return with_layers(model, {name: _eight_bit(layer) for name, layer in linear_layers(model).items() if part_of(name) == "dit"})


def _eight_bit(linear: torch.nn.Linear) -> Fp8WeightLinear:
    """Made without looking at weights, which have no memory here."""
    layer = Fp8WeightLinear.__new__(Fp8WeightLinear)
    torch.nn.Module.__init__(layer)
    layer.out_features, layer.bias = linear.out_features, linear.bias
    layer.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.float8_e4m3fn, device=linear.weight.device))
    layer.register_buffer("weight_scale", torch.empty(linear.out_features, dtype=torch.float32, device=linear.weight.device))
    return layer


def launch_everything(model: Gr00tN1d5, prompt_tokens: int, cameras: int, batch: int = 1) -> None:
    """Every launch of one inference, of a model on the meta device."""
    head, vision = model.config.head, model.config.vision
    images = cameras * vision.tokens
    with torch.device("meta"):
        inputs = ModelInputs(
            torch.empty(batch, cameras, 3, vision.image_size, vision.image_size, dtype=model.dtype),
            torch.empty(batch, prompt_tokens, dtype=torch.int64),
            torch.empty(images, dtype=torch.int64),
            torch.empty(batch, head.state_dim, dtype=model.dtype),
        )
        noise = torch.empty(batch, head.action_horizon, head.action_dim, dtype=model.dtype)
        time = torch.empty(head.dit.width, dtype=model.dtype)
        modulation = torch.empty(head.dit.num_layers + 1, 2, head.dit.width, dtype=model.dtype)
    stages = FusedModel(model, "triton", "triton").stages()
    stages.velocity(noise, stages.prepare(inputs), time, modulation)
