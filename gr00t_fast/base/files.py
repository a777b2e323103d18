"""Files written whole or not at all (under a hidden name beside their place, then renamed), and small files of others: no pointers of
git-lfs, and JSON without numbers that are none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import ConfigError

MANIFEST_NAME = "manifest.json"  # lies in every export, and is what one is recognised by
LFS_POINTER, LFS_REMEDY = b"version https://git-lfs", "it is git-lfs's pointer, not the file: run `git lfs pull` where it was cloned"
_OLD = "-old"  # ends the name of a directory that makes room for the new one


def lerobot_home() -> Path:
    """Where lerobot keeps data sets and calibrations, found without importing it or huggingface_hub, whose variables are read (tests compare)."""
    hub = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_LEROBOT_HOME") or Path(hub) / "lerobot").expanduser()


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


def read_text(path: Path) -> str:
    """UTF-8 text. Raises OSError, and ValueError for no text, git-lfs's pointer to one among it."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise ValueError(LFS_REMEDY)
    return content.decode("utf-8")


def read_json(path: Path, nan: bool = False) -> Any:
    """nan: as of `parse_json`. Raises like `read_text` and `parse_json`."""
    return parse_json(read_text(path), nan=nan)


def check_no_pointer(path: Path) -> None:
    """Also for files that a library opens itself. Raises OSError, and ValueError for git-lfs's pointer."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(LFS_REMEDY)


def parse_json(text: str | bytes | bytearray, convert: Callable[[dict[str, Any]], Any] | None = None, nan: bool = False) -> Any:
    """JSON whose numbers are finite (nan: or NaN, as Python's json module writes it). `convert` gets each object. Raises ValueError and what
    `convert` raises."""

    def constant(name: str) -> float:
        if nan and name == "NaN":
            return math.nan
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=constant, parse_float=_finite, object_hook=convert)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:80]} is too large")
    return value
