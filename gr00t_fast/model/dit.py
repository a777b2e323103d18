"""The diffusion transformer: velocity of the action tokens, given the robot's state and the vision-language tokens.

Even blocks attend to vision-language tokens, odd blocks to the sequence itself. In N1.5 an even block attends to all of them, in N1.7 to the text or
to the pictures. The time enters through AdaLN (Peebles & Xie 2023) and is known before any observation comes: `modulation` is tabulated for all steps
ahead of the loop.
Axis alphabet: B batch, T tokens (1 state + future + H actions), S vision-language tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.config import TransformerConfig
from gr00t_fast.model.layers import CrossAttention, GeluMLP, SelfAttention, sinusoid, timestep_frequencies

_TIME_CHANNELS = 256  # sinusoids of the reference's timestep embedding
DIT_NORM_EPS = 1e-5
OUTPUT_NORM_EPS = 1e-6

KeysValues = list[tuple[Tensor, Tensor]]
Context = Literal["all", "text", "image"]  # which vision-language tokens a cross-attending block sees


def context_of(index: int, attend_text_every: int | None) -> Context | None:
    """What block `index` attends to; None: to the sequence itself. attend_text_every: one in so many cross-attending blocks sees the text, the others
    the pictures; None: each sees all."""
    if index % 2 == 1:
        return None
    if attend_text_every is None:
        return "all"
    return "text" if index % (2 * attend_text_every) == 0 else "image"


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(_TIME_CHANNELS, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, buckets: Tensor) -> Tensor:
        """Time buckets (n,) -> embedding (n, D). Cosines first, as diffusers' `flip_sin_to_cos=True`."""
        waves = sinusoid(buckets, timestep_frequencies(_TIME_CHANNELS, buckets.device), cos_first=True).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(waves)))


class DiTBlock(nn.Module):
    """AdaLN, attention, LayerNorm, GELU MLP. The first norm's scale and shift arrive ready-made."""

    def __init__(self, width: int, heads: int, context_width: int, context: Context | None = "all") -> None:
        super().__init__()
        self.width, self.context = width, context
        self.crosses = context is not None
        self.ada_norm = nn.Linear(width, 2 * width)
        self.attention = CrossAttention(width, heads, context_width) if self.crosses else SelfAttention(width, heads)
        self.mlp = GeluMLP(width, 4 * width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, keys_values: tuple[Tensor, Tensor] | None, key_mask: Tensor | None) -> Tensor:
        h = F.layer_norm(x, (self.width,), eps=DIT_NORM_EPS) * scale + shift  # scale already holds the 1
        x = x + (self.attention(h, keys_values, key_mask) if self.crosses else self.attention(h))
        return x + self.mlp(F.layer_norm(x, (self.width,), eps=DIT_NORM_EPS))


class DiT(nn.Module):
    def __init__(self, config: TransformerConfig, context_width: int, out_width: int, attend_text_every: int | None = None) -> None:
        super().__init__()
        self.width = config.width
        self.time = TimestepEmbedding(config.width)
        self.blocks = nn.ModuleList(
            DiTBlock(config.width, config.num_heads, context_width, context_of(index, attend_text_every)) for index in range(config.num_layers)
        )
        self.out_modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, out_width)

    def cross_keys_values(self, contexts: Mapping[Context, Tensor]) -> KeysValues:
        """Keys and values of every cross-attending block, once per observation: contexts, each (B, its S, C) -> [(B, heads, its S, K) x 2]."""
        return [block.attention.keys_values(contexts[block.context]) for block in self.blocks if block.crosses]

    def modulation(self, bucket: Tensor) -> Tensor:
        """AdaLN (1 + scale, shift) of every block, then of the output norm, at one time: bucket (1,) -> (blocks + 1, 2, D)."""
        time = F.silu(self.time(bucket))  # (1, D)
        rows = [block.ada_norm(time).view(2, self.width) for block in self.blocks]  # scale, shift
        rows.append(self.out_modulation(time).view(2, self.width).flip(0))  # stored as shift, scale: the other order
        table = torch.stack(rows)  # (blocks + 1, 2, D)
        table[:, 0] += 1
        return table

    def forward(self, x: Tensor, modulation: Tensor, cross: KeysValues, key_mask: Tensor | None, last: int) -> Tensor:
        """x (B, T, D), modulation (blocks + 1, 2, D) of this step -> output tokens (B, last, out_width): the `last` ones only.

        key_mask: of the blocks that see text; pictures are never padded.
        """
        keys_values = iter(cross)
        for index, block in enumerate(self.blocks):
            scale, shift = modulation[index]
            x = block(x, scale, shift, next(keys_values) if block.crosses else None, key_mask if block.context in ("all", "text") else None)
        scale, shift = modulation[-1]
        return self.out(F.layer_norm(x[:, -last:], (self.width,), eps=OUTPUT_NORM_EPS) * scale + shift)
