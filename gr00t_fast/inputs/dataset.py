"""Where calibration and verification take their observations from, one at a time and spread over whole recordings; and how recordings move.

* a LeRobotDataset directory (v3): `meta/info.json` and its parquet and video files, read offline;
* a directory of recordings: each `<name>.npz` is an episode and holds, by the policy's own keys, `video.<cam>` uint8 (T, H, W, 3),
  `state.<part>` float (T, D) and the instruction under the language key (one text, or T of them);
* `random:SEED`: synthetic textured pictures and joints within the statistics. It finds wrong graphs; it says nothing about real activations.

A run's video (`--video`) cannot be used: its frames are compressed again, cut to one picture and without joint values.
Axis alphabet: T frames of an episode, H and W height and width, D joint values.
"""

from __future__ import annotations

import re
import shlex
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import PolicyMetadata
from gr00t_fast.base.errors import ConfigError, closest, require
from gr00t_fast.base.files import read_json
from gr00t_fast.inputs.data_config import DataConfig

MIN_FRAMES = 128  # fewer do not show an activation's range
MIN_EPISODES = 8  # neighbouring frames are nearly the same picture: frames of few episodes count for few
_MEND = "Copy the data set again, or record it again."
_FOREIGN_SHARE = 0.1  # of the joint values may lie further outside the statistics than their own width before a source is refused
_EXAMPLE_INSTRUCTION = "Place the block in the bowl"
_STATE, _ACTION = "observation.state", "action"
_EXAMPLE_SIZE = (640, 480)  # width and height, where the checkpoint does not say what its cameras delivered


class Frames(ABC):
    """Random access to observations in the policy's own dictionary form (unbatched), each of one time."""

    name: str
    config: DataConfig
    episode_lengths: list[int]
    synthetic = False

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Frame number `index`, counted over all episodes. Without the language key where the recording does not say what was done."""

    def episode_of(self, index: int) -> tuple[int, int]:
        """The number of a frame's episode, and that of the episode's first frame."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, int(self._starts[number])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.episode_lengths])


@dataclass(frozen=True)
class Sample:
    """Which frames were taken; goes into the manifest."""

    source: str
    synthetic: bool
    seed: int
    indices: list[int]
    episodes: int  # how many different ones the frames come from
    warnings: list[str]

    def describe(self) -> dict[str, Any]:
        told = asdict(self)
        return told | {"frames": len(told.pop("indices"))}


def open_frames(source: str, config: DataConfig, metadata: PolicyMetadata, camera_map: Mapping[str, str] | None = None) -> Frames:
    """`source` is a directory or `random:SEED`. Raises ConfigError for anything else, with what was looked for."""
    if source.startswith("random:"):
        seed = source.removeprefix("random:")
        if not seed.isdecimal():
            raise ConfigError(f"--observations '{source}': expected random:SEED with a whole number, e.g. random:0.")
        return RandomFrames(int(seed), config, metadata)
    path = Path(source)
    if (path / "meta" / "info.json").is_file():
        return LeRobotFrames(path, config, metadata, camera_map or {})
    if path.is_dir() and any(path.glob("*.npz")):
        return RecordedFrames(path, config)
    raise ConfigError(
        f"'{source}' is neither a LeRobotDataset (no meta/info.json), nor a directory of recordings (no *.npz), nor random:SEED. "
        "Name one of these as the source of observations."
    )


def draw(frames: Frames, count: int, seed: int, allow_few: bool, least: int = MIN_FRAMES) -> Sample:
    """Choose `count` frames uniformly over all frames of all episodes, without repetition. Raises ConfigError when there are too few."""
    total = sum(frames.episode_lengths)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:count]).tolist()
    episodes = len({frames.episode_of(index)[0] for index in chosen})
    lacks = []
    if len(chosen) < least:
        lacks.append(f"{len(chosen)} frames, expected at least {least}")
    if episodes < MIN_EPISODES and not frames.synthetic:
        lacks.append(f"frames of {episodes} episodes, expected at least {MIN_EPISODES}")
    if lacks and not allow_few:
        raise ConfigError(f"{frames.name}: {'; '.join(lacks)}. Record more, or say --allow_few: fewer tell less of what the network meets.")
    if frames.synthetic:
        lacks.append("synthetic observations: ranges of real pictures may differ")
    return Sample(frames.name, frames.synthetic, seed, chosen, episodes, lacks)


