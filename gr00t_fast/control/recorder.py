"""`--record`: a run's episodes become a LeRobotDataset v3. This is the run's end, which costs the control loop a copy of the pictures per tick; the
other end is a process of its own (dataset_writer.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.binding import joints_of_parts
from gr00t_fast.control.dataset_writer import SUCCESS, DatasetWriter, check_whole, features, tidy_up
from gr00t_fast.control.sink import Sink
from gr00t_fast.control.views import check_writable
from gr00t_fast.errors import ConfigError, MissingExtraError, RecordingError, install_command, require

QUEUE_S = 3.0  # of ticks that may wait for the other process
_LEAST_FREE_BYTES = 200 << 20  # a few minutes of one camera
_START_S = 120.0  # importing lerobot and torch takes 5 s, on a busy machine with a cold disk ten times that
_SILENT_S = 30.0  # so long may the other process leave everything unanswered; saving an episode takes about 1 s
_END_S = 10.0  # and so long may it take to end
_TELL_AFTER_S = 2.0
_SLOWER = 1.1  # an episode that took so many times what its rows say is told
_DISK_FULL = ("No space left", "Errno 28", "Disk quota", "File too large")
_WHOLE = "Episodes saved before are whole."
_BY_LEROBOT = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every data set


def dataset_directory(name: str) -> Path:
    """Where a data set called `name` lies: lerobot's place for `user/name`, unless there is a directory `user` here; else a path."""
    path = Path(name).expanduser()
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(parts[0]).is_dir():
        cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        return Path(os.environ.get("HF_LEROBOT_HOME") or cache / "lerobot").expanduser() / name
    return path


def modality_of(
    state_widths: Mapping[str, int], action_widths: Mapping[str, int], joint_names: tuple[str, ...], camera_map: Mapping[str, str]
) -> dict[str, Any] | None:
    """`meta/modality.json`, by which programs of NVIDIA and of this project find a policy's parts and cameras. `camera_map` {robot: policy}. None
    when a part's joints are not next to each other."""
    told: dict[str, Any] = {}
    for kind, widths in (("state", state_widths), ("action", action_widths)):
        told[kind] = {}
        for part, joints in joints_of_parts(widths, joint_names, kind).items():
            if joints != list(range(joints[0], joints[0] + len(joints))):
                return None
            told[kind][part] = {"start": joints[0], "end": joints[-1] + 1}
    told["video"] = {policy: {"original_key": f"observation.images.{robot}"} for robot, policy in camera_map.items()}
    told["annotation"] = {"human.task_description": {"original_key": "task_index"}}
    return told


