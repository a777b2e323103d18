"""GR00T N1.7: Qwen3-VL's vision and language model, and an action head whose blocks see the text or the pictures.

config.json                    sizes. The reference fills keys that are absent with its class's defaults, and several of those are not the
                               published network's: a file without `select_layer` means 12 layers, not 16. The same defaults are filled in here.
backbone_config.json           sizes of another backbone than Qwen3-VL-2B (Cosmos-Reason2-2B), a Qwen3VLConfig
processor_config.json, statistics.json, embodiment_id.json
                               what observations and actions look like, of all embodiments that the checkpoint ever saw; beside config.json, or in
                               `processor/` if there are none
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.contracts import MAX_FRAME_PX, MIN_FRAME_PX, Letterbox
from gr00t_fast.base.errors import CheckpointError, ConfigError, closest, shown
from gr00t_fast.base.files import parse_json, read_text
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import STATISTICS, Arithmetic, Embodiment, ImageSettings, Part, Statistics, check_std, part_statistics
from gr00t_fast.inputs.images import BY_QWEN, FitImages
from gr00t_fast.inputs.processor import PolicyInputs, left_padded
from gr00t_fast.inputs.prompt import PromptForm
from gr00t_fast.model.config import ActionHeadConfig, LanguageConfig, ModelConfig, QwenVisionConfig, TransformerConfig
from gr00t_fast.model.vision import patches_of
from gr00t_fast.networks.spec import (
    HEAD,
    PUBLISHED_SELF_ATTENTION,
    Layout,
    NetworkSpec,
    Section,
    Sources,
    check_head,
    damaged,
    expect,
    linear,
    qwen3,
    read_object,
    read_qwen3,
    read_transformer,
    rows,
)

MODEL_TYPE = "Gr00tN1d7"
CONFIG_FILE, BACKBONE_FILE = "config.json", "backbone_config.json"
PROCESSOR_FILE, STATISTICS_FILE, EMBODIMENT_FILE = "processor_config.json", "statistics.json", "embodiment_id.json"
PROCESSOR_FILES = (PROCESSOR_FILE, STATISTICS_FILE, EMBODIMENT_FILE)
SUBDIRECTORY = "processor"
# What a fine-tune leaves besides; only these tell how it was trained.
TRAINING_FILES = tuple(f"experiment_cfg/{file}" for file in ("final_processor_config.json", "final_model_config.json", "config.yaml"))

# Sizes

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
# config.json of the published network.
PUBLISHED_CONFIG: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": ["Gr00tN1d7"],
    "model_name": "nvidia/Cosmos-Reason2-2B",
    **{key: value for key, value in DEFAULTS.items() if not isinstance(value, dict | None)},
    "select_layer": 16,
    "diffusion_model_cfg": {**DEFAULTS["diffusion_model_cfg"], "num_layers": 32},
    "vl_self_attention_cfg": PUBLISHED_SELF_ATTENTION,
}
# What an absent key means to the reference, and the value that this implementation computes with.
_COMPUTED: dict[str, tuple[Any, Any]] = {
    "add_pos_embed": (True, True),
    "backbone_model_type": ("qwen", "qwen"),
    "reproject_vision": (False, False),
    "strict_action_padding_mask": (False, False),
    "use_tactile": (False, False),
}
# Keys without effect on inference: training, number formats, what transformers adds of itself. Picture and text settings are read from
# processor_config.json, which the reference's processor goes by.
WITHOUT_EFFECT = {
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


_HEAD_SIZES = {
    "action_dim": "max_action_dim",
    "action_horizon": "action_horizon",
    "hidden_size": "hidden_size",
    "max_positions": "max_seq_len",
    "embodiments": "max_num_embodiments",
    "denoising_steps": "num_inference_timesteps",
    "timestep_buckets": "num_timestep_buckets",
}
_VISION_SIZES = {
    **{name: name for name in ("hidden_size", "intermediate_size", "num_heads", "patch_size")},
    "num_layers": "depth",
    "frames_per_patch": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def read_config(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> ModelConfig:
    """From the checkpoint's `config.json` and its `backbone_config.json` (PUBLISHED_BACKBONE where there is none). Raises CheckpointError."""
    Section(config, CONFIG_FILE).warn_of_unknown({*DEFAULTS, *_COMPUTED, *WITHOUT_EFFECT})
    whole, qwen = Section({**DEFAULTS, **config}, CONFIG_FILE), Section(backbone, BACKBONE_FILE)
    whole.refuse_other(_COMPUTED)
    vision = _vision(qwen.section("vision_config"))
    language = _language(qwen.section("text_config"), whole.whole("select_layer"), qwen.whole("image_token_id"))
    built = ModelConfig(vision, language, read_head(whole, language.hidden_size))
    if (out := qwen.section("vision_config").values.get("out_hidden_size")) != language.hidden_size:
        raise CheckpointError(f"{BACKBONE_FILE} vision_config: out_hidden_size is {shown(out)}, expected {language.hidden_size} as in text_config.")
    check_head(built, CONFIG_FILE)
    return built


