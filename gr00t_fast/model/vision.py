"""Vision: one 224 x 224 picture in, 256 tokens of the language model's width out.

SigLIP-2 so400m/14 without its pooling head (the reference computes that and drops it), then one linear connector.
Axis alphabet: I images, T patches, D width, L language width.
"""

from __future__ import annotations

from torch import Tensor, nn

from gr00t_fast.config import VisionConfig
from gr00t_fast.model.layers import PreNormBlock


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, out_width: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.tokens, config.hidden_size)
        block = (config.hidden_size, config.num_heads, config.intermediate_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.connector = nn.Linear(config.hidden_size, out_width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (I, 3, 224, 224) in [-1, 1] -> tokens (I, T, L)."""
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding.weight  # (I, T, D)
        for block in self.blocks:
            x = block(x)
        return self.connector(self.norm(x))
