"""GR00T N1.5: SigLIP-2, Qwen3-1.7B's first layers, and an action head; data configurations of the user's, and metadata.json.

config.json                         the action head's sizes
eagle2_hg_model/config.json         the backbone's, where a checkpoint carries them (Eagle 2.5)
experiment_cfg/metadata.json        statistics, camera resolutions and rates, for each embodiment
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.errors import CheckpointError, ConfigError, closest, shown
from gr00t_fast.inputs.data_config import DataConfig, check_trained_cameras, load_data_config
from gr00t_fast.inputs.embodiment import Arithmetic, Camera, Embodiment, Part, Statistics, check_std, part_statistics
from gr00t_fast.inputs.images import ResizeFrames
from gr00t_fast.inputs.processor import PolicyInputs, left_padded
from gr00t_fast.inputs.prompt import PromptForm
from gr00t_fast.model.config import ActionHeadConfig, ModelConfig, VisionConfig
from gr00t_fast.networks.spec import (
    HEAD,
    PUBLISHED_SELF_ATTENTION,
    NetworkSpec,
    Section,
    check_head,
    expect,
    linear,
    norm,
    qwen3,
    read_object,
    read_qwen3,
    read_transformer,
    rows,
)

# Sizes. Fields that would change the computation in a way this implementation does not cover are refused by name.

CONFIG_FILE, BACKBONE_FILE = "config.json", "eagle2_hg_model/config.json"
METADATA_FILE = "experiment_cfg/metadata.json"
_MOST_VISION_TOKENS = 4096
_HEAD_KEYS = {
    *("action_dim", "action_horizon", "add_pos_embed", "backbone_embedding_dim", "diffusion_model_cfg", "hidden_size", "input_embedding_dim"),
    *("max_action_dim", "max_state_dim", "model_dtype", "noise_beta_alpha", "noise_beta_beta", "noise_s", "num_inference_timesteps"),
    *("num_target_vision_tokens", "num_timestep_buckets", "tune_diffusion_model", "tune_projector", "use_vlln", "vl_self_attention_cfg"),
    *("max_seq_len", "max_num_embodiments", "expand_batch", "load_pretrained_det_decode_layer_path", "detection_coeff", "freeze_decode_layer"),
}
_BACKBONE_KEYS = {
    *("eagle_path", "load_bf16", "project_to_dim", "reproject_vision", "select_layer", "tune_llm", "tune_visual", "use_flash_attention"),
}
_HEAD_SIZES = {
    **{name: name for name in ("action_dim", "action_horizon", "hidden_size")},
    "state_dim": "max_state_dim",
    "future_tokens": "num_target_vision_tokens",
    "denoising_steps": "num_inference_timesteps",
    "timestep_buckets": "num_timestep_buckets",
}
VISION_SIZES = {
    **{name: name for name in ("hidden_size", "intermediate_size", "patch_size", "image_size")},
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
# The published backbone (SigLIP-2 so400m/14 at 224 and Qwen3-1.7B).
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


# config.json of the published network.
PUBLISHED_CONFIG: dict[str, Any] = {
    "model_type": "gr00t_n1_5",
    "architectures": ["GR00T_N1_5"],
    "action_dim": 32,
    "action_horizon": 16,
    "hidden_size": 2048,
    "compute_dtype": "bfloat16",
    "model_dtype": "float32",
    "torch_dtype": "bfloat16",
    "backbone_cfg": {
        "eagle_path": None,
        "load_bf16": False,
        "project_to_dim": None,
        "reproject_vision": False,
        "select_layer": 12,
        "tune_llm": False,
        "tune_visual": True,
        "use_flash_attention": True,
    },
    "action_head_cfg": {
        "action_dim": 32,
        "action_horizon": 16,
        "add_pos_embed": True,
        "backbone_embedding_dim": 2048,
        "diffusion_model_cfg": {
            "attention_head_dim": 48,
            "cross_attention_dim": 2048,
            "dropout": 0.2,
            "final_dropout": True,
            "interleave_self_attention": True,
            "norm_type": "ada_norm",
            "num_attention_heads": 32,
            "num_layers": 16,
            "output_dim": 1024,
            "positional_embeddings": None,
        },
        "hidden_size": 1024,
        "input_embedding_dim": 1536,
        "max_action_dim": 32,
        "max_state_dim": 64,
        "model_dtype": "float32",
        "noise_beta_alpha": 1.5,
        "noise_beta_beta": 1.0,
        "noise_s": 0.999,
        "num_inference_timesteps": 4,
        "num_target_vision_tokens": 32,
        "num_timestep_buckets": 1000,
        "tune_diffusion_model": True,
        "tune_projector": True,
        "use_vlln": True,
        "vl_self_attention_cfg": PUBLISHED_SELF_ATTENTION,
    },
}


def read_config(config: Mapping[str, Any], eagle: Mapping[str, Any]) -> ModelConfig:
    """From the checkpoint's `config.json` and Eagle's. Raises CheckpointError."""
    whole, backbone = Section(config, CONFIG_FILE), Section(eagle, BACKBONE_FILE)
    section = whole.section("backbone_cfg")
    section.warn_of_unknown(_BACKBONE_KEYS)
    section.refuse_other({"project_to_dim": (1536, None), "reproject_vision": (False, False)})
    backbone.refuse_other({"use_pixel_shuffle": (True, False), "mlp_connector_layers": (2, 1), "select_layer": (-4, -1)})
    text = backbone.section("text_config")
    text.refuse_other({"model_type": ("qwen3", "qwen3"), "rope_scaling": (None, None), "use_sliding_window": (False, False)})
    language = read_qwen3(text, section.whole("select_layer"), backbone.whole("image_token_index"), text.positive("rope_theta", 1e4))
    built = ModelConfig(_vision(backbone.section("vision_config")), language, _head(whole.section("action_head_cfg"), language.hidden_size))
    whole.refuse_different({"action_dim": built.head.action_dim, "action_horizon": built.head.action_horizon})
    check_head(built, f"{CONFIG_FILE} action_head_cfg")
    return built


def _vision(section: Section) -> VisionConfig:
    section.refuse_other({"hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"), "num_channels": (3, 3)})
    vision = VisionConfig(**section.wholes(VISION_SIZES), layer_norm_eps=section.positive("layer_norm_eps", 1e-6))
    conditions = {
        "hidden_size is a multiple of num_attention_heads": vision.hidden_size % vision.num_heads == 0,
        f"image_size is at least patch_size and gives at most {_MOST_VISION_TOKENS} patches": 0 < vision.tokens <= _MOST_VISION_TOKENS,
    }
    expect(section.where, conditions)
    return vision


def _head(section: Section, width: int) -> ActionHeadConfig:
    section.warn_of_unknown(_HEAD_KEYS)
    section.refuse_other({"add_pos_embed": (True, True)})
    dit_section, use_vlln = section.section("diffusion_model_cfg"), section.switch("use_vlln", True)
    dit, vl_attention = read_transformer(dit_section, is_dit=True), read_transformer(section.section("vl_self_attention_cfg"))
    dit_section.refuse_different({"cross_attention_dim": width})
    head = ActionHeadConfig(
        **section.wholes(_HEAD_SIZES),
        max_positions=section.whole("max_seq_len", 1024),
        embodiments=section.whole("max_num_embodiments", 32),
        output_dim=dit_section.whole("output_dim"),
        use_vlln=use_vlln,
        dit=dit,
        vl_attention=vl_attention if use_vlln else replace(vl_attention, num_layers=0),  # the reference's switch turns off both
    )
    section.refuse_different({"backbone_embedding_dim": width, "input_embedding_dim": dit.width, "max_action_dim": head.action_dim})
    return head


# Names of the weights

_V = "backbone.eagle_model.vision_model.vision_model."
_L = "backbone.eagle_model.language_model.model."
_SIGLIP = f"{_V}encoder.layers.{{i}}."
WEIGHTS = {
    **linear("vision.patch_embedding", f"{_V}embeddings.patch_embedding"),
    "vision.position_embedding.weight": rows(f"{_V}embeddings.position_embedding.weight"),
    **linear("vision.blocks.{i}.norm1", f"{_SIGLIP}layer_norm1"),
    **linear("vision.blocks.{i}.attention.qkv", *(f"{_SIGLIP}self_attn.{x}_proj" for x in "qkv")),
    **linear("vision.blocks.{i}.attention.out", f"{_SIGLIP}self_attn.out_proj"),
    **linear("vision.blocks.{i}.norm2", f"{_SIGLIP}layer_norm2"),
    **linear("vision.blocks.{i}.mlp.up", f"{_SIGLIP}mlp.fc1"),
    **linear("vision.blocks.{i}.mlp.down", f"{_SIGLIP}mlp.fc2"),
    **linear("vision.norm", f"{_V}post_layernorm"),
    **linear("vision.connector", "backbone.eagle_model.mlp1.0"),
    **qwen3(_L),
    **norm("language.norm", f"{_L}norm"),
    **HEAD,
}
# SigLIP's pooling head, and the language head (tied to the embedding).
UNUSED = (f"{_V}head.", "backbone.eagle_model.language_model.lm_head.")

# What the checkpoint was trained on

# Row of the per-embodiment weights that each tag selects (NVIDIA's EMBODIMENT_TAG_MAPPING).
EMBODIMENT_ROWS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}
# The reference normalises states in float64 and restores actions in float32.
ARITHMETIC = Arithmetic(forward=np.float64, inverse=np.float32, close=False, clip_actions=False, keep_constant=False)
_STATISTICS_OF = {"min_max": ("min", "max"), "q99": ("q01", "q99"), "mean_std": ("mean", "std")}  # low and high, or mean and deviation


@dataclass(frozen=True)
class MetadataFile:
    """metadata.json: what the training data looked like, for each embodiment. Which parts and cameras are read, a data configuration says."""

    raw: Mapping[str, Any]
    config: ModelConfig

    @property
    def tags(self) -> Collection[str]:
        return self.raw.keys()

    def row_of(self, tag: str) -> int:
        if tag not in EMBODIMENT_ROWS:
            raise self._unusable(tag, "unknown embodiment_tag")
        return EMBODIMENT_ROWS[tag]

    def _unusable(self, tag: str, what: str) -> ConfigError:
        usable = [name for name in self.raw if name in EMBODIMENT_ROWS]
        has = ", ".join(f"--embodiment_tag={name}" for name in usable) or f"none that is known, only {', '.join(self.raw) or 'nothing'}"
        return ConfigError(f"{what} '{tag}'.{closest(tag, usable)} This checkpoint has: {has}.")

    def embodiment(self, tag: str, data_config: DataConfig | None) -> Embodiment:
        row, head, config = self.row_of(tag), self.config.head, load_data_config(data_config)
        if tag not in self.raw:
            raise self._unusable(tag, "this checkpoint has no statistics for embodiment_tag")
        cameras, statistics, unsupported = self._entry(tag)
        check_trained_cameras(config, cameras)
        if unknown := [key for key in (*config.state_keys, *config.action_keys) if key not in statistics]:
            raise ConfigError(
                f"the data config reads {', '.join(unknown)}, but this checkpoint has statistics for {', '.join(sorted(statistics))} only. "
                "Choose the data_config it was trained with."
            )
        parts = {key: _part(key, config, statistics[key], unsupported[key]) for key in (*config.state_keys, *config.action_keys)}
        state, action = (tuple(parts[key] for key in keys) for keys in (config.state_keys, config.action_keys))
        for keys, found, width in ((config.state_keys, state, head.state_dim), (config.action_keys, action, head.action_dim)):
            if (total := sum(part.network_width for part in found)) > width:
                raise ConfigError(f"the data config's {', '.join(keys)} have {total} values together; the network takes {width}.")
        return Embodiment(tag, row, config, cameras, state, action, ARITHMETIC, head.action_horizon, head.state_dim, self.raw[tag])

    def _entry(self, tag: str) -> tuple[Mapping[str, Camera], Mapping[str, Statistics], Mapping[str, str]]:
        """Cameras and statistics by key, and what `modalities` says of parts that is not computed here. Raises CheckpointError."""
        try:
            entry = self.raw[tag]
            cameras = {f"video.{name}": _camera(values) for name, values in entry["modalities"]["video"].items()}
            parts = [(kind, part, values) for kind in ("state", "action") for part, values in entry["statistics"][kind].items()]
            statistics = {f"{kind}.{part}": part_statistics(f"{kind}.{part}", values) for kind, part, values in parts}
            told = {(kind, part): entry["modalities"].get(kind, {}).get(part, {}) for kind, part, _ in parts}
            unsupported = {
                f"{kind}.{part}": _unsupported(kind, said, len(statistics[f"{kind}.{part}"]["min"])) for (kind, part), said in told.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{METADATA_FILE}: the entry '{tag}' is incomplete or damaged ({error!r}).") from error
        return cameras, statistics, unsupported


def _unsupported(kind: str, told: Mapping[str, Any], width: int) -> str:
    if kind == "action" and told.get("absolute", True) is not True:
        return f"absolute is {shown(told['absolute'])}, expected true: an arm may not get differences as positions"
    if told.get("rotation_type") is not None:
        return f"rotation_type is {shown(told['rotation_type'])}: rotations are not computed here"
    if told.get("shape", [width]) != [width]:
        return f"shape is {shown(told['shape'])}, but its statistics have {width} values"
    return ""


def _camera(values: Mapping[str, Any]) -> Camera:
    width, height = values["resolution"]
    return Camera(width, height, float(values["fps"]))


def _part(key: str, config: DataConfig, statistics: Statistics, unsupported: str) -> Part:
    if unsupported:
        raise CheckpointError(f"{METADATA_FILE}: of {key}, {unsupported}.")
    mode = config.normalisation_of(key)
    names = _STATISTICS_OF.get(mode, ("min", "max"))  # the other modes compute without them, and take the width from them
    if absent := [name for name in names if name not in statistics]:
        raise ConfigError(f"{key}: normalisation '{mode}' needs the statistics {', '.join(absent)}, which metadata.json does not have.")
    low, high = (statistics[name] for name in names)
    return Part(key, mode, low, check_std(key, high), statistics, clip=mode == "q99")


def read_files(path: Path, config: Mapping[str, Any], sizes: ModelConfig, letterbox: str) -> MetadataFile:
    if letterbox != "auto":
        raise ConfigError(f"letterbox '{letterbox}' is for GR00T N1.6 and N1.7; {path} is a GR00T N1.5 checkpoint. Leave --letterbox out.")
    return MetadataFile(read_object(path / METADATA_FILE, nan=True), sizes)


# Pictures and prompts

IMAGE_TOKEN = "<IMG_CONTEXT>"


def images(embodiment: Embodiment, config: Any) -> ResizeFrames:
    trained = {key: camera for key in embodiment.data_config.video_keys if (camera := embodiment.cameras[key]) is not None}
    return ResizeFrames(trained, config.vision.tokens)


def render_prompt(instruction: str, images: int, tokens: int) -> str:
    """Eagle's chat template."""
    blocks = "".join(f"<image {k}><img>{IMAGE_TOKEN * tokens}</img>" for k in range(1, images + 1))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    return f"{system}{blocks}{instruction}<|im_end|>\n<|im_start|>assistant\n"


