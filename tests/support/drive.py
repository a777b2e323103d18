"""Whole commands on virtual servo buses, each in a process of its own: what a test does to them, and what the servos did."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from waiting import PATIENCE_S, until
from watched_bus import Sample, started

SPEED_OVER_S = 0.1
BODY = slice(0, 5)


class Programs:
    """Starts commands, and says when they have ended."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("default_arm.py"))]
        self._errors = (directory / "programs").open("w")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1)
        self._heard: dict[str, queue.SimpleQueue[int]] = {}
        self._lock, self._numbers = threading.Lock(), itertools.count()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, **scenario: Any) -> int:
        """The number of the new process."""
        name = f"run{next(self._numbers)}"
        self._heard[name] = queue.SimpleQueue()
        with self._lock:
            self._process.stdin.write(json.dumps({"name": name, **scenario}) + "\n")
        pid = self._heard[name].get(timeout=PATIENCE_S)
        return pid

    def status(self, pid: int) -> int:
        """How the process ended, which is waited for."""
        return self._heard[str(pid)].get(timeout=PATIENCE_S)

    def _listen(self) -> None:
        for line in self._process.stdout:
            what, first, second = line.split()
            if what == "pid":
                self._heard[first] = queue.SimpleQueue()
                self._heard[second].put(int(first))
            else:
                self._heard[second].put(int(first))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()


class Drive:
    """A command on an arm of its own, and what the servos did. `lay`, `let_go` (6,): where the joints were before, and at the last moment with power,
    in degrees and gripper per cent. `status`: exit code, or the negative number of a signal."""

    def __init__(self, programs: Programs, directory: Path, argv: list[str], powered: tuple[int, ...] = (), **scenario: Any) -> None:
        """powered: ids of servos that hold from the start."""
        directory.mkdir(parents=True)
        self._closing = contextlib.ExitStack()
        self.bus = self._closing.enter_context(started(directory, powered))
        self._log, self._port = directory / "log", self.bus.port()
        self.lay, self.status, self.torque, self.took_s = self.bus.joints(), 0, {}, 0.0
        self.samples: list[Sample] = []
        arm = ["--robot.type=so100_follower", f"--robot.port={self._port}", "--robot.id=test", f"--robot.calibration_dir={directory}"]
        self._programs, command = programs, [argv[0], *arm, *argv[1:]]
        self.pid = programs.start(argv=command, log=str(self._log), **scenario)

    # What a test does

    def moves(self, by_deg: float = 5.0) -> None:
        """Waits until the arm is that far from where it lay."""
        until(lambda: np.abs(self.bus.joints() - self.lay)[BODY].max() > by_deg or self.said("error"), "the arm moves")
        assert not self.said("error:"), self.words()

    def says(self, words: str) -> None:
        until(lambda: self.said(words), f"says {words!r}", 30.0)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def ends(self) -> None:
        """Waits for the program, and for its watchdog."""
        began_s = time.monotonic()
        self.status = self._programs.status(self.pid)
        self.took_s = time.monotonic() - began_s
        until(lambda: not self.watchdogs(), "its watchdog ends", 30.0)
        time.sleep(0.3)
        self.torque, self.samples = self.bus.torque(), self.bus.close()

    def watchdogs(self) -> list[int]:
        """Numbers of the processes beside the program that know its port."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._port.encode() in (directory / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
        return found

    # What came of it

    def words(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def said(self, words: str) -> bool:
        return words in self.words()

    @property
    def powered(self) -> np.ndarray:
        return np.array([on for _, on, _ in self.samples])

    @property
    def off_s(self) -> float:
        """When the torque went off for good."""
        return self.samples[int(np.flatnonzero(self.powered)[-1])][0]

    @property
    def let_go(self) -> np.ndarray:
        return self.samples[int(np.flatnonzero(self.powered)[-1])][2]

    @property
    def away_deg(self) -> np.ndarray:
        return np.abs(self.let_go - self.lay)

    @property
    def reached_deg(self) -> float:
        """How far the body was from where it lay, at most."""
        return float(max(np.abs(joints - self.lay)[BODY].max() for _, _, joints in self.samples))

    def fastest_deg_s(self, begin_s: float = 0.0, end_s: float = np.inf) -> float:
        """Of any joint of the body, between two times of the monotonic clock."""
        shown = [(at_s, joints) for at_s, _, joints in self.samples if begin_s <= at_s <= end_s]
        times_s, poses = np.array([at_s for at_s, _ in shown]), np.array([joints for _, joints in shown])
        later = np.searchsorted(times_s, times_s + SPEED_OVER_S)
        pairs = np.flatnonzero(later < len(times_s))
        if not len(pairs):
            return 0.0
        ways = np.abs(poses[later[pairs]] - poses[pairs])[:, BODY].max(axis=1)
        return float((ways / (times_s[later[pairs]] - times_s[pairs])).max())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._closing.close()
