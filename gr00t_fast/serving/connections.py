"""Listening sockets of a policy server, and its connections with limits on memory and time before a client has been served.

Nothing is reserved for what a client announces, only for what has arrived. Where places or memory run out, newcomers are still accepted: a connection
that was never served, of the host that holds most, and the oldest of these, is closed. All of this is on the event loop's thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import select
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gr00t_fast.errors import ServerError

MAX_CONNECTIONS = 128
UNFINISHED_BYTES = 2**25  # of all unfinished messages; one may go beyond
# A newcomer keeps its place for so long, in which an honest one sends its request; for this there are so many times the places.
_GRACE_S, _GRACE_PLACES = 0.1, 3
_PATIENCE_S = 1.0  # for a message of a usual size from this network
_SUSPECT_S = 10.0
_THROTTLE_SHARE = 0.2  # of the event loop's time
_HUNG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)  # Linux's flag tells it before what the client sent last has been read


@dataclass(eq=False)
class Connection:
    """One client's. `abort` closes it without waiting for anything."""

    host: str
    abort: Callable[[], None]
    served: bool = False  # has had an answer that was no refusal
    waiting: int = 0  # requests of it that wait for an inference
    unfinished_bytes: int = 0  # memory that its unfinished message takes
    since_s: float = field(default_factory=time.monotonic)  # when it came, or last began or finished a message
    deadlines_s: dict[str, float] = field(default_factory=dict)  # by what it has to finish until then
    held_since_s: float | None = None  # it waits for memory
    refused_s: float = -math.inf  # when a request of it was refused for the last time
    socket: Any = None  # as asyncio gives it

    @property
    def gone(self) -> bool:
        """Whether the client has hung up, also where nothing is read from it now. For any thread."""
        if self.socket is None:
            return False
        if (number := self.socket.fileno()) < 0:
            return True
        poll = select.poll()
        poll.register(number, _HUNG_UP)
        return bool(poll.poll(0))

    @property
    def suspect(self) -> bool:
        """Its requests wait until no others do."""
        return time.monotonic() - self.refused_s < _SUSPECT_S

    def hold(self) -> None:
        """It waits for memory: no time passes for the client."""
        if self.held_since_s is None:
            self.held_since_s = time.monotonic()

    def go_on(self) -> None:
        if self.held_since_s is not None:
            self.since_s += time.monotonic() - self.held_since_s
            self.held_since_s = None

    def age_s(self, now_s: float) -> float:
        """How long the client has had for what it does."""
        return (now_s if self.held_since_s is None else self.held_since_s) - self.since_s


class Throttle:
    """A share of the event loop's time for work that deserves no more, so that a flood of it leaves the rest to inferences and other clients."""

    def __init__(self) -> None:
        self._until_s = 0.0

    def pause_s(self, cost_s: float) -> float:
        """How long a connection has to wait after work that took `cost_s`."""
        now_s = time.monotonic()
        self._until_s = max(self._until_s, now_s) + cost_s / _THROTTLE_SHARE
        return self._until_s - now_s


class Connections:
    """All connections of one server, in bounded number and with a bounded number of bytes in unfinished messages.

    `refusals`: throttle of messages that are answered without an inference; `uploads`: of those of connections that were never served, when crowded.
    """

    def __init__(self, unfinished_limit_bytes: int = UNFINISHED_BYTES, max_connections: int = MAX_CONNECTIONS) -> None:
        self._limit_bytes, self._max_connections = unfinished_limit_bytes, max_connections
        self._known: set[Connection] = set()
        self._unfinished_bytes = 0
        self._waiting: dict[Connection, Callable[[], None]] = {}
        self.refusals, self.uploads = Throttle(), Throttle()

    def enter(self, connection: Connection) -> None:
        """A newcomer takes the place of another one when all are taken; where every other one waits for its answer, it is closed itself."""
        self._known.add(connection)
        if len(self._known) <= self._max_connections:
            return
        idle = [each for each in self._known if not each.waiting and each is not connection]
        if len(self._known) <= _GRACE_PLACES * self._max_connections:
            newest_s = time.monotonic() - _GRACE_S
            idle = [each for each in idle if not each.served and each.since_s < newest_s]
            if not idle:
                return
        self._close(self._least(idle, Counter(each.host for each in self._known)) if idle else connection)

    def leave(self, connection: Connection) -> None:
        """Calling it again is harmless."""
        self.holds(connection, 0)
        self._known.discard(connection)

    def __contains__(self, connection: Connection) -> bool:
        """Whether it has not been closed."""
        return connection in self._known

    def expect(self, connection: Connection, what: str, within_s: float | None) -> None:
        """Close the connection unless `what` is done in time; None: it is done."""
        if within_s is None:
            connection.deadlines_s.pop(what, None)
        else:
            connection.deadlines_s[what] = time.monotonic() + within_s

    def holds(self, connection: Connection, size_bytes: int) -> None:
        """Its unfinished message takes so much memory now; 0: it is finished or given up."""
        if connection not in self._known:
            return
        if not size_bytes or not connection.unfinished_bytes:
            connection.since_s = time.monotonic()
        freed = size_bytes < connection.unfinished_bytes
        self._unfinished_bytes += size_bytes - connection.unfinished_bytes
        connection.unfinished_bytes = size_bytes
        if freed:
            self.wake()

    def may_go_on(self, connection: Connection, go_on: Callable[[], None]) -> bool:
        """Whether its message may take more memory. If not, `go_on` is called once it may, or the connection has been closed.

        Others are closed for it, if they were never served and have not finished their message in the time that an honest one takes; for a connection
        that was served, whatever their age. The oldest unfinished message may always go on, so that somebody finishes, and so may one that takes less
        than its equal share.
        """
        while self._unfinished_bytes > self._limit_bytes:
            holders = [each for each in self._known if each.unfinished_bytes]
            if connection.unfinished_bytes <= self._limit_bytes // len(holders):
                return True
            if connection not in self._known or all(each.since_s >= connection.since_s for each in holders):
                return True
            now_s, patience_s = time.monotonic(), 0.0 if connection.served else _PATIENCE_S
            idle = [each for each in holders if each is not connection and not each.served and each.age_s(now_s) > patience_s]
            if not idle:
                self._waiting[connection] = go_on
                return False
            held = Counter[str]()
            for each in holders:
                held[each.host] += each.unfinished_bytes
            self._close(self._least(idle, held))
        return True

    def wake(self) -> None:
        """Let those go on that may by now. To be called every now and then."""
        waiting, self._waiting = self._waiting, {}
        for connection, go_on in waiting.items():
            if self.may_go_on(connection, go_on):
                go_on()

    @property
    def crowded(self) -> bool:
        """Whether unfinished messages take half of what they may."""
        return self._unfinished_bytes > self._limit_bytes // 2

    def close_overdue(self) -> None:
        """To be called every now and then."""
        now_s = time.monotonic()
        for connection in [each for each in self._known if min(each.deadlines_s.values(), default=now_s) < now_s]:
            self._close(connection)

    def close_all(self) -> None:
        """The server ends."""
        for connection in list(self._known):
            self._close(connection)

    @staticmethod
    def _least(candidates: list[Connection], held_by_host: Counter[str]) -> Connection:
        return min(candidates, key=lambda each: (each.served, -held_by_host[each.host], each.since_s))

    def _close(self, connection: Connection) -> None:
        self.leave(connection)
        connection.abort()


