"""How a dry run is shown: a table in words, one row of CSV per frame, and a picture of predicted and recorded joints."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.open_loop_study.metrics import Compared
from benchmarks.program import Result
from gr00t_fast.optional import require

_MOST_FRAMES_DRAWN = 900  # beyond, chunks are too narrow to be seen; the CSV has all

_MOST_NAMED = 12  # episodes


def as_table(result: Result) -> str:
    """Markdown."""
    data, lines = result["dataset"], []
    lines += [
        f"{result['checkpoint']} on {data['name']}: {data['frames']} frames of episode{'s' if len(data['episodes']) > 1 else ''} "
        f"{_numbers(data['episodes'])} ({data['of']} in all), {result['engine']}, {result['precision']}, "
        f"the first {result['action_horizon']} of {result['trained_horizon']} actions of each chunk.",
        f"Cameras: {'; '.join(_camera(*item) for item in data['cameras'].items())}. Instruction: {' | '.join(data['instructions'])}.",
        *_recorded_by(data),
        "Joint units are the recording's: degrees, and per cent for the gripper, in lerobot's SO-100 data.",
        "",
    ]
    for steps, run in result["runs"].items():
        lines += [f"**Denoising steps: {steps}.** {_headline(run)}", "", *_joints(run, data["ranges"]), ""]
    lines += [*_leads(result), "", *_verdict(result)]
    return "\n".join(lines)


def _recorded_by(data: Mapping[str, Any]) -> Iterator[str]:
    """Which layouts of the simulation these are, where the data set says it."""
    if told := data["recording"]:
        layouts = ", ".join(str(told["layouts"][episode]) for episode in data["episodes"][:_MOST_NAMED])
        yield f"Recorded by {told['program']}, layouts {layouts}; training/samples.py draws layouts from {told['training_layouts_from']} on."


def _numbers(episodes: Sequence[int]) -> str:
    listed = list(map(str, episodes))
    return ", ".join(listed if len(listed) <= _MOST_NAMED else [*listed[:_MOST_NAMED], "..."])


def _camera(key: str, camera: Mapping[str, Any]) -> str:
    size = f", {camera['size'][0]}x{camera['size'][1]}" if camera["size"] else ""
    return f"{key} is {camera['feature']}{size} (by {camera['chosen_by']})"


def _headline(run: Mapping[str, Any]) -> str:
    chunks, jumps, times = run["chunks"], run["boundary_jumps"], run["inference_ms"]
    worst = chunks["worst"]
    said = [
        f"MAE {chunks['mae']:.2f}, MSE {chunks['mse']:.2f}; holding still {chunks['hold_mae']:.2f}"
        + ("" if chunks["replay_mae"] is None else f", replaying the other episodes' mean {chunks['replay_mae']:.2f}")
        + f"; ratio to holding {_cell(chunks['ratio_to_hold'])}; R2 {_cell(chunks['r2'])}.",
        f"Worst: {worst['joint']} at episode {worst['episode']} frame {worst['frame']}, predicted {worst['predicted']:.1f}, "
        f"recorded {worst['recorded']:.1f}.",
    ]
    if jumps["predicted"]:
        said.append(
            f"Change of target across a chunk boundary, largest joint: p50 {jumps['predicted']['p50']:.1f}, p95 {jumps['predicted']['p95']:.1f} "
            f"(recorded there: {jumps['recorded']['p50']:.1f}, {jumps['recorded']['p95']:.1f})."
        )
    if frames := run["best_shift"]["frames"]:
        way = "ahead of" if frames > 0 else "behind"
        said.append(f"Predictions run {way} the recording: shifted by {abs(frames)} frames, MAE {run['best_shift']['mae']:.2f}.")
    return " ".join([*said, f"Inference p50 {times['p50']:.1f} ms."])


def _joints(run: Mapping[str, Any], ranges: Mapping[str, Any]) -> Iterator[str]:
    heads = ("joint", "MAE", "MSE", "holding still", "replay", "ratio", "R2", "bias", "first action less state: recorded, predicted")
    yield f"| {' | '.join(heads)} | state: recorded, checkpoint |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, joint in run["chunks"]["joints"].items():
        offset, span = run["offsets"][name], ranges[name]["state"]
        cells = [joint["mae"], joint["mse"], joint["hold_mae"], joint["replay_mae"], joint["ratio_to_hold"], joint["r2"], offset["bias"]]
        first = f"{offset['first_action_recorded']:.1f}, {offset['first_action_predicted']:.1f}"
        yield f"| {name} | {' | '.join(map(_cell, cells))} | {first} | {_span(span['recorded'])}, {_span(span['checkpoint'])} |"


def _span(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.0f} to {bounds[1]:.0f}"


def _leads(result: Result) -> Iterator[str]:
    """One column per row of the chunk, at most eight."""
    runs = list(result["runs"].items())
    rows = len(runs[0][1]["leads"]["mae"])
    shown = sorted(set(np.linspace(0, rows - 1, min(rows, 8)).round().astype(int)) | {min(result["action_horizon"], rows) - 1})
    yield f"Error by how far ahead (frames after the observation), over all {rows} rows of the chunk, with --stride={result['stride']}:"
    yield ""
    yield "| MAE | " + " | ".join(map(str, shown)) + " |"
    yield "|---|" + "--:|" * len(shown)
    for name, leads, key in (*((f"steps: {steps}", run["leads"], "mae") for steps, run in runs), ("holding still", runs[0][1]["leads"], "hold_mae")):
        yield f"| {name} | " + " | ".join(f"{leads[key][row]:.2f}" for row in shown) + " |"


def _verdict(result: Result) -> Iterator[str]:
    verdict = result["verdict"]
    yield f"**Verdict (denoising steps: {verdict['denoising_steps']}): {verdict['kind']}.** {verdict['advice'][0].upper()}{verdict['advice'][1:]}"
    yield ""
    basis, by_episode = verdict["rests_on"], result["runs"][str(verdict["denoising_steps"])]["ratio_by_episode"]
    counted = ", ".join(f"{basis[what]} {what[:-1] if basis[what] == 1 else what}" for what in ("episodes", "chunks", "frames"))
    spread = by_episode["spread"]
    told = f"; ratio to holding by episode: {_cell(spread['min'])} to {_cell(spread['max'])}, median {_cell(spread['median'])}" if spread else ""
    yield f"- This rests on {counted}{told if basis['episodes'] > 1 else ''}."
    if basis["warning"]:
        yield f"- {basis['warning']}."
    yield from (f"- {text}" for text in verdict["evidence"])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_csv(compared: Mapping[int, Compared], names: Sequence[str], path: Path) -> None:
    """One row per frame and step count: what was recorded, predicted and measured of each joint."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        kinds = ("recorded", "predicted", "state")
        table.writerow(("denoising_steps", "episode", "frame", "row_of_chunk", *(f"{name}_{kind}" for name in names for kind in kinds)))
        for steps, c in compared.items():
            values = np.stack([c.recorded, c.predicted, c.state], axis=-1).reshape(len(c.frame), -1).round(4)
            for episode, frame, lead, row in zip(c.episode, c.frame, c.lead, values, strict=True):
                table.writerow((steps, episode, frame, lead, *row))


