"""The study as a table, and what it shows in words, each statement checked against the figures before it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NOTEWORTHY_S = 0.5
_TOLERABLE_MISSED = 1.0
_COLUMNS = (  # heading, figure, digits
    ("frozen ticks", "frozen_ticks", 1),
    ("freeze, s", "freeze_s", 2),
    ("boundary jump, deg/s", "boundary_jump_deg_s", 0),
    ("step there, deg", "boundary_step_deg", 1),
    ("jerk, 1000 deg/s^3", "jerk_rms_deg_s3", 1),
    ("target lag, s", "target_lag_s", 2),
    ("tracking delay, s", "tracking_delay_s", 2),
    ("MAE, same instant", "mae_raw", 2),
    ("MAE, delay out", "mae_aligned", 2),
    ("went back, s", "went_back_s", 2),
    ("never played, s", "never_played_s", 2),
    ("took, s", "duration_s", 1),
    ("missed ticks", "missed_ticks", 1),
)


def as_table(result: Mapping[str, Any]) -> str:
    """Markdown: one row per setting and architecture, means over the trials, +- half a 95 % confidence interval where it is not 0."""
    recording = result["recording"]
    lines = [
        f"Recording: {recording['source']}, {recording['seconds']:.1f} s, {len(recording['joints'])} joints. {result['fps']:g} Hz, "
        f"think again at {result['chunk_size_threshold']:g} of a chunk, chunk error {result['chunk_noise_deg']:g} deg, arm time constant "
        f"{result['arm_time_constant_s']:g} s, {result['trials']} trials, {result['time']}.",
        "",
        "| scene | delay | actions per chunk | architecture | " + " | ".join(heading for heading, _, _ in _COLUMNS) + " |",
        "|---" * (4 + len(_COLUMNS)) + "|",
    ]
    for row in result["rows"]:
        figures = row["figures"]
        cells = [_cell(figures[name], digits, 1000 if "jerk" in name else 1) for _, name, digits in _COLUMNS]
        texts = dict(zip((name for _, name, _ in _COLUMNS), cells, strict=True))
        if row["scene"] == "still":  # its time is the arm's own: a lag behind it has no meaning
            texts["target_lag_s"] = texts["tracking_delay_s"] = ""
        if not figures["finished"]["mean"]:
            texts["duration_s"] = "not done"
        lines.append(
            f"| {row['scene']} | {row.get('delay', '')} | {row.get('actions_per_chunk', '')} | {row['architecture']} | {' | '.join(texts.values())} |"
        )
    return "\n".join([*lines, "", *(f"* {note}" for note in result["notes"])])


def _cell(figure: Mapping[str, Any], digits: int, unit: float) -> str:
    half = f" +- {figure['ci95'] / unit:.{digits}f}" if figure["ci95"] and round(figure["ci95"] / unit, digits) else ""
    return f"{figure['mean'] / unit:.{digits}f}{half}"


def notes_on(rows: Sequence[Mapping[str, Any]], fps: float) -> list[str]:
    """What the figures show, and what they cannot."""
    return [*dict.fromkeys(_bridges(rows, fps)), *_frozen(rows), *_leaps(rows), *_caveats(rows)]


def _bridges(rows: Sequence[Mapping[str, Any]], fps: float) -> Iterator[str]:
    for row in rows:
        if row["architecture"] in ("threaded", "server") and row["actions_per_chunk"] < row["needed_actions_per_chunk"]:
            left = max(0, row["actions_per_chunk"] - row["delay_ticks"])
            yield (
                f"With {row['actions_per_chunk']} actions at {fps:g} Hz, a delay of {row['delay_ticks']} ticks leaves {left} actions per chunk, "
                f"fewer than the {row['delay_ticks']} ticks until the next one: a controller that drops elapsed actions must starve. It need not "
                f"from {row['needed_actions_per_chunk']} actions on: twice the delay, and a margin."
            )


def _frozen(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in ("sync", "threaded", "server", "threaded_resume"):
        own = [row for row in rows if row["architecture"] == name]
        if not own:
            continue
        enough = [row for row in own if row["actions_per_chunk"] >= row["needed_actions_per_chunk"]]
        if name in ("threaded", "server") and enough:
            worst = max(row["figures"]["frozen_ticks"]["max"] for row in enough)
            yield f"{name}, wherever a chunk is long enough: {worst:g} frozen ticks after the first chunk in the worst trial."
        else:
            worst = max(own, key=lambda row: row["figures"]["frozen_ticks"]["mean"])
            mean = worst["figures"]["frozen_ticks"]["mean"]
            yield f"{name}: at most {mean:.1f} frozen ticks after the first chunk on average ({worst['scene']} scene, {worst['setting']})."


def _leaps(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Controllers of gr00t_fast that did not play a still scene's recording from begin to end."""
    for row in rows:
        if row["scene"] != "still" or row["architecture"] in ("floor", "naive_async"):
            continue
        back, over = (row["figures"][name]["mean"] for name in ("went_back_s", "never_played_s"))
        if max(back, over) > _NOTEWORTHY_S:
            done = "" if row["figures"]["finished"]["mean"] == 1 else "; it did not get to the end"
            yield f"{row['architecture']} in a still scene, {row['setting']}: went back {back:.1f} s and jumped over {over:.1f} s in all{done}."


def _caveats(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    missed = sum(row["figures"]["missed_ticks"]["mean"] for row in rows) / len(rows)
    if missed > _TOLERABLE_MISSED:
        yield f"The machine was busy: it missed {missed:.1f} ticks per trial. Jumps, jerk and single frozen ticks are partly its own; see --virtual."
    yield "The policy replays a recording and waits: it stands for a network's delay and for chunks that disagree, not for a network's mistakes."
    if any(row["scene"] == "still" for row in rows):
        yield (
            "In the still scene the task waits for the arm, so a pause costs time, not accuracy: compare `took`. Errors there are against the "
            "recording at the moment the arm had come to."
        )
    if any(row["architecture"] == "naive_async" for row in rows):
        yield "naive_async is a baseline with known mistakes (first in, first out, from index 0); no controller of gr00t_fast works like that."
