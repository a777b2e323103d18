"""A policy behind HTTP, in the protocol of NVIDIA's http_server for GR00T N1.5 (json_numpy arrays), on uvicorn. NVIDIA has none for N1.7.

    GET  /health                                    -> {"status": "healthy", "model": "GR00T"}
    POST /act     {"observation": {...}}            -> {"action.<part>": array, ...}
    POST /act     {"encoded": "<the same as text>"} -> likewise, for clients that cannot nest arrays
                  an observation in N1.7's nested form (gr00t_fast/inputs/observation.py) -> likewise
    errors        {"detail": "<reason>"} with status 400, 401, 403, 404, 408, 413, 500 or 503

NVIDIA's server takes a token and ignores it. Here a request without `Authorization: Bearer <token>` gets 401 when a token is set.
A web page must not reach the server through the browser of somebody on this network: requests with an Origin are refused, and so are those whose Host
is a name that is not this machine's (a page's own name, made to point here).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from gr00t_fast.contracts import Policy
from gr00t_fast.errors import Gr00tFastError, ServerError, WireError, require
from gr00t_fast.inputs.observation import flat_observation, is_nested
from gr00t_fast.serving.connections import ACCEPTED_AT_ONCE, Connection, Connections, is_local, listen_on_tcp, widen
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    UNAUTHORISED,
    InferenceQueue,
    InferenceResult,
    PolicyServerBase,
    RequestLog,
    check_batch,
    reason_of,
    same_token,
)
from gr00t_fast.serving.wire import from_json, to_json

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 2**24 + 2**16  # two frames of 1920x1080 as base64; ZeroMQ carries more
# A connection is closed when it has not said this much by then, however often it sends another byte.
HEADER_S = 10.0  # its first request's header
IDLE_S = 30.0  # another request's header; also for the client to take an answer
BODY_S = 30.0
_ANSWER_S = 120.0  # no inference takes so long; without it a bug in the queue would keep the connection for ever
_REFUSAL_COST_S = 0.0005  # of the event loop, besides what reading the body took: uvicorn's reading of the header
_BYTE_COST_S = 2e-9  # reading a body
_STOP_S = 1
_UNCOUNTED_BYTES = 2**18  # MAX_CONNECTIONS times this is little
_LOCAL_NAMES = ("localhost",)
_Event = dict[str, Any]


class HttpPolicyServer(PolicyServerBase):
    """Serves one policy. Listens from construction on, answers while `run` runs."""

    def __init__(
        self, policy: Policy, host: str = "127.0.0.1", port: int = 5555, api_token: str | None = None, host_names: Collection[str] = ()
    ) -> None:
        """Port 0 picks a free one. `host_names`: further names by which clients call this machine, besides its own and all numeric addresses.

        Raises ServerError when it cannot listen there, and MissingExtraError without uvicorn.
        """
        self._uvicorn = require("uvicorn", "serving")
        self._policy, self._token = policy, api_token
        self._names = {name.lower() for name in (*_LOCAL_NAMES, host, socket.gethostname(), f"{socket.gethostname()}.local", *host_names)}
        self._records: dict[tuple[str, int], Connection] = {}  # by the client's address and port
        listener, numeric = listen_on_tcp(host, port)
        traffic, connections = RequestLog(), Connections()
        super().__init__(listener, f"http://{numeric}", InferenceQueue(traffic, BUDGET_MESSAGES * MAX_BODY_BYTES), traffic, connections)
        if api_token is None and not is_local(self.address):
            log.warning("%s can be reached from other machines and no api_token is asked for", self.address)

    async def _talk(self, stopping: asyncio.Event) -> None:
        config = self._uvicorn.Config(
            self._application,
            http=_watched_protocol(self._connections, self._records),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.CRITICAL + 1,  # what clients do wrong is counted by RequestLog; a line for each would fill the disk
            access_log=False,
            server_header=False,
            proxy_headers=False,  # would believe whoever calls from this machine
            timeout_keep_alive=int(IDLE_S),
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=_STOP_S,
        )
        server = self._uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            widen(self._listener)
        waiting = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        waiting.cancel()
        await serving
        self._connections.close_all()

    # --- one request -------------------------------------------------------------------------------------------------------------------

    async def _application(self, scope: _Event, receive: Callable[[], Awaitable[_Event]], send: Callable[[_Event], Awaitable[None]]) -> None:
        record = self._records.get(tuple(scope.get("client") or ()))
        if record is None:  # closed meanwhile
            return
        self._connections.expect(record, "header", None)
        status, message, keep, pause_s = 200, None, True, 0.0
        try:
            message = await self._respond(scope, receive, record)
        except _Refusal as refusal:  # it holds what was refused, so nothing is waited for in here
            self._request_log.refused(str(refusal))
            record.refused_s = time.monotonic()
            status, message, keep = refusal.status, {"detail": str(refusal)}, refusal.keep
            pause_s = 0.0 if record.gone else self._connections.refusals.pause_s(_REFUSAL_COST_S + refusal.cost_s)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - no request, whatever it holds, may end the service for the others
            self._request_log.failed(error)
            status, message, keep = 500, {"detail": reason_of(f"{type(error).__name__}: {error}")}, False
        finally:
            self._connections.holds(record, 0)
        if record not in self._connections:
            return
        await asyncio.sleep(pause_s)
        await _send(send, status, message, keep)
        self._connections.expect(record, "header", IDLE_S)

    async def _respond(self, scope: _Event, receive: Callable[[], Awaitable[_Event]], record: Connection) -> Any:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        self._check_sender(headers)
        route = (scope["method"], scope["path"])
        if route == ("GET", "/health"):
            return {"status": "healthy", "model": "GR00T"}
        given = headers.get("authorization", b"").decode("utf-8", "surrogateescape").removeprefix("Bearer ")
        if not same_token(given, self._token):
            raise _Refusal(401, UNAUTHORISED)
        if route != ("POST", "/act"):
            raise _Refusal(404, "Not Found: GET /health or POST /act")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        return await self._act(await self._body_in_time(receive, record), record)

    def _check_sender(self, headers: dict[str, bytes]) -> None:
        """Raises _Refusal for a request that a web page makes in somebody's browser."""
        if "origin" in headers:
            raise _Refusal(403, "requests of web pages (with an Origin header) are refused.")
        host = headers.get("host", b"").decode("latin-1").strip().lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name.split("%")[0])
            return
        if host and name not in self._names:  # HTTP/1.0 sends none, a browser always
            raise _Refusal(403, f"Host '{name[:80]}' is no name of this server. Call it by its address, or start it with --host_names={name[:80]}.")

    async def _body_in_time(self, receive: Callable[[], Awaitable[_Event]], record: Connection) -> bytearray:
        try:
            return await asyncio.wait_for(self._body(receive, record), BODY_S)
        except asyncio.TimeoutError:
            raise _Refusal(408, f"the body did not arrive within {BODY_S:g} s.") from None

    async def _body(self, receive: Callable[[], Awaitable[_Event]], record: Connection) -> bytearray:
        """Counted as it arrives. Raises _Refusal."""
        body = bytearray()
        try:
            while True:
                event = await receive()
                if event["type"] == "http.disconnect" or record not in self._connections:
                    raise _Refusal(400, "the client closed the connection in the middle of its request.")
                body += event["body"]
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                self._connections.holds(record, len(body) if len(body) > _UNCOUNTED_BYTES else 0)
                go_on = asyncio.Event()
                if not self._connections.may_go_on(record, go_on.set):
                    record.hold()
                    await go_on.wait()
                    record.go_on()
                if self._connections.crowded and len(body) > _UNCOUNTED_BYTES:
                    await asyncio.sleep(self._connections.uploads.pause_s(len(event["body"]) * _BYTE_COST_S))
                if not event.get("more_body"):
                    return body
        except BaseException:
            body.clear()  # asyncio.wait_for leaves the exception, and with it this frame, to the garbage collector
            raise

    async def _act(self, body: bytearray, record: Connection) -> Any:
        began_s, answered = time.thread_time(), asyncio.get_running_loop().create_future()
        size_bytes = len(body)

        def answer(outcome: InferenceResult) -> None:
            self._from_any_thread(_settle, answered, outcome)

        try:
            observation = _observation(body)
            del body
            self._connections.holds(record, 0)
            self._queue.submit(lambda: self._policy.get_action(observation), answer, record, size_bytes)
        except ServerError as error:
            raise _Refusal(503, str(error), keep=True, cost_s=time.thread_time() - began_s) from error
        except Gr00tFastError as error:
            raise _Refusal(400, str(error), keep=True, cost_s=time.thread_time() - began_s) from error
        cost_s = time.thread_time() - began_s
        record.waiting += 1
        try:
            outcome: InferenceResult = await asyncio.wait_for(answered, _ANSWER_S)
        except asyncio.TimeoutError:
            outcome = InferenceResult(error=f"no result within {_ANSWER_S:g} s", fault=True)
        finally:
            record.waiting -= 1
        if outcome.error is not None:
            raise _Refusal(500 if outcome.fault else 400, outcome.error, keep=True, cost_s=cost_s)
        record.served = True
        return outcome.value


