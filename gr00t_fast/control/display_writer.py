"""The process beside a run that shows it in rerun, writes it into an .rrd file, or shows its cameras in a window; display.py is its other end.

They live here and not in the control loop's process: rerun's calls hold the interpreter lock for milliseconds a tick, connecting to a viewer that is
away takes five seconds, and what a viewer does not take is kept in memory without a limit; a window may stand still for seconds (ssh -X, a mouse that
drags it).

Messages come on stdin: four bytes of length, JSON, then what the JSON announces as raw bytes: float32 arrays, then pictures. The first one is the
header. Answers are JSON lines on stdout: `ready`, `say` for a line to the user, `quit` for a key in the window, `written` at the end.

Axis alphabet of this file: J joints of the arm, L rows that the playing chunk still holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NoReturn

import numpy as np

from gr00t_fast.control.recorder import side_by_side
from gr00t_fast.errors import require

APPLICATION = "gr00t_fast"
_NICENESS = 10  # the control loop comes first
_JPEG_QUALITY = 85
_PROBE_S = 3.0  # for a viewer's machine to accept a connection
_CHECK_EVERY_S, _CHECK_S = 0.5, 0.25  # how often a sink is asked whether it has taken everything, and how long it has for that
_PATIENCE_S = 5.0  # for a viewer that takes nothing; what comes meanwhile is left out
_LAST_S = 3.0
_WINDOW = "gr00t_fast (q: stop)"
_TICK_WIDTH = 10.0  # of a tick in the picture of the chunk, whose heights are joint units: a chunk of 16 is as wide as the range of a joint is high
_COLOURS = ((228, 87, 86), (76, 120, 168), (84, 162, 75), (245, 133, 24), (178, 121, 162), (238, 202, 59))


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """JSON and the bytes that belong to it (`payload_bytes` of them); None at the end of the input, also in the middle of a message."""
    size = stream.read(4)
    if len(size) < 4:
        return None
    text = stream.read(struct.unpack(">I", size)[0])
    try:
        message = json.loads(text)
    except ValueError:
        return None
    payload = stream.read(message["payload_bytes"])
    return (message, payload) if len(payload) == message["payload_bytes"] else None


def say(**values: Any) -> None:
    with contextlib.suppress(OSError):  # the run was killed: what it has sent is still written
        os.write(1, json.dumps(values).encode() + b"\n")


class Recording:
    """One rerun stream: the entities of a run, and what they look like."""

    def __init__(self, rr: Any, stream: Any, joints: Sequence[str], fps: float) -> None:
        self._rr, self._stream, self._joints, self._fps = rr, stream, joints, fps
        for index, joint in enumerate(joints):
            colour = _COLOURS[index % len(_COLOURS)]
            stream.log(f"joints/{joint}/commanded", rr.SeriesLines(names="commanded", colors=[colour]), static=True)
            stream.log(f"joints/{joint}/measured", rr.SeriesLines(names="measured", colors=[(140, 140, 140)]), static=True)

    def add(self, message: Mapping[str, Any], numbers: np.ndarray, pictures: Mapping[str, bytes]) -> None:
        """A tick. numbers (3 + L, J): measured, target, commanded, then the chunk's rows from this tick on; between episodes (1, J): measured."""
        rr, stream, tick = self._rr, self._stream, message["tick"]
        stream.set_time("time", duration=message["time_s"])
        if tick is None:
            stream.disable_timeline("tick")
        else:
            stream.set_time("tick", sequence=tick["number"])
        for name, jpeg in pictures.items():
            stream.log(f"cameras/{name}", rr.EncodedImage(contents=jpeg, media_type="image/jpeg"))
        for index, joint in enumerate(self._joints):
            stream.log(f"joints/{joint}/measured", rr.Scalars(float(numbers[0, index])))
            if tick is not None:
                stream.log(f"joints/{joint}/commanded", rr.Scalars(float(numbers[2, index])))
        if tick is None:
            return
        self._add_chunk(numbers[3:])
        for name in ("tick_error_ms", "missed_ticks", "inference_ms", "age_ticks"):
            stream.log(f"timing/{name}", rr.Scalars(float(tick[name])))
        if tick["event"]:
            stream.log("events", rr.TextLog(tick["event"], level="INFO"))

    def _add_chunk(self, ahead: np.ndarray) -> None:
        """A curve for each joint, from now to the right; up is more."""
        x = _TICK_WIDTH * np.arange(len(ahead))
        curves = [np.column_stack([x, -ahead[:, joint]]) for joint in range(len(self._joints))] if len(ahead) > 1 else []
        colours = [_COLOURS[joint % len(_COLOURS)] for joint in range(len(curves))]
        self._stream.log("chunk", self._rr.LineStrips2D(curves, colors=colours, labels=list(self._joints)[: len(curves)]))

    def flush(self, timeout_s: float) -> None:
        """Raises RuntimeError when the sink has failed, or has not taken everything in time."""
        self._stream.flush(timeout_sec=timeout_s)


