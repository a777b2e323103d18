"""RMSNorm of each query and key head and rotary positions in one pass, from the fused projection to the layout that attention reads.

Apart, these are two norms and two rotations of six operations each, on strided halves.
Axis alphabet: B batch, S tokens, N query heads, M key/value heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor

from gr00t_fast.engine.kernels.launch import check, on, power_of_two, tl, triton
from gr00t_fast.model.layers import split_heads

_WARPS = 4


@triton.jit
def _rotary_kernel(
    qkv_ptr,  # (B, S, (N + 2 M) K)
    q_weight_ptr,  # (K,)
    k_weight_ptr,  # (K,)
    cos_ptr,  # (S, K)
    sin_ptr,  # (S, K), with the sign of the rotation: its first half is negative
    q_ptr,  # (B, S, N, K)
    k_ptr,  # (B, S, M, K)
    tokens,
    heads,
    kv_heads,
    eps,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One program per token, for all its heads: queries' first, then keys'. The halves that rotate against each other are two tiles."""
    row = tl.program_id(0)  # of B x S
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    within = column < HALF
    inside = (head < heads + kv_heads) & within
    at = row * (heads + 2 * kv_heads) * (2 * HALF) + head * (2 * HALF) + column
    first = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)[:, None]
    is_query = head < heads
    q_first = tl.load(q_weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight_ptr + HALF + column, mask=within, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight_ptr + HALF + column, mask=within, other=0.0).to(tl.float32)
    first = first * scale * tl.where(is_query, q_first, k_first)
    second = second * scale * tl.where(is_query, q_second, k_second)
    angle = (row % tokens) * (2 * HALF) + column
    cos_first = tl.load(cos_ptr + angle, mask=within, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angle + HALF, mask=within, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angle, mask=within, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angle + HALF, mask=within, other=0.0).to(tl.float32)
    out_first = (first * cos_first + second * sin_first).to(q_ptr.dtype.element_ty)
    out_second = (second * cos_second + first * sin_second).to(q_ptr.dtype.element_ty)
    q_at = row * heads * (2 * HALF) + head * (2 * HALF) + column
    tl.store(q_ptr + q_at, out_first, mask=is_query & within)
    tl.store(q_ptr + q_at + HALF, out_second, mask=is_query & within)
    k_at = row * kv_heads * (2 * HALF) + (head - heads) * (2 * HALF) + column
    is_key = (head >= heads) & inside
    tl.store(k_ptr + k_at, out_first, mask=is_key)
    tl.store(k_ptr + k_at + HALF, out_second, mask=is_key)


def normed_rotated(qkv: Tensor, heads: int, head_norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As TorchOps.normed_rotated, v as it is in qkv; all query heads have the same norm weight, and all key heads. Raises ValueError for tensors that
    do not fit."""
    check("qkv", qkv, (None, None, None))
    kv_heads = head_norm.shape[0] - heads
    batch, tokens, width = qkv.shape
    dim = width // (heads + 2 * kv_heads)
    if dim % 2 or dim * (heads + 2 * kv_heads) != width:
        raise ValueError(f"qkv: expected {heads} + 2 x {kv_heads} heads of an even width, got {width} columns")
    for name, tensor, shape in (("head_norm", head_norm, (heads + kv_heads, dim)), ("cos", cos, (tokens, dim)), ("sin", sin, (tokens, dim))):
        check(name, tensor, shape, like=qkv)
    q, k = qkv.new_empty((batch, tokens, heads, dim)), qkv.new_empty((batch, tokens, kv_heads, dim))
    with on(qkv):
        _rotary_kernel[(batch * tokens,)](
            *(qkv, head_norm[0], head_norm[-1], cos, sin, q, k, tokens, heads, kv_heads, eps),
            HALF=dim // 2,
            HEADS_BLOCK=power_of_two(heads + kv_heads),
            HALF_BLOCK=power_of_two(dim // 2),
            num_warps=_WARPS,
        )
    return q.transpose(1, 2), k.transpose(1, 2), split_heads(qkv[..., (heads + kv_heads) * dim :], kv_heads)
