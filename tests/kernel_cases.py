"""Every kernel with random inputs of awkward shapes, for any device: as called, and as its twin makes of the same inputs in fp64.

A twin in the kernel's own dtype rounds after each operation, the kernel once or twice: it would be the less exact of the two. And on a GPU torch's
own attention in fp32 may multiply in TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gr00t_fast.engine.kernels.attention import AttentionConfig, attention
from gr00t_fast.engine.kernels.gemm import GemmConfig, linear, linear_parts
from gr00t_fast.engine.kernels.norms import norm, residual_norm
from gr00t_fast.engine.kernels.rotary import normed_rotated
from gr00t_fast.engine.ops import ACTIVATIONS, Norm, TorchOps
from gr00t_fast.engine.quantized import LARGEST, to_fp8
from gr00t_fast.model.layers import merge_heads, rotary_tables, split_heads

# Relative to the norm of the result. fp32: sums in another order, and the hardware's exp. 16 bits: a rounding at the end (at most 2^-9 for bf16,
# 2^-12 for fp16) and one before it, of the sum that a norm sees, of attention's probabilities or its added-up queries. Triton's interpreter cuts bf16
# off instead of rounding it.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INTERPRETED_BF16_TOLERANCE = 1.2e-2


TORCH = TorchOps()


def residual_norm_twin(x: Tensor, y: Tensor, spec: Norm, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if y.shape != x.shape:
        y = y.sum(0).view(x.shape).to(x.dtype)
    total = x + (y if bias is None else y + bias)
    return total, TORCH.norm(total, spec)


def linear_twin(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, residual: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    product = F.linear(x, weight.to(x.dtype))
    y = product if scale is None else product * scale
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    return y if residual is None else y + residual


def linear_parts_twin(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Whole, as one part."""
    return linear_twin(x, weight, scale=scale).reshape(1, -1, weight.shape[0])


def attention_twin(q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None = None) -> Tensor:
    q = q.sum(0).to(k.dtype) if q.dim() == 5 else q
    q = q if q_bias is None else q + q_bias.view(1, q.shape[1], 1, -1)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


@dataclass(frozen=True)
class Case:
    """`kernel` and `twin` take the same tensors; `keywords` go to the kernel alone."""

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self) -> tuple[Tensor, ...]:
        return _tensors(self.kernel(*self.inputs, **self.keywords))

    def error(self) -> float:
        """||kernel - truth|| / ||truth||, the worst over outputs; NaN where anything is."""
        got = self.run()
        truth = _tensors(self.twin(*_widened(self.inputs)))
        assert [tensor.shape for tensor in got] == [tensor.shape for tensor in truth], self.name
        errors = [((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)]
        return max(errors, key=lambda error: (error != error, error))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Norm):
        return Norm(value.eps, _widened(value.scale), _widened(value.shift), value.centred)
    return tuple(map(_widened, value)) if isinstance(value, tuple) else value


class _Random:
    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self._generator, self._dtype, self._device = torch.Generator().manual_seed(seed), dtype, device

    def __call__(self, *shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) + mean).to(self._device, self._dtype)

    def rounded(self, outputs: int, width: int) -> tuple[Tensor, Tensor]:
        """A weight in E4M3 and its scale per output."""
        weight = torch.randn(outputs, width, generator=self._generator) * torch.logspace(-2, 0, outputs)[:, None] / width**0.5
        step = weight.abs().amax(dim=1) / LARGEST
        return to_fp8(weight / step[:, None]).to(self._device), step.to(self._device)