def read(frames: Frames, sample: Sample, metadata: PolicyMetadata) -> Iterator[dict[str, Any]]:
    """The chosen observations, in order. Raises ConfigError for one without an instruction, and when most joints are far outside what the checkpoint
    was trained on."""
    far = values = 0
    for index in sample.indices:
        observation = _with_history(frames, index)
        if not "".join(observation.get(frames.config.language_key, ())).strip():
            where = f"{sample.source}: episode {frames.episode_of(index)[0]} has no task text (frame {index})"
            raise ConfigError(f"{where}. Expected what the robot was told to do: add it to the data set, or leave that episode out.")
        for part, statistics in metadata.state_statistics.items():
            joints = np.asarray(observation[f"state.{part}"], np.float64)
            width = np.maximum(statistics.max - statistics.min, 1e-6)
            far += int(((joints < statistics.min - width) | (joints > statistics.max + width)).sum())
            values += joints.size
        yield observation
    if far > _FOREIGN_SHARE * values:
        raise ConfigError(
            f"{sample.source}: {far} of {values} joint values lie far outside the checkpoint's training range. "
            "Expected data of the same robot in the same units (degrees or -100..100)."
        )


def _with_history(frames: Frames, index: int) -> dict[str, Any]:
    """Frame number `index` with the earlier times that the policy reads; the episode's first frame stands for what was before it."""
    config, seen = frames.config, frames[index]
    _, first = frames.episode_of(index)
    earlier = {offset: frames[max(first, index + offset)] for offset in {*config.video_indices, *config.state_indices} - {0}}
    found = dict(seen)
    for keys, offsets in ((config.video_keys, config.video_indices), (config.state_keys, config.state_indices)):
        found |= {key: np.concatenate([earlier.get(offset, seen)[key] for offset in offsets]) for key in keys}
    return found


class RandomFrames(Frames):
    """Textured pictures, joints uniform within the statistics. Each frame is an episode of its own."""

    synthetic = True

    def __init__(self, seed: int, config: DataConfig, metadata: PolicyMetadata, count: int = 100_000) -> None:
        self.name, self._seed, self.config, self._metadata = f"random:{seed}", seed, config, metadata
        self.episode_lengths = [1] * count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng((self._seed, index))
        observation: dict[str, Any] = {self.config.language_key: [_EXAMPLE_INSTRUCTION]}
        for key in self.config.video_keys:
            width, height = self._metadata.resolutions[key.split(".", 1)[1]] or _EXAMPLE_SIZE
            observation[key] = textured_picture(generator, width, height)[None]
        for part, statistics in self._metadata.state_statistics.items():
            observation[f"state.{part}"] = np.asarray(generator.uniform(statistics.min, statistics.max))[None]
        return observation


def textured_picture(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): waves of several scales, patches with edges, and noise: neither flat nor white."""
    grid: np.ndarray = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = grid[0] / height, grid[1] / width
    picture: np.ndarray = np.full((height, width, 3), generator.uniform(40, 200, 3), np.float32)
    for cycles in (1, 3, 9, 27):
        angle, phase = generator.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        picture += wave[..., None] * generator.uniform(-60, 60, 3).astype(np.float32) / cycles**0.5
    for _ in range(8):
        top, left = int(generator.integers(0, height)), int(generator.integers(0, width))
        deep, wide = int(generator.integers(1, height // 2 + 2)), int(generator.integers(1, width // 2 + 2))
        picture[top : top + deep, left : left + wide] = generator.uniform(0, 255, 3)
    picture += generator.normal(0, 6, (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


class RecordedFrames(Frames):
    """A directory of `.npz` episodes; one episode is held in memory at a time."""

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.name, self.config = str(path), config
        self._files = sorted(path.glob("*.npz"))
        self.episode_lengths = [self._length(file) for file in self._files]
        self._held: tuple[int, dict[str, np.ndarray]] | None = None

    def _length(self, file: Path) -> int:
        with self._open(file) as arrays:
            needed = [*self.config.video_keys, *self.config.state_keys, self.config.language_key]
            if absent := [key for key in needed if key not in arrays.files]:
                raise ConfigError(f"{file}: {', '.join(absent)} missing. Expected {', '.join(needed)}; got {', '.join(arrays.files) or 'nothing'}.")
            return len(arrays[self.config.state_keys[0]])

    def _open(self, file: Path) -> np.lib.npyio.NpzFile:
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a readable .npz recording ({error}).") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, first = self.episode_of(index)
        if self._held is None or self._held[0] != number:
            with self._open(self._files[number]) as arrays:
                self._held = (number, {key: arrays[key] for key in arrays.files})
        episode, row = self._held[1], index - first
        observation: dict[str, Any] = {key: episode[key][row][None] for key in (*self.config.video_keys, *self.config.state_keys)}
        texts = np.atleast_1d(episode[self.config.language_key])
        observation[self.config.language_key] = [str(texts[row] if len(texts) > 1 else texts[0])]
        return observation


@dataclass(frozen=True)
class Camera:
    """Which camera of a data set stands for one of the policy's, and how that was decided."""

    feature: str  # observation.images.front
    chosen_by: str
    size: tuple[int, int] | None  # width, height as recorded; None when the data set does not say