class Viewer:
    """A recording's connection to a viewer, which may be slow, hang or go away."""

    def __init__(self, recording: Recording, address: str) -> None:
        self._recording, self.address = recording, address
        self._behind_since_s: float | None = None
        self._checked_s = time.monotonic()
        self.skipped = 0
        self.lost: str | None = None  # why it is given up

    def add(self, *tick: Any) -> None:
        now_s = time.monotonic()
        if self.lost is None and now_s - self._checked_s >= _CHECK_EVERY_S:
            self._check()
        if self.lost is None and self._behind_since_s is None:
            self._recording.add(*tick)
        else:
            self.skipped += 1

    def _check(self) -> None:
        limit_s = _CHECK_S if self._behind_since_s is None else 0.02
        began_s = time.monotonic()
        try:
            self._recording.flush(limit_s)
            self._behind_since_s = None
        except RuntimeError as error:  # of one type for a connection that is gone and for one that is slow: the second takes as long as it may
            now_s = time.monotonic()
            if self._behind_since_s is None:
                self._behind_since_s = began_s
            if now_s - began_s < limit_s / 2:
                self.lost = f"went away ({error})"
            elif now_s - self._behind_since_s > _PATIENCE_S:
                self.lost = f"has taken nothing for {_PATIENCE_S:g} s"
        self._checked_s = time.monotonic()

    def close(self) -> None:
        if self.lost is None:
            with contextlib.suppress(RuntimeError):
                self._recording.flush(_LAST_S)


class Window:
    """The cameras side by side."""

    def __init__(self, cv2: Any) -> None:
        """Opened now and not with the first picture: over a network it takes seconds, and the arm is under power then. `open`: while it works."""
        self._cv2, self.open = cv2, True
        self._try(lambda: cv2.namedWindow(_WINDOW))

    def add(self, pictures: Mapping[str, np.ndarray]) -> None:
        if pictures:
            self._try(lambda: self._cv2.imshow(_WINDOW, side_by_side(pictures)[:, :, ::-1]))  # RGB -> BGR

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
            if self._cv2.waitKey(1) & 0xFF in (ord("q"), 27):
                say(quit=True)
        except self._cv2.error as error:  # no window system, or it went away
            say(say=f"--show_images: the window failed ({str(error).strip()}). The run goes on without it.")
            self.open = False


