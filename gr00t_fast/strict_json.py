"""Small files of others, read without trust: regular files of bounded size, and JSON without numbers that are none."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 2**24  # the largest published configuration has 100 kB
LFS_POINTER, LFS_REMEDY = b"version https://git-lfs", "it is git-lfs's pointer, not the file: run `git lfs pull` where it was cloned"
_TOKENIZER_BYTES = 2**26  # Qwen's tokenizer.json has 11 MB


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """UTF-8 text of a regular file. Raises OSError, and ValueError for a file that is too large or no text.

    A named pipe without a writer would hold the program up for ever, a device never ends: both are refused.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()), max_bytes)
        content = file.read(max_bytes)
    if content.startswith(LFS_POINTER):
        raise ValueError(LFS_REMEDY)
    return content.decode("utf-8")


def read_json(path: Path, nan: bool = False) -> Any:
    """nan: as of `parse_json`. Raises like `read_text` and `parse_json`."""
    return parse_json(read_text(path), nan=nan)


def check_tokenizer_file(path: Path) -> None:
    """For files that a library opens itself. Raises like `read_text`."""
    _check_regular(path, os.stat(path), _TOKENIZER_BYTES)
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(LFS_REMEDY)


def parse_json(text: str | bytes | bytearray, convert: Callable[[dict[str, Any]], Any] = lambda found: found, nan: bool = False) -> Any:
    """JSON whose numbers are finite (nan: or NaN, as Python's json module writes it) and whose objects name each key once. `convert` gets each
    object. Raises ValueError and what `convert` raises."""

    def constant(name: str) -> float:
        if nan and name == "NaN":
            return math.nan
        raise ValueError(f"{name} is no number of JSON")

    def one_of_each(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key '{twice[:80]}' is given twice")
        return convert(found)

    try:
        return json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=one_of_each)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:80]} is too large")
    return value


def _check_regular(path: Path, state: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise OSError(f"{path} is a directory, a pipe or a device, expected a file")
    if state.st_size > max_bytes:
        raise ValueError(f"{state.st_size} bytes, expected at most {max_bytes}")
