"""A recorded joint trajectory, read from a LeRobotDataset, a CSV file or a ROS 1 bag, or made up. Degrees throughout; a gripper may be in per cent.

Axis alphabet of this file: T samples, J joints.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.replay_study.recording_files import read_bag, read_lerobot
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import ConfigError

MARKER = "recording_time_s"  # the replay's own extra axis, see follower.py; no joint may be called so
_EVEN_S = 1e-9
# A made-up pick and place in the angles of an SO-100 (last: gripper, per cent open), and how long each pose is held.
_HOME = (0.0, -50.0, 50.0, 70.0, -90.0, 10.0)
_ABOVE_OBJECT = (25.0, -10.0, 25.0, 75.0, -80.0, 60.0)
_ABOVE_BOWL = (-35.0, -15.0, 20.0, 80.0, -100.0, 5.0)
_DOWN = (0.0, 22.0, -4.0, -12.0, 0.0, 0.0)
_GRIPPER_SHUT, _GRIPPER_OPEN = 5.0, 60.0
_DWELL_S, _MEAN_SPEED_DEG_S, _SHORTEST_S = 0.3, 60.0, 0.5  # a brisk hand guiding the arm: a choice
_SPREAD_DEG = 5.0


@dataclass(frozen=True)
class Recording:
    """times_s float64 (T,), from 0, increasing; values float64 (T, J) in degrees. `source` says where it is from, without machine paths."""

    joint_names: tuple[str, ...]
    times_s: np.ndarray
    values: np.ndarray
    source: str

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.times_s), len(self.joint_names)) or len(self.times_s) < 2:
            raise ConfigError(f"{self.source}: expected at least two samples of {len(self.joint_names)} joints, got an array of {self.values.shape}.")
        if not (np.isfinite(self.times_s).all() and np.isfinite(self.values).all()):
            raise ConfigError(f"{self.source}: times or joints are not finite (NaN or infinite). Cut those rows out, or use --start_s and --seconds.")
        if (backward := np.flatnonzero(np.diff(self.times_s) <= 0)).size:
            raise ConfigError(f"{self.source}: time must increase, but does not after {self.times_s[backward[0]]:g} s ({backward.size} places).")
        if len(set(self.joint_names)) < len(self.joint_names) or MARKER in self.joint_names:
            raise ConfigError(f"{self.source}: joint names must differ from each other and from '{MARKER}', got {', '.join(self.joint_names)}.")

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1])

    def at(self, times_s: np.ndarray) -> np.ndarray:
        """Return the pose (..., J) at each of `times_s` (...,): linear in between, the first and last pose held outside."""
        return np.stack([np.interp(times_s, self.times_s, column) for column in self.values.T], axis=-1)

    def cut(self, start_s: float, seconds: float | None) -> Recording:
        """The part from `start_s` on, at most `seconds` long, with its time from 0. Raises ConfigError when nothing is left."""
        end_s = self.duration_s if seconds is None else min(self.duration_s, start_s + seconds)
        if not 0 <= start_s < end_s:
            raise ConfigError(f"--start_s={start_s:g} --seconds={seconds}: the recording lasts {self.duration_s:.2f} s, nothing of it is left.")
        inner = self.times_s[(self.times_s > start_s + _EVEN_S) & (self.times_s < end_s - _EVEN_S)]
        times_s = np.concatenate([[start_s], inner, [end_s]])
        return Recording(self.joint_names, times_s - start_s, self.at(times_s), self.source)


def load_recording(path: Path | None, episode: int = 0, column: str = "action", topic: str | None = None, seed: int = 0) -> Recording:
    """Read a LeRobotDataset directory (`episode`, `column`), a .csv, or a .bag (`topic`); without `path`, make one up from `seed`.

    Raises ConfigError for a file that is missing, of another kind, or damaged; MissingExtraError without what reads it.
    """
    if path is None:
        return made_up(seed)
    if not path.exists():
        raise ConfigError(f"--recording: there is no '{path}'. Expected a LeRobotDataset directory, a .csv or a ROS 1 .bag file.")
    if path.is_dir():
        names, times_s, values = read_lerobot(path, episode, column)
        source = f"LeRobotDataset {path.name}, episode {episode}, column {column}"
    elif path.suffix == ".csv":
        (names, times_s, values), source = read_csv(path), f"CSV {path.name}"
    elif path.suffix == ".bag":
        (names, times_s, values), source = read_bag(path, topic), f"ROS 1 bag {path.name}"
    else:
        raise ConfigError(f"--recording: '{path.name}' is neither a directory (LeRobotDataset) nor a .csv nor a ROS 1 .bag file.")
    return Recording(names, times_s - times_s[:1], values, source)


def read_csv(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """A header `time_s,<joint>,<joint>,...` and one row of numbers per sample: seconds, degrees. Returns names, (T,), (T, J)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    names = tuple(name.strip() for name in header)
    if len(names) < 2 or names[0] != "time_s":
        raise ConfigError(f"{path.name}: the first line must name the columns, time_s and then the joints; it is: {','.join(header)[:80]!r}.")
    values = np.array([_numbers(path, number, row, len(names)) for number, row in enumerate(rows, 2) if row]).reshape(-1, len(names))
    return names[1:], values[:, 0], values[:, 1:]


