"""An output directory that is either whole or not there: filled under another name and renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gr00t_fast.engine.manifest import MANIFEST_NAME
from gr00t_fast.errors import ConfigError


@contextlib.contextmanager
def whole_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory beside `out` that becomes `out` when the block ends well and is removed when it does not.

    A process killed outright leaves it behind under its hidden name, where nothing takes it for an export; the next one removes it.
    Raises ConfigError when `out` exists and `overwrite` is false.
    """
    check_free(out, overwrite)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        check_free(out, overwrite)  # again: minutes have passed
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ConfigError for an output that is there already, or can never be a directory."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file. Expected a directory, existing or not.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out={out} exists and is not empty. Choose another --out, or say --overwrite.")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():  # somebody's files, not an earlier export
        raise ConfigError(f"--out={out} holds files but no export (no {MANIFEST_NAME}): --overwrite would delete them. Choose another --out.")


def _replace(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.partial-{os.getpid()}-old"
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    for found in out.parent.glob(f".{out.name}.partial-*"):
        owner = found.name.removeprefix(f".{out.name}.partial-").removesuffix("-old")
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(found, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's, but alive
    return True
