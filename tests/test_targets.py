"""What gpu_check promises is judged from the benchmarks' own results, and what was not measured is never a pass."""

from __future__ import annotations

import copy

import pytest

from benchmarks.targets import verdicts


def times(p50: float, p99: float | None = None, count: int = 1000) -> dict:
    return {"count": count, "p50": p50, "p95": p50, "p99": p50 * 1.1 if p99 is None else p99, "max": 99.0}


def stages(engine: str, cameras: int, steps: int, p50: float, **more: dict) -> dict:
    whole = {"back_to_back_ms": times(p50), **more}
    common = {"benchmark": "bench_stages", "device": "cuda", "precision": "bfloat16", "parameters": 2_000_000_000}
    return {**common, "engine": engine, "cameras": cameras, "denoising_steps": steps, "whole": whole}


def engines(reference: dict | None, eager: dict | None, kept: bool = True) -> dict:
    error = {"p50": 0.1, "p99": 0.3, "max": 0.6}
    common = {
        "benchmark": "bench_engines",
        "device": "cuda",
        "network": "some",
        "parameters": 2_000_000_000,
        "eight_bit": ["fp8"],
        "observations": 100,
    }
    names = {"cuda_graph": error}
    return {
        **common,
        **{"error_deg": names, "within_limit": {"cuda_graph": kept}},
        **{"times_as_fast_as_reference": {"4": reference}, "times_as_fast_as_eager": {"4": eager}},
    }


def eight_bit(p50: dict[str, float], network: str = "random-full", error: float = 1.2, cameras: int = 1) -> dict:
    return {
        **{
            "benchmark": "bench_eight_bit",
            "device": "cuda",
            "network": network,
            "parameters": 2_000_000_000,
            "cameras": cameras,
            "observations": 100,
        },
        "times_ms": {steps: {"fp8": times(value, count=50), "eager": times(90.0)} for steps, value in p50.items()},
        "error_deg": {"fp8": {"p50": 0.2, "p99": error, "max": 2.0}},
        "within_limit": {"fp8": error <= 1.5},
    }


def ratio(median: float) -> dict:
    return {"median": median, "p25": median, "p75": median}


KEPT = {
    "graph": stages("cuda_graph", 1, 4, 7.5),
    "triton": stages("triton", 1, 4, 4.9, with_idle_gaps_ms=times(8.0, 12.0), kept_warm_ms=times(6.0, 7.0)),
    "two": stages("cuda_graph", 1, 2, 5.4),
    "cameras": stages("cuda_graph", 2, 4, 9.0),
    "engines": engines({"cuda_graph": ratio(7.0), "eager": ratio(1.5), "fp8": ratio(20.0)}, {"cuda_graph": ratio(5.0)}),
    "eight_bit_full": eight_bit({"4": 3.9, "2": 3.4}, error=9.0),
    "eight_bit_trained": eight_bit({"4": 1.0}, "so100-sim-reach") | {"parameters": 5_000_000},
}


def outcomes(results: dict) -> list[str]:
    return [verdict.outcome for verdict in verdicts(results)]


def test_the_fastest_engine_keeps_the_promise() -> None:
    found = {verdict.promise: verdict for verdict in verdicts(KEPT)}
    assert [verdict.outcome for verdict in found.values()] == ["PASS"] * 11
    assert "4.90 ms (triton, 1000 calls)" in found[SEVEN].detail
    assert "3.90 ms (fp8, 50 calls)" in found[FP8].detail
    assert "7.00 x (cuda_graph, against the reference modules)" in found[FASTER].detail, "neither 8 bits nor eager count"
    assert "idle gaps p50 8.00" in found[WARM].detail
    assert "p99 1.200" in found["actions of fp8 near eager fp32, so100-sim-reach"].detail
    assert all(verdict.line().startswith("PASS  ") for verdict in found.values())


