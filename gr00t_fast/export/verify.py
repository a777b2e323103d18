"""An exported engine against the plain model in fp32, stage by stage and in the actions, on the same observations and noise.

First the plain model runs all observations and its outputs go to the disk, some 35 MB for each at full size, then it is freed and the engine is
opened: the two are not in memory together. A stage is fed with the plain model's outputs of the stage before, so that its figure is its own; the
actions are the engine's from pixels to the end.
Axis alphabet: n observations, H horizon, A padded action width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import load_model
from gr00t_fast.console import progress_bar
from gr00t_fast.engine.exported import ExportedEngine
from gr00t_fast.engine.manifest import Target
from gr00t_fast.export.graphs import plain_outputs
from gr00t_fast.export.samples import ActionError, Case, action_error
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import ModelInputs

_FP32_STAGE_LIMIT = 1e-5  # relative L2: rounding of another order of operations, and no more
# p99 of |action error| in joint units that a format may cost: a repeated SO-100 pose is no better than half a degree
ACTION_LIMITS = {"fp32": 0.5, "fp16": 0.5, "bf16": 0.5, "int8": 1.5, "fp8": 1.5}
Outputs = Mapping[str, Tensor]  # of the plain model for one observation, by the graphs' names, fp32


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


def compare(
    engine: ExportedEngine,
    embed: Callable[[Tensor], Tensor],
    cases: Sequence[Case],
    steps: int,
    directory: Path,
    limit: float | None,
) -> dict[str, Any]:
    """The engine over the cases of `record_reference`: what `judged` says of it. `embed`: `ExportTables.embed` of the export. `limit`: p99 in joint
    units, None: that of the coarsest number format that the engine computes in."""
    stages: dict[str, list[float]] = {}
    truth, chained, alone = [], [], []
    with progress_bar(f"engine {engine.name}", len(cases)) as tick, torch.inference_mode():
        for index, case in enumerate(cases):
            inputs, plain = case.inputs.to(engine.device, engine.dtype), torch.load(directory / f"{index}.pt")
            got = engine.run(inputs, case.noise.to(engine.device), steps, StageTimer(engine.synchronise))
            outputs = _stage_outputs(engine, embed, inputs, case.noise, steps, plain)
            for name, value in outputs.items():
                stages.setdefault(name, []).append(relative_l2(value, plain[name]))
            for kept, actions in ((truth, plain["actions"]), (chained, got), (alone, outputs["actions"])):
                kept.append(actions.float().cpu().numpy())
            tick()
    errors = [action_error(np.concatenate(actions), np.concatenate(truth), cases) for actions in (chained, alone)]
    name = engine.precision or engine.manifest.precision
    return judged(name, stages, *errors, ACTION_LIMITS[name] if limit is None else limit)


def _stage_outputs(
    engine: ExportedEngine, embed: Callable[[Tensor], Tensor], inputs: ModelInputs, noise: Tensor, steps: int, plain: Outputs
) -> dict[str, Tensor]:
    """Outputs of vision and language, and the actions of all denoising steps (1, H, A); each stage is fed with the plain model's."""
    place = {"device": engine.device, "dtype": engine.dtype}

    def handed_on(stage: str) -> dict[str, Tensor]:
        return {name: plain[name].to(**place) for name in engine.handed_on[stage]}

    text = embed(inputs.input_ids[0].cpu()).to(engine.device)
    embeddings = text.index_copy(1, inputs.image_positions, plain["tokens"].to(**place))
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
