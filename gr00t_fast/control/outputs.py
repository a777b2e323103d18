"""What a run leaves behind: the report on the terminal, and files where asked for. Everything that could be missing is found out
beforehand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.recorder import LiveView, VideoRecorder
from gr00t_fast.control.report import as_text, build_report, write_report
from gr00t_fast.control.trace import RunTrace
from gr00t_fast.errors import ConfigError, MissingExtraError
from gr00t_fast.optional import install_command, require


class Outputs:
    """Onlookers during the run and files after it. Use as a context manager around the run."""

    def __init__(self, out: Path | None, video: Path | None, show_images: bool, fps: float, on_quit: Callable[[], None]) -> None:
        """Raises ConfigError when `out` or `video` cannot be written, MissingExtraError without a needed package: before the arm is touched."""
        self._out = out
        if out is not None:
            _check_writable(out, "--out")
            if importlib.util.find_spec("matplotlib") is None:  # found, not imported: that costs 0.3 s and is not needed yet
                raise MissingExtraError(f"--out draws joints.png with matplotlib, which is not installed: {install_command('plots')}")
        self._video = VideoRecorder(video, fps) if video is not None else None
        if video is not None:
            _check_writable(video.parent, "--video")
            if video.is_dir():
                raise ConfigError(f"--video: '{video}' is a directory. Name a file in a directory that can be written.")
        self._view = LiveView(on_quit=on_quit) if show_images else None
        self._stack = ExitStack()

    @property
    def observers(self) -> list[Observer]:
        return [observer for observer in (self._video, self._view) if observer is not None]

    def __enter__(self) -> Outputs:
        if self._video is not None:
            self._stack.enter_context(self._video)
        if self._view is not None:
            self._stack.callback(self._view.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def write(
        self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], failing: bool = False, notes: Sequence[str] = ()
    ) -> None:
        """Print the report, `warnings` and `notes` once more in it, and write the files. Raises ConfigError when the disk refuses; with `failing`,
        when the run's own error is on its way to the user, that is only a warning."""
        try:
            self._write(loop, settings, warnings, notes)
        except Exception as error:
            if not failing:
                raise
            if isinstance(error, BrokenPipeError):
                return  # it is what ended the run, and said as that
            with suppress(OSError):  # whatever it was, it must not take the place of the error that ended the run
                print(f"WARNING: the report of the run could not be written: {error}", file=sys.stderr, flush=True)

    def _write(self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], notes: Sequence[str]) -> None:
        report = build_report(loop, settings, [*warnings, *self._video_warnings()], notes=notes)
        with ExitStack() as told:  # the terminal may be gone (SIGHUP): the files are written all the same, and then that is raised
            try:
                print(_for_terminal(loop, report), end="", flush=True)
            except OSError as error:
                told.callback(_raise, error)
            paths = self._write_files(loop, report)
        if self._video is not None and self._video.error is None and self._video.path.exists():
            paths.append(self._video.path)
        if paths:
            print("wrote " + ", ".join(str(path) for path in paths))

    def _write_files(self, loop: ControlLoop, report: Mapping[str, Any]) -> list[Path]:
        if self._out is None:
            return []
        paths = write_report(report, self._out)
        if len(loop.trace):
            try:
                paths += save_run(loop.trace, self._out)
                paths.append(plot_joints(loop.trace, self._out / "joints.png", loop.robot.joint_unit))
            except OSError as error:
                raise ConfigError(f"--out: cannot write to '{self._out}': {error}. The report itself is there.") from error
        return paths

    def _video_warnings(self) -> list[str]:
        if self._video is None:
            return []
        warnings = [f"the video ended early: {self._video.error}"] if self._video.error else []
        if self._video.dropped_frames:
            warnings.append(f"the video lacks {self._video.dropped_frames} frames: the encoder was slower than the loop.")
        return warnings


def _for_terminal(loop: ControlLoop, report: Mapping[str, Any]) -> str:
    """The report; where nothing was played there is nothing to report but that."""
    if loop.trace.moved or loop.trace.ended_by == "done":
        return "\n" + as_text(report)
    return "The arm was not moved: the run ended before the first target was sent.\n"


def _raise(error: BaseException) -> NoReturn:
    raise error


def _check_writable(directory: Path, flag: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write_probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot write to '{directory}': {error}. Name a directory that can be written.") from error


# The recorded run as a picture (commanded against measured, joint by joint) and as files for other programs.


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