def _vision(section: Section) -> QwenVisionConfig:
    section.refuse_other({"hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"), "in_channels": (3, 3)})
    depth, positions = section.whole("depth"), section.whole("num_position_embeddings")
    deepstack: Any = section.values.get("deepstack_visual_indexes")
    is_list = isinstance(deepstack, list) and all(type(index) is int and 0 <= index < depth for index in deepstack)
    if not is_list or sorted(set(deepstack)) != deepstack:
        expected = f"blocks from 0 to {depth - 1} in order"
        raise CheckpointError(f"{section.where}: 'deepstack_visual_indexes' must be {expected}, got {shown(deepstack)}.")
    vision = QwenVisionConfig(**section.wholes(_VISION_SIZES), grid=round(positions**0.5), deepstack=tuple(deepstack))
    conditions = {
        "'num_position_embeddings' is the square of a whole number": vision.grid**2 == positions,
        "hidden_size is a multiple of 4 num_heads": vision.hidden_size % (4 * vision.num_heads) == 0,
    }
    expect(section.where, conditions)
    return vision


def _language(section: Section, num_layers: int, image_token_id: int) -> LanguageConfig:
    head_dim = section.whole("head_dim")
    rope = section.values.get("rope_scaling", section.values.get("rope_parameters"))
    sections: Any = rope.get("mrope_section") if isinstance(rope, Mapping) else None
    is_sections = isinstance(sections, list) and len(sections) == 3 and all(type(count) is int and count > 0 for count in sections)
    if not is_sections or 2 * sum(sections) != head_dim or rope.get("mrope_interleaved") is not True:
        raise CheckpointError(
            f"{section.where}: rope_scaling must hold mrope_interleaved true and an mrope_section of three numbers that add up to half of head_dim "
            f"({head_dim // 2}), got {shown(rope)}."
        )
    Section(rope, f"{section.where} rope_scaling").refuse_other({"rope_type": ("default", "default")})
    theta = Section({**rope, **section.values}, section.where).positive("rope_theta", 5e6)
    return read_qwen3(section, num_layers, image_token_id, theta, final_norm=False, mrope_sections=tuple(sections))


def read_head(whole: Section, width: int) -> ActionHeadConfig:
    """N1.6's and N1.7's. whole: config.json, with what absent keys mean; width: of the backbone's features."""
    dit_section, vl_section = whole.section("diffusion_model_cfg"), whole.values["vl_self_attention_cfg"]
    dit = read_transformer(dit_section, is_dit=True)
    # as the reference reads it: none, or one without layers, is no self-attention
    without_vl = vl_section is None or whole.section("vl_self_attention_cfg").values.get("num_layers", 0) == 0
    alternates = whole.switch("use_alternate_vl_dit", True)
    whole.refuse_different({"backbone_embedding_dim": width, "input_embedding_dim": dit.width})
    dit_section.refuse_different({"cross_attention_dim": width})
    return ActionHeadConfig(
        **whole.wholes(_HEAD_SIZES),
        state_dim=whole.whole("max_state_dim") * whole.whole("state_history_length"),
        future_tokens=0,
        output_dim=dit_section.whole("output_dim"),
        use_vlln=whole.switch("use_vlln", True),
        dit=dit,
        vl_attention=TransformerConfig(0, 1, 1) if without_vl else read_transformer(whole.section("vl_self_attention_cfg")),
        attend_text_every=whole.whole("attend_text_every_n_blocks") if alternates else None,
    )


# Names of the weights

