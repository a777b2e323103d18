"""The operations of engine/ops.py as Triton kernels.

The towers keep torch's matrix products, which have hundreds of rows, and torch's attention. A denoising step, 49 rows per observation, has no product
of torch's left: per block of the diffusion transformer 7 launches. Every kernel has its twin in engine/ops.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from gr00t_fast.engine.kernels.attention import attention
from gr00t_fast.engine.kernels.gemm import linear, linear_parts
from gr00t_fast.engine.kernels.norms import norm, residual_norm
from gr00t_fast.engine.kernels.rotary import normed_rotated
from gr00t_fast.engine.ops import Activation, Norm, TorchOps
from gr00t_fast.engine.quantized import Fp8WeightLinear
from gr00t_fast.model.layers import split_heads


class TowerOps(TorchOps):
    """For hundreds of rows: what lies between the matrix products."""

    def norm(self, x: Tensor, spec: Norm) -> Tensor:
        return norm(x.contiguous(), spec)

    def linear_add_norm(self, layer: nn.Module, h: Tensor, x: Tensor, spec: Norm) -> tuple[Tensor, Tensor]:
        return residual_norm(x, self.linear(layer, h), spec)

    def normed_rotated(self, qkv: Tensor, heads: int, head_norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return normed_rotated(qkv, heads, head_norm, cos, sin, eps)


class StepOps(TowerOps):
    """For few rows: everything. Layers are nn.Linear or Fp8WeightLinear."""

    def linear(
        self, layer: nn.Module, x: Tensor, activation: Activation | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if residual is not None:
            residual = residual.expand(*x.shape[:-1], -1).contiguous()
        return linear(x, layer.weight, layer.bias if bias is None else bias, activation, residual, _scale_of(layer))

    def linear_add_norm(self, layer: nn.Module, h: Tensor, x: Tensor, spec: Norm) -> tuple[Tensor, Tensor]:
        return residual_norm(x, linear_parts(h, layer.weight, _scale_of(layer)), spec, layer.bias)

    def self_attention(self, qkv: nn.Module, x: Tensor, heads: int) -> Tensor:
        return attention(*(split_heads(part, heads) for part in self.linear(qkv, x).chunk(3, dim=-1)))

    def cross_attention(self, q: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The sum over parts of K is left to attention, which reads each query once."""
        parts = linear_parts(x, q.weight, _scale_of(q))  # (P, B T, D)
        parts = parts.reshape(-1, *x.shape[:2], keys.shape[1], keys.shape[3])  # (P, B, T, N, K)
        return attention(parts.transpose(2, 3), keys, values, q.bias)


def _scale_of(layer: nn.Module) -> Tensor | None:
    """fp32 (N,), of weights in 8 bits."""
    return layer.weight_scale if isinstance(layer, Fp8WeightLinear) else None
