"""Flags that several subcommands have, each written once: the checkpoint, the engine, where observations come from, what is printed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from gr00t_fast.base.contracts import MAX_FRAME_PX, MIN_FRAME_PX
from gr00t_fast.base.errors import AT_LEAST_0, AT_LEAST_1, ConfigError, check_ranges, closest
from gr00t_fast.base.flags import OUTPUTS, Flags, setting
from gr00t_fast.control.camera_watch import CameraFault
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.record.views import WINDOW, display_target
from gr00t_fast.robots import RobotConfig, SO100FollowerConfig, rendered
from gr00t_fast.robots.lerobot_glue import check_numbers

# The words of gr00t_fast.engine, which imports torch; a test compares them.
ExportedName = Literal["onnxruntime", "openvino", "tensorrt"]
EngineName = Literal["auto", "eager", "cuda_graph", "compiled", "onnxruntime", "openvino", "tensorrt"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_SIZE = re.compile(r"(\d+)x(\d+)")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DATA_SETS = "a LeRobotDataset or recordings directory, or random:SEED (which says nothing about trained weights)"
SHEET_NAME = "cameras.png"
_HEIGHT, _BAND = 360, 58  # pixels of a picture on the sheet, and of the words above it


@dataclass(kw_only=True)
class CheckpointFlags(Flags):
    """Which checkpoint, and how its data is read: options of load_policy."""

    GROUP = "checkpoint"

    model_path: str = ""  # directory of the checkpoint, or its name on the Hugging Face hub; required
    revision: str | None = None  # commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str | None = None  # N1.5: a name of NVIDIA's (so100, so100_dualcam, ...) or module:ClassName; default: so100
    processor_path: Path | None = None  # directory with the tokenizer files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: with the brackets that NVIDIA's clients and server put around the instruction
    letterbox: Literal["auto", "always", "never"] = "auto"  # whether an N1.6 or N1.7 checkpoint was trained on padded pictures; auto: its files tell

    or_else: ClassVar[str] = ""  # what to do without a checkpoint

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.needs_checkpoint() and not self.model_path.strip():
            yield "model_path", f"the directory of a GR00T checkpoint, or its name on the Hugging Face hub.{self.or_else}"
        yield from super().missing()

    def check(self) -> None:
        super().check()
        if self.model_path.strip():
            load_data_config(self.data_config)

    def needs_checkpoint(self) -> bool:
        """Whether there is nothing to do without one."""
        return True

    def options(self, *more: str) -> dict[str, Any]:
        """These by name, but for model_path, and `more` of the configuration."""
        names = [field.name for field in dataclasses.fields(CheckpointFlags) if field.name != "model_path"]
        return {name: getattr(self, name) for name in (*names, *more)}


@dataclass(kw_only=True)
class PolicyFlags(CheckpointFlags):
    """How the network runs: the other options of load_policy."""

    GROUP = "checkpoint"

    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    action_horizon: int | None = None  # actions played per inference; default: all that the checkpoint predicts
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: PrecisionName = "auto"  # number format of the network
    engine: EngineName = "auto"  # auto is eager; onnxruntime, openvino and tensorrt need files (docs/engines.md)
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    seed: int | None = None  # makes the noise, and a simulated scene, repeatable

    def check(self) -> None:
        super().check()
        check_device(self.device)
        check_ranges(self, denoising_steps=AT_LEAST_1, action_horizon=AT_LEAST_1, seed=AT_LEAST_0)

    def policy_options(self) -> dict[str, Any]:
        """The keyword arguments of load_policy."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(PolicyFlags) if field.name != "model_path"}


@dataclass(kw_only=True)
class CameraFlags(Flags):
    """What the cameras deliver, where neither a robot nor a data set tells it."""

    GROUP = "observations"

    camera_size: str | None = None  # WIDTHxHEIGHT, which decides what an N1.6 or N1.7 export is for; default: as in --observations, or 640x480

    def check(self) -> None:
        super().check()
        self.camera_px()

    def camera_px(self) -> tuple[int, int] | None:
        """Width and height. Raises ConfigError."""
        if self.camera_size is None:
            return None
        found = _SIZE.fullmatch(self.camera_size)
        if found is None or not all(MIN_FRAME_PX <= int(side) <= MAX_FRAME_PX for side in found.groups()):
            raise ConfigError(f"--camera_size={self.camera_size}: expected WIDTHxHEIGHT in pixels, such as 640x480.")
        return int(found[1]), int(found[2])


