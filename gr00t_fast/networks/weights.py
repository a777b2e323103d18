"""Which published tensors make up each parameter of ours: the language every network's table is written in, and the parts that all share.

`{i}` stands for a layer index. Several sources are stacked by rows (fused projections). See `Layout` for the other arrangement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gr00t_fast.model.config import ModelConfig


class Layout(Enum):
    ROWS = "sources stacked along the first dimension"
    CATEGORY = "per-embodiment (E, ...): this embodiment's row"
    PATCHES = "(D, 3, frames, p, p): a convolution over patches, as rows of a product"


@dataclass(frozen=True)
class Sources:
    names: tuple[str, ...]
    layout: Layout = Layout.ROWS


def rows(*names: str) -> Sources:
    return Sources(names)


def linear(ours: str, *theirs: str) -> dict[str, Sources]:
    """A Linear or norm with weight and bias; several published ones when fused."""
    return {f"{ours}.{part}": rows(*(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")}


def _category(ours: str, theirs: str) -> dict[str, Sources]:
    return {
        f"{ours}.weight": Sources((f"{theirs}.W",), Layout.CATEGORY),
        f"{ours}.bias": Sources((f"{theirs}.b",), Layout.CATEGORY),
    }


def norm(ours: str, theirs: str) -> dict[str, Sources]:
    """An RMSNorm."""
    return {f"{ours}.weight": rows(f"{theirs}.weight")}


def qwen3(prefix: str) -> dict[str, Sources]:
    """Qwen3's decoder."""
    theirs = f"{prefix}layers.{{i}}."
    return {
        "language.embedding.weight": rows(f"{prefix}embed_tokens.weight"),
        **norm("language.blocks.{i}.norm1", f"{theirs}input_layernorm"),
        "language.blocks.{i}.attention.qkv.weight": rows(*(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv")),
        **norm("language.blocks.{i}.attention.q_norm", f"{theirs}self_attn.q_norm"),
        **norm("language.blocks.{i}.attention.k_norm", f"{theirs}self_attn.k_norm"),
        "language.blocks.{i}.attention.out.weight": rows(f"{theirs}self_attn.o_proj.weight"),
        **norm("language.blocks.{i}.norm2", f"{theirs}post_attention_layernorm"),
        **{f"language.blocks.{{i}}.mlp.{part}.weight": rows(f"{theirs}mlp.{part}_proj.weight") for part in ("gate", "up", "down")},
    }


_H = "action_head."
_D = "action_head.model."
_VL = f"{_H}vl_self_attention.transformer_blocks.{{i}}."
_DIT = f"{_D}transformer_blocks.{{i}}."
# The action head, the same in all networks
HEAD: dict[str, Sources] = {
    # self-attention over vision-language tokens
    **linear("head.vlln", f"{_H}vlln"),
    **linear("head.vl_blocks.{i}.norm1", f"{_VL}norm1"),
    **linear("head.vl_blocks.{i}.attention.qkv", *(f"{_VL}attn1.to_{x}" for x in "qkv")),
    **linear("head.vl_blocks.{i}.attention.out", f"{_VL}attn1.to_out.0"),
    **linear("head.vl_blocks.{i}.norm2", f"{_VL}norm3"),
    **linear("head.vl_blocks.{i}.mlp.up", f"{_VL}ff.net.0.proj"),
    **linear("head.vl_blocks.{i}.mlp.down", f"{_VL}ff.net.2"),
    # per-embodiment encoders and decoder
    **_category("head.state_encoder.layer1", f"{_H}state_encoder.layer1"),
    **_category("head.state_encoder.layer2", f"{_H}state_encoder.layer2"),
    **_category("head.action_encoder.w1", f"{_H}action_encoder.W1"),
    **_category("head.action_encoder.w2", f"{_H}action_encoder.W2"),
    **_category("head.action_encoder.w3", f"{_H}action_encoder.W3"),
    **_category("head.action_decoder.layer1", f"{_H}action_decoder.layer1"),
    **_category("head.action_decoder.layer2", f"{_H}action_decoder.layer2"),
    "head.position_embedding.weight": rows(f"{_H}position_embedding.weight"),
    "head.future_tokens.weight": rows(f"{_H}future_tokens.weight"),
    # diffusion transformer
    **linear("head.dit.time.linear1", f"{_D}timestep_encoder.timestep_embedder.linear_1"),
    **linear("head.dit.time.linear2", f"{_D}timestep_encoder.timestep_embedder.linear_2"),
    **linear("head.dit.blocks.{i}.ada_norm", f"{_DIT}norm1.linear"),
    **linear("head.dit.blocks.{i}.attention.out", f"{_DIT}attn1.to_out.0"),
    **linear("head.dit.blocks.{i}.mlp.up", f"{_DIT}ff.net.0.proj"),
    **linear("head.dit.blocks.{i}.mlp.down", f"{_DIT}ff.net.2"),
    **linear("head.dit.out_modulation", f"{_D}proj_out_1"),
    **linear("head.dit.out", f"{_D}proj_out_2"),
    **linear("head.dit.blocks.{i}.attention.q", f"{_DIT}attn1.to_q"),
    **linear("head.dit.blocks.{i}.attention.kv", f"{_DIT}attn1.to_k", f"{_DIT}attn1.to_v"),
    **linear("head.dit.blocks.{i}.attention.qkv", *(f"{_DIT}attn1.to_{x}" for x in "qkv")),
}


def sources_of(weights: Mapping[str, Sources], parameter: str) -> Sources:
    """Published sources of one of our parameters, by a network's table, layer index filled in."""
    index = next(iter(re.findall(r"\.(\d+)\.", parameter)), "")
    entry = weights[re.sub(r"\.\d+\.", ".{i}.", parameter)]
    return Sources(tuple(name.format(i=index) for name in entry.names), entry.layout)


def published_shapes(weights: Mapping[str, Sources], parameter: str, shape: tuple[int, ...], config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes that the sources of `parameter` must have, given our parameter's shape."""
    sources = sources_of(weights, parameter)
    if sources.layout is Layout.CATEGORY:
        return {sources.names[0]: (config.head.embodiments, *shape)}
    if sources.layout is Layout.PATCHES:
        vision = config.vision
        return {sources.names[0]: (shape[0], 3, vision.frames_per_patch, vision.patch_size, vision.patch_size)}
    return {name: (rows, *shape[1:]) for name, rows in zip(sources.names, _row_split(parameter, shape[0], len(sources.names), config), strict=True)}


def _row_split(parameter: str, row_count: int, count: int, config: ModelConfig) -> tuple[int, ...]:
    """How the rows of a fused projection divide among its sources: equally, but for grouped-query attention."""
    if parameter.startswith("language.") and count == 3:
        language = config.language
        return (language.num_heads * language.head_dim, *(language.num_kv_heads * language.head_dim,) * 2)
    return (row_count // count,) * count
