"""What an 8-bit version and a verification come to, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ERRORS = ("p50", "p99", "largest", "of the displacement")  # joint units


def table_of(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def written(directory: Path, name: str, result: Mapping[str, Any], text: str) -> None:
    """NAME.json and NAME.md."""
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def quantisation_table(report: Mapping[str, Any]) -> str:
    """report: `Manifest.quantisation` and that of a calibration, if there was one."""
    parts = [f"# {report['format'].upper()} for {report['runtime']}"]
    if data := report["calibration"]:
        parts.append(f"Calibrated with {data['frames']} frames of {data['episodes']} episodes from `{data['source']}`.")
        parts += [f"**Warning: {warning}.**" for warning in data["warnings"]]
    if "groups" not in report:
        return "\n\n".join([*parts, "All linear layers, activations rounded with scales found at run time."])
    if error := report["action_error_on_trial_samples"]:
        figures = ", ".join(_figures(error))
        parts.append(f"Actions on {report['trial_samples']} of these frames, {report['denoising_steps']} steps, against fp32: {figures}.")
    parts.append(f"{report['work_in_8_bits']:.1%} of the multiplications are in 8 bits. Each group rounded alone:")
    rows = [
        (
            f"{group['group']} ({group['layers']})",
            f"{group['share_of_multiplications']:.2%}",
            *(_figures(group["alone"]) if group["alone"] else [""] * len(_ERRORS)),
            group["kept_in_16_bits"] or "",
        )
        for group in report["groups"]
    ]
    return "\n\n".join([*parts, table_of(("layers", "of the work", *_ERRORS, "kept in 16 bits because"), rows)])


def _figures(error: Mapping[str, float]) -> list[str]:
    """By `_ERRORS`. error: of `ActionError.describe`."""
    return [*(f"{error[key]:.3g}" for key in ("p50", "p99", "max")), f"{error['relative_to_displacement']:.3%}"]


def verification_table(result: Mapping[str, Any]) -> str:
    source = result["source"]
    stages = [(name, *(f"{values[key]:.2e}" for key in ("p50", "p99", "max"))) for name, values in result["relative_l2"].items()]
    actions = {"pixels to actions": result["actions"], "denoising alone": result["actions_of_denoise_alone"]}
    parts = [
        f"{result['engine']} ({result['format']}), {result['denoising_steps']} steps, {result['observations']} observations of {source['source']}",
        *(f"Warning: {warning}." for warning in source["warnings"]),
        table_of(("relative L2 against the plain model in fp32", "p50", "p99", "largest"), stages),
        table_of(("actions, joint units", *_ERRORS), [(name, *_figures(error)) for name, error in actions.items()]),
    ]
    return "\n\n".join(parts)


def verification_verdict(result: Mapping[str, Any]) -> str:
    """One line; it says when the observations were synthetic."""
    verdict = "passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"])
    synthetic = "; on synthetic observations: --observations=DATASET judges it on your recordings" if result["source"]["synthetic"] else ""
    return f"{verdict} (limit: p99 {result['action_limit_p99']:g} joint units){synthetic}"
