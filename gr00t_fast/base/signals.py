"""Stopping on Ctrl-C, SIGTERM or a closed terminal.

A signal sets a flag; the loop, and whatever waits, retries or sleeps, looks at it. Inference runs in a thread of its own, so that nothing native
holds up the main one, and no exception comes out of the middle of a transfer.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Exit code of a program ended by a signal, by shell convention: 128 + number (Ctrl-C 130, SIGTERM 143).
SIGNAL_EXIT_BASE = 128
# SIGHUP: the terminal or the ssh connection went away. SIGQUIT and SIGTSTP (Ctrl-\, Ctrl-Z) would end or freeze the program with the motors
# holding. All but the first two are absent on Windows.
_STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP") if hasattr(signal, name))
# While the arm is put down, only these mean that its torque is to go off at once: a person or a supervisor sends them on purpose. A terminal that is
# lost and an Esc do not.
_DELIBERATE = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
FURTHER_AFTER_S = 1.0  # after the put-down was announced: before, they were meant for the run
PRESSED_ANEW_S = 0.7  # after the last one: a key that is held down repeats sooner, first after up to 0.5 s; make and uv deliver a stop twice


class StopRequested(KeyboardInterrupt):  # not an Exception: what survives faults must not swallow it
    """The run is to end now. `reason` for the report, `exit_code` for the shell."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code


class StopSignals:
    """Takes note of stops: signals while used as a context manager (main thread only), and `request`. Handlers are restored on exit."""

    def __init__(self) -> None:
        self._first: tuple[str, int] | None = None
        self._last_s, self._put_down_s = -math.inf, math.inf  # when the last signal came, and the put-down was announced
        self._due = self._raises = self._asked = False  # asked: whether a person has ended the run, or tried to since
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if not _ignored_on_purpose(number):
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def shutting_down(self) -> bool:
        """Whether the orderly end has begun."""
        return not math.isinf(self._put_down_s)

    @property
    def exit_code(self) -> int | None:
        """What to exit with because of the first stop, or None when there was none."""
        return None if self._first is None else self._first[1]

    @property
    def reason(self) -> str | None:
        """Why the end was requested, if it was."""
        return None if self._first is None else self._first[0]

    def request(self, reason: str, exit_code: int = 0, by_person: bool = False) -> None:
        """Ask for the end from the program itself (another thread, or a key: `by_person`)."""
        if self._first is None:
            self._first, self._due, self._asked = (reason, exit_code), math.isinf(self._put_down_s), by_person

    def check(self) -> None:
        """Raise StopRequested if a stop has come that has not been obeyed."""
        if self._due and self._first is not None:
            raise StopRequested(*self._first)

    def begin_shutdown(self) -> None:
        """The orderly end begins and is announced, which may take a while: from now on `check` raises for a deliberate further stop alone, see
        `press`. `reason` and `exit_code` stay the first one's."""
        self._raises = self._due = False
        self._put_down_s = time.monotonic()

    @contextmanager
    def raise_at_once(self) -> Iterator[None]:
        """Inside, a signal raises StopRequested wherever the program is, as Ctrl-C does: only where nothing is powered."""
        self.check()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
        self.check()  # a library may have swallowed it

    def press(self, reason: str, exit_code: int = 0, deliberate: bool = True) -> None:
        """A person, or a supervisor, stops the run; from any thread. The first stop ends it. While the arm is put down a further one lets go at once,
        if it is `deliberate`, pressed anew, and FURTHER_AFTER_S after the announcement or later. After a run that ended by itself the first of these
        is none: it was meant for the run."""
        now_s, before_s = time.monotonic(), self._last_s
        self._last_s = now_s
        if self._first is None:
            self.request(reason, exit_code, by_person=math.isinf(self._put_down_s))
        if deliberate and not math.isinf(self._put_down_s):
            self._due |= self._asked and now_s - self._put_down_s > FURTHER_AFTER_S and now_s - before_s > PRESSED_ANEW_S
            self._asked = True
        if self._due and self._raises:
            main = threading.main_thread()
            if threading.current_thread() is main:
                self.check()
            else:  # only there it may be raised
                signal.pthread_kill(main.ident, signal.SIGINT)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.press(signal.Signals(number).name, SIGNAL_EXIT_BASE + number, number in _DELIBERATE)


def _ignored_on_purpose(number: int) -> bool:
    """Only `nohup` means it. A script's background job (`run.sh` with a `&`) inherits SIGINT and SIGQUIT ignored without anybody having asked for
    that, and an arm that does not hear them is an arm that moves on."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
