"""What a run leaves (`--out`): its report as text, page and JSON, its arrays, plots of joints and pace. And the report on the terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.report import as_page, as_text, build_report, verdict
from gr00t_fast.control.trace import RunTrace, TickRecord
from gr00t_fast.control.views import View, check_writable
from gr00t_fast.errors import MissingExtraError, RecordingError, install_command, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}  # a path may hold bytes that are no text; as \\udcNN it is valid JSON still


class Outputs:
    """Observers during the run and files after it. Use as a context manager around the run."""

    def __init__(self, out: Path | None, views: Sequence[View] = (), quiet: bool = False, as_json: bool = False) -> None:
        """quiet: of the report, print one line. as_json: print it as one line of JSON on standard output, all else on standard error.

        Raises ConfigError when `out` cannot be written, MissingExtraError without a needed package: before the arm is touched."""
        self._out, self._views, self._quiet, self._as_json = out, views, quiet, as_json
        if out is not None:
            check_writable(out, "--out")
            if importlib.util.find_spec("matplotlib") is None:  # found, not imported: that costs 0.3 s and is not needed yet
                raise MissingExtraError(f"--out draws joints.png with matplotlib, which is not installed: {install_command('plots')}")
        self._pictures = FirstAndLast() if out is not None else None
        self._stack = ExitStack()

    @property
    def observers(self) -> list[Observer]:
        return [*self._views, *([self._pictures] if self._pictures else [])]

    def __enter__(self) -> Outputs:
        for view in self._views:
            self._stack.enter_context(view)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def prepare(self, observation: Observation) -> None:
        """The first observation, before the arm moves."""
        for view in self._views:
            view.sink.prepare(observation)

    def write(
        self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], failing: bool = False, notes: Sequence[str] = ()
    ) -> None:
        """Print the report, `warnings` and `notes` once more in it, and write the files. Raises RecordingError when the disk refuses; with `failing`,
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
        report = build_report(loop, settings, [*warnings, *(warning for view in self._views for warning in view.warnings)], notes=notes)
        with ExitStack() as told:  # the terminal may be gone (SIGHUP): the files are written all the same, and then that is raised
            try:
                self._say(verdict(report) + "\n" if self._quiet else _for_terminal(loop, report))
                if self._as_json:
                    print(json.dumps(_strict(report), allow_nan=False), flush=True)
            except OSError as error:
                told.callback(_raise, error)
            paths = self._write_files(loop, report)
        paths += [view.written for view in self._views if view.written is not None]
        if paths:
            self._say("wrote " + ", ".join(str(path) for path in paths) + "\n")

    def _say(self, text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if self._as_json else sys.stdout)

    def _write_files(self, loop: ControlLoop, report: Mapping[str, Any]) -> list[Path]:
        if self._out is None or not (loop.trace.episodes or loop.trace.moved):  # a start that was refused leaves nothing behind
            return []
        paths = write_report(report, self._out)
        if not len(loop.trace):
            return paths
        joints, pace = _png(joints_figure(loop.trace, loop.robot.joint_unit)), _png(pace_figure(loop.trace, loop.pacer.fps))
        page = as_page(report, [("joints", joints), ("pace", pace)], [("first", self._pictures.first), ("last", self._pictures.last)])
        try:
            paths += save_run(loop.trace, self._out)
            for name, content in (("joints.png", joints), ("report.html", page.encode())):
                (self._out / name).write_bytes(content)
                paths.append(self._out / name)
        except OSError as error:
            raise RecordingError(f"--out: cannot write to '{self._out}': {error}. The report itself is there.") from error
        return paths


class FirstAndLast:
    """Keeps the first and the last frames of a run."""

    def __init__(self) -> None:
        self.first: Mapping[str, np.ndarray] = {}
        self.last: Mapping[str, np.ndarray] = {}

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        self.first = self.first or observation.frames
        self.last = observation.frames or self.last


