"""What a run was like, as a dictionary for JSON and as aligned text for people.

Percentiles are over all samples of the run (numpy's linear interpolation). Times in milliseconds, joints in the arm's own unit.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gr00t_fast.contracts import LandingReport, Observation
from gr00t_fast.control.html_report import html_report, rates, stalled_text, timing_plot
from gr00t_fast.control.limits import SafetyFilter
from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.pacer import Pacer
from gr00t_fast.control.trace import RunTrace, TickRecord
from gr00t_fast.control.views import View, check_writable
from gr00t_fast.errors import ConfigError, MissingExtraError, install_command, require
from gr00t_fast.measurement import git_commit, machine, percentiles, versions

SCHEMA, SCHEMA_VERSION = "gr00t_fast.run_report", 1
_LEGEND = (
    "pause/chunk: the arm stood still for a new chunk. wait: idle until the next tick; counted twice where a chunk begins.",
    "loop: one inference and its actions played. infer/refine: what vision and language found, made ready for denoising.",
    "clamped: target beyond the calibrated range. speed-lim.: faster than --max_speed_deg_s. All three count ticks.",
    "follow-lim.: further ahead of the joint than --max_following_error_deg.",
    "track: distance from a target to the pose one tick later.",
)
_SECRET_FLAGS, _HIDDEN = ("__api_token",), "(hidden)"  # dashes and underscores are the same to the flags


def build_report(
    loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str] = (), argv: Sequence[str] | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about a finished (or failed) run as JSON-ready values. `settings`, `warnings` and `notes` are passed through."""
    trace, pacer = loop.trace, loop.pacer
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "run": _run(trace, pacer),
        "stages_ms": {stage: percentiles(values) for stage, values in trace.stages_ms.items()},
        "pacing": {
            "tick_error_ms": percentiles(1000 * np.asarray(pacer.tick_errors_s)),
            "missed_ticks": pacer.missed_ticks,
            "waiting_for_inference_ticks": pacer.waiting_ticks,
            "pause_per_chunk_ms": percentiles([chunk.pause_ms for chunk in trace.chunks]),
        },
        "controller": _controller(loop),
        "safety": _safety(loop.safety),
        "tracking_error": _tracking(trace, loop.robot.joint_unit),
        "events": dict(trace.events),
        "landing": _landing(trace.landing),
        "warnings": list(warnings),
        "notes": list(notes),
        "settings": dict(settings),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": shlex.join(without_secrets(sys.argv if argv is None else argv)),
    }


def without_secrets(argv: Sequence[str]) -> list[str]:
    """A command line for others to read: `--api_token=...` without its value, however it is spelt."""
    shown, hide = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = name.replace("-", "_") in _SECRET_FLAGS
        shown.append(_HIDDEN if hide else f"{name}={_HIDDEN}" if equals and secret else word)
        hide = not equals and secret
    return shown


def _run(trace: RunTrace, pacer: Pacer) -> dict[str, Any]:
    """`achieved_hz`: from the first target of each episode to its last, so without the inference before the one and the wait after the other."""
    intervals_s = _intervals_s(trace)
    during_playback_s = intervals_s[~(_is_chunk_start(trace) | trace.arrays()["starved"][1:])]
    return {
        "ended_by": trace.ended_by,
        "episodes": trace.episodes,
        "episodes_solved": trace.episodes_solved,
        "ticks": len(trace),
        "inferences": len(trace.chunks),
        "duration_s": round(trace.ended_s - trace.began_s, 3),
        "target_hz": pacer.fps,
        "achieved_hz": _rate(intervals_s),
        "playback_hz": _rate(during_playback_s),
    }


def _controller(loop: ControlLoop) -> dict[str, Any]:
    """Ages in ticks since the observation behind a target: how fresh what was played is."""
    data = loop.trace.arrays()
    own = loop.controller.summary()
    return {"starved_ticks": int(data["starved"].sum()), **own, "target_age_ticks": percentiles(data["age_ticks"][~data["starved"]])}


def _intervals_s(trace: RunTrace) -> np.ndarray:
    """Time between successive sends; NaN across episodes."""
    data = trace.arrays()
    return np.where(np.diff(data["episode"]) == 0, np.diff(data["time_s"]), np.nan)


def _is_chunk_start(trace: RunTrace) -> np.ndarray:
    return np.isin(np.arange(1, max(1, len(trace))), trace.arrays()["chunk_starts"])


def _rate(intervals_s: np.ndarray) -> float | None:
    valid = intervals_s[np.isfinite(intervals_s)]
    return round(float(valid.size / valid.sum()), 3) if valid.size and valid.sum() > 0 else None


