"""The recorded run as a picture (commanded against measured, joint by joint) and as files for other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gr00t_fast.control.trace import RunTrace
from gr00t_fast.optional import require


def save_run(trace: RunTrace, directory: Path) -> list[Path]:
    """Write run.npz (arrays of `RunTrace.arrays` and joint_names) and run.csv (one line per tick) into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    data = trace.arrays()
    npz, csv = directory / "run.npz", directory / "run.csv"
    np.savez_compressed(npz, joint_names=np.array(trace.joint_names), **data)
    columns = [f"{kind}.{name}" for kind in ("measured", "target", "commanded") for name in trace.joint_names]
    table = np.column_stack([data["time_s"], data["episode"], data["measured"], data["target"], data["commanded"]])
    np.savetxt(csv, table, fmt="%.5f", delimiter=",", header=",".join(["time_s", "episode", *columns]), comments="")
    return [npz, csv]


def plot_joints(trace: RunTrace, path: Path, unit: str) -> Path:
    """Draw one panel per joint over time, begins of chunks and episodes as vertical lines; returns `path`. Raises MissingExtraError without
    matplotlib."""
    require("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the object interface: no global state, no display
    from matplotlib.figure import Figure

    data = trace.arrays()
    joints = len(trace.joint_names)
    figure = Figure(figsize=(11, 1.7 * joints), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(joints, 1, sharex=True, squeeze=False)[:, 0]
    for index, (axis, name) in enumerate(zip(axes, trace.joint_names, strict=True)):
        for start_s in data["time_s"][data["chunk_starts"]]:
            axis.axvline(start_s, color="0.85", linewidth=0.8, zorder=0)
        for start_s in data["time_s"][_later_episodes(data["episode"])]:
            axis.axvline(start_s, color="tab:red", linestyle="--", linewidth=1.0, zorder=0)
        axis.step(data["time_s"], data["commanded"][:, index], where="post", label="commanded", linewidth=1.2)
        axis.plot(data["time_s"], data["measured"][:, index], label="measured", linewidth=1.2)
        axis.set_ylabel(name.replace("_", "\n"), fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    episodes = ", red lines: a new episode" if trace.episodes > 1 else ""
    axes[0].set_title(f"joints ({unit}; gripper in per cent), grey lines: a new chunk{episodes}", fontsize=9)
    axes[-1].set_xlabel("time (s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _later_episodes(episode: np.ndarray) -> np.ndarray:
    """Ticks at which an episode begins, but for the first; `episode` int64 (T,)."""
    return np.flatnonzero(np.diff(episode)) + 1
