"""What the figures mean, in words: the model, units or calibration, the cameras, the rate, or none of these.

The rules, in this order; the first that holds is the verdict, all evidence is told:
1. joints are off by a constant, and without that the predictions are good: units/calibration;
2. the error is well below that of holding still and no joint's is large, or all are small: nothing is wrong here, suspect the loop;
3. undoing one common mistake makes the predictions good: units/calibration or cameras, as the mistake is;
4. the recording contradicts the checkpoint's units, order or ranges: units/calibration;
5. pictures are flat or distorted, or the predictions follow the pictures and are no better for it: cameras;
6. another rate than in training: rate;
7. otherwise: the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.open_loop_study.checks import CAMERAS, RATE, UNITS, Finding
from benchmarks.open_loop_study.probes import Interview

MODEL, FINE = "model", "looks fine: suspect the loop"
# Chosen figures. The demo's trained network is at 0.5 with 8 actions per chunk, networks with random weights beyond 5.
GOOD_RATIO = 0.7  # of the error of holding the chunk's first state
SMALL_UNITS = 2.0  # degrees or per cent: an error that no task notices; holding still can be as good where hardly anything moves
_POOR_UNITS = 5.0  # one joint that is off by more, and worse than holding still, is not hidden by the others
_BIAS_UNITS, _SAME_SIGN, _BIAS_SPREAD = 5.0, 0.9, 0.4  # a constant offset: so large, so often on one side, its spread so small beside it
_UNDONE = 0.7  # a mistake counts as undone when the error falls to this part
_NO_BETTER, _FOLLOWS = 1.1, 0.3  # foreign pictures: error at most this much larger, though predictions moved by this part of the error


@dataclass(frozen=True)
class Verdict:
    kind: str
    advice: str
    evidence: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "advice": self.advice, "evidence": list(self.evidence)}


def is_good(summary: Mapping[str, Any]) -> bool:
    """Whether the predictions need no explanation."""
    ratio, joints = summary["ratio_to_hold"], list(summary["joints"].values())
    poor = any(joint["mae"] > _POOR_UNITS and (joint["ratio_to_hold"] or 2.0) > 1 for joint in joints)
    return (ratio is not None and ratio <= GOOD_RATIO and not poor) or all(joint["mae"] <= SMALL_UNITS for joint in joints)


def suspects(summary: Mapping[str, Any]) -> list[int]:
    """Joints that are little or no better than holding still, worst first."""
    poor = [(joint["ratio_to_hold"] or 0.0, index) for index, joint in enumerate(summary["joints"].values())]
    return [index for found, index in sorted(poor, reverse=True) if found > GOOD_RATIO]


def judge(summary: Mapping[str, Any], offsets: Mapping[str, Any], findings: Sequence[Finding], interview: Interview | None) -> Verdict:
    """`interview` is None where the predictions are good or nothing was to be asked."""
    ratio, constant = summary["ratio_to_hold"], _constant_offsets(summary, offsets)
    if is_good(summary) and not constant:
        return Verdict(FINE, _ADVICE[FINE], (_how_good(summary), *(finding.text for finding in findings)))
    mended = _mended(interview)
    looks = [] if constant or mended else _looks_in_vain(interview)  # explained already
    evidence = [*constant, *mended, *findings, *looks]
    hinted = {finding.kind for finding in evidence if finding.decides}
    reasons = [finding.kind for finding in (*constant, *mended)] or [kind for kind in (UNITS, CAMERAS, RATE) if kind in hinted]
    kind = reasons[0] if reasons else MODEL
    how = f"error {'?' if ratio is None else f'{ratio:.2f}'} times that of holding still"
    return Verdict(kind, _ADVICE[kind], (how, *(finding.text for finding in evidence)))


def _how_good(summary: Mapping[str, Any]) -> str:
    ratio = summary["ratio_to_hold"]
    if ratio is not None and ratio <= GOOD_RATIO:
        return f"error {ratio:.2f} times that of holding still (good is up to {GOOD_RATIO})"
    return (
        f"every joint within {SMALL_UNITS:g} units; but holding still would do as well, so little moves: judge on a livelier episode or with a "
        "longer --action_horizon"
    )


def _constant_offsets(summary: Mapping[str, Any], offsets: Mapping[str, Any]) -> list[Finding]:
    """Joints that are off by a constant, if the policy is good apart from that: a poor model is off in every way."""
    shifted = [
        name
        for name, joint in offsets.items()
        if abs(joint["bias"]) >= _BIAS_UNITS and joint["same_sign"] >= _SAME_SIGN and joint["spread"] <= _BIAS_SPREAD * abs(joint["bias"])
    ]
    left = [offsets[name]["mae_without_bias"] if name in shifted else joint["mae"] for name, joint in summary["joints"].items()]
    hold = sum(joint["hold_mae"] for joint in summary["joints"].values())
    if not shifted or sum(left) > GOOD_RATIO * hold:
        return []
    return [
        Finding(
            UNITS,
            f"{name}: predictions are off by {offsets[name]['bias']:+.1f} (median; {100 * offsets[name]['same_sign']:.0f} % of frames on that side), "
            f"and by {offsets[name]['mae_without_bias']:.1f} without that: another zero point?",
        )
        for name in shifted
    ]


def _mended(interview: Interview | None) -> list[Finding]:
    """The change that helps most, if it makes the predictions good."""
    if interview is None or not interview.answers:
        return []
    best = min(interview.answers, key=lambda answer: answer.mae)
    if best.mae > _UNDONE * interview.as_is or best.mae > GOOD_RATIO * interview.hold:
        return []
    return [Finding(best.question.kind, f"with {best.question.what} the error falls from {interview.as_is:.1f} to {best.mae:.1f}")]


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
    RATE: "recording and training ran at different rates. Use a recording at the checkpoint's rate.",
    MODEL: "the recording fits the checkpoint and is predicted poorly: train longer or on more data, or check instruction and checkpoint.",
}
