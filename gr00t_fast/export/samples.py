"""From observations to what the network gets, by the policy's own transforms and without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.tables import ExportTables
from gr00t_fast.export.observations import Frames, Sample, read
from gr00t_fast.export.stage_chain import StageSample
from gr00t_fast.export.verify import Case
from gr00t_fast.model import ModelInputs
from gr00t_fast.policy import Gr00tPolicy, load_policy
from gr00t_fast.timing import StageTimer


class RecordingEngine:
    """Keeps what it is given and answers with the noise."""

    name, continues = "recording", False
    device, dtype = torch.device("cpu"), torch.float32
    inputs: ModelInputs

    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        self.inputs = inputs
        return noise

    def synchronise(self) -> None:
        """Nothing runs apart."""


def transforms_only(model_path: str | Path, **options: Any) -> Gr00tPolicy:
    """A policy with a `RecordingEngine`: checks and transforms observations, reads no weights. Options as of `load_policy`."""
    return load_policy(model_path, engine=RecordingEngine(), **options)


def network_inputs(policy: Gr00tPolicy, observation: dict[str, Any]) -> ModelInputs:
    """One unbatched observation through the transforms of a `transforms_only` policy; fp32."""
    policy.get_action(observation)
    return policy.engine.inputs


def draw_noise(shapes: Mapping[str, Any], count: int, seed: int) -> np.ndarray:
    """(count, 1, H, A) fp32; `shapes` as in the manifest."""
    return np.random.default_rng(seed).standard_normal((count, 1, shapes["horizon"], shapes["action_dim"])).astype(np.float32)


def network_cases(policy: Gr00tPolicy, frames: Frames, sample: Sample, seed: int, tick: Callable[[], None] = lambda: None) -> list[Case]:
    """The chosen observations through the transforms of a `transforms_only` policy, each with noise of its own; `tick` is called after each."""
    horizon, action_dim = policy.chunk_shape
    noise, cases = draw_noise({"horizon": horizon, "action_dim": action_dim}, len(sample.indices), seed), []
    for observation, start in zip(read(frames, sample, policy.facts), noise, strict=True):
        cases.append(Case(network_inputs(policy, observation), torch.from_numpy(start)))
        tick()
    return cases


def stage_samples(policy: Gr00tPolicy, tables: ExportTables, observations: Iterable[dict[str, Any]], noise: np.ndarray) -> list[StageSample]:
    """Samples for the exported stages, one per observation and row of `noise` (n, 1, H, A)."""
    samples = []
    for number, (observation, start) in enumerate(zip(observations, noise, strict=True)):
        inputs = network_inputs(policy, observation)
        ids = inputs.input_ids[0]
        samples.append(
            StageSample(
                number=number,
                pixel_values=inputs.pixel_values.numpy(),
                text=tables.embed(ids).float().numpy(),
                image_positions=inputs.image_positions.numpy(),
                state=inputs.state.numpy(),
                noise=start,
            )
        )
    return samples
