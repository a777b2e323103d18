"""`make gpu-check` without a GPU: it must say so, and must not take a failure for a result."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Step
from gr00t_fast.engine import ENGINES

ROOT = Path(__file__).parent.parent
MACHINE = {"gpu": {"name": "some GPU", "cuda": "12.8"}, "packages": {"torch": "2.10.0"}}


def _benchmark(tmp_path: Path, code: str, budget_s: float = 60.0) -> Step:
    script = tmp_path / "script.py"
    script.write_text(code)
    return gpu_check.run_benchmark("sample", (str(script), "--seed=0"), tmp_path, time.monotonic() + budget_s)


def test_the_last_line_of_a_benchmark_is_its_result(tmp_path: Path) -> None:
    step = _benchmark(
        tmp_path, "import json, sys\nprint('warming up')\nprint(json.dumps({'argv': sys.argv[1:]}))\nsys.exit(print('bye', file=sys.stderr))"
    )
    assert (step.outcome, step.result) == ("passed", {"argv": ["--seed=0", f"--out={tmp_path / 'sample'}"]})
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


@pytest.fixture
def plan(tmp_path: Path) -> gpu_check.Plan:
    return gpu_check.Plan((), "cuda", "full", tmp_path, time.monotonic() + 60.0, {"lerobot": False})


@pytest.mark.parametrize("name", gpu_check.BENCHMARKS)
def test_every_command_is_understood_by_its_program(name: str, plan: gpu_check.Plan) -> None:
    """The flags for the GPU, which no other test without one runs."""
    checkpoints = {"one camera": Path("one"), "two cameras": Path("two"), "trained": gpu_check.TRAINED}
    script, *flags = gpu_check.command_of(name, plan, checkpoints)
    parsed = importlib.import_module(script.removesuffix(".py").replace("/", "."))._parser().parse_args(flags)
    assert parsed.device == "cuda"
    assert parsed.model_path == checkpoints[gpu_check.BENCHMARKS[name].checkpoint]
    assert getattr(parsed, "data_config", "so100") == ("so100_dualcam" if name.endswith("2_cameras") else "so100")
    assert getattr(parsed, "reference", False) is False
    engines = getattr(parsed, "engines", "")
    named = [*filter(None, engines.split(",") if isinstance(engines, str) else ()), *([parsed.engine] if "stages" in name else [])]
    assert all(engine in ENGINES for engine in named)


def test_the_second_run_is_what_the_first_has_no_time_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device=cpu", "--only=second", "--budget_s=600", "--size=tiny", f"--out={tmp_path}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [step["name"] for step in result["steps"]][: len(gpu_check.SECOND_RUN)] == list(gpu_check.SECOND_RUN)
    assert {step["outcome"] for step in result["steps"][1:]} == {"not run"}, "eight bits and TensorRT need a GPU"


def test_the_plan_fits_the_budget_up_to_compilation() -> None:
    later = {"bench_policy", *gpu_check.SECOND_RUN}
    needed = [benchmark.needs_s for name, benchmark in gpu_check.BENCHMARKS.items() if "compiled" not in name and name not in later]
    assert sum(needed) + gpu_check._TESTS_LIMIT_S < gpu_check.DEFAULT_BUDGET_S + 60, "each figure is generous"


def test_with_too_little_time_left_a_benchmark_is_not_begun(plan: gpu_check.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *_: pytest.fail("begun"))
    late = replace(plan, wanted=("engines_trained",), deadline=time.monotonic() + 1.0)
    step, *_ = gpu_check.run_all(late)
    assert (step.outcome, step.name) == ("not run", "engines_trained")
    assert "1 s of --budget_s are left" in step.detail or "0 s of" in step.detail


def test_a_checkpoint_that_cannot_be_written_has_failed(plan: gpu_check.Plan) -> None:
    (step, *_) = gpu_check.run_all(replace(plan, wanted=("stages_graph",), size="no-such-size"))
    assert (step.name, step.outcome) == ("checkpoint", "failed")


def test_what_needs_a_gpu_is_not_rehearsed(plan: gpu_check.Plan) -> None:
    step, *_ = gpu_check.run_all(replace(plan, wanted=("eight_bit_trained",), device="cpu"))
    assert (step.outcome, step.detail) == ("not run", "needs a GPU")


def test_steps_that_do_not_exist_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device=cpu", "--only=stages_grahp", f"--out={tmp_path}"]) == 2
    assert "--only names stages_grahp" in capsys.readouterr().out


def test_a_rehearsal_runs_the_steps_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two kinds of benchmark, on the trained network and on the one with two cameras, whose weights are another one's."""
    arguments = ["--device=cpu", "--size=tiny", f"--out={tmp_path}", "--only=engines_trained,stages_graph_2_cameras", "--budget_s=600"]
    assert gpu_check.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    engines, stages = (step["result"] for step in result["steps"][:2])
    assert (engines["network"], engines["device"], list(engines["error_deg"])) == ("so100-sim-reach", "cpu", ["eager"])
    assert (stages["cameras"], stages["engine"], stages["whole"]["back_to_back_ms"]["count"]) == (2, "eager", 3)
    table = (tmp_path / "result.txt").read_text()
    assert "not measured p50 <= 7 ms, bf16, 1 camera, 4 steps" in table
    assert "actions of eager near eager fp32, so100-sim-reach" in table


def test_tests_run_file_by_file_and_one_that_hangs_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text("def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n")
    head = "import pytest, time\npytestmark = pytest.mark.gpu\n"
    (tests / "test_gpu_graph.py").write_text(head + "def test_hangs():\n    time.sleep(60)\n")
    (tests / "test_gpu_a.py").write_text(head + "def test_breaks():\n    assert False\n")
    (tests / "test_gpu_b.py").write_text(head + "def test_works():\n    pass\n")
    (tests / "test_gpu_c.py").write_text(head + "def test_skips():\n    pytest.skip('no')\n")
    (tests / "test_plain.py").write_text("import no_such_package\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "_LEAST_FOR_A_FILE_S", 20.0)
    steps = list(gpu_check.run_tests(tmp_path, time.monotonic() + 62.0))
    expected = {"gpu_graph": "failed", "gpu_a": "failed", "gpu_b": "passed", "gpu_c": "not run"}
    assert {step.name.removeprefix("gpu tests: "): step.outcome for step in steps} == expected
    assert "the time was up" in steps[0].detail


def test_an_interrupt_leaves_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *_: object) -> Step:
        if name != "engines_trained":
            raise KeyboardInterrupt
        return Step(name, "passed", 1.0, "", {})

    monkeypatch.setattr(gpu_check, "run_benchmark", run)
    assert gpu_check.main(["--device=cpu", "--size=tiny", f"--out={tmp_path}", "--only=engines_trained,stages_graph"]) == 130
    assert [step["name"] for step in json.loads((tmp_path / "result.json").read_text())["steps"]] == ["engines_trained"]
    assert "interrupted" in capsys.readouterr().out


def test_it_needs_the_standard_library_only_and_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    blocked = "import sys\nsys.modules['torch'] = None\nimport benchmarks.gpu_check\n"
    done = subprocess.run([sys.executable, "-S", "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", f"--out={tmp_path}"]  # -S: no site-packages, hence no torch
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no torch with a CUDA GPU" in done.stdout
