"""The server's end of ZeroMQ's wire protocol, spoken to byte by byte: what libzmq never sends, or sends in other pieces."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import nvidia_style_service as reference
import pytest
from attackers import GREETING, READY, frame, request, zeromq
from serving_fakes import ArithmeticPolicy, running

from gr00t_fast.serving import PolicyServer

PING = request({"endpoint": "ping"})
READY_BYTES = 2 + len(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER")


@pytest.fixture(scope="module")
def server() -> Iterator[PolicyServer]:
    with running(PolicyServer(ArithmeticPolicy(), port=0, max_message_bytes=100_000)) as started:
        yield started


def read(raw: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = raw.recv(size - len(data))
        assert more, "the server closed the connection"
        data += more
    return data


def is_closed(raw: socket.socket) -> bool:
    """After whatever it still says."""
    try:
        while raw.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def greet(server: PolicyServer) -> socket.socket:
    raw = zeromq(server.port)
    greeting = read(raw, 64 + READY_BYTES)
    assert greeting[:11] == b"\xff" + bytes(8) + b"\x7f\x03"
    assert b"ROUTER" in greeting[64:]
    return raw


def reply(raw: socket.socket) -> dict[str, object]:
    """Of a REQ client: an empty frame, then one of less than 256 bytes."""
    assert read(raw, 2) == b"\x01\x00"
    flags, size = read(raw, 2)
    assert flags == 0
    return reference.unpack(read(raw, size))


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" + bytes(8) + b"\x7f\x01" + bytes(53),  # ZMTP 2
        GREETING[:12] + b"PLAIN".ljust(20, b"\0") + bytes(32),  # security that the server does not have
        GREETING + READY.replace(b"REQ", b"SUB"),
        GREETING + b"\x04\x05\x05HELP!",
        GREETING + PING,  # before the handshake
        GREETING + b"\x06" + (2**40).to_bytes(8, "big"),
        GREETING + READY + b"\x08\x00",  # flags that do not exist
        GREETING + READY + b"\x01\x00\x02" + (200_001).to_bytes(8, "big"),
        GREETING + READY + b"\x01\x00" + b"\x01\x00" * 1002,
        GREETING + READY + b"\x04\x06\x05ERROR",
    ],
)
def test_who_does_not_keep_to_the_protocol_is_disconnected(server: PolicyServer, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(begun)
        assert is_closed(raw)
    with greet(server) as raw:
        raw.sendall(PING)
        assert reply(raw)["status"] == "ok"


def test_a_request_in_single_bytes_and_two_in_one_piece(server: PolicyServer) -> None:
    with greet(server) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in PING:
            raw.sendall(bytes([byte]))
        assert reply(raw)["status"] == "ok"
        raw.sendall(PING + PING)
        assert [reply(raw)["status"] for _ in range(2)] == ["ok", "ok"]


def test_heartbeats_are_answered_with_what_they_carry(server: PolicyServer) -> None:
    with greet(server) as raw:
        raw.sendall(b"\x04\x0b\x04PING\x00\x0abeat")
        assert read(raw, 11) == b"\x04\x09\x04PONGbeat"
        raw.sendall(PING)
        assert reply(raw)["status"] == "ok"


def test_a_message_over_the_limit_is_skipped_and_refused(server: PolicyServer) -> None:
    with greet(server) as raw:
        raw.sendall(b"\x01\x00" + frame(bytes(100_001)) + PING)
        assert "at most 100000" in str(reply(raw)["error"])
        assert reply(raw)["status"] == "ok"
