"""Files written whole or not at all (under a hidden name beside their place, then renamed), and small files of others read without trust: regular
files of bounded size, and JSON without numbers that are none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gr00t_fast.errors import ConfigError

MANIFEST_NAME = "manifest.json"  # lies in every export, and is what one is recognised by
MAX_BYTES = 2**24  # the largest published configuration has 100 kB
LFS_POINTER, LFS_REMEDY = b"version https://git-lfs", "it is git-lfs's pointer, not the file: run `git lfs pull` where it was cloned"
_OLD = "-old"  # ends the name of a directory that makes room for the new one
_TOKENIZER_BYTES = 2**26  # Qwen's tokenizer.json has 11 MB


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` where the block makes a file or a directory, which replaces `path` when the block ends well.

    When it does not, what was made is removed and `path` stays as it was. A process that is killed leaves hidden paths behind; the next write of the
    same `path` removes them, and puts a directory back that was moved aside. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    old = path.with_name(f"{partial.name}{_OLD}")
    try:
        yield partial
        if path.is_dir():  # a directory cannot be renamed onto one that has content
            path.rename(old)
            partial.rename(path)
        else:
            partial.replace(path)
    finally:
        _settle(old, path)
        _remove(partial)


@contextlib.contextmanager
def whole_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` when the block ends well, as `atomic_write`.

    Raises ConfigError as `check_free`, before and after the block.
    """
    check_free(out, overwrite)
    with atomic_write(out.resolve()) as partial:
        check_free(out, overwrite)  # one that a killed process had moved aside is back
        partial.mkdir()
        yield partial
        check_free(out, overwrite)  # again: minutes have passed


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ConfigError for an output directory that cannot be made or may not be replaced. With `overwrite` an earlier export may be."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file. Expected a directory, existing or not.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"--out={out} exists and is not empty. Choose another --out, or say --overwrite.")
    if not (out / MANIFEST_NAME).is_file():
        raise ConfigError(f"--out={out} holds files but no export (no {MANIFEST_NAME}): --overwrite would delete them. Choose another --out.")


def check_kept(files: Iterable[Path], flag: str, overwrite: bool) -> None:
    """Raises ConfigError where one of the `files` that `flag` leads to is there already; with `overwrite` they may be replaced."""
    earlier = next((file for file in files if file.is_file()), None)
    if earlier is not None and not overwrite:
        raise ConfigError(f"{earlier} is of an earlier run. Choose another {flag}, or say --overwrite.")


def _remove_abandoned(path: Path) -> None:
    for found in path.parent.glob(f".{path.name}.partial-*"):
        owner = found.name.removeprefix(f".{path.name}.partial-").removesuffix(_OLD)
        if owner.isdigit() and not is_running(int(owner)):
            _settle(found, path) if found.name.endswith(_OLD) else _remove(found)


def _settle(old: Path, path: Path) -> None:
    """`old`, which was moved aside for a new `path`, goes back where that has not come."""
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number that has not ended: one that was killed keeps its number until its parent asks for it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:  # gone by now, or a system without /proc
        return not Path("/proc/self/stat").exists()


# --- small files of others -----------------------------------------------------------------------------------------------------------------


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """UTF-8 text of a regular file. Raises OSError, and ValueError for a file that is too large or no text.

    A named pipe without a writer would hold the program up for ever, a device never ends: both are refused.
    """
    return _beginning(path, max_bytes, max_bytes).decode("utf-8")


def read_json(path: Path, nan: bool = False) -> Any:
    """nan: as of `parse_json`. Raises like `read_text` and `parse_json`."""
    return parse_json(read_text(path), nan=nan)


def check_tokenizer_file(path: Path) -> None:
    """For files that a library opens itself. Raises like `read_text`."""
    _beginning(path, len(LFS_POINTER), _TOKENIZER_BYTES)


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


def _beginning(path: Path, read_bytes: int, max_bytes: int) -> bytes:
    """Of a regular file that has at most `max_bytes`."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise OSError(f"{path} is a directory, a pipe or a device, expected a file")
    if state.st_size > max_bytes:
        raise ValueError(f"{state.st_size} bytes, expected at most {max_bytes}")
    with open(path, "rb") as file:
        content = file.read(read_bytes)
    if content.startswith(LFS_POINTER):
        raise ValueError(LFS_REMEDY)
    return content
