"""What a network's description holds: which published tensors make up each parameter of ours, and how its configuration files are read by
tables.

A published network is one file of this folder, which exports a NetworkSpec. `gr00t_fast.networks.NETWORKS` lists them. In names of tensors `{i}`
stands for a layer index. Several sources are stacked by rows (fused projections). See `Layout` for the other arrangement.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gr00t_fast.base.contracts import NetworkName
from gr00t_fast.base.errors import CheckpointError, closest, shown
from gr00t_fast.base.files import read_json
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.inputs.images import ImageTransform
from gr00t_fast.inputs.processor import PolicyInputs, Processor
from gr00t_fast.inputs.prompt import PromptEncoder, PromptForm
from gr00t_fast.model.config import LanguageConfig, ModelConfig, QwenVisionConfig, TransformerConfig
from gr00t_fast.model.vision import pixels_of

log = logging.getLogger(__name__)


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
        assert isinstance(vision, QwenVisionConfig)
        return {sources.names[0]: (shape[0], 3, vision.frames_per_patch, vision.patch_size, vision.patch_size)}
    return {name: (rows, *shape[1:]) for name, rows in zip(sources.names, _row_split(parameter, shape[0], len(sources.names), config), strict=True)}


def _row_split(parameter: str, row_count: int, count: int, config: ModelConfig) -> tuple[int, ...]:
    """How the rows of a fused projection divide among its sources: equally, but for grouped-query attention."""
    if parameter.startswith("language.") and count == 3:
        language = config.language
        return (language.num_heads * language.head_dim, *(language.num_kv_heads * language.head_dim,) * 2)
    return (row_count // count,) * count


if TYPE_CHECKING:
    from tokenizers import Tokenizer


class EmbodimentFiles(Protocol):
    """The small files of a checkpoint that say what it was trained on."""

    @property
    def tags(self) -> Collection[str]:
        """Embodiments that they know, as they write them."""

    def row_of(self, tag: str) -> int:
        """The row of the per-embodiment weights. Raises ConfigError for an unknown tag, CheckpointError for damaged files."""

    def embodiment(self, tag: str, data_config: DataConfig | None) -> Embodiment:
        """data_config: None for the checkpoint's own, or its network's usual one. Raises as `row_of`, and ConfigError for a data configuration that
        does not fit."""


@dataclass(frozen=True)
class NetworkSpec:
    """Everything special about a published network outside of gr00t_fast.model, whose flags are in ModelConfig.

    name: what reports and clients call it.
    model_type: what its config.json says.
    backbone_file: the file with the backbone's sizes.
    published_backbone: these sizes, for a checkpoint without that file.
    read_config: config.json and the backbone's configuration -> sizes.
    weights: parameter -> the published tensors that it is made of.
    unused_weights: prefixes of tensors that are in the files and are not read.
    read_files: directory, config.json, sizes and `letterbox` -> the files about embodiments.
    images: how frames become images.
    prompt: how an instruction becomes tokens.
    reference_inputs: what the network reads, by the names of NVIDIA's code.
    download: patterns of a hub repository's small files.
    fixed_images: whether images have one size, whatever the cameras are.
    protocol: see `Policy.protocol`.
    config_of: directory and its config.json -> what `read_config` reads.
    prefix: with which all names of tensors in the files begin.
    tied: published names of the language head and of the embedding, if a file may have only the former of the two.
    """

    name: str
    model_type: str
    backbone_file: str
    published_backbone: Mapping[str, Any]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]
    weights: Mapping[str, Sources]
    unused_weights: tuple[str, ...]
    read_files: Callable[[Path, Mapping[str, Any], ModelConfig, str], EmbodimentFiles]
    images: Callable[[Embodiment, ModelConfig], ImageTransform]
    prompt: PromptForm
    reference_inputs: Callable[[PolicyInputs, Embodiment, ModelConfig, Tensor], dict[str, Tensor]]
    download: tuple[str, ...]
    fixed_images: bool
    protocol: NetworkName
    config_of: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] = lambda directory, config: config
    prefix: str = ""
    tied: tuple[str, str] | None = None

    @property
    def title(self) -> str:
        return f"GR00T {self.name.upper()}"

    def processor(self, config: ModelConfig, embodiment: Embodiment, tokenizer: Tokenizer, prompt_style: str) -> Processor:
        """Raises ConfigError for an unknown style, CheckpointError for a tokenizer of another network."""
        images = self.images(embodiment, config)
        image_token = config.language.image_token_id
        prompts = PromptEncoder(self.prompt, tokenizer, embodiment.images_per_observation, image_token, prompt_style, embodiment.formalize_language)
        return Processor(embodiment, images, prompts, pixels_of(config.vision), (config.head.action_horizon, config.head.action_dim))


def read_object(path: Path, nan: bool = False) -> dict[str, Any]:
    """A file's JSON object. nan: whether numbers may be NaN; whoever uses them decides. Raises CheckpointError."""
    try:
        loaded = read_json(path, nan)
    except FileNotFoundError as error:
        below = sorted({file.parent for file in path.parent.glob("*/model*.safetensors*")})
        meant = f" Did you mean {' or '.join(map(str, below[:3]))}?" if below else ""
        raise CheckpointError(
            f"{path} is missing. Expected a GR00T checkpoint: config.json, model*.safetensors and (N1.5) experiment_cfg/metadata.json or (N1.6 "
            f"and N1.7) processor_config.json, statistics.json, embodiment_id.json; or what lerobot saved, with its policy_p*processor files.{meant}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(loaded).__name__}.")
    return loaded


