"""Servers under attack: honest clients are served, and the server does not grow. The attackers are in `attackers.py`.

GR00T_FAST_ATTACK_S=10 for longer attacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nvidia_style_service as reference
import psutil
import pytest
from serving_fakes import ArithmeticPolicy, ServerProcess, assert_same, observation

from gr00t_fast.serving import PolicyClient

ATTACK_S = float(os.environ.get("GR00T_FAST_ATTACK_S") or 1.0)
MAX_GROWTH_BYTES = 512e6  # eight messages of 45 MB on their way
CALLS = 5
ATTACKS = ("slow senders", "big messages", "connections", "garbage")


@pytest.fixture(scope="module", params=["zmq", "http"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, ServerProcess]]:
    with ServerProcess(request.param) as process:
        yield request.param, process


def call(kind: str, port: int) -> None:
    """One honest request, over a connection of its own, whose answer is checked; a server that says that it is busy is asked again."""
    seen, expected = observation(size=(480, 640)), ArithmeticPolicy().get_action(observation(size=(480, 640)))
    if kind == "zmq":
        with PolicyClient(port=port, timeout_s=30) as client:
            assert_same(client.get_action(seen), expected)
        return
    end_s = time.monotonic() + 30
    while (answer := reference.http_post(f"http://127.0.0.1:{port}/act", {"observation": seen}))[0] == 503 and time.monotonic() < end_s:
        time.sleep(0.05)
    assert answer[0] == 200, answer
    assert_same(answer[1], expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_neither_stops_honest_clients_nor_takes_the_memory(server: tuple[str, ServerProcess], name: str) -> None:
    kind, process = server
    memory = psutil.Process(process.process.pid).memory_info
    call(kind, process.port)
    before_bytes = most_bytes = memory().rss
    attacker = subprocess.Popen([sys.executable, str(Path(__file__).with_name("attackers.py")), f"{kind} {name}", str(process.port)])
    try:
        time.sleep(0.5)
        calls, end_s = 0, time.monotonic() + ATTACK_S
        while calls < CALLS or time.monotonic() < end_s:
            call(kind, process.port)
            calls, most_bytes = calls + 1, max(most_bytes, memory().rss)
        assert attacker.poll() is None, "the attacker has given up"
    finally:
        attacker.kill()
        attacker.wait(10)
    print(f"{kind} {name}: {calls} calls, +{(most_bytes - before_bytes) / 1e6:.0f} MB")
    assert most_bytes - before_bytes < MAX_GROWTH_BYTES
