"""Stopping on Ctrl-C, SIGTERM or a closed terminal without ever losing the request or the landing.

A signal may come anywhere: in the middle of a seconds-long inference (the arm must land now, not after it), in the middle of a bus transfer
(let it finish: milliseconds), or in the middle of landing (must not be cut short). The handler raises only where the program allows it:

    try:
        with stop.armed():                  # a signal raises StopRequested here, at once
            ...
            with stop.atomic():             # ... but here on leaving, or after GRACE_S (a second signal does not wait)
                robot.send(targets)
    finally:
        robot.land()                        # outside `armed`: signals are remembered, never raised

An exception raised by a signal handler can be lost: Python drops it in finalisers and weakref callbacks, and a library may have a bare
`except`. So a timer raises it again, every RAISE_AGAIN_S until `armed` has been left. It never raises while code of this module runs: that is
what makes leaving `armed` final.
"""

from __future__ import annotations

import signal
import threading
import time
from enum import Enum
from types import FrameType, TracebackType

# Exit code of a program ended by a signal, by shell convention: 128 + number (Ctrl-C 130, SIGTERM 143).
SIGNAL_EXIT_BASE = 128
# SIGHUP: the terminal or the ssh connection went away. SIGQUIT and SIGTSTP (Ctrl-\, Ctrl-Z) would end or freeze the program with the motors
# holding. All but the first two are absent on Windows.
_STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP") if hasattr(signal, name))
GRACE_S = 0.5  # a transfer on a sound bus takes milliseconds; one that waits for a lost cable must not hold up the landing
RAISE_AGAIN_S = 0.25  # unwinding to the landing takes less; a lost request is obeyed this much later
SAME_STOP_S = 0.3  # a closed terminal, make and uv deliver a stop twice within milliseconds: one stop; a person is slower, or presses a third time
_SOON_S = 0.005  # this module's own code was interrupted: it lasts microseconds


class StopRequested(BaseException):  # not an Exception: like KeyboardInterrupt it must not be swallowed
    """The run is to end now. `reason` for the report, `exit_code` for the shell."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code


class _Mode(Enum):
    QUIET = "remember only"
    ARMED = "raise at once"
    ATOMIC = "raise on leaving, after GRACE_S, or on the second signal"


class StopSignals:
    """Signal handlers while used as a context manager (main thread only; elsewhere only `request` stops). Handlers are restored on exit."""

    def __init__(self) -> None:
        self._mode = _Mode.QUIET
        self._request: tuple[str, int] | None = None
        self._obeyed: tuple[str, int] | None = None
        self._first_s: float | None = None  # when the first signal came
        self._further = False  # whether one has come that is no copy of the first
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if not _ignored_on_purpose(number):
                    self._previous[number] = signal.signal(number, self._on_signal)
            if hasattr(signal, "SIGALRM"):
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_timer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _set_timer(0.0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> bool:
        return (self._request or self._obeyed) is not None

    @property
    def exit_code(self) -> int | None:
        """What to exit with because of the request, or None when nothing was requested."""
        request = self._obeyed or self._request
        return None if request is None else request[1]

    @property
    def reason(self) -> str | None:
        """Why the end was requested, if it was."""
        request = self._obeyed or self._request
        return None if request is None else request[0]

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Ask for the end from the program itself (a key press, another thread); takes effect at the next `check`."""
        if self._request is None:
            self._request = (reason, exit_code)

    def obeyed(self) -> None:
        """The request has led to an orderly end, which may take a while: from now on a further one raises. `reason` and `exit_code` stay the first
        one's. A second signal that has come already counts as the further one, unless it came within SAME_STOP_S."""
        first = self._obeyed or self._request
        self._obeyed, self._request = first, first if self._further else None

    def check(self) -> None:
        """Raise StopRequested if the end was asked for; the catch for whatever could not be raised at once."""
        if self._request is not None:
            raise StopRequested(*self._request)

    def armed(self) -> _Armed:
        """Inside, a signal raises StopRequested at once (also one that came before), and again while it is not obeyed."""
        return _Armed(self)

    def atomic(self) -> _Atomic:
        """Inside, the first signal waits until the block is left, or for GRACE_S. For bus transfers, which last milliseconds."""
        return _Atomic(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, now_s = self._request is None, time.monotonic()
        self._first_s = now_s if self._first_s is None else self._first_s
        self._further |= now_s - self._first_s >= SAME_STOP_S
        if self._obeyed is not None and not self._further:
            return
        if first:
            self._request = (signal.Signals(number).name, SIGNAL_EXIT_BASE + number)
        if self._mode is _Mode.ATOMIC and first:
            _set_timer(GRACE_S)
        else:
            self._raise(frame)

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        del number
        self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        if self._mode is _Mode.QUIET or self._request is None:
            return
        if frame is not None and frame.f_code.co_filename == __file__:  # entering or leaving a block: what it does must be whole
            _set_timer(_SOON_S)
            return
        _set_timer(RAISE_AGAIN_S)
        raise StopRequested(*self._request)


class _Armed:
    """`with stop.armed()`. A class and not a generator: Python runs no signal handler between the block's end and the first line of `__exit__`."""

    def __init__(self, stop: StopSignals) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._stop._mode = _Mode.ARMED
        if self._stop._request is not None:
            self._stop._mode = _Mode.QUIET
            self._stop.check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop._mode = _Mode.QUIET
        _set_timer(0.0)


class _Atomic:
    """`with stop.atomic()`."""

    def __init__(self, stop: StopSignals) -> None:
        self._stop = stop
        self._entered = False

    def __enter__(self) -> None:
        self._entered = self._stop._mode is _Mode.ARMED
        if self._entered:
            self._stop._mode = _Mode.ATOMIC

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._entered:
            return
        self._stop._mode = _Mode.ARMED
        if self._stop._request is not None and not isinstance(error, StopRequested):
            _set_timer(RAISE_AGAIN_S)
            self._stop.check()


def _ignored_on_purpose(number: int) -> bool:
    """Only `nohup` means it. A script's background job (`run.sh` with a `&`) inherits SIGINT and SIGQUIT ignored without anybody having asked for
    that, and an arm that does not hear them is an arm that moves on."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def _set_timer(delay_s: float) -> None:
    """Once after `delay_s` and then every RAISE_AGAIN_S, for an expiry too can be lost (or fall into a landing that holds signals off); 0: never."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, delay_s, RAISE_AGAIN_S if delay_s else 0.0)
