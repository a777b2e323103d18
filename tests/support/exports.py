"""Exports of small checkpoints for tests: what to make them for, and what the plain model gives for each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_networks import random_inputs, random_inputs_n1d7
from torch import Tensor

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine import Target
from gr00t_fast.engine.manifest import target_of
from gr00t_fast.export import OnnxOptions, SampleOptions
from gr00t_fast.export.graphs import Layout, graph_tables, graphs_of, plain_outputs
from gr00t_fast.export.onnx import export_onnx, shapes_of
from gr00t_fast.export.verify import Case, collect_cases
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.action_head import euler_step
from gr00t_fast.model.config import ModelConfig, VisionConfig
from gr00t_fast.policy import Gr00tPolicy


class Made(NamedTuple):
    """A checkpoint and its export."""

    checkpoint: Path
    onnx: Path


FEW = ("--observations=random:0", "--frames=4", "--allow_few")


def target_for(checkpoint: Path, data_config: str | None = "so100", tag: str = "new_embodiment") -> Target:
    return target_of(open_checkpoint(checkpoint), tag, data_config)


def cases_of(checkpoint: Path, count: int = 3, source: str = "random:0") -> list[Case]:
    return collect_cases(target_for(checkpoint), SampleOptions(observations=source, frames=count, allow_few=True), noise_seed=0)[0]


def network_inputs(policy: Gr00tPolicy, observation: dict[str, Any]) -> ModelInputs:
    return policy.preprocess(observation).to(torch.device("cpu"), torch.float32)


def make_export(
    checkpoint: Path,
    out: Path,
    data_config: str | None = "so100",
    precision: str = "fp32",
    text_tokens: int = 20,
    longest: int = 256,
    tag: str = "new_embodiment",
) -> Path:
    target = target_for(checkpoint, data_config, tag)
    usual, _ = inputs_for(target.checkpoint.config, len(target.data_config.video_keys), text_tokens)
    options = OnnxOptions(out=out, precision=precision, denoising_steps=[3], max_text_tokens=longest)
    export_onnx(target, options, usual, "made by a test")
    return out


def inputs_for(config: ModelConfig, pictures: int = 1, text_tokens: int = 20, **options: int | tuple[int, int]) -> tuple[ModelInputs, Tensor]:
    """Random inputs and noise of any network."""
    if not isinstance(config.vision, VisionConfig):
        return random_inputs_n1d7(config, pictures=pictures, text_tokens=text_tokens, **options)
    return random_inputs(config, cameras=pictures, text_tokens=text_tokens, **options)


def layout_of(config: ModelConfig, inputs: ModelInputs, longest: int = 96) -> Layout:
    """Of an export for prompts like that of `inputs`."""
    return Layout.of(shapes_of(config, inputs, longest), config)


@torch.inference_mode()
def stages_of(model: Gr00t, inputs: ModelInputs, noise: Tensor, steps: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Stage -> (inputs, outputs) of one observation, in the graphs' names and shapes, from the plain model; denoise_step is the last Euler step,
    where the actions differ most from the noise."""
    known, condition = plain_outputs(model, inputs)
    known |= {"pixel_values": inputs.pixel_values, "state": inputs.state}
    known["embeddings"] = model.language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, known["tokens"])
    tables, graph_side = model.head.step_tables(steps), graph_tables(model, steps)
    known |= {"tau": graph_side.tau[-1], "modulation": graph_side.modulation[-1], "step_size": torch.tensor([1 / steps], dtype=noise.dtype)}

    def velocity(actions: Tensor, step: int) -> Tensor:
        return model.head.velocity(actions, condition, tables.tau[step], tables.modulation[step])

    known["actions"] = noise
    for step in range(steps - 1):
        known["actions"] = euler_step(known["actions"], velocity(known["actions"], step), 1 / steps)
    known["next_actions"] = euler_step(known["actions"], velocity(known["actions"], steps - 1), 1 / steps)
    specs = graphs_of(model.config)
    return {name: ({key: known[key] for key in spec.inputs}, {key: known[key] for key in spec.outputs}) for name, spec in specs.items()}
