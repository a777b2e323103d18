"""What looks on at a run, each in a process of its own (sink.py): a video of the cameras (`--video`), and everything in
rerun's viewer, in an .rrd file or both (`--display`).

What a viewer of rerun does not take, rerun keeps in memory without a limit: so it is asked now and then whether it has taken everything, and left out
while it has not. J: joints of the arm, L: rows that the playing chunk still holds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import ConfigError, MissingExtraError, install_command, require
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.record.pictures import jpeg
from gr00t_fast.record.sink import Sink, Tell

Echo = Callable[[str], None]
QUEUED_TICKS = 60  # two seconds at 30 Hz; 55 MB of a 640x480 camera
_START_S = 10.0
FINISH_S = 20.0  # to encode what is queued; the process has a lower priority than the rest of a busy machine. Ctrl-C ends the waiting
_GIF_FINISH_S_PER_FRAME = 0.1  # a GIF is only encoded once its palette, and so its last frame, is known
_GIF_FPS = 10.0  # GIF stores every frame nearly whole; viewers show 10 frames/s reliably
_GIF = ["-filter_complex", "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse", "-c:v", "gif"]  # a palette of the clip's own 256 colours
_H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]  # plays everywhere; 16: hardly to be told from the original
WINDOW = "window"  # what `--display` without a value means
DEFAULT_PORT = 9876  # rerun's own
RECORDING = "display.rrd"  # in --out
_ADDRESS = re.compile(r"(?:rerun(?:\+https?)?://)?(?P<host>\[[\da-fA-F:.%]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?(?:/proxy)?")
_YES, _NO = ("true", "yes", "on", "1", WINDOW), ("false", "no", "off", "0")
APPLICATION = "gr00t_fast"
_PROBE_S = 3.0  # for a viewer's machine to accept a connection
_CHECK_EVERY_S, _CHECK_S = 0.5, 0.25  # how often file and viewer are asked whether they have taken everything, and how long they have for that
_PATIENCE_S = 5.0  # for a viewer that takes nothing; what comes meanwhile is left out
_LAST_S = 3.0
_TICK_WIDTH = 10.0  # of a tick in the picture of the chunk, whose heights are joint units: a chunk of 16 is as wide as the range of a joint is high
_COLOURS = ((228, 87, 86), (76, 120, 168), (84, 162, 75), (245, 133, 24), (178, 121, 162), (238, 202, 59))
_TIMING = ("tick_error_ms", "missed_ticks", "inference_ms", "age_ticks")


class View:
    """An observer of the control loop. Use as a context manager; neither that nor `see` raises for reasons of the view."""

    def __init__(self, flag: str, consumer: Callable[..., Any], *arguments: Any, echo: Echo = print, path: Path | None = None) -> None:
        """`flag` that asked for it; `consumer` and `arguments` as of Sink; `path` of the file that it writes. `echo` is told, in another thread, what
        goes wrong. Starts nothing."""
        self.path, self.warnings = path, list[str]()  # warnings: for the report, complete once the run is over
        self.every, self.finish_s_per_frame = 1, 0.0
        self.sink = Sink(consumer, *arguments, on_answer=self._take, slots=QUEUED_TICKS)
        self._flag, self._echo, self._seen, self._failed = flag, echo, 0, False

    def see(self, observation: Observation, tick: TickRecord | None = None, mode: Mode = Mode.HOLD) -> None:
        if self._seen % self.every == 0:
            self.sink.put(observation, tick)
        self._seen += 1

    def __enter__(self) -> View:
        """Starts the process and waits until it is ready, at most _START_S: the arm is not connected yet."""
        self.sink.start()
        self.sink.wait(_START_S)
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is queued, but not for a process that hangs: that is killed."""
        limit_s = FINISH_S + self.finish_s_per_frame * self._seen / self.every
        if not self.sink.close(limit_s):
            self._failed = True
            self.warnings.append(f"{self._flag}: its process did not finish within {limit_s:.0f} s and was ended.")
        if self.sink.dropped:
            self.warnings.append(f"{self._flag} lacks {self.sink.dropped} of {self._seen} ticks: its process was slower than the loop.")

    @property
    def written(self) -> Path | None:
        """The file, where it is whole."""
        return self.path if self.path is not None and self.path.exists() and not self._failed else None

    def _take(self, what: str, value: Any) -> None:
        self._failed = self._failed or what == "error"
        text = f"{self._flag}: {value if what == 'say' else f'failed ({value}). The run goes on without it.'}"
        self.warnings.append(text)
        self._echo(text)


