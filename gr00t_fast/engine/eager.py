"""The plain model, operation by operation: the truth that other engines are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from gr00t_fast.engine.base import Engine, Inputs
from gr00t_fast.engine.continuation import Continuation, denoise_towards
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import Condition, Gr00t, StepTables


class EagerEngine(Engine):
    name = "eager"
    continues = frozenset({"rtc", "prefix"})

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
