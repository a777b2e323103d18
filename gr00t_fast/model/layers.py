"""The few layers that the towers share.

Axis alphabet: B batch, T tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (T, K)


def split_heads(x: Tensor, heads: int) -> Tensor:
    b, t, d = x.shape
    return x.view(b, t, heads, d // heads).transpose(1, 2)  # (B, N, T, K)


def merge_heads(x: Tensor) -> Tensor:
    b, n, t, k = x.shape
    return x.transpose(1, 2).reshape(b, t, n * k)  # (B, T, D)


def put_rows(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """x (B, S, D) with rows (B, V, D) at places (V,), or (B, V) where each item has its own."""
    return x.index_copy(1, places, rows) if places.dim() == 1 else x.scatter(1, places.unsqueeze(-1).expand_as(rows), rows)


def take_rows(x: Tensor, places: Tensor) -> Tensor:
    """The rows (B, V, D) of x (B, S, D) at places (V,), or (B, V) where each item has its own."""
    return x.index_select(1, places) if places.dim() == 1 else x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and one fused projection (vision towers, vision-language blocks, odd DiT blocks)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        """x (B, T, D); key_mask bool (B, 1, 1, T), True = attend, None = attend to all; rotary: tables (T, K) for queries and keys."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, N, T, K)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)))


class CrossAttention(nn.Module):
    """Attention to tokens that stay the same over all denoising steps: their keys and values are projected once, by the caller."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, S, C) -> keys and values, each (B, N, S, K)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], key_mask: Tensor | None = None) -> Tensor:
        q = split_heads(self.q(x), self.heads)  # (B, N, T, K)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, *keys_values, attn_mask=key_mask)))


class GeluMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear; with biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class CategoryLinear(nn.Module):
    """x @ W + b with one embodiment's W (in, out), laid out as the reference's per-category layers store it."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.empty(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class CategoryMLP(nn.Module):
    """Two CategoryLinear layers with a ReLU between (state encoder, action decoder)."""

    def __init__(self, width_in: int, inner: int, width_out: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(width_in, inner)
        self.layer2 = CategoryLinear(inner, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x)))


class PreNormBlock(nn.Module):
    """Pre-norm transformer block: LayerNorm, self-attention, LayerNorm, GELU MLP (vision towers and vision-language self-attention)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GeluMLP(width, inner)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), key_mask, rotary)
        return x + self.mlp(self.norm2(x))


def rotary_tables(tokens: int, head_dim: int, theta: float, like: Tensor) -> Rotary:
    """cos and sin (T, K) of rotary position embedding (Su et al. 2021), in `like`'s dtype and device.

    Frequencies and angles are fp32 whatever the model's dtype: bf16 positions would be wrong by whole tokens.
    """
    inv_freq = rotary_frequencies(head_dim, theta, like.device)
    return tables_of(torch.outer(torch.arange(tokens, device=like.device, dtype=torch.float32), inv_freq), like.dtype)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """fp32 (K/2,): radians per position."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def tables_of(angles: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin (T, K) of fp32 angles (T, K/2), which both halves of a head share."""
    angles = torch.cat((angles, angles), dim=-1)  # (T, K)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables (T, K) to x (B, N, T, K); halves are rotated against each other, as Qwen does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def sinusoid(positions: Tensor, inverse_frequencies: Tensor, cos_first: bool) -> Tensor:
    """fp32 (..., width): sinusoidal embedding of integer `positions` with `inverse_frequencies` (width/2,) (Vaswani et al. 2017)."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies  # (..., width/2)
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(halves, dim=-1)


# Positions reach 1000 radians, so the last bit of a frequency is worth 6e-5 radians, and flow integration amplifies it: each table
# below keeps the order of operations of the code it has to agree with.


def timestep_frequencies(width: int, device: torch.device) -> Tensor:
    """(width/2,) as diffusers' `Timesteps` with `downscale_freq_shift=1`: base 10000 over width/2 - 1."""
    half = width // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=device) / (half - 1))


def position_frequencies(width: int, device: torch.device) -> Tensor:
    """(width/2,) as the reference's action encoder: base 10000 over width/2."""
    half = width // 2
    return torch.exp(-torch.arange(half, dtype=torch.float32, device=device) * (torch.log(torch.tensor(10000.0, device=device)) / half))
