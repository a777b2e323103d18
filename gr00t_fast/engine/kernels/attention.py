"""Attention of few queries over some hundred keys, read from and written to the layouts that projections have.

The parts of a split query projection are added up as they are read. A head dim of 48 is padded to 64 in registers only. Softmax is accumulated block
by block (Milakov & Gimelshein 2018; Dao et al. 2022).
Axis alphabet: B batch, N heads, T queries, S keys, K head dim, P partial sums of a split matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gr00t_fast.engine.kernels.launch import INTERPRETED, Processor, check, dot_extent, dot_precision, on, processor_of, tl, triton

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionConfig:
    """Tile sizes and Triton's launch options."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


def choose_config(batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, processor: Processor) -> AttentionConfig:
    """A rule of thumb, not a measurement: tiles of 16 queries unless larger ones (in fp32 64 would not fit the registers) occupy all multiprocessors.
    Shared memory stays below 99 KB."""
    large = 32 if dtype == torch.float32 else 64
    block_t = large if batch * heads * triton.cdiv(queries, large) >= processor.multiprocessors else 16
    block_s = min(dot_extent(keys), 64 if dim <= 64 and dtype != torch.float32 else 32)
    return AttentionConfig(block_t, block_s, num_warps=4, num_stages=3 if dtype != torch.float32 else 2)


@triton.jit
def _attention_kernel(
    q_ptr,  # (P, B, N, T, K), by its strides; the last is 1
    q_bias_ptr,  # (N, K)
    k_ptr,  # (B, N, S, K), by its strides; the last is 1
    v_ptr,  # as k
    out_ptr,  # (B, T, N, K)
    heads,
    queries,
    keys,
    q_stride_p,
    q_stride_b,
    q_stride_n,
    q_stride_t,
    k_stride_b,
    k_stride_n,
    k_stride_s,
    v_stride_b,
    v_stride_n,
    v_stride_s,
    scale_log2,  # 1 / sqrt(K), times log2(e): powers of two are what the hardware has
    PARTS: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,  # to fp32 before multiplying
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per tile of queries of one head."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, DIM_BLOCK)
    within = column < DIM
    row_inside = (row < queries)[:, None] & within[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_n + row[:, None] * q_stride_t + column[None, :]
    q = tl.load(q_at, mask=row_inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        q += tl.load(q_at + part * q_stride_p, mask=row_inside, other=0.0)
    if HAS_Q_BIAS:
        q = q.to(tl.float32) + tl.load(q_bias_ptr + head * DIM + column, mask=within, other=0.0).to(tl.float32)[None, :]
    q = q.to(k_ptr.dtype.element_ty)
    if WIDEN:
        q = q.to(tl.float32)
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T, DIM_BLOCK], tl.float32)
    for start in range(0, keys, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        exists = key < keys
        k_at = k_ptr + batch * k_stride_b + head * k_stride_n + key[None, :] * k_stride_s + column[:, None]
        k = tl.load(k_at, mask=exists[None, :] & within[:, None], other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))  # finite: every block has a key
        probabilities = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        weight = weight * decay + tl.sum(probabilities, axis=1)
        v_at = v_ptr + batch * v_stride_b + head * v_stride_n + key[:, None] * v_stride_s + column[None, :]
        v = tl.load(v_at, mask=exists[:, None] & within[None, :], other=0.0)
        probabilities = probabilities.to(v.dtype)
        if WIDEN:
            probabilities = probabilities.to(tl.float32)
            v = v.to(tl.float32)
        total = tl.dot(probabilities, v, total * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    total = total / weight[:, None]
    at = ((batch * queries + row[:, None]) * heads + head) * DIM + column[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=row_inside)


def attention(q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None = None, config: AttentionConfig | None = None) -> Tensor:
    """q (B, N, T, K), or fp32 partial sums of it (P, B, N, T, K); k and v (B, N, S, K); each with contiguous last axis and any other strides;
    q_bias (N K,), added to q -> (B, T, N K), heads merged. Raises ValueError for tensors that do not fit."""
    parts = q.unsqueeze(0) if q.dim() == 4 else q
    check("k", k, (None, None, None, None), contiguous=False)
    batch, heads, keys, dim = k.shape
    check("v", v, tuple(k.shape), like=k, contiguous=False)
    check("q", parts, (None, batch, heads, None, dim), like=k if q.dim() == 4 else None, contiguous=False)
    if q.dim() == 5 and (q.dtype, q.device) != (torch.float32, k.device):
        raise ValueError(f"q: expected partial sums in fp32 on {k.device}, got {q.dtype} on {q.device}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last axis, got strides {tensor.stride()}")
    if q_bias is not None:
        check("q_bias", q_bias, (heads * dim,), like=k)
    queries = q.shape[-2]
    config = config or choose_config(batch, heads, queries, keys, dim, k.dtype, processor_of(k.device))
    out = k.new_empty((batch, queries, heads * dim))
    with on(k):
        _attention_kernel[(triton.cdiv(queries, config.block_t), batch * heads)](
            *(parts, q_bias, k, v, out, heads, queries, keys),
            *(*parts.stride()[:4], *k.stride()[:3], *v.stride()[:3], _LOG2_E / math.sqrt(dim)),
            PARTS=parts.shape[0],
            HAS_Q_BIAS=q_bias is not None,
            WIDEN=INTERPRETED and k.dtype == torch.bfloat16,  # the interpreter would multiply the bit patterns as integers
            PRECISION=dot_precision(k.dtype),
            DIM=dim,
            DIM_BLOCK=dot_extent(dim),
            BLOCK_T=config.block_t,
            BLOCK_S=config.block_s,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
