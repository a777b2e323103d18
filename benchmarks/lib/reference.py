"""The reference's way from camera frames to joint targets, on the libraries it uses: what `ab_server.py` compares ours with.

`ReferencePreprocessing` repeats the evaluation transforms of NVIDIA's N1.5 SO-100 configuration in their order and on their libraries: the whole
frame becomes fp32 on the CPU, torchvision crops and resizes it with antialias, it goes back to bytes and through PIL into transformers' fast
image processor; the chat template is rendered and tokenised at every call. Left out, because it is bookkeeping of well below a millisecond:
Eagle's search for tilings (a 224x224 picture is always one tile), masks that inference does not use. State and actions are normalised by
gr00t_fast's code (some ten numbers). So what the reference really spends is, if anything, more.

`reference_engine` runs a second reference, N1.5's or N1.7's, as an engine.

Axis alphabet: B batch (1), C cameras, S prompt tokens, H horizon, A padded action width.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gr00t_fast.base.contracts import ModalityConfig, Policy
from gr00t_fast.base.errors import CheckpointError, ConfigError, require
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.checkpoint import Checkpoint, open_checkpoint
from gr00t_fast.engine import Engine
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.prompt import find_tokenizer
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.model import ModelInputs
from gr00t_fast.networks.n1d5 import EMBODIMENT_ROWS, IMAGE_TOKEN, PROMPT

_VISION = "backbone.eagle_model.vision_model."
_LANGUAGE = "backbone.eagle_model.language_model."
_CONNECTOR = "backbone.eagle_model.mlp1.0."
_HEAD = "action_head."
REFERENCE_HEAD = "lerobot.policies.groot.action_head.flow_matching_action_head"  # in lerobot up to 0.5


def _sub(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        state.update(load_file(file))
    return state


class SecondReference(nn.Module):
    """transformers' SigLIP and Qwen3 with lerobot's GR00T N1.5 action head, which reproduce NVIDIA's recorded outputs.

    NVIDIA's package needs flash-attn and cannot be installed beside lerobot; these modules can. Nothing here shares code with gr00t_fast:
    configuration and weights are read from the checkpoint's files by the libraries' own names. The language head is computed, as NVIDIA's and
    lerobot's inference do, so that timings compare like with like.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32, language_head: bool = True) -> None:
        from lerobot.policies.groot.action_head.flow_matching_action_head import FlowmatchingActionHead, FlowmatchingActionHeadConfig
        from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        config = json.loads((checkpoint / "config.json").read_text())
        eagle = json.loads((checkpoint / "eagle2_hg_model" / "config.json").read_text())
        vision = SiglipVisionConfig(**{**eagle["vision_config"], "attn_implementation": "sdpa"})
        text = {**eagle["text_config"], "num_hidden_layers": config["backbone_cfg"]["select_layer"], "attn_implementation": "sdpa"}
        text.pop("layer_types", None)
        head_cfg = FlowmatchingActionHeadConfig(**config["action_head_cfg"])
        torch.distributions.Distribution.set_default_validate_args(False)  # the head's Beta would ask a meta tensor for its value
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):  # lerobot's head prints its parameter count
            self.vision = SiglipVisionModel(vision)
            self.language = Qwen3ForCausalLM(Qwen3Config(**text))
            self.head = FlowmatchingActionHead(head_cfg)
        self.image_token_id = eagle["image_token_index"]
        self.language_head = language_head
        self._load(read_weights(checkpoint), dtype)
        self.eval().requires_grad_(False)

    def _load(self, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        language = _sub(state, _LANGUAGE)
        language.setdefault("lm_head.weight", language["model.embed_tokens.weight"])
        self.language.load_state_dict(language, strict=True, assign=True)
        # the pooling head is never used, and checkpoints may leave it out
        unused = {name: torch.zeros(meta.shape, dtype=dtype) for name, meta in self.vision.state_dict().items() if ".head." in name}
        self.vision.load_state_dict(unused | _sub(state, _VISION), strict=True, assign=True)
        self.head.load_state_dict(_sub(state, _HEAD), strict=True, assign=True)
        connector = _sub(state, _CONNECTOR)
        self.connector = nn.Linear(*reversed(connector["weight"].shape), device="meta")
        self.connector.load_state_dict(connector, assign=True)
        # buffers that are no weights were made on the meta device: make them again, in fp32 where the library keeps fp32
        embeddings = self.vision.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
        rotary = self.language.model.rotary_emb
        self.language.model.rotary_emb = type(rotary)(self.language.config)

    @torch.inference_mode()
    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, 224, 224) -> (I, 256, D)."""
        return self.connector(self.vision(pixel_values).last_hidden_state)

    @torch.inference_mode()
    def encode_language(self, input_ids: Tensor, vision_tokens: Tensor) -> Tensor:
        """(B, S), (I, 256, D) -> (B, S, D)."""
        embeddings = self.language.get_input_embeddings()(input_ids)
        selected = input_ids == self.image_token_id
        embeddings[selected] = vision_tokens.reshape(-1, embeddings.shape[-1])
        inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(input_ids), "output_hidden_states": True, "use_cache": False}
        outputs = self.language(**inputs) if self.language_head else self.language.model(**inputs)
        return outputs.hidden_states[-1]

    @torch.inference_mode()
    def refine(self, features: Tensor) -> Tensor:
        return self.head.vl_self_attention(self.head.vlln(features))

    @torch.inference_mode()
    def denoise(self, features: Tensor, state: Tensor, noise: Tensor, steps: int, embodiment_row: int = 31) -> Tensor:
        """The head's own `get_action`, with its random start replaced by `noise` (B, H, A)."""
        from transformers.feature_extraction_utils import BatchFeature

        self.head.num_inference_timesteps = steps
        row = torch.full((noise.shape[0],), embodiment_row)
        inputs = BatchFeature({"state": state.unsqueeze(1), "embodiment_id": row})
        original, torch.randn = torch.randn, lambda *_, **__: noise.clone()
        try:
            return self.head.get_action(BatchFeature({"backbone_features": features}), inputs)["action_pred"]
        finally:
            torch.randn = original

    def forward(self, pixel_values: Tensor, input_ids: Tensor, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        features = self.encode_language(input_ids, self.encode_vision(pixel_values))
        return self.denoise(features, state, noise, steps)


_CROP_SCALE = 0.95  # NVIDIA's VideoCrop in every SO-100 data configuration
# The conversation as Eagle's chat template renders it; pictures are numbered places that the processor fills afterwards.
_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<image-{{ loop.index }}>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PLACE = re.compile(r"<image-(\d+)>")


def reference_engine(checkpoint: Path, embodiment_tag: str, device: torch.device, dtype: torch.dtype) -> ReferenceEngine:
    """The engine of the checkpoint's network. Raises MissingExtraError without the packages that it needs, CheckpointError without files that it
    reads, ConfigError for N1.6, which no library can run."""
    network = open_checkpoint(checkpoint, with_weights=False).network
    if network.name == "n1.6":
        raise ConfigError(f"there is no second reference of {network.title}: neither lerobot nor transformers has its tower. Leave it out.")
    if network.name == "n1.5":
        return ReferenceEngine(checkpoint, embodiment_tag, device, dtype)
    from benchmarks.lib.reference_n1d7 import ReferenceEngineN1d7

    return ReferenceEngineN1d7(checkpoint, embodiment_tag, device, dtype)


class ReferenceEngine(Engine):
    """The second reference (transformers' towers, lerobot's action head, language head included)."""

    name = "reference"

    def __init__(self, checkpoint: Path, embodiment_tag: str, device: torch.device, dtype: torch.dtype) -> None:
        """Raises MissingExtraError without transformers and lerobot, CheckpointError without the files that they read."""
        require("transformers", "bench")
        require("lerobot", "robot")
        if not (checkpoint / "eagle2_hg_model" / "config.json").exists():
            raise CheckpointError(f"the reference modules read their sizes from {checkpoint}/eagle2_hg_model/config.json, which is not there.")
        self.device, self.dtype, self._row = device, dtype, EMBODIMENT_ROWS[embodiment_tag]
        self.modules = SecondReference(checkpoint, dtype).to(device)

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer) -> Tensor:
        """As `Engine.run`, for a batch of one."""
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device)
        with timer.stage("vision"):
            tokens = self.modules.encode_vision(inputs.pixel_values.flatten(0, 1))
        with timer.stage("language"):
            features = self.modules.encode_language(inputs.input_ids, tokens)
        with timer.stage("refine+denoise"):  # the head does both in one call
            return self.modules.denoise(features, inputs.state, noise.to(features.dtype), denoising_steps, self._row)


