"""Flow matching: from noise to an action chunk in a few Euler steps.

Everything that does not change inside the loop is computed before it, each in a function of its own: `step_tables` once per step count,
`condition` once per observation. Per-embodiment weights of the reference are sliced at load, so each CategoryLinear holds one matrix.
Axis alphabet: B batch, S vision-language tokens, H horizon, A padded action width, F future tokens, D width, N denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr00t_fast.config import ActionHeadConfig
from gr00t_fast.model.dit import Context, DiT, KeysValues
from gr00t_fast.model.layers import CategoryLinear, CategoryMLP, PreNormBlock, position_frequencies, sinusoid

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


def integrate(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    update: Callable[[Tensor, Tensor, float], Tensor] = euler_step,
    before: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """noise (B, H, A) at t = 0 -> actions (B, H, A) at t = 1. before: changes the actions ahead of each step."""
    actions = noise
    for step in range(steps):
        if before is not None:
            actions = before(actions, step)
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
        """Once per observation: vl_features (B, S, C), state (B, state_dim). image_positions (V,): needed where blocks see text or pictures alone."""
        cross = self.dit.cross_keys_values(self.contexts(vl_features, image_positions))
        if key_mask is not None and self.config.attend_text_every is not None:
            key_mask = key_mask.index_select(-1, other_positions(vl_features.shape[1], image_positions))
        return Condition(self.prefix(state), cross, key_mask)

    def contexts(self, vl_features: Tensor, image_positions: Tensor | None) -> dict[Context, Tensor]:
        """What cross-attending blocks see: vl_features (B, S, C) -> all of it, or the text's and the pictures' part."""
        if self.config.attend_text_every is None:
            return {"all": vl_features}
        text_positions = other_positions(vl_features.shape[1], image_positions)
        return {"text": vl_features.index_select(1, text_positions), "image": vl_features.index_select(1, image_positions)}

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
        return integrate(lambda actions, step: self.velocity(actions, condition, tables.tau[step], tables.modulation[step]), noise, tables.steps)


def other_positions(tokens: int, positions: Tensor) -> Tensor:
    """int64 (tokens - V,): those of 0, 1, ... tokens - 1 that are not among positions (V,), in order; without waiting for a GPU."""
    taken = torch.zeros(tokens, dtype=torch.int32, device=positions.device).index_fill(0, positions, 1)
    return torch.argsort(taken, stable=True)[: tokens - positions.shape[0]]
