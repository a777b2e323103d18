"""`--display`: a run seen live in rerun, or in its .rrd file afterwards; `--show_images`: its cameras in a window. An observer of the control loop;
the other end is display_writer.py.

The loop only puts what it has into a bounded queue. A thread writes it into a pipe, and a process of lower priority does the rest. What does not fit
is dropped and counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.recorder import desktop_obstacle, display_obstacle
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.errors import ConfigError, MissingExtraError, install_command

WINDOW = "window"  # what `--display` without a value means
DEFAULT_PORT = 9876  # rerun's own
RECORDING = "display.rrd"  # in --out
QUEUED_TICKS = 60  # two seconds at 30 Hz; 55 MB of a 640x480 camera
_QUEUED_IMAGES = 2  # a window shows the present: what it is too slow for is left out
_START_S, _FINISH_S = 10.0, 6.0
_PIPE_BYTES = 2**20  # what an unprivileged process may have; a picture of 640x480 takes 14 wake-ups with the usual 64 kB
_ADDRESS = re.compile(r"(?:rerun(?:\+https?)?://)?(?P<host>\[[\da-fA-F:.%]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?(?:/proxy)?")
_YES, _NO = ("true", "yes", "on", "1", WINDOW), ("false", "no", "off", "0")


@dataclass(frozen=True)
class DisplayTarget:
    """Where a run is shown: a viewer of ours (`spawn`) or of others at `host`, `port`; an .rrd file; or both. `images`: the cameras, in a window."""

    host: str | None = None
    port: int = DEFAULT_PORT
    url: str = ""
    spawn: bool = False
    rrd: Path | None = None
    images: bool = False

    @property
    def flag(self) -> str:
        """What asked for it."""
        return "--show_images" if self.images else "--display"


def window_target(echo: Callable[[str], None]) -> DisplayTarget | None:
    """What `--show_images` means; where no window can be opened `echo` is told why and what to do."""
    if (obstacle := display_obstacle()) is None:
        return DisplayTarget(images=True)
    echo(f"--show_images: {obstacle} The run goes on without a window.")
    return None


def display_target(text: str | None, out: Path | None) -> DisplayTarget | None:
    """What `--display=text` means; None: nothing is shown. Raises ConfigError for text that is neither a file, an address nor a switch."""
    if text is None or text.lower() in _NO:
        return None
    rrd = out / RECORDING if out is not None else None
    if text.lower() in _YES:
        return DisplayTarget("127.0.0.1", url=_url("127.0.0.1", DEFAULT_PORT), spawn=True, rrd=rrd)
    if text.lower().endswith(".rrd"):
        return DisplayTarget(rrd=Path(text).expanduser())
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"] or DEFAULT_PORT) if found else 0
    if not 1 <= port <= 65535:
        raise ConfigError(
            f"--display={text} is neither a file nor the address of a viewer. Expected HOST:PORT, rerun+http://HOST:PORT/proxy or FILE.rrd; "
            "without a value a viewer opens here."
        )
    return DisplayTarget(found["host"].strip("[]"), port, text if "://" in text else _url(found["host"], port), rrd=rrd)


def _url(host: str, port: int) -> str:
    return f"rerun+http://{host}:{port}/proxy"


class Display:
    """Shows every tick. Use as a context manager; neither that nor `see` raises for reasons of the viewer."""

    def __init__(
        self,
        target: DisplayTarget,
        name: str,
        unit: str,
        joints: tuple[str, ...],
        cameras: Iterable[str],
        fps: float,
        echo: Callable[[str], None] = print,
        on_quit: Callable[[], None] = lambda: None,
    ) -> None:
        """`name` of the recording; `unit` of the joints. `echo` is told, in another thread, of a viewer that is missing or goes away; `on_quit` is
        called there when q or Escape is pressed in the window.

        Raises MissingExtraError without rerun, ConfigError when the file cannot be written: before the arm is touched. Starts nothing.
        """
        if not target.images and importlib.util.find_spec("rerun") is None:  # found, not imported: that costs a second and is for the other process
            raise MissingExtraError(f"--display shows the run in rerun, which is not installed. Install it with: {install_command('display')}")
        if target.rrd is not None:
            _check_file(target.rrd)
        self._target = target
        self._header = {"name": name, "unit": unit, "joints": list(joints), "cameras": list(cameras), "fps": fps, "images": target.images}
        self._echo, self._on_quit = echo, on_quit
        self._most = _QUEUED_IMAGES if target.images else QUEUED_TICKS
        # SimpleQueue leaves no lock behind when a signal handler raises out of it
        self._queue: queue.SimpleQueue[tuple[Observation, TickRecord | None] | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._time_s = self._observed_s = 0.0
        self._episode = -1
        self._seen = self._dropped = 0
        self._skipped = 0  # by a viewer that was behind
        self._warnings: list[str] = []
        self.path = target.rrd

    # The loop's side

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        self._seen += 1
        if self._ended.is_set():
            return
        if self._queue.qsize() >= self._most:
            self._dropped += 1
        else:
            self._queue.put((observation, tick))

    # The run's side

    def __enter__(self) -> Display:
        """Starts the other process and waits until it is ready, at most _START_S: the arm is not connected yet."""
        viewer = self._viewer()
        if viewer is None and self.path is None and not self._target.images:
            self._ended.set()
            return self
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gr00t_fast.control.display_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is for the arm
        )
        with contextlib.suppress(ImportError, AttributeError, OSError):  # only Linux has it
            import fcntl

            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        threading.Thread(target=self._listen, args=(self._process,), name="display-answers", daemon=True).start()
        threading.Thread(target=self._feed, args=(self._process, viewer), name="display", daemon=True).start()
        self._ready.wait(_START_S)
        return self

    def _viewer(self) -> dict[str, Any] | None:
        target = self._target
        if target.host is None:
            return None
        if target.spawn and (obstacle := desktop_obstacle()) is not None:
            kept = f"It is recorded into {self.path}." if self.path is not None else "With --out, or as --display=FILE.rrd, it is recorded."
            self._tell(f"--display: {obstacle} The run goes on without a viewer. {kept} --display=HOST:PORT is a viewer on another machine.")
            return None
        return {"host": target.host, "port": target.port, "url": target.url, "spawn": target.spawn}

    def __exit__(self, *error: object) -> None:
        """Wait for what is queued, but not for a process that hangs: that is killed."""
        process = self._process
        if process is None:
            return
        self._queue.put(None)
        try:
            process.wait(_FINISH_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._warnings.append(f"{self._target.flag}: its process did not finish within {_FINISH_S:g} s and was ended.")
        self._ended.wait(1.0)  # the thread is a daemon: whatever it does now, it does not hold up the program
        if process.returncode and not self._warnings:
            self._warnings.append(f"{self._target.flag}: its process ended with code {process.returncode}: {self._complaint()}")
        with contextlib.suppress(OSError):
            process.stdin.close()
        self._stderr.close()

    def _complaint(self) -> str:
        self._stderr.seek(0)
        return (self._stderr.read().decode(errors="replace").strip().splitlines() or ["without a message"])[-1][:300]

    @property
    def warnings(self) -> list[str]:
        """For the report, once the run is over."""
        found = list(self._warnings)
        if self._dropped and not self._target.images:
            found.append(f"--display lacks {self._dropped} of {self._seen} ticks: its process was slower than the loop.")
        if self._skipped:
            found.append(f"--display: the viewer lacks {self._skipped} of {self._seen} ticks: it did not take them in time.")
        return found

    def _tell(self, text: str) -> None:
        """Now and in the report."""
        self._echo(text)
        self._warnings.append(text)

    # The two threads

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        with process.stdout:
            for line in process.stdout:
                if not line.startswith(b"{"):  # a library's
                    continue
                answer = json.loads(line)
                if "say" in answer:
                    self._tell(answer["say"])
                if "quit" in answer:
                    self._on_quit()
                if "ready" in answer:
                    self._ready.set()
                self._skipped = answer.get("skipped", 0)
        self._ready.set()
        self._ended.set()

    def _feed(self, process: subprocess.Popen[bytes], viewer: dict[str, Any] | None) -> None:
        header = {**self._header, "viewer": viewer, "rrd": None if self.path is None else str(self.path.absolute()), "payload_bytes": 0}
        with contextlib.suppress(OSError, ValueError), process.stdin as pipe:  # the process went away, and said why
            _write(pipe, header)
            while (item := self._queue.get()) is not None:
                self._send(pipe, *item)

    def _send(self, pipe: IO[bytes], observation: Observation, tick: TickRecord | None) -> None:
        told, rows = None, [observation.joints[None]]
        if tick is None:
            self._time_s += observation.time_s - self._observed_s
        else:
            self._time_s = tick.time_s
            event = f"episode {tick.episode + 1}" if tick.episode != self._episode else ""
            self._episode = tick.episode
            names = ("number", "tick_error_ms", "missed_ticks", "inference_ms", "age_ticks")
            told = {"event": event, **{name: getattr(tick, name) for name in names}}
            rows += [tick.target[None], tick.commanded[None], tick.ahead]
        self._observed_s = observation.time_s
        numbers = np.concatenate(rows).astype(np.float32)
        pictures = {name: np.ascontiguousarray(frame) for name, frame in observation.frames.items()}
        message = {
            "tick": told,
            "time_s": self._time_s,
            "rows": len(numbers),
            "pictures": {name: picture.shape[:2] for name, picture in pictures.items()},
            "payload_bytes": numbers.nbytes + sum(picture.nbytes for picture in pictures.values()),
        }
        _write(pipe, message, numbers, *pictures.values())


def _write(pipe: IO[bytes], message: Mapping[str, Any], *arrays: np.ndarray) -> None:
    text = json.dumps(message).encode()
    pipe.write(struct.pack(">I", len(text)) + text)
    for array in arrays:
        pipe.write(memoryview(array).cast("B"))
    pipe.flush()


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--display: '{path}' is a directory. Name a file that ends in .rrd.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--display: cannot write '{path}': {error}. Name a file in a directory that can be written.") from error


def _environment() -> dict[str, str]:
    """For the other process and the viewer that it may start: the same packages, and rerun's usage statistics off.

    These have no switch but rerun's own configuration file. The user's stays as it is: the viewer is shown another one.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gr00t_fast" / "rerun"
    place = home / ("Library/Application Support/rerun" if sys.platform == "darwin" else "rerun")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RERUN", None)  # "off" would make every call do nothing
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = place / "analytics.json"
        paths = {"config_file_path": str(file), "data_dir_path": str(place / "analytics")}
        file.write_text(json.dumps({"analytics_enabled": False, "analytics_id": "", "metadata": {}, **paths}))
    except OSError:
        return environment  # a home that cannot be written: rerun cannot note that it has asked, and sends nothing the first time
    return {**environment, "HOME" if sys.platform == "darwin" else "XDG_CONFIG_HOME": str(home)}
