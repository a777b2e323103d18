"""What an engine is; the plain one, operation by operation, that others are compared with; and how a chunk continues the one before.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width, P padded state width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.inputs.processor import PolicyInputs
from gr00t_fast.model import Condition, Gr00t, ModelInputs, StepTables
from gr00t_fast.model.action_head import Velocity, euler_step, integrate

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BATCH = 8  # of engines over the torch model: beyond, a batch of one camera each computes as long as its parts, on GPUs too


@dataclass(frozen=True)
class Continuation:
    """What a chunk shall continue: actions fp32 (B, H, A), normalised, and how much each counts: weights fp32 (B, H, A), 0..1."""

    actions: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Continuation:
        return Continuation(self.actions.to(device), self.weights.to(device))

    @staticmethod
    def together(parts: Sequence[Continuation]) -> Continuation:
        """Those of one batch, in their order."""
        return Continuation(torch.cat([part.actions for part in parts]), torch.cat([part.weights for part in parts]))

    def item(self, index: int) -> Continuation:
        """That of one item of the batch."""
        return Continuation(self.actions[index : index + 1], self.weights[index : index + 1])


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
    continues: bool = False  # whether `run` takes a Continuation
    max_batch: int = 1  # how many observations `run` computes in less time than one after the other
    equal_prompts: bool = False  # whether only those with prompts of one length
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


class EagerEngine(Engine):
    name = "eager"
    continues = True
    max_batch = MAX_BATCH

    def __init__(self, model: Gr00t) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self._tables: dict[int, StepTables] = {}

    @torch.inference_mode()
    def run(self, inputs: Inputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device)
        with timer.stage("vision"):
            tokens = self.vision(inputs)
        with timer.stage("language"):
            features = self.language(inputs, tokens)
        with timer.stage("refine"):
            condition = self.condition(inputs, features)
        with timer.stage("denoise"):
            velocity = self.tables(denoising_steps).at_each(self.velocity, condition)
            if continuation is None:
                return integrate(velocity, noise.to(self.dtype), denoising_steps)
            return denoise_towards(velocity, noise, denoising_steps, continuation.to(self.device))

    # Stages, which a faster form of the network replaces; arguments and results as of Gr00t and ActionHead.

    def vision(self, inputs: ModelInputs) -> Tensor:
        return self.model.encode_vision(inputs.pixel_values)

    def language(self, inputs: ModelInputs, tokens: Tensor) -> Tensor:
        return self.model.encode_language(inputs, tokens)

    def condition(self, inputs: ModelInputs, features: Tensor) -> Condition:
        head = self.model.head
        return head.condition(head.refine(features, inputs.key_mask), inputs.state, inputs.key_mask, inputs.image_positions)

    def velocity(self, actions: Tensor, condition: Condition, tau: Tensor, modulation: Tensor) -> Tensor:
        return self.model.head.velocity(actions, condition, tau, modulation)

    def step_tables(self, steps: int) -> StepTables:
        return self.model.head.step_tables(steps)

    def tables(self, steps: int) -> StepTables:
        """Computed once per step count: changing the number of steps costs one small table, no reload."""
        if steps not in self._tables:
            self._tables[steps] = self.step_tables(steps)
        return self._tables[steps]


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


# --- chunks that continue another one
#
# GR00T's flow runs from noise at t = 0 to actions at t = 1 along `(1 - t) noise + t actions`. After every step the known rows are put back on their
# own path, by their weights, which ends at the known actions; the other rows see them through attention. That needs no derivative, so that every
# engine and export has it. Guidance (real-time chunking, with the network's gradient or the identity in its place) and SEAM were measured beside it:
# DECISIONS.md, Control.


def prefix_weights(horizon: int, inference_delay: int, execution_horizon: int) -> Tensor:
    """Weights (H,): 1 for the first `inference_delay` rows, 0 from row `execution_horizon` on, falling in between.

    `c (e^c - 1) / (e - 1)` with `c` falling linearly from 1 to 0 (Black et al. 2025; lerobot's prefix_attention_schedule EXP).
    """
    fall = (execution_horizon - torch.arange(horizon, dtype=torch.float32)) / (execution_horizon - inference_delay + 1)
    fall = fall.clamp(0.0, 1.0)
    weights = fall * torch.expm1(fall) / math.expm1(1.0)
    weights[:inference_delay] = 1.0
    return weights


def denoise_towards(velocity: Velocity, noise: Tensor, steps: int, continuation: Continuation) -> Tensor:
    """Integrate in fp32: noise (B, H, A) -> normalised actions (B, H, A)."""
    actions = noise = noise.float()
    for step in range(steps):
        t = (step + 1) / steps
        moved = euler_step(actions, velocity(actions, step).float(), 1.0 / steps)
        actions = torch.lerp(moved, (1 - t) * noise + t * continuation.actions, continuation.weights)  # exactly the path where the weight is 1
    return actions
