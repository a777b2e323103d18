"""A policy behind a ZeroMQ socket, in the protocols of NVIDIA's GR00T N1.5 and N1.7 inference services: NVIDIA's clients talk to it unchanged.

A request for actions tells its protocol by its form. What cannot be told from the message, the modality configuration, is answered in the form of the
network that is served.

One thread talks (a silent or broken client never holds up the others, and pings are answered while the network computes), and the one that called
`run` infers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.contracts import ActionPrefix, Policy
from gr00t_fast.errors import Gr00tFastError, ObservationError, ServerError, WireError
from gr00t_fast.inputs.observation import flat_observation, is_nested, nested_actions
from gr00t_fast.serving.connections import ACCEPTED_AT_ONCE, Connections, is_local, listen_on, listen_on_tcp, widen
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    MAX_PER_CLIENT,
    UNAUTHORISED,
    InferenceQueue,
    InferenceResult,
    PolicyServerBase,
    RequestLog,
    check_batch,
    reason_of,
    same_token,
)
from gr00t_fast.serving.wire import MAX_MESSAGE_BYTES, decode, encode, metadata_to_message, modality_config_message
from gr00t_fast.serving.zmtp import Request, ZmtpConnection

log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5555
_LINGER_S = 1.0  # how long closing waits for the last replies to leave


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

        Raises ServerError when it cannot listen there, and MissingExtraError without msgpack.
        """
        self._policy, self._token, self._max_bytes = policy, api_token, max_message_bytes
        # answered by the talking thread, which must not touch the policy
        self._modality_config = encode(modality_config_message(policy.get_modality_config(), n1d7=policy.network == "n1.7"))
        self._metadata = None if policy.metadata is None else encode(metadata_to_message(policy.metadata))
        if address:
            listener, bound = listen_on(address)
        else:
            listener, numeric = listen_on_tcp(host, port)
            bound = f"tcp://{numeric}"
        traffic = RequestLog()
        queue = InferenceQueue(traffic, BUDGET_MESSAGES * max_message_bytes)
        super().__init__(listener, bound, queue, traffic, Connections())
        if api_token is None and not is_local(self.address):
            log.warning("%s can be reached from other machines and no api_token is asked for", self.address)

    # --- the talking thread ------------------------------------------------------------------------------------------------------------

    async def _talk(self, stopping: asyncio.Event) -> None:
        alive: set[ZmtpConnection] = set()

        def new_connection() -> ZmtpConnection:
            return ZmtpConnection(self._take, self._connections, alive, self._max_bytes, MAX_PER_CLIENT)

        listening = await asyncio.get_running_loop().create_server(new_connection, sock=self._listener, backlog=ACCEPTED_AT_ONCE)
        widen(self._listener)
        await stopping.wait()
        listening.close()
        for connection in list(alive):
            connection.close_after_writing()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_none_left(alive), _LINGER_S)
        self._connections.close_all()

    def _take(self, connection: ZmtpConnection, request: Request) -> None:
        """Frames are the route back, which ends in an empty frame (a REQ client, perhaps behind proxies), and the message."""
        if not request.has_route:  # a reply would have no address
            self._request_log.refused("frames that no REQ client sends")
            connection.answer_at_once([], b"", refused=True)
            return
        refused = True
        try:
            if request.parts != 1:
                raise WireError(f"expected a message of one part, got {request.parts}.")
            if request.body is None:
                raise WireError(f"the message has {request.size_bytes} bytes; at most {self._max_bytes} are accepted. Send fewer pictures.")
            reply = self._answer(request.body, request.route, connection)
            refused = False
        except Gr00tFastError as error:
            self._request_log.refused(str(error))
            reply = encode({"error": reason_of(error)})
        except Exception as error:  # noqa: BLE001 - no message, whatever it holds, may end the service for the others
            self._request_log.failed(error)
            reply = encode({"error": reason_of(f"{type(error).__name__}: {error}")})
        if reply is not None:
            connection.answer_at_once(request.route, reply, refused)

    def _answer(self, message: memoryview, route: list[bytes], connection: ZmtpConnection) -> bytes | None:
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
        if endpoint == "get_facts" and self._metadata is not None:  # an extension, like those below
            return self._metadata
        if endpoint == "reset":  # nothing to do: what belongs to an episode is with the client, and the policy is everybody's
            return encode({"status": "ok"})
        if endpoint == "kill":
            return self._kill()
        call = self._policy_call(endpoint, request.get("data", {}))
        self._queue.submit(call, lambda outcome: self._reply(connection, route, outcome), connection.record, len(message))
        connection.wait()
        return None

    def _policy_call(self, endpoint: str, data: Any) -> Callable[[], Any]:
        if endpoint == "get_action" and isinstance(data, dict) and is_nested(data.get("observation")):
            nested = _observation(flat_observation(data["observation"]), "data.observation")
            return lambda: _InFormOfN1d7([nested_actions(self._policy.get_action(nested)), {}])
        if endpoint == "get_action":
            if isinstance(data, dict) and isinstance(data.get("observation"), dict):
                keys = ", ".join(str(key)[:40] for key in [*data["observation"]][:8])
                raise ObservationError(
                    'data.observation: expected {"video": {...}, "state": {...}, "language": {...}}, N1.7\'s nested form, or the flat keys in data '
                    f"itself, N1.5's protocol; got the keys {keys}."
                )
            observation = _observation(data, "data")
            return lambda: self._policy.get_action(observation)
        if endpoint == "get_action_with_options":  # an extension: NVIDIA's server answers it with "Unknown endpoint"
            request = _string_keyed(data, "data")
            observation, options = _observation(request.get("observation"), "observation"), _options(request)
            return lambda: self._policy.get_action(observation, **options)
        raise ServerError(f"Unknown endpoint: {endpoint[:80]}")

    def _kill(self) -> bytes:
        if self._token is None:
            raise ServerError("kill is disabled, because anybody could send it: start the server with an api_token, or stop it with Ctrl-C.")
        log.info("killed by a client")
        self.stop()
        return encode({"status": "ok", "message": "Server is shutting down"})

    # --- the inference thread ----------------------------------------------------------------------------------------------------------

    def _reply(self, connection: ZmtpConnection, route: list[bytes], outcome: InferenceResult) -> None:
        try:
            value, n1d7 = outcome.value, isinstance(outcome.value, _InFormOfN1d7)
            reply = encode({"error": outcome.error} if outcome.error is not None else value.message if n1d7 else value, n1d7)
        except WireError as error:  # the policy returned what cannot travel
            reply = encode({"error": reason_of(error)})
        self._from_any_thread(connection.answer, route, reply, outcome.error is None)


@dataclass(frozen=True)
class _InFormOfN1d7:
    """An answer whose arrays are written as N1.7's clients read them."""

    message: Any


async def _none_left(alive: set[ZmtpConnection]) -> None:
    while alive:
        await asyncio.sleep(0.01)


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
