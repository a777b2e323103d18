"""`gr00t-fast replay`: play the actions of a recorded episode on the arm.

    gr00t-fast replay --robot.type=so100_sim --dataset=outputs/recorded --episode=0

They take the way of a policy's actions: the same loop, limits, watchdog and landing as `gr00t-fast run`. Before the first one the arm is led to it
slowly. No network is loaded, and no camera is needed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.cli.main import Command
from gr00t_fast.cli.run import EXITS, RecordedFacts, RunConfig, drive
from gr00t_fast.cli.shared_flags import ArmFlags, RunOutputFlags, SafetyFlags
from gr00t_fast.contracts import ModalityConfig, PartStatistics, Policy, PolicyMetadata, Robot
from gr00t_fast.control.dataset_writer import MODALITY, ROLLOUTS
from gr00t_fast.control.poses import SPEEDS_DEG_S, Poses
from gr00t_fast.control.recorder import dataset_directory
from gr00t_fast.errors import AT_LEAST_0, ConfigError, check_ranges
from gr00t_fast.files import read_json
from gr00t_fast.flags import Flags, UsageError
from gr00t_fast.inputs.data_config import load_data_config

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
class ReplayConfig(RunOutputFlags, SafetyFlags, EpisodeFlags, ArmFlags):
    """Play the actions of a recorded episode on an arm: the same loop, limits, watchdog and end as a run.

    --config_path may be the file of your runs: its robot and limits count, what it says of outputs does not.
    """

    def missing(self) -> Iterator[tuple[str, str]]:
        yield from super().missing()
        if not self.dataset:
            yield "dataset", "the directory of a LeRobotDataset, e.g. one that `gr00t-fast run --record=DIR` wrote"

    def check(self) -> None:
        """Raises UsageError."""
        super().check()
        if isinstance(self.rest, str) and self.rest != "start":
            raise UsageError(f"--rest={self.rest}: give six joint values, start, or null.")
        Poses(rest=self.rest)
        check_ranges(self, episode=AT_LEAST_0, approach_deg_s=SPEEDS_DEG_S)


def run(config: ReplayConfig) -> int:
    """One replay; returns the exit code. Raises Gr00tFastError with the arm untouched or landed."""
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in RunConfig.__dataclass_fields__}
    directory = here if (here := Path(config.dataset).expanduser()).is_dir() else dataset_directory(config.dataset)
    as_run = RunConfig(model_path=str(directory), controller="sync", poses=Poses(rest=config.rest), **shared)

    def load(robot: Robot, stop: Callable[[str], None]) -> RecordedEpisode:
        episode = RecordedEpisode.read(directory, config.episode, robot, lambda: stop("the end of the recording"), config.approach_deg_s)
        as_run.lang_instruction = episode.task
        return episode

    return drive(as_run, load, RecordedFacts({"replay_of": str(directory), "replayed_episode": config.episode}, _camera_names(directory)))


class RecordedEpisode(Policy):
    """The actions of an episode as a policy: its first answer leads from where the arm is to the first action and then through all of them."""

    computes = False

    def __init__(
        self,
        name: str,
        task: str,
        states: Mapping[str, np.ndarray],
        actions: Mapping[str, np.ndarray],
        fps: float,
        on_end: Callable[[], None],
        approach_deg_s: float,
        units_per_deg: Callable[[], np.ndarray],
    ) -> None:
        """`states` and `actions`: part -> (T, D). `on_end` is called when all actions have been played. `units_per_deg` (J,) is asked for once the
        arm is connected."""
        self._name, self.task, self._fps, self._on_end = name, task, fps, on_end
        self._actions = {part: np.asarray(values, np.float64) for part, values in actions.items()}
        self._approach_deg_s, self._units_per_deg = approach_deg_s, units_per_deg
        self._played = False
        length = len(next(iter(actions.values())))
        widths = {part: values.shape[1] for part, values in actions.items()}
        self.metadata = PolicyMetadata("new_embodiment", {}, fps, widths, widths, _statistics(states), _statistics(actions), length)
        self.action_horizon = length

    @classmethod
    def read(cls, directory: Path, number: int, robot: Robot, on_end: Callable[[], None], approach_deg_s: float) -> RecordedEpisode:
        """Raises ConfigError for what is no data set of this arm, and for an episode that it has not."""
        from gr00t_fast.inputs.dataset import LeRobotFrames  # opens it with lerobot, which takes seconds to import

        if not (directory / "meta" / "info.json").is_file():
            raise ConfigError(f"--dataset={directory} is no LeRobotDataset (no meta/info.json). Name the directory that has meta/ and data/.")
        _check_unit(directory, robot)
        none = PartStatistics(*(np.zeros(0) for _ in range(4)))
        blank = PolicyMetadata(None, {}, None, _PARTS, _PARTS, dict.fromkeys(_PARTS, none), dict.fromkeys(_PARTS, none), 1)
        frames = LeRobotFrames(directory, load_data_config("so100"), blank, _any_camera(directory))
        joints = tuple(name for names in frames.names("action").values() for name in names)
        if joints != robot.joint_names:
            raise ConfigError(f"{directory}: its actions are {', '.join(joints)}; this arm's joints are {', '.join(robot.joint_names)}.")
        if number >= len(frames.episodes):
            raise ConfigError(f"--episode={number}: {directory} has {len(frames.episodes)} episodes, 0 to {len(frames.episodes) - 1}.")
        if frames.fps is None:
            raise ConfigError(f"{directory}: meta/info.json does not say at how many frames a second it was recorded. Write its fps there.")
        rows = frames.episodes[number]
        task = next(iter(frames.tasks_of(number)), "a recording without a task")
        name = f"episode {number} of {directory}"
        columns = frames.columns("state", rows), frames.columns("action", rows)
        return cls(name, task, *columns, frames.fps, on_end, approach_deg_s, lambda: robot.units_per_deg)

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: Any = None) -> dict[str, np.ndarray]:
        """The way to the first action and all actions; after that the last one, and `on_end` is called."""
        if self._played:
            self._on_end()
            return {f"action.{part}": values[-1:].astype(np.float32) for part, values in self._actions.items()}
        self._played = True
        joints = {part: np.asarray(observation[f"state.{part}"], np.float64)[-1] for part in self._actions}
        return {f"action.{part}": values.astype(np.float32) for part, values in self._from(joints).items()}

    def _from(self, joints: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All joints arrive at the same time."""
        away = np.concatenate([values[0] - joints[part] for part, values in self._actions.items()])
        ticks = math.ceil(float(np.abs(away / self._units_per_deg()).max()) / self._approach_deg_s * self._fps)
        shares = np.arange(1, ticks + 1)[:, None] / max(1, ticks)
        return {part: np.concatenate([joints[part] + shares * (values[0] - joints[part]), values]) for part, values in self._actions.items()}

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
        return [f"{self._name}, {self.action_horizon / self._fps:.1f} s"]

    def summary(self) -> dict[str, Any]:
        return {"replays": self._name}


