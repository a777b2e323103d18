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
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from gr00t_fast.contracts import Policy
from gr00t_fast.errors import Gr00tFastError, ServerError, WireError, require
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    DEFAULT_HOST,
    DEFAULT_PORT,
    PolicyServerBase,
    Service,
    listen_on_tcp,
    reason_of,
)
from gr00t_fast.serving.wire import from_json, to_json

MAX_BODY_BYTES = 2**24 + 2**16  # two frames of 1920x1080 as base64; ZeroMQ carries more
MAX_CONNECTIONS = 256  # further requests are answered with 503
BODY_S = 30.0  # for all of a body
_IDLE_S = 30  # between two requests of a connection
_STOP_S = 1
_HEALTH = b'{"status":"healthy","model":"GR00T"}'
_Event = dict[str, Any]
_Receive, _Send = Callable[[], Awaitable[_Event]], Callable[[_Event], Awaitable[None]]


class HttpPolicyServer(PolicyServerBase):
    """Serves one policy. Listens from construction on, answers while `run` runs."""

    def __init__(
        self, policy: Policy, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, api_token: str | None = None, host_names: Collection[str] = ()
    ) -> None:
        """Port 0 picks a free one. `host_names`: further names by which clients call this machine, besides its own and all numeric addresses.

        Raises ServerError when it cannot listen there, and MissingExtraError without uvicorn.
        """
        uvicorn = require("uvicorn", "serving")
        self._names = {name.lower() for name in ("localhost", host, socket.gethostname(), f"{socket.gethostname()}.local", *host_names)}
        self._bodies_bytes = 0  # of all requests that are being read
        self._listener = listen_on_tcp(host, port)
        address, bound_port, *_ = self._listener.getsockname()
        place = f"[{address}]" if ":" in address else address
        service = Service(policy, api_token, BUDGET_MESSAGES * MAX_BODY_BYTES)
        super().__init__(service, f"http://{place}:{bound_port}")
        config = uvicorn.Config(
            self._application,
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.CRITICAL + 1,  # what clients do wrong is counted by RequestLog; a line for each would fill the disk
            access_log=False,
            server_header=False,
            proxy_headers=False,  # would believe whoever calls from this machine
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_S,
            backlog=64,  # asyncio accepts as many before it turns to its clients again
            timeout_graceful_shutdown=_STOP_S,
        )
        self._uvicorn = uvicorn.Server(config)

    def close(self) -> None:
        self._listener.close()

    def _talk(self) -> None:
        asyncio.run(self._uvicorn.serve(sockets=[self._listener]))

    def _end_talk(self) -> None:
        self._uvicorn.should_exit = True

    # One request

    async def _application(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        keep = False  # the connection, once the body has been read
        try:
            body = await self._body(scope, receive)
            keep = True
            status, reply = 200, _HEALTH if body is None else await self._act(body, scope["client"], receive)
        except _ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - no request, whatever it holds, may end the service for the others
            self._service.log.refused(error)
            status, reply = _status(error), to_json({"detail": reason_of(error)})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(reply)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers if keep else [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": reply})

    async def _body(self, scope: _Event, receive: _Receive) -> bytearray | None:
        """Of a request for actions; None of one for /health. Raises _RefusedError for a sender, path or size that is not served."""
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        self._check_sender(headers)
        route = (scope["method"], scope["path"])
        if route == ("GET", "/health"):
            return None
        self._service.check_token(headers.get("authorization", b"").decode("utf-8", "surrogateescape").removeprefix("Bearer "))
        if route != ("POST", "/act"):
            raise _RefusedError(404, "Not Found: GET /health or POST /act")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        try:
            return await asyncio.wait_for(self._read(receive), BODY_S)
        except asyncio.TimeoutError:
            raise _RefusedError(408, f"the body did not arrive within {BODY_S:g} s.") from None

    def _check_sender(self, headers: dict[str, bytes]) -> None:
        """Raises _RefusedError for a request that a web page makes in somebody's browser."""
        if "origin" in headers:
            raise _RefusedError(403, "requests of web pages (with an Origin header) are refused.")
        host = headers.get("host", b"").decode("latin-1").strip().lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name.split("%")[0])
            return
        if host and name not in self._names:  # HTTP/1.0 sends none, a browser always
            shown = name[:80]
            raise _RefusedError(403, f"Host '{shown}' is no name of this server. Call it by its address, or start it with --host_names={shown}.")

    async def _read(self, receive: _Receive) -> bytearray:
        """Counted as it arrives, with the bodies of other requests."""
        body = bytearray()
        try:
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise _ClientGoneError
                body += event["body"]
                self._bodies_bytes += len(event["body"])
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                if self._bodies_bytes > BUDGET_MESSAGES * MAX_BODY_BYTES:
                    raise ServerError("busy: too many requests are being read. Try again later.", ServerError.BUSY)
                if not event.get("more_body"):
                    return body
        finally:
            self._bodies_bytes -= len(body)

    async def _act(self, body: bytearray, client: Any, receive: _Receive) -> bytes:
        """The actions as JSON. Raises the error that the inference ended with. A request whose client hangs up meanwhile leaves the queue."""
        answer = asyncio.wrap_future(self._service.ask(_observation(body), client, len(body)))
        hung_up = asyncio.ensure_future(receive())
        await asyncio.wait((answer, hung_up), return_when=asyncio.FIRST_COMPLETED)
        hung_up.cancel()
        if not answer.done():
            answer.cancel()
            self._service.forget(lambda waiting: waiting == client)
            raise _ClientGoneError
        actions = answer.result()
        try:
            return to_json(actions)
        except WireError as error:  # what the policy returned cannot travel
            raise _RefusedError(500, str(error)) from error


class _RefusedError(Gr00tFastError):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _ClientGoneError(Exception):
    """Nobody waits for an answer."""


def _too_large() -> _RefusedError:
    return _RefusedError(413, f"at most {MAX_BODY_BYTES} bytes are accepted. Send fewer or smaller pictures at once, or use the ZeroMQ server.")


def _status(error: Exception) -> int:
    if isinstance(error, _RefusedError):
        return error.status
    statuses = {ServerError.BUSY: 503, ServerError.STOPPING: 503, ServerError.UNAUTHORISED: 401}
    return statuses.get(getattr(error, "code", ""), 400 if isinstance(error, Gr00tFastError) else 500)


def _observation(body: bytearray) -> Any:
    payload = from_json(body, MAX_BODY_BYTES)
    if isinstance(payload, dict) and isinstance(payload.get("encoded"), str) and len(payload) == 1:
        payload = from_json(payload["encoded"].encode("utf-8", "surrogatepass"), MAX_BODY_BYTES)
    if not isinstance(payload, dict):
        raise WireError('expected {"observation": {name: value}}.')
    return payload.get("observation")
