"""Any policy behind gr00t_fast's own PolicyServer, in a process of its own."""

from __future__ import annotations

import multiprocessing
import secrets
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from benchmarks.lib.program import end_with_parent
from gr00t_fast.base.contracts import Policy
from gr00t_fast.base.errors import Gr00tFastError, ServerError
from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.server import PolicyServer

_START_TIMEOUT_S, _END_TIMEOUT_S, _CALL_TIMEOUT_S = 600.0, 5.0, 60.0  # to load the weights, to end, for an inference


class ServedPolicy:
    """Context manager: starts the server, gives a client that is connected to it, and ends both. `make` makes the policy, over there."""

    def __init__(self, make: Callable[[], Policy], transport: Literal["tcp", "ipc"] = "tcp", max_batch: int = 1) -> None:
        """max_batch: how many clients' requests it may compute together."""
        self.token = secrets.token_hex(8)
        self._directory = tempfile.TemporaryDirectory(prefix="gr00t-")  # short: an ipc path may have some hundred bytes only
        address = f"ipc://{Path(self._directory.name) / 'server'}" if transport == "ipc" else None
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        arguments = (make, self.token, address, self._theirs, max_batch)
        self._process = context.Process(target=_serve, args=arguments, name="policy-server", daemon=True)
        self._client: PolicyClient | None = None

    def __enter__(self) -> PolicyClient:
        """Raises ServerError when the server does not start."""
        self._process.start()
        self._theirs.close()  # else nobody would notice that the process has died
        try:
            self._client = PolicyClient(address=self._address(), timeout_s=_CALL_TIMEOUT_S, api_token=self.token)
            self._client.get_modality_config()  # connected now: the first inference shall not pay for it
        except BaseException:
            self._end()
            raise
        return self._client

    def _address(self) -> str:
        try:
            told = self._ours.recv() if self._ours.poll(_START_TIMEOUT_S) else f"no answer within {_START_TIMEOUT_S:g} s"
        except EOFError:
            told = "its process ended"
        if "://" not in told.partition(" ")[0]:
            raise ServerError(f"the policy server did not start: {told}. Its own messages are above.")
        return told

    def __exit__(self, *_: Any) -> None:
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
        self._directory.cleanup()


def _serve(make: Callable[[], Policy], token: str, address: str | None, connection: Connection, max_batch: int) -> None:
    end_with_parent()
    try:
        server = PolicyServer(make(), port=0, address=address, api_token=token)
        server.service.measure_batches(max_batch)
    except Gr00tFastError as error:
        connection.send(str(error))
        return
    connection.send(server.address)
    server.run()
