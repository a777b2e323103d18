"""Any policy behind gr00t_fast's own PolicyServer, in a process of its own."""

from __future__ import annotations

import multiprocessing
import secrets
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol

from benchmarks.lib.program import end_with_parent
from gr00t_fast.contracts import Clock, Policy
from gr00t_fast.control.pacer import MonotonicClock
from gr00t_fast.errors import Gr00tFastError, ServerError
from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.server import PolicyServer

_START_TIMEOUT_S, _END_TIMEOUT_S = 60.0, 5.0


class Recipe(Protocol):
    """How to make a policy; travels to the other process."""

    def build(self, clock: Clock) -> Policy: ...


class ServedPolicy:
    """Context manager: starts the server, gives a client that is connected to it, and ends both."""

    def __init__(self, spec: Recipe) -> None:
        self._token = secrets.token_hex(8)
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, self._token, self._theirs), name="policy-server", daemon=True)
        self._client: PolicyClient | None = None

    def __enter__(self) -> PolicyClient:
        """Raises ServerError when the server does not start."""
        self._process.start()
        self._theirs.close()  # else nobody would notice that the process has died
        try:
            self._client = PolicyClient(port=self._port(), api_token=self._token)
            self._client.get_modality_config()  # connected now: the first inference shall not pay for it
        except BaseException:
            self._end()
            raise
        return self._client

    def _port(self) -> int:
        try:
            port = self._ours.recv() if self._ours.poll(_START_TIMEOUT_S) else f"no answer within {_START_TIMEOUT_S:g} s"
        except EOFError:
            port = "its process ended"
        if not isinstance(port, int):
            raise ServerError(f"the policy server did not start: {port}. Its own messages are above.")
        return port

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._client is not None:
            self._client.close()
        self._process.terminate()
        self._process.join(_END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._ours.close()


def _serve(spec: Recipe, token: str, connection: Connection) -> None:
    end_with_parent()
    try:
        server = PolicyServer(spec.build(MonotonicClock()), port=0, api_token=token)
    except Gr00tFastError as error:
        connection.send(str(error))
        return
    connection.send(server.port)
    server.run()
