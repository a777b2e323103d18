"""`gr00t-fast replay`: play the actions of a recorded episode on the arm.

    gr00t-fast replay --robot.type=so100_sim --dataset=outputs/recorded --episode=0

They take the way of a policy's actions: the same loop, limits, watchdog and landing as `gr00t-fast run`. Before the first one the arm is led to it
slowly. No network is loaded, and no camera is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import ActionPrefix, ModalityConfig, PartStatistics, Policy, PolicyMetadata, Robot
from gr00t_fast.base.errors import AT_LEAST_0, ConfigError, check_ranges
from gr00t_fast.base.flags import Flags
from gr00t_fast.cli.main import Command
from gr00t_fast.cli.run import EXITS, RecordedFacts, RunConfig, drive
from gr00t_fast.cli.shared_flags import RunOutputFlags, SafetyFlags
from gr00t_fast.control.limits import SPEEDS_DEG_S, Poses
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.inputs.dataset import LeRobotFrames, read_map
from gr00t_fast.record.recorder import MODALITY, ROLLOUTS, dataset_directory
from gr00t_fast.robots import ArmOptions

_PARTS = {"single_arm": 5, "gripper": 1}
_PICTURES = "observation.images."  # begins the name of a camera's column


@dataclass(kw_only=True)
class EpisodeFlags(Flags):
    """Which episode, and how the arm gets to its beginning."""

    GROUP = "episode"

    dataset: str = ""  # a LeRobotDataset v3: its directory, or user/name in lerobot's cache; required
    episode: int = 0  # which one, counted from 0
    approach_deg_s: float = 30.0  # how fast the arm goes to where the episode begins
    rest: list[float] | str | None = "start"  # move slowly there before the torque goes off: where the arm lay, or six joint values; null: nowhere
    seed: int | None = None  # of a simulated scene


@dataclass(kw_only=True)
class ReplayConfig(RunOutputFlags, SafetyFlags, EpisodeFlags, ArmOptions):
    """Play the actions of a recorded episode on an arm: the same loop, limits, watchdog and end as a run.

    --config_path may be the file of your runs: its robot and limits count, what it says of outputs does not.
    """

    def missing(self) -> Iterator[tuple[str, str]]:
        yield from super().missing()
        if not self.dataset:
            yield "dataset", "the directory of a LeRobotDataset, e.g. one that `gr00t-fast run --record=DIR` wrote"

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if isinstance(self.rest, str) and self.rest != "start":
            raise ConfigError(f"--rest={self.rest}: give six joint values, start, or null.")
        Poses(rest=self.rest)
        check_ranges(self, episode=AT_LEAST_0, approach_deg_s=SPEEDS_DEG_S)


def run(config: ReplayConfig) -> int:
    """One replay; returns the exit code. Raises Gr00tFastError with the arm untouched or landed."""
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in RunConfig.__dataclass_fields__}
    directory = here if (here := Path(config.dataset).expanduser()).is_dir() else dataset_directory(config.dataset)
    as_run = RunConfig(model_path=str(directory), controller="sync", poses=Poses(rest=config.rest), **shared)

    def load(robot: Robot, stop: Callable[[str], None]) -> RecordedEpisode:
        episode = RecordedEpisode(directory, config.episode, robot, lambda: stop("the end of the recording"), config.approach_deg_s)
        as_run.lang_instruction = episode.task
        return episode

    return drive(as_run, load, RecordedFacts({"replay_of": str(directory), "replayed_episode": config.episode}, _camera_names(directory)))


class PlayedRows(Policy):
    """Rows of joint targets as a policy: its first answer leads from where the arm is to the first row and then through all of them."""

    computes = False

    def __init__(self, name: str, task: str, fps: float, robot: Robot, on_end: Callable[[], None], approach_deg_s: float) -> None:
        """`on_end` is called when all rows have been played. `_play` gives them."""
        self._name, self.task, self._fps = name, task, fps
        self._robot, self._on_end, self._approach_deg_s, self._played = robot, on_end, approach_deg_s, False

    def _play(self, states: Mapping[str, np.ndarray], actions: Mapping[str, np.ndarray]) -> None:
        """By part (T, D)."""
        self._actions, self.action_horizon = actions, len(next(iter(actions.values())))
        statistics = (_statistics(states), _statistics(actions))
        self.metadata = PolicyMetadata("new_embodiment", {}, self._fps, _PARTS, _PARTS, *statistics, self.action_horizon)

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        """The way to the first action and all actions; after that the last one, and `on_end` is called. With a `prefix`, what was left when the
        arm was out of reach, the way to its first row and all of it."""
        if self._played and prefix is None:
            self._on_end()
            return {f"action.{part}": values[-1:].astype(np.float32) for part, values in self._actions.items()}
        self._played = True
        rows = self._actions if prefix is None else {part: prefix.actions[f"action.{part}"] for part in self._actions}
        joints = {part: np.asarray(observation[f"state.{part}"], np.float64)[-1] for part in rows}
        return {f"action.{part}": values.astype(np.float32) for part, values in self._led(joints, rows).items()}

    def _led(self, joints: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The `rows` by part, and before them the way to the first. All joints arrive at the same time."""
        away = np.concatenate([values[0] - joints[part] for part, values in rows.items()])
        ticks = math.ceil(float(np.abs(away / self._robot.units_per_deg).max()) / self._approach_deg_s * self._fps)
        shares = np.arange(1, ticks + 1)[:, None] / max(1, ticks)
        return {part: np.concatenate([joints[part] + shares * (values[0] - joints[part]), values]) for part, values in rows.items()}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        parts = list(self._actions)
        return {
            "video": ModalityConfig([0], []),
            "state": ModalityConfig([0], [f"state.{part}" for part in parts]),
            "action": ModalityConfig([0], [f"action.{part}" for part in parts]),
            "language": ModalityConfig([0], ["annotation.human.task_description"]),
        }

    def reset(self) -> None:
        self._played = False

    def describe(self) -> list[str]:
        return [f"{self._name}, {self.action_horizon / self._fps:.1f} s"]  # type: ignore[operator]

    def summary(self) -> dict[str, Any]:
        return {"replays": self._name}


