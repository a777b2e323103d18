"""A policy behind HTTP, in the protocol of NVIDIA's http_server for GR00T N1.5 (json_numpy arrays), and behind a WebSocket, in openpi's, on uvicorn.
NVIDIA has none for N1.7.

    GET  /health                                    -> {"status": "healthy", "model": "GR00T"}; /healthz too, where openpi's is
    GET  /metrics, /status                          -> figures for Prometheus; for people, as JSON
    POST /act     {"observation": {...}}            -> {"action.<part>": array, ...}
    POST /act     {"encoded": "<the same as text>"} -> likewise, for clients that cannot nest arrays
                  an observation in N1.7's nested form (gr00t_fast/inputs/observation.py) -> likewise; "deadline_s" beside it, see `Service.ask`
    errors        {"detail": "<reason>"} with status 400, 401, 403, 404, 408, 413, 500 or 503

    WebSocket     on connect: metadata, with "keys", what an observation holds. Then an observation -> {"actions": (H, J), "action.<part>": ...,
                  "server_timing": {"infer_ms", "prev_total_ms"}}, or the reason of a refusal as text. Its keys may have / in place of a point
                  (`observation/state`, `observation/images/webcam`), `prompt` is the instruction, and `deadline_s` may be among them.

NVIDIA's server takes a token and ignores it. Here a request without `Authorization: Bearer <token>` (openpi: `Api-Key <token>`) gets 401 when a token
is set.
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
from typing import Any, TypeAlias

import numpy as np

from gr00t_fast.base.contracts import Policy
from gr00t_fast.base.errors import Gr00tFastError, ServerError, WireError, require, shown
from gr00t_fast.inputs.observation import LEROBOT_TASK
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    DEFAULT_HOST,
    DEFAULT_PORT,
    PolicyServerBase,
    Service,
    listen_on_tcp,
    reason_of,
    string_keyed,
)
from gr00t_fast.serving.wire import decode, encode_openpi, from_json, metadata_to_message, to_json

MAX_BODY_BYTES = 2**24 + 2**16  # two frames of 1920x1080 as base64; ZeroMQ carries more
MAX_CONNECTIONS = 256  # further requests are answered with 503
MAX_WEBSOCKETS = 32  # at once: each may hold a message
BODY_S = 30.0  # for all of a body
HEADER_S = 10.0  # from a connection's begin until it has sent the whole header of a request
IDLE_S = 30  # from an answer to the whole header of the connection's next request
_STOP_S = 1
_HEALTH = b'{"status":"healthy","model":"GR00T"}'
_Event = dict[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Event]]
_Send: TypeAlias = Callable[[_Event], Awaitable[None]]


def http_service(policy: Policy, api_token: str | None) -> Service:
    """For an HttpApplication."""
    return Service(policy, api_token, BUDGET_MESSAGES * MAX_BODY_BYTES)


class HttpApplication:
    """The protocols above as an ASGI application over one service, which somebody runs."""

    def __init__(self, service: Service, host_names: Collection[str] = ()) -> None:
        """host_names: by which clients call this machine, besides its own name and all numeric addresses."""
        self.service = service
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), f"{socket.gethostname()}.local", *host_names)}
        self._bodies_bytes = 0  # of all requests that are being read
        self.websockets = 0  # that are open

    async def __call__(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "websocket":
            return await self._converse(scope, receive, send)
        keep, kind = False, b"application/json"  # keep: the connection, once the body has been read
        try:
            body = await self._body(scope, receive)
            keep = True
            reply = body if isinstance(body, bytes) else await self._act(body, scope["client"], receive)
            kind = b"text/plain; version=0.0.4" if scope["path"] == "/metrics" else kind
        except _ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - no request, whatever it holds, may end the service for the others
            self.service.figures.refused(error, _name(scope["client"]))
            return await refuse(scope, send, error, keep)
        await _reply(send, 200, reply, kind)

    async def _body(self, scope: _Event, receive: _Receive) -> bytearray | bytes:
        """The body of a request for actions; the whole reply, as bytes, to another one. Raises _RefusedError for a sender, path or size that is
        not served."""
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        self._check_sender(headers)
        route = (scope["method"], scope["path"])
        if route in (("GET", "/health"), ("GET", "/healthz")):
            return _HEALTH
        self._check_token(headers)
        if route == ("GET", "/metrics"):
            return self.service.figures.exposition()
        if route == ("GET", "/status"):
            return to_json(self.service.status())
        if route != ("POST", "/act"):
            raise _RefusedError(404, "Not Found: GET /health, /metrics or /status, or POST /act")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        try:
            return await asyncio.wait_for(self._read(receive), BODY_S)
        except asyncio.TimeoutError:
            raise _RefusedError(408, f"the body did not arrive within {BODY_S:g} s.") from None

    def _check_token(self, headers: dict[str, bytes]) -> None:
        given = headers.get("authorization", b"").decode("utf-8", "surrogateescape")
        self.service.check_token(given.removeprefix("Bearer ").removeprefix("Api-Key "))

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
        payload, next_event = _payload(body), asyncio.ensure_future(receive())
        asked = {"name": _name(client), "deadline_s": payload.get("deadline_s")}
        try:
            actions = await self._answered(payload.get("observation"), client, len(body), asked, next_event)
        finally:
            next_event.cancel()
        try:
            return to_json(actions)
        except WireError as error:  # what the policy returned cannot travel
            raise _RefusedError(500, str(error)) from error

    async def _answered(self, observation: Any, client: Any, size_bytes: int, asked: dict[str, Any], next_event: asyncio.Future[_Event]) -> Any:
        """The actions. Raises what `Service.ask` and the inference do, and _ClientGoneError when `next_event` is that the client hung up."""
        answer = asyncio.wrap_future(self.service.ask(observation, client, size_bytes, **asked))
        await asyncio.wait((answer, next_event), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and next_event.result()["type"].endswith("disconnect"):
            answer.cancel()
            self.service.forget(lambda waiting: waiting == client)
            raise _ClientGoneError
        return await answer

    # openpi's clients

    async def _converse(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        """One observation after the other, for as long as the client is connected."""
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            self._check_sender(headers)
            self._check_token(headers)
            if self.websockets >= MAX_WEBSOCKETS:
                raise _RefusedError(503, f"busy: {MAX_WEBSOCKETS} WebSockets are open.")
        except Gr00tFastError as error:
            self.service.figures.refused(error, _name(scope["client"]))
            return await refuse(scope, send, error)
        self.websockets += 1
        try:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "bytes": encode_openpi(_told(self.service.policy))})
            await self._answer_each(scope["client"], receive, send)
        except _ClientGoneError:
            pass
        finally:
            self.websockets -= 1

    async def _answer_each(self, client: Any, receive: _Receive, send: _Send) -> None:
        total_ms: dict[str, float] = {}
        event = await receive()
        while event["type"] == "websocket.receive":
            began_s, next_event = time.monotonic(), asyncio.ensure_future(receive())
            try:
                observation, deadline_s = _from_openpi(event, self.service.policy)
                asked = {"name": _name(client), "deadline_s": deadline_s}
                actions = await self._answered(observation, client, len(event["bytes"]), asked, next_event)
                timing = {"infer_ms": 1000 * (time.monotonic() - began_s), **total_ms}
                joined = np.concatenate([*actions.values()], axis=-1)  # as openpi's programs expect them
                await send({"type": "websocket.send", "bytes": encode_openpi({"actions": joined, **actions, "server_timing": timing})})
            except _ClientGoneError:
                raise
            except Exception as error:  # noqa: BLE001 - no request, whatever it holds, may end the service for the others
                self.service.figures.refused(error, _name(client))
                await send({"type": "websocket.send", "text": reason_of(error)})
            total_ms = {"prev_total_ms": 1000 * (time.monotonic() - began_s)}
            event = await next_event


class HttpPolicyServer(PolicyServerBase):
    """Serves one policy. Listens from construction on, answers while `run` runs."""

    def __init__(
        self, policy: Policy, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, api_token: str | None = None, host_names: Collection[str] = ()
    ) -> None:
        """Port 0 picks a free one. `host_names`: further names by which clients call this machine, besides its own and all numeric addresses.

        Raises ServerError when it cannot listen there, and MissingExtraError without uvicorn.
        """
        uvicorn, _ = require("uvicorn", "serving"), require("websockets", "serving")
        self._listener = listen_on_tcp(host, port)
        address, bound_port, *_ = self._listener.getsockname()
        place = f"[{address}]" if ":" in address else address
        service = http_service(policy, api_token)
        self.application = HttpApplication(service, (host, *host_names))
        super().__init__(service, f"http://{place}:{bound_port}")
        config = uvicorn.Config(
            self.application,
            http=_h11_protocol(),
            ws="websockets-sansio",
            ws_max_size=MAX_BODY_BYTES,
            ws_per_message_deflate=False,
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.CRITICAL + 1,  # what clients do wrong is counted; a line for each would fill the disk
            access_log=False,
            server_header=False,
            proxy_headers=False,  # would believe whoever calls from this machine
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_S,
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


def _h11_protocol() -> type[asyncio.Protocol]:
    """uvicorn's, which has no limit for a header: silent connections would take all places for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._limit = self.loop.call_later(HEADER_S, self._end_unless_asked, self.cycle)

        def on_response_complete(self) -> None:
            self._limit.cancel()
            self._limit = self.loop.call_later(IDLE_S, self._end_unless_asked, self.cycle)
            super().on_response_complete()  # may begin with the next request

        def connection_lost(self, exc: Exception | None) -> None:
            self._limit.cancel()
            super().connection_lost(exc)

        def _end_unless_asked(self, answered: Any) -> None:
            if self.cycle is answered and self.transport.get_protocol() is self:  # else it is a request's or a WebSocket's
                self.transport.abort()

    return TimedProtocol