@dataclass(frozen=True)
class Drawing:
    """What the plot needs beyond the result. pictures: policy's camera -> uint8 (H, W, 3) of the first frame."""

    compared: Compared
    names: Sequence[str]
    pictures: Mapping[str, np.ndarray]


def plot(result: Result, drawing: Drawing, path: Path) -> None:
    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    joints = len(drawing.names)
    figure = plt.figure(figsize=(12, 1.5 * joints + 3.5), layout="constrained")
    grid = figure.add_gridspec(joints + 2, 1 + len(drawing.pictures), width_ratios=[2, *[1] * len(drawing.pictures)])
    shared = None
    for joint in range(joints):
        shared = axis = figure.add_subplot(grid[joint, :], sharex=shared)
        _draw_joint(axis, drawing, joint)
    axis.set_xlabel("frame; episodes " + _numbers(result["dataset"]["episodes"]) + " one after the other")
    _draw_leads(figure.add_subplot(grid[joints:, 0]), result)
    for column, (key, picture) in enumerate(drawing.pictures.items(), 1):
        axis = figure.add_subplot(grid[joints:, column])
        axis.imshow(picture)
        axis.set_title(f"{key}, first frame", fontsize=8)
        axis.axis("off")
    verdict = result["verdict"]
    figure.suptitle(
        f"{result['checkpoint']} on {result['dataset']['name']}, {verdict['denoising_steps']} denoising steps: {verdict['kind']}", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_joint(axis: Any, drawing: Drawing, joint: int) -> None:
    c, drawn = drawing.compared, min(len(drawing.compared.frame), _MOST_FRAMES_DRAWN)
    begins = [0, *(np.flatnonzero(np.diff(c.episode[:drawn])) + 1), drawn]
    for begin, end in itertools.pairwise(begins):
        hidden = "_" if begin else ""  # a label that begins so is left out of the legend
        places = np.arange(begin, end)
        axis.plot(places, c.state[begin:end, joint], color="0.6", lw=1, label=hidden + "state")
        axis.plot(places, c.recorded[begin:end, joint], color="k", lw=1.2, label=hidden + "recorded action")
        starts = [*(begin + np.flatnonzero(c.lead[begin:end] == 0)), end]
        for one, other in itertools.pairwise(starts):
            label = ("_" if one else "") + "predicted chunk"
            axis.plot(np.arange(one, other), c.predicted[one:other, joint], color="C1", lw=1.4, label=label)
            axis.plot(one, c.predicted[one, joint], "o", color="C1", ms=3)
        if begin:
            axis.axvline(begin - 0.5, color="0.8", lw=0.8)
    axis.set_ylabel(drawing.names[joint], fontsize=8)
    axis.tick_params(labelsize=7, labelbottom=joint == len(drawing.names) - 1)
    if joint == 0:
        axis.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def _draw_leads(axis: Any, result: Result) -> None:
    for steps, run in result["runs"].items():
        axis.plot(run["leads"]["mae"], marker=".", label=f"denoising steps: {steps}")
    axis.plot(next(iter(result["runs"].values()))["leads"]["hold_mae"], "k--", lw=1, label="holding still")
    axis.axvline(result["action_horizon"] - 0.5, color="0.7", lw=0.8)
    axis.set_xlabel("frames after the observation (line: end of what is executed)", fontsize=8)
    axis.set_ylabel("MAE, all joints", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
