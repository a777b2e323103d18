"""LayerNorm and RMSNorm, with the addition before them and the modulation after them, in one pass over memory.

A block of the network ends with `x = x + y` and the next begins with `norm(x)`: apart, x is written, read, written as its norm and, for AdaLN,
read and written twice more. Here each row is read once; sums are fp32, and the norm sees the sum as it was rounded to the model's dtype.
Axis alphabet: M rows (batch x tokens), D width, P partial sums of a split matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr00t_fast.engine.kernels.launch import check, on, power_of_two, tl, triton
from gr00t_fast.engine.ops import Norm

_COLUMNS_PER_WARP = 256  # eight per thread: one 16-byte access in 16-bit formats
_MAX_WARPS = 8
_MAX_WIDTH = 16384  # a row is held in registers


@triton.jit
def _norm_kernel(
    x_ptr,  # (M, D)
    parts_ptr,  # (P, M, D)
    bias_ptr,  # (D,)
    scale_ptr,  # (D,)
    shift_ptr,  # (D,)
    sum_ptr,  # (M, D)
    out_ptr,  # (M, D)
    rows,
    width,
    eps,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        y = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            y += tl.load(parts_ptr + part * rows * width + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, spec: Norm) -> Tensor:
    """x (..., D) -> its norm, the same shape and dtype. Raises ValueError for tensors that do not fit."""
    out = torch.empty_like(x)
    _launch(x, None, None, spec, out, out)
    return out


def residual_norm(x: Tensor, y: Tensor, spec: Norm, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (..., D) and y, either as x or fp32 partial sums (P, M, D) of a matrix product: -> x + y + bias, and its norm.

    Raises ValueError for tensors that do not fit.
    """
    total, out = torch.empty_like(x), torch.empty_like(x)
    parts = y.unsqueeze(0) if y.shape == x.shape else y
    _launch(x, parts, bias, spec, total, out)
    return total, out


def _launch(x: Tensor, parts: Tensor | None, bias: Tensor | None, spec: Norm, total: Tensor, out: Tensor) -> None:
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    check("x", x, tuple(x.shape))
    if width > _MAX_WIDTH:
        raise ValueError(f"x: expected rows of at most {_MAX_WIDTH} elements, got {width}")
    if parts is not None:
        _check_parts(parts, x, rows)
    for name, vector in (("bias", bias), ("scale", spec.scale), ("shift", spec.shift)):
        if vector is not None:
            check(name, vector, (width,), like=x)
    block = power_of_two(width)
    with on(x):
        _norm_kernel[(rows,)](
            *(x, parts, bias, spec.scale, spec.shift, total, out, rows, width, spec.eps),
            PARTS=0 if parts is None else parts.shape[0],
            HAS_BIAS=bias is not None,
            HAS_SCALE=spec.scale is not None,
            HAS_SHIFT=spec.shift is not None,
            CENTRED=spec.centred,
            BLOCK=block,
            num_warps=min(max(block // _COLUMNS_PER_WARP, 1), _MAX_WARPS),
        )


def _check_parts(parts: Tensor, x: Tensor, rows: int) -> None:
    if parts.shape[1:] == x.shape:
        check("y", parts, tuple(parts.shape))
    else:
        check("y", parts, (None, rows, x.shape[-1]))
    if parts.device != x.device:
        raise ValueError(f"y: expected {x.device} as x, got {parts.device}")
