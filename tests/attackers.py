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

import numpy as np
import nvidia_style_service as reference

sys.path.insert(0, str(Path(__file__).parent.parent))

MB = 2**20
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
TASK = "annotation.human.task_description"


def zeromq(port: int) -> socket.socket:
    """A connection as libzmq's REQ socket opens it."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=30)
    raw.sendall(GREETING + READY)
    return raw


def frame(body: bytes, more: bool = False) -> bytes:
    return bytes([2 | more]) + len(body).to_bytes(8, "big") + body


def request(message: dict[str, object]) -> bytes:
    return b"\x01\x00" + frame(reference.pack(message))


def small_observation(batch: int | None = None, side: int = 40, task: str = "pick") -> dict[str, object]:
    lead = () if batch is None else (batch,)
    state = {"state.single_arm": np.zeros((*lead, 1, 5)), "state.gripper": np.zeros((*lead, 1, 1))}
    return state | {"video.webcam": np.zeros((*lead, 1, side, side, 3), np.uint8), TASK: [task] * (batch or 1)}


def flood(open_one: Callable[[], socket.socket], messages: Iterable[bytes], reads: bool = True) -> None:
    """Send one message after the other, taking the answers, and connect anew when thrown out."""
    while True:
        with contextlib.suppress(OSError), open_one() as raw:
            for message in messages:
                raw.sendall(message)
                if reads and not raw.recv(65536):
                    break


def hold(port: int, count: int, begin: bytes, rest: bytes = b"", every_s: float = 0.1) -> None:
    """Open many connections with an unfinished message each, and go on sending a bit; those that are closed are opened anew."""
    held: list[socket.socket] = []
    while True:
        while len(held) < count:
            with contextlib.suppress(OSError):
                raw = socket.create_connection(("127.0.0.1", port), timeout=30)
                raw.sendall(begin)
                held.append(raw)
        time.sleep(every_s)
        for raw in list(held):
            try:
                raw.sendall(rest or b"")
                raw.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not raw.recv(65536):
                        raise ConnectionError
                raw.settimeout(30)
            except OSError:
                raw.close()
                held.remove(raw)


def several(count: int, attack: Callable[[], None]) -> None:
    threads = [threading.Thread(target=attack, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def forever(*messages: bytes) -> Iterator[bytes]:
    while True:
        yield from messages


def mutated(messages: list[bytes]) -> Iterator[bytes]:
    from serving_fakes import Mutator

    mutator = Mutator(messages, random.randrange(2**32))
    while True:
        yield b"\x01\x00" + frame(mutator.next())


def http_request(body: bytes, announced: int | None = None) -> bytes:
    return b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (len(body) if announced is None else announced) + body


def attack(name: str, port: int) -> None:
    web = lambda: socket.create_connection(("127.0.0.1", port), timeout=30)  # noqa: E731
    zmq = lambda: zeromq(port)  # noqa: E731
    opened = GREETING + READY + b"\x01\x00"
    slow = small_observation(task="wait 0.02")
    act = reference.json_numpy_text({"observation": small_observation()}).encode()
    greedy = {
        "endless_multipart": lambda: several(4, lambda: flood(zmq, forever(b"\x01\x00" + frame(bytes(MB), more=True)), reads=False)),
        "endless_small_frames": lambda: several(4, lambda: flood(zmq, forever(b"\x01\x00" + b"\x01\x01x" * 20_000), reads=False)),
        "endless_route": lambda: several(4, lambda: flood(zmq, forever(b"\x01\xff" + bytes(255)), reads=False)),
        "announced": lambda: hold(port, 100, opened + b"\x02" + (45 * MB).to_bytes(8, "big")),
        "unfinished": lambda: hold(port, 20, opened + b"\x02" + (45 * MB).to_bytes(8, "big") + bytes(40 * MB), b"x" * 1000),
        "silent": lambda: hold(port, 300, b""),
        "half_handshake": lambda: hold(port, 300, GREETING[:30], b"\0"),
        "connecting": lambda: several(4, lambda: flood(zmq, iter(()))),
        "mutated": lambda: several(8, lambda: flood(zmq, mutated([reference.pack({"endpoint": "get_action", "data": small_observation()})]))),
        "pings": lambda: several(8, lambda: flood(zmq, forever(request({"endpoint": "ping"})))),
        "heartbeats": lambda: several(8, lambda: flood(zmq, forever(b"\x04\x07\x04PING\x00\x00" * 1000), reads=False)),
        "large_garbage": lambda: several(4, lambda: flood(zmq, forever(b"\x01\x00" + frame(b"\x93" * 45 * MB)))),
        "one_pixel_frames": lambda: several(8, lambda: flood(zmq, forever(request({"data": small_observation(400, 1)})))),
        "long_prompt": lambda: several(8, lambda: flood(zmq, forever(request({"data": small_observation(task="a b " * 15_000)})))),
        "many_texts": lambda: several(8, lambda: flood(zmq, forever(request({"data": small_observation() | {TASK: np.full(10**7, "ab", "<U1")}})))),
        "hanging_up": lambda: several(4, lambda: flood(zmq, [request({"data": slow})], reads=False)),
        "http_announced": lambda: hold(port, 100, http_request(b"", 16 * MB)),
        "http_unfinished": lambda: hold(port, 40, http_request(bytes(15 * MB), 16 * MB), b"x" * 1000),
        "http_header_drip": lambda: hold(port, 300, b"POST /act HTTP/1.1\r\nX: ", b"x"),
        "http_connecting": lambda: several(4, lambda: flood(web, iter(()))),
        "http_garbage": lambda: several(8, lambda: flood(web, forever(http_request(b"{" * 100)))),
        "http_large_garbage": lambda: several(4, lambda: flood(web, forever(http_request(b'{"x": "' + b"y" * 15 * MB)))),
        "http_one_pixel_frames": lambda: several(
            8, lambda: flood(web, forever(http_request(reference.json_numpy_text({"observation": small_observation(400, 1)}).encode())))
        ),
        "http_hanging_up": lambda: several(
            4, lambda: flood(web, [http_request(reference.json_numpy_text({"observation": slow}).encode())], reads=False)
        ),
        "http_mutated": lambda: several(8, lambda: flood(web, _mutated_http(act))),
    }
    greedy[name]()


def _mutated_http(act: bytes) -> Iterator[bytes]:
    from serving_fakes import Mutator

    mutator = Mutator([http_request(act)], random.randrange(2**32))
    while True:
        yield mutator.next()


if __name__ == "__main__":
    attack(sys.argv[1], int(sys.argv[2]))
