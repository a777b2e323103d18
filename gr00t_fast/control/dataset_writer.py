"""The process beside a run that writes its LeRobotDataset v3 with lerobot's own writer; recorder.py is its other end.

Each episode is written into a directory beside the data set and moved into it when it is whole, in an order in which the data set can be read at
any instant. So a full disk, a camera that fails or a crash costs at most the episode in progress. What a crash leaves is tidied up by the next
recording into the same data set: an episode whose move had begun is moved to its end, anything else is removed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.sink import Tell
from gr00t_fast.errors import require
from gr00t_fast.files import is_running

ROLLOUTS = "meta/rollouts.json"  # of each episode what lerobot has no place for
MODALITY = "meta/modality.json"  # NVIDIA's name for which columns are which part
_FACTS = ("meta/tasks.parquet", "meta/stats.json", ROLLOUTS, MODALITY, "meta/info.json")  # replaced, the one that counts last
_MOVING = ".moving"  # lies in a whole episode's directory while its files are moved
_ENCODER_QUEUE = 60  # frames of a camera; 55 MB at 640x480
_ENCODER_PATIENCE_S = 5.0
# H.264: half the processor time of lerobot's default (AV1) at 640x480, plays everywhere. And SVT-AV1, run by root, gives its thread a real-time
# priority above the control loop.
_CODEC = "h264"
SUCCESS = "next.success"


@dataclass(frozen=True)
class Header:
    """What all episodes of a recording have in common. cameras: name -> shape of its pictures. facts: JSON-ready, for meta/rollouts.json."""

    fps: int
    joints: tuple[str, ...]
    cameras: Mapping[str, tuple[int, ...]]
    joint_unit: str
    robot_type: str
    modality: Mapping[str, Any] | None
    facts: Mapping[str, Any]


def features(joints: Sequence[str], cameras: Mapping[str, tuple[int, ...]], success: bool = False) -> dict[str, Any]:
    """Columns of a data set as lerobot's own recorder names them; `cameras`: name -> (height, width, ...). `success`: true in the last row of an
    episode that was solved."""
    vector = {"dtype": "float32", "shape": (len(joints),), "names": [f"{joint}.pos" for joint in joints]}
    names = ["height", "width", "channels"]
    pictures = {f"observation.images.{name}": {"dtype": "video", "shape": (*size[:2], 3), "names": names} for name, size in cameras.items()}
    outcome = {SUCCESS: {"dtype": "bool", "shape": (1,), "names": None}} if success else {}
    return {"observation.state": vector, "action": vector, **pictures, **outcome}


def create(root: Path, fps: int, columns: Mapping[str, Any], robot_type: str) -> Any:
    """An empty LeRobotDataset to write into `root`, which must not be there. Raises MissingExtraError without lerobot."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local data set: nothing is asked of the hub
    dataset = _dataset_class()
    return dataset.create(f"local/{root.name}", fps, dict(columns), root=root, robot_type=robot_type, **_encoding(dataset.create))


def _dataset_class() -> Any:
    return require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDataset


def _encoding(method: Any) -> dict[str, Any]:
    """Arguments of lerobot's writer by what the installed version knows: encode while frames come in."""
    known = inspect.signature(method).parameters
    settings = {"streaming_encoding": True, "encoder_queue_maxsize": _ENCODER_QUEUE, "encoder_threads": 1, "vcodec": _CODEC}
    if "rgb_encoder" in known:  # 0.6
        settings["rgb_encoder"] = require("lerobot.configs.video", "robot").RGBEncoderConfig(vcodec=_CODEC)
    return {name: value for name, value in settings.items() if name in known}


def _continue(root: Path, before: Path, fps: int, columns: Mapping[str, Any], robot_type: str) -> Any:
    """A LeRobotDataset in `root` that numbers on from the one in `before`. Of that only the facts and the last episode's entry are read."""
    cls, repo_id = _dataset_class(), f"local/{before.name}"
    if hasattr(cls, "resume"):  # 0.6
        _copy_facts(before, root)
        return cls.resume(repo_id, root=root, **_encoding(cls.resume))
    dataset = create(root, fps, columns, robot_type)
    shutil.rmtree(root / "meta")
    _copy_facts(before, root)
    metadata = require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDatasetMetadata
    dataset.meta = metadata(repo_id, root=root)
    dataset.episode_buffer = dataset.create_episode_buffer()
    return dataset