async def refuse(scope: _Event, send: _Send, error: Exception, keep: bool = False) -> None:
    """Answer a request, or the begin of a WebSocket, with an error. keep: the connection, whose request was read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason_of(error)[:100]})  # before it was accepted: HTTP 403
    else:
        await _reply(send, _status(error), to_json({"detail": reason_of(error)}), keep=keep)


async def _reply(send: _Send, status: int, body: bytes, kind: bytes = b"application/json", keep: bool = True) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers if keep else [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


def _told(policy: Policy) -> dict[str, Any]:
    """What openpi's clients get when they connect."""
    keys = {modality: list(config.modality_keys) for modality, config in policy.get_modality_config().items()}
    return {"model": "GR00T", "keys": keys, **({} if policy.metadata is None else metadata_to_message(policy.metadata))}


def _from_openpi(event: _Event, policy: Policy) -> tuple[Any, Any]:
    """The observation and its deadline. Raises WireError."""
    if event.get("bytes") is None:
        raise WireError("expected a binary message (msgpack), got text.")
    message = string_keyed(decode(event["bytes"], MAX_BODY_BYTES), "observation")
    deadline_s = message.pop("deadline_s", None)
    observation = {key.replace("/", "."): value for key, value in message.items()}
    pictures = [f"observation.images.{key.removeprefix('video.')}" for key in policy.get_modality_config()["video"].modality_keys]
    if "observation.image" in observation and len(pictures) == 1 and pictures[0] not in observation:
        observation[pictures[0]] = observation.pop("observation.image")  # openpi's usual name of the only picture
    if "prompt" in observation:
        joined = any(key.startswith("observation.") for key in observation)
        observation[LEROBOT_TASK if joined else policy.get_modality_config()["language"].modality_keys[0]] = observation.pop("prompt")
    return observation, deadline_s


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


def _name(client: Any) -> str:
    """A client's name, for people and figures: its address without the port, which is another one for each connection."""
    return str(client[0]) if client else ""


def _payload(body: bytearray) -> dict[str, Any]:
    payload = from_json(body, MAX_BODY_BYTES)
    if isinstance(payload, dict) and isinstance(payload.get("encoded"), str) and len(payload) == 1:
        payload = from_json(payload["encoded"].encode("utf-8", "surrogatepass"), MAX_BODY_BYTES)
    if not isinstance(payload, dict) or "observation" not in payload:
        got = shown(list(payload)[:5]) if isinstance(payload, dict) else type(payload).__name__
        raise WireError(f'expected {{"observation": {{name: value}}}}, got {got}.')
    return payload