def damaged(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {why}. Copy or download the checkpoint again.")


# The weights show a wrong size, but only once the network is built, which takes hours for a million layers.
# Nothing shows too many steps in time; their tables would take all memory.
_MOST = {**dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "select_layer"), 256), "num_timestep_buckets": 10_000}
_MOST_OTHERWISE = 2**18  # widths, vocabulary
_REQUIRED: Any = object()
_LISTED = 12  # keys named in one warning


@dataclass(frozen=True)
class Section:
    """One section of a configuration file. `absent`, below: what a file that leaves a key out means, the default of the reference's class.

    Every method raises CheckpointError that names file and key.
    """

    values: Mapping[str, Any]
    where: str

    def section(self, name: str) -> Section:
        if not isinstance(self.values.get(name), Mapping):
            raise CheckpointError(f"{self.where} has no '{name}' section. Expected what NVIDIA's training writes.")
        return Section(self.values[name], f"{self.where}{'.' if ' ' in self.where else ' '}{name}")  # file, then a dotted path

    def whole(self, key: str, absent: Any = _REQUIRED, most: int | None = None) -> int:
        value, most = self.values.get(key, absent), most or _MOST.get(key, _MOST_OTHERWISE)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self._wrong(key, f"a whole number from 1 to {most}", value)
        return value

    def wholes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """names: field of a dataclass of sizes -> key."""
        return {field: self.whole(key) for field, key in names.items()}

    def positive(self, key: str, absent: float) -> float:
        value = self.values.get(key, absent)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise self._wrong(key, "a positive number", value)
        return float(value)

    def switch(self, key: str, absent: bool) -> bool:
        value = self.values.get(key, absent)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def warn_of_unknown(self, known: Iterable[str]) -> None:
        """One warning that names all keys that nothing reads here: most are new settings of training. Those that are known to change the computation
        are in the tables of `refuse_other`."""
        known = set(known)
        if unknown := [key for key in self.values if key not in known]:
            told = ", ".join(f"{shown(key)}{closest(key, known)}" for key in unknown[:_LISTED])
            more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
            log.warning("%s: unknown and not read: %s%s. If one of them changes actions, they will be wrong.", self.where, told, more)

    def refuse_other(self, computed: Mapping[str, tuple[Any, Any]]) -> None:
        """computed: key -> what an absent one means, and the value that this implementation computes with; any other would need other code."""
        for key, (absent, value) in computed.items():
            if self.values.get(key, absent) != value:
                found = shown(self.values[key]) if key in self.values else f"not given, which means {absent!r} to the reference"
                raise CheckpointError(f"{self.where}: {key} is {found}; this implementation computes with {value!r} only.")

    def refuse_different(self, expected: Mapping[str, Any]) -> None:
        """Sizes that are written twice, where they are given. Parts that do not fit together would show as a puzzling shape error in the network."""
        for key, value in expected.items():
            if self.values.get(key, value) != value:
                raise CheckpointError(f"{self.where}: {key} is {shown(self.values[key])}, expected {value} from the rest of the configuration.")

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        found = "nothing" if value is _REQUIRED else shown(value)
        return CheckpointError(f"{self.where}: '{key}' must be {expected}, got {found}. The file is incomplete or damaged.")