def cases(dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    random = _Random(dtype, device, seed)
    yield from _norms(random)
    yield from _rotary(random)
    yield from _products(random)
    yield from _attentions(random)


def full_size_cases(dtype: torch.dtype, device: str, seed: int = 0) -> Iterator[Case]:
    """The shapes of the published network with one camera; too slow for the interpreter."""
    random = _Random(dtype, device, seed)
    x, y, scale, shift = random(1, 49, 1536), random(6, 49, 1536).float(), random(1536, mean=1.0), random(1536)
    yield Case("parts and AdaLN", _with_bias(residual_norm), _with_bias(residual_norm_twin), (x, y, shift, Norm(1e-5, scale, shift)), {})
    x, y, scale = random(1, 288, 2048), random(1, 288, 2048), random(2048, mean=1.0)
    yield Case("residual rms", residual_norm, residual_norm_twin, (x, y, Norm(1e-6, scale, None, False)), {})
    yield _rotary_case(random, 1, 288, 16, 8, 128)
    for m, n, k, activation in ((49, 4608, 1536, None), (49, 6144, 1536, "gelu"), (98, 6144, 1536, "gelu"), (16, 1024, 1536, "relu")):
        weight = random(n, k) / k**0.5
        yield Case(f"linear {m} x {k} x {n}", linear, linear_twin, (random(1, m, k), weight, random(n), activation), {})
        if n == 6144:
            down = (random(1, m, n), weight.T.contiguous())
            yield Case(f"parts {m} x {n} x {k}", _summed(linear_parts), _summed(linear_parts_twin), down, {})
            rounded = (random(1, m, n), *random.rounded(k, n))
            yield Case(f"parts of 8-bit weights {m} x {n} x {k}", _summed(linear_parts), _summed(linear_parts_twin), rounded, {})
    for keys in (288, 544):
        q, (k, v) = split_heads(random(1, 49, 1536), 32), (split_heads(part, 32) for part in random(1, keys, 3072).chunk(2, dim=-1))
        yield Case(f"cross-attention to {keys}", attention, attention_twin, (q, k, v), {})


def _norms(random: _Random) -> Iterator[Case]:
    for rows, width in (((1, 1), 1), ((2, 5), 48), ((1, 3), 1152), ((7,), 40)):
        x, y, scale, shift = random(*rows, width, mean=2.0), random(*rows, width), random(width, mean=1.0), random(width)
        name = f"{rows} x {width}"
        yield Case(f"adaln {name}", norm, TORCH.norm, (x, Norm(1e-5, scale, shift)), {}) if width > 1 else _one_column(x, scale, shift)
        yield Case(f"rms {name}", norm, TORCH.norm, (x, Norm(1e-6, scale, None, False)), {})
        yield Case(f"residual rms {name}", residual_norm, residual_norm_twin, (x, y, Norm(1e-6, scale, None, False)), {})
        if width > 1:  # a centred single column is all cancellation
            yield Case(f"plain layer norm {name}", norm, TORCH.norm, (x, Norm(1e-5)), {})
            yield Case(f"residual layer norm {name}", residual_norm, residual_norm_twin, (x, y, Norm(1e-6, scale, shift)), {})
            parts = torch.stack([random(x.numel() // width, width).float() for _ in range(3)])
            yield Case(f"parts and bias {name}", _with_bias(residual_norm), _with_bias(residual_norm_twin), (x, parts, shift, Norm(1e-5, scale)), {})


def _one_column(x: Tensor, scale: Tensor, shift: Tensor) -> Case:
    return Case("adaln of one column is its shift", norm, TORCH.norm, (x, Norm(1e-5, scale, shift)), {})


def _with_bias(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, parts, bias, spec: function(x, parts, spec, bias)


def _rotary(random: _Random) -> Iterator[Case]:
    for batch, tokens, heads, kv_heads, dim in ((2, 5, 4, 2, 8), (1, 3, 16, 8, 128), (1, 2, 3, 1, 6)):
        yield _rotary_case(random, batch, tokens, heads, kv_heads, dim)


def _rotary_case(random: _Random, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    qkv = random(batch, tokens, (heads + 2 * kv_heads) * dim)
    head_norm = torch.cat((random(dim, mean=1.0).expand(heads, -1), random(dim, mean=1.0).expand(kv_heads, -1)))
    cos, sin = rotary_tables(tokens, dim, 1e6, qkv)
    signed = torch.cat((-sin[:, : dim // 2], sin[:, dim // 2 :]), dim=-1)
    inputs = (qkv, heads, head_norm, cos, signed, 1e-6)
    return Case(f"rotary {batch} x {tokens}, {heads} + {kv_heads} heads of {dim}", normed_rotated, TORCH.normed_rotated, inputs, {})


def _products(random: _Random) -> Iterator[Case]:
    for m, k, n, activation in ((1, 8, 5, None), (49, 72, 40, "gelu"), (98, 130, 33, "silu"), (16, 200, 65, "relu")):
        x, weight, bias = random(m, k), random(n, k) / k**0.5, random(n)
        yield Case(f"linear {m} x {k} x {n}, {activation}", linear, linear_twin, (x, weight, bias, activation), {})
        yield Case(f"linear {m} x {k} x {n}, by columns", linear, linear_twin, (x, weight.T.contiguous().T, None, activation, random(m, n)), {})
        for parts in (1, 3):
            config = GemmConfig(64, 32, 32, parts, 4, 2)
            yield Case(f"{parts} parts of {m} x {k} x {n}", _summed(linear_parts), _summed(linear_parts_twin), (x, weight), {"config": config})
            rounded = (x, *random.rounded(n, k))
            yield Case(
                f"{parts} parts of {m} x {k} x {n}, 8-bit weights", _summed(linear_parts), _summed(linear_parts_twin), rounded, {"config": config}
            )
        eight, scale = random.rounded(n, k)
        yield Case(f"linear {m} x {k} x {n}, {activation}, 8-bit weights", linear, linear_twin, (x, eight, bias, activation, None, scale), {})


def _summed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs, **keywords: function(*inputs, **keywords).sum(0)


def _attentions(random: _Random) -> Iterator[Case]:
    for batch, heads, queries, keys, dim in ((1, 2, 49, 70, 48), (2, 3, 5, 33, 8), (1, 1, 1, 1, 64), (2, 1, 20, 130, 72)):
        q = split_heads(random(batch, queries, heads * dim), heads)  # strided, as projections leave them
        k, v = (split_heads(part, heads) for part in random(batch, keys, 2 * heads * dim).chunk(2, dim=-1))
        name = f"attention of {batch} x {heads} x {queries} to {keys}, heads of {dim}"
        yield Case(name, attention, attention_twin, (q, k, v), {})
        parts = torch.stack([random(batch, queries, heads, dim).float() for _ in range(3)]).transpose(2, 3)
        yield Case(f"{name}, parts of queries", attention, attention_twin, (parts, k, v, random(heads * dim)), {})
        yield Case(f"{name}, other tiles", attention, attention_twin, (q, k, v), {"config": AttentionConfig(32, 16, 4, 2)})
