"""`--page`: the run in a browser, to watch, stop and judge it. This is the run's side; page_server.py draws and answers in a process of its own.

What is pressed there comes back as what a key or a signal is. The page can hold up no tick, and a page that ends changes nothing.
"""

from __future__ import annotations

import errno
import importlib.util
import queue
import re
import socket
import time
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Observation, Robot
from gr00t_fast.base.errors import ConfigError, require
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.record.views import Echo, View, desktop_obstacle
from gr00t_fast.record.web import HERE, names_of

DEFAULT_PORT, OPEN = 8100, "open"
BARE = f"{HERE}:{DEFAULT_PORT}"  # what `--page` without a value means
_OFF = ("false", "no", "off", "0")
_ADDRESS = re.compile(r"(?P<host>\[[\da-fA-F:.%]+\]|[\w.-]*):(?P<port>\d{1,5})|(?P<only>\d{1,5})")
COMPARED = " as recorded, now, difference"  # behind a camera's name
_PUT_S = 0.1  # between two pictures of a camera
_START_S, FINISH_S = 30.0, 5.0  # to start: on a slow disk or a busy machine; the arm is not powered yet
_MOST_WAITING = 50  # calls that the page has not answered: beyond, it hangs and gets no more words
_PATIENT_LINES, _LONGEST_LINE = 100, 400  # that wait for a page that takes nothing: all fit into a message


@dataclass(frozen=True)
class PageAddress:
    """Where the page is served, and whether a browser is opened here."""

    host: str = HERE
    port: int = DEFAULT_PORT
    opens: bool = False


@dataclass(frozen=True)
class PageFacts:
    """What the page knows before the first tick.

    hosts: what a browser may call this machine; empty: any IP address. token: what a browser must have, or "". limits_s: how long the arm may stay
    in a mode, where there is an end to it. trial: what is shown in place of figures that would tell the setting of a blinded trial, or "".
    """

    joints: tuple[str, ...]
    unit: str
    cameras: tuple[str, ...]
    episodes: int
    timeout_s: float | None
    limits_s: Mapping[Mode, float]
    hosts: tuple[str, ...]
    token: str
    trial: str
    compares: bool  # whether pictures are compared with recordings


@dataclass(frozen=True)
class PageNote:
    """What changed since the last note: the ticks, `waits` for what the next episode waits, the lines that were `said`."""

    ticks: tuple[TickRecord, ...]
    mode: Mode
    instruction: str
    waits: str
    said: tuple[str, ...]


def page_address(text: str | None) -> PageAddress | None:
    """What `--page=text` means; None: no page. Raises ConfigError for text that is neither an address nor a switch."""
    if text is None or text.lower() in _OFF:
        return None
    if text.lower() == OPEN:
        return PageAddress(opens=True)
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"] or found["only"]) if found else -1
    if not 0 <= port <= 65535:
        raise ConfigError(f"--page={text} is no address. Expected HOST:PORT (default {BARE}), PORT, or {OPEN} for a browser here.")
    return PageAddress((found["host"] or HERE).strip("[]") if found else HERE, port)


