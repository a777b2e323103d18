"""Sizes of a network. What its checkpoint's files say of them is read by gr00t_fast.networks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP-2 tower and the one-layer connector behind it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    layer_norm_eps: float
    crop_scale: float = 0.95  # share of a frame's sides that is seen: NVIDIA's VideoCrop in every SO-100 data configuration

    @property
    def tokens(self) -> int:
        """Tokens per camera: one per patch (no pixel shuffle)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_side(self) -> int:
        """Pixels per side of what becomes one token."""
        return self.patch_size


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen3 decoder cut to its first `num_layers` layers."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    image_token_id: int
    final_norm: bool = True  # whether features are taken behind the final norm
    mrope_sections: tuple[int, int, int] | None = None  # frequencies for time, row and column; None: tokens have one position


@dataclass(frozen=True)
class QwenVisionConfig:
    """Qwen3-VL's tower, its merger and its deepstack mergers."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    frames_per_patch: int  # of a video; a picture is repeated as often
    merge_size: int  # patches per side that become one token
    grid: int  # learnt positions per side
    deepstack: tuple[int, ...]  # blocks whose output is given to the language model too
    layer_norm_eps: float = 1e-6
    image_size = None  # pictures of any size that is a multiple of `token_side`

    @property
    def token_side(self) -> int:
        """Pixels per side of what becomes one token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Siglip2VisionConfig:
    """SigLIP-2 tower for pictures of any size, and the two-layer connector behind it, which joins patches."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    grid: int  # learnt positions per side
    layer_norm_eps: float
    merge_size: int = 2  # patches per side that become one token
    image_size = None  # pictures of any size that is a multiple of `token_side`

    @property
    def token_side(self) -> int:
        """Pixels per side of what becomes one token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class TransformerConfig:
    """Width and depth of the diffusion transformer, or of the self-attention over vision-language tokens."""

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class ActionHeadConfig:
    """Flow-matching head: state and action encoders, diffusion transformer, action decoder."""

    action_dim: int
    state_dim: int
    action_horizon: int
    hidden_size: int  # inner width of the per-embodiment encoders and decoder
    future_tokens: int
    max_positions: int
    embodiments: int
    denoising_steps: int
    timestep_buckets: int
    output_dim: int
    use_vlln: bool
    dit: TransformerConfig
    vl_attention: TransformerConfig
    attend_text_every: int | None = None  # one in so many cross-attending blocks sees the text, the others the pictures; None: each sees all


AnyVisionConfig = VisionConfig | QwenVisionConfig | Siglip2VisionConfig


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a tensor's shape. The kind of `vision` tells the tower."""

    vision: AnyVisionConfig
    language: LanguageConfig
    head: ActionHeadConfig
