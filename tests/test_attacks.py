"""Servers under attack: honest clients are served as before, and the server does not grow. The attackers are in `attackers.py`.

GR00T_FAST_ATTACK_S=10 for the long form, which also compares latencies; for a machine without other work.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import nvidia_style_service as reference
import psutil
import pytest
from serving_fakes import ArithmeticPolicy, ServerProcess, assert_same, observation

from gr00t_fast.serving import PolicyClient

LONG_S = float(os.environ.get("GR00T_FAST_ATTACK_S") or 0)
ATTACK_S = LONG_S or 1.0
MAX_GROWTH_BYTES = 256e6
MAX_SLOWDOWN = 3.0
WARM_UP_S = 1.0 if LONG_S else 0.3
INFERENCE = "wait 0.02"
ZEROMQ = (
    *("endless_multipart", "endless_small_frames", "endless_route", "announced", "unfinished", "silent", "half_handshake", "connecting", "mutated"),
    *("pings", "heartbeats", "large_garbage", "one_pixel_frames", "long_prompt", "many_texts", "hanging_up"),
)
HTTP = (
    *("http_announced", "http_unfinished", "http_header_drip", "http_connecting", "http_garbage", "http_large_garbage", "http_one_pixel_frames"),
    *("http_mutated", "http_hanging_up"),
)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ServerProcess]]:
    with ServerProcess("zmq") as zmq, ServerProcess("http") as http:
        yield {"zmq": zmq, "http": http}


class Growth:
    """How far a process grows while it is watched."""

    def __init__(self, pid: int) -> None:
        self._memory = psutil.Process(pid).memory_info
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> Growth:
        self._before_bytes = self._most_bytes = self._memory().rss
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._most_bytes = max(self._most_bytes, self._memory().rss)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join(10)

    @property
    def bytes(self) -> int:
        return self._most_bytes - self._before_bytes


@contextlib.contextmanager
def attacker(name: str, port: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("attackers.py")), name, str(port)])
    try:
        time.sleep(WARM_UP_S)
        assert process.poll() is None, "the attacker has given up"
        yield
        assert process.poll() is None, "the attacker has given up"
    finally:
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def honest_client(kind: str, port: int) -> Iterator[Callable[[], None]]:
    """A call whose answer is checked; over HTTP each has a connection of its own, as NVIDIA's client does it."""
    task = {"annotation.human.task_description": [INFERENCE]}
    seen = observation(size=(480, 640), **task)
    expected = ArithmeticPolicy().get_action(seen)
    if kind == "http":
        body = reference.json_numpy_text({"observation": seen}).encode()

        def post() -> None:
            status, actions = reference.http_post(f"http://127.0.0.1:{port}/act", body)
            assert status == 200, actions
            assert_same(actions, expected)

        yield post
        return
    with PolicyClient(port=port, timeout_s=15, resend=False) as client:
        yield lambda: assert_same(client.get_action(seen), expected)


def durations_ms(call: Callable[[], None], seconds: float) -> np.ndarray:
    found, end_s = [], time.monotonic() + seconds
    while time.monotonic() < end_s or len(found) < 5:
        began_s = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began_s))
        time.sleep(0.01)
    return np.array(found)


@pytest.mark.parametrize("name", [*ZEROMQ, *HTTP])
def test_an_attack_neither_stops_honest_clients_nor_takes_the_memory(servers: dict[str, ServerProcess], name: str) -> None:
    kind = "http" if name.startswith("http") else "zmq"
    process = servers[kind]
    with honest_client(kind, process.port) as call, Growth(process.process.pid) as growth:
        idle_ms = durations_ms(call, LONG_S or 0.1)
        with attacker(name, process.port):
            attacked_ms = durations_ms(call, ATTACK_S)
    idle, attacked = (float(np.percentile(times, 99)) for times in (idle_ms, attacked_ms))
    ratio, growth_mb = attacked / idle, growth.bytes / 1e6
    print(f"{name}: p99 {idle:.1f} ms idle, {attacked:.1f} ms attacked ({ratio:.2f} times), {len(attacked_ms)} calls, +{growth_mb:.0f} MB")
    assert growth.bytes < MAX_GROWTH_BYTES
    if LONG_S:
        assert attacked <= MAX_SLOWDOWN * idle
