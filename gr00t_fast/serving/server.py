"""A policy behind a ZeroMQ socket, in the protocols of NVIDIA's GR00T N1.5, N1.6 and N1.7 inference services: NVIDIA's clients talk to it unchanged.

A request for actions tells its protocol by its form. What cannot be told from the message, the modality configuration, is answered in the form of the
network that is served. One thread talks: a silent or broken client never holds up the others, and pings are answered while the network computes.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import socket
import sys
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import ActionPrefix, Policy
from gr00t_fast.base.errors import ServerError, WireError, require
from gr00t_fast.inputs.observation import is_nested, nested_actions
from gr00t_fast.serving.service import (
    BUDGET_MESSAGES,
    DEFAULT_HOST,
    DEFAULT_PORT,
    PolicyServerBase,
    Service,
    cannot_listen,
    check_free,
    reason_of,
    string_keyed,
)
from gr00t_fast.serving.wire import (
    CONTINUED_BY,
    MAX_MESSAGE_BYTES,
    UNKNOWN_ENDPOINT_TEXT,
    decode_with_form,
    encode,
    metadata_to_message,
    modality_config_message,
    tcp_address,
    to_json,
)

log = logging.getLogger(__name__)
_HANDSHAKE_MS = 10_000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2_000, 10_000  # a machine that vanished without closing its connections is noticed after this long
_UNREAD_MESSAGES = 2  # of one connection; further ones stay in the network
_REFUSED_UP_TO = 2  # times the limit: a message up to this size is refused with a reason, a larger one ends its connection
_LINGER_MS = 1_000  # how long closing waits for the last replies to leave


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

        Raises ServerError or ConfigError when it cannot listen there, and MissingExtraError without pyzmq and msgpack.
        """
        self._zmq, self._max_bytes = require("zmq", "serving"), max_message_bytes
        self._fingerprint = _fingerprint(policy)
        self._told = _fixed_replies(policy, self._fingerprint)  # answered by the talking thread, which must not touch the policy
        self._context = self._zmq.Context()
        self._answers: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()  # of the inference thread; a socket belongs to one thread
        self._wake_talker, self._woken = socket.socketpair()
        self._ended = False
        self._router = self._context.socket(self._zmq.ROUTER)
        try:
            self._listen(address or tcp_address(host, port))
        except BaseException:
            self.close()
            raise
        service = Service(policy, api_token, BUDGET_MESSAGES * max_message_bytes)
        super().__init__(service, self._router.getsockopt(self._zmq.LAST_ENDPOINT).decode())

    def close(self) -> None:
        if not self._context.closed:
            self._router.disable_monitor()  # first: ZeroMQ's own thread blocks for ever when it reports to a reader that is gone
            self._context.destroy(linger=_LINGER_MS)
        self._wake_talker.close()
        self._woken.close()

    def _listen(self, address: str) -> None:
        zmq = self._zmq
        limits = {zmq.MAXMSGSIZE: _REFUSED_UP_TO * self._max_bytes, zmq.RCVHWM: _UNREAD_MESSAGES}
        times = {zmq.HANDSHAKE_IVL: _HANDSHAKE_MS, zmq.HEARTBEAT_IVL: _HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS}
        for option, value in {zmq.IPV6: int("[" in address), **limits, **times}.items():
            self._router.setsockopt(option, value)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        check_free(address)
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            raise cannot_listen(address, error) from error

    # The talking thread

    def _talk(self) -> None:
        zmq, poller = self._zmq, self._zmq.Poller()
        for each in (self._router, self._monitor, self._woken):
            poller.register(each, zmq.POLLIN)
        while not self._ended:
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            self._send_answers()
            self._forget_disconnected()
            if self._router in ready:
                self._receive()
        self._send_answers()

    def _end_talk(self) -> None:
        self._ended = True
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
            self.service.forget(lambda client, descriptor=descriptor: client[0] == descriptor)  # type: ignore[misc]

    def _receive(self) -> None:
        """Frames are the route back, which ends in an empty frame (a REQ client, perhaps behind proxies), and the message."""
        frames = self._router.recv_multipart(copy=False)
        self._forget_disconnected()
        parts = [frame.buffer for frame in frames]
        length = next((number for number, part in enumerate(parts) if not len(part)), len(parts) - 1) + 1
        route, message = [bytes(part) for part in parts[:length]], parts[length:]
        if route[-1]:
            self.service.figures.refused(WireError("frames that no REQ client sends"))  # a reply would have no address
            return
        name = f"{frames[-1].get('Peer-Address') or 'local'}#{int.from_bytes(route[0][-2:], 'big')}"  # ZeroMQ numbers those without a name
        try:
            if len(message) != 1:
                raise WireError(f"expected a message of one part, got {len(message)}.")
            reply = self._answer(message[0], route, frames[-1].get(self._zmq.SRCFD), name)
        except Exception as error:  # noqa: BLE001 - no message, whatever it holds, may end the service for the others
            self.service.figures.refused(error, name)
            reply = _error_message(error)
        if reply is not None:
            self._router.send_multipart([*route, reply])

    def _answer(self, message: memoryview, route: list[bytes], descriptor: int, name: str) -> bytes | None:
        """The reply, or None when it comes later. Raises Gr00tFastError with the reason of a refusal."""
        request, arrays_n1d7 = decode_with_form(message, self._max_bytes)
        if not isinstance(request, dict):
            raise WireError(f'expected a map with "endpoint" and "data", got {type(request).__name__}.')
        self.service.check_token(request.get("api_token"))
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str):
            raise WireError(f"endpoint: expected text, got {type(endpoint).__name__}.")
        if endpoint in self._told:
            return self._told[endpoint]
        if endpoint == "kill":
            return self._kill()
        if endpoint == "get_status":  # an extension
            return encode(self.service.status())
        observation, options, nested = _asked(endpoint, data := request.get("data", {}))
        beside = {"fingerprint": self._fingerprint} if endpoint == "get_action_with_options" and "fingerprint" in data else {}  # never for NVIDIA's
        correlated = len(route) > 2 and len(route[-2]) == 4  # the number of the request, which REQ_CORRELATE puts there
        client = (descriptor, *route[: -2 if correlated else -1])

        def send(answer: Future[dict[str, np.ndarray]]) -> None:
            if (error := answer.exception()) is not None:
                self.service.figures.refused(error, name)  # type: ignore[arg-type]
            self._answers.put([*route, _answer_message(answer, nested, nested and arrays_n1d7, beside)])
            self._wake_talker.send(b"x")

        self.service.ask(observation, client, len(message), name, **options).add_done_callback(send)
        return None

    def _kill(self) -> bytes:
        if self.service.api_token is None:
            raise ServerError("kill is disabled, because anybody could send it: start the server with an api_token, or stop it with Ctrl-C.")
        log.info("killed by a client")
        self.stop()
        return encode({"status": "ok", "message": "Server is shutting down"})


