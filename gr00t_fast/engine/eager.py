"""The plain model, operation by operation: the truth that other engines are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from gr00t_fast.engine.continuation import Goal, Velocity, denoise_towards
from gr00t_fast.model import Condition, Gr00tN1d5, ModelInputs, StepTables
from gr00t_fast.timing import StageTimer


class EagerEngine:
    name = "eager"
    continues = True

    def __init__(self, model: Gr00tN1d5) -> None:
        self.model = model
        self._tables: dict[int, StepTables] = {}

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        head = self.model.head
        with timer.stage("vision"):
            tokens = self.model.encode_vision(inputs.pixel_values)
        with timer.stage("language"):
            features = self.model.encode_language(inputs, tokens)
        with timer.stage("refine"):
            condition = head.condition(head.refine(features, inputs.key_mask), inputs.state, inputs.key_mask)
        with timer.stage("denoise"):
            if goal is not None:
                return self._continue(noise, condition, denoising_steps, goal)
            return head.denoise(noise.to(self.model.dtype), condition, self.tables(denoising_steps))

    def _continue(self, noise: Tensor, condition: Condition, steps: int, goal: Goal) -> Tensor:
        """Outside inference mode, whose tensors autograd refuses: what was made inside is copied (some megabytes, once per call)."""
        tables = self.tables(steps)
        with torch.inference_mode(False), torch.no_grad():
            velocity = self._velocity(_copied(condition), StepTables(tables.tau.clone(), tables.modulation.clone()))
            return denoise_towards(velocity, noise.clone(), steps, goal)

    def _velocity(self, condition: Condition, tables: StepTables) -> Velocity:
        def velocity(actions: Tensor, step: int) -> Tensor:
            return self.model.head.velocity(actions.to(self.model.dtype), condition, tables.tau[step], tables.modulation[step])

        return velocity

    def tables(self, steps: int) -> StepTables:
        """Computed once per step count: changing the number of steps costs one small table, no reload."""
        if steps not in self._tables:
            self._tables[steps] = self.model.head.step_tables(steps)
        return self._tables[steps]

    def synchronise(self) -> None:
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _copied(condition: Condition) -> Condition:
    cross = [(keys.clone(), values.clone()) for keys, values in condition.cross]
    return Condition(condition.prefix.clone(), cross, None if condition.key_mask is None else condition.key_mask.clone())