class _Refusal(Exception):  # noqa: N818 - not an error of the program: an HTTP answer
    """`keep`: the body was read, so that another request may follow on the connection. `cost_s`: what reading it cost the event loop."""

    def __init__(self, status: int, detail: str, keep: bool = False, cost_s: float = 0.0) -> None:
        super().__init__(reason_of(detail))
        self.status, self.keep, self.cost_s = status, keep, cost_s


def _too_large() -> _Refusal:
    return _Refusal(413, f"at most {MAX_BODY_BYTES} bytes are accepted. Send fewer or smaller pictures at once, or use the ZeroMQ server.")


def _settle(future: asyncio.Future[InferenceResult], outcome: InferenceResult) -> None:
    if not future.done():
        future.set_result(outcome)


async def _send(send: Callable[[_Event], Awaitable[None]], status: int, message: Any, keep: bool) -> None:
    try:
        body = to_json(message)
    except WireError as error:  # the policy returned what cannot travel
        status, body = 500, to_json({"detail": reason_of(error)})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers if keep else [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


def _watched_protocol(connections: Connections, records: dict[tuple[str, int], Connection]) -> type:
    """uvicorn's reader of HTTP, whose connections are counted and have a deadline for their header; uvicorn itself waits for one for ever."""
    h11_impl = require("uvicorn.protocols.http.h11_impl", "serving")

    class WatchedProtocol(h11_impl.H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._record = Connection(transport.get_extra_info("peername")[0], transport.abort, socket=transport.get_extra_info("socket"))
            records[transport.get_extra_info("peername")[:2]] = self._record
            connections.expect(self._record, "header", HEADER_S)
            connections.enter(self._record)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.leave(self._record)
            if records.get(self.client) is self._record:
                del records[self.client]
            super().connection_lost(exc)

    return WatchedProtocol


def _observation(body: bytearray) -> dict[str, Any]:
    payload = from_json(body, MAX_BODY_BYTES)
    if isinstance(payload, dict) and isinstance(payload.get("encoded"), str) and len(payload) == 1:
        payload = from_json(payload["encoded"].encode("utf-8", "surrogatepass"), MAX_BODY_BYTES)
    if not isinstance(payload, dict) or not isinstance(payload.get("observation"), dict):
        raise WireError('expected {"observation": {name: value}}.')
    observation = payload["observation"]
    observation = flat_observation(observation) if is_nested(observation) else observation
    check_batch(observation)
    return observation
