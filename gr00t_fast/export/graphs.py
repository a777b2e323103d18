"""The network as three graphs that a runtime can execute, wrapped around the plain model from outside.

    vision         pixel_values -> tokens
    language       embeddings (image tokens in place) -> backbone_features, vl_features, keys, values
    denoise_step   actions, state, keys, values, tau, modulation, step_size -> next_actions

One observation per call: batches are the caller's loop. The same numbers as `gr00t_fast.model` up to rounding; what differs, and why:

* A projection is stored [in, out] and written as `x @ W`. `F.linear` would export as MatMul(x, Transpose(W)), and every use of a shared weight
  leaves its own Transpose, or its own copy of the weight.
* Attention is written out (product, softmax, product): every runtime fuses that, and quantisers see the products.
* Key and value projections of all cross-attending blocks are one product, once per observation.
* No nonlinearity lies between the action encoder's first two layers, nor between the transformer's output layer and the decoder's first:
  each pair is folded into one. The time's part of the former is in the `tau` table.
* The last transformer block computes its attention output and MLP for the action tokens only: the others are not used.

Axis alphabet: C cameras, V image tokens, S prompt tokens (image tokens included), H horizon, A padded action width, D width of the
transformer, L its blocks, X those that cross-attend, N heads, K head dim. The batch of one is written 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.config import ModelConfig
from gr00t_fast.engine.fused import FoldedEncoder, folded_decoder
from gr00t_fast.model import Gr00tN1d5, StepTables
from gr00t_fast.model.action_head import euler_step
from gr00t_fast.model.dit import DIT_NORM_EPS, OUTPUT_NORM_EPS
from gr00t_fast.model.layers import SelfAttention, merge_heads, rotary_tables, rotate, split_heads

_MASKED = -30000.0  # added to a score, its exponential is 0 in every format; finite in fp16, and for tools that measure ranges


@dataclass(frozen=True)
class GraphSpec:
    """How to build one graph and which of the network's parameters it needs (prefixes of their names)."""

    build: Callable[[Gr00tN1d5, int, int], nn.Module]  # model, cameras, most prompt tokens
    parameters: Callable[[ModelConfig], tuple[str, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class MatMulLinear(nn.Module):
    """nn.Linear with its weight stored [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class PlainRMSNorm(nn.Module):
    """nn.RMSNorm, normalised in fp32 whatever the dtype: squares of fp16 activations overflow."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class PlainSelfAttention(nn.Module):
    """`SelfAttention` written out; with `queries`, the output of the last so many tokens only."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = attention.heads, attention.qkv, attention.out

    def forward(self, x: Tensor, key_mask: None = None, queries: int | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # (1, N, T, K)
        q = q if queries is None else q[:, :, -queries:]
        return self.out(merge_heads(attend(q, k, v)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (1, N, T, K), k and v (1, N, S, K), additive mask (T, S) -> (1, N, T, K)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaled first: fp16 products of unscaled queries can overflow
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


def make_exportable(module: nn.Module) -> nn.Module:
    """Swap layers in place, depth first, so that one weight at a time is held twice; returns `module`."""
    for name, child in module.named_children():
        make_exportable(child)
        if isinstance(child, nn.Linear):
            setattr(module, name, MatMulLinear(child.weight.t(), child.bias))
        elif isinstance(child, nn.RMSNorm):
            setattr(module, name, PlainRMSNorm(child))
        elif isinstance(child, SelfAttention):
            setattr(module, name, PlainSelfAttention(child))
    return module


class VisionGraph(nn.Module):
    """pixel_values (1, C, 3, h, w) -> tokens (1, V, width of the language model)."""

    def __init__(self, model: Gr00tN1d5, cameras: int, max_tokens: int) -> None:
        super().__init__()
        del max_tokens
        tower = model.vision
        convolution = tower.patch_embedding
        self.cameras, self.patch = cameras, convolution.kernel_size[0]
        self.patch_embedding = MatMulLinear(convolution.weight.flatten(1).t(), convolution.bias)  # a convolution without overlap is a product
        self.position_embedding = tower.position_embedding.weight
        tower.patch_embedding = None
        make_exportable(tower)
        self.blocks, self.norm, self.connector = tower.blocks, tower.norm, tower.connector

    def forward(self, pixel_values: Tensor) -> Tensor:
        _, c, channels, height, width = pixel_values.shape
        p = self.patch
        x = pixel_values.reshape(c, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (C, rows, columns, 3, p, p)
        x = self.patch_embedding(x.reshape(c, -1, channels * p * p)) + self.position_embedding  # (C, T, width)
        for block in self.blocks:
            x = block(x)
        return self.connector(self.norm(x)).flatten(0, 1).unsqueeze(0)  # (1, V, width of the language model)


class LanguageGraph(nn.Module):
    """embeddings (1, S, C) -> backbone_features (1, S, C), vl_features (1, S, C), keys and values (X, N, S, K). S may vary up to `max_tokens`."""

    def __init__(self, model: Gr00tN1d5, cameras: int, max_tokens: int) -> None:
        super().__init__()
        del cameras
        language, dit = model.language, model.head.dit
        self.heads = model.config.head.dit.num_heads
        crossing = [block.attention for block in dit.blocks if block.crosses]
        self.crossing = len(crossing)
        keys_values = zip(*(attention.kv.weight.chunk(2) for attention in crossing), strict=True)
        biases = zip(*(attention.kv.bias.chunk(2) for attention in crossing), strict=True)
        # [in, all keys then all values]: one product, and its output is cut into two whole tensors
        weight = torch.cat([part for parts in keys_values for part in parts])
        self.keys_values = MatMulLinear(weight.t(), torch.cat([part for parts in biases for part in parts]))
        cos, sin = rotary_tables(max_tokens, language.config.head_dim, language.config.rope_theta, language.norm.weight)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("positions", torch.arange(max_tokens))
        make_exportable(language)
        make_exportable(model.head.vl_blocks)
        self.blocks, self.norm = language.blocks, language.norm
        self.vlln, self.vl_blocks = model.head.vlln, model.head.vl_blocks

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = embeddings.shape[1]
        cos, sin, positions = self.cos[:tokens], self.sin[:tokens], self.positions[:tokens]
        mask = torch.where(positions[:, None] >= positions[None, :], 0.0, _MASKED).to(embeddings.dtype)  # (S, S)
        x = embeddings
        for block in self.blocks:
            x = x + _grouped_query_attention(block.attention, block.norm1(x), cos, sin, mask)
            x = x + block.mlp(block.norm2(x))
        backbone = self.norm(x)
        refined = self.vlln(backbone)
        for block in self.vl_blocks:
            refined = block(refined)
        keys, values = (self._per_block(part) for part in self.keys_values(refined).chunk(2, dim=-1))
        return backbone, refined, keys, values

    def _per_block(self, x: Tensor) -> Tensor:
        """(1, S, X * D) -> (X, N, S, K)."""
        tokens, width = x.shape[1], x.shape[2] // (self.crossing * self.heads)
        return x.reshape(tokens, self.crossing, self.heads, width).permute(1, 2, 0, 3)


def _grouped_query_attention(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """`GroupedQueryAttention` written out: each key/value head serves heads / kv_heads query heads."""
    q, k, v = attention.qkv(x).split((attention.q_width, attention.kv_width, attention.kv_width), dim=-1)
    q = rotate(attention.q_norm(split_heads(q, attention.heads)), cos, sin)  # (1, heads, S, K)
    k = rotate(attention.k_norm(split_heads(k, attention.kv_heads)), cos, sin)  # (1, kv_heads, S, K)
    v = split_heads(v, attention.kv_heads)
    share = attention.heads // attention.kv_heads
    return attention.out(merge_heads(attend(q, _repeat_heads(k, share), _repeat_heads(v, share), mask)))


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    """(1, M, S, K) -> (1, M * times, S, K), each head `times` times in a row."""
    one, heads, tokens, width = x.shape
    return x.unsqueeze(2).expand(one, heads, times, tokens, width).reshape(one, heads * times, tokens, width)


class DenoiseStepGraph(nn.Module):
    """One Euler update.

    actions (1, H, A), state (1, state_dim), keys and values (X, N, S, K), and of the step: tau (D,) and modulation (L + 1, 2, D) from
    `graph_tables`, step_size (1,) = 1 / steps -> next_actions (1, H, A).
    """

    def __init__(self, model: Gr00tN1d5, cameras: int, max_tokens: int) -> None:
        super().__init__()
        del cameras, max_tokens
        head = model.head
        folded, self.horizon = FoldedEncoder.of(head), head.config.action_horizon
        self.encode = MatMulLinear(folded.weight, None)  # its bias is in tau
        self.mix = MatMulLinear(head.action_encoder.w3.weight, None)
        self.positions = nn.Parameter(folded.places, False)  # no sum in the graph: one bias per action token
        self.decode1 = MatMulLinear(*folded_decoder(head))
        self.decode2 = MatMulLinear(head.action_decoder.layer2.weight, head.action_decoder.layer2.bias)
        self.state_encoder, self.future_tokens = head.state_encoder, head.future_tokens.weight
        for block in head.dit.blocks:
            block.ada_norm = None  # tabulated
            if block.crosses:
                block.attention.kv = None  # in the language graph
        self.blocks = make_exportable(head.dit.blocks)
        self.width = head.dit.width

    def forward(self, actions: Tensor, state: Tensor, keys: Tensor, values: Tensor, tau: Tensor, modulation: Tensor, step_size: Tensor) -> Tensor:
        mixed = self.encode(actions) + tau  # (1, H, D)
        tokens = self.mix(mixed * torch.sigmoid(mixed)) + self.positions  # (1, H, D)
        x = torch.cat((self.state_encoder(state).unsqueeze(1), self.future_tokens.unsqueeze(0), tokens), dim=1)  # (1, 1 + F + H, D)
        crossed = 0
        for index, block in enumerate(self.blocks):
            queries = self.horizon if index == len(self.blocks) - 1 else None
            h = F.layer_norm(x, (self.width,), weight=modulation[index, 0], bias=modulation[index, 1], eps=DIT_NORM_EPS)
            x = x if queries is None else x[:, -queries:]
            if block.crosses:
                x = x + self._cross(block.attention, h[:, -x.shape[1] :], keys[crossed : crossed + 1], values[crossed : crossed + 1])
                crossed += 1
            else:
                x = x + block.attention(h, queries=queries)
            x = x + block.mlp(F.layer_norm(x, (self.width,), eps=DIT_NORM_EPS))
        x = F.layer_norm(x, (self.width,), weight=modulation[-1, 0], bias=modulation[-1, 1], eps=OUTPUT_NORM_EPS)  # (1, H, D)
        return euler_step(actions, self.decode2(F.relu(self.decode1(x))), step_size)

    @staticmethod
    def _cross(attention: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention.out(merge_heads(attend(split_heads(attention.q(x), attention.heads), keys, values)))


def graph_tables(model: Gr00tN1d5, steps: int) -> StepTables:
    """The tables that `denoise_step` takes, for `steps` Euler steps: tau (steps, D) already through the action encoder's second layer, its biases
    included; modulation (steps, L + 1, 2, D) as the plain model's. To be made before `DenoiseStepGraph` is, which takes the model apart."""
    return FoldedEncoder.of(model.head).step_tables(model.head.step_tables(steps))


# what `graph_tables` needs of the network
TABLE_PARAMETERS = ("head.action_encoder.", "head.position_embedding.", "head.dit.")


def _crossing(config: ModelConfig) -> tuple[str, ...]:
    return tuple(f"head.dit.blocks.{index}.attention.kv." for index in range(0, config.head.dit.num_layers, 2))


GRAPHS = {
    "vision": GraphSpec(VisionGraph, lambda config: ("vision.",), ("pixel_values",), ("tokens",)),
    "language": GraphSpec(
        LanguageGraph,
        lambda config: ("language.blocks.", "language.norm.", "head.vlln.", "head.vl_blocks.", *_crossing(config)),
        ("embeddings",),
        ("backbone_features", "vl_features", "keys", "values"),
    ),
    "denoise_step": GraphSpec(
        DenoiseStepGraph,
        lambda config: (
            *("head.state_encoder.", "head.action_encoder.", "head.action_decoder.", "head.position_embedding.", "head.future_tokens."),
            "head.dit.",
        ),
        ("actions", "state", "keys", "values", "tau", "modulation", "step_size"),
        ("next_actions",),
    ),
}

DYNAMIC = {"embeddings": 1, "keys": 2, "values": 2}  # input -> its dimension that is the prompt length


def example_inputs(name: str, config: ModelConfig, cameras: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs of the right shapes for the graph `name` and a prompt of `tokens`, in the order of its spec."""
    head, vision = config.head, config.vision
    blocks, crossing, width = head.dit.num_layers, len(_crossing(config)), head.dit.width
    shapes = {
        "pixel_values": (1, cameras, 3, vision.image_size, vision.image_size),
        "embeddings": (1, tokens, config.language.hidden_size),
        "actions": (1, head.action_horizon, head.action_dim),
        "state": (1, head.state_dim),
        "keys": (crossing, head.dit.num_heads, tokens, head.dit.head_dim),
        "values": (crossing, head.dit.num_heads, tokens, head.dit.head_dim),
        "tau": (width,),
        "modulation": (blocks + 1, 2, width),
        "step_size": (1,),
    }
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shapes[key], generator=generator).to(dtype) for key in GRAPHS[name].inputs)
