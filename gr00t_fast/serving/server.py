"""A policy behind a ZeroMQ socket, in the protocol of NVIDIA's GR00T N1.5 inference service: NVIDIA's clients talk to it unchanged.

Two threads: one talks (a ROUTER socket, so that a silent or broken client never holds up the others, and pings are answered while the
network computes), and the one that called `run` infers. They pass replies through an in-process socket.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from gr00t_fast.contracts import ActionPrefix, Policy
from gr00t_fast.errors import Gr00tFastError, ServerError, WireError
from gr00t_fast.optional import require
from gr00t_fast.serving.facts_message import facts_to_message
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
from gr00t_fast.serving.wire import MAX_MESSAGE_BYTES, decode, encode

log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5555
_REPLIES = "inproc://replies"
_LINGER_MS = 1000  # how long closing waits for the last replies to leave
_WAITING_PER_CLIENT = 2  # messages read ahead from one connection
# A message over the limit is read and refused with a reason; one over this many times the limit ends the connection unread.
_DROP_FACTOR = 2
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 5000, 15000  # connections to machines that vanished are closed


class PolicyServer:
    """Serves one policy. Listens from construction on (clients' requests wait), answers while `run` runs."""

    def __init__(
        self,
        policy: Policy,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        api_token: str | None = None,
        address: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Port 0 picks a free one. `address`: any ZeroMQ address instead of host and port, such as `ipc:///tmp/gr00t.sock`.

        Raises ServerError when it cannot listen there, and MissingExtraError without pyzmq and msgpack.
        """
        self._zmq = require("zmq", "serving")
        self._policy, self._token, self._max_bytes = policy, api_token, max_message_bytes
        self._traffic = Traffic()
        self._queue = InferenceQueue(self._traffic, ByteBudget(BUDGET_MESSAGES * max_message_bytes))
        # answered by the talking thread, which must not touch the policy
        self._modality_config = encode(policy.get_modality_config())
        self._facts = encode(facts_to_message(policy.facts)) if hasattr(policy, "facts") else None
        self._talk_failure: BaseException | None = None
        self._context = self._zmq.Context()
        try:
            self._socket = self._listen(address or _tcp_address(host, port))
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.address: str = self._socket.getsockopt_string(self._zmq.LAST_ENDPOINT)
        if api_token is None and not _is_local(self.address):
            log.warning("%s can be reached from other machines and no api_token is asked for", self.address)

    @property
    def port(self) -> int:
        """TCP port, also when 0 was asked for."""
        return int(self.address.rpartition(":")[2])

    def run(self) -> None:
        """Answer requests in this thread until `stop`, or until a client with the token kills the server. Then closes the socket."""
        replies = self._context.socket(self._zmq.PUSH)
        inbox = self._context.socket(self._zmq.PULL)
        inbox.bind(_REPLIES)
        replies.setsockopt(self._zmq.SNDTIMEO, _LINGER_MS)
        replies.connect(_REPLIES)
        self._reply_later = replies.send_multipart
        talker = threading.Thread(target=self._talk, args=(inbox,), name="policy-server", daemon=True)
        talker.start()
        log.info("answering on %s", self.address)
        try:
            self._queue.run()
        finally:
            with contextlib.suppress(self._zmq.Again):  # the talking thread has ended by itself
                replies.send(b"")  # nothing more to reply
            talker.join()
            replies.close(0)
            self.close()
        if self._talk_failure is not None:
            raise self._talk_failure

    def stop(self) -> None:
        """End `run` after the inference in progress. From any thread and from signal handlers."""
        self._queue.stop()

    def close(self) -> None:
        """Close the socket of a server that does not run (any more)."""
        self._socket.close(_LINGER_MS)
        self._context.destroy(_LINGER_MS)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _listen(self, address: str) -> Any:
        zmq = self._zmq
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.IPV6, int("[" in address))  # always on would turn 127.0.0.1 into ::ffff:127.0.0.1
        socket.setsockopt(zmq.RCVHWM, _WAITING_PER_CLIENT)
        socket.setsockopt(zmq.MAXMSGSIZE, _DROP_FACTOR * self._max_bytes)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ServerError(f"cannot listen on {address}: {error}. Another server may be running there; choose another port.") from error
        return socket

    # --- the talking thread ------------------------------------------------------------------------------------------------------------

    def _talk(self, inbox: Any) -> None:
        try:
            poller = self._zmq.Poller()
            poller.register(self._socket, self._zmq.POLLIN)
            poller.register(inbox, self._zmq.POLLIN)
            while self._talk_once(dict(poller.poll()), inbox):
                pass
        except BaseException as error:  # noqa: BLE001 - kept for `run`, which raises it: a server that cannot talk must not go on silently
            self._talk_failure = error
        finally:
            inbox.close(0)
            self._queue.stop()

    def _talk_once(self, ready: dict[Any, int], inbox: Any) -> bool:
        """Pass on one reply and take one request. False when the inference thread has ended."""
        if inbox in ready:
            frames = inbox.recv_multipart(copy=False)
            if len(frames) == 1:
                return False
            self._socket.send_multipart(frames, copy=False)
        if self._socket in ready:
            self._take(self._socket.recv_multipart(copy=False))
        return True

    def _take(self, frames: list[Any]) -> None:
        """Frames are the route back, which ends in an empty frame (a REQ client, perhaps behind proxies), and the message."""
        ends = [place for place, frame in enumerate(frames) if place and not len(frame.buffer)]
        if not ends:
            self._traffic.refused("frames that no REQ client sends")
            return  # without a route in REQ form there is nobody who could read a reply
        route, parts = [frame.bytes for frame in frames[: ends[0] + 1]], frames[ends[0] + 1 :]
        try:
            if len(parts) != 1:
                raise WireError(f"expected a message of one part, got {len(parts)}.")
            reply = self._answer(parts[0].buffer, route)
        except Gr00tFastError as error:
            self._traffic.refused(str(error))
            reply = encode({"error": reason_of(error)})
        except Exception as error:  # noqa: BLE001 - no message, whatever it holds, may end the service for the others
            self._traffic.failed(error)
            reply = encode({"error": reason_of(f"{type(error).__name__}: {error}")})
        if reply is not None:
            self._socket.send_multipart([*route, reply])

    def _answer(self, message: memoryview, route: list[bytes]) -> bytes | None:
        """The reply, or None when it comes later. Raises Gr00tFastError with the reason of a refusal."""
        request = decode(message, self._max_bytes)
        if not isinstance(request, dict):
            raise WireError(f'expected a map with "endpoint" and "data", got {type(request).__name__}.')
        if not same_token(request.get("api_token"), self._token):
            raise ServerError(UNAUTHORISED)
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str):
            raise WireError(f"endpoint: expected text, got {type(endpoint).__name__}.")
        if endpoint == "ping":
            return encode({"status": "ok", "message": "Server is running"})
        if endpoint == "get_modality_config":
            return self._modality_config
        if endpoint == "get_facts" and self._facts is not None:  # an extension, like those below
            return self._facts
        if endpoint == "kill":
            return self._kill()
        call = self._policy_call(endpoint, request.get("data", {}))
        self._queue.submit(call, lambda outcome: self._reply(route, outcome), client=tuple(route), size_bytes=len(message))
        return None

    def _policy_call(self, endpoint: str, data: Any) -> Callable[[], Any]:
        if endpoint == "reset":
            return self._reset
        if endpoint == "get_action":
            observation = _string_keyed(data, "data")
            return lambda: self._policy.get_action(observation)
        if endpoint == "get_action_with_options":  # an extension: NVIDIA's server answers it with "Unknown endpoint"
            request = _string_keyed(data, "data")
            observation, options = _string_keyed(request.get("observation"), "observation"), _options(request)
            return lambda: self._policy.get_action(observation, **options)
        raise ServerError(f"Unknown endpoint: {endpoint[:80]}")

    def _kill(self) -> bytes:
        if self._token is None:
            raise ServerError("kill is disabled, because anybody could send it: start the server with an api_token, or stop it with Ctrl-C.")
        log.info("killed by a client")
        self.stop()
        return encode({"status": "ok", "message": "Server is shutting down"})

    # --- the inference thread ----------------------------------------------------------------------------------------------------------

    def _reset(self) -> dict[str, str]:
        self._policy.reset()
        return {"status": "ok"}

    def _reply(self, route: list[bytes], outcome: Outcome) -> None:
        try:
            reply = encode(outcome.value if outcome.error is None else {"error": outcome.error})
        except WireError as error:  # the policy returned what cannot travel
            reply = encode({"error": reason_of(error)})
        with contextlib.suppress(self._zmq.Again):  # the talking thread failed; `run` raises its error next
            self._reply_later([*route, reply], copy=False)


def _options(request: dict[str, Any]) -> dict[str, Any]:
    """`noise` and `prefix` of `ContinuingPolicy.get_action`, as far as they were sent."""
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


def _tcp_address(host: str, port: int) -> str:
    if not 0 <= port <= 65535:
        raise ServerError(f"port must be from 0 to 65535, got {port}.")
    address = numeric_host(host, port)[1]  # ZeroMQ binds to numbers only
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _is_local(address: str) -> bool:
    if not address.startswith("tcp://"):
        return True
    return ipaddress.ip_address(address.removeprefix("tcp://").rpartition(":")[0].strip("[]").split("%")[0]).is_loopback
