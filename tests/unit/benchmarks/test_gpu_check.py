"""`make gpu-check` without a GPU: its plan, what it makes of parts that break or hang, and that it says so without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.bench_engines import BenchEnginesConfig
from benchmarks.gpu_check import Outcome, Part, parts_of, run_part
from gr00t_fast.base.flags import parse_flags
from gr00t_fast.cli import export

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = {"machine": {"gpu": "some GPU"}, "versions": {"torch": "2.10.0"}}
STEPS = tuple(gpu_check.STEP_LIMITS_S)


# --- the plan


@pytest.mark.parametrize("step", STEPS)
def test_a_step_fits_its_limit(step: str, tmp_path: Path) -> None:
    """All of its parts at their own limits: none has to share, so one that hangs costs only itself."""
    parts = parts_of(step, "cuda", "full", tmp_path)
    assert 0 < sum(part.limit_s for part in parts) <= gpu_check.STEP_LIMITS_S[step] <= 600
    assert len({part.name for part in parts}) == len(parts)


def test_every_file_of_gpu_tests_has_time_to_run(tmp_path: Path) -> None:
    """20 s go into imports and the CPU's answers."""
    limits = {part.name: part.limit_s for part in parts_of("A", "cuda", "full", tmp_path)}
    assert set(limits) == {file.stem for file in (ROOT / "tests" / "gpu").glob("test_gpu*.py")}
    assert min(limits.values()) >= 30


@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_understood_by_its_program(step: str, device: str, tmp_path: Path) -> None:
    """The flags for the GPU, which no other test without one runs."""
    for part in parts_of(step, device, "full", tmp_path):
        script, *flags = part.command
        builds = script == "export/to_tensorrt.py"
        parsed, _ = parse_flags(export.TensorRTConfig if builds else BenchEnginesConfig, flags)
        assert builds or parsed.device == device
        assert not parsed.model_path or (ROOT / parsed.model_path / "config.json").is_file()
        assert parsed.out.is_relative_to(tmp_path), "what need not be kept"


# --- parts that break


def part(tmp_path: Path, code: str, limit_s: float = 60.0, benchmark: bool = True) -> Part:
    script = tmp_path / "script.py"
    script.write_text(code)
    return Part("sample", (str(script), "--seed=0"), limit_s, benchmark)


def test_the_last_line_of_a_benchmark_is_its_result(tmp_path: Path) -> None:
    code = "import json, sys\nprint('warming up')\nprint(json.dumps({'argv': sys.argv[1:]}))\nsys.exit(print('bye', file=sys.stderr))"
    outcome = run_part(part(tmp_path, code), "cpu", tmp_path / "log")
    assert (outcome.outcome, outcome.result) == ("passed", {"argv": ["--seed=0"]})
    assert (tmp_path / "log").read_text().startswith("warming up\n")


@pytest.mark.parametrize(
    ("code", "limit_s", "expected"),
    [
        ("print('{}')\nraise SystemExit('no such GPU')", 60.0, "exit code 1: no such GPU"),
        ("print('fast enough')", 60.0, "not JSON"),
        ("pass", 60.0, "not JSON"),
        ("import time\ntime.sleep(600)", 1.0, "its limit is 1 s"),
    ],
)
def test_a_part_that_breaks_has_failed(tmp_path: Path, code: str, limit_s: float, expected: str) -> None:
    outcome = run_part(part(tmp_path, code, limit_s), "cpu", tmp_path / "log")
    assert outcome.outcome == "failed"
    assert expected in outcome.detail


# --- what is left behind


def measured(p50: float) -> dict:
    times = {"count": 1000, "p50": p50, "p95": p50, "p99": p50, "max": p50}
    engine = {"times_ms": {"4": times}, "times_as_fast_as": {"4": {}}, "error_deg": {"p99": 0.1}, "within_limit": True, "arithmetic": "bf16"}
    engines = {name: engine for name in ("eager", "cuda_graph")}
    return {"benchmark": "bench_engines", "network": "random", "parameters": 2e9, "device": "cuda", "cameras": 1, "engines": engines}


def test_a_step_leaves_one_file_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [Outcome(f"part {index}", "passed", 1.0, "", measured(6.0)) for index in range(2)]
    gpu_check.report("B", many, ORIGIN, tmp_path)
    assert any(line.startswith("PASS") and "7 ms" in line for line in capsys.readouterr().out.splitlines())
    assert {file.name for file in tmp_path.iterdir()} == {"B.json", "result.txt"}
    assert len(json.loads((tmp_path / "B.json").read_text())["parts"]) == 2


@pytest.mark.parametrize(("outcomes", "code"), [(["passed", "not run"], 0), (["passed", "failed"], 1), (["not run", "not run"], 1)])
def test_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list, code: int) -> None:
    seen = iter(outcomes)
    monkeypatch.setattr(gpu_check, "parts_of", lambda *_: outcomes)
    monkeypatch.setattr(gpu_check, "run_part", lambda part, *_: Outcome(part, next(seen), 1.0, ""))
    assert gpu_check.main(["--device=cpu", "--step", "B", f"--out={tmp_path}"]) == code


@pytest.mark.slow
def test_a_rehearsal_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One part of a step, on a random network."""
    monkeypatch.setattr(gpu_check, "parts_of", lambda *asked: parts_of(*asked)[1:2])
    assert gpu_check.main(["--device=cpu", "--size=tiny", "--step", "B", f"--out={tmp_path}"]) == 0
    (part,) = json.loads((tmp_path / "B.json").read_text())["parts"]
    assert set(part["result"]["engines"]["eager"]["times_ms"]) == {"2", "4"}
    assert "not measured p50 <= 7 ms, bf16, 4 steps" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"B.json", "B.log", "result.txt", "certificate.json"}
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    (measured,) = certificate["measured"]
    assert measured["weights"] == part["result"]["weights"]
    assert certificate["passed"] is measured["engines"]["eager"]["passed"]
    assert str(tmp_path) not in json.dumps(certificate)


def test_it_says_when_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([f"--out={tmp_path}"]) == 1
    assert "no torch with a CUDA GPU" in capsys.readouterr().out


def test_a_package_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with torch and little else: nothing is started that would fail at an import."""
    monkeypatch.setattr(gpu_check, "is_installed", lambda package: package != "tokenizers")
    outcomes = [run_part(part, "cuda", tmp_path / "log") for part in parts_of("B", "cuda", "full", tmp_path)]
    assert {(outcome.outcome, outcome.detail) for outcome in outcomes} == {("not run", "not installed: tokenizers")}


def test_what_it_runs_needs_little_to_be_installed() -> None:
    """torch, triton, tokenizers, safetensors, numpy, opencv and pytest; TensorRT's part asks for what it needs."""
    absent = ["transformers", "lerobot", "draccus", "yaml", "matplotlib", "pandas", "pyarrow", "datasets", "PIL"]
    absent += ["onnx", "onnxruntime", "openvino", "mujoco", "zmq"]
    modules = ["benchmarks.gpu_check", "benchmarks.bench_engines", "gr00t_fast.export.calibrate"]
    modules += [file.stem for file in gpu_check.test_files() if file.stem != "test_gpu_tensorrt"]
    code = f"import importlib, sys\nsys.path[:0] = ['.', 'tests', 'tests/gpu', 'tests/support']\nsys.modules.update(dict.fromkeys({absent}))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}for name in {modules}: importlib.import_module(name)"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
