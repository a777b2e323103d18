"""What the Triton kernels replace, at the shapes of a network: operations of engine/kernels/ops.py and their twins, on the same inputs.

Importing this imports triton. Axis alphabet: B batch, T tokens, S prompt tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gr00t_fast.config import ModelConfig
from gr00t_fast.engine.fused import as_linear
from gr00t_fast.engine.kernels.ops import StepOps, TowerOps
from gr00t_fast.engine.ops import Norm, TorchOps
from gr00t_fast.engine.quantized import Fp8WeightLinear
from gr00t_fast.model.layers import rotary_tables, split_heads

_INPUTS_BYTES = 512 * 2**20  # of all input sets of one pair: several times the caches (60 MB on an H200, 72 on an RTX 4090)
_MOST_SETS = 64
_TORCH = TorchOps()

Tensors = tuple[Tensor, ...]
Layers = Callable[..., nn.Module]  # weight and bias -> the layer


@dataclass(frozen=True)
class Pair:
    """`operation(ops, *inputs())` with the kernels and with torch. `flop`: of the matrix products."""

    operation: Callable[..., Any]
    ops: TorchOps
    inputs: Callable[[], tuple[Any, ...]]
    flop: float = 0.0

    def kernel(self, *given: Any) -> Any:
        return self.operation(self.ops, *given)

    def twin(self, *given: Any) -> Any:
        return self.operation(_TORCH, *given)

    def moved_bytes(self) -> int:
        """The fewest: each input read once, each output written once."""
        given = self.inputs()
        return sum(tensor.nbytes for tensor in (*_tensors(given), *_tensors(self.twin(*given))))

    def sets(self) -> list[tuple[Any, ...]]:
        """Inputs that together are more than the caches hold."""
        return [self.inputs() for _ in range(min(max(_INPUTS_BYTES // self.moved_bytes(), 2), _MOST_SETS))]

    def error(self) -> float:
        """||kernel - twin in fp64|| / ||twin in fp64||, the worst over outputs."""
        given = self.inputs()
        pairs = zip(_tensors(self.kernel(*given)), _tensors(self.twin(*map(_wide, given))), strict=True)
        errors = [((got.double() - truth).norm() / truth.norm()).item() for got, truth in pairs]
        return max(errors, key=lambda error: (error != error, error))


def _tensors(values: Any) -> list[Tensor]:
    """Of an answer, or of inputs with the layers' own among them."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, nn.Module):
        return [*values.parameters(), *values.buffers()]
    return [tensor for value in values if isinstance(value, (Tensor, nn.Module)) for tensor in _tensors(value)]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Fp8WeightLinear):
        weight = value.weight.double() * value.weight_scale.double()[:, None]
        return as_linear(weight, None if value.bias is None else value.bias.double())
    return as_linear(value.weight.double(), None if value.bias is None else value.bias.double()) if isinstance(value, nn.Linear) else value


class Randoms:
    """Normal numbers; weights as a trained layer has them, so that sums stay near one."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._like = {"dtype": dtype, "device": device, "generator": torch.Generator(device).manual_seed(seed)}

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, **self._like) * scale

    def layer(self, width: int, outputs: int, eight_bit: bool = False) -> nn.Module:
        plain = as_linear(self(outputs, width, scale=width**-0.5), self(outputs))
        return Fp8WeightLinear(plain) if eight_bit else plain


def all_pairs(config: ModelConfig, prompt_tokens: int, r: Randoms, eight_bit: bool) -> dict[str, Pair]:
    """Of one observation with one camera; eight_bit: the steps' products with weights in FP8 too."""
    found = dict(tower_pairs(config, prompt_tokens, r)) | dict(step_pairs(config, prompt_tokens, r, False))
    return found | ({f"{name}, FP8 weights": pair for name, pair in step_pairs(config, prompt_tokens, r, True)} if eight_bit else {})


def step_pairs(config: ModelConfig, prompt_tokens: int, r: Randoms, eight_bit: bool) -> Iterator[tuple[str, Pair]]:
    """One block of the diffusion transformer, in stretches."""
    ops, d, heads, s = StepOps(), config.head.dit.width, config.head.dit.num_heads, prompt_tokens
    t = 1 + config.head.future_tokens + config.head.action_horizon

    def keys_values() -> tuple[Tensor, Tensor]:
        return tuple(split_heads(part, heads) for part in r(1, s, 2 * d).chunk(2, dim=-1))

    yield (
        "query projection, cross-attention",
        Pair(
            lambda o, q, x, k, v: o.cross_attention(q, x, k, v),
            *(ops, lambda: (r.layer(d, d, eight_bit), r(1, t, d), *keys_values()), 2.0 * t * d * d + 4.0 * t * s * d),
        ),
    )
    yield (
        "q/k/v projection, self-attention",
        Pair(
            lambda o, qkv, x: o.self_attention(qkv, x, heads),
            *(ops, lambda: (r.layer(d, 3 * d, eight_bit), r(1, t, d)), 6.0 * t * d * d + 4.0 * t * t * d),
        ),
    )
    for name, width in (("output projection, residual, AdaLN", d), ("second layer of MLP, residual, AdaLN", 4 * d)):
        yield (
            name,
            Pair(
                lambda o, layer, h, x, scale, shift: o.linear_add_norm(layer, h, x, Norm(1e-5, scale, shift)),
                *(ops, lambda width=width: (r.layer(width, d, eight_bit), r(1, t, width), r(1, t, d), r(d), r(d)), 2.0 * t * d * width),
            ),
        )
    yield (
        "first layer of MLP, GELU",
        Pair(lambda o, layer, x: o.linear(layer, x, "gelu"), ops, lambda: (r.layer(d, 4 * d, eight_bit), r(1, t, d)), 8.0 * t * d * d),
    )


def tower_pairs(config: ModelConfig, prompt_tokens: int, r: Randoms) -> Iterator[tuple[str, Pair]]:
    """Between the matrix products of vision and language."""
    ops, v, la, s = TowerOps(), config.vision, config.language, prompt_tokens
    yield (
        "vision: norm",
        Pair(lambda o, x, w, b: o.norm(x, Norm(1e-6, w, b)), ops, lambda: (r(1, v.tokens, v.hidden_size), r(v.hidden_size), r(v.hidden_size))),
    )
    yield (
        "language: projection, residual, RMSNorm",
        Pair(
            lambda o, layer, h, x, w: o.linear_add_norm(layer, h, x, Norm(1e-6, w, None, False)),
            ops,
            lambda: (r.layer(la.hidden_size, la.hidden_size), r(1, s, la.hidden_size), r(1, s, la.hidden_size), r(la.hidden_size)),
            2.0 * s * la.hidden_size**2,
        ),
    )

    def rotary_inputs() -> Tensors:
        qkv = r(1, s, (la.num_heads + 2 * la.num_kv_heads) * la.head_dim)
        weights = (r(la.head_dim).expand(la.num_heads, -1), r(la.head_dim).expand(la.num_kv_heads, -1))
        cos, sin = rotary_tables(s, la.head_dim, la.rope_theta, qkv)
        first, second = sin.chunk(2, dim=-1)
        return qkv, torch.cat(weights), cos, torch.cat((-first, second), dim=-1)

    yield (
        "language: q/k norm, rotary",
        Pair(lambda o, qkv, w, cos, sin: o.normed_rotated(qkv, la.num_heads, w, cos, sin, 1e-6)[:2], ops, rotary_inputs),
    )
