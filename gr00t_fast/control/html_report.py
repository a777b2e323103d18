"""The report of a run as one page for a browser: table, plots, pictures and settings in a file that loads nothing and needs no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gr00t_fast.control.trace import RunTrace
from gr00t_fast.errors import require

_WIDTH_PX = 640  # of a camera's picture; larger ones are made smaller
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .15rem .8rem; text-align: right; font-variant-numeric: tabular-nums }
th { font-weight: 600; border-bottom: 1px solid #8888 } th:first-child, td:first-child { text-align: left } td.text { text-align: left }
img { max-width: 100%; background: #fff } figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 46% } figcaption { font-size: .85rem }
pre { overflow-x: auto; padding: .6rem; background: #8882 } .warning { border-left: 4px solid #d22; padding-left: .6rem } .scroll { overflow-x: auto }
"""


def html_report(
    report: Mapping[str, Any],
    verdict: str,
    text: str,
    plots: Sequence[tuple[str, bytes]],
    frames: Sequence[tuple[str, Mapping[str, np.ndarray]]],
) -> str:
    """The page. `report` as of build_report, `verdict` and `text` the same for people; `plots` (title, PNG); `frames` (when, camera -> RGB uint8)."""
    body = [
        f"<h1>{_text(verdict)}</h1>",
        *(f'<p class="warning">{_text(warning)}</p>' for warning in report["warnings"]),
        *_sections(report),
        *(f"<h2>{_text(title)}</h2>{_image(png, 'png', title)}" for title, png in plots),
        *_pictures(frames),
        "<h2>settings</h2>",
        _table([], [(name, value) for name, value in flat(report["settings"]).items()]),
        "<h2>made with</h2>",
        _table([], [("command", report["command_line"]), ("commit", report["git_commit"]), *report["machine"].items(), *report["versions"].items()]),
        f"<h2>as text</h2><pre>{_text(text)}</pre>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(verdict)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _sections(report: Mapping[str, Any]) -> Iterator[str]:
    run, pacing = report["run"], report["pacing"]
    rows = [
        ("instruction", report["settings"].get("lang_instruction", "")),
        ("episodes solved", "not known to the arm" if run["episodes_solved"] is None else f"{run['episodes_solved']} of {run['episodes']}"),
        ("duration", f"{run['duration_s']:.1f} s, {run['ticks']} ticks, {run['inferences']} inferences"),
        ("rate", rates(run)),
        ("missed ticks", f"{pacing['missed_ticks']}; {pacing['waiting_for_inference_ticks']} more while waiting for inference"),
        ("faults survived", ", ".join(f"{name} {count}" for name, count in report["events"].items()) or "none"),
        ("joints found blocked and held", stalled_text(report) or "none"),
        ("landing", "not reported" if report["landing"] is None else "safe" if report["landing"]["safe"] else "NOT SAFE"),
    ]
    yield _table([], rows)
    yield "<h2>times (ms)</h2>"
    stages = {**report["stages_ms"], "tick error": pacing["tick_error_ms"], "pause per chunk": pacing["pause_per_chunk_ms"]}
    keys = ("p50", "p95", "p99", "max")
    yield _table(["stage", "count", *keys], [(stage, row["count"], *(number(row[key]) for key in keys)) for stage, row in stages.items() if row])
    if report["safety"] is not None:
        safety, tracking = report["safety"], report["tracking_error"]
        yield f"<h2>joints ({_text(tracking['unit'])}; ticks at which a target was changed)</h2>"
        rows = []
        for name, clamped in safety["clamped"].items():
            track = tracking["joints"][name] or {}
            limited = (safety["speed_limited"][name], safety["following_limited"][name])
            rows.append((name, clamped, *limited, *(number(track.get(key)) for key in ("p50", "p95", "max"))))
        yield _table(["joint", "clamped", "speed-limited", "following-limited", "tracking p50", "p95", "max"], rows)
    controller = [(name, _compact(value)) for name, value in report["controller"].items()]
    yield "<h2>controller</h2>" + _table([], controller)
    yield "".join(f"<p>note: {_text(note)}</p>" for note in report["notes"])


def stalled_text(report: Mapping[str, Any]) -> str:
    """Which joints stall protection held, how often and how long; empty for none."""
    stalled = (report["safety"] or {}).get("stalled", {})
    return ", ".join(f"{name} {row['times']} time(s), {row['total_s']:.1f} s" for name, row in stalled.items())


def _pictures(frames: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> Iterator[str]:
    if any(cameras for _, cameras in frames):
        yield "<h2>cameras</h2>"
    for when, cameras in frames:
        for name, frame in cameras.items():
            yield f"<figure>{_image(_jpeg(frame), 'jpeg', f'{name}, {when}')}<figcaption>{_text(f'{name}, {when}')}</figcaption></figure>"


def _jpeg(frame: np.ndarray) -> bytes:
    import cv2  # changes the environment when it is imported

    height, width = frame.shape[:2]
    if width > _WIDTH_PX:
        frame = cv2.resize(frame, (_WIDTH_PX, max(1, round(height * _WIDTH_PX / width))), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()  # RGB -> BGR


def _image(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    title = "<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>" if head else ""
    kind = "" if head else ' class="text"'
    lines = ("<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{title}{"".join(lines)}</table></div>'


def _text(value: Any) -> str:
    return html.escape("-" if value is None else str(value)).encode("utf-8", "backslashreplace").decode()


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def rates(run: Mapping[str, Any]) -> str:
    """What the arm was sent, in Hz; `run` as in a report."""
    return f"{number(run['achieved_hz'])} Hz from first to last target, {number(run['playback_hz'])} within chunks (asked: {run['target_hz']:g})"


def _compact(value: Any) -> Any:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as --config_path and the command line write them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def timing_plot(trace: RunTrace, fps: float) -> bytes:
    """PNG: the time between two targets, tick by tick, and what each inference took. Raises MissingExtraError without matplotlib."""
    require("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = trace.arrays()
    same_episode = np.diff(data["episode"]) == 0
    intervals_ms = np.where(same_episode, 1000 * np.diff(data["time_s"]), np.nan)
    chunks = [chunk for chunk in trace.chunks if chunk.first_tick < len(trace)]
    figure = Figure(figsize=(11, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(data["time_s"][1:], intervals_ms, linewidth=0.8, label="between two targets")
    axis.axhline(1000 / fps, color="0.6", linewidth=0.8, label=f"at {fps:g} Hz")
    at_s = [data["time_s"][chunk.first_tick] for chunk in chunks]
    axis.plot(at_s, [chunk.inference_ms for chunk in chunks], ".", color="tab:red", label="inference")
    axis.set(xlabel="time (s)", ylabel="ms", ylim=(0, None))
    axis.legend(loc="upper right", ncols=3, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()
