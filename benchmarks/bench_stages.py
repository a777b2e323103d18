"""Where the time of one inference goes, and how far each stage is from what this machine could do.

    python benchmarks/bench_stages.py --model_path=DIR --device=cuda --engine=cuda_graph
    python benchmarks/bench_stages.py --size=full --device=cuda          # 2.4 billion random parameters, written to --out first

Per stage: time, FLOP, bytes of weights, floor (the larger of FLOP and bytes over ceilings measured in the same run) and their ratio. On a
GPU each stage is recorded as a CUDA graph of its own and timed with events, kernels are counted, and the time in which none runs is told.
Then the whole way, camera frame in host memory to actions in host memory: back to back, and at --hz with the idle gaps of a control loop,
with and without keeping the GPU warm, since an idle one lowers its clocks. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.program import checkpoint_of, finish, provenance, show_progress
from benchmarks.random_observations import random_observations
from benchmarks.stage_calls import kernels_of, recorded, stages_of, timed_ms
from benchmarks.work import Work, measure_ceilings, stage_work
from gr00t_fast.measurement import percentiles
from gr00t_fast.policy import Gr00tPolicy, load_policy

_RANDOM_FRAMES = 16  # different ones in turn


def main(argv: list[str] | None = None) -> int:
    return finish("bench_stages", _parser().parse_args(argv), run, as_table)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    policy = load_policy(
        checkpoint_of(arguments, arguments.size),
        embodiment_tag=arguments.embodiment_tag,
        data_config=arguments.data_config,
        denoising_steps=arguments.denoising_steps,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        processor_path=arguments.processor_path,
        seed=arguments.seed,
    )
    policy.warm_up()
    before = measure_ceilings(policy.device, policy.dtype)
    stages = measure_stages(policy, arguments)
    ceilings = before.best(measure_ceilings(policy.device, policy.dtype))
    observations = random_observations(policy, arguments.seed, _RANDOM_FRAMES)
    whole = {"back_to_back_ms": percentiles(back_to_back(policy, observations, arguments.calls))}
    if arguments.seconds > 0:
        whole |= at_rate(policy, observations, arguments)
    floors = {name: round(work.floor_ms(ceilings), 4) for name, work in stage_work_of(policy).items()}
    return {
        "benchmark": "bench_stages",
        "engine": policy.engine.name,
        "device": str(policy.device),
        "precision": str(policy.dtype).removeprefix("torch."),
        "denoising_steps": policy.denoising_steps,
        "cameras": len(policy.facts.resolutions),
        "parameters": sum(parameter.numel() for parameter in policy.engine.model.parameters()),
        "stages": {name: _with_floor(figures, floors.get(name)) for name, figures in stages.items()},
        "floor_ms": round(sum(floors.values()), 3),
        "ceilings": {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)},
        "whole": whole,
        "whole_over_floor": round(whole["back_to_back_ms"]["p50"] / sum(floors.values()), 2),
        "attention": policy.engine.attention.describe() if hasattr(policy.engine, "attention") else [],
        **provenance(arguments.seed),
    }


def measure_stages(policy: Gr00tPolicy, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> time, work and, on a GPU, kernels. Stages take turns, so that a disturbance hits all alike."""
    stages = stages_of(policy, policy.raw_inputs(random_observations(policy, arguments.seed, 1)[0]), arguments.seed)
    calls: Mapping[str, Callable[[], Any]] = {name: recorded(stage, policy) for name, stage in stages.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = arguments.rounds
    for number in range(arguments.warm_up + rounds):
        for name, call in calls.items():
            taken_ms = timed_ms(call, policy.device)
            if number >= arguments.warm_up:
                times[name].append(taken_ms)
        show_progress("round", number + 1, arguments.warm_up + rounds)
    work = stage_work_of(policy)
    found = {}
    for name, call in calls.items():
        figures: dict[str, Any] = {"time_ms": percentiles(times[name])}
        if name in work:
            figures |= {"flop": work[name].flop, "weight_bytes": work[name].weight_bytes}
        if policy.device.type == "cuda":
            figures |= kernels_of(call)
        found[name] = figures
    return found


def stage_work_of(policy: Gr00tPolicy) -> dict[str, Work]:
    raw = policy.raw_inputs(policy.example_observation())
    return stage_work(policy.engine.model, raw.input_ids.shape[1], len(raw.frames), policy.denoising_steps)


def _with_floor(figures: dict[str, Any], floor_ms: float | None) -> dict[str, Any]:
    if floor_ms is None:
        return figures
    return figures | {"floor_ms": floor_ms, "over_floor": round(figures["time_ms"]["p50"] / floor_ms, 2)}


# --- the whole way ----------------------------------------------------------------------------------------------------------------------


def back_to_back(policy: Gr00tPolicy, observations: list[dict[str, Any]], calls: int) -> list[float]:
    """ms of each call, without pauses."""
    times = []
    for number in range(calls):
        began_s = time.perf_counter()
        policy.get_action(observations[number % len(observations)])
        times.append(1000 * (time.perf_counter() - began_s))
        show_progress("call", number + 1, calls)
    return times


def at_rate(policy: Gr00tPolicy, observations: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """ms of each call when the machine idles until the next tick, as in a control loop; with a CUDA graph also with the GPU's clocks kept up."""
    found: dict[str, Any] = {"hz": arguments.hz, "with_idle_gaps_ms": percentiles(_paced(policy, observations, arguments.seconds, arguments.hz))}
    if arguments.warm_seconds > 0 and policy.device.type == "cuda" and hasattr(policy.engine, "kept_warm"):
        with policy.kept_warm() as warm:
            found["kept_warm_ms"] = percentiles(_paced(policy, observations, arguments.warm_seconds, arguments.hz))
            found["bursts"] = warm.bursts
    return found


def _paced(policy: Gr00tPolicy, observations: list[dict[str, Any]], seconds: float, hz: float) -> list[float]:
    ticks, began_s, times = round(seconds * hz), time.perf_counter(), []
    for tick in range(ticks):
        time.sleep(max(began_s + tick / hz - time.perf_counter(), 0))
        start_s = time.perf_counter()
        policy.get_action(observations[tick % len(observations)])
        times.append(1000 * (time.perf_counter() - start_s))
        show_progress("tick", tick + 1, ticks)
    return times


def as_table(result: dict[str, Any]) -> str:
    head = f"{'stage':<10} {'p50':>9} {'p95':>9} {'p99':>9} {'floor':>9} {'ratio':>6} {'GFLOP':>8} {'MB':>8} {'kernels':>8} {'idle ms':>8}"
    rows = [head]
    for name, s in result["stages"].items():
        t = s["time_ms"]
        rows.append(
            f"{name:<10} {t['p50']:>9.3f} {t['p95']:>9.3f} {t['p99']:>9.3f} {_cell(s.get('floor_ms'), 9, 3)} {_cell(s.get('over_floor'), 6, 2)} "
            f"{_cell(_scaled(s.get('flop'), 1e9), 8, 1)} {_cell(_scaled(s.get('weight_bytes'), 1e6), 8, 0)} {_cell(s.get('kernels'), 8, 0)} "
            f"{_cell(s.get('idle_ms'), 8, 3)}"
        )
    for name, p in result["whole"].items():
        if isinstance(p, dict):
            what = name.removesuffix("_ms").replace("_", " ")
            rows.append("whole, {}: p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} ms ({count} calls)".format(what, **p))
    rows += [_attention_row(choice) for choice in result["attention"]]
    rows.append(f"whole is {result['whole_over_floor']}x the floor {result['floor_ms']} ms of this machine {result['ceilings']}")
    return "\n".join(rows)


def _attention_row(choice: dict[str, Any]) -> str:
    tried = ", ".join(f"{name} {1000 * taken_ms:.1f}" for name, taken_ms in choice["times_ms"].items())
    mask = " masked" * choice["masked"] + " causal" * choice["causal"]
    return f"attention {choice['queries']} to {choice['keys']}{mask}: {choice['back_end']} (us: {tried})"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _cell(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:>{width}.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processor_path", help="tokenizer files, when the checkpoint has none")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each stage")
    parser.add_argument("--warm_up", type=int, default=3, help="rounds not counted")
    parser.add_argument("--calls", type=int, default=100, help="whole inferences back to back; a GPU deserves 1000")
    parser.add_argument("--seconds", type=float, default=0.0, help="length of the run with idle gaps; 0: none")
    parser.add_argument("--hz", type=float, default=30.0, help="inferences per second of the run with idle gaps")
    parser.add_argument("--warm_seconds", type=float, default=20.0, help="length of its repetition with the GPU's clocks kept up; 0: none")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_stages"), help="directory for JSON and table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
