"""Everything that needs a GPU, in four steps that stand alone and fit ten minutes each, on a machine where nothing can be installed.

    python -m benchmarks.gpu_check --step A    # correctness: the tests marked gpu; 5 minutes at most
    python -m benchmarks.gpu_check --step B    # cuda_graph: error, 1000 calls; 10 minutes at most
    python -m benchmarks.gpu_check --step C    # compiled; 10 minutes at most
    python -m benchmarks.gpu_check --step D    # TensorRT where it is installed; 4 minutes at most
    python -m benchmarks.gpu_check             # all of them; 29 minutes at most
    python -m benchmarks.gpu_check --device=cpu --size=tiny    # a rehearsal of what runs without a GPU, which shows that it runs and nothing else

Needs a Python with torch (CUDA), triton, numpy, safetensors, tokenizers and opencv, and for step A pytest; what else is missing is named and not
counted as passed. Each part of a step has a limit of its own: one that hangs costs only itself. In --out stay
one JSON file and one log per step, certificate.json, which is fit to be sent to us (docs/gpu.md), and result.txt: a table, and whether what the
project promises of an H200 was kept by the steps so far. A broken promise is named and does not change the exit code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib.program import read_flags
from gr00t_fast.base.measurement import provenance
from gr00t_fast.evaluation.certificate import write_certificate

# --- what is promised of an H200 -----------------------------------------------------------------------------------------------------------

_BF16 = "bf16"
_P50_LIMITS_MS = ((4, 7.0), (4, 5.0), (2, 3.5))  # denoising steps
_P99_OVER_P50 = 1.25
_TIMES_AS_FAST = 6.0  # as the reference modules
_LEAST_CALLS, _LEAST_OBSERVATIONS = 1000, 100
_FULL_SIZE = 1e9  # parameters: everything else is a toy, whose speed says nothing
_NO_PRODUCT = ("eager", "reference")  # what engines are compared with


@dataclass(frozen=True)
class Row:
    """One engine at one step count."""

    engine: str
    format: str
    steps: int
    times: Mapping[str, float]
    faster: Mapping[str, Any]


def promises(results: Iterable[Any]) -> Iterator[str]:
    """Lines: what was promised, what was measured, by which engine. results: what bench_engines left, in any order; anything else is passed over."""
    found = comparisons(results)
    trained = [each for each in found if not each["network"].startswith("random")]
    wrong = {name for each in trained for name, engine in each["engines"].items() if not engine["within_limit"]}
    rows = [row for each in found for row in _rows(each) if row.engine not in wrong]

    def fastest(steps: int) -> Row | None:
        return min((row for row in rows if (row.format, row.steps) == (_BF16, steps)), key=lambda row: row.times["p50"], default=None)

    for steps, limit_ms in _P50_LIMITS_MS:
        best = fastest(steps)
        detail = best and f"{best.times['p50']:.2f} ms ({best.engine}, {best.times['count']} calls)"
        yield _line(f"p50 <= {limit_ms:g} ms, {_BF16}, {steps} steps", best and best.times["p50"] <= limit_ms, detail)
    best = fastest(4)  # the engine to be used
    over = best and best.times["p99"] / best.times["p50"]
    detail = best and f"{over:.2f} (p99 {best.times['p99']:.2f} ms, {best.engine})"
    yield _line(f"p99 <= {_P99_OVER_P50:g} x p50, {_BF16}, 4 steps", over and over <= _P99_OVER_P50, detail)
    # where the reference modules are not installed, against our eager engine, which does less than they do
    known = [
        (of, row.faster[of]["median"], row.engine)
        for of in _NO_PRODUCT
        for row in rows
        if (row.format, row.steps) == (_BF16, 4) and row.faster.get(of)
    ]
    of, times, engine = max(known, default=("", 0.0, ""))
    words = ", against our eager: the reference modules are not installed, and do more" if of == "eager" else ""
    detail = f"{times:.2f} x ({engine}{words})" if known else None
    yield _line(f">= {_TIMES_AS_FAST:g} x the reference modules, {_BF16}, 4 steps", times >= _TIMES_AS_FAST if known else None, detail)
    for result in trained:
        for name, engine in result["engines"].items():
            detail = f"p99 {engine['error_deg']['p99']:.3f} in joint units over {result['observations']} observations"
            kept = engine["within_limit"] if result["observations"] >= _LEAST_OBSERVATIONS else None
            yield _line(f"actions of {name} near eager fp32, {result['network']}", kept, detail)
    if not trained:
        yield _line("actions near eager fp32, trained network", None, None)


def comparisons(results: Iterable[Any]) -> list[dict[str, Any]]:
    """Those that bench_engines left."""
    return [each for each in results if isinstance(each, dict) and each.get("benchmark") == "bench_engines" and "engines" in each]


def _line(promise: str, kept: bool | None, detail: str | None) -> str:
    """kept: None where nothing was measured."""
    return f"{'not measured' if kept is None else 'PASS' if kept else 'FAIL':<12} {promise:<52} {detail or ''}"


def _rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """What counts for speed: the published size, on a GPU, one camera, enough calls."""
    if result["parameters"] < _FULL_SIZE or not result["device"].startswith("cuda") or result["cameras"] != 1:
        return
    for name, engine in result["engines"].items():
        for steps, times in engine["times_ms"].items():
            if name not in _NO_PRODUCT and times["count"] >= _LEAST_CALLS:
                yield Row(name, engine["arithmetic"], int(steps), times, engine["times_as_fast_as"][steps])


# --- what is run ---------------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
TRAINED = "checkpoints/so100-sim-reach"  # degrees mean something on trained weights only
STEP_LIMITS_S = {"A": 300.0, "B": 600.0, "C": 600.0, "D": 240.0}
_NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "cv2")  # by every part
# Seconds that a file of GPU tests may take: to import torch and start CUDA, on the CPU for what it compares with, and to compile kernels.
TEST_LIMITS_S = {"test_gpu_graph.py": 80.0, "test_gpu.py": 40.0, "test_gpu_tensorrt.py": 30.0}
_COMPILING_S = 460.0  # the published size: Inductor took up to 393 s of a busy core
_MARKED = re.compile(r"^pytestmark = pytest\.mark\.gpu", re.MULTILINE)
_NO_TESTS_COLLECTED = 5  # pytest's exit code

Name = Literal["A", "B", "C", "D"]


@dataclass(frozen=True)
class Part:
    """One process of a step. `benchmark`: its last line of JSON is its result; else its exit code is. needs: packages without which it is not run."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    benchmark: bool = True
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    outcome: Literal["passed", "failed", "not run"]
    seconds: float
    detail: str
    result: Any = None