_V = "backbone.model.model.visual."
_L = "backbone.model.model.language_model."
_BLOCK = f"{_V}blocks.{{i}}."
WEIGHTS = {
    "vision.patch_embedding.weight": Sources((f"{_V}patch_embed.proj.weight",), Layout.PATCHES),
    "vision.patch_embedding.bias": rows(f"{_V}patch_embed.proj.bias"),
    "vision.position_embedding.weight": rows(f"{_V}pos_embed.weight"),
    **linear("vision.blocks.{i}.norm1", f"{_BLOCK}norm1"),
    **linear("vision.blocks.{i}.attention.qkv", f"{_BLOCK}attn.qkv"),
    **linear("vision.blocks.{i}.attention.out", f"{_BLOCK}attn.proj"),
    **linear("vision.blocks.{i}.norm2", f"{_BLOCK}norm2"),
    **linear("vision.blocks.{i}.mlp.up", f"{_BLOCK}mlp.linear_fc1"),
    **linear("vision.blocks.{i}.mlp.down", f"{_BLOCK}mlp.linear_fc2"),
    **{
        name: sources
        for ours, theirs in (("vision.merger", "merger"), ("vision.deepstack_mergers.{i}", "deepstack_merger_list.{i}"))
        for part, published in (("norm", "norm"), ("up", "linear_fc1"), ("down", "linear_fc2"))
        for name, sources in linear(f"{ours}.{part}", f"{_V}{theirs}.{published}").items()
    },
    **qwen3(_L),
    **HEAD,
}
# The language head (tied to the embedding), and the final norm.
UNUSED = ("backbone.model.lm_head.", f"{_L}norm.")

# What the checkpoint was trained on

# Rows of the per-embodiment weights by tag (the reference's table); embodiment_id.json comes first.
EMBODIMENT_ROWS = {
    "simpler_env_google": 0,
    "simpler_env_widowx": 1,
    "libero_sim": 2,
    **dict.fromkeys(("new_embodiment", "robocasa_panda_omron", "robocasa_gr1_tabletop"), 10),
    "unitree_g1_sonic": 11,
    "oxe_droid_relative_eef_relative_joint": 24,
    **dict.fromkeys(("real_g1_relative_eef_relative_joints", "unitree_g1_full_body_with_waist_height_nav_cmd"), 25),
    **{f"real_r1_pro_sharpa_relative_eef{source}": 26 for source in ("", "_human", "_maxinsights", "_mecka")},
    **dict.fromkeys(("xdof_relative_eef_relative_joint", "xdof_relative_eef_relative_joint_subtask"), 27),
}
# What an absent key means to the reference's processor. Sizes that an absent key takes from config.json are None.
_SETTINGS: dict[str, Any] = {
    "image_crop_size": None,
    "image_target_size": None,
    "shortest_image_edge": 256,
    "crop_fraction": 0.95,
    "use_albumentations": False,
    "formalize_language": True,
    "max_state_dim": None,
    "max_action_dim": None,
    "max_action_horizon": None,
    "use_percentiles": False,
    "clip_outliers": True,
    "apply_sincos_state_encoding": False,
    "use_relative_action": False,
    "exclude_state": False,
    "letter_box_transform": False,
}
_SETTINGS_WITHOUT_EFFECT = {  # on inference
    *("random_rotation_angle", "color_jitter_params", "extra_augmentation_config", "model_name", "state_dropout_prob"),
    *("use_mean_std", "transformers_loading_kwargs", "statistics", "embodiment_id_mapping", "tactile_state_keys", "tactile_input_shape"),
    *("tactile_embed_dim", "modality_configs"),
}
# Also in config.json, where they have no effect; different values there mean that the files are not of one checkpoint.
_SAID_TWICE = ("use_percentiles", "use_relative_action", "apply_sincos_state_encoding", "exclude_state", "formalize_language")
_SETTINGS_COMPUTED = {"model_type": ("qwen", "qwen"), "use_tactile": (False, False)}
_MODALITY_KEYS = {"delta_indices", "modality_keys", "sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"}
_MOST_HISTORY = 1000  # steps back; a chosen limit
# The reference forms differences in float64 and rounds them to float32; it restores actions in float64.
ARITHMETIC = Arithmetic(forward=np.float32, inverse=np.float64, close=True, clip_actions=True, keep_constant=True)
LETTERBOX_WORDS = ("auto", "always", "never")


