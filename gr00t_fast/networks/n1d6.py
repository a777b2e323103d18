"""GR00T N1.6: SigLIP-2 at any size, Qwen3-1.7B's first layers, and N1.7's action head without its self-attention.

config.json                    sizes, or only those that differ from the reference's class, whose defaults are filled in here: a file without
                               `max_state_dim` means 29 values, not the published 128
backbone_config.json           sizes of another backbone than the published one (Eagle-Block2A-2B-v2, which NVIDIA's code carries), in that one's form
processor_config.json, statistics.json, embodiment_id.json
                               as N1.7's

NVIDIA/Isaac-GR00T 4e62473 (December 2025), e29d8fc, ead5283 (April 2026), and its branch n1d6 (from June 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.base.contracts import Letterbox
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.inputs.images import BY_EAGLE, FitImages
from gr00t_fast.inputs.processor import PolicyInputs, left_padded
from gr00t_fast.inputs.prompt import PromptForm
from gr00t_fast.model.config import ModelConfig, Siglip2VisionConfig
from gr00t_fast.networks import n1d5, n1d7
from gr00t_fast.networks.n1d5 import IMAGE_TOKEN
from gr00t_fast.networks.n1d7 import BACKBONE_FILE, CONFIG_FILE, PROCESSOR_FILE, PROCESSOR_FILES, SUBDIRECTORY, ProcessorFiles, ProcessorForm
from gr00t_fast.networks.spec import HEAD, NetworkSpec, Section, check_head, expect, linear, norm, qwen3, read_qwen3, rows

MODEL_TYPE = "Gr00tN1d6"

# Sizes

# The reference's class defaults of what decides the computation.
DEFAULTS: dict[str, Any] = {
    **{key: value for key, value in n1d7.DEFAULTS.items() if key not in ("state_history_length", "vl_self_attention_cfg")},
    "select_layer": 16,
    "max_state_dim": 29,
    "max_action_dim": 29,
    "action_horizon": 16,
    "diffusion_model_cfg": {**n1d7.DEFAULTS["diffusion_model_cfg"], "num_layers": 32},
}
# config.json of the published network.
PUBLISHED_CONFIG: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": ["Gr00tN1d6"],
    "model_name": "nvidia/Eagle-Block2A-2B-v2",
    **DEFAULTS,
    "max_state_dim": 128,
    "max_action_dim": 128,
    "action_horizon": 50,
    "apply_sincos_state_encoding": True,
    "use_relative_action": True,
}
# What an absent key means to the reference, and the value that this implementation computes with.
_COMPUTED: dict[str, tuple[Any, Any]] = {
    "add_pos_embed": (True, True),
    "backbone_model_type": ("eagle", "eagle"),
    "reproject_vision": (False, False),
}
_UNKNOWN_TO_N1D6 = {"strict_action_padding_mask", "use_tactile", "tactile_state_keys", "tactile_input_shape", "tactile_embed_dim", "exclude_state"}
_WITHOUT_EFFECT = n1d7.WITHOUT_EFFECT - _UNKNOWN_TO_N1D6
# N1.7's keys, which N1.6's code stores and does not read.
_NOT_READ: dict[str, Any] = {"state_history_length": 1, "vl_self_attention_cfg": None}
# Eagle-Block2A-2B-v2's sizes.
PUBLISHED_BACKBONE: dict[str, Any] = {
    "model_type": "eagle_3_vl",
    "downsample_ratio": 0.5,
    "image_token_index": 151669,
    "mlp_connector_layers": 2,
    "select_layer": -1,
    "use_pixel_shuffle": True,
    "vision_config": {
        **{key: value for key, value in n1d5.PUBLISHED_EAGLE["vision_config"].items() if key != "image_size"},
        "model_type": "siglip2_vision_model",
        "num_patches": 256,
        "use_rope": False,
        "use_windows_attn": False,
    },
    "text_config": {"model_type": "qwen3", **n1d5.PUBLISHED_EAGLE["text_config"]},
}
_VISION_SIZES = {field: key for field, key in n1d5.VISION_SIZES.items() if field != "image_size"}


def read_config(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> ModelConfig:
    """From the checkpoint's `config.json` and its `backbone_config.json` (PUBLISHED_BACKBONE where there is none). Raises CheckpointError."""
    Section(config, CONFIG_FILE).warn_of_unknown({*DEFAULTS, *_COMPUTED, *_WITHOUT_EFFECT})
    whole, eagle = Section({**DEFAULTS, **config, **_NOT_READ}, CONFIG_FILE), Section(backbone, BACKBONE_FILE)
    whole.refuse_other(_COMPUTED)
    eagle.refuse_other({"use_pixel_shuffle": (True, True), "downsample_ratio": (0.5, 0.5), "mlp_connector_layers": (2, 2), "select_layer": (-4, -1)})
    text = eagle.section("text_config")
    text.refuse_other({"model_type": ("qwen3", "qwen3"), "rope_scaling": (None, None), "use_sliding_window": (False, False)})
    language = read_qwen3(text, whole.whole("select_layer"), eagle.whole("image_token_index"), text.positive("rope_theta", 1e4))
    built = ModelConfig(_vision(eagle.section("vision_config")), language, n1d7.read_head(whole, language.hidden_size))
    check_head(built, CONFIG_FILE)
    return built