class LeRobotFrames(Frames):
    """A LeRobotDataset v3 on the disk. `meta/modality.json` (NVIDIA's convention), where present, says which columns a part has.

    `fps` is the rate of the recording, or None when it does not say. `cameras`: policy's key (`video.webcam`) -> Camera; with `camera_map` None there
    are none, and only the joints are read.
    """

    def __init__(self, path: Path, config: DataConfig, metadata: PolicyMetadata, camera_map: Mapping[str, str] | None) -> None:
        self.name, self._path, self.config, self._metadata = str(path), path, config, metadata
        self._info = read_map(path / "meta" / "info.json")
        version, self._features = str(self._info.get("codebase_version", "")), dict(self._info.get("features") or {})
        if not version.startswith("v3"):
            raise ConfigError(f"{path}: LeRobotDataset {version or 'of unknown version'}, expected v3. {conversion(path, version)}")
        self.fps = float(self._info["fps"]) if self._info.get("fps") else None
        modality = path / "meta" / "modality.json"
        self._modality = read_map(modality) if modality.is_file() else {}
        self.cameras = {} if camera_map is None else self._choose_cameras(camera_map)
        self._check_files()
        self._spans("state")
        self._data = self._open()
        self.episode_lengths = [int(length) for length in self._data.meta.episodes["length"]]

    @property
    def episodes(self) -> list[range]:
        """Rows of each episode, by its number. Raises ConfigError when they are not stored in order: lerobot would show another one's pictures."""
        meta = self._data.meta.episodes
        numbers = [int(number) for number in meta["episode_index"]]
        if numbers != list(range(len(numbers))):
            raise ConfigError(f"{self.name}: meta/episodes lists the episodes as {numbers[:8]}, expected 0, 1, 2, ... Write the data set again.")
        spans = zip(meta["dataset_from_index"], meta["dataset_to_index"], strict=True)
        return [range(int(begin), int(end)) for begin, end in spans]

    def tasks_of(self, episode: int) -> list[str]:
        """What the recording says was done; empty when it says nothing."""
        return [text for text in self._data.meta.episodes[episode]["tasks"] if text.strip()]

    def columns(self, kind: str, rows: range) -> dict[str, np.ndarray]:
        """`state` or `action` of consecutive rows: part -> float64 (T, D). No picture is decoded."""
        spans = self._spans(kind)
        wanted = sorted({column for column, _ in spans.values()})
        table = self._data.hf_dataset.with_format("numpy", columns=wanted)[rows.start : rows.stop]
        return {part: np.asarray(table[column], np.float64)[:, span] for part, (column, span) in spans.items()}

    def names(self, kind: str) -> dict[str, tuple[str, ...]]:
        """Part -> names of its columns, without lerobot's `.pos`; numbered where the data set does not name them."""
        found = {}
        for part, (column, span) in self._spans(kind).items():
            names = self._features[column].get("names")
            named = names[span] if isinstance(names, list) else [f"{part}.{number}" for number in range(span.stop - span.start)]
            found[part] = tuple(str(name).removesuffix(".pos") for name in named)
        return found

    def _choose_cameras(self, camera_map: Mapping[str, str]) -> dict[str, Camera]:
        """Policy's key -> the data set's camera."""
        found = [key.rpartition(".")[2] for key in self._features if key.startswith("observation.images.")]
        names = [key.split(".", 1)[1] for key in self.config.video_keys]
        given = {policy: data for data, policy in camera_map.items()}
        told = {name: entry.get("original_key", "").rpartition(".")[2] for name, entry in self._modality.get("video", {}).items()}
        chosen = {}
        if strangers := [policy for policy in given if policy not in names]:
            raise ConfigError(f"--camera_map: the policy has no camera '{strangers[0]}', only {', '.join(names)}.{closest(strangers[0], names)}")
        for name in names:
            ways = {"--camera_map": given.get(name), "meta/modality.json": told.get(name), "its name": name if name in found else None}
            ways["being the only one on both sides"] = found[0] if len(names) == len(found) == 1 else None
            chosen_by, data = next(((way, data) for way, data in ways.items() if data), ("", None))
            if data not in found:
                says = f" {chosen_by} says '{data}'." if data else ""
                raise ConfigError(
                    f"{self.name}: no camera for '{name}'.{says} The data set has {', '.join(found) or 'none'}. "
                    f'Say which is which with --camera_map="{{<data set camera>: {name}}}".'
                )
            feature = f"observation.images.{data}"
            chosen[f"video.{name}"] = Camera(feature, chosen_by, _picture_size(self._features[feature]))
        return chosen

    def _check_files(self) -> None:
        """Before lerobot looks: what it does not find it asks the hub for, and the message is about the network."""
        patterns = {
            "the joints": self._info.get("data_path"),
            "the tasks": "meta/tasks.parquet",
            "the lengths of episodes": "meta/episodes/*/*.parquet",
        }
        for name in (name for name, feature in self._features.items() if feature.get("dtype") == "video"):
            patterns[f"the videos of {name}"] = str(self._info.get("video_path")).replace("{video_key}", name)
        for what, pattern in patterns.items():
            pattern = re.sub(r"\{[^}]*\}", "*", str(pattern))
            if not any(self._path.glob(pattern)):
                raise ConfigError(f"{self.name}: {what} are missing, expected {pattern}. {_MEND}")

    def _open(self) -> Any:
        dataset = require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDataset
        try:  # pyav: torchcodec is there without the FFmpeg libraries it needs on many machines, and fails on the first frame
            return dataset(f"local/{self._path.name}", root=self._path, video_backend="pyav")
        except Exception as error:  # lerobot, datasets, pyarrow and the hub's client raise kinds of their own for files missing or damaged
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            what = "A file is missing or damaged, or meta/info.json describes other columns than data/ has"
            raise ConfigError(f"{self.name}: lerobot cannot open it ({reason}). {what}. {_MEND}") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                # torchvision announces with each frame that its reader of videos will go; lerobot has no other without FFmpeg's libraries
                warnings.filterwarnings("ignore", "The video decoding and encoding capabilities of torchvision", UserWarning)
                row = self._data[index]
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise ConfigError(f"{self.name}: frame {index} cannot be decoded ({type(error).__name__}). {_MEND}") from error
        observation: dict[str, Any] = {self.config.language_key: [row["task"]]} if row.get("task") else {}
        for key, camera in self.cameras.items():
            pixels = (row[camera.feature] * 255.0).round().clamp(0, 255).byte()  # lerobot gives float (3, H, W) in 0..1
            observation[key] = pixels.permute(1, 2, 0).contiguous().numpy()[None]
        for part, (column, span) in self._spans("state").items():
            observation[f"state.{part}"] = np.asarray(row[column], np.float64)[span][None]
        return observation

    def _spans(self, kind: str) -> dict[str, tuple[str, slice]]:
        """Part of `state` or `action` -> column of the data set, and the part's place in it. Raises ConfigError where they do not fit."""
        widths, default = (self._metadata.state_widths, _STATE) if kind == "state" else (self._metadata.action_widths, _ACTION)
        told, start, count = self._modality.get(kind, {}), 0, 0
        spans: dict[str, tuple[str, slice]] = {}
        for part, width in widths.items():
            place: dict[str, Any] = told.get(part, {}) if told else {"start": start, "end": start + width}
            column, span = place.get("original_key") or default, slice(place.get("start", -1), place.get("end", -1))
            count, start = (self._features.get(column, {}).get("shape") or [0])[0], start + width
            if not (span.start >= 0 and span.stop - span.start == width and span.stop <= count):
                where = f"{column} has {count} values, meta/modality.json says {told.get(part, 'nothing')}"
                raise ConfigError(f"{self.name}: no place for {kind}.{part}, in the checkpoint {width} value(s): {where}. Name data of this arm.")
            spans[part] = (column, span)
        if not told and count != start:
            raise ConfigError(f"{self.name}: {default} has {count} values, the policy {dict(widths)}. Expected as many, or a meta/modality.json.")
        return spans


