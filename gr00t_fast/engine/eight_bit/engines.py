"""The engines `fp8` and `int8`: camera frames to actions as one CUDA graph, with the linear layers in 8 bits.

Compiled, because rounding activations costs a kernel per layer where nothing fuses it with what comes before, which is what 8 bits save on a DiT of
50 tokens. With scales from calibration rounding is element-wise, and goes into the kernel of the norm or activation function before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.cuda_graph import CompiledEngine
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.eight_bit.rewrite import Rounding, rewritten
from gr00t_fast.engine.eight_bit.store import Calibration, read_calibration
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.stages import Stages
from gr00t_fast.engine.static_call import RawInputs
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.timing import StageTimer

# Compute capability from which tensor cores have the format, and whose they are.
_NEEDS = {"fp8": ((8, 9), "Ada, Hopper, Blackwell"), "int8": ((8, 0), "Ampere and newer")}
_INSTEAD = {"fp8": "--engine=int8 (8.0 and newer) or --engine=cuda_graph", "int8": "--engine=cuda_graph"}


class EightBitEngine(CompiledEngine):
    """A FrameEngine. `fuse=False` records the layers' kernels one by one, without a compiler: for comparison."""

    device_types = ("cuda",)

    def __init__(self, model: Gr00tN1d5, *frame_functions: Any, calibration: Calibration, fuse: bool = True) -> None:
        """frame_functions: what other engines over frames take after the model. `model` is not needed afterwards: drop it, and the 16-bit weights of
        the rounded layers are free. Raises EngineError for a GPU that lacks the format, or a calibration of another network."""
        check_gpu(calibration.format, model.device)
        self.name, self.compiles, self._calibration = calibration.format, fuse, calibration
        super().__init__(rewritten(model, calibration.scales, Rounding(calibration.format, calibration.per_token)), *frame_functions)

    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        check_call(self._calibration, denoising_steps, goal)
        return super().run(inputs, noise, denoising_steps, timer, goal)

    def run_raw(self, raw: RawInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> np.ndarray:
        """As `FrameEngine.run_raw`. Raises ConfigError for a step count that was not calibrated, or a continuation that needs a gradient."""
        check_call(self._calibration, denoising_steps, goal)
        return super().run_raw(raw, noise, denoising_steps, timer, goal)

    def _make_stages(self) -> Stages:
        stages = super()._make_stages()  # compiled when they are first called
        return stages if self.compiles else self._uncompiled


class EightBitTwin(EagerEngine):
    """The same arithmetic, operation by operation, on any device: what the engines are compared with, and what a CPU can say of their accuracy."""

    continues = False

    def __init__(self, model: Gr00tN1d5, calibration: Calibration, emulated: bool = True) -> None:
        super().__init__(rewritten(model, calibration.scales, Rounding(calibration.format, calibration.per_token, emulated)))
        self.name = f"{calibration.format}_twin"
        self.device, self.dtype = model.device, model.dtype


def prepare(name: str, directory: Path, target: Target, device: torch.device) -> Callable[..., EightBitEngine]:
    """What makes the engine `name` from the model; GPU and calibration are checked here, before weights are read.

    Raises EngineError and StaleEngineError, naming the command to run.
    """
    check_gpu(name, device)
    calibration = read_calibration(directory, name, target)
    return functools.partial(EightBitEngine, calibration=calibration)


def check_gpu(format: str, device: torch.device) -> None:
    """Raises EngineError where `device` is no GPU with tensor cores for `format`."""
    (major, minor), whose = _NEEDS[format]
    needs = f"engine '{format}' needs a CUDA GPU of compute capability {major}.{minor} or newer ({whose})"
    if device.type != "cuda":
        raise EngineError(f"{needs}, but the device is {device}. Use --device=cuda, or --engine=eager; for INT8 on a CPU --engine=openvino.")
    if not has_product(format, device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise EngineError(f"{needs}; {torch.cuda.get_device_name(device)} has {found}. Use {_INSTEAD[format]}.")


def has_product(format: str, device: torch.device) -> bool:
    """Whether torch multiplies in `format` on `device` as fast as it should; elsewhere the product is written out. A CPU's FP8 is emulation too,
    six times as slow as fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _NEEDS[format][0]
    return device.type == "cpu" and format == "int8"


def check_call(calibration: Calibration, steps: int, goal: Goal | None) -> None:
    """Raises ConfigError for a step count that was not calibrated, whose activations the scales may cut off, and for a continuation by gradient:
    rounding has none."""
    if steps not in calibration.denoising_steps:
        known = ", ".join(map(str, calibration.denoising_steps))
        raise ConfigError(
            f"denoising_steps={steps}: the {calibration.format} calibration was made with {known}. Use one of these, or calibrate again with "
            f"export/calibrate.py --denoising_steps {' '.join(map(str, sorted({*calibration.denoising_steps, steps})))}."
        )
    if goal is not None and goal.method != "prefix":
        raise ConfigError(
            f"the engine '{calibration.format}' cannot continue a chunk by '{goal.method}': that needs the network's gradient. "
            "Use --smoothing=prefix (or none, ensemble), or --engine=cuda_graph."
        )
