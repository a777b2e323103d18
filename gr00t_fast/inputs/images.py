"""From a camera's frame to the picture that N1.7's network reads, as the reference's processor makes it: bytes throughout, on the CPU.

A frame is padded to a square with black, if the checkpoint asks for that; then its shorter side is resized, it is cropped to its centre and resized
again; then it is brought to a size that Qwen3-VL's image processor accepts. Axis alphabet: H and W height and width, h and w those of the result.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from gr00t_fast.inputs.embodiment import PictureSettings

Size = tuple[int, int]  # height and width

# Qwen3-VL's image processor (preprocessor_config.json of the published one): how many pixels a picture may have.
_MIN_PIXELS, _MAX_PIXELS = 65_536, 16_777_216


def picture(frame: np.ndarray, settings: PictureSettings, multiple: int) -> np.ndarray:
    """uint8 (H, W, 3) RGB -> uint8 (h, w, 3), both sides multiples of `multiple`."""
    made = view(frame, settings)
    return _interpolated(made, accepted_size(*made.shape[:2], multiple), "bicubic")


def view(frame: np.ndarray, settings: PictureSettings) -> np.ndarray:
    """uint8 (H, W, 3) RGB -> uint8 (h, w, 3): what the reference stacks, so that all views of an observation must have one size."""
    frame = _letterboxed(frame) if settings.letterbox else frame
    return _by_area(frame, settings) if settings.albumentations else _by_torchvision(frame, settings)


def view_size(height: int, width: int, settings: PictureSettings) -> Size:
    """(h, w) of `view` for a frame of that size."""
    if not settings.albumentations:
        return settings.target_size
    size = (max(height, width),) * 2 if settings.letterbox else (height, width)
    return _with_edge(_cropped(_with_edge(size, settings.edge), settings.crop_fraction), settings.edge)


def accepted_size(height: int, width: int, multiple: int) -> Size:
    """Qwen's `smart_resize`: the nearest multiples, enlarged or shrunk to the allowed number of pixels."""
    rounded = tuple(round(side / multiple) * multiple for side in (height, width))
    if math.prod(rounded) > _MAX_PIXELS:
        scale = math.sqrt(height * width / _MAX_PIXELS)
        return tuple(max(multiple, math.floor(side / scale / multiple) * multiple) for side in (height, width))
    if math.prod(rounded) < _MIN_PIXELS:
        scale = math.sqrt(_MIN_PIXELS / (height * width))
        return tuple(math.ceil(side * scale / multiple) * multiple for side in (height, width))
    return rounded


def _with_edge(size: Size, edge: int) -> Size:
    """With a shorter side of `edge`; halves are rounded to even, as Python and albumentations do."""
    scale = edge / min(size)
    return size if min(size) == edge else (round(size[0] * scale), round(size[1] * scale))


def _cropped(size: Size, fraction: float) -> Size:
    return max(1, int(size[0] * fraction)), max(1, int(size[1] * fraction))


def _letterboxed(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    side = max(height, width)
    if height == width:
        return frame
    padded = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = frame
    return padded


def _by_area(frame: np.ndarray, settings: PictureSettings) -> np.ndarray:
    import cv2  # here, because importing it changes the environment of the process

    def resized(image: np.ndarray) -> np.ndarray:
        """INTER_AREA also where it enlarges."""
        height, width = size = _with_edge(image.shape[:2], settings.edge)
        return image if image.shape[:2] == size else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    whole = resized(frame)
    height, width = _cropped(whole.shape[:2], settings.crop_fraction)
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    return resized(np.ascontiguousarray(whole[top : top + height, left : left + width]))


def _by_torchvision(frame: np.ndarray, settings: PictureSettings) -> np.ndarray:
    """Resize, CenterCrop, Resize of torchvision on bytes."""
    whole = _interpolated(frame, settings.target_size, "bilinear")
    cropped = np.zeros((*settings.crop_size, 3), np.uint8)  # a crop larger than the picture is padded with black
    source, target = [], []
    for have, want in zip(whole.shape[:2], settings.crop_size, strict=True):
        # torchvision pads first, the smaller half before, and rounds a crop's offset to even as Python does
        padding = max(0, want - have) // 2
        start = 0 if want >= have else round((have - want) / 2.0)
        source.append(slice(start, start + min(have, want)))
        target.append(slice(padding, padding + min(have, want)))
    cropped[tuple(target)] = whole[tuple(source)]
    return _interpolated(cropped, settings.target_size, "bilinear")


def _interpolated(image: np.ndarray, size: Size, mode: str) -> np.ndarray:
    """With antialias, in torch's arithmetic on bytes, which torchvision uses where the processor has AVX2."""
    if image.shape[:2] == tuple(size):
        return image
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return F.interpolate(x, size=size, mode=mode, align_corners=False, antialias=True)[0].permute(1, 2, 0).contiguous().numpy()  # (h, w, 3)


def to_trained_size(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 (B, H, W, 3) of any size -> (B, height, width, 3): what a camera of the training videos' resolution would have delivered.

    The reference refuses other sizes, so the kernel is our choice: area averaging where pixels are lost, bilinear elsewhere.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    import cv2  # here, because importing it changes the environment of the process

    shrinks = frames.shape[1] > height and frames.shape[2] > width
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (width, height), interpolation=kernel) for frame in frames])
