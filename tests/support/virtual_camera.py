"""A camera that the real cv2.VideoCapture opens by index, without a device: an OpenCV video plugin built from virtual_camera.c with gcc.

OpenCV looks for plugins once per process, so a test that uses this starts a fresh process with `plugin_environment`.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np

RUNNING, READS_FAIL, READS_HANG, SLOW = 0, 1, 2, 3
_STATE_OFFSET = 16


def build_plugin(directory: Path) -> None:
    """Compile the plugin into `directory` under the name OpenCV looks for, for the OpenCV that is installed: it refuses those of other versions."""
    import cv2

    major, minor = cv2.__version__.split(".")[:2]
    version = (f"-DOPENCV_MAJOR={major}", f"-DOPENCV_MINOR={minor}")
    source = Path(__file__).with_name("virtual_camera.c")
    target = directory / "libopencv_videoio_gstreamer.so"
    subprocess.run([compiler() or "cc", "-shared", "-fPIC", "-O1", "-w", *version, "-o", str(target), str(source)], check=True)


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("gcc") or shutil.which("cc")


def plugin_environment(directory: Path) -> dict[str, str]:
    """The environment in which cv2 finds the plugin and its cameras in `directory`."""
    return {**os.environ, "OPENCV_VIDEOIO_PLUGIN_PATH": str(directory), "VCAM_DIR": str(directory)}


def write_camera(directory: Path, index: int, frame_bgr: np.ndarray, fps: int = 30) -> None:
    """Create camera `index`, which shows `frame_bgr` (height, width, 3) uint8, or change it in place: a reader has the file mapped, and would die of
    one that is empty for a moment."""
    height, width = frame_bgr.shape[:2]
    content, file = struct.pack("5i", width, height, fps, 0, RUNNING) + frame_bgr.tobytes(), directory / f"cam{index}"
    with file.open("r+b" if file.exists() and file.stat().st_size == len(content) else "wb") as camera:
        camera.write(content)


def set_state(directory: Path, index: int, state: int) -> None:
    """RUNNING, READS_FAIL, READS_HANG or SLOW (a tenth of its rate), effective at once."""
    with (directory / f"cam{index}").open("r+b") as file:
        file.seek(_STATE_OFFSET)
        file.write(struct.pack("i", state))
