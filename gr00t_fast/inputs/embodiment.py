"""What one embodiment's observations and actions look like, as its checkpoint says: read once, when a checkpoint is opened for a policy.

Axis alphabet: H horizon, D joint values of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX, Letterbox, PartStatistics, PolicyMetadata
from gr00t_fast.base.errors import CheckpointError
from gr00t_fast.inputs.data_config import DataConfig

STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
_STANDS_FOR = {"q01": "min", "q99": "max"}  # in files that lack it
# Smaller ones come first. The tolerance, a share of the larger of |min| and |max|, is for figures that were rounded or estimated; the absolute one
# for a joint that was always 0: quantiles that lerobot estimates from a histogram are then some 1e-14.
_ORDER = (("min", "q01"), ("q99", "max"))
_ORDER_TOLERANCE = 1e-3
_ORDER_SLACK = 1e-6
_LARGEST = 1e6  # no joint value in any unit; a chosen limit

Statistics = Mapping[str, np.ndarray]  # name of STATISTICS -> float64 (D,)


@dataclass(frozen=True)
class Camera:
    """Resolution and rate that training saw; fps: None where that is not known. Raises ValueError for what no camera delivers."""

    width: int
    height: int
    fps: float | None

    def __post_init__(self) -> None:
        width, height, fps = self.width, self.height, self.fps
        fits = min(width, height) >= MIN_FRAME_PX and max(width, height) <= MAX_FRAME_PX and width * height <= MAX_PIXELS
        if not (fits and type(width) is type(height) is int and (fps is None or 0 < fps < float("inf"))):
            limits = f"{MIN_FRAME_PX} to {MAX_FRAME_PX} each way and at most {MAX_PIXELS} in all"
            raise ValueError(f"camera resolution {width}x{height} at {fps} fps; expected whole pixels, {limits}")


@dataclass(frozen=True)
class ImageSettings:
    """How a frame becomes the image that the network's processor gets (N1.6, N1.7, and lerobot's N1.5).

    letterbox: padded to a square first. albumentations: area averaging, crop by `crop_fraction`, shorter side `edge`. squash: lerobot's, whatever
    the frame's shape: bicubic to `edge` x `edge`, crop by `crop_fraction`, bicubic to `target_size`. Else torchvision's bilinear, crop to
    `crop_size`, size `target_size`, both (height, width).
    """

    letterbox: bool
    albumentations: bool
    edge: int
    crop_fraction: float
    crop_size: tuple[int, int] | None
    target_size: tuple[int, int] | None
    squash: bool = False


@dataclass(frozen=True)
class Arithmetic:
    """How a network's reference rounds, as data: other roundings are other inputs.

    forward: type in which joint values are taken and scaled values are given. inverse: type in which actions are restored. close: a joint is
    constant where its statistics are close, else where they are equal. clip_actions: normalised actions are clipped to [-1, 1] before they are
    restored. keep_constant: an action whose deviation is 0 is given as the network has it, else as its mean.
    """

    forward: type[np.floating[Any]]
    inverse: type[np.floating[Any]]
    close: bool
    clip_actions: bool
    keep_constant: bool


@dataclass(frozen=True)
class Part:
    """One state or action part. mode: of data_config.NORMALISATIONS. low and high, or mean and deviation, float64 (D,), of a relative action (H, D).

    clip: whether a normalised state is clipped to [-1, 1]. reference: key of the state that a relative action counts from, None for an absolute one.
    """

    key: str  # with its prefix, `state.gripper`
    mode: str
    low: np.ndarray
    high: np.ndarray
    statistics: Statistics
    clip: bool = False
    reference: str | None = None

    @property
    def name(self) -> str:
        return bare(self.key)

    @property
    def width(self) -> int:
        """Number of joint values D."""
        return self.low.shape[-1]

    @property
    def network_width(self) -> int:
        """Number of values that the network reads of them."""
        return 2 * self.width if self.mode == "sin_cos" else self.width


@dataclass(frozen=True)
class Embodiment:
    """One embodiment of a checkpoint.

    data_config: keys, the times that are read, the language key. cameras: key -> what training saw, None where the checkpoint does not say.
    trained_horizon: how many actions can be returned. state_width: padded width of one time. record: what the small files say of it, as it stands
    there. images, letterbox, formalize_language, exclude_state, action_configs: settings of N1.6 and N1.7. notes: what else a line before the start
    says. n_action_steps: as of PolicyMetadata.
    """

    tag: str
    row: int
    data_config: DataConfig
    cameras: Mapping[str, Camera | None]
    state: tuple[Part, ...]
    action: tuple[Part, ...]
    arithmetic: Arithmetic
    trained_horizon: int
    state_width: int
    record: Any
    images: ImageSettings | None = None
    letterbox: Letterbox | None = None
    formalize_language: bool = False
    exclude_state: bool = False
    action_configs: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    n_action_steps: int | None = None

    @property
    def default_horizon(self) -> int:
        """How many actions are returned unless others are asked for."""
        return min(self.trained_horizon, len(self.data_config.action_indices))

    @property
    def images_per_observation(self) -> int:
        return len(self.data_config.video_keys) * len(self.data_config.video_indices)

    @property
    def state_widths(self) -> dict[str, int]:
        """Key -> number of values."""
        return {part.key: part.width for part in self.state}

    @property
    def action_widths(self) -> dict[str, int]:
        return {part.key: part.width for part in self.action}

    @property
    def metadata(self) -> PolicyMetadata:
        """For the pre-flight check."""
        cameras = {bare(key): self.cameras[key] for key in self.data_config.video_keys}
        first = next(iter(cameras.values()))
        return PolicyMetadata(
            embodiment_tag=self.tag,
            fps=None if first is None else first.fps,
            resolutions={name: None if camera is None else (camera.width, camera.height) for name, camera in cameras.items()},
            state_widths={part.name: part.width for part in self.state},
            action_widths={part.name: part.width for part in self.action},
            state_statistics={part.name: _range(part.statistics) for part in self.state},
            action_statistics={part.name: _range(part.statistics) for part in self.action},
            trained_horizon=self.trained_horizon,
            letterbox=self.letterbox,
            n_action_steps=self.n_action_steps,
        )


def bare(key: str) -> str:
    """`video.webcam` -> `webcam`."""
    return key.split(".", 1)[1]


def _range(statistics: Statistics) -> PartStatistics:
    found = {name: statistics.get(name, statistics[_STANDS_FOR.get(name, name)]) for name in ("min", "max", "q01", "q99")}
    return PartStatistics(**found)


def part_statistics(where: str, values: Mapping[str, Any], dimensions: int = 1) -> dict[str, np.ndarray]:
    """Name -> float64 of one shape, of those in STATISTICS that are there: finite, but for std, which the reference's merging of data sets makes NaN
    for a joint that never moves. Raises ValueError for a part without min and max, and for figures that contradict each other."""
    arrays = {name: np.atleast_1d(np.asarray(values[name])) for name in STATISTICS if name in values}
    if "min" not in arrays or "max" not in arrays:
        raise ValueError(f"{where}: statistics without min and max")
    if not arrays["min"].size:
        raise ValueError(f"{where}: statistics of no values")
    for name, array in arrays.items():
        numbers = array.dtype.kind in "if" and array.shape == arrays["min"].shape and array.ndim == dimensions
        if not numbers or not (np.isfinite(array) | (np.isnan(array) & (name == "std"))).all():
            raise ValueError(f"{where}.{name} is no list of finite numbers of the shape that min has")
        if (np.abs(array) > _LARGEST).any():
            raise ValueError(f"{where}.{name} exceeds {_LARGEST:g}: no joint value")
    if "std" in arrays and (arrays["std"] < 0).any():
        raise ValueError(f"{where}.std is negative")
    slack = _ORDER_SLACK + _ORDER_TOLERANCE * np.maximum(np.abs(arrays["min"]), np.abs(arrays["max"]))
    for low, high, tolerance in (("min", "max", 0.0), ("q01", "q99", 0.0), *((*pair, slack) for pair in _ORDER)):
        if low in arrays and high in arrays and (arrays[low] > arrays[high] + tolerance).any():
            raise ValueError(f"{where}.{low} exceeds {where}.{high}")
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def check_std(where: str, std: np.ndarray) -> np.ndarray:
    """`std` of a part that is normalised with it. Raises CheckpointError where it holds NaN."""
    if np.isnan(std).any():
        raise CheckpointError(
            f"{where} is normalised by mean and std, and its std holds NaN. Expected finite numbers: NVIDIA's merging of data sets writes NaN for a "
            "joint that never moves. Compute the statistics of the data again, and train with them."
        )
    return std
