"""A second, independent reference: transformers' SigLIP and Qwen3 with lerobot's GR00T N1.5 action head.

NVIDIA's package needs flash-attn and cannot be installed beside lerobot. These modules can, and reproduce NVIDIA's recorded outputs.
Nothing here shares code with gr00t_fast: configuration and weights are read from the checkpoint's files by the libraries' own names. The
language head is computed, as NVIDIA's and lerobot's inference do, so that timings compare like with like.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_VISION = "backbone.eagle_model.vision_model."
_LANGUAGE = "backbone.eagle_model.language_model."
_CONNECTOR = "backbone.eagle_model.mlp1.0."
_HEAD = "action_head."


def _sub(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        state.update(load_file(file))
    return state


class SecondReference(nn.Module):
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
