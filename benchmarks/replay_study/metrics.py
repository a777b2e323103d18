"""Figures of a motion. Degrees; joints called `gripper` are in per cent and left out of jumps and jerk.

A *boundary* is a tick at which another chunk begins to play or a freeze begins: there, and only there, the architectures differ.
Axis alphabet of this file: K ticks, J joints, G instants of the regular grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.replay_study.trial import Motion

_LAG_STEP_S = 0.01
_ONE_TICK = 1.5  # a step of more than this many periods in the recording leaves something out; less is the jitter of the ticks
_LONGEST_LAG = 0.5  # of the motion; beyond, too little is left to compare
# Two-sided 95 % quantiles of Student's t for 1, 2, .. 30 degrees of freedom (any table of statistics), and of the normal distribution.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95 = 1.960


def measure(motion: Motion) -> dict[str, Any]:
    """All figures of one trial. `mae` and `rmse` are dicts by joint; "raw" compares equal instants, "aligned" after taking the delay out."""
    body = [index for index, name in enumerate(motion.joint_names) if "gripper" not in name]
    delay_s = tracking_delay_s(motion)
    raw, aligned = errors(motion, 0.0), errors(motion, delay_s)
    return {
        "frozen_ticks": frozen_ticks(motion),
        "freeze_s": freeze_s(motion),
        **boundary_jumps(motion, body),
        "jerk_rms_deg_s3": jerk_rms(motion, body),
        "tracking_delay_s": delay_s,
        "target_lag_s": float(np.median(motion.sent_s - motion.played_s)),
        "went_back_s": float(np.maximum(-np.diff(motion.played_s), 0).sum()),
        "never_played_s": never_played_s(motion),
        "duration_s": float(motion.sent_s[-1] + motion.period_s),
        "finished": float(motion.finished),
        "missed_ticks": float(motion.missed_ticks),
        "speed_limited": float(motion.speed_limited),
        "mae_raw": float(np.abs(raw).mean()),
        "mae_aligned": float(np.abs(aligned).mean()),
        "joints": {
            f"{name}_{kind}": dict(zip(motion.joint_names, values.tolist(), strict=True))
            for kind, gap in (("raw", raw), ("aligned", aligned))
            for name, values in (("mae", np.abs(gap).mean(0)), ("rmse", np.sqrt((gap**2).mean(0))))
        },
    }


def never_played_s(motion: Motion) -> float:
    """How much of the recording was jumped over, forward."""
    steps_s = np.diff(motion.played_s)
    return float((steps_s - motion.period_s)[steps_s > _ONE_TICK * motion.period_s].sum())


def _gaps(motion: Motion) -> np.ndarray:
    """(N,) ticks from the target before; 1 for the first."""
    steps = np.diff(motion.sent_s, prepend=motion.sent_s[0] - motion.period_s) / motion.period_s
    return np.maximum(1, np.rint(steps)).astype(np.int64)


def _waits(motion: Motion) -> np.ndarray:
    """Indices of the targets that the arm stood still for, without the first chunk's: nothing had moved yet."""
    return motion.entries[motion.waited & (motion.entries > 0)]


def frozen_ticks(motion: Motion) -> int:
    """Deadlines after the first target at which the arm got nothing new because the network was not ready; missed ones are counted apart."""
    return int(motion.starved.sum() + (_gaps(motion)[_waits(motion)] - 1).sum())


def freeze_s(motion: Motion) -> float:
    """The same in seconds: held ticks, and what the pauses lasted beyond one period."""
    waits = _waits(motion)
    pauses_s = motion.sent_s[waits] - motion.sent_s[waits - 1] - motion.period_s
    return float(motion.starved.sum() * motion.period_s + np.maximum(pauses_s, 0).sum())


