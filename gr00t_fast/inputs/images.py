"""From a camera's frame to the image that a network reads: bytes throughout, on the CPU.

N1.5 resizes frames to the training videos' resolution (the crop to 224 x 224 follows on the device). N1.6 and N1.7 pad a frame to a square with
black, if the checkpoint asks for that; then its shorter side is resized, it is cropped to its centre and resized again; then the image processor of
Eagle 3 or of Qwen3-VL brings it to a size that it accepts (`LastResize`). lerobot squashes frames instead. Axis alphabet: B batch, T times, C images
(times x cameras, time-major), H and W height and width, h and w those of the result.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from gr00t_fast.base.errors import ObservationError
from gr00t_fast.inputs.embodiment import Camera, Embodiment, ImageSettings
from gr00t_fast.inputs.observation import CheckedObservation, check_pixels

log = logging.getLogger(__name__)

Size = tuple[int, int]  # height and width

EXAMPLE_CAMERA = (640, 480)  # width and height, where a checkpoint does not say what its cameras delivered
# Qwen3-VL's image processor (preprocessor_config.json of the published one): how many pixels a picture may have.
_MIN_PIXELS, _MAX_PIXELS = 65_536, 16_777_216
# Eagle 3's (processing_eagle3_vl.py of N1.6): the same, and the longest side.
_EAGLE_MIN_PIXELS, _EAGLE_MAX_PIXELS, _EAGLE_MAX_SIDE = 4 * 28 * 28, 4096 * 28 * 28, 7000
_MAX_ASPECT = 8  # of a frame that is not padded: the longer side by the shorter; a chosen limit, the widest cameras have less than 4


class ImageTransform(Protocol):
    """Frames of a checked observation -> `frames` of PolicyInputs, one uint8 (B, h, w, 3) for each image."""

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]: ...

    def tokens(self, observation: CheckedObservation) -> int:
        """The tokens of one image."""

    def example_size(self, key: str) -> tuple[int, int]:
        """Width and height of a camera's frames, for warm-up and timing."""

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Key -> (width, height) of the frames to come. Raises ObservationError for sizes that do not go together."""


class ResizeFrames:
    """Frames of any size -> the training videos' resolution."""

    def __init__(self, cameras: Mapping[str, Camera], tokens: int) -> None:
        """tokens: of one image."""
        self._cameras, self._tokens = cameras, tokens
        self._told: set[str] = set()

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        sizes = [self._cameras[key].width * self._cameras[key].height for key in observation.frames]
        check_pixels(observation.batch * sum(sizes), "at the size of the training videos")
        return {"frames": [self._resized(key, frames[:, 0]) for key, frames in observation.frames.items()]}

    def tokens(self, observation: CheckedObservation) -> int:
        return self._tokens

    def example_size(self, key: str) -> tuple[int, int]:
        return self._cameras[key].width, self._cameras[key].height

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """All sizes can be used."""

    def _resized(self, key: str, frames: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        camera, (height, width) = self._cameras[key], frames.shape[1:3]
        if (height, width) != (camera.height, camera.width) and key not in self._told:
            self._told.add(key)
            log.info("%s is %dx%d, training saw %dx%d: resizing every frame", key, width, height, camera.width, camera.height)
        return to_trained_size(frames, camera.width, camera.height)

    def __repr__(self) -> str:
        return f"ResizeFrames({', '.join(f'{key}: {camera.width}x{camera.height}' for key, camera in self._cameras.items())})"


class FitImages:
    """Frames, one (B, T, H, W, 3) for each camera -> C images (B, h, w, 3), all of one size, which that of the frames decides."""

    def __init__(self, embodiment: Embodiment, multiple: int, last: LastResize | None) -> None:
        """multiple: pixels per side of a token. last: the image processor that has the last word on the size; None: it is that of `view`, whatever
        the frames are."""
        self._settings, self._multiple, self._last, self._may_pad = embodiment.images, multiple, last, embodiment.letterbox is not None
        self._expected = dict.fromkeys(embodiment.data_config.video_keys, EXAMPLE_CAMERA)

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        cameras = list(observation.frames.values())
        self._size_in(observation)  # refuses what does not go together before it is resized
        height, width = cameras[0].shape[2:4]
        times = range(cameras[0].shape[1])
        images = [np.stack([self._picture(item[time]) for item in frames]) for time in times for frames in cameras]
        return {"frames": images, **({"camera_size": (width, height)} if self._last else {})}

    def _picture(self, frame: np.ndarray) -> np.ndarray:
        made = view(frame, self._settings)
        return self._last(made, self._multiple) if self._last else made

    def tokens(self, observation: CheckedObservation) -> int:
        return self.tokens_of(self._size_in(observation))

    def tokens_of(self, size: Size) -> int:
        return (size[0] // self._multiple) * (size[1] // self._multiple)

    def example_size(self, key: str) -> tuple[int, int]:
        return self._expected[key]

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        expected = {**self._expected, **sizes}
        self.size({key: (height, width) for key, (width, height) in expected.items()})
        self._expected = expected

    def _size_in(self, observation: CheckedObservation) -> Size:
        return self.size({key: frames.shape[2:4] for key, frames in observation.frames.items()})

    def size(self, frames: Mapping[str, Size]) -> Size:
        """(h, w) of all images, from each camera's (height, width). Raises ObservationError for views that the reference cannot stack."""
        settings, told = self._settings, _sizes(frames)
        if not settings.letterbox and settings.albumentations and any(max(size) > _MAX_ASPECT * min(size) for size in frames.values()):
            raise ObservationError(f"cameras: expected pictures at most {_MAX_ASPECT} times as long as wide, got {told}.")
        views = {camera: view_size(*size, settings) for camera, size in frames.items()}
        if len(set(views.values())) > 1:
            raise ObservationError(
                f"cameras: expected views of one size once they are resized, got {_sizes(views)} of {told}: this checkpoint's pictures are not "
                "padded to a square, and the code that trained it refuses these as well. Set all cameras to one shape (all 640x480, or all "
                "1280x720 and 640x360), as in the recordings"
                + ("; or, if it was trained on padded pictures, say --letterbox=always." if self._may_pad else ".")
            )
        size = next(iter(views.values()))
        return self._last.size(*size, self._multiple) if self._last else size

    def __repr__(self) -> str:
        return f"FitImages({self._settings})"


def _sizes(frames: Mapping[str, Size]) -> str:
    return ", ".join(f"{key.removeprefix('video.')} {width}x{height}" for key, (height, width) in frames.items())


@dataclass(frozen=True)
class LastResize:
    """How a network's image processor resizes what it gets. size: height, width and the multiple that both are to be of -> height and width.
    resized: uint8 (H, W, 3) and (h, w) -> uint8 (h, w, 3)."""

    size: Callable[[int, int, int], Size]
    resized: Callable[[np.ndarray, Size], np.ndarray]

    def __call__(self, image: np.ndarray, multiple: int) -> np.ndarray:
        """uint8 (H, W, 3) RGB -> uint8 (h, w, 3), both sides multiples of `multiple`."""
        return self.resized(image, self.size(*image.shape[:2], multiple))


def view(frame: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 (H, W, 3) RGB -> uint8 (h, w, 3): what the reference stacks, so that all views of an observation must have one size."""
    frame = _letterboxed(frame) if settings.letterbox else frame
    if settings.squash:
        return _squashed(frame, settings)
    return _by_area(frame, settings) if settings.albumentations else _by_torchvision(frame, settings)


def view_size(height: int, width: int, settings: ImageSettings) -> Size:
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


def eagle_size(height: int, width: int, multiple: int) -> Size:
    """Eagle 3's `smart_resize`: as Qwen's, with other bounds, and too many pixels are counted once the sides are rounded."""
    rows, columns = rounded = tuple(min(max(multiple, round(side / multiple) * multiple), _EAGLE_MAX_SIDE) for side in (height, width))
    if rows * columns > _EAGLE_MAX_PIXELS:
        scale = math.sqrt(rows * columns / _EAGLE_MAX_PIXELS)
        return tuple(math.floor(side / scale / multiple) * multiple for side in rounded)
    if rows * columns < _EAGLE_MIN_PIXELS:
        scale = math.sqrt(_EAGLE_MIN_PIXELS / (height * width))
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


def _by_area(frame: np.ndarray, settings: ImageSettings) -> np.ndarray:
    import cv2  # here, because importing it changes the environment of the process

    def resized(image: np.ndarray) -> np.ndarray:
        """INTER_AREA also where it enlarges."""
        height, width = size = _with_edge(image.shape[:2], settings.edge)
        return image if image.shape[:2] == size else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    whole = resized(frame)
    height, width = _cropped(whole.shape[:2], settings.crop_fraction)
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    return resized(np.ascontiguousarray(whole[top : top + height, left : left + width]))


def _squashed(frame: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """lerobot's: the crop's size is rounded, its offset is not."""
    whole = _interpolated(frame, (settings.edge, settings.edge), "bicubic")
    side = max(1, round(settings.edge * settings.crop_fraction))
    start = (settings.edge - side) // 2
    return _interpolated(whole[start : start + side, start : start + side], settings.target_size, "bicubic")


def _by_torchvision(frame: np.ndarray, settings: ImageSettings) -> np.ndarray:
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
    x = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return F.interpolate(x, size=size, mode=mode, align_corners=False, antialias=True)[0].permute(1, 2, 0).contiguous().numpy()  # (h, w, 3)


_PILLOW_BITS = 22  # of a weight's fraction; sums of bytes times weights fit in 32 bits


def pillow_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3), as Pillow's resize does it (Resample.c), in its whole numbers: each row first, rounded to bytes, then each
    column. torch's kernel is the same, but its rounding is not. Pillow 13 takes columns first where that is less work; NVIDIA's N1.6 pins 12.1.1."""
    turned = _pillow_rows(image.transpose(1, 0, 2), size[1])  # (w, H, 3)
    return np.ascontiguousarray(_pillow_rows(turned.transpose(1, 0, 2), size[0]))


def _pillow_rows(image: np.ndarray, want: int) -> np.ndarray:
    """(H, W, 3) -> uint8 (want, W, 3). In place where possible: a fresh megabyte costs more than what is computed in it."""
    if len(image) == want:
        return image
    places, weights = _pillow_weights(len(image), want)
    source = image.astype(np.int32, order="C").reshape(len(image), -1)
    total = np.full((want, source.shape[1]), 1 << (_PILLOW_BITS - 1), np.int32)
    part = np.empty_like(total)
    for place, weight in zip(places, weights, strict=True):
        np.take(source, place, 0, out=part, mode="clip")
        part *= weight[:, None]
        total += part
    total >>= _PILLOW_BITS
    return total.clip(0, 255).astype(np.uint8).reshape(want, *image.shape[1:])


@functools.lru_cache(maxsize=64)
def _pillow_weights(have: int, want: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `want` pixels the pixels of `have` that it is made of, int (taps, want), and their weights, int32 (taps, want)."""
    scale = have / want
    spread = max(scale, 1.0)
    centre = (np.arange(want) + 0.5) * scale
    first = (centre - 2 * spread + 0.5).astype(int).clip(min=0)
    behind = (centre + 2 * spread + 0.5).astype(int).clip(max=have)
    places = first + np.arange((behind - first).max())[:, None]  # (taps, want)
    x = np.abs((places - centre + 0.5) / spread)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
    weights = np.where(places < behind, weights, 0.0)
    whole = weights / functools.reduce(np.add, weights) * (1 << _PILLOW_BITS)  # one tap after the other, as Pillow adds them
    return places.clip(max=have - 1), np.trunc(whole + np.copysign(0.5, whole)).astype(np.int32)


BY_QWEN = LastResize(accepted_size, lambda image, size: _interpolated(image, size, "bicubic"))
BY_EAGLE = LastResize(eagle_size, pillow_bicubic)


def to_trained_size(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 (B, H, W, 3) of any size -> (B, height, width, 3): what a camera of the training videos' resolution would have delivered.

    The reference refuses other sizes, so the kernel is our choice: area averaging along a side that loses pixels, then bilinear along one that
    gains them.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    import cv2  # here, because importing it changes the environment of the process

    least = min(frames.shape[2], width), min(frames.shape[1], height)
    shrunk = [cv2.resize(frame, least, interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in shrunk])
