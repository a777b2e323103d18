"""lerobot's port of GR00T N1.7 over transformers' Qwen3-VL, stage by stage and as an engine: what ours is compared with besides NVIDIA's recordings.

Axis alphabet: B batch, C pictures, P patches of all pictures, V tokens of one picture, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.reference import ReferenceEngine, read_weights
from gr00t_fast.base.errors import MissingExtraError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.model import ModelInputs
from gr00t_fast.model.vision import patches_of
from gr00t_fast.networks.n1d7 import BACKBONE_FILE, CONFIG_FILE


class SecondReferenceN1d7(nn.Module):
    """Needs lerobot 0.6's `policies.groot`, transformers 5.4 or 5.5, and diffusers. No part of the computation is shared with gr00t_fast:
    configuration and weights are read from the checkpoint's files by the libraries' own names."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

        super().__init__()
        config = json.loads((checkpoint / CONFIG_FILE).read_text())
        with tempfile.TemporaryDirectory() as directory, torch.device("meta"):  # without memory, of which the whole backbone would take 17 GB
            if (checkpoint / BACKBONE_FILE).exists():  # else the sizes of the published backbone, which lerobot holds
                (Path(directory) / "config.json").write_text((checkpoint / BACKBONE_FILE).read_text())
                config["model_name"] = directory
            self.model = GR00TN17(GR00TN17Config(**config), load_backbone_weights=False)
        # copied even in the file's dtype: safetensors' are views of the mapped file, and timings are of weights in memory
        weights = {name: tensor.to(dtype, copy=True) for name, tensor in read_weights(checkpoint).items()}
        weights.setdefault("backbone.model.lm_head.weight", weights["backbone.model.model.language_model.embed_tokens.weight"])
        self.model.load_state_dict(weights, strict=True, assign=True)
        # buffers that are no weights were made on the meta device: made again, in fp32, as lerobot has them in any dtype
        text, visual, sizes = self.qwen.model.language_model, self.qwen.model.visual, self.qwen.config.vision_config
        text.rotary_emb = type(text.rotary_emb)(self.qwen.config.text_config)
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(sizes.hidden_size // sizes.num_heads // 2)
        self.eval().requires_grad_(False)

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

        head, row = self.model.action_head, torch.full((noise.shape[0],), embodiment_row, device=noise.device)
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
    return torch.tensor([[1, rows, columns]], device=patches.device).expand(patches.shape[0] // (rows * columns), -1)


class ReferenceEngineN1d7(ReferenceEngine):
    """As ReferenceEngine. Patches are made as its own processor makes them, before the network's clock begins."""

    def __init__(self, checkpoint: Path, embodiment_tag: str, device: torch.device, dtype: torch.dtype) -> None:
        """Raises MissingExtraError without the packages of SecondReferenceN1d7."""
        try:
            import diffusers  # noqa: F401
            import lerobot.policies.groot.groot_n1_7  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                f"the reference modules of N1.7 are lerobot 0.6's ({error}). In an environment of its own, with Python 3.12: "
                "pip install 'lerobot==0.6.1' 'transformers>=5.4,<5.6' diffusers"
            ) from error
        opened = open_checkpoint(checkpoint, with_weights=False)
        self.device, self.dtype, self._row, self._vision = device, dtype, opened.row_of(embodiment_tag), opened.config.vision
        self.modules = SecondReferenceN1d7(checkpoint, dtype).to(device)

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer) -> Tensor:
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device, self.dtype)
            patches = patches_of(inputs.pixel_values.flatten(0, 1), self._vision).flatten(0, 1)
            height, width = (pixels // self._vision.patch_size for pixels in inputs.pixel_values.shape[-2:])
        with timer.stage("vision+language"):  # one module there
            features = self.modules.encode_language(inputs.input_ids, patches, (height, width))
        with timer.stage("refine+denoise"):
            refined = self.modules.refine(features)
            return self.modules.denoise(refined, inputs.input_ids, inputs.state, noise, denoising_steps, self._row)