def _safety(safety: SafetyFilter | None) -> dict[str, Any] | None:
    if safety is None:
        return None
    return {
        "held_ticks": safety.held_ticks,
        "clamped": _per_joint(safety.joint_names, safety.clamped),
        "speed_limited": _per_joint(safety.joint_names, safety.speed_limited),
        "following_limited": _per_joint(safety.joint_names, safety.following_limited),
        "stalled": {
            name: {"times": int(times), "total_s": round(float(total_s), 3)}
            for name, times, total_s in zip(safety.joint_names, safety.blocked.count, safety.blocked.total_s, strict=True)
            if times
        },
        "options": asdict(safety.options),
    }


def _per_joint(names: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _tracking(trace: RunTrace, unit: str) -> dict[str, Any]:
    errors = trace.tracking_error()
    return {"unit": unit, "joints": {name: percentiles(errors[:, index]) for index, name in enumerate(trace.joint_names)}}


def _landing(landing: LandingReport | None) -> dict[str, Any] | None:
    return None if landing is None else {**asdict(landing), "safe": landing.safe}


def verdict(report: Mapping[str, Any]) -> str:
    """One line: what was played, how it ended, and in what state the arm is."""
    run, landing = report["run"], report["landing"]
    solved = "" if run["episodes_solved"] is None else f", solved in {run['episodes_solved']}"
    safe = "not reported" if landing is None else "safe" if landing["safe"] else "NOT SAFE"
    ticks = f"{run['ticks']} ticks, {report['pacing']['missed_ticks']} missed"
    return f"{run['episodes']} episode(s){solved}, {ticks}, ended by {_ending(run)}; landing {safe}"


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [*_text_run(report), "", *_text_stages(report), "", *_text_joints(report), *_text_tail(report)]
    return "\n".join(lines) + "\n"


def _text_run(report: Mapping[str, Any]) -> list[str]:
    run, pacing = report["run"], report["pacing"]
    pause, error = pacing["pause_per_chunk_ms"], pacing["tick_error_ms"]
    lines = [
        f"run            {run['ticks']} ticks, {run['inferences']} inferences, {run['episodes']} episode(s), "
        f"{run['duration_s']:.1f} s, ended by {_ending(run)}",
        f"rate           {rates(run)}",
        f"missed ticks   {pacing['missed_ticks']} during playback, {pacing['waiting_for_inference_ticks']} while waiting for inference",
    ]
    if run["episodes_solved"] is not None:
        lines.insert(1, f"task           solved in {run['episodes_solved']} of {run['episodes']} episode(s)")
    if error:
        lines.append(f"tick error     p50 {error['p50']:.2f}, p95 {error['p95']:.2f}, p99 {error['p99']:.2f} ms")
    lines += _text_controller(report["controller"])
    if pause:
        lines.append(f"pause/chunk    p50 {pause['p50']:.1f}, p95 {pause['p95']:.1f}, p99 {pause['p99']:.1f} ms")
    return lines


def _ending(run: Mapping[str, Any]) -> str:
    """`done` in words: nothing but its time limit ends a run that moves the arm."""
    return run["ended_by"] if run["ended_by"] != "done" else "itself: a dry run" if run["inferences"] and not run["ticks"] else "the time limit"


def _text_controller(controller: Mapping[str, Any]) -> list[str]:
    chosen = controller.get("chosen_because")
    lines = [f"controller     {controller['kind']}, chosen because {chosen}"] if chosen else []
    return [*lines, *_text_server(controller), *_text_overlap(controller)]


def _text_server(controller: Mapping[str, Any]) -> list[str]:
    server = controller.get("server")
    if server is None:
        return []
    away = f"outages {server['outages']}, {server['away_s']:.1f} s in all; {server['reconnects']} reconnects"
    return [
        f"server         {server['address']}: {away}, {controller['lost_inferences']} lost inferences, {controller['starved_ticks']} starved ticks"
    ]


def _text_overlap(controller: Mapping[str, Any]) -> list[str]:
    if controller["kind"] != "threaded":
        return []
    rows = {"action age": "target_age_ticks", "chunk delay": "delay_ticks", "estimate": "delay_estimate_ticks"}
    lines = [
        f"overlapped     starved ticks {controller['starved_ticks']}; chunks: {controller['chunks_entered']} entered, "
        f"{controller['chunks_expired']} expired, {controller['chunks_stale']} stale, {controller['lost_inferences']} lost; "
        f"smoothing {controller['smoothing']}"
    ]
    for name, key in rows.items():
        if row := controller[key]:
            lines.append(f"{name:<15}p50 {row['p50']:.1f}, p95 {row['p95']:.1f}, p99 {row['p99']:.1f}, max {row['max']:.0f} ticks")
    if controller["inference_left_running"]:
        lines.append("warning: an inference was still running when the program ended; the arm had landed before.")
    return lines


def _text_stages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{'stage':<24}{'count':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'max ms':>10}"]
    for stage, row in report["stages_ms"].items():
        if row:
            lines.append(f"{stage:<24}{row['count']:>8}" + "".join(f"{row[key]:>10.2f}" for key in ("p50", "p95", "p99", "max")))
    return lines


def _text_joints(report: Mapping[str, Any]) -> list[str]:
    safety, tracking = report["safety"], report["tracking_error"]
    if safety is None:
        return []
    lines = [f"{'joint':<24}{'clamped':>8}{'speed-lim.':>11}{'follow-lim.':>12}{'track p50':>10}{'p95':>10}{'max':>10}  ({tracking['unit']})"]
    for name, clamped in safety["clamped"].items():
        row = tracking["joints"][name]
        errors = "".join(f"{row[key]:>10.2f}" for key in ("p50", "p95", "max")) if row else f"{'-':>10}" * 3
        lines.append(f"{name:<24}{clamped:>8}{safety['speed_limited'][name]:>11}{safety['following_limited'][name]:>12}{errors}")
    return [*lines, f"targets held because NaN or infinite: {safety['held_ticks']}", "", *_LEGEND]


def _text_tail(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if stalled := stalled_text(report):
        lines.append(f"joints found blocked and held where they stood: {stalled}")
    if report["events"]:
        lines.append("faults survived: " + ", ".join(f"{name} {count}" for name, count in sorted(report["events"].items())))
    lines += [f"warning: {warning}" for warning in report["warnings"]] + [f"note: {note}" for note in report["notes"]]
    landing = report["landing"]
    if landing:
        states = sorted(set(landing["torque"].values())) or ["not reported"]
        lines.append(f"landing: torque {', '.join(states)}; {'safe' if landing['safe'] else 'NOT SAFE: ' + '; '.join(landing['problems'])}")
    return lines


_UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}  # a path may hold bytes that are no text; as \\udcNN it is valid JSON still


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN; a setting may be one (`--robot.reconnect_s=.inf`): as text then."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_report(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write report.json and report.txt into `directory`; returns their paths. Raises ConfigError when it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        as_json, text = directory / "report.json", directory / "report.txt"
        as_json.write_text(json.dumps(_strict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n", **_UTF8)
        text.write_text(as_text(report), **_UTF8)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{directory}': {error}. Name a directory that can be written.") from error
    return [as_json, text]


# The report on the terminal and the files of a run (--out, --video). Missing packages and directories raise before the arm is touched.


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
        if len(loop.trace):
            try:
                paths += save_run(loop.trace, self._out)
                paths.append(plot_joints(loop.trace, self._out / "joints.png", loop.robot.joint_unit))
                paths.append(self._write_html(loop, report))
            except OSError as error:
                raise ConfigError(f"--out: cannot write to '{self._out}': {error}. The report itself is there.") from error
        return paths

    def _write_html(self, loop: ControlLoop, report: Mapping[str, Any]) -> Path:
        plots = [("joints", (self._out / "joints.png").read_bytes()), ("pace", timing_plot(loop.trace, loop.pacer.fps))]
        frames = [("first", self._pictures.first), ("last", self._pictures.last)] if self._pictures is not None else []
        page = html_report(report, verdict(report), as_text(report), plots, frames)
        path = self._out / "report.html"
        path.write_text(page, encoding="utf-8")
        return path


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
    measured_s, measured = _with_gaps(data["time_s"], data["measured"], data["episode"])
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
        axis.plot(measured_s, measured[:, index], label="measured", linewidth=1.2)
        axis.set_ylabel(name.replace("_", "\n"), fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    episodes = ", red lines: a new episode" if trace.episodes > 1 else ""
    axes[0].set_title(f"joints ({unit}; gripper in per cent), grey lines: a new chunk{episodes}", fontsize=9)
    axes[-1].set_xlabel("time (s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _with_gaps(time_s: np.ndarray, values: np.ndarray, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) and values (T, J) with NaN, which no line crosses, before each episode and after each pause."""
    intervals_s = np.diff(time_s)
    pauses = np.flatnonzero(intervals_s > 2 * np.median(intervals_s)) + 1 if len(intervals_s) else []
    places = np.union1d(pauses, _later_episodes(episode)).astype(int)
    return np.insert(time_s, places, np.nan), np.insert(values, places, np.nan, axis=0)


def _later_episodes(episode: np.ndarray) -> np.ndarray:
    """Ticks at which an episode begins, but for the first; `episode` int64 (T,)."""
    return np.flatnonzero(np.diff(episode)) + 1
