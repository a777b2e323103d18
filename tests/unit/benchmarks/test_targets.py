"""What is promised of an H200, judged from what bench_engines leaves."""

from __future__ import annotations

import copy
import re

import pytest

from benchmarks.gpu_check import promises


def engine(format: str, times: dict[str, tuple[float, float]], as_fast: dict[str, float] | None = None, kept: bool = True, calls: int = 1000) -> dict:
    ratios = {of: {"median": median} for of, median in (as_fast or {}).items()}
    return {
        "arithmetic": format,
        "times_ms": {steps: {"count": calls, "p50": p50, "p99": p99} for steps, (p50, p99) in times.items()},
        "times_as_fast_as": dict.fromkeys(times, ratios),
        "error_deg": {"p99": 0.3},
        "within_limit": kept,
    }


def result(engines: dict, **others: object) -> dict:
    facts = {"benchmark": "bench_engines", "network": "random-full", "parameters": 2.4e9, "device": "cuda", "cameras": 1, "observations": 100}
    return facts | {"engines": engines} | others


FULL = {
    "eager": engine("bf16", {"4": (40.0, 41.0)}),
    "cuda_graph": engine("bf16", {"4": (6.5, 7.0), "2": (4.0, 4.1)}, {"reference": 6.1, "eager": 6.2}),
    "compiled": engine("bf16", {"4": (4.9, 5.4), "2": (3.4, 3.6)}, {"reference": 8.0, "eager": 8.2}),
}
TRAINED = {"cuda_graph": engine("bf16", {}), "compiled": engine("bf16", {})}
KEPT = [result(FULL), result(TRAINED, network="so100-sim-reach", parameters=5e6)]
FIVE = "p50 <= 5 ms, bf16, 4 steps"


def by_promise(results: list) -> dict[str, tuple[str, str]]:
    """Promise -> outcome, and what was measured."""
    found = [re.match(r"(.{12}) (.+?)(?:  +| (?=p99 \d)|$)(.*)", line).groups() for line in promises(results)]
    return {promise: (outcome.strip(), detail) for outcome, promise, detail in found}


def outcomes(results: list) -> set[str]:
    return {outcome for outcome, _ in by_promise(results).values()}


def test_all_promises_can_be_kept() -> None:
    assert outcomes(KEPT) == {"PASS"}
    assert len(by_promise(KEPT)) == 3 + 2 + 2
    assert "4.90 ms (compiled, 1000 calls)" in by_promise(KEPT)[FIVE][1]


@pytest.mark.parametrize(
    ("promise", "name", "steps", "times"),
    [
        (FIVE, "compiled", "4", (5.1, 5.2)),
        ("p50 <= 3.5 ms, bf16, 2 steps", "compiled", "2", (3.6, 3.7)),
        ("p99 <= 1.25 x p50, bf16, 4 steps", "compiled", "4", (4.9, 6.2)),
    ],
)
def test_each_promise_can_be_broken(promise: str, name: str, steps: str, times: tuple[float, float]) -> None:
    results = copy.deepcopy(KEPT)
    results[0]["engines"][name]["times_ms"][steps] |= {"p50": times[0], "p99": times[1]}
    assert {each for each, (outcome, _) in by_promise(results).items() if outcome == "FAIL"} == {promise}


def test_an_engine_with_wrong_actions_is_not_fast() -> None:
    results = copy.deepcopy(KEPT)
    results[1]["engines"]["compiled"]["within_limit"] = False
    found = by_promise(results)
    assert found["actions of compiled near eager fp32, so100-sim-reach"][0] == "FAIL"
    assert "cuda_graph," in found["p50 <= 7 ms, bf16, 4 steps"][1]
    assert found[FIVE][0] == "FAIL"


NO_MATCH = [[result(FULL, **others)] for others in ({"parameters": 5e6}, {"device": "cpu"}, {"cameras": 2}, {"benchmark": "bench_policy"})]


@pytest.mark.parametrize("results", [[], [None, "text", {"kernels": {}}], *NO_MATCH])
def test_toys_cpus_two_cameras_and_what_did_not_run_do_not_count(results: list) -> None:
    assert outcomes(results) == {"not measured"}
