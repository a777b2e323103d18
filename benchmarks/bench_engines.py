"""Every engine that can be used here against the plain one: how far its actions are off, how long it takes, what memory it wants, side by side.

    python benchmarks/bench_engines.py --model_path=checkpoints/so100-sim-reach
    python benchmarks/bench_engines.py --model_path=DIR --dataset=./my-lerobot-dataset                  # errors on what your arm saw
    python benchmarks/bench_engines.py --model_path=DIR --engines eager openvino=exports/openvino-int8  # these two; the export lies there
    python benchmarks/bench_engines.py --size=full --device=cuda --stages --rounds=1000                 # random weights, made on the GPU
    python benchmarks/bench_engines.py --kernels --engines none    # the Triton kernels one by one; without a GPU: TRITON_INTERPRET=1 in front

First eager in fp32 answers all observations: the truth. Then the engines answer the same observations with the same noise; last they take turns at
whole calls, camera frame to joint targets, in random order: ratios are paired by round. `cuda_graph+triton` is the CUDA graph over the Triton
kernels; `fp8` without a directory is calibrated here; `reference` is a second, independent implementation (transformers' towers and lerobot's action
head behind our pre-processing). An engine that cannot be used here gets a line that says why; one that was named ends the run. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.engine_arms import ARMS, REFERENCE, Actions, Bench, open_arms, seconds_of, word_of
from benchmarks.program import finish, provenance, show_progress
from benchmarks.random_observations import random_observations
from benchmarks.stage_calls import measure_kernels, measure_stages
from gr00t_fast.config import ModelConfig
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.graph import GraphEngine
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.verify import ACTION_LIMITS
from gr00t_fast.measurement import peak_rss_bytes, percentiles
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.random_checkpoint import network_config

NONE = "none"
# Where the plain model in the same precision is itself further from fp32 than the limit (a network with random weights amplifies rounding), an
# engine may be this much further than that.
_OF_EAGER = 1.5

Times = dict[str, list[float]]


def main(argv: list[str] | None = None) -> int:
    return finish("bench_engines", _parser().parse_args(argv), run, as_table)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    result: dict[str, Any] = {"benchmark": "bench_engines", "device": str(device), "precision": word_of(dtype)}
    if arguments.kernels:
        result["kernels"] = kernels(arguments, device, dtype)
    if arguments.engines != [NONE]:
        result |= compare(arguments, device, dtype)
    return result | provenance(arguments.seed)


def compare(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    bench = Bench(arguments, device, dtype)
    truth = bench.answers(bench.policy(EagerEngine(bench.network(torch.float32))))  # freed before the engines come
    arms, refused = open_arms(bench)
    for name, arm in arms.items():
        arm["error_deg"] = error_of(bench.answers(arm["policy"]), truth)
        show_progress("error", list(arms).index(name) + 1, len(arms))
    policies = {name: arm["policy"] for name, arm in arms.items()}
    steps = arguments.denoising_steps or [next(iter(policies.values())).denoising_steps]
    for count in steps:
        times, busy = take_turns(policies, count, arguments)
        for name, arm in arms.items():
            arm.setdefault("times_ms", {})[str(count)] = percentiles(times[name])
            ratios = {of: ratio(times, of, name) for of in ("eager", "cuda_graph", REFERENCE)}
            # on a shared machine what was computed says more than how long it took; a GPU's work is not in it
            ratios |= {"eager_in_processor_time": ratio(busy, "eager", name)} if device.type == "cpu" else {}
            arm.setdefault("times_as_fast_as", {})[str(count)] = ratios
    if arguments.at_hz:  # before the profiler of --stages comes: it slows down what comes after it
        for arm in arms.values():
            arm["at_hz_ms"] = percentiles(paced(arm["policy"], arguments))
    for arm in arms.values():
        if arguments.stages and isinstance(arm["policy"].engine, GraphEngine):
            arm |= measure_stages(arm["policy"], bench.observations[0], min(arguments.rounds, 100), arguments.seed)
    errors = {name: arm["error_deg"] for name, arm in arms.items()}
    return {
        "network": bench.path.name,
        "parameters": bench.parameters,
        "cameras": len(next(iter(policies.values())).facts.resolutions),
        "observations": len(truth),
        "of": Path(arguments.dataset).name if arguments.dataset else "random pictures and joints",
        "rounds": arguments.rounds,
        "at_hz": arguments.at_hz,
        "engines": {
            name: {key: value for key, value in arm.items() if key != "policy"} | {"within_limit": within_limit(errors, name, arm["limit"], dtype)}
            for name, arm in arms.items()
        },
        "refused": refused,
        "peak_rss_bytes": peak_rss_bytes(),
    }


# --- accuracy and time --------------------------------------------------------------------------------------------------------------------


def error_of(got: Sequence[Actions], truth: Sequence[Actions]) -> dict[str, float]:
    """|difference| over all observations, times and joints, in joint units: degrees, per cent for the gripper. NaN where an action is NaN."""
    gaps = np.concatenate([np.abs(mine[key] - theirs[key]).ravel() for mine, theirs in zip(got, truth, strict=True) for key in theirs])
    p50, p99 = np.percentile(gaps, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(gaps.max())}


def within_limit(errors: Mapping[str, dict[str, float]], name: str, format: str, dtype: torch.dtype) -> bool:
    """NaN is no pass."""
    limit = ACTION_LIMITS[format]
    if format == word_of(dtype) and "eager" in errors and errors["eager"]["p99"] > limit:
        limit = _OF_EAGER * errors["eager"]["p99"]
    return bool(errors[name]["p99"] <= limit)


def take_turns(policies: Mapping[str, Gr00tPolicy], steps: int, arguments: argparse.Namespace) -> tuple[Times, Times]:
    """ms of whole calls, by the clock and of processor time. Each round calls every engine once, in an order of its own: a disturbance hits all
    alike."""
    generator, names = np.random.default_rng(arguments.seed), list(policies)
    for policy in policies.values():
        policy.denoising_steps = steps
        policy.warm_up()
    observations = random_observations(policies[names[0]], arguments.seed, 8)
    times, busy = ({name: [] for name in names} for _ in range(2))
    for number in range(arguments.rounds):
        observation = observations[number % len(observations)]
        for name in generator.permutation(names):
            busy_s = time.process_time()
            times[name].append(1000 * seconds_of(partial(policies[name].get_action, observation)))
            busy[name].append(1000 * (time.process_time() - busy_s))
        show_progress("round", number + 1, arguments.rounds)
    return times, busy


def paced(policy: Gr00tPolicy, arguments: argparse.Namespace) -> list[float]:
    """ms of each call when the machine idles until the next tick, as in a control loop: an idle GPU lowers its clocks."""
    observations, times, began_s = random_observations(policy, arguments.seed, 8), [], time.perf_counter()
    for tick in range(round(arguments.at_hz * arguments.at_hz_seconds)):
        time.sleep(max(began_s + tick / arguments.at_hz - time.perf_counter(), 0))
        times.append(1000 * seconds_of(partial(policy.get_action, observations[tick % len(observations)])))
    return times


def ratio(times: Mapping[str, list[float]], of: str, name: str) -> dict[str, float] | None:
    """How many times as fast as `of` it is, paired by round: median and quartiles. None where `of` did not run."""
    if of not in times or of == name:
        return None
    paired = [theirs / max(mine, 1e-6) for mine, theirs in zip(times[name], times[of], strict=True)]
    low, high = np.percentile(paired, (25, 75))
    return {"median": round(statistics.median(paired), 3), "p25": round(float(low), 3), "p75": round(float(high), 3)}


# --- kernels ------------------------------------------------------------------------------------------------------------------------------


def kernels(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """On a GPU at the shapes of --size; elsewhere at tiny ones, in Triton's interpreter (TRITON_INTERPRET=1), for equality alone."""
    from gr00t_fast.engine.kernels.launch import INTERPRETED

    if (device.type == "cuda") == INTERPRETED:
        raise ConfigError(f"--kernels on {device}: put TRITON_INTERPRET=1 before the command on a CPU, and leave it out on a GPU.")
    from benchmarks.kernel_pairs import Randoms, all_pairs

    config = ModelConfig.from_dicts(*network_config("tiny" if INTERPRETED else arguments.size, published_vocabulary=False))
    pairs = all_pairs(config, 37 if INTERPRETED else 288, Randoms(dtype, device, arguments.seed), eight_bit=True)
    with torch.no_grad():
        return measure_kernels(pairs, device, dtype, min(arguments.rounds, 50))


