"""Read tensors of a .safetensors file straight into memory that already exists.

The safetensors library maps the file and hands out views; copying those into a model keeps both the map and the copy resident, twice the
memory that loading needs. Reading each tensor's bytes into the parameter itself needs it once, and several threads can do it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gr00t_fast.errors import CheckpointError
from gr00t_fast.files import LFS_POINTER, LFS_REMEDY, parse_json

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 2**23  # a published file's has 150 kB
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file: `offset` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class TensorFile:
    """A .safetensors file open for positional reads. Safe to read from several threads.

    entries: its tensors by name. whole: name -> dtype of those that hold whole numbers, which no weight is made of: counters and positions.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is not a whole safetensors file."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}. Expected a readable weight file.") from error
        self.whole: dict[str, str] = {}
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, target: Tensor, entry: TensorEntry, first_row: int = 0) -> None:
        """Fill contiguous CPU tensor `target`, of the file's dtype, with the file's rows from `first_row` on."""
        view = memoryview(target.view(torch.uint8).reshape(-1).numpy())
        position = entry.offset + first_row * entry.row_bytes
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], position + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ended early while being read. Copy or download it again.")
            done += count

    def _read_header(self) -> dict[str, TensorEntry]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, _LENGTH_BYTES, 0), "little")
        if os.pread(self._descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
            raise self._damaged(LFS_REMEDY)
        if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise self._damaged(f"its header announces {length} bytes, the file has {size}")
        try:
            header = parse_json(os.pread(self._descriptor, length, _LENGTH_BYTES))
            header.pop("__metadata__", None)
            entries = {name: self._entry(name, raw, _LENGTH_BYTES + length) for name, raw in header.items()}
        except CheckpointError:  # a ValueError too, but it already says what is wrong
            raise
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header cannot be read ({error!r})") from error
        end = _LENGTH_BYTES + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
            if entry.offset != end:  # the format allows neither holes nor overlaps
                raise self._damaged(f"'{name}' begins at byte {entry.offset}, expected {end}")
            end += entry.size_bytes
        if end != size:
            raise self._damaged(f"expected {end} bytes, got {size}")
        self.whole = {name: header[name]["dtype"] for name in entries if header[name]["dtype"] in _WHOLE}
        return {name: entry for name, entry in entries.items() if name not in self.whole}

    def _entry(self, name: str, raw: dict, data_start: int) -> TensorEntry:
        dtype = (_DTYPES | _WHOLE).get(raw["dtype"])
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor '{name}' has dtype {raw['dtype']}, expected one of {', '.join(_DTYPES)}.")
        entry = TensorEntry(dtype, tuple(raw["shape"]), data_start + raw["data_offsets"][0])
        if len(entry.shape) > _MAX_DIMENSIONS or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in (*entry.shape, *raw["data_offsets"])
        ):
            raise ValueError(f"shape or place of '{name}' is no list of whole numbers")
        if entry.size_bytes != raw["data_offsets"][1] - raw["data_offsets"][0]:
            raise ValueError(f"size of '{name}' does not fit its shape")
        return entry

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or cut short: {why}. Copy or download it again.")
