"""A linear layer whose matrix product is done in 8 bits: INT8 or FP8 (E4M3).

    y = rescale * (rounded(x * inverse) @ weight.T) + bias

`inverse` holds one number per input channel: what a channel of outliers is divided by (its weights are multiplied with the same), and the step of
the 8-bit grid. Weights are rounded once, when the layer is made. INT8 weights have one scale per output channel; FP8 has one scale per tensor,
because its numbers keep their relative precision over 15 powers of two. INT8 activations have a scale from calibration, or one per token, found at
run time; FP8's come from calibration.

The product itself is a function, so that each layer has a twin that differs in nothing else: the GPU's own 8-bit product, or the same written out.

Axis alphabet: R rows (tokens), K input width, N output width. Weights are stored (N, K), as torch stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.errors import CheckpointError

FORMATS = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}  # of E4M3 without infinity (Micikevicius et al. 2022)
_SMALLEST = 1e-6  # a scale of what is always zero: any will do, but not zero
_ALIGNMENT = 16  # of K and N: torch._scaled_mm asks for 16, torch._int_mm for 8
_MIN_INT8_ROWS = 17  # torch._int_mm refuses fewer on CUDA
_PADDED_ROWS = 32

IntProduct = Callable[[Tensor, Tensor], Tensor]  # int8 (R, K) and (N, K) -> int32 (R, N)
# fp8 (R, K) and (N, K), their scales (fp32, no axis), bias (N,) or None, the type of the answer -> (R, N)
Fp8Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


@dataclass(frozen=True)
class InputScale:
    """How the inputs of one or more layers are rounded. largest: |input| that the largest 8-bit number stands for, after division by `smoothing`
    (fp32 (K,), positive), if any."""

    largest: float
    smoothing: Tensor | None = None


def int_product(rows: Tensor, weight: Tensor) -> Tensor:
    """On the tensor cores. Exact: 32-bit sums overflow beyond K = 133,000."""
    return torch._int_mm(rows, weight.t())


def emulated_int_product(rows: Tensor, weight: Tensor) -> Tensor:
    """The same numbers: float64 holds every sum of such integers exactly."""
    return (rows.double() @ weight.double().t()).to(torch.int32)


def fp8_product(rows: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """On the tensor cores. `use_fast_accum`: Hopper keeps 14 bits of the running sums, where E4M3 keeps 4 of each factor."""
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def emulated_fp8_product(rows: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same up to the order of summation in fp32: products of two E4M3 numbers are exact there."""
    product = (rows.float() @ weight.float().t()) * (row_scale * weight_scale)
    return (product if bias is None else product + bias.float()).to(dtype)


class Int8Linear(nn.Module):
    """INT8 weights (N, K), sums in 32 bits."""

    def __init__(self, linear: nn.Linear, scale: InputScale, inverse: Tensor, per_token: bool, product: IntProduct) -> None:
        """`inverse`: of `inverse_of`, shared by layers that read the same tensor. Raises CheckpointError for weights that are NaN or infinite."""
        super().__init__()
        self.out_features, self.per_token, self._product = linear.out_features, per_token, product
        weight = _smoothed(linear, scale)  # fp32 (N, K)
        steps = _finite(weight.abs().amax(dim=1).clamp_min(_SMALLEST)) / LARGEST["int8"]  # (N,)
        rounded = (weight / steps[:, None]).round().clamp(-127, 127).to(torch.int8)
        rescale = steps if per_token else steps * _step(scale, "int8")
        self.register_buffer("weight", _padded(rounded))
        self.register_buffer("inverse", inverse)  # fp32 (K,)
        self.register_buffer("rescale", rescale)  # fp32 (N,)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) of any float type -> (..., N) of the same."""
        rows = x.flatten(0, -2).float() * self.inverse  # (R, K)
        rescale = self.rescale
        if self.per_token:
            step = rows.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST) / LARGEST["int8"]  # (R, 1)
            rows, rescale = rows / step, rescale * step  # (R, K), (R, N)
        y = self.sums(rows.round().clamp(-128, 127).to(torch.int8)).float() * rescale  # (R, N)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])  # (..., N)

    def sums(self, rows: Tensor) -> Tensor:
        """int8 (R, K) -> int32 (R, N)."""
        count, width = rows.shape
        more = _PADDED_ROWS - count if count < _MIN_INT8_ROWS else 0
        columns = self.weight.shape[1] - width
        if more or columns:
            rows = F.pad(rows, (0, columns, 0, more))
        return self._product(rows, self.weight)[:count, : self.out_features]


class Fp8Linear(nn.Module):
    """E4M3 weights (N, K), sums in fp32."""

    def __init__(self, linear: nn.Linear, scale: InputScale, inverse: Tensor, product: Fp8Product) -> None:
        """As `Int8Linear`."""
        super().__init__()
        self.out_features, self._product = linear.out_features, product
        weight = _smoothed(linear, scale)  # fp32 (N, K)
        step = _finite(weight.abs().amax().clamp_min(_SMALLEST)) / LARGEST["fp8"]
        self.register_buffer("weight", _padded(to_fp8(weight / step)))
        self.register_buffer("inverse", inverse)  # fp32 (K,)
        self.register_buffer("row_scale", torch.tensor(_step(scale, "fp8"), dtype=torch.float32, device=weight.device))
        self.register_buffer("weight_scale", step)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", None if bias is None else F.pad(bias, (0, self.weight.shape[0] - len(bias))))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) of any float type -> (..., N) of the same."""
        rows = to_fp8(x.flatten(0, -2).float() * self.inverse)  # (R, K)
        if columns := self.weight.shape[1] - rows.shape[1]:
            rows = F.pad(rows.view(torch.uint8), (0, columns)).view(rows.dtype)  # padding is not implemented for fp8; 0 is the byte 0
        inside = None if x.dtype == torch.float32 else self.bias  # the product adds a 16-bit bias only
        y = self._product(rows, self.weight, self.row_scale, self.weight_scale, inside, x.dtype)
        if self.bias is not None and inside is None:
            y = y + self.bias
        return y[:, : self.out_features].unflatten(0, x.shape[:-1])  # (..., N)


def inverse_of(scale: InputScale, width: int, format: str, per_token: bool, device: torch.device) -> Tensor:
    """fp32 (K,): what inputs are multiplied with before they are rounded."""
    channels = torch.ones(width) if scale.smoothing is None else 1.0 / scale.smoothing.float().cpu()
    return (channels if per_token else channels / _step(scale, format)).to(device)


def to_fp8(values: Tensor) -> Tensor:
    """fp32 -> E4M3, saturating: the cast alone makes NaN of what is too large."""
    return values.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)


def _step(scale: InputScale, format: str) -> float:
    return max(scale.largest, _SMALLEST) / LARGEST[format]


def _smoothed(linear: nn.Linear, scale: InputScale) -> Tensor:
    weight = linear.weight.detach().float()
    return weight if scale.smoothing is None else weight * scale.smoothing.to(weight.device, torch.float32)


def _finite(sizes: Tensor) -> Tensor:
    """Rounding would turn NaN into an ordinary number, and hide it from every later check."""
    if not torch.isfinite(sizes).all():
        raise CheckpointError("a weight to be rounded to 8 bits is NaN or infinite; expected finite ones. Copy or download the checkpoint again.")
    return sizes


def _padded(weight: Tensor) -> Tensor:
    """(N, K) with zeros up to the alignment, contiguous."""
    rows, columns = (_ALIGNMENT * math.ceil(size / _ALIGNMENT) for size in weight.shape)
    raw = F.pad(weight.view(torch.uint8), (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
    return raw.view(weight.dtype).contiguous()
