"""From observations to what the network gets, by the policy's own transforms and without a network; and from its answers to errors in joint units.

Axis alphabet: n observations, H horizon, A padded action width, J joints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.console import progress_bar
from gr00t_fast.engine import Continuation, Engine, PolicyInputs
from gr00t_fast.engine.manifest import Target
from gr00t_fast.errors import EngineError
from gr00t_fast.inputs.dataset import MIN_FRAMES, draw, open_frames, read
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import ModelInputs
from gr00t_fast.policy import Gr00tPolicy, load_policy


@dataclass(frozen=True)
class Case:
    """One observation as the network gets it (fp32, batch of one), its noise (1, H, A), and what makes joint targets, float64 (1, rows that the
    robot gets, J) in joint units, of normalised actions (1, H, A)."""

    inputs: ModelInputs
    noise: Tensor
    joint_targets: Callable[[np.ndarray], np.ndarray]


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
    camera_map: Mapping[str, str] | None = None,
    allow_few: bool = False,
    least: int = MIN_FRAMES,
    processor_path: str | Path | None = None,
    prompt_style: str = "plain",
    camera_size: tuple[int, int] | None = None,
) -> tuple[list[Case], dict[str, Any]]:
    """`frames` observations of the source `observations` (as `gr00t_fast.inputs.dataset.open_frames` takes it), each with noise of its own, and a
    description of them with their digest. `least`, `allow_few`: as for `gr00t_fast.inputs.dataset.draw`. camera_size: of synthetic frames, where the
    checkpoint does not say. Raises ConfigError for a source that does not fit."""
    options = {"data_config": target.data_config, "processor_path": processor_path, "prompt_style": prompt_style, "letterbox": target.letterbox}
    policy = transforms_only(target.checkpoint.path, embodiment_tag=target.embodiment_tag, **options)
    sizes = {camera: size or camera_size for camera, size in policy.metadata.resolutions.items()}
    opened = open_frames(observations, target.data_config, replace(policy.metadata, resolutions=sizes), camera_map)
    sample, generator, cases = draw(opened, frames, seed, allow_few, least), np.random.default_rng(noise_seed), []
    with progress_bar("observations", len(sample.indices)) as tick:
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


# --- errors of actions


@dataclass(frozen=True)
class ActionError:
    """|difference| over all observations, times and joints, in joint units; and relative to the displacement (L2, normalised)."""

    p50: float
    p99: float
    largest: float
    rms: float
    displacement: float
    per_joint_p99: tuple[float, ...]

    def describe(self) -> dict[str, Any]:
        names = {"p50": self.p50, "p99": self.p99, "max": self.largest, "rms": self.rms}
        rounded = {name: round(value, 5) for name, value in names.items()}
        per_joint = [round(value, 5) for value in self.per_joint_p99]
        return {**rounded, "relative_to_displacement": round(self.displacement, 6), "p99_per_joint": per_joint}


def action_error(got: np.ndarray, truth: np.ndarray, cases: Sequence[Case]) -> ActionError:
    """Answers to `cases`, normalised, both (n, H, A). NaN and infinity in `got` give NaN figures, which no limit lets pass."""
    gap = np.abs(joints(got, cases) - joints(truth, cases))  # (n, rows, J)
    used = np.s_[:, : gap.shape[1], : gap.shape[2]]  # of the padded actions, only these move a joint
    noise = np.concatenate([case.noise.numpy() for case in cases])
    moved = np.linalg.norm((truth - noise)[used].astype(np.float64))
    relative = np.linalg.norm((got - truth)[used].astype(np.float64)) / max(moved, 1e-12)
    p50, p99 = np.percentile(gap, (50, 99))
    per_joint = tuple(float(value) for value in np.percentile(gap.reshape(-1, gap.shape[2]), 99, axis=0))
    return ActionError(float(p50), float(p99), float(gap.max()), float(np.sqrt((gap**2).mean())), float(relative), per_joint)


def joints(actions: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
    """Answers to `cases` (n, H, A), normalised -> float64 (n, rows that the robot gets, J) in joint units."""
    return np.concatenate([case.joint_targets(actions[index : index + 1]) for index, case in enumerate(cases)])
