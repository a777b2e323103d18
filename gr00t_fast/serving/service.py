"""A policy that several clients ask: who may, who waits, who is refused, and the thread in which the network runs. No protocol here.

`server.py` (ZeroMQ) and `http.py` are fronts: each reads requests in its own protocol, asks the `Service`, and writes what it answers.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import os
import queue
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.contracts import Policy
from gr00t_fast.errors import ConfigError, Gr00tFastError, ObservationError, ServerError, WireError
from gr00t_fast.inputs.observation import flat_observation, is_nested
from gr00t_fast.measurement import percentiles
from gr00t_fast.serving.wire import UNAUTHORISED_TEXT

log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5555
MAX_WAITING = 128  # clients in the queue; further ones are refused at once, so that waiting time stays bounded
MAX_BATCH = 8  # observations in one request: what a request of a batch may cost everybody else
BUDGET_MESSAGES = 2  # the unanswered requests together may be as large as this many of the largest ones
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
MAX_WAIT_S = 15.0  # NVIDIA's clients mean to wait this long; an older request is answered with an error instead of being computed
PROGRESS_EVERY_S = 10.0


def reason_of(error: BaseException) -> str:
    """An error as text that does not grow with the request; a bug's with its type in front."""
    text = str(error) if isinstance(error, Gr00tFastError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."


def string_keyed(value: Any, name: str) -> dict[str, Any]:
    """Raises WireError for anything but a map from texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"{name}: expected a map from names to values, got {type(value).__name__}.")
    return value


@dataclass(frozen=True, eq=False)
class _Request:
    observation: dict[str, Any]
    options: dict[str, Any]  # of `Policy.get_action`
    answer: Future[dict[str, np.ndarray]]
    arrived_s: float
    size_bytes: int


class Service:
    """One policy, for all who ask: requests from any thread wait here and are inferred one after the other in the thread that calls `run`.

    Each client has one place: clients take turns in the order in which they came, and a later request takes the place of an earlier one that
    still waits, which its client has given up.
    """

    def __init__(
        self, policy: Policy, api_token: str | None, limit_bytes: int, max_waiting: int = MAX_WAITING, max_wait_s: float = MAX_WAIT_S
    ) -> None:
        """`limit_bytes`: of all unanswered requests together, as they were sent."""
        self.policy, self.api_token, self.log = policy, api_token, RequestLog()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may be interrupted by a signal handler that puts
        self._waiting: dict[Hashable, _Request] = {}  # by client; replacing a value keeps its place
        self._running_bytes = 0
        self._limit_bytes, self._max_waiting, self._max_wait_s = limit_bytes, max_waiting, max_wait_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # never taken by `stop`: a signal handler may interrupt whoever holds it

    def check_token(self, given: Any) -> None:
        """Raises ServerError, equally late wherever the two differ."""
        text, expected = given if isinstance(given, str) else "", self.api_token
        if expected is not None and not hmac.compare_digest(text.encode("utf-8", "surrogatepass"), expected.encode("utf-8", "surrogatepass")):
            raise ServerError(UNAUTHORISED_TEXT, ServerError.UNAUTHORISED)

    def ask(self, observation: Any, client: Hashable, size_bytes: int = 0, **options: Any) -> Future[dict[str, np.ndarray]]:
        """Queue a request, flat or in N1.7's nested form, for `Policy.get_action` with `options`. The future gets the actions or the error, in the
        thread of `run` unless a later request of the client comes first; it cannot be cancelled.

        Raises WireError or ObservationError for what is no observation or too many at once, and ServerError when too many or too large requests
        wait or the server is ending.
        """
        observation = _observation(observation)
        request = _Request(observation, options, Future(), time.monotonic(), size_bytes)
        request.answer.set_running_or_notify_cancel()
        with self._lock:
            if self._stopping.is_set():
                raise _stopping_error()
            replaced = self._waiting.get(client)
            others_bytes = self._running_bytes + sum(waiting.size_bytes for waiting in self._waiting.values() if waiting is not replaced)
            if (replaced is None and len(self._waiting) >= self._max_waiting) or others_bytes + size_bytes > self._limit_bytes:
                raise ServerError(f"busy: {len(self._waiting)} requests are waiting, {others_bytes} bytes in all. Try again later.", ServerError.BUSY)
            self._waiting[client] = request
            self._wake.put(None)
        if replaced is not None:
            replaced.answer.set_exception(ServerError("a later request of the same client took its place.", ServerError.REPLACED))
        return request.answer

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Drop, without an answer, the waiting requests of clients for which `gone` is true."""
        with self._lock:
            self._waiting = {client: request for client, request in self._waiting.items() if not gone(client)}

    def run(self) -> None:
        """Infer until `stop`; what still waits then is answered with an error."""
        while not self._stopping.is_set():
            self._wake.get()
            with self._lock:
                request = self._waiting.pop(next(iter(self._waiting))) if self._waiting else None
                self._running_bytes = 0 if request is None else request.size_bytes
            if request is not None:
                self._infer(request)
            del request  # it holds an observation
        with self._lock:  # an `ask` that had seen no `stop` has queued its request by now, and later ones are refused
            left, self._waiting = self._waiting, {}
        for request in left.values():
            request.answer.set_exception(_stopping_error())

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._stopping.set()
        self._wake.put(None)

    def _infer(self, request: _Request) -> None:
        actions, failure, began_s = {}, None, time.monotonic()
        try:
            if began_s - request.arrived_s > self._max_wait_s:
                raise ServerError(f"busy: the request waited longer than {self._max_wait_s:g} s. Try again later.", ServerError.BUSY)
            actions = self.policy.get_action(request.observation, **request.options)
            self.log.served(1000 * (time.monotonic() - began_s))
        except Exception as error:  # noqa: BLE001 - a bug or a device failure in one request must reach its client and not end the service
            self.log.refused(error)
            failure = error
        self._running_bytes = 0  # before the answer: whoever has it may send the next request
        if failure is None:
            request.answer.set_result(actions)
        else:
            request.answer.set_exception(failure)


def _observation(value: Any) -> dict[str, Any]:
    observation = flat_observation(value) if is_nested(value) else string_keyed(value, "observation")
    for key, frames in observation.items():
        if isinstance(frames, np.ndarray) and key.startswith("video.") and frames.ndim == 5 and len(frames) > MAX_BATCH:
            raise ObservationError(f"{key}: a batch of {len(frames)}; this server takes at most {MAX_BATCH} at once. Send several requests.")
    return observation


def _stopping_error() -> ServerError:
    return ServerError("the server is shutting down.", ServerError.STOPPING)


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

    def refused(self, error: Exception) -> None:
        """A bug leaves a traceback in the log, but not the same one again and again."""
        reason = reason_of(error)
        with self._lock:
            if not isinstance(error, Gr00tFastError) and reason != self._last_failure:
                self._last_failure = reason
                log.error("a request failed", exc_info=error)
            self._refused, self._reason = self._refused + 1, reason[:300]
            self._say()

    def _say(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < self._every_s:
            return
        figures = percentiles(self._durations_ms)
        done = f"{figures['count']} requests served, p50 {figures['p50']:.1f} ms, p95 {figures['p95']:.1f} ms" if figures else "no request served"
        log.info("%s%s", done, f"; {self._refused} refused, the last one because: {self._reason!r}" if self._refused else "")
        self._said_s, self._durations_ms, self._refused = now_s, [], 0


class PolicyServerBase(ABC):
    """A front of a `Service`: inference in the thread that calls `run`, talk with clients in another one."""

    def __init__(self, service: Service, address: str) -> None:
        self.address, self._service = address, service
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
            talk.add_done_callback(lambda _: self._service.stop())  # a server that cannot talk must not go on silently
            try:
                self._service.run()
            finally:
                self._end_talk()
                wait((talk,))
                self.close()
        talk.result()

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._service.stop()

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