def test_files() -> list[Path]:
    """The files whose tests are all marked `gpu`, the ones with a limit of their own first. Others are never collected: they import packages that a
    bare machine lacks, and some only write about the mark."""
    files = [file for file in (ROOT / "tests" / "gpu").glob("test_*.py") if _MARKED.search(file.read_text("utf-8"))]
    return sorted(files, key=lambda file: (list(TEST_LIMITS_S).index(file.name) if file.name in TEST_LIMITS_S else len(TEST_LIMITS_S), file.name))


def parts_of(step: Name, device: str, size: str, scratch: Path) -> list[Part]:
    """What a step runs. scratch: for what need not be kept."""
    if step == "A":
        return _tests()
    short = () if device == "cuda" else ("--rounds=2", "--frames=2")  # a rehearsal has few calls
    trained = (f"--model_path={TRAINED}", "--rounds=100", "--frames=100")
    full = (f"--size={size}", "--rounds=1000")
    two_step_counts = ("--denoising_steps", "4", "2")

    def engines(name: str, limit_s: float, names: Sequence[str], *flags: str, **options: Any) -> Part:
        command = ("benchmarks/bench_engines.py", f"--device={device}", "--precision=bf16", "--engines", *names, *flags)
        return Part(name, (*command, *short, "--json", f"--out={scratch / name}"), limit_s, **options)

    if step == "B":
        graph = ("eager", "cuda_graph") if device == "cuda" else ("eager",)
        reference = ("reference",) if all(map(is_installed, ("lerobot", "transformers"))) else ()
        at_rate = ("--at_hz=30", "--at_hz_seconds=10" if device == "cuda" else "--at_hz_seconds=0.2")
        return [
            engines("trained", 120.0, (*graph, *reference), *trained),
            engines("full", 330.0, graph, *full, *two_step_counts, "--frames=20", *at_rate),
            engines("two cameras", 150.0, graph, f"--size={size}", "--rounds=200", "--data_config=so100_dualcam"),
        ]
    if step == "C":
        return [
            engines("compiled trained", 130.0, ("eager", "compiled"), *trained),
            engines("compiled full", _COMPILING_S, ("eager", "cuda_graph", "compiled"), *full, "--frames=4", needs_gpu=True),
        ]
    built = scratch / "engines"
    library = next((name for name in ("tensorrt_rtx", "tensorrt") if is_installed(name)), "tensorrt_rtx or tensorrt")
    needed: dict[str, Any] = {"needs": ("onnx", "onnxscript", library), "needs_gpu": True}
    return [
        Part("build TensorRT", ("export/to_tensorrt.py", f"--model_path={TRAINED}", f"--out={built}"), 150.0, False, **needed),
        engines("tensorrt trained", 60.0, ("eager", "cuda_graph", f"tensorrt={built}"), *trained, **needed),
    ]