# --- as a program -------------------------------------------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> str:
    rows = []
    for name, f in result.get("kernels", {}).items():
        cells = ", ".join(f"{each} {us:.2f}" for each, us in f["us"].items()) + f" us, floor {f['floor_us']:.2f}" if "us" in f else "interpreted"
        rows.append(f"{name:<54} error {f['error']:.0e}  {cells}")
    if "engines" not in result:
        return "\n".join(rows)
    rows += [f"{result['network']}, {result['precision']} on {result['device']}; errors in joint units over {result['observations']} observations of"]
    rows += [f"{result['of']}, against eager fp32", ""]
    rows += [f"{'engine':<18} {'steps':>5} {'p50 ms':>9} {'p95':>9} {'p99':>9} {'x eager':>8} {'error p99':>9} {'max':>9} {'MB':>7}  verdict"]
    for name, arm in result["engines"].items():
        for steps, t in arm["times_ms"].items():
            faster = arm["times_as_fast_as"][steps]["eager"]
            verdict = "within its limit" if arm["within_limit"] else "ERROR ABOVE ITS LIMIT: do not use it"
            e, of = arm["error_deg"], "-" if faster is None else f"{faster['median']:.2f}"
            cells = f"{t['p50']:>9.3f} {t['p95']:>9.3f} {t['p99']:>9.3f} {of:>8} {e['p99']:>9.4f} {e['max']:>9.4f} {arm['memory_bytes'] / 1e6:>7.0f}"
            rows.append(f"{name:<18} {steps:>5} {cells}  {arm['arithmetic']}, {verdict}")
        if arm.get("at_hz_ms"):
            rows.append(f"{'':<18} at {result['at_hz']:g} Hz, idle in between: p50 {arm['at_hz_ms']['p50']:.3f}, p99 {arm['at_hz_ms']['p99']:.3f} ms")
        rows += [_stage_row(stage, f) for stage, f in arm.get("stages", {}).items()]
        rows += [f"{'':<18} floor of all stages {arm['floor_ms']:.3f} ms {arm['ceilings']}"] if "stages" in arm else []
    rows += ["", *(f"{name} cannot be used here: {reason}" for name, reason in result["refused"].items()), _verdict(result)]
    return "\n".join(rows)