@dataclass(frozen=True)
class ProcessorForm:
    """What differs between N1.6's and N1.7's processor files.

    processor_class: as processor_config.json names it. rows: the reference's table of tags and rows. settings: what an absent key means; None: as in
    config.json. without_effect: keys that do not change an inference. computed: as of `Section.refuse_other`. said_twice: keys that are in
    config.json too. sizes: settings that must be the network's. history: what decides how many times of the state the network takes.
    """

    processor_class: str
    rows: Mapping[str, int]
    settings: Mapping[str, Any]
    without_effect: AbstractSet[str]
    computed: Mapping[str, tuple[Any, Any]]
    said_twice: Collection[str]
    sizes: Collection[str] = ("max_state_dim", "max_action_dim", "max_action_horizon")
    history: str = "state_history_length in config.json"


FORM = ProcessorForm("Gr00tN1d7Processor", EMBODIMENT_ROWS, _SETTINGS, _SETTINGS_WITHOUT_EFFECT, _SETTINGS_COMPUTED, _SAID_TWICE)


@dataclass(frozen=True)
class ProcessorFiles:
    """The contents of the three files and of config.json, as they are; and what was decided on letterboxing. history: how many times of the state
    the network takes."""

    form: ProcessorForm
    processor: Mapping[str, Any]
    statistics: Mapping[str, Any]
    rows: Mapping[str, Any]
    network: Mapping[str, Any]
    config: ModelConfig
    letterbox: Letterbox
    history: int = 1

    @property
    def tags(self) -> Collection[str]:
        return self.statistics.keys()

    @property
    def _settings(self) -> Mapping[str, Any]:
        kwargs = self.processor.get("processor_kwargs")
        if not isinstance(kwargs, Mapping) or not isinstance(kwargs.get("modality_configs"), Mapping):
            raise damaged(PROCESSOR_FILE, "no processor_kwargs.modality_configs")
        if (named := self.processor.get("processor_class", self.form.processor_class)) != self.form.processor_class:
            raise CheckpointError(
                f"{PROCESSOR_FILE} is of {shown(named)}, expected {self.form.processor_class}, as config.json is of "
                f"{shown(self.network.get('model_type'))}. Take all files from one checkpoint."
            )
        return kwargs

    def row_of(self, tag: str) -> int:
        modalities, embodiments = self._settings["modality_configs"], self.config.head.embodiments
        usable = [name for name in modalities if name in self.statistics and (name in self.rows or name in self.form.rows)]
        if tag not in usable:
            has = ", ".join(f"--embodiment_tag={name}" for name in usable) or "none"
            what = "this checkpoint has no statistics for" if tag in modalities else "unknown"
            raise ConfigError(f"{what} embodiment_tag '{tag}'.{closest(tag, usable)} This checkpoint has: {has}.")
        row = self.rows.get(tag, self.form.rows.get(tag))
        if type(row) is not int or not 0 <= row < embodiments:
            raise CheckpointError(
                f"{EMBODIMENT_FILE}: '{tag}' selects row {shown(row)} of the per-embodiment weights; by config.json there are {embodiments}."
            )
        return row

    def embodiment(self, tag: str, data_config: DataConfig | None) -> Embodiment:
        """data_config: refused where it contradicts the files."""
        settings = self._checked_settings()
        row = self.row_of(tag)
        try:
            found = self._read(tag, row, settings)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise damaged(f"{PROCESSOR_FILE} and {STATISTICS_FILE}", f"the entry '{tag}' is incomplete or damaged ({error!r})") from error
        if data_config is not None:
            check_data_config(data_config, found.data_config)
        return found

    def _checked_settings(self) -> dict[str, Any]:
        """With what absent keys mean. Raises CheckpointError for those that are not computed, or contradict config.json."""
        form, section, head = self.form, Section(self._settings, PROCESSOR_FILE), self.config.head
        section.warn_of_unknown({*form.settings, *form.without_effect, *form.computed})
        section.refuse_other(form.computed)
        for key, absent in form.settings.items():
            if isinstance(absent, bool):
                section.switch(key, absent)
        sizes = {"max_state_dim": self._state_width, "max_action_dim": head.action_dim, "max_action_horizon": head.action_horizon}
        settings = {**form.settings, **section.values}
        meant = {key: settings[key] for key in form.sizes if key in section.values or settings[key] is not None}
        Section(meant, PROCESSOR_FILE).refuse_different({key: sizes[key] for key in meant})
        for key in form.said_twice:
            if self.network.get(key, settings[key]) != settings[key]:
                raise CheckpointError(
                    f"{key} is {settings[key]} in {PROCESSOR_FILE} and {shown(self.network[key])} in config.json. NVIDIA's code goes by the former, "
                    "in training too: if that is how this checkpoint was trained, write the same into config.json."
                )
        return settings

    @property
    def _state_width(self) -> int:
        """Padded width of one time."""
        return self.config.head.state_dim // self.history

    def _read(self, tag: str, row: int, settings: Mapping[str, Any]) -> Embodiment:
        modalities, head = settings["modality_configs"][tag], self.config.head
        reader = Modalities(modalities, self.statistics[tag], settings)
        steps, state_offsets = reader.offsets("action"), reader.past("state")
        if list(steps) != list(range(len(steps))) or len(steps) > head.action_horizon:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: action delta_indices {shown(list(steps))} are not supported; expected 0, 1, 2 and so on, at most "
                f"{head.action_horizon} of them: one action for each tick."
            )
        if len(state_offsets) != self.history:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: state delta_indices {list(state_offsets)} are {len(state_offsets)} time steps; the network takes "
                f"{self.history} ({self.form.history})."
            )
        state, action = tuple(reader.state()), tuple(reader.action(len(steps)))
        for what, parts, width in (("state", state, self._state_width), ("action", action, head.action_dim)):
            if (total := sum(part.network_width for part in parts)) > width:
                raise CheckpointError(f"{PROCESSOR_FILE}: the {what} parts have {total} values together; the network takes {width}.")
        data_config = DataConfig(
            video_keys=tuple(f"video.{camera}" for camera in reader.keys("video")),
            state_keys=tuple(part.key for part in state),
            action_keys=tuple(part.key for part in action),
            language_key=reader.keys("language")[0],
            action_indices=steps,
            video_indices=reader.past("video"),
            state_indices=state_offsets,
        )
        told = {key: value for key, value in self._settings.items() if key not in (*self.form.without_effect, "letter_box_transform")}
        return Embodiment(
            tag=tag,
            row=row,
            data_config=data_config,
            cameras=dict.fromkeys(data_config.video_keys),  # the files say neither the rate nor the resolution of the recordings
            state=state,
            action=action,
            arithmetic=ARITHMETIC,
            trained_horizon=len(steps),
            state_width=self._state_width,
            record={"settings": told, "modalities": modalities, "statistics": self.statistics[tag], "row": row},
            images=image_settings(settings, self.letterbox.pads),
            letterbox=self.letterbox,
            formalize_language=settings["formalize_language"],
            exclude_state=settings["exclude_state"],
            action_configs=modalities["action"].get("action_configs"),
        )


