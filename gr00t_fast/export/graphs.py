"""The network as three graphs that a runtime can execute, wrapped around the plain model from outside.

    vision         pixel_values -> tokens
    language       embeddings (image tokens in place) -> backbone_features, vl_features, keys, values
    denoise_step   actions, state, tau, modulation, step_size, keys, values -> next_actions

`graphs_of` puts them together as a network asks for it. N1.7's vision has a second output, `deepstack`, which its language takes besides; and where
blocks see text or pictures alone, keys and values are `text_keys`, `text_values`, `image_keys` and `image_values`. What goes out under a name that a
later stage takes is for it. Where pictures come before the instruction, their tokens have the same places in every prompt, and behind it (N1.6) the
same places from its end: those are built in, and with them each token's position.

One observation per call, or a fixed number of them (`Layout.batch`) with prompts of one length. The same numbers as `gr00t_fast.model` up to
rounding; what differs, and why:

* A projection is stored [in, out] and written as `x @ W`. `F.linear` would export as MatMul(x, Transpose(W)), and every use of a shared weight
  leaves its own Transpose, or its own copy of the weight.
* Attention is written out (product, softmax, product): every runtime fuses that, and quantisers see the products.
* Key and value projections of all cross-attending blocks that see the same tokens are one product, once per observation.
* No nonlinearity lies between the action encoder's first two layers, nor between the transformer's output layer and the decoder's first:
  each pair is folded into one. The time's part of the former is in the `tau` table.
* The last transformer block computes its attention output and MLP for the action tokens only: the others are not used.

Axis alphabet: C pictures, V image tokens, S prompt tokens (image tokens included), H horizon, A padded action width, D width of the
transformer, L its blocks, X those that cross-attend, E deepstack layers, N heads, K head dim. The batch is written 1. Where it is more, X and E
are that many times as long: the observations of a block, or of a layer, follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.engine.fused import FoldedEncoder, folded_decoder
from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, least_tokens
from gr00t_fast.model import Condition, Gr00t, ModelInputs, StepTables
from gr00t_fast.model.action_head import DIT_NORM_EPS, OUTPUT_NORM_EPS, Context, context_of, euler_step
from gr00t_fast.model.config import ModelConfig, QwenVisionConfig, Siglip2VisionConfig, VisionConfig
from gr00t_fast.model.gr00t import prompt_rotary
from gr00t_fast.model.layers import Rotary, SelfAttention, merge_heads, rotate, split_heads
from gr00t_fast.model.siglip2 import joined_patches, patches_of
from gr00t_fast.model.vision import one_frame_patches, one_frame_weight

_MASKED = -30000.0  # added to a score, its exponential is 0 in every format; finite in fp16, and for tools that measure ranges


@dataclass(frozen=True)
class Layout:
    """What all prompts of an export have in common: so many pictures of height x width pixels, `image_tokens` together, and `max_tokens` at most.

    spans: of each picture the place of its first token and the one behind its last, for networks that these make a difference to; else empty. Both
    are negative where they count from the prompt's end. batch: observations of a call.
    """

    pictures: int
    height: int
    width: int
    image_tokens: int
    max_tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    batch: int = 1

    @classmethod
    def of(cls, shapes: Mapping[str, Any], config: ModelConfig, batch: int = 1) -> Layout:
        """From `Manifest.shapes`."""
        height, width = shapes.get("picture") or [config.vision.image_size] * 2
        spans = tuple((first, behind) for first, behind in shapes.get("image_spans", ()))
        return cls(shapes["cameras"], height, width, shapes["image_tokens"], shapes["max_tokens"], spans, batch)

    @property
    def least_tokens(self) -> int:
        """Tokens of the shortest prompt."""
        return least_tokens(self.spans, self.image_tokens)


def needs_spans(config: ModelConfig) -> bool:
    """Whether it makes a difference to the network where in a prompt its pictures lie."""
    return config.language.mrope_sections is not None or config.head.attend_text_every is not None


@dataclass(frozen=True)
class GraphSpec:
    """How to build one graph and which of the network's parameters it needs (prefixes of their names)."""

    build: Callable[[Gr00t, Layout], nn.Module]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class MatMulLinear(nn.Module):
    """nn.Linear with its weight stored [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class PlainRMSNorm(nn.Module):
    """nn.RMSNorm, normalised in fp32 whatever the dtype: squares of fp16 activations overflow."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class PlainSelfAttention(nn.Module):
    """`SelfAttention` written out; with `queries`, the output of the last so many tokens only."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = attention.heads, attention.qkv, attention.out

    def forward(self, x: Tensor, key_mask: None = None, rotary: Rotary | None = None, queries: int | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # (1, N, T, K)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q = q if queries is None else q[:, :, -queries:]
        return self.out(merge_heads(attend(q, k, v)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (1, N, T, K), k and v (1, N, S, K), additive mask (T, S) -> (1, N, T, K)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaled first: fp16 products of unscaled queries can overflow
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


def make_exportable(module: nn.Module) -> nn.Module:
    """Swap layers in place, depth first, so that one weight at a time is held twice; returns `module`."""
    for name, child in module.named_children():
        make_exportable(child)
        if isinstance(child, nn.Linear):
            setattr(module, name, MatMulLinear(child.weight.t(), child.bias))
        elif isinstance(child, nn.RMSNorm):
            setattr(module, name, PlainRMSNorm(child))
        elif isinstance(child, SelfAttention):
            setattr(module, name, PlainSelfAttention(child))
    return module


class VisionGraph(nn.Module):
    """pixel_values (1, C, 3, h, w) -> tokens (1, V, width of the language model)."""

    def __init__(self, model: Gr00t, layout: Layout) -> None:
        super().__init__()
        del layout
        tower = model.vision
        convolution = tower.patch_embedding
        self.patch = convolution.kernel_size[0]
        self.patch_embedding = MatMulLinear(convolution.weight.flatten(1).t(), convolution.bias)  # a convolution without overlap is a product
        self.position_embedding = tower.position_embedding.weight
        tower.patch_embedding = None
        make_exportable(tower)
        self.blocks, self.norm, self.connector = tower.blocks, tower.norm, tower.connector

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, c, channels, height, width = pixel_values.shape
        p, all_pictures = self.patch, batch * c
        x = pixel_values.reshape(all_pictures, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (C, rows, columns, 3, p, p)
        x = self.patch_embedding(x.reshape(all_pictures, -1, channels * p * p)) + self.position_embedding  # (C, T, width)
        for block in self.blocks:
            x = block(x)
        return _of_each(self.connector(self.norm(x)), batch)  # (1, V, width of the language model)


class QwenVisionGraph(nn.Module):
    """pixel_values (1, C, 3, h, w) -> tokens (1, V, width of the language model), and deepstack (E, V, same width) where the network has that."""

    def __init__(self, model: Gr00t, layout: Layout) -> None:
        super().__init__()
        tower, self.config = model.vision, model.vision.config
        rows, columns = layout.height // self.config.patch_size, layout.width // self.config.patch_size
        self.patch_embedding = MatMulLinear(one_frame_weight(tower).t(), tower.patch_embedding.bias)
        self.position_embedding = nn.Parameter(tower.positions(rows, columns), requires_grad=False)  # (T, D), interpolated
        cos, sin = tower.rotary(rows, columns, self.position_embedding)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        tower.patch_embedding = None
        make_exportable(tower)
        self.blocks, self.merger, self.deepstack_mergers = tower.blocks, tower.merger, tower.deepstack_mergers

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch = pixel_values.shape[0]
        pictures = pixel_values[0] if batch == 1 else pixel_values.flatten(0, 1)
        x = self.patch_embedding(one_frame_patches(pictures, self.config).flatten(2)) + self.position_embedding  # (C, T, D)
        deepstack: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, rotary=(self.cos, self.sin))
            if index in self.config.deepstack:
                deepstack.append(_of_each(self.deepstack_mergers[len(deepstack)](x), batch))  # (1, V, width of the language model)
        tokens = _of_each(self.merger(x), batch)  # (1, V, width of the language model)
        return (tokens, torch.cat(deepstack)) if deepstack else tokens


class Siglip2Graph(nn.Module):
    """pixel_values (1, C, 3, h, w) -> tokens (1, V, width of the language model)."""

    def __init__(self, model: Gr00t, layout: Layout) -> None:
        super().__init__()
        tower, self.config = model.vision, model.vision.config
        self.grid = layout.height // self.config.patch_size, layout.width // self.config.patch_size
        self.position_embedding = nn.Parameter(tower.positions(*self.grid), requires_grad=False)  # (T, D), interpolated
        make_exportable(tower)
        self.patch_embedding, self.blocks, self.norm, self.connector = tower.patch_embedding, tower.blocks, tower.norm, tower.connector

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch = pixel_values.shape[0]
        pictures = pixel_values[0] if batch == 1 else pixel_values.flatten(0, 1)
        x = self.patch_embedding(patches_of(pictures, self.config.patch_size)) + self.position_embedding  # (C, T, D)
        for block in self.blocks:
            x = block(x)
        return _of_each(self.connector(joined_patches(self.norm(x), *self.grid, self.config.merge_size)), batch)


_VISION_GRAPHS: dict[type, type[nn.Module]] = {VisionConfig: VisionGraph, QwenVisionConfig: QwenVisionGraph, Siglip2VisionConfig: Siglip2Graph}


def _of_each(x: Tensor, batch: int) -> Tensor:
    """Tokens of all pictures of all observations, (B * C, T, D), -> (B, C * T, D)."""
    return x.flatten(0, 1).unsqueeze(0) if batch == 1 else x.unflatten(0, (batch, -1)).flatten(1, 2)


class LanguageGraph(nn.Module):
    """embeddings (1, S, C), deepstack (E, V, C) of some networks -> backbone_features (1, S, C), vl_features (1, S, C), and for each context keys and
    values (X, N, its tokens, K). S may vary up to `max_tokens`."""

    def __init__(self, model: Gr00t, layout: Layout) -> None:
        super().__init__()
        language, dit, config = model.language, model.head.dit, model.config
        self.heads, self.spans, self.batch = config.head.dit.num_heads, layout.spans, layout.batch
        crossing = crossing_blocks(config)
        self.crossing = {context: len(indices) for context, indices in crossing.items()}
        self.keys_values = nn.ModuleDict(
            {context: _keys_then_values([dit.blocks[index].attention.kv for index in indices]) for context, indices in crossing.items()}
        )
        places = torch.tensor([place for first, behind in layout.spans for place in range(first, behind)], dtype=torch.int64)  # (V,)
        cos, sin = prompt_rotary(config, layout.max_tokens, places, (layout.height, layout.width), language.blocks[0].norm1.weight)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("positions", torch.arange(layout.max_tokens))
        make_exportable(language)
        make_exportable(model.head.vl_blocks)
        self.blocks, self.norm = language.blocks, language.norm
        self.vlln, self.vl_blocks = model.head.vlln, model.head.vl_blocks

    def forward(self, embeddings: Tensor, deepstack: Tensor | None = None) -> tuple[Tensor, ...]:
        tokens = embeddings.shape[1]
        cos, sin, positions = self.cos[:tokens], self.sin[:tokens], self.positions[:tokens]
        mask = torch.where(positions[:, None] >= positions[None, :], 0.0, _MASKED).to(embeddings.dtype)  # (S, S)
        deeper = () if deepstack is None else self._in_place(deepstack)
        x = embeddings
        for index, block in enumerate(self.blocks):
            x = x + _grouped_query_attention(block.attention, block.norm1(x), cos, sin, mask)
            x = x + block.mlp(block.norm2(x))
            if (index + 1) * self.batch <= len(deeper):
                added = deeper.shape[1]  # type: ignore[union-attr]
                x = torch.cat((x[:, :added] + deeper[index * self.batch : (index + 1) * self.batch], x[:, added:]), dim=1)  # (1, S, C)
        backbone = self.norm(x)
        refined = self.vlln(backbone)
        for block in self.vl_blocks:
            refined = block(refined)
        made = [self._keys_values(context, self._seen(refined, context)) for context in self.crossing]
        return backbone, refined, *(tensor for pair in made for tensor in pair)

    def _in_place(self, deepstack: Tensor) -> Tensor:
        """(E, V, C) -> (E, tokens up to the last picture's end, C), zero where there is text."""
        parts, place, used = [], 0, 0
        for first, behind in self.spans:
            parts += [deepstack.new_zeros(deepstack.shape[0], first - place, deepstack.shape[2]), deepstack[:, used : used + behind - first]]
            place, used = behind, used + behind - first
        return torch.cat(parts, dim=1)

    def _seen(self, x: Tensor, context: Context) -> Tensor:
        """The rows of x (1, S, C) that belong to `context`."""
        if context == "all":
            return x
        if context == "image":
            return torch.cat([x[:, first:behind] for first, behind in self.spans], dim=1)  # (1, V, C)
        starts = (0, *(behind for _, behind in self.spans))
        between = [x[:, start:first] for start, (first, _) in zip(starts, self.spans, strict=False)]
        return torch.cat([*between, x[:, starts[-1] :]], dim=1)  # (1, S - V, C)

    def _keys_values(self, context: Context, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys_values[context](x).chunk(2, dim=-1)
        return self._per_block(keys, self.crossing[context]), self._per_block(values, self.crossing[context])

    def _per_block(self, x: Tensor, blocks: int) -> Tensor:
        """(1, S, X * D) -> (X, N, S, K)."""
        tokens, width = x.shape[1], x.shape[2] // (blocks * self.heads)
        if self.batch == 1:
            return x.reshape(tokens, blocks, self.heads, width).permute(1, 2, 0, 3)
        return x.reshape(self.batch, tokens, blocks, self.heads, width).permute(2, 0, 3, 1, 4).flatten(0, 1)


def _keys_then_values(layers: Sequence[nn.Linear]) -> MatMulLinear:
    """One product [in, all keys then all values]: its output is cut into two whole tensors."""
    weights = zip(*(layer.weight.chunk(2) for layer in layers), strict=True)
    biases = zip(*(layer.bias.chunk(2) for layer in layers), strict=True)
    weight = torch.cat([part for parts in weights for part in parts])
    return MatMulLinear(weight.t(), torch.cat([part for parts in biases for part in parts]))


def _grouped_query_attention(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """`GroupedQueryAttention` written out: each key/value head serves heads / kv_heads query heads."""
    q, k, v = attention.qkv(x).split((attention.q_width, attention.kv_width, attention.kv_width), dim=-1)
    q = rotate(attention.q_norm(split_heads(q, attention.heads)), cos, sin)  # (1, heads, S, K)
    k = rotate(attention.k_norm(split_heads(k, attention.kv_heads)), cos, sin)  # (1, kv_heads, S, K)
    v = split_heads(v, attention.kv_heads)
    share = attention.heads // attention.kv_heads
    return attention.out(merge_heads(attend(q, _repeat_heads(k, share), _repeat_heads(v, share), mask)))


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    """(1, M, S, K) -> (1, M * times, S, K), each head `times` times in a row."""
    batch, heads, tokens, width = x.shape
    return x.unsqueeze(2).expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


class DenoiseStepGraph(nn.Module):
    """One Euler update.

    actions (1, H, A), state (1, state_dim); of the step: tau (D,) and modulation (L + 1, 2, D) from `graph_tables`, step_size (1,) = 1 / steps; and
    for each context keys and values (X, N, its tokens, K) -> next_actions (1, H, A).
    """

    def __init__(self, model: Gr00t, layout: Layout) -> None:
        super().__init__()
        head, self.batch = model.head, layout.batch
        folded, self.horizon = FoldedEncoder.of(head), head.config.action_horizon
        self.encode = MatMulLinear(folded.weight, None)  # its bias is in tau
        self.mix = MatMulLinear(head.action_encoder.w3.weight, None)
        self.positions = nn.Parameter(folded.places, False)  # no sum in the graph: one bias per action token
        self.decode1 = MatMulLinear(*folded_decoder(head))
        self.decode2 = MatMulLinear(head.action_decoder.layer2.weight, head.action_decoder.layer2.bias)
        self.state_encoder = head.state_encoder
        self.future_tokens = None if head.future_tokens is None else head.future_tokens.weight
        for block in head.dit.blocks:
            block.ada_norm = None  # tabulated
            if block.crosses:
                block.attention.kv = None  # in the language graph
        self.blocks = make_exportable(head.dit.blocks)
        self.width = head.dit.width
        self.contexts = tuple(crossing_blocks(model.config))

    def forward(self, actions: Tensor, state: Tensor, tau: Tensor, modulation: Tensor, step_size: Tensor, *keys_values: Tensor) -> Tensor:
        pairs = zip(keys_values[::2], keys_values[1::2], strict=True)
        crossed = {context: _per_block(keys, values, self.batch) for context, (keys, values) in zip(self.contexts, pairs, strict=True)}
        mixed = self.encode(actions) + tau  # (1, H, D)
        tokens = self.mix(mixed * torch.sigmoid(mixed)) + self.positions  # (1, H, D)
        prefix = [self.state_encoder(state).unsqueeze(1), *(() if self.future_tokens is None else (self.future_tokens.unsqueeze(0),))]
        if self.batch > 1:  # a sum, because exporters write out what is repeated: the weights would be others than those of one observation
            prefix[1:] = [each + 0.0 * prefix[0] for each in prefix[1:]]
        x = torch.cat((*prefix, tokens), dim=1)  # (1, 1 + F + H, D)
        for index, block in enumerate(self.blocks):
            queries = self.horizon if index == len(self.blocks) - 1 else None
            h = F.layer_norm(x, (self.width,), weight=modulation[index, 0], bias=modulation[index, 1], eps=DIT_NORM_EPS)
            x = x if queries is None else x[:, -queries:]
            if block.crosses:
                x = x + self._cross(block.attention, h[:, -x.shape[1] :], *next(crossed[block.context]))
            else:
                x = x + block.attention(h, queries=queries)
            x = x + block.mlp(F.layer_norm(x, (self.width,), eps=DIT_NORM_EPS))
        x = F.layer_norm(x, (self.width,), weight=modulation[-1, 0], bias=modulation[-1, 1], eps=OUTPUT_NORM_EPS)  # (1, H, D)
        return euler_step(actions, self.decode2(F.relu(self.decode1(x))), step_size)

    @staticmethod
    def _cross(attention: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention.out(merge_heads(attend(split_heads(attention.q(x), attention.heads), keys, values)))


def _per_block(keys: Tensor, values: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(X, N, S, K) each -> (1, N, S, K) of one block after the other."""
    return ((keys[first : first + batch], values[first : first + batch]) for first in range(0, keys.shape[0], batch))


def graph_tables(model: Gr00t, steps: int) -> StepTables:
    """The tables that `denoise_step` takes, for `steps` Euler steps: tau (steps, D) already through the action encoder's second layer, its biases
    included; modulation (steps, L + 1, 2, D) as the plain model's. To be made before `DenoiseStepGraph` is, which takes the model apart."""
    return FoldedEncoder.of(model.head).step_tables(model.head.step_tables(steps))


# what `graph_tables` needs of the network
TABLE_PARAMETERS = ("head.action_encoder.", "head.position_embedding.", "head.dit.")


def crossing_blocks(config: ModelConfig) -> dict[Context, list[int]]:
    """Context -> the blocks of the transformer that attend to it."""
    found: dict[Context, list[int]] = {}
    for index in range(config.head.dit.num_layers):
        if (context := context_of(index, config.head.attend_text_every)) is not None:
            found.setdefault(context, []).append(index)
    return found


# What keys and values of the blocks that see a context are called.
KEYS_VALUES: dict[Context, tuple[str, str]] = {
    "all": ("keys", "values"),
    "text": ("text_keys", "text_values"),
    "image": ("image_keys", "image_values"),
}
# Inputs and outputs with a size that varies between calls: which of their dimensions, and its name.
VARYING: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("embeddings", "backbone_features", "vl_features"), (1, TOKENS)),
    **dict.fromkeys(KEYS_VALUES["all"], (2, TOKENS)),
    **dict.fromkeys(KEYS_VALUES["text"], (2, TEXT_TOKENS)),
}


def graphs_of(config: ModelConfig) -> dict[str, GraphSpec]:
    """The graphs of a network, in the order of execution."""
    crossing = crossing_blocks(config)
    keys_values = tuple(name for context in crossing for name in KEYS_VALUES[context])
    deepstack = ("deepstack",) if getattr(config.vision, "deepstack", ()) else ()
    projections = tuple(f"head.dit.blocks.{index}.attention.kv." for indices in crossing.values() for index in indices)
    encoders = ("head.state_encoder.", "head.action_encoder.", "head.action_decoder.", "head.position_embedding.", "head.future_tokens.")
    refining = ("head.vlln.", "head.vl_blocks.")
    return {
        "vision": GraphSpec(_VISION_GRAPHS[type(config.vision)], ("vision.",), ("pixel_values",), ("tokens", *deepstack)),
        "language": GraphSpec(
            LanguageGraph,
            ("language.blocks.", "language.norm.", *refining, *projections),
            ("embeddings", *deepstack),
            ("backbone_features", "vl_features", *keys_values),
        ),
        "denoise_step": GraphSpec(
            DenoiseStepGraph,
            (*encoders, "head.dit."),
            ("actions", "state", "tau", "modulation", "step_size", *keys_values),
            ("next_actions",),
        ),
    }


def plain_outputs(model: Gr00t, inputs: ModelInputs) -> tuple[dict[str, Tensor], Condition]:
    """What the graphs `vision` and `language` put out, by the plain model, for a batch of one; and what its denoising steps have in common."""
    head, positions = model.head, inputs.image_positions
    seen = model.encode_vision(inputs.pixel_values)
    features = model.encode_language(inputs, seen)
    refined = head.refine(features)
    condition = head.condition(refined, inputs.state, None, positions)
    found = {"backbone_features": features, "vl_features": refined}
    found |= {"tokens": seen} if seen.dim() == 3 else {"tokens": seen[0], "deepstack": seen[1:].squeeze(1)}
    for context, indices in crossing_blocks(model.config).items():
        pairs = [condition.cross[index // 2] for index in indices]  # every other block cross-attends
        found |= {name: torch.cat(parts) for name, parts in zip(KEYS_VALUES[context], zip(*pairs, strict=True), strict=True)}  # (X, N, S, K)
    return found, condition


def example_inputs(name: str, config: ModelConfig, layout: Layout, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs of the right shapes for the graph `name` and a prompt of `tokens`, in the order of its spec."""
    head, width, images, batch = config.head, config.head.dit.width, layout.image_tokens, layout.batch
    shapes = {
        "pixel_values": (batch, layout.pictures, 3, layout.height, layout.width),
        "embeddings": (batch, tokens, config.language.hidden_size),
        "deepstack": (batch * len(getattr(config.vision, "deepstack", ())), images, config.language.hidden_size),
        "actions": (batch, head.action_horizon, head.action_dim),
        "state": (batch, head.state_dim),
        "tau": (width,),
        "modulation": (head.dit.num_layers + 1, 2, width),
        "step_size": (1,),
    }
    counts = {"all": tokens, "text": tokens - images, "image": images}
    for context, indices in crossing_blocks(config).items():
        shapes |= dict.fromkeys(KEYS_VALUES[context], (batch * len(indices), head.dit.num_heads, counts[context], head.dit.head_dim))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shapes[key], generator=generator).to(dtype) for key in graphs_of(config)[name].inputs)
