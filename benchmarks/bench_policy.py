"""How much faster than the reference's modules, on the same inputs, in one process.

    python benchmarks/bench_policy.py --model_path=DIR --rounds=20
    python benchmarks/bench_policy.py --size=full            # 2.4 billion random parameters, written to --out first

Two arms take turns, order swapped every round: gr00t_fast's engine, and `transformers` + lerobot's action head with the language head that
NVIDIA's inference also computes (benchmarks/second_reference.py). Both get the same pixels, prompt, state, noise and dtype. Reported:
p50/p95/p99 of each arm and stage, the paired ratio, the difference of the actions, and the floor of the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.program import checkpoint_of, finish, provenance, show_progress
from benchmarks.work import measure_ceilings, stage_work
from gr00t_fast.config import ModelConfig
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import Target, check_engine, make_engine, open_engine, runs_from_files, select_device, select_precision
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import percentiles
from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.timing import StageTimer

_PROMPT_TOKENS_WITHOUT_IMAGES = 32  # "Place the block in the bowl" with one camera has 288 ids


def main(argv: list[str] | None = None) -> int:
    return finish("bench_policy", _parser().parse_args(argv), run, as_table, plot)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check_engine(arguments.engine, arguments.engine_path)
    path = checkpoint_of(arguments, arguments.size)
    ours, network, device, dtype = _load(path, arguments)
    inputs, noise = example_inputs(network.config, device, dtype, arguments.cameras, arguments.seed)
    reference = _load_reference(path, device, dtype) if arguments.reference else None
    steps = arguments.denoising_steps or network.config.head.denoising_steps
    before = measure_ceilings(device, dtype)
    times, difference = interleave(ours, reference, inputs, noise, steps, arguments.rounds, arguments.warm_up)
    ceilings = before.best(measure_ceilings(device, dtype))  # twice: a machine that was busy once must not lower its own ceiling
    work = stage_work(network, inputs.input_ids.shape[1], inputs.pixel_values.shape[1], steps)
    if "refine" not in times["ours"]:  # an export runs both in one graph
        work["language"] += work.pop("refine")
    floors = {stage: round(w.floor_ms(ceilings), 3) for stage, w in work.items()}
    return {
        "benchmark": "bench_policy",
        "engine": ours.name,
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "denoising_steps": steps,
        "cameras": arguments.cameras,
        "parameters": sum(p.numel() for p in network.parameters()),
        "rounds": arguments.rounds,
        "times_ms": {arm: {stage: percentiles(values) for stage, values in stages.items()} for arm, stages in times.items()},
        "speed_up": _speed_up(times) if reference else None,
        "difference": difference,
        "floor_ms": {**floors, "total": round(sum(floors.values()), 3)},
        "total_over_floor": round(percentiles(times["ours"]["total"])["p50"] / sum(floors.values()), 2),
        "flop": {stage: w.flop for stage, w in work.items()},
        "ceilings": {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)},
        **provenance(arguments.seed),
    }


def interleave(ours, reference, inputs: ModelInputs, noise: torch.Tensor, steps: int, rounds: int, warm_up: int):
    """Take turns; returns arm -> stage -> samples in ms, and how far the actions of the two are apart."""
    times: dict[str, dict[str, list[float]]] = {"ours": {}}
    arms = [("ours", lambda: _run_ours(ours, inputs, noise, steps))]
    if reference is not None:
        times["reference"] = {}
        arms.append(("reference", lambda: _run_reference(reference, inputs, noise, steps, ours.synchronise)))
    results = {}
    for number in range(warm_up + rounds):
        for arm, call in arms if number % 2 else reversed(arms):
            results[arm], stages = call()
            if number >= warm_up:
                for stage, value in stages.items():
                    times[arm].setdefault(stage, []).append(value)
        show_progress("round", number + 1, warm_up + rounds)
    return times, _difference(results, noise)


def _run_ours(engine, inputs: ModelInputs, noise: torch.Tensor, steps: int):
    timer = StageTimer(engine.synchronise)
    return engine.run(inputs, noise, steps, timer), timer.finish()


def _run_reference(reference, inputs: ModelInputs, noise: torch.Tensor, steps: int, synchronise):
    timer = StageTimer(synchronise)
    with timer.stage("vision"):
        tokens = reference.encode_vision(inputs.pixel_values.flatten(0, 1))
    with timer.stage("language"):
        features = reference.encode_language(inputs.input_ids, tokens)
    with timer.stage("refine+denoise"):  # the head does both in one call
        actions = reference.denoise(features, inputs.state, noise.to(features.dtype), steps)
    return actions, timer.finish()


def example_inputs(config: ModelConfig, device: torch.device, dtype: torch.dtype, cameras: int, seed: int) -> tuple[ModelInputs, torch.Tensor]:
    """One observation of random pixels, a prompt of the usual length and a state; and its noise. Never zeros: they can run faster."""
    generator = torch.Generator().manual_seed(seed)
    images, size = cameras * config.vision.tokens, config.vision.image_size
    ids = torch.randint(0, min(1000, config.language.vocab_size - 1), (1, images + _PROMPT_TOKENS_WITHOUT_IMAGES), generator=generator)
    ids[ids == config.language.image_token_id] = 0
    positions = torch.arange(14, 14 + images)
    ids[0, positions] = config.language.image_token_id
    pixels = torch.rand(1, cameras, 3, size, size, generator=generator) * 2 - 1
    state = torch.rand(1, config.head.state_dim, generator=generator) * 2 - 1
    noise = torch.randn(1, config.head.action_horizon, config.head.action_dim, generator=generator)
    place = {"device": device, "dtype": dtype}
    inputs = ModelInputs(pixels.to(**place), ids.to(device), positions.to(device), state.to(**place))
    return inputs, noise.to(device)


def _load(path: Path, arguments: argparse.Namespace):
    """The engine, the network that it runs (without memory when it runs from exported files), and its device and dtype."""
    from gr00t_fast.checkpoint import load_model, open_checkpoint

    checkpoint = open_checkpoint(path)
    if runs_from_files(arguments.engine):
        config = load_data_config(arguments.data_config)
        if len(config.video_keys) != arguments.cameras:
            raise ConfigError(
                f"--cameras={arguments.cameras}: the data config '{arguments.data_config}' reads {len(config.video_keys)}. Give both alike."
            )
        target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
        engine = open_engine(arguments.engine, arguments.engine_path, target, arguments.device, arguments.precision)
        with torch.device("meta"):
            return engine, Gr00tN1d5(checkpoint.config).to(engine.dtype), engine.device, engine.dtype
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    model = load_model(checkpoint, arguments.embodiment_tag, device, dtype)
    return make_engine(arguments.engine, model), model, device, dtype


def _load_reference(path: Path, device: torch.device, dtype: torch.dtype):
    from benchmarks.second_reference import SecondReference

    return SecondReference(path, dtype).to(device)


def _speed_up(times: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Reference over ours, paired by round: a disturbance of the machine hits both arms of a round alike."""
    ratios = [theirs / mine for mine, theirs in zip(times["ours"]["total"], times["reference"]["total"], strict=True)]
    low, high = np.percentile(ratios, [25, 75])
    best = min(times["reference"]["total"]) / min(times["ours"]["total"])
    return {"median": round(statistics.median(ratios), 3), "p25": round(float(low), 3), "p75": round(float(high), 3), "of_minima": round(best, 3)}


