"""Other processes of `ab_server.py`: servers that are started, waited for and ended, and cold starts timed from the start of a process.

Output of every process goes to a file: a pipe that nobody reads would block the process once it is full. Thread counts are set in the
environment, for OpenMP, MKL and OpenCV alike.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.errors import ServerError, ServerUnreachableError
from gr00t_fast.serving import PolicyClient

ROOT = Path(__file__).resolve().parent.parent
_PING_TIMEOUT_S = 1.0
_PROGRESS_EVERY_S = 5.0
_END_TIMEOUT_S = 10.0
_LOG_TAIL_CHARS = 2000


def thread_variables(threads: int) -> dict[str, str]:
    """What sets the thread count of every library that computes, when a process starts with it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
    return dict.fromkeys(names, str(threads))


def environment(threads: int) -> dict[str, str]:
    """This process's environment for a child with that many threads, which finds this checkout and writes its output as it comes."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **thread_variables(threads), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Addresses:
    """Free addresses per transport; use as a context manager, which removes the socket files."""

    def __enter__(self) -> Addresses:
        self._directory = Path(tempfile.mkdtemp(prefix="ab-"))  # short: an ipc path may have some hundred bytes only
        self._count = 0
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def new(self, transport: str) -> str:
        """`tcp` or `ipc`. The TCP port was free a moment ago."""
        self._count += 1
        if transport == "ipc":
            return f"ipc://{self._directory}/{self._count}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@dataclass
class ServerProcess:
    """One server and our client to it. `ready_s`: from the start of the process to its first answer to a ping."""

    command: list[str]
    address: str
    threads: int
    log: Path
    timeout_s: float
    process: subprocess.Popen[bytes] | None = None
    client: PolicyClient | None = None
    began_s: float = 0.0
    ready_s: float = 0.0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.began_s = time.monotonic()
            self.process = subprocess.Popen(self.command, env=environment(self.threads), stdout=output, stderr=subprocess.STDOUT)
        self.client = PolicyClient(address=self.address, timeout_s=self.timeout_s)

    def wait_ready(self, deadline_s: float) -> None:
        """Ping until it answers. Raises ServerError with the end of its output when it ends first, ServerUnreachableError at the deadline."""
        next_word_s = self.began_s + _PROGRESS_EVERY_S
        while not self.client.ping(_PING_TIMEOUT_S):
            now_s = time.monotonic()
            if self.process.poll() is not None:
                raise ServerError(f"the server '{' '.join(self.command[1:4])} …' ended with exit code {self.process.returncode}:\n{self.tail()}")
            if now_s > deadline_s:
                raise ServerUnreachableError(f"the server at {self.address} was not ready in {now_s - self.began_s:.0f} s. Its output: {self.log}")
            if now_s > next_word_s:
                print(f"waiting for the server at {self.address}: {now_s - self.began_s:.0f} s", file=sys.stderr)
                next_word_s = now_s + _PROGRESS_EVERY_S
        self.ready_s = time.monotonic() - self.began_s

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]

    def stop(self) -> None:
        """Ends the process whatever state it is in."""
        if self.client is not None:
            self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(servers: list[ServerProcess], patience_s: float) -> Iterator[None]:
    """All of them started at once and ready; ended afterwards."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(time.monotonic() + patience_s)
        yield
    finally:
        for server in servers:
            server.stop()


@dataclass
class ColdStart:
    """Start of a process to its first action, repeated. `calls_ms[k]`: the first calls of start k, the very first among them."""

    first_action_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)  # servers only
    calls_ms: list[list[float]] = field(default_factory=list)


def cold_start_of_server(server: ServerProcess, inputs: tuple[dict[str, Any], np.ndarray], calls: int, patience_s: float, into: ColdStart) -> None:
    """The client's process is running already; what it costs to start that one is not in the figure."""
    with running([server], patience_s):
        times_ms = []
        for number in range(calls):
            began_s = time.monotonic()
            server.client.get_action(*inputs)
            times_ms.append(1e3 * (time.monotonic() - began_s))
            if number == 0:
                into.first_action_s.append(time.monotonic() - server.began_s)
    into.ready_s.append(server.ready_s)
    into.calls_ms.append(times_ms)


def cold_start_in_process(command: list[str], threads: int, log: Path, into: ColdStart) -> None:
    """`command` prints a line of JSON after each call. Raises ServerError with the end of its output when it fails."""
    times_ms: list[float] = []
    with log.open("wb") as errors:
        began_s = time.monotonic()
        with subprocess.Popen(command, env=environment(threads), stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                if not times_ms:
                    first_action_s = time.monotonic() - began_s
                times_ms.append(json.loads(line)["call_ms"])
    if process.returncode or not times_ms:
        raise ServerError(
            f"'{' '.join(command[1:4])} …' ended with exit code {process.returncode}:\n{log.read_text(errors='replace')[-_LOG_TAIL_CHARS:]}"
        )
    into.first_action_s.append(first_action_s)
    into.calls_ms.append(times_ms)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say (only Linux does)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return next((1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
