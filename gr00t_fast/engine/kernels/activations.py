"""Activation functions between matrix products: one pass over memory instead of two or three.

Axis alphabet: M rows (batch x tokens), I inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr00t_fast.engine.kernels.launch import check, on, tl, triton

_BLOCK = 1024  # elements per program: eight per thread, one 16-byte access in 16-bit formats
_WARPS = 4


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form, of an fp32 tile. 0.5 (1 + tanh(u)) is sigmoid(2 u), and Triton has no tanh of its own."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi); Hendrycks & Gimpel 2016
    return x * tl.sigmoid(2.0 * inner)


@triton.jit
def silu(x):
    """x sigmoid(x), of an fp32 tile."""
    return x * tl.sigmoid(x)


@triton.jit
def _bias_gelu_kernel(
    x_ptr,  # (M, I)
    bias_ptr,  # (I,)
    out_ptr,  # (M, I)
    width,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, gelu_tanh(x).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # (M, 2 I): gate, then up
    out_ptr,  # (M, I)
    width,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at = gate_up_ptr + row * 2 * width + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias): x (..., I), bias (I,). Raises ValueError for tensors that do not fit."""
    width = x.shape[-1]
    check("x", x, tuple(x.shape))
    check("bias", bias, (width,), like=x)
    out = torch.empty_like(x)
    with on(x):
        _bias_gelu_kernel[(x.numel() // width, triton.cdiv(width, _BLOCK))](x, bias, out, width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of gate_up (..., 2 I) -> (..., I). Raises ValueError for tensors that do not fit."""
    check("gate_up", gate_up, tuple(gate_up.shape))
    width, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"gate_up: expected two halves, got rows of {gate_up.shape[-1]} elements")
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    with on(gate_up):
        _swiglu_kernel[(out.numel() // width, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


# --- twins --------------------------------------------------------------------------------------------------------------------------------


def bias_gelu_twin(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def swiglu_twin(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