def read_map(path: Path) -> dict[str, Any]:
    """A JSON object of a data set. Raises ConfigError."""
    try:
        found = read_json(path, nan=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). {_MEND}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(found).__name__}. {_MEND}")
    return found


def _picture_size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of a picture feature, whose shape is (height, width, 3) or (3, height, width)."""
    shape = list(feature.get("shape") or ())
    if len(shape) != 3:
        return None
    height, width = shape[:2] if shape[2] == 3 else shape[1:]
    return int(width), int(height)


def conversion(path: Path, version: str) -> str:
    """How to bring a data set of an older version to v3. lerobot's converter joins --root and --repo-id, and pushes to the hub unless told not to."""
    if not version.startswith("v2.1"):
        return "lerobot's converter reads v2.1 alone: bring it to v2.1 first, with the lerobot that knows its version, or record it again."
    flags = f"--root={shlex.quote(str(path.absolute().parent))} --repo-id={shlex.quote(path.name)} --push-to-hub=false"
    return f"Convert it in its place: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 {flags}"


# Motion of the recordings behind a checkpoint. J joints of the arm


@dataclass(frozen=True)
class Recordings:
    """lengths: frames of each of E episodes. states, actions: the first measured joints and targets of each, float64 (E, J). fastest_units_s: the
    largest change of each joint's target from one frame to the next, a second, float64 (J,). All in the units of the data."""

    name: str
    lengths: tuple[int, ...]
    states: np.ndarray
    actions: np.ndarray
    fastest_units_s: np.ndarray

    @property
    def episodes(self) -> int:
        return len(self.lengths)

    @property
    def begin(self) -> np.ndarray:
        """Median over the episodes of the first measured joints (J,)."""
        return np.median(self.states, axis=0)


