"""What the quantiser did, for people (Markdown) and programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr00t_fast.export.quantise import Outcome, Settings

_NAME = "quantisation"


def build_report(outcome: Outcome | None, settings: Settings, calibration: Mapping[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = {"format": settings.scheme, "runtime": settings.target, "calibration": dict(calibration)}
    if outcome is None:
        return {**report, "layers": "all linear layers, activations rounded with scales found at run time"}
    kept = [verdict for verdict in outcome.groups if verdict.kept]
    return {
        **report,
        "denoising_steps": settings.denoising_steps,
        "limit_p99": settings.limit,
        "trial_samples": outcome.trial_samples,
        "action_error_on_trial_samples": None if outcome.error is None else outcome.error.describe(),
        "work_in_8_bits": round(1.0 - sum(verdict.group.work for verdict in kept), 4),
        "groups": [
            {
                "group": verdict.group.name,
                "layers": len(verdict.group.labels),
                "share_of_multiplications": round(verdict.group.work, 5),
                "alone": None if verdict.alone is None else verdict.alone.describe(),
                "kept_in_16_bits": verdict.kept,
            }
            for verdict in outcome.groups
        ],
        "layers": {name: report.describe() for name, report in outcome.reports.items()},
    }


def write_report(report: Mapping[str, Any], directory: Path) -> None:
    (directory / f"{_NAME}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (directory / f"{_NAME}.md").write_text(as_markdown(report), encoding="utf-8")


def as_markdown(report: Mapping[str, Any]) -> str:
    calibration = report["calibration"]
    lines = [f"# {report['format'].upper()} for {report['runtime']}", ""]
    if calibration:
        lines += [f"Calibrated with {calibration['frames']} frames of {calibration['episodes']} episodes from `{calibration['source']}`.", ""]
        lines += [f"**Warning: {warning}.**" for warning in calibration["warnings"]] + [""] * bool(calibration["warnings"])
    if "groups" not in report:
        return "\n".join([*lines, report["layers"] + ".", ""])
    error = report["action_error_on_trial_samples"]
    if error is not None:
        lines += [
            f"Actions on {report['trial_samples']} of these frames, {report['denoising_steps']} steps, against fp32: joint units "
            f"p50 {error['p50']:.3g}, p99 {error['p99']:.3g}, largest {error['max']:.3g}; "
            f"{error['relative_to_displacement']:.2%} of the displacement.",
            "",
        ]
    lines += [f"{report['work_in_8_bits']:.1%} of the multiplications are in 8 bits. Each group rounded alone:", ""]
    lines += ["| layers | of the work | p99 | largest | of the displacement | kept in 16 bits because |", "|---|---|---|---|---|---|"]
    for group in report["groups"]:
        alone = group["alone"]
        figures = "| | | |" if alone is None else f"| {alone['p99']:.3g} | {alone['max']:.3g} | {alone['relative_to_displacement']:.2%} |"
        lines.append(f"| {group['group']} ({group['layers']}) | {group['share_of_multiplications']:.2%} {figures} {group['kept_in_16_bits'] or ''} |")
    return "\n".join([*lines, ""])
