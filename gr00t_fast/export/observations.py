"""Where calibration and verification take their observations from, one at a time and spread over whole recordings.

* a LeRobotDataset directory (v3): `meta/info.json` and its parquet and video files, read offline;
* a directory of recordings: each `<name>.npz` is an episode and holds, by the policy's own keys, `video.<cam>` uint8 (T, H, W, 3),
  `state.<part>` float (T, D) and the instruction under the language key (one text, or T of them);
* `random:SEED`: synthetic textured pictures and joints within the statistics. It finds wrong graphs; it says nothing about real activations.

A run's video (`--video`) cannot be used: its frames are compressed again, cut to one picture and without joint values.
Axis alphabet: T frames of an episode, H and W height and width, D joint values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gr00t_fast.contracts import PolicyFacts
from gr00t_fast.data_config import DataConfig
from gr00t_fast.errors import ConfigError
from gr00t_fast.optional import require

MIN_FRAMES = 128  # fewer do not show an activation's range
MIN_EPISODES = 8  # neighbouring frames are nearly the same picture: frames of few episodes count for few
_FOREIGN_SHARE = 0.1  # of the joint values may lie further outside the statistics than their own width before a source is refused
_EXAMPLE_INSTRUCTION = "Place the block in the bowl"


class Frames(Protocol):
    """Random access to observations in the policy's own dictionary form (unbatched)."""

    name: str
    synthetic: bool
    episode_lengths: list[int]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Frame number `index`, counted over all episodes."""


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
        return {
            "source": self.source,
            "synthetic": self.synthetic,
            "seed": self.seed,
            "frames": len(self.indices),
            "episodes": self.episodes,
            "warnings": self.warnings,
        }


def open_frames(source: str, config: DataConfig, facts: PolicyFacts, camera_map: Mapping[str, str] | None = None) -> Frames:
    """`source` is a directory or `random:SEED`. Raises ConfigError for anything else, with what was looked for."""
    if source.startswith("random:"):
        seed = source.removeprefix("random:")
        if not seed.isdecimal():
            raise ConfigError(f"--calibration '{source}': expected random:SEED with a whole number, e.g. random:0.")
        return RandomFrames(int(seed), config, facts)
    path = Path(source)
    if (path / "meta" / "info.json").is_file():
        return LeRobotFrames(path, config, facts, camera_map or {})
    if path.is_dir() and any(path.glob("*.npz")):
        return RecordedFrames(path, config)
    raise ConfigError(
        f"'{source}' is neither a LeRobotDataset (no meta/info.json), nor a directory of recordings (no *.npz), nor random:SEED. "
        "Name one of these as the source of observations."
    )


def draw(frames: Frames, count: int, seed: int, allow_few: bool, least: int = MIN_FRAMES) -> Sample:
    """Choose `count` frames uniformly over all frames of all episodes, without repetition. Raises ConfigError when there are too few."""
    total = sum(frames.episode_lengths)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    starts = np.cumsum([0, *frames.episode_lengths])
    episodes = len(np.unique(np.searchsorted(starts, chosen, side="right")))
    lacks = []
    if len(chosen) < least:
        lacks.append(f"{len(chosen)} frames, expected at least {least}")
    if episodes < MIN_EPISODES and not frames.synthetic:
        lacks.append(f"frames of {episodes} episodes, expected at least {MIN_EPISODES}")
    if lacks and not allow_few:
        raise ConfigError(f"{frames.name}: {'; '.join(lacks)}. Record more, or say --allow_few and expect clipped activations.")
    if frames.synthetic:
        lacks.append("synthetic observations: ranges of real pictures may differ")
    return Sample(frames.name, frames.synthetic, seed, [int(i) for i in chosen], episodes, lacks)


def read(frames: Frames, sample: Sample, facts: PolicyFacts) -> Iterator[dict[str, Any]]:
    """The chosen observations, in order. Raises ConfigError when most joints are far outside what the checkpoint was trained on."""
    far = values = 0
    for index in sample.indices:
        observation = frames[index]
        for part, statistics in facts.state_statistics.items():
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


class RandomFrames:
    """Textured pictures, joints uniform within the statistics. Each frame is an episode of its own."""

    synthetic = True

    def __init__(self, seed: int, config: DataConfig, facts: PolicyFacts, count: int = 100_000) -> None:
        self.name, self._seed, self._config, self._facts = f"random:{seed}", seed, config, facts
        self.episode_lengths = [1] * count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng((self._seed, index))
        observation: dict[str, Any] = {self._config.language_key: [_EXAMPLE_INSTRUCTION]}
        for key in self._config.video_keys:
            width, height = self._facts.resolutions[key.split(".", 1)[1]]
            observation[key] = textured_picture(generator, width, height)[None]
        for part, statistics in self._facts.state_statistics.items():
            observation[f"state.{part}"] = generator.uniform(statistics.min, statistics.max)[None]
        return observation


def textured_picture(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): waves of several scales, patches with edges, and noise: neither flat nor white."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    picture = np.full((height, width, 3), generator.uniform(40, 200, 3), np.float32)
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


class RecordedFrames:
    """A directory of `.npz` episodes; one episode is held in memory at a time."""

    synthetic = False

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.name, self._config = str(path), config
        self._files = sorted(path.glob("*.npz"))
        self.episode_lengths = [self._length(file) for file in self._files]
        self._starts = np.cumsum([0, *self.episode_lengths])
        self._held: tuple[int, dict[str, np.ndarray]] | None = None

    def _length(self, file: Path) -> int:
        with self._open(file) as arrays:
            needed = [*self._config.video_keys, *self._config.state_keys, self._config.language_key]
            if absent := [key for key in needed if key not in arrays.files]:
                raise ConfigError(f"{file}: {', '.join(absent)} missing. Expected {', '.join(needed)}; got {', '.join(arrays.files) or 'nothing'}.")
            return len(arrays[self._config.state_keys[0]])

    def _open(self, file: Path) -> np.lib.npyio.NpzFile:
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a readable .npz recording ({error}).") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._held is None or self._held[0] != number:
            with self._open(self._files[number]) as arrays:
                self._held = (number, {key: arrays[key] for key in arrays.files})
        episode, row = self._held[1], index - int(self._starts[number])
        observation: dict[str, Any] = {key: episode[key][row][None] for key in (*self._config.video_keys, *self._config.state_keys)}
        texts = np.atleast_1d(episode[self._config.language_key])
        observation[self._config.language_key] = [str(texts[row] if len(texts) > 1 else texts[0])]
        return observation


class LeRobotFrames:
    """A LeRobotDataset v3 on the disk. `meta/modality.json` (NVIDIA's convention), where present, says which columns a part has."""

    synthetic = False

    def __init__(self, path: Path, config: DataConfig, facts: PolicyFacts, camera_map: Mapping[str, str]) -> None:
        self.name, self._config, self._facts = str(path), config, facts
        info = json.loads((path / "meta" / "info.json").read_text())
        if not str(info.get("codebase_version", "")).startswith("v3"):
            raise ConfigError(f"{path}: LeRobotDataset {info.get('codebase_version')}, expected v3. Convert it with lerobot's conversion script.")
        modality = path / "meta" / "modality.json"
        self._modality = json.loads(modality.read_text()) if modality.is_file() else {}
        self._cameras = self._camera_keys([key.rpartition(".")[2] for key in info["features"] if key.startswith("observation.images.")], camera_map)
        # pyav: torchcodec is there without the FFmpeg libraries it needs on many machines, and fails on the first frame
        self._data = require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDataset(f"local/{path.name}", root=path, video_backend="pyav")
        self.episode_lengths = [int(length) for length in self._data.meta.episodes["length"]]

    def _camera_keys(self, found: list[str], camera_map: Mapping[str, str]) -> dict[str, str]:
        """Policy's key -> the data set's key."""
        given = {policy: data for data, policy in camera_map.items()}
        told = {name: entry.get("original_key", "").rpartition(".")[2] for name, entry in self._modality.get("video", {}).items()}
        keys, names = {}, [key.split(".", 1)[1] for key in self._config.video_keys]
        for name in names:
            data = given.get(name) or told.get(name) or (name if name in found else None)
            if data is None and len(names) == len(found) == 1:
                data = found[0]
            if data not in found:
                raise ConfigError(
                    f"{self.name}: no camera for '{name}'. The data set has {', '.join(found) or 'none'}. "
                    f'Say which is which with --camera_map="{{<data set camera>: {name}}}".'
                )
            keys[f"video.{name}"] = f"observation.images.{data}"
        return keys

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._data[index]
        observation: dict[str, Any] = {self._config.language_key: [row.get("task") or _EXAMPLE_INSTRUCTION]}
        for key, feature in self._cameras.items():
            pixels = (row[feature] * 255.0).round().clamp(0, 255).byte()  # lerobot gives float (3, H, W) in 0..1
            observation[key] = pixels.permute(1, 2, 0).contiguous().numpy()[None]
        observation.update(self._state(np.asarray(row["observation.state"], np.float64)))
        return observation

    def _state(self, values: np.ndarray) -> dict[str, np.ndarray]:
        widths, told, parts, start = self._facts.state_widths, self._modality.get("state", {}), {}, 0
        if not told and sum(widths.values()) != len(values):
            raise ConfigError(
                f"{self.name}: observation.state has {len(values)} values, the policy has {widths}. Expected as many, or a modality.json."
            )
        for part, width in widths.items():
            span = told.get(part, {"start": start, "end": start + width})
            parts[f"state.{part}"] = values[span["start"] : span["end"]][None]
            start += width
        return parts
