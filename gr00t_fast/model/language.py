"""Language: prompt tokens with image tokens in their places, through the first layers of Qwen3 and its final norm.

The language head is not built: the reference computes 151 680 logits per token and throws them away.
Axis alphabet: B batch, S tokens, D width, N heads, M key/value heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.config import LanguageConfig
from gr00t_fast.model.layers import merge_heads, rotary_tables, rotate, split_heads


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
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))


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
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """token_embeddings (B, S, D) -> features (B, S, D) after the final norm (`hidden_states[select_layer]` of the reference).

        Prompts of unequal length are padded on the right: attention is causal, so no real token ever sees padding, and
        positions need no shift.
        """
        cos, sin = rotary_tables(token_embeddings.shape[1], self.config.head_dim, self.config.rope_theta, token_embeddings)
        x = token_embeddings
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)
