"""Vision: one 224 x 224 picture in, 256 tokens of the language model's width out.

SigLIP-2 so400m/14 without its pooling head (the reference computes that and drops it), then one linear connector.
Axis alphabet: I images, T patches, D width, L language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.config import VisionConfig
from gr00t_fast.model.layers import PreNormBlock

_CROP_SCALE = 0.95  # NVIDIA's VideoCrop in every SO-100 data configuration
_PIXEL_MEAN = 127.5  # mean and deviation of Eagle's image processor, 0.5 of 255, folded as its fast path does: another order rounds differently


def pixel_values(frames: Tensor, image_size: int) -> Tensor:
    """uint8 (B, H, W, 3) RGB at the training videos' resolution -> fp32 (B, 3, image_size, image_size) in [-1, 1], on the frames' device.

    Cropping bytes before they become floats gives the same numbers as the reference's order, with less to convert.
    """
    x = _centre_crop(frames.permute(0, 3, 1, 2), _CROP_SCALE).contiguous().float().div_(255.0)  # (B, 3, h, w)
    if x.shape[-2:] != (image_size, image_size):
        # bilinear with antialias: what torchvision's resize does to a float tensor
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=True)
    x = (x * 255.0).to(torch.uint8).float()  # truncation, as the reference's conversion to bytes does
    return (x - _PIXEL_MEAN) / _PIXEL_MEAN


def _centre_crop(x: Tensor, scale: float) -> Tensor:
    height, width = x.shape[-2:]
    crop_height, crop_width = int(height * scale), int(width * scale)
    top = round((height - crop_height) / 2.0)  # torchvision's CenterCrop rounds to even as Python does
    left = round((width - crop_width) / 2.0)
    return x[..., top : top + crop_height, left : left + crop_width]


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
