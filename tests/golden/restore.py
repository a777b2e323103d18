"""Write the recordings of the reference anew, from the reduced ones beside this file: the directories of SHARED_DIR (see README.md).

What can be computed from the seeds is computed (`seeds.py`), and the stored difference added, bit by bit: every number that tests read is the
reference's own, whatever machine restores it; a digest says so. `reduce.py` goes the same way to find the differences.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden import seeds

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("GR00T_FAST_SHARED") or HERE.parents[2] / "shared")  # the unreduced recordings, where somebody has them
Arrays = dict[str, np.ndarray]
UNREAD_WORD = 2.0**100  # of an embedding, whose squares overflow; an export refuses NaN there
# Random bits compress best without a search for context among their neighbours.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]


class Differences:
    """Name -> what is to be added to the bits of a prediction. With `truth` they are found, else applied."""

    def __init__(self, stored: Arrays, truth: Mapping[str, np.ndarray] | None = None) -> None:
        self.stored, self._truth = stored, truth

    def __call__(self, name: str, predicted: np.ndarray) -> np.ndarray:
        """What it really is, of the same shape and type."""
        bits = _bits(predicted)
        if self._truth is not None:
            true = self._truth[name]
            assert (true.shape, true.dtype) == (predicted.shape, predicted.dtype), name
            difference = _bits(true) - bits
            if difference.any():
                self.stored[name] = difference
        added = bits + self.stored[name] if name in self.stored else bits
        return added.view(predicted.dtype).reshape(predicted.shape)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def read(file: Path) -> tuple[dict[str, Any], Arrays]:
    """What a case is (see CASES in reduce.py), and its differences."""
    with np.load(io.BytesIO(lzma.decompress(file.read_bytes(), lzma.FORMAT_XZ))) as z:
        planes = {name: z[name] for name in z}
    about = json.loads(planes.pop("about").tobytes())
    return about, {name: np.ascontiguousarray(each.T).view(f"u{len(each)}")[:, 0] for name, each in planes.items()}


def write(file: Path, about: dict[str, Any], stored: Arrays) -> None:
    """Numbers byte by byte, the highest together: those repeat, the lowest do not."""
    planes = {name: np.ascontiguousarray(each.view(np.uint8).reshape(len(each), -1).T) for name, each in stored.items()}
    whole = io.BytesIO()
    np.savez(whole, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **planes)
    file.write_bytes(lzma.compress(whole.getvalue(), lzma.FORMAT_XZ, filters=_FILTERS))


def restore(name: str, into: Path) -> Path:
    """The directory `name` of SHARED_DIR, in `into`. Raises AssertionError where this machine's NumPy draws other numbers from a seed."""
    if name in (tokenizers := json.loads((HERE / "tokenizers.json").read_text())):
        _write_tokenizer(tokenizers[name], into / name)
    for file in sorted(HERE.glob(f"{name}.*.xz")):
        about, stored = read(file)
        arrays, tensors = build(about, Differences(stored))
        assert digest(arrays, tensors) == about["digest"], f"{file.name}: NumPy {np.__version__} does not give what was recorded"
        write_case(about, arrays, tensors, into / name / file.name.split(".")[1])
    return into / name


def _write_tokenizer(tokenizer: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *tokenizer["merges"], ""]), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokenizer["added"]}))


