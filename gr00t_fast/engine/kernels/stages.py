"""The stages of the model with the kernels of this package in them: the parameters as laid_out.py joins them, in another sequence of launches.

The towers keep torch's matrix products, which have hundreds of rows, and torch's attention where nothing is masked. A denoising step, 49 rows per
observation, has no product of torch's left: per block of the diffusion transformer 7 launches, where the plain model has 12 or more.
Axis alphabet: B batch, T tokens, S prompt tokens, H horizon, A padded action width, D width, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gr00t_fast.engine.kernels.activations import bias_gelu, swiglu
from gr00t_fast.engine.kernels.attention import attention
from gr00t_fast.engine.kernels.gemm import linear, linear_parts
from gr00t_fast.engine.kernels.norms import Norm, norm, residual_norm
from gr00t_fast.engine.kernels.rotary import normed_rotated
from gr00t_fast.engine.laid_out import HeadStage, joined
from gr00t_fast.engine.stages import Stages
from gr00t_fast.model import Condition, Gr00tN1d5, ModelInputs
from gr00t_fast.model.action_head import ActionHead
from gr00t_fast.model.dit import DiTBlock
from gr00t_fast.model.language import GroupedQueryAttention
from gr00t_fast.model.layers import PreNormBlock, SelfAttention, merge_heads, rotary_tables, split_heads

_DIT_NORM_EPS, _OUTPUT_NORM_EPS = 1e-5, 1e-6  # as in gr00t_fast/model/dit.py

Attend = Callable[[SelfAttention, Tensor], Tensor]


def fused_stages(model: Gr00tN1d5) -> Stages:
    """The five stages of `model` with fused kernels. Its weights are moved into joined matrices: their values do not change."""
    with torch.no_grad():
        language, head = FusedLanguage(model), FusedHead(model)
    return Stages(lambda pixel_values: _vision(model, pixel_values), language, head.refine, head.condition, head.velocity)


# --- towers -------------------------------------------------------------------------------------------------------------------------------


def _vision(model: Gr00tN1d5, pixel_values: Tensor) -> Tensor:
    """As Gr00tN1d5.encode_vision: (B, C, 3, h, w) -> (B, V, D)."""
    tower, convolution = model.vision, model.vision.patch_embedding
    patch = convolution.kernel_size[0]
    rows = pixel_values.flatten(0, 1).unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)  # (B C, rows, columns, 3, p, p)
    x = F.linear(rows.flatten(3).flatten(1, 2), convolution.weight.flatten(1), convolution.bias) + tower.position_embedding.weight  # (B C, T, D)
    _, normed = _pre_norm_blocks(x, tower.blocks, tower.norm, lambda layer, h: layer(h))
    return tower.connector(normed).unflatten(0, pixel_values.shape[:2]).flatten(1, 2)  # (B, V, D)


def _pre_norm_blocks(x: Tensor, blocks: Sequence[PreNormBlock], final: torch.nn.LayerNorm | None, attend: Attend) -> tuple[Tensor, Tensor]:
    """x (B, T, D) through `blocks` -> the result, and its norm by `final` (the result itself without one)."""
    if not len(blocks):
        return x, x if final is None else norm(x, Norm.of(final))
    normed = norm(x, Norm.of(blocks[0].norm1))
    for block, following in zip(blocks, [*(later.norm1 for later in blocks[1:]), final], strict=True):
        x, normed = residual_norm(x, attend(block.attention, normed), Norm.of(block.norm2))
        up, down = block.mlp.up, block.mlp.down
        y = down(bias_gelu(F.linear(normed, up.weight), up.bias))
        x, normed = residual_norm(x, y, Norm.of(following)) if following is not None else (x + y,) * 2
    return x, normed


class FusedLanguage:
    """As Gr00tN1d5.encode_language: inputs and vision tokens (B, V, D) -> features (B, S, D)."""

    def __init__(self, model: Gr00tN1d5) -> None:
        self._model = model.language
        self._gate_up = [joined([block.mlp.gate, block.mlp.up]).weight for block in model.language.blocks]
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: ModelInputs, vision_tokens: Tensor) -> Tensor:
        model = self._model
        x = model.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, vision_tokens)  # (B, S, D)
        cos, sin = self._tables(x)
        normed = norm(x, Norm.of(model.blocks[0].norm1))
        followings = [*(later.norm1 for later in model.blocks[1:]), model.norm]
        for block, gate_up, following in zip(model.blocks, self._gate_up, followings, strict=True):
            x, normed = residual_norm(x, _grouped_attention(block.attention, normed, cos, sin), Norm.of(block.norm2))
            x, normed = residual_norm(x, block.mlp.down(swiglu(F.linear(normed, gate_up))), Norm.of(following))
        return normed

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (S, K), made once per prompt length."""
        config, tokens = self._model.config, x.shape[1]
        if tokens not in self._rotary:
            self._rotary[tokens] = rotary_tables(tokens, config.head_dim, config.rope_theta, x)
        return self._rotary[tokens]


def _grouped_attention(layer: GroupedQueryAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = normed_rotated(layer.qkv(x), layer.heads, layer.kv_heads, layer.q_norm.weight, layer.k_norm.weight, cos, sin, layer.q_norm.eps)
    return layer.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))


