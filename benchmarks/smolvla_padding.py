"""SmolVLA at several camera resolutions: lerobot 0.4.4 brings every picture to one square (512x512 as published), whatever the camera gives.

So its number of tokens does not depend on the resolution; the aspect ratio decides how much of the square is padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.policy_zoo import JOINTS, Setting, build_smolvla, observation_of
from training.picture_size import Size

_PADDING = -1.0  # lerobot pads with 0 before it maps 0..1 to -1..1; real pixels are random here, so that none of their patches is all black


@dataclass(frozen=True)
class Seen:
    """What reached the vision tower at one resolution. `padded_share`: of its patches that hold padding only."""

    square: Size
    image_tokens: int  # per camera, after the connector
    padded_share: float


class SmolVlaAtResolutions:
    """One network; a resolution is only what the frames have. `setting.resolution` is not used."""

    def __init__(self, setting: Setting, sizes: list[Size], batch: int) -> None:
        generator = np.random.default_rng(setting.seed)
        self._setting, self._batch, self._arm = setting, batch, build_smolvla(setting)
        self._observations = {size: observation_of(replace(setting, resolution=size), generator) for size in sizes}
        self._update: Callable[[Size], float] | None = None

    @property
    def parameters(self) -> int:
        return self._arm.parameters

    @property
    def dtype(self) -> str:
        return self._arm.dtype

    def forward_ms(self, size: Size) -> float:
        """From uint8 frames and joints to the first action of a new chunk on the host."""
        self._arm.reset()
        began_s = time.perf_counter()
        self._arm.act(self._observations[size])
        return 1e3 * (time.perf_counter() - began_s)

    def look_inside(self, size: Size) -> Seen:
        """One forward with hooks at the vision tower's door and behind the connector."""
        vlm = self._arm.policy.model.vlm_with_expert.get_vlm_model()
        pixels: list[Tensor] = []
        tokens: list[int] = []
        hooks = [
            vlm.vision_model.register_forward_pre_hook(lambda _, args, named: pixels.append(named["pixel_values"]), with_kwargs=True),
            vlm.connector.register_forward_hook(lambda _, args, output: tokens.append(output.shape[1])),  # (B, V, D)
        ]
        self.forward_ms(size)
        for hook in hooks:
            hook.remove()
        height, width = pixels[0].shape[-2:]
        return Seen((width, height), tokens[0], padded_share(pixels[0], vlm.vision_model.config.patch_size))

    def training_s(self, size: Size) -> float:
        """updt_s of one step on random samples, by lerobot's own update_policy; the vision tower and the language model stay frozen."""
        if self._update is None:
            self._update = self._make_update()
        return self._update(size)

    def _make_update(self) -> Callable[[Size], float]:
        from accelerate import Accelerator  # with lerobot
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        policy, on_cpu = self._arm.policy, self._setting.device.type == "cpu"
        preset = policy.config.get_optimizer_preset()
        accelerator = Accelerator(cpu=on_cpu, step_scheduler_with_optimizer=False)
        wrapped, optimizer = accelerator.prepare(policy, preset.build(policy.get_optim_params()))

        def update(size: Size) -> float:
            tracker = MetricsTracker(self._batch, 1, 1, {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")})
            update_policy(tracker, wrapped, self._samples(size), optimizer, preset.grad_clip_norm, accelerator=accelerator)
            return tracker.metrics["update_s"].val

        return update

    def _samples(self, size: Size) -> dict[str, Tensor]:
        device, observation = self._setting.device, self._observations[size]
        batch: dict[str, Any] = {"observation.state": torch.randn(self._batch, JOINTS)}
        for name, frame in observation["frames"].items():
            pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
            batch[f"observation.images.{name}"] = pixels.expand(self._batch, -1, -1, -1)  # (B, 3, H, W)
        batch["action"] = torch.randn(self._batch, self._arm.actions_per_chunk, JOINTS)
        tokens = torch.randint(5, 200, (self._batch, 10))
        batch |= {"observation.language.tokens": tokens, "observation.language.attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
        return {key: value.to(device) for key, value in batch.items()}


def padded_share(pixels: Tensor, patch: int) -> float:
    """Of the patches of pixels (B, C, H, W) in -1..1, those that are padding all over."""
    rows = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, H/p, W/p, p, p)
    return (rows == _PADDING).all(-1).all(-1).all(1).float().mean().item()