def _copy_facts(before: Path, root: Path) -> None:
    last = max((before / "meta" / "episodes").rglob("*.parquet"), key=lambda file: file.relative_to(before).as_posix())
    for file in (*(before / name for name in _FACTS), last):
        if file.is_file():
            target = root / file.relative_to(before)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


class Episode:
    """Rows of one episode, in a directory beside the data set `out` until it is whole. `save` or `discard` ends it."""

    def __init__(self, out: Path, header: Header, task: str) -> None:
        self._out, self._header, self._task = out, header, task
        self._columns = features(header.joints, header.cameras, success=True)
        self._beside = out.with_name(f".{out.name}.recording-{os.getpid()}")
        self._beside.mkdir(parents=True)
        self._root = self._beside / out.name
        try:
            self._dataset = self._open()
        except BaseException:
            shutil.rmtree(self._beside, ignore_errors=True)
            raise
        self._last: dict[str, Any] | None = None  # the outcome is told in the last row
        self.rows = 0

    def _open(self) -> Any:
        fps, robot_type = self._header.fps, self._header.robot_type
        if not _is_dataset(self._out):
            return create(self._root, fps, self._columns, robot_type)
        known = _read_map(self._out, "meta/info.json")["features"]
        self._columns = {name: column for name, column in self._columns.items() if name in known}
        return _continue(self._root, self._out, fps, self._columns, robot_type)

    def add(self, row: Mapping[str, np.ndarray]) -> None:
        """Copies the row."""
        if self._last is not None:
            self._write(self._last, solved=False)
        self._last = {name: np.array(value) for name, value in row.items()}
        self.rows += 1

    def _write(self, row: dict[str, Any], solved: bool) -> None:
        _let_encoders_catch_up(self._dataset)
        outcome = {SUCCESS: np.array([solved])} if SUCCESS in self._columns else {}
        self._dataset.add_frame({**row, **outcome, "task": self._task})

    def save(self, outcome: Mapping[str, Any]) -> int:
        """Returns the episode's number. Raises what lerobot and the file system raise; the data set is then as it was."""
        self._write(self._last, solved=bool(outcome.get("success")))
        if self.rows == 1:
            _make_statistics_of_one_picture(self._dataset, self._last)
        number = int(self._dataset.meta.total_episodes)
        self._dataset.save_episode()
        self._dataset.finalize()
        self._check_videos()
        self._add_facts(number, outcome)
        _sync(self._root)
        if _is_dataset(self._out):
            (self._beside / _MOVING).touch()
            move_into(self._out, self._root)
        else:
            self._root.rename(self._out)
        shutil.rmtree(self._beside)
        return number

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is removed
            self._dataset.clear_episode_buffer()
            self._dataset.finalize()
        shutil.rmtree(self._beside, ignore_errors=True)

    def _check_videos(self) -> None:
        """lerobot's encoder leaves frames out when it cannot keep up: every later picture would belong to another row."""
        av = require("av", "robot")
        for file in (self._root / "videos").rglob("*.mp4"):
            with av.open(str(file)) as container:
                found = container.streams.video[0].frames
            if found != self.rows:
                raise RuntimeError(f"{file.name} has {found} pictures of {self.rows}: the video encoder could not keep up")

    def _add_facts(self, number: int, outcome: Mapping[str, Any]) -> None:
        header, file, modality = self._header, self._root / ROLLOUTS, self._root / MODALITY
        told = _read_map(self._root, ROLLOUTS) if file.is_file() else {"program": "gr00t-fast"}
        entry = {"episode": number, "frames": self.rows, "task": self._task, **outcome, **header.facts}
        told["episodes"] = [*(other for other in told.get("episodes", []) if other["episode"] != number), entry]
        file.write_text(json.dumps({**told, "joint_unit": header.joint_unit}, indent=1) + "\n")
        if header.modality and not modality.is_file():
            modality.write_text(json.dumps(header.modality, indent=2) + "\n")


