"""The server's end of ZeroMQ's wire protocol (ZMTP 3, https://rfc.zeromq.org/spec/23) without encryption, as far as request-reply clients need it.

libzmq assembles a message of any number of frames before anybody sees the first of them; its only limit, MAXMSGSIZE, is per frame. Here a message
is bounded in bytes and frames while it arrives. Clients are REQ and DEALER sockets of any libzmq since 4.0.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from gr00t_fast.serving.connections import Connection, Connections, Throttle

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_GREETING = _SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)  # version 3.0, no security, not a server of security
_MORE, _LONG, _COMMAND = 1, 2, 4
_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"
_PARTNERS = (b"REQ", b"DEALER", b"ROUTER")
_MAX_COMMAND_BYTES = 1024
_MAX_ROUTE_FRAMES, _MAX_ROUTE_BYTES = 16, 256  # each proxy on the way adds one name of at most 255 bytes
_MAX_PARTS = 1000  # of a message that will be refused; more end the connection
_DROP_FACTOR = 2  # a message over the limit is skipped and refused with a reason; one over this many times the limit ends the connection
_SCRATCH_BYTES = _STEP_BYTES = 2**18  # read at once: what one connection keeps the others waiting for
_PAGE_BYTES = 2**21  # of memory; a huge one, as Linux may give
_HANDSHAKE_S = 10.0
_MESSAGE_S = 30.0  # from the first byte of a message to its last, and for a client to take its answers
_Reading = Generator[memoryview, None, Any]


@dataclass
class Request:
    """A whole message. `body` is None when there was none or it was too large; `route` lacks its empty frame when no REQ client sent it."""

    route: list[bytes] = field(default_factory=list)
    body: memoryview | None = None
    parts: int = 0  # frames behind the route
    size_bytes: int = 0

    @property
    def has_route(self) -> bool:
        return bool(self.route) and not self.route[-1]


class _Violation(Exception):  # noqa: N818 - not an error of the program: ends a connection
    """The other end does not keep to the protocol."""


class ZmtpConnection(asyncio.BufferedProtocol):
    """One client's connection. `take` gets each request and has to say with `answer` or `refuse` what comes of it."""

    scratch = memoryview(bytearray(_SCRATCH_BYTES))  # between two calls of the event loop nothing of interest is in it
    trash = memoryview(bytearray(_SCRATCH_BYTES))

    def __init__(
        self,
        take: Callable[[ZmtpConnection, Request], None],
        connections: Connections,
        alive: set[ZmtpConnection],
        max_bytes: int,
        max_waiting: int,
    ) -> None:
        """It is in `alive` while it is open. At most `max_waiting` requests are taken before their answers; further ones stay in the network."""
        self._take, self._connections, self._alive, self._max_bytes, self._max_waiting = take, connections, alive, max_bytes, max_waiting
        self._reading: _Reading = self._read()
        self._wanted, self._have = next(self._reading), 0  # what to fill next, and how much of it is there
        self._pending = b""  # read, and not looked at yet because of a hold
        self._holds: set[str] = set()  # why nothing is read now
        self._cost_s = self._began_s = 0.0  # of this thread's time: time that a busy machine takes is not counted
        self.record: Connection

    # --- what the event loop calls -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.record = Connection(peer[0] if isinstance(peer, tuple) else "this machine", transport.abort, socket=transport.get_extra_info("socket"))
        self._connections.expect(self.record, "handshake", _HANDSHAKE_S)
        self._connections.enter(self.record)
        self._alive.add(self)
        transport.write(_GREETING)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.leave(self.record)
        self._alive.discard(self)
        self._end()

    def get_buffer(self, sizehint: int) -> memoryview:
        self._began_s = time.thread_time()
        rest = self._wanted[self._have :]
        self._direct = len(rest) >= _SCRATCH_BYTES
        return rest if self._direct else self.scratch

    def buffer_updated(self, count: int) -> None:
        try:
            if self._direct:
                self._filled(count)
            else:
                self._feed(self.scratch[:count])
        except _Violation:
            self._end()
        self._cost_s += time.thread_time() - self._began_s

    def pause_writing(self) -> None:
        self._connections.expect(self.record, "taking answers", _MESSAGE_S)
        self._hold("writing")

    def resume_writing(self) -> None:
        self._connections.expect(self.record, "taking answers", None)
        self._release("writing")

    # --- what the server calls ---------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """The request just taken is in the queue; `answer` comes later."""
        self.record.waiting += 1
        if self.record.waiting >= self._max_waiting:
            self._hold("waiting")

    def answer(self, route: list[bytes], reply: bytes, served: bool) -> None:
        """Of a request that waited."""
        self.record.waiting -= 1
        if self.record.gone:
            self._end()
            return
        self.record.served = self.record.served or served
        self._send(route, reply)
        if served:
            self._cost_s = 0.0
        else:
            self.record.refused_s = time.monotonic()
            self._began_s = time.thread_time()
            self._pause(self._connections.refusals)
        self._release("waiting")

    def answer_at_once(self, route: list[bytes], reply: bytes, refused: bool) -> None:
        """Of the request just taken; the connection's next one is read after a pause in proportion to its cost. Without a route nothing is sent."""
        if refused:
            self.record.refused_s = time.monotonic()
        if route:
            self._send(route, reply)
        self._pause(self._connections.refusals)

    def _pause(self, throttle: Throttle) -> None:
        """What this connection cost since the last time holds itself up, not the others."""
        cost_s, self._cost_s, self._began_s = self._cost_s + time.thread_time() - self._began_s, 0.0, time.thread_time()
        self._hold("pause")
        asyncio.get_running_loop().call_later(throttle.pause_s(cost_s), self._release, "pause")

    def _go_on(self) -> None:
        self.record.go_on()
        self._release("memory")

    def close_after_writing(self) -> None:
        self._transport.close()

    # --- bytes -------------------------------------------------------------------------------------------------------------------------

    def _send(self, route: list[bytes], reply: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"".join(_frame(part, _MORE) for part in route) + _frame(reply, 0))

    def _end(self) -> None:
        self._holds.add("closed")
        self._pending, self._wanted = b"", self.trash
        self._reading.close()
        self._transport.abort()

    def _hold(self, why: str) -> None:
        if not self._holds and not self._transport.is_closing():
            self._transport.pause_reading()
        self._holds.add(why)

    def _release(self, why: str) -> None:
        self._holds.discard(why)
        if self._holds:
            return
        self._began_s = time.thread_time()
        pending, self._pending = self._pending, b""
        try:
            self._feed(memoryview(pending))
        except _Violation:
            self._end()
        self._cost_s += time.thread_time() - self._began_s
        if not self._holds and not self._transport.is_closing():
            self._transport.resume_reading()

    def _feed(self, data: memoryview) -> None:
        while len(data):
            if self._holds:
                self._pending = bytes(data)
                return
            count = min(len(data), len(self._wanted) - self._have)
            self._wanted[self._have : self._have + count] = data[:count]
            data = data[count:]
            self._filled(count)

    def _filled(self, count: int) -> None:
        self._have += count
        if self._have == len(self._wanted):
            self._wanted, self._have = next(self._reading), 0

    # --- the protocol ------------------------------------------------------------------------------------------------------------------

    def _read(self) -> _Reading:
        """Yields memory to be filled with what comes next. Raises _Violation."""
        yield from self._handshake()
        self._connections.expect(self.record, "handshake", None)
        request = Request()
        while True:
            flags, size = yield from self._header()
            if flags & _COMMAND:
                self._answer_command((yield from self._exactly(size)) if size <= _MAX_COMMAND_BYTES else b"")
                self._pause(self._connections.refusals)
                continue
            if not request.size_bytes and not request.route:
                self._connections.expect(self.record, "message", _MESSAGE_S)
            yield from self._part(request, size)
            if not flags & _MORE:
                self._connections.expect(self.record, "message", None)
                self._connections.holds(self.record, 0)
                taken, request = request, Request()
                self._take(self, taken)
                del taken  # it holds a picture

    def _handshake(self) -> _Reading:
        greeting = yield from self._exactly(len(_SIGNATURE))
        if greeting[0] != 0xFF or greeting[9] != 0x7F:
            raise _Violation
        greeting += yield from self._exactly(len(_GREETING) - len(_SIGNATURE))
        if greeting[10] < 3 or greeting[12:32] != _GREETING[12:32]:
            raise _Violation
        self._transport.write(_frame(_READY, 0, _COMMAND))
        flags, size = yield from self._header()
        if not flags & _COMMAND or size > _MAX_COMMAND_BYTES:
            raise _Violation
        if _socket_type((yield from self._exactly(size))) not in _PARTNERS:
            raise _Violation

    def _header(self) -> _Reading:
        flags = (yield from self._exactly(1))[0]
        if flags > (_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise _Violation
        return flags, int.from_bytes((yield from self._exactly(8 if flags & _LONG else 1)), "big")

    def _answer_command(self, command: bytes) -> None:
        if command.startswith(b"\x04PING") and len(command) >= 7:
            self._transport.write(_frame(b"\x04PONG" + command[7:23], 0, _COMMAND))
        elif not command or command.startswith(b"\x05ERROR"):
            raise _Violation

    def _part(self, request: Request, size: int) -> _Reading:
        """One frame of a message: of the route up to an empty one, then the body, then what does not belong there."""
        request.size_bytes += size
        if request.size_bytes > _DROP_FACTOR * self._max_bytes or request.parts >= _MAX_PARTS:
            raise _Violation
        in_route = not request.has_route
        if in_route and len(request.route) < _MAX_ROUTE_FRAMES and size < _MAX_ROUTE_BYTES and not request.parts:
            request.route.append((yield from self._exactly(size)))
            return
        request.parts += 1
        if not in_route and request.parts == 1 and size <= self._max_bytes:
            request.body = yield from self._body(size)
        else:
            request.body = None
            yield from self._skip(size)

    def _body(self, size: int) -> _Reading:
        """A picture's memory comes from the system, which gives a page of it when the first byte arrives, not when its size is announced.

        Where many send at once, connections that were never served share a throttle.
        """
        begun = yield from self._exactly(min(size, _STEP_BYTES))
        if size <= _STEP_BYTES:
            return memoryview(begun)
        try:
            room = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except OSError:  # a system that promises no more than it has
            raise _Violation from None
        room[: len(begun)], filled = begun, len(begun)
        while filled < size:
            self._connections.holds(self.record, -(-filled // _PAGE_BYTES) * _PAGE_BYTES)
            if not self._connections.may_go_on(self.record, self._go_on):
                self.record.hold()
                self._hold("memory")
            if not self.record.served and self._connections.crowded:
                self._pause(self._connections.uploads)
            yield room[filled : filled + _STEP_BYTES]
            filled = min(filled + _STEP_BYTES, size)
        return room

    def _exactly(self, size: int) -> _Reading:
        if not size:
            return b""
        room = bytearray(size)
        yield memoryview(room)
        return bytes(room)

    def _skip(self, size: int) -> _Reading:
        while size:
            count = min(size, _SCRATCH_BYTES - 1)  # shorter than the scratch memory: read through it
            self._pause(self._connections.uploads)
            yield self.trash[:count]
            size -= count


def _frame(body: bytes, flags: int, kind: int = 0) -> bytes:
    long = len(body) > 255
    return bytes([flags | kind | (_LONG if long else 0)]) + len(body).to_bytes(8 if long else 1, "big") + body


def _socket_type(command: bytes) -> bytes:
    """The property of a READY command; nothing when it has none. Raises _Violation."""
    if not command.startswith(b"\x05READY"):
        raise _Violation
    rest = command[6:]
    while rest:
        name, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        length = int.from_bytes(rest[:4], "big")
        value, rest = rest[4 : 4 + length], rest[4 + length :]
        if name.lower() == b"socket-type":
            return value
    return b""
