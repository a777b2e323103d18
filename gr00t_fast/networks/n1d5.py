"""Sizes of the network, read from a checkpoint's own files and checked once.

The published checkpoint says nothing about the backbone's sizes: they are in Eagle's configuration, a separate file. Fields that would change the
computation in a way this implementation does not cover are refused here, by name, instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gr00t_fast.errors import CheckpointError, closest, shown
from gr00t_fast.model.config import ActionHeadConfig, LanguageConfig, ModelConfig, TransformerConfig, VisionConfig


def read_config(config: Mapping[str, Any], eagle: Mapping[str, Any]) -> ModelConfig:
    """Build from the checkpoint's `config.json` and Eagle's `config.json`. Raises CheckpointError."""
    if config.get("model_type") != "gr00t_n1_5":
        raise CheckpointError(
            f"config.json says model_type '{config.get('model_type')}', expected 'gr00t_n1_5' or 'Gr00tN1d7'. "
            "This library runs GR00T N1.5 and N1.7; N1.6 and others have another network."
        )
    head, backbone = _section(config, "action_head_cfg"), _section(config, "backbone_cfg")
    _refuse_unknown(head, _HEAD_KEYS, "action_head_cfg")
    _refuse_unknown(backbone, _BACKBONE_KEYS, "backbone_cfg")
    built = ModelConfig(_vision(eagle), _language(eagle, backbone), _head(config, head))
    _refuse_other_computation(config, eagle)
    _check_widths(built, config)
    return built


# What an absent key means (the default of the reference's class), and the value that this implementation computes with; any other would need other
# code. Paths are dotted keys in config.json ...
_ASSUMED: dict[str, tuple[Any, Any]] = {
    "action_head_cfg.add_pos_embed": (True, True),
    "action_head_cfg.diffusion_model_cfg.norm_type": ("ada_norm", "ada_norm"),
    "action_head_cfg.diffusion_model_cfg.interleave_self_attention": (False, True),
    "action_head_cfg.diffusion_model_cfg.positional_embeddings": ("sinusoidal", None),
    "action_head_cfg.diffusion_model_cfg.activation_fn": ("gelu-approximate", "gelu-approximate"),
    "action_head_cfg.diffusion_model_cfg.attention_bias": (True, True),
    "action_head_cfg.diffusion_model_cfg.norm_elementwise_affine": (False, False),
    "action_head_cfg.diffusion_model_cfg.norm_eps": (1e-5, 1e-5),
    "action_head_cfg.vl_self_attention_cfg.positional_embeddings": ("sinusoidal", None),
    "action_head_cfg.vl_self_attention_cfg.activation_fn": ("gelu-approximate", "gelu-approximate"),
    "action_head_cfg.vl_self_attention_cfg.attention_bias": (True, True),
    "backbone_cfg.project_to_dim": (1536, None),
    "backbone_cfg.reproject_vision": (False, False),
}
# ... and in Eagle's config.json.
_ASSUMED_EAGLE: dict[str, tuple[Any, Any]] = {
    "use_pixel_shuffle": (True, False),
    "mlp_connector_layers": (2, 1),
    "select_layer": (-4, -1),
    "text_config.model_type": ("qwen3", "qwen3"),
    "text_config.hidden_act": ("silu", "silu"),
    "text_config.attention_bias": (False, False),
    "text_config.rope_scaling": (None, None),
    "text_config.use_sliding_window": (False, False),
    "vision_config.hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
    "vision_config.num_channels": (3, 3),
}
_TRANSFORMER_KEYS = {
    *("attention_head_dim", "cross_attention_dim", "dropout", "final_dropout", "interleave_self_attention", "norm_type", "norm_eps"),
    *("num_attention_heads", "num_layers", "output_dim", "positional_embeddings", "activation_fn", "attention_bias", "compute_dtype"),
    *("norm_elementwise_affine", "max_num_positional_embeddings", "upcast_attention", "num_embeds_ada_norm"),
}
_HEAD_KEYS = {
    *("action_dim", "action_horizon", "add_pos_embed", "backbone_embedding_dim", "diffusion_model_cfg", "hidden_size", "input_embedding_dim"),
    *("max_action_dim", "max_state_dim", "model_dtype", "noise_beta_alpha", "noise_beta_beta", "noise_s", "num_inference_timesteps"),
    *("num_target_vision_tokens", "num_timestep_buckets", "tune_diffusion_model", "tune_projector", "use_vlln", "vl_self_attention_cfg"),
    *("max_seq_len", "max_num_embodiments", "expand_batch", "load_pretrained_det_decode_layer_path", "detection_coeff", "freeze_decode_layer"),
}
_BACKBONE_KEYS = {
    *("eagle_path", "load_bf16", "project_to_dim", "reproject_vision", "select_layer", "tune_llm", "tune_visual", "use_flash_attention"),
}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(config.get(name), Mapping):
        raise CheckpointError(f"config.json has no '{name}' section. Expected the config.json that NVIDIA's N1.5 training writes.")
    return config[name]


def _refuse_unknown(section: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    for key in section:
        if key not in known:
            raise CheckpointError(
                f"config.json: unknown key '{key}' in {name}.{closest(key, known)} It may change the computation, so it is refused."
            )
    for part in ("diffusion_model_cfg", "vl_self_attention_cfg"):
        if isinstance(section.get(part), Mapping):  # one that is absent or no section is reported where it is read
            _refuse_unknown(section[part], _TRANSFORMER_KEYS, f"{name}.{part}")


def _refuse_other_computation(config: Mapping[str, Any], eagle: Mapping[str, Any]) -> None:
    for source, assumed, file in ((config, _ASSUMED, "config.json"), (eagle, _ASSUMED_EAGLE, "eagle2_hg_model/config.json")):
        for path, (absent, computed) in assumed.items():
            value = look_up(source, path, default=...)
            if (absent if value is ... else value) != computed:
                found = f"not given, which means {absent!r} to the reference" if value is ... else shown(value)
                raise CheckpointError(f"{file}: {path} is {found}; this implementation computes with {computed!r} only.")


def look_up(source: Mapping[str, Any], path: str, default: Any) -> Any:
    node: Any = source
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def need(section: Mapping[str, Any], key: str, where: str) -> int:
    value = section.get(key)
    most = _MOST.get(key, _MOST_OTHERWISE)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise CheckpointError(f"{where}: '{key}' must be a whole number from 1 to {most}, got {shown(value)}. The file is incomplete or damaged.")
    return value


# Ten times the published sizes or more. What is larger is damage, and building such a network would take hours or all memory before the weights
# showed it.
_MOST_OTHERWISE = 2**18  # widths, vocabulary
_MOST = {"num_hidden_layers": 256, "num_layers": 256, "image_size": 2048, "patch_size": 2048, "action_horizon": 4096, "max_num_embodiments": 4096}
_MOST |= {"num_target_vision_tokens": 4096, "num_timestep_buckets": 10_000, "action_dim": 4096, "max_state_dim": 4096, "max_seq_len": 2**16}
_MOST |= {"num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 4096, "attention_head_dim": 4096}
_MOST |= {"num_heads": 1024, "depth": 256, "select_layer": 256, "temporal_patch_size": 16, "spatial_merge_size": 16, "state_history_length": 64}
_MOST_VISION_TOKENS = 4096


def positive(section: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """`default`: of the reference's class, which files that leave the key out mean."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise CheckpointError(f"{where}: '{key}' must be a positive number, got {shown(value)}. The file is incomplete or damaged.")
    return float(value)


