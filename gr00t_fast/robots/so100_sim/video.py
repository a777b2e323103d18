"""Pictures of the simulated scene as a video file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gr00t_fast.optional import require

FPS = 30
GIF_EVERY = 2  # a GIF of every second frame is half the size and still fluent


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """An mp4 (H.264) or GIF (half the pixels each way: it compresses badly), by the name's ending. Raises MissingExtraError."""
    imageio = require("imageio.v3", "sim")
    if path.suffix == ".gif":
        smaller = [frame.reshape(len(frame) // 2, 2, -1, 2, 3).mean((1, 3)).astype(np.uint8) for frame in frames[::GIF_EVERY]]
        imageio.imwrite(path, smaller, duration=1000 * GIF_EVERY / FPS, loop=0)
    else:
        require("imageio_ffmpeg", "sim")
        imageio.imwrite(path, frames, fps=FPS, codec="libx264", quality=8, macro_block_size=2)