def _encoder(dataset: Any) -> Any:
    return getattr(getattr(dataset, "writer", None), "_streaming_encoder", None) or getattr(dataset, "_streaming_encoder", None)


def _make_statistics_of_one_picture(dataset: Any, row: Mapping[str, np.ndarray]) -> None:
    """lerobot's encoder makes none of an episode of one row; a data set whose first episode has none cannot be read once there is a second one."""
    stats, encoder = require("lerobot.datasets.compute_stats", "robot"), _encoder(dataset)
    finish = getattr(encoder, "finish_episode", None)

    def of_picture(picture: np.ndarray) -> Any:
        found = stats.RunningQuantileStats()
        found.update(stats.auto_downsample_height_width(picture.transpose(2, 0, 1)).transpose(1, 2, 0))  # channels come last in the batch
        return found.get_statistics()

    if finish is not None:  # there are cameras
        encoder.finish_episode = lambda: {key: (path, of_picture(row[key])) for key, (path, _) in finish().items()}


def _let_encoders_catch_up(dataset: Any) -> None:
    """lerobot drops pictures when an encoder's queue is full; here nothing is in a hurry."""
    queues = getattr(_encoder(dataset), "_frame_queues", {})
    end_s = time.monotonic() + _ENCODER_PATIENCE_S
    while time.monotonic() < end_s and any(queue.qsize() >= _ENCODER_QUEUE - 1 for queue in queues.values()):
        time.sleep(0.002)


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
    rows: dict[str, int] = {}
    for entry in entries:
        file = info["data_path"].format(**_place(entry, "data"))
        rows[file] = rows.get(file, 0) + entry["length"]
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
    """Of the episodes, without their statistics."""
    names = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
    return parquet.read_table(file, columns=names).to_pylist()


def _place(entry: Mapping[str, Any], what: str) -> dict[str, int]:
    return {part: entry[f"{what}/{part}"] for part in ("chunk_index", "file_index")}


def _sync(directory: Path) -> None:
    """A power cut after this loses none of the files."""
    for file in [path for path in directory.rglob("*") if path.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


# The process


class DatasetWriter:
    """What the recorder asks for, done in order. An episode that is cut off because the run was killed is saved: `ended_by` says it."""

    def __init__(self, tell: Tell, out: Path) -> None:
        """Imports lerobot, whose progress bars are off."""
        self._tell, self._out = tell, out
        self._header: Header | None = None
        self._episode: Episode | None = None
        self._ended: dict[str, Any] = {}  # how the episode ended whose fate is not decided yet
        self._cache = tempfile.TemporaryDirectory(prefix="gr00t_fast-")
        os.environ["HF_DATASETS_CACHE"] = self._cache.name  # lerobot reads each episode's entry back through `datasets`, which keeps a copy
        _dataset_class()
        require("datasets", "robot").disable_progress_bars()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None and self._episode is not None:
                self.save(self._ended)
        finally:
            self.discard()
            self._cache.cleanup()

    def open(self, header: Header) -> None:
        self._header = header

    def begin(self, task: str) -> None:
        self.discard()
        self._episode = Episode(self._out, self._header, task)
        self._ended = {"success": None, "ended_by": "the program was killed"}

    def add(self, observation: Observation, commanded: np.ndarray) -> None:
        pictures = {f"observation.images.{name}": picture for name, picture in observation.frames.items()}
        self._episode.add({"observation.state": observation.joints.astype(np.float32), "action": commanded.astype(np.float32), **pictures})

    def end(self, outcome: dict[str, Any]) -> None:
        self._ended = outcome

    def save(self, outcome: dict[str, Any]) -> None:
        if self._episode.rows:
            number = self._episode.save(outcome)
            self._tell("saved", {"lost_ticks": 0, "duration_s": 0.0, **outcome, "episode": number, "frames": self._episode.rows})
            self._episode = None
        self.discard()

    def discard(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.discard()
