"""A policy that several clients ask: who may, who waits, who is refused, the thread in which the network runs, and what an operator sees of it. No
protocol here.

Of the requests that wait that one is computed next whose chunk must be there first, and with it as many others as still let it be there in time: a
GPU computes four observations in little more time than one, a CPU does not. How long each size of batch takes is measured before anybody is served,
and again by each batch that is.

`server.py` (ZeroMQ) and `http.py` are fronts: each reads requests in its own protocol, asks the `Service`, and writes what it answers.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import ipaddress
import logging
import math
import os
import queue
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gr00t_fast.base.contracts import Policy
from gr00t_fast.base.errors import ConfigError, Gr00tFastError, ObservationError, ServerError, WireError, require
from gr00t_fast.base.measurement import percentiles
from gr00t_fast.inputs.observation import flat_observation, is_nested
from gr00t_fast.serving.wire import UNAUTHORISED_TEXT

log = logging.getLogger(__name__)
SIZES = (1, 2, 4, 8)  # of batches: few, because some engines prepare themselves for each
PATIENCE_S = 1.0  # the place in the queue of a request without a deadline is that of one with so much time
_REFINED_BY = 0.1  # how much of a newly measured time goes into the known one
_MEASURE_S = 10.0  # a size that would take longer than this to measure is not used
MAX_WAITING = 128  # clients in the queue; further ones are refused at once, so that waiting time stays bounded
MAX_BATCH = 8  # observations in one request: what a request of a batch may cost everybody else
BUDGET_MESSAGES = 2  # the unanswered requests together may be as large as this many of the largest ones
MAX_WAIT_S = 15.0  # NVIDIA's clients mean to wait this long; an older request is answered with an error instead of being computed
MAX_DEADLINE_S = 3600.0
_Answer = TypeVar("_Answer")
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
PROGRESS_EVERY_S = 10.0
_MAX_CLIENTS, _OTHERS = 64, "others"  # told apart: whoever connects anew for each request must not fill the memory
_KEPT = 1000  # times of the last requests, for percentiles
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks: an observation, the options of `Policy.get_action`, and when its answer is to be there (monotonic; None: it does not say).

    client: its name, for people. since_s: since when this client waits, this request's or an earlier one's, of which this takes the place.
    """

    observation: Mapping[str, Any]
    options: Mapping[str, Any]
    answer: Future[dict[str, np.ndarray]]
    client: str
    arrived_s: float
    since_s: float
    deadline_s: float | None
    size_bytes: int

    @property
    def due_s(self) -> float:
        """By which requests are ordered."""
        return self.since_s + PATIENCE_S if self.deadline_s is None else self.deadline_s

    def form(self, equal_prompts: bool) -> Hashable:
        """Equal for requests that one inference can compute, with `equal_prompts` (as of `Policy`) those with one instruction. A request of a batch
        is computed alone."""
        if batch_of(self.observation) > 1:
            return id(self)
        pictures = sorted((key, value.shape) for key, value in self.observation.items() if isinstance(value, np.ndarray) and value.ndim > 2)
        texts = sorted(filter(None, map(_text_of, self.observation.values()))) if equal_prompts else []
        return tuple(pictures), tuple(texts), self.options.get("prefix") is not None


def _text_of(value: Any) -> str | None:
    """The text that a value is, or holds as its only item."""
    items = value.flat[:2].tolist() if isinstance(value, np.ndarray) else value if isinstance(value, list | tuple) else [value]
    return items[0] if len(items) == 1 and isinstance(items[0], str) else None


def batch_of(observation: Mapping[str, Any]) -> int:
    """How many observations one is, by its pictures: NVIDIA's have an axis of times, lerobot's none."""
    pictures = ((value, 5 if key.startswith("video.") else 4) for key, value in observation.items() if isinstance(value, np.ndarray))
    return max((len(value) for value, axes in pictures if value.ndim == axes), default=1)