def check_writable(directory: Path, flag: str) -> None:
    """Raises ConfigError where no file can be made in `directory`, which is made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{flag}: cannot write to '{directory}': {error}. Name a directory that can be written.") from error


# A video of the cameras


def video_view(path: Path, fps: float, echo: Echo = print) -> View:
    """`path`: a .gif, or an .mp4 file. Raises ConfigError for one that cannot be written, MissingExtraError without imageio-ffmpeg."""
    gif = path.suffix.lower() == ".gif"
    ffmpeg = require("imageio_ffmpeg", "plots")
    check_writable(path.parent, "--video")
    if path.is_dir():
        raise ConfigError(f"--video: '{path}' is a directory. Name a file in a directory that can be written.")
    every = max(1, round(fps / _GIF_FPS)) if gif else 1
    view = View("--video", VideoFile, path, ffmpeg.get_ffmpeg_exe(), fps / every, _GIF if gif else _H264, echo=echo, path=path)
    view.every, view.finish_s_per_frame = every, _GIF_FINISH_S_PER_FRAME if gif else 0.0
    return view


class VideoFile(contextlib.AbstractContextManager):
    """Encodes the frames side by side; the file is opened with the first of them."""

    def __init__(self, tell: Tell, path: Path, ffmpeg: str, fps: float, codec: list[str]) -> None:
        self._path, self._ffmpeg, self._fps, self._codec = path, ffmpeg, fps, codec
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process

    def __exit__(self, *error: object) -> None:
        self._finish()

    def add(self, observation: Observation, tick: TickRecord | None) -> None:
        """Raises RuntimeError with what ffmpeg says when it has ended."""
        if not observation.frames:
            return
        picture = side_by_side(observation.frames)
        self._process = self._process or self._start(*picture.shape[:2])
        try:
            self._process.stdin.write(picture)
        except OSError:
            self._finish()

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self._fps:.4f}", "-i", "-"]
        command = [self._ffmpeg, "-y", "-loglevel", "error", *source, "-an", *self._codec, str(self._path.absolute())]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._complaints, bufsize=0)

    def _finish(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        if code := process.wait():
            self._complaints.seek(0)
            raise RuntimeError(f"ffmpeg ended with code {code}: {self._complaints.read().decode(errors='replace').strip() or 'without a message'}")


def side_by_side(frames: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return all frames in one uint8 RGB picture, cut at the bottom to the lowest and to even sizes (what H.264 needs)."""
    height = min(frame.shape[0] for frame in frames.values())
    picture = np.concatenate([frame[:height] for frame in frames.values()], axis=1)
    return np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])


