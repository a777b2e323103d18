"""Exported engines against the plain model in fp32: observations as the network gets them, errors of actions in joint units, and the verdict.

First the plain model runs all observations and its outputs go to the disk, some 35 MB for each at full size, then it is freed and the engine is
opened: the two are not in memory together. A stage is fed with the plain model's outputs of the stage before, so that its figure is its own; the
actions are the engine's from pixels to the end.
Axis alphabet: n observations, H horizon, A padded action width, J joints.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.errors import EngineError
from gr00t_fast.base.measurement import StageTimer, provenance
from gr00t_fast.checkpoint import load_model
from gr00t_fast.engine import Continuation, Engine, PolicyInputs, open_engine
from gr00t_fast.engine.exported import ExportedEngine, ExportTables
from gr00t_fast.engine.manifest import Target
from gr00t_fast.export import LEAST_VERIFIED, SYNTHETIC, SampleOptions, VerifyOptions
from gr00t_fast.export.graphs import plain_outputs
from gr00t_fast.export.report import verification_table, verification_verdict, written
from gr00t_fast.inputs.dataset import MIN_FRAMES, draw, open_frames, read
from gr00t_fast.model import ModelInputs
from gr00t_fast.policy import Gr00tPolicy, load_policy

_FP32_STAGE_LIMIT = 1e-5  # relative L2: rounding of another order of operations, and no more
# p99 of |action error| in joint units that a format may cost: a repeated SO-100 pose is no better than half a degree
ACTION_LIMITS = {"fp32": 0.5, "fp16": 0.5, "bf16": 0.5, "int8": 1.5, "fp8": 1.5}
Outputs = Mapping[str, Tensor]  # of the plain model for one observation, by the graphs' names, fp32


def verify(options: VerifyOptions) -> dict[str, Any]:
    """Check the data and the export, run the plain model, free it, run the engine; leave verify.json and verify.md, and return
    what the former says. Raises Gr00tFastError."""
    checkpoint, target = options.opened()
    directory = options.engine_path or checkpoint.path / "exports" / options.engine
    size = open_engine(options.engine, directory, target, options.device, options.precision).camera_size  # refused now rather than in ten minutes
    steps = options.denoising_steps or checkpoint.config.head.denoising_steps
    ExportTables(directory, target.command("to_onnx.py")).steps(steps)
    noise_seed = (options.seed, 1)  # not the noise of the calibration
    cases, source = collect_cases(target, options, noise_seed, LEAST_VERIFIED, size)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".reference-") as work:
        record_reference(target, cases, steps, Path(work))
        engine = open_engine(options.engine, directory, target, options.device, options.precision)
        judged = compare(engine, cases, steps, Path(work), options.limit)
    facts = {"program": "verify", "engine": options.engine, "device": str(engine.device), "denoising_steps": steps, "source": source}
    result = {**facts, **judged, **provenance(), "seed": options.seed}
    written(options.out, "verify", result, f"{verification_table(result)}\n\n{verification_verdict(result)}")
    return result


# --- observations


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
    options: SampleOptions,
    noise_seed: int | tuple[int, ...],
    least: int = MIN_FRAMES,
    camera_size: tuple[int, int] | None = None,
) -> tuple[list[Case], dict[str, Any]]:
    """Observations, each with noise of its own, and a description of them with their digest. least: as for `gr00t_fast.inputs.dataset.draw`.
    camera_size: of synthetic frames, where the checkpoint does not say. Raises ConfigError for a source that does not fit."""
    reading = {"data_config": target.data_config, "processor_path": options.processor_path, "prompt_style": options.prompt_style}
    policy = transforms_only(target.checkpoint.path, embodiment_tag=target.embodiment_tag, letterbox=target.checkpoint.letterbox, **reading)
    sizes = {camera: size or camera_size for camera, size in policy.metadata.resolutions.items()}
    source, metadata = options.observations or SYNTHETIC, replace(policy.metadata, resolutions=sizes)
    opened = open_frames(source, target.data_config, metadata, options.camera_map)
    sample, generator, cases = draw(opened, options.frames, options.seed, options.allow_few, least), np.random.default_rng(noise_seed), []
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
    moved = float(np.linalg.norm((truth - noise)[used].astype(np.float64)))
    relative = float(np.linalg.norm((got - truth)[used].astype(np.float64))) / max(moved, 1e-12)
    p50, p99 = np.percentile(gap, (50, 99)).tolist()  # type: ignore[misc]
    per_joint = tuple(float(value) for value in np.percentile(gap.reshape(-1, gap.shape[2]), 99, axis=0))
    return ActionError(p50, p99, float(gap.max()), float(np.sqrt((gap**2).mean())), relative, per_joint)  # type: ignore[has-type]


def joints(actions: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
    """Answers to `cases` (n, H, A), normalised -> float64 (n, rows that the robot gets, J) in joint units."""
    return np.concatenate([case.joint_targets(actions[index : index + 1]) for index, case in enumerate(cases)])


# --- engine and plain model


def record_reference(target: Target, cases: Sequence[Case], steps: int, directory: Path) -> None:
    """Run the plain model in fp32 on the CPU over all cases; `directory` gets a file of outputs for each. Needs the fp32 weights in memory, 8 GB at
    full size."""
    model = load_model(target.checkpoint, target.embodiment_tag, torch.device("cpu"), torch.float32)
    tables = model.head.step_tables(steps)
    with progress_bar("plain model, fp32", len(cases)) as tick, torch.inference_mode():
        for index, case in enumerate(cases):
            found, condition = plain_outputs(model, case.inputs)
            torch.save({**found, "actions": model.head.denoise(case.noise, condition, tables)}, directory / f"{index}.pt")
            tick()


def compare(engine: ExportedEngine, cases: Sequence[Case], steps: int, directory: Path, limit: float | None) -> dict[str, Any]:
    """The engine over the cases of `record_reference`: what `judged` says of it. `limit`: p99 in joint units, None: that of the coarsest number
    format that the engine computes in."""
    stages: dict[str, list[float]] = {}
    truth, chained, alone = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    with progress_bar(f"engine {engine.name}", len(cases)) as tick, torch.inference_mode():
        for index, case in enumerate(cases):
            inputs, plain = case.inputs.to(engine.device, engine.dtype), torch.load(directory / f"{index}.pt")
            got = engine.run(inputs, case.noise.to(engine.device), steps, StageTimer(engine.synchronise))
            outputs = _stage_outputs(engine, inputs, case.noise, steps, plain)
            for name, value in outputs.items():
                stages.setdefault(name, []).append(relative_l2(value, plain[name]))
            for kept, actions in ((truth, plain["actions"]), (chained, got), (alone, outputs["actions"])):
                kept.append(actions.float().cpu().numpy())
            tick()
    with torch.inference_mode():
        for size in engine.batch_sizes[1:]:
            stages[f"actions, {size} at once"] = _in_batches(engine, cases, chained, steps, size)
    whole, last = (action_error(np.concatenate(actions), np.concatenate(truth), cases) for actions in (chained, alone))
    name = engine.precision or engine.manifest.precision
    return judged(name, stages, whole, last, ACTION_LIMITS[name] if limit is None else limit)


def _in_batches(engine: ExportedEngine, cases: Sequence[Case], alone: Sequence[np.ndarray], steps: int, size: int) -> list[float]:
    """Relative L2 of each observation's actions, computed with others whose prompts are as long, from those that the engine answers to it alone."""
    groups: dict[int, list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(case.inputs.input_ids.shape[1], []).append(number)
    found = []
    for group in groups.values():
        for first in range(0, len(group), size):
            numbers = [group[place % len(group)] for place in range(first, first + size)]
            parts = [cases[number].inputs for number in numbers]
            pixels, ids, states = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixel_values", "input_ids", "state"))
            together = ModelInputs(pixels, ids, parts[0].image_positions, states).to(engine.device, engine.dtype)
            noise = torch.cat([cases[number].noise for number in numbers]).to(engine.device)
            actions = engine.run(together, noise, steps, StageTimer(engine.synchronise))
            found += [relative_l2(got, torch.from_numpy(alone[number][0])) for got, number in zip(actions, numbers, strict=True)]
    return found


def _stage_outputs(engine: ExportedEngine, inputs: ModelInputs, noise: Tensor, steps: int, plain: Outputs) -> dict[str, Tensor]:
    """Outputs of vision and language, and the actions of all denoising steps (1, H, A); each stage is fed with the plain model's."""
    place = {"device": engine.device, "dtype": engine.dtype}

    def handed_on(stage: str) -> dict[str, Tensor]:
        return {name: plain[name].to(**place) for name in engine.handed_on[stage]}

    embeddings = engine.embed([inputs.input_ids[0].cpu()], inputs.image_positions, plain["tokens"].to(**place))
    given = {"vision": {"pixel_values": inputs.pixel_values.contiguous()}, "language": {"embeddings": embeddings, **handed_on("vision")}}
    found: dict[str, Tensor] = {}
    for stage, tensors in given.items():
        wanted = tuple(engine.manifest.stages[stage]["outputs"])
        found |= zip(wanted, engine.runtime.run_stage(stage, tensors, wanted), strict=True)
    fixed = {"state": inputs.state, **handed_on("language")}
    return {**found, "actions": engine.denoise(noise.to(**place), fixed, engine.tables(steps))}


def judged(format: str, stages: Mapping[str, Sequence[float]], chained: ActionError, denoise: ActionError, limit: float) -> dict[str, Any]:
    """For verify.json. format: of numbers; stages: output -> relative L2 of each observation, `actions` being those of the last stage alone; chained:
    of the actions, pixels to end; denoise: of the last stage alone; limit: of p99, in joint units."""
    failures = []
    if not chained.p99 <= limit:  # not: NaN passes no limit
        failures.append(f"actions: p99 {chained.p99:.3g}, limit {limit:g} joint units ({format})")
    for name, values in stages.items():
        if format == "fp32" and not max(values) <= _FP32_STAGE_LIMIT:
            failures.append(f"{name}: relative L2 {max(values):.3g}, limit {_FP32_STAGE_LIMIT:g}")
    return {
        "format": format,
        "observations": len(next(iter(stages.values()))),
        "relative_l2": {name: _percentiles(values) for name, values in stages.items()},
        "actions": chained.describe(),
        "actions_of_denoise_alone": denoise.describe(),
        "action_limit_p99": limit,
        "failures": failures,
        "passed": not failures,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(f"{np.percentile(values, q):.3e}") for name, q in (("p50", 50), ("p99", 99), ("max", 100))}


def relative_l2(got: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((got.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30))
