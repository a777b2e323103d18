"""The process beside a run that writes its LeRobotDataset v3 with lerobot's own writer; dataset_recorder.py is its other end.

Encoding, lerobot and torch live here, so that nothing of them takes time from the control loop: this process has an interpreter lock of its own, a
lower priority, and outlives a run that is killed.

Each episode is written into a directory beside the data set and moved into it when it is whole, in an order in which the data set can be read at
any instant. So a full disk, a camera that fails or a crash costs at most the episode in progress. What a crash leaves is tidied up by the next
recording into the same data set: an episode whose move had begun is moved to its end, anything else is removed.

Commands come as JSON lines on stdin, pictures through shared memory (`SLOTS_FD`); answers are JSON lines on stdout.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gr00t_fast.errors import require
from gr00t_fast.files import is_running

ROLLOUTS = "meta/rollouts.json"  # of each episode what lerobot has no place for
MODALITY = "meta/modality.json"  # NVIDIA's name for which columns are which part
_FACTS = ("meta/tasks.parquet", "meta/stats.json", ROLLOUTS, MODALITY, "meta/info.json")  # replaced, the one that counts last
_MOVING = ".moving"  # lies in a whole episode's directory while its files are moved
_NICENESS = 10
_ENCODER_QUEUE = 60  # frames of a camera; 55 MB at 640x480
_ENCODER_PATIENCE_S = 5.0
# H.264: half the processor time of lerobot's default (AV1) at 640x480, plays everywhere. And SVT-AV1, run by root, gives its thread a real-time
# priority above the control loop.
_CODEC = "h264"
SUCCESS = "next.success"


def features(joints: Sequence[str], cameras: Mapping[str, tuple[int, int]], success: bool = False) -> dict[str, Any]:
    """Columns of a data set as lerobot's own recorder names them; `cameras`: name -> (height, width). `success`: true in the last row of an episode
    that was solved."""
    vector = {"dtype": "float32", "shape": (len(joints),), "names": [f"{joint}.pos" for joint in joints]}
    names = ["height", "width", "channels"]
    pictures = {f"observation.images.{name}": {"dtype": "video", "shape": (*size, 3), "names": names} for name, size in cameras.items()}
    outcome = {SUCCESS: {"dtype": "bool", "shape": (1,), "names": None}} if success else {}
    return {"observation.state": vector, "action": vector, **pictures, **outcome}


def create(root: Path, fps: int, columns: Mapping[str, Any], robot_type: str) -> Any:
    """An empty LeRobotDataset to write into `root`, which must not be there. Raises MissingExtraError without lerobot."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local data set has no business on the hub
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


# --- an episode, from its first row until it is part of the data set ---------------------------------------------------------------------------


class Episode:
    """Rows of one episode in a directory beside the data set `out`. `save` or `discard` ends it."""

    def __init__(self, out: Path, header: Mapping[str, Any], task: str) -> None:
        self._out, self._header, self._task = out, header, task
        self._columns = features(header["joints"], header["cameras"], success=True)
        self._beside = _beside(out)
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
        if not _is_dataset(self._out):
            return create(self._root, self._header["fps"], self._columns, self._header["robot_type"])
        known = json.loads((self._out / "meta" / "info.json").read_text())["features"]
        self._columns = {name: column for name, column in self._columns.items() if name in known}
        return _continue(self._root, self._out, self._header["fps"], self._columns, self._header["robot_type"])

    def add(self, row: Mapping[str, np.ndarray]) -> None:
        """Pictures are copied."""
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
        self._close()
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
            self._close()
        shutil.rmtree(self._beside, ignore_errors=True)

    def _close(self) -> None:
        self._dataset.finalize()

    def _check_videos(self) -> None:
        """lerobot's encoder leaves frames out when it cannot keep up: every later picture would belong to another row."""
        av = require("av", "robot")
        for file in (self._root / "videos").rglob("*.mp4"):
            with av.open(str(file)) as container:
                found = container.streams.video[0].frames
            if found != self.rows:
                raise RuntimeError(f"{file.name} has {found} pictures of {self.rows}: the video encoder could not keep up")

    def _add_facts(self, number: int, outcome: Mapping[str, Any]) -> None:
        file = self._root / ROLLOUTS
        told = json.loads(file.read_text()) if file.is_file() else {"program": "gr00t-fast", "episodes": []}
        entry = {"episode": number, "frames": self.rows, "task": self._task, **outcome, **self._header["facts"]}
        told["episodes"] = [*(other for other in told.get("episodes", []) if other["episode"] != number), entry]
        file.write_text(json.dumps({**told, "joint_unit": self._header["joint_unit"]}, indent=1) + "\n")
        modality = self._root / MODALITY
        if self._header["modality"] and not modality.is_file():
            modality.write_text(json.dumps(self._header["modality"], indent=2) + "\n")


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


