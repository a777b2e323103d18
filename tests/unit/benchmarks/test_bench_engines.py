"""The comparison of engines: its judgements, and that it runs from end to end on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_engines
from benchmarks.bench_engines import LaboratoryBench
from benchmarks.lib.reference import REFERENCE_HEAD
from gr00t_fast.engine import packed

ROOT = Path(__file__).resolve().parents[3]
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> dict:
    common = [f"--model_path={TRAINED}", f"--out={tmp_path}", "--device=cpu", "--precision=fp32", "--frames=2", "--rounds=2", "--json"]
    assert bench_engines.main([*common, *flags]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1]) if code == 0 else {}


def test_it_runs_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, capsys, "--engines", "eager", "--denoising_steps", "1", "2")
    eager = result["engines"]["eager"]
    assert eager["error_deg"] == {"p50": 0.0, "p99": 0.0, "max": 0.0}, "the truth itself"
    assert eager["within_limit"] is True
    assert {steps: times["count"] for steps, times in eager["times_ms"].items()} == {"1": 2, "2": 2}
    assert "fastest within its limit: eager" in (tmp_path / "bench_engines.md").read_text()


def test_fused_leaves_the_others_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one network in memory: eager, which is asked last, stays the exact twin."""
    monkeypatch.setattr(packed, "MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr(packed, "chosen_ways", {})
    monkeypatch.setattr(packed, "FASTER", 0.0)
    engines = run(tmp_path, capsys, "--engines", "fused", "eager")["engines"]
    assert engines["eager"]["error_deg"]["max"] == 0.0
    assert 0.0 < engines["fused"]["error_deg"]["max"] < 0.01


def test_the_reference_runs_on_the_shipped_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which leaves out the weights that no inference uses."""
    pytest.importorskip("transformers", reason="needs `pip install 'gr00t_fast[bench]'`")
    pytest.importorskip(REFERENCE_HEAD, reason="needs lerobot up to 0.5, which has GR00T N1.5's action head")
    reference = run(tmp_path, capsys, "--engines", "eager", "reference")["engines"]["reference"]
    assert reference["error_deg"]["p99"] < 0.01
    assert reference["times_as_fast_as"]["4"]["eager"]["median"] > 0


def test_a_named_engine_that_cannot_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, capsys, "--engines", "eager", "cuda_graph", code=2)
    assert "engine 'cuda_graph' needs a CUDA GPU" in capsys.readouterr().err
    run(tmp_path, capsys, "--engines", "eager", "cuda_grahp", code=2)
    assert "Did you mean 'cuda_graph'" in capsys.readouterr().err


def test_an_unnamed_engine_that_cannot_run_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaboratoryBench, "names", tuple(name for name in LaboratoryBench.names if name not in ("compiled", "reference")))  # a minute
    result = run(tmp_path, capsys)
    assert list(result["engines"]) == ["eager", "fused"]
    assert set(result["refused"]) == {"cuda_graph", "onnxruntime", "openvino", "tensorrt"}
    assert "needs a CUDA GPU" in result["refused"]["cuda_graph"]
    assert "gr00t-fast export tensorrt" in result["refused"]["tensorrt"]
    assert "openvino cannot be used here" in (tmp_path / "bench_engines.md").read_text()
