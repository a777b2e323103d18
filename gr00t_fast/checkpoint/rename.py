"""The rename table: which published tensors make up each parameter of ours. Nothing else knows the published names.

`{i}` stands for a layer index. Several sources are stacked by rows (fused projections). See `Layout` for the other arrangement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gr00t_fast.config import ModelConfig

_V = "backbone.eagle_model.vision_model.vision_model."
_L = "backbone.eagle_model.language_model.model."
_H = "action_head."
_D = "action_head.model."

# Tensors that published files may hold and the policy never uses: SigLIP's pooling head, the language head (tied to the embedding).
UNUSED_PREFIXES = (f"{_V}head.", "backbone.eagle_model.language_model.lm_head.")


class Layout(Enum):
    ROWS = "sources stacked along the first dimension"
    CATEGORY = "per-embodiment (E, ...): this embodiment's row"


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


_SIGLIP = f"{_V}encoder.layers.{{i}}."
_QWEN = f"{_L}layers.{{i}}."
_VL = f"{_H}vl_self_attention.transformer_blocks.{{i}}."
_DIT = f"{_D}transformer_blocks.{{i}}."

_COMMON: dict[str, Sources] = {
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
    "language.embedding.weight": _rows(f"{_L}embed_tokens.weight"),
    "language.blocks.{i}.norm1.weight": _rows(f"{_QWEN}input_layernorm.weight"),
    "language.blocks.{i}.attention.qkv.weight": _rows(*(f"{_QWEN}self_attn.{x}_proj.weight" for x in "qkv")),
    "language.blocks.{i}.attention.q_norm.weight": _rows(f"{_QWEN}self_attn.q_norm.weight"),
    "language.blocks.{i}.attention.k_norm.weight": _rows(f"{_QWEN}self_attn.k_norm.weight"),
    "language.blocks.{i}.attention.out.weight": _rows(f"{_QWEN}self_attn.o_proj.weight"),
    "language.blocks.{i}.norm2.weight": _rows(f"{_QWEN}post_attention_layernorm.weight"),
    "language.blocks.{i}.mlp.gate.weight": _rows(f"{_QWEN}mlp.gate_proj.weight"),
    "language.blocks.{i}.mlp.up.weight": _rows(f"{_QWEN}mlp.up_proj.weight"),
    "language.blocks.{i}.mlp.down.weight": _rows(f"{_QWEN}mlp.down_proj.weight"),
    "language.norm.weight": _rows(f"{_L}norm.weight"),
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
RENAME = {**_COMMON, **_CROSS, **_SELF}


def sources_of(parameter: str) -> Sources:
    """Published sources of one of our parameters, layer index filled in."""
    index = next(iter(re.findall(r"\.(\d+)\.", parameter)), "")
    entry = RENAME[re.sub(r"\.\d+\.", ".{i}.", parameter)]
    return Sources(tuple(name.format(i=index) for name in entry.names), entry.layout)


def published_shapes(parameter: str, shape: tuple[int, ...], config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes that the sources of `parameter` must have, given our parameter's shape."""
    sources = sources_of(parameter)
    if sources.layout is Layout.CATEGORY:
        return {sources.names[0]: (config.head.embodiments, *shape)}
    return {name: (rows, *shape[1:]) for name, rows in zip(sources.names, _row_split(parameter, shape[0], config), strict=True)}


def _row_split(parameter: str, rows: int, config: ModelConfig) -> tuple[int, ...]:
    """How the rows of a fused projection divide among its sources: equally, but for grouped-query attention."""
    count = len(sources_of(parameter).names)
    if parameter.startswith("language.") and count == 3:
        language = config.language
        return (language.num_heads * language.head_dim, *(language.num_kv_heads * language.head_dim,) * 2)
    return (rows // count,) * count