def _vision(section: Section) -> Siglip2VisionConfig:
    computed = {"hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"), "num_channels": (3, 3)}
    section.refuse_other({**computed, "use_rope": (False, False), "use_windows_attn": (False, False)})
    positions = section.whole("num_patches")
    eps = section.positive("layer_norm_eps", 1e-6)
    vision = Siglip2VisionConfig(**section.wholes(_VISION_SIZES), grid=round(positions**0.5), layer_norm_eps=eps)
    conditions = {
        "hidden_size is a multiple of num_attention_heads": vision.hidden_size % vision.num_heads == 0,
        "num_patches is the square of a whole number": vision.grid**2 == positions,
        "patch_size is 14, as the image processor's multiple of 28 takes for granted": vision.patch_size == 14,
    }
    expect(section.where, conditions)
    return vision


# Names of the weights

_V = "backbone.model.vision_model.vision_model."
_L = "backbone.model.language_model.model."
_EAGLE_1D5 = "backbone.eagle_model."
_CONNECTOR = {"norm": "mlp1.0", "up": "mlp1.1", "down": "mlp1.3"}
WEIGHTS = {
    # the towers have N1.5's names below another root
    **{
        name: rows(*(theirs.replace(_EAGLE_1D5, "backbone.model.") for theirs in sources.names))
        for name, sources in n1d5.WEIGHTS.items()
        if name.startswith("vision.") and not name.startswith("vision.connector")
    },
    **{k: v for ours, theirs in _CONNECTOR.items() for k, v in linear(f"vision.connector.{ours}", f"backbone.model.{theirs}").items()},
    **qwen3(_L),
    **norm("language.norm", f"{_L}norm"),
    **HEAD,
}
# SigLIP's pooling head, the language head, and what stood for a dropped state in training.
UNUSED = (f"{_V}head.", "backbone.model.language_model.lm_head.", "action_head.mask_token")

# What the checkpoint was trained on

# Rows of the per-embodiment weights by tag (the reference's table); embodiment_id.json comes first.
EMBODIMENT_ROWS = {
    "robocasa_panda_omron": 13,
    "gr1": 20,
    "behavior_r1_pro": 24,
    "unitree_g1": 8,
    "libero_panda": 2,
    "oxe_google": 0,
    "oxe_widowx": 1,
    "oxe_droid": 16,
    "new_embodiment": 10,
}
FORM = ProcessorForm(
    processor_class="Gr00tN1d6Processor",
    rows=EMBODIMENT_ROWS,
    settings={**n1d7.FORM.settings, "shortest_image_edge": 512, "max_state_dim": 29},
    without_effect=n1d7.FORM.without_effect - _UNKNOWN_TO_N1D6,
    computed={"model_type": ("eagle", "eagle"), "exclude_state": (False, False)},
    said_twice=("use_relative_action", "apply_sincos_state_encoding", "formalize_language"),
    sizes=("max_state_dim", "max_action_dim"),  # max_action_horizon pads the actions of training alone
    history="NVIDIA's code makes a token of each time, and of one alone here",
)