def _difference(results: dict[str, torch.Tensor], noise: torch.Tensor) -> dict[str, float] | None:
    """Relative to the displacement (action - noise): the noise itself, equal in both, would flatter the figure."""
    if "reference" not in results:
        return None
    ours, theirs = (results[arm].double() for arm in ("ours", "reference"))
    gap = ours - theirs
    return {"max_abs": float(gap.abs().max()), "relative_to_displacement": float(gap.norm() / (theirs - noise.double()).norm())}


def as_table(result: dict[str, Any]) -> str:
    rows = [f"{'arm':<10} {'stage':<16} {'p50':>10} {'p95':>10} {'p99':>10} {'floor':>10}  (ms)"]
    for arm, stages in result["times_ms"].items():
        for stage, p in stages.items():
            floor = result["floor_ms"].get(stage) if arm == "ours" else None
            rows.append(f"{arm:<10} {stage:<16} {p['p50']:>10.2f} {p['p95']:>10.2f} {p['p99']:>10.2f} {'' if floor is None else f'{floor:.2f}':>10}")
    if result["speed_up"]:
        rows.append("speed-up over the reference modules, paired by round: {median}x (quartiles {p25} to {p75})".format(**result["speed_up"]))
    rows.append(f"total is {result['total_over_floor']}x the floor of this machine {result['ceilings']}")
    return "\n".join(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    stages = ["vision", "language", "refine", "denoise", "refine+denoise"]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.7 * (1 + len(result["times_ms"]))))
    for arm, values in {**result["times_ms"], "floor": {s: {"p50": v} for s, v in result["floor_ms"].items()}}.items():
        left = 0.0
        for stage in (s for s in stages if s in values):
            axis.barh(arm, values[stage]["p50"], left=left, color=f"C{stages.index(stage)}", label=stage)
            left += values[stage]["p50"]
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), loc="best", fontsize=8)
    axis.set_xlabel("p50 (ms)")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--engine", default="auto", help="eager, or an export: onnxruntime and its like")
    parser.add_argument("--engine_path", type=Path, help="directory of the export; default: exports/<engine> in the checkpoint's directory")
    parser.add_argument("--data_config", default="so100", help="what the export was made for")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=2, help="rounds not counted")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True, help="time the reference modules too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_policy"), help="directory for the JSON and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
