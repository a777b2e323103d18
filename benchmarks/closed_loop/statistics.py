"""Figures of a cell, each with what its number of episodes leaves open. Intervals are at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.closed_loop.episode import Outcome
from gr00t_fast.measurement import wilson_interval

_RESAMPLES = 4000


def figures_of(outcomes: Sequence[Outcome], episode_s: float, deadlines_s: Sequence[float]) -> dict[str, Any]:
    """Success within the episode and within each deadline, time to success, smoothness. JSON-ready.

    mean_time_s counts an episode without success as the whole episode (a restricted mean), so that slow and failed ones both show and none is left
    out; median_time_s is None where half the episodes or more fail.
    """
    times_s = times_of(outcomes, math.inf)
    bounded_s = np.minimum(times_s, episode_s)
    median_s = float(np.median(times_s))
    return {
        "episodes": len(outcomes),
        "success": rate_of(np.isfinite(times_s)),
        "within": {f"{deadline_s:g}": rate_of(times_s <= deadline_s) for deadline_s in deadlines_s},
        "mean_time_s": round(float(bounded_s.mean()), 3),
        "mean_time_95_s": _bootstrapped_mean(bounded_s),
        "median_time_s": round(median_s, 3) if math.isfinite(median_s) else None,
        **_jerk_of(outcomes),
        "median_end_distance_mm": round(1000 * float(np.median([outcome.end_distance_m for outcome in outcomes])), 1),
        "median_tip_path_m": round(float(np.median([outcome.tip_path_m for outcome in outcomes])), 3),
        "mean_inferences": round(float(np.mean([outcome.inferences for outcome in outcomes])), 2),
        "mean_starved_ticks": round(float(np.mean([outcome.starved_ticks for outcome in outcomes])), 2),
        "failed_seeds": [outcome.seed for outcome in outcomes if outcome.solved_s is None],
    }


def _jerk_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    noted = [outcome.jerk_rms_deg_s3 for outcome in outcomes if outcome.jerk_rms_deg_s3 is not None]
    return {"median_jerk_deg_s3": round(float(np.median(noted)), 1) if noted else None, "episodes_with_jerk": len(noted)}


def times_of(outcomes: Sequence[Outcome], without: float) -> np.ndarray:
    """(n,) seconds to success, by seed; `without` where there was none."""
    return np.array([without if outcome.solved_s is None else outcome.solved_s for outcome in sorted(outcomes, key=lambda outcome: outcome.seed)])


def rate_of(solved: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(solved.sum()), len(solved))
    return {"successes": int(solved.sum()), "rate": round(float(solved.mean()), 4), "wilson_95": [round(low, 4), round(high, 4)]}


def difference(outcomes: Sequence[Outcome], reference: Sequence[Outcome], episode_s: float) -> dict[str, Any] | None:
    """`outcomes` minus `reference` on the seeds that both have: success rate (Newcombe's interval for paired rates), and mean time."""
    both = {outcome.seed for outcome in outcomes} & {outcome.seed for outcome in reference}
    if not both:
        return None
    ours, theirs = (times_of([outcome for outcome in arm if outcome.seed in both], math.inf) for arm in (outcomes, reference))
    lost, won = int((np.isinf(ours) & np.isfinite(theirs)).sum()), int((np.isfinite(ours) & np.isinf(theirs)).sum())
    seconds = np.minimum(ours, episode_s) - np.minimum(theirs, episode_s)
    low, high = newcombe_interval(int(np.isfinite(ours).sum()), int(np.isfinite(theirs).sum()), lost, won, len(both))
    return {
        "seeds": len(both),
        "rate": round((won - lost) / len(both), 4),
        "rate_95": [round(low, 4), round(high, 4)],
        "lost": lost,
        "won": won,
        "mean_time_s": round(float(seconds.mean()), 3),
        "mean_time_95_s": _bootstrapped_mean(seconds),
    }


def newcombe_interval(ours: int, theirs: int, lost: int, won: int, trials: int) -> tuple[float, float]:
    """95 % interval of a difference of paired rates (Newcombe 1998, method 10). ours, theirs: successes of `trials`; lost, won: pairs in which only
    they, only we succeeded. The correlation is corrected for continuity, so that the interval has a width also where no pair differs."""
    rates = ours / trials, theirs / trials
    intervals = wilson_interval(ours, trials), wilson_interval(theirs, trials)
    both, neither = ours - won, trials - ours - lost
    spread = math.sqrt(ours * (trials - ours) * theirs * (trials - theirs))
    agreement = both * neither - won * lost
    corrected = agreement if agreement < 0 else max(agreement - trials / 2, 0.0)
    correlation = corrected / spread if spread else 0.0
    below, above = [(rate - low, high - rate) for rate, (low, high) in zip(rates, intervals, strict=True)]

    def apart(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))

    centre = rates[0] - rates[1]
    return centre - apart(below[0], above[1]), centre + apart(below[1], above[0])


def _bootstrapped_mean(values: np.ndarray) -> list[float]:
    """Percentile bootstrap over episodes; the same resamples for the same number of episodes."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return [round(float(bound), 3) for bound in np.percentile(values[picks].mean(axis=1), (2.5, 97.5))]