class DatasetRecorder:
    """Writes episodes into the data set `out`. Use as a context manager around the run; all methods belong to the loop's thread.

    `begin`, `add` at each tick, `end`, then `save` or `discard`; an episode that was ended and not decided is saved. None of these waits: `busy` is
    true while an episode is being saved. `failure` says why nothing more is recorded, if that happened; `echo` has told it.
    """

    def __init__(self, out: Path, append: bool, joint_names: tuple[str, ...], echo: Callable[[str], None] = print) -> None:
        """Raises ConfigError for a place that cannot be written, that holds something else, or a data set that is not continued with `append`;
        MissingExtraError without lerobot."""
        require("lerobot", "robot")
        if importlib.util.find_spec("datasets") is None:  # with lerobot 0.6 an extra of its own
            raise MissingExtraError(f"--record writes with lerobot's own writer, which needs its data set packages: {install_command('robot')}")
        self.out, self._append, self._joints, self._echo = out.absolute(), append, joint_names, echo
        self._check_place()
        self.failure: str | None = None
        self.episodes: list[int] = []  # numbers of those saved
        self._sink = Sink(DatasetWriter, self.out, on_answer=self._take)
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._recording = False
        self._lost_before = 0  # ticks, in the episodes before the present one
        self._ticks_s: list[float] = []  # when the episode's first and latest tick were seen

    def _check_place(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--record={self.out} is a file. Name a directory that is not there yet.")
        there = self.out.is_dir() and any(self.out.iterdir())
        if there and not self._append:
            raise ConfigError(f"--record={self.out} exists already. Name another one, or add --record_append=true to continue that data set.")
        if there and not (self.out / "meta" / "info.json").is_file():
            raise ConfigError(f"--record={self.out} holds files but no LeRobotDataset (no meta/info.json). Name another directory.")
        if rescued := tidy_up(self.out):
            self._echo(f"{self.out}: {rescued} episode(s) of an interrupted recording were completed.")
        if there:
            try:
                check_whole(self.out)
            except Exception as error:  # whatever is wrong with its files, no row may be added to them
                why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                raise ConfigError(f"--record_append: {self.out} is damaged and was left as it is: {why}. Record into another directory.") from error
        check_writable(self.out.parent, "--record")
        free = shutil.disk_usage(self.out.parent).free
        if free < _LEAST_FREE_BYTES:
            raise ConfigError(
                f"--record: the disk of '{self.out.parent}' has {free >> 20} MB left, less than {_LEAST_FREE_BYTES >> 20}. Free some space."
            )

    def set_rate(self, fps: float) -> None:
        """Ticks a second of the run. Raises ConfigError where the data set cannot have that rate."""
        if not float(fps).is_integer():
            raise ConfigError(f"--record: a LeRobotDataset has a whole number of frames a second, the run {fps:g}. Give --fps={round(fps)}.")
        self._fps = fps
        self._check_continued()

    def _check_continued(self, cameras: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Raises ConfigError where rows of this run would be of another kind than those that are there."""
        if not (self.out / "meta" / "info.json").is_file():
            return
        info = json.loads((self.out / "meta" / "info.json").read_text(encoding="utf-8"))
        there, wanted = info["features"], features(self._joints, cameras or {})
        pairs = [("version", str(info.get("codebase_version"))[:2], "v3"), ("frames a second", info.get("fps"), self._fps)]
        pairs += [(name, _kind(there.get(name)), _kind(column)) for name, column in wanted.items()]
        if cameras is not None:
            pairs += [(name, "there", "missing") for name in there if name not in (*wanted, SUCCESS, *_BY_LEROBOT)]
        if differences := [f"its {name} is {known}, this run's {here}" for name, known, here in pairs if known != here]:
            raise ConfigError(f"--record_append: {self.out} cannot be continued: {'; '.join(differences)}. Record into another directory.")

    # The other process

    @property
    def process(self) -> int | None:
        """Its number, once it was started."""
        return self._sink.process

    @property
    def lost_ticks(self) -> int:
        """For which there was no room, in all episodes."""
        return self._sink.dropped

    def __enter__(self) -> DatasetRecorder:
        """Starts it, `wait_until_ready` waits: it imports lerobot while the checkpoint is loaded."""
        self._sink.start()
        return self

    def wait_until_ready(self) -> None:
        """Raises RecordingError when the other process does not start."""
        self._check_alive(self._sink.wait(_START_S))

    def _check_alive(self, answered: bool) -> None:
        if self.failure is not None:
            raise RecordingError(self.failure)
        if not answered:
            raise RecordingError(f"the recording process did not answer within {_START_S:.0f} s. Try again, or run without --record.")

    def open(self, observation: Observation, robot_type: str, joint_unit: str, modality: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
        """Fixes the columns by the first observation. `facts` go into meta/rollouts.json with each episode. Raises
        ConfigError when the data set to continue has other columns, RecordingError when the other process does not answer."""
        sizes = {name: frame.shape for name, frame in observation.frames.items()}
        self._check_continued(sizes)
        self._sizes = sizes
        self._sink.slots = round(QUEUE_S * self._fps)
        self._sink.prepare(observation)
        self._sink.call("open", int(self._fps), self._joints, sizes, joint_unit, robot_type, modality, dict(facts))
        self._check_alive(self._sink.wait(_START_S))

    # Episodes

    @property
    def busy(self) -> bool:
        """Whether an episode is being saved. Gives up on a process that does nothing any more."""
        if self._sink.silent_s > _SILENT_S:
            self._sink.kill()
            why = f"has not answered for {_SILENT_S:.0f} s (a network directory that is gone, a disk that hangs?) and was ended"
            self._fail(f"the recording process {why}: the last episode is lost. {_WHOLE}")
        return self.failure is None and self._sink.pending

    def begin(self, task: str) -> None:
        """An episode of the instruction `task` begins."""
        if self.failure is None:
            self._sink.call("begin", task)
            self._recording, self._lost_before, self._ticks_s = True, self.lost_ticks, []

    def add(self, observation: Observation, commanded: np.ndarray) -> None:
        """A tick: what was seen, and what was sent (J,) then. Ticks for which there is no room are left out and counted."""
        if not self._recording or self.failure is not None:
            return
        for name, size in self._sizes.items():
            frame = observation.frames.get(name)
            if frame is None or frame.shape != size:
                got = f"camera '{name}' delivers {'nothing' if frame is None else f'{frame.shape[1]}x{frame.shape[0]}'}"
                self.save(success=None, ended_by=got)
                self._fail(f"{got}, the recording has {size[1]}x{size[0]}. Set its width and height, and record again.")
                return
        self._ticks_s = [*self._ticks_s[:1], observation.time_s]
        self._sink.put(observation, commanded)
        _ = self.busy

    def end(self, **outcome: Any) -> None:
        """The episode's last tick has been. `outcome`: JSON-ready facts, `success` (True, False or None) among them."""
        self._recording = False
        self._sink.call("end", self._with_figures(outcome))

    def save(self, **outcome: Any) -> None:
        """The ended episode, if there is one that is not decided, is to be part of the data set, with this outcome."""
        self._recording = False
        self._sink.call("save", self._with_figures(outcome))

    def discard(self) -> None:
        """The ended episode is to be forgotten."""
        self._recording = False
        self._sink.call("discard")

    def _with_figures(self, outcome: Mapping[str, Any]) -> dict[str, Any]:
        lasted_s = self._ticks_s[-1] - self._ticks_s[0] if self._ticks_s else 0.0
        return {**outcome, "lost_ticks": self.lost_ticks - self._lost_before, "duration_s": round(lasted_s, 3)}

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until what was ended is saved, and says so. May be called again. `failure` says what went wrong."""
        if not self._sink.running:
            return
        opened = bool(self._sizes)  # where nothing was recorded there is nothing to wait for
        try:
            if opened:
                self.save(success=None, ended_by="error")
                if not self._sink.wait(_TELL_AFTER_S):
                    self._echo("saving the last episode ...")
                while self.busy:
                    time.sleep(0.02)
        finally:
            self._sink.close(_END_S if opened else 0.0)
        if opened:
            self._echo(f"{len(self.episodes)} episode(s) recorded into {self.out}")

    @property
    def warnings(self) -> list[str]:
        """For the report."""
        lost = [f"the recording lacks {self.lost_ticks} ticks: encoder or disk were slower than the loop."] if self.lost_ticks else []
        return [*lost, *([self.failure] if self.failure else [])]

    # What the other process says

    def _take(self, what: str, value: Any) -> None:
        if what == "saved":
            self.episodes.append(value["episode"])
            self._echo(self._told(value))
        elif what == "short":
            self._echo("an episode of one frame is not recorded")
        elif self.failure is None:
            full = f"the disk of {self.out.parent} is full ({value}). Free some space" if any(sign in value for sign in _DISK_FULL) else value
            self._fail(f"{full}. {_WHOLE}")

    def _told(self, saved: Mapping[str, Any]) -> str:
        rows_s, lasted_s, lost = (saved["frames"] - 1) / self._fps, saved["duration_s"], saved["lost_ticks"]
        told = f"episode {saved['episode']} recorded: {saved['frames']} frames"
        if lasted_s > _SLOWER * rows_s + 1 / self._fps:
            told += f": {rows_s:.1f} s at {self._fps:g} frames a second; it lasted {lasted_s:.1f} s, with ticks missed or inferences waited for"
        return told + (f"\nWARNING: it lacks {lost} ticks: encoder or disk are slower than the loop" if lost else "")

    def _fail(self, why: str) -> None:
        self.failure = f"the recording has ended: {why}"
        self._echo(f"WARNING: {self.failure}")


def _kind(column: Mapping[str, Any] | None) -> str:
    """Shape and names of joints, to be compared and shown."""
    if not column:
        return "missing"
    names = f" ({', '.join(column.get('names') or ())})" if column["dtype"] == "float32" else ""
    return " x ".join(map(str, column["shape"])) + names
