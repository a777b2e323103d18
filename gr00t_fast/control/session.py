"""A run as a row of episodes with a person at the keyboard: which end early, which are played again, what they showed, what is recorded of them.

Keys are read without waiting while the arm moves, also over ssh and without a keyboard library: the terminal gives each at once and does not show it
while `Keys` is open; Ctrl-C and the like stay signals. What the person reads meanwhile is here too: a run in a line, its progress, a dry run's table.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Clock, Observation, Policy
from gr00t_fast.control.chunk_buffer import RunTrace
from gr00t_fast.control.pacer import Pacer, StopSignals

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

KEYS_HELP = "keys: right arrow ends the episode, left arrow plays it again, s success, f failure, Esc stops; between episodes t: another instruction"
_REPEAT_S = 0.7  # a key that is held down repeats sooner, first after up to 0.5 s
_EXIT_CODE = 1
_TELL_AFTER_S, SAVE_LIMIT_S = 5.0, 60.0  # pictures are encoded as they come: an episode is saved within seconds, while the arm holds its pose
RIGHT, LEFT, ESCAPE, ENTER, BACKSPACE = "right", "left", "escape", "enter", "backspace"
_NAMES = {"\x1b": ESCAPE, "\r": ENTER, "\n": ENTER, "\x7f": BACKSPACE, "\b": BACKSPACE}
_NAMES |= {"\x1b[C": RIGHT, "\x1bOC": RIGHT, "\x1b[D": LEFT, "\x1bOD": LEFT}
_KEY = re.compile(r"\x1b(O.|\[[^@-~]*[@-~]|(?=[^O\[]))|[^\x1b]", re.DOTALL)  # a terminal's sequence, the key Esc before another key, or one key
_ESCAPE_S = 0.1  # after Esc alone nothing follows; an arrow's three bytes may come in two packets
PROGRESS_EVERY_S = 5.0  # often enough to see that it lives, seldom enough to leave the warnings in sight
_WIDTH = 16


def keys_obstacle() -> str | None:
    """Why no keys can be read from stdin, or None."""
    if termios is None:
        return "this system has no termios"
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, ValueError):  # closed, or not a file
        return "there is no stdin"
    if not os.isatty(descriptor):
        return "stdin is no terminal"
    try:
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return "the program runs in the background"
    except OSError:
        return "stdin is no terminal of this program"
    return None


class Keys:
    """Use as a context manager, in the main thread. `poll` names what was pressed: RIGHT, LEFT, ESCAPE, ENTER, BACKSPACE or a character."""

    def __init__(self, descriptor: int | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        """Of stdin, if not said otherwise. Changes nothing yet."""
        self._descriptor, self._now_s = sys.stdin.fileno() if descriptor is None else descriptor, now_s
        self._saved: list[Any] | None = None
        self._handlers: dict[int, object] = {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._text, self._since_s = "", 0.0

    def __enter__(self) -> Keys:
        for number in (signal.SIGTTIN, signal.SIGTTOU):  # a program in the background that uses its terminal is stopped by these, motors on
            self._handlers[number] = signal.signal(number, signal.SIG_IGN)
        self._saved = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor, termios.TCSANOW)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._saved is not None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                # TCSADRAIN would wait for a terminal that is stopped (Ctrl-S)
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._saved)
            self._saved = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()

    def poll(self) -> list[str]:
        """Never waits. Nothing more comes from a terminal that is gone."""
        try:
            while self._saved is not None and select.select([self._descriptor], [], [], 0)[0]:
                read = os.read(self._descriptor, 1024)
                if not read:
                    self._saved = None
                    break
                if not self._text:
                    self._since_s = self._now_s()
                self._text += self._decoder.decode(read)
        except OSError:
            self._saved = None
        return self._parsed()

    def _parsed(self) -> list[str]:
        found = []
        while self._text:
            key = _KEY.match(self._text)
            if key is None and self._now_s() - self._since_s < _ESCAPE_S:  # not all of it is here yet, or it is the key Esc
                break
            pressed = self._text[: 1 if key is None else key.end()]
            self._text = self._text[len(pressed) :]
            if pressed in _NAMES or (len(pressed) == 1 and pressed.isprintable()):
                found.append(_NAMES.get(pressed, pressed))
        return found


class Session:
    """What the control loop asks at each tick; nothing here waits. Without keys and recorder it changes nothing."""

    def __init__(
        self,
        stop: StopSignals,
        keys: Keys | None = None,
        recorder: Any = None,
        echo: Callable[[str], None] = print,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop, self._keys, self._recorder, self._echo, self._now_s = stop, keys, recorder, echo, now_s
        self._last_key, self._last_key_s = "", float("-inf")
        self._typed: str | None = None  # of an instruction that is being typed
        self._playing, self._settled = False, True
        self._busy_since_s: float | None = None  # the recorder, with saving
        self._told_saving = False
        self._outcome: dict[str, Any] = {}
        self.over = False  # the episode, or the pause after it, is to end now
        self.again = False  # the episode does not count and is to be played again
        self.instruction: str | None = None  # typed for the episodes to come; the loop takes it

    def begin(self, instruction: str) -> None:
        """An episode begins."""
        self.over = self.again = False
        self._playing, self._settled, self._outcome = True, False, {"success": None}
        if self._recorder is not None:
            self._recorder.begin(instruction)

    def see(self, observation: Observation, commanded: np.ndarray, underrun: bool = False) -> None:
        """A tick: what was seen, the target (J,) that was sent, and whether it is the last one once more for want of actions."""
        if self._recorder is not None:
            self._recorder.add(observation, commanded, underrun)
        self._end_with_the_recording()
        self.poll()

    def poll(self) -> None:
        """Take note of what was pressed."""
        if self._keys is None:
            return
        for key in self._keys.poll():
            now_s = self._now_s()
            repeated = self._typed is None and key == self._last_key and now_s - self._last_key_s < _REPEAT_S
            self._last_key, self._last_key_s = key, now_s
            if not repeated:
                self._pressed(key) if self._typed is None else self._type(key, self._typed)

    def end(self, ended_by: str, solved: bool | None) -> None:
        """The episode's last tick has been. `solved` as far as the arm can tell; what the person said counts more."""
        if not self._playing:
            return
        self._playing = self.over = False
        self._outcome["ended_by"] = ended_by
        if self._outcome["success"] is None:
            self._outcome["success"] = solved
        if self._recorder is not None:
            self._recorder.end(**self._outcome)

    # Between episodes

    @property
    def typing(self) -> bool:
        """Whether an instruction is being typed."""
        return self._typed is not None

    @property
    def waits(self) -> bool:
        """Whether the next episode is to wait although the pause is over: the person types, or the last one is still being saved."""
        is_saving = self._recorder is not None and self._recorder.busy  # looking may be what ends it
        self._end_with_the_recording()
        if not is_saving:
            self._busy_since_s, self._told_saving = None, False
            return self.typing
        self._busy_since_s = self._now_s() if self._busy_since_s is None else self._busy_since_s
        busy_s = self._now_s() - self._busy_since_s
        if busy_s >= _TELL_AFTER_S and not self._told_saving:
            self._told_saving = True
            self._echo(f"WARNING: the episode has not been saved for {busy_s:.0f} s; the arm holds its pose, {SAVE_LIMIT_S:.0f} s at most")
        if busy_s >= SAVE_LIMIT_S:  # a recorder that hangs must not keep the arm powered for ever
            self._stop.request(f"the episode was not saved within {SAVE_LIMIT_S:.0f} s: does the disk answer?", _EXIT_CODE)
        return True

    def settle(self) -> bool:
        """The pause is over, or the run: the last episode is saved, or forgotten. Returns whether it is to be played again. May be called again."""
        if self._recorder is not None and not self._settled:
            self._recorder.discard() if self.again else self._recorder.save(**self._outcome)
        self._settled = True
        return self.again

    def _end_with_the_recording(self) -> None:
        if self._recorder is not None and self._recorder.failure is not None:
            self._stop.request(self._recorder.failure, _EXIT_CODE)

    # Keys

    def _pressed(self, key: str) -> None:
        if key == RIGHT:
            self.over = True
        elif key in (LEFT, "s", "f") and self._settled:
            self._echo("no episode is open: the last one is decided, the next one has not begun")
        elif key == LEFT:
            self.over = self.again = True
            self._echo("this episode is played again and not recorded")
        elif key in ("s", "f"):
            self._outcome["success"] = key == "s"
            self._echo(f"marked: {'success' if key == 's' else 'failure'}")
        elif key == ESCAPE:
            self._stop.request("Esc")
        elif key in ("t", ENTER) and not self._playing:
            self._echo("new instruction (Enter: take it, Esc: keep the old one; the arm holds its pose):")
            self._type("", "")

    def _type(self, key: str, typed: str) -> None:
        if key == ENTER:
            self.instruction = typed.strip() or None
        if key in (ENTER, ESCAPE):
            self._typed = None
            self._echo(f"\ninstruction: {self.instruction!r}" if key == ENTER and self.instruction else "\nthe instruction stays")
            return
        self._typed = typed[:-1] if key == BACKSPACE else typed + key * (len(key) <= 1)
        print(f"\r> {self._typed}\x1b[K", end="", file=sys.stderr, flush=True)  # standard output is --json's; \x1b[K clears the rest of the line


