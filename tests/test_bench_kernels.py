"""The kernel benchmark as far as a CPU goes: equality in the interpreter, what is compared with what, and the arithmetic of its figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux: pip install 'gr00t_fast[triton]'")

from benchmarks import bench_kernels
from benchmarks.kernel_pairs import Pair, Randoms, all_pairs
from benchmarks.work import Ceilings
from gr00t_fast.config import ModelConfig
from gr00t_fast.errors import EngineError
from gr00t_fast.random_checkpoint import network_config

ROOT = Path(__file__).parent.parent
ARGUMENTS = argparse.Namespace(rounds=3, warm_up=1, compiled=False, sweep=True, sweep_rounds=1)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    config = ModelConfig.from_dicts(*network_config("tiny", published_vocabulary=False))
    return {pair.name: pair for pair in all_pairs(config, 20, Randoms(torch.float32, torch.device("cpu"), 0))}


def test_on_a_cpu_it_shows_equality_and_claims_no_times(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "benchmarks/bench_kernels.py", "--device=cpu", "--precision=fp32", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["kernels"]) == 12
    assert all(set(figures) == {"error"} and figures["error"] < 1e-6 for figures in result["kernels"].values())
    assert result["engines"] is result["ceilings"] is None
    assert json.loads((tmp_path / "bench_kernels.json").read_text()) == result


def test_every_twin_compiles_without_a_graph_break(pairs: dict[str, Pair]) -> None:
    for pair in pairs.values():
        torch.compiler.reset()
        inputs = pair.inputs()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(pair.twin, fullgraph=True, dynamic=False, backend="eager")(*inputs), pair.twin(*inputs))


def test_a_wrong_kernel_ends_the_benchmark(pairs: dict[str, Pair]) -> None:
    pair = pairs["language: SwiGLU"]
    assert replace(pair, kernel=pair.twin).error() < 1e-6  # its own rounding
    for wrong in (lambda x: 1.01 * pair.twin(x), lambda x: pair.twin(x) * float("nan")):
        error = replace(pair, kernel=wrong).error()
        with pytest.raises(EngineError, match="Do not use --engine=triton"):
            bench_kernels._refuse_wrong({pair.name: error}, 1e-3)


def test_figures_follow_from_times_bytes_and_ceilings(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are given, so that the figures can be worked out by hand: 2 us for the kernel, 6 for torch, per call."""
    pair = pairs["output projection, residual, AdaLN"]
    pair = replace(pair, kernel=pair.twin)
    monkeypatch.setattr(bench_kernels, "graph_of", lambda function, sets: (function, len(sets)))
    turns = iter([2.0, 6.0] * 4 + [5.0] * 1000)
    monkeypatch.setattr(bench_kernels, "timed_ms", lambda call, _: next(turns) * call[1] / 1e3)
    found = bench_kernels.measure_pair(pair, Ceilings(1e12, 1e12), ARGUMENTS)
    width, tokens = 32, 49
    assert found["bytes"] == 4 * (width * width + 3 * width + 4 * tokens * width)
    assert found["gb_per_s"] == pytest.approx(found["bytes"] / 2e3, abs=0.1)
    assert found["of_ceiling"] == pytest.approx(found["bytes"] / 2e6, abs=1e-3)
    assert found["floor_us"] == pytest.approx(max(found["bytes"], 2 * tokens * width * width) / 1e6, abs=1e-3)
    assert found["times_as_fast"] == {"torch": 3.0}
    assert found["sweep"]["tried"] > 1
    table = bench_kernels.as_table({"interpreted": False, "kernels": {pair.name: {"error": 1e-7} | found}, "engines": {"whole": {"triton": _P}}})
    assert "2.00     6.00        -" in table
    assert [line.split()[:2] for line in table.splitlines()][-1] == ["whole", "triton"]


_P = {"count": 1, "p50": 4.0, "p95": 4.0, "p99": 4.0, "max": 4.0}