@dataclass(kw_only=True)
class ObservationFlags(Flags):
    """Where observations come from."""

    GROUP = "observations"

    observations: str | None = None  # a LeRobotDataset or recordings directory, or random:SEED
    camera_map: dict[str, str] = field(default_factory=dict)  # which camera of the data set is which of the policy: "{front: webcam}"

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.needs_observations() and self.observations is None:
            yield "observations", DATA_SETS
        yield from super().missing()

    def needs_observations(self) -> bool:
        """Whether there is nothing to do without."""
        return False


@dataclass(kw_only=True)
class OutputFlags(Flags):
    """What is printed."""

    GROUP = OUTPUTS

    json: bool = False  # print the result as one line of JSON on standard output, and the table on standard error
    quiet: bool = False  # print the verdict, warnings and errors only
    verbose: bool = False  # full tracebacks

    def check(self) -> None:
        super().check()
        out = getattr(self, "out", None)  # of most programs
        if out is not None and out.is_file():
            raise ConfigError(f"--out={out} is a file. Expected a directory, existing or not.")


@dataclass(kw_only=True)
class ArmFlags(Flags):
    """The arm, and what is checked before it may move."""

    GROUP = "arm"

    robot: RobotConfig | None = None
    preflight: Literal["refuse", "warn"] = "refuse"  # warn: go on although the arm and the data contradict each other

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.robot is None:
            yield "robot.type", f"choose from {', '.join(sorted(RobotConfig.types))}"
        elif isinstance(self.robot, SO100FollowerConfig) and not self.robot.port.strip():
            yield "robot.port", "the arm's serial device, /dev/ttyACM0 (Linux) or /dev/tty.usbmodem... (macOS). `lerobot-find-port` finds it"
        yield from super().missing()

    def check(self) -> None:
        super().check()
        for name, camera in getattr(self.robot, "cameras", {}).items():
            for size in ("width", "height", "fps"):
                if (value := getattr(camera, size)) <= 0:
                    raise ConfigError(f"--robot.cameras.{name}.{size}={value} must be at least 1.")
        if isinstance(self.robot, SO100FollowerConfig):
            check_numbers(self.robot)

    def notes(self) -> list[str]:
        """A policy that looks at pictures of another world moves the arm blindly: right for a virtual bus, wrong for an arm of metal."""
        drawn = ", ".join(rendered(getattr(self.robot, "cameras", {})))
        if not drawn or not isinstance(self.robot, SO100FollowerConfig):
            return super().notes()
        what = f"camera {drawn} has type sim: it draws the simulated scene with the arm where its servos say it is, and shows nothing real."
        return [*super().notes(), f"{what} Meant for the virtual servo bus; a real camera is {{type: opencv, ...}}."]


@dataclass(kw_only=True)
class SafetyFlags(Flags):
    """What limits the motion: SafetyOptions, and what is watched beside it."""

    GROUP = "safety"

    safety: SafetyOptions = field(default_factory=SafetyOptions)
    camera_fault: CameraFault = "warn"  # one that is blank, shows noise, always the same picture, or old ones: warn says it, land ends the run


@dataclass(kw_only=True)
class RunOutputFlags(OutputFlags):
    """What a run leaves."""

    GROUP = OUTPUTS

    out: Path | None = None  # directory for report.html, report.json, report.txt, joints.png, run.npz, run.csv
    overwrite: bool = False  # replace the files of an earlier run in --out, and the file of --video
    video: Path | None = None  # record the cameras to this .mp4 or .gif
    record: str = ""  # write the run as a LeRobotDataset v3: a directory, or user/name in lerobot's cache
    record_append: bool = False  # add the episodes to the data set of --record that is there
    display: str | None = setting(None, bare=WINDOW)  # show the run in rerun: in a window here, at HOST:PORT, or in FILE.rrd; kept with --out

    def check(self) -> None:
        super().check()
        if self.record_append and not self.record:
            raise ConfigError("--record_append needs --record=DIR: the data set to continue.")
        if self.video is not None and self.video.suffix.lower() not in (".mp4", ".gif"):
            raise ConfigError(f"--video={self.video} must end in .mp4 or .gif.")
        display_target(self.display, self.out)


def check_device(device: str) -> None:
    """Raises ConfigError."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"--device={device} is not one of auto, cuda, cuda:N, cpu, mps.{closest(device, ('auto', 'cuda', 'cpu', 'mps'))}")


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
