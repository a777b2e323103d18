"""Keys of a terminal, read without waiting, also over ssh and without a keyboard library: the terminal gives each at once and does not show it while
`Keys` is open; Ctrl-C and the like stay signals."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

RIGHT, LEFT, ESCAPE, ENTER, BACKSPACE, SPACE = "right", "left", "escape", "enter", "backspace", " "
_NAMES = {"\x1b": ESCAPE, "\r": ENTER, "\n": ENTER, "\x7f": BACKSPACE, "\b": BACKSPACE}
_NAMES |= {"\x1b[C": RIGHT, "\x1bOC": RIGHT, "\x1b[D": LEFT, "\x1bOD": LEFT}
_KEY = re.compile(r"\x1b(O.|\[[^@-~]*[@-~]|(?=[^O\[]))|[^\x1b]", re.DOTALL)  # a terminal's sequence, the key Esc before another key, or one key
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
        """descriptor: of a terminal, default stdin. Changes nothing yet."""
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

    def __exit__(self, *error: object) -> None:
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