# --- directories --------------------------------------------------------------------------------------------------------------------------------


def _is_dataset(out: Path) -> bool:
    return (out / "meta" / "info.json").is_file()


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.recording-{os.getpid()}")


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
    parquet = require("pyarrow.parquet", "recordings")
    info = json.loads((out / "meta" / "info.json").read_text(encoding="utf-8"))
    columns = info.get("features") if isinstance(info, dict) else None
    if not isinstance(columns, dict) or not all(isinstance(column, dict) for column in columns.values()):
        raise ValueError("meta/info.json has no map of features")
    for name in (ROLLOUTS, "meta/stats.json"):
        told = json.loads((out / name).read_text(encoding="utf-8")) if (out / name).exists() else {}
        episodes = told.get("episodes", []) if isinstance(told, dict) else None
        if not isinstance(episodes, list) or not all(isinstance(each, dict) and "episode" in each for each in episodes):
            raise ValueError(f"{name} is no map, or has an entry without an episode")
    parquet.read_metadata(out / "meta" / "tasks.parquet")
    entries = [entry for file in sorted((out / "meta" / "episodes").glob("*/*.parquet")) for entry in _entries(parquet, file)]
    numbers = sorted(entry["episode_index"] for entry in entries)
    if numbers != list(range(len(numbers))) or not numbers or len(numbers) != info.get("total_episodes"):
        raise ValueError(f"meta/info.json counts {info.get('total_episodes')} episodes, meta/episodes has {len(numbers)}")
    videos = [name for name, column in columns.items() if column.get("dtype") == "video"]
    rows: dict[str, int] = {}
    for entry in entries:
        place = {"chunk_index": entry["data/chunk_index"], "file_index": entry["data/file_index"]}
        rows[file] = rows.get(file := info["data_path"].format(**place), 0) + entry["length"]
        for name in videos:
            place = {"chunk_index": entry[f"videos/{name}/chunk_index"], "file_index": entry[f"videos/{name}/file_index"]}
            if not (out / info["video_path"].format(video_key=name, **place)).is_file():
                raise ValueError(f"{info['video_path'].format(video_key=name, **place)} of episode {entry['episode_index']} is missing")
    for file, count in rows.items():
        if (found := parquet.read_metadata(out / file).num_rows) != count:
            raise ValueError(f"{file} has {found} rows, meta/episodes counts {count}")
    if sum(rows.values()) != info.get("total_frames"):
        raise ValueError(f"meta/info.json counts {info.get('total_frames')} rows, meta/episodes {sum(rows.values())}")


def _entries(parquet: Any, file: Path) -> list[dict[str, Any]]:
    """Of the episodes, without their statistics."""
    names = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
    return parquet.read_table(file, columns=names).to_pylist()