SEVEN, FIVE = ("p50 <= 7 ms, bf16, 1 camera, 4 steps", "p50 <= 5 ms, bf16, 1 camera, 4 steps")
TWO_STEPS, TWO_CAMERAS = ("p50 <= 5.5 ms, bf16, 1 camera, 2 steps", "p50 <= 9 ms, bf16, 2 cameras, 4 steps")
FP8, FP8_TWO_STEPS = ("p50 <= 4 ms, fp8, 1 camera, 4 steps", "p50 <= 3.5 ms, fp8, 1 camera, 2 steps")
SPREAD, WARM = ("p99 <= 1.25 x p50 over >= 1000 calls, 1 camera, 4 steps", "p99 <= 1.25 x p50 at 30 Hz with the GPU kept warm")
FASTER = ">= 6 x the eager baseline"


@pytest.mark.parametrize(
    ("promise", "path", "value"),
    [
        (FIVE, ("triton", "whole", "back_to_back_ms"), times(5.1)),
        (TWO_STEPS, ("two", "whole", "back_to_back_ms"), times(5.6)),
        (TWO_CAMERAS, ("cameras", "whole", "back_to_back_ms"), times(9.01)),
        (FP8, ("eight_bit_full", "times_ms", "4", "fp8"), times(4.1)),
        (FP8_TWO_STEPS, ("eight_bit_full", "times_ms", "2", "fp8"), times(3.6)),
        (SPREAD, ("triton", "whole", "back_to_back_ms", "p99"), 6.2),
        (WARM, ("triton", "whole", "kept_warm_ms", "p99"), 7.6),
        (FASTER, ("engines", "times_as_fast_as_reference", "4", "cuda_graph"), ratio(5.9)),
    ],
)
def test_each_promise_can_be_broken(promise: str, path: tuple[str, ...], value: object) -> None:
    results = copy.deepcopy(KEPT)
    node = results
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert {verdict.promise for verdict in verdicts(results) if verdict.outcome == "FAIL"} == {promise}


def test_an_engine_with_wrong_actions_is_not_fast() -> None:
    results = copy.deepcopy(KEPT)
    results["engines"]["within_limit"]["cuda_graph"] = False
    found = {verdict.promise: verdict for verdict in verdicts(results)}
    assert found["actions of cuda_graph near eager fp32, some"].outcome == "FAIL"
    assert "triton" in found[SEVEN].detail
    assert [found[promise].outcome for promise in (TWO_STEPS, TWO_CAMERAS, FASTER)] == ["not measured"] * 3
    results["eight_bit_trained"] = eight_bit({"4": 1.0}, "so100-sim-reach", error=1.6)
    found = {verdict.promise: verdict for verdict in verdicts(results)}
    assert (found[FP8].outcome, found[FP8].detail) == ("not measured", "its actions are outside their limit")
    assert found["actions of fp8 near eager fp32, so100-sim-reach"].outcome == "FAIL"


def test_what_did_not_run_is_not_measured() -> None:
    assert set(outcomes({})) == {"not measured"}
    assert set(outcomes({"graph": None, "tests": "text"})) == {"not measured"}


def test_other_precisions_devices_small_networks_and_few_calls_do_not_count() -> None:
    fp32, small, cpu, few = (copy.deepcopy(KEPT["two"]) for _ in range(4))
    fp32["precision"], small["parameters"], cpu["device"] = "float32", 1_000_000, "cpu"
    assert set(outcomes({"a": fp32, "b": small, "c": cpu})) == {"not measured"}
    few["denoising_steps"], few["whole"]["back_to_back_ms"]["count"] = 4, 999
    found = {verdict.promise: verdict.outcome for verdict in verdicts({"a": few})}
    assert (found[SEVEN], found[SPREAD]) == ("PASS", "not measured")


def test_without_the_reference_modules_our_eager_stands_in_and_is_named() -> None:
    (verdict,) = [verdict for verdict in verdicts({"engines": engines(None, {"cuda_graph": ratio(6.5)})}) if "6 x" in verdict.promise]
    assert verdict.outcome == "PASS"
    assert "our eager" in verdict.detail
