"""What a run was like: one dictionary of facts, which is its report.json, and from that one list of sections, which are text and a page for
people; and the files that a run leaves (`--out`).

Percentiles are over all samples of the run (numpy's linear interpolation). Times in milliseconds, joints in the arm's own unit.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import MissingExtraError, RecordingError, install_command, require
from gr00t_fast.base.measurement import git_commit, machine, percentiles, versions
from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import RunTrace, TickRecord
from gr00t_fast.record.pictures import jpeg, png
from gr00t_fast.record.views import View, check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gr00t_fast.control.limits import Limits


SCENE_PICTURE, _SCENE_CAPTION = "scene.png", "as recorded (median of the first pictures), now, and the difference"
SCHEMA, SCHEMA_VERSION = "gr00t_fast.run_report", 1
LIMITS = ("clamped", "speed_limited", "following_limited")  # of a target; counted by joint
_PERCENTILES = ("p50", "p95", "p99", "max")
_STAGES = (
    "pause per chunk: the arm stood still for a new chunk. wait: until the next tick.",
    "infer/refine: what vision and language found, made ready for denoising.",
)
_LIMIT_NOTES = (
    "clamped: target beyond the calibrated range. speed-limited: faster than --max_speed_deg_s.",
    "following-limited: further ahead of the joint than --max_following_error_deg. All three count ticks.",
    "tracking: distance from a target to the pose one tick later.",
)
_SCENE_NOTE = "live less recorded: shift, right, down in pixels, roll in degrees, zoom a share; light logarithmic; score: 1 is the same picture."
_SECRET_FLAGS, HIDDEN = ("__api_token",), "(hidden)"  # what is shown in place of a secret; dashes and underscores are the same to the flags
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .15rem .8rem; text-align: right; font-variant-numeric: tabular-nums }
th { font-weight: 600; border-bottom: 1px solid #8888 } th:first-child, td:first-child { text-align: left } td.text { text-align: left }
img { max-width: 100%; background: #fff } figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 46% } figcaption { font-size: .85rem }
.warning { border-left: 4px solid #d22; padding-left: .6rem } .scroll { overflow-x: auto }
"""