def _numbers(path: Path, line: int, row: list[str], width: int) -> list[float]:
    try:
        numbers = [float(cell) for cell in row]
    except ValueError as error:
        raise ConfigError(f"{path.name}, line {line}: {error}. Every cell must be a number: seconds, then degrees.") from error
    if len(numbers) != width:
        raise ConfigError(f"{path.name}, line {line}: {len(numbers)} numbers for {width} columns.")
    return numbers


def made_up(seed: int, sample_hz: float = 100.0) -> Recording:
    """Pick and place of nobody: poses around fixed ones, drawn with `seed`, joined by minimum-jerk moves, with a dwell where the gripper works."""
    poses = _pick_and_place(np.random.default_rng(seed))
    times_s, values, now_s = [], [], 0.0
    for begin, end in zip(poses, poses[1:], strict=False):
        lasts_s = max(_SHORTEST_S, float(np.abs(end - begin).max()) / _MEAN_SPEED_DEG_S)
        phase = np.arange(0, lasts_s, 1 / sample_hz) / lasts_s
        shape = phase**3 * (10 - 15 * phase + 6 * phase**2)  # minimum jerk: at rest, and without acceleration, at both ends
        times_s.append(now_s + phase * lasts_s)
        values.append(begin + shape[:, None] * (end - begin))
        now_s += lasts_s
        if end[-1] != begin[-1]:  # the gripper has worked: wait, as everybody does
            now_s += _DWELL_S
    times_s.append(np.array([now_s]))
    values.append(poses[-1][None])
    return Recording(SO100_JOINTS, np.concatenate(times_s), np.concatenate(values), f"made up: minimum-jerk pick and place, seed {seed}")


def _pick_and_place(generator: np.random.Generator) -> list[np.ndarray]:
    spread = np.array([_SPREAD_DEG] * 5 + [0.0])
    above_object, above_bowl = (np.array(pose) + spread * generator.uniform(-1, 1, 6) for pose in (_ABOVE_OBJECT, _ABOVE_BOWL))
    held = np.array([0.0] * 5 + [1.0])

    def gripper(pose: np.ndarray, opening: float) -> np.ndarray:
        return pose * (1 - held) + opening * held

    at_object = above_object + np.array(_DOWN)
    shut, bowl = gripper(at_object, _GRIPPER_SHUT), gripper(above_bowl, _GRIPPER_SHUT)
    home = np.array(_HOME)
    return [home, above_object, at_object, shut, gripper(above_object, _GRIPPER_SHUT), bowl, gripper(bowl, _GRIPPER_OPEN), home]
