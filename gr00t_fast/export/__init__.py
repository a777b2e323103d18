"""From a checkpoint to files that other runtimes run: graphs, 8-bit versions of them, and the proof that they agree.

Here is what the exporters can be asked for: flags of their commands, so nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gr00t_fast.base.errors import AT_LEAST_1, ConfigError, check_ranges
from gr00t_fast.base.flags import Flags
from gr00t_fast.inputs.dataset import MIN_FRAMES
from gr00t_fast.options import DATA_SETS, CameraOptions, CheckpointOptions, ExportedName, ObservationOptions, PrecisionName, check_device

if TYPE_CHECKING:
    from gr00t_fast.checkpoint import Checkpoint
    from gr00t_fast.engine.manifest import Target

ExportPrecision = Literal["fp32", "bf16", "fp16"]  # PRECISIONS of gr00t_fast.engine, which imports torch; a test compares them
DEFAULT_PRECISION: ExportPrecision = "fp16"  # of graphs for TensorRT: every GPU that it knows computes in it; bf16 needs Ampere
FP8 = "fp8"
LEAST_VERIFIED = 100  # observations
SYNTHETIC = "random:0"
_OF_GRAPHS = ("precision", "denoising_steps", "camera_size", "lang_instruction")  # options of graphs that are exported for TensorRT


@dataclass(kw_only=True)
class ExportOptions(CheckpointOptions):
    """What all of them take."""

    def check(self) -> None:
        super().check()
        check_device(getattr(self, "device", "auto"))
        counts = ("denoising_steps", "max_text_tokens", "frames")
        check_ranges(self, **{name: AT_LEAST_1 for name in counts if hasattr(self, name)})

    def opened(self) -> tuple[Checkpoint, Target]:
        """Small files only. Raises CheckpointError and ConfigError."""
        from gr00t_fast.checkpoint import open_checkpoint
        from gr00t_fast.engine.manifest import target_of

        checkpoint = open_checkpoint(self.model_path, revision=self.revision, letterbox=self.letterbox)
        return checkpoint, target_of(checkpoint, self.embodiment_tag, self.data_config)


@dataclass(kw_only=True)
class OutOptions(ExportOptions):
    """Where the files go."""

    GROUP = "export"

    out: Path  # directory to make
    overwrite: bool = False  # replace the export that is there, once the new one is whole


@dataclass(kw_only=True)
class OnnxOptions(CameraOptions, OutOptions):
    """An export of graphs."""

    GROUP = "export"

    precision: ExportPrecision = "fp32"  # of weights, inputs and outputs
    denoising_steps: list[int] = field(default_factory=list)  # step counts to cover besides 1, 2, 4, 8 and the checkpoint's own
    max_text_tokens: int = 256  # longest prompt, without the tokens of the pictures
    batch_sizes: list[int] = field(default_factory=list)  # observations at once besides one, e.g. 2,4: for a server; more graphs, the same weights
    lang_instruction: str = "Place the block in the bowl"  # an instruction of the usual length; others can be given later


@dataclass(kw_only=True)
class BuildOptions(CameraOptions, OutOptions):
    """An export of TensorRT engines, and of the graphs that they are built from."""

    GROUP = "export"

    builder: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"  # auto: what is installed, tensorrt_rtx first
    compute_capability: str = "auto"  # 8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only
    max_text_tokens: int | None = None  # longest prompt, without the tokens of the pictures; default: what was exported
    overwrite: bool = False  # replace engines, and graphs in OUT-onnx, that are there, once the new ones are whole
    onnx: Path | None = None  # graphs to begin with; default: exported into OUT-onnx
    precision: ExportPrecision | None = None  # of graphs that are exported here; default: fp16
    denoising_steps: list[int] = field(default_factory=list)  # when exporting: step counts besides the usual ones
    lang_instruction: str | None = None  # when exporting: an instruction of the usual length; others can be given later

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if self.onnx is not None and (given := [f"--{name}" for name in _OF_GRAPHS if getattr(self, name) not in (None, [])]):
            raise ConfigError(f"{', '.join(given)} with --onnx: the graphs there have theirs. Leave it out, or leave out --onnx to export others.")


@dataclass(kw_only=True)
class CalibrationOptions(Flags):
    """Which layers keep 16 bits."""

    GROUP = "calibration"

    limit: float = 1.0  # p99 of the action error, in joint units, that layers are kept in 16 bits for
    trial_frames: int = 8  # frames that decide which layers are kept; 0: keep none, measure nothing
    seed: int = 0  # of the choice of frames and of the noise


@dataclass(kw_only=True)
class SampleOptions(ObservationOptions, ExportOptions):
    """Which observations are taken."""

    GROUP = "observations"

    allow_few: bool = False  # go on with fewer frames or episodes than it takes; the result says so
    frames: int = MIN_FRAMES  # how many observations, spread over all episodes
    denoising_steps: int | None = None  # default: the checkpoint's own; calibrate with as many as will run
    seed: int = 0  # of the choice of frames and of the noise


@dataclass(kw_only=True)
class QuantiseOptions(OutOptions, CalibrationOptions, SampleOptions):
    """The 8-bit versions of an ONNX export."""

    GROUP = "export"

    onnx: Path  # export to begin with (gr00t-fast export onnx)
    target: Literal["openvino", "onnxruntime", "tensorrt"]  # the runtime that the files are for
    format: Literal["int8", "fp8"] = "int8"  # of the numbers

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if self.format == FP8 and self.target != "tensorrt":
            raise ConfigError(f"--format=fp8 --target={self.target}: no CPU computes in FP8. Expected --format=int8, or --target=tensorrt.")
        if self.observations is None and self.target != "onnxruntime":
            raise ConfigError(f"--target={self.target} needs --observations: {DATA_SETS}.")

    def made_with(self) -> list[str]:
        """Flags by which the manifest names the command that makes the same again."""
        names = ("onnx", "format", "target", "observations", "frames", "denoising_steps", "limit", "trial_frames", "prompt_style")
        return list(flags_given(self, *names, "processor_path", "seed", "camera_map", "allow_few"))


@dataclass(kw_only=True)
class VerifyOptions(SampleOptions):
    """A comparison with the plain model."""

    GROUP = "export"

    engine: ExportedName  # which runtime the export is for
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    frames: int = LEAST_VERIFIED  # how many observations, spread over all episodes
    limit: float | None = None  # p99 of the action error in joint units; default: 0.5 for 16 bits and more, 1.5 for 8
    device: str = "auto"  # of the engine; the plain model runs on the CPU
    precision: PrecisionName = "auto"  # of the engine, where it has a choice
    out: Path = Path("outputs/verify")  # directory for verify.json and verify.md, which are replaced


def flags_given(options: Any, *names: str) -> Iterator[str]:
    """Flags by which a manifest names the command that makes the same again; what is empty or off is left out."""
    for name in names:
        value = getattr(options, name)
        if value is None or value is False or value in ([], {}):
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        yield f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
