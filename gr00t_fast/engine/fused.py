"""The same network in fewer and larger operations, over weights packed once: what every torch engine on a GPU runs.

The plain model repeats the reference's order of operations, bit by bit; a GPU pays for each operation with a launch. What is joined here changes
actions by rounding alone, and tests compare every stage with the plain one:

* Matrices that multiply the same input lie side by side and are one product: gate and up of the decoder's MLP, keys and values of all
  cross-attending blocks. The model's own weights become views of the joined ones: nothing is held twice.
* No nonlinearity lies between the action encoder's first two layers, nor between the transformer's last and the decoder's first: each pair is
  one matrix (the only new weights, some 4 MB). What the time adds to the action encoder is tabulated per step.
* AdaLN's scale and shift are the weight and bias of the norm itself; a residual, and the norm that follows it, are one operation.
* Queries and keys are normed and rotated in one go. Tables of positions, the same for every observation of a shape, are made once (`Constants`).
* Patches without overlap are rows of a product, not a convolution. The last block's end runs on the action tokens alone.

Nothing is masked: prompts have their exact length, and a batch has prompts of one length (engine/cuda_graph.py sees to it).
Axis alphabet: I images, B batch, C cameras, V image tokens, S prompt tokens, H horizon, A padded action width, D width, N heads, K head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model import Condition, Gr00t, ModelInputs, StepTables
from gr00t_fast.model.action_head import DIT_NORM_EPS, OUTPUT_NORM_EPS, ActionHead, euler_step_in_one, integrate, other_positions
from gr00t_fast.model.config import QwenVisionConfig, Siglip2VisionConfig, VisionConfig
from gr00t_fast.model.gr00t import prompt_rotary
from gr00t_fast.model.language import QwenBlock, causal_attention, leaks
from gr00t_fast.model.layers import PreNormBlock, merge_heads, split_heads
from gr00t_fast.model.siglip2 import joined_patches, patches_of
from gr00t_fast.model.vision import PatchMerger, one_frame_patches, one_frame_weight


@dataclass(frozen=True)
class Constants:
    """What is the same for every observation of a shape, with its pictures in the same places of the prompt.

    cos, sin (S, K): of the prompt, sin with the sign of the rotation. image_positions (V,), and text_positions (S - V,) where blocks see the text
    alone. patches: of N1.6 and N1.7 the patches' learnt positions (T, D), and of N1.7 their cos and sin (T, K).
    """

    cos: Tensor
    sin: Tensor
    image_positions: Tensor
    text_positions: Tensor | None = None
    patches: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Stages:
    """The forward pass as five callables, so that each can be compiled, recorded or timed for itself; signatures as of FusedModel."""

    encode_vision: Callable[[Tensor, Constants], Tensor]
    encode_language: Callable[[Tensor, Tensor, Constants], Tensor]
    refine: Callable[[Tensor], Tensor]
    condition: Callable[[Tensor, Tensor, Constants], Condition]
    velocity: Callable[[Tensor, Condition, Tensor, Tensor], Tensor]

    def __call__(self, inputs: ModelInputs, constants: Constants, noise: Tensor, tables: StepTables) -> Tensor:
        """As Gr00t.forward: noise (B, H, A) -> normalised actions (B, H, A)."""
        return self.denoise(noise, self.prepare(inputs, constants), tables)

    def prepare(self, inputs: ModelInputs, constants: Constants) -> Condition:
        """All that the denoising steps have in common."""
        features = self.encode_language(inputs.input_ids, self.encode_vision(inputs.pixel_values, constants), constants)  # (B, S, D)
        return self.condition(self.refine(features), inputs.state, constants)

    def denoise(self, noise: Tensor, condition: Condition, tables: StepTables) -> Tensor:
        """As ActionHead.denoise."""
        return integrate(tables.at_each(self.velocity, condition), noise, tables.steps, euler_step_in_one)


@dataclass(frozen=True)
class FoldedEncoder:
    """The action encoder with its first two layers, which have no nonlinearity between them, as one matrix. Computed in fp64.

    weight (A, D): W1, then what W2 does to it; its bias is in the step tables. of_time (D, D) and constant (D,), fp64: what W2 does to the time, and
    the biases of both. places (H, D): W3's bias and the position embedding.
    """

    weight: Tensor
    of_time: Tensor
    constant: Tensor
    places: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, head: ActionHead) -> FoldedEncoder:
        encoder, dtype = head.action_encoder, head.action_encoder.w1.weight.dtype
        of_actions, of_time = encoder.w2.weight.double().split(encoder.width)  # W2 acts on [W1(a), tau]
        places = encoder.w3.bias.double() + head.position_embedding.weight[: head.config.action_horizon].double()
        constant = encoder.w1.bias.double() @ of_actions + encoder.w2.bias.double()
        return cls((encoder.w1.weight.double() @ of_actions).to(dtype), of_time, constant, places.to(dtype))

    def step_tables(self, tables: StepTables) -> StepTables:
        """Of ActionHead.step_tables: `tau` (N, D) becomes what the time adds to the action encoder's second layer, biases included."""
        return StepTables((tables.tau.double() @ self.of_time + self.constant).to(tables.tau.dtype), tables.modulation)


