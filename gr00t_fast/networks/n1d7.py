"""Sizes of GR00T N1.7's network, read from a checkpoint's own files and checked once.

The reference fills keys that config.json lacks with its class's defaults, and several of those are not the published network's: a file without
`select_layer` means 12 layers, not 16. The same defaults are filled in here. Published checkpoints say nothing about the backbone's sizes, which
are those of Qwen3-VL-2B (Cosmos-Reason2-2B); a checkpoint with another backbone says so in backbone_config.json (a Qwen3VLConfig).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gr00t_fast.errors import CheckpointError, closest, shown
from gr00t_fast.model.config import ActionHeadConfig, LanguageConfig, ModelConfig, QwenVisionConfig, TransformerConfig
from gr00t_fast.networks.n1d5 import look_up, need, positive, switch

MODEL_TYPE = "Gr00tN1d7"
CONFIG_FILE, BACKBONE_FILE = "config.json", "backbone_config.json"

# The reference's class defaults of what decides the computation.
DEFAULTS: dict[str, Any] = {
    "backbone_embedding_dim": 2048,
    "select_layer": 12,
    "max_state_dim": 132,
    "max_action_dim": 132,
    "action_horizon": 40,
    "hidden_size": 1024,
    "input_embedding_dim": 1536,
    "state_history_length": 1,
    "use_vlln": True,
    "max_seq_len": 1024,
    "use_alternate_vl_dit": True,
    "attend_text_every_n_blocks": 2,
    "num_inference_timesteps": 4,
    "num_timestep_buckets": 1000,
    "max_num_embodiments": 32,
    "vl_self_attention_cfg": None,
    "diffusion_model_cfg": {
        "positional_embeddings": None,
        "num_layers": 16,
        "num_attention_heads": 32,
        "attention_head_dim": 48,
        "norm_type": "ada_norm",
        "dropout": 0.2,
        "final_dropout": True,
        "output_dim": 1024,
        "interleave_self_attention": True,
    },
}
# Values this implementation computes with; the first is what an absent key means to the reference.
_ASSUMED: dict[str, tuple[Any, ...]] = {
    "add_pos_embed": (True,),
    "backbone_model_type": ("qwen",),
    "reproject_vision": (False,),
    "strict_action_padding_mask": (False,),
    "use_tactile": (False,),
}
# Of a transformer's section an absent key means its class's default, which for some is not what is computed here.
_ASSUMED_OF_TRANSFORMERS: dict[str, tuple[Any, Any]] = {  # key: what an absent one means, what is computed
    "positional_embeddings": ("sinusoidal", None),
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "attention_bias": (True, True),
}
_ASSUMED_OF_DIT = {
    "norm_type": ("ada_norm", "ada_norm"),
    "norm_elementwise_affine": (False, False),
    "norm_eps": (1e-5, 1e-5),
    "interleave_self_attention": (False, True),
}
_ASSUMED_BACKBONE = {
    "text_config.hidden_act": ("silu",),
    "text_config.attention_bias": (False,),
    "vision_config.hidden_act": ("gelu_pytorch_tanh",),
    "vision_config.in_channels": (3,),
}
_TRANSFORMER_KEYS = {
    *("attention_head_dim", "cross_attention_dim", "dropout", "final_dropout", "num_attention_heads", "num_layers", "output_dim"),
    *("compute_dtype", "max_num_positional_embeddings", "upcast_attention", "num_embeds_ada_norm"),
    *_ASSUMED_OF_TRANSFORMERS,
    *_ASSUMED_OF_DIT,
}
# Keys without effect on inference: training, number formats, what transformers adds of itself. Picture and text settings are read from
# processor_config.json, which the reference's processor goes by.
_WITHOUT_EFFECT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "model_type", "model_name", "model_revision", "model_dtype"),
    *("_name_or_path", "name_or_path", "load_bf16", "use_flash_attention", "backbone_trainable_params_fp32", "attn_dropout", "attn_implementation"),
    *("tune_llm", "tune_visual", "tune_top_llm_layers", "tune_projector", "tune_diffusion_model", "tune_vlln", "state_dropout_prob"),
    *("noise_beta_alpha", "noise_beta_beta", "noise_s", "image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction"),
    *("random_rotation_angle", "color_jitter_params", "use_albumentations_transforms", "extra_augmentation_config", "formalize_language"),
    *("letter_box_transform", "apply_sincos_state_encoding", "use_percentiles", "use_relative_action", "exclude_state", "use_mean_std"),
    *("gradient_checkpointing", "collator_overwrite_image_inputs", "eagle_collator", "use_cache", "state_additive_noise_scale"),
    *("tactile_state_keys", "tactile_input_shape", "tactile_embed_dim"),
}

# Qwen3-VL-2B's sizes, which are Cosmos-Reason2-2B's.
PUBLISHED_BACKBONE: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "vocab_size": 151936,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "depth": 24,
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}


def read_config(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> ModelConfig:
    """From the checkpoint's `config.json` and its `backbone_config.json` (PUBLISHED_BACKBONE where there is none). Raises CheckpointError."""
    _refuse_unknown(config, {*DEFAULTS, *_ASSUMED, *_WITHOUT_EFFECT}, CONFIG_FILE)
    values = {**DEFAULTS, **config}
    for name, assumed in (("diffusion_model_cfg", _ASSUMED_OF_TRANSFORMERS | _ASSUMED_OF_DIT), ("vl_self_attention_cfg", _ASSUMED_OF_TRANSFORMERS)):
        if isinstance(values[name], Mapping):
            where = f"{CONFIG_FILE} {name}"
            _refuse_unknown(values[name], _TRANSFORMER_KEYS, where)
            for key, (absent, computed) in assumed.items():
                _refuse_other(values[name].get(key, absent), (computed,), f"{where}: {key}")
    for path, allowed in _ASSUMED.items():
        _refuse_other(look_up(config, path, allowed[0]), allowed, f"{CONFIG_FILE}: {path}")
    for path, allowed in _ASSUMED_BACKBONE.items():
        _refuse_other(look_up(backbone, path, allowed[0]), allowed, f"{BACKBONE_FILE}: {path}")
    built = ModelConfig(_vision(backbone), _language(backbone, values), _head(values))
    _check_widths(built, values, backbone)
    return built


