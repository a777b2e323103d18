"""What is written is whole or not there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import atomic_write, is_running, whole_directory


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "state.json"
    for text in ("first", "second"):
        with atomic_write(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    with pytest.raises(OSError), atomic_write(path) as partial:  # the block fails half way
        partial.write_bytes(b"half") and (partial / "not" / "there").write_text("half")
    assert [path.read_text() for path in path.parent.iterdir()] == ["second"]


def test_an_output_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    out, ended = tmp_path / "out", subprocess.Popen([sys.executable, "-c", ""])
    if Path("/proc/self/stat").exists():  # Linux: it has ended, and keeps its number until it is asked for
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(ended.pid)
    ended.wait()
    (tmp_path / f".out.partial-{ended.pid}").mkdir()  # as a kill that cannot be caught leaves it
    running = tmp_path / f".out.partial-{os.getppid()}"
    running.mkdir()
    with pytest.raises(FileExistsError), whole_directory(out, overwrite=False) as directory:
        directory.mkdir()  # anything that raises
    assert list(tmp_path.iterdir()) == [running]
    for content, overwrite in (("first", False), ("second", True)):
        with whole_directory(out, overwrite) as directory:
            (directory / "manifest.json").write_text(content)
            assert not out.exists() or (out / "manifest.json").read_text() != content
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for path, overwrite, told in ((precious, True, "delete"), (out, False, "--overwrite"), (out / "manifest.json", True, "is a file")):
        with pytest.raises(ConfigError, match=told), whole_directory(path, overwrite):
            pytest.fail("nothing is done before it is refused")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_old_directory_survives_a_swap_that_fails(tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever rename; the third puts the old one back, and the process ends there, too: then the next write does it."""
    out, calls, rename = tmp_path / "out", itertools.count(1), Path.rename
    out.mkdir()
    (out / "manifest.json").write_text("old")

    def broken(source: Path, target: Path) -> Path:
        if next(calls) in (failing, 2):
            raise OSError("no space left")
        return rename(source, target)

    def replace() -> None:
        with whole_directory(out, overwrite=True) as directory:
            (directory / "manifest.json").write_text("new")
            monkeypatch.setattr(Path, "rename", broken)

    with pytest.raises(OSError, match="no space left"):
        replace()
    monkeypatch.undo()
    if failing == 3:
        (aside,) = tmp_path.glob(".out.partial-*-old")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        aside.rename(tmp_path / f".out.partial-{ended.pid}-old")
        with pytest.raises(ConfigError, match="--overwrite"), whole_directory(out, overwrite=False):
            pytest.fail("the old one is there again, and may not be replaced")
    assert (out / "manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
