"""`make gpu-check` without a GPU: it must say so, and must not take a failure for a result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Step

ROOT = Path(__file__).parent.parent
MACHINE = {"gpu": {"name": "some GPU", "cuda": "12.8"}, "packages": {"torch": "2.10.0"}}


def _benchmark(tmp_path: Path, code: str, budget_s: float = 60.0) -> Step:
    script = tmp_path / "script.py"
    script.write_text(code)
    return gpu_check.run_benchmark("sample", (str(script), "--seed=0"), tmp_path, time.monotonic() + budget_s)


def test_the_last_line_of_a_benchmark_is_its_result(tmp_path: Path) -> None:
    step = _benchmark(tmp_path, "import json, sys\nprint('warming up')\nprint(json.dumps(sys.argv[1:]))")
    assert (step.outcome, step.result) == ("passed", ["--seed=0", f"--out={tmp_path / 'sample'}"])
    assert (tmp_path / "sample.log").read_text().startswith("warming up\n")


@pytest.mark.parametrize(
    ("code", "budget_s", "expected"),
    [
        ("print('{}')\nraise SystemExit('no such GPU')", 60.0, "exit code 1: no such GPU"),
        ("print('fast enough')", 60.0, "not JSON"),
        ("pass", 60.0, "not JSON"),
        ("import time\ntime.sleep(60)", 1.0, "the time was up"),
    ],
)
def test_a_benchmark_that_breaks_has_failed(tmp_path: Path, code: str, budget_s: float, expected: str) -> None:
    step = _benchmark(tmp_path, code, budget_s)
    assert step.outcome == "failed"
    assert expected in step.detail


def test_a_benchmark_that_is_missing_has_failed(tmp_path: Path) -> None:
    assert gpu_check.run_benchmark("sample", ("benchmarks/none.py",), tmp_path, time.monotonic() + 1.0).outcome == "failed"


@pytest.mark.parametrize(
    ("outcomes", "code"), [(["passed", "not run"], 0), (["passed", "failed"], 1), (["not run", "not run"], 1), (["passed", "passed"], 0)]
)
def test_the_exit_code_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], outcomes: list, code: int) -> None:
    steps = [Step(f"step {index}", outcome, 1.0, "detail") for index, outcome in enumerate(outcomes)]
    assert gpu_check.report(steps, MACHINE, tmp_path) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((tmp_path / "result.json").read_text())
    assert "some GPU" in (tmp_path / "result.txt").read_text()


def test_it_needs_the_standard_library_only_and_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    blocked = "import sys\nsys.modules['torch'] = None\nimport benchmarks.gpu_check\n"
    done = subprocess.run([sys.executable, "-S", "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", f"--out={tmp_path}"]  # -S: no site-packages, hence no torch
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no torch with a CUDA GPU" in done.stdout
