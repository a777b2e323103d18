"""Vision of N1.6: pictures of any size in, one token of the language model's width out for each square of 2 x 2 patches.

SigLIP-2 without its pooling head. The reference also permutes patches into windows and back, which changes nothing while attention is to the whole
picture. Axis alphabet: I pictures, T patches, V tokens, D width, L language width, p patch side, m patches per side of a token.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model.config import Siglip2VisionConfig
from gr00t_fast.model.layers import PreNormBlock

_CONNECTOR_EPS = 1e-5


class PatchConnector(nn.Module):
    """Joined patches to tokens: LayerNorm, Linear, GELU (erf), Linear."""

    def __init__(self, joined: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(joined, eps=_CONNECTOR_EPS)
        self.up = nn.Linear(joined, out_width)
        self.down = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x (I, V, m m D) -> (I, V, L)."""
        return self.down(F.gelu(self.up(self.norm(x))))


class Siglip2Tower(nn.Module):
    """Pictures attend to themselves only: they are the batch, also those of one observation."""

    def __init__(self, config: Siglip2VisionConfig, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)
        block = (config.hidden_size, config.num_heads, config.intermediate_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.connector = PatchConnector(config.hidden_size * config.merge_size**2, out_width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (I, 3, h, w) in [-1, 1], h and w multiples of m p -> tokens (I, V, L), row by row."""
        x = self.embed(pixel_values)  # (I, T, D)
        for block in self.blocks:
            x = block(x)
        return self.connector(joined_patches(self.norm(x), *self.grid_of(pixel_values), self.config.merge_size))

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches in a column and in a row of pixel_values (..., h, w)."""
        return pixel_values.shape[-2] // self.config.patch_size, pixel_values.shape[-1] // self.config.patch_size

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, h, w) -> patches with their positions (I, T, D)."""
        return self.patch_embedding(patches_of(pixel_values, self.config.patch_size)) + self.positions(*self.grid_of(pixel_values))

    def positions(self, rows: int, columns: int) -> Tensor:
        """(T, D): the learnt grid, interpolated bilinearly with antialias, corners not aligned. In fp32 whatever the dtype, then rounded once."""
        table = self.position_embedding.weight
        grid = table.float().reshape(1, self.config.grid, self.config.grid, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
        resized = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return resized[0].flatten(1).t().to(table.dtype)  # (T, D)


def patches_of(pixel_values: Tensor, p: int) -> Tensor:
    """(I, 3, h, w) -> (I, T, p p 3), row by row; channels come last in a patch."""
    rows, columns = pixel_values.shape[-2] // p, pixel_values.shape[-1] // p
    x = pixel_values.reshape(-1, 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)  # (I, R, C, p, p, 3)
    return x.reshape(-1, rows * columns, p * p * 3)


def joined_patches(x: Tensor, rows: int, columns: int, m: int) -> Tensor:
    """(I, T, D) -> (I, V, D m m): the patches of a square side by side, ordered (channel, row, column) as torch's pixel_unshuffle does."""
    x = x.reshape(-1, rows // m, m, columns // m, m, x.shape[-1]).permute(0, 1, 3, 5, 2, 4)  # (I, R/m, C/m, D, m, m)
    return x.reshape(x.shape[0], (rows // m) * (columns // m), -1)
