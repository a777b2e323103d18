"""Everything that needs a GPU, in one command, on a machine where nothing can be installed: GPU tests, then the benchmarks.

    python -m benchmarks.gpu_check [--out DIR] [--size full] [--budget_s 470] [--only NAME,NAME]
    python -m benchmarks.gpu_check --only=second --out DIR           # what the first run has no time for: kernels one by one, 8 bits, TensorRT
    python -m benchmarks.gpu_check --device=cpu --size=tiny          # a rehearsal of the steps, which shows that they run and nothing else

Needs a Python with torch (CUDA), numpy, safetensors and opencv; this file itself uses the standard library only. What is missing is said
and not counted as passed. Leaves `result.json`, `result.txt` and one log per step in DIR. The table ends with what the project promises
(benchmarks/targets.py): a promise that is not kept is said, and does not change the exit code, which is about steps that broke.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.targets import verdicts

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_BUDGET_S = 470.0  # eight minutes in all; ten seconds to write and to stop
TESTS = "gpu tests"
_TESTS_LIMIT_S = 150.0  # so that tests that hang leave time for the rest
_LEAST_FOR_A_FILE_S = 20.0  # kept for each file of tests that is still to come
_TESTS_FIRST = ("test_gpu_graph.py", "test_gpu_kernels.py", "test_gpu.py")
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"  # degrees mean something on trained weights only


Checkpoint = Literal["one camera", "two cameras", "trained"]


@dataclass(frozen=True)
class Benchmark:
    """`checkpoint`: which one it measures. `rehearsal`: flags instead of `flags` where there is no GPU; None: it cannot run there. `needs_s`: not
    begun with less time left."""

    script: str
    flags: Sequence[str]
    rehearsal: Sequence[str] | None
    checkpoint: Checkpoint = "one camera"
    needs_s: float = 20.0
    takes_precision: bool = True


def _stages(engine: str, *flags: str, seconds: float = 0.0, checkpoint: Checkpoint = "one camera", needs_s: float = 20.0) -> Benchmark:
    long = ["--rounds=100", "--calls=1000", f"--engine={engine}", f"--seconds={seconds}", *flags]
    short = ["--rounds=2", "--calls=3", "--engine=eager", f"--seconds={min(seconds, 0.2)}", *flags]
    return Benchmark("benchmarks/bench_stages.py", long, short, checkpoint, needs_s + seconds)


def _engines(*flags: str, checkpoint: Checkpoint = "one camera", needs_s: float = 20.0) -> Benchmark:
    steps = [flag for flag in flags if "engines" not in flag and "skip" not in flag]
    short = ["--engines=eager", "--rounds=2", "--observations=2", *steps]
    return Benchmark("benchmarks/bench_engines.py", ["--rounds=50", *flags], short, checkpoint, needs_s)


_EIGHT_BIT = ("--beside", "eager", "cuda_graph", "--rounds=50")


def _eight_bit_full(format: str, *steps: str) -> Benchmark:
    return Benchmark("benchmarks/bench_eight_bit.py", (*_EIGHT_BIT, "--formats", format, "--denoising_steps", *steps), None, needs_s=90.0)


# What matters most first: the last ones may be cut by the budget. Engines apart: what breaks one says nothing of the other.
BENCHMARKS: dict[str, Benchmark] = {
    "engines_trained": _engines("--engines=eager,cuda_graph", checkpoint="trained"),
    "stages_graph": _stages("cuda_graph", "--warm_seconds=20", seconds=60.0, needs_s=40.0),
    "stages_graph_2_steps": _stages("cuda_graph", "--denoising_steps=2"),
    "stages_graph_2_cameras": _stages("cuda_graph", checkpoint="two cameras"),
    "engines_full": _engines("--skip=compiled,triton", "--denoising_steps", "4", "2", needs_s=40.0),
    "stages_triton": _stages("triton"),
    "stages_triton_2_steps": _stages("triton", "--denoising_steps=2"),
    "stages_triton_2_cameras": _stages("triton", checkpoint="two cameras"),
    "engines_trained_triton": _engines("--engines=eager,triton", checkpoint="trained"),
    "engines_full_triton": _engines("--engines=eager,triton"),
    "stages_compiled": _stages("compiled", needs_s=90.0),
    "engines_compiled": _engines("--engines=eager,compiled", needs_s=60.0),
    "bench_policy": Benchmark("benchmarks/bench_policy.py", [], ["--rounds=2", "--warm_up=1"]),
    "kernels": Benchmark("benchmarks/bench_kernels.py", ["--no-engines"], ["--no-engines"], needs_s=60.0),
    "eight_bit_trained": Benchmark("benchmarks/bench_eight_bit.py", (*_EIGHT_BIT, "--frames=64", "--trial_frames=8"), None, "trained", needs_s=90.0),
    "eight_bit_full_fp8": _eight_bit_full("fp8", "4", "2"),
    "eight_bit_full_int8": _eight_bit_full("int8", "4"),
    "tensorrt_run": Benchmark("benchmarks/bench_tensorrt_run.py", ["--rounds=100"], None, needs_s=90.0, takes_precision=False),
}
# A run has hardly time for these: `--only=second` gives them one of their own.
SECOND_RUN = ("kernels", "eight_bit_trained", "eight_bit_full_fp8", "eight_bit_full_int8", "tensorrt_run")
TAKES_REFERENCE = ("bench_policy",)
REFERENCE_PACKAGES = ("lerobot", "diffusers", "transformers")  # without them only our own engines are timed
NO_TESTS_COLLECTED = 5  # pytest's exit code


@dataclass
class Step:
    """One line of the table."""

    name: str
    outcome: Literal["passed", "failed", "not run"]
    seconds: float
    detail: str
    result: Any = None  # the benchmark's own last line, parsed


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    gpu = describe_gpu() if options.device == "cuda" else {"name": "no GPU: a rehearsal", "cuda": None}
    if gpu is None:
        print("error: this Python has no torch with a CUDA GPU. Run where it has one, or name another interpreter: make gpu-check PYTHON=...")
        return 1
    names = (TESTS, *BENCHMARKS)
    wanted = [name.strip() for name in options.only.split(",")] if options.only else list(names)
    if wanted == ["second"]:
        wanted = list(SECOND_RUN)
    if unknown := [name for name in wanted if name not in names]:
        print(f"error: --only names {', '.join(unknown)}. Expected some of: {', '.join(names)}.")
        return 2
    plan = Plan(wanted, options.device, options.size, options.out.resolve(), time.monotonic() + options.budget_s)
    plan.out.mkdir(parents=True, exist_ok=True)
    steps: list[Step] = []
    stopped = False
    try:
        for step in run_all(plan):
            steps.append(step)
    except KeyboardInterrupt:
        stopped = True
        print("\ninterrupted: what ran until now", flush=True)
    code = report(steps, {"gpu": gpu, "python": platform.python_version(), "packages": versions()}, plan.out)
    return 130 if stopped else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks on a bare machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check", help="directory for result.json, result.txt and logs")
    parser.add_argument("--size", default="full", help="random checkpoint to time, as in gr00t_fast.random_checkpoint")
    parser.add_argument("--budget_s", type=float, default=DEFAULT_BUDGET_S, help="seconds for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try the steps with few calls of the eager engine")
    parser.add_argument("--only", default="", help=f"comma-separated steps: {TESTS}, {', '.join(BENCHMARKS)}; `second`: {', '.join(SECOND_RUN)}")
    return parser


@dataclass(frozen=True)
class Plan:
    """What to run, on what, where results go (steps run in the repository's root), and until when (monotonic)."""

    wanted: Sequence[str]
    device: str
    size: str
    out: Path
    deadline: float
    packages: Mapping[str, bool] = field(default_factory=lambda: {name: importlib.util.find_spec(name) is not None for name in REFERENCE_PACKAGES})


def describe_gpu() -> dict[str, Any] | None:
    """Name, memory and versions, or None without a usable GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability, "cuda": torch.version.cuda}


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide about speed; None for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in ("torch", "triton", "transformers", "safetensors", "numpy", "lerobot"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def run_all(plan: Plan) -> Iterator[Step]:
    """Tests while the checkpoint is being written, which needs no GPU; then one benchmark at a time. The checkpoint is kept out of `out`: at full
    size it has 4.7 GB, and what is in `out` may be copied."""
    with tempfile.TemporaryDirectory(prefix="gr00t_fast_") as directory:
        random = Path(directory) / f"random-{plan.size}"
        checkpoints = {"one camera": random, "two cameras": random.with_name(f"{random.name}-2"), "trained": TRAINED}
        needed = {BENCHMARKS[name].checkpoint for name in plan.wanted if name in BENCHMARKS}
        writer = Writer(plan, checkpoints) if needed - {"trained"} else None
        try:
            if TESTS in plan.wanted:
                yield from run_tests(plan.out, min(plan.deadline, time.monotonic() + _TESTS_LIMIT_S))
            failed = writer.wait() if writer else None
        finally:
            if writer:
                writer.stop()
        if failed is not None:
            yield failed
            return
        for name in (name for name in BENCHMARKS if name in plan.wanted):
            left_s = plan.deadline - time.monotonic()
            if plan.device == "cpu" and BENCHMARKS[name].rehearsal is None:
                yield Step(name, "not run", 0.0, "needs a GPU")
            elif left_s < BENCHMARKS[name].needs_s and plan.device == "cuda":
                yield Step(name, "not run", 0.0, f"{left_s:.0f} s of --budget_s are left; it needs {BENCHMARKS[name].needs_s:.0f}")
            else:
                yield run_benchmark(name, command_of(name, plan, checkpoints), plan.out, plan.deadline)
    missing = [name for name, is_there in plan.packages.items() if not is_there]
    if missing:
        yield Step("reference", "not run", 0.0, f"not installed: {', '.join(missing)}")


def command_of(name: str, plan: Plan, checkpoints: Mapping[str, Path]) -> list[str]:
    """Script and flags of a benchmark."""
    benchmark = BENCHMARKS[name]
    flags = benchmark.flags if plan.device == "cuda" else benchmark.rehearsal
    data_config = ["--data_config=so100_dualcam"] if benchmark.checkpoint == "two cameras" else []
    no_reference = ["--no-reference"] if name in TAKES_REFERENCE and not all(plan.packages.values()) else []
    precision = ["--precision=bf16"] if benchmark.takes_precision else []
    common = [f"--device={plan.device}", *precision, "--seed=0", f"--model_path={checkpoints[benchmark.checkpoint]}"]
    return [benchmark.script, *common, *flags, *data_config, *no_reference]


class Writer:
    """Writes the random checkpoints in a process of its own: one with weights, one that links to them and was trained with two cameras."""

    def __init__(self, plan: Plan, checkpoints: Mapping[str, Path]) -> None:
        self._plan, self._one, self._two = plan, checkpoints["one camera"], checkpoints["two cameras"]
        self._began_s, self._log = time.monotonic(), plan.out / "checkpoint.log"
        self._process = self._start(plan.size, self._one)

    def _start(self, size: str, out: Path, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "gr00t_fast.random_checkpoint", f"--size={size}", f"--out={out}", *flags]
        with self._log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> Step | None:
        """None when all is written, else what went wrong."""
        small = self._start("tiny", self._two, "--data_config=so100_dualcam")
        for process in (self._process, small):
            try:
                code = process.wait(max(self._plan.deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                process.kill()
                code = -1
            if code != 0:
                text = self._log.read_text(encoding="utf-8", errors="replace").strip()
                return Step("checkpoint", "failed", time.monotonic() - self._began_s, f"exit code {code}: {(text or 'no output').splitlines()[-1]}")
        self._share_weights()
        return None

    def stop(self) -> None:
        """Nothing goes on writing."""
        self._process.kill()
        self._process.wait()

    def _share_weights(self) -> None:
        """Of the small checkpoint only what it says about cameras stays."""
        for file in self._two.glob("*.*"):
            file.unlink()
        for file in (self._two / "eagle2_hg_model").iterdir():
            file.unlink()
        for file in (*self._one.glob("*.*"), *(self._one / "eagle2_hg_model").iterdir()):
            (self._two / file.relative_to(self._one)).symlink_to(file)


def run_tests(out: Path, deadline: float) -> Iterator[Step]:
    """The tests marked `gpu`, each file in a process of its own: one that hangs or breaks the GPU's context hides no other. Only files that have
    some are collected: others import packages that a bare machine lacks."""
    if importlib.util.find_spec("pytest") is None:
        yield Step(TESTS, "not run", 0.0, "pytest is not installed for this Python")
        return
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text("utf-8")]
    if not files:
        yield Step(TESTS, "not run", 0.0, "no test is marked gpu")
    for number, file in enumerate(sorted(files, key=_importance), start=1):
        limit = max(deadline - (len(files) - number) * _LEAST_FOR_A_FILE_S, time.monotonic() + 1.0)
        yield run_test_file(file, out / f"{file.stem}.log", limit)


def _importance(file: Path) -> tuple[int, str]:
    """Smallest first: what the project promises most about."""
    return (_TESTS_FIRST.index(file.name) if file.name in _TESTS_FIRST else len(_TESTS_FIRST), file.name)


def run_test_file(file: Path, log: Path, deadline: float) -> Step:
    """Tests that were all skipped have not run."""
    name = f"{TESTS}: {file.stem.removeprefix('test_')}"
    code, seconds, lines = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(file.relative_to(ROOT))], log, deadline)
    summary = lines[-1] if lines else "no output"
    if code == NO_TESTS_COLLECTED or (code == 0 and "passed" not in summary):
        return Step(name, "not run", seconds, summary)
    return Step(name, "passed" if code == 0 else "failed", seconds, summary)


def run_benchmark(name: str, command: Sequence[str], out: Path, deadline: float) -> Step:
    """A benchmark ends in one line of JSON; anything else is a failure."""
    script, *flags = command
    if not (ROOT / script).exists():
        return Step(name, "failed", 0.0, f"{script} does not exist")
    code, seconds, lines = run([sys.executable, script, *flags, f"--out={out / name}"], out / f"{name}.log", deadline)
    if code != 0:
        return Step(name, "failed", seconds, f"exit code {code}: {lines[-1] if lines else 'no output'}")
    # Errors share the log: libraries have something to say when a program ends
    last = next((index for index in reversed(range(len(lines))) if lines[index].startswith("{")), None)
    try:
        result = json.loads("" if last is None else lines[last])
    except json.JSONDecodeError:
        return Step(name, "failed", seconds, "its last line is not JSON")
    return Step(name, "passed", seconds, lines[last - 1] if last else "", result)


def run(command: Sequence[str], log: Path, deadline: float) -> tuple[int, float, list[str]]:
    """(exit code, seconds, non-empty lines of output). Output goes to `log` and is shown at the end; code -1 when the time was up."""
    start = time.monotonic()
    print(f"--- {log.stem}: up to {max(deadline - start, 0.0):.0f} s, output in {log}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            limit_s = max(deadline - start, 1.0)
            code = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
            file.write(f"\nstopped after {time.monotonic() - start:.0f} s: the time was up (--budget_s)\n")
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text, end="" if text.endswith("\n") else "\n", flush=True)
    return code, time.monotonic() - start, [line for line in text.splitlines() if line.strip()]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def report(steps: Sequence[Step], machine: dict[str, Any], out: Path) -> int:
    """Write and print the table, then one JSON line. Exit code 1 when a step failed or nothing ran."""
    rows = [f"{step.name:<24} {step.outcome:<8} {step.seconds:7.1f} s  {step.detail[:100]}" for step in steps]
    promises = verdicts({step.name: step.result for step in steps})
    head = f"{machine['gpu']['name']}, torch {machine['packages']['torch']}, CUDA {machine['gpu']['cuda']}"
    table = "\n".join([head, *rows, "", "what is promised of an H200:", *(verdict.line() for verdict in promises)]) + "\n"
    result = {"machine": machine, "promises": [asdict(verdict) for verdict in promises], "steps": [asdict(step) for step in steps]}
    (out / "result.txt").write_text(table, encoding="utf-8")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n" + table)
    print(json.dumps(result), flush=True)
    outcomes = {step.outcome for step in steps}
    return 1 if "failed" in outcomes or "passed" not in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
