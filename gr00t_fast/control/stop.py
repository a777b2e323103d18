"""Stopping on Ctrl-C, SIGTERM or a closed terminal without ever losing the landing.

A signal may come anywhere: in the middle of a seconds-long inference (the arm must land now, not after it), in the middle of a bus transfer
(let it finish: milliseconds), or in the middle of landing (must not be cut short). The handler raises only where the program allows it:

    try:
        with stop.armed():                  # a signal raises StopRequested here, at once
            ...
            with stop.atomic():             # ... but here on leaving, or after GRACE_S (a second signal does not wait)
                robot.send(targets)
    finally:
        robot.land()                        # outside `armed`: signals are remembered, never raised

The handler raises at most once, so nothing can be raised between leaving `armed` and the landing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType, TracebackType

# Exit code of a program ended by a signal, by shell convention: 128 + number (Ctrl-C 130, SIGTERM 143).
SIGNAL_EXIT_BASE = 128
# SIGHUP: the terminal or the ssh connection went away. SIGQUIT and SIGTSTP (Ctrl-\, Ctrl-Z) would end or freeze the program with the motors
# holding. All but the first two are absent on Windows.
_STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP") if hasattr(signal, name))
GRACE_S = 0.5  # a transfer on a sound bus takes milliseconds; one that waits for a lost cable must not hold up the landing


class StopRequested(BaseException):  # not an Exception: like KeyboardInterrupt it must not be swallowed
    """The run shall end now. `reason` for the report, `exit_code` for the shell."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code


class _Mode(Enum):
    QUIET = "remember only"
    ARMED = "raise at once"
    ATOMIC = "raise on leaving, or on the second signal"


class StopSignals:
    """Signal handlers while used as a context manager (main thread only; elsewhere only `request` stops). Handlers are restored on exit."""

    def __init__(self) -> None:
        self._mode = _Mode.QUIET
        self._request: StopRequested | None = None
        self._raised = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if not _ignored_on_purpose(number):
                    self._previous[number] = signal.signal(number, self._on_signal)
            if hasattr(signal, "SIGALRM"):
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_grace_over)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _end_grace()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> bool:
        return self._request is not None

    @property
    def exit_code(self) -> int | None:
        """What to exit with because of the request, or None when nothing was requested."""
        return None if self._request is None else self._request.exit_code

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Ask for the end from the program itself (a key press, another thread); takes effect at the next `check`."""
        if self._request is None:
            self._request = StopRequested(reason, exit_code)

    def check(self) -> None:
        """Raise StopRequested if the end was asked for; the catch for whatever could not be raised at once."""
        if self._request is not None:
            self._mode, self._raised = _Mode.QUIET, True
            raise self._request

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Inside, a signal raises StopRequested at once (also one that came before)."""
        try:
            self._mode = _Mode.ARMED
            self.check()
            yield
        finally:
            self._mode = _Mode.QUIET

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Inside, the first signal waits until the block is left, or for GRACE_S. For bus transfers, which last milliseconds."""
        if self._mode is not _Mode.ARMED:
            yield
            return
        self._mode = _Mode.ATOMIC
        try:
            yield
        finally:
            if self._request is not None:
                _end_grace()
            if self._mode is _Mode.ATOMIC:  # the handler switches to QUIET when it raises, and QUIET must stay
                self._mode = _Mode.ARMED
        self.check()

    def _on_grace_over(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._mode is _Mode.ATOMIC and self._request is not None and not self._raised:
            self._mode, self._raised = _Mode.QUIET, True
            raise self._request

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        first = self._request is None
        if first:
            self._request = StopRequested(signal.Signals(number).name, SIGNAL_EXIT_BASE + number)
        if first and self._mode is _Mode.ATOMIC and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        may_raise = self._mode is _Mode.ARMED or (self._mode is _Mode.ATOMIC and not first)
        if may_raise and not self._raised:
            self._mode, self._raised = _Mode.QUIET, True
            raise self._request


def _ignored_on_purpose(number: int) -> bool:
    """Only `nohup` means it. A script's background job (`run.sh` with a `&`) inherits SIGINT and SIGQUIT ignored without anybody having asked for
    that, and an arm that does not hear them is an arm that moves on."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def _end_grace() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0.0)
