"""Pictures of the study: joints over time, and errors with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay_study.trial import Cell, Motion
from gr00t_fast.optional import require

_DPI = 75
_COLOURS = {"sync": "C3", "threaded": "C0", "server": "C2", "threaded_resume": "C4", "naive_async": "C1", "floor": "0.5"}
Motions = Mapping[Cell, Motion]


def _pyplot() -> Any:
    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def setting(cell: Cell) -> str:
    return f"delay {cell.delay.label}, {cell.horizon} actions per chunk"


def plot_all_joints(motions: Motions, path: Path) -> None:
    """Every joint of one trial of every architecture, in the hardest setting; a row per scene's joint."""
    plt = _pyplot()
    scenes = list(dict.fromkeys(cell.scene for cell in motions))
    names = next(iter(motions.values())).joint_names
    figure, axes = plt.subplots(len(names), len(scenes), figsize=(7 * len(scenes), 1.7 * len(names)), squeeze=False, sharex="col")
    for column, scene in enumerate(scenes):
        chosen = _hardest({cell: motion for cell, motion in motions.items() if cell.scene == scene})
        for joint, name in enumerate(names):
            _draw_joint(axes[joint][column], chosen, joint)
            axes[joint][column].set_ylabel(name, fontsize=8)
        axes[0][column].set_title(f"{scene} scene, {setting(next(iter(chosen)))}", fontsize=10)
        axes[-1][column].set_xlabel("time since the first target (s)")
    axes[0][0].legend(fontsize=7, ncol=3)
    _save(plt, figure, path)


def plot_one_joint(motions: Motions, path: Path) -> None:
    """The joint that moves most, in every setting."""
    plt = _pyplot()
    keys = list(dict.fromkeys((cell.scene, setting(cell)) for cell in motions))
    scenes = list(dict.fromkeys(scene for scene, _ in keys))
    settings = list(dict.fromkeys(setting(cell) for cell in sorted(motions, key=lambda cell: (cell.delay.ticks(1000), cell.horizon))))
    joint = int(np.ptp(next(iter(motions.values())).reference, axis=0).argmax())
    figure, axes = plt.subplots(len(settings), len(scenes), figsize=(7 * len(scenes), 2.6 * len(settings)), squeeze=False, sharex="col", sharey=True)
    for row, text in enumerate(settings):
        for column, scene in enumerate(scenes):
            axis = axes[row][column]
            chosen = {cell: motion for cell, motion in motions.items() if (cell.scene, setting(cell)) == (scene, text)}
            _draw_joint(axis, chosen, joint)
            axis.set_title(f"{scene} scene, {text}", fontsize=9)
            if chosen:
                axis.legend(fontsize=7)
    axes[0][0].set_ylabel(f"{next(iter(motions.values())).joint_names[joint]} (degrees)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("time since the first target (s)")
    _save(plt, figure, path)


def plot_errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """MAE and RMSE by joint, mean over the trials with 95 % confidence intervals, delay taken out; a column per setting of the first scene."""
    plt = _pyplot()
    rows = [row for row in rows if row["scene"] == rows[0]["scene"] and row["architecture"] != "floor"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(4, len(settings), figsize=(4.6 * len(settings), 9.5), squeeze=False, sharey="row")
    for column, text in enumerate(settings):
        for line, figure_name in enumerate(("mae_raw", "mae_aligned", "rmse_raw", "rmse_aligned")):
            axis = axes[line][column]
            _draw_bars(axis, [row for row in rows if row["setting"] == text], figure_name)
            kind, _, alignment = figure_name.partition("_")
            axis.set_ylabel(
                f"{kind.upper()}, {'same instant' if alignment == 'raw' else 'delay taken out'}\n(degrees; gripper: per cent)", fontsize=7
            )
        axes[0][column].set_title(text, fontsize=9)
    handles = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(handles.values(), handles.keys(), fontsize=7)
    figure.suptitle(f"{rows[0]['scene']} scene; whiskers: 95 % confidence interval over {rows[0]['trials']} trials", fontsize=10)
    _save(plt, figure, path)


def _hardest(motions: Motions) -> Motions:
    """Those of the longest delay and the shortest chunk."""
    ticks, horizon = max((cell.delay.ticks(1000), -cell.horizon) for cell in motions)
    return {cell: motion for cell, motion in motions.items() if (cell.delay.ticks(1000), -cell.horizon) == (ticks, horizon)}


def _draw_joint(axis: Any, motions: Motions, joint: int) -> None:
    if not motions:
        axis.axis("off")
        return
    moving = next((motion for cell, motion in motions.items() if cell.scene == "moving"), None)
    if moving is not None:  # a still scene has no time of its own
        axis.plot(moving.grid_s, moving.reference[:, joint], "k", linewidth=2.2, alpha=0.45, label="recording")
    for cell, motion in motions.items():
        style = {"linestyle": (0, (4, 4)), "zorder": 3} if cell.architecture == "server" else {}  # it lies on `threaded`
        axis.plot(motion.grid_s, motion.arm[:, joint], color=_COLOURS[cell.architecture], linewidth=1.1, label=cell.architecture, **style)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=7)


def _draw_bars(axis: Any, rows: Sequence[Mapping[str, Any]], figure_name: str) -> None:
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        joints = row["figures"]["joints"][figure_name]
        means, halves = ([entry[key] or 0.0 for entry in joints.values()] for key in ("mean", "ci95"))
        places = np.arange(len(joints)) + number * width - 0.4 + width / 2
        axis.bar(places, means, width, yerr=halves, color=_COLOURS[row["architecture"]], label=row["architecture"], error_kw={"elinewidth": 0.8})
        axis.set_xticks(range(len(joints)), joints, rotation=20, fontsize=7)
    axis.grid(alpha=0.25, axis="y")
    axis.tick_params(axis="y", labelsize=7)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