class Writer:
    """The header's sinks, and what is written into them."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        import cv2  # changes the environment when it is imported

        self._cv2, self._header = cv2, header
        self._window = Window(cv2) if header["images"] else None
        if self._window is None:
            self._rr = require("rerun", "display")
        self._identity = str(uuid.uuid4())  # of both sinks: a viewer that has one open knows the other
        self._file: Recording | None = None
        self._viewer: Viewer | None = None
        self._checked_s = time.monotonic()
        self.written = 0
        if header["rrd"] is not None:
            self._file = self._open_file(header["rrd"])
        if header["viewer"] is not None:
            self._viewer = self._open_viewer(header["viewer"])

    @property
    def idle(self) -> bool:
        """Whether nothing is left to write into."""
        return self._file is None and self._viewer is None and not (self._window is not None and self._window.open)

    def _stream(self) -> Any:
        stream = self._rr.RecordingStream(APPLICATION, recording_id=self._identity)
        stream.set_time("time", duration=0.0)
        return stream

    def _recording(self, stream: Any) -> Recording:
        recording = Recording(self._rr, stream, self._header["joints"], self._header["fps"])
        stream.send_recording_name(self._header["name"])
        return recording

    def _open_file(self, path: str) -> Recording | None:
        stream = self._stream()
        try:
            stream.save(path, default_blueprint=self._blueprint())
        except (RuntimeError, OSError) as error:
            say(say=f"--display: cannot write '{path}' ({error}). The run goes on without it.")
            return None
        return self._recording(stream)

    def _open_viewer(self, viewer: Mapping[str, Any]) -> Viewer | None:
        address = f"{viewer['host']}:{viewer['port']}"
        if viewer["spawn"]:
            try:
                self._rr.spawn(port=viewer["port"], connect=False, memory_limit="25%", hide_welcome_screen=True)
            except (RuntimeError, OSError) as error:
                say(say=f"--display: rerun's viewer does not start ({error}). The run goes on without it; --display=HOST:PORT is one elsewhere.")
                return None
        try:
            _probe(viewer["host"], viewer["port"], _PROBE_S if not viewer["spawn"] else 3 * _PROBE_S)
        except OSError as error:
            say(
                say=f"--display: no viewer answers at {address} ({error}). The run goes on without one. Start one there with: "
                f"rerun --port {viewer['port']}"
            )
            return None
        stream = self._stream()
        stream.connect_grpc(viewer["url"], default_blueprint=self._blueprint())
        return Viewer(self._recording(stream), address)

    def _blueprint(self) -> Any:
        """Cameras on the left, joints in the middle, what is to come and how punctual it is on the right."""
        import rerun.blueprint as blueprint

        joints = [blueprint.TimeSeriesView(origin=f"joints/{joint}", name=f"{joint} ({self._header['unit']})") for joint in self._header["joints"]]
        cameras = [blueprint.Spatial2DView(origin=f"cameras/{name}", name=name) for name in self._header["cameras"]]
        timing = [
            blueprint.Spatial2DView(origin="chunk", name=f"chunk from now on ({_TICK_WIDTH:g} to the right: a tick; up: {self._header['unit']})"),
            blueprint.TimeSeriesView(contents=["timing/tick_error_ms", "timing/inference_ms"], name="tick error, inference (ms)"),
            blueprint.TimeSeriesView(contents=["timing/missed_ticks", "timing/age_ticks"], name="missed ticks, age of the action (ticks)"),
            blueprint.TextLogView(origin="events", name="events"),
        ]
        columns = [blueprint.Vertical(*joints), blueprint.Vertical(*timing)]
        columns = [blueprint.Vertical(*cameras), *columns] if cameras else columns
        return blueprint.Blueprint(blueprint.Horizontal(*columns), blueprint.TimePanel(timeline="time"), collapse_panels=True)

    def add(self, message: Mapping[str, Any], payload: bytes) -> None:
        joints = len(self._header["joints"])
        rows = message["rows"]
        numbers = np.frombuffer(payload, np.float32, rows * joints).reshape(rows, joints)
        at, pictures = 4 * rows * joints, {}
        for name, (height, width) in message["pictures"].items():
            picture = np.frombuffer(payload, np.uint8, 3 * height * width, at).reshape(height, width, 3)
            at += picture.size
            pictures[name] = picture if self._window is not None else self._jpeg(picture)
        if self._window is not None:
            self._window.add(pictures)
        if self._file is not None:
            self._file.add(message, numbers, pictures)
            self._check_file()
        if self._viewer is not None:
            self._viewer.add(message, numbers, pictures)
            self._check_viewer()
        self.written += 1

    def _jpeg(self, picture: np.ndarray) -> bytes:
        quality = [self._cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        return self._cv2.imencode(".jpg", picture[:, :, ::-1], quality)[1].tobytes()  # RGB -> BGR

    def _check_file(self) -> None:
        now_s = time.monotonic()
        if now_s - self._checked_s < _CHECK_EVERY_S:
            return
        self._checked_s = now_s
        self._flush_file(_LAST_S)

    def _flush_file(self, timeout_s: float) -> None:
        try:
            self._file.flush(timeout_s)
        except RuntimeError as error:
            say(say=f"--display: writing '{self._header['rrd']}' failed ({error}). The run goes on without it.")
            self._file = None

    def _check_viewer(self) -> None:
        if self._viewer.lost is not None:
            rest = "; the recording goes on" if self._file is not None else ""
            say(say=f"--display: the viewer at {self._viewer.address} {self._viewer.lost}. The run goes on without it{rest}.")
            self._viewer = None

    def close(self) -> None:
        if self._file is not None:
            self._flush_file(_LAST_S)
        if self._viewer is not None:
            self._viewer.close()
        say(written=self.written, skipped=self._viewer.skipped if self._viewer is not None else 0)


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


def main() -> NoReturn:
    """Until the input ends. Leaves at once then: threads of a viewer's connection may hang."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the run; this process ends when its input does
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    source = os.fdopen(0, "rb")
    first = read_message(source)
    if first is None:
        os._exit(0)
    try:
        writer = Writer(first[0])
        say(ready=True)
        while not writer.idle and (message := read_message(source)) is not None:
            writer.add(*message)
        writer.close()
    except Exception as error:  # noqa: BLE001 - whatever it was: the run is told, and goes on
        say(say=f"{'--show_images' if first[0]['images'] else '--display'}: failed ({type(error).__name__}: {error}). The run goes on without it.")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