def _statistics(parts: Mapping[str, np.ndarray]) -> dict[str, PartStatistics]:
    ranges = {part: (values.min(0), values.max(0)) for part, values in parts.items()}
    return {part: PartStatistics(low, high, low, high) for part, (low, high) in ranges.items()}


def _any_camera(directory: Path) -> dict[str, str]:
    """The reader of data sets wants a picture; none is decoded here."""
    features = json.loads((directory / "meta" / "info.json").read_text(encoding="utf-8")).get("features", {})
    first = next((name.removeprefix(_PICTURES) for name in features if name.startswith(_PICTURES)), None)
    return {} if first is None else {first: "webcam"}


def _camera_names(directory: Path) -> dict[str, str]:
    """Camera of the recording -> its name in meta/modality.json, as far as that says one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        told = read_json(directory / MODALITY)["video"]
        return {entry["original_key"].removeprefix(_PICTURES): name for name, entry in told.items()}
    return {}


def _check_unit(directory: Path, robot: Robot) -> None:
    """Raises ConfigError where the recording says its joint unit, and it is not this arm's. lerobot's own recordings do not say it."""
    unit = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        unit = json.loads((directory / ROLLOUTS).read_text(encoding="utf-8")).get("joint_unit")
    if unit is not None and unit != robot.joint_unit:
        wanted = str(unit == "degrees").lower()
        raise ConfigError(f"{directory} was recorded in {unit}, the arm is set to {robot.joint_unit}. Use --robot.use_degrees={wanted}.")


main = Command(
    ReplayConfig,
    run,
    "usage: gr00t-fast replay --robot.type=... --dataset=DIR [--episode=N] [--flag=value ...]",
    EXITS,
    file_of=RunConfig,
    drives_arm=True,
)
