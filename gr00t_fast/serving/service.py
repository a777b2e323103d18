"""What both servers share: a queue in front of the one thread that runs the policy, a thread that talks, the token check, and the progress line."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from gr00t_fast.errors import Gr00tFastError, ObservationError, ServerError
from gr00t_fast.measurement import percentiles
from gr00t_fast.serving.connections import Connection, Connections

log = logging.getLogger(__name__)
MAX_WAITING = 128  # requests in the queue; further ones are refused at once, so that waiting time stays bounded
MAX_PER_CLIENT = 2  # of one connection; what it sends ahead of these stays in the network until one of them is answered
MAX_BATCH = 8  # observations in one request: what a request of a batch may cost everybody else
BUDGET_MESSAGES = 2  # the unanswered requests together may be as large as this many of the largest ones
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
MAX_WAIT_S = 15.0  # NVIDIA's clients mean to wait this long; an older request is answered with an error instead of being computed
PROGRESS_EVERY_S = 10.0
_SWEEP_S = 0.05
UNAUTHORISED = "Unauthorized: Invalid API token"  # NVIDIA's wording, which clients may compare
SHUTTING_DOWN, BUSY = "the server is shutting down.", "busy: "  # refusals that pass: a client that can wait may look for them


def same_token(given: Any, expected: str | None) -> bool:
    """True when no token is asked for or `given` is the expected one; takes equally long wherever the two differ."""
    if expected is None:
        return True
    text = given if isinstance(given, str) else ""
    return hmac.compare_digest(text.encode("utf-8", "surrogatepass"), expected.encode("utf-8", "surrogatepass"))


def reason_of(error: object) -> str:
    """An error as text that does not grow with the request."""
    text = str(error)
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."


@dataclass(frozen=True)
class InferenceResult:
    """A result, or why there is none. `fault` is true when the server is to blame and not the request."""

    value: Any = None
    error: str | None = None
    fault: bool = False


@dataclass(frozen=True, eq=False)
class _Job:
    call: Callable[[], Any]
    answer: Callable[[InferenceResult], None]
    client: Connection
    arrived_s: float
    size_bytes: int


def _host(job: _Job) -> str:
    return job.client.host


def _connection(job: _Job) -> int:
    return id(job.client)


class InferenceQueue:
    """Calls are submitted from any thread and run one after the other in the thread that calls `run`.

    Calls of clients that have hung up are not run. Clients whose requests were refused lately come after all others, hosts take turns, and of one
    host the oldest call comes first. Where places or bytes run out, a newcomer takes those of the host, or the connection, that holds most.
    """

    def __init__(self, traffic: RequestLog, limit_bytes: int, max_waiting: int = MAX_WAITING, max_wait_s: float = MAX_WAIT_S) -> None:
        """`limit_bytes`: of all unanswered requests together, as they were sent."""
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may be interrupted by a signal handler that puts
        self._waiting: list[_Job] = []
        self._running_bytes = 0
        self._served_s: dict[str, float] = {}  # when a call of a host was taken for the last time, for as long as a call may wait
        self._request_log, self._limit_bytes, self._max_waiting, self._max_wait_s = traffic, limit_bytes, max_waiting, max_wait_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # never taken by `stop`: a signal handler may interrupt whoever holds it

    def submit(self, call: Callable[[], Any], answer: Callable[[InferenceResult], None], client: Connection, size_bytes: int = 0) -> None:
        """Queue `call`; `answer` gets its outcome, in the running thread unless it is given up for another one.

        Raises ServerError when too many or too large ones wait, or the server is ending.
        """
        job = _Job(call, answer, client, time.monotonic(), size_bytes)
        with self._lock:
            if self._stopping.is_set():
                raise ServerError(SHUTTING_DOWN)
            dropped = [] if self._fits(job) else self._without_gone()
            while not self._fits(job) and (other := self._more_than_its_share(job)) is not None:
                self._waiting.remove(other)
                dropped.append(other)
            if fits := self._fits(job):
                self._waiting.append(job)
                self._wake.put(None)
            refusal = f"{BUSY}{len(self._waiting)} requests of {self._taken_bytes} bytes are waiting already. Try again later."
        for other in dropped:
            other.answer(InferenceResult(error=refusal, fault=True))
        if not fits:
            raise ServerError(refusal)

    def run(self) -> None:
        """Work until `stop`; what still waits then is answered with an error."""
        while not self._stopping.is_set():
            self._wake.get()
            with self._lock:
                gone, job = self._without_gone(), self._next()
            for each in gone:
                each.answer(InferenceResult(error="the client has hung up.", fault=True))
            if job is not None:
                self._work(job)
            del gone, job  # they hold observations
        with self._lock:  # a `submit` that had seen no `stop` has queued its job by now, and later ones are refused
            left, self._waiting = self._waiting, []
        for each in left:
            self._work(each)

    @property
    def _taken_bytes(self) -> int:
        return self._running_bytes + sum(each.size_bytes for each in self._waiting)

    def _fits(self, job: _Job) -> bool:
        return len(self._waiting) < self._max_waiting and self._taken_bytes + job.size_bytes <= self._limit_bytes

    def _without_gone(self) -> list[_Job]:
        """Take out, and return, the calls of clients that have hung up."""
        gone = [each for each in self._waiting if each.client.gone]
        self._waiting = [each for each in self._waiting if each not in gone]
        return gone

    def _more_than_its_share(self, job: _Job) -> _Job | None:
        """The newest call of the host that has most, where that is more than the newcomer's has with `job`; else likewise of its connections."""
        most, own = self._most(self._waiting, _host), [each for each in self._waiting if _host(each) == _host(job)]
        if self._share(most) > self._share([*own, job]):
            return self._most(most, _connection)[-1]
        most, own = self._most(own, _connection), [each for each in own if each.client is job.client]
        return most[-1] if self._share(most) > self._share([*own, job]) else None

    def _most(self, jobs: list[_Job], owner: Callable[[_Job], Any]) -> list[_Job]:
        """Of the owner with the largest share."""
        held: dict[Any, list[_Job]] = {}
        for each in jobs:
            held.setdefault(owner(each), []).append(each)
        return max(held.values(), key=self._share, default=[])

    def _share(self, jobs: list[_Job]) -> float:
        return max(len(jobs) / self._max_waiting, sum(each.size_bytes for each in jobs) / self._limit_bytes)

    def _next(self) -> _Job | None:
        now_s = time.monotonic()
        self._served_s = {host: time_s for host, time_s in self._served_s.items() if now_s - time_s < self._max_wait_s}
        job = min(self._waiting, key=lambda each: (each.client.suspect, self._served_s.get(_host(each), 0.0)), default=None)
        if job is not None:
            self._waiting.remove(job)
            self._served_s[_host(job)], self._running_bytes = now_s, job.size_bytes
        return job

    def stop(self) -> None:
        """End `run` after the call in progress. From any thread and from signal handlers."""
        self._stopping.set()
        self._wake.put(None)

    def _work(self, job: _Job) -> None:
        outcome = InferenceResult(error=SHUTTING_DOWN, fault=True) if self._stopping.is_set() else self._outcome(job)
        self._running_bytes = 0  # before the answer: whoever has it may send the next request
        job.answer(outcome)

    def _outcome(self, job: _Job) -> InferenceResult:
        began_s = time.monotonic()
        if began_s - job.arrived_s > self._max_wait_s:
            return InferenceResult(error=f"{BUSY}the request waited longer than {self._max_wait_s:g} s. Try again later.", fault=True)
        try:
            value = job.call()
        except Gr00tFastError as error:
            self._request_log.refused(str(error))
            return InferenceResult(error=reason_of(error))
        except Exception as error:  # noqa: BLE001 - a bug or a device failure in one request must reach its client and not end the service
            self._request_log.failed(error)
            return InferenceResult(error=reason_of(f"{type(error).__name__}: {error}"), fault=True)
        self._request_log.served(1000 * (time.monotonic() - began_s))
        return InferenceResult(value)


