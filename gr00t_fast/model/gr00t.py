"""GR00T whole: pictures, prompt and state in, normalised action chunk out. One class for all networks: what differs is in their ModelConfig.

    pixels -> vision tower -> tokens, deepstack \\
    prompt ids -> embedding ---------------------> LanguageModel -> ActionHead.refine -> ActionHead.condition -> denoise -> actions
    state ------------------------------------------------------------------------------/

N1.6 has another vision tower than N1.5, its pictures come behind the text, and a diffusion transformer whose blocks see the text or the pictures
(`attend_text_every`). N1.7 has a third tower, positions of the prompt's tokens on three axes (`mrope_sections`), image features added behind the
language model's first layers (deepstack), features before its final norm (`final_norm`), and N1.6's transformer.
Axis alphabet: B batch, C pictures (cameras x times), S prompt tokens (image tokens included), V image tokens in a prompt, H horizon,
A padded action width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr00t_fast.model.action_head import ActionHead, StepTables
from gr00t_fast.model.config import ModelConfig, QwenVisionConfig, Siglip2VisionConfig, VisionConfig
from gr00t_fast.model.language import LanguageModel, mrope_tables, prompt_positions
from gr00t_fast.model.layers import Rotary, put_rows, rotary_tables
from gr00t_fast.model.siglip2 import Siglip2Tower
from gr00t_fast.model.vision import QwenVisionTower, VisionTower, pixels_of

_TOWERS = {VisionConfig: VisionTower, QwenVisionConfig: QwenVisionTower, Siglip2VisionConfig: Siglip2Tower}


@dataclass(frozen=True)
class ModelInputs:
    """One batch, on the model's device, floats in the model's dtype.

    pixel_values (B, C, 3, h, w) in [-1, 1]; input_ids int64 (B, S); image_positions int64 (V,), the places of the image tokens in all prompts,
    or (B, V) where pictures come behind texts of unequal length; state (B, state_dim);
    prompt_mask bool (B, S), False on padding, or None when all prompts are equally long.
    """

    pixel_values: Tensor
    input_ids: Tensor
    image_positions: Tensor
    state: Tensor
    prompt_mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelInputs:
        """On `device`, floats in `dtype`."""
        mask = None if self.prompt_mask is None else self.prompt_mask.to(device)
        pixels, state = self.pixel_values.to(device, dtype), self.state.to(device, dtype)
        return ModelInputs(pixels, self.input_ids.to(device), self.image_positions.to(device), state, mask)

    @property
    def key_mask(self) -> Tensor | None:
        """(B, 1, 1, S) for attention over prompt tokens. The reference does not mask, so its padded batches leak into each other."""
        return None if self.prompt_mask is None else self.prompt_mask[:, None, None, :]


def prompt_rotary(config: ModelConfig, tokens: int, image_positions: Tensor, picture: Sequence[int], like: Tensor) -> Rotary:
    """cos and sin (tokens, K) of prompts with image tokens at image_positions (V,), of pictures of (height, width) pixels each, in `like`'s dtype and
    device: of positions 0, 1, ... tokens - 1, or on three axes (`mrope_sections`). The prompts of a batch have their pictures in the same places, so
    they share positions; so do prompts of other lengths."""
    language, side = config.language, config.vision.token_side
    if language.mrope_sections is None:
        return rotary_tables(tokens, language.head_dim, language.rope_theta, like)
    rows, columns = (pixels // side for pixels in picture)
    positions = prompt_positions(tokens, image_positions, rows, columns)
    return mrope_tables(positions, language.head_dim, language.rope_theta, language.mrope_sections, like.dtype)


class Gr00t(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = _TOWERS[type(config.vision)](config.vision, config.language.hidden_size)
        self.language = LanguageModel(config.language)
        self.head = ActionHead(config.head, config.language.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.language.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embedding.weight.device

    def to_pixels(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W, 3), as `PolicyInputs` has them -> fp32 (B, 3, h, w) in [-1, 1], on the frames' device."""
        return pixels_of(self.config.vision)(frames)

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """All pictures of all observations in one call: (B, C, 3, h, w) -> (B, V, D), with deepstack (1 + deepstack, B, V, D)."""
        tokens = self.vision(pixel_values.flatten(0, 1))  # ([1 + deepstack,] B C, T, D)
        return tokens.reshape(*tokens.shape[:-3], pixel_values.shape[0], -1, tokens.shape[-1])

    def rotary(self, inputs: ModelInputs) -> Rotary:
        """Tables of the prompt's positions."""
        like = self.language.embedding.weight
        return prompt_rotary(self.config, inputs.input_ids.shape[1], inputs.image_positions, inputs.pixel_values.shape[-2:], like)

    def encode_language(self, inputs: ModelInputs, vision_tokens: Tensor) -> Tensor:
        """Put the image tokens in their places in the prompt and run the decoder: -> backbone features (B, S, D)."""
        tokens, *deepstack = vision_tokens if vision_tokens.dim() == 4 else (vision_tokens,)
        embeddings = put_rows(self.language.embedding(inputs.input_ids), inputs.image_positions, tokens)  # (B, S, D)
        return self.language(embeddings, self.rotary(inputs), deepstack, inputs.image_positions)

    def forward(self, inputs: ModelInputs, noise: Tensor, tables: StepTables) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A)."""
        features = self.encode_language(inputs, self.encode_vision(inputs.pixel_values))  # (B, S, D)
        vl_features = self.head.refine(features, inputs.key_mask)  # (B, S, D)
        condition = self.head.condition(vl_features, inputs.state, inputs.key_mask, inputs.image_positions)
        return self.head.denoise(noise, condition, tables)
