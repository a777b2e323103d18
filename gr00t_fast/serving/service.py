"""What both servers share: a queue in front of the one thread that runs the policy, the token check, and the progress line."""

from __future__ import annotations

import hmac
import logging
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from gr00t_fast.errors import Gr00tFastError, ServerError
from gr00t_fast.measurement import percentiles

log = logging.getLogger(__name__)
MAX_WAITING = 128  # requests in the queue; further ones are refused at once, so that waiting time stays bounded
MAX_PER_CLIENT = 2  # of these, the one in work included: nobody fills the queue by sending ahead
BUDGET_MESSAGES = 4  # the unanswered requests together may be as large as this many of the largest ones
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
MAX_WAIT_S = 15.0  # NVIDIA's clients mean to wait this long; an older request is answered with an error instead of being computed
PROGRESS_EVERY_S = 10.0
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
class Outcome:
    """A result, or why there is none. `fault` is true when the server is to blame and not the request."""

    value: Any = None
    error: str | None = None
    fault: bool = False


@dataclass(frozen=True)
class _Job:
    call: Callable[[], Any]
    answer: Callable[[Outcome], None]
    arrived_s: float
    client: Hashable
    size_bytes: int


class ByteBudget:
    """How much the unanswered requests may take together, in bytes as they were sent. For any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._lock, self._limit_bytes, self._taken_bytes = threading.Lock(), limit_bytes, 0

    def take(self, size_bytes: int) -> None:
        """Raises ServerError when there is no room for so many more."""
        with self._lock:
            if self._taken_bytes + size_bytes > self._limit_bytes:
                raise ServerError(f"{BUSY}requests of {self._taken_bytes} bytes are waiting already. Try again later.")
            self._taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._taken_bytes -= size_bytes


class InferenceQueue:
    """Calls are submitted from any thread and run one after the other in the thread that calls `run`."""

    def __init__(self, traffic: Traffic, budget: ByteBudget, max_waiting: int = MAX_WAITING, max_wait_s: float = MAX_WAIT_S) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # its `put` may be interrupted by a signal handler that puts
        self._traffic, self._budget, self._max_waiting, self._max_wait_s = traffic, budget, max_waiting, max_wait_s
        self._unanswered: Counter[Hashable] = Counter()  # by client
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # never taken by `stop`: a signal handler may interrupt whoever holds it

    def submit(self, call: Callable[[], Any], answer: Callable[[Outcome], None], client: Hashable = None, size_bytes: int = 0) -> None:
        """Queue `call`; `answer` gets its outcome in the running thread.

        `client`: whose requests are counted together; None: this one is not counted. `size_bytes` comes out of the budget until the answer.
        Raises ServerError when too many or too large ones wait, or the server is ending.
        """
        with self._lock:
            if self._stopping.is_set():
                raise ServerError(SHUTTING_DOWN)
            if self._jobs.qsize() >= self._max_waiting:
                raise ServerError(f"{BUSY}{self._max_waiting} requests are waiting already. Try again later.")
            if client is not None and self._unanswered[client] >= MAX_PER_CLIENT:
                raise ServerError(f"{BUSY}{MAX_PER_CLIENT} requests of this client are waiting already. Wait for their answers.")
            self._budget.take(size_bytes)
            self._unanswered[client] += 1
            self._jobs.put(_Job(call, answer, time.monotonic(), client, size_bytes))

    def run(self) -> None:
        """Work until `stop`; what still waits then is answered with an error."""
        while (job := self._jobs.get()) is not None:
            self._work(job)
            del job  # it holds an observation
        with self._lock:  # a `submit` that had seen no `stop` has put its job by now, and later ones are refused
            left = [self._jobs.get() for _ in range(self._jobs.qsize())]
        for job in left:
            if job is not None:
                self._work(job)

    def stop(self) -> None:
        """End `run` after the call in progress. From any thread and from signal handlers."""
        self._stopping.set()
        self._jobs.put(None)

    def _work(self, job: _Job) -> None:
        outcome = Outcome(error=SHUTTING_DOWN, fault=True) if self._stopping.is_set() else self._outcome(job)
        with self._lock:  # before the answer: whoever has it may send the next request
            self._unanswered[job.client] -= 1
            if not self._unanswered[job.client]:
                del self._unanswered[job.client]
        self._budget.give_back(job.size_bytes)
        job.answer(outcome)

    def _outcome(self, job: _Job) -> Outcome:
        began_s = time.monotonic()
        if began_s - job.arrived_s > self._max_wait_s:
            return Outcome(error=f"{BUSY}the request waited longer than {self._max_wait_s:g} s. Try again later.", fault=True)
        try:
            value = job.call()
        except Gr00tFastError as error:
            self._traffic.refused(str(error))
            return Outcome(error=reason_of(error))
        except Exception as error:  # noqa: BLE001 - a bug or a device failure in one request must reach its client and not end the service
            self._traffic.failed(error)
            return Outcome(error=reason_of(f"{type(error).__name__}: {error}"), fault=True)
        self._traffic.served(1000 * (time.monotonic() - began_s))
        return Outcome(value)


class Traffic:
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


def numeric_host(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Family and numeric address of a host to bind (`*` means all). Raises ServerError when the name is unknown."""
    try:
        family, _, _, _, address = socket.getaddrinfo("0.0.0.0" if host == "*" else host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise ServerError(
            f"cannot serve on host '{host}', port {port}: {error}. Use an address of this machine: 127.0.0.1, or 0.0.0.0 for all."
        ) from error
    return family, str(address[0])


def check_port_free(host: str, port: int) -> None:
    """Raises ServerError when nothing can listen there; asked before minutes are spent on loading."""
    family, address = numeric_host(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a port just left is free
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port}: {error.strerror}. Another server may be running there; choose another --port."
            ) from error