def _tests() -> list[Part]:
    """Each file in a process of its own: one that hangs or breaks the GPU's context hides no other."""
    files = test_files()
    others = [file.name for file in files if file.name not in TEST_LIMITS_S]
    left_s = STEP_LIMITS_S["A"] - sum(TEST_LIMITS_S.values())
    limits = TEST_LIMITS_S | dict.fromkeys(others, left_s / max(len(others), 1))
    return [
        Part(file.stem, ("-m", "pytest", "-q", "-m", "gpu", str(file.relative_to(ROOT))), limits[file.name], False, ("pytest",)) for file in files
    ]


@dataclass
class Config:
    step: list[Name] = field(default_factory=lambda: list(STEP_LIMITS_S))  # which, one after the other; default: all
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: try what can run there, with few calls
    size: Literal["tiny", "demo", "full"] = "full"  # of the network with random weights, made on the GPU
    out: Path = ROOT / "outputs" / "gpu_check"  # directory for a JSON file and a log per step, and result.txt


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    if config.device == "cuda" and not has_gpu():
        print("error: this Python has no torch with a CUDA GPU. Run where it has one, or name another interpreter: make gpu-check PYTHON=...")
        return 1
    out = config.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    origin, seen = provenance(), set()
    for step in config.step:
        outcomes, interrupted = run_step(step, config.device, config.size, out)
        report(step, outcomes, origin, out)
        certify(out)
        seen |= {outcome.outcome for outcome in outcomes}
        if interrupted:
            return 130
    return 1 if "failed" in seen or "passed" not in seen else 0


def has_gpu() -> bool:
    return is_installed("torch") and importlib.import_module("torch").cuda.is_available()


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- running ------------------------------------------------------------------------------------------------------------------------------


def run_step(step: Name, device: str, size: str, out: Path) -> tuple[list[Outcome], bool]:
    """What its parts did, one after the other, and whether it was interrupted: then of the parts that had ended."""
    outcomes: list[Outcome] = []
    log = out / f"{step}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gr00t_fast_") as scratch:
        try:
            for part in parts_of(step, device, size, Path(scratch)):
                outcomes.append(run_part(part, device, log))
                print(f"{step}: {_row(outcomes[-1])}", flush=True)
        except KeyboardInterrupt:
            print("\ninterrupted: what ran until now", flush=True)
            return outcomes, True
    return outcomes, False