class RecordedEpisode(PlayedRows):
    """The actions of an episode."""

    def __init__(self, directory: Path, number: int, robot: Robot, on_end: Callable[[], None], approach_deg_s: float) -> None:
        """Raises ConfigError for what is no data set of this arm, and for an episode that it has not."""
        frames = _opened(directory, robot)
        if number >= len(frames.episodes):
            raise ConfigError(f"--episode={number}: {directory} has {len(frames.episodes)} episodes, 0 to {len(frames.episodes) - 1}.")
        rows, task = frames.episodes[number], next(iter(frames.tasks_of(number)), "a recording without a task")
        super().__init__(f"episode {number} of {directory}", task, frames.fps, robot, on_end, approach_deg_s)  # type: ignore[arg-type]
        self._play(frames.columns("state", rows), frames.columns("action", rows))


def _statistics(parts: Mapping[str, np.ndarray]) -> dict[str, PartStatistics]:
    ranges = {part: (values.min(0), values.max(0)) for part, values in parts.items()}
    return {part: PartStatistics(low, high, low, high) for part, (low, high) in ranges.items()}


def _opened(directory: Path, robot: Robot) -> LeRobotFrames:
    """Raises ConfigError for what is no data set of this arm."""
    if not (directory / "meta" / "info.json").is_file():
        raise ConfigError(f"--dataset={directory} is no LeRobotDataset (no meta/info.json). Name the directory that has meta/ and data/.")
    unit = _told(directory, ROLLOUTS).get("joint_unit", robot.joint_unit)  # lerobot's own recordings do not say it
    if unit != robot.joint_unit:
        wanted = str(unit == "degrees").lower()
        raise ConfigError(f"{directory} was recorded in {unit}, the arm is set to {robot.joint_unit}. Use --robot.use_degrees={wanted}.")
    widths = PolicyMetadata(None, {}, None, _PARTS, _PARTS, {}, {}, 1)
    frames = LeRobotFrames(directory, load_data_config("so100"), widths, camera_map=None)
    joints = tuple(name for names in frames.names("action").values() for name in names)
    if joints != robot.joint_names:
        raise ConfigError(f"{directory}: its actions are {', '.join(joints)}; this arm's joints are {', '.join(robot.joint_names)}.")
    if frames.fps is None:
        raise ConfigError(f"{directory}: meta/info.json does not say at how many frames a second it was recorded. Write its fps there.")
    return frames


def _camera_names(directory: Path) -> dict[str, str]:
    """Camera of the recording -> its name in meta/modality.json, as far as that says one."""
    told = _told(directory, MODALITY).get("video", {})
    return {entry["original_key"].removeprefix(_PICTURES): name for name, entry in told.items() if "original_key" in entry}


def _told(directory: Path, name: str) -> dict[str, Any]:
    return read_map(directory / name) if (directory / name).is_file() else {}


main = Command(
    ReplayConfig,
    run,
    "usage: gr00t-fast replay --robot.type=... --dataset=DIR [--episode=N] [--flag=value ...]",
    EXITS,
    file_of=RunConfig,
    drives_arm=True,
)
