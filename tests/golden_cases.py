"""The reference's recorded outputs, from the reduced copies in tests/golden/ or from the full recordings beside the checkout, in one form.

Axis alphabet: B batch (1), C cameras, V vision tokens, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden.reduce import KEPT_IMAGE_TOKENS, PROMPTS, ROW, STEPS, is_per_embodiment
from safetensors.torch import save_file
from torch import Tensor

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.model import Gr00t, ModelInputs

REDUCED_DIR = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One case and prompt style: what went into the reference, and what came out of each of its stages."""

    case: str
    style: str
    checkpoint: Path
    inputs: ModelInputs
    noise: Tensor
    vision_features: Tensor  # (C, some of V, D): `[:, ::vision_stride]` of what the network gives
    vision_stride: int
    rows: Tensor  # of the S prompt tokens, those that the two features below hold
    backbone_features: Tensor  # (1, rows, D)
    vl_features: Tensor  # (1, rows, D)
    arrays: Mapping[str, np.ndarray]  # `action_pred.N`, `action.<part>.N`, `in.state`, `state.<part>`, and what else the recording holds

    def action_pred(self, steps: int) -> Tensor:
        return torch.from_numpy(self.arrays[f"action_pred.{steps}"])


def reduced(case: str, directory: Path) -> Path:
    """Write the reduced checkpoint in the published format. Rows of other embodiments are NaN: reading one cannot go unseen."""
    with np.load(REDUCED_DIR / f"{case}.npz") as z:
        for name, file in (("config", "config.json"), ("eagle", "eagle2_hg_model/config.json"), ("metadata", "experiment_cfg/metadata.json")):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_text(str(z[name]))
        embodiments = json.loads(str(z["config"]))["action_head_cfg"].get("max_num_embodiments", 32)
        tensors = {}
        for key in (key for key in z if key.startswith("weights/")):
            name, tensor = key.removeprefix("weights/"), torch.from_numpy(z[key].view(np.int16)).view(torch.bfloat16)
            if is_per_embodiment(name):
                whole = torch.full((embodiments, *tensor.shape[1:]), torch.nan, dtype=torch.bfloat16)
                whole[ROW] = tensor[0]
                tensor = whole
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def load_case(case: str, style: str, checkpoint: Path, shared: Path | None) -> Golden:
    """From the full recording in `shared`, or from the reduced copy when `shared` is None."""
    return recorded(case, style, shared) if shared else _from_reduced(case, style, checkpoint)


def _from_reduced(case: str, style: str, checkpoint: Path) -> Golden:
    with np.load(REDUCED_DIR / f"{case}.npz") as z:
        arrays = {key: z[key] for key in z if "/" not in key} | {key.split("/", 1)[1]: z[key] for key in z if key.startswith(f"{style}/")}
    frames = torch.from_numpy(arrays["frames_224"]).permute(0, 3, 1, 2).float()  # (C, 3, 224, 224)
    pixels = (frames - 127.5) / 127.5  # equal to the recorded pixel_values, bit for bit
    ids = torch.from_numpy(arrays["ids"]).long()[None]
    return _golden(case, style, checkpoint, arrays, pixels, ids, torch.from_numpy(arrays["rows"]).long(), KEPT_IMAGE_TOKENS)


def recorded(case: str, style: str, shared: Path) -> Golden:
    directory = shared / "golden" / case
    with np.load(directory / PROMPTS[style]) as z, np.load(directory / "observation.npz") as observation:
        arrays = {**z, **observation}
    ids = torch.from_numpy(arrays["in.eagle_input_ids"])
    pixels = torch.from_numpy(arrays["in.eagle_pixel_values"])
    return _golden(case, style, directory / "checkpoint", arrays, pixels, ids, torch.arange(ids.shape[1]), 1)


def _golden(case: str, style: str, checkpoint: Path, arrays: dict, pixels: Tensor, ids: Tensor, rows: Tensor, stride: int) -> Golden:
    image_token = open_checkpoint(checkpoint).config.language.image_token_id
    state = torch.from_numpy(arrays["in.state"])[:, 0].float()  # (1, 64)
    inputs = ModelInputs(pixels[None], ids, torch.nonzero(ids[0] == image_token)[:, 0], state)
    features = (torch.from_numpy(arrays[key]) for key in ("vision_features", "backbone_features", "vl_features"))
    vision, backbone, vl = features
    return Golden(case, style, checkpoint, inputs, torch.from_numpy(arrays["noise"]), vision, stride, rows, backbone, vl, arrays)


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
