"""A policy behind a ZeroMQ socket, in the protocols of NVIDIA's GR00T N1.5 and N1.7 inference services: NVIDIA's clients talk to it unchanged.

A request for actions tells its protocol by its form. What cannot be told from the message, the modality configuration, is answered in the form of the
network that is served.

One thread talks (a silent or broken client never holds up the others, and pings are answered while the network computes), and the one that called
`run` infers. `http.py` has the HTTP server, around the same queue.
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
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from gr00t_fast.contracts import ActionPrefix, Policy
from gr00t_fast.errors import Gr00tFastError, ObservationError, ServerError, WireError, require
from gr00t_fast.inputs.observation import flat_observation, is_nested, nested_actions
from gr00t_fast.measurement import percentiles
from gr00t_fast.serving.wire import (
    MAX_MESSAGE_BYTES,
    UNAUTHORISED_TEXT,
    UNKNOWN_ENDPOINT_TEXT,
    decode,
    encode,
    metadata_to_message,
    modality_config_message,
)

log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5555
MAX_WAITING = 128  # clients in the queue; further ones are refused at once, so that waiting time stays bounded
MAX_BATCH = 8  # observations in one request: what a request of a batch may cost everybody else
BUDGET_MESSAGES = 2  # the unanswered requests together may be as large as this many of the largest ones
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
MAX_WAIT_S = 15.0  # NVIDIA's clients mean to wait this long; an older request is answered with an error instead of being computed
PROGRESS_EVERY_S = 10.0
_HANDSHAKE_MS = 10_000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2_000, 10_000  # a machine that vanished without closing its connections is noticed after this long
_UNREAD_MESSAGES = 2  # of one connection; further ones stay in the network
_REFUSED_UP_TO = 2  # times the limit: a message up to this size is refused with a reason, a larger one ends its connection
_LINGER_MS = 1_000  # how long closing waits for the last replies to leave


def same_token(given: Any, expected: str | None) -> bool:
    """True when no token is asked for or `given` is the expected one; takes equally long wherever the two differ."""
    if expected is None:
        return True
    text = given if isinstance(given, str) else ""
    return hmac.compare_digest(text.encode("utf-8", "surrogatepass"), expected.encode("utf-8", "surrogatepass"))


def reason_of(error: BaseException) -> str:
    """An error as text that does not grow with the request; a bug's with its type in front."""
    text = str(error) if isinstance(error, Gr00tFastError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."


def check_batch(observation: dict[str, Any]) -> None:
    """Raises ObservationError for more observations at once than a server computes for one client."""
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and key.startswith("video.") and value.ndim == 5 and len(value) > MAX_BATCH:
            raise ObservationError(f"{key}: a batch of {len(value)}; this server takes at most {MAX_BATCH} at once. Send several requests.")


# What both servers share


@dataclass(frozen=True, eq=False)
class _Job:
    call: Callable[[], Any]
    answer: Callable[[Any, Exception | None], None]
    arrived_s: float
    size_bytes: int


class InferenceQueue:
    """Calls are submitted from any thread and run one after the other in the thread that calls `run`.

    Each client has one place: clients take turns in the order in which they came, and a later request takes the place of an earlier one that
    still waits, which its client has given up.
    """

    def __init__(self, requests: RequestLog, limit_bytes: int, max_waiting: int = MAX_WAITING, max_wait_s: float = MAX_WAIT_S) -> None:
        """`limit_bytes`: of all unanswered requests together, as they were sent."""
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may be interrupted by a signal handler that puts
        self._waiting: dict[Hashable, _Job] = {}  # by client; replacing a value keeps its place
        self._running_bytes = 0
        self._requests, self._limit_bytes, self._max_waiting, self._max_wait_s = requests, limit_bytes, max_waiting, max_wait_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # never taken by `stop`: a signal handler may interrupt whoever holds it

    def submit(self, call: Callable[[], Any], answer: Callable[[Any, Exception | None], None], client: Hashable, size_bytes: int = 0) -> None:
        """Queue `call`; `answer` gets its result or its error, in the running thread unless a later request of the client comes first.

        Raises ServerError when too many or too large ones wait, or the server is ending.
        """
        with self._lock:
            if self._stopping.is_set():
                raise ServerError("the server is shutting down.", ServerError.STOPPING)
            replaced = self._waiting.get(client)
            others_bytes = self._running_bytes + sum(job.size_bytes for job in self._waiting.values() if job is not replaced)
            if (replaced is None and len(self._waiting) >= self._max_waiting) or others_bytes + size_bytes > self._limit_bytes:
                raise ServerError(f"busy: {len(self._waiting)} requests are waiting, {others_bytes} bytes in all. Try again later.", ServerError.BUSY)
            self._waiting[client] = _Job(call, answer, time.monotonic(), size_bytes)
            self._wake.put(None)
        if replaced is not None:
            replaced.answer(None, ServerError("a later request of the same client took its place.", ServerError.REPLACED))

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Drop, without an answer, the waiting calls of clients for which `gone` is true."""
        with self._lock:
            self._waiting = {client: job for client, job in self._waiting.items() if not gone(client)}

    def run(self) -> None:
        """Work until `stop`; what still waits then is answered with an error."""
        while not self._stopping.is_set():
            self._wake.get()
            with self._lock:
                job = self._waiting.pop(next(iter(self._waiting))) if self._waiting else None
                self._running_bytes = 0 if job is None else job.size_bytes
            if job is not None:
                self._work(job)
            del job  # it holds an observation
        with self._lock:  # a `submit` that had seen no `stop` has queued its job by now, and later ones are refused
            left, self._waiting = self._waiting, {}
        for job in left.values():
            job.answer(None, ServerError("the server is shutting down.", ServerError.STOPPING))

    def stop(self) -> None:
        """End `run` after the call in progress. From any thread and from signal handlers."""
        self._stopping.set()
        self._wake.put(None)

    def _work(self, job: _Job) -> None:
        result, error = None, None
        began_s = time.monotonic()
        try:
            if began_s - job.arrived_s > self._max_wait_s:
                raise ServerError(f"busy: the request waited longer than {self._max_wait_s:g} s. Try again later.", ServerError.BUSY)
            result = job.call()
            self._requests.served(1000 * (time.monotonic() - began_s))
        except Exception as failure:  # noqa: BLE001 - a bug or a device failure in one request must reach its client and not end the service
            self._requests.refused(failure)
            error = failure
        self._running_bytes = 0  # before the answer: whoever has it may send the next request
        job.answer(result, error)


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
    """Serves one policy: inference in the thread that calls `run`, everything else in another one."""

    def __init__(self, policy: Policy, api_token: str | None, address: str, max_message_bytes: int) -> None:
        self.address = address
        self._policy, self._token = policy, api_token
        self._requests = RequestLog()
        self._queue = InferenceQueue(self._requests, BUDGET_MESSAGES * max_message_bytes)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        if api_token is None and not _is_local(address):
            log.warning("%s can be reached from other machines and no api_token is asked for", address)

    @property
    def port(self) -> int:
        """TCP port, also when 0 was asked for."""
        return int(self.address.rpartition(":")[2])

    def run(self) -> None:
        """Answer requests in this thread until `stop`. Then closes the socket."""
        talker = threading.Thread(target=self._talk_in_thread, name="policy-server", daemon=True)
        talker.start()
        log.info("answering on %s", self.address)
        try:
            self._queue.run()
        finally:
            self._stopping.set()
            self._end_talk()
            talker.join()
            self.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._queue.stop()

    def __enter__(self) -> PolicyServerBase:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the socket of a server that does not run (any more)."""

    @abstractmethod
    def _talk(self) -> None:
        """Speak with clients until `_stopping` is set and `_end_talk` was called."""

    @abstractmethod
    def _end_talk(self) -> None: ...

    def _talk_in_thread(self) -> None:
        try:
            self._talk()
        except BaseException as error:  # noqa: BLE001 - kept for `run`, which raises it: a server that cannot talk must not go on silently
            self._failure = error
        finally:
            self._queue.stop()


def listen_on_tcp(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one, host * means all. Raises ServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(("0.0.0.0" if host == "*" else host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(f"{host}:{port}", error) from error


def check_port_free(host: str, port: int) -> None:
    """Raises ServerError when nothing can listen there; asked before minutes are spent on loading."""
    listen_on_tcp(host, port).close()


def _cannot_listen(place: str, error: Exception) -> ServerError:
    reason = getattr(error, "strerror", None) or error
    return ServerError(f"cannot listen on {place}: {reason}. Give an address of this machine that no other server has: --host, --port.")


def _is_local(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    transport, _, place = address.partition("://")
    return transport == "ipc" or ipaddress.ip_address(place.rpartition(":")[0].strip("[]").split("%")[0]).is_loopback


# The ZeroMQ server


class PolicyServer(PolicyServerBase):
    """Serves one policy. Listens from construction on (clients' requests wait), answers while `run` runs, until a client with the token kills it."""

    def __init__(
        self,
        policy: Policy,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        api_token: str | None = None,
        address: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Port 0 picks a free one. `address`: `ipc:///tmp/gr00t.sock` or `tcp://HOST:PORT` instead of host and port.

        Raises ServerError when it cannot listen there, and MissingExtraError without pyzmq and msgpack.
        """
        self._zmq, self._max_bytes = require("zmq", "serving"), max_message_bytes
        # answered by the talking thread, which must not touch the policy
        self._modality_config = encode(modality_config_message(policy.get_modality_config(), n1d7=policy.nested))
        self._metadata = None if policy.metadata is None else encode(metadata_to_message(policy.metadata))
        address = address or (f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        self._context = self._zmq.Context()
        self._answers: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()  # of the inference thread; a socket belongs to one thread
        self._wake_talker, self._woken = socket.socketpair()
        self._router = self._context.socket(self._zmq.ROUTER)
        try:
            self._listen(address)
        except BaseException:
            self.close()
            raise
        super().__init__(policy, api_token, self._router.getsockopt(self._zmq.LAST_ENDPOINT).decode(), max_message_bytes)

    def close(self) -> None:
        if not self._context.closed:
            self._router.disable_monitor()  # first: ZeroMQ's own thread blocks for ever when it reports to a reader that is gone
            self._context.destroy(linger=_LINGER_MS)
        self._wake_talker.close()
        self._woken.close()

    def _listen(self, address: str) -> None:
        zmq = self._zmq
        for option, value in (
            (zmq.IPV6, int("[" in address)),
            (zmq.MAXMSGSIZE, _REFUSED_UP_TO * self._max_bytes),
            (zmq.RCVHWM, _UNREAD_MESSAGES),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
        ):
            self._router.setsockopt(option, value)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            _check_place(address)
            self._router.bind(address)
        except (OSError, zmq.ZMQError) as error:
            raise _cannot_listen(address, error) from error

    # The talking thread

    def _talk(self) -> None:
        zmq, poller = self._zmq, self._zmq.Poller()
        for each in (self._router, self._monitor, self._woken):
            poller.register(each, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            self._send_answers()
            self._forget_disconnected()
            if self._router in ready:
                self._receive()
        self._send_answers()

    def _end_talk(self) -> None:
        self._wake_talker.send(b"x")

    def _send_answers(self) -> None:
        while not self._answers.empty():
            self._router.send_multipart(self._answers.get())  # dropped by ZeroMQ when the client has gone

    def _forget_disconnected(self) -> None:
        """Requests of connections that broke are not computed. A connection is known by its file descriptor, which a later one may have again:
        what came over that is not in the queue yet."""
        while self._monitor.poll(0):
            event, _ = self._monitor.recv_multipart()
            descriptor = int.from_bytes(event[2:6], sys.byteorder)
            self._queue.forget(lambda client, descriptor=descriptor: client[0] == descriptor)

    def _receive(self) -> None:
        """Frames are the route back, which ends in an empty frame (a REQ client, perhaps behind proxies), and the message."""
        frames = self._router.recv_multipart(copy=False)
        self._forget_disconnected()
        parts = [frame.buffer for frame in frames]
        length = next((number for number, part in enumerate(parts) if not len(part)), len(parts) - 1) + 1
        route, message = [bytes(part) for part in parts[:length]], parts[length:]
        if route[-1]:
            self._requests.refused(WireError("frames that no REQ client sends"))  # a reply would have no address
            return
        try:
            if len(message) != 1:
                raise WireError(f"expected a message of one part, got {len(message)}.")
            reply = self._answer(message[0], route, frames[-1].get(self._zmq.SRCFD))
        except Exception as error:  # noqa: BLE001 - no message, whatever it holds, may end the service for the others
            self._requests.refused(error)
            reply = _error_message(error)
        if reply is not None:
            self._router.send_multipart([*route, reply])

    def _answer(self, message: memoryview, route: list[bytes], descriptor: int) -> bytes | None:
        """The reply, or None when it comes later. Raises Gr00tFastError with the reason of a refusal."""
        request = decode(message, self._max_bytes)
        if not isinstance(request, dict):
            raise WireError(f'expected a map with "endpoint" and "data", got {type(request).__name__}.')
        if not same_token(request.get("api_token"), self._token):
            raise ServerError(UNAUTHORISED_TEXT, ServerError.UNAUTHORISED)
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str):
            raise WireError(f"endpoint: expected text, got {type(endpoint).__name__}.")
        if endpoint == "ping":
            return encode({"status": "ok", "message": "Server is running"})
        if endpoint == "get_modality_config":
            return self._modality_config
        if endpoint == "get_facts" and self._metadata is not None:  # an extension, like those below
            return self._metadata
        if endpoint == "reset":  # nothing to do: what belongs to an episode is with the client, and the policy is everybody's
            return encode({"status": "ok"})
        if endpoint == "kill":
            return self._kill()
        call, n1d7 = self._policy_call(endpoint, request.get("data", {}))
        correlated = len(route) > 2 and len(route[-2]) == 4  # the number of the request, which REQ_CORRELATE puts there
        client = (descriptor, *route[: -2 if correlated else -1])

        def answer(result: Any, error: Exception | None) -> None:
            self._answers.put([*route, _answer_message(result, error, n1d7)])
            self._wake_talker.send(b"x")

        self._queue.submit(call, answer, client, len(message))
        return None

    def _policy_call(self, endpoint: str, data: Any) -> tuple[Callable[[], Any], bool]:
        """The call, and whether its answer is in the form of N1.7."""
        if endpoint == "get_action" and isinstance(data, dict) and is_nested(data.get("observation")):
            nested = _observation(flat_observation(data["observation"]), "data.observation")
            return lambda: [nested_actions(self._policy.get_action(nested)), {}], True
        if endpoint == "get_action":
            if isinstance(data, dict) and isinstance(data.get("observation"), dict):
                keys = ", ".join(str(key)[:40] for key in [*data["observation"]][:8])
                raise ObservationError(
                    'data.observation: expected {"video": {...}, "state": {...}, "language": {...}}, N1.7\'s nested form, or the flat keys in data '
                    f"itself, N1.5's protocol; got the keys {keys}."
                )
            observation = _observation(data, "data")
            return lambda: self._policy.get_action(observation), False
        if endpoint == "get_action_with_options":  # an extension: NVIDIA's server answers it with "Unknown endpoint"
            request = _string_keyed(data, "data")
            observation, options = _observation(request.get("observation"), "observation"), _options(request)
            return lambda: self._policy.get_action(observation, **options), False
        raise ServerError(f"{UNKNOWN_ENDPOINT_TEXT}: {endpoint[:80]}", ServerError.UNKNOWN_ENDPOINT)

    def _kill(self) -> bytes:
        if self._token is None:
            raise ServerError("kill is disabled, because anybody could send it: start the server with an api_token, or stop it with Ctrl-C.")
        log.info("killed by a client")
        self.stop()
        return encode({"status": "ok", "message": "Server is shutting down"})


def _answer_message(result: Any, error: Exception | None, n1d7: bool) -> bytes:
    try:
        return encode(result, n1d7) if error is None else _error_message(error)
    except WireError as unsendable:  # of what the policy returned
        return _error_message(unsendable)


def _error_message(error: Exception) -> bytes:
    code = getattr(error, "code", "")
    return encode({"error": reason_of(error)} | ({"code": code} if code else {}))


def _check_place(address: str) -> None:
    """ZeroMQ takes port 70000 for 4464, and removes whatever file is in the way. Raises ServerError where it cannot, and OSError where it must not
    listen."""
    transport, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    if transport == "tcp" and port.isdigit():
        check_port_free(host.strip("[]"), int(port))
    if transport != "ipc" or place.startswith("@") or not os.path.exists(place):
        return
    if not stat.S_ISSOCK(os.stat(place).st_mode):
        raise OSError("it is a file and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionError):
        probe.connect(place)
        raise OSError("another server listens there already")


def _observation(value: Any, name: str) -> dict[str, Any]:
    observation = _string_keyed(value, name)
    check_batch(observation)
    return observation


def _options(request: dict[str, Any]) -> dict[str, Any]:
    """`noise` and `prefix` of `Policy.get_action`, as far as they were sent."""
    noise = request.get("noise")
    options = {} if noise is None else {"noise": noise.copy() if isinstance(noise, np.ndarray) else noise}  # torch complains of read-only arrays
    if request.get("prefix") is not None:
        prefix = _string_keyed(request["prefix"], "prefix")
        delay, method = prefix.get("delay"), prefix.get("method")
        if type(delay) is not int or not isinstance(method, str) or method not in ("rtc", "prefix"):
            got = f"{str(delay)[:80]} and {str(method)[:80]}"
            raise WireError(f"prefix: expected a whole number as delay and rtc or prefix as method, got {got}.")
        options["prefix"] = ActionPrefix(_string_keyed(prefix.get("actions"), "prefix.actions"), delay, method)
    return options


def _string_keyed(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"{name}: expected a map from names to values, got {type(value).__name__}.")
    return value
