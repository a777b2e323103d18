"""Servers under attack: honest clients are served, and the server does not grow.

GR00T_FAST_ATTACK_S=10 for longer attacks.
`python tests/realtime/test_attacks.py "zmq garbage" PORT` is one of the attackers, a process that ends when killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import nvidia_style_service as reference
import psutil
import pytest
from serving_fakes import ArithmeticPolicy, Mutator, ServerProcess, assert_same, observation

from gr00t_fast.serving import PolicyClient

ATTACK_S = float(os.environ.get("GR00T_FAST_ATTACK_S") or 1.0)
MAX_GROWTH_BYTES = 512e6  # eight messages of 45 MB on their way
CALLS = 5
ATTACKS = ("slow senders", "big messages", "connections", "garbage")


# --- the attackers -------------------------------------------------------------------------------------------------------------------------


MB = 2**20
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"  # both as libzmq's REQ socket says them
ACT = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def frame(body: bytes) -> bytes:
    """A request of one part."""
    return b"\x01\x00\x02" + len(body).to_bytes(8, "big") + body


@functools.cache  # once, or once in each thread
def say_that_it_has_begun() -> None:
    print("begun", flush=True)


def flood(port: int, begin: bytes, messages: Callable[[], Iterable[bytes]]) -> None:
    """From four threads: send one message after the other, taking the answers, and connect anew when thrown out."""

    def attack() -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
                raw.sendall(begin)
                say_that_it_has_begun()
                for message in messages():
                    raw.sendall(message)
                    if not raw.recv(65536):
                        break

    threads = [threading.Thread(target=attack, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hold(port: int, count: int, begin: bytes, rest: bytes) -> None:
    """Open many connections with an unfinished message each, and go on sending a bit; those that are closed are opened anew."""
    held: list[socket.socket] = []
    while True:
        while len(held) < count:
            with contextlib.suppress(OSError):
                raw = socket.create_connection(("127.0.0.1", port), timeout=30)
                raw.sendall(begin)
                held.append(raw)
                say_that_it_has_begun()
        time.sleep(0.1)
        for raw in list(held):
            try:
                raw.sendall(rest)
                raw.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not raw.recv(65536):
                        raise ConnectionError
                raw.settimeout(30)
            except OSError:
                raw.close()
                held.remove(raw)


def mutated(seed: bytes, form: Callable[[bytes], bytes]) -> Iterator[bytes]:
    valid = reference.json_numpy_text({"observation": observation()}).encode() if seed == b"json" else None
    mutator = Mutator([valid or reference.pack({"endpoint": "get_action", "data": observation()})], random.randrange(2**32))
    while True:
        yield form(mutator.next())


def attack(name: str, port: int) -> None:
    opened = GREETING + READY
    attacks: dict[str, Callable[[], None]] = {
        "zmq slow senders": lambda: hold(port, 100, opened + b"\x01\x00\x02" + (45 * MB).to_bytes(8, "big") + bytes(MB // 4), b"x"),
        "zmq big messages": lambda: flood(port, opened, lambda: [frame(b"\x93" * 45 * MB)] * 100),
        "zmq connections": lambda: flood(port, opened, lambda: []),
        "zmq garbage": lambda: flood(port, opened, lambda: mutated(b"", frame)),
        "http slow senders": lambda: hold(port, 100, ACT % (16 * MB), b"x"),
        "http big messages": lambda: flood(port, b"", lambda: [ACT % (15 * MB) + b'{"x": "' + b"y" * (15 * MB - 7)] * 100),
        "http connections": lambda: flood(port, b"", lambda: []),
        "http garbage": lambda: flood(port, b"", lambda: mutated(b"json", lambda body: ACT % len(body) + body)),
    }
    attacks[name]()


# --- the tests -----------------------------------------------------------------------------------------------------------------------------


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
    attacker = subprocess.Popen([sys.executable, __file__, f"{kind} {name}", str(process.port)], stdout=subprocess.PIPE, text=True)
    try:
        assert attacker.stdout.readline().startswith("begun")
        calls, end_s = 0, time.monotonic() + ATTACK_S
        while calls < CALLS or time.monotonic() < end_s:
            call(kind, process.port)
            calls, most_bytes = calls + 1, max(most_bytes, memory().rss)
        assert attacker.poll() is None, "the attacker has given up"
    finally:
        attacker.kill()
        attacker.communicate(timeout=10)
    print(f"{kind} {name}: {calls} calls, +{(most_bytes - before_bytes) / 1e6:.0f} MB")
    assert most_bytes - before_bytes < MAX_GROWTH_BYTES


if __name__ == "__main__":
    attack(sys.argv[1], int(sys.argv[2]))