def _refuse_unknown(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in section:
        if key not in known:
            raise CheckpointError(f"{where}: unknown key '{key}'.{closest(key, known)} It may change the computation, so it is refused.")


def _refuse_other(value: Any, allowed: tuple[Any, ...], what: str) -> None:
    if value not in allowed:
        raise CheckpointError(f"{what} is {shown(value)}; this implementation computes with {allowed[0]!r} only.")


def _section(source: Mapping[str, Any], name: str, file: str) -> Mapping[str, Any]:
    if not isinstance(source.get(name), Mapping):
        raise CheckpointError(f"{file} has no '{name}' section. Expected what NVIDIA's N1.7 training and Qwen3-VL write.")
    return source[name]


def _vision(backbone: Mapping[str, Any]) -> QwenVisionConfig:
    section, where = _section(backbone, "vision_config", BACKBONE_FILE), f"{BACKBONE_FILE} vision_config"
    depth, positions = need(section, "depth", where), need(section, "num_position_embeddings", where)
    deepstack: Any = section.get("deepstack_visual_indexes")
    is_list = isinstance(deepstack, list) and all(type(index) is int and 0 <= index < depth for index in deepstack)
    if not is_list or sorted(set(deepstack)) != deepstack:
        raise CheckpointError(f"{where}: 'deepstack_visual_indexes' must be blocks from 0 to {depth - 1} in order, got {shown(deepstack)}.")
    if round(positions**0.5) ** 2 != positions:
        raise CheckpointError(f"{where}: 'num_position_embeddings' must be the square of a whole number, got {positions}.")
    return QwenVisionConfig(
        hidden_size=need(section, "hidden_size", where),
        intermediate_size=need(section, "intermediate_size", where),
        num_layers=depth,
        num_heads=need(section, "num_heads", where),
        patch_size=need(section, "patch_size", where),
        frames_per_patch=need(section, "temporal_patch_size", where),
        merge_size=need(section, "spatial_merge_size", where),
        grid=round(positions**0.5),
        deepstack=tuple(deepstack),
    )


def _language(backbone: Mapping[str, Any], values: Mapping[str, Any]) -> LanguageConfig:
    section, where = _section(backbone, "text_config", BACKBONE_FILE), f"{BACKBONE_FILE} text_config"
    available, select_layer = need(section, "num_hidden_layers", where), need(values, "select_layer", CONFIG_FILE)
    if select_layer > available:
        raise CheckpointError(f"{CONFIG_FILE}: select_layer must be between 1 and {available}, got {select_layer}.")
    head_dim, rope = need(section, "head_dim", where), section.get("rope_scaling", section.get("rope_parameters"))
    sections: Any = rope.get("mrope_section") if isinstance(rope, Mapping) else None
    is_sections = isinstance(sections, list) and len(sections) == 3 and all(type(count) is int and count > 0 for count in sections)
    if not is_sections or 2 * sum(sections) != head_dim or rope.get("mrope_interleaved") is not True:
        raise CheckpointError(
            f"{where}: rope_scaling must hold mrope_interleaved true and an mrope_section of three numbers that add up to half of head_dim "
            f"({head_dim // 2}), got {shown(rope)}."
        )
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where}: rope_scaling.rope_type is {shown(rope['rope_type'])}; this implementation computes with 'default' only.")
    return LanguageConfig(
        hidden_size=need(section, "hidden_size", where),
        intermediate_size=need(section, "intermediate_size", where),
        num_layers=select_layer,
        num_heads=need(section, "num_attention_heads", where),
        num_kv_heads=need(section, "num_key_value_heads", where),
        head_dim=head_dim,
        rms_norm_eps=positive(section, "rms_norm_eps", 1e-6, where),
        rope_theta=positive({**rope, **section}, "rope_theta", 5e6, where),
        vocab_size=need(section, "vocab_size", where),
        image_token_id=need(backbone, "image_token_id", BACKBONE_FILE),
        final_norm=False,
        mrope_sections=tuple(sections),
    )


