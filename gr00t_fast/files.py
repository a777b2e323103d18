"""Files and directories that are whole or not there: written under a hidden name beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from gr00t_fast.errors import ConfigError

MANIFEST_NAME = "manifest.json"  # lies in every export, and is what one is recognised by


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` where the block makes a file or a directory, which replaces `path` when the block ends well.

    When it does not, what was made is removed and `path` stays as it was. A process that is killed leaves the hidden path behind; the next write of
    the same `path` removes it. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        if path.is_dir():  # a directory cannot be renamed onto one that has content
            old = path.with_name(f"{partial.name}-old")
            path.rename(old)
            partial.rename(path)
            _remove(old)
        else:
            partial.replace(path)
    finally:
        _remove(partial)


@contextlib.contextmanager
def whole_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` when the block ends well, as `atomic_write`.

    Raises ConfigError as `check_free`, before and after the block.
    """
    check_free(out, overwrite)
    with atomic_write(out.resolve()) as partial:
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
        owner = found.name.removeprefix(f".{path.name}.partial-").removesuffix("-old")
        if owner.isdigit() and not is_running(int(owner)):
            _remove(found)


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
