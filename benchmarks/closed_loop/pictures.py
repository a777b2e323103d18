"""Plots of an evaluation: the rows are those of its result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gr00t_fast.optional import require

_DPI = 110
_COLOURS = {"sync": "C3", "threaded": "C0", "resume": "C4", "rtc": "C1", "server": "C2"}
_MARKS = {4: "v", 8: "o", 16: "s"}
Row = Mapping[str, Any]


def plot_latency(rows: Sequence[Row], deadline_s: float, episode_s: float, path: Path) -> bool:
    """Success within a deadline and time to success against latency, a column per scene. False when the rows hold fewer than two latencies."""
    like = max(rows, key=lambda row: _latencies_of(rows, row))
    rows = [row for row in rows if all(row[name] == like[name] for name in ("denoising_steps", "engine"))]
    latencies = sorted({row["latency_ms"] for row in rows})
    arms = list(dict.fromkeys((row["controller"], row["action_horizon"]) for row in rows if _latencies_of(rows, row) > 1))
    scenes = list(dict.fromkeys(row["scene"] for row in rows))
    if len(latencies) < 2 or not arms:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(2, len(scenes), figsize=(6 * len(scenes), 7), squeeze=False, sharex=True, sharey="row")
    for column, scene in enumerate(scenes):
        for index, (controller, horizon) in enumerate(arms):
            arm = scene, controller, horizon
            mine = {row["latency_ms"]: row for row in rows if (row["scene"], row["controller"], row["action_horizon"]) == arm}
            style = {"color": _COLOURS[controller], "marker": _MARKS.get(horizon, "o"), "ms": 4, "capsize": 2, "lw": 1}
            style["ls"] = "--" if horizon != max(h for c, h in arms if c == controller) else "-"
            shift = 0.06 * (index - (len(arms) - 1) / 2)  # bars of different arms beside each other
            label = f"{controller}, {horizon} actions"
            _draw(axes[0][column], latencies, mine, shift, label, style, lambda row: _rate(row["within"][f"{deadline_s:g}"]))
            _draw(axes[1][column], latencies, mine, shift, label, style, lambda row: (row["mean_time_s"], *row["mean_time_95_s"]))
        axes[0][column].set_title(f"{scene} block")
        axes[1][column].set_xticks(range(len(latencies)), [str(latency) for latency in latencies])
        axes[1][column].set_xlabel("latency of an inference (ms)")
    axes[0][0].set_ylabel(f"success within {deadline_s:g} s (%)")
    axes[0][0].set_ylim(-3, 103)
    axes[1][0].set_ylabel(f"mean time to success (s; {episode_s:g} without)")
    axes[1][0].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8, loc="lower left")
    _save(plt, figure, path)
    return True


def plot_steps(rows: Sequence[Row], episode_s: float, path: Path) -> bool:
    """Success and time to success against denoising steps, a line per horizon. False when the rows hold fewer than two step counts."""
    rows = [row for row in rows if row["controller"] == "sync" and row["latency_ms"] == 0 and row["engine"] == rows[0]["engine"]]
    steps, scenes = sorted({row["denoising_steps"] for row in rows}), list(dict.fromkeys(row["scene"] for row in rows))
    horizons = sorted({row["action_horizon"] for row in rows})
    if len(steps) < 2:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(2, len(scenes), figsize=(5 * len(scenes), 6), squeeze=False, sharex=True, sharey="row")
    for column, scene in enumerate(scenes):
        for index, horizon in enumerate(horizons):
            mine = {row["denoising_steps"]: row for row in rows if (row["scene"], row["action_horizon"]) == (scene, horizon)}
            style = {"color": f"C{index}", "marker": _MARKS.get(horizon, "o"), "ms": 4, "capsize": 2, "lw": 1}
            shift = 0.06 * (index - (len(horizons) - 1) / 2)
            _draw(axes[0][column], steps, mine, shift, f"{horizon} actions", style, lambda row: _rate(row["success"]))
            _draw(axes[1][column], steps, mine, shift, f"{horizon} actions", style, lambda row: (row["mean_time_s"], *row["mean_time_95_s"]))
        axes[0][column].set_title(f"{scene} block, no latency")
        axes[1][column].set_xticks(range(len(steps)), [str(step) for step in steps])
        axes[1][column].set_xlabel("denoising steps")
    axes[0][0].set_ylabel(f"success within {episode_s:g} s (%)")
    axes[0][0].set_ylim(0, 103)
    axes[1][0].set_ylabel("mean time to success (s)")
    axes[1][0].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8, loc="lower left")
    _save(plt, figure, path)
    return True


def _latencies_of(rows: Iterable[Row], like: Row) -> int:
    same = ("scene", "controller", "action_horizon", "denoising_steps", "engine")
    return len({row["latency_ms"] for row in rows if all(row[name] == like[name] for name in same)})


def _rate(rate: Mapping[str, Any]) -> tuple[float, float, float]:
    return 100 * rate["rate"], 100 * rate["wilson_95"][0], 100 * rate["wilson_95"][1]


def _draw(axis: Any, places: Sequence[int], rows: Mapping[int, Row], shift: float, label: str, style: Mapping[str, Any], value_of: Any) -> None:
    """One line with 95 % intervals; where an arm cannot run at all, its line ends."""
    found = [(index + shift, *value_of(rows[place])) for index, place in enumerate(places) if place in rows and "refused" not in rows[place]]
    if found:
        xs, ys, lows, highs = zip(*found, strict=True)
        below, above = [y - low for y, low in zip(ys, lows, strict=True)], [high - y for y, high in zip(ys, highs, strict=True)]
        axis.errorbar(xs, ys, yerr=(below, above), label=label, **style)
    axis.grid(alpha=0.3)


def _pyplot() -> Any:
    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