def _head(values: Mapping[str, Any]) -> ActionHeadConfig:
    where, name = CONFIG_FILE, "vl_self_attention_cfg"
    vl = {} if values[name] is None else _section(values, name, where)
    alternates = switch(values, "use_alternate_vl_dit", True, where)
    return ActionHeadConfig(
        action_dim=need(values, "max_action_dim", where),
        state_dim=need(values, "max_state_dim", where) * need(values, "state_history_length", where),
        action_horizon=need(values, "action_horizon", where),
        hidden_size=need(values, "hidden_size", where),
        future_tokens=0,
        max_positions=need(values, "max_seq_len", where),
        embodiments=need(values, "max_num_embodiments", where),
        denoising_steps=need(values, "num_inference_timesteps", where),
        timestep_buckets=need(values, "num_timestep_buckets", where),
        output_dim=need(_section(values, "diffusion_model_cfg", where), "output_dim", f"{where} diffusion_model_cfg"),
        use_vlln=switch(values, "use_vlln", True, where),
        dit=_transformer(values, "diffusion_model_cfg"),
        # as the reference reads it: none, or one without layers, is no self-attention
        vl_attention=_transformer(values, name) if vl.get("num_layers", 0) != 0 else TransformerConfig(0, 1, 1),
        attend_text_every=need(values, "attend_text_every_n_blocks", where) if alternates else None,
    )


def _transformer(values: Mapping[str, Any], name: str) -> TransformerConfig:
    section, where = _section(values, name, CONFIG_FILE), f"{CONFIG_FILE} {name}"
    return TransformerConfig(*(need(section, key, where) for key in ("num_layers", "num_attention_heads", "attention_head_dim")))


def _check_widths(config: ModelConfig, values: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
    language, vision, head = config.language, config.vision, config.head
    width = language.hidden_size
    pairs = {
        f"{CONFIG_FILE}: backbone_embedding_dim": (values["backbone_embedding_dim"], width),
        f"{BACKBONE_FILE}: vision_config.out_hidden_size": (backbone["vision_config"].get("out_hidden_size"), width),
        f"{CONFIG_FILE}: vl_self_attention_cfg heads x head_dim": (head.vl_attention.width if head.vl_attention.num_layers else width, width),
        f"{CONFIG_FILE}: input_embedding_dim": (values["input_embedding_dim"], head.dit.width),
        f"{CONFIG_FILE}: diffusion_model_cfg.output_dim": (head.output_dim, head.hidden_size),
        f"{CONFIG_FILE}: diffusion_model_cfg.cross_attention_dim": (values["diffusion_model_cfg"].get("cross_attention_dim", width), width),
    }
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise CheckpointError(f"{name} is {shown(got)}, expected {expected} from the rest of the configuration.")
    conditions = {
        "vision_config.hidden_size is a multiple of 4 num_heads": vision.hidden_size % (4 * vision.num_heads) == 0,
        "text_config.num_attention_heads is a multiple of num_key_value_heads": language.num_heads % language.num_kv_heads == 0,
        "input_embedding_dim is even": head.dit.width % 2 == 0,
        "max_seq_len is at least action_horizon": head.max_positions >= head.action_horizon,
        "num_timestep_buckets is at least num_inference_timesteps": head.timestep_buckets >= head.denoising_steps,
        "image_token_id is below text_config.vocab_size": language.image_token_id < language.vocab_size,
    }
    for condition, holds in conditions.items():
        if not holds:
            raise CheckpointError(f"{CONFIG_FILE} and {BACKBONE_FILE}: expected that {condition}, which is not so.")