# --- action head --------------------------------------------------------------------------------------------------------------------------


class FusedHead:
    """`refine`, `condition` and `velocity` of ActionHead."""

    def __init__(self, model: Gr00tN1d5) -> None:
        self._head: ActionHead = model.head
        self._laid_out = HeadStage(model)

    def refine(self, features: Tensor, key_mask: Tensor | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        head = self._head
        if isinstance(head.vlln, torch.nn.Identity):
            return features
        x = norm(features.contiguous(), Norm.of(head.vlln))
        return _pre_norm_blocks(x, head.vl_blocks, None, lambda layer, h: _masked_attention(layer, h, key_mask))[0]

    def condition(self, vl_features: Tensor, state: Tensor, key_mask: Tensor | None) -> Condition:
        """vl_features (B, S, C), state (B, state_dim); keys and values of all blocks from one product."""
        head = self._head
        future = head.future_tokens.weight.expand(state.shape[0], -1, -1)  # (B, F, D)
        prefix = torch.cat((head.state_encoder(state).unsqueeze(1), future), dim=1)  # (B, 1 + F, D)
        parts = self._laid_out.cross(vl_features).split(head.config.dit.width, dim=-1)  # keys, values of the first block, of the second, ...
        heads = [split_heads(part, head.config.dit.num_heads) for part in parts]  # (B, N, S, K)
        return Condition(prefix, list(zip(heads[::2], heads[1::2], strict=True)), key_mask)

    def velocity(self, actions: Tensor, condition: Condition, tau: Tensor, modulation: Tensor) -> Tensor:
        """actions (B, H, A), tau (D,), modulation (blocks + 1, 2, D) -> (B, H, A)."""
        horizon, decode, layer2 = actions.shape[1], self._laid_out.decode, self._head.action_decoder.layer2
        x = torch.cat((condition.prefix, self._action_tokens(actions.contiguous(), tau)), dim=1)  # (B, T, D)
        x = self._transformed(x, condition, modulation)[:, -horizon:].contiguous()  # (B, H, D)
        return linear(linear(x, decode.weight, decode.bias, "relu"), layer2.weight.T, layer2.bias)  # (B, H, A)

    def _action_tokens(self, actions: Tensor, tau: Tensor) -> Tensor:
        """(B, H, A) -> (B, H, D), positions added."""
        laid_out, w3 = self._laid_out, self._head.action_encoder.w3
        time = linear(tau[None], laid_out.of_time.T, laid_out.encode.bias)[0]  # (D,)
        mixed = linear(actions, laid_out.encode.weight, time, "silu")  # (B, H, D)
        places = laid_out.places[: actions.shape[1]].expand_as(mixed).contiguous()  # w3's bias in them
        return linear(mixed, w3.weight.T, residual=places)

    def _transformed(self, x: Tensor, condition: Condition, modulation: Tensor) -> Tensor:
        """x (B, T, D) through the diffusion transformer and its last norm -> (B, T, D)."""
        blocks, cross = self._head.dit.blocks, iter(condition.cross)
        normed = norm(x, _modulated(modulation, 0, len(blocks)))
        for index, block in enumerate(blocks):
            attended = _cross_attended(block, normed, *next(cross), condition.key_mask) if block.crosses else _self_attended(block, normed)
            out, mlp = block.attention.out, block.mlp
            x, normed = residual_norm(x, linear_parts(attended, out.weight), Norm(_DIT_NORM_EPS), out.bias)
            inner = linear(normed, mlp.up.weight, mlp.up.bias, "gelu")
            x, normed = residual_norm(x, linear_parts(inner, mlp.down.weight), _modulated(modulation, index + 1, len(blocks)), mlp.down.bias)
        return normed


def _modulated(modulation: Tensor, index: int, blocks: int) -> Norm:
    """The norm that opens block `index`, or, behind the last block, the output's."""
    scale, shift = modulation[index]
    return Norm(_DIT_NORM_EPS if index < blocks else _OUTPUT_NORM_EPS, scale, shift)


def _masked_attention(layer: SelfAttention, x: Tensor, key_mask: Tensor | None) -> Tensor:
    q, k, v = (split_heads(part, layer.heads) for part in layer.qkv(x).chunk(3, dim=-1))  # (B, N, T, K)
    return layer.out(attention(q, k, v, key_mask))


def _cross_attended(block: DiTBlock, x: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None) -> Tensor:
    """The sum over parts of K is left to attention, which reads each query once."""
    layer = block.attention
    parts = linear_parts(x, layer.q.weight).unflatten(1, x.shape[:2]).unflatten(-1, (layer.heads, -1))  # (P, B, T, N, K)
    return attention(parts.transpose(2, 3), keys, values, key_mask, layer.q.bias)  # (B, T, D)


def _self_attended(block: DiTBlock, x: Tensor) -> Tensor:
    layer = block.attention
    qkv = linear(x, layer.qkv.weight, layer.qkv.bias)
    return attention(*(split_heads(part, layer.heads) for part in qkv.chunk(3, dim=-1)))  # (B, T, D)
