"""One thread that runs one call at a time, and hands back what came of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from gr00t_fast.contracts import Clock

THREAD_NAME = "gr00t_fast-inference"
KEEP_ALIVE_EVERY_S = 0.1
_in_a_call: set[threading.Thread] = set()


@dataclass(frozen=True)
class CallResult:
    """What a call returned, or what it raised."""

    value: Any = None
    error: BaseException | None = None


class Worker(Protocol):
    """Where inference runs. Tests and simulations of slow networks use one without a thread."""

    @property
    def busy(self) -> bool:
        """True from `submit` until the outcome has been taken by `poll` or `wait`."""

    def submit(self, call: Callable[[], Any]) -> None:
        """Start a call. Raises RuntimeError while busy."""

    def poll(self) -> CallResult | None:
        """The outcome if it is there; never waits."""

    def wait(self, timeout_s: float | None = None) -> CallResult | None:
        """Wait for the outcome; None when it is not there after `timeout_s` (the call goes on, and the worker stays busy)."""

    def close(self, timeout_s: float) -> bool:
        """Take no more calls and wait for the running one, at most `timeout_s`. True when it has ended."""


class ThreadWorker:
    """A daemon thread, started with the first call. All methods belong to one other thread.

    Daemon, because a call may hang for ever (a driver, a network connection) and must not keep the program from ending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[CallResult] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.busy = False

    def submit(self, call: Callable[[], Any]) -> None:
        if self.busy or self._closed:
            raise RuntimeError("the inference thread is " + ("closed" if self._closed else "busy; take its outcome first"))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
            self._thread.start()
        self.busy = True
        self._calls.put(call)

    def poll(self) -> CallResult | None:
        if not self.busy:
            return None
        try:
            outcome = self._results.get_nowait()
        except Empty:
            return None
        self.busy = False
        return outcome

    def wait(self, timeout_s: float | None = None) -> CallResult | None:
        if not self.busy:
            raise RuntimeError("nothing was submitted to the inference thread")
        try:
            outcome = self._results.get(timeout=timeout_s)
        except Empty:
            return None
        self.busy = False
        return outcome

    def close(self, timeout_s: float) -> bool:
        if not self._closed:
            self._closed = True
            self._calls.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            _in_a_call.add(threading.current_thread())
            outcome = _result_of(call)
            _in_a_call.discard(threading.current_thread())
            self._results.put(outcome)
            del call, outcome  # they hold an observation


def wait_with_keep_alive(worker: Worker, clock: Clock, limit_s: float | None, keep_alive: Callable[[], None] = lambda: None) -> CallResult | None:
    """Wait for the worker's outcome at most `limit_s` of `clock` (None: for ever), with `keep_alive` called several times a second. None when it is
    not there by then."""
    end_s = math.inf if limit_s is None else clock.now_s() + limit_s
    while True:
        keep_alive()
        outcome = worker.wait(max(0.0, min(KEEP_ALIVE_EVERY_S, end_s - clock.now_s())))
        if outcome is not None or clock.now_s() >= end_s:
            return outcome


def value_of(outcome: CallResult) -> Any:
    """What the call returned. Raises what it raised."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _result_of(call: Callable[[], Any]) -> CallResult:
    try:
        return CallResult(value=call())
    except BaseException as error:  # noqa: BLE001 - not handled here but handed over: the other thread raises it
        return CallResult(error=error)


def thread_left_running() -> bool:
    """Whether some inference still runs in a thread that could not be joined."""
    return bool(_in_a_call)
