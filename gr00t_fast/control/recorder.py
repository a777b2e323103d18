"""Observers of the control loop: a video file, and the first and last frames. Neither delays a tick or raises into the loop."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.errors import ConfigError, require

QUEUE_FRAMES = 60  # two seconds at 30 Hz (110 MB at 640x480 and two cameras); a slower encoder drops frames instead of delaying the arm
_GIF_FILTER = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse"  # a palette of the clip's own 256 colours
_H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]  # plays everywhere; 16: hardly to be told from the original
# How long a finished run waits for the encoder's backlog; a GIF is only encoded once its palette, and so its last frame, is known.
_FINISH_S, _GIF_FINISH_S_PER_FRAME = 5.0, 0.1
_GIF_FPS = 10.0  # GIF stores every frame nearly whole; viewers show 10 frames/s reliably


def side_by_side(frames: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return all frames in one uint8 RGB picture, cut at the bottom to the lowest and to even sizes (what H.264 needs)."""
    height = min(frame.shape[0] for frame in frames.values())
    picture = np.concatenate([frame[:height] for frame in frames.values()], axis=1)
    return np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])


class VideoRecorder:
    """Writes every observation's frames to an .mp4 or .gif, encoding in a thread of its own. Use as a context manager."""

    def __init__(self, path: Path, fps: float) -> None:
        """Raises ConfigError for another suffix, MissingExtraError without imageio-ffmpeg. Nothing is written before the first frame."""
        if path.suffix.lower() not in (".mp4", ".gif"):
            raise ConfigError(f"--video: '{path}' must end in .mp4 or .gif.")
        self._ffmpeg = require("imageio_ffmpeg", "plots")
        self.path = path
        self.dropped_frames = 0
        self.error: str | None = None  # why encoding ended early, if it did
        self._every = max(1, round(fps / _GIF_FPS)) if path.suffix.lower() == ".gif" else 1
        self._fps = fps / self._every
        self._seen = 0
        # SimpleQueue leaves no lock behind when a signal handler raises out of it
        self._queue: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._encode, name="video", daemon=True)

    def __enter__(self) -> VideoRecorder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the encoder, but not for one that hangs: that is killed, and `error` says so."""
        limit_s = _FINISH_S + (_GIF_FINISH_S_PER_FRAME * self._seen / self._every if self.path.suffix.lower() == ".gif" else 0.0)
        if not self._finished(limit_s):
            self.error = f"the encoder did not finish within {limit_s:.0f} s and was killed"
            if self._process is not None:
                self._process.kill()
            self._finished(1.0)  # the thread is a daemon: whatever it does now, it does not hold up the program

    def _finished(self, limit_s: float) -> bool:
        self._queue.put(None)
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        self._seen += 1
        if self.error or not observation.frames or (self._seen - 1) % self._every:
            return
        if self._queue.qsize() >= QUEUE_FRAMES:
            self.dropped_frames += 1
        else:
            self._queue.put(side_by_side(observation.frames))

    def _encode(self) -> None:
        try:
            with tempfile.TemporaryFile() as complaints:
                while (picture := self._queue.get()) is not None:
                    if self._process is None:
                        self._process = self._start(picture, complaints)
                    try:
                        self._process.stdin.write(picture)
                    except OSError:  # it went away; why, it has said itself
                        break
                if self._process is not None:
                    self._close(complaints)
        except (OSError, ValueError, RuntimeError) as error:  # disk full, unwritable path, encoder gone: the run goes on without a video
            self.error = self.error or f"{type(error).__name__}: {error}"
            while self._queue.get() is not None:
                pass

    def _close(self, complaints: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        code = self._process.wait()
        if code:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip()
            raise RuntimeError(f"ffmpeg ended with code {code}: {said or 'without a message'}")

    def _start(self, picture: np.ndarray, complaints: IO[bytes]) -> subprocess.Popen[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{picture.shape[1]}x{picture.shape[0]}", "-r", f"{self._fps:.4f}", "-i", "-"]
        codec = ["-filter_complex", _GIF_FILTER, "-c:v", "gif"] if self.path.suffix.lower() == ".gif" else _H264
        command = [self._ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, "-an", *codec, str(self.path.absolute())]
        # a session of its own: Ctrl-C in the terminal is for the arm, the encoder ends when its input does
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints, bufsize=0, start_new_session=True)


class FirstAndLast:
    """Keeps the first and the last frames of a run, for its report."""

    def __init__(self) -> None:
        self.first: Mapping[str, np.ndarray] = {}
        self.last: Mapping[str, np.ndarray] = {}

    def see(self, observation: Observation, tick: TickRecord | None = None) -> None:
        self.first = self.first or observation.frames
        self.last = observation.frames or self.last


def desktop_obstacle() -> str | None:
    """Return why no program can open a window here, or None."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (DISPLAY is not set)."
    return None


def display_obstacle() -> str | None:
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