def _fingerprint(policy: Policy) -> str:
    """A digest of the checkpoint and of what the policy says of itself, by which a client tells one policy from another."""
    log.info("taking the fingerprint of the checkpoint")
    told = None if policy.metadata is None else metadata_to_message(policy.metadata)
    said = [policy.fingerprint(), modality_config_message(policy.get_modality_config(), "n1.7"), told]
    return hashlib.sha256(to_json(said)).hexdigest()


def _fixed_replies(policy: Policy, fingerprint: str) -> dict[str, bytes]:
    """By endpoint."""
    replies = {
        "ping": {"status": "ok", "message": "Server is running"},
        "get_modality_config": modality_config_message(policy.get_modality_config(), policy.protocol),
        "reset": {"status": "ok"},  # nothing to do: what belongs to an episode is with the client, and the policy is everybody's
    }
    if policy.metadata is not None:
        replies["get_facts"] = metadata_to_message(replace(policy.metadata, fingerprint=fingerprint))  # an extension
    return {endpoint: encode(reply) for endpoint, reply in replies.items()}


def _asked(endpoint: str, data: Any) -> tuple[Any, dict[str, Any], bool]:
    """The observation, the options of `Policy.get_action`, and whether the answer is to be nested, as N1.6's and N1.7's are. Raises
    Gr00tFastError."""
    if endpoint not in ("get_action", "get_action_with_options"):
        raise ServerError(f"{UNKNOWN_ENDPOINT_TEXT}: {endpoint[:80]}", ServerError.UNKNOWN_ENDPOINT)
    data = string_keyed(data, "data")
    if endpoint == "get_action_with_options":  # an extension: NVIDIA's server answers it with "Unknown endpoint"
        return data.get("observation"), _options(data), False
    nested = is_nested(data.get("observation"))
    return data["observation"] if nested else data, {}, nested


def _answer_message(answer: Future[dict[str, np.ndarray]], nested: bool, arrays_n1d7: bool, beside: dict[str, str]) -> bytes:
    try:
        actions = answer.result()
        return encode([nested_actions(actions), {}] if nested else {**actions, **beside}, arrays_n1d7)
    except Exception as error:  # noqa: BLE001 - of the inference, or of what the policy returned, which cannot be sent
        return _error_message(error)


def _error_message(error: Exception) -> bytes:
    code = getattr(error, "code", "")
    return encode({"error": reason_of(error)} | ({"code": code} if code else {}))


def _options(request: dict[str, Any]) -> dict[str, Any]:
    """`noise` and `prefix` of `Policy.get_action` and `deadline_s` of `Service.ask`, as far as they were sent."""
    options = {name: request[name] for name in ("noise", "deadline_s") if request.get(name) is not None}
    if isinstance(options.get("noise"), np.ndarray):
        options["noise"] = options["noise"].copy()  # torch complains of read-only arrays
    if request.get("prefix") is not None:
        prefix = string_keyed(request["prefix"], "prefix")
        delay, method = prefix.get("delay"), prefix.get("method")
        if type(delay) is not int or not isinstance(method, str) or method != CONTINUED_BY:
            got = f"{str(delay)[:80]} and {str(method)[:80]}"
            raise WireError(
                f"prefix: expected a whole number as delay and {CONTINUED_BY} as method, got {got}. A client of 0.1.0: --smoothing={CONTINUED_BY}."
            )
        options["prefix"] = ActionPrefix(string_keyed(prefix.get("actions"), "prefix.actions"), delay)
    return options
