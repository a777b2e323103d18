"""When the control loop acts, and when it ends: absolute deadlines, and the request to stop.

Deadlines are `origin + k * period`, so an early or late tick never shifts the ones after it (a sleep of one period per tick drifts by the
work done in it). A deadline that has gone by is skipped, not caught up: two targets in quick succession would be a jump.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from gr00t_fast.base.contracts import Clock
from gr00t_fast.base.errors import ConfigError

# The operating system wakes a sleeper late: about 0.06 ms on Linux (timer slack), above 1 ms on a busy machine. The last
# stretch is polled instead; 1 ms of a 33 ms tick is 3 % of a core.
SPIN_S = 0.001
# A tick that is late by less than this part of a period still runs (and shows in the tick error); beyond, it would crowd the next one.
MISS_AFTER_PERIODS = 0.5
FPS_RANGE = (1.0, 200.0)  # Hz; six servos take about 4 ms for one read and one write
ROUNDING = 1e-6  # periods; a pause of exactly n periods counts as n


class MonotonicClock:
    """Real time. Sleeps coarsely, then polls the last millisecond."""

    def now_s(self) -> float:
        return time.perf_counter()

    def sleep_until_s(self, deadline_s: float) -> None:
        coarse_s = deadline_s - SPIN_S - time.perf_counter()
        if coarse_s > 0:
            time.sleep(coarse_s)
        while time.perf_counter() < deadline_s:
            time.sleep(0)  # gives the interpreter lock to camera threads while polling

    def suspended_s(self) -> float:
        """CLOCK_MONOTONIC stands still while a laptop is closed; CLOCK_BOOTTIME does not."""
        if not hasattr(time, "CLOCK_BOOTTIME"):
            return 0.0
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class VirtualClock:
    """Time that moves only when somebody sleeps: nothing waits, and the same run has the same result."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_until_s(self, deadline_s: float) -> None:
        self.time_s = max(self.time_s, deadline_s)

    def suspended_s(self) -> float:
        return 0.0


class Pacer:
    """Ticks at `fps` on a fixed grid, from the first to the last: `wait` at the end of each, and `restart` after work that was meant to take longer.

    tick: number of the present one: deadlines since the beginning, those that were missed included.
    tick_errors_s: how late each tick began after its deadline. missed_ticks: deadlines at which nothing could be done because a tick overran.
    """

    def __init__(self, fps: float, clock: Clock) -> None:
        """Raises ConfigError unless fps is positive and finite."""
        if not (math.isfinite(fps) and fps > 0):
            raise ConfigError(f"the control rate must be a positive number of ticks per second, got {fps}.")
        self.fps = float(fps)
        self.period_s = 1.0 / self.fps
        self.tick_errors_s = array("d")
        self.missed_ticks = self.tick = 0
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """The present tick is due now, and the next one a period later."""
        self._origin_s = self._clock.now_s() - self.tick * self.period_s

    def wait(self) -> None:
        """Sleep until the next deadline of the grid.

        Overrun deadlines are counted and skipped, so ticks never come in a burst. After a sleep that was too long (a program that was stopped, a
        machine that swaps) the grid begins anew, at the tick whose time it is.
        """
        late_periods = self._periods_since(self.tick + 1)
        if late_periods > MISS_AFTER_PERIODS:
            self._skip(math.ceil(late_periods))
        self.tick += 1
        self._clock.sleep_until_s(self._origin_s + self.tick * self.period_s)
        late_periods = self._periods_since(self.tick)
        self.tick_errors_s.append(late_periods * self.period_s)
        if late_periods > MISS_AFTER_PERIODS:
            self._skip(math.floor(late_periods + ROUNDING))
            self.restart()

    def _skip(self, ticks: int) -> None:
        self.missed_ticks += ticks
        self.tick += ticks

    def _periods_since(self, tick: int) -> float:
        """How long ago the deadline of `tick` was, in periods; negative when it is still to come."""
        return (self._clock.now_s() - self._origin_s) * self.fps - tick


# Stopping on Ctrl-C, SIGTERM or a closed terminal. A signal sets a flag; the loop, and whatever waits, retries or sleeps, looks at it. Inference
# runs in a thread of its own, so that nothing native holds up the main one, and no exception comes out of the middle of a transfer.

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Ask for the end from the program itself (a key press, another thread)."""
        if self._first is None:
            self._first, self._due = (reason, exit_code), math.isinf(self._put_down_s)

    def check(self) -> None:
        """Raise StopRequested if a stop has come that has not been obeyed."""
        if self._due and self._first is not None:
            raise StopRequested(*self._first)

    def begin_shutdown(self) -> None:
        """The orderly end begins and is announced, which may take a while: from now on `check` raises for a deliberate further stop alone, see
        `_on_signal`. `reason` and `exit_code` stay the first one's."""
        self._raises = self._due = False
        self._asked, self._put_down_s = self._first is not None, time.monotonic()

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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first stop of a run ends it. While the arm is put down a further one lets go at once, if it is deliberate: Ctrl-C or SIGTERM, pressed
        anew, FURTHER_AFTER_S after the announcement or later. After a run that ended by itself the first of these is none: it was meant for the
        run."""
        now_s, before_s = time.monotonic(), self._last_s
        self._last_s = now_s
        if self._first is None:
            self.request(signal.Signals(number).name, SIGNAL_EXIT_BASE + number)
        if number in _DELIBERATE and not math.isinf(self._put_down_s):
            self._due |= self._asked and now_s - self._put_down_s > FURTHER_AFTER_S and now_s - before_s > PRESSED_ANEW_S
            self._asked = True
        if self._due and self._raises:
            self.check()


def _ignored_on_purpose(number: int) -> bool:
    """Only `nohup` means it. A script's background job (`run.sh` with a `&`) inherits SIGINT and SIGQUIT ignored without anybody having asked for
    that, and an arm that does not hear them is an arm that moves on."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
