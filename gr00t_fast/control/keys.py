"""Keys pressed in the terminal while the arm moves: read without waiting, also over ssh, and without a keyboard library.

The terminal gives each key at once and does not show it while `Keys` is open; Ctrl-C and the like stay signals. It is put back when `Keys` is closed.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

RIGHT, LEFT, ESCAPE, ENTER, BACKSPACE = "right", "left", "escape", "enter", "backspace"
_SEQUENCES = {"[C": RIGHT, "OC": RIGHT, "[D": LEFT, "OD": LEFT}
_NAMES = {"\r": ENTER, "\n": ENTER, "\x7f": BACKSPACE, "\b": BACKSPACE}
_ESCAPE_S = 0.1  # after Esc alone nothing follows; an arrow's three bytes may come in two packets


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
            if self._text[0] != "\x1b":
                character, self._text = self._text[0], self._text[1:]
                if character.isprintable() or character in _NAMES:
                    found.append(_NAMES.get(character, character))
                continue
            length = _sequence_length(self._text)
            if length is None:  # not all of it is here yet, or it is the key Esc
                if self._now_s() - self._since_s < _ESCAPE_S:
                    break
                length = 1
            sequence, self._text = self._text[1:length], self._text[length:]
            if length == 1:
                found.append(ESCAPE)
            elif sequence in _SEQUENCES:
                found.append(_SEQUENCES[sequence])
        return found


def _sequence_length(text: str) -> int | None:
    """How many characters of `text`, which begins with Esc, belong to it; None: more may come."""
    if len(text) == 1:
        return None
    if text[1] == "O":
        return 3 if len(text) > 2 else None
    if text[1] == "[":
        return next((index + 1 for index, character in enumerate(text) if index > 1 and "@" <= character <= "~"), None)
    return 1
