"""What the project promises of a GPU of the H200's class, and whether the steps of gpu_check kept it. Standard library only, as gpu_check itself.

Speed is judged at the published size with random weights: whole calls, camera frame in host memory to joint targets in host memory, one camera.
Errors are judged on the trained network, where a degree means something; an engine whose errors are too large there is no engine to be fast with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_BF16, _FP8 = "bf16", "fp8"
_P50_LIMITS_MS = ((_BF16, 4, 7.0), (_BF16, 4, 5.0), (_BF16, 2, 3.5), (_FP8, 4, 5.0), (_FP8, 4, 4.0))  # format, denoising steps
_P99_OVER_P50 = 1.25
_TIMES_AS_FAST = 6.0  # as the reference modules
_LEAST_CALLS, _LEAST_OBSERVATIONS = 1000, 100
_FULL_SIZE = 1e9  # parameters: everything else is a toy, whose speed says nothing
_NO_PRODUCT = ("eager", "reference")  # what engines are compared with


@dataclass(frozen=True)
class Verdict:
    """One line: what was promised, what was measured, by which engine."""

    promise: str
    outcome: Literal["PASS", "FAIL", "not measured"]
    detail: str

    def line(self) -> str:
        return f"{self.outcome:<12} {self.promise:<52} {self.detail}"


@dataclass(frozen=True)
class Row:
    """One engine at one step count."""

    engine: str
    format: str
    steps: int
    times: Mapping[str, float]
    faster: Mapping[str, Any]


def verdicts(results: Iterable[Any]) -> list[Verdict]:
    """results: what bench_engines left, in any order; anything else is passed over."""
    found = [each for each in results if isinstance(each, dict) and each.get("benchmark") == "bench_engines" and "engines" in each]
    trained = [each for each in found if not each["network"].startswith("random")]
    wrong = {name for each in trained for name, engine in each["engines"].items() if not engine["within_limit"]}
    rows = [row for each in found for row in _rows(each) if row.engine not in wrong]
    return [*(_p50(rows, *promised) for promised in _P50_LIMITS_MS), _spread(rows), _speed_up(rows), *_accuracy(trained)]


def _rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """What counts for speed: the published size, on a GPU, one camera, enough calls."""
    if result["parameters"] < _FULL_SIZE or not result["device"].startswith("cuda") or result["cameras"] != 1:
        return
    for name, engine in result["engines"].items():
        for steps, times in engine["times_ms"].items():
            if name not in _NO_PRODUCT and times["count"] >= _LEAST_CALLS:
                yield Row(name, engine["arithmetic"], int(steps), times, engine["times_as_fast_as"][steps])


def _p50(rows: list[Row], format: str, steps: int, limit_ms: float) -> Verdict:
    promise = f"p50 <= {limit_ms:g} ms, {format}, {steps} steps"
    best = min((row for row in rows if (row.format, row.steps) == (format, steps)), key=lambda row: row.times["p50"], default=None)
    if best is None:
        return Verdict(promise, "not measured", "")
    return Verdict(promise, _passed(best.times["p50"] <= limit_ms), f"{best.times['p50']:.2f} ms ({best.engine}, {best.times['count']} calls)")


def _spread(rows: list[Row]) -> Verdict:
    """Of the fastest engine in 16 bits, which is the one to be used."""
    promise = f"p99 <= {_P99_OVER_P50:g} x p50, {_BF16}, 4 steps"
    best = min((row for row in rows if (row.format, row.steps) == (_BF16, 4)), key=lambda row: row.times["p50"], default=None)
    if best is None:
        return Verdict(promise, "not measured", "")
    over = best.times["p99"] / best.times["p50"]
    return Verdict(promise, _passed(over <= _P99_OVER_P50), f"{over:.2f} (p99 {best.times['p99']:.2f} ms, {best.engine})")


def _speed_up(rows: list[Row]) -> Verdict:
    """Against the reference modules; where they are not installed against our eager engine, which does less than they do: the line then says so."""
    promise = f">= {_TIMES_AS_FAST:g} x the reference modules, {_BF16}, 4 steps"
    for of, words in (("reference", ""), ("eager", ", against our eager: the reference modules are not installed, and do more")):
        known = [(row.faster[of]["median"], row.engine) for row in rows if (row.format, row.steps) == (_BF16, 4) and row.faster.get(of)]
        if known:
            times, engine = max(known)
            return Verdict(promise, _passed(times >= _TIMES_AS_FAST), f"{times:.2f} x ({engine}{words})")
    return Verdict(promise, "not measured", "")


def _accuracy(trained: list[Mapping[str, Any]]) -> list[Verdict]:
    """One line for each engine of each network."""
    lines = []
    for result in trained:
        for name, engine in result["engines"].items():
            promise = f"actions of {name} near eager fp32, {result['network']}"
            detail = f"p99 {engine['error_deg']['p99']:.3f} in joint units over {result['observations']} observations"
            enough = result["observations"] >= _LEAST_OBSERVATIONS
            lines.append(Verdict(promise, _passed(engine["within_limit"]) if enough else "not measured", detail))
    return lines or [Verdict("actions near eager fp32, trained network", "not measured", "")]


def _passed(kept: bool) -> Literal["PASS", "FAIL"]:
    return "PASS" if kept else "FAIL"