def expect(files: str, conditions: Mapping[str, bool]) -> None:
    """Raises CheckpointError for the first condition that does not hold."""
    for condition, holds in conditions.items():
        if not holds:
            raise CheckpointError(f"{files}: expected that {condition}, which is not so.")


# What all networks have: diffusers' transformers in the action head, and Qwen3 as the language model.

_COMPUTED_BY_TRANSFORMERS: dict[str, tuple[Any, Any]] = {
    "positional_embeddings": ("sinusoidal", None),
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "attention_bias": (True, True),
}
_COMPUTED_BY_THE_DIT: dict[str, tuple[Any, Any]] = {
    "norm_type": ("ada_norm", "ada_norm"),
    "norm_elementwise_affine": (False, False),
    "norm_eps": (1e-5, 1e-5),
    "interleave_self_attention": (False, True),
}
_TRANSFORMER_KEYS = {
    *("attention_head_dim", "cross_attention_dim", "dropout", "final_dropout", "num_attention_heads", "num_layers", "output_dim", "compute_dtype"),
    *("max_num_positional_embeddings", "upcast_attention", "num_embeds_ada_norm", *_COMPUTED_BY_TRANSFORMERS, *_COMPUTED_BY_THE_DIT),
}


def read_transformer(section: Section, is_dit: bool = False) -> TransformerConfig:
    section.warn_of_unknown(_TRANSFORMER_KEYS)
    section.refuse_other(_COMPUTED_BY_TRANSFORMERS | (_COMPUTED_BY_THE_DIT if is_dit else {}))
    return TransformerConfig(**section.wholes({"num_layers": "num_layers", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim"}))


# vl_self_attention_cfg of the published networks
PUBLISHED_SELF_ATTENTION = {
    "attention_head_dim": 64,
    "dropout": 0.2,
    "final_dropout": True,
    "num_attention_heads": 32,
    "num_layers": 4,
    "positional_embeddings": None,
}

_QWEN3_SIZES = {
    **{name: name for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")},
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


def read_qwen3(section: Section, num_layers: int, image_token_id: int, rope_theta: float, **others: Any) -> LanguageConfig:
    """num_layers: how many of the decoder's layers are used. others: further fields of LanguageConfig."""
    section.refuse_other({"hidden_act": ("silu", "silu"), "attention_bias": (False, False)})
    if num_layers > (available := section.whole("num_hidden_layers")):
        raise CheckpointError(f"{section.where}: select_layer of config.json must be between 1 and {available}, got {num_layers}.")
    config = LanguageConfig(
        **section.wholes(_QWEN3_SIZES),
        num_layers=num_layers,
        rms_norm_eps=section.positive("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        image_token_id=image_token_id,
        **others,
    )
    expect(
        section.where,
        {
            "num_attention_heads is a multiple of num_key_value_heads": config.num_heads % config.num_kv_heads == 0,
            "head_dim is even": config.head_dim % 2 == 0,
            "the image token's id is below vocab_size": image_token_id < config.vocab_size,
        },
    )
    return config


def check_head(config: ModelConfig, where: str) -> None:
    """What must hold of an action head in any network. Raises CheckpointError."""
    head, width = config.head, config.language.hidden_size
    if head.vl_attention.num_layers and head.vl_attention.width != width:
        raise CheckpointError(
            f"{where}: vl_self_attention_cfg has heads x head_dim {head.vl_attention.width}, expected {width}, the backbone's width."
        )
    expect(
        where,
        {
            f"diffusion_model_cfg.output_dim is hidden_size ({head.hidden_size})": head.output_dim == head.hidden_size,
            "input_embedding_dim is even": head.dit.width % 2 == 0,
            "max_seq_len is at least action_horizon": head.max_positions >= head.action_horizon,
            "num_timestep_buckets is at least num_inference_timesteps": head.timestep_buckets >= head.denoising_steps,
        },
    )
