"""What the recordings behind a checkpoint say about motion: where they began, and how fast their targets changed.

Reads the tables of a LeRobotDataset (v2.1 or v3); no video, no network. J joints of the arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import read_json

_STATE, _ACTION = "observation.state", "action"
_COLUMNS = [_STATE, _ACTION, "episode_index", "frame_index"]


@dataclass(frozen=True)
class Recordings:
    """begin: median over the episodes of the first measured joints, float64 (J,). fastest_units_s: the largest change of each joint's target from one
    frame to the next, a second, float64 (J,). Both in the units of the data."""

    name: str
    episodes: int
    begin: np.ndarray
    fastest_units_s: np.ndarray


def read_recordings(directory: Path, joint_names: tuple[str, ...]) -> Recordings:
    """Raises ConfigError where there is no data set, or one of another robot; MissingExtraError without pyarrow."""
    info_file = directory / "meta" / "info.json"
    if not info_file.is_file():
        raise ConfigError(f"--recordings={directory}: no LeRobotDataset is there (no meta/info.json). Name the directory of the recordings.")
    try:
        info = read_json(info_file)
        fps, features = float(info["fps"]), info["features"]
        for column in (_STATE, _ACTION):
            _check_joints(directory, column, features[column], joint_names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{info_file}: cannot be used ({type(error).__name__}: {error}). Copy the data set again.") from error
    table = _table(directory, len(joint_names))
    order = np.lexsort((table["frame_index"], table["episode_index"]))
    episode, state, action = (table[name][order] for name in ("episode_index", _STATE, _ACTION))
    first = np.flatnonzero(np.diff(episode, prepend=-1))  # rows at which an episode begins
    changes = np.abs(np.diff(action, axis=0))[np.diff(episode) == 0]
    fastest = changes.max(axis=0) * fps if len(changes) else np.zeros(len(joint_names))
    return Recordings(str(directory), len(first), np.median(state[first], axis=0), fastest)


def _check_joints(directory: Path, column: str, feature: dict[str, Any], joint_names: tuple[str, ...]) -> None:
    names, shape = feature.get("names"), list(feature["shape"])
    if isinstance(names, dict):  # lerobot before v2.1: {"motors": [...]}
        names = next(iter(names.values()), None)
    bare = [str(name).removesuffix(".pos").removeprefix("main_") for name in names or ()]
    if shape != [len(joint_names)] or (bare and bare != list(joint_names)):
        raise ConfigError(
            f"--recordings={directory}: {column} has {', '.join(bare) or shape}, the arm {', '.join(joint_names)}. "
            "Name recordings of this kind of arm."
        )


def _table(directory: Path, joints: int) -> dict[str, np.ndarray]:
    parquet = require("pyarrow.parquet", "recordings")
    files = sorted((directory / "data").rglob("*.parquet"))
    if not files:
        raise ConfigError(f"--recordings={directory}: data/ holds no table. Copy the whole data set.")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    for file in files:
        try:
            read = parquet.read_table(file, columns=_COLUMNS)
            for name in _COLUMNS:
                values = np.array(read[name].to_pylist(), np.float64)
                parts[name].append(values.reshape(-1, joints) if name in (_STATE, _ACTION) else values)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{file}: cannot be read ({type(error).__name__}: {str(error)[:120]}). Copy the data set again.") from error
    table = {name: np.concatenate(values) for name, values in parts.items()}
    if not len(table[_STATE]) or not np.isfinite(table[_STATE]).all() or not np.isfinite(table[_ACTION]).all():
        raise ConfigError(f"--recordings={directory}: holds no frame, or joints that are not finite. Name recordings with measured joints.")
    return table
