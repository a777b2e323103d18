"""Onlookers of the control loop: a video file and a live window. Neither may ever disturb the arm."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.errors import ConfigError
from gr00t_fast.optional import require

QUEUE_FRAMES = 60  # two seconds at 30 Hz (110 MB at 640x480 and two cameras); a slower encoder drops frames instead of delaying the arm
_GIF_FILTER = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse"  # a palette of the clip's own 256 colours
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
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(QUEUE_FRAMES)
        self._thread = threading.Thread(target=self._encode, name="video", daemon=True)

    def __enter__(self) -> VideoRecorder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def see(self, observation: Observation) -> None:
        self._seen += 1
        if self.error or not observation.frames or (self._seen - 1) % self._every:
            return
        try:
            self._queue.put_nowait(side_by_side(observation.frames))
        except queue.Full:
            self.dropped_frames += 1

    def _encode(self) -> None:
        writer = None
        try:
            while (picture := self._queue.get()) is not None:
                if writer is None:
                    writer = self._open(picture)
                writer.send(picture)
            if writer is not None:
                writer.close()
        except (OSError, ValueError, RuntimeError) as error:  # disk full, unwritable path, encoder gone: the run goes on without a video
            self.error = f"{type(error).__name__}: {error}"
            while self._queue.get() is not None:
                pass

    def _open(self, picture: np.ndarray):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = (picture.shape[1], picture.shape[0])
        if self._every > 1 or self.path.suffix.lower() == ".gif":
            options = {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-filter_complex", _GIF_FILTER]}
        else:
            options = {"codec": "libx264", "quality": 7}
        writer = self._ffmpeg.write_frames(str(self.path), size, fps=self._fps, macro_block_size=2, ffmpeg_log_level="error", **options)
        writer.send(None)  # starts the encoder
        return writer


class LiveView:
    """Shows the frames in a window (`--show_images`). Where that is impossible it says why and what to do, once, and does nothing."""

    def __init__(self, echo: Callable[[str], None] = print, on_quit: Callable[[], None] = lambda: None) -> None:
        """`on_quit` is called when q or Escape is pressed in the window."""
        self._echo, self._on_quit = echo, on_quit
        self._cv2 = None
        obstacle = display_obstacle()
        if obstacle:
            echo(f"--show_images: {obstacle} The run goes on without a window.")
        else:
            import cv2

            self._cv2 = cv2

    def see(self, observation: Observation) -> None:
        if self._cv2 is None or not observation.frames:
            return
        try:
            self._cv2.imshow("gr00t_fast (q: stop)", side_by_side(observation.frames)[:, :, ::-1])  # RGB -> BGR
            if self._cv2.waitKey(1) & 0xFF in (ord("q"), 27):
                self._on_quit()
        except self._cv2.error as error:  # the window system went away: the arm does not care
            self._echo(f"--show_images: the window failed ({str(error).strip()}); the run goes on without it.")
            self._cv2 = None

    def close(self) -> None:
        if self._cv2 is not None:
            self._cv2.destroyAllWindows()


def display_obstacle() -> str | None:
    """Return why no window can be opened here and what to do about it, or None."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (DISPLAY is not set). Run it on a desktop or with 'ssh -X', or record with --video=run.mp4."
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
