"""The diffusion transformer: velocity of the action tokens, given the robot's state and the vision-language tokens.

Even blocks attend to vision-language tokens, odd blocks to the sequence itself. In N1.5 an even block attends to all of them, in N1.6 and N1.7 to the
text or to the pictures. The time enters through AdaLN (Peebles & Xie 2023) and is known before any observation comes: `modulation` is tabulated for
all steps ahead of the loop.
Axis alphabet: B batch, T tokens (1 state + future + H actions), S vision-language tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model.config import ActionHeadConfig, TransformerConfig
from gr00t_fast.model.layers import (
    CategoryLinear,
    CategoryMLP,
    CrossAttention,
    GeluMLP,
    PreNormBlock,
    SelfAttention,
    position_frequencies,
    sinusoid,
    take_rows,
    timestep_frequencies,
)

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


_NORM_EPS = 1e-5

Velocity = Callable[[Tensor, int], Tensor]  # (actions (B, H, A), Euler step) -> (B, H, A)


@dataclass(frozen=True)
class StepTables:
    """What depends on the number of denoising steps alone: tau (N, D) for the action encoder, modulation (N, blocks + 1, 2, D)."""

    tau: Tensor
    modulation: Tensor

    @property
    def steps(self) -> int:
        return self.tau.shape[0]

    def at_each(self, velocity: Callable[[Tensor, Condition, Tensor, Tensor], Tensor], condition: Condition) -> Velocity:
        """`velocity`, with arguments as ActionHead's, at the times of the steps. Actions may come in any number format."""
        return lambda actions, step: velocity(actions.to(self.modulation.dtype), condition, self.tau[step], self.modulation[step])


@dataclass(frozen=True)
class Condition:
    """What depends on the observation alone: state and future tokens (B, 1 + F, D), cross-attention keys and values, their mask."""

    prefix: Tensor
    cross: KeysValues
    key_mask: Tensor | None  # bool (B, 1, 1, S); with image_positions of the text tokens alone


def euler_step(actions: Tensor, velocity: Tensor, step_size: float | Tensor) -> Tensor:
    """One update of the flow: actions and velocity (B, H, A) -> (B, H, A)."""
    return actions + velocity * step_size


def euler_step_in_one(actions: Tensor, velocity: Tensor, step_size: float) -> Tensor:
    """`euler_step` as one kernel, rounded once instead of twice."""
    return torch.add(actions, velocity, alpha=step_size)


def integrate(velocity: Velocity, noise: Tensor, steps: int, update: Callable[[Tensor, Tensor, float], Tensor] = euler_step) -> Tensor:
    """noise (B, H, A) at t = 0 -> actions (B, H, A) at t = 1."""
    actions = noise
    for step in range(steps):
        actions = update(actions, velocity(actions, step), 1.0 / steps)
    return actions


class ActionEncoder(nn.Module):
    """W3(swish(W2([W1(a), tau]))): the noisy actions and the time, mixed per token."""

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.w1 = CategoryLinear(action_dim, width)
        self.w2 = CategoryLinear(2 * width, width)
        self.w3 = CategoryLinear(width, width)

    def tau(self, buckets: Tensor) -> Tensor:
        """Buckets (N,) -> (N, D): sinusoid of the bucket index, sines first."""
        return sinusoid(buckets, position_frequencies(self.width, buckets.device), cos_first=False).to(self.w2.weight.dtype)

    def forward(self, actions: Tensor, tau: Tensor) -> Tensor:
        """actions (B, H, A), tau (D,) -> (B, H, D)."""
        embedded = self.w1(actions)  # (B, H, D)
        x = self.w2(torch.cat((embedded, tau.expand_as(embedded)), dim=-1))  # (B, H, D)
        return self.w3(x * torch.sigmoid(x))


