"""What the project promises of a GPU of the H200's class, and whether a run of gpu_check kept it. Standard library only, as gpu_check itself.

The figures are for the published size with random weights, bf16, whole calls: camera frame in host memory to joint targets in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_P50_LIMITS_MS = ((1, 4, 7.0), (1, 4, 5.0), (1, 2, 5.5), (2, 4, 9.0))  # cameras, denoising steps, ms; the second is what fused kernels are for
_FP8_P50_LIMITS_MS = ((1, 4, 4.0), (1, 2, 3.5))
_P99_OVER_P50 = 1.25
_TIMES_AS_FAST = 6.0  # as the eager baseline: the reference modules
_PRECISION = "bfloat16"
_CALLS = 1000  # of which a percentile is taken
_FULL_SIZE = 1e9  # parameters: everything else is a toy, whose speed says nothing


@dataclass(frozen=True)
class Verdict:
    """One line: what was promised, what was measured, by which engine."""

    promise: str
    outcome: Literal["PASS", "FAIL", "not measured"]
    detail: str

    def line(self) -> str:
        return f"{self.outcome:<12} {self.promise:<58} {self.detail}"


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """`results`: last line of each benchmark that ran, by the name of its step. An engine whose actions are outside their limit anywhere is no
    engine to be fast with: it is left out of every line on speed."""
    engines = [result for result in results.values() if _is(result, "bench_engines")]
    eight_bit = [result for result in results.values() if _is(result, "bench_eight_bit")]
    wrong = {name for result in (*engines, *_trained(eight_bit)) for name, kept in result["within_limit"].items() if not kept}
    stages = [result for result in results.values() if _is(result, "bench_stages") and _counts(result)]
    stages = [result for result in stages if result["precision"] == _PRECISION and result["engine"] not in wrong]
    return [
        *(_p50(stages, *promised) for promised in _P50_LIMITS_MS),
        *(_fp8_p50(eight_bit, wrong, *promised) for promised in _FP8_P50_LIMITS_MS),
        _spread(stages),
        _idle(stages),
        _speed_up(engines, wrong),
        *_accuracy([*engines, *_trained(eight_bit)]),
    ]


def _trained(eight_bit: list[dict]) -> list[dict]:
    """8 bits in a network with random weights tell speed and no accuracy: there is no action for the error to be small against."""
    return [result for result in eight_bit if not result["network"].startswith("random")]


def _counts(result: Mapping[str, Any]) -> bool:
    """For speed: the published size, on a GPU."""
    return result["parameters"] > _FULL_SIZE and result["device"].startswith("cuda")


def _is(result: Any, name: str) -> bool:
    return isinstance(result, dict) and result.get("benchmark") == name


def _fastest(stages: list[dict], cameras: int, steps: int) -> dict | None:
    """Of the engines that were measured with these settings."""
    fitting = [result for result in stages if (result["cameras"], result["denoising_steps"]) == (cameras, steps)]
    return min(fitting, key=lambda result: result["whole"]["back_to_back_ms"]["p50"], default=None)


def _p50(stages: list[dict], cameras: int, steps: int, limit_ms: float) -> Verdict:
    promise = f"p50 <= {limit_ms:g} ms, bf16, {cameras} camera{'s' * (cameras > 1)}, {steps} steps"
    best = _fastest(stages, cameras, steps)
    if best is None:
        return Verdict(promise, "not measured", "")
    times = best["whole"]["back_to_back_ms"]
    return Verdict(promise, _passed(times["p50"] <= limit_ms), f"{times['p50']:.2f} ms ({best['engine']}, {times['count']} calls)")


def _fp8_p50(eight_bit: list[dict], wrong: set[str], cameras: int, steps: int, limit_ms: float) -> Verdict:
    promise = f"p50 <= {limit_ms:g} ms, fp8, {cameras} camera{'s' * (cameras > 1)}, {steps} steps"
    found = [
        result["times_ms"][str(steps)]["fp8"]
        for result in eight_bit
        if _counts(result) and result["cameras"] == cameras and "fp8" in result["times_ms"].get(str(steps), {})
    ]
    if not found or "fp8" in wrong:
        return Verdict(promise, "not measured", "its actions are outside their limit" if found else "")
    times = min(found, key=lambda times: times["p50"])
    return Verdict(promise, _passed(times["p50"] <= limit_ms), f"{times['p50']:.2f} ms (fp8, {times['count']} calls)")


def _spread(stages: list[dict]) -> Verdict:
    promise = f"p99 <= {_P99_OVER_P50:g} x p50 over >= {_CALLS} calls, 1 camera, 4 steps"
    best = _fastest(stages, 1, 4)
    if best is None or best["whole"]["back_to_back_ms"]["count"] < _CALLS:
        return Verdict(promise, "not measured", "")
    times = best["whole"]["back_to_back_ms"]
    ratio = times["p99"] / times["p50"]
    return Verdict(promise, _passed(ratio <= _P99_OVER_P50), f"{ratio:.2f} (p99 {times['p99']:.2f} ms, {best['engine']})")


def _idle(stages: list[dict]) -> Verdict:
    """With idle gaps the clocks sink: no limit of its own was promised, but the same ratio has to hold with the GPU kept warm."""
    promise = f"p99 <= {_P99_OVER_P50:g} x p50 at 30 Hz with the GPU kept warm"
    paced = next((result for result in stages if "kept_warm_ms" in result["whole"]), None)
    if paced is None:
        return Verdict(promise, "not measured", "")
    warm, idle, busy = (paced["whole"][name] for name in ("kept_warm_ms", "with_idle_gaps_ms", "back_to_back_ms"))
    detail = ", ".join(f"{what} p50 {t['p50']:.2f} p99 {t['p99']:.2f}" for what, t in (("warm", warm), ("idle gaps", idle), ("back to back", busy)))
    return Verdict(promise, _passed(warm["p99"] <= _P99_OVER_P50 * warm["p50"]), f"{detail} ms ({paced['engine']})")


def _speed_up(engines: list[dict], wrong: set[str]) -> Verdict:
    """Against the reference modules; where they are not installed against our eager engine, which does less than they do: the line then says so."""
    promise = f">= {_TIMES_AS_FAST:g} x the eager baseline"
    for kind, baseline in (("reference", "the reference modules"), ("eager", "our eager; the reference modules are not installed and do more")):
        found = [
            (ratio["median"], name)
            for result in engines
            if _counts(result)
            for name, ratio in (result[f"times_as_fast_as_{kind}"].get("4") or {}).items()
            if name not in {"eager", "reference", *result["eight_bit"], *wrong}
        ]
        if found:
            ratio, name = max(found)
            if kind == "eager":
                promise = f">= {_TIMES_AS_FAST:g} x our own eager engine"
            return Verdict(promise, _passed(ratio >= _TIMES_AS_FAST), f"{ratio:.2f} x ({name}, against {baseline})")
    return Verdict(promise, "not measured", "")


def _accuracy(engines: list[dict]) -> list[Verdict]:
    found = []
    for result in engines:
        for name, error in result["error_deg"].items():
            detail = f"p50 {error['p50']:.3f}, p99 {error['p99']:.3f}, max {error['max']:.3f} degrees ({result['observations']} observations)"
            found.append(Verdict(f"actions of {name} near eager fp32, {result['network']}", _passed(result["within_limit"][name]), detail))
    return found or [Verdict("actions near eager fp32", "not measured", "")]


def _passed(kept: bool) -> Literal["PASS", "FAIL"]:
    return "PASS" if kept else "FAIL"
