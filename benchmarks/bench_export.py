"""How much faster an exported engine is than the plain model and than the reference's modules, on the same inputs, in one process.

    python benchmarks/bench_export.py --model_path=DIR --engine=openvino --engine_path=exports/openvino --rounds=20 --threads=2

Arms take turns, in another order every round: `eager`, the plain model; `exported`, the engine; `exported_few`, the engine at --few_steps; and
`reference`, transformers + lerobot's action head with the language head that NVIDIA's inference also computes (benchmarks/second_reference.py).
All get the same pixels, prompt, state and noise; eager and reference run in --precision, the export in its own. Reported: p50/p95/p99 of wall time
and of processor time per arm and stage, ratios paired by round, how far the actions are apart, and the plain model's floor on this machine. On a
shared machine the ratio of processor times is the steadier one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.bench_policy import example_inputs
from benchmarks.program import finish, provenance
from benchmarks.work import measure_ceilings, stage_work
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import Target, make_engine, open_engine, select_device, select_precision
from gr00t_fast.engine.select import EXPORTED
from gr00t_fast.measurement import percentiles
from gr00t_fast.model import ModelInputs
from gr00t_fast.optional import require
from gr00t_fast.timing import StageTimer

RATIOS = (("eager", "exported"), ("reference", "exported"), ("reference", "exported_few"), ("reference", "eager"))


@dataclass(frozen=True)
class Arm:
    """One way to run; `call` takes a timer and returns normalised actions."""

    name: str
    steps: int
    call: Callable[[StageTimer], torch.Tensor]


def main(argv: list[str] | None = None) -> int:
    return finish("bench_export", parser().parse_args(argv), run, as_table, plot)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", type=Path, required=True)
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100")
    p.add_argument("--engine", choices=tuple(EXPORTED), default="openvino")
    p.add_argument("--engine_path", type=Path, help="directory of the export; default: <checkpoint>/exports/<engine>")
    p.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    p.add_argument("--few_steps", type=int, default=2, help="of the arm exported_few")
    p.add_argument("--device", default="cpu", help="of eager and reference")
    p.add_argument("--precision", default="auto", help="of eager and reference")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--warm_up", type=int, default=2, help="rounds not counted")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    p.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True, help="time the reference modules too")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("outputs/bench_export"), help="directory for the JSON and the plot")
    return p


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    checkpoint, config = open_checkpoint(arguments.model_path), load_data_config(arguments.data_config)
    target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
    exported = open_engine(arguments.engine, arguments.engine_path, target, "auto", "auto")  # first: what is stale is refused at once
    model = load_model(checkpoint, arguments.embodiment_tag, device, dtype)
    inputs, noise = example_inputs(model.config, device, dtype, len(config.video_keys), arguments.seed)
    steps = arguments.denoising_steps or checkpoint.config.head.denoising_steps
    reference = _load_reference(arguments.model_path, device, dtype) if arguments.reference else None
    arms = make_arms(make_engine("eager", model), exported, reference, inputs, noise, steps, arguments.few_steps)
    before = measure_ceilings(device, dtype)
    wall, cpu, actions = interleave(arms, arguments.rounds, arguments.warm_up)
    ceilings = before.best(measure_ceilings(device, dtype))
    floors = {stage: work.floor_ms(ceilings) for stage, work in stage_work(model, inputs.input_ids.shape[1], len(config.video_keys), steps).items()}
    return {
        "benchmark": "bench_export",
        "engine": arguments.engine,
        "quantisation": exported.manifest.quantisation,
        "arithmetic": getattr(exported, "arithmetic", exported.manifest.precision),
        "precision_of_eager_and_reference": str(dtype).removeprefix("torch."),
        "denoising_steps": {arm.name: arm.steps for arm in arms},
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "wall_ms": {arm: {stage: percentiles(values) for stage, values in stages.items()} for arm, stages in wall.items()},
        "cpu_ms": {arm: percentiles(values) for arm, values in cpu.items()},
        "ratios": _ratios({arm: stages["total"] for arm, stages in wall.items()}, cpu),
        "difference_from_eager": _differences(actions, noise),
        "floor_ms_of_eager": {**{stage: round(value, 3) for stage, value in floors.items()}, "total": round(sum(floors.values()), 3)},
        "ceilings": {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)},
        **provenance(arguments.seed),
    }


def make_arms(eager, exported, reference, inputs: ModelInputs, noise: torch.Tensor, steps: int, few: int) -> list[Arm]:
    place = {"device": exported.device, "dtype": exported.dtype}
    theirs = replace(
        inputs,
        pixel_values=inputs.pixel_values.to(**place),
        input_ids=inputs.input_ids.to(exported.device),
        image_positions=inputs.image_positions.to(exported.device),
        state=inputs.state.to(**place),
    )
    arms = [
        Arm("eager", steps, lambda timer: eager.run(inputs, noise, steps, timer)),
        Arm("exported", steps, lambda timer: exported.run(theirs, noise.to(exported.device), steps, timer)),
        Arm("exported_few", few, lambda timer: exported.run(theirs, noise.to(exported.device), few, timer)),
    ]
    if reference is not None:
        arms.append(Arm("reference", steps, lambda timer: _run_reference(reference, inputs, noise, steps, timer)))
    return arms


def interleave(arms: list[Arm], rounds: int, warm_up: int):
    """Take turns; returns arm -> stage -> wall ms, arm -> processor ms, and arm -> actions of the last round."""
    wall: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}
    cpu: dict[str, list[float]] = {arm.name: [] for arm in arms}
    actions = {}
    for number in range(warm_up + rounds):
        turn = number % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):
            timer, start_s = StageTimer(), time.process_time()
            actions[arm.name] = arm.call(timer)
            cpu_ms = (time.process_time() - start_s) * 1e3
            if number >= warm_up:
                cpu[arm.name].append(cpu_ms)
                for stage, value in timer.finish().items():
                    wall[arm.name].setdefault(stage, []).append(value)
        if sys.stderr.isatty():
            print(f"\rround {number + 1}/{warm_up + rounds}", end="", file=sys.stderr, flush=True)
    return wall, cpu, actions


def _run_reference(reference, inputs: ModelInputs, noise: torch.Tensor, steps: int, timer: StageTimer) -> torch.Tensor:
    with timer.stage("vision"):
        tokens = reference.encode_vision(inputs.pixel_values.flatten(0, 1))
    with timer.stage("language"):
        features = reference.encode_language(inputs.input_ids, tokens)
    with timer.stage("refine+denoise"):  # the head does both in one call
        return reference.denoise(features, inputs.state, noise.to(features.dtype), steps)


def _load_reference(path: Path, device: torch.device, dtype: torch.dtype):
    from benchmarks.second_reference import SecondReference

    return SecondReference(path, dtype).to(device)


def _ratios(wall: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times faster the second arm of each pair is, paired by round: a disturbance hits all arms of a round alike."""
    found = {}
    for slow, fast in RATIOS:
        if slow in wall and fast in wall:
            found[f"{fast} over {slow}"] = {name: _paired(times[slow], times[fast]) for name, times in (("wall", wall), ("cpu", cpu))}
    return found