class ActionHead(nn.Module):
    def __init__(self, config: ActionHeadConfig, context_width: int) -> None:
        super().__init__()
        self.config = config
        width, vl = config.dit.width, config.vl_attention
        self.vlln = nn.LayerNorm(context_width, eps=_NORM_EPS) if config.use_vlln else nn.Identity()
        self.vl_blocks = nn.ModuleList(PreNormBlock(vl.width, vl.num_heads, 4 * vl.width, _NORM_EPS) for _ in range(vl.num_layers))
        self.state_encoder = CategoryMLP(config.state_dim, config.hidden_size, width)
        self.action_encoder = ActionEncoder(config.action_dim, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.future_tokens = nn.Embedding(config.future_tokens, width) if config.future_tokens else None
        self.dit = DiT(config.dit, context_width, config.output_dim, config.attend_text_every)
        self.action_decoder = CategoryMLP(config.output_dim, config.hidden_size, config.action_dim)

    def refine(self, features: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """LayerNorm and self-attention over the vision-language tokens: (B, S, C) -> (B, S, C)."""
        x = self.vlln(features)
        for block in self.vl_blocks:
            x = block(x, key_mask)
        return x

    def condition(self, vl_features: Tensor, state: Tensor, key_mask: Tensor | None = None, image_positions: Tensor | None = None) -> Condition:
        """Once per observation: vl_features (B, S, C), state (B, state_dim). image_positions (V,) or (B, V): needed where blocks see text or pictures
        alone."""
        cross = self.dit.cross_keys_values(self.contexts(vl_features, image_positions))
        if key_mask is not None and self.config.attend_text_every is not None:
            key_mask = take_rows(key_mask[:, 0, 0, :, None], other_positions(vl_features.shape[1], image_positions))[:, None, None, :, 0]
        return Condition(self.prefix(state), cross, key_mask)

    def contexts(self, vl_features: Tensor, image_positions: Tensor | None) -> dict[Context, Tensor]:
        """What cross-attending blocks see: vl_features (B, S, C) -> all of it, or the text's and the pictures' part."""
        if self.config.attend_text_every is None:
            return {"all": vl_features}
        text_positions = other_positions(vl_features.shape[1], image_positions)
        return {"text": take_rows(vl_features, text_positions), "image": take_rows(vl_features, image_positions)}

    def prefix(self, state: Tensor) -> Tensor:
        """state (B, state_dim) -> the tokens before the actions (B, 1 + F, D)."""
        state_token = self.state_encoder(state).unsqueeze(1)  # (B, 1, D)
        if self.future_tokens is None:
            return state_token
        return torch.cat((state_token, self.future_tokens.weight.expand(state.shape[0], -1, -1)), dim=1)  # (B, 1 + F, D)

    def step_tables(self, steps: int) -> StepTables:
        """Once per step count: the Euler times 0, 1/N, ... (N-1)/N as the integer buckets that training used."""
        device = self.position_embedding.weight.device
        buckets = torch.tensor([int(step / float(steps) * self.config.timestep_buckets) for step in range(steps)], device=device)
        # one row at a time: a GEMM over all rows rounds differently from the reference's, and long integrations amplify that
        return StepTables(self.action_encoder.tau(buckets), torch.stack([self.dit.modulation(bucket[None]) for bucket in buckets]))

    def velocity(self, actions: Tensor, condition: Condition, tau: Tensor, modulation: Tensor) -> Tensor:
        """One evaluation of the flow: actions (B, H, A) -> (B, H, A)."""
        horizon = actions.shape[1]
        tokens = self.action_encoder(actions, tau) + self.position_embedding.weight[:horizon]  # (B, H, D)
        x = torch.cat((condition.prefix, tokens), dim=1)  # (B, 1 + F + H, D)
        return self.action_decoder(self.dit(x, modulation, condition.cross, condition.key_mask, last=horizon))

    def denoise(self, noise: Tensor, condition: Condition, tables: StepTables) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A)."""
        return integrate(tables.at_each(self.velocity, condition), noise, tables.steps)


def other_positions(tokens: int, positions: Tensor) -> Tensor:
    """int64 (tokens - V,): those of 0, 1, ... tokens - 1 that are not among positions (V,), in order; of positions (B, V) those of each,
    (B, tokens - V). Without waiting for a GPU."""
    taken = torch.zeros((*positions.shape[:-1], tokens), dtype=torch.int32, device=positions.device).scatter(-1, positions, 1)
    return torch.argsort(taken, dim=-1, stable=True)[..., : tokens - positions.shape[-1]]
