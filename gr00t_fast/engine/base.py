"""What an engine is, and what goes into one.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width, P padded state width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gr00t_fast.engine.continuation import Continuation
from gr00t_fast.errors import ConfigError
from gr00t_fast.inputs.processor import PolicyInputs
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import ModelInputs

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs(Protocol):
    """What an engine over tensors takes: PolicyInputs, or ModelInputs that are there already."""

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelInputs: ...


@runtime_checkable
class Engine(Protocol):
    """Runs the network for one batch. Stages are timed: `preprocess` (tensors of PolicyInputs), vision, language, refine, denoise, or all as one.

    To derive from it: only `run` has to be written, and the attributes given.
    """

    name: str
    precision: str = ""  # what it computes in, where that is not `dtype`: int8, fp8
    device: torch.device
    dtype: torch.dtype
    continues: frozenset[str] = frozenset()  # methods of Continuation that `run` can do
    warming_up: bool = False  # set by the policy while a first call may take seconds without a warning

    def run(self, inputs: PolicyInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A), of any float type and on any device. With `continuation` a chunk that continues another
        one. `noise` and `continuation` are fp32 on the host. Raises ConfigError for what the engine cannot do."""

    def synchronise(self) -> None:
        """Wait until everything that this thread submitted has finished; nothing to do on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # not the whole GPU, which others may use
        elif self.device.type == "mps":
            torch.mps.synchronize()


def check_own_engine(engine: Any) -> None:
    """Raises ConfigError when an engine of the user's own lacks a part of the protocol."""
    absent = [name for name in ("name", "device", "dtype", "continues", "run", "synchronise") if not hasattr(engine, name)]
    if absent:
        raise ConfigError(
            f"engine: the {type(engine).__name__} given has no {', '.join(absent)}. Derive it from gr00t_fast.engine.Engine, and set what is missing."
        )


def tell_new(log: logging.Logger, engine: Engine, what: str) -> None:
    """Log that `engine` prepares `what` now, as a warning unless it is warming up: a run gets no actions meanwhile."""
    if engine.warming_up:
        log.info("preparing %s for %s", engine.name, what)
    else:
        log.warning("%s meets %s for the first time: no actions until it is prepared. Warm up with the instructions to come.", engine.name, what)


@contextmanager
def warming_up(engine: Engine) -> Iterator[None]:
    """Inside, `engine` prepares what is new to it without a warning."""
    engine.warming_up = True
    try:
        yield
    finally:
        engine.warming_up = False
