"""Output that nobody takes: it must not hold up the loop, nor the end of the program."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr00t_fast.base.console import Console

ROOT = Path(__file__).resolve().parents[3]
# The whole program with a fake arm and policy in real time, one line of output per tick and more than any pipe holds.
PROGRAM = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from gr00t_fast.cli import run as script
from control_fakes import FakeClock, FakePolicy, FakeRobot
from gr00t_fast.cli.main import leave
robot = FakeRobot(FakeClock())
land = robot.land
def talk():
    if not robot.sent:
        open({log!r} + ".began", "w").write(str(time.time()))
    elif {bug!r}:
        raise ZeroDivisionError
    print("x" * 5000)
    print("y" * 5000, file=sys.stderr)
robot.on_send = talk
robot.land = lambda *_: open({log!r}, "w").write(str(time.time())) and land()
script.load = lambda config: FakePolicy(FakeClock())
script.build_robot = lambda config: robot
leave(script.main(["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go", *{flags!r}]))
"""


def start(log: Path, *flags: str, bug: bool = False, **streams: object) -> subprocess.Popen[bytes]:
    code = PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests" / "support"), log=str(log), flags=list(flags), bug=bug)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, **streams)


def test_a_closed_stream_and_letters_that_the_terminal_lacks_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    with Console() as console:
        print("into nothing")
        print("a gauche: \xe0 gauche", file=sys.stderr)
        kept = sys.stderr
    print("later", file=kept)  # a logging handler keeps the stream that it was made with
    assert console.failure is None
    assert raw.getvalue() == b"a gauche: \\xe0 gauche\nlater\n"


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that takes nothing any more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize(("bug", "code"), [(False, 0), (True, 1)])
def test_a_pipe_that_nobody_reads_holds_up_neither_the_run_nor_its_end(bug: bool, code: int, tmp_path: Path) -> None:
    """As a terminal that is stopped (Ctrl-S)."""
    with full_pipe() as writer:
        program = start(tmp_path / "landed", "--timeout=1", f"--out={tmp_path / 'out'}", bug=bug, stdout=writer, stderr=writer)
        try:
            assert program.wait(60) == code
        finally:
            program.kill()
    landed_s, began_s = float((tmp_path / "landed").read_text()), float((tmp_path / "landed.began").read_text())
    assert landed_s - began_s < 1 + 10
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_closed_terminal_lands_with_its_own_exit_code(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with (tmp_path / "errors").open("w") as errors:
        program = start(tmp_path / "landed", stdout=slave, stderr=errors, preexec_fn=lambda: _own_terminal(slave))
    os.close(slave)
    while os.read(master, 65536).find(b"xxx") < 0:
        continue
    os.close(master)  # the window is closed: SIGHUP, and every write fails
    try:
        assert program.wait(60) == 129
    finally:
        program.kill()
    assert (tmp_path / "landed").exists()
    assert "Traceback" not in (tmp_path / "errors").read_text()


def _own_terminal(slave: int) -> None:
    import fcntl

    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def test_a_full_disk_behind_the_output_is_said(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        program = start(tmp_path / "landed", stdout=full, stderr=subprocess.PIPE)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 1
    assert b"Traceback" not in said
    assert os.strerror(errno.ENOSPC).encode() in said
