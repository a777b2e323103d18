"""Pictures of an arm's cameras as files: each one, and all on one sheet with their names, on which swapped cameras are seen at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.errors import ConfigError

SHEET_NAME = "cameras.png"
_HEIGHT, _BAND = 360, 58  # pixels of a picture on the sheet, and of the words above it


def write_pictures(frames: Mapping[str, np.ndarray], titles: Mapping[str, str], out: Path) -> list[Path]:
    """frames: camera -> uint8 RGB (height, width, 3); titles: what is said under a camera's name. Writes `camera_<name>.png` of each and SHEET_NAME
    into the directory `out`. Raises ConfigError when that cannot be written."""
    import cv2

    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [_write(out / _file_name(name), frame) for name, frame in frames.items()]
        if frames:
            written.append(_write(out / SHEET_NAME, np.hstack([_tile(name, titles.get(name, ""), frame) for name, frame in frames.items()])))
    except (OSError, cv2.error) as error:
        raise ConfigError(f"--out: the cameras' pictures cannot be written to '{out}': {' '.join(str(error).split())}.") from error
    return written


def _file_name(camera: str) -> str:
    return "camera_" + re.sub(r"[^\w-]", "_", camera) + ".png"


def _write(path: Path, frame: np.ndarray) -> Path:
    import cv2

    encoded = cv2.imencode(".png", frame[..., ::-1])[1]
    path.write_bytes(encoded.tobytes())
    return path


def _tile(name: str, title: str, frame: np.ndarray) -> np.ndarray:
    """(_BAND + _HEIGHT, width, 3): the name and what is said of it above the picture."""
    import cv2

    width = max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    band = np.full((_BAND, width, 3), 255, np.uint8)
    for line, (text, size) in enumerate(((name, 0.8), (title, 0.45))):
        longest = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]
        cv2.putText(
            band, text, (6, 24 + 24 * line), cv2.FONT_HERSHEY_SIMPLEX, size * min(1.0, (width - 12) / max(longest, 1)), (0, 0, 0), 1, cv2.LINE_AA
        )
    picture = cv2.resize(np.ascontiguousarray(frame), (width, _HEIGHT), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(np.vstack([band, picture]), 0, 0, 0, 8, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def write_dry_run(out: Path, table: str, frames: Mapping[str, np.ndarray]) -> str:
    """dry_run.txt and the pictures, into `out`; returns what to tell the user. Raises ConfigError."""
    paths = write_pictures(frames, {name: f"{frame.shape[1]}x{frame.shape[0]}" for name, frame in frames.items()}, out)
    try:
        (out / "dry_run.txt").write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{out}': {error.strerror}.") from error
    return f"wrote {out / 'dry_run.txt'}" + (f"; look at {paths[-1]}: is each camera under its name?" if paths else "")
