"""From observations to what the network gets, by the policy's own transforms and without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.console import Progress
from gr00t_fast.dataset import MIN_FRAMES, draw, open_frames, read
from gr00t_fast.engine import Continuation, Engine, PolicyInputs
from gr00t_fast.engine.manifest import Target
from gr00t_fast.errors import EngineError
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import ModelInputs
from gr00t_fast.policy import Gr00tPolicy, load_policy

JointTargets = Callable[[np.ndarray], np.ndarray]  # normalised actions (1, H, A) -> float64 (1, rows, J) in joint units


@dataclass(frozen=True)
class Case:
    """One observation as the network gets it (fp32, batch of one), its noise (1, H, A), and what makes joint targets of the network's answer."""

    inputs: ModelInputs
    noise: Tensor
    joint_targets: JointTargets


class NoNetwork(Engine):
    """Stands where an engine does in a policy that only transforms."""

    name, device, dtype = "none", torch.device("cpu"), torch.float32

    def run(self, inputs: PolicyInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        raise EngineError("this policy was made by transforms_only: it has no network. Load one with load_policy.")


def transforms_only(model_path: str | Path, **options: Any) -> Gr00tPolicy:
    """A policy without a network: checks and transforms observations, reads no weights. Options as of `load_policy`."""
    return load_policy(model_path, engine=NoNetwork(), **options)


def network_inputs(policy: Gr00tPolicy, observation: dict[str, Any]) -> ModelInputs:
    """One unbatched observation as the network gets it, in fp32 on the CPU."""
    return policy.preprocess(observation).to(torch.device("cpu"), torch.float32)


def case_of(policy: Gr00tPolicy, observation: dict[str, Any], noise: np.ndarray) -> Case:
    """noise: fp32 (1, H, A)."""
    given, processor = policy.preprocess(observation), policy.processor
    state = given.raw_state  # kept alone: frames are large

    def joint_targets(actions: np.ndarray) -> np.ndarray:
        targets = processor.action(actions[:, : processor.embodiment.trained_horizon], state)
        return np.concatenate(list(targets.values()), axis=-1).astype(np.float64)

    return Case(given.to(torch.device("cpu"), torch.float32), torch.from_numpy(noise), joint_targets)


def collect_cases(
    target: Target,
    observations: str,
    *,
    frames: int,
    seed: int,
    noise_seed: int | tuple[int, ...],
    progress: Progress,
    camera_map: Mapping[str, str] | None = None,
    allow_few: bool = False,
    least: int = MIN_FRAMES,
    processor_path: str | Path | None = None,
    prompt_style: str = "plain",
    camera_size: tuple[int, int] | None = None,
) -> tuple[list[Case], dict[str, Any]]:
    """`frames` observations of the source `observations` (as `gr00t_fast.dataset.open_frames` takes it), each with noise of its own, and a
    description of them with their digest. `least`, `allow_few`: as for `gr00t_fast.dataset.draw`. camera_size: of synthetic frames, where the
    checkpoint does not say. Raises ConfigError for a source that does not fit."""
    options = {"data_config": target.data_config, "processor_path": processor_path, "prompt_style": prompt_style, "letterbox": target.letterbox}
    policy = transforms_only(target.checkpoint.path, embodiment_tag=target.embodiment_tag, **options)
    sizes = {camera: size or camera_size for camera, size in policy.metadata.resolutions.items()}
    opened = open_frames(observations, target.data_config, replace(policy.metadata, resolutions=sizes), camera_map)
    sample, generator, cases = draw(opened, frames, seed, allow_few, least), np.random.default_rng(noise_seed), []
    with progress.bar("observations", len(sample.indices)) as tick:
        for observation in read(opened, sample, policy.metadata):
            noise = generator.standard_normal((1, *policy.chunk_shape)).astype(np.float32)
            cases.append(case_of(policy, observation, noise))
            tick()
    return cases, {**sample.describe(), "digest": digest_of(cases)}


def digest_of(cases: Iterable[Case]) -> str:
    """SHA-256 of what the network was given: two calibrations with one digest saw the same observations and noise."""
    digest = hashlib.sha256()
    for case in cases:
        for tensor in (case.inputs.pixel_values, case.inputs.input_ids, case.inputs.state, case.noise):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