def _seconds_of(infer: Callable[[int], object], size: int) -> float:
    began_s = time.monotonic()
    infer(size)
    return time.monotonic() - began_s


class BatchTimes:
    """Seconds that a batch of each size takes. A size that was not measured is not used, but for one."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def measure(self, infer: Callable[[int], object], most: int) -> None:
        """infer: computes a batch of a size, up to `most`. The fastest call after the first counts: what else a machine does only adds to it."""
        for size in SIZES:
            if size > most or 4 * self.seconds.get(size // 2, 0.0) > _MEASURE_S:
                return
            try:
                first_s = _seconds_of(infer, size)
                self.seconds[size] = min(_seconds_of(infer, size) for _ in range(4 if first_s < _MEASURE_S / 10 else 1))
            except RuntimeError as error:  # torch's, when memory is short
                log.warning("%d requests cannot be computed together: %s", size, error)
                return

    def refine(self, size: int, seconds: float) -> None:
        known = self.seconds.get(size, seconds)
        self.seconds[size] = known + _REFINED_BY * (seconds - known)

    def size_for(self, requests: Sequence[Request], now_s: float) -> int:
        """How many of `requests`, the first ones, are computed together: the most whose deadlines are met, as far as they can be, and who together
        take less time than one after the other. Where none has a deadline: as far as the mean of their waiting becomes shorter."""
        alone_s = self.seconds.get(1, math.inf)
        for size in reversed(SIZES):
            if 1 < size <= len(requests) and size in self.seconds:
                takes_s = self.seconds[size]
                told_s = [request.deadline_s for request in requests[:size] if request.deadline_s is not None]
                in_time = all(now_s + takes_s <= deadline_s for deadline_s in told_s if now_s + alone_s <= deadline_s)
                if in_time and takes_s < alone_s * (size if told_s else (size + 1) / 2):
                    return size
        return 1


class Queue:
    """Requests that wait, one of each client. Not thread-safe."""

    def __init__(self, times: BatchTimes, equal_prompts: bool = False) -> None:
        self.times, self._equal_prompts = times, equal_prompts
        self.waiting: dict[Hashable, Request] = {}
        self._computed: list[Hashable] = []  # clients whose requests were taken last
        self._served_s: dict[Hashable, float] = {}  # when clients got their last answer, as far as somebody has waited since before that

    def take(self, now_s: float) -> list[Request]:
        """The next to be computed together, which leave the queue; none when nobody waits. Who got an answer while another client waited already lets
        that one go first: nobody waits longer than for what is computed, because of a client that is always in a hurry."""
        if not self.waiting:
            return []
        in_order = sorted(self.waiting, key=lambda client: self.waiting[client].due_s)
        oldest_s = min(request.since_s for request in self.waiting.values())
        self._served_s = {client: served_s for client, served_s in self._served_s.items() if served_s > oldest_s}
        first = next((client for client in in_order if client not in self._served_s), in_order[0])  # all were served together
        forms = {client: self.waiting[client].form(self._equal_prompts) for client in in_order}
        alike = [client for client in in_order if client != first and forms[client] == forms[first]]
        size = self.times.size_for([self.waiting[client] for client in (first, *alike)], now_s)
        self._computed = [first, *alike][:size]
        return [self.waiting.pop(client) for client in self._computed]

    def served(self, now_s: float) -> None:
        """Those who were taken last have their answers."""
        self._served_s |= dict.fromkeys(self._computed, now_s)


def reason_of(error: BaseException) -> str:
    """An error as text that does not grow with the request; a bug's with its type in front."""
    text = str(error) if isinstance(error, Gr00tFastError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."


class Figures:
    """Counts requests and says so in the log every few seconds, however many come; a flood of garbage must not fill the disk. For any thread."""

    def __init__(self, every_s: float = PROGRESS_EVERY_S) -> None:
        """Raises MissingExtraError without prometheus_client."""
        prometheus = require("prometheus_client", "serving")
        self._registry, self._text_of = prometheus.CollectorRegistry(), prometheus.generate_latest
        of_client = {"labelnames": ("client",), "registry": self._registry}
        self._served = prometheus.Counter("gr00t_requests_served", "Requests answered with actions", **of_client)
        self._refused = prometheus.Counter("gr00t_requests_refused", "Requests answered with an error", **of_client)
        self._missed = prometheus.Counter("gr00t_deadlines_missed", "Actions that were there later than the client said they must be", **of_client)
        self._batches = prometheus.Histogram("gr00t_batch_size", "Requests computed together", buckets=(1, 2, 4, 8), registry=self._registry)
        times = {"buckets": _BUCKETS_S, "registry": self._registry}
        self._queue_s = prometheus.Histogram("gr00t_queue_seconds", "From a request's arrival until it is computed", **times)
        self._compute_s = prometheus.Histogram("gr00t_compute_seconds", "What the inference of a request took, with those of its batch", **times)
        self._lock, self._every_s, self._said_s = threading.Lock(), every_s, time.monotonic() - every_s
        self._clients: set[str] = set()
        self._counts = {"served": 0, "refused": 0, "deadlines_missed": 0, "batches": 0}
        self._queue_ms: deque[float] = deque(maxlen=_KEPT)
        self._compute_ms: deque[float] = deque(maxlen=_KEPT)
        self._reason, self._last_failure = "", ""

    def batch(self, size: int) -> None:
        self._batches.observe(size)
        with self._lock:
            self._counts["batches"] += 1

    def served(self, client: str, queue_s: float, compute_s: float, missed: bool = False) -> None:
        """missed: whether the answer was later than the client's deadline."""
        with self._lock:
            client = self._known(client)
            self._served.labels(client).inc()
            self._missed.labels(client).inc(missed)
            self._queue_s.observe(queue_s)
            self._compute_s.observe(compute_s)
            self._queue_ms.append(1000 * queue_s)
            self._compute_ms.append(1000 * compute_s)
            self._counts["served"] += 1
            self._counts["deadlines_missed"] += missed
            self._say()

    def refused(self, error: Exception, client: str = "") -> None:
        """A bug leaves a traceback in the log, but not the same one again and again."""
        reason = reason_of(error)
        with self._lock:
            if not isinstance(error, Gr00tFastError) and reason != self._last_failure:
                self._last_failure = reason
                log.error("a request of %s failed", client or "a client", exc_info=error)
            self._refused.labels(self._known(client)).inc()
            self._counts["refused"] += 1
            self._reason = f"{reason[:300]!r}{f' ({client})' if client else ''}"
            self._say()

    def status(self) -> dict[str, Any]:
        """Counts since the start, and percentiles in ms of the last requests; JSON-ready."""
        with self._lock:
            return self._status()

    def _status(self) -> dict[str, Any]:
        times = {"queue_ms": percentiles(self._queue_ms), "compute_ms": percentiles(self._compute_ms)}
        return {"clients": len(self._clients), **self._counts, **times}

    def serve(self, port: int) -> None:
        """Answer GET /metrics at a port of this machine, in a thread of its own. Raises ServerError."""
        try:
            require("prometheus_client", "serving").start_http_server(port, "127.0.0.1", self._registry)
        except OSError as error:
            raise ServerError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}. Give another --metrics_port.") from error

    def exposition(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(self._text_of(self._registry))

    def _known(self, client: str) -> str:
        name = client if client in self._clients or len(self._clients) < _MAX_CLIENTS else _OTHERS
        self._clients.add(name)
        return name

    def _say(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < self._every_s:
            return
        log.info("%s", status_line(self._status(), self._reason))
        self._said_s = now_s


def status_line(status: dict[str, Any], last_refusal: str = "") -> str:
    """`status` of Figures in one line."""
    if not status["served"]:
        text = "no request served"
    else:
        compute, queue = status["compute_ms"], status["queue_ms"]
        of_each = status["served"] / max(status["batches"], 1)
        text = f"{status['served']} requests served, p50 {compute['p50']:.1f} ms, p95 {compute['p95']:.1f} ms, {of_each:.1f} in a batch; "
        text += f"waited p50 {queue['p50']:.1f} ms, p95 {queue['p95']:.1f} ms"
        if status["deadlines_missed"]:
            text += f"; {status['deadlines_missed']} later than their deadline"
    refused = f"; {status['refused']} refused" if status["refused"] else ""
    return f"{text}{refused}{f', the last one because: {last_refusal}' if refused and last_refusal else ''}"


log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5555


def string_keyed(value: Any, name: str) -> dict[str, Any]:
    """Raises WireError for anything but a map from texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"{name}: expected a map from names to values, got {type(value).__name__}.")
    return value


class Service:
    """One policy, for all who ask: requests from any thread wait here and are inferred in the thread that calls `run`, several together where that
    pays (`BatchTimes`).

    Each client has one place: a later request takes the place of an earlier one that still waits, which its client has given up.
    """

    def __init__(
        self, policy: Policy, api_token: str | None, limit_bytes: int, max_waiting: int = MAX_WAITING, max_wait_s: float = MAX_WAIT_S
    ) -> None:
        """`limit_bytes`: of all unanswered requests together, as they were sent. Refusals are counted in `figures` by who sends them."""
        self.policy, self.api_token, self.figures = policy, api_token, Figures()
        self.times = BatchTimes()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may be interrupted by a signal handler that puts
        self.queue = Queue(self.times, policy.equal_prompts)
        self._running_bytes = 0
        self._limit_bytes, self._max_waiting, self._max_wait_s = limit_bytes, max_waiting, max_wait_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # never taken by `stop`: a signal handler may interrupt whoever holds it

    def check_token(self, given: Any) -> None:
        """Raises ServerError, equally late wherever the two differ."""
        text, expected = given if isinstance(given, str) else "", self.api_token
        if expected is not None and not hmac.compare_digest(text.encode("utf-8", "surrogatepass"), expected.encode("utf-8", "surrogatepass")):
            raise ServerError(UNAUTHORISED_TEXT, ServerError.UNAUTHORISED)

    def measure_batches(self, most: int = SIZES[-1]) -> None:
        """How long batches take, up to `most` together, of a policy that has a network; nothing where it computes one call at a time. To be asked
        before `run`, in its thread. Raises what the policy raises."""
        most = min(most, self.policy.max_batch)
        if most == 1:
            return
        log.info("measuring batches")
        # Given, so that a seed means the same noise as ever.
        noise: np.ndarray = np.zeros((1, *self.policy.chunk_shape), np.float32)  # type: ignore[attr-defined]
        call = {"observation": self.policy.example_observation(), "noise": noise}  # type: ignore[attr-defined]
        self.times.measure(lambda size: self.policy.get_actions([call] * size) if size > 1 else self.policy.get_action(**call), most)

    def ask(
        self, observation: Any, client: Hashable, size_bytes: int = 0, name: str = "", deadline_s: Any = None, **options: Any
    ) -> Future[dict[str, np.ndarray]]:
        """Queue a request, flat or in N1.7's nested form, for `Policy.get_action` with `options`. The future gets the actions or the error, in the
        thread of `run` unless a later request of the client comes first; it cannot be cancelled. name: of the client, for people. deadline_s: in how
        many seconds the answer is to be there; None: as soon as those who came before have theirs.

        Raises WireError or ObservationError for what is no observation, deadline, or too many at once, and ServerError when too many or too large
        requests wait or the server is ending.
        """
        observation, now_s = _observation(observation), time.monotonic()
        if deadline_s is not None and not (type(deadline_s) in (int, float) and 0 < deadline_s <= MAX_DEADLINE_S):
            raise WireError(f"deadline_s: expected seconds from now, more than 0 and at most {MAX_DEADLINE_S:g}, got {str(deadline_s)[:80]}.")
        due_s, future = None if deadline_s is None else now_s + deadline_s, Future[dict[str, np.ndarray]]()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._stopping.is_set():
                raise _stopping_error()
            waiting = self.queue.waiting
            replaced = waiting.get(client)
            others_bytes = self._running_bytes + sum(request.size_bytes for request in waiting.values() if request is not replaced)
            if (replaced is None and len(waiting) >= self._max_waiting) or others_bytes + size_bytes > self._limit_bytes:
                raise ServerError(f"busy: {len(waiting)} requests are waiting, {others_bytes} bytes in all. Try again later.", ServerError.BUSY)
            since_s = now_s if replaced is None else replaced.since_s
            waiting[client] = Request(observation, options, future, name, now_s, since_s, due_s, size_bytes)
            self._wake.put(None)
        if replaced is not None:
            replaced.answer.set_exception(ServerError("a later request of the same client took its place.", ServerError.REPLACED))
        return future

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Drop, without an answer, the waiting requests of clients for which `gone` is true."""
        with self._lock:
            for client in [client for client in self.queue.waiting if gone(client)]:
                del self.queue.waiting[client]

    def status(self) -> dict[str, Any]:
        """For an operator, JSON-ready: `Figures.status`, how many wait, and the measured times of batches in ms."""
        times_ms = {str(size): round(1000 * seconds, 1) for size, seconds in self.times.seconds.items()}
        return {"waiting": len(self.queue.waiting), **self.figures.status(), "batch_ms": times_ms}

    def run(self) -> None:
        """Infer until `stop`; what still waits then is answered with an error."""
        while not self._stopping.is_set():
            self._wake.get()
            with self._lock:
                together = self.queue.take(time.monotonic())
                self._running_bytes = sum(request.size_bytes for request in together)
            if together:
                self._infer(together)
            del together  # it holds observations
        with self._lock:  # an `ask` that had seen no `stop` has queued its request by now, and later ones are refused
            left = [self.queue.waiting.pop(client) for client in list(self.queue.waiting)]
        for request in left:
            request.answer.set_exception(_stopping_error())

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._stopping.set()
        self._wake.put(None)

    def _infer(self, requests: list[Request]) -> None:
        began_s = time.monotonic()
        fresh = [request for request in requests if began_s - request.arrived_s <= self._max_wait_s]
        answers = dict(zip(fresh, self._answers(fresh), strict=True))
        ended_s = time.monotonic()
        with self._lock:
            self.queue.served(ended_s)
        for request in requests:
            too_old = ServerError(f"busy: the request waited longer than {self._max_wait_s:g} s. Try again later.", ServerError.BUSY)
            answer = answers.get(request, too_old)
            self._running_bytes -= request.size_bytes  # before the answer: whoever has it may send the next request
            if isinstance(answer, Exception):
                request.answer.set_exception(answer)
            else:
                missed = request.deadline_s is not None and ended_s > request.deadline_s
                self.figures.served(request.client, began_s - request.arrived_s, ended_s - began_s, missed)
                request.answer.set_result(answer)

    def _answers(self, requests: list[Request]) -> list[dict[str, np.ndarray] | Exception]:
        """The answers of one inference; where that fails as a whole, of one inference each: only a wrong request gets an error."""
        answers: list[dict[str, np.ndarray] | Exception] = []
        if len(requests) > 1:
            calls = [{"observation": request.observation, **request.options} for request in requests]
            try:
                answers = self._timed(len(requests), lambda: self.policy.get_actions(calls))
            except Exception as error:  # noqa: BLE001 - a bug or a device failure in one request must not reach the others
                log.warning("%d requests could not be computed together (%s); now each alone", len(requests), reason_of(error))
        for request in [] if answers else requests:
            try:
                answers.append(self._timed(1, functools.partial(self.policy.get_action, dict(request.observation), **request.options)))
            except Exception as error:  # noqa: BLE001 - a bug or a device failure in one request must reach its client and not end the service
                answers.append(error)
        return answers

    def _timed(self, size: int, infer: Callable[[], _Answer]) -> _Answer:
        began_s = time.monotonic()
        answer = infer()
        self.times.refine(size, time.monotonic() - began_s)
        self.figures.batch(size)
        return answer


def _observation(value: Any) -> dict[str, Any]:
    observation = string_keyed(flat_observation(value) if is_nested(value) else value, "observation")
    if (batch := batch_of(observation)) > MAX_BATCH:
        raise ObservationError(f"observation: a batch of {batch}; this server takes at most {MAX_BATCH} at once. Send several requests.")
    return observation


def _stopping_error() -> ServerError:
    return ServerError("the server is shutting down.", ServerError.STOPPING)


class PolicyServerBase(ABC):
    """A front of a `Service`: inference in the thread that calls `run`, talk with clients in another one."""

    def __init__(self, service: Service, address: str) -> None:
        self.address, self.service = address, service
        if service.api_token is None and not _is_local(address):
            log.warning("%s can be reached from other machines and no api_token is asked for", address)

    @property
    def port(self) -> int:
        """TCP port, also when 0 was asked for."""
        return int(self.address.rpartition(":")[2])

    def run(self) -> None:
        """Answer requests in this thread until `stop`. Then closes the socket."""
        log.info("answering on %s", self.address)
        with ThreadPoolExecutor(1, "policy-server") as pool:
            talk = pool.submit(self._talk)
            talk.add_done_callback(lambda _: self.service.stop())  # a server that cannot talk must not go on silently
            try:
                self.service.run()
            finally:
                self._end_talk()
                wait((talk,))
                self.close()
        talk.result()

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self.service.stop()

    @abstractmethod
    def close(self) -> None:
        """Close the socket of a server that does not run (any more)."""

    @abstractmethod
    def _talk(self) -> None:
        """Speak with clients until `_end_talk` was called."""

    @abstractmethod
    def _end_talk(self) -> None: ...


def listen_on_tcp(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one, host * means all. Raises ServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(("0.0.0.0" if host == "*" else host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise cannot_listen(f"{host}:{port}", error) from error


def check_free(address: str) -> None:
    """Raises ServerError when no server can listen there, ConfigError for a path that no socket can have. Asked before minutes are spent on loading,
    and because ZeroMQ takes port 70000 for 4464 and removes whatever file is in the way."""
    transport, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    if transport == "tcp" and port.isdigit():
        listen_on_tcp(host.strip("[]"), int(port)).close()
    elif transport == "ipc" and not place.startswith("@"):  # @: Linux's abstract names, no files
        try:
            _check_path(place)
        except OSError as error:
            raise cannot_listen(address, error) from error


def _check_path(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if not os.path.exists(path):
            try:
                probe.bind(path)
            except OSError as error:
                raise ConfigError(
                    f"cannot make a socket at {path}: {error}. Give a short path in a directory of yours: --address=ipc://PATH."
                ) from error
            os.unlink(path)
            return
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError("it is a file and no socket")
        with contextlib.suppress(ConnectionError):
            probe.connect(path)
            raise OSError("another server listens there already")


def cannot_listen(place: str, error: Exception) -> ServerError:
    reason = getattr(error, "strerror", None) or error
    return ServerError(f"cannot listen on {place}: {reason}. Give an address of this machine that no other server has: --host, --port, --address.")


def _is_local(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    transport, _, place = address.partition("://")
    return transport == "ipc" or ipaddress.ip_address(place.rpartition(":")[0].strip("[]").split("%")[0]).is_loopback