def desktop_obstacle() -> str | None:
    """Return why no program can open a window here, or None."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (DISPLAY is not set)."
    return None


# Everything in rerun: a viewer, a file, or both


@dataclass(frozen=True)
class DisplayTarget:
    """Where a run is shown: a viewer of ours (`spawn`) or of others at `host`, `port`; an .rrd file; or both."""

    host: str | None = None
    port: int = DEFAULT_PORT
    url: str = ""
    spawn: bool = False
    rrd: Path | None = None


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


def display_view(target: DisplayTarget, name: str, unit: str, joints: tuple[str, ...], cameras: Iterable[str], echo: Echo = print) -> View:
    """`name` of the recording; `unit` of the joints. Raises MissingExtraError without rerun, ConfigError when the file cannot be written: before the
    arm is touched."""
    if importlib.util.find_spec("rerun") is None:  # found, not imported: that costs a second and is for the other process
        raise MissingExtraError(f"--display shows the run in rerun, which is not installed. Install it with: {install_command('display')}")
    if target.rrd is not None:
        check_writable(target.rrd.parent, "--display")
        if target.rrd.is_dir():
            raise ConfigError(f"--display: '{target.rrd}' is a directory. Name a file that ends in .rrd.")
    return View("--display", RerunView, target, name, unit, joints, list(cameras), echo=echo, path=target.rrd)


class RerunView(contextlib.AbstractContextManager):
    """The streams of `target`, and what is written into them."""

    def __init__(self, tell: Tell, target: DisplayTarget, name: str, unit: str, joints: tuple[str, ...], cameras: list[str]) -> None:
        import cv2  # noqa: F401 - for the pictures, before the first tick; changes the environment when it is imported

        _without_statistics()
        self._rr, self._tell = require("rerun", "display"), tell
        self._name, self._unit, self._joints, self._cameras = name, unit, joints, cameras
        self._identity = str(uuid.uuid4())  # of both streams: a viewer that has one open knows the other
        self._time_s = self._observed_s = 0.0
        self._episode = -1
        self._streams: list[Stream] = []
        if target.rrd is not None:
            self._open(f"the file '{target.rrd}'", lambda stream: stream.save(str(target.rrd), default_blueprint=self._blueprint()), 0.0)
        if target.host is not None:
            self._open(f"a viewer at {target.host}:{target.port}", lambda stream: self._connect(stream, target), _PATIENCE_S)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            return
        for stream in self._streams:
            stream.flush(_LAST_S)
        self._tell_lost()
        for stream in [stream for stream in self._streams if stream.skipped]:
            self._tell("say", f"{stream.what} lacks {stream.skipped} ticks: it did not take them in time.")
        os._exit(0)  # threads of a viewer's connection may hang

    def _open(self, what: str, connect: Callable[[Any], None], patience_s: float) -> None:
        stream = self._rr.RecordingStream(APPLICATION, recording_id=self._identity)
        stream.set_time("time", duration=0.0)
        try:
            connect(stream)
        except (RuntimeError, OSError) as error:
            self._tell("say", f"{what} cannot be opened: {error}. The run goes on without it.")
        else:
            self._streams.append(Stream(self._rr, stream, what, self._name, self._joints, patience_s))

    def _connect(self, stream: Any, target: DisplayTarget) -> None:
        """Raises OSError, RuntimeError where no viewer answers or starts."""
        if target.spawn and (obstacle := desktop_obstacle()):
            kept = f"the run is kept in {target.rrd}" if target.rrd else "--out or --display=FILE.rrd keeps the run"
            raise RuntimeError(f"{obstacle} --display=HOST:PORT is a viewer on another machine; {kept}")
        if target.spawn:
            self._rr.spawn(port=target.port, connect=False, memory_limit="25%", hide_welcome_screen=True)
        try:
            _probe(target.host, target.port, 3 * _PROBE_S if target.spawn else _PROBE_S)
        except OSError as error:
            raise OSError(f"{error} (start one there with: rerun --port {target.port})") from error
        stream.connect_grpc(target.url, default_blueprint=self._blueprint())

    def add(self, observation: Observation, tick: TickRecord | None) -> None:
        """A tick; without a record, between episodes, the cameras and the measured joints."""
        self._time_s = tick.time_s if tick is not None else self._time_s + observation.time_s - self._observed_s
        self._observed_s = observation.time_s
        event = f"episode {tick.episode + 1}" if tick is not None and tick.episode != self._episode else ""
        self._episode = tick.episode if tick is not None else self._episode
        pictures = {name: jpeg(frame, frame.shape[1]) for name, frame in observation.frames.items() if self._streams}
        for stream in self._streams:
            stream.add(self._time_s, observation.joints, tick, event, pictures)
        self._tell_lost()

    def _tell_lost(self) -> None:
        for stream in [stream for stream in self._streams if stream.lost]:
            self._streams.remove(stream)
            rest = "; the recording goes on" if self._streams else ""
            self._tell("say", f"{stream.what} {stream.lost}. The run goes on without it{rest}.")

    def _blueprint(self) -> Any:
        """Cameras on the left, joints in the middle, what is to come and how punctual it is on the right."""
        import rerun.blueprint as blueprint

        joints = [blueprint.TimeSeriesView(origin=f"joints/{joint}", name=f"{joint} ({self._unit})") for joint in self._joints]
        cameras = [blueprint.Spatial2DView(origin=f"cameras/{name}", name=name) for name in self._cameras]
        timing = [
            blueprint.Spatial2DView(origin="chunk", name=f"chunk from now on ({_TICK_WIDTH:g} to the right: a tick; up: {self._unit})"),
            blueprint.TimeSeriesView(contents=["timing/tick_error_ms", "timing/inference_ms"], name="tick error, inference (ms)"),
            blueprint.TimeSeriesView(contents=["timing/missed_ticks", "timing/age_ticks"], name="missed ticks, age of the action (ticks)"),
            blueprint.TextLogView(origin="events", name="events"),
        ]
        columns = [blueprint.Vertical(*joints), blueprint.Vertical(*timing)]
        columns = [blueprint.Vertical(*cameras), *columns] if cameras else columns
        return blueprint.Blueprint(blueprint.Horizontal(*columns), blueprint.TimePanel(timeline="time"), collapse_panels=True)


class Stream:
    """A file or a viewer: the entities of a run, what they look like, and whether they are taken."""

    def __init__(self, rr: Any, stream: Any, what: str, name: str, joints: tuple[str, ...], patience_s: float) -> None:
        """`patience_s`: how long it may take nothing before it is lost."""
        self._rr, self._stream, self._joints, self.what, self._patience_s = rr, stream, joints, what, patience_s
        self._behind_since_s: float | None = None
        self._checked_s = time.monotonic()
        self.skipped = 0  # ticks, while it was behind
        self.lost: str | None = None  # why it is given up
        for index, joint in enumerate(joints):
            colour = _COLOURS[index % len(_COLOURS)]
            stream.log(f"joints/{joint}/commanded", rr.SeriesLines(names="commanded", colors=[colour]), static=True)
            stream.log(f"joints/{joint}/measured", rr.SeriesLines(names="measured", colors=[(140, 140, 140)]), static=True)
        stream.send_recording_name(name)

    def add(self, *tick: Any) -> None:
        """As `_log`, where it has taken what came before."""
        if time.monotonic() - self._checked_s >= _CHECK_EVERY_S:
            self.flush(_CHECK_S if self._behind_since_s is None else 0.02)
        if self._behind_since_s is None:
            self._log(*tick)
        else:
            self.skipped += 1

    def flush(self, limit_s: float) -> None:
        """Find out whether it takes what it is given; that is waited for so long."""
        began_s = time.monotonic()
        try:
            self._stream.flush(timeout_sec=limit_s)
            self._behind_since_s = None
        except RuntimeError as error:  # of one type for a connection that is gone and for one that is slow: the second takes as long as it may
            self._behind_since_s = self._behind_since_s or began_s
            if time.monotonic() - began_s < limit_s / 2 or not self._patience_s:
                self.lost = f"went away ({error})"
            elif time.monotonic() - self._behind_since_s > self._patience_s:
                self.lost = f"has taken nothing for {self._patience_s:g} s"
        self._checked_s = time.monotonic()

    def _log(self, time_s: float, measured: np.ndarray, tick: TickRecord | None, event: str, pictures: Mapping[str, bytes]) -> None:
        """A tick, with the joints (J,) as measured; `event` to be listed."""
        rr, stream = self._rr, self._stream
        stream.set_time("time", duration=time_s)
        if tick is None:
            stream.disable_timeline("tick")
        else:
            stream.set_time("tick", sequence=tick.number)
        for name, picture in pictures.items():
            stream.log(f"cameras/{name}", rr.EncodedImage(contents=picture, media_type="image/jpeg"))
        for index, joint in enumerate(self._joints):
            stream.log(f"joints/{joint}/measured", rr.Scalars(float(measured[index])))
            if tick is not None:
                stream.log(f"joints/{joint}/commanded", rr.Scalars(float(tick.commanded[index])))
        if tick is not None:
            ahead = tick.ahead if len(tick.ahead) > 1 else np.empty((0, 0))  # (L, J): a curve for each joint, from now to the right; up is more
            x = _TICK_WIDTH * np.arange(len(ahead))
            curves = [np.column_stack([x, -heights]) for heights in ahead.T]
            colours = [_COLOURS[joint % len(_COLOURS)] for joint in range(len(curves))]
            stream.log("chunk", rr.LineStrips2D(curves, colors=colours, labels=list(self._joints)[: len(curves)]))
            for name in _TIMING:
                stream.log(f"timing/{name}", rr.Scalars(float(getattr(tick, name))))
        if event:
            stream.log("events", rr.TextLog(event, level="INFO"))


def _probe(host: str, port: int, limit_s: float) -> None:
    """Raises OSError when nothing accepts a connection within the limit: rerun would wait for five seconds and not say."""
    end_s = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((host, port), timeout=_PROBE_S).close()
            return
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


def _without_statistics() -> None:
    """rerun's usage statistics off, here and in the viewer that may be started.

    These have no switch but rerun's own configuration file. The user's stays as it is: another one is shown.
    """
    os.environ.pop("RERUN", None)  # "off" would make every call do nothing
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gr00t_fast" / "rerun"
    place = home / ("Library/Application Support/rerun" if sys.platform == "darwin" else "rerun")
    file = place / "analytics.json"
    paths = {"config_file_path": str(file), "data_dir_path": str(place / "analytics")}
    with contextlib.suppress(OSError):  # a home that cannot be written: rerun cannot note that it has asked, and sends nothing the first time
        place.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"analytics_enabled": False, "analytics_id": "", "metadata": {}, **paths}))
        os.environ["HOME" if sys.platform == "darwin" else "XDG_CONFIG_HOME"] = str(home)
