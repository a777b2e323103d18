"""A `Policy` whose network runs on a ZeroMQ server: ours, or NVIDIA's inference service of GR00T N1.5, N1.6 or N1.7.

Every call ends within `timeout_s`. ZeroMQ numbers the requests (REQ_CORRELATE; every REP and ROUTER server sends the number back with its answer), so
a late answer is not taken for the next request's. A connection that breaks is seen at once; the request is sent again while there is time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import ActionPrefix, ModalityConfig, NetworkName, Policy, PolicyMetadata
from gr00t_fast.base.errors import ConfigError, ObservationError, ServerError, ServerUnreachableError, WireError, require
from gr00t_fast.inputs.observation import flat_actions, flat_observation, is_nested, nested_observation
from gr00t_fast.serving.wire import (
    CONTINUED_BY,
    MAX_MESSAGE_BYTES,
    UNAUTHORISED_TEXT,
    UNKNOWN_ENDPOINT_TEXT,
    Encoder,
    ModalityConfigN1d6,
    ModalityConfigN1d7,
    decode,
    metadata_from_message,
    tcp_address,
)

DEFAULT_TIMEOUT_S = 15.0  # NVIDIA's clients have the same figure, but never tell their socket
PING_TIMEOUT_S = 2.0
# A machine that vanished without closing its connections is noticed after this long. Answered by ZeroMQ itself, also while a server computes.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 1000, 5000
_RECONNECT_MS = 50
_LOOK_MS = 200  # between two looks, while it waits, at whether another thread has closed the client
_LEAST_DEADLINE_S = 1e-3  # of a chunk that should be there already
_CODES_OF_TEXTS = {UNAUTHORISED_TEXT: ServerError.UNAUTHORISED, UNKNOWN_ENDPOINT_TEXT: ServerError.UNKNOWN_ENDPOINT}


class PolicyClient(Policy, contextlib.AbstractContextManager["PolicyClient"]):
    """A policy on a server. One thread may call it at a time, and any may close it. Close it, or use it as a context manager."""

    continues = True  # as far as the server does: another one refuses

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 5555,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_token: str | None = None,
        address: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        resend: bool = True,
    ) -> None:
        """Connects in the background. `address`: any ZeroMQ address instead of host and port, such as `ipc:///tmp/gr00t.sock`.

        `resend=False`: a connection that breaks, or broke since the last call, ends `get_action` at once with ServerUnreachableError: whoever drives
        an arm has a newer observation to send.
        Raises ConfigError for an address or time-out that cannot be used, and MissingExtraError without pyzmq and msgpack.
        """
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ConfigError(f"timeout_s must be a positive number of seconds, got {timeout_s}.")
        self._zmq = require("zmq", "serving")
        self.address = address or tcp_address(host, port)
        self.timeout_s, self._token, self._max_bytes, self._resend = timeout_s, api_token, max_message_bytes, resend
        self.last_timing = {}
        self.expected_fingerprint: str | None = None  # of the only policy whose actions are taken; None: whoever answers. It needs our server
        self.connection = 0  # another number whenever it broke: what answers now may be another server than before
        self._encoder = Encoder()
        self._connections = itertools.count()
        self._protocol: NetworkName | None = None  # which the server speaks, once it was asked
        self._context = self._zmq.Context()
        self._in_use, self._closed = threading.Lock(), False  # ZeroMQ's sockets are one thread's: closed beside a call, they crash the process
        try:
            self._connect()
        except self._zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot connect to '{self.address}': {error}. Expected an address like tcp://192.168.0.7:5555.") from error

    def get_action(
        self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Policy.get_action`. `noise`, `prefix` and `deadline_s`, by which our server orders its clients, need that server; NVIDIA's has no such
        endpoint and says so. The first call asks the server for its modality configuration too, which tells its protocol.

        States travel as float64 and an instruction as a list, whatever they are here: NVIDIA's server refuses every state of another type than
        the first one it saw, and fails on a bare text.
        Raises ServerError with the server's reason, or when the answer has another fingerprint, ServerUnreachableError when it did not answer,
        WireError when the answer makes no sense, and ObservationError for a state of something else than numbers.
        """
        observation = _as_nvidia_takes_it(flat_observation(observation) if is_nested(observation) else observation)
        left_s = self.timeout_s
        if self._protocol is None:
            began_s = time.monotonic()
            self.get_modality_config()
            left_s -= time.monotonic() - began_s

        if any(option is not None for option in (noise, prefix, deadline_s, self.expected_fingerprint)):
            options: dict[str, Any] = {"fingerprint": True} | ({} if noise is None else {"noise": np.asarray(noise, np.float32)})
            if deadline_s is not None:
                options["deadline_s"] = max(float(deadline_s), _LEAST_DEADLINE_S)
            if prefix is not None:
                options["prefix"] = {"actions": dict(prefix.actions), "delay": int(prefix.inference_delay), "method": CONTINUED_BY}
            reply = self._call("get_action_with_options", {"observation": observation, **options}, left_s, self._resend)
            self._check_fingerprint(reply)
            return _actions(reply)
        if self._protocol == "n1.5":
            return _actions(self._call("get_action", observation, left_s, self._resend))
        nested, batched = nested_observation(observation)
        reply = self._call("get_action", {"observation": nested, "options": None}, left_s, self._resend)
        if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[0], dict):
            raise WireError(f"get_action: expected actions and info from the server, got {type(reply).__name__}.")
        return _actions(flat_actions(reply[0], batched))

    def _check_fingerprint(self, reply: Any) -> None:
        """Takes it out of the reply. Raises ServerError when it is not the expected one."""
        found = reply.pop("fingerprint", None) if isinstance(reply, dict) else None
        if self.expected_fingerprint not in (None, found):
            raise ServerError(
                f"the policy server at {self.address} answered with another policy than before: it has another checkpoint now, or several servers "
                "share the address. The answer is not used. Start the program again to check the policy."
            )

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """As `Policy.get_modality_config`; raises like `get_action`. Its form tells in which protocol `get_action` is to speak."""
        reply = self._call("get_modality_config")
        if not isinstance(reply, dict) or not all(isinstance(value, ModalityConfig) for value in reply.values()):
            raise WireError("get_modality_config: the server answered something else than modality configurations.")
        forms: dict[type, NetworkName] = {ModalityConfigN1d6: "n1.6", ModalityConfigN1d7: "n1.7"}
        self._protocol = next((forms[type(config)] for config in reply.values() if type(config) in forms), "n1.5")
        return {name: config.of(name) if isinstance(config, ModalityConfigN1d7) else config for name, config in reply.items()}

    def get_metadata(self) -> PolicyMetadata | None:
        """What the server's checkpoint was trained on, or None from a server that does not tell (NVIDIA's). Raises like `get_action`."""
        reply = self._call_extension("get_facts")
        return None if reply is None else metadata_from_message(reply)

    def get_status(self) -> dict[str, Any] | None:
        """`Service.status` of the server, or None from one that has none (NVIDIA's). Raises like `get_action`."""
        return self._call_extension("get_status")

    def reset(self) -> None:
        """As `Policy.reset`; our server has nothing to reset, being everybody's. NVIDIA's N1.5 server has no such endpoint: that is no error."""
        self._call_extension("reset")

    def ping(self, timeout_s: float = PING_TIMEOUT_S) -> bool:
        """True when the server answers in time. Raises ServerError when it answers with a refusal (a wrong token)."""
        try:
            self._call("ping", timeout_s=timeout_s)
        except ServerUnreachableError:
            return False
        return True

    def kill(self) -> None:
        """End the server. Raises ServerError when it refuses: ours does without an api_token."""
        self._call("kill")  # NVIDIA's server answers with nil

    def close(self) -> None:
        """Close the connection; never waits. Calling it again is harmless. A call of another thread then ends with ServerError, and closes it."""
        self._closed = True
        self._close_unless_in_use()

    def _close_unless_in_use(self) -> None:
        if not self._in_use.acquire(blocking=False):
            return
        try:
            if not self._context.closed:
                self._drop_socket()
                self._context.destroy(linger=0)
        finally:
            self._in_use.release()

    def __del__(self) -> None:
        if hasattr(self, "_in_use"):
            self.close()  # the garbage collector would close the sockets in an order that can block for ever, see _drop_socket

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call_extension(self, endpoint: str) -> Any:
        """The reply, or None from a server that does not know this endpoint of ours."""
        try:
            return self._call(endpoint)
        except ServerError as error:
            if error.code != ServerError.UNKNOWN_ENDPOINT:
                raise
            return None

    def _call(self, endpoint: str, data: Any = None, timeout_s: float | None = None, resend: bool = True) -> Any:
        """One request and its reply. Fills `last_timing`: stages in ms."""
        began_s = time.monotonic()
        request = self._encoder.encode(
            {"endpoint": endpoint} | ({} if data is None else {"data": data}) | ({} if self._token is None else {"api_token": self._token}),
            n1d7=self._protocol == "n1.7",
        )
        sent_s = time.monotonic()
        try:
            with self._in_use:
                answer = self._exchange(request, began_s + (self.timeout_s if timeout_s is None else timeout_s), resend)
        finally:
            if self._closed:
                self._close_unless_in_use()
        answered_s = time.monotonic()
        reply = decode(answer, self._max_bytes)
        stages_s = {"encode": sent_s - began_s, "server": answered_s - sent_s, "decode": time.monotonic() - answered_s}
        self.last_timing = {name: 1000 * seconds for name, seconds in stages_s.items()}
        if isinstance(reply, dict) and "error" in reply:
            raise ServerError(f"the policy server at {self.address} refused {endpoint}: {reply['error']}", _code(reply))
        return reply

    def _exchange(self, request: memoryview, deadline_s: float, resend: bool) -> bytes:
        """Send and wait. With `resend`, a request whose connection broke is sent again until the deadline. Raises ServerError once it is closed."""
        self._check_open()
        broke = self._count_breaks()
        while True:
            if broke and not resend:
                raise ServerUnreachableError(f"the connection to the policy server at {self.address} broke.")
            if broke:  # a server that ends every connection must not be hammered
                time.sleep(min(_RECONNECT_MS / 1000, max(deadline_s - time.monotonic(), 0)))
            if not self._sent(request):
                self._drop_socket()
                self._connect()
                self._sent(request)
            answer = self._wait(deadline_s)
            if answer is not None:
                return answer
            broke = self._count_breaks()

    def _sent(self, request: memoryview) -> bool:
        """False when ZeroMQ gave up the other end, which speaks another protocol, or still holds a request that it could not send."""
        try:
            self._socket.poll(0, self._zmq.POLLOUT)  # ZeroMQ looks at what became of the request before
            self._socket.send(request, self._zmq.NOBLOCK, copy=False)
        except self._zmq.Again:
            return False
        return True

    def _wait(self, deadline_s: float) -> bytes | None:
        """The answer, or None when the connection broke. Raises ServerUnreachableError at the deadline."""
        while True:
            self._check_open()
            ready = dict(self._poller.poll(min(max(math.ceil(1000 * (deadline_s - time.monotonic())), 0), _LOOK_MS)))
            if self._socket in ready:
                with contextlib.suppress(self._zmq.Again):  # an earlier request's answer
                    return self._socket.recv(self._zmq.NOBLOCK)
            if time.monotonic() >= deadline_s:
                raise ServerUnreachableError(
                    f"no answer from the policy server at {self.address} in time. Is it running there (gr00t-fast serve), does it accept "
                    "messages of this size, and is the time-out longer than an inference (--server_timeout_s of a run, timeout_s of PolicyClient)?"
                )
            if self._monitor in ready:
                return None

    def _check_open(self) -> None:
        if self._closed:
            raise ServerError("this client is closed; make a new one.")

    def _count_breaks(self) -> bool:
        """Whether the connection broke since it was last looked at."""
        before = self.connection
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            self.connection += 1
        return self.connection > before

    def _connect(self) -> None:
        zmq = self._zmq
        self._socket = self._context.socket(zmq.REQ)
        limits = {zmq.SNDHWM: 1, zmq.LINGER: 0, zmq.MAXMSGSIZE: self._max_bytes}
        times = {zmq.RECONNECT_IVL: _RECONNECT_MS, zmq.HEARTBEAT_IVL: _HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS}
        for option, value in {zmq.REQ_RELAXED: 1, zmq.REQ_CORRELATE: 1, zmq.IPV6: 1, **limits, **times}.items():
            self._socket.setsockopt(option, value)
        events_address = f"inproc://events-{next(self._connections)}"  # never one again: ZeroMQ gives it back some time after a socket was closed
        self._socket.monitor(events_address, zmq.EVENT_DISCONNECTED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # ZeroMQ's own thread, which writes, would block when it is full
        self._monitor.connect(events_address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(self.address)

    def _drop_socket(self) -> None:
        self._socket.disable_monitor()  # first: ZeroMQ's own thread blocks for ever when it reports to a reader that is gone
        self._socket.close(0)
        self._monitor.close(0)


def _as_nvidia_takes_it(observation: dict[str, Any]) -> dict[str, Any]:
    sent = dict(observation)
    for key, value in observation.items():
        if key.startswith("state."):
            try:
                sent[key] = np.asarray(value, np.float64)
            except (TypeError, ValueError) as error:
                raise ObservationError(f"{key}: expected numbers, got {_kind(value)} ({error}).") from error
    batch = next((len(value) for key, value in sent.items() if key.startswith("state.") and value.ndim == 3), 1)
    return {key: [value] * batch if "annotation" in key and isinstance(value, str) else value for key, value in sent.items()}


def _actions(reply: Any) -> dict[str, np.ndarray]:
    """Checked actions in float32, as the `Policy` protocol has them."""
    if not isinstance(reply, dict) or not reply:
        raise WireError(f"get_action: expected a map of action arrays from the server, got {type(reply).__name__}.")
    for key, value in reply.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim not in (1, 2, 3):
            raise WireError(f"get_action: expected an array of (horizon, values) or (batch, horizon, values) for '{key}', got {_kind(value)}.")
    return {key: value.astype(np.float32) for key, value in reply.items()}


def _code(reply: dict[str, Any]) -> str:
    """The code of an error; NVIDIA's servers give a text alone."""
    codes = (code for text, code in _CODES_OF_TEXTS.items() if text in str(reply["error"]))
    return str(reply.get("code", "")) or next(codes, "")


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