def read_recordings(directory: Path, joint_names: tuple[str, ...]) -> Recordings:
    """Where recorded episodes begin, and how fast their targets change: from the tables of a LeRobotDataset (v2.1 or v3), no video is read.

    Raises ConfigError where there is no data set, or one of another robot; MissingExtraError without pyarrow."""
    if not (directory / "meta" / "info.json").is_file():
        raise ConfigError(f"{directory}: no LeRobotDataset is there (no meta/info.json). Name the directory of the recordings.")
    info, parquet = read_map(directory / "meta" / "info.json"), require("pyarrow.parquet", "recordings")
    try:
        fps = float(info["fps"])
        for column in (_STATE, _ACTION):
            _check_joints(f"{directory}: {column}", info["features"][column], joint_names)
        files = sorted((directory / "data").rglob("*.parquet"))
        tables = [parquet.read_table(file, columns=[_STATE, _ACTION, "episode_index", "frame_index"]).to_pydict() for file in files]
        columns = {name: np.concatenate([np.array(table[name], np.float64) for table in tables]) for name in tables[0]}
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{directory}: cannot be read ({type(error).__name__}: {str(error)[:120]}). {_MEND}") from error
    order = np.lexsort((columns["frame_index"], columns["episode_index"]))
    episode, state, action = (columns[name][order] for name in ("episode_index", _STATE, _ACTION))
    if not len(state) or not np.isfinite(state).all() or not np.isfinite(action).all():
        raise ConfigError(f"{directory}: holds no frame, or joints that are not finite. Name recordings with measured joints.")
    first = np.flatnonzero(np.diff(episode, prepend=-1))  # rows at which an episode begins
    changes = np.abs(np.diff(action, axis=0))[np.diff(episode) == 0]
    lengths = tuple(np.diff([*first, len(state)]).tolist())
    return Recordings(str(directory), lengths, state[first], action[first], changes.max(axis=0, initial=0.0) * fps)


