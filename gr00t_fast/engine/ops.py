"""The operations that the fused model is made of: few launches each, on any device; differentiable where autograd records.

Every operation keeps the dtype of `x`.
Axis alphabet: B batch, T tokens, S keys, D width, N query heads, M key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model.layers import merge_heads, split_heads

Activation = Literal["gelu", "silu", "relu"]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
_IN_THE_PRODUCT = ("gelu", "relu")  # what cuBLASLt computes in the epilogue of a product


@dataclass(frozen=True)
class Norm:
    """y = normalised(x) * scale + shift. scale and shift (D,) or None; `centred`: LayerNorm, else RMSNorm."""

    eps: float
    scale: Tensor | None = None
    shift: Tensor | None = None
    centred: bool = True

    @classmethod
    def of(cls, module: nn.LayerNorm | nn.RMSNorm) -> Norm:
        """The norm that a module of the model holds."""
        layer = isinstance(module, nn.LayerNorm)
        return cls(module.eps, module.weight, module.bias if layer else None, layer)


def norm(x: Tensor, spec: Norm) -> Tensor:
    """x (..., D) -> the same shape."""
    width = (x.shape[-1],)
    if not spec.centred:
        return F.rms_norm(x, width, spec.scale, spec.eps)
    return F.layer_norm(x, width, spec.scale, spec.shift, spec.eps)


def linear(layer: nn.Module, x: Tensor, activation: Activation | None = None, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """activation(layer(x)) + residual: x (B, T, D) -> (B, T, out). `bias` (out,): instead of the layer's own, of a plain nn.Linear."""
    if type(layer) is not nn.Linear:
        y = ACTIVATIONS[activation](layer(x))
    else:
        bias = layer.bias if bias is None else bias
        # A CPU computes the other GELU here (erf), and autograd has no formula for it
        if activation in _IN_THE_PRODUCT and bias is not None and x.is_cuda and not torch.is_grad_enabled():
            rows = x.reshape(-1, x.shape[-1])
            y = torch._addmm_activation(bias, rows, layer.weight.t(), use_gelu=activation == "gelu").reshape(*x.shape[:-1], -1)
        else:
            y = ACTIVATIONS[activation](F.linear(x, layer.weight, bias))
    return y if residual is None else y + residual


def linear_add_norm(layer: nn.Module, h: Tensor, x: Tensor, spec: Norm) -> tuple[Tensor, Tensor]:
    """x + layer(h), and its norm: h (B, T, in), x (B, T, D)."""
    x = x + linear(layer, h)
    return x, norm(x, spec)


def self_attention(qkv: nn.Module, x: Tensor, heads: int) -> Tensor:
    """x (B, T, D) -> (B, T, D), heads merged and not yet projected."""
    q, k, v = (split_heads(part, heads) for part in linear(qkv, x).chunk(3, dim=-1))  # (B, N, T, K)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def cross_attention(q: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """x (B, T, D), keys and values (B, N, S, K) -> (B, T, D), heads merged and not yet projected."""
    return merge_heads(F.scaled_dot_product_attention(split_heads(linear(q, x), keys.shape[1]), keys, values))


def normed_rotated(qkv: Tensor, heads: int, head_norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, S, (N + 2 M) K) -> q (B, N, S, K), k and v (B, M, S, K): queries and keys normed head by head and rotated.

    head_norm (N + M, K): the norm's weight of each query head, then of each key head; cos and sin (S, K), sin with the sign of the rotation.
    """
    width, kv_heads = cos.shape[-1], head_norm.shape[0] - heads
    qk, v = qkv.split(((heads + kv_heads) * width, kv_heads * width), dim=-1)
    qk = F.rms_norm(qk.reshape(*qk.shape[:2], -1, width), (width,), eps=eps) * head_norm  # (B, S, N + M, K)
    qk = qk.transpose(1, 2)  # (B, N + M, S, K)
    qk = torch.addcmul(qk * cos, qk.roll(width // 2, dims=-1), sin)  # halves rotated against each other, as model.layers.rotate does
    q, k = qk.split((heads, kv_heads), dim=1)
    return q, k, split_heads(v, kv_heads)
