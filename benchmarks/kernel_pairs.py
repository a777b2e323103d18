"""What the Triton kernels replace, at the shapes of a network: the same inputs through the kernels and through their twins, as the model writes it.

A pair is a stretch of the network, not a kernel: where a matrix product is split so that the next kernel adds its parts up, only both together do
what the twin does. Importing this imports triton.
Axis alphabet: B batch, T tokens, S prompt tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gr00t_fast.config import ModelConfig
from gr00t_fast.engine.kernels.activations import bias_gelu, bias_gelu_twin, swiglu, swiglu_twin
from gr00t_fast.engine.kernels.attention import attention, attention_twin
from gr00t_fast.engine.kernels.gemm import linear, linear_parts, linear_twin
from gr00t_fast.engine.kernels.norms import Norm, norm_twin, residual_norm, residual_norm_twin
from gr00t_fast.engine.kernels.rotary import normed_rotated, normed_rotated_twin
from gr00t_fast.model.layers import rotary_tables, split_heads

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """`kernel` and `twin` take what `inputs` makes. `flop`: of the matrix products. `product`: (M, N, K, split) of the one that can be swept."""

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: Callable[[], Tensors]
    flop: float = 0.0
    product: tuple[int, int, int, bool] | None = None

    def moved_bytes(self) -> int:
        """The fewest: each input read once, each output written once."""
        given = self.inputs()
        return sum(tensor.nbytes for tensor in (*given, *outputs(self.twin(*given))))

    def error(self) -> float:
        """||kernel - twin in fp64|| / ||twin in fp64||, the worst over outputs."""
        given = self.inputs()
        wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in given)
        pairs = zip(outputs(self.kernel(*given)), outputs(self.twin(*wide)), strict=True)
        errors = [((got.double() - truth).norm() / truth.norm()).item() for got, truth in pairs]
        return max(errors, key=lambda error: (error != error, error))


def outputs(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


class Randoms:
    """Normal numbers; weights as a trained layer has them, so that sums stay near one."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._like = {"dtype": dtype, "device": device, "generator": torch.Generator(device).manual_seed(seed)}

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, **self._like) * scale

    def weight(self, out: int, width: int) -> Tensor:
        return self(out, width, scale=width**-0.5)

    def mask(self, tokens: int) -> Tensor:
        """A prompt that fills its bucket but for 9 tokens."""
        return (torch.arange(tokens, device=self._like["device"]) < max(tokens - 9, 1)).view(1, 1, 1, tokens)


def all_pairs(config: ModelConfig, prompt_tokens: int, randoms: Randoms) -> Iterator[Pair]:
    """Of one observation with one camera."""
    yield from step_pairs(config, prompt_tokens, randoms)
    yield from tower_pairs(config, prompt_tokens, randoms)


