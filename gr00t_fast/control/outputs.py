"""What a run leaves (`--out`): its report as text, page and JSON, its arrays, plots of joints and pace. And the report on the terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.report import as_page, as_text, build_report, verdict
from gr00t_fast.control.trace import RunTrace, TickRecord
from gr00t_fast.control.views import View, check_writable
from gr00t_fast.errors import MissingExtraError, RecordingError, install_command, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        self._first: Mapping[str, np.ndarray] = {}  # pictures of the run
        self._last: Mapping[str, np.ndarray] = {}
        self._stack = ExitStack()

    @property
    def observers(self) -> list[Observer]:
        return [*self._views, *([self] if self._out is not None else [])]

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        self._first = self._first or observation.frames
        self._last = observation.frames or self._last

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
            report = build_report(loop, settings, [*warnings, *(warning for view in self._views for warning in view.warnings)], notes=notes)
            try:
                self._show(loop, report)
            finally:  # the terminal may be gone (SIGHUP): the files are written all the same
                paths = self._write_files(loop, report)
            if paths:
                self._say("wrote " + ", ".join(map(str, paths)) + "\n")
        except Exception as error:
            if not failing:
                raise
            if isinstance(error, BrokenPipeError):
                return  # it is what ended the run, and said as that
            with suppress(OSError):  # whatever it was, it must not take the place of the error that ended the run
                print(f"WARNING: the report of the run could not be written: {error}", file=sys.stderr, flush=True)

    def _show(self, loop: ControlLoop, report: Mapping[str, Any]) -> None:
        if self._quiet:
            self._say(verdict(report) + "\n")
        elif loop.trace.moved or loop.trace.ended_by == "done":
            self._say("\n" + as_text(report))
        else:
            self._say("The arm was not moved: the run ended before the first target was sent.\n")
        if self._as_json:
            print(json.dumps(_strict(report), allow_nan=False), flush=True)

    def _say(self, text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if self._as_json else sys.stdout)

    def _write_files(self, loop: ControlLoop, report: Mapping[str, Any]) -> list[Path]:
        paths = [view.written for view in self._views if view.written is not None]
        if self._out is None or not (loop.trace.episodes or loop.trace.moved):  # a start that was refused leaves nothing behind
            return paths
        return [*write_files(self._out, self._contents(loop, report)), *paths]

    def _contents(self, loop: ControlLoop, report: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        yield from contents(loop.trace, report)
        if len(loop.trace):
            joints, pace = _png(joints_figure(loop.trace, loop.robot.joint_unit)), _png(pace_figure(loop.trace, loop.pacer.fps))
            page = as_page(report, [("joints", joints), ("pace", pace)], [("first", self._first), ("last", self._last)])
            yield from {"joints.png": joints, "report.html": page.encode()}.items()


def write_files(directory: Path, files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Write (name, content) into `directory`; returns the paths. Raises RecordingError; the files before the one that it names are whole."""
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files:
            (directory / name).write_bytes(content)
            paths.append(directory / name)
    except OSError as error:
        raise RecordingError(f"--out: cannot write to '{directory}': {error}. Name a directory that can be written.") from error
    return paths


def contents(trace: RunTrace, report: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files of a run but its pictures: report.json, report.txt and, where something was played, run.npz (`RunTrace.arrays` and joint_names) and
    run.csv (a line for each tick)."""
    texts = {"report.json": json.dumps(_strict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n", "report.txt": as_text(report)}
    for name, text in texts.items():
        yield name, text.encode("utf-8", "backslashreplace")  # a path may hold bytes that are no text; as \\udcNN it is valid JSON still
    if not len(trace):
        return
    data, npz, csv = trace.arrays(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(npz, joint_names=np.array(trace.joint_names), **data)
    yield "run.npz", npz.getvalue()
    vectors = ("measured", "target", "commanded")
    header = ["time_s", "episode", *(f"{kind}.{name}" for kind in vectors for name in trace.joint_names)]
    table = np.column_stack([data["time_s"], data["episode"], *(data[kind] for kind in vectors)])
    np.savetxt(csv, table, fmt="%.5f", delimiter=",", header=",".join(header), comments="")
    yield "run.csv", csv.getvalue()


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN; a setting may be one (`--robot.reconnect_s=.inf`): as text then."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def joints_figure(trace: RunTrace, unit: str) -> Figure:
    """One panel per joint over time, commanded against measured; begins of chunks and episodes as vertical lines. Raises MissingExtraError without
    matplotlib."""
    data, figure = trace.arrays(), _figure(1.7 * len(trace.joint_names))
    measured_s, measured = _with_gaps(trace)
    axes = figure.subplots(len(trace.joint_names), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axis, name) in enumerate(zip(axes, trace.joint_names, strict=True)):
        for start_s in data["time_s"][data["chunk_starts"]]:
            axis.axvline(start_s, color="0.85", linewidth=0.8, zorder=0)
        for start_s in data["time_s"][1:][np.diff(data["episode"]) > 0]:
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
    axis.plot(data["time_s"][1:], 1000 * trace.intervals_s(), linewidth=0.8, label="between two targets")
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


def _with_gaps(trace: RunTrace) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) and measured joints (T, J) with NaN, which no line crosses, before each episode and after each pause."""
    data, intervals_s = trace.arrays(), trace.intervals_s()
    played_s = intervals_s[np.isfinite(intervals_s)]
    usual_s = np.median(played_s) if len(played_s) else 0.0
    places = np.flatnonzero(~(intervals_s <= 2 * usual_s)) + 1
    return np.insert(data["time_s"], places, np.nan), np.insert(data["measured"], places, np.nan, axis=0)
