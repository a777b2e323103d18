"""How much faster than the reference's modules, on the same inputs, in one process.

    python benchmarks/bench_policy.py --model_path=DIR --rounds=20
    python benchmarks/bench_policy.py --size=full            # 2.4 billion random parameters, written to --out first
    python benchmarks/bench_policy.py --network=n1.7 --size=full

Two arms take turns, in an order drawn anew every round: gr00t_fast's engine, and `transformers` + lerobot's action head with the language head that
NVIDIA's inference also computes (benchmarks/lib/reference.py); of N1.7 lerobot 0.6's port (benchmarks/lib/reference_n1d7.py, which says what it
needs). Both get the same pixels, prompt, state, noise and dtype. Reported:
p50/p95/p99 of each arm and stage, the paired ratio, the difference of the actions, and the floor: per stage the larger of arithmetic and memory
traffic at the best rates that this machine showed in the same run. Nothing gets below it at that precision.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch

from benchmarks.lib import program
from benchmarks.lib.reference import reference_engine
from benchmarks.lib.work import measure_ceilings, stage_work
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.measurement import StageTimer, paired_ratio, percentiles
from gr00t_fast.engine import EXPORTED, PRECISIONS, check_engine, make_engine, open_engine, select_device, select_precision
from gr00t_fast.engine.manifest import target_of
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.config import ModelConfig, QwenVisionConfig, Siglip2VisionConfig, VisionConfig

# Tokens before the first picture, between two, and in all beside pictures ("Place the block in the bowl" with one picture: N1.5 288 ids, N1.6 137,
# N1.7 77); and height and width of a picture where the tower leaves that open: of 640x480, N1.7's padded.
_USUAL: dict[type, tuple[tuple[int, int, int], tuple[int, int] | None]] = {
    VisionConfig: ((14, 0, 32), None),
    Siglip2VisionConfig: ((26, 7, 29), (252, 336)),
    QwenVisionConfig: ((4, 2, 13), (256, 256)),
}


@dataclass
class Config(program.RandomFlags):
    size: Literal["tiny", "demo", "full"] = "demo"  # of the random checkpoint; full: the published sizes, 4.7 GB, of N1.6 6.6, of N1.7 6.3
    cameras: int = 1  # pictures of one observation
    rounds: int = 20  # turns of each arm
    warm_up: int = 2  # rounds before them that are not counted
    reference: bool = True  # time the reference modules too
    out: Path = Path("outputs/bench_policy")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    return program.finish("bench_policy", program.read_flags(Config, argv, __doc__), run, as_table)


def run(arguments: Config) -> dict[str, Any]:
    check_ranges(arguments, **dict.fromkeys(("rounds", "cameras", "denoising_steps"), (1, math.inf)))
    check_engine(arguments.engine, arguments.engine_path)
    path = program.checkpoint_of(arguments, arguments.size)
    ours, model, device, dtype = _load(path, arguments)
    inputs, noise = example_inputs(model.config, device, dtype, arguments.cameras, arguments.seed)
    reference = reference_engine(path, arguments.embodiment_tag, device, dtype) if arguments.reference else None
    steps = arguments.denoising_steps or model.config.head.denoising_steps
    int8, arithmetic = ours.precision == "int8" and device.type == "cpu", PRECISIONS.get(ours.precision, dtype)
    before = measure_ceilings(device, arithmetic, int8)
    times, busy, difference = interleave(ours, reference, inputs, noise, steps, arguments.rounds, arguments.warm_up, arguments.seed)
    ceilings = before.best(measure_ceilings(device, arithmetic, int8))  # twice: a machine that was busy once must not lower its own ceiling
    tokens, size = (inputs.input_ids.shape[1], inputs.image_positions.shape[0]), 1 if int8 else arithmetic.itemsize
    work = stage_work(model, *tokens, arguments.cameras, steps, itemsize=size)
    if "refine" not in times["ours"]:  # an export runs both in one graph
        work["language"] += work.pop("refine")
    floors = {stage: round(w.floor_ms(ceilings), 3) for stage, w in work.items()}
    return {
        **{"benchmark": "bench_policy", "weights": program.weights_of(arguments), "engine": ours.name, "device": str(device)},
        "precision": ours.precision or str(dtype).removeprefix("torch."),
        **{"denoising_steps": steps, "cameras": arguments.cameras, "rounds": arguments.rounds},
        "parameters": sum(p.numel() for p in model.parameters()),
        "times_ms": {arm: {stage: percentiles(values) for stage, values in stages.items()} for arm, stages in times.items()},
        "speed_up": paired_ratio(times["reference"]["total"], times["ours"]["total"]) if reference else None,
        # on a shared machine what was computed says more than how long it took; a GPU's work is not in it
        "speed_up_in_processor_time": paired_ratio(busy["reference"], busy["ours"]) if reference and device.type == "cpu" else None,
        "processor_ms": {arm: percentiles(values) for arm, values in busy.items()},
        "difference": difference,
        "floor_ms": {**floors, "total": round(sum(floors.values()), 3)},
        "total_over_floor": round(percentiles(times["ours"]["total"])["p50"] / sum(floors.values()), 2),
        "flop": {stage: w.flop for stage, w in work.items()},
        "ceilings": {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)},
        **program.provenance(arguments.seed),
    }


def interleave(ours, reference, inputs: ModelInputs, noise: torch.Tensor, steps: int, rounds: int, warm_up: int, seed: int):
    """Take turns; returns arm -> stage -> samples in ms, arm -> processor time of calls in ms, and how far the actions of the two are apart."""
    arms = {"ours": ours} if reference is None else {"ours": ours, "reference": reference}
    times: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    busy: dict[str, list[float]] = {arm: [] for arm in arms}
    results = {}
    for order, counted in program.shuffled_rounds(arms, rounds, warm_up, seed):
        for arm in order:
            timer, began_s = StageTimer(arms[arm].synchronise), time.process_time()
            results[arm] = arms[arm].run(inputs, noise, steps, timer)
            stages = timer.finish()
            busy[arm] += [1000 * (time.process_time() - began_s)] if counted else []
            for stage, value in stages.items() if counted else ():
                times[arm].setdefault(stage, []).append(value)
    return times, busy, _difference(results, noise)


def example_inputs(config: ModelConfig, device: torch.device, dtype: torch.dtype, cameras: int, seed: int) -> tuple[ModelInputs, torch.Tensor]:
    """One observation of random pixels, a prompt of the usual length and a state; and its noise. Never zeros: they can run faster."""
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision
    (before, between, text), size = _USUAL[type(vision)]
    height, width = size or (vision.image_size, vision.image_size)
    each = (height // vision.token_side) * (width // vision.token_side)
    positions = torch.cat([torch.arange(each) + before + camera * (each + between) for camera in range(cameras)])
    length = len(positions) + (cameras - 1) * between + text
    ids = torch.randint(0, min(1000, config.language.vocab_size - 1), (1, length), generator=generator)
    ids[ids == config.language.image_token_id] = 0
    ids[0, positions] = config.language.image_token_id
    pixels = torch.rand(1, cameras, 3, height, width, generator=generator) * 2 - 1
    state = torch.rand(1, config.head.state_dim, generator=generator) * 2 - 1
    noise = torch.randn(1, config.head.action_horizon, config.head.action_dim, generator=generator)
    place = {"device": device, "dtype": dtype}
    inputs = ModelInputs(pixels.to(**place), ids.to(device), positions.to(device), state.to(**place))
    return inputs, noise.to(device)


def _load(path: Path, arguments: Config):
    """The engine, the network that it runs (without memory when it runs from exported files), and its device and dtype."""
    from gr00t_fast.checkpoint import load_model, open_checkpoint

    checkpoint = open_checkpoint(path)
    if arguments.engine in EXPORTED:
        target = target_of(checkpoint, arguments.embodiment_tag, arguments.data_config)
        trained = len(target.data_config.video_keys)
        if trained != arguments.cameras:
            raise ConfigError(f"--cameras={arguments.cameras}: the export is made for {trained}. Give both alike.")
        engine = open_engine(arguments.engine, arguments.engine_path, target, arguments.device, arguments.precision)
        with torch.device("meta"):
            return engine, Gr00t(checkpoint.config).to(engine.dtype), engine.device, engine.dtype
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    model = load_model(checkpoint, arguments.embodiment_tag, device, dtype)
    return make_engine(arguments.engine, model), model, device, dtype


def _difference(results: dict[str, torch.Tensor], noise: torch.Tensor) -> dict[str, float] | None:
    """Relative to the displacement (action - noise): the noise itself, equal in both, would flatter the figure."""
    if "reference" not in results:
        return None
    ours, theirs = (results[arm].double() for arm in ("ours", "reference"))
    gap = ours - theirs
    return {"max_abs": float(gap.abs().max()), "relative_to_displacement": float(gap.norm() / (theirs - noise.double()).norm())}


def as_table(result: dict[str, Any]) -> str:
    rows = []
    for arm, stages in result["times_ms"].items():
        for stage, p in stages.items():
            floor = result["floor_ms"].get(stage) if arm == "ours" else None
            rows.append((arm, stage, *(program.figure(p[name]) for name in ("p50", "p95", "p99")), program.figure(floor)))
    lines = [program.markdown_table(("arm", "stage", "p50 ms", "p95", "p99", "floor"), rows, 2), ""]
    if result["speed_up"]:
        lines.append("Speed-up over the reference modules, paired by round: {median}x (quartiles {p25} to {p75}).".format(**result["speed_up"]))
    if busy := result.get("speed_up_in_processor_time"):
        lines.append(f"The same of processor time, without what the machine did besides: {busy['median']}x ({busy['p25']} to {busy['p75']}).")
    return "\n".join([*lines, f"The total is {result['total_over_floor']}x the floor of this machine {result['ceilings']}."])


if __name__ == "__main__":
    sys.exit(main())
