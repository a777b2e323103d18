"""The model's forward as five callables, so that each can be compiled, recorded or timed for itself.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.model import Condition, Gr00tN1d5, ModelInputs, StepTables


@dataclass(frozen=True)
class Stages:
    """Signatures are those of the methods of Gr00tN1d5 and ActionHead with the same names."""

    encode_vision: Callable[[Tensor], Tensor]
    encode_language: Callable[[ModelInputs, Tensor], Tensor]
    refine: Callable[[Tensor, Tensor | None], Tensor]
    condition: Callable[[Tensor, Tensor, Tensor | None], Condition]
    velocity: Callable[[Tensor, Condition, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, model: Gr00tN1d5) -> Stages:
        head = model.head
        return cls(model.encode_vision, model.encode_language, head.refine, head.condition, head.velocity)

    def compiled(self, **options: Any) -> Stages:
        """Each through torch.compile, with `options`, when it is first called: one denoising step is compiled once and called N times. Whole graphs
        only: a break would be a launch that nobody asked for."""
        return Stages(*(torch.compile(stage, fullgraph=True, dynamic=False, **options) for stage in vars(self).values()))

    def __call__(self, inputs: ModelInputs, noise: Tensor, tables: StepTables) -> Tensor:
        """As Gr00tN1d5.forward: noise (B, H, A) -> normalised actions (B, H, A)."""
        features = self.encode_language(inputs, self.encode_vision(inputs.pixel_values))  # (B, S, D)
        return self.denoise(noise, self.prepare(features, inputs), tables)

    def prepare(self, features: Tensor, inputs: ModelInputs) -> Condition:
        """All that the denoising steps have in common, from features (B, S, D)."""
        return self.condition(self.refine(features, inputs.key_mask), inputs.state, inputs.key_mask)

    def denoise(self, noise: Tensor, condition: Condition, tables: StepTables) -> Tensor:
        """As ActionHead.denoise."""
        actions = noise
        for step in range(tables.steps):
            actions = actions + self.velocity(actions, condition, tables.tau[step], tables.modulation[step]) * (1.0 / tables.steps)
        return actions
