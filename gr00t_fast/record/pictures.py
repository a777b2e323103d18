"""A picture of each camera, and all of them on one sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.base.errors import ConfigError

SHEET_NAME = "cameras.png"
_WIDTH_PX = 640
_HEIGHT, _BAND = 360, 58  # pixels of a picture on the sheet, and of the words above it


def write_pictures(frames: Mapping[str, np.ndarray], titles: Mapping[str, str], out: Path, name: str, text: str) -> str:
    """frames: camera -> uint8 RGB (height, width, 3); titles: a line under a camera's name. Writes `camera_<name>.png` of each, SHEET_NAME and
    `text` as the file `name` into the directory `out`; returns what to tell the user. Raises ConfigError when that cannot be written."""
    pictures = {"camera_" + re.sub(r"[^\w-]", "_", camera) + ".png": frame for camera, frame in frames.items()}
    if frames:
        pictures[SHEET_NAME] = np.hstack([_tile(camera, titles.get(camera, ""), frame) for camera, frame in frames.items()])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, picture in pictures.items():
            (out / file).write_bytes(png(picture))
        (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{out}': {error.strerror}.") from error
    return f"wrote {out / name}" + (f"; look at {out / SHEET_NAME}: is each camera under its name?" if frames else "")


def png(picture: np.ndarray) -> bytes:
    """uint8 RGB (height, width, 3) as a file."""
    import cv2

    encoded: np.ndarray = cv2.imencode(".png", picture[..., ::-1])[1]
    return encoded.tobytes()


def jpeg(picture: np.ndarray, widest_px: int = _WIDTH_PX) -> bytes:
    """uint8 RGB (height, width, 3) as a file, made smaller where it is wider than `widest_px`."""
    import cv2  # changes the environment when it is imported

    height, width = picture.shape[:2]
    if width > widest_px:
        picture = cv2.resize(picture, (widest_px, max(1, round(height * widest_px / width))), interpolation=cv2.INTER_AREA)
    encoded: np.ndarray = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]  # RGB -> BGR
    return encoded.tobytes()


def _tile(name: str, title: str, frame: np.ndarray) -> np.ndarray:
    """(_BAND + _HEIGHT, width, 3): the name and its line above the picture."""
    import cv2

    font, width = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    band = np.full((_BAND, width, 3), 255, np.uint8)
    for line, (text, size) in enumerate(((name, 0.8), (title, 0.45))):
        longest = cv2.getTextSize(text, font, size, 1)[0][0]
        cv2.putText(band, text, (6, 24 + 24 * line), font, size * min(1.0, (width - 12) / max(longest, 1)), (0, 0, 0), 1, cv2.LINE_AA)
    picture = cv2.resize(np.ascontiguousarray(frame), (width, _HEIGHT), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(np.vstack([band, picture]), 0, 0, 0, 8, cv2.BORDER_CONSTANT, value=(255, 255, 255))