def per_tick(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Targets (K, J) at every deadline, those of pauses held, and boundary (K,)."""
    gaps = _gaps(motion)
    ticks = np.cumsum(gaps) - 1  # of each target
    targets = np.repeat(motion.targets, np.append(gaps[1:], 1), axis=0)  # (K, J)
    boundary = np.zeros(len(targets), bool)
    boundary[ticks[motion.entries[motion.entries > 0]]] = True
    freeze_begins = motion.starved & ~np.roll(motion.starved, 1)
    boundary[ticks[freeze_begins]] = True
    waits = _waits(motion)
    boundary[ticks[waits - 1][gaps[waits] > 1] + 1] = True
    return targets, boundary


def boundary_jumps(motion: Motion, body: Sequence[int]) -> dict[str, float]:
    """The largest change of a joint's commanded velocity at a boundary, and the largest step there in one tick.

    The tick after a boundary counts as well: a jump's way back is part of it."""
    targets, boundary = per_tick(motion)
    at = np.flatnonzero(boundary)
    at = np.unique(np.concatenate([at, at + 1]))
    at = at[(at >= 2) & (at < len(targets))]
    if not at.size:
        return {"boundary_jump_deg_s": 0.0, "boundary_step_deg": 0.0}
    step = np.diff(targets[:, body], axis=0)  # (K - 1, J): entry k is the step into tick k + 1
    change = np.abs(step[at - 1] - step[at - 2]) / motion.period_s
    return {"boundary_jump_deg_s": float(change.max()), "boundary_step_deg": float(np.abs(step[at - 1]).max())}


def jerk_rms(motion: Motion, body: Sequence[int]) -> float:
    """Root mean square over instants and joints of the third difference of the arm's pose at the control rate, in degrees per second cubed."""
    if len(motion.arm) < 4:
        return math.nan
    return float(np.sqrt((np.diff(motion.arm[:, body], 3, axis=0) ** 2).mean()) / motion.period_s**3)


def errors(motion: Motion, delay_s: float) -> np.ndarray:
    """Arm minus reference (G', J), the reference taken `delay_s` earlier; instants before that are left out."""
    grid_s = motion.grid_s[motion.grid_s >= delay_s - 1e-9]
    reference = np.stack([np.interp(grid_s - delay_s, motion.grid_s, column) for column in motion.reference.T], axis=1)
    return motion.arm[-len(grid_s) :] - reference


def tracking_delay_s(motion: Motion) -> float:
    """The delay at which arm and reference correlate best (cross-correlation, mean over the joints that move), from 0 to half the motion."""
    moving = np.flatnonzero((motion.reference.std(0) > 1e-6) & (motion.arm.std(0) > 1e-6))
    if not moving.size:
        return 0.0
    best, best_s = -math.inf, 0.0
    for delay_s in np.arange(0.0, _LONGEST_LAG * motion.grid_s[-1], _LAG_STEP_S):
        grid_s = motion.grid_s[motion.grid_s >= delay_s - 1e-9]
        arm = motion.arm[-len(grid_s) :, moving]
        reference = np.stack([np.interp(grid_s - delay_s, motion.grid_s, motion.reference[:, j]) for j in moving], axis=1)
        arm, reference = arm - arm.mean(0), reference - reference.mean(0)
        power = np.sqrt((arm**2).sum(0) * (reference**2).sum(0))
        score = float(((arm * reference).sum(0) / np.maximum(power, 1e-12)).mean())
        if score > best:
            best, best_s = score, float(delay_s)
    return best_s


def summarise(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over trials of every figure, and half the width of its 95 % confidence interval (Student's t; None with a single trial)."""
    return {key: _summary([trial[key] for trial in trials]) for key in trials[0]}


def t95(freedom: int) -> float:
    """Beyond the table linear in 1 / freedom down to the normal quantile, as tables of statistics recommend: right to 0.001."""
    return _T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95 + (_T95[-1] - _NORMAL95) * len(_T95) / freedom


def _summary(values: list[Any]) -> dict[str, Any]:
    if isinstance(values[0], dict):
        return {key: _summary([value[key] for value in values]) for key in values[0]}
    count, mean = len(values), float(np.mean(values))
    half = None
    if count > 1:
        half = round(t95(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count), 4)
    return {"mean": round(mean, 4), "ci95": half, "max": round(float(np.max(values)), 4)}