def letterbox_of(checkpoint: Path, processor: Mapping[str, Any], asked: str) -> Letterbox:
    """NVIDIA's code of N1.6 never padded until 24 February 2026, always until April, and by letter_box_transform in its branch n1d6, which writes
    that key: a file without it says nothing. Raises CheckpointError and ConfigError as `n1d7.told_letterbox`."""
    told, _ = n1d7.told_letterbox(checkpoint, asked)
    if told is not None:
        return told
    kwargs = processor.get("processor_kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    if (pads := kwargs.get("letter_box_transform")) is None:
        if not kwargs.get("use_albumentations", False):
            return Letterbox(True, "use_albumentations is false, and NVIDIA's torchvision pictures were padded before there was a flag", True)
        return Letterbox(False, f"{PROCESSOR_FILE} has no letter_box_transform, as of the base and of fine-tunes before 24 February 2026", False)
    return Letterbox(pads is True, f"letter_box_transform is {str(pads).lower()} in {PROCESSOR_FILE}", True)


def read_files(path: Path, config: Mapping[str, Any], sizes: ModelConfig, letterbox: str) -> ProcessorFiles:
    files = n1d7.read_files(path, config, sizes, letterbox)
    return replace(files, form=FORM, letterbox=letterbox_of(path, files.processor, letterbox), history=1)


# Pictures and prompts

_PADDING_ID = 151643  # Qwen's <|endoftext|>


def render_prompt(instruction: str, images: int, tokens: int) -> str:
    """Eagle 3's chat template: the text first, and nothing between it and the first picture."""
    blocks = "".join(f"<image {k}><img>{IMAGE_TOKEN * tokens}</img>" for k in range(1, images + 1))
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{instruction}{blocks}<|im_end|>\n"


PROMPT = PromptForm(
    image_token=IMAGE_TOKEN,
    render=render_prompt,
    lists_texts=False,
    folders=("", SUBDIRECTORY, *n1d5.PROMPT.folders[:1]),
    hub=n1d5.PROMPT.hub,  # the same ids; N1.6's own files are in NVIDIA's package alone
    whose="Eagle",
    installed="model/modules/nvidia/Eagle-Block2A-2B-v2",
    place_holder=r"<(image|video)-\d+>",
    images_last=True,
)


def reference_inputs(inputs: PolicyInputs, embodiment: Embodiment, config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """pixels fp32 (B, C, 3, h, w) -> input_ids (B, S) and attention_mask, pixel_values (B x C, 3, h, w; the reference has a list of them) and
    image_sizes (B x C, 2), state (B, 1, P), embodiment_id (B,)."""
    pictures = pixels.flatten(0, 1)
    ids, mask = left_padded(inputs, _PADDING_ID)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pictures,
        "image_sizes": torch.tensor(pictures.shape[-2:]).expand(len(pictures), 2),
        "state": torch.from_numpy(inputs.state)[:, None],
        "embodiment_id": torch.full((inputs.batch,), embodiment.row),
    }


N1D6 = NetworkSpec(
    name="n1.6",
    model_type=MODEL_TYPE,
    backbone_file=BACKBONE_FILE,
    published_backbone=PUBLISHED_BACKBONE,
    read_config=read_config,
    weights=WEIGHTS,
    unused_weights=UNUSED,
    read_files=read_files,
    images=lambda embodiment, config: FitImages(embodiment, config.vision.token_side, BY_EAGLE),
    prompt=PROMPT,
    reference_inputs=reference_inputs,
    download=(BACKBONE_FILE, *PROCESSOR_FILES, *(f"{SUBDIRECTORY}/{file}" for file in PROCESSOR_FILES), *n1d7.TRAINING_FILES),
    fixed_images=False,
    protocol="n1.6",
)
