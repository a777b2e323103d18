"""An arm's cameras before a run: whether their devices are there, a picture of each, and all on one sheet, which shows swapped cameras at once."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.errors import ConfigError, RobotError, require
from gr00t_fast.robots.config import OpenCVCameraConfig, RobotConfig

SHEET_NAME = "cameras.png"
CAMERA_S = 6.0  # a camera that has given no picture by then counts as one that gives none; lerobot lets it warm up for a second
_V4L = 200  # OpenCV's number of the backend that opens device files
_OTHER_BACKENDS = ("OPENCV_VIDEOIO_PLUGIN_PATH", "OPENCV_VIDEOIO_PRIORITY_LIST")  # cameras may then come without a device file
_HEIGHT, _BAND = 360, 58  # pixels of a picture on the sheet, and of the words above it


def opencv_cameras(robot: RobotConfig | None) -> dict[str, OpenCVCameraConfig]:
    return {name: each for name, each in getattr(robot, "cameras", {}).items() if isinstance(each, OpenCVCameraConfig)}


def device_faults(robot: RobotConfig | None) -> dict[str, ConfigError]:
    """Camera -> what keeps it from being opened, as far as its device tells without being opened."""
    faults, first = {}, dict[int | Path, str]()  # device -> the camera that has it
    for name, camera in opencv_cameras(robot).items():
        if (twin := first.setdefault(camera.index_or_path, name)) != name:
            faults[name] = ConfigError(f"cameras {twin} and {name} are the same device, {camera.index_or_path}. Give each its own index_or_path.")
        elif fault := _device_fault(name, camera):
            faults[name] = ConfigError(fault)
    return faults


def device_of(camera: OpenCVCameraConfig) -> Path:
    return Path(f"/dev/video{camera.index_or_path}" if isinstance(camera.index_or_path, int) else camera.index_or_path)


def _device_fault(name: str, camera: OpenCVCameraConfig) -> str | None:
    """On Linux, where cameras are files unless OpenCV was given another source of them."""
    path = device_of(camera)
    if sys.platform != "linux" or camera.backend not in (0, _V4L) or any(os.environ.get(each) for each in _OTHER_BACKENDS):
        return None
    if not path.exists():
        seen = ", ".join(sorted(str(each) for each in Path("/dev").glob("video*"))) or "none"
        return f"camera {name}: there is no {path}. Video devices seen: {seen}. `lerobot-find-cameras opencv` lists them."
    if not os.access(path, os.R_OK | os.W_OK):
        return f"camera {name}: no permission for {path}. Join its group: `sudo usermod -aG video $USER`, then log in again."
    return None


def take_pictures(cameras: Mapping[str, OpenCVCameraConfig]) -> dict[str, np.ndarray | RobotError]:
    """A picture of each as the policy gets it, uint8 (height, width, 3), or why there is none. All are opened at once, as a run opens them, each in a
    thread that the program does not wait for when the driver hangs: takes CAMERA_S at most. Raises MissingExtraError without lerobot."""
    from gr00t_fast.robots.lerobot_glue import programs_using

    driver = require("lerobot.cameras.opencv", "robot") if cameras else None  # before the clock runs: it can take seconds to import
    taken: dict[str, np.ndarray | RobotError] = {}

    def take(name: str) -> None:
        taken[name] = _picture(driver, name, cameras[name])

    threads = [threading.Thread(target=take, args=(name,), name=f"gr00t_fast-camera-{name}", daemon=True) for name in cameras]
    for thread in threads:
        thread.start()
    give_up_s = time.monotonic() + CAMERA_S
    for thread in threads:
        thread.join(max(0.0, give_up_s - time.monotonic()))
    for name, camera in cameras.items():
        shown = taken.setdefault(name, RobotError(f"camera '{name}' ({camera.index_or_path}) gives no picture. Plug it in again."))
        if isinstance(shown, RobotError) and (users := programs_using(str(device_of(camera)))):
            taken[name] = RobotError(f"{shown} It is in use by {'; '.join(users)}: stop that program.")
    return {name: taken[name] for name in cameras}


def _picture(driver: Any, name: str, camera: OpenCVCameraConfig) -> np.ndarray | RobotError:
    from gr00t_fast.robots.lerobot_glue import camera_error_message

    opened = driver.OpenCVCamera(driver.OpenCVCameraConfig(**vars(camera)))
    try:
        opened.connect()
        frame: np.ndarray = opened.async_read(timeout_ms=1000 * CAMERA_S)
        return frame
    except Exception as error:  # noqa: BLE001 - whatever lerobot and OpenCV raise
        return RobotError(camera_error_message(name, camera, error))
    finally:
        if opened.is_connected:
            opened.disconnect()


# --- files ---------------------------------------------------------------------------------------------------------------------------------


def write_pictures(frames: Mapping[str, np.ndarray], titles: Mapping[str, str], out: Path, name: str, text: str) -> str:
    """frames: camera -> uint8 RGB (height, width, 3); titles: what is said under a camera's name. Writes `camera_<name>.png` of each, SHEET_NAME and
    `text` as the file `name` into the directory `out`; returns what to tell the user. Raises ConfigError when that cannot be written."""
    pictures = {"camera_" + re.sub(r"[^\w-]", "_", camera) + ".png": frame for camera, frame in frames.items()}
    if frames:
        pictures[SHEET_NAME] = np.hstack([_tile(camera, titles.get(camera, ""), frame) for camera, frame in frames.items()])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, picture in pictures.items():
            (out / file).write_bytes(_png(picture))
        (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{out}': {error.strerror}.") from error
    return f"wrote {out / name}" + (f"; look at {out / SHEET_NAME}: is each camera under its name?" if frames else "")


def _png(picture: np.ndarray) -> bytes:
    import cv2

    encoded: np.ndarray = cv2.imencode(".png", picture[..., ::-1])[1]
    return encoded.tobytes()


def _tile(name: str, title: str, frame: np.ndarray) -> np.ndarray:
    """(_BAND + _HEIGHT, width, 3): the name and what is said of it above the picture."""
    import cv2

    font, width = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    band = np.full((_BAND, width, 3), 255, np.uint8)
    for line, (text, size) in enumerate(((name, 0.8), (title, 0.45))):
        longest = cv2.getTextSize(text, font, size, 1)[0][0]
        cv2.putText(band, text, (6, 24 + 24 * line), font, size * min(1.0, (width - 12) / max(longest, 1)), (0, 0, 0), 1, cv2.LINE_AA)
    picture = cv2.resize(np.ascontiguousarray(frame), (width, _HEIGHT), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(np.vstack([band, picture]), 0, 0, 0, 8, cv2.BORDER_CONSTANT, value=(255, 255, 255))
