"""Two runs side by side, from what each left in its `--out`: settings that differ, timing, motion, safety, outcome.

Axis alphabet of this file: T ticks, J joints of the arm without the gripper.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import read_json
from gr00t_fast.control.limits import GRIPPER
from gr00t_fast.record.report import LIMITS, SCHEMA, SCHEMA_VERSION, Section, cell, flat, text_of

COMPARISON_SCHEMA, COMPARISON_VERSION = "gr00t_fast.run_comparison", 1
_PLACES = ("out", "video", "overwrite", "display", "json", "quiet", "verbose")  # where a run goes to, not how it goes
_REPORT = "report.json"
_STILL_UNITS = 0.05  # a tick at which no target changes by more is one at which the arm is to stand still
# Group -> what a figure is called -> its place in a report. The others are worked out.
_FIGURES = {
    "outcome": {
        "episodes": "run.episodes",
        "episodes solved": "run.episodes_solved",
        "duration (s)": "run.duration_s",
        "ended by": "run.ended_by",
    },
    "timing": {
        "ticks": "run.ticks",
        "rate, first to last target (Hz)": "run.achieved_hz",
        "missed ticks": "pacing.missed_ticks",
        "ticks waiting for inference": "pacing.waiting_for_inference_ticks",
        "tick error p50 (ms)": "pacing.tick_error_ms.p50",
        "tick error p99 (ms)": "pacing.tick_error_ms.p99",
        "inference p50 (ms)": "stages_ms.{infer}.p50",
        "inference p99 (ms)": "stages_ms.{infer}.p99",
        "pause per chunk p50 (ms)": "pacing.pause_per_chunk_ms.p50",
        "pause per chunk p99 (ms)": "pacing.pause_per_chunk_ms.p99",
        "age of actions p50 (ticks)": "controller.target_age_ticks.p50",
    },
}


@dataclass(frozen=True)
class RecordedRun:
    """What a run left: report.json, and the arrays of run.npz (empty where nothing was played)."""

    directory: Path
    report: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def read_run(directory: Path) -> RecordedRun:
    """`directory`, or the report.json in it. Raises ConfigError for a directory without the report of a run, or with one that cannot be read."""
    directory = directory.parent if directory.name == _REPORT else directory
    arrays: dict[str, np.ndarray] = {}
    try:
        report = read_json(directory / _REPORT)
        if (recorded := directory / "run.npz").is_file():
            with np.load(recorded, allow_pickle=False) as data:
                arrays = dict(data)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        what = f"'{directory}': {_REPORT} or run.npz cannot be read: {error}"
        raise ConfigError(f"{what}. Name a directory that was --out of gr00t-fast run.") from error
    schema = (report.get("schema"), report.get("schema_version")) if isinstance(report, dict) else None
    if schema != (SCHEMA, SCHEMA_VERSION):
        what = f"'{directory / _REPORT}' is no report of this version ({SCHEMA} {SCHEMA_VERSION}): {schema}"
        raise ConfigError(f"{what}. Name a run of this version, or run again.")
    return RecordedRun(directory, report, arrays)


def compare_runs(first: RecordedRun, second: RecordedRun) -> dict[str, Any]:
    """JSON-ready. settings, versions, machine: name -> [of the first, of the second], those that differ. figures: group -> name -> both."""
    runs = (first, second)
    tables = [_figures(run) for run in runs]
    return {
        "schema": COMPARISON_SCHEMA,
        "schema_version": COMPARISON_VERSION,
        "runs": [str(run.directory) for run in runs],
        "settings": differences(*map(_settings, runs)),
        "figures": {group: {name: [table[group][name] for table in tables] for name in rows} for group, rows in tables[0].items()},
        "machine": differences(*(run.report["machine"] for run in runs)),
        "versions": differences(*({**run.report["versions"], "commit": run.report["git_commit"]} for run in runs)),
    }


def _settings(run: RecordedRun) -> dict[str, Any]:
    """Without its places; of the controller `auto` what it chose, too."""
    found = played_settings(run.report["settings"])
    chosen = {"controller": f"auto, {run.report['controller'].get('kind')}"} if found.get("controller") == "auto" else {}
    return found | chosen


def played_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run by dotted name, but for where it goes to."""
    return {name: value for name, value in flat(settings).items() if name.partition(".")[0] not in _PLACES}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> both values, of those that differ."""
    names = dict.fromkeys([*first, *second])
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _figures(run: RecordedRun) -> dict[str, dict[str, Any]]:
    report, safety, landing = run.report, run.report["safety"] or {}, run.report["landing"]
    facts = flat(report)
    infer = "infer/total" if report["stages_ms"].get("infer/total") else "infer"
    found = {group: {name: facts.get(path.format(infer=infer)) for name, path in rows.items()} for group, rows in _FIGURES.items()}
    found["outcome"] |= {
        "landing": None if landing is None else "safe" if landing["safe"] else "NOT SAFE",
        "faults survived": sum(report["events"].values()),
        "warnings": len(report["warnings"]),
    }
    found["motion"] = _motion(run)
    found["safety"] = {f"{name.replace('_', '-')} steps": sum(safety[name].values()) if safety else None for name in LIMITS}
    found["safety"] |= {
        "stalls": sum(row["times"] for row in safety.get("stalled", {}).values()),
        "held ticks (NaN)": safety.get("held_ticks"),
    }
    return found


def _motion(run: RecordedRun) -> dict[str, Any]:
    """How the joints but the gripper moved, in joint units; as commanded where not said otherwise. None where too little was played."""
    fps, data = run.report["run"]["target_hz"], run.arrays
    body = np.asarray(data.get("joint_names", ())) != GRIPPER
    commanded, measured = (data[kind][:, body] if kind in data else np.empty((0, 1)) for kind in ("commanded", "measured"))  # (T, J)
    episode = data.get("episode", np.empty(0))
    largest = np.abs(_within(commanded, episode, 1)).max(axis=1, initial=0.0)  # (T - 1,)
    to_chunk = np.isin(np.arange(1, len(commanded)), data.get("chunk_starts", ()))[np.diff(episode) == 0]
    tracking = [row["p95"] for row in run.report["tracking_error"]["joints"].values() if row]
    return {
        "jerk of commands, rms (units/s^3)": _rms(_within(commanded, episode, 3) * fps**3),
        "jerk of the arm, rms (units/s^3)": _rms(_within(measured, episode, 3) * fps**3),
        "largest step (units/tick)": _largest(largest),
        "largest step into a chunk (units/tick)": _largest(largest[to_chunk]),
        "ticks standing still (%)": round(100 * float((largest <= _STILL_UNITS).mean()), 1) if len(largest) else None,
        "tracking error p95, worst joint (units)": max(tracking, default=None),
    }


def seam_jerk(run: RecordedRun) -> float | None:
    """Rms jerk (units/s^3) of the joints but the gripper, as commanded, at the ticks about each new chunk but the first. None without a seam."""
    data = run.arrays
    if "commanded" not in data:
        return None
    third = np.diff(data["commanded"][:, data["joint_names"] != GRIPPER], n=3, axis=0)  # (T - 3, J)
    before = data["chunk_starts"][:, None] - np.arange(1, 4)  # a difference of rows i to i + 3 crosses into row s for i = s - 3 to s - 1
    at_seam = np.isin(np.arange(len(third)), before) & (data["episode"][3:] == data["episode"][:-3])
    return _rms(third[at_seam] * run.report["run"]["target_hz"] ** 3)


def _within(values: np.ndarray, episode: np.ndarray, order: int) -> np.ndarray:
    """Differences of `order` between successive ticks (T - order, J), without those across episodes."""
    if len(episode) <= order:
        return values[:0]
    return np.diff(values, n=order, axis=0)[episode[order:] == episode[:-order]]  # episodes only count up


def _rms(values: np.ndarray) -> float | None:
    return round(float(np.sqrt(np.mean(np.square(values)))), 1) if values.size else None


def _largest(values: np.ndarray) -> float | None:
    return round(float(values.max()), 3) if values.size else None


def as_table(comparison: Mapping[str, Any]) -> str:
    """For people: figures in three columns (first, second, change), then whatever else differs."""
    found = [Section("runs", (), list(zip(("first", "second"), comparison["runs"], strict=True)))]
    for group, rows in comparison["figures"].items():
        changes = [(name, _short(first), _short(second), _change(first, second)) for name, (first, second) in rows.items()]
        found.append(Section(group, (group, "first", "second", "change"), changes))
    for group in ("settings", "machine", "versions"):
        rows = [(f"{name}:", " -> ".join("not set" if value is None else str(value) for value in both)) for name, both in comparison[group].items()]
        found.append(Section(group, (), rows, [] if rows else [f"{group}: the same"]))
    return text_of(found)


def verdict(comparison: Mapping[str, Any]) -> str:
    """One line."""
    rows = comparison["figures"]["outcome"] | comparison["figures"]["timing"]
    shown = {"solved": "episodes solved", "missed ticks": "missed ticks", "tick error p99 (ms)": "tick error p99 (ms)"}
    told = [f"{word} {' -> '.join(map(cell, rows[name]))}" for word, name in shown.items()]
    return "; ".join([*told, f"{len(comparison['settings'])} settings differ"])


def _short(value: Any) -> str:
    text = cell(value)
    return text if len(text) <= 15 else text[:12] + "..."


def _change(first: Any, second: Any) -> str:
    if first == second:
        return "=" if isinstance(first, int | float) else ""
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (first, second)):
        return "differs"
    return f"{second - first:+g}" if not first else f"{100 * (second - first) / abs(first):+.0f} %"