def step_pairs(config: ModelConfig, prompt_tokens: int, r: Randoms) -> Iterator[Pair]:
    """One block of the diffusion transformer, in stretches."""
    d, heads, s = config.head.dit.width, config.head.dit.num_heads, prompt_tokens
    t = 1 + config.head.future_tokens + config.head.action_horizon

    def product_flop(rows: int, columns: int, inner: int) -> float:
        return 2.0 * rows * columns * inner

    def cross(x: Tensor, w: Tensor, b: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        parts = linear_parts(x, w).unflatten(1, x.shape[:2]).unflatten(-1, (heads, -1))  # (P, B, T, N, K)
        return attention(parts.transpose(2, 3), *_heads_of(kv, heads, 2), mask, b)

    def cross_twin(x: Tensor, w: Tensor, b: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        return attention_twin(split_heads(F.linear(x, w, b), heads), *_heads_of(kv, heads, 2), mask)

    yield Pair(
        "query projection, cross-attention",
        *(cross, cross_twin, lambda: (r(1, t, d), r.weight(d, d), r(d), r(1, s, 2 * d), r.mask(s))),
        product_flop(t, d, d) + 2 * product_flop(t, s, d),
        (t, d, d, True),
    )
    yield Pair(
        "q/k/v projection, self-attention",
        lambda x, w, b: attention(*_heads_of(linear(x, w, b), heads, 3)),
        lambda x, w, b: attention_twin(*_heads_of(F.linear(x, w, b), heads, 3)),
        lambda: (r(1, t, d), r.weight(3 * d, d), r(3 * d)),
        product_flop(t, 3 * d, d) + 2 * product_flop(t, t, d),
        (t, 3 * d, d, False),
    )
    for name, width in (("output projection, residual, AdaLN", d), ("second layer of MLP, residual, AdaLN", 4 * d)):
        yield Pair(
            name,
            lambda x, h, w, b, scale, shift: residual_norm(x, linear_parts(h, w), Norm(1e-5, scale, shift), b),
            lambda x, h, w, b, scale, shift: _added_and_normed(x, F.linear(h, w, b), Norm(1e-5, scale, shift)),
            lambda width=width: (r(1, t, d), r(1, t, width), r.weight(d, width), r(d), r(d), r(d)),
            product_flop(t, d, width),
            (t, d, width, True),
        )
    yield Pair(
        "first layer of MLP, GELU",
        *(lambda x, w, b: linear(x, w, b, "gelu"), lambda x, w, b: linear_twin(x, w, b, "gelu")),
        lambda: (r(1, t, d), r.weight(4 * d, d), r(4 * d)),
        product_flop(t, 4 * d, d),
        (t, 4 * d, d, False),
    )
    h, inner = config.head.action_horizon, config.head.hidden_size
    yield Pair(
        "first layer of decoder, ReLU",
        *(lambda x, w, b: linear(x, w, b, "relu"), lambda x, w, b: linear_twin(x, w, b, "relu")),
        lambda: (r(1, h, d), r.weight(inner, d), r(inner)),
        product_flop(h, inner, d),
        (h, inner, d, False),
    )


def tower_pairs(config: ModelConfig, prompt_tokens: int, r: Randoms) -> Iterator[Pair]:
    """Between the matrix products of vision, language and refinement."""
    v, la, s = config.vision, config.language, prompt_tokens
    yield Pair(
        "vision: residual, LayerNorm",
        lambda x, y, w, b: residual_norm(x, y, Norm(1e-6, w, b, learnt=True)),
        lambda x, y, w, b: residual_norm_twin(x, y, Norm(1e-6, w, b, learnt=True)),
        lambda: (r(1, v.tokens, v.hidden_size), r(1, v.tokens, v.hidden_size), r(v.hidden_size), r(v.hidden_size)),
    )
    yield Pair("vision: bias, GELU", bias_gelu, bias_gelu_twin, lambda: (r(1, v.tokens, v.intermediate_size), r(v.intermediate_size)))
    yield Pair(
        "language: residual, RMSNorm",
        lambda x, y, w: residual_norm(x, y, Norm(1e-6, w, None, False, True)),
        lambda x, y, w: residual_norm_twin(x, y, Norm(1e-6, w, None, False, True)),
        lambda: (r(1, s, la.hidden_size), r(1, s, la.hidden_size), r(la.hidden_size)),
    )
    yield Pair("language: SwiGLU", swiglu, swiglu_twin, lambda: (r(1, s, 2 * la.intermediate_size),))
    yield _rotary_pair(config, s, r)
    heads, width = config.head.vl_attention.num_heads, config.head.vl_attention.width
    yield Pair(
        "refinement: masked attention",
        lambda qkv, mask: attention(*_heads_of(qkv, heads, 3), mask),
        lambda qkv, mask: attention_twin(*_heads_of(qkv, heads, 3), mask),
        lambda: (r(1, s, 3 * width), r.mask(s)),
        4.0 * s * s * width,
    )


def _rotary_pair(config: ModelConfig, s: int, r: Randoms) -> Pair:
    la = config.language

    def on(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        # queries and keys only: values pass as they are
        return lambda qkv, q, k, cos, sin: function(qkv, la.num_heads, la.num_kv_heads, q, k, cos, sin, 1e-6)[:2]

    def inputs() -> Tensors:
        qkv = r(1, s, (la.num_heads + 2 * la.num_kv_heads) * la.head_dim)
        return qkv, r(la.head_dim), r(la.head_dim), *rotary_tables(s, la.head_dim, la.rope_theta, qkv)

    return Pair("language: q/k norm, rotary", on(normed_rotated), on(normed_rotated_twin), inputs)


def _heads_of(x: Tensor, heads: int, count: int) -> Tensors:
    return tuple(split_heads(part, heads) for part in x.chunk(count, dim=-1))


def _added_and_normed(x: Tensor, y: Tensor, spec: Norm) -> Tensors:
    total = x + y
    return total, norm_twin(total, spec)
