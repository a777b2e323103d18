"""The plain model, operation by operation: the truth that other engines are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from gr00t_fast.model import Gr00tN1d5, ModelInputs, StepTables
from gr00t_fast.timing import StageTimer


class EagerEngine:
    name = "eager"

    def __init__(self, model: Gr00tN1d5) -> None:
        self.model = model
        self._tables: dict[int, StepTables] = {}

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer) -> Tensor:
        head = self.model.head
        with timer.stage("vision"):
            tokens = self.model.encode_vision(inputs.pixel_values)
        with timer.stage("language"):
            features = self.model.encode_language(inputs, tokens)
        with timer.stage("refine"):
            condition = head.condition(head.refine(features, inputs.key_mask), inputs.state, inputs.key_mask)
        with timer.stage("denoise"):
            return head.denoise(noise.to(self.model.dtype), condition, self.tables(denoising_steps))

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
