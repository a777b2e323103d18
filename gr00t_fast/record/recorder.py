"""`--record`: a run's episodes become a LeRobotDataset v3. `DatasetRecorder` is the run's end, which costs the control loop a copy of the pictures
per tick; `DatasetWriter`, in a process beside it, writes with lerobot's own writer.

Each episode is written into a directory beside the data set and moved into it when it is whole, in an order in which the data set can be read at
any instant. So a full disk, a camera that fails or a crash costs at most the episode in progress. What a crash leaves is tidied up by the next
recording into the same data set: an episode whose move had begun is moved to its end, anything else is removed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import ConfigError, MissingExtraError, RecordingError, install_command, require
from gr00t_fast.base.files import is_running, lerobot_home
from gr00t_fast.control.binding import joints_of_parts
from gr00t_fast.record.sink import Sink, Tell
from gr00t_fast.record.views import check_writable

QUEUE_S = 3.0  # of ticks that may wait for the other process
_LEAST_FREE_BYTES = 200 << 20  # a few minutes of one camera
_START_S = 120.0  # importing lerobot and torch takes 5 s, on a busy machine with a cold disk ten times that
SILENT_S = 30.0  # so long may the other process leave everything unanswered; saving an episode takes about 1 s
_END_S = 10.0  # and so long may it take to end
_TELL_AFTER_S = 2.0
_SLOWER = 1.1  # times what its rows say: an episode that took longer gets a line
_DISK_FULL = ("No space left", "Errno 28", "Disk quota", "File too large")
_WHOLE = "Episodes saved before are whole."
_BY_LEROBOT = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every data set
ROLLOUTS = "meta/rollouts.json"  # of each episode what lerobot has no place for
MODALITY = "meta/modality.json"  # NVIDIA's name for which columns are which part
_FACTS = ("meta/tasks.parquet", "meta/stats.json", ROLLOUTS, MODALITY, "meta/info.json")  # replaced, the one that counts last
_MOVING = ".moving"  # lies in a whole episode's directory while its files are moved
_ENCODER_QUEUE = 60  # frames of a camera; 55 MB at 640x480
_ENCODER_PATIENCE_S = 5.0
# H.264: half the processor time of lerobot's default (AV1) at 640x480, plays everywhere. And SVT-AV1, run by root, gives its thread a real-time
# priority above the control loop.
_CODEC = "h264"
SUCCESS, UNDERRUN, TIME_S = "next.success", "underrun", "time_s"
# Columns beside lerobot's own: whether the episode was solved, in its last row; whether the arm only held at this row, for want of actions; when the
# row was, in seconds since the first one of the episode. (`timestamp` is counted: lerobot finds the pictures by it.)
_OWN = {
    SUCCESS: {"dtype": "bool", "shape": (1,), "names": None},
    UNDERRUN: {"dtype": "bool", "shape": (1,), "names": None},
    TIME_S: {"dtype": "float32", "shape": (1,), "names": None},
}


def dataset_directory(name: str) -> Path:
    """Where a data set called `name` lies: lerobot's place for `user/name`, unless there is a directory `user` here; else a path."""
    path = Path(name).expanduser()
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(parts[0]).is_dir():
        return lerobot_home() / name
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
        self._opened, self._sizes = False, dict[str, tuple[int, ...]]()
        self._recording = False
        self._lost_before = 0  # ticks, in the episodes before the present one
        self._ticks_s: list[float] = []  # when the episode's first and latest tick were seen

    def _check_place(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--record={self.out} is a file. Name a directory that is not there yet.")
        there = self.out.is_dir() and any(self.out.iterdir())
        if there and not self._append:
            raise ConfigError(f"--record={self.out} exists already. Name another one, or add --record_append=true to continue that data set.")
        if there and not _is_dataset(self.out):
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

    def _check_continued(self, cameras: Mapping[str, tuple[int, ...]] | None = None, robot_type: str = "", joint_unit: str = "") -> None:
        """Raises ConfigError where rows of this run would be of another kind than those that are there. What is empty is not known yet."""
        if not _is_dataset(self.out):
            return
        info = _read_map(self.out, "meta/info.json")
        there, wanted = info["features"], features(self._joints, cameras or {})
        pairs = [("version", str(info.get("codebase_version"))[:2], "v3"), ("frames a second", info.get("fps"), self._fps)]
        pairs += [(name, _kind(there.get(name)), _kind(column)) for name, column in wanted.items()]
        if cameras is not None:
            pairs += [(name, "there", "missing") for name in there if name not in (*wanted, *_OWN, *_BY_LEROBOT)]
        facts = _read_map(self.out, ROLLOUTS) if (self.out / ROLLOUTS).is_file() else {}  # lerobot's own recordings do not say the unit
        for name, known, here in (("robot type", info.get("robot_type"), robot_type), ("joint unit", facts.get("joint_unit"), joint_unit)):
            pairs += [(name, known, here)] if known and here else []
        if differences := [f"its {name} is {known}, this run's {here}" for name, known, here in pairs if known != here]:
            raise ConfigError(f"--record_append: {self.out} cannot be continued: {'; '.join(differences)}. Record into another directory.")

    # The other process

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
        self._check_continued(sizes, robot_type, joint_unit)
        self._opened, self._sizes = True, sizes
        self._sink.slots = round(QUEUE_S * self._fps)
        self._sink.prepare(observation)
        self._sink.call("open", int(self._fps), self._joints, sizes, joint_unit, robot_type, modality, dict(facts))
        self._check_alive(self._sink.wait(_START_S))

    # Episodes

    @property
    def busy(self) -> bool:
        """Whether an episode is being saved. Gives up on a process that does nothing any more."""
        if self._sink.silent_s > SILENT_S:
            self._sink.kill()
            why = f"has not answered for {SILENT_S:.0f} s (a network directory that is gone, a disk that hangs?) and was ended"
            self._fail(f"the recording process {why}: the last episode is lost. {_WHOLE}")
        return self.failure is None and self._sink.pending

    def begin(self, task: str) -> None:
        """An episode of the instruction `task` begins."""
        if self.failure is None:
            self._sink.call("begin", task)
            self._recording, self._lost_before, self._ticks_s = True, self.lost_ticks, []

    def add(self, observation: Observation, commanded: np.ndarray, underrun: bool = False) -> None:
        """A tick: what was seen, what was sent (J,) then, and whether that is the last target once more for want of actions. Ticks for which there is
        no room are left out and counted."""
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
        self._sink.put(observation, (commanded, underrun))
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
        try:
            if self._opened:  # else there is nothing to wait for
                self.save(success=None, ended_by="error")
                if not self._sink.wait(_TELL_AFTER_S):
                    self._echo("saving the last episode ...")
                while self.busy:
                    time.sleep(0.02)
        finally:
            self._sink.close(_END_S if self._opened else 0.0)
        if self._opened:
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


def features(joints: Sequence[str], cameras: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Columns of a data set as lerobot's own recorder names them; `cameras`: name -> (height, width, ...)."""
    vector = {"dtype": "float32", "shape": (len(joints),), "names": [f"{joint}.pos" for joint in joints]}
    names = ["height", "width", "channels"]
    pictures = {f"observation.images.{name}": {"dtype": "video", "shape": (*size[:2], 3), "names": names} for name, size in cameras.items()}
    return {"observation.state": vector, "action": vector, **pictures}


class DatasetWriter(contextlib.AbstractContextManager):
    """What the recorder asks for, done in order: `open` once, then for each episode `begin`, `add` for each row, `end`, and `save` or `discard`.

    An episode that is cut off because the run was killed is saved: `ended_by` says it. All raise what lerobot and the file system raise; the data set
    is then as it was.
    """

    def __init__(self, tell: Tell, out: Path) -> None:
        """Imports lerobot, whose progress bars are off."""
        self._tell, self._out = tell, out
        self._beside = out.with_name(f".{out.name}.recording-{os.getpid()}")
        self._root = self._beside / out.name
        self._dataset: Any = None  # of the episode, while there is one
        self._ended: dict[str, Any] = {}
        self._cache = tempfile.TemporaryDirectory(prefix="gr00t_fast-")
        os.environ["HF_DATASETS_CACHE"] = self._cache.name  # lerobot reads each episode's entry back through `datasets`, which keeps a copy
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local data set: nothing is asked of the hub
        self._lerobot = require("lerobot.datasets.lerobot_dataset", "robot")
        require("datasets", "robot").disable_progress_bars()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.save(self._ended)
        finally:
            self.discard()
            self._cache.cleanup()

    def open(
        self,
        fps: int,
        joints: tuple[str, ...],
        cameras: Mapping[str, tuple[int, ...]],
        joint_unit: str,
        robot_type: str,
        modality: Mapping[str, Any] | None,
        facts: Mapping[str, Any],
    ) -> None:
        """What all episodes have in common. cameras: name -> shape of its pictures. facts: JSON-ready, for meta/rollouts.json."""
        self._columns = features(joints, cameras) | _OWN
        self._fps, self._robot_type, self._joint_unit, self._modality, self._facts = fps, robot_type, joint_unit, modality, facts

    def begin(self, task: str) -> None:
        self.discard()
        self._task, self._rows, self._began_s, self._last = task, 0, 0.0, dict[str, np.ndarray]()
        self._ended = {"success": None, "ended_by": "the program was killed"}
        self._beside.mkdir(parents=True)
        if _is_dataset(self._out):
            known = _read_map(self._out, "meta/info.json")["features"]
            self._columns = {name: column for name, column in self._columns.items() if name in known}
            self._dataset = self._continue()
        else:
            self._dataset = self._create()

    def _create(self) -> Any:
        """An empty LeRobotDataset beside."""
        create, repo_id = self._lerobot.LeRobotDataset.create, f"local/{self._out.name}"
        return create(repo_id, self._fps, dict(self._columns), root=self._root, robot_type=self._robot_type, **_encoding(create))

    def _continue(self) -> Any:
        """A LeRobotDataset beside that numbers on from the one in `out`. Of that only the facts and the last episode's entry are read."""
        cls, repo_id = self._lerobot.LeRobotDataset, f"local/{self._out.name}"
        if hasattr(cls, "resume"):  # 0.6
            self._copy_facts()
            return cls.resume(repo_id, root=self._root, **_encoding(cls.resume))
        dataset = self._create()
        shutil.rmtree(self._root / "meta")
        self._copy_facts()
        dataset.meta = self._lerobot.LeRobotDatasetMetadata(repo_id, root=self._root)
        dataset.episode_buffer = dataset.create_episode_buffer()
        return dataset

    def _copy_facts(self) -> None:
        last = max((self._out / "meta" / "episodes").rglob("*.parquet"), key=lambda file: file.relative_to(self._out).as_posix())
        for file in (*(self._out / name for name in _FACTS), last):
            if file.is_file():
                target = self._root / file.relative_to(self._out)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def add(self, observation: Observation, note: tuple[np.ndarray, bool]) -> None:
        """Copies the row: what was seen, and in `note` what was sent (J,) and whether the arm only held. It is written with the next one, for the
        episode's outcome is told in its last row."""
        if self._last:
            self._write(solved=False)
        commanded, underrun = note
        self._began_s = self._began_s if self._rows else observation.time_s
        own = {UNDERRUN: np.array([underrun]), TIME_S: np.array([observation.time_s - self._began_s], np.float32)}
        pictures = {f"observation.images.{name}": np.array(picture) for name, picture in observation.frames.items()}
        self._last = {"observation.state": observation.joints.astype(np.float32), "action": commanded.astype(np.float32), **pictures}
        self._last |= {name: value for name, value in own.items() if name in self._columns}
        self._rows += 1

    def _write(self, solved: bool) -> None:
        self._let_encoders_catch_up()
        outcome = {SUCCESS: np.array([solved])} if SUCCESS in self._columns else {}
        self._dataset.add_frame({**self._last, **outcome, "task": self._task})

    def _let_encoders_catch_up(self) -> None:
        """lerobot drops pictures when an encoder's queue is full; here nothing is in a hurry."""
        owner = getattr(self._dataset, "writer", None) or self._dataset  # 0.6, 0.4
        queues = getattr(getattr(owner, "_streaming_encoder", None), "_frame_queues", {})
        end_s = time.monotonic() + _ENCODER_PATIENCE_S
        while time.monotonic() < end_s and any(queue.qsize() >= _ENCODER_QUEUE - 1 for queue in queues.values()):
            time.sleep(0.002)

    def end(self, outcome: dict[str, Any]) -> None:
        self._ended = outcome

    def save(self, outcome: dict[str, Any]) -> None:
        if self._dataset is None:
            return
        if self._rows == 1:  # lerobot makes no statistics of it, and cannot read a data set that begins so
            self._tell("short")
        elif self._rows:
            self._write(solved=bool(outcome.get("success")))
            number = int(self._dataset.meta.total_episodes)
            self._dataset.save_episode()
            self._dataset.finalize()
            self._check_videos()
            self._add_facts(number, outcome)
            self._move()
            self._dataset = None
            self._tell("saved", {"lost_ticks": 0, "duration_s": 0.0, **outcome, "episode": number, "frames": self._rows})
        self.discard()

    def discard(self) -> None:
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it is removed
                dataset.clear_episode_buffer()
                dataset.finalize()
        shutil.rmtree(self._beside, ignore_errors=True)

    def _check_videos(self) -> None:
        """lerobot's encoder leaves frames out when it cannot keep up: every later picture would belong to another row."""
        av = require("av", "robot")
        for file in (self._root / "videos").rglob("*.mp4"):
            with av.open(str(file)) as container:
                found = container.streams.video[0].frames
            if found != self._rows:
                raise RuntimeError(f"{file.name} has {found} pictures of {self._rows}: the video encoder could not keep up")

    def _add_facts(self, number: int, outcome: Mapping[str, Any]) -> None:
        file, modality = self._root / ROLLOUTS, self._root / MODALITY
        told: dict[str, Any] = _read_map(self._root, ROLLOUTS) if file.is_file() else {"program": "gr00t-fast"}
        entry = {"episode": number, "frames": self._rows, "task": self._task, **outcome, **self._facts}
        told["episodes"] = [*(other for other in told.get("episodes", []) if other["episode"] != number), entry]
        file.write_text(json.dumps({**told, "joint_unit": self._joint_unit}, indent=1) + "\n")
        if self._modality and not modality.is_file():
            modality.write_text(json.dumps(self._modality, indent=2) + "\n")

    def _move(self) -> None:
        """The whole episode into the data set."""
        _sync(self._root)
        if _is_dataset(self._out):
            (self._beside / _MOVING).touch()
            move_into(self._out, self._root)
        else:
            self._root.rename(self._out)


def _encoding(method: Any) -> dict[str, Any]:
    """Arguments of lerobot's writer by what the installed version knows: encode while frames come in."""
    known = inspect.signature(method).parameters
    settings = {"streaming_encoding": True, "encoder_queue_maxsize": _ENCODER_QUEUE, "encoder_threads": 1, "vcodec": _CODEC}
    if "rgb_encoder" in known:  # 0.6
        settings["rgb_encoder"] = require("lerobot.configs.video", "robot").RGBEncoderConfig(vcodec=_CODEC)
    return {name: value for name, value in settings.items() if name in known}


# Directories


def _is_dataset(out: Path) -> bool:
    return (out / "meta" / "info.json").is_file()


def _read_map(out: Path, name: str) -> dict[str, Any]:
    found = json.loads((out / name).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def move_into(out: Path, root: Path) -> None:
    """Move an episode's files from `root` into the data set `out`; may be done again where it was interrupted.

    First what nothing refers to yet, then the episode's entry, last the counts: a reader finds a whole data set, with the episode or without it.
    """
    new = sorted(file for part in ("data", "videos", "meta/episodes") for file in (root / part).rglob("*") if file.is_file())
    new = [file for file in new if not (out / file.relative_to(root)).exists()]
    new = [*(file for file in new if "episodes" not in file.parts), *(file for file in new if "episodes" in file.parts)]
    for file in (*new, *(root / name for name in _FACTS if (root / name).is_file())):
        target = out / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    _sync(out / "meta")


def tidy_up(out: Path) -> int:
    """Finish or remove what recordings into `out` left that were killed. Returns how many episodes were rescued."""
    rescued = 0
    for found in out.parent.glob(f".{out.name}.recording-*"):
        owner = found.name.rpartition("-")[2]
        if not owner.isdigit() or is_running(int(owner)):
            continue
        if (found / _MOVING).exists() and _is_dataset(out):
            move_into(out, found / out.name)
            rescued += 1
        shutil.rmtree(found, ignore_errors=True)
    return rescued


def check_whole(out: Path) -> None:
    """Whether a recording can go on in the data set `out`: its counts agree and every file that they name is there. Raises ValueError that names the
    file, and what pyarrow and the file system raise."""
    parquet, info = require("pyarrow.parquet", "recordings"), _read_map(out, "meta/info.json")
    if not isinstance(info.get("features"), dict):
        raise ValueError("meta/info.json has no map of features")
    for name in (name for name in (ROLLOUTS, "meta/stats.json") if (out / name).exists()):
        if not all(isinstance(entry, dict) and "episode" in entry for entry in _read_map(out, name).get("episodes", [])):
            raise ValueError(f"{name} has an entry without an episode")
    parquet.read_metadata(out / "meta" / "tasks.parquet")
    entries = [entry for file in sorted((out / "meta" / "episodes").glob("*/*.parquet")) for entry in _entries(parquet, file)]
    numbers = sorted(entry["episode_index"] for entry in entries)
    if not numbers or numbers != list(range(info.get("total_episodes", 0))):
        raise ValueError(f"meta/info.json counts {info.get('total_episodes')} episodes, meta/episodes has {len(numbers)}")
    rows: Counter[str] = Counter()
    for entry in entries:
        rows[info["data_path"].format(**_place(entry, "data"))] += entry["length"]
        for name in (name for name, column in info["features"].items() if column.get("dtype") == "video"):
            video = info["video_path"].format(video_key=name, **_place(entry, f"videos/{name}"))
            if not (out / video).is_file():
                raise ValueError(f"{video} of episode {entry['episode_index']} is missing")
    for file, count in rows.items():
        if (found := parquet.read_metadata(out / file).num_rows) != count:
            raise ValueError(f"{file} has {found} rows, meta/episodes counts {count}")
    if sum(rows.values()) != info.get("total_frames"):
        raise ValueError(f"meta/info.json counts {info.get('total_frames')} rows, meta/episodes {sum(rows.values())}")


def _entries(parquet: Any, file: Path) -> list[dict[str, Any]]:
    """The rows of the episodes, without their statistics."""
    names = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
    return parquet.read_table(file, columns=names).to_pylist()


def _place(entry: Mapping[str, Any], what: str) -> dict[str, int]:
    return {part: entry[f"{what}/{part}"] for part in ("chunk_index", "file_index")}


def _sync(directory: Path) -> None:
    """A power cut after this loses none of the files."""
    for file in [path for path in directory.rglob("*") if path.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
