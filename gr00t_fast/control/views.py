"""What looks on at a run, each in a process of its own (sink.py): a video of the cameras (`--video`), the cameras in a window (`--show_images`), and
everything in rerun (`--display`, in rerun_view.py)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.sink import Sink, Tell
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.errors import ConfigError, require

Echo = Callable[[str], None]
QUEUED_TICKS = 60  # two seconds at 30 Hz; 55 MB of a 640x480 camera
_QUEUED_IMAGES = 2  # a window shows the present: what it is too slow for is left out
_START_S = 10.0
_FINISH_S = 20.0  # to encode what is queued; the process has a lower priority than the rest of a busy machine. Ctrl-C ends the waiting
_GIF_FINISH_S_PER_FRAME = 0.1  # a GIF is only encoded once its palette, and so its last frame, is known
_GIF_FPS = 10.0  # GIF stores every frame nearly whole; viewers show 10 frames/s reliably
_GIF = ["-filter_complex", "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse", "-c:v", "gif"]  # a palette of the clip's own 256 colours
_H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]  # plays everywhere; 16: hardly to be told from the original
_TITLE = "gr00t_fast (q: stop)"


class View:
    """An observer of the control loop. Use as a context manager; neither that nor `see` raises for reasons of the view."""

    def __init__(self, flag: str, consumer: Callable[..., Any], *arguments: Any, echo: Echo = print, path: Path | None = None) -> None:
        """`flag` that asked for it; `consumer` and `arguments` as of Sink; `path` of the file that it writes. `echo` is told, in another thread, what
        goes wrong. Starts nothing."""
        self.path, self.warnings = path, list[str]()  # warnings: for the report, complete once the run is over
        self.on_quit: Callable[[], None] = lambda: None  # q or Escape was pressed in the window; called in another thread
        self.every, self.finish_s_per_frame, self.counts_drops = 1, 0.0, True
        self.sink = Sink(consumer, *arguments, on_answer=self._take, slots=QUEUED_TICKS)
        self._flag, self._echo, self._seen, self._failed = flag, echo, 0, False

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
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
        limit_s = _FINISH_S + self.finish_s_per_frame * self._seen / self.every
        if not self.sink.close(limit_s):
            self._failed = True
            self.warnings.append(f"{self._flag}: its process did not finish within {limit_s:.0f} s and was ended.")
        if self.sink.dropped and self.counts_drops:
            self.warnings.append(f"{self._flag} lacks {self.sink.dropped} of {self._seen} ticks: its process was slower than the loop.")

    @property
    def written(self) -> Path | None:
        """The file, where it is whole."""
        return self.path if self.path is not None and self.path.exists() and not self._failed else None

    def _take(self, what: str, value: Any) -> None:
        if what == "quit":
            self.on_quit()
            return
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
    """Raises ConfigError for another suffix and a file that cannot be written, MissingExtraError without imageio-ffmpeg."""
    gif = path.suffix.lower() == ".gif"
    if not gif and path.suffix.lower() != ".mp4":
        raise ConfigError(f"--video: '{path}' must end in .mp4 or .gif.")
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


# The cameras in a window


def window_view(echo: Echo = print, on_quit: Callable[[], None] = lambda: None) -> View | None:
    """What `--show_images` means; where no window can be opened `echo` is told why and what to do."""
    if obstacle := window_obstacle():
        echo(f"--show_images: {obstacle} The run goes on without a window.")
        return None
    view = View("--show_images", Window, echo=echo)
    view.sink.slots, view.counts_drops, view.on_quit = _QUEUED_IMAGES, False, on_quit
    return view


class Window(contextlib.AbstractContextManager):
    """The cameras side by side."""

    def __init__(self, tell: Tell) -> None:
        """Opened now and not with the first picture: over a network it takes seconds, and the arm is under power then."""
        import cv2  # changes the environment when it is imported

        self._cv2, self._tell, self._open = cv2, tell, True
        self._try(lambda: cv2.namedWindow(_TITLE))

    def __exit__(self, *error: object) -> None:
        pass  # it closes with the process

    def add(self, observation: Observation, tick: TickRecord | None) -> None:
        if observation.frames and self._open:
            self._try(lambda: self._cv2.imshow(_TITLE, side_by_side(observation.frames)[:, :, ::-1]))  # RGB -> BGR

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
            if self._cv2.waitKey(1) & 0xFF in (ord("q"), 27):
                self._tell("quit")
        except self._cv2.error as error:  # no window system, or it went away
            self._tell("say", f"the window failed ({str(error).strip()}). The run goes on without it.")
            self._open = False


def window_obstacle() -> str | None:
    """Return why no window of OpenCV can be opened here and what to do about it, or None."""
    if obstacle := desktop_obstacle():
        return f"{obstacle} Run it on a desktop or with 'ssh -X', or record with --video=run.mp4."
    try:
        import cv2
    except ImportError:
        return "OpenCV is not installed. Install it with: pip install opencv-python"
    gui = next((line.split(":", 1)[1].strip() for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")), "")
    if gui == "NONE":
        return (
            "this OpenCV was built without windows (opencv-python-headless, which lerobot installs). Replace it with: "
            "pip uninstall -y opencv-python-headless && pip install opencv-python"
        )
    return None


def desktop_obstacle() -> str | None:
    """Return why no program can open a window here, or None."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (DISPLAY is not set)."
    return None