class RequestLog:
    """Counts requests and says so in the log every few seconds, however many come; a flood of garbage must not fill the disk."""

    def __init__(self, every_s: float = PROGRESS_EVERY_S) -> None:
        self._lock, self._every_s, self._said_s = threading.Lock(), every_s, time.monotonic() - every_s
        self._durations_ms: list[float] = []
        self._refused, self._reason, self._last_failure = 0, "", ""

    def served(self, duration_ms: float) -> None:
        with self._lock:
            self._durations_ms.append(duration_ms)
            self._say()

    def refused(self, reason: str) -> None:
        with self._lock:
            self._refused, self._reason = self._refused + 1, reason_of(reason)
            self._say()

    def failed(self, error: Exception) -> None:
        """A traceback in the log, but not the same one again and again."""
        if (failure := reason_of(repr(error))) != self._last_failure:
            self._last_failure = failure
            log.error("a request failed", exc_info=error)
        self.refused(failure)

    def _say(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < self._every_s:
            return
        figures = percentiles(self._durations_ms)
        done = f"{figures['count']} requests served, p50 {figures['p50']:.1f} ms, p95 {figures['p95']:.1f} ms" if figures else "no request served"
        log.info("%s%s", done, f"; {self._refused} refused, the last one because: {self._reason[:300]!r}" if self._refused else "")
        self._said_s, self._durations_ms, self._refused = now_s, [], 0


class PolicyServerBase(ABC):
    """Serves one policy: inference in the thread that calls `run`, everything else in the event loop of another one."""

    def __init__(self, listener: socket.socket, address: str, queue: InferenceQueue, traffic: RequestLog, connections: Connections) -> None:
        self.address = address
        self._listener, self._queue, self._request_log, self._connections = listener, queue, traffic, connections
        self._path = address.removeprefix("ipc://") if address.startswith("ipc://") else ""
        self._talking = threading.Event()
        self._failure: BaseException | None = None

    @property
    def port(self) -> int:
        """TCP port, also when 0 was asked for."""
        return int(self.address.rpartition(":")[2])

    def run(self) -> None:
        """Answer requests in this thread until `stop`. Then closes the socket."""
        talker = threading.Thread(target=self._talk_in_thread, name="policy-server", daemon=True)
        talker.start()
        self._talking.wait()
        log.info("answering on %s", self.address)
        try:
            self._queue.run()
        finally:
            if talker.is_alive():
                self._from_any_thread(self._stopping.set)
            talker.join()
            self.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._queue.stop()

    def close(self) -> None:
        """Close the socket of a server that does not run (any more)."""
        self._listener.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = ""

    def __enter__(self) -> PolicyServerBase:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    async def _talk(self, stopping: asyncio.Event) -> None:
        """Speak with clients until `stopping`."""

    def _from_any_thread(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have the event loop call it. Does nothing when that has ended: `run` raises its failure."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def _talk_in_thread(self) -> None:
        try:
            asyncio.run(self._talk_on_time())
        except BaseException as error:  # noqa: BLE001 - kept for `run`, which raises it: a server that cannot talk must not go on silently
            self._failure = error
        finally:
            self._talking.set()
            self._queue.stop()

    async def _talk_on_time(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(self._note_failure)
        self._talking.set()
        sweeper = asyncio.create_task(self._sweep())
        try:
            await self._talk(self._stopping)
        finally:
            sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._connections.close_overdue()
            self._connections.wake()

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Of one connection: the event loop closes it and goes on with the others."""
        self._request_log.failed(context.get("exception") or RuntimeError(context.get("message")))


def check_batch(observation: dict[str, Any]) -> None:
    """Raises ObservationError for more observations at once than a server computes for one client."""
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and key.startswith("video.") and value.ndim == 5 and len(value) > MAX_BATCH:
            raise ObservationError(f"{key}: a batch of {len(value)}; this server takes at most {MAX_BATCH} at once. Send several requests.")