@torch.no_grad()
def folded_decoder(head: ActionHead) -> tuple[Tensor, Tensor]:
    """The transformer's last layer and the decoder's first, with no nonlinearity between them, as one: weight (D, inner) and bias, from fp64."""
    out, first = head.dit.out, head.action_decoder.layer1
    wide = first.weight.double()
    return (out.weight.double().t() @ wide).to(first.weight.dtype), (out.bias.double() @ wide + first.bias.double()).to(first.weight.dtype)


class FusedModel(nn.Module):
    dtype, device = Gr00t.dtype, Gr00t.device  # these properties are found in the same way here

    def __init__(self, model: Gr00t, join: bool = True) -> None:
        """The weights of `model` are moved into joined matrices: their values do not change. join=False: they stay where they are, for a CPU, which
        gains nothing by it."""
        super().__init__()
        self.config, self._join = model.config, join
        self.vision, self.language, self.head, self.to_pixels = model.vision, model.language, model.head, model.to_pixels
        with torch.no_grad():
            self._pack()
        self.requires_grad_(False)

    def stages(self) -> Stages:
        return Stages(self.encode_vision, self.encode_language, self.refine, self.condition, self.velocity)

    @torch.no_grad()
    def constants(self, inputs: ModelInputs) -> Constants:
        """What depends on the shape of `inputs` and the places of its pictures alone."""
        tokens, positions = inputs.input_ids.shape[1], inputs.image_positions
        cos, sin = prompt_rotary(self.config, tokens, positions, inputs.pixel_values.shape[-2:], self.language.embedding.weight)
        text = None if self.config.head.attend_text_every is None else other_positions(tokens, positions)
        return Constants(*signed(cos, sin), positions, text, self._of_patches(inputs.pixel_values))

    def _of_patches(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """`Constants.patches`."""
        return ()

    def step_tables(self, steps: int) -> StepTables:
        """As ActionHead.step_tables; `tau` (N, D) is what the time adds to the second layer of the action encoder, its bias included."""
        return self.folded_encoder.step_tables(self.head.step_tables(steps))

    # --- towers ---------------------------------------------------------------------------------------------------------------------------

    def encode_vision(self, pixel_values: Tensor, constants: Constants) -> Tensor:
        """As Gr00t.encode_vision: (B, C, 3, h, w) -> (B, V, D)."""
        tower, p = self.vision, self.vision.patch_embedding.kernel_size[0]
        b, c, channels, height, width = pixel_values.shape
        patches = pixel_values.reshape(b * c, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (I, rows, columns, 3, p, p)
        x = linear(self.patches, patches.reshape(b * c, -1, channels * p * p)) + tower.position_embedding.weight  # (I, T, D)
        _, normed = self._pre_norm_blocks(x, tower.blocks, tower.norm)
        return linear(tower.connector, normed).reshape(b, -1, self.config.language.hidden_size)

    def encode_language(self, input_ids: Tensor, vision_tokens: Tensor, constants: Constants) -> Tensor:
        """As Gr00t.encode_language: input_ids (B, S) -> (B, S, D)."""
        tokens, *deepstack = vision_tokens if vision_tokens.dim() == 4 else (vision_tokens,)
        x = self.language.embedding(input_ids).index_copy(1, constants.image_positions, tokens)  # (B, S, D)
        model = self.language
        normed = norm(x, Norm.of(model.blocks[0].norm1))
        followings = [*(block.norm1 for block in model.blocks[1:]), model.norm]
        for index, (block, head_norm, gate_up, following) in enumerate(zip(model.blocks, self.head_norms, self.gate_up, followings, strict=True)):
            attention = block.attention
            qkv = linear(attention.qkv, normed)
            q, k, v = normed_rotated(qkv, attention.heads, head_norm, constants.cos, constants.sin, attention.q_norm.eps)
            attended = merge_heads(causal_attention(q, k, v, by_mask=leaks(x)))
            x, normed = linear_add_norm(attention.out, attended, x, Norm.of(block.norm2))
            inner = gated(gate_up, normed)  # (B, S, inner)
            if index < len(deepstack) or isinstance(following, nn.Identity):
                x = linear(block.mlp.down, inner, residual=x)
                x = x.index_add(1, constants.image_positions, deepstack[index]) if index < len(deepstack) else x
                normed = x if isinstance(following, nn.Identity) else norm(x, Norm.of(following))
            else:
                x, normed = linear_add_norm(block.mlp.down, inner, x, Norm.of(following))
        return normed

    def refine(self, features: Tensor) -> Tensor:
        """As ActionHead.refine: (B, S, C) -> (B, S, C)."""
        head = self.head
        x = features if isinstance(head.vlln, nn.Identity) else norm(features, Norm.of(head.vlln))
        return self._pre_norm_blocks(x, head.vl_blocks, None)[0]

    def _pre_norm_blocks(self, x: Tensor, blocks: Sequence[PreNormBlock], final: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) through `blocks` -> the result, and its norm by `final` (the result itself without one)."""
        if not len(blocks):
            return x, x if final is None else norm(x, Norm.of(final))
        normed = norm(x, Norm.of(blocks[0].norm1))
        for block, following in zip(blocks, [*(later.norm1 for later in blocks[1:]), final], strict=True):
            attended = self_attention(block.attention.qkv, normed, block.attention.heads)
            x, normed = linear_add_norm(block.attention.out, attended, x, Norm.of(block.norm2))
            inner = linear(block.mlp.up, normed, "gelu")
            if following is None:
                x = normed = linear(block.mlp.down, inner, residual=x)
            else:
                x, normed = linear_add_norm(block.mlp.down, inner, x, Norm.of(following))
        return x, normed

    # --- action head ----------------------------------------------------------------------------------------------------------------------

    def condition(self, vl_features: Tensor, state: Tensor, constants: Constants) -> Condition:
        """As ActionHead.condition: vl_features (B, S, C), state (B, state_dim); keys and values of all blocks from one product for each context."""
        crossing = [block for block in self.head.dit.blocks if block.crosses]
        if constants.text_positions is None:
            contexts = {"all": vl_features}
        else:
            seen = {"text": constants.text_positions, "image": constants.image_positions}
            contexts = {name: vl_features.index_select(1, places) for name, places in seen.items()}
        pairs = {name: iter(self._keys_values(layers, contexts[name])) for name, layers in self.cross.items()}
        return Condition(self.head.prefix(state), [next(pairs[block.context]) for block in crossing], None)

    def _keys_values(self, layers: nn.ModuleList, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the blocks that `layers` hold side by side: context (B, S, C) -> pairs of (B, N, S, K)."""
        products = [linear(layer, context).split(self.head.dit.width, dim=-1) for layer in layers]
        parts = [part for product in products for part in product]  # keys, values of the first block, of the second, ...
        heads = [split_heads(part, self.head.config.dit.num_heads) for part in parts]  # (B, N, S, K)
        return list(zip(heads[::2], heads[1::2], strict=True))

    def velocity(self, actions: Tensor, condition: Condition, time: Tensor, modulation: Tensor) -> Tensor:
        """actions (B, H, A), time (D,) and modulation (blocks + 1, 2, D) of `step_tables` -> (B, H, A)."""
        horizon, blocks, cross = actions.shape[1], self.head.dit.blocks, iter(condition.cross)
        mixed = linear(self.encode, actions.contiguous(), "silu", bias=time)  # (B, H, D)
        tokens = linear(self.w3, mixed, residual=self.places[:horizon])  # (B, H, D)
        x = torch.cat((condition.prefix, tokens), dim=1)  # (B, 1 + F + H, D)
        normed = norm(x, _modulated(modulation, 0, len(blocks)))
        for index, block in enumerate(blocks):
            attention, mlp = block.attention, block.mlp
            if block.crosses:
                attended = cross_attention(attention.q, normed, *next(cross))
            else:
                attended = self_attention(attention.qkv, normed, attention.heads)
            if index == len(blocks) - 1:  # the other tokens are not looked at again
                attended, x = attended[:, -horizon:].contiguous(), x[:, -horizon:].contiguous()
            x, normed = linear_add_norm(attention.out, attended, x, Norm(DIT_NORM_EPS))
            x, normed = linear_add_norm(mlp.down, linear(mlp.up, normed, "gelu"), x, _modulated(modulation, index + 1, len(blocks)))
        return linear(self.layer2, linear(self.decode, normed, "relu"))

    # --- packing --------------------------------------------------------------------------------------------------------------------------

    def _pack_vision(self) -> None:
        patch_embedding = self.vision.patch_embedding
        self.patches = as_linear(patch_embedding.weight.flatten(1), patch_embedding.bias)

    def _pack(self) -> None:
        self._pack_vision()
        head, blocks = self.head, self.language.blocks
        side_by_side = joined if self._join else list
        self.gate_up = nn.ModuleList(nn.ModuleList(side_by_side([block.mlp.gate, block.mlp.up])) for block in blocks)
        self.head_norms = nn.ParameterList(nn.Parameter(_per_head(block), requires_grad=False) for block in blocks)
        crossing: dict[str, list[nn.Module]] = {}
        for block in (block for block in head.dit.blocks if block.crosses):
            crossing.setdefault(block.context, []).append(block.attention.kv)
        self.cross = nn.ModuleDict({name: nn.ModuleList(side_by_side(layers)) for name, layers in crossing.items()})
        self.folded_encoder = folded = FoldedEncoder.of(head)
        self.encode = as_linear(folded.weight.t().contiguous(), None)
        self.w3 = as_linear(head.action_encoder.w3.weight.t(), None)
        self.register_buffer("places", folded.places)
        decode, decode_bias = folded_decoder(head)
        self.decode = as_linear(decode.t().contiguous(), decode_bias)
        self.layer2 = as_linear(head.action_decoder.layer2.weight.t(), head.action_decoder.layer2.bias)


class FusedSiglip2(FusedModel):
    """With N1.6's vision tower."""

    def _pack_vision(self) -> None:
        self.patches = self.vision.patch_embedding

    def _of_patches(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.vision.positions(*self.vision.grid_of(pixel_values)),)

    def encode_vision(self, pixel_values: Tensor, constants: Constants) -> Tensor:
        """As Gr00t.encode_vision: (B, C, 3, h, w) -> (B, V, D)."""
        tower, connector = self.vision, self.vision.connector
        x = linear(self.patches, patches_of(pixel_values.flatten(0, 1), tower.config.patch_size)) + constants.patches[0]  # (I, T, D)
        _, normed = self._pre_norm_blocks(x, tower.blocks, tower.norm)
        joined = joined_patches(normed, *tower.grid_of(pixel_values), tower.config.merge_size)  # type: ignore[call-arg]  # (I, V / C, m m D)
        tokens = linear(connector.down, nn.functional.gelu(linear(connector.up, norm(joined, Norm.of(connector.norm)))))
        return tokens.reshape(pixel_values.shape[0], -1, tokens.shape[-1])


class FusedQwenVision(FusedModel):
    """With N1.7's vision tower, and deepstack. The patch embedding reads one frame of a patch: half the product."""

    def _pack_vision(self) -> None:
        self.patches = as_linear(one_frame_weight(self.vision), self.vision.patch_embedding.bias)

    def _of_patches(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        tower, (rows, columns) = self.vision, self.vision.grid_of(pixel_values)
        return tower.positions(rows, columns), *signed(*tower.rotary(rows, columns, tower.position_embedding.weight))

    def encode_vision(self, pixel_values: Tensor, constants: Constants) -> Tensor:
        """As Gr00t.encode_vision: (B, C, 3, h, w) -> (1 + deepstack, B, V, D)."""
        tower, pictures, (places, cos, sin) = self.vision, pixel_values.flatten(0, 1), constants.patches
        patches = one_frame_patches(pictures, tower.config).flatten(2)  # (I, T, 3 p p)
        x = linear(self.patches, patches) + places  # (I, T, D)
        tokens: list[Tensor] = []
        normed = norm(x, Norm.of(tower.blocks[0].norm1))
        for index, (block, following) in enumerate(zip(tower.blocks, [*(b.norm1 for b in tower.blocks[1:]), tower.merger.norm], strict=True)):
            q, k, v = (split_heads(part, block.attention.heads) for part in linear(block.attention.qkv, normed).chunk(3, dim=-1))
            attended = nn.functional.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)  # (I, N, T, K)
            x, normed = linear_add_norm(block.attention.out, merge_heads(attended), x, Norm.of(block.norm2))
            x, normed = linear_add_norm(block.mlp.down, linear(block.mlp.up, normed, "gelu"), x, Norm.of(following))
            if index in tower.config.deepstack:
                merger = tower.deepstack_mergers[len(tokens)]
                tokens.append(self._merged(merger, norm(x.reshape(len(x), -1, merger.joined), Norm.of(merger.norm))))
        stacked = torch.stack([self._merged(tower.merger, normed.reshape(len(x), -1, tower.merger.joined)), *tokens])  # (1 + deepstack, I, V, D)
        return stacked.reshape(len(stacked), pixel_values.shape[0], -1, stacked.shape[-1])

    def _merged(self, merger: PatchMerger, normed: Tensor) -> Tensor:
        return linear(merger.down, nn.functional.gelu(linear(merger.up, normed)))


_BY_TOWER: dict[type, type[FusedModel]] = {VisionConfig: FusedModel, Siglip2VisionConfig: FusedSiglip2, QwenVisionConfig: FusedQwenVision}


def fused_model(model: Gr00t, join: bool = True) -> FusedModel:
    """The fused model of any network, chosen by its vision tower."""
    return _BY_TOWER[type(model.config.vision)](model, join)


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables (T, K), sin with the sign of the rotation."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, T, K) by tables of `signed`: halves rotated against each other, as model.layers.rotate does."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def joined(layers: Sequence[nn.Linear]) -> list[nn.Linear]:
    """One layer whose outputs are those of `layers` side by side. Their weights become views of its weights, if they are not yet."""
    weight = _side_by_side([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    return [as_linear(weight, bias)]


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer over these very tensors: weight (out, in), with any strides, bias (out,)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _modulated(modulation: Tensor, index: int, blocks: int) -> Norm:
    """The norm that opens block `index`, or, behind the last block, the output's."""
    scale, shift = modulation[index]  # scale already holds the 1
    return Norm(DIT_NORM_EPS if index < blocks else OUTPUT_NORM_EPS, scale, shift)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """(sum of rows, in): where they already lie like that, for another engine over the same model, that memory and no copy."""
    first, row = weights[0], weights[0].stride(0) * weights[0].element_size()
    ends = itertools.accumulate((weight.shape[0] * row for weight in weights), initial=first.data_ptr())
    adjacent = all(weight.is_contiguous() and weight.data_ptr() == end for weight, end in zip(weights, ends, strict=False))
    if adjacent and len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return first.detach().as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), first.stride())
    return torch.cat(list(weights))


def _per_head(block: QwenBlock) -> Tensor:
    """(N + M, K): the weight of the norm of each query head, then of each key head."""
    attention = block.attention
    return torch.cat((attention.q_norm.weight.expand(attention.heads, -1), attention.k_norm.weight.expand(attention.kv_heads, -1)))


# --- operations: few launches each, on any device; differentiable where autograd records; each keeps the dtype of `x`
# Axis alphabet: B batch, T tokens, S keys, D width, N query heads, M key/value heads, K head dim.

Activation = Literal["gelu", "silu", "relu"]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
_IN_THE_PRODUCT = ("gelu", "relu")  # what cuBLASLt computes in the epilogue of a product


@dataclass(frozen=True)
class Norm:
    """y = normalised(x) * scale + shift. scale and shift (D,) or None; `centred`: LayerNorm, else RMSNorm."""

    eps: float
    scale: Tensor | None = None
    shift: Tensor | None = None
    centred: bool = True

    @classmethod
    def of(cls, module: nn.LayerNorm | nn.RMSNorm) -> Norm:
        """The norm that a module of the model holds."""
        layer = isinstance(module, nn.LayerNorm)
        return cls(module.eps, module.weight, module.bias if layer else None, layer)


def norm(x: Tensor, spec: Norm) -> Tensor:
    """x (..., D) -> the same shape."""
    width = (x.shape[-1],)
    if not spec.centred:
        return F.rms_norm(x, width, spec.scale, spec.eps)
    return F.layer_norm(x, width, spec.scale, spec.shift, spec.eps)


def linear(layer: nn.Module, x: Tensor, activation: Activation | None = None, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """activation(layer(x)) + residual: x (B, T, D) -> (B, T, out). `bias` (out,): instead of the layer's own, of a plain nn.Linear."""
    if type(layer) is not nn.Linear:  # engine/packed.py: all in one
        return layer(x, activation, bias, residual)
    bias = layer.bias if bias is None else bias
    # A CPU computes the other GELU here (erf), and autograd has no formula for it
    if activation in _IN_THE_PRODUCT and bias is not None and x.is_cuda and not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        y = torch._addmm_activation(bias, rows, layer.weight.t(), use_gelu=activation == "gelu").reshape(*x.shape[:-1], -1)
    else:
        y = ACTIVATIONS[activation](F.linear(x, layer.weight, bias))
    return y if residual is None else y + residual


def gated(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """silu(gate(x)) * up(x), of [gate, up] or both joined: x (B, T, D) -> (B, T, inner)."""
    if len(layers) == 2:
        return linear(layers[0], x, "silu") * linear(layers[1], x)
    gate, up = linear(layers[0], x).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add_norm(layer: nn.Module, h: Tensor, x: Tensor, spec: Norm) -> tuple[Tensor, Tensor]:
    """x + layer(h), and its norm: h (B, T, in), x (B, T, D)."""
    x = linear(layer, h, residual=x)
    return x, norm(x, spec)


def self_attention(qkv: nn.Module, x: Tensor, heads: int) -> Tensor:
    """x (B, T, D) -> (B, T, D), heads merged and not yet projected."""
    q, k, v = (split_heads(part, heads) for part in linear(qkv, x).chunk(3, dim=-1))  # (B, N, T, K)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def cross_attention(q: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """x (B, T, D), keys and values (B, N, S, K) -> (B, T, D), heads merged and not yet projected."""
    return merge_heads(F.scaled_dot_product_attention(split_heads(linear(q, x), keys.shape[1]), keys, values))


def normed_rotated(qkv: Tensor, heads: int, head_norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, S, (N + 2 M) K) -> q (B, N, S, K), k and v (B, M, S, K): queries and keys normed head by head and rotated.

    head_norm (N + M, K): the norm's weight of each query head, then of each key head; cos and sin (S, K), sin with the sign of the rotation.
    """
    width, kv_heads = cos.shape[-1], head_norm.shape[0] - heads
    qk, v = qkv.split(((heads + kv_heads) * width, kv_heads * width), dim=-1)
    qk = F.rms_norm(qk.reshape(*qk.shape[:2], -1, width), (width,), eps=eps) * head_norm  # (B, S, N + M, K)
    q, k = _rotated(qk.transpose(1, 2), cos, sin).split((heads, kv_heads), dim=1)  # (B, N, S, K), (B, M, S, K)
    return q, k, split_heads(v, kv_heads)
