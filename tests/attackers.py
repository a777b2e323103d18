"""Clients that do harm, each in a process of its own until it is killed.

python tests/attackers.py NAME PORT
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nvidia_style_service as reference

sys.path.insert(0, str(Path(__file__).parent.parent))

MB = 2**20
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"  # both as libzmq's REQ socket says them
ACT = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def frame(body: bytes) -> bytes:
    """A request of one part."""
    return b"\x01\x00\x02" + len(body).to_bytes(8, "big") + body


def flood(port: int, begin: bytes, messages: Callable[[], Iterable[bytes]]) -> None:
    """From four threads: send one message after the other, taking the answers, and connect anew when thrown out."""

    def attack() -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
                raw.sendall(begin)
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
    from serving_fakes import Mutator, observation

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


if __name__ == "__main__":
    attack(sys.argv[1], int(sys.argv[2]))
