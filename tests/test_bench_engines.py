"""The comparison of engines: its judgements, and that it runs from end to end on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_engines
from benchmarks.random_observations import random_noise, random_observations
from gr00t_fast import load_policy

TRAINED = Path(__file__).parent.parent / "checkpoints" / "so100-sim-reach"


def test_it_runs_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--engines=eager", "--device=cpu", "--precision=fp32", "--observations=2", "--rounds=2", "--denoising_steps", "1", "2"]
    assert bench_engines.main([f"--model_path={TRAINED}", f"--out={tmp_path}", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["error_deg"]["eager"] == {"p50": 0.0, "p99": 0.0, "max": 0.0}, "the truth itself"
    assert result["within_limit"] == {"eager": True}
    assert {steps: times["eager"]["count"] for steps, times in result["times_ms"].items()} == {"1": 2, "2": 2}
    assert (tmp_path / "bench_engines.md").read_text().startswith("engine ")


def test_a_named_engine_that_cannot_run_is_an_error_and_an_unnamed_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--model_path={TRAINED}", f"--out={tmp_path}", "--device=cpu", "--observations=1", "--rounds=1", "--precision=fp32"]
    assert bench_engines.main([*common, "--engines=eager,cuda_graph"]) == 1
    assert "engine 'cuda_graph' needs a CUDA GPU" in capsys.readouterr().err
    assert bench_engines.main([*common, "--skip=compiled,reference"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["refused"]) >= {"cuda_graph", "triton"}
    assert list(result["error_deg"]) == ["eager"]


def test_errors_can_be_measured_on_what_an_arm_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seen").mkdir()
    example = load_policy(TRAINED, device="cpu", precision="fp32", engine="eager").example_observation()
    rng, rows = np.random.default_rng(0), {}
    for key, value in example.items():
        if key.startswith("video."):
            rows[key] = rng.integers(0, 256, (5, *value.shape[1:]), dtype=np.uint8)
        elif key.startswith("state."):
            rows[key] = np.repeat(value, 5, axis=0)
        else:
            rows[key] = np.array(["reach the block"] * 5)
    np.savez(tmp_path / "seen" / "000.npz", **rows)
    flags = ["--engines=eager", "--device=cpu", "--precision=fp32", "--rounds=1", f"--dataset={tmp_path / 'seen'}"]
    assert bench_engines.main([f"--model_path={TRAINED}", f"--out={tmp_path}", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["observations"], result["of"]) == (5, "seen")
    flags[-1] = f"--dataset={tmp_path / 'nowhere'}"
    assert bench_engines.main([f"--model_path={TRAINED}", f"--out={tmp_path}", *flags]) == 1
    assert "neither a LeRobotDataset" in capsys.readouterr().err


def test_limits() -> None:
    errors = {"eager": {"p99": 0.4}, "cuda_graph": {"p99": 0.49}, "fp8": {"p99": 1.4}, "bad": {"p99": float("nan")}}
    assert [bench_engines.within_limit(name, errors, "bf16") for name in errors] == [True, True, True, False]
    errors |= {"cuda_graph": {"p99": 0.51}, "fp8": {"p99": 1.6}}
    assert not bench_engines.within_limit("cuda_graph", errors, "bf16")
    assert not bench_engines.within_limit("fp8", errors, "bf16")


def test_where_the_plain_model_amplifies_rounding_too_an_engine_is_held_against_it() -> None:
    errors = {"eager": {"p99": 2.0}, "cuda_graph": {"p99": 2.9}, "triton": {"p99": 3.1}, "fp8": {"p99": 2.0}}
    assert [bench_engines.within_limit(name, errors, "bf16") for name in errors] == [True, True, False, False]


def test_ratios_are_paired_by_round() -> None:
    """A disturbed round hits both: the median of pairs does not move."""
    times = {"eager": [10.0, 20.0, 400.0], "graph": [5.0, 10.0, 200.0]}
    assert bench_engines.ratios(times, "eager") == {"graph": {"median": 2.0, "p25": 2.0, "p75": 2.0}}
    assert bench_engines.ratios(times, "reference") is None


def test_observations_are_random_and_repeatable() -> None:
    policy = load_policy(TRAINED, device="cpu", precision="fp32", engine="eager")
    first, again = (random_observations(policy, 3, 2) for _ in range(2))
    for key in first[0]:
        assert np.array_equal(first[0][key], again[0][key])
        if not key.startswith("annotation"):
            assert not np.array_equal(first[0][key], first[1][key])
    ranges = policy.facts.state_statistics["single_arm"]
    assert all(((ranges.min <= seen["state.single_arm"]) & (seen["state.single_arm"] <= ranges.max)).all() for seen in first)
    assert random_noise(policy, 0).shape == (1, *policy.chunk_shape)
