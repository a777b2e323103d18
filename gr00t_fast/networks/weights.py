"""The rename table: which published tensors make up each parameter of ours. Nothing else knows the published names.

`{i}` stands for a layer index. Several sources are stacked by rows (fused projections). See `Layout` for the other arrangement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gr00t_fast.model.config import ModelConfig, QwenVisionConfig

_V = "backbone.eagle_model.vision_model.vision_model."
_L = "backbone.eagle_model.language_model.model."
_V7 = "backbone.model.model.visual."
_L7 = "backbone.model.model.language_model."
_H = "action_head."
_D = "action_head.model."

# Tensors that published files may hold and the policy never uses: SigLIP's pooling head, the language head (tied to the embedding), and N1.7's final
# norm.
UNUSED_PREFIXES = (f"{_V}head.", "backbone.eagle_model.language_model.lm_head.", "backbone.model.lm_head.", f"{_L7}norm.")


class Layout(Enum):
    ROWS = "sources stacked along the first dimension"
    CATEGORY = "per-embodiment (E, ...): this embodiment's row"
    PATCHES = "(D, 3, frames, p, p): a convolution over patches, as rows of a product"


@dataclass(frozen=True)
class Sources:
    names: tuple[str, ...]
    layout: Layout = Layout.ROWS


def _rows(*names: str) -> Sources:
    return Sources(names)


def _linear(ours: str, *theirs: str) -> dict[str, Sources]:
    """A Linear or norm with weight and bias; several published ones when fused."""
    return {f"{ours}.{part}": _rows(*(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")}


def _category(ours: str, theirs: str) -> dict[str, Sources]:
    return {
        f"{ours}.weight": Sources((f"{theirs}.W",), Layout.CATEGORY),
        f"{ours}.bias": Sources((f"{theirs}.b",), Layout.CATEGORY),
    }


def _norm(ours: str, theirs: str) -> dict[str, Sources]:
    """An RMSNorm."""
    return {f"{ours}.weight": _rows(f"{theirs}.weight")}


def _language(prefix: str) -> dict[str, Sources]:
    """Qwen3's decoder."""
    theirs = f"{prefix}layers.{{i}}."
    return {
        "language.embedding.weight": _rows(f"{prefix}embed_tokens.weight"),
        **_norm("language.blocks.{i}.norm1", f"{theirs}input_layernorm"),
        "language.blocks.{i}.attention.qkv.weight": _rows(*(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv")),
        **_norm("language.blocks.{i}.attention.q_norm", f"{theirs}self_attn.q_norm"),
        **_norm("language.blocks.{i}.attention.k_norm", f"{theirs}self_attn.k_norm"),
        "language.blocks.{i}.attention.out.weight": _rows(f"{theirs}self_attn.o_proj.weight"),
        **_norm("language.blocks.{i}.norm2", f"{theirs}post_attention_layernorm"),
        **{f"language.blocks.{{i}}.mlp.{part}.weight": _rows(f"{theirs}mlp.{part}_proj.weight") for part in ("gate", "up", "down")},
    }


_SIGLIP = f"{_V}encoder.layers.{{i}}."
_QWEN_VISION = f"{_V7}blocks.{{i}}."
_VL = f"{_H}vl_self_attention.transformer_blocks.{{i}}."
_DIT = f"{_D}transformer_blocks.{{i}}."

_TOWERS: dict[str, Sources] = {
    # vision
    **_linear("vision.patch_embedding", f"{_V}embeddings.patch_embedding"),
    "vision.position_embedding.weight": _rows(f"{_V}embeddings.position_embedding.weight"),
    **_linear("vision.blocks.{i}.norm1", f"{_SIGLIP}layer_norm1"),
    **_linear("vision.blocks.{i}.attention.qkv", *(f"{_SIGLIP}self_attn.{x}_proj" for x in "qkv")),
    **_linear("vision.blocks.{i}.attention.out", f"{_SIGLIP}self_attn.out_proj"),
    **_linear("vision.blocks.{i}.norm2", f"{_SIGLIP}layer_norm2"),
    **_linear("vision.blocks.{i}.mlp.up", f"{_SIGLIP}mlp.fc1"),
    **_linear("vision.blocks.{i}.mlp.down", f"{_SIGLIP}mlp.fc2"),
    **_linear("vision.norm", f"{_V}post_layernorm"),
    **_linear("vision.connector", "backbone.eagle_model.mlp1.0"),
    # language
    **_language(_L),
    **_norm("language.norm", f"{_L}norm"),
}
_TOWERS_N1D7: dict[str, Sources] = {
    "vision.patch_embedding.weight": Sources((f"{_V7}patch_embed.proj.weight",), Layout.PATCHES),
    "vision.patch_embedding.bias": _rows(f"{_V7}patch_embed.proj.bias"),
    "vision.position_embedding.weight": _rows(f"{_V7}pos_embed.weight"),
    **_linear("vision.blocks.{i}.norm1", f"{_QWEN_VISION}norm1"),
    **_linear("vision.blocks.{i}.attention.qkv", f"{_QWEN_VISION}attn.qkv"),
    **_linear("vision.blocks.{i}.attention.out", f"{_QWEN_VISION}attn.proj"),
    **_linear("vision.blocks.{i}.norm2", f"{_QWEN_VISION}norm2"),
    **_linear("vision.blocks.{i}.mlp.up", f"{_QWEN_VISION}mlp.linear_fc1"),
    **_linear("vision.blocks.{i}.mlp.down", f"{_QWEN_VISION}mlp.linear_fc2"),
    **{
        name: sources
        for ours, theirs in (("vision.merger", "merger"), ("vision.deepstack_mergers.{i}", "deepstack_merger_list.{i}"))
        for part, published in (("norm", "norm"), ("up", "linear_fc1"), ("down", "linear_fc2"))
        for name, sources in _linear(f"{ours}.{part}", f"{_V7}{theirs}.{published}").items()
    },
    **_language(_L7),
}
_HEAD: dict[str, Sources] = {
    # self-attention over vision-language tokens
    **_linear("head.vlln", f"{_H}vlln"),
    **_linear("head.vl_blocks.{i}.norm1", f"{_VL}norm1"),
    **_linear("head.vl_blocks.{i}.attention.qkv", *(f"{_VL}attn1.to_{x}" for x in "qkv")),
    **_linear("head.vl_blocks.{i}.attention.out", f"{_VL}attn1.to_out.0"),
    **_linear("head.vl_blocks.{i}.norm2", f"{_VL}norm3"),
    **_linear("head.vl_blocks.{i}.mlp.up", f"{_VL}ff.net.0.proj"),
    **_linear("head.vl_blocks.{i}.mlp.down", f"{_VL}ff.net.2"),
    # per-embodiment encoders and decoder
    **_category("head.state_encoder.layer1", f"{_H}state_encoder.layer1"),
    **_category("head.state_encoder.layer2", f"{_H}state_encoder.layer2"),
    **_category("head.action_encoder.w1", f"{_H}action_encoder.W1"),
    **_category("head.action_encoder.w2", f"{_H}action_encoder.W2"),
    **_category("head.action_encoder.w3", f"{_H}action_encoder.W3"),
    **_category("head.action_decoder.layer1", f"{_H}action_decoder.layer1"),
    **_category("head.action_decoder.layer2", f"{_H}action_decoder.layer2"),
    "head.position_embedding.weight": _rows(f"{_H}position_embedding.weight"),
    "head.future_tokens.weight": _rows(f"{_H}future_tokens.weight"),
    # diffusion transformer
    **_linear("head.dit.time.linear1", f"{_D}timestep_encoder.timestep_embedder.linear_1"),
    **_linear("head.dit.time.linear2", f"{_D}timestep_encoder.timestep_embedder.linear_2"),
    **_linear("head.dit.blocks.{i}.ada_norm", f"{_DIT}norm1.linear"),
    **_linear("head.dit.blocks.{i}.attention.out", f"{_DIT}attn1.to_out.0"),
    **_linear("head.dit.blocks.{i}.mlp.up", f"{_DIT}ff.net.0.proj"),
    **_linear("head.dit.blocks.{i}.mlp.down", f"{_DIT}ff.net.2"),
    **_linear("head.dit.out_modulation", f"{_D}proj_out_1"),
    **_linear("head.dit.out", f"{_D}proj_out_2"),
}
_CROSS = {
    **_linear("head.dit.blocks.{i}.attention.q", f"{_DIT}attn1.to_q"),
    **_linear("head.dit.blocks.{i}.attention.kv", f"{_DIT}attn1.to_k", f"{_DIT}attn1.to_v"),
}
_SELF = _linear("head.dit.blocks.{i}.attention.qkv", *(f"{_DIT}attn1.to_{x}" for x in "qkv"))
RENAME = {**_TOWERS, **_HEAD, **_CROSS, **_SELF}
RENAME_N1D7 = {**_TOWERS_N1D7, **_HEAD, **_CROSS, **_SELF}


def sources_of(parameter: str, config: ModelConfig) -> Sources:
    """Published sources of one of our parameters, layer index filled in."""
    table = RENAME_N1D7 if isinstance(config.vision, QwenVisionConfig) else RENAME
    index = next(iter(re.findall(r"\.(\d+)\.", parameter)), "")
    entry = table[re.sub(r"\.\d+\.", ".{i}.", parameter)]
    return Sources(tuple(name.format(i=index) for name in entry.names), entry.layout)


def published_shapes(parameter: str, shape: tuple[int, ...], config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes that the sources of `parameter` must have, given our parameter's shape."""
    sources = sources_of(parameter, config)
    if sources.layout is Layout.CATEGORY:
        return {sources.names[0]: (config.head.embodiments, *shape)}
    if sources.layout is Layout.PATCHES:
        vision = config.vision
        return {sources.names[0]: (shape[0], 3, vision.frames_per_patch, vision.patch_size, vision.patch_size)}
    return {name: (rows, *shape[1:]) for name, rows in zip(sources.names, _row_split(parameter, shape[0], config), strict=True)}


def _row_split(parameter: str, rows: int, config: ModelConfig) -> tuple[int, ...]:
    """How the rows of a fused projection divide among its sources: equally, but for grouped-query attention."""
    count = len(sources_of(parameter, config).names)
    if parameter.startswith("language.") and count == 3:
        language = config.language
        return (language.num_heads * language.head_dim, *(language.num_kv_heads * language.head_dim,) * 2)
    return (rows // count,) * count
