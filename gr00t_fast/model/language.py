"""Language: prompt tokens with image tokens in their places, through the first layers of Qwen3.

N1.5 takes the features behind the final norm; N1.7 those before it, adds deeper image features behind the first layers (deepstack), and gives a
token three positions (time, row, column of a picture; interleaved mRoPE of Qwen3-VL).

The language head is not built: the reference computes 151 680 logits per token and throws them away.
Axis alphabet: B batch, S tokens, D width, N heads, M key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model.config import LanguageConfig
from gr00t_fast.model.layers import Rotary, merge_heads, rotary_frequencies, rotate, split_heads, tables_of


class GroupedQueryAttention(nn.Module):
    """Causal attention with fewer key/value heads than query heads, RMSNorm on each query and key head, rotary positions, no biases."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.q_width, self.kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, self.q_width + 2 * self.kv_width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.out = nn.Linear(self.q_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((self.q_width, self.kv_width, self.kv_width), dim=-1)
        q = rotate(self.q_norm(split_heads(q, self.heads)), cos, sin)  # (B, N, S, K)
        k = rotate(self.k_norm(split_heads(k, self.kv_heads)), cos, sin)  # (B, M, S, K)
        v = split_heads(v, self.kv_heads)  # (B, M, S, K)
        return self.out(merge_heads(causal_attention(q, k, v, by_mask=leaks(x))))


def leaks(x: Tensor) -> bool:
    """Whether torch's causal attention lets a token of such numbers see later ones: fp16 and bf16 on MPS (before 2.14; pytorch issue 195910)."""
    return x.device.type == "mps" and x.dtype != torch.float32


def causal_attention(q: Tensor, k: Tensor, v: Tensor, by_mask: bool = False) -> Tensor:
    """q (B, N, S, K), k and v (B, M, S, K) -> (B, N, S, K); each token sees itself and those before it. by_mask: by a mask that is given."""
    mask = torch.ones(q.shape[-2:-1] * 2, dtype=torch.bool, device=q.device).tril() if by_mask else None  # (S, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not by_mask, enable_gqa=True)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # Not fused: silu on a strided half rounds differently where the width is no multiple of the vector length.
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class QwenBlock(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = GroupedQueryAttention(config)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(QwenBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.final_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary, deepstack: Sequence[Tensor] = (), image_positions: Tensor | None = None) -> Tensor:
        """x, token embeddings (B, S, D) -> features (B, S, D): `hidden_states[select_layer]` of the reference.

        rotary: tables of the positions. deepstack: (B, V, D) each, the first added to the tokens at image_positions (V,) behind the first layer, and
        so on. Prompts of unequal length are padded on the right: attention is causal, so no real token ever sees padding, and positions need no
        shift.
        """
        for index, block in enumerate(self.blocks):
            x = block(x, *rotary)
            if index < len(deepstack):
                x = x.index_add(1, image_positions, deepstack[index])
        return self.norm(x)


def prompt_positions(tokens: int, image_positions: Tensor, rows: int, columns: int) -> Tensor:
    """int64 (3, S): time, row and column of each of S prompt tokens, of which those at image_positions (V,) belong to pictures of rows x columns.

    Text counts on one by one, on all three axes alike. A picture at position p has time p, rows p, p + 1, ... and columns likewise, and the text
    behind it goes on max(rows, columns) after p. Nothing here waits for a GPU.
    """
    device, per_picture = image_positions.device, rows * columns
    is_image = torch.zeros(tokens, dtype=torch.int64, device=device).index_fill(0, image_positions, 1)  # (S,)
    before = is_image.cumsum(0) - is_image  # image tokens before each token
    text_before = torch.arange(tokens, device=device) - before
    place, start = before % per_picture, text_before + before // per_picture * max(rows, columns)
    return torch.stack((start, start + is_image * (place // columns), start + is_image * (place % columns)))  # (3, S)


def mrope_tables(positions: Tensor, head_dim: int, theta: float, sections: Sequence[int], dtype: torch.dtype) -> Rotary:
    """positions (3, S) -> cos and sin (S, K). Frequency i turns with the row where i % 3 = 1 and i < 3 sections[1], with the column where i % 3 = 2
    and i < 3 sections[2], else with time."""
    angles = positions.float().unsqueeze(-1) * rotary_frequencies(head_dim, theta, positions.device)  # (3, S, K/2)
    mixed = angles[0].clone()
    for axis in (1, 2):
        mixed[:, axis : 3 * sections[axis] : 3] = angles[axis, :, axis : 3 * sections[axis] : 3]
    return tables_of(mixed, dtype)
