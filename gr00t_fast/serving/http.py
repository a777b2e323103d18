"""A policy behind HTTP, in the protocol of NVIDIA's http_server for GR00T N1.5 (json_numpy arrays), from the standard library.

    GET  /health                                    -> {"status": "healthy", "model": "GR00T"}
    POST /act     {"observation": {...}}            -> {"action.<part>": array, ...}
    POST /act     {"encoded": "<the same as text>"} -> likewise, for clients that cannot nest arrays
    errors        {"detail": "<reason>"} with status 400, 401, 404, 411, 413, 500 or 503

NVIDIA's server takes a token and ignores it. Here a request without `Authorization: Bearer <token>` gets 401 when a token is set.
"""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gr00t_fast.contracts import Policy
from gr00t_fast.errors import Gr00tFastError, ServerError, WireError
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    UNAUTHORISED,
    ByteBudget,
    InferenceQueue,
    Outcome,
    Traffic,
    numeric_host,
    reason_of,
    same_token,
)
from gr00t_fast.serving.wire import MAX_MESSAGE_BYTES
from gr00t_fast.serving.wire_json import from_json, to_json

log = logging.getLogger(__name__)
_MAX_BODY_BYTES = MAX_MESSAGE_BYTES * 4 // 3  # base64 makes four bytes of three
_MAX_CONNECTIONS = 128  # a thread each
# A connection is closed when it has not said this much by then, however often it sends another byte.
_HEADER_S = 10.0  # its first request's header
_IDLE_S = 30.0  # another request's header; also for the client to take an answer
_BODY_S = 30.0
_ANSWER_S = 120.0  # no inference takes so long; without it a bug in the queue would block the connection's thread for ever


class HttpPolicyServer:
    """Serves one policy. Listens from construction on, answers while `run` runs."""

    def __init__(self, policy: Policy, host: str = "127.0.0.1", port: int = 5555, api_token: str | None = None) -> None:
        """Port 0 picks a free one. Raises ServerError when it cannot listen there."""
        self._traffic = Traffic()
        budget = ByteBudget(BUDGET_MESSAGES * _MAX_BODY_BYTES)
        self._queue = InferenceQueue(self._traffic, budget)
        family, address = numeric_host(host, port)
        server_class = type("Server", (_Server,), {"address_family": family})
        shared = {"policy": policy, "token": api_token, "queue": self._queue, "traffic": self._traffic, "budget": budget}
        handler = type("Handler", (_Handler,), shared)
        try:
            self._server = server_class((address, port), handler)
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port}: {error.strerror}. Another server may be running there; choose another --port."
            ) from error
        self.port: int = self._server.server_address[1]
        self.address = f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"
        if api_token is None and host not in ("127.0.0.1", "localhost", "::1"):
            log.warning("%s can be reached from other machines and no api_token is asked for", self.address)

    def run(self) -> None:
        """Answer requests until `stop`; inference is in this thread. Then closes the socket."""
        talker = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="http-policy-server", daemon=True)
        talker.start()
        log.info("answering on %s", self.address)
        try:
            self._queue.run()
        finally:
            self._server.shutdown()
            talker.join()
            self.close()

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._queue.stop()

    def close(self) -> None:
        """Close the socket of a server that does not run (any more)."""
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(*args)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._places.acquire(blocking=False)  # when all are taken the connection is closed at once

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection from %s ended with an error", client_address, exc_info=True)  # clients may vanish at any time


class _Refusal(Exception):  # noqa: N818 - not an error of the program: an HTTP answer
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(reason_of(detail))
        self.status = status


class _TimedReader(io.RawIOBase):
    """What comes from a connection, up to a deadline. Raises TimeoutError; a socket's own time-out begins again with every byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.allow(_HEADER_S)

    def allow(self, seconds: float) -> None:
        """From now on."""
        self._deadline_s = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(_IDLE_S)  # for the answer


class _Handler(BaseHTTPRequestHandler):
    policy: Policy
    token: str | None
    queue: InferenceQueue
    traffic: Traffic
    budget: ByteBudget
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gr00t_fast", ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True  # else a reply waits for the client's delayed acknowledgement

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = _TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self._reader.allow(_IDLE_S)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "healthy", "model": "GR00T"})
        else:
            self._send(404, {"detail": "Not Found: GET /health or POST /act"})

    def do_POST(self) -> None:
        try:
            self._send(200, self._act())
        except _Refusal as refusal:
            self.traffic.refused(str(refusal))
            self._send(refusal.status, {"detail": str(refusal)})

    def _act(self) -> Any:
        """A refusal before the body was read ends the connection: what follows on it would be taken for a request."""
        keep, self.close_connection = self.close_connection, True
        size_bytes = self._body_bytes()
        try:
            self.budget.take(size_bytes)
            try:
                self._reader.allow(_BODY_S)
                body = self.rfile.read(size_bytes)
                self.close_connection = keep
                if self.path != "/act":
                    raise _Refusal(404, "Not Found: GET /health or POST /act")
                outcome = self._infer(_observation(body))
            finally:
                self.budget.give_back(size_bytes)
        except WireError as error:
            raise _Refusal(400, str(error)) from error
        except ServerError as error:
            raise _Refusal(503, str(error)) from error
        if outcome.error is not None:
            raise _Refusal(500 if outcome.fault else 400, outcome.error)
        return outcome.value

    def _body_bytes(self) -> int:
        """How long the body is, of a client that may send one."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        given = given.encode("latin-1").decode("utf-8", "surrogateescape")  # http.server reads each byte as one character
        if not same_token(given, self.token):
            raise _Refusal(401, UNAUTHORISED)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(411, "Content-Length is missing or not a number.")
        if len(length) > 12 or int(length) > _MAX_BODY_BYTES:
            raise _Refusal(413, f"at most {_MAX_BODY_BYTES} bytes are accepted. Send fewer or smaller pictures at once.")
        return int(length)

    def _infer(self, observation: dict[str, Any]) -> Outcome:
        future: Future[Outcome] = Future()
        self.queue.submit(lambda: self.policy.get_action(observation), future.set_result)
        try:
            return future.result(timeout=_ANSWER_S)
        except FutureTimeoutError:
            return Outcome(error=f"no result within {_ANSWER_S:g} s", fault=True)

    def _send(self, status: int, message: Any) -> None:
        try:
            body = to_json(message)
        except Gr00tFastError as error:  # the policy returned what cannot travel
            status, body = 500, to_json({"detail": reason_of(error)})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _observation(body: bytes) -> dict[str, Any]:
    payload = from_json(body, _MAX_BODY_BYTES)
    if isinstance(payload, dict) and isinstance(payload.get("encoded"), str) and len(payload) == 1:
        payload = from_json(payload["encoded"].encode("utf-8", "surrogatepass"), _MAX_BODY_BYTES)
    if not isinstance(payload, dict) or not isinstance(payload.get("observation"), dict):
        raise WireError('expected {"observation": {name: value}}.')
    return payload["observation"]
