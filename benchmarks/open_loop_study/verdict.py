"""What the figures mean, in words: the model, units or calibration, the cameras, the rate, the timing, or none of these.

The rules, in this order; the first that holds is the verdict, all evidence is told:
1. joints are off by a constant, and without that the predictions are good: units/calibration;
2. the error is well below that of holding still and no joint's is large, or all are small: nothing is wrong here, suspect the loop;
3. undoing one common mistake makes the predictions good: units/calibration or cameras, as the mistake is;
4. the recording contradicts the checkpoint's units, order or ranges: units/calibration;
5. pictures are flat or distorted, or the predictions follow the pictures and are no better for it: cameras;
6. another rate than in training: rate;
7. otherwise: the model.

Timing stands beside 1 and 3: where the predictions become good once they are shifted in time, and that leaves less of the error than 1 or 3 would,
the actions were recorded late or early: timing (unless the rate is another one, which shifts them too). Any other shift that helps is told as a hint.
Large and small are shares of the range that a joint had in training: degrees, per cent and radians are judged alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.open_loop_study.checks import CAMERAS, RATE, TIMING, UNITS, Finding
from benchmarks.open_loop_study.metrics import MOST_SHIFT, Compared
from benchmarks.open_loop_study.probes import Interview

MODEL, FINE = "model", "looks fine: suspect the loop"
# Chosen figures. The demo's trained network is at 0.5 with 8 actions per chunk, networks with random weights beyond 5.
GOOD_RATIO = 0.7  # of the error of holding the chunk's first state
# Shares of a joint's trained range; an SO-100's shoulder turns through about 140 degrees.
SMALL_SHARE = 0.02  # an error that no task notices; holding still can be as good where hardly anything moves
_STILL_SHARE = 0.01  # hardly anything moves where holding still errs by no more; elsewhere it must not be the better policy
_POOR_SHARE = 0.05  # one joint that is off by more, and worse than holding still, is not hidden by the others
_BIAS_SHARE, _SAME_SIGN, _BIAS_SPREAD = 0.05, 0.9, 0.4  # a constant offset: so large, so often on one side, its spread so small beside it
ENOUGH_EPISODES = 5  # chosen: with fewer the spread over episodes says nothing
_UNDONE = 0.7  # a mistake counts as undone when the error falls to this part
_NO_BETTER, _FOLLOWS = 1.1, 0.3  # foreign pictures: error at most this much larger, though predictions moved by this part of the error


@dataclass(frozen=True)
class Verdict:
    kind: str
    advice: str
    evidence: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "advice": self.advice, "evidence": list(self.evidence)}


@dataclass(frozen=True)
class _Explanation:
    """`left`: the part of the error that remains once it is undone."""

    findings: Sequence[Finding]
    left: float


def is_good(summary: Mapping[str, Any], findings: Sequence[Finding]) -> bool:
    """Whether the predictions need no explanation."""
    ratio, joints = summary["ratio_to_hold"], list(summary["joints"].values())
    poor = any(joint["mae"] > _POOR_SHARE * joint["trained_range"] and (joint["ratio_to_hold"] or 2.0) > 1 for joint in joints)
    contradicted = any(finding.kind == UNITS and finding.decides for finding in findings)  # shares of a range in other units say nothing
    return (ratio is not None and ratio <= GOOD_RATIO and not poor) or (not contradicted and _is_small(ratio, joints))


def _is_small(ratio: float | None, joints: Sequence[Mapping[str, Any]]) -> bool:
    still = all(joint["hold_mae"] <= _STILL_SHARE * joint["trained_range"] for joint in joints)
    return (still or (ratio is not None and ratio <= 1)) and all(joint["mae"] <= SMALL_SHARE * joint["trained_range"] for joint in joints)


def suspects(summary: Mapping[str, Any]) -> list[int]:
    """Joints that are little or no better than holding still, worst first."""
    poor = [(joint["ratio_to_hold"] or 0.0, index) for index, joint in enumerate(summary["joints"].values())]
    return [index for found, index in sorted(poor, reverse=True) if found > GOOD_RATIO]


def judge(
    summary: Mapping[str, Any], offsets: Mapping[str, Any], findings: Sequence[Finding], interview: Interview | None, shift: Mapping[str, Any]
) -> Verdict:
    """`interview` is None where the predictions are good or nothing was to be asked; `shift` is what metrics.best_shift found."""
    ratio, constant, timing = summary["ratio_to_hold"], _constant_offsets(summary, offsets), _timing(summary, shift, findings)
    decisive = [one for one in timing if one.findings[0].decides]
    offset = [one for one in constant if all(one.left <= other.left for other in decisive)]  # a steady motion makes a delay look like an offset
    if is_good(summary, findings) and not offset:
        told = [*findings, *(finding for one in timing for finding in one.findings)]
        return Verdict(FINE, _ADVICE[FINE], (_how_good(summary), *(finding.text for finding in told)))
    explained = sorted([*(constant or _mended(interview)), *decisive], key=lambda one: one.left)
    looks = [] if explained else _looks_in_vain(interview)
    hints = [finding for one in timing if one not in decisive for finding in one.findings]
    evidence = [*(finding for one in explained for finding in one.findings), *findings, *looks, *hints]
    hinted = {finding.kind for finding in evidence if finding.decides}
    reasons = [one.findings[0].kind for one in explained] or [kind for kind in (UNITS, CAMERAS, RATE) if kind in hinted]
    kind = reasons[0] if reasons else MODEL
    how = f"error {'?' if ratio is None else f'{ratio:.2f}'} times that of holding still"
    return Verdict(kind, _ADVICE[kind], (how, *(finding.text for finding in evidence)))


def rests_on(compared: Compared) -> dict[str, Any]:
    """How much was looked at; `warning` says when that is little."""
    episodes = len(np.unique(compared.episode))
    few = f"Fewer than {ENOUGH_EPISODES} episodes: another one may well give another verdict. Look at more before you rely on it (--episodes all)"
    return {
        "episodes": episodes,
        "chunks": int((compared.lead == 0).sum()),
        "frames": len(compared.frame),
        "warning": few if episodes < ENOUGH_EPISODES else None,
    }


def _how_good(summary: Mapping[str, Any]) -> str:
    ratio = summary["ratio_to_hold"]
    if ratio is not None and ratio <= GOOD_RATIO:
        return f"error {ratio:.2f} times that of holding still (good is up to {GOOD_RATIO})"
    return (
        f"every joint within {100 * SMALL_SHARE:g} % of its trained range; but holding still would do about as well, so little moves: judge on a "
        "livelier episode or with a longer --action_horizon"
    )


def _constant_offsets(summary: Mapping[str, Any], offsets: Mapping[str, Any]) -> list[_Explanation]:
    """Joints that are off by a constant, if the policy is good apart from that: a poor model is off in every way."""
    shifted = [
        name
        for name, joint in offsets.items()
        if abs(joint["bias"]) >= _BIAS_SHARE * summary["joints"][name]["trained_range"]
        and joint["same_sign"] >= _SAME_SIGN
        and joint["spread"] <= _BIAS_SPREAD * abs(joint["bias"])
    ]
    left = [offsets[name]["mae_without_bias"] if name in shifted else joint["mae"] for name, joint in summary["joints"].items()]
    hold = sum(joint["hold_mae"] for joint in summary["joints"].values())
    if not shifted or sum(left) > GOOD_RATIO * hold:
        return []
    found = [
        Finding(
            UNITS,
            f"{name}: predictions are off by {offsets[name]['bias']:+.1f} (median; {100 * offsets[name]['same_sign']:.0f} % of frames on that side), "
            f"and by {offsets[name]['mae_without_bias']:.1f} without that: another zero point?",
        )
        for name in shifted
    ]
    return [_Explanation(found, sum(left) / sum(joint["mae"] for joint in summary["joints"].values()))]


def _timing(summary: Mapping[str, Any], shift: Mapping[str, Any], findings: Sequence[Finding]) -> list[_Explanation]:
    """A shift in time that helps; it decides if it makes the predictions good."""
    frames, mae, shifted_mae = shift["frames"], summary["mae"], shift["mae"]
    if not frames:
        return []
    count = f"{abs(frames)} frame{'s' if abs(frames) > 1 else ''}{' or more' if abs(frames) == MOST_SHIFT else ''}"
    recorded, trained = ("late", "ahead of") if frames > 0 else ("early", "behind")
    finding = Finding(
        TIMING,
        f"predictions run {trained} the recorded actions by {count}: shifted so, the error falls from {mae:.1f} to {shifted_mae:.1f}. "
        f"Actions recorded {recorded}, or a network that was trained with actions {trained} those of this recording",
    )
    another_rate = any(other.kind == RATE and other.decides for other in findings)
    decides = shifted_mae <= _UNDONE * mae and shifted_mae <= GOOD_RATIO * summary["hold_mae"] and not another_rate
    return [_Explanation([replace(finding, decides=decides)], shifted_mae / mae)]


def _mended(interview: Interview | None) -> list[_Explanation]:
    """The change that helps most, if it makes the predictions good."""
    if interview is None or not interview.answers:
        return []
    best = min(interview.answers, key=lambda answer: answer.mae)
    if best.mae >= _UNDONE * interview.as_is or best.mae > GOOD_RATIO * interview.hold:
        return []
    finding = Finding(best.question.kind, f"with {best.question.what} the error falls from {interview.as_is:.1f} to {best.mae:.1f}")
    return [_Explanation([finding], best.mae / interview.as_is)]


def _looks_in_vain(interview: Interview | None) -> list[Finding]:
    if interview is None:
        return []
    foreign = interview.foreign
    if foreign.mae > _NO_BETTER * interview.as_is or foreign.moved < _FOLLOWS * interview.as_is:
        return []
    return [
        Finding(
            CAMERAS,
            f"predictions follow the pictures (other frames' pictures move them by {foreign.moved:.1f}) and are no better for the right ones "
            f"(error {interview.as_is:.1f}, with other frames' {foreign.mae:.1f}): another view than in training?",
        )
    ]


_ADVICE = {
    FINE: (
        "the checkpoint predicts what was recorded. If the arm still misbehaves, look at what the recording does not have: the arm's calibration and "
        "cameras now (--dry_run compares them), the rate of the loop, the light, --action_horizon and the delay of inference."
    ),
    UNITS: "recording and checkpoint count joints differently. Compare the ranges above; check use_degrees, the calibration and meta/modality.json.",
    CAMERAS: "compare the pictures in the plot with those of the training data: which camera is which (--camera_map), its place, mirroring, colours.",
    TIMING: (
        "the recorded actions belong to other frames than their states and pictures. Check that each row holds the state and the pictures from just "
        "before its action was sent, that no frames were dropped or queued while recording, the delay of the cameras, and whether the checkpoint's "
        "training data had its actions ahead of the measured joints."
    ),
    RATE: "recording and training ran at different rates. Use a recording at the checkpoint's rate.",
    MODEL: "the recording fits the checkpoint and is predicted poorly: train longer or on more data, or check instruction and checkpoint.",
}