def _sync(directory: Path) -> None:
    """A power cut after this loses none of the files."""
    for file in [path for path in directory.rglob("*") if path.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


# --- the process --------------------------------------------------------------------------------------------------------------------------------


class Slots:
    """Shared memory with room for the pictures of `count` ticks. Both ends make the same views of it."""

    def __init__(self, fd: int, cameras: Mapping[str, tuple[int, int]], count: int) -> None:
        sizes = {name: height * width * 3 for name, (height, width) in cameras.items()}
        self.slot_bytes = sum(sizes.values())
        flags = {"flags": mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)} if hasattr(mmap, "MAP_SHARED") else {}
        self._memory = mmap.mmap(fd, max(1, count * self.slot_bytes), **flags)
        pixels = np.frombuffer(self._memory, np.uint8)
        self.pictures: list[dict[str, np.ndarray]] = []
        for slot in range(count):
            at, views = slot * self.slot_bytes, {}
            for name, (height, width) in cameras.items():
                views[name] = pixels[at : at + sizes[name]].reshape(height, width, 3)
                at += sizes[name]
            self.pictures.append(views)


class Writer:
    """What the other end says, done in order."""

    def __init__(self, out: Path, slots_fd: int, answers: IO[str]) -> None:
        self._out, self._fd, self._answers = out, slots_fd, answers
        self._header: dict[str, Any] = {}
        self._slots: Slots | None = None
        self._episode: Episode | None = None
        self._ended: dict[str, Any] | None = None  # how the episode ended whose fate is not decided yet
        self._joints = 0

    def answer(self, **values: Any) -> None:
        with contextlib.suppress(OSError):  # the run was killed; what it has recorded is still saved
            self._answers.write(json.dumps(values) + "\n")
            self._answers.flush()

    def serve(self, commands: Iterator[str]) -> None:
        """Until the commands end. An episode that was cut off by that is saved too: `ended_by` says it."""
        with contextlib.ExitStack() as left:
            left.callback(self._drop)
            for line in commands:
                command = json.loads(line)
                getattr(self, f"_on_{command.pop('do')}")(**command)
            if self._episode is not None and self._episode.rows:
                self._on_save(**(self._ended or {"success": None, "ended_by": "the program was killed"}))

    def _on_open(self, **header: Any) -> None:
        self._header = header
        self._slots = Slots(self._fd, header["cameras"], header["slots"])
        self._joints = len(header["joints"])
        self.answer(opened=True)

    def _on_begin(self, task: str) -> None:
        self._drop()
        self._episode, self._ended = Episode(self._out, self._header, task), None

    def _on_row(self, slot: int, values: list[float]) -> None:
        numbers = np.array(values, np.float32)
        pictures = {f"observation.images.{name}": picture for name, picture in self._slots.pictures[slot].items()}
        self._episode.add({"observation.state": numbers[: self._joints], "action": numbers[self._joints :], **pictures})
        self.answer(free=slot)

    def _on_end(self, **outcome: Any) -> None:
        self._ended = outcome

    def _on_save(self, **outcome: Any) -> None:
        episode = self._episode
        if episode is None or not episode.rows:
            self._drop()
            self.answer(saved=None, frames=0)
            return
        number = episode.save(outcome)
        self._episode = None
        self.answer(saved=number, frames=episode.rows, duration_s=outcome.get("duration_s", 0.0))

    def _on_discard(self) -> None:
        self._drop()
        self.answer(saved=None, frames=0)

    def _drop(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.discard()


def main(argv: Sequence[str]) -> int:
    """`argv`: the data set's directory and the file descriptor of the shared memory."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of the terminal or the user for the run; this process ends when its input does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the other end
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with tempfile.TemporaryDirectory(prefix="gr00t_fast-") as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # lerobot reads each episode's entry back through `datasets`, which keeps a copy
        writer = Writer(Path(argv[0]), int(argv[1]), answers)
        try:
            _quiet()
            writer.answer(ready=True)
            writer.serve(iter(sys.stdin.readline, ""))
        except Exception as error:  # whatever it was: the run is told, and lands
            writer.answer(error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
            raise
    return 0


def _quiet() -> None:
    """lerobot imported, its progress bars and the encoder's messages off."""
    _dataset_class()
    with contextlib.suppress(AttributeError):
        require("datasets", "robot").disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
