"""What an engine is; the plain one, operation by operation, that others are compared with; and how a chunk continues the one before.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width, P padded state width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.inputs.processor import PolicyInputs
from gr00t_fast.model import Condition, Gr00t, ModelInputs, StepTables
from gr00t_fast.model.action_head import Velocity, integrate

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BATCH = 8  # of engines over the torch model: beyond, a batch of one camera each computes as long as its parts, on GPUs too
MAX_GUIDANCE_WEIGHT = 5.0  # beta in Black et al. 2025


@dataclass(frozen=True)
class Continuation:
    """What a chunk shall continue: actions fp32 (B, H, A), normalised, and how much each counts: weights fp32 (B, H, A), 0..1."""

    actions: Tensor
    weights: Tensor
    method: Literal["rtc", "prefix"]

    def to(self, device: torch.device) -> Continuation:
        return Continuation(self.actions.to(device), self.weights.to(device), self.method)

    @staticmethod
    def together(parts: Sequence[Continuation | None]) -> Continuation | None:
        """Of one batch, in their order; None when all are. Raises ConfigError for different methods."""
        there = [part for part in parts if part is not None]
        if not there:
            return None
        if len(there) < len(parts) or len({part.method for part in there}) > 1:
            raise ConfigError("calls of one batch: expected a prefix in none or in all of them, of one method.")
        return Continuation(torch.cat([part.actions for part in there]), torch.cat([part.weights for part in there]), there[0].method)

    def item(self, index: int) -> Continuation:
        """Of one item of the batch."""
        return Continuation(self.actions[index : index + 1], self.weights[index : index + 1], self.method)


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
    max_batch: int = 1  # how many observations `run` computes in less time than one after the other
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
    continues = frozenset({"rtc", "prefix"})
    max_batch = MAX_BATCH

    def __init__(self, model: Gr00t) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self._tables: dict[int, StepTables] = {}

    @torch.inference_mode()
    def run(self, inputs: Inputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        head = self.model.head
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device)
        with timer.stage("vision"):
            tokens = self.model.encode_vision(inputs.pixel_values)
        with timer.stage("language"):
            features = self.model.encode_language(inputs, tokens)
        with timer.stage("refine"):
            condition = head.condition(head.refine(features, inputs.key_mask), inputs.state, inputs.key_mask, inputs.image_positions)
        with timer.stage("denoise"):
            if continuation is not None:
                return self._continue(noise, condition, denoising_steps, continuation.to(self.device))
            return head.denoise(noise.to(self.dtype), condition, self.tables(denoising_steps))

    def _continue(self, noise: Tensor, condition: Condition, steps: int, continuation: Continuation) -> Tensor:
        """Outside inference mode, whose tensors autograd refuses: what was made inside is copied (some megabytes, once per call)."""
        tables = self.tables(steps)
        with torch.inference_mode(False), torch.no_grad():
            condition, tau, modulation = _copied(condition), tables.tau.clone(), tables.modulation.clone()

            def velocity(actions: Tensor, step: int) -> Tensor:
                return self.model.head.velocity(actions.to(self.dtype), condition, tau[step], modulation[step])

            return denoise_towards(velocity, noise.clone(), steps, continuation)

    def tables(self, steps: int) -> StepTables:
        """Computed once per step count: changing the number of steps costs one small table, no reload."""
        if steps not in self._tables:
            self._tables[steps] = self.model.head.step_tables(steps)
        return self._tables[steps]


def _copied(condition: Condition) -> Condition:
    cross = [(keys.clone(), values.clone()) for keys, values in condition.cross]
    return Condition(condition.prefix.clone(), cross, None if condition.key_mask is None else condition.key_mask.clone())


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
# Real-time chunking integrates the same velocity in another way. GR00T's flow runs from noise at t = 0 to actions at t = 1 along
# `a_t = (1 - t) noise + t actions`, and the network gives the velocity `v(a_t, t) = E[actions - noise | a_t]`. That is the direction of Black et
# al. 2025 (arXiv 2506.07339, tau = t), so their formulas hold without a change of sign. Derived once more:
#
# * The network's guess of the end is `â = a_t + (1 - t) v`.
# * `noise = (a_t - t actions) / (1 - t)` and the score of p_t is `-E[noise | a_t] / (1 - t)`; eliminating the expectations gives
#   `v = (a_t + (1 - t) score) / t`. Conditioning on known actions Y adds `grad log p(Y | a_t)` to the score, hence `(1 - t) / t` of it to v.
# * With `p(Y | a_t)` taken as normal around â, of variance `r² = (1 - t)² / (t² + (1 - t)²)` (the posterior variance of an action of unit
#   variance), `grad log p(Y | a_t) = (W (Y - â))ᵀ (d â / d a_t) / r²`: a vector-Jacobian product through the network. W weights the rows.
# * Together: `v + w(t) (W (Y - â))ᵀ (d â / d a_t)` with `w = (1 - t) / (t r²) = (t² + (1 - t)²) / (t (1 - t))`, infinite at t = 0 and clipped.
#
# The clip is the paper's beta = 5, and never above the number of Euler steps N: a step moves the end by `w / N` of the gap (where d â / d a_t is
# near the identity), so a larger weight overshoots. At the paper's N = 5 the two are the same.
#
# The cheaper way needs no derivative: at every step the known rows are put back on their own path `(1 - t) noise + t Y`, which the other rows see
# through attention, and on Y at the end.


def prefix_weights(horizon: int, inference_delay: int, execution_horizon: int) -> Tensor:
    """Weights (H,): 1 for the first `inference_delay` rows, 0 from row `execution_horizon` on, falling in between.

    `c (e^c - 1) / (e - 1)` with `c` falling linearly from 1 to 0 (Black et al. 2025; lerobot's prefix_attention_schedule EXP).
    """
    fall = (execution_horizon - torch.arange(horizon, dtype=torch.float32)) / (execution_horizon - inference_delay + 1)
    fall = fall.clamp(0.0, 1.0)
    weights = fall * torch.expm1(fall) / math.expm1(1.0)
    weights[:inference_delay] = 1.0
    return weights


def guidance_weight(t: float, steps: int) -> float:
    """w(t) as derived above, at most lerobot's max_guidance_weight."""
    limit = min(MAX_GUIDANCE_WEIGHT, float(steps))
    return limit if t == 0 else min(limit, (t**2 + (1 - t) ** 2) / (t * (1 - t)))


def denoise_towards(velocity: Velocity, noise: Tensor, steps: int, continuation: Continuation) -> Tensor:
    """Integrate in fp32: noise (B, H, A) -> normalised actions (B, H, A). `velocity` must be differentiable for method "rtc"."""
    noise, known, weights = noise.float(), continuation.actions, continuation.weights

    def guided(actions: Tensor, step: int) -> Tensor:
        t = step / steps
        with torch.enable_grad():
            start = actions.detach().requires_grad_()
            flow = velocity(start, step).float()
            end = start + (1 - t) * flow  # (B, H, A)
        (pull,) = torch.autograd.grad(end, start, weights * (known - end.detach()))
        return flow.detach() + guidance_weight(t, steps) * pull

    def on_path(actions: Tensor, step: int) -> Tensor:
        t = step / steps
        return torch.lerp(actions, (1 - t) * noise + t * known, weights)  # exactly the path where the weight is 1

    if continuation.method == "rtc":
        return integrate(guided, noise, steps)
    actions = integrate(lambda actions, step: velocity(actions, step).float(), noise, steps, before=on_path)
    return torch.lerp(actions, known, weights)
