"""Somebody at the terminal of a run."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

from waiting import PATIENCE_S, children

ROOT = Path(__file__).resolve().parents[2]


class Person:
    """Reads what a command says, presses keys, and kills it."""

    def __init__(self, words: list[str]) -> None:
        self._end, program = pty.openpty()
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=program, stdout=program, stderr=program, start_new_session=True, preexec_fn=_foreground
        )
        os.close(program)
        self.said = ""

    def wait_for(self, text: str) -> None:
        """Said after what was waited for before."""
        end_s = time.monotonic() + PATIENCE_S
        while text not in self.said:
            assert time.monotonic() < end_s, self.said
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self._end, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.said, self.said
                    break
        self.said = self.said.partition(text)[2]

    def press(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def kill(self) -> None:
        """The program and, a moment later, the process beside it: as when the machine goes down."""
        beside = children(self.process.pid)
        for process in (*beside, self.process.pid):
            os.kill(process, signal.SIGSTOP)
        for process in (*beside, self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.wait()


def _foreground() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