def _check_joints(what: str, feature: dict[str, Any], joint_names: tuple[str, ...]) -> None:
    names, shape = feature.get("names"), list(feature["shape"])
    if isinstance(names, dict):  # lerobot before v2.1: {"motors": [...]}
        names = next(iter(names.values()), None)
    bare = [str(name).removesuffix(".pos").removeprefix("main_") for name in names or ()]
    if shape != [len(joint_names)] or (bare and bare != list(joint_names)):
        told = f"{what} has {', '.join(bare) or shape}, the arm {', '.join(joint_names)}"
        raise ConfigError(f"{told}. Name recordings of this kind of arm.")


# Single pictures of them


@dataclass(frozen=True)
class Filmed:
    """A camera of a data set. policy: what `meta/modality.json` calls it in the checkpoint, or empty."""

    feature: str
    size: tuple[int, int]  # width, height
    policy: str


class RecordedPictures:
    """Single frames of a LeRobotDataset's videos (v2.1 or v3), without lerobot. `cameras`: name -> Filmed."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where the data set is damaged, or of another version; MissingExtraError without pyarrow."""
        self._path, self._info = directory, read_map(directory / "meta" / "info.json")
        modality = read_map(file) if (file := directory / "meta" / "modality.json").is_file() else {}
        policy_of = {entry.get("original_key"): name for name, entry in modality.get("video", {}).items()}
        videos = {name: feature for name, feature in dict(self._info.get("features") or {}).items() if feature.get("dtype") == "video"}
        self.cameras = {
            name.rpartition(".")[2]: Filmed(name, size, policy_of.get(name, policy_of.get(name.rpartition(".")[2], "")))
            for name, feature in videos.items()
            if (size := _picture_size(feature)) is not None
        }
        self._rows: dict[int, dict[str, Any]] = {}
        if str(self._info.get("codebase_version", "")).startswith("v3") and self.cameras:
            parquet = require("pyarrow.parquet", "recordings")
            try:
                for part in sorted((directory / "meta" / "episodes").rglob("*.parquet")):
                    wanted = [name for name in parquet.read_schema(part).names if name == "episode_index" or name.startswith("videos/")]
                    self._rows |= {row["episode_index"]: row for row in parquet.read_table(part, columns=wanted).to_pylist()}
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(f"{directory}: meta/episodes cannot be read ({type(error).__name__}). {_MEND}") from error

    def picture(self, camera: str, episode: int, frame: int) -> np.ndarray:
        """uint8 RGB (H, W, 3). Raises ConfigError where it cannot be decoded; MissingExtraError without PyAV."""
        av, key = require("av", "robot"), self.cameras[camera].feature
        at_s, row = frame / float(self._info["fps"]), self._rows.get(episode, {})
        try:
            chunk = row.get(f"videos/{key}/chunk_index", episode // int(self._info.get("chunks_size") or 1000))
            places = {"video_key": key, "chunk_index": chunk, "episode_chunk": chunk, "episode_index": episode}
            file = self._path / self._info["video_path"].format(**places, file_index=row.get(f"videos/{key}/file_index", 0))
            at_s += row.get(f"videos/{key}/from_timestamp", 0.0)
            with av.open(str(file)) as container:
                stream = container.streams.video[0]
                container.seek(int(at_s / stream.time_base), stream=stream)
                for decoded in container.decode(stream):
                    if decoded.time + 0.5 / float(self._info["fps"]) > at_s:
                        found: np.ndarray = decoded.to_ndarray(format="rgb24")
                        return found
            raise ValueError("the video ends before")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, av.FFmpegError) as error:  # of PyAV's errors some are neither
            why = f"{type(error).__name__}: {str(error)[:80]}"
            raise ConfigError(f"{self._path}: frame {frame} of episode {episode}, camera '{camera}', cannot be decoded ({why}). {_MEND}") from error
