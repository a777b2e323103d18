"""The recorded outputs of the reference's N1.5 code, and our own stages in the same shapes.

Axis alphabet: B batch (1), C cameras, V vision tokens, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.model import Gr00t, ModelInputs

CASES = {"so100": ("webcam",), "so100_dualcam": ("front", "wrist")}  # and their cameras
PROMPTS = {"plain": "expected.npz", "nvidia": "expected_list_prompt.npz"}
STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Golden:
    """One case and prompt style: what went into the reference, and what came out of each of its stages."""

    case: str
    style: str
    checkpoint: Path
    inputs: ModelInputs
    noise: Tensor
    vision_features: Tensor  # (C, V, D)
    backbone_features: Tensor  # (1, S, D)
    vl_features: Tensor  # (1, S, D)
    arrays: Mapping[str, np.ndarray]  # `action_pred.N`, `action.<part>.N`, `in.state`, `state.<part>`, and what else the recording holds

    def action_pred(self, steps: int) -> Tensor:
        return torch.from_numpy(self.arrays[f"action_pred.{steps}"])


def load_case(directory: Path, style: str) -> Golden:
    """Of a case's directory."""
    with np.load(directory / PROMPTS[style]) as z, np.load(directory / "observation.npz") as observation:
        arrays = {**z, **observation}
    ids, pixels = torch.from_numpy(arrays["in.eagle_input_ids"]), torch.from_numpy(arrays["in.eagle_pixel_values"])
    checkpoint = directory / "checkpoint"
    image_token = open_checkpoint(checkpoint).config.language.image_token_id
    state = torch.from_numpy(arrays["in.state"])[:, 0].float()  # (1, 64)
    inputs = ModelInputs(pixels[None], ids, torch.nonzero(ids[0] == image_token)[:, 0], state)
    vision, backbone, vl = (torch.from_numpy(arrays[key]) for key in ("vision_features", "backbone_features", "vl_features"))
    return Golden(directory.name, style, checkpoint, inputs, torch.from_numpy(arrays["noise"]), vision, backbone, vl, arrays)


@dataclass(frozen=True)
class Stages:
    """Our network's output of each stage, in the reference's shapes."""

    vision: Tensor  # (B * C, V, D)
    backbone: Tensor  # (B, S, D)
    vl: Tensor  # (B, S, D)
    actions: Mapping[int, Tensor]  # steps -> (B, H, A)


@torch.inference_mode()
def run_stages(model: Gr00t, inputs: ModelInputs, noise: Tensor, steps: tuple[int, ...] = STEPS) -> Stages:
    vision = model.encode_vision(inputs.pixel_values)
    backbone = model.encode_language(inputs, vision)
    vl = model.head.refine(backbone, inputs.key_mask)
    condition = model.head.condition(vl, inputs.state, inputs.key_mask)
    actions = {count: model.head.denoise(noise, condition, model.head.step_tables(count)) for count in steps}
    return Stages(vision.unflatten(1, (inputs.pixel_values.shape[1], -1)).flatten(0, 1), backbone, vl, actions)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, in float64. Shapes must be equal: nothing is broadcast or trimmed."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def matrix_library_is_regular(model: Gr00t) -> bool:
    """Whether a product's element has the same bits however rows and columns are grouped into calls, for the groupings in which we differ.

    Ours fuses projections and computes the last tokens only. Elsewhere than on x86 with AVX-512 the kernels' results were seen to depend even on
    where in memory an operand lies, so that the reference does not always equal itself.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    linear, generator = torch.nn.functional.linear, torch.Generator().manual_seed(0)
    out = model.head.dit.out
    x = torch.randn(1, 49, out.in_features, generator=generator)
    alike = [torch.equal(linear(x, out.weight)[:, -16:], linear(x[:, -16:].contiguous(), out.weight))]
    for name, module in model.named_modules():
        if name.endswith((".qkv", ".kv")):
            x = torch.randn(1, 49, module.in_features, generator=generator)
            parts = module.weight.split(_fused_rows(model.get_submodule(name.rpartition(".")[0]), module))
            alike.append(torch.equal(linear(x, module.weight), torch.cat([linear(x, part) for part in parts], dim=-1)))
    return all(alike)


def _fused_rows(attention: torch.nn.Module, fused: torch.nn.Linear) -> list[int]:
    if hasattr(attention, "q_width"):  # grouped-query attention
        return [attention.q_width, attention.kv_width, attention.kv_width]
    count = 3 if hasattr(attention, "qkv") else 2
    return [fused.out_features // count] * count
