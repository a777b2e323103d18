"""From the samples of `ab_server.py` to its result: what each factor is worth, sentences chosen by the figures, a table and a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ab_arms import Contrast, Measurement, Plan, Setup, paired, paired_ratio, ratio_text, resolved
from benchmarks.ab_processes import ColdStart
from gr00t_fast.measurement import percentiles

_QUIET_LOAD = 0.5  # per CPU; above it, other work takes turns with the arms
_TITLE = "Policy server against one process, one factor at a time"


def evaluate(plan: Plan, measured: Measurement, cold: Mapping[Setup, ColdStart], commands: Mapping[Setup, list[str]]) -> dict[str, Any]:
    """The figures as plain values. Times in ms, differences of actions in joint units (degrees; gripper: per cent)."""
    latency = {name: percentiles(samples) for name, samples in measured.times_ms.items()}
    transport = {name: _transport_alone(name, measured) for kind, name in (k for k in measured.times_ms if isinstance(k, tuple)) if kind == "ping"}
    path, alone = ([_worth(contrast, measured) for contrast in contrasts] for contrasts in (plan.path, plan.alone))
    return {
        "rounds": measured.rounds,
        "arms": [_arm(setup, latency[setup], measured, commands.get(setup)) for setup in plan.setups],
        "baseline": str(plan.baseline),
        "ours": str(plan.ours),
        "all_factors": paired(measured.times_ms[plan.baseline], measured.times_ms[plan.ours]),
        "ratio": paired_ratio(measured.times_ms[plan.baseline], measured.times_ms[plan.ours]),
        "speed_up_p50": round(latency[plan.baseline]["p50"] / latency[plan.ours]["p50"], 2),
        "waterfall": path,
        "alone": alone,
        "transport_alone": transport,
        "cold_start": [_cold(setup, each, latency[setup]["p50"]) for setup, each in cold.items()],
        "agreement": {
            "same_bits_across_transports": [str(setup) for setup in plan.setups if setup.transport != "none"],
            "rounds_checked": measured.rounds,
        },
    }


def _arm(setup: Setup, latency: dict[str, float], measured: Measurement, command: list[str] | None) -> dict[str, Any]:
    stages = {stage: percentiles(samples)["p50"] for stage, samples in measured.stages_ms[setup].items()}
    levels = {"transport": setup.transport, "preprocessing": setup.preprocessing, "engine": setup.engine, "steps": setup.steps}
    return {"arm": str(setup), **levels, "latency_ms": latency, "stages_p50_ms": stages, "server": " ".join(command[1:3]) if command else None}


def _worth(contrast: Contrast, measured: Measurement) -> dict[str, Any]:
    before, after = (measured.times_ms[setup] for setup in (contrast.before, contrast.after))
    worth = paired(before, after)
    gaps = measured.differences.get((contrast.before, contrast.after))
    return {
        "factor": contrast.factor,
        "change": contrast.change,
        "before": str(contrast.before),
        "after": str(contrast.after),
        "before_p50_ms": percentiles(before)["p50"],
        "after_p50_ms": percentiles(after)["p50"],
        "worth_ms": worth,
        "resolved": resolved(worth),
        "largest_action_difference": max(gaps) if gaps else 0.0,  # across transports: checked to be none
    }


def _transport_alone(name: str, measured: Measurement) -> dict[str, Any]:
    arm = ("transport alone", name)
    stages = {stage: percentiles(samples)["p50"] for stage, samples in measured.stages_ms[arm].items()}
    return {"message_ms": percentiles(measured.times_ms[arm]), "ping_ms": percentiles(measured.times_ms["ping", name]), "stages_p50_ms": stages}


def _cold(setup: Setup, cold: ColdStart, steady_ms: float) -> dict[str, Any]:
    first_ms = [calls[0] for calls in cold.calls_ms]
    return {
        "arm": str(setup),
        "served": setup.transport != "none",
        "start_to_first_action_s": [round(value, 3) for value in cold.first_action_s],
        "start_to_ready_s": [round(value, 3) for value in cold.ready_s],
        "first_calls_ms": [[round(value, 3) for value in calls] for calls in cold.calls_ms],
        "first_call_p50_ms": percentiles(first_ms)["p50"],
        "steady_p50_ms": steady_ms,
        "warm_up_worth_ms": round(percentiles(first_ms)["p50"] - steady_ms, 3),
    }


# --- words -------------------------------------------------------------------------------------------------------------------------------


def magnitude(ms: float) -> str:
    """What kind of time that is, in words, by its figure."""
    if ms < 1:
        return "less than a millisecond"
    if ms < 10:
        return "milliseconds, not tenths of a second"
    if ms < 100:
        return "tens of milliseconds, not tenths of a second"
    return "tenths of a second" if ms < 1000 else "seconds"


def transport_sentence(name: str, probe: dict[str, Any], result: dict[str, Any]) -> str:
    pictures = f"{result['cameras']} x {size_text(result)}, {result['request_bytes'] / 1e6:.2f} MB"
    p, ping_ms = probe["message_ms"], probe["ping_ms"]["p50"]
    costs = f"costs {p['p50']:.2f} ms p50, {p['p95']:.2f} p95: {magnitude(p['p50'])}."
    return f"Transport alone over {name} ({pictures}; the policy answers at once) {costs} A ping takes {ping_ms:.2f} ms."


def size_text(result: dict[str, Any]) -> str:
    return "x".join(map(str, result["resolution"]))


def sentences(result: dict[str, Any]) -> list[str]:
    """What the figures say, and no more; the ratio that was measured in any case."""
    lines = [transport_sentence(name, probe, result) for name, probe in result["transport_alone"].items()]
    for row in (row for row in result["alone"] if row["factor"] == "transport"):
        lines.append(f"Around our policy, {row['change'].replace('transport: ', '')} is worth {_words(row)}.")
    if not result["waterfall"]:
        return lines
    measured = f"The baseline takes {ratio_text(result['ratio'])} as long as ours; {result['speed_up_p50']:.2f} times by the arms' p50."
    return [*lines, measured, *_total(result)]


def _total(result: dict[str, Any]) -> list[str]:
    total = result["all_factors"]
    if not resolved(total):
        return [f"From the baseline to ours: no difference that {total['rounds']} rounds can tell from zero (median {total['median']:+.2f} ms)."]
    quartiles = f"(quartiles {total['p25']:.1f} to {total['p75']:.1f})"
    if total["median"] < 0:
        return [f"From the baseline to ours: **slower** by {-total['median']:.1f} ms per call {quartiles}."]
    largest = max(result["waterfall"], key=lambda row: row["worth_ms"]["median"])
    gain = f"{total['median']:.1f} ms less per call {quartiles}"
    return [f"From the baseline to ours: {gain}, at the same number of denoising steps. The largest part is {largest['change']}: {_words(largest)}."]


def _words(row: dict[str, Any]) -> str:
    worth = row["worth_ms"]
    if not row["resolved"]:
        return f"nothing that {worth['rounds']} rounds can tell from zero (median {worth['median']:+.2f} ms)"
    return f"{worth['median']:.2f} ms (quartiles {worth['p25']:.2f} to {worth['p75']:.2f})"


# --- table -------------------------------------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any]) -> str:
    parts = [f"# {_TITLE}", _regime(result), _arms_table(result["arms"])]
    if result["waterfall"]:
        parts.append("## From the baseline to ours, one factor after the other\n\n" + _worth_table(result["waterfall"], result["arms"][0]))
    if result["alone"]:
        parts.append("## Each factor alone, changed from ours\n\n" + _worth_table(result["alone"], None))
    if result["cold_start"]:
        parts.append("## Cold start\n\n" + _cold_table(result["cold_start"]))
    notes = [f"* {line}" for line in [*sentences(result), *_notes(result)]]
    return "\n\n".join([*parts, "\n".join(notes)])


def _regime(r: dict[str, Any]) -> str:
    counted = f"{r['rounds']} rounds after {r['warm_up_rounds']} uncounted"
    if r["stopped_early"]:
        counted += f" (**stopped early**: {r['calls_asked']} were asked for, --max_minutes={r['max_minutes']:g})"
    network = f"{r['weights']} weights ({r['weight_bytes'] / 1e6:,.0f} MB), {r['precision']} on {r['device']}"
    cameras = f"{r['cameras']} camera(s) of {size_text(r)}, {r['threads_per_process']} CPU thread(s) in every process"
    settled = f", right after {r['settling_calls']} uncounted call(s) of its own" if r["settling_calls"] else ""
    order = f"every arm once a round in random order{settled}, same observation and noise"
    return f"{network}, {cameras}. Camera frame to joint targets; {counted}, {order}. Times in ms."


def _arms_table(arms: list[dict[str, Any]]) -> str:
    rows = ["| arm | p50 | p95 | p99 |", "|---|--:|--:|--:|"]
    for arm in arms:
        p = arm["latency_ms"]
        rows.append(f"| {arm['arm']} | {p['p50']:.2f} | {p['p95']:.2f} | {p['p99']:.2f} |")
    return "\n".join(rows)


def _worth_table(rows: list[dict[str, Any]], baseline: dict[str, Any] | None) -> str:
    share = " of the baseline |" if baseline else ""
    lines = [f"| factor | p50 before → after | worth, paired | quartiles |{share} actions differ by at most |"]
    lines.append("|---|--:|--:|--:|" + ("--:|" if baseline else "") + "--:|")
    for row in rows:
        worth = row["worth_ms"]
        levels = f"{row['before_p50_ms']:.2f} → {row['after_p50_ms']:.2f}"
        told = f"{worth['median']:.2f}" + ("" if row["resolved"] else " (not told from 0)")
        percent = f" {100 * worth['median'] / baseline['latency_ms']['p50']:.1f} % |" if baseline else ""
        gap = f"{row['largest_action_difference']:.2g}" if row["factor"] != "transport" else "0 (checked)"
        lines.append(f"| {row['change']} | {levels} | {told} | {worth['p25']:.2f} to {worth['p75']:.2f} |{percent} {gap} |")
    return "\n".join(lines)


def _cold_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | process start → first action, s | first calls, ms (medians) | steady p50, ms |", "|---|--:|--:|--:|"]
    for row in rows:
        starts = row["start_to_first_action_s"]
        calls = [percentiles(call)["p50"] for call in zip(*row["first_calls_ms"], strict=True)]
        first = f"{percentiles(starts)['p50']:.2f} ({min(starts):.2f} to {max(starts):.2f}, n={len(starts)})"
        lines.append(f"| {row['arm']} | {first} | {', '.join(f'{call:.0f}' for call in calls)} | {row['steady_p50_ms']:.1f} |")
    return "\n".join(lines)


def _notes(r: dict[str, Any]) -> list[str]:
    agreement, notes = r["agreement"], []
    if agreement["same_bits_across_transports"]:
        served = "; ".join(agreement["same_bits_across_transports"])
        notes.append(f"The same bits as in process in each of {agreement['rounds_checked']} rounds: {served}.")
    if agreement["pixel_levels_apart"] is not None:
        notes.append(f"The two pre-processings give pictures {agreement['pixel_levels_apart']:g} grey levels apart, and the same token ids.")
    random = ", on RANDOM weights: they say nothing about a trained policy." if r["weights"] == "RANDOM" else "."
    notes += [
        f"Differences of actions are in joint units (degrees; gripper: per cent) at equal noise{random}",
        "Fewer denoising steps give other actions: those rows are no free gain.",
    ]
    if r["floor_ms"] is not None:
        notes.append(f"The network's own floor on this machine, by measured arithmetic and memory rates: {r['floor_ms']:.1f} ms.")
    if r["cold_start"]:
        notes.append(
            "Cold starts read files that are in the page cache. A server is started alone, its client runs already; ours warms up before it answers, "
            "the reference does not, as NVIDIA's does not."
        )
    cpus, load = r["machine"]["cpus"] or 1, r["load_average_at_start"]
    if load > _QUIET_LOAD * cpus:
        busy = f"**The machine was busy** before the run began (load average {load:.1f} on {cpus} CPUs)"
        notes.append(f"{busy}: repeat it on a quiet one before quoting a figure.")
    return notes + [f"Left out: {reason}" for reason in r["left_out"]]


def write_samples(measured: Measurement, path: Path) -> None:
    """One row per round, one column per arm, ms."""
    names = [" ".join(name) if isinstance(name, tuple) else str(name) for name in measured.times_ms]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([f"{value:.4f}" for value in row] for row in zip(*measured.times_ms.values(), strict=True))


# --- plot --------------------------------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    height = 2 + 0.5 * max(len(result["waterfall"]) + 4, len(result["alone"]))
    figure, (fall, single) = plt.subplots(1, 2, figsize=(13, height))
    _waterfall(fall, result)
    _alone(single, result["alone"])
    figure.suptitle(f"{_TITLE}: {result['cameras']} x {size_text(result)}, {result['precision']} on {result['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _waterfall(axis: Any, result: dict[str, Any]) -> None:
    """Levels are p50s, so that the bars close; the worth of a factor in the table is the median of the paired differences."""
    path = result["waterfall"]
    levels = [*(row["before_p50_ms"] for row in path), path[-1]["after_p50_ms"]] if path else [result["arms"][0]["latency_ms"]["p50"]]
    _bars(axis, ["baseline"], [levels[0]], [0.0], ["C7"], [f"{levels[0]:.1f}"])
    for row, before, after in zip(path, levels, levels[1:], strict=False):
        _bars(axis, [row["change"]], [abs(before - after)], [min(before, after)], [_colour(row, before - after)], [f"{after - before:+.1f}"])
    _bars(axis, ["ours"], [levels[-1]], [0.0], ["C0"], [f"{levels[-1]:.1f}"])
    for row in result["alone"]:
        if row["factor"] == "steps" and row["after_p50_ms"] < levels[-1]:
            name, p50_ms = f"ours, {row['change']}\n(other actions)", row["after_p50_ms"]
            _bars(axis, [name], [p50_ms], [0.0], ["C0"], [f"{p50_ms:.1f}"], alpha=0.4, hatch="//")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_xlabel("p50, ms")
    axis.set_title("from the server baseline to ours, at the same number of steps", fontsize=10)


def _alone(axis: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        worth = row["worth_ms"]
        bar = _bars(axis, [row["change"]], [worth["median"]], [0.0], [_colour(row, worth["median"])], [])
        middle, spread = bar[0].get_y() + bar[0].get_height() / 2, [[worth["median"] - worth["p25"]], [worth["p75"] - worth["median"]]]
        axis.errorbar(worth["median"], middle, xerr=spread, color="black", capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("worth per call, ms (paired: median, quartiles)")
    axis.set_title("each factor alone (pale: not told from 0)", fontsize=10)


def _bars(axis: Any, names: list[str], widths: list[float], lefts: list[float], colours: list[str], texts: list[str], **look: Any) -> Any:
    bars = axis.barh(names, widths, left=lefts, color=colours, **look)
    if texts:
        axis.bar_label(bars, texts, fontsize=8, padding=3)
    return bars


def _colour(row: dict[str, Any], gain: float) -> Any:
    """Green saves time, red costs it; pale when it cannot be told from nothing."""
    return ("C2" if gain >= 0 else "C3", 1.0 if row["resolved"] else 0.35)
