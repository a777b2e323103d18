"""GR00T N1.7 whole: pictures, prompt and state in, normalised action chunk out.

    pixels -> QwenVisionTower -> tokens, deepstack \\
    prompt ids -> embedding -----------------------> LanguageModel -> ActionHead.refine -> ActionHead.condition -> denoise -> actions
    state --------------------------------------------------------------------------------/

What differs from N1.5 besides the vision tower: positions of the prompt's tokens on three axes, image features added behind the language model's
first layers, features before its final norm, and a diffusion transformer whose blocks see the text or the pictures.
Axis alphabet: B batch, C pictures (cameras x times), S prompt tokens (image tokens included), V image tokens in a prompt, H horizon,
A padded action width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gr00t_fast.config import ModelConfig
from gr00t_fast.model.action_head import ActionHead, StepTables
from gr00t_fast.model.gr00t import ModelInputs
from gr00t_fast.model.language import LanguageModel, mrope_tables, prompt_positions
from gr00t_fast.model.layers import Rotary
from gr00t_fast.model.vision_qwen import QwenVisionTower, picture_values


def prompt_rotary(config: ModelConfig, tokens: int, image_positions: Tensor, picture: Sequence[int], dtype: torch.dtype) -> Rotary:
    """cos and sin (tokens, K) of prompts with image tokens at image_positions (V,), of pictures of (height, width) pixels each. The prompts of a
    batch have their pictures in the same places, so they share positions; so do prompts of other lengths."""
    language, side = config.language, config.vision.patch_size * config.vision.merge_size
    rows, columns = (pixels // side for pixels in picture)
    positions = prompt_positions(tokens, image_positions, rows, columns)
    return mrope_tables(positions, language.head_dim, language.rope_theta, language.mrope_sections, dtype)


class Gr00tN1d7(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = QwenVisionTower(config.vision, config.language.hidden_size)
        self.language = LanguageModel(config.language)
        self.head = ActionHead(config.head, config.language.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.language.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embedding.weight.device

    def to_pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (B, h, w, 3), padded, cropped and resized already -> fp32 (B, 3, h, w), on the pictures' device."""
        return picture_values(pictures)

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """All pictures of all observations in one call: (B, C, 3, h, w) -> (1 + deepstack, B, V, D)."""
        tokens = self.vision(pixel_values.flatten(0, 1))  # (1 + deepstack, B C, T, D)
        return tokens.reshape(tokens.shape[0], pixel_values.shape[0], -1, tokens.shape[-1])

    def rotary(self, inputs: ModelInputs) -> Rotary:
        return prompt_rotary(self.config, inputs.input_ids.shape[1], inputs.image_positions, inputs.pixel_values.shape[-2:], self.dtype)

    def encode_language(self, inputs: ModelInputs, vision_tokens: Tensor) -> Tensor:
        """Put the image tokens in their places in the prompt and run the decoder: -> backbone features (B, S, D)."""
        tokens, *deepstack = vision_tokens
        embeddings = self.language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, tokens)  # (B, S, D)
        return self.language(embeddings, self.rotary(inputs), deepstack, inputs.image_positions)

    def forward(self, inputs: ModelInputs, noise: Tensor, tables: StepTables) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A)."""
        features = self.encode_language(inputs, self.encode_vision(inputs.pixel_values))  # (B, S, D)
        vl_features = self.head.refine(features, inputs.key_mask)  # (B, S, D)
        condition = self.head.condition(vl_features, inputs.state, inputs.key_mask, inputs.image_positions)
        return self.head.denoise(noise, condition, tables)
