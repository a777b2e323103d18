"""Waiting for other processes and threads: until it is so, with a limit that only a program that hangs reaches."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 120.0  # a start of Python beside other work takes ten seconds and more


def until(done: Callable[[], object], what: str = "it", patience_s: float = PATIENCE_S) -> None:
    """Raises AssertionError that says `what` did not happen."""
    end_s = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < end_s, f"{what} did not happen"
        time.sleep(0.02)


def is_there(below: Path, pattern: str) -> bool:
    """Whether a file of this name is anywhere below a directory. Unlike rglob it bears directories that another process deletes meanwhile."""
    return any(fnmatch.fnmatch(name, pattern) for _, _, names in os.walk(below) for name in names)


def beside() -> int:
    """The number of the process that this one has started last with multiprocessing, as a Sink does."""
    return max(process.pid or 0 for process in multiprocessing.active_children())


def children(process: int) -> list[int]:
    """Numbers of the processes that a process has started. Linux alone."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