def switch(section: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = section.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: '{key}' must be true or false, got {shown(value)}. The file is incomplete or damaged.")
    return value


def _eagle_section(eagle: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(eagle.get(name), Mapping):
        raise CheckpointError(f"eagle2_hg_model/config.json has no '{name}' section. Expected Eagle's config.json.")
    return eagle[name]


def _vision(eagle: Mapping[str, Any]) -> VisionConfig:
    section, where = _eagle_section(eagle, "vision_config"), "eagle2_hg_model/config.json vision_config"
    return VisionConfig(
        hidden_size=need(section, "hidden_size", where),
        intermediate_size=need(section, "intermediate_size", where),
        num_layers=need(section, "num_hidden_layers", where),
        num_heads=need(section, "num_attention_heads", where),
        patch_size=need(section, "patch_size", where),
        image_size=need(section, "image_size", where),
        layer_norm_eps=positive(section, "layer_norm_eps", 1e-6, where),
    )


def _language(eagle: Mapping[str, Any], backbone: Mapping[str, Any]) -> LanguageConfig:
    section, where = _eagle_section(eagle, "text_config"), "eagle2_hg_model/config.json text_config"
    select_layer = backbone.get("select_layer")
    available = need(section, "num_hidden_layers", where)
    if isinstance(select_layer, bool) or not isinstance(select_layer, int) or not 0 < select_layer <= available:
        raise CheckpointError(f"config.json: backbone_cfg.select_layer must be between 1 and {available}, got {select_layer!r}.")
    return LanguageConfig(
        hidden_size=need(section, "hidden_size", where),
        intermediate_size=need(section, "intermediate_size", where),
        num_layers=select_layer,
        num_heads=need(section, "num_attention_heads", where),
        num_kv_heads=need(section, "num_key_value_heads", where),
        head_dim=need(section, "head_dim", where),
        rms_norm_eps=positive(section, "rms_norm_eps", 1e-6, where),
        rope_theta=positive(section, "rope_theta", 1e4, where),
        vocab_size=need(section, "vocab_size", where),
        image_token_id=need(eagle, "image_token_index", "eagle2_hg_model/config.json"),
    )


def _head(config: Mapping[str, Any], head: Mapping[str, Any]) -> ActionHeadConfig:
    where = "config.json action_head_cfg"
    use_vlln, vl_attention = switch(head, "use_vlln", True, where), _transformer(head, "vl_self_attention_cfg")
    return ActionHeadConfig(
        action_dim=need(head, "action_dim", where),
        state_dim=need(head, "max_state_dim", where),
        action_horizon=need(head, "action_horizon", where),
        hidden_size=need(head, "hidden_size", where),
        future_tokens=need(head, "num_target_vision_tokens", where),
        max_positions=need({"max_seq_len": 1024, **head}, "max_seq_len", where),  # the reference's default; published files leave it out
        embodiments=need({"max_num_embodiments": 32, **head}, "max_num_embodiments", where),  # likewise
        denoising_steps=need(head, "num_inference_timesteps", where),
        timestep_buckets=need(head, "num_timestep_buckets", where),
        output_dim=need(_section(head, "diffusion_model_cfg"), "output_dim", f"{where}.diffusion_model_cfg"),
        use_vlln=use_vlln,
        dit=_transformer(head, "diffusion_model_cfg"),
        vl_attention=vl_attention if use_vlln else replace(vl_attention, num_layers=0),  # the reference's switch turns off both
    )


def _transformer(head: Mapping[str, Any], name: str) -> TransformerConfig:
    section, where = _section(head, name), f"config.json action_head_cfg.{name}"
    return TransformerConfig(*(need(section, key, where) for key in ("num_layers", "num_attention_heads", "attention_head_dim")))


def _check_widths(config: ModelConfig, raw: Mapping[str, Any]) -> None:
    """The parts must fit together; a mismatch here would otherwise show as a puzzling shape error in the middle of the network."""
    width = config.language.hidden_size
    head = raw["action_head_cfg"]
    dit_cfg = head["diffusion_model_cfg"]
    pairs = {
        "action_head_cfg.backbone_embedding_dim": (head.get("backbone_embedding_dim", width), width),
        "diffusion_model_cfg.cross_attention_dim": (dit_cfg.get("cross_attention_dim", width), width),
        "vl_self_attention_cfg heads x head_dim": (config.head.vl_attention.width, width),
        "action_head_cfg.input_embedding_dim": (head.get("input_embedding_dim", config.head.dit.width), config.head.dit.width),
        "diffusion_model_cfg.output_dim": (config.head.output_dim, config.head.hidden_size),
        "action_head_cfg.max_action_dim": (head.get("max_action_dim", config.head.action_dim), config.head.action_dim),
        "action_dim": (raw.get("action_dim", config.head.action_dim), config.head.action_dim),
        "action_horizon": (raw.get("action_horizon", config.head.action_horizon), config.head.action_horizon),
    }
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise CheckpointError(f"config.json: {name} is {shown(got)}, expected {expected} from the rest of the configuration.")
    language, vision = config.language, config.vision
    conditions = {
        "vision_config.hidden_size is a multiple of num_attention_heads": vision.hidden_size % vision.num_heads == 0,
        "text_config.num_attention_heads is a multiple of num_key_value_heads": language.num_heads % language.num_kv_heads == 0,
        f"vision_config.image_size is at least patch_size and gives at most {_MOST_VISION_TOKENS} patches": 0 < vision.tokens <= _MOST_VISION_TOKENS,
        "text_config.head_dim is even": language.head_dim % 2 == 0,
        "action_head_cfg.input_embedding_dim is even": config.head.dit.width % 2 == 0,
        "action_head_cfg.max_seq_len is at least action_horizon": config.head.max_positions >= config.head.action_horizon,
        "action_head_cfg.num_timestep_buckets is at least num_inference_timesteps": config.head.timestep_buckets >= config.head.denoising_steps,
        "image_token_index is below text_config.vocab_size": language.image_token_id < language.vocab_size,
    }
    for condition, holds in conditions.items():
        if not holds:
            raise CheckpointError(f"config.json and eagle2_hg_model/config.json: expected that {condition}, which is not so.")


# Sizes of the published backbone (Eagle 2.5: SigLIP-2 so400m/14 at 224 and Qwen3-1.7B), for checkpoints that do not carry Eagle's config.json.
PUBLISHED_EAGLE: dict[str, Any] = {
    "image_token_index": 151669,
    "mlp_connector_layers": 1,
    "select_layer": -1,
    "use_pixel_shuffle": False,
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151680,
    },
}
