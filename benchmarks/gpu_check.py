"""Everything that needs a GPU, in one command, on a machine where nothing can be installed: GPU tests, then the benchmarks.

    python -m benchmarks.gpu_check [--out DIR] [--size full] [--budget_s 570]

Needs a Python with torch (CUDA), numpy, safetensors and opencv; this file itself uses the standard library only. What is missing is said
and not counted as passed. Leaves `result.json`, `result.txt` and one log per step in DIR.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_BUDGET_S = 570.0  # ten minutes in all; half a minute to write and to stop
_STAGES = ("benchmarks/bench_stages.py", "--device=cuda", "--seed=0", "--rounds=100", "--calls=1000")
BENCHMARKS: dict[str, Sequence[str]] = {  # what matters most first: the last ones may be cut by the budget
    "bench_policy": ("benchmarks/bench_policy.py", "--device=cuda", "--seed=0"),
    "stages_graph": (*_STAGES, "--engine=cuda_graph", "--seconds=60"),
    "stages_graph_2_steps": (*_STAGES, "--engine=cuda_graph", "--denoising_steps=2"),
    "stages_compiled": (*_STAGES, "--engine=compiled"),
}
TAKES_REFERENCE = ("bench_policy",)
REFERENCE_PACKAGES = ("lerobot", "diffusers", "transformers")  # without them only our own engine is timed
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
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks on a bare machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check", help="directory for result.json, result.txt and logs")
    parser.add_argument("--size", default="full", help="random checkpoint to time, as in gr00t_fast.random_checkpoint")
    parser.add_argument("--budget_s", type=float, default=DEFAULT_BUDGET_S, help="seconds for everything")
    options = parser.parse_args(argv)
    gpu = describe_gpu()
    if gpu is None:
        print("error: this Python has no torch with a CUDA GPU. Run where it has one, or name another interpreter: make gpu-check PYTHON=...")
        return 1
    out = options.out.resolve()  # steps run in the repository's root
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget_s
    steps = [run_tests(out, deadline)]
    steps += run_benchmarks(options.size, out, deadline)
    return report(steps, {"gpu": gpu, "python": platform.python_version(), "packages": versions()}, out)


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


def run_tests(out: Path, deadline: float) -> Step:
    """The tests marked `gpu`. Only their files are collected: others import packages that a bare machine lacks."""
    if importlib.util.find_spec("pytest") is None:
        return Step("gpu tests", "not run", 0.0, "pytest is not installed for this Python")
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text("utf-8"))
    if not files:
        return Step("gpu tests", "not run", 0.0, "no test is marked gpu")
    code, seconds, lines = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files], out / "gpu_tests.log", deadline)
    summary = lines[-1] if lines else "no output"
    if code == NO_TESTS_COLLECTED or (code == 0 and "passed" not in summary):  # all were skipped
        return Step("gpu tests", "not run", seconds, summary)
    return Step("gpu tests", "passed" if code == 0 else "failed", seconds, summary)


def run_benchmarks(size: str, out: Path, deadline: float) -> list[Step]:
    """Time a random checkpoint, which is kept out of `out`: at full size it has 4.7 GB and what is in `out` may be copied."""
    missing = [package for package in REFERENCE_PACKAGES if importlib.util.find_spec(package) is None]
    with tempfile.TemporaryDirectory(prefix="gr00t_fast_") as directory:
        checkpoint = Path(directory) / "checkpoint"
        make = [sys.executable, "-m", "gr00t_fast.random_checkpoint", f"--size={size}", f"--out={checkpoint}"]
        code, seconds, lines = run(make, out / "checkpoint.log", deadline)
        if code != 0:
            return [Step("checkpoint", "failed", seconds, f"exit code {code}: {lines[-1] if lines else 'no output'}")]
        steps = []
        for name, command in BENCHMARKS.items():
            flags = ["--no-reference"] if missing and name in TAKES_REFERENCE else []
            steps.append(run_benchmark(name, (*command, f"--model_path={checkpoint}", *flags), out, deadline))
    without = [Step("reference", "not run", 0.0, f"not installed: {', '.join(missing)}")] if missing else []
    return [*steps, *without]


def run_benchmark(name: str, command: Sequence[str], out: Path, deadline: float) -> Step:
    """A benchmark ends in one line of JSON; anything else is a failure."""
    script, *flags = command
    if not (ROOT / script).exists():
        return Step(name, "failed", 0.0, f"{script} does not exist")
    code, seconds, lines = run([sys.executable, script, *flags, f"--out={out / name}"], out / f"{name}.log", deadline)
    if code != 0:
        return Step(name, "failed", seconds, f"exit code {code}: {lines[-1] if lines else 'no output'}")
    try:
        result = json.loads(lines[-1] if lines else "")
    except json.JSONDecodeError:
        return Step(name, "failed", seconds, "its last line is not JSON")
    return Step(name, "passed", seconds, lines[-2] if len(lines) > 1 else "", result)


def run(command: Sequence[str], log: Path, deadline: float) -> tuple[int, float, list[str]]:
    """(exit code, seconds, non-empty lines of output). Output goes to `log` and is shown at the end; code -1 when the time was up."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        try:
            limit_s = max(deadline - start, 1.0)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
            file.write(f"\nstopped after {time.monotonic() - start:.0f} s: the time was up (--budget_s)\n")
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text, end="" if text.endswith("\n") else "\n", flush=True)
    return code, time.monotonic() - start, [line for line in text.splitlines() if line.strip()]


def report(steps: Sequence[Step], machine: dict[str, Any], out: Path) -> int:
    """Write and print the table, then one JSON line. Exit code 1 when a step failed or nothing ran."""
    rows = [f"{step.name:<20} {step.outcome:<8} {step.seconds:7.1f} s  {step.detail[:100]}" for step in steps]
    table = "\n".join([f"{machine['gpu']['name']}, torch {machine['packages']['torch']}, CUDA {machine['gpu']['cuda']}", *rows]) + "\n"
    result = {"machine": machine, "steps": [asdict(step) for step in steps]}
    (out / "result.txt").write_text(table, encoding="utf-8")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n" + table)
    print(json.dumps(result), flush=True)
    outcomes = {step.outcome for step in steps}
    return 1 if "failed" in outcomes or "passed" not in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