def check_data_config(given: DataConfig, own: DataConfig, file: str = PROCESSOR_FILE) -> None:
    """Raises ConfigError when a data configuration that was given contradicts the checkpoint's own, which is in `file`."""
    lists = {"video": "video_keys", "state": "state_keys", "action": "action_keys"}
    wrong = [
        f"{modality} {', '.join(getattr(given, name))} (the checkpoint: {', '.join(getattr(own, name))})"
        for modality, name in lists.items()
        if set(getattr(given, name)) != set(getattr(own, name))
    ]
    if given.language_key != own.language_key:
        wrong.append(f"language {given.language_key} (the checkpoint: {own.language_key})")
    if wrong:
        raise ConfigError(f"the data config contradicts {file}: {'; '.join(wrong)}. Leave --data_config out.")


def told_letterbox(checkpoint: Path, asked: str) -> tuple[Letterbox | None, dict[str, str]]:
    """What was asked ("auto", "always" or "never"), else what the training's pipeline says, None where neither tells; and the texts of TRAINING_FILES
    that are there. Raises CheckpointError for a damaged file, ConfigError for another word."""
    if asked not in LETTERBOX_WORDS:
        raise ConfigError(f"unknown letterbox '{asked}'.{closest(asked, LETTERBOX_WORDS)} Expected one of: {', '.join(LETTERBOX_WORDS)}.")
    if asked != "auto":
        return Letterbox(asked == "always", f"--letterbox={asked}", True), {}

    found: dict[str, str] = {}
    for name in TRAINING_FILES:
        try:
            found[name] = read_text(checkpoint / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise damaged(name, f"cannot be read ({error})") from error
    processor = found.get(TRAINING_FILES[0])
    if processor is not None and "eval_image_transform" in processor:
        try:
            pipeline = str(parse_json(processor)["eval_image_transform"])  # as text; the padding step of either kind is called LetterBox...
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(TRAINING_FILES[0], f"cannot be read as JSON ({error!r})") from error
        if any(step in pipeline for step in ("LetterBox", "Resize", "SmallestMaxSize")):  # else it is no list of steps
            return Letterbox("LetterBox" in pipeline, f"it was trained so, by {TRAINING_FILES[0]}", True), found
    return None, found


def letterbox_of(checkpoint: Path, config: Mapping[str, Any], asked: str) -> Letterbox:
    """The flag in processor_config.json says how the checkpoint was trained from July 2026 on; before mid-June all were padded, also those that say
    false. Raises as `told_letterbox`."""
    told, found = told_letterbox(checkpoint, asked)
    if told is not None:
        return told
    _, model, settings = (found.get(name) for name in TRAINING_FILES)
    if model is not None and "letter_box_transform" not in model:
        return Letterbox(True, f"it was trained before the flag counted: {TRAINING_FILES[1]} does not have it", True)
    if settings is not None and re.search(r"^\s+video_backend:", settings, re.MULTILINE):
        return Letterbox(True, f"it was trained before the flag counted: {TRAINING_FILES[2]} has a video_backend", True)
    kwargs = config.get("processor_kwargs")
    pads = (kwargs if isinstance(kwargs, Mapping) else {}).get("letter_box_transform", False) is True
    return Letterbox(pads, f"letter_box_transform is {str(pads).lower()} in {PROCESSOR_FILE}", pads or model is not None or settings is not None)


class Modalities:
    """One embodiment's modality configuration and statistics, and the settings of all, as NVIDIA's files and lerobot's have them. Methods raise
    CheckpointError, and what Python raises where the files are not of the form."""

    def __init__(
        self,
        modalities: Mapping[str, Any],
        statistics: Mapping[str, Any],
        settings: Mapping[str, Any],
        needed: Iterable[str] = STATISTICS,
        files: tuple[str, str] = (PROCESSOR_FILE, STATISTICS_FILE),
    ) -> None:
        """needed: what each part must have of STATISTICS. files: where the modalities and the statistics are from."""
        self._modalities, self._settings, (self._file, self._numbers) = modalities, settings, files
        kinds = ("state", "action", "relative_action")
        self._statistics = {modality: _statistics_of(modality, statistics.get(modality, {}), needed) for modality in kinds}
        for modality, config in modalities.items():
            Section(config, f"{self._file} {modality}").warn_of_unknown(_MODALITY_KEYS)

    def keys(self, modality: str) -> tuple[str, ...]:
        keys = self._modalities[modality]["modality_keys"]
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys) or len(set(keys)) != len(keys):
            raise ValueError(f"{modality}.modality_keys {shown(keys)}")
        return tuple(keys)

    def offsets(self, modality: str) -> tuple[int, ...]:
        offsets = self._modalities[modality]["delta_indices"]
        if not isinstance(offsets, list) or not offsets or not all(type(offset) is int for offset in offsets):
            raise ValueError(f"{modality}.delta_indices {shown(offsets)}")
        return tuple(offsets)

    def past(self, modality: str) -> tuple[int, ...]:
        offsets = self.offsets(modality)
        if sorted(set(offsets)) != list(offsets) or offsets[-1] != 0 or offsets[0] < -_MOST_HISTORY:
            raise CheckpointError(
                f"{self._file}: {modality} delta_indices {list(offsets)} are not supported; expected steps back from -{_MOST_HISTORY} on, in "
                "order, the last one 0."
            )
        return offsets

    def _listed(self, modality: str, which: str) -> tuple[str, ...]:
        return tuple(self._modalities[modality].get(f"{which}_embedding_keys") or ())

    def state(self) -> Iterable[Part]:
        sin_cos = self._listed("state", "sin_cos") if self._settings["apply_sincos_state_encoding"] else ()
        mean_std = self._listed("state", "mean_std")
        for name in self.keys("state"):
            statistics, key = self._statistics["state"][name], f"state.{name}"
            mode = "sin_cos" if name in sin_cos else "mean_std" if name in mean_std else "min_max"
            clip = mode == "min_max" and self._settings["clip_outliers"]
            yield Part(key, mode, *self._range(statistics, mode, key), statistics, clip)

    def action(self, steps: int) -> Iterable[Part]:
        names, mean_std = self.keys("action"), self._listed("action", "mean_std")
        configs = self._modalities["action"].get("action_configs") or [{}] * len(names)
        if len(configs) != len(names):
            raise ValueError(f"{len(configs)} action_configs for {len(names)} parts")
        for name, config in zip(names, configs, strict=True):
            mode, rep = "mean_std" if name in mean_std else "min_max", config.get("rep", "ABSOLUTE")
            self._check_joints(name, config.get("type", "NON_EEF"))
            self._check_rep(name, rep)
            if rep == "RELATIVE" and self._settings["use_relative_action"]:
                yield self._relative(name, mode, config, steps)
            else:
                statistics, key = self._statistics["action"][name], f"action.{name}"
                yield Part(key, mode, *self._range(statistics, mode, key), statistics)

    def _check_rep(self, name: str, rep: Any) -> None:
        if rep not in ("RELATIVE", "ABSOLUTE", "DELTA"):
            raise ValueError(f"rep {shown(rep)} of action part '{name}'")
        if rep == "DELTA":
            raise CheckpointError(
                f"{self._file}: action part '{name}' has rep DELTA: its values are differences, which no arm may get as positions. Expected "
                "RELATIVE or ABSOLUTE."
            )
        if rep == "ABSOLUTE" and name in self._statistics["relative_action"]:
            raise CheckpointError(
                f"{self._file} says that action part '{name}' is absolute, but {self._numbers} has statistics of it in relative_action. "
                f"Take both files from one checkpoint. If it was trained with absolute values, delete relative_action.{name} there: training "
                "copies what an earlier one left beside the data set."
            )

    def _check_joints(self, name: str, kind: Any) -> None:
        if kind != "NON_EEF":
            raise CheckpointError(
                f"{self._file}: action part '{name}' has type {shown(kind)}, expected NON_EEF. Poses of the end effector (EEF) are not "
                "played here: an SO-100 takes joint positions. Train with joint positions, or play this checkpoint with NVIDIA's Isaac-GR00T."
            )

    def _relative(self, name: str, mode: str, config: Mapping[str, Any], steps: int) -> Part:
        """Its statistics are min and max (or mean and deviation) for each step, percentiles never."""
        if name not in self._statistics["relative_action"]:
            raise CheckpointError(f"{self._numbers}: action part '{name}' is relative, but relative_action has no statistics of it.")
        absolute, statistics = self._statistics["action"][name], self._statistics["relative_action"][name]
        width, reference = len(absolute["min"]), config.get("state_key") or name
        if statistics["min"].shape != (steps, width):
            raise CheckpointError(
                f"{self._numbers}: relative_action.{name} has shape {statistics['min'].shape}, expected {(steps, width)}: one row for each action."
            )
        if reference not in self.keys("state") or len(self._statistics["state"][reference]["min"]) != width:
            raise CheckpointError(
                f"{self._file}: relative action part '{name}' counts from state part '{reference}', which is none of {width} values."
            )
        low, high = self._range(statistics, mode, f"relative_action.{name}", percentiles=False)
        return Part(f"action.{name}", mode, low, high, absolute, reference=f"state.{reference}")

    def _range(self, statistics: Statistics, mode: str, where: str, percentiles: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """percentiles: None: as the settings say."""
        if mode == "mean_std":
            return statistics["mean"], check_std(where, statistics["std"])
        by_percentiles = self._settings["use_percentiles"] if percentiles is None else percentiles
        low, high = ("q01", "q99") if by_percentiles else ("min", "max")
        return statistics[low], statistics[high]


def image_settings(settings: Mapping[str, Any], letterbox: bool, squash: bool = False) -> ImageSettings:
    """squash: what lerobot makes of a setting without albumentations. Raises ValueError for sizes that make no picture."""

    def size(key: str) -> tuple[int, int] | None:
        if settings[key] is None:
            return None
        pair = tuple(settings[key])
        if len(pair) != 2 or not all(type(side) is int and MIN_FRAME_PX <= side <= MAX_FRAME_PX for side in pair):
            raise ValueError(f"{key} {shown(settings[key])}")
        return pair

    crop, target = size("image_crop_size"), size("image_target_size")
    edge, fraction = settings["shortest_image_edge"], settings["crop_fraction"]
    if settings["use_albumentations"] or squash:
        if target is not None:
            edge = target[0] if edge is None else edge
            fraction = crop[0] / target[0] if fraction is None and crop is not None else fraction
        if edge is None or fraction is None:
            raise ValueError("shortest_image_edge, or crop_fraction, and the sizes that stand for them are null")
        if type(edge) is not int or not MIN_FRAME_PX <= edge <= MAX_FRAME_PX or not 0 < float(fraction) <= 1:
            raise ValueError(f"shortest_image_edge {shown(edge)}, crop_fraction {shown(fraction)}")
        return ImageSettings(letterbox, settings["use_albumentations"], edge, float(fraction), crop, target, squash)
    if crop is None or target is None:
        raise ValueError("use_albumentations is false, and image_crop_size or image_target_size is null")
    return ImageSettings(letterbox, False, min(target), 1.0, crop, target)


def _statistics_of(modality: str, parts: Mapping[str, Any], needed: Iterable[str]) -> dict[str, Statistics]:
    """Part -> name -> float64 (D,), or (steps, D) of relative actions."""
    for part, values in parts.items():
        if absent := [name for name in needed if name not in values]:
            raise ValueError(f"{modality}.{part} without {', '.join(absent)}")
    return {part: part_statistics(f"{modality}.{part}", values, 2 if modality == "relative_action" else 1) for part, values in parts.items()}


def read_files(path: Path, config: Mapping[str, Any], sizes: ModelConfig, letterbox: str) -> ProcessorFiles:
    directory = next((each for each in (path, path / SUBDIRECTORY) if (each / PROCESSOR_FILE).exists()), path)  # the root wins
    rows = directory / EMBODIMENT_FILE  # without one the reference has its own table
    processor, statistics = read_object(directory / PROCESSOR_FILE), read_object(directory / STATISTICS_FILE, nan=True)
    decided, history = letterbox_of(path, processor, letterbox), config.get("state_history_length", 1)
    return ProcessorFiles(FORM, processor, statistics, read_object(rows) if rows.exists() else {}, config, sizes, decided, history)


# Pictures and prompts

IMAGE_TOKEN = "<|image_pad|>"
_PADDING_ID = 151643  # Qwen's <|endoftext|>


def render_prompt(instruction: str, images: int, tokens: int) -> str:
    """Qwen3-VL's chat template, without a system message and a generation prompt."""
    blocks = f"<|vision_start|>{IMAGE_TOKEN * tokens}<|vision_end|>" * images
    return f"<|im_start|>user\n{blocks}{instruction}<|im_end|>\n"


PROMPT = PromptForm(
    image_token=IMAGE_TOKEN,
    render=render_prompt,
    lists_texts=False,  # the reference's clients send a list of text that its policy unpacks
    folders=("", SUBDIRECTORY),
    hub="Qwen/Qwen3-VL-2B-Instruct",  # the reference takes them from nvidia/Cosmos-Reason2-2B, which is gated; the ids are the same
    whose="Qwen3-VL",
)


def reference_inputs(inputs: PolicyInputs, embodiment: Embodiment, config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """pixels fp32 (B, C, 3, h, w) -> input_ids (B, S) and attention_mask, pixel_values (patches of all pictures, 1536), image_grid_thw (B x C, 3),
    state (B, T, P), embodiment_id (B,)."""
    pictures, patch = pixels.flatten(0, 1), config.vision.patch_size
    grid = [1, pictures.shape[-2] // patch, pictures.shape[-1] // patch]
    ids, mask = left_padded(inputs, _PADDING_ID)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches_of(pictures, config.vision).flatten(0, 1),
        "image_grid_thw": torch.tensor([grid] * len(pictures)),
        "state": torch.from_numpy(inputs.state).unflatten(1, (len(embodiment.data_config.state_indices), -1)),
        "embodiment_id": torch.full((inputs.batch,), embodiment.row),
    }


N1D7 = NetworkSpec(
    name="n1.7",
    model_type=MODEL_TYPE,
    backbone_file=BACKBONE_FILE,
    published_backbone=PUBLISHED_BACKBONE,
    read_config=read_config,
    weights=WEIGHTS,
    unused_weights=UNUSED,
    read_files=read_files,
    images=lambda embodiment, config: FitImages(embodiment, config.vision.token_side, BY_QWEN),
    prompt=PROMPT,
    reference_inputs=reference_inputs,
    download=(BACKBONE_FILE, *PROCESSOR_FILES, *(f"{SUBDIRECTORY}/{file}" for file in PROCESSOR_FILES), *TRAINING_FILES),
    fixed_images=False,
    protocol="n1.7",
)
