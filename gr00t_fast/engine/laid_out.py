"""The same network in fewer and larger operations, over weights laid out once.

The plain model repeats the reference's order of operations, bit by bit; a GPU pays for each operation with a launch. What is joined here changes
actions by rounding alone, and tests compare every stage with the plain one:

* Matrices that multiply the same input lie side by side and are one product: gate and up of the decoder's MLP, keys and values of all
  cross-attending blocks. The model's own weights become views of the joined ones: nothing is held twice.
* No nonlinearity lies between the action encoder's first two layers, nor between the transformer's last and the decoder's first: each pair is
  one matrix, computed in fp32 (the only new weights, some 4 MB).
* AdaLN's scale and shift are the weight and bias of the norm itself.
* Queries and keys are normed and rotated in one go; the tables of the rotation, and the mask as numbers to add, are made once.
* Patches without overlap are rows of a product, not a convolution. The last block's MLP runs on the action tokens alone.

Axis alphabet: I images, B batch, S prompt tokens, H horizon, A padded action width, D width, N query heads, M key/value heads, K head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.engine.stages import Stages
from gr00t_fast.model import Condition, Gr00tN1d5, ModelInputs
from gr00t_fast.model.dit import DiTBlock
from gr00t_fast.model.language import QwenBlock
from gr00t_fast.model.layers import CategoryLinear, merge_heads, rotary_tables, split_heads

_ROTARY_POSITIONS = 2048  # rows of the tables: eight pictures are 2048 tokens; longer prompts make their own
_DIT_NORM_EPS, _OUTPUT_NORM_EPS = 1e-5, 1e-6  # as in gr00t_fast/model/dit.py


def laid_out_stages(model: Gr00tN1d5) -> Stages:
    """The stages of `model`, to be recorded or compiled. Its weights are moved into joined matrices: their values do not change.

    A model some of whose linear layers were replaced by others (of 8 bits) has its own layout: its stages come as they are.
    """
    if not has_plain_weights(model):
        return Stages.of(model)
    with torch.no_grad():
        vision, language, head = VisionStage(model), LanguageStage(model), HeadStage(model)
    return Stages(vision, language, head.refine, head.condition, head.velocity)


class VisionStage(nn.Module):
    def __init__(self, model: Gr00tN1d5) -> None:
        super().__init__()
        self.tower = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """As Gr00tN1d5.encode_vision: (B, C, 3, h, w) -> (B, V, D)."""
        tower, convolution = self.tower, self.tower.patch_embedding
        patch = convolution.kernel_size[0]
        images = pixel_values.flatten(0, 1)  # (I, 3, h, w)
        rows = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)  # (I, rows, columns, 3, p, p)
        x = F.linear(rows.flatten(3).flatten(1, 2), convolution.weight.flatten(1), convolution.bias) + tower.position_embedding.weight
        for block in tower.blocks:
            x = block(x)
        return tower.connector(tower.norm(x)).unflatten(0, pixel_values.shape[:2]).flatten(1, 2)


class LanguageStage(nn.Module):
    def __init__(self, model: Gr00tN1d5) -> None:
        super().__init__()
        self.language, self.rope = model.language, (model.config.language.head_dim, model.config.language.rope_theta)
        self.gate_up = nn.ParameterList(joined([block.mlp.gate, block.mlp.up]).weight for block in self.language.blocks)
        self.head_norms = nn.ParameterList(nn.Parameter(_per_head(block), requires_grad=False) for block in self.language.blocks)
        cos, sin = self._tables(_ROTARY_POSITIONS, self.language.norm.weight)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, inputs: ModelInputs, vision_tokens: Tensor) -> Tensor:
        """As Gr00tN1d5.encode_language: -> (B, S, D)."""
        x = self.language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, vision_tokens)  # (B, S, D)
        tokens = x.shape[1]
        cos, sin = (self.cos[:tokens], self.sin[:tokens]) if tokens <= _ROTARY_POSITIONS else self._tables(tokens, x)
        for block, gate_up, head_norm in zip(self.language.blocks, self.gate_up, self.head_norms, strict=True):
            x = x + self._attend(block, block.norm1(x), head_norm, cos, sin)
            gate, up = F.linear(block.norm2(x), gate_up).chunk(2, dim=-1)  # (B, S, inner)
            x = x + block.mlp.down(F.silu(gate) * up)
        return self.language.norm(x)

    def _tables(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos, and sin with the sign of the rotation, (tokens, K)."""
        cos, sin = rotary_tables(tokens, *self.rope, like)
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat((-first, second), dim=-1)

    def _attend(self, block: QwenBlock, x: Tensor, head_norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = block.attention
        heads, width = attention.heads, cos.shape[-1]
        qk, v = attention.qkv(x).split((attention.q_width + attention.kv_width, attention.kv_width), dim=-1)
        qk = F.rms_norm(qk.unflatten(-1, (-1, width)), (width,), eps=attention.q_norm.eps) * head_norm  # (B, S, N + M, K)
        qk = qk.transpose(1, 2)  # (B, N + M, S, K)
        qk = torch.addcmul(qk * cos, qk.roll(width // 2, dims=-1), sin)  # halves rotated against each other, as `rotate` does
        q, k = qk.split((heads, attention.kv_heads), dim=1)
        v = split_heads(v, attention.kv_heads)  # (B, M, S, K)
        return attention.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))


class HeadStage(nn.Module):
    """`refine`, `condition` and `velocity` of the action head."""

    def __init__(self, model: Gr00tN1d5) -> None:
        super().__init__()
        head = self.head = model.head
        encoder, self.width = head.action_encoder, head.dit.width
        self.cross = joined([block.attention.kv for block in head.dit.blocks if block.crosses])
        of_actions, of_time = encoder.w2.weight.split((self.width, self.width))  # W2 acts on [W1(a), tau]
        self.encode = _product(encoder.w1.weight, encoder.w1.bias, of_actions, encoder.w2.bias)
        self.of_time = nn.Parameter(of_time, requires_grad=False)
        self.decode = _product(head.dit.out.weight.t(), head.dit.out.bias, head.action_decoder.layer1.weight, head.action_decoder.layer1.bias)
        places = encoder.w3.bias + head.position_embedding.weight[: head.config.action_horizon]  # (H, D)
        self.places = nn.Parameter(places, requires_grad=False)

    def refine(self, features: Tensor, key_mask: Tensor | None) -> Tensor:
        """As ActionHead.refine."""
        return self.head.refine(features, _additive(key_mask, features.dtype))

    def condition(self, vl_features: Tensor, state: Tensor, key_mask: Tensor | None) -> Condition:
        """As ActionHead.condition, with the mask as numbers to add (0 and minus infinity)."""
        head = self.head
        future = head.future_tokens.weight.expand(state.shape[0], -1, -1)  # (B, F, D)
        prefix = torch.cat((head.state_encoder(state).unsqueeze(1), future), dim=1)  # (B, 1 + F, D)
        parts = self.cross(vl_features).split(self.width, dim=-1)  # keys, values of the first block, of the second, ...
        heads = [split_heads(part, head.config.dit.num_heads) for part in parts]  # (B, N, S, K)
        return Condition(prefix, list(zip(heads[::2], heads[1::2], strict=True)), _additive(key_mask, vl_features.dtype))

    def velocity(self, actions: Tensor, condition: Condition, tau: Tensor, modulation: Tensor) -> Tensor:
        """As ActionHead.velocity: (B, H, A) -> (B, H, A)."""
        head, horizon = self.head, actions.shape[1]
        x = torch.cat((condition.prefix, self._action_tokens(actions, tau)), dim=1)  # (B, 1 + F + H, D)
        keys_values = iter(condition.cross)
        for index, block in enumerate(head.dit.blocks):
            x = x + self._attend(block, self._norm(x, modulation[index], _DIT_NORM_EPS), keys_values, condition.key_mask)
            x = x[:, -horizon:] if index == len(head.dit.blocks) - 1 else x
            x = x + block.mlp(F.layer_norm(x, (self.width,), eps=_DIT_NORM_EPS))
        x = F.relu(self.decode(self._norm(x, modulation[-1], _OUTPUT_NORM_EPS)))
        return _times(head.action_decoder.layer2, x)

    def _action_tokens(self, actions: Tensor, tau: Tensor) -> Tensor:
        """As ActionEncoder.forward, with the positions added: (B, H, D)."""
        time = torch.mv(self.of_time.t(), tau)  # (D,)
        return F.silu(self.encode(actions) + time) @ self.head.action_encoder.w3.weight + self.places[: actions.shape[1]]

    @staticmethod
    def _attend(block: DiTBlock, x: Tensor, keys_values, key_mask: Tensor | None) -> Tensor:
        return block.attention(x, next(keys_values), key_mask) if block.crosses else block.attention(x)

    def _norm(self, x: Tensor, modulation: Tensor, eps: float) -> Tensor:
        scale, shift = modulation  # scale already holds the 1
        return F.layer_norm(x, (self.width,), scale, shift, eps)


def has_plain_weights(model: Gr00tN1d5) -> bool:
    """Whether every layer that this module joins with another, or reads the weight of, is torch's own."""
    dit = model.head.dit
    layers = [layer for block in model.language.blocks for layer in (block.mlp.gate, block.mlp.up)]
    return all(type(layer) is nn.Linear for layer in (*layers, *(block.attention.kv for block in dit.blocks if block.crosses), dit.out))


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of `linears` side by side; their weights become views of its weights, if they are not yet."""
    outputs = [linear.out_features for linear in linears]
    weight = _side_by_side([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    for linear, part in zip(linears, weight.split(outputs), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return _linear(weight, bias)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """(sum of rows, in): where they already lie like that, for another engine over the same model, that memory and no copy."""
    first, row = weights[0], weights[0].stride(0) * weights[0].element_size()
    ends = itertools.accumulate((weight.shape[0] * row for weight in weights), initial=first.data_ptr())
    if all(weight.is_contiguous() and weight.data_ptr() == end for weight, end in zip(weights, ends, strict=False)):
        storages = {weight.untyped_storage().data_ptr() for weight in weights}
        if len(storages) == 1:
            return first.detach().as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), first.stride())
    return torch.cat(list(weights))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def _product(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> nn.Linear:
    """(x @ first + first_bias) @ second + second_bias, as one layer; matrices (in, out)."""
    wide = second.float()
    weight, bias = first.float() @ wide, first_bias.float() @ wide + second_bias.float()
    return _linear(weight.t().contiguous().to(second.dtype), bias.to(second.dtype))


def _times(layer: CategoryLinear, x: Tensor) -> Tensor:
    """CategoryLinear as one operation: (B, H, in) -> (B, H, out)."""
    return torch.addmm(layer.bias, x.flatten(0, 1), layer.weight).unflatten(0, x.shape[:2])


def _per_head(block: QwenBlock) -> Tensor:
    """(N + M, K): the weight of the norm of each query head, then of each key head."""
    attention = block.attention
    return torch.cat((attention.q_norm.weight.expand(attention.heads, -1), attention.k_norm.weight.expand(attention.kv_heads, -1)))


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """True and False as 0 and minus infinity: attention would do it at every call."""
    return None if key_mask is None else torch.zeros_like(key_mask, dtype=dtype).masked_fill(~key_mask, float("-inf"))
