"""A thread that makes one call at a time: where the policy runs, so that it never holds up the loop that drives the arm."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

_in_a_call: set[threading.Thread] = set()


class Worker(Protocol):
    """Where inference runs, one call at a time. Tests and simulations of slow networks use one without a thread."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Start a call; the one before has ended. Callers use `done`, `exception` and `result` of the answer."""

    def close(self, timeout_s: float) -> bool:
        """Take no more calls and wait for the running one, at most `timeout_s`. True when it has ended."""


class ThreadWorker:
    """A daemon thread, started with the first call: a call may hang for ever (a driver, a network connection) and must not keep the program from
    ending, as one of a ThreadPoolExecutor would."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gr00t_fast-inference", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def close(self, timeout_s: float) -> bool:
        self._calls.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            _in_a_call.add(threading.current_thread())
            try:
                result, error = call(), None
            except BaseException as raised:  # noqa: BLE001 - not handled here but handed over: the other thread raises it
                result, error = None, raised
            _in_a_call.discard(threading.current_thread())
            future.set_result(result) if error is None else future.set_exception(error)
            del item, future, call, result, error  # they hold an observation


def thread_left_running() -> bool:
    """Whether some inference still runs in a thread that could not be joined."""
    return bool(_in_a_call)