# What a run says on the terminal while it goes on: what is about to happen, how far it is, and what a dry run would have sent.


class ProgressLine:
    """A line every few seconds, whatever the controller: one that infers while the arm moves has no other sign of life."""

    def __init__(self, trace: RunTrace, pacer: Pacer, clock: Clock, echo: Callable[[str], None]) -> None:
        self._trace, self._pacer, self._clock, self._echo = trace, pacer, clock, echo
        self.begin()

    def begin(self) -> None:
        """The arm begins to move now."""
        self._due_s = self._clock.now_s() + PROGRESS_EVERY_S

    def __call__(self) -> None:
        """After each tick; says something when it is time."""
        now_s = self._clock.now_s()
        if now_s >= self._due_s:
            self._due_s = now_s + PROGRESS_EVERY_S
            self._echo(self._line(now_s))

    def _line(self, now_s: float) -> str:
        trace = self._trace
        last = f", the last took {trace.chunks[-1].inference_ms:.0f} ms" if trace.chunks else ""
        ticks = f"{len(trace)} ticks ({self._pacer.missed_ticks} missed, {self._pacer.waiting_ticks} waiting for inference)"
        return f"{now_s - trace.began_s:.0f} s: {ticks}, {len(trace.chunks)} inferences{last}"


def dry_run_table(names: Sequence[str], present: np.ndarray, wanted: np.ndarray, sent: np.ndarray) -> str:
    """The first target by joint, each array (J,): where the arm stands, what the policy asked for, and what clamping and step limit make of it."""
    lines = ["Dry run: nothing was sent. By joint: the pose now, the policy's first target, and what would have been sent."]
    lines.append(f"{'':<{_WIDTH}}{'present':>12}{'policy':>12}{'to be sent':>12}")
    rows = zip(names, present, wanted, sent, strict=True)
    return "\n".join(lines + [f"{name:<{_WIDTH}}{now:>12.1f}{target:>12.1f}{limited:>12.1f}" for name, now, target, limited in rows])


def summary(policy: Policy, robot_name: str, fps: float, action_horizon: int | None, instruction: str) -> str:
    """One line about what is going to run."""
    trained = policy.metadata.trained_horizon  # type: ignore[union-attr]  # known once a run has its policy
    played = action_horizon or policy.action_horizon or trained
    inference = [f"{played} of {trained} actions per inference"] if policy.computes else []
    what = [*policy.describe(), *inference, f"{fps:g} Hz", f"{robot_name}, instruction: {instruction!r}"]
    return "ready: " + ", ".join(what)