def listen(address: PageAddress) -> socket.socket:
    """A socket that accepts browsers. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last run's connections may still be ending
        sock.bind((address.host, address.port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        other = f"{HERE}:{address.port}"
        if error.errno == errno.EADDRINUSE:
            other = f"{address.host}:{address.port + 1 if address.port < 65535 else DEFAULT_PORT}"
        said = f"--page: {address.host}:{address.port} cannot be had: {error.strerror or error}."
        raise ConfigError(f"{said} Take another address of this computer, such as --page={other}.") from error
    return sock


class PageView(View):
    """An observer of the control loop, and where its Session finds what was pressed in a browser. Use as a context manager around the run."""

    def __init__(
        self, address: PageAddress, facts: Callable[[tuple[str, ...], str], PageFacts], stop: StopSignals, echo: Echo, show_address: Echo
    ) -> None:
        """`facts` from the names that a browser may call this machine, and the token. `show_address` gets the address, which may hold a secret.

        Raises MissingExtraError without NiceGUI, ConfigError where the address cannot be had. Starts nothing.
        """
        if importlib.util.find_spec("nicegui") is None:  # found, not imported: that costs a second and is for the other process
            require("nicegui", "page")
        from gr00t_fast.record.page_server import PageServer

        self._socket = listen(address)
        hosts, token, self.url = names_of(self._socket)
        super().__init__("--page", PageServer, self._socket, facts(hosts, token), echo=echo)
        self.playing: Callable[[], tuple[str, str]] = lambda: ("", "")  # the instruction, and what the next episode waits for
        self.report = ""  # as it was printed, once the run is over
        self._opens, self._stop, self._show_address = address.opens, stop, show_address
        self._pressed: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._said: list[str] = []
        self._ticks: list[TickRecord] = []  # since the last message
        self._put_s, self._mode = -np.inf, Mode.APART

    def __enter__(self) -> PageView:
        """Starts the process, which takes a second or two: `wait_until_ready` waits for it."""
        self.sink.start()
        self._socket.close()  # the other process has it
        return self

    def __exit__(self, *error: object) -> None:
        """The browsers keep the report, and the error that ended the run."""
        why = f"error: {str(error[1]) or type(error[1]).__name__}\n\n" if error and error[1] is not None else ""
        self._call("over", why + self.report.strip(), tuple(self._said))
        if not self.sink.close(FINISH_S):
            self._echo(f"WARNING: --page: its process did not end within {FINISH_S:.0f} s and was ended.")

    def wait_until_ready(self) -> None:
        """Before the arm is connected. Raises ConfigError where no page comes: its STOP was asked for."""
        if not self.sink.wait(_START_S) or not self.sink.running:
            why = self.warnings[-1].removeprefix("--page: ") if self.warnings else f"it has not started within {_START_S:.0f} s."
            raise ConfigError(f"--page cannot be shown: {why} Leave --page out, or mend that.")
        self._show_address(f"page: {self.url}")
        if self._opens and desktop_obstacle() is None:
            webbrowser.open(self.url)

    def tee(self, say: Echo) -> Echo:
        """`say`, and the page shows the line too."""

        def both(line: str) -> None:
            shown = line.strip()[:_LONGEST_LINE].encode("utf-8", "replace").decode()  # a path may hold bytes that are no text
            self._said = [*self._said, shown][-_PATIENT_LINES:]
            say(line)

        return both

    def connected(self, robot: Robot, observation: Observation) -> None:
        """The first look: how far each joint may go, and room for ticks like this one."""
        self.sink.prepare(observation)
        self._call("ranges", robot.joint_limits.tolist())

    def compared(self, observation: Observation, pictures: Mapping[str, np.ndarray]) -> None:
        """What a look at the scene compared: camera -> uint8 RGB (height, width, 3); shown where it is no larger than the cameras' pictures."""
        named = {f"{camera}{COMPARED}": picture for camera, picture in pictures.items()}
        self.sink.put(replace(observation, frames=named), PageNote((), Mode.CONNECTED, *self.playing(), ()))

    def see(self, observation: Observation, tick: TickRecord | None = None, mode: Mode = Mode.HOLD) -> None:
        """Handed on ten times a second, and when the mode changes: every message wakes a process beside the loop."""
        if tick is not None:  # the rows that are left are drawn of the newest alone; at 200 Hz all of them would not fit into a note
            self._ticks[-1:] = [replace(each, ahead=each.ahead[:0]) for each in self._ticks[-1:]]
            self._ticks.append(tick)
        now_s = time.monotonic()
        if now_s - self._put_s < _PUT_S - 0.01 and mode is self._mode:
            return
        self._put_s, self._mode = now_s, mode
        said, self._said = self._said, []
        ticks, self._ticks = self._ticks, []
        dropped = self.sink.dropped
        self.sink.put(observation, PageNote(tuple(ticks), mode, *self.playing(), tuple(said)))
        if self.sink.dropped > dropped:
            self._said = [*said, *self._said]

    def poll(self) -> list[tuple[str, str]]:
        """What was pressed since: ("key", as of base.keyboard), ("instruction", text). Never waits."""
        found = []
        while not self._pressed.empty():
            found.append(self._pressed.get())
        return found

    def _call(self, method: str, *arguments: Any) -> None:
        if self.sink.backlog < _MOST_WAITING:
            self.sink.call(method, *arguments)

    def _take(self, what: str, value: Any) -> None:
        """In a thread: STOP counts at once, the rest when the Session asks."""
        if what == "stop":
            self._stop.press("STOP on the page")
        elif what in ("key", "instruction"):
            self._pressed.put((what, value))
        else:
            super()._take(what, value)
