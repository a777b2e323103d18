"""GR00T N1.5 whole: pictures, prompt and state in, normalised action chunk out.

    pixels -> VisionTower -> tokens \
    prompt ids -> embedding ---------> LanguageModel -> ActionHead.refine -> ActionHead.condition -> denoise -> actions
    state -----------------------------------------------------------------/

Axis alphabet: B batch, C cameras, S prompt tokens (image tokens included), V image tokens in a prompt, H horizon, A padded action width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr00t_fast.config import ModelConfig
from gr00t_fast.model.action_head import ActionHead, StepTables
from gr00t_fast.model.language import LanguageModel
from gr00t_fast.model.vision import VisionTower, pixel_values


@dataclass(frozen=True)
class ModelInputs:
    """One batch, on the model's device, floats in the model's dtype.

    pixel_values (B, C, 3, 224, 224) in [-1, 1]; input_ids int64 (B, S); image_positions int64 (V,), the places of the image tokens,
    the same in every prompt because pictures come first; state (B, state_dim);
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


class Gr00tN1d5(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision, config.language.hidden_size)
        self.language = LanguageModel(config.language)
        self.head = ActionHead(config.head, config.language.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.connector.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.vision.connector.weight.device

    def to_pixels(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) at the training videos' resolution -> fp32 (B, 3, h, w), on the frames' device."""
        return pixel_values(frames, self.config.vision.image_size)

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """All cameras of all observations in one call: (B, C, 3, h, w) -> (B, V, D)."""
        tokens = self.vision(pixel_values.flatten(0, 1))  # (B C, T, D)
        return tokens.reshape(pixel_values.shape[0], -1, tokens.shape[-1])

    def encode_language(self, inputs: ModelInputs, vision_tokens: Tensor) -> Tensor:
        """Put the image tokens in their places in the prompt and run the decoder: -> backbone features (B, S, D)."""
        embeddings = self.language.embedding(inputs.input_ids)  # (B, S, D)
        return self.language(embeddings.index_copy(1, inputs.image_positions, vision_tokens))

    def forward(self, inputs: ModelInputs, noise: Tensor, tables: StepTables) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A)."""
        features = self.encode_language(inputs, self.encode_vision(inputs.pixel_values))  # (B, S, D)
        vl_features = self.head.refine(features, inputs.key_mask)  # (B, S, D)
        return self.head.denoise(noise, self.head.condition(vl_features, inputs.state, inputs.key_mask), tables)