def _paired(slow: list[float], fast: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, high = np.percentile(ratios, [25, 75])
    return {"median": round(statistics.median(ratios), 3), "p25": round(float(low), 3), "p75": round(float(high), 3)}


def _differences(actions: dict[str, torch.Tensor], noise: torch.Tensor) -> dict[str, dict[str, float]]:
    """Relative to the displacement (action - noise): the noise itself, equal in all, would flatter the figure."""
    truth = actions["eager"].double().cpu()
    moved = (truth - noise.double().cpu()).norm()
    gaps = {arm: got.double().cpu() - truth for arm, got in actions.items() if arm != "eager"}
    return {arm: {"max_abs": float(gap.abs().max()), "relative_to_displacement": float(gap.norm() / moved)} for arm, gap in gaps.items()}


def as_table(result: dict[str, Any]) -> str:
    rows = [f"{'arm':<13} {'stage':<16} {'p50':>9} {'p95':>9} {'p99':>9}  (wall ms)"]
    for arm, stages in result["wall_ms"].items():
        rows += [f"{arm:<13} {stage:<16} {p['p50']:>9.1f} {p['p95']:>9.1f} {p['p99']:>9.1f}" for stage, p in stages.items()]
        p = result["cpu_ms"][arm]
        rows.append(f"{arm:<13} {'processor time':<16} {p['p50']:>9.1f} {p['p95']:>9.1f} {p['p99']:>9.1f}")
    for name, ratios in result["ratios"].items():
        rows.append("{}: wall {median}x (quartiles {p25} to {p75})".format(name, **ratios["wall"]) + ", processor {median}x".format(**ratios["cpu"]))
    for arm, gap in result["difference_from_eager"].items():
        rows.append(f"{arm} differs from eager by {gap['relative_to_displacement']:.2%} of the displacement")
    rows.append(f"floor of eager on this machine {result['floor_ms_of_eager']['total']:.0f} ms {result['ceilings']}")
    return "\n".join(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    stages = ["vision", "language", "refine", "denoise", "refine+denoise"]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.7 * len(result["wall_ms"])))
    for arm, values in result["wall_ms"].items():
        left = 0.0
        for stage in (s for s in stages if s in values):
            axis.barh(f"{arm}, {result['denoising_steps'][arm]} steps", values[stage]["p50"], left=left, color=f"C{stages.index(stage)}", label=stage)
            left += values[stage]["p50"]
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), loc="best", fontsize=8)
    axis.set_xlabel("p50 (ms)")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
