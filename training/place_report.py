"""The result of place_state.py as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gr00t_fast.optional import require

_TITLE = "# Block into bowl, told where things are"
_WHAT = """\
GR00T N1.5's action head (`gr00t_fast.model`, flow-matching loss) in closed loop with the simulated SO-100, in simulated time. In place of vision and
language it gets three tokens: pose of the block, place of the bowl, whether both fingers touch the block. **State-conditioned: not a
vision-language-action policy.** Intervals are Wilson's, 95 %; all settings meet the same layouts and the same noise. Solved: block in the bowl and
let go of, for 5 ticks in a row. p: exact sign test over the layouts that only one of two settings solved, two-sided, not corrected for the number of
settings compared."""
_NOT = """\
What this does not prove: anything about seeing, about language, about the published network (which is two thousand times larger and pretrained), or
about a real arm. Poses are exact, the scene is one block and one bowl, and the demonstrations come from a script, not from people. One network was
trained, once; between settings the intervals are those of the layouts, not of training."""


def as_table(result: dict[str, Any]) -> str:
    """Markdown: what was measured, the settings, where episodes failed, and what it does not prove."""
    rows = [_row("scripted expert (the ceiling)", "", result["expert"])]
    rows += [_row(setting["horizon"], setting["denoising_steps"], setting) for setting in result["settings"]]
    head = "| actions per inference | denoising steps | solved | rate | 95 % interval | seconds, p50 / p95 "
    head += "| failed at grasp / transport / release | solved after the block fell | only here / only with 4 steps (p) |"
    return "\n".join([_TITLE, "", _WHAT, "", head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|", *rows, "", _how(result), "", _NOT])


def _row(horizon: int | str, steps: int | str, found: dict[str, Any]) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in found["wilson_95"])
    seconds = " / ".join(f"{value:.2f}" for value in found["seconds_p50_p95"]) if found["seconds_p50_p95"] else "never"
    failed = " / ".join(str(count) for count in found["failed_at"].values())
    solved = f"{found['successes']} of {found['episodes']}"
    pairs = found.get("against_4_steps")
    against = f"{pairs['only_here']} / {pairs['only_there']} ({pairs['p']:.2g})" if pairs else ""
    cells = (horizon, steps, solved, f"{100 * found['rate']:.1f} %", f"{low} to {high}", seconds, failed, found["solved_after_a_fall"], against)
    return f"| {' | '.join(map(str, cells))} |"


def _how(result: dict[str, Any]) -> str:
    data, training, options = result["data"], result["training"], result["options"]
    error = f", {training['action_error_deg']:.2f} degrees from the expert's actions on held-out layouts" if "action_error_deg" in training else ""
    return (
        f"{result['parameters'] / 1e6:.2f} million parameters; {data['samples']} samples of {data['episodes']} disturbed demonstrations "
        f"({data['with_second_attempts']} with a second attempt, {data['layouts'] - data['episodes']} more left out as failed), layouts from seed "
        f"{data['first_layout_seed']} on; {training['steps']} of {options['steps']} updates of {options['batch']}, "
        f"{training['minutes']:.0f} minutes of wall time on {result['machine']['torch_threads']} thread(s) of a CPU{error}. Episodes end after "
        f"{result['max_ticks'] / 30:.0f} s. `{result['command_line']}`"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Success with its interval against denoising steps, one line per horizon; the expert as a band."""
    require("matplotlib", "plots").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    low, high = result["expert"]["wilson_95"]
    axes.axhspan(100 * low, 100 * high, color="0.88", label="scripted expert")
    horizons = sorted({setting["horizon"] for setting in result["settings"]})
    for place, horizon in enumerate(horizons):
        settings = sorted((s for s in result["settings"] if s["horizon"] == horizon), key=lambda s: s["denoising_steps"])
        steps = [s["denoising_steps"] * 1.03 ** (place - (len(horizons) - 1) / 2) for s in settings]  # apart, so that the bars are seen
        rates = [100 * s["rate"] for s in settings]
        bounds = [[abs(100 * s["wilson_95"][side] - rate) for s, rate in zip(settings, rates, strict=True)] for side in (0, 1)]
        axes.errorbar(steps, rates, bounds, marker="o", capsize=3, label=f"{horizon} actions per inference")
    axes.set_xscale("log", base=2)
    marks = sorted({setting["denoising_steps"] for setting in result["settings"]})
    axes.set_xticks(marks, [str(mark) for mark in marks])
    axes.set_xlabel("denoising steps")
    axes.set_ylabel("block in the bowl, % (axis not from 0)")
    axes.set_title(f"action head told where things are, {result['expert']['episodes']} layouts, 95 % intervals", fontsize=10)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
