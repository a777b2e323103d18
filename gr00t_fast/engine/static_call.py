"""One inference with every shape fixed and every buffer made beforehand: what a CUDA graph can record, and a CPU can run as it stands.

Everything a call needs is packed into one host buffer, so that there is one upload; the answer is one download. A prompt has its exact length:
nothing is padded or masked, and another instruction of the same length changes contents only.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width, P padded state width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gr00t_fast.engine.base import PolicyInputs
from gr00t_fast.engine.continuation import Continuation, denoise_towards
from gr00t_fast.engine.fused import FusedModel, Stages
from gr00t_fast.model import ModelInputs

_ALIGNMENT_BYTES = 256  # of each part of the packed buffer: what CUDA's own allocations have


@dataclass(frozen=True)
class CallShape:
    """What one recording is good for."""

    frames: tuple[tuple[int, ...], ...]  # (B, H, W, 3) per camera
    prompt_tokens: int
    image_positions: tuple[int, ...]  # in the prompt
    denoising_steps: int
    continuation: Literal["rtc", "prefix"] | None = None  # how a chunk continues another one; None: it begins afresh

    @classmethod
    def of(cls, inputs: PolicyInputs, denoising_steps: int, continuation: Continuation | None = None) -> CallShape:
        frames = tuple(view.shape for view in inputs.frames)
        method = None if continuation is None else continuation.method
        return cls(frames, inputs.input_ids.shape[1], tuple(inputs.image_positions.tolist()), denoising_steps, method)

    @property
    def batch(self) -> int:
        return self.frames[0][0]


class PackedBuffers:
    """Named tensors in one block of memory on the host (pinned, for CUDA) and one on the device."""

    def __init__(self, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        offsets, size = {}, 0
        for name, (dtype, shape) in parts.items():
            offsets[name] = size
            size += _ALIGNMENT_BYTES * math.ceil(math.prod(shape) * dtype.itemsize / _ALIGNMENT_BYTES)
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = dict(_views(self._host, offsets, parts))
        self.device = dict(_views(self._device, offsets, parts))

    def upload(self) -> None:
        """One copy, which returns at once on CUDA."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def _views(block: Tensor, offsets: Mapping[str, int], parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
    for name, (dtype, shape) in parts.items():
        begin = offsets[name]
        yield name, block[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class StaticCall:
    """`fill` writes host memory, `upload` copies it, `compute` makes `actions` from what is on the device, `download` copies them back.
    `compute` always touches the same memory and never waits for the device, so it can be recorded. To be made and used without autograd, but not
    in inference mode, whose tensors autograd refuses when a chunk continues another one."""

    def __init__(self, model: FusedModel, shape: CallShape, stages: Stages | None = None) -> None:
        """`stages`: the model's own, or those compiled."""
        head, batch = model.config.head, shape.batch
        self._model, self.shape = model, shape
        self.stages = stages or model.stages()
        size = (batch, head.action_horizon, head.action_dim)
        continuation = {} if shape.continuation is None else {"known_actions": (torch.float32, size), "known_weights": (torch.float32, size[1:])}
        self._inputs = PackedBuffers(
            {
                **{f"frames{index}": (torch.uint8, frames) for index, frames in enumerate(shape.frames)},
                "input_ids": (torch.int64, (batch, shape.prompt_tokens)),
                "state": (torch.float32, (batch, head.state_dim)),
                "noise": (torch.float32, size),
                **continuation,
            },
            model.device,
        )
        self._image_positions = torch.tensor(shape.image_positions, device=model.device)
        self.tables, self.constants = model.step_tables(shape.denoising_steps), model.constants(self.model_inputs(self.pixels()))
        self.actions = torch.zeros(size, device=model.device)  # fp32 (B, H, A), normalised
        self.answer = torch.zeros(size, pin_memory=model.device.type == "cuda")  # the same on the host

    def fill(self, inputs: PolicyInputs, noise: Tensor, continuation: Continuation | None = None) -> None:
        """Write one observation, its noise, fp32 (B, H, A), and what it continues. Nothing uploaded before may still be under way."""
        host = self._inputs.host
        for index, frames in enumerate(inputs.frames):
            host[f"frames{index}"].numpy()[...] = frames
        host["input_ids"].numpy()[...] = inputs.input_ids
        host["state"].numpy()[...] = inputs.state
        host["noise"].copy_(noise)
        if continuation is not None:
            host["known_actions"].copy_(continuation.actions)
            host["known_weights"].copy_(continuation.weights)

    def upload(self) -> None:
        self._inputs.upload()

    def compute(self) -> None:
        inputs = self.model_inputs(self.pixels())
        self.actions.copy_(self._continued(inputs) if self.shape.continuation else self.stages(inputs, self.constants, self.noise(), self.tables))

    def _continued(self, inputs: ModelInputs) -> Tensor:
        """As EagerEngine with a continuation: normalised actions, fp32."""
        given, condition = self._inputs.device, self.stages.prepare(inputs, self.constants)
        # guidance needs the gradient of the velocity, which kernels and compiled stages need not have
        velocity_of = self._model.velocity if self.shape.continuation == "rtc" else self.stages.velocity

        def velocity(actions: Tensor, step: int) -> Tensor:
            return velocity_of(actions.to(self._model.dtype), condition, self.tables.tau[step], self.tables.modulation[step])

        continuation = Continuation(given["known_actions"], given["known_weights"], self.shape.continuation)
        return denoise_towards(velocity, given["noise"], self.shape.denoising_steps, continuation)

    def model_inputs(self, pixels: Tensor) -> ModelInputs:
        model, given = self._model, self._inputs.device
        return ModelInputs(
            pixel_values=pixels.to(model.dtype),
            input_ids=given["input_ids"],
            image_positions=self._image_positions,
            state=given["state"].to(model.dtype),
        )

    def noise(self) -> Tensor:
        return self._inputs.device["noise"].to(self._model.dtype)  # (B, H, A)

    def pixels(self) -> Tensor:
        """fp32 (B, C, 3, h, w) from the frames on the device."""
        cameras = range(len(self.shape.frames))
        return torch.stack([self._model.to_pixels(self._inputs.device[f"frames{index}"]) for index in cameras], dim=1)

    def download(self) -> None:
        """Start copying the actions to the host; `answer` is complete once the stream has got there."""
        self.answer.copy_(self.actions, non_blocking=True)
