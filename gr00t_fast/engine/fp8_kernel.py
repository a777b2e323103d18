"""The product with weights of 8 bits (E4M3, a scale per output) for few rows, as a Triton kernel.

A denoising step multiplies 49 rows per observation with every weight of the diffusion transformer: reading the weights is the work, so enough
programs must read at once. They are multiplied in the rows' own format. The order of additions is fixed: the same inputs give the same bits.
Importing this imports triton. Axis alphabet: M rows (batch x tokens), K inner width, N outer width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gr00t_fast.errors import require

triton = require("triton", "triton")
tl = require("triton.language", "triton")

# With TRITON_INTERPRET=1, set before this import, the kernel runs in numpy on the CPU: slow, and the same program.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_SMALLEST_TILE = 16  # that tensor cores take
_LARGE_SHARED_BYTES = 160 * 1024  # of a multiprocessor: a data-centre card, with three to five times the memory bandwidth


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, and Triton's launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_tiles(m: int, n: int, k: int, dtype: torch.dtype, multiprocessors: int, shared_bytes: int) -> Tiles:
    """A rule of thumb, not a measurement: the widest tiles that occupy 65 % of the multiprocessors, each with as many bytes of weights under way as
    a memory latency takes. Four stages fit the shared memory in any combination."""
    block_m = min(max(triton.next_power_of_2(m), _SMALLEST_TILE), 128)
    length = (32 if dtype == torch.float32 else 64) * (2 if shared_bytes >= _LARGE_SHARED_BYTES else 1) * (2 if block_m == _SMALLEST_TILE else 1)
    rows = triton.cdiv(m, block_m)
    wide_enough = (width for width in (64, 32) if rows * triton.cdiv(n, width) >= 0.65 * multiprocessors)
    return Tiles(
        block_m,
        next(wide_enough, _SMALLEST_TILE),
        min(length, max(triton.next_power_of_2(k), _SMALLEST_TILE)),
        num_warps=8 if block_m == 128 else 4,
        num_stages=3 if block_m == 128 else 4,
    )


@triton.jit
def _kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # E4M3 (N, K)
    scale_ptr,  # fp32 (N,)
    bias_ptr,  # (N,)
    out_ptr,  # (M, N)
    m,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a whole number of blocks: loads need no mask along it
    WIDEN: tl.constexpr,  # to fp32 before multiplying
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of the output."""
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + inner
        x_inside = row < m
        weight_inside = column < n
        if not EVEN_K:
            x_inside = x_inside & (at[None, :] < k)
            weight_inside = weight_inside & (at[:, None] < k)
        x = tl.load(x_ptr + row * k + at[None, :], mask=x_inside, other=0.0)
        weight = tl.load(weight_ptr + column * k + at[:, None], mask=weight_inside, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision=PRECISION)
    total *= tl.load(scale_ptr + column, mask=column < n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + column, total.to(out_ptr.dtype.element_ty), mask=(row < m) & (column < n))


@torch.library.custom_op("gr00t_fast::fp8_weight_product", mutates_args=())
def fp8_weight_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) @ weight.T * scale + bias: weight E4M3 (N, K), scale fp32 (N,), bias (N,) of the type of x, all contiguous -> (M, N)."""
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty((m, n))
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        tiles = choose_tiles(m, n, k, x.dtype, properties.multi_processor_count, properties.shared_memory_per_block_optin)
    else:
        tiles = choose_tiles(m, n, k, x.dtype, 4, 99 * 1024)  # the interpreter: few programs
    with torch.cuda.device_of(x):  # which need not be the current one
        _kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
            *(x, weight, scale, bias, out, m, n, k),
            HAS_BIAS=bias is not None,
            EVEN_K=k % tiles.block_k == 0,
            WIDEN=INTERPRETED and x.dtype == torch.bfloat16,  # the interpreter would multiply the bit patterns as integers
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # fp32 stays fp32; ignored for 16-bit operands
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


@fp8_weight_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