def run_part(part: Part, device: str, log: Path) -> Outcome:
    """Tests that were all skipped have not run; a benchmark ends in one line of JSON, and anything else is a failure. Output goes to `log`."""
    missing = [package for package in (*_NEEDED, *part.needs) if not is_installed(package)]
    if missing or (part.needs_gpu and device != "cuda"):
        return Outcome(part.name, "not run", 0.0, f"not installed: {', '.join(missing)}" if missing else "needs a GPU")
    print(f"--- {part.name}: at most {part.limit_s:.0f} s, output in {log}", flush=True)
    code, seconds, lines = run((sys.executable, *part.command), log, part.limit_s)
    last = lines[-1] if lines else "no output"
    if code is None:
        return Outcome(part.name, "failed", seconds, f"stopped: its limit is {part.limit_s:.0f} s; {last}")
    if not part.benchmark:
        skipped = code == _NO_TESTS_COLLECTED or (code == 0 and "pytest" in part.command and "passed" not in last)
        return Outcome(part.name, "not run" if skipped else "failed" if code else "passed", seconds, last)
    if code != 0:
        return Outcome(part.name, "failed", seconds, f"exit code {code}: {last}")
    # errors share the log: libraries have something to say when a program ends
    index = next((index for index in reversed(range(len(lines))) if lines[index].startswith("{")), None)
    try:
        result = json.loads("" if index is None else lines[index])
    except json.JSONDecodeError:
        return Outcome(part.name, "failed", seconds, "its last line is not JSON")
    return Outcome(part.name, "passed", seconds, lines[index - 1] if index else "", result)


def run(command: Sequence[str], log: Path, limit_s: float) -> tuple[int | None, float, list[str]]:
    """(exit code, None when the time was up; seconds; non-empty lines of output). The process and all that it started are ended with it."""
    began_s = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        at = file.tell()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_bytes()[at:].decode(errors="replace")
    return code, time.monotonic() - began_s, [line for line in text.splitlines() if line.strip()]


# --- reporting ----------------------------------------------------------------------------------------------------------------------------


def report(step: Name, outcomes: Sequence[Outcome], origin: Mapping[str, Any], out: Path) -> None:
    """Leave STEP.json, and print a table: this step's parts, what they measured, the promises as far as all steps so far tell."""
    (out / f"{step}.json").write_text(json.dumps({**origin, "parts": [asdict(each) for each in outcomes]}, indent=1) + "\n", "utf-8")
    promised = list(promises(results_in(out)))
    head = f"step {step}: {origin['machine'].get('gpu') or 'no GPU: a rehearsal'}, torch {origin['versions'].get('torch')}"
    measured = [row for each in outcomes if isinstance(each.result, dict) for row in _measured(each)]
    table = [head, *map(_row, outcomes), *measured, "promised of an H200:", *promised]
    (out / "result.txt").write_text("\n".join(table) + "\n", "utf-8")
    print("\n" + "\n".join(table), flush=True)


def results_in(out: Path) -> list[Any]:
    """What the parts of all steps so far left."""
    known = [json.loads(file.read_text("utf-8")) for file in sorted(out.glob("[A-D].json"))]
    return [part["result"] for each in known for part in each["parts"]]


def certify(out: Path) -> None:
    """Leave certificate.json, of all steps so far, where anything was compared."""
    if compared := comparisons(results_in(out)):
        passed = write_certificate(out / "certificate.json", compared, compared[-1])
        print(f"certificate: {'pass' if passed else 'FAIL'}, {out / 'certificate.json'}; docs/gpu.md says how to send it", flush=True)


def _row(outcome: Outcome) -> str:
    return f"{outcome.name:<20} {outcome.outcome:<8} {outcome.seconds:6.1f} s  {outcome.detail[:110]}"


def _measured(outcome: Outcome) -> Iterator[str]:
    """The figures of a benchmark, a line each."""
    for name, engine in outcome.result.get("engines", {}).items():
        for steps, times in engine["times_ms"].items():
            error = f"error p99 {engine['error_deg']['p99']:.3f}{'' if engine['within_limit'] else ' ABOVE ITS LIMIT'}"
            yield f"  {outcome.name}: {name}, {steps} steps: p50 {times['p50']:.3f} p95 {times['p95']:.3f} p99 {times['p99']:.3f} ms, {error}"
    for name, reason in outcome.result.get("refused", {}).items():
        yield f"  {outcome.name}: {name} cannot be used: {reason}"


if __name__ == "__main__":
    sys.exit(main())
