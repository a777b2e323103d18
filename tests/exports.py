"""Exports of small checkpoints for tests: what to make them for, and what the plain model gives for each stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import DATA_CONFIGS
from gr00t_fast.engine import Target
from gr00t_fast.export.graphs import graph_tables
from gr00t_fast.export.onnx import Options, export_onnx
from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.model.action_head import euler_step


def target_for(checkpoint: Path, data_config: str = "so100", tag: str = "new_embodiment") -> Target:
    return Target(open_checkpoint(checkpoint), tag, DATA_CONFIGS[data_config], data_config)


def make_export(checkpoint: Path, out: Path, data_config: str = "so100", precision: str = "fp32", text_tokens: int = 20, longest: int = 256) -> Path:
    target = target_for(checkpoint, data_config)
    usual = len(target.data_config.video_keys) * target.checkpoint.config.vision.tokens + text_tokens
    export_onnx(target, Options(out, precision, (3,), usual, longest), "made by a test")
    return out


@torch.inference_mode()
def stages_of(model: Gr00tN1d5, inputs: ModelInputs, noise: Tensor, steps: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Stage -> (inputs, outputs) of one observation, in the graphs' names and shapes, from the plain model; denoise_step is the last Euler step,
    where the actions differ most from the noise."""
    tokens = model.encode_vision(inputs.pixel_values)
    embeddings = model.language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, tokens)
    backbone = model.encode_language(inputs, tokens)
    vl = model.head.refine(backbone)
    condition, tables = model.head.condition(vl, inputs.state), model.head.step_tables(steps)
    keys, values = (torch.cat(parts) for parts in zip(*condition.cross, strict=True))

    def velocity(actions: Tensor, step: int) -> Tensor:
        return model.head.velocity(actions, condition, tables.tau[step], tables.modulation[step])

    actions = noise
    for step in range(steps - 1):
        actions = euler_step(actions, velocity(actions, step), 1 / steps)
    graph_side = graph_tables(model, steps)
    of_step = {"tau": graph_side.tau[-1], "modulation": graph_side.modulation[-1], "step_size": torch.tensor([1 / steps], dtype=noise.dtype)}
    return {
        "vision": ({"pixel_values": inputs.pixel_values}, {"tokens": tokens}),
        "language": ({"embeddings": embeddings}, {"backbone_features": backbone, "vl_features": vl, "keys": keys, "values": values}),
        "denoise_step": (
            {"actions": actions, "state": inputs.state, "keys": keys, "values": values, **of_step},
            {"next_actions": euler_step(actions, velocity(actions, steps - 1), 1 / steps)},
        ),
    }
