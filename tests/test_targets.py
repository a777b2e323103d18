"""What gpu_check promises is judged from the benchmarks' own results, and what was not measured is never a pass."""

from __future__ import annotations

import copy

import pytest

from benchmarks.targets import verdicts


def times(p50: float, p99: float | None = None, count: int = 1000) -> dict:
    return {"count": count, "p50": p50, "p95": p50, "p99": p50 * 1.1 if p99 is None else p99, "max": 99.0}


def stages(engine: str, cameras: int, steps: int, p50: float, **more: dict) -> dict:
    whole = {"back_to_back_ms": times(p50), **more}
    common = {"benchmark": "bench_stages", "precision": "bfloat16", "parameters": 2_000_000_000}
    return {**common, "engine": engine, "cameras": cameras, "denoising_steps": steps, "whole": whole}


def engines(reference: dict | None, eager: dict | None, kept: bool = True) -> dict:
    error = {"p50": 0.1, "p99": 0.3, "max": 0.6}
    common = {"benchmark": "bench_engines", "network": "some", "parameters": 2_000_000_000, "eight_bit": ["fp8"], "observations": 100}
    names = {"cuda_graph": error}
    return {
        **common,
        **{"error_deg": names, "within_limit": {"cuda_graph": kept}},
        **{"times_as_fast_as_reference": {"4": reference}, "times_as_fast_as_eager": {"4": eager}},
    }


def ratio(median: float) -> dict:
    return {"median": median, "p25": median, "p75": median}


KEPT = {
    "graph": stages("cuda_graph", 1, 4, 7.5),
    "triton": stages("triton", 1, 4, 5.9, with_idle_gaps_ms=times(8.0, 12.0), kept_warm_ms=times(6.0, 7.0)),
    "two": stages("cuda_graph", 1, 2, 5.4),
    "cameras": stages("cuda_graph", 2, 4, 9.0),
    "engines": engines({"cuda_graph": ratio(7.0), "eager": ratio(1.5), "fp8": ratio(20.0)}, {"cuda_graph": ratio(5.0)}),
}


def outcomes(results: dict) -> list[str]:
    return [verdict.outcome for verdict in verdicts(results)]


def test_the_fastest_engine_keeps_the_promise() -> None:
    found = verdicts(KEPT)
    assert [verdict.outcome for verdict in found] == ["PASS"] * 7
    assert "5.90 ms (triton, 1000 calls)" in found[0].detail
    assert "7.00 x (cuda_graph, against the reference modules)" in found[5].detail, "neither 8 bits nor eager count"
    assert "idle gaps p50 8.00" in found[4].detail
    assert all(verdict.line().startswith("PASS  ") for verdict in found)


@pytest.mark.parametrize(
    ("index", "path", "value"),
    [
        (0, ("triton", "whole", "back_to_back_ms", "p50"), 7.6),
        (1, ("two", "whole", "back_to_back_ms", "p50"), 5.6),
        (2, ("cameras", "whole", "back_to_back_ms", "p50"), 9.01),
        (3, ("triton", "whole", "back_to_back_ms", "p99"), 7.4),
        (4, ("triton", "whole", "kept_warm_ms", "p99"), 7.6),
        (5, ("engines", "times_as_fast_as_reference", "4", "cuda_graph"), ratio(5.9)),
        (6, ("engines", "within_limit", "cuda_graph"), False),
    ],
)
def test_each_promise_can_be_broken(index: int, path: tuple[str, ...], value: object) -> None:
    results = copy.deepcopy(KEPT)
    if index == 0:
        del results["graph"]
    node = results
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    expected = ["PASS"] * 7
    expected[index] = "FAIL"
    if index == 0:
        expected[3] = "PASS"
        results["triton"]["whole"]["back_to_back_ms"]["p99"] = 8.0
    assert outcomes(results) == expected


def test_what_did_not_run_is_not_measured() -> None:
    assert set(outcomes({})) == {"not measured"}
    assert set(outcomes({"graph": None, "tests": "text"})) == {"not measured"}


def test_other_precisions_small_networks_and_few_calls_do_not_count() -> None:
    fp32, small, few = (copy.deepcopy(KEPT["two"]) for _ in range(3))
    fp32["precision"], small["parameters"] = "float32", 1_000_000
    assert set(outcomes({"a": fp32, "b": small})) == {"not measured"}
    few["denoising_steps"], few["whole"]["back_to_back_ms"]["count"] = 4, 999
    assert outcomes({"a": few})[3] == "not measured"


def test_without_the_reference_modules_our_eager_stands_in_and_is_named() -> None:
    verdict = verdicts({"engines": engines(None, {"cuda_graph": ratio(6.5)})})[5]
    assert verdict.outcome == "PASS"
    assert "our eager" in verdict.detail
