"""An ONNX export to an 8-bit one for a runtime: calibrate, choose layers, write.

One calibration serves two runtimes: TensorRT and OpenVINO both read explicit Q/DQ (gr00t_fast/export/qdq.py). ONNX Runtime does not execute such
graphs in 8 bits; for it, activations are rounded with scales found at run time, which needs no calibration.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.engine.manifest import Manifest, describe_files
from gr00t_fast.engine.tables import TABLES_NAME, ExportTables
from gr00t_fast.export.action_error import ActionError
from gr00t_fast.export.layer_statistics import InputRecorder, InputStatistics, PlanReport, plan_inputs
from gr00t_fast.export.linear_layers import Graph, LinearLayer
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.qdq import LayerPlan
from gr00t_fast.export.quantised_files import write_stage
from gr00t_fast.export.sensitivity import NEGLIGIBLE, Group, Trials, Verdict, choose, spread
from gr00t_fast.export.stage_chain import REFERENCE, STAGES, OrtStage, StageChain, StageSample
from gr00t_fast.export.upcast import as_fp32
from gr00t_fast.measurement import versions
from gr00t_fast.transforms import ActionTransform

SCHEMES = ("int8", "fp8")
TARGETS = ("tensorrt", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """limit: p99 of the action error in joint units that layers are kept in 16 bit for; trial_samples: how many samples decide that, 0 for none."""

    scheme: str
    target: str
    denoising_steps: int
    limit: float = 1.0
    trial_samples: int = 8
    balance: bool = True
    seed: int = 0


@dataclass
class Outcome:
    """What was decided, for the report. `error`: of the actions with every chosen layer rounded (None: not measured)."""

    groups: list[Verdict] = field(default_factory=list)
    plans: dict[str, dict[str, LayerPlan]] = field(default_factory=dict)
    reports: dict[str, PlanReport] = field(default_factory=dict)
    error: ActionError | None = None
    trial_samples: int = 0

    def chosen(self, stage: str) -> dict[str, LayerPlan]:
        kept = {label for verdict in self.groups if verdict.kept and verdict.group.stage == stage for label in verdict.group.labels}
        return {label: plan for label, plan in self.plans[stage].items() if label not in kept}


def calibrate(
    source: Path, samples: Sequence[StageSample], settings: Settings, transform: ActionTransform, work: Path, progress: Progress
) -> Outcome:
    """Decide how to round each linear layer of the export `source`. `work` takes temporary files: 30 MB per full-size sample, and fp32 graphs."""
    tables = ExportTables(source, remedy="").steps(settings.denoising_steps)
    chain = StageChain(work / "outputs", samples, tables.tau.float().numpy(), tables.modulation.float().numpy())
    graphs = {stage: as_fp32(source / f"{stage}.onnx", work) for stage in STAGES}
    outcome, groups = Outcome(), []
    for stage in STAGES:
        layers = Graph(graphs[stage]).linear_layers()
        statistics = _record(chain, stage, graphs[stage], layers, settings, progress)
        outcome.plans[stage] = _plan(stage, graphs[stage], layers, statistics, settings, outcome.reports, progress)
        groups += _groups(stage, layers, statistics, settings.denoising_steps)
    groups = _with_shares(groups)
    if settings.trial_samples:
        few = chain.of(spread(samples, settings.trial_samples))
        trials = Trials(few, graphs, outcome.plans, settings.scheme, transform)
        outcome.trial_samples = len(few.samples)
        with progress.bar("sensitivity", sum(group.work >= NEGLIGIBLE for group in groups)) as tick:
            outcome.groups, outcome.error = choose(groups, trials, settings.limit, tick)
    else:
        outcome.groups = [Verdict(group, None, None if group.work >= NEGLIGIBLE else "negligible work") for group in groups]
    return outcome


def write_quantised_export(
    source: Path,
    manifest: Manifest,
    out: Path,
    outcome: Outcome | None,
    settings: Settings,
    calibration: Mapping[str, Any],
    command: str,
    flags: Sequence[str],
) -> Manifest:
    """Fill the directory `out` with files for `settings.target`, tables and manifest. `outcome` None: only ONNX Runtime's dynamic rounding.

    `flags`: as `Manifest.flags`.
    """
    stages = {}
    for stage in STAGES:
        plans = None if outcome is None else outcome.chosen(stage)
        stages[stage] = {**manifest.stages[stage], "file": write_stage(source / f"{stage}.onnx", out, plans, settings.scheme, settings.target)}
    shutil.copyfile(source / TABLES_NAME, out / TABLES_NAME)
    made = Manifest(
        kind="openvino" if settings.target == "openvino" else "onnx",
        precision=manifest.precision,
        identity=manifest.identity,
        shapes=manifest.shapes,
        denoising_steps=manifest.denoising_steps,
        stages=stages,
        files=describe_files(out),
        versions=versions(),
        command=command,
        program="quantise.py",
        flags=tuple(flags),
        quantisation={"format": settings.scheme, "runtime": settings.target, "calibration": dict(calibration)},
        details={**manifest.details, "made_from": manifest.command},
    )
    made.write(out)
    return made


def temporary_directory(out: Path) -> tempfile.TemporaryDirectory:
    """On the disk of the output: the system's own may be small, or memory."""
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}.calibration-")


def _record(
    chain: StageChain, stage: str, graph: Path, layers: list[LinearLayer], settings: Settings, progress: Progress
) -> dict[str, InputStatistics]:
    """Run the stage over all samples; statistics of what goes into its linear layers."""
    runs = len(chain.samples) * (chain.steps if stage == "denoise_step" else 1)
    recorder = InputRecorder(layers, runs, settings.seed)
    ort = OrtStage(Graph(graph), recorder.tensors)

    def infer(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = ort(feeds)
        recorder.see({**feeds, **outputs})
        return outputs

    with progress.bar(f"calibrating {stage}", len(chain.samples)) as tick:
        chain.run(stage, infer, REFERENCE, REFERENCE, tick)
    return recorder.statistics


def _plan(
    stage: str,
    path: Path,
    layers: list[LinearLayer],
    statistics: Mapping[str, InputStatistics],
    settings: Settings,
    reports: dict[str, PlanReport],
    progress: Progress,
) -> dict[str, LayerPlan]:
    graph, plans = Graph(path), {}
    with progress.bar(f"scales of {stage}", len(statistics)) as tick:
        for tensor, entry in statistics.items():
            sharing = [layer for layer in layers if layer.input == tensor]
            weights = {layer.label: graph.array(layer.weight) for layer in sharing}
            made, report = plan_inputs(entry, weights, settings.scheme, settings.balance)
            plans |= made
            reports |= {f"{stage} {label}": report for label in made}
            tick()
    return plans


def _groups(stage: str, layers: Iterable[LinearLayer], statistics: Mapping[str, InputStatistics], steps: int) -> list[Group]:
    labels: dict[str, list[str]] = {}
    work: dict[str, float] = {}
    for layer in layers:
        products = statistics[layer.input].rows_per_run * layer.shape[0] * layer.shape[1] * (steps if stage == "denoise_step" else 1)
        labels.setdefault(layer.kind, []).append(layer.label)
        work[layer.kind] = work.get(layer.kind, 0.0) + products
    return [Group(stage, kind, tuple(labels[kind]), work[kind]) for kind in labels]


def _with_shares(groups: list[Group]) -> list[Group]:
    total = sum(group.work for group in groups)
    return [Group(group.stage, group.kind, group.labels, group.work / total) for group in groups]
