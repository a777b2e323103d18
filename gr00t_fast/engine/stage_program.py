"""The three exported stages as one fixed sequence over buffers made beforehand, for runtimes that take addresses: what a CUDA graph can record.

Nothing here allocates, waits or asks the device a question once the buffers are there. The runtime is a function that runs one stage on
named tensors, so that the sequence itself can be tried on a CPU with any other runtime.
Axis alphabet: C cameras, V image tokens, S prompt tokens, H horizon, A padded action width, D width of the transformer, L its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.model import StepTables

VARYING = "tokens"  # how a manifest writes the prompt length
Shape = tuple[int, ...]
RunStage = Callable[[str, Mapping[str, Tensor]], None]  # stage, tensor of each of its inputs and outputs


def stage_shapes(stages: Mapping[str, Mapping[str, Any]], prompt_tokens: int) -> dict[str, dict[str, Shape]]:
    """Stage -> the shape of each of its inputs and outputs, for prompts of one length, from `Manifest.stages`."""
    return {
        stage: {name: tuple(prompt_tokens if size == VARYING else int(size) for size in shape) for name, shape in (*_items(entry),)}
        for stage, entry in stages.items()
    }


def _items(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [*entry["inputs"].items(), *entry["outputs"].items()]


class StageProgram:
    """One inference at one prompt length and step count: `fill`, `enqueue`, then read `actions`."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Shape]], image_tokens: int, tables: StepTables, embedding: Tensor) -> None:
        """shapes: of `stage_shapes`. tables, embedding (vocabulary, width): on the device and in the number format of the stages.

        One buffer per tensor name: what one stage writes, the next reads.
        """
        self._embedding, device, dtype = embedding, embedding.device, embedding.dtype
        self._shapes = shapes
        self._buffers = {name: torch.zeros(shape, dtype=dtype, device=device) for each in shapes.values() for name, shape in each.items()}
        self._ids = torch.zeros(self._buffers["embeddings"].shape[1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(image_tokens, dtype=torch.int64, device=device)
        # each row a tensor of its own: libraries want the alignment of whole allocations
        self._steps = [(tau.clone(), modulation.clone()) for tau, modulation in zip(tables.tau, tables.modulation, strict=True)]
        self._buffers["step_size"].fill_(1.0 / tables.steps)
        # the last step's output lies in either of two buffers, by turns
        self.actions = self._buffers["next_actions" if tables.steps % 2 else "actions"]

    def fill(self, pixel_values: Tensor, input_ids: Tensor, image_positions: Tensor, state: Tensor, noise: Tensor) -> None:
        """pixel_values (1, C, 3, h, w), input_ids (S,), image_positions (V,), state (1, state_dim), noise (1, H, A)."""
        self._buffers["pixel_values"].copy_(pixel_values, non_blocking=True)
        self._ids.copy_(input_ids, non_blocking=True)
        self._positions.copy_(image_positions, non_blocking=True)
        self._buffers["state"].copy_(state, non_blocking=True)
        self._buffers["actions"].copy_(noise, non_blocking=True)

    def enqueue(self, run_stage: RunStage) -> None:
        """Submit the inference: vision, the prompt's rows of the embedding with the image tokens in their places, language, every denoising step."""
        buffers = self._buffers
        run_stage("vision", self._of("vision"))
        torch.index_select(self._embedding, 0, self._ids, out=buffers["embeddings"][0])  # (S, width)
        buffers["embeddings"].index_copy_(1, self._positions, buffers["tokens"])
        run_stage("language", self._of("language"))
        now, later = buffers["actions"], buffers["next_actions"]
        for tau, modulation in self._steps:
            step = {"tau": tau, "modulation": modulation, "actions": now, "next_actions": later}
            run_stage("denoise_step", {**self._of("denoise_step"), **step})
            now, later = later, now

    def _of(self, stage: str) -> dict[str, Tensor]:
        return {name: self._buffers[name] for name in self._shapes[stage]}
