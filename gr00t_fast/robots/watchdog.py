"""Starts and feeds the watchdog process, which takes the torque off when this program is killed, crashes, freezes or is stuck in native code.

The process itself and its protocol are in watchdog_process.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gr00t_fast.errors import RobotError, require
from gr00t_fast.robots.watchdog_process import CALL, DISMISS

log = logging.getLogger(__name__)

START_S = 10.0  # an interpreter on a machine that is busy
_LOOK_S = 0.1  # meanwhile, between two looks at whether the run is to stop
_BEAT_EVERY_S = 0.05  # a write costs some 5 us here and wakes the other process; a limit of a second needs no more
_END_S = 1.0
# Frozen: so many heartbeats over so long without an answer. Not time alone, for a machine that stood still as a whole held up both.
UNANSWERED_S, UNANSWERED_BEATS = 1.5, 8


class Watchdog:
    """Watches from `start` to `end`. From the first `beat` on it expects one every `limit_s`; without any it only watches for the end of
    this process."""

    def __init__(self, port: str, servo_ids: list[int], limit_s: float, holds: bool) -> None:
        """`holds`: the arm is to keep its pose when the program is gone (disable_torque_on_disconnect=false). Starts nothing."""
        self._port, self._ids, self._limit_s, self._holds = port, servo_ids, limit_s, holds
        self._process: subprocess.Popen[bytes] | None = None
        self._last_s = -math.inf
        self._lives = True
        self._expected = False  # whether there are to be heartbeats
        self._unanswered: list[float] = []  # when the beats since its last answer were sent

    def start(self, check_stop: Callable[[], object]) -> None:
        """Returns once it watches; a second call does nothing. `check_stop` is called meanwhile. Raises RobotError when it does not watch within
        START_S."""
        if self._process is not None:
            return
        if os.name != "posix":
            log.warning("there is no watchdog on this system: a program that is killed or crashes leaves the arm powered")
            return
        if os.getpid() == 1:
            log.warning(
                "this program is the first process of a container: when it crashes, the kernel ends the watchdog with it and the arm stays "
                "powered, and when it hangs nobody can end it. Start the container with an init process (docker run --init)"
            )
        program, pyserial = str(Path(__file__).with_name("watchdog_process.py")), str(Path(require("serial", "robot").__file__).parent.parent)
        command = [sys.executable, "-I", program, self._port, "hold" if self._holds else "off", pyserial, *map(str, self._ids)]
        # a session of its own: what is typed in the terminal, and signals to the program's group, are not for it
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
            self._wait_until_ready(self._process, check_stop)
            for pipe in (self._process.stdin, self._process.stdout):
                os.set_blocking(pipe.fileno(), False)
        except BaseException:  # a signal, too: it must not take the end of its input for the end of this program
            if self._process is not None:
                self._process.kill()
            self.end()
            raise

    @staticmethod
    def _wait_until_ready(process: subprocess.Popen[bytes], check_stop: Callable[[], object]) -> None:
        poll, give_up_s = select.poll(), time.monotonic() + START_S
        poll.register(process.stdout, select.POLLIN)
        while not poll.poll(1000 * _LOOK_S):
            check_stop()
            if time.monotonic() > give_up_s:
                raise RobotError(f"the watchdog process did not start within {START_S:g} s; the arm is not switched on without it. Try again.")
        if not process.stdout.read(64):
            raise RobotError("the watchdog process ended while it started (why stands above); the arm is not switched on without it.")

    def beat(self) -> bool:
        """Heartbeat of a control loop. Returns False once the watchdog process has ended, or no longer answers."""
        self._expected = True
        return self._beat()

    def exchanging(self) -> None:
        """Heartbeat of an exchange with the servos, where heartbeats are expected. A watchdog that has ended is reported by `beat`, not here:
        landing exchanges, too."""
        if self._expected:
            self._beat()

    def _beat(self) -> bool:
        now_s = time.monotonic()
        if self._process is None or now_s - self._last_s < _BEAT_EVERY_S:
            return self._lives
        self._last_s = now_s
        try:
            os.write(self._process.stdin.fileno(), struct.pack("<f", self._limit_s))
        except OSError:
            self._lives = False
        if self._process.stdout.read(4096):
            self._unanswered.clear()
        self._unanswered.append(now_s)
        self._lives &= len(self._unanswered) <= UNANSWERED_BEATS or now_s - self._unanswered[0] <= UNANSWERED_S
        return self._lives

    def end(self, powered: bool = False) -> None:
        """The arm has landed. `powered`: it could not be; the other process goes on trying for a while, a cable may be put back. Never raises."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            os.write(process.stdin.fileno(), CALL if powered else DISMISS)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        if powered:
            return
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