# Sockets to listen on, for addresses as ZeroMQ writes them.


ACCEPTED_AT_ONCE = 16  # by the event loop, before it turns to its clients again: asyncio takes this from the backlog that it is told of
_BACKLOG = 512  # connections that have said nothing yet, or wait for the event loop; where there are more, an honest one tries again after a second
# Connections to machines that vanished without closing them are noticed after 25 s. One that says nothing is the kernel's until then: clients of
# ZeroMQ and of HTTP speak first.
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_DEFER_ACCEPT": 10}


def numeric_host(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Family and numeric address of a host to bind (`*` means all). Raises ServerError when the name is unknown."""
    if not 0 <= port <= 65535:
        raise ServerError(f"port must be from 0 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo("0.0.0.0" if host == "*" else host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"cannot serve on host '{host}', port {port}: {error}. Use an address of this machine: 127.0.0.1, or 0.0.0.0 for all."
        ) from error
    return family, str(address[0])


def check_port_free(host: str, port: int) -> None:
    """Raises ServerError when nothing can listen there; asked before minutes are spent on loading."""
    listen_on_tcp(host, port)[0].close()


def listen_on_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its `address:port`, numeric and with brackets around IPv6. Port 0 picks a free one. Raises ServerError."""
    family, address = numeric_host(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted connections inherit these
        for name, value in _OPTIONS.items():
            if hasattr(socket, name):  # Linux has all of them
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.bind((address, port))
        _listen(listener)
    except OSError as error:
        listener.close()
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}. Another server may be running there; choose another --port.") from error
    return listener, f"[{address}]:{listener.getsockname()[1]}" if ":" in address else f"{address}:{listener.getsockname()[1]}"


def listen_on(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address, for `tcp://HOST:PORT` (`*` for all hosts, or a free port) or `ipc://PATH` (`@name`: Linux's abstract
    names). Raises ServerError."""
    transport, _, place = address.partition("://")
    if transport == "tcp" and ":" in place:
        host, _, port = place.rpartition(":")
        if port == "*" or (port.isascii() and port.isdigit()):
            listener, numeric = listen_on_tcp(host.strip("[]"), 0 if port == "*" else int(port[:6]))
            return listener, f"tcp://{numeric}"
    if transport != "ipc" or not place:
        raise ServerError(f"cannot listen on '{address}'. Expected tcp://HOST:PORT or ipc://PATH.")
    path = f"\0{place[1:]}" if place.startswith("@") else place
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not place.startswith("@"):
            _remove_stale(path)
        listener.bind(path)
        _listen(listener)
    except OSError as error:
        listener.close()
        raise ServerError(f"cannot listen on {address}: {error.strerror or error}. Another server may be running there.") from error
    return listener, address


def is_local(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if not address.startswith("tcp://") and not address.startswith("http://"):
        return True
    return ipaddress.ip_address(address.partition("://")[2].rpartition(":")[0].strip("[]").split("%")[0]).is_loopback


def widen(listener: socket.socket) -> None:
    """The full backlog again, after asyncio has set its own."""
    listener.listen(_BACKLOG)


def _listen(listener: socket.socket) -> None:
    listener.listen(_BACKLOG)
    listener.setblocking(False)


def _remove_stale(path: str) -> None:
    """Remove the file of a socket without a listener. Raises OSError when there is one."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OSError("another server listens there already")
            os.unlink(path)
