"""Vision: one 224 x 224 picture in, 256 tokens of the language model's width out.

SigLIP-2 so400m/14 without its pooling head (the reference computes that and drops it), then one linear connector.
Axis alphabet: I images, T patches, D width, L language width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model.config import AnyVisionConfig, QwenVisionConfig, VisionConfig
from gr00t_fast.model.layers import PreNormBlock, Rotary, rotary_frequencies, tables_of

_PIXEL_MEAN = 127.5  # mean and deviation of Eagle's image processor, 0.5 of 255, folded as its fast path does: another order rounds differently


def pixel_values(frames: Tensor, image_size: int, crop_scale: float = VisionConfig.crop_scale) -> Tensor:
    """uint8 (B, H, W, 3) RGB at the training videos' resolution -> fp32 (B, 3, image_size, image_size) in [-1, 1], on the frames' device.

    Cropping bytes before they become floats gives the same numbers as the reference's order, with less to convert.
    """
    x = _centre_crop(frames.permute(0, 3, 1, 2), crop_scale).contiguous().float().div_(255.0)  # (B, 3, h, w)
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


_ROTARY_THETA = 10_000.0


def pixels_of(config: AnyVisionConfig) -> Callable[[Tensor], Tensor]:
    """What makes a tower's pixels, fp32 (B, 3, h, w) in [-1, 1], of uint8 (B, H, W, 3) on their device."""
    if config.image_size is None:
        return picture_values
    return functools.partial(pixel_values, image_size=config.image_size, crop_scale=config.crop_scale)


def picture_values(pictures: Tensor) -> Tensor:
    """uint8 (B, h, w, 3) -> fp32 (B, 3, h, w) in [-1, 1], on the pictures' device."""
    return (pictures.permute(0, 3, 1, 2).float() - _PIXEL_MEAN) / _PIXEL_MEAN


class PatchMerger(nn.Module):
    """Successive patches joined to one token: LayerNorm before or after joining, Linear, GELU, Linear."""

    def __init__(self, config: QwenVisionConfig, out_width: int, norm_joined: bool) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.merge_size**2
        self.norm = nn.LayerNorm(self.joined if norm_joined else config.hidden_size, eps=config.layer_norm_eps)
        self.norm_joined = norm_joined
        self.up = nn.Linear(self.joined, self.joined)
        self.down = nn.Linear(self.joined, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x (I, T, D) -> (I, V, L)."""
        x = self.norm(x.reshape(x.shape[0], -1, self.joined)) if self.norm_joined else self.norm(x).reshape(x.shape[0], -1, self.joined)
        return self.down(F.gelu(self.up(x)))


class QwenVisionTower(nn.Module):
    def __init__(self, config: QwenVisionConfig, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.frames_per_patch * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)
        block = (config.hidden_size, config.num_heads, config.intermediate_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(config.num_layers))
        self.merger = PatchMerger(config, out_width, norm_joined=False)
        self.deepstack_mergers = nn.ModuleList(PatchMerger(config, out_width, norm_joined=True) for _ in config.deepstack)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (I, 3, h, w) in [-1, 1], h and w multiples of 2 patches -> (1 + deepstack, I, V, L): the tokens, then what is added behind the
        language model's first layers."""
        rows, columns = self.grid_of(pixel_values)
        x = self.embed(pixel_values)  # (I, T, D)
        rotary = self.rotary(rows, columns, x)
        deepstack: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, rotary=rotary)
            if index in self.config.deepstack:
                deepstack.append(self.deepstack_mergers[len(deepstack)](x))
        return torch.stack([self.merger(x), *deepstack])

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches in a column and in a row of pixel_values (..., h, w)."""
        return pixel_values.shape[-2] // self.config.patch_size, pixel_values.shape[-1] // self.config.patch_size

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, h, w) -> patches with their positions (I, T, D)."""
        return self.patch_embedding(patches_of(pixel_values, self.config)) + self.positions(*self.grid_of(pixel_values))

    def positions(self, rows: int, columns: int) -> Tensor:
        """(T, D): the learnt grid, interpolated bilinearly, corners aligned."""
        table, last = self.position_embedding.weight, self.config.grid - 1
        (top, bottom, down), (left, right, along) = (_between(count, last, table.device) for count in (rows, columns))
        down, along = down[:, None], along[None, :]
        corners = (
            (top, left, (1 - down) * (1 - along)),
            (top, right, (1 - down) * along),
            (bottom, left, down * (1 - along)),
            (bottom, right, down * along),
        )
        total = 0
        for row, column, weight in corners:
            index = row[:, None] * self.config.grid + column[None, :]  # (rows, columns)
            total = total + table[index] * weight.to(table.dtype)[..., None]  # (rows, columns, D)
        return self._in_patch_order(total, rows, columns)

    def rotary(self, rows: int, columns: int, like: Tensor) -> Rotary:
        """cos and sin (T, K) in `like`'s dtype: half of the frequencies turn with the row, half with the column."""
        config, device = self.config, like.device
        frequencies = rotary_frequencies(config.hidden_size // config.num_heads // 2, _ROTARY_THETA, device)  # (K/4,)
        row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        places = self._in_patch_order(torch.stack((row, column), dim=-1), rows, columns)  # (T, 2)
        return tables_of((places.float()[..., None] * frequencies).flatten(1), like.dtype)

    def _in_patch_order(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(rows, columns, n) -> (T, n)."""
        m = self.config.merge_size
        return x.reshape(rows // m, m, columns // m, m, -1).transpose(1, 2).flatten(0, 3)


def patches_of(pixel_values: Tensor, config: QwenVisionConfig) -> Tensor:
    """(I, 3, h, w) -> (I, T, 3 x frames x patch x patch), the picture repeated for each frame of a patch: the reference processor's pixel_values."""
    x = one_frame_patches(pixel_values, config).unsqueeze(3)  # (I, T, 3, 1, patch x patch)
    return x.expand(-1, -1, -1, config.frames_per_patch, -1).flatten(2)


def one_frame_patches(pixel_values: Tensor, config: QwenVisionConfig) -> Tensor:
    """(I, 3, h, w) -> (I, T, 3, patch x patch), in patch order."""
    m, p = config.merge_size, config.patch_size
    rows, columns = pixel_values.shape[-2] // p, pixel_values.shape[-1] // p
    x = pixel_values.reshape(-1, 3, rows // m, m, p, columns // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # (I, R/m, C/m, m, m, 3, p, p)
    return x.reshape(-1, rows * columns, 3, p * p)


def one_frame_weight(tower: QwenVisionTower) -> Tensor:
    """(D, 3 x patch x patch): as all frames of a patch are the same picture, the parts of the patch embedding's weight that read them are added."""
    weight = tower.patch_embedding.weight
    return weight.unflatten(1, (3, tower.config.frames_per_patch, -1)).float().sum(2).flatten(1).to(weight.dtype)


def _between(count: int, last: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`count` places evenly from 0 to `last`: the index below, the index above, and how far the place is from the one below, each (count,)."""
    place = torch.linspace(0, last, count, device=device)
    below = place.int()
    return below, (below + 1).clamp(max=last), place - below