def _for_terminal(loop: ControlLoop, report: Mapping[str, Any]) -> str:
    """The report; where nothing was played there is nothing to report but that."""
    if loop.trace.moved or loop.trace.ended_by == "done":
        return "\n" + as_text(report)
    return "The arm was not moved: the run ended before the first target was sent.\n"


def _raise(error: BaseException) -> NoReturn:
    raise error


def write_report(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write report.json and report.txt into `directory`; returns their paths. Raises RecordingError when it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        as_json, text = directory / "report.json", directory / "report.txt"
        as_json.write_text(json.dumps(_strict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n", **_UTF8)
        text.write_text(as_text(report), **_UTF8)
    except OSError as error:
        raise RecordingError(f"--out: cannot write to '{directory}': {error}. Name a directory that can be written.") from error
    return [as_json, text]


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN; a setting may be one (`--robot.reconnect_s=.inf`): as text then."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# The run as files for other programs, and as pictures


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


def joints_figure(trace: RunTrace, unit: str) -> Figure:
    """One panel per joint over time, commanded against measured; begins of chunks and episodes as vertical lines. Raises MissingExtraError without
    matplotlib."""
    data, figure = trace.arrays(), _figure(1.7 * len(trace.joint_names))
    measured_s, measured = _with_gaps(data["time_s"], data["measured"], data["episode"])
    axes = figure.subplots(len(trace.joint_names), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axis, name) in enumerate(zip(axes, trace.joint_names, strict=True)):
        for start_s in data["time_s"][data["chunk_starts"]]:
            axis.axvline(start_s, color="0.85", linewidth=0.8, zorder=0)
        for start_s in data["time_s"][_later_episodes(data["episode"])]:
            axis.axvline(start_s, color="tab:red", linestyle="--", linewidth=1.0, zorder=0)
        axis.step(data["time_s"], data["commanded"][:, index], where="post", label="commanded", linewidth=1.2)
        axis.plot(measured_s, measured[:, index], label="measured", linewidth=1.2)
        axis.set_ylabel(name.replace("_", "\n"), fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    episodes = ", red lines: a new episode" if trace.episodes > 1 else ""
    axes[0].set_title(f"joints ({unit}; gripper in per cent), grey lines: a new chunk{episodes}", fontsize=9)
    axes[-1].set_xlabel("time (s)")
    return figure


def pace_figure(trace: RunTrace, fps: float) -> Figure:
    """The time between two targets, tick by tick, and what each inference took. Raises MissingExtraError without matplotlib."""
    data, chunks = trace.arrays(), [chunk for chunk in trace.chunks if chunk.first_tick < len(trace)]
    figure = _figure(3.0)
    axis = figure.subplots()
    intervals_ms = np.where(np.diff(data["episode"]) == 0, 1000 * np.diff(data["time_s"]), np.nan)
    axis.plot(data["time_s"][1:], intervals_ms, linewidth=0.8, label="between two targets")
    axis.axhline(1000 / fps, color="0.6", linewidth=0.8, label=f"at {fps:g} Hz")
    at_s = [data["time_s"][chunk.first_tick] for chunk in chunks]
    axis.plot(at_s, [chunk.inference_ms for chunk in chunks], ".", color="tab:red", label="inference")
    axis.set(xlabel="time (s)", ylabel="ms", ylim=(0, None))
    axis.legend(loc="upper right", ncols=3, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    return figure


def _figure(height: float) -> Figure:
    require("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the object interface: no global state, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _with_gaps(time_s: np.ndarray, values: np.ndarray, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) and values (T, J) with NaN, which no line crosses, before each episode and after each pause."""
    intervals_s = np.diff(time_s)
    pauses = np.flatnonzero(intervals_s > 2 * np.median(intervals_s)) + 1 if len(intervals_s) else []
    places = np.union1d(pauses, _later_episodes(episode)).astype(int)
    return np.insert(time_s, places, np.nan), np.insert(values, places, np.nan, axis=0)


def _later_episodes(episode: np.ndarray) -> np.ndarray:
    """Ticks at which an episode begins, but for the first; `episode` int64 (T,)."""
    return np.flatnonzero(np.diff(episode)) + 1