def _stage_row(stage: str, f: dict[str, Any]) -> str:
    kernels = f"{f['kernels']} kernels, idle {f['idle_ms']:.3f} ms" if "kernels" in f else ""
    floor = f"floor {f['floor_ms']:.3f} ms, {f['gflop']:.1f} GFLOP, {f['weight_mb']:.0f} MB" if "floor_ms" in f else ""
    return f"    {stage:<14} p50 {f['time_ms']['p50']:>9.3f} ms  {floor}  {kernels}".rstrip()


def _verdict(result: dict[str, Any]) -> str:
    able = {name: arm for name, arm in result["engines"].items() if arm["within_limit"] and name != REFERENCE}
    if not able:
        return "no engine keeps its limit on the error here"
    steps = next(iter(next(iter(able.values()))["times_ms"]))
    best = min(able, key=lambda name: able[name]["times_ms"][steps]["p50"])
    return f"fastest within its limit: {best}, {able[best]['times_ms'][steps]['p50']:.3f} ms at {steps} steps"


def _camera_map(text: str) -> dict[str, str]:
    import yaml  # a bare GPU machine has none, and needs none without this flag

    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'expected a mapping, e.g. "{{front: webcam}}", got {text}')
    return found


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", type=Path, help="checkpoint directory; without it random weights of --size (on a CPU written to --out)")
    p.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100")
    p.add_argument("--processor_path", help="tokenizer files, when the checkpoint has none")
    p.add_argument("--engines", nargs="+", default=[], metavar="NAME[=DIR]", help=f"default: all that work here, of {', '.join(ARMS)}; {NONE}: none")
    p.add_argument("--denoising_steps", type=int, nargs="+", help="step counts to time; default: the checkpoint's own")
    p.add_argument("--observations", type=int, default=100, help="for the error")
    p.add_argument("--dataset", help="a LeRobotDataset or recordings directory to take them from, instead of random pictures and joints")
    p.add_argument("--camera_map", type=_camera_map, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    p.add_argument("--calibration_frames", type=int, default=16, help="random ones, for fp8 without a calibration; they tell speed and little else")
    p.add_argument("--rounds", type=int, default=100, help="timed calls of each engine; a GPU deserves 1000")
    p.add_argument("--stages", action="store_true", help="also each stage against its floor, and on a GPU its kernels")
    p.add_argument("--kernels", action="store_true", help="also the Triton kernels, one by one")
    p.add_argument("--at_hz", type=float, default=0.0, help="also calls at this rate, idle in between as in a control loop; 0: none")
    p.add_argument("--at_hz_seconds", type=float, default=20.0)
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto", help="of the engines over the torch model and of the reference")
    p.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("outputs/bench_engines"), help="directory for JSON and table")
    return p


if __name__ == "__main__":
    sys.exit(main())
