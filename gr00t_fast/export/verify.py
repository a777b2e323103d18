"""An exported engine against the plain model in fp32, stage by stage and in the actions, on the same observations and noise.

First the plain model runs all observations and its outputs go to the disk, then it is freed and the engine is opened: at full size the two are not
in memory together. A stage is fed with the plain model's outputs of the stage before, so that its figure is its own; the actions are the engine's
from pixels to the end.
Axis alphabet: n observations, H horizon, A padded action width, J joints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import load_model
from gr00t_fast.console import Progress
from gr00t_fast.engine.exported import ExportedEngine
from gr00t_fast.engine.manifest import Target
from gr00t_fast.export.graphs import plain_outputs
from gr00t_fast.export.samples import Case
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import Gr00t, ModelInputs, StepTables

_FP32_STAGE_LIMIT = 1e-5  # relative L2: rounding of another order of operations, and no more
# p99 of |action error| in joint units that a format may cost: a repeated SO-100 pose is no better than half a degree
ACTION_LIMITS = {"fp32": 0.5, "fp16": 0.5, "bf16": 0.5, "int8": 1.5, "fp8": 1.5}


class ReferenceOutputs:
    """The plain model's outputs on the disk: some 35 MB per full-size observation."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def store(self, index: int, outputs: Mapping[str, Tensor]) -> None:
        for name, value in outputs.items():
            np.save(self._directory / f"{index}.{name}.npy", value.numpy())

    def load(self, index: int, name: str) -> Tensor:
        return torch.from_numpy(np.load(self._directory / f"{index}.{name}.npy"))


@dataclass(frozen=True)
class Verification:
    """stages: output -> relative L2 of each observation, `actions` being those of the last stage alone. chained: of the actions, pixels to end;
    denoise: of the last stage alone."""

    format: str
    stages: Mapping[str, Sequence[float]]
    chained: ActionError
    denoise: ActionError
    action_limit: float

    @property
    def failures(self) -> list[str]:
        found = []
        if not self.chained.p99 <= self.action_limit:  # not: NaN passes no limit
            found.append(f"actions: p99 {self.chained.p99:.3g}, limit {self.action_limit:g} joint units ({self.format})")
        if self.format == "fp32":
            for name, values in self.stages.items():
                if not max(values) <= _FP32_STAGE_LIMIT:
                    found.append(f"{name}: relative L2 {max(values):.3g}, limit {_FP32_STAGE_LIMIT:g}")
        return found

    def describe(self) -> dict[str, Any]:
        stages = {name: {"p50": _percentile(v, 50), "p99": _percentile(v, 99), "max": _percentile(v, 100)} for name, v in self.stages.items()}
        return {
            "format": self.format,
            "observations": len(next(iter(self.stages.values()))),
            "relative_l2": stages,
            "actions": self.chained.describe(),
            "actions_of_denoise_alone": self.denoise.describe(),
            "action_limit_p99": self.action_limit,
            "failures": self.failures,
            "passed": not self.failures,
        }


def record_reference(target: Target, cases: Sequence[Case], steps: int, files: ReferenceOutputs, progress: Progress) -> None:
    """Run the plain model in fp32 on the CPU over all cases. Needs the fp32 weights in memory, 8 GB at full size."""
    model = load_model(target.checkpoint, target.embodiment_tag, torch.device("cpu"), torch.float32)
    tables = model.head.step_tables(steps)
    with progress.bar("plain model, fp32", len(cases)) as tick, torch.inference_mode():
        for index, case in enumerate(cases):
            files.store(index, _plain_outputs(model, case, tables))
            tick()


def _plain_outputs(model: Gr00t, case: Case, tables: StepTables) -> dict[str, Tensor]:
    found, condition = plain_outputs(model, case.inputs)
    return {**found, "actions": model.head.denoise(case.noise, condition, tables)}


def compare(
    engine: ExportedEngine,
    embed: Callable[[Tensor], Tensor],
    cases: Sequence[Case],
    steps: int,
    files: ReferenceOutputs,
    limit: float | None,
    progress: Progress,
) -> Verification:
    """The engine over the same cases. `embed`: `ExportTables.embed` of the export. `limit`: p99 in joint units, None: that of the engine's format."""
    stages: dict[str, list[float]] = {}
    chained, alone = [], []
    with progress.bar(f"engine {engine.name}", len(cases)) as tick, torch.inference_mode():
        for index, case in enumerate(cases):
            inputs = case.inputs.to(engine.device, engine.dtype)
            chained.append(engine.run(inputs, case.noise.to(engine.device), steps, StageTimer(engine.synchronise)).float().cpu())
            for name, got in _stage_outputs(engine, embed, inputs, files, index).items():
                stages.setdefault(name, []).append(relative_l2(got, files.load(index, name)))
            alone.append(_denoise(engine, inputs, case.noise, steps, files, index))
            stages.setdefault("actions", []).append(relative_l2(alone[-1], files.load(index, "actions")))
            tick()
    truth = np.concatenate([files.load(index, "actions").numpy() for index in range(len(cases))])
    errors = [action_error(torch.cat(got).numpy(), truth, cases) for got in (chained, alone)]
    name = format_of(engine)
    return Verification(name, stages, *errors, ACTION_LIMITS[name] if limit is None else limit)


def _stage_outputs(
    engine: ExportedEngine, embed: Callable[[Tensor], Tensor], inputs: ModelInputs, files: ReferenceOutputs, index: int
) -> dict[str, Tensor]:
    """Vision's and language's outputs, each stage fed with the plain model's."""
    text = embed(inputs.input_ids[0].cpu()).to(engine.device)
    embeddings = text.index_copy(1, inputs.image_positions, files.load(index, "tokens").to(engine.device, engine.dtype))
    handed_on = {name: files.load(index, name).to(engine.device, engine.dtype) for name in engine.handed_on["vision"]}
    given = {"vision": {"pixel_values": inputs.pixel_values.contiguous()}, "language": {"embeddings": embeddings, **handed_on}}
    found: dict[str, Tensor] = {}
    for stage, tensors in given.items():
        wanted = tuple(engine.manifest.stages[stage]["outputs"])
        found |= zip(wanted, engine.runtime.run_stage(stage, tensors, wanted), strict=True)
    return found


def _denoise(engine: ExportedEngine, inputs: ModelInputs, noise: Tensor, steps: int, files: ReferenceOutputs, index: int) -> Tensor:
    """All steps with the plain model's keys and values: (1, H, A) fp32."""
    place = {"device": engine.device, "dtype": engine.dtype}
    fixed = {"state": inputs.state, **{name: files.load(index, name).to(**place) for name in engine.handed_on["language"]}}
    return engine.denoise(noise.to(**place), fixed, engine.tables(steps)).float().cpu()


def format_of(engine: ExportedEngine) -> str:
    """The coarsest number format that the engine computes in."""
    return engine.precision or engine.manifest.precision


def relative_l2(got: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((got.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30))


def _percentile(values: Sequence[float], q: float) -> float:
    return float(f"{np.percentile(values, q):.3e}")


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
        return {
            "p50": round(self.p50, 5),
            "p99": round(self.p99, 5),
            "max": round(self.largest, 5),
            "rms": round(self.rms, 5),
            "relative_to_displacement": round(self.displacement, 6),
            "p99_per_joint": [round(value, 5) for value in self.per_joint_p99],
        }


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
