"""Matrix products with few rows, with what comes after them in the same launch.

A denoising step multiplies 49 rows per observation with every weight of the diffusion transformer: reading the weights is the work, so enough
programs must read at once. Weights may be in 8 bits (E4M3, a scale per output): half the bytes, multiplied in the inputs' 16. Where the output alone
has too few tiles, the inner axis is split too (`linear_parts`) and the sum is left to the kernel that comes next, which adds the residual and
normalises anyway. The order of additions is fixed: the same inputs give the same bits.
Axis alphabet: M rows (batch x tokens), K inner width, N outer width, P parts of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gr00t_fast.engine.kernels.launch import INTERPRETED, Processor, check, dot_extent, dot_precision, on, processor_of, tl, triton
from gr00t_fast.engine.ops import ACTIVATIONS

_NAMES = {None: "none", "gelu": "gelu", "silu": "silu", "relu": "relu"}
_E4M3 = torch.float8_e4m3fn
_FEWEST_CHUNKS = 2  # of K per part: with one, nothing is loaded while something is multiplied


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes, parts of K, and Triton's launch options."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int


def choose_config(m: int, n: int, k: int, dtype: torch.dtype, splits: bool, processor: Processor) -> GemmConfig:
    """A rule of thumb, not a measurement: enough programs to occupy most multiprocessors, each
    with as many bytes of weights under way as a memory latency takes.

    Without splitting, the widest tiles that occupy 65 % of them. With it, tiles of 64 columns, and the most parts of equal length that still give
    each program a multiprocessor of its own.
    """
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    row_tiles = triton.cdiv(m, block_m)
    block_k = min(_block_k(block_m, dtype, processor), dot_extent(k))
    stages = 3 if block_m == 128 else 4
    if not splits:
        wide_enough = (width for width in (64, 32) if row_tiles * triton.cdiv(n, width) >= 0.65 * processor.multiprocessors)
        return GemmConfig(block_m, next(wide_enough, 16), block_k, 1, 8 if block_m == 128 else 4, stages)
    tiles, chunks = row_tiles * triton.cdiv(n, 64), triton.cdiv(k, block_k)
    fitting = [p for p in range(1, chunks // _FEWEST_CHUNKS + 1) if chunks % p == 0 and tiles * p <= processor.multiprocessors]
    # 4 warps would spill a register on sm_120
    return GemmConfig(block_m, 64, block_k, max(fitting, default=1), 8 if block_m == 128 or not processor.deep else 4, stages)


def _block_k(block_m: int, dtype: torch.dtype, processor: Processor) -> int:
    """Twice as long where rows are few or the card is a data-centre's; tiles of four stages then fit its shared memory in any combination."""
    length = 32 if dtype == torch.float32 else 64
    return length * (2 if processor.deep else 1) * (2 if block_m == 16 else 1)


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
def _linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K) or (K, N), by its strides
    scale_ptr,  # fp32 (N,), of weights in 8 bits
    bias_ptr,  # (N,)
    residual_ptr,  # (M, N)
    out_ptr,  # (P, M, N)
    m,
    n,
    k,
    stride_n,
    stride_k,
    k_per_part,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # every part is a whole number of blocks: loads need no mask along K
    WIDEN: tl.constexpr,  # to fp32 before multiplying
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of the output and part of K."""
    part = tl.program_id(2)
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inner = tl.arange(0, BLOCK_K)
    begin = part * k_per_part
    end = tl.minimum(begin + k_per_part, k)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        at = start + inner
        x_inside = row < m
        weight_inside = column < n
        if not EVEN_K:
            x_inside = x_inside & (at[None, :] < end)
            weight_inside = weight_inside & (at[:, None] < end)
        x = tl.load(x_ptr + row * k + at[None, :], mask=x_inside, other=0.0)
        weight = tl.load(weight_ptr + column * stride_n + at[:, None] * stride_k, mask=weight_inside, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        weight = weight.to(x.dtype)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + column, mask=column < n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        total = gelu_tanh(total)
    elif ACTIVATION == "silu":
        total = silu(total)
    elif ACTIVATION == "relu":
        total = tl.maximum(total, 0.0)
    at = row * n + column
    inside = (row < m) & (column < n)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + part * m * n + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """activation(x @ weight.T * scale + bias) + residual: x (..., K), weight (N, K) with either axis contiguous, bias (N,), residual (..., N) ->
    (..., N). scale fp32 (N,): of a weight in E4M3.

    activation: None, 'gelu' (tanh), 'silu' or 'relu'. Raises ValueError for tensors that do not fit.
    """
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    config = config or choose_config(_rows(x), *weight.shape, x.dtype, False, processor_of(x.device))
    if config.parts != 1:
        raise ValueError(f"config: expected 1 part of K, since nothing would add them up; got {config.parts}. Use linear_parts")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(str, ACTIVATIONS))}; got '{activation}'")
    if bias is not None:
        check("bias", bias, (weight.shape[0],), like=x)
    if residual is not None:
        check("residual", residual, tuple(out.shape), like=x)
    _launch(x, weight, scale, bias, activation, residual, out, config)
    return out


def linear_parts(x: Tensor, weight: Tensor, scale: Tensor | None = None, config: GemmConfig | None = None) -> Tensor:
    """x @ weight.T * scale as fp32 partial sums over parts of K: x (..., K), weight and scale as of `linear` -> (P, M, N), for `residual_norm`.

    Raises ValueError for tensors that do not fit.
    """
    config = config or choose_config(_rows(x), *weight.shape, x.dtype, True, processor_of(x.device))
    out = x.new_empty((config.parts, _rows(x), weight.shape[0]), dtype=torch.float32)
    _launch(x, weight, scale, None, None, None, out, config)
    return out


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor,
    config: GemmConfig,
) -> None:
    check("x", x, tuple(x.shape))
    m, (n, k) = _rows(x), weight.shape
    if scale is None:
        check("weight", weight, (None, x.shape[-1]), like=x, contiguous=False)
    elif (weight.dtype, weight.device, weight.shape[1:], scale.dtype, scale.shape) != (_E4M3, x.device, x.shape[-1:], torch.float32, (n,)):
        raise ValueError(
            f"weight: expected E4M3 of shape (any, {x.shape[-1]}) on {x.device} with an fp32 scale per row, got {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}, {scale.dtype} of shape {tuple(scale.shape)}"
        )
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        raise ValueError(f"weight: expected one axis contiguous and no gaps, got strides {weight.stride()} for shape {tuple(weight.shape)}")
    k_per_part = config.block_k * triton.cdiv(triton.cdiv(k, config.block_k), config.parts)
    with on(x):
        _linear_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.parts)](
            *(x, weight, scale, bias, residual, out, m, n, k, weight.stride(0), weight.stride(1), k_per_part),
            ACTIVATION=_NAMES[activation],
            HAS_SCALE=scale is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            EVEN_K=k_per_part * config.parts == k,
            WIDEN=INTERPRETED and x.dtype == torch.bfloat16,  # the interpreter would multiply the bit patterns as integers
            PRECISION=dot_precision(x.dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