def build_report(
    loop: ControlLoop,
    settings: Mapping[str, Any],
    warnings: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    scene: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything about a finished (or failed) run as JSON-ready values. `settings`, `warnings`, `notes` and `scene` (`Outputs.compared`) are passed
    through."""
    trace, pacer, data = loop.trace, loop.pacer, loop.trace.arrays()
    errors = tracking_error(data)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "run": _run(trace, loop.options.fps),
        "stages_ms": {stage: percentiles(values) for stage, values in trace.stages_ms.items()},
        "pacing": {
            "tick_error_ms": percentiles(1000 * np.asarray(pacer.tick_errors_s)),
            "missed_ticks": pacer.missed_ticks,
            "waiting_for_inference_ticks": int(data["underrun"].sum()),
            "pause_per_chunk_ms": percentiles([chunk.pause_ms for chunk in trace.chunks if not chunk.overlapped]),
        },
        "controller": {
            **loop.planner.summary(),
            "target_age_ticks": percentiles(data["age_ticks"][~data["underrun"]]),
        },
        "safety": None if loop.limits is None else _safety(loop.limits),
        "tracking_error": {
            "unit": loop.robot.joint_unit,
            "joints": {name: percentiles(errors[:, index]) for index, name in enumerate(trace.joint_names)},
        },
        "events": dict(trace.events),
        "landing": None if trace.landing is None else {**asdict(trace.landing), "safe": trace.landing.safe},
        "warnings": list(warnings),
        "notes": list(notes),
        **({} if scene is None else {"scene": dict(scene)}),
        "settings": dict(settings),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": shlex.join(without_secrets(sys.argv if argv is None else argv)),
    }


def played_intervals_s(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """The times between rows of `RunTrace.arrays` that played (P - 1,), without those held in between; NaN across episodes."""
    played = ~data["underrun"]
    return np.where(np.diff(data["episode"][played]) == 0, np.diff(data["time_s"][played]), np.nan)


def tracking_error(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """|commanded at a tick - measured one tick later| (T', J), pairs of rows that played within one episode."""
    comparable = (np.diff(data["episode"]) == 0) & ~data["underrun"][:-1] & ~data["underrun"][1:]
    return np.abs(data["commanded"][:-1] - data["measured"][1:])[comparable]


def without_secrets(argv: Sequence[str]) -> list[str]:
    """A command line for others to read: `--api_token=...` without its value, however it is spelt."""
    shown, hide = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = name.replace("-", "_") in _SECRET_FLAGS
        shown.append(HIDDEN if hide else f"{name}={HIDDEN}" if equals and secret else word)
        hide = not equals and secret
    return shown


def _run(trace: RunTrace, fps: float) -> dict[str, Any]:
    """`achieved_hz`: from the first target of each episode to its last, so without the inference before the one and the wait after the other."""
    data = trace.arrays()
    intervals_s = played_intervals_s(data)
    waited = np.diff(np.flatnonzero(~data["underrun"])) > 1  # rows were held in between
    return {
        "ended_by": trace.ended_by,
        "episodes": trace.episodes,
        "episodes_solved": trace.episodes_solved,
        "ticks": int((~data["underrun"]).sum()),
        "inferences": len(trace.chunks),
        "duration_s": round(trace.ended_s - trace.began_s, 3),
        "target_hz": fps,
        "achieved_hz": _rate(intervals_s),
        "playback_hz": _rate(intervals_s[~waited]),
    }


def _rate(intervals_s: np.ndarray) -> float | None:
    valid = intervals_s[np.isfinite(intervals_s)]
    return round(float(valid.size / valid.sum()), 3) if valid.size and valid.sum() > 0 else None


def _safety(safety: Limits) -> dict[str, Any]:
    counts = {name: getattr(safety, name).tolist() for name in LIMITS}
    stalled = zip(safety.joint_names, safety.blocked.count.tolist(), safety.blocked.total_s.tolist(), strict=True)
    return {
        "held_ticks": safety.held_ticks,
        **{name: dict(zip(safety.joint_names, found, strict=True)) for name, found in counts.items()},
        "stalled": {name: {"times": times, "total_s": round(total_s, 3)} for name, times, total_s in stalled if times},
        "options": asdict(safety.options),
    }


# For people


@dataclass(frozen=True)
class Section:
    """A table. Without columns its rows are names and values. `notes` explain its words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The sections of a report that `build_report` made."""
    controller = {name.replace("_", " "): value for name, value in report["controller"].items() if value is not None}
    rows = [(name, _listed(value)) for name, value in controller.items()]
    return [Section("run", (), list(_run_rows(report))), *_scene(report), _stages(report), *_joints(report), Section("controller", (), rows)]


def _run_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    run, pacing, landing, safety = report["run"], report["pacing"], report["landing"], report["safety"]
    inferences = f"{run['ticks']} ticks, {run['inferences']} inferences, {run['episodes']} episode(s)"
    yield "run", f"{inferences}, {run['duration_s']:.1f} s, ended by {_ending(run)}"
    yield "instruction", report["settings"].get("lang_instruction") or "none"
    if run["ticks"]:  # not of a dry run
        if run["episodes_solved"] is not None:
            yield "task", f"solved in {run['episodes_solved']} of {run['episodes']} episode(s)"
        asked = f"(asked: {run['target_hz']:g})"
        yield "rate", f"{cell(run['achieved_hz'])} Hz from first to last target, {cell(run['playback_hz'])} within chunks {asked}"
        yield "missed ticks", f"{pacing['missed_ticks']} during playback, {pacing['waiting_for_inference_ticks']} while waiting for inference"
    if safety is not None:
        yield "held ticks", f"{safety['held_ticks']}, because the target was NaN or infinite"
    if stalled := (safety or {}).get("stalled"):
        yield "blocked joints", ", ".join(f"{name} {row['times']} time(s), {row['total_s']:.1f} s" for name, row in stalled.items())
    if report["events"]:
        yield "faults survived", ", ".join(f"{name} {count}" for name, count in sorted(report["events"].items()))
    yield from (("warning", warning) for warning in report["warnings"])
    if report["controller"].get("inference_left_running"):
        yield "warning", "an inference was still running when the program ended; the arm had been released before."
    yield from (("note", note) for note in report["notes"])
    if landing is not None:
        states = ", ".join(sorted(set(landing["torque"].values())) or ["not reported"])
        yield "landing", f"torque {states}; {'safe' if landing['safe'] else 'NOT SAFE: ' + '; '.join(landing['problems'])}"


def _stages(report: Mapping[str, Any]) -> Section:
    pacing = report["pacing"]
    stages = {**report["stages_ms"], "tick error": pacing["tick_error_ms"], "pause per chunk": pacing["pause_per_chunk_ms"]}
    rows = [(stage, row["count"], *(row[key] for key in _PERCENTILES)) for stage, row in stages.items() if row]
    return Section("times", ("stage (ms)", "count", *_PERCENTILES), rows, _STAGES)


def _joints(report: Mapping[str, Any]) -> Iterator[Section]:
    safety, tracking = report["safety"], report["tracking_error"]
    if safety is None:
        return
    errors = {name: [(row or {}).get(key) for key in ("p50", "p95", "max")] for name, row in tracking["joints"].items()}
    rows = [(name, *(safety[limit][name] for limit in LIMITS), *row) for name, row in errors.items()]
    columns = (f"joint ({tracking['unit']}, gripper in %)", *(limit.replace("_", "-") for limit in LIMITS), "tracking p50", "p95", "max")
    yield Section("joints", columns, rows, _LIMIT_NOTES)


def _scene(report: Mapping[str, Any]) -> Iterator[Section]:
    """Cameras against the recordings: what was measured. What follows of it is among the warnings and notes."""
    if measures := report.get("scene", {}).get("measures"):
        columns = ("shift", "right", "down", "roll", "zoom", "light", "sharp", "covered", "score")
        rows = [(camera, *(row[name] for name in columns)) for camera, row in measures.items()]
        yield Section("scene", ("camera", *columns), rows, (_SCENE_NOTE,))


def _listed(value: Any) -> str:
    return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) if isinstance(value, Mapping) else cell(value)


def verdict(report: Mapping[str, Any]) -> str:
    """One line: what was played, how it ended, and in what state the arm is."""
    run, landing = report["run"], report["landing"]
    solved = "" if run["episodes_solved"] is None or not run["ticks"] else f", solved in {run['episodes_solved']}"
    safe = "not reported" if landing is None else "safe" if landing["safe"] else "NOT SAFE"
    ticks = f"{run['ticks']} ticks, {report['pacing']['missed_ticks']} missed"
    return f"{run['episodes']} episode(s){solved}, {ticks}, ended by {_ending(run)}; landing {safe}"


def _ending(run: Mapping[str, Any]) -> str:
    """`done` in words: nothing but its time limit ends a run that moves the arm."""
    if run["ended_by"] != "done":
        return run["ended_by"]
    return "itself: a dry run" if run["inferences"] and not run["ticks"] else "the time limit"


def text_of(found: Sequence[Section]) -> str:
    """For a terminal: sections below each other, columns aligned."""
    return "\n".join("".join(line.rstrip() + "\n" for line in _lines(section)) for section in found)


def _lines(section: Section) -> Iterator[str]:
    if not section.columns:
        width = max((len(name) for name, _ in section.rows), default=0)
        yield from (f"{name:<{min(width, 24)}}  {text}" for name, text in section.rows)
    else:
        table = [[cell(value) for value in row] for row in (section.columns, *section.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(section.columns))]
        for first, *others in table:
            yield f"{first:<{max(widths[0], 24)}}" + "".join(f"{text:>{max(width + 2, 10)}}" for text, width in zip(others, widths[1:], strict=True))
    yield from section.notes


def as_page(report: Mapping[str, Any], plots: Sequence[tuple[str, bytes]], frames: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> str:
    """The report for a browser: a file that loads nothing and needs no network. `plots` (title, PNG); `frames` (when, camera -> RGB uint8)."""
    made = {"command": report["command_line"], "commit": report["git_commit"], **report["machine"], **report["versions"]}
    tables = [*sections(report), Section("settings", (), list(flat(report["settings"]).items())), Section("made with", (), list(made.items()))]
    shown = [f"<h2>{_escaped(title)}</h2>{_image(png, 'png', title)}" for title, png in plots]
    return page_of(verdict(report), [*map(_table, tables[:-2]), *shown, *_pictures(frames), *map(_table, tables[-2:])])


def as_plain_page(title: str, found: Sequence[Section], plots: Sequence[tuple[str, bytes]]) -> str:
    """Sections and then pictures (title, PNG) for a browser, as `as_page`."""
    return page_of(title, [*map(_table, found), *(f"<h2>{_escaped(name)}</h2>{_image(png, 'png', name)}" for name, png in plots)])


def page_of(title: str, body: Sequence[str]) -> str:
    """A page with these parts, which are HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style>"
    )
    parts = "\n".join([f"<h1>{_escaped(title)}</h1>", *body])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{parts}\n</body></html>\n'


def _table(section: Section) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in section.columns)
    kind = "" if section.columns else ' class="text"'
    rows = [("warning" if row[0] == "warning" else "", "".join(f"<td{kind}>{_escaped(value)}</td>" for value in row)) for row in section.rows]
    body = "".join(f'<tr class="{name}">{cells}</tr>' for name, cells in [("", head), *rows] if cells)
    notes = "".join(f"<p>{_escaped(note)}</p>" for note in section.notes)
    return f'<h2>{_escaped(section.title)}</h2><div class="scroll"><table>{body}</table></div>{notes}'


def _pictures(frames: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> Iterator[str]:
    if any(cameras for _, cameras in frames):
        yield "<h2>cameras</h2>"
    for when, cameras in frames:
        for name, frame in cameras.items():
            yield f"<figure>{_image(jpeg(frame), 'jpeg', f'{name}, {when}')}<figcaption>{_escaped(f'{name}, {when}')}</figcaption></figure>"


def _image(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{_escaped(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _escaped(value: Any) -> str:
    return html.escape(cell(value)).encode("utf-8", "backslashreplace").decode()


def cell(value: Any) -> str:
    """As it is shown in a table."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return "-" if value is None else str(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as --config_path and the command line write them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


class Outputs:
    """Observers during the run and files after it. Use as a context manager around the run."""

    def __init__(self, out: Path | None, views: Sequence[View] = (), quiet: bool = False, as_json: bool = False, silent: bool = False) -> None:
        """quiet: of the report, print one line. as_json: print it as one line of JSON on standard output, all else on standard error. silent: print
        nothing.

        Raises ConfigError when `out` cannot be written, MissingExtraError without a needed package: before the arm is touched."""
        self._out, self._views, self._quiet, self._as_json, self._silent = out, views, quiet, as_json, silent
        if out is not None:
            check_writable(out, "--out")
            if importlib.util.find_spec("matplotlib") is None:  # found, not imported: that costs 0.3 s and is not needed yet
                raise MissingExtraError(f"--out draws joints.png with matplotlib, which is not installed: {install_command('plots')}")
        self._first: Mapping[str, np.ndarray] = {}  # pictures of the run
        self._last: Mapping[str, np.ndarray] = {}
        self.shown = ""  # of the report, as it was printed
        self._scene: Mapping[str, Any] | None = None  # facts and pictures of the look at the scene
        self._scene_pictures: Mapping[str, np.ndarray] = {}
        self._stack = ExitStack()

    @property
    def observers(self) -> list[Observer]:
        return [*self._views, *([self] if self._out is not None else [])]

    def see(self, observation: Observation, tick: TickRecord | None = None, mode: Mode = Mode.HOLD) -> None:
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

    def compared(self, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        """What the look at the scene found, for the report. Its pictures (camera -> recorded, live, difference) are written at once: the run may be
        refused. Raises RecordingError."""
        self._scene, self._scene_pictures = facts, pictures
        if self._out is not None and pictures:
            write_files(self._out, [(SCENE_PICTURE, png(np.vstack(list(pictures.values()))))])

    def write(
        self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], failing: bool = False, notes: Sequence[str] = ()
    ) -> None:
        """Print the report, `warnings` and `notes` once more in it, and write the files. Raises RecordingError when the disk refuses; with `failing`,
        when the run's own error is on its way to the user, that is only a warning."""
        try:
            report = build_report(
                loop, settings, [*warnings, *(warning for view in self._views for warning in view.warnings)], notes=notes, scene=self._scene
            )
            try:
                if not self._silent:
                    self._show(loop, report)
            finally:  # the terminal may be gone (SIGHUP): the files are written all the same
                paths = self._write_files(loop, report)
            if paths and not self._silent:
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
            self._say("\n" + text_of(sections(report)))
        else:
            self._say("The arm was not moved: the run ended before the first target was sent.\n")
        if self._as_json:
            print(json.dumps(strict(report), allow_nan=False), flush=True)

    def _say(self, text: str) -> None:
        self.shown += text
        print(text, end="", flush=True, file=sys.stderr if self._as_json else sys.stdout)

    def _write_files(self, loop: ControlLoop, report: Mapping[str, Any]) -> list[Path]:
        paths = [view.written for view in self._views if view.written is not None]
        if self._out is None or not (loop.trace.episodes or loop.trace.moved):  # a start that was refused leaves nothing behind
            return paths
        return [*write_files(self._out, self._contents(loop, report)), *paths]

    def _contents(self, loop: ControlLoop, report: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        yield from contents(loop.trace, report)
        if len(loop.trace):
            joints, pace = png_of(joints_figure(loop.trace, loop.robot.joint_unit)), png_of(pace_figure(loop.trace, loop.options.fps))
            frames = [(_SCENE_CAPTION, self._scene_pictures), ("first", self._first), ("last", self._last)]
            page = as_page(report, [("joints", joints), ("pace", pace)], frames)
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
    texts = {"report.json": json.dumps(strict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n", "report.txt": text_of(sections(report))}
    for name, text in texts.items():
        yield name, text.encode("utf-8", "backslashreplace")  # a path may hold bytes that are no text; as \\udcNN it is valid JSON still
    if not len(trace):
        return
    data, npz, csv = trace.arrays(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(npz, joint_names=np.array(trace.joint_names), **data)
    yield "run.npz", npz.getvalue()
    vectors = ("measured", "target", "commanded")
    header = ["time_s", "episode", *(f"{kind}.{name}" for kind in vectors for name in trace.joint_names), "underrun"]
    table = np.column_stack([data["time_s"], data["episode"], *(data[kind] for kind in vectors), data["underrun"]])
    np.savetxt(csv, table, fmt="%.5f", delimiter=",", header=",".join(header), comments="")
    yield "run.csv", csv.getvalue()


def strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN; a setting may be one (`--robot.reconnect_s=.inf`): as text then."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def joints_figure(trace: RunTrace, unit: str) -> Figure:
    """One panel per joint over time, commanded against measured; begins of chunks and episodes as vertical lines. Raises MissingExtraError without
    matplotlib."""
    data, figure = trace.arrays(), new_figure(1.7 * len(trace.joint_names))
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
    data, chunks = trace.arrays(), [chunk for chunk in trace.chunks if chunk.first_row < len(trace)]
    figure = new_figure(3.0)
    axis = figure.subplots()
    axis.plot(data["time_s"][~data["underrun"]][1:], 1000 * played_intervals_s(data), linewidth=0.8, label="between two targets")
    axis.axhline(1000 / fps, color="0.6", linewidth=0.8, label=f"at {fps:g} Hz")
    at_s = [data["time_s"][chunk.first_row] for chunk in chunks]
    axis.plot(at_s, [chunk.inference_ms for chunk in chunks], ".", color="tab:red", label="inference")
    axis.set(xlabel="time (s)", ylabel="ms", ylim=(0, None))
    axis.legend(loc="upper right", ncols=3, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    return figure


def new_figure(height: float) -> Figure:
    figures = require("matplotlib.figure", "plots")  # the object interface: no global state, no display
    return figures.Figure(figsize=(11, height), layout="constrained")


def png_of(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _with_gaps(trace: RunTrace) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) and measured joints (T, J) with NaN, which no line crosses, before each episode."""
    data = trace.arrays()
    places = np.flatnonzero(np.diff(data["episode"]) > 0) + 1
    return np.insert(data["time_s"], places, np.nan), np.insert(data["measured"], places, np.nan, axis=0)