def write_case(about: dict[str, Any], arrays: dict[str, Arrays], tensors: Arrays, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for path, text in about["texts"].items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    for path, content in about["binary"].items():
        (directory / path).write_bytes(bytes.fromhex(content))
    for path, members in arrays.items():
        np.savez(directory / path, **members)
    for path, members in about["weights"].items():
        made = {key: torch.from_numpy(tensors[drawn]) for key, drawn in members.items()}
        made = {key: tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor for key, tensor in made.items()}
        save_file(made, directory / path, metadata={"format": "pt"})


def digest(arrays: dict[str, Arrays], tensors: Arrays) -> str:
    """Of all numbers."""
    found = hashlib.sha256()
    for members in (*arrays.values(), tensors):
        for name, values in members.items():
            found.update(f"{name} {values.dtype.str} {values.shape}".encode())
            found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


# --- one case


def build(about: dict[str, Any], differences: Differences) -> tuple[dict[str, Arrays], Arrays]:
    """File -> its arrays; parameter -> bits of bfloat16 as int16, or float32."""
    tensors = {name: each for name, each in _tensors(about, differences)}
    files: dict[str, Arrays] = {}
    for path, members in about["arrays"].items():
        made = files[path] = {}
        predict = _frames(about) if path == "observation.npz" else _expected(about, files, made, differences)
        for name, (dtype, shape, *text) in members.items():
            if text:
                made[name] = np.array(text[0], dtype).reshape(shape)
            else:
                predicted = predict(name, tuple(shape))
                predicted = np.zeros(shape, dtype) if predicted is None else np.ascontiguousarray(predicted, dtype).reshape(shape)
                made[name] = differences(f"{path}/{name}", predicted)
    return files, tensors


def _tensors(about: dict[str, Any], differences: Differences) -> Iterator[tuple[str, np.ndarray]]:
    """In the order in which they were drawn. Rows that nothing may read are filled so that reading one cannot go unseen."""
    normals, tables = seeds.TorchNormals(about["seed"]), about["rows"]
    for name, shape, is_stored in about["draws"]:
        rows = next((np.array(rows) for ending, rows in tables.items() if name.endswith(ending)), np.arange(shape[0]))
        drawn = normals.draw(tuple(shape), (rows if is_stored else rows[:0]) if len(shape) > 1 else None)
        if not is_stored:
            continue
        mean, deviation = seeds.spread(name, tuple(shape), about["program"])
        single = (np.float32(mean) + np.float32(deviation) * drawn.astype(np.float32)).view(np.uint32)
        half = ((single + (0x7FFF + (single >> 16 & 1))) >> 16).astype(np.uint16)  # rounded to bfloat16, a half to the even number
        value = half.view(np.int16) if about["bfloat16"] else (half.astype(np.uint32) << 16).view(np.float32)
        value = differences(name, value)
        if len(rows) < shape[0]:
            fill = np.float32(UNREAD_WORD if name.endswith("weight") else np.nan)
            whole = np.full(shape, fill.view(np.int32) >> 16 if about["bfloat16"] else fill, value.dtype)
            whole[rows] = value
            value = whole
        yield name, value


def _frames(about: dict[str, Any]) -> Callable[[str, tuple[int, ...]], np.ndarray | None]:
    """Of the cameras, one after the other."""
    bits = np.random.PCG64(about["seed"]).advance(about["skip"])
    if about["half"] is not None:  # of the last 64 bits one half was left
        bits.state = {**bits.state, "has_uint32": 1, "uinteger": about["half"]}
    random = np.random.Generator(bits)

    def predict(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if len(shape) < 3 or shape[-1] != 3:
            return None
        return np.stack([seeds.frame(random, *shape[-3:-1], about["noise"]) for _ in range(math.prod(shape[:-3]))])

    return predict


def _expected(about: dict[str, Any], files: dict[str, Arrays], made: Arrays, differences: Differences) -> Callable[[str, tuple[int, ...]], Any]:
    """Of what the reference made of an observation: pictures, and what is other recorded numbers in another order."""
    observation, first = files["observation.npz"], files.get("expected.npz", {})
    letterbox, kind = about["letterbox"], about["program"]
    cameras = [observation[name].reshape(-1, *observation[name].shape[-3:]) for name in about["cameras"]]  # (T, H, W, 3) each
    frames = [camera[time] for time in range(len(cameras[0])) for camera in cameras]

    def predict(name: str, shape: tuple[int, ...]) -> Any:
        if first is not made and name in first and first[name].shape == shape:
            return first[name]
        if name.startswith("video_224."):
            return seeds.cropped(observation[name.replace("_224", "")][0])
        if name in ("images_256", "images"):
            return [seeds.squashed(frame) if letterbox is None else seeds.by_area(frame, letterbox) for frame in frames]
        if name == "images_28":
            return [seeds.by_bicubic(image, *shape[1:3]) for image in made["images_256"]]
        if name == "in.eagle_pixel_values":
            pictures = [made[f"video_224.{camera.removeprefix('video.')}"][0, 0] for camera in about["cameras"]] if kind == "n1d5" else squashed()
            return _normalised(np.stack(pictures)).transpose(0, 3, 1, 2)
        if name == "in.pixel_values" and kind == "n1d6":
            return _normalised(made["images_28"]).transpose(0, 3, 1, 2)
        if name == "vision_shuffled":
            pictures = np.split(made["vision_tower"], len(made["grids"]))
            return np.concatenate([_joined(x, *grid) for x, grid in zip(pictures, made["grids"], strict=True)])
        return patches() if name == "in.pixel_values" else None

    def squashed() -> np.ndarray:
        return differences("pictures", np.stack([seeds.squashed(frame, 224, None) for frame in frames]))

    def patches() -> np.ndarray:
        pictures = made["images"] if "images" in made else made["images_256"]
        rows, columns = about["grid"]
        resized = np.stack([seeds.by_bicubic(image, 16 * rows, 16 * columns) for image in pictures])
        return _patches(_normalised(differences("pictures", resized)), rows, columns)

    return predict


def _normalised(pictures: np.ndarray) -> np.ndarray:
    return (pictures.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)


def _patches(pictures: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(C, h, w, 3) -> (C * patches, 1536), as Qwen's image processor orders them: blocks of 2 x 2 patches; of each its colours, twice, its rows."""
    x = pictures.reshape(-1, rows // 2, 2, 16, columns // 2, 2, 16, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]  # C, blocks down and across, patches down and across, colour, time, pixels
    return np.repeat(x, 2, axis=6).reshape(-1, 3 * 2 * 16 * 16)


def _joined(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(patches, D) row by row -> (tokens, 4 * D): of 2 x 2 patches the channel first, then down, then across."""
    x = patches.reshape(rows // 2, 2, columns // 2, 2, -1)
    return x.transpose(0, 2, 4, 1, 3).reshape(rows * columns // 4, -1)