class ReferencePreprocessing:
    """Observation dict -> ModelInputs, as the reference's processor and transforms make them. One observation at a time."""

    def __init__(self, checkpoint: Checkpoint, embodiment_tag: str, config: DataConfig, processor_path: Path | None) -> None:
        transformers = require("transformers", "bench")
        require("lerobot", "robot")  # brings torchvision
        from torchvision.transforms import v2

        embodiment = checkpoint.embodiment(embodiment_tag, config)
        sizes = {(embodiment.cameras[key].height, embodiment.cameras[key].width) for key in config.video_keys}
        if len(sizes) != 1:
            raise CheckpointError(f"the reference takes cameras of one resolution only; this checkpoint was trained with {sorted(sizes)}.")
        ((height, width),) = sizes
        self._config, vision = config, checkpoint.config.vision
        self._crop = v2.CenterCrop((int(height * _CROP_SCALE), int(width * _CROP_SCALE)))
        self._resize = v2.Resize((vision.image_size, vision.image_size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        half = [0.5] * 3
        self._images = transformers.SiglipImageProcessorFast(do_resize=False, image_mean=half, image_std=half)
        self._tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=find_tokenizer(PROMPT, processor_path, checkpoint.base), pad_token="<|endoftext|>", padding_side="left"
        )
        self._image_text, self._image_token_id = IMAGE_TOKEN * vision.tokens, checkpoint.config.language.image_token_id
        self._state = StateTransform(embodiment)

    def __call__(self, observation: dict[str, Any], device: torch.device, dtype: torch.dtype) -> ModelInputs:
        """Unbatched `video.*` (1, H, W, 3), `state.*` (1, D), instruction as [str]. Frames have the training size."""
        frames = self._frames(observation)
        pixels, ids = self._processor(frames, str(observation[self._config.language_key][0]))
        state = torch.from_numpy(self._state({key: np.asarray(observation[key], np.float64) for key in self._config.state_keys}))
        image_positions = torch.nonzero(ids[0] == self._image_token_id)[:, 0]
        return ModelInputs(pixels[None].to(device, dtype), ids.to(device), image_positions.to(device), state.to(device, dtype))

    def _frames(self, observation: dict[str, Any]) -> list[np.ndarray]:
        """Bytes (224, 224, 3) per camera. Every step of the reference joins the cameras and parts them again, which copies."""
        views = [np.asarray(observation[key]) for key in self._config.video_keys]
        x = (torch.from_numpy(np.concatenate(views)).to(torch.float32) / 255.0).permute(0, 3, 1, 2)  # (C, 3, H, W)
        x = self._crop(torch.cat(list(x.split(1))))
        x = self._resize(torch.cat(list(x.split(1))))  # (C, 3, 224, 224)
        return list((torch.cat(list(x.split(1))).permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy())

    def _processor(self, frames: list[np.ndarray], instruction: str) -> tuple[Tensor, Tensor]:
        """-> fp32 (C, 3, 224, 224) in [-1, 1], ids (1, S)."""
        from PIL import Image

        pictures = [Image.fromarray(frame).convert("RGB") for frame in frames]
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": instruction}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        tiles = [self._images(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]  # one by one, as Eagle's does
        text = _PLACE.sub(lambda found: f"<image {found[1]}><img>{self._image_text}</img>", text)
        ids = self._tokenizer([text], return_tensors="pt", padding=True, add_special_tokens=False)["input_ids"]
        return torch.cat(tiles), ids


class ReferencePreprocessingPolicy(Policy):
    """A `Policy` with the reference's pre-processing in front of any engine."""

    def __init__(
        self,
        checkpoint_path: Path,
        embodiment_tag: str,
        config: DataConfig,
        processor_path: Path | None,
        engine: Any,
        place: tuple[torch.device, torch.dtype],
        denoising_steps: int,
    ) -> None:
        checkpoint = open_checkpoint(checkpoint_path)
        self.engine, self.denoising_steps = engine, denoising_steps
        self._device, self._dtype = place
        self._config = config
        self.preprocessing = ReferencePreprocessing(checkpoint, embodiment_tag, config, processor_path)
        self._action = ActionTransform(checkpoint.embodiment(embodiment_tag, config))

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        """As `Policy.get_action`, for one unbatched observation. noise: (1, H, A), which has to be given."""
        inputs = self.preprocessing(observation, self._device, self._dtype)
        start = torch.as_tensor(noise, dtype=torch.float32).to(self._device)
        actions = self.engine.run(inputs, start, self.denoising_steps, StageTimer(self.engine.synchronise))
        return {key: rows[0] for key, rows in self._action(actions.float().cpu().numpy()).items()}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return self._config.modality_config()

    def reset(self) -> None:
        """Nothing is kept between calls."""
