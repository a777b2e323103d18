"""The table of an evaluation, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
_COMPARED = ("against", "success, points (95 %)", "time s (95 %)")
_SETTING = ("block", "controller", "latency ms", "steps", "actions", "engine")


def as_table(result: Result) -> str:
    deadlines = result["deadlines_s"]
    within = (f"within {deadline:g} s" for deadline in deadlines)
    columns = [
        *_SETTING,
        "success % (95 %)",
        *within,
        "mean time s (95 %)",
        "against",
        "success, points (95 %)",
        "time s (95 %)",
        "jerk 1000 deg/s^3",
        "inferences",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += [_line(row, deadlines) for row in result["rows"]]
    return "\n".join([_preface(result), "", *lines, "", *_notes(result)])


def _preface(result: Result) -> str:
    return (
        f"Reach, {result['seeds']} layouts unseen in training, the same layouts and noise in every row; {result['episode_s']:g} s at "
        f"30 Hz; the moving block goes {100 * result['block_speed_m_s']:g} cm/s. Simulated time: an inference takes the latency "
        "given and nothing more."
    )


def _line(row: Result, deadlines: Sequence[float]) -> str:
    setting = [row["scene"], row["controller"], row["latency_ms"], row["denoising_steps"], row["action_horizon"], row["engine"].partition("=")[0]]
    if "refused" in row:
        cells = ["cannot run", *["-"] * (len(deadlines) + 6)]
    else:
        cells = [
            _rate(row["success"]),
            *(_rate(row["within"][f"{deadline:g}"]) for deadline in deadlines),
            f"{row['mean_time_s']:.2f} ({row['mean_time_95_s'][0]:.2f}-{row['mean_time_95_s'][1]:.2f})",
            *_against(row),
            "-" if row["median_jerk_deg_s3"] is None else f"{row['median_jerk_deg_s3'] / 1000:.1f}",
            f"{row['mean_inferences']:.1f}",
        ]
    return "| " + " | ".join(str(cell) for cell in [*setting, *cells]) + " |"


def _against(row: Result) -> list[str]:
    """What is compared, and the differences of success and of mean time, paired by layout."""
    against = row["against"]
    if against is None:
        return ["-", "-", "-"]
    low, high = against["rate_95"]
    faster, slower = against["mean_time_95_s"]
    return [
        f"sync, 8 actions, {against['latency_ms']} ms",
        f"{100 * against['rate']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{against['mean_time_s']:+.2f} ({faster:+.2f} to {slower:+.2f})",
    ]


def _rate(rate: Result) -> str:
    low, high = rate["wilson_95"]
    return f"{100 * rate['rate']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _notes(result: Result) -> list[str]:
    notes = [
        f"Mean time counts an episode without success as {result['episode_s']:g} s. Against: the same layouts, 4 steps, fp32. "
        f"Jerk: median over {_jerk_episodes(result)} episodes, while the arm moves, at 30 Hz, without the gripper."
    ]
    reasons = dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row)
    notes += [f"Cannot run: {reason}" for reason in reasons]
    if any(row["controller"] == "server" for row in result["rows"]):
        notes.append(
            "server: threaded, each observation and chunk over ZeroMQ to another process. The transport's own time is not simulated time, so "
            "this row shows that the way through a server changes no action; what it costs in time, ab_server measures."
        )
    if any(row["controller"] == "rtc" for row in result["rows"]):
        notes.append("rtc: real-time chunking at the latency given; its denoising steps cost more than plain ones, which is not charged here.")
    return notes


def _jerk_episodes(result: Result) -> str:
    counts = sorted({row["episodes_with_jerk"] for row in result["rows"] if "refused" not in row})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)
