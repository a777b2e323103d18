"""TensorRT engines on the GPU at hand: do they load, how far are their actions from the plain model's, and how long do they take beside a CUDA graph?

    python benchmarks/bench_tensorrt_run.py --model_path=DIR                                      # builds fp16 engines first
    python benchmarks/bench_tensorrt_run.py --model_path=DIR --engines fp16=exports/fp16 int8=exports/int8    # takes what is built

Arms: `cuda_graph` (bf16), and one per set of TensorRT engines, built here from graphs that are exported here (--build), or taken as they are
(--engines). First eager in fp32 answers --observations: the truth, with which every arm is compared in joint units. Then the arms take turns at
whole calls, camera frame in host memory to joint targets in host memory, in random order, after a warm-up each. Floor: the CUDA graph's own, of
benchmarks/bench_stages.py. A library that is not installed, or refuses this GPU, ends its arm with the library's own message in the result, and
not the benchmark. Without a CUDA GPU there is nothing to run: exit code 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch

from benchmarks.bench_engines import action_error, add_dataset_flags, ratios, take_turns, true_actions
from benchmarks.program import Result, checkpoint_of, finish, provenance
from gr00t_fast import tensorrt_library as library
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import Target
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.engine.select import PRECISIONS
from gr00t_fast.errors import ConfigError, Gr00tFastError
from gr00t_fast.export.tensorrt_build import BuildOptions, build_engines
from gr00t_fast.export.tensorrt_targets import rtx_capabilities
from gr00t_fast.export.to_onnx import Options, export_onnx
from gr00t_fast.export.verify import ACTION_LIMITS
from gr00t_fast.measurement import percentiles
from gr00t_fast.policy import Gr00tPolicy, load_policy

BASELINE = "cuda_graph"
_LONGEST_TEXT = 256  # tokens besides the pictures', of engines that are built here


def run(arguments: argparse.Namespace) -> Result:
    check(arguments)
    path = checkpoint_of(arguments, arguments.size)
    capability = library.gpu_capability()
    truth = true_actions(path, arguments)
    policies = {BASELINE: load(path, arguments, engine=BASELINE, device=arguments.device, precision="bf16")}
    arms: dict[str, dict[str, Any]] = {BASELINE: {"format": "bf16"}}
    taken = dict(word.split("=", 1) for word in arguments.engines)
    for name in (*taken, *(f"built_{precision}" for precision in arguments.build if not taken)):
        policy, arms[name] = open_arm(name, taken.get(name), path, policies[BASELINE], arguments)
        if policy is not None:
            policies[name] = policy
    for name, policy in policies.items():
        arms[name] |= measured_error(policy, truth, arms[name]["format"], arguments)
    steps = policies[BASELINE].denoising_steps
    times, _ = take_turns(policies, steps, arguments)
    return {
        "benchmark": "bench_tensorrt_run",
        "regime": "whole calls, batch 1, camera frame in host memory to joint targets in host memory",
        "protocol": f"{arguments.rounds} rounds, arms in random order; errors over {len(truth)} observations against eager fp32",
        "network": path.name,
        "capability": capability,
        "libraries": library.installed(),
        "denoising_steps": steps,
        "arms": arms,
        "times_ms": {name: percentiles(values) for name, values in times.items()},
        "times_as_fast_as_cuda_graph": ratios(times, BASELINE),
        **provenance(arguments.seed),
    }


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where nothing can be run."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"TensorRT engines run on NVIDIA GPUs, and torch {torch.__version__} sees none. Run this on the machine that has one; "
            "benchmarks/bench_tensorrt_build.py needs none."
        )
    for word in arguments.engines:
        name, equals, directory = word.partition("=")
        if not (name and equals and directory) or name == BASELINE:
            raise ConfigError(f"--engines {word}: expected NAME=DIRECTORY, e.g. fp16=exports/tensorrt.")


def open_arm(
    name: str, directory: str | None, path: Path, baseline: Gr00tPolicy, arguments: argparse.Namespace
) -> tuple[Gr00tPolicy | None, dict[str, Any]]:
    """The policy, or None and why not: a refusal is a finding."""
    began_s = time.perf_counter()
    arm: dict[str, Any] = {"format": name.removeprefix("built_")}
    try:
        engines = Path(directory) if directory else build(arm["format"], path, baseline, arguments)
        manifest = read_manifest(engines, "python export/to_tensorrt.py")
        arm["format"] = (manifest.quantisation or {}).get("format") or manifest.precision
        arm |= {key: manifest.details.get(key) for key in ("builder", "builder_version", "compute_capability")}
        arm["bytes"] = sum(entry["bytes"] for entry in manifest.files.values())
        arm["read_back_when_built"] = {stage: entry.get("build", {}).get("check") for stage, entry in manifest.stages.items()}
        opened_s = time.perf_counter()
        policy = load(path, arguments, engine="tensorrt", engine_path=engines, device=arguments.device)
        arm |= {"prepared_s": round(opened_s - began_s, 1), "opened_s": round(time.perf_counter() - opened_s, 1)}
        opened_s = time.perf_counter()
        policy.warm_up()
        return policy, arm | {"refused": None, "warm_up_s": round(time.perf_counter() - opened_s, 1)}
    except Gr00tFastError as error:
        return None, arm | {"refused": f"{type(error).__name__}: {error}"}


def build(precision: str, path: Path, baseline: Gr00tPolicy, arguments: argparse.Namespace) -> Path:
    """Graphs and engines in --out, for this GPU; what is up to date is taken. Raises Gr00tFastError."""
    builder, capability = choose_builder(arguments.builder)
    graphs, engines = (arguments.out / f"{kind}-{precision}" for kind in ("graphs", "engines"))
    if not (graphs / "manifest.json").is_file():
        target = Target(open_checkpoint(path), arguments.embodiment_tag, load_data_config(arguments.data_config), arguments.data_config)
        usual = baseline.raw_inputs(baseline.example_observation()).input_ids.shape[1]
        export_onnx(target, Options(graphs, precision, (), usual, _LONGEST_TEXT), "benchmarks/bench_tensorrt_run.py")
    build_engines(BuildOptions(graphs, engines, builder, capability), "benchmarks/bench_tensorrt_run.py")
    return engines


def choose_builder(name: str) -> tuple[str, str]:
    """Library and --compute_capability. `tensorrt_rtx` does not name data-centre GPUs of every generation: there, engines for any GPU are built, and
    the run says whether its runtime takes them. Raises MissingExtraError, ConfigError or EngineError."""
    here = library.gpu_capability()
    if name == "auto" and library.STANDARD in library.installed():
        known = rtx_capabilities(library.load(library.RTX)) if library.RTX in library.installed() else {}
        name = library.RTX if here in known else library.STANDARD
    chosen = library.choose(name)
    if chosen == library.RTX and here not in rtx_capabilities(library.load(chosen)):
        return chosen, "any"
    return chosen, "auto"


def measured_error(policy: Gr00tPolicy, truth: list, format: str, arguments: argparse.Namespace) -> dict[str, Any]:
    error, limit = action_error(policy, truth, arguments), ACTION_LIMITS.get(format, ACTION_LIMITS["fp16"])
    return {"error_deg": error, "limit_p99_deg": limit, "within_limit": bool(error["p99"] <= limit)}  # NaN is no pass


def load(path: Path, arguments: argparse.Namespace, **options: Any) -> Gr00tPolicy:
    common = {name: getattr(arguments, name) for name in ("embodiment_tag", "data_config", "processor_path", "seed")}
    return load_policy(path, **common, **options)


def as_table(result: Result) -> str:
    lines = ["| arm | format | p50, ms | p95 | p99 | times as fast as cuda_graph | error p99, joint units | |", "|---|---|--:|--:|--:|--:|--:|---|"]
    for name, arm in result["arms"].items():
        if arm.get("refused"):
            lines.append(f"| {name} | {arm['format']} | | | | | | refused: {' '.join(arm['refused'].split())} |")
            continue
        times, ratio = result["times_ms"][name], result["times_as_fast_as_cuda_graph"].get(name)
        faster = f"{ratio['median']:.2f} ({ratio['p25']:.2f} to {ratio['p75']:.2f})" if ratio else "1"
        verdict = "kept" if arm["within_limit"] else f"above {arm['limit_p99_deg']:g}"
        error = f"{arm['error_deg']['p99']:.3f}"
        lines.append(f"| {name} | {arm['format']} | {times['p50']:.2f} | {times['p95']:.2f} | {times['p99']:.2f} | {faster} | {error} | {verdict} |")
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 0.6 * len(result["times_ms"]) + 1.2))
    for row, (name, times) in enumerate(result["times_ms"].items()):
        axis.barh(row, times["p50"], xerr=[[0], [times["p99"] - times["p50"]]], capsize=3, label=name)
    axis.set_yticks(range(len(result["times_ms"])), list(result["times_ms"]))
    axis.set_xlabel("ms per call: p50, and up to p99")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    return finish("bench_tensorrt_run", _parser().parse_args(argv), run, as_table, plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--processor_path", help="tokenizer files, when the checkpoint has none")
    parser.add_argument(
        "--engines", nargs="+", default=[], metavar="NAME=DIR", help="engines of export/to_tensorrt.py, each with a name for the table"
    )
    parser.add_argument("--build", nargs="+", choices=tuple(PRECISIONS), default=["fp16"], help="what to build when no --engines are given")
    parser.add_argument("--builder", choices=("auto", *library.BUILDERS), default="auto")
    add_dataset_flags(parser)
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of each arm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/tensorrt_run"), help="directory for engines, the JSON, the table and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