PROMPT = PromptForm(
    image_token=IMAGE_TOKEN,
    render=render_prompt,
    lists_texts=True,
    folders=("eagle2_hg_model", ""),
    hub="lerobot/eagle2hg-processor-groot-n1p5",
    whose="Eagle",
    installed="model/backbone/eagle2_hg_model",
)


def reference_inputs(inputs: PolicyInputs, embodiment: Embodiment, config: ModelConfig, pixels: Tensor) -> dict[str, Tensor]:
    """pixels fp32 (B, C, 3, h, w) -> state (B, 1, P) and state_mask, eagle_input_ids (B, S) and eagle_attention_mask, eagle_pixel_values
    (B x C, 3, h, w) and eagle_image_sizes (B x C, 2), embodiment_id (B,)."""
    pictures, states = pixels.flatten(0, 1), torch.from_numpy(inputs.state)[:, None]
    ids, mask = left_padded(inputs, padding_id=0)
    return {
        "state": states,
        "state_mask": (torch.arange(states.shape[-1]) < sum(part.network_width for part in embodiment.state)).expand_as(states),
        "eagle_input_ids": ids,
        "eagle_attention_mask": mask,
        "eagle_pixel_values": pictures,
        "eagle_image_sizes": torch.tensor(pictures.shape[-2:]).expand(len(pictures), 2),
        "embodiment_id": torch.full((inputs.batch,), embodiment.row),
    }


N1D5 = NetworkSpec(
    name="n1.5",
    model_type="gr00t_n1_5",
    backbone_file=BACKBONE_FILE,
    published_backbone=PUBLISHED_EAGLE,
    read_config=read_config,
    weights=WEIGHTS,
    unused_weights=UNUSED,
    read_files=read_files,
    images=images,
    prompt=PROMPT,
    reference_inputs=reference_inputs,
    download=(METADATA_FILE, "eagle2_hg_model/*"),
    fixed_images=True,
    protocol="n1.5",
)
