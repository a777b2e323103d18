"""Which of the Triton kernels pay: each against what torch does in its place, and the engine made of them against the one that is not.

    python benchmarks/bench_kernels.py --device=cuda --size=full [--sweep] [--no-engines]
    python benchmarks/bench_kernels.py --device=cpu                     # equality at tiny shapes in Triton's interpreter; no times

Regime: a replayed CUDA graph, so that launches cost what they cost inside an inference; each call of a graph has inputs of its own, more than the
caches hold, because weights come from memory in an inference too. Contenders take turns, round by round: `triton`, `torch` (the same through torch,
as the plain model does it) and `compiled` (that through torch.compile). GB/s counts each input and output once, over the ceiling measured in the
same run. Then stages and whole inferences of --engine=triton and cuda_graph, in turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch

from benchmarks.program import checkpoint_of, finish, provenance, show_progress
from benchmarks.stage_calls import recorded, stages_of, timed_ms
from benchmarks.work import Ceilings, measure_ceilings
from gr00t_fast.config import ModelConfig
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.measurement import percentiles
from gr00t_fast.random_checkpoint import network_config

if TYPE_CHECKING:
    from benchmarks.kernel_pairs import Pair
    from gr00t_fast.engine.kernels.gemm import GemmConfig

_CALLS_BEFORE_RECORDING = 3  # libraries choose kernels in their first calls
_INPUTS_BYTES = 512 * 2**20  # of all input sets of one pair: several times the caches (60 MB on an H200, 72 on an RTX 4090)
_MOST_SETS = 64
# Of ||kernel - fp64|| / ||fp64||. Two roundings; attention's queries and a norm's sum are rounded before the end.
_LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_INTERPRETED_ERROR = 3e-2  # of bf16, which the interpreter cuts off instead of rounding it
ENGINES = ("triton", "cuda_graph")

Call = Callable[[], Any]


def main(argv: list[str] | None = None) -> int:
    return finish("bench_kernels", _parser().parse_args(argv), run, as_table)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = select_device(arguments.device)
    dtype, on_gpu = select_precision(arguments.precision, device), device.type == "cuda"
    _check_device(device)
    from benchmarks.kernel_pairs import Randoms, all_pairs

    config = ModelConfig.from_dicts(*network_config(arguments.size if on_gpu else "tiny", published_vocabulary=False))
    pairs = list(all_pairs(config, arguments.prompt_tokens if on_gpu else 37, Randoms(dtype, device, arguments.seed)))
    with torch.no_grad():
        errors = {pair.name: pair.error() for pair in pairs}
        _refuse_wrong(errors, _LARGEST_ERROR[dtype] if on_gpu or dtype != torch.bfloat16 else _INTERPRETED_ERROR)
        kernels = {name: {"error": float(f"{error:.2e}")} for name, error in errors.items()}
        ceilings = measure_ceilings(device, dtype) if on_gpu else None
        for number, pair in enumerate(pairs if on_gpu else []):
            kernels[pair.name] |= measure_pair(pair, ceilings, arguments)
            show_progress("kernel", number + 1, len(pairs))
    return {
        "benchmark": "bench_kernels",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "size": arguments.size if on_gpu else "tiny",
        "interpreted": not on_gpu,
        "kernels": kernels,
        "ceilings": None if ceilings is None else {"tflop_per_s": ceilings.flop_per_s / 1e12, "gb_per_s": ceilings.bytes_per_s / 1e9},
        "engines": measure_engines(arguments) if on_gpu and arguments.engines else None,
        **provenance(arguments.seed),
    }


def _check_device(device: torch.device) -> None:
    """Choose the interpreter for a CPU, before the kernels are imported."""
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"Triton kernels run on CUDA, and in an interpreter on the CPU; device is {device}. Use --device=cuda or --device=cpu.")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from gr00t_fast.engine.kernels.launch import INTERPRETED

    if (device.type == "cpu") != INTERPRETED:
        raise ConfigError(f"device is {device}, but TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}. It is for --device=cpu only: unset it.")


def _refuse_wrong(errors: Mapping[str, float], largest: float) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= largest}  # NaN is wrong
    if wrong:
        raise EngineError(f"expected at most {largest} of relative difference from fp64, got {wrong}. Do not use --engine=triton here.")


# --- kernels ------------------------------------------------------------------------------------------------------------------------------


def measure_pair(pair: Pair, ceilings: Ceilings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times in microseconds per call, and what they mean."""
    moved = pair.moved_bytes()
    sets = [pair.inputs() for _ in range(min(max(_INPUTS_BYTES // moved, 2), _MOST_SETS))]
    contenders = {"triton": pair.kernel, "torch": pair.twin}
    if arguments.compiled:
        torch.compiler.reset()
        contenders["compiled"] = torch.compile(pair.twin, fullgraph=True, dynamic=False)
    graphs = {name: graph_of(function, sets) for name, function in contenders.items()}
    times = in_turns(graphs, len(sets), arguments)
    p50 = {name: figures["p50"] for name, figures in times.items()}
    floor_us = 1e6 * max(moved / ceilings.bytes_per_s, pair.flop / ceilings.flop_per_s)
    found = {
        "time_us": times,
        "bytes": moved,
        "gb_per_s": round(moved / p50["triton"] / 1e3, 1),
        "of_ceiling": round(1e6 * moved / p50["triton"] / ceilings.bytes_per_s, 3),
        "floor_us": round(floor_us, 3),
        "times_as_fast": {name: round(p50[name] / p50["triton"], 3) for name in p50 if name != "triton"},
    }
    if arguments.sweep and pair.product is not None:
        found["sweep"] = sweep(pair, sets[0][0].dtype, sets[0][0].device, arguments)
    return found


def graph_of(function: Callable[..., Any], sets: list[tuple[torch.Tensor, ...]]) -> Call:
    """The replay of one call per set of inputs."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(_CALLS_BEFORE_RECORDING):
            function(*sets[number % len(sets)])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            function(*inputs)
    return graph.replay


def in_turns(calls: Mapping[str, Call], count: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Percentiles of microseconds; each call is `count` in one."""
    device, times = torch.device("cuda"), {name: [] for name in calls}
    for number in range(arguments.warm_up + arguments.rounds):
        for name, call in calls.items():
            taken_us = 1e3 * timed_ms(call, device) / count
            if number >= arguments.warm_up:
                times[name].append(taken_us)
    return {name: percentiles(taken) for name, taken in times.items()}


def sweep(pair: Pair, dtype: torch.dtype, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """The pair's matrix product alone with other tiles: the rule's choice, the best found, and microseconds of both."""
    from gr00t_fast.engine.kernels.gemm import choose_config, linear, linear_parts
    from gr00t_fast.engine.kernels.launch import processor_of, triton

    m, n, k, splits = pair.product
    function, chosen = linear_parts if splits else linear, choose_config(m, n, k, dtype, splits, processor_of(device))
    count = min(max(_INPUTS_BYTES // (n * k * dtype.itemsize), 2), _MOST_SETS)
    sets = [(torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)) for _ in range(count)]
    took_us = {}
    for config in {chosen, *_other_configs(chosen, k, splits, dtype, processor_of(device).shared_bytes)}:
        try:
            graph = graph_of(lambda x, w, config=config: function(x, w, config=config), sets)
        except triton.runtime.errors.OutOfResources:
            continue  # more registers or shared memory than there are: not a choice here
        took_us[config] = statistics.median(1e3 * timed_ms(graph, device) / count for _ in range(arguments.sweep_rounds))
    best = min(took_us, key=took_us.__getitem__)
    chosen_us = took_us.get(chosen)  # None: the rule itself asks for too much
    return {"chosen": vars(chosen), "chosen_us": chosen_us, "best": vars(best), "best_us": took_us[best], "tried": len(took_us)}


def _other_configs(chosen: GemmConfig, k: int, splits: bool, dtype: torch.dtype, shared_bytes: int) -> Iterator[GemmConfig]:
    for block_n, block_k, stages in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (3, 4, 5)):
        for parts in (1, 2, 3, 4, 6, 8) if splits else (1,):
            if (chosen.block_m + block_n) * block_k * stages * dtype.itemsize <= shared_bytes and k % (parts * block_k) == 0:
                yield dataclasses.replace(chosen, block_n=block_n, block_k=block_k, parts=parts, num_stages=stages)


# --- engines ------------------------------------------------------------------------------------------------------------------------------


def measure_engines(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name of stage -> engine -> ms; `whole`: camera frame in host memory to actions in host memory."""
    from benchmarks.random_observations import random_observations
    from gr00t_fast.policy import load_policy

    path, chosen = checkpoint_of(arguments, arguments.size), {"device": arguments.device, "precision": arguments.precision}
    policies = {name: load_policy(path, data_config=arguments.data_config, engine=name, seed=arguments.seed, **chosen) for name in ENGINES}
    seen = random_observations(next(iter(policies.values())), arguments.seed, 8)
    calls: dict[str, dict[str, Call]] = {}
    for engine, policy in policies.items():
        policy.warm_up()
        for stage, call in stages_of(policy, policy.raw_inputs(seen[0]), arguments.seed).items():
            calls.setdefault(stage, {})[engine] = recorded(call, policy)
    found = {stage: {name: _in_ms(figures) for name, figures in in_turns(each, 1, arguments).items()} for stage, each in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in policies}
    for number in range(arguments.warm_up + arguments.rounds):
        for name, policy in policies.items():
            began_s = time.perf_counter()
            policy.get_action(seen[number % len(seen)])
            if number >= arguments.warm_up:
                times[name].append(1e3 * (time.perf_counter() - began_s))
    found["whole"] = {name: percentiles(taken) for name, taken in times.items()}
    return found


def _in_ms(figures_us: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == "count" else round(value / 1e3, 4) for name, value in figures_us.items()}


# --- as a program -------------------------------------------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> str:
    if result["interpreted"]:
        rows = [f"{name:<42} relative difference from fp64 {figures['error']:.1e}" for name, figures in result["kernels"].items()]
        return "\n".join(
            [*rows, f"{len(rows)} kernels give in Triton's interpreter what torch gives ({result['precision']}, tiny shapes). No times."]
        )
    rows = [f"{'p50, us':<42} {'triton':>8} {'torch':>8} {'compiled':>8} {'floor':>8} {'MB':>7} {'GB/s':>7} {'of ceiling':>10} {'error':>8}"]
    for name, f in result["kernels"].items():
        p50 = {contender: figures["p50"] for contender, figures in f["time_us"].items()}
        cells = " ".join(f"{p50[contender]:>8.2f}" if contender in p50 else f"{'-':>8}" for contender in ("triton", "torch", "compiled"))
        rows.append(
            f"{name:<42} {cells} {f['floor_us']:>8.2f} {f['bytes'] / 1e6:>7.2f} {f['gb_per_s']:>7.0f} {f['of_ceiling']:>10.0%} {f['error']:>8.0e}"
        )
        if "sweep" in f:
            s = f["sweep"]
            chosen = "cannot run" if s["chosen_us"] is None else f"{s['chosen_us']:.2f} us"
            rows.append(f"    product alone: {chosen} as chosen; best of {s['tried']}: {s['best_us']:.2f} us with {s['best']}")
    for stage, engines in (result["engines"] or {}).items():
        rows.append(f"{stage:<10} " + ", ".join("{} p50 {p50:.3f} p99 {p99:.3f} ms".format(name, **figures) for name, figures in engines.items()))
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory for the engines; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="full", choices=("tiny", "demo", "full"), help="shapes of the kernels on a GPU, and that checkpoint's size")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prompt_tokens", type=int, default=288, help="of the shapes: one camera and a short instruction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each contender")
    parser.add_argument("--warm_up", type=int, default=5, help="rounds not counted")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True, help="also time torch.compile; seconds per kernel to compile"
    )
    parser.add_argument("--sweep", action="store_true", help="try other tiles for each matrix product; minutes")
    parser.add_argument("--sweep_rounds", type=int, default=10)
    parser.add_argument("--engines", action=argparse.BooleanOptionalAction, default=True, help="also compare whole engines")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_kernels"), help="directory for JSON and table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
