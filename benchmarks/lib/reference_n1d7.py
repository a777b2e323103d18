"""lerobot's port of GR00T N1.7 over transformers' Qwen3-VL, stage by stage: what our N1.7 is compared with besides NVIDIA's recordings.

Axis alphabet: B batch, C pictures, P patches of all pictures, V tokens of one picture, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.reference import read_weights
from gr00t_fast.config_n1d7 import BACKBONE_FILE, CONFIG_FILE


class SecondReferenceN1d7(nn.Module):
    """Needs lerobot 0.6's `policies.groot`, transformers 5.4 or 5.5, and diffusers. No part of the computation is shared with gr00t_fast:
    configuration and weights are read from the checkpoint's files by the libraries' own names."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

        super().__init__()
        config = json.loads((checkpoint / CONFIG_FILE).read_text())
        with tempfile.TemporaryDirectory() as directory:
            if (checkpoint / BACKBONE_FILE).exists():  # else the sizes of the published backbone, which lerobot holds
                (Path(directory) / "config.json").write_text((checkpoint / BACKBONE_FILE).read_text())
                config["model_name"] = directory
            self.model = GR00TN17(GR00TN17Config(**config), load_backbone_weights=False)
        weights = read_weights(checkpoint)
        weights.setdefault("backbone.model.lm_head.weight", weights["backbone.model.model.language_model.embed_tokens.weight"])
        self.model.load_state_dict(weights, strict=True)
        self.eval().requires_grad_(False)
        for parameter in self.parameters():  # and no buffers: the rotary frequencies stay fp32, as lerobot loads them
            parameter.data = parameter.data.to(dtype)

    @property
    def qwen(self) -> nn.Module:
        return self.model.backbone.model

    @torch.inference_mode()
    def encode_vision(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (P, 3 x frames x patch x patch) of pictures of `grid` rows and columns of patches -> (1 + deepstack, C V, D)."""
        out = self.qwen.model.visual(patches, grid_thw=_grids(patches, grid))
        return torch.stack([out.pooler_output, *out.deepstack_features])

    @torch.inference_mode()
    def positions(self, input_ids: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Time, row and column of each token, int64 (3, B, S)."""
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "image_grid_thw": _grids(patches, grid)}
        self.model.backbone._ensure_mm_token_type_ids(inputs)
        self.model.backbone._ensure_legacy_qwen3_position_ids(inputs)
        return inputs["position_ids"][-3:]

    @torch.inference_mode()
    def encode_language(self, input_ids: Tensor, patches: Tensor, grid: tuple[int, int], vision_tokens: Tensor | None = None) -> Tensor:
        """lerobot's backbone: (B, S) -> (B, S, D). vision_tokens (1 + deepstack, C V, D): in place of what its vision tower would give."""

        def replace(_module: nn.Module, _inputs: object, out):
            out.pooler_output, out.deepstack_features = vision_tokens[0], list(vision_tokens[1:])
            return out

        hook = self.qwen.model.visual.register_forward_hook(replace) if vision_tokens is not None else None
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": patches}
        try:
            return self.model.backbone({**inputs, "image_grid_thw": _grids(patches, grid)})["backbone_features"]
        finally:
            if hook is not None:
                hook.remove()

    @torch.inference_mode()
    def refine(self, features: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.model.action_head.process_backbone_output({"backbone_features": features})["backbone_features"]

    @torch.inference_mode()
    def denoise(self, vl_features: Tensor, input_ids: Tensor, state: Tensor, noise: Tensor, steps: int, embodiment_row: int) -> Tensor:
        """The head's own loop, begun at `noise` (B, H, A) instead of at random: state (B, times x state_dim) -> (B, H, A)."""
        from transformers.feature_extraction_utils import BatchFeature

        head, row = self.model.action_head, torch.full((noise.shape[0],), embodiment_row)
        head.num_inference_timesteps = steps
        masks = {"image_mask": input_ids == self.qwen.config.image_token_id, "backbone_attention_mask": torch.ones_like(input_ids, dtype=torch.bool)}
        state_features = head.state_encoder(state.unsqueeze(1), row)
        original, torch.randn = torch.randn, lambda *_, **__: noise.clone()
        try:
            made = head.get_action_with_features(vl_features, state_features, row, BatchFeature(masks), BatchFeature({}))
            return made["action_pred"]
        finally:
            torch.randn = original


def _grids(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """int64 (C, 3): times, rows, columns of each picture."""
    rows, columns = grid
    return torch.tensor([[1, rows, columns]]).expand(patches.shape[0] // (rows * columns), -1)
