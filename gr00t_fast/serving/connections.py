"""Who is connected to a policy server, and what each may hold of its memory and time before it has been served.

Nothing is reserved for what a client announces, only for what has arrived. Where places or memory run out, newcomers are still heard: the connection
that has never been answered, of the host that holds most, and the oldest of these, is closed. All of this is on the event loop's thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_CONNECTIONS = 128
_REFUSALS_SHARE = 0.25  # of the event loop's time, for messages that are answered without an inference; the rest is for those that are not


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


class Connections:
    """All connections of one server, in bounded number and with a bounded number of bytes in unfinished messages."""

    def __init__(self, unfinished_limit_bytes: int, max_connections: int = MAX_CONNECTIONS) -> None:
        self._limit_bytes, self._max_connections = unfinished_limit_bytes, max_connections
        self._known: set[Connection] = set()
        self._unfinished_bytes = 0
        self._refusals_until_s = 0.0

    def enter(self, connection: Connection) -> None:
        """A newcomer takes the place of another one when all are taken; where every other one waits for its answer, it is closed itself."""
        self._known.add(connection)
        if len(self._known) > self._max_connections:
            idle = [each for each in self._known if not each.waiting and each is not connection]
            self._close(self._least(idle, Counter(each.host for each in self._known)) if idle else connection)

    def leave(self, connection: Connection) -> None:
        """Calling it again is harmless."""
        if connection in self._known:
            self.holds(connection, 0)
            self._known.discard(connection)

    def expect(self, connection: Connection, what: str, within_s: float | None) -> None:
        """Close the connection unless `what` is done in time; None: it is done."""
        if within_s is None:
            connection.deadlines_s.pop(what, None)
        else:
            connection.deadlines_s[what] = time.monotonic() + within_s

    def holds(self, connection: Connection, size_bytes: int) -> None:
        """Its unfinished message takes so much memory now; 0: it is finished or given up. Too much in all closes connections."""
        if not size_bytes or not connection.unfinished_bytes:
            connection.since_s = time.monotonic()
        self._unfinished_bytes += size_bytes - connection.unfinished_bytes
        connection.unfinished_bytes = size_bytes
        while self._unfinished_bytes > self._limit_bytes:
            holders: Counter[str] = Counter()
            for each in self._known:
                holders[each.host] += each.unfinished_bytes
            self._close(self._least([each for each in self._known if each.unfinished_bytes], holders))

    def pause_s(self, cost_s: float) -> float:
        """How long a connection has to wait after a message that cost `cost_s` of the event loop and asked for no inference.

        All such messages together get a share of the time: a flood of them leaves the rest to the inferences, which are in the same process.
        """
        now_s = time.monotonic()
        self._refusals_until_s = max(self._refusals_until_s, now_s) + cost_s / _REFUSALS_SHARE
        return self._refusals_until_s - now_s

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
