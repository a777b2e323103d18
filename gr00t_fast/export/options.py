"""What the exporters can be asked for: flags of their commands, so nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gr00t_fast.flags import Flags

ExportPrecision = Literal["fp32", "bf16", "fp16"]  # PRECISIONS of gr00t_fast.engine, which imports torch; a test compares them


@dataclass(kw_only=True)
class OutOptions(Flags):
    """Where the files go."""

    GROUP = "export"

    out: Path  # directory to make
    overwrite: bool = False  # replace the export that is there, once the new one is whole


@dataclass(kw_only=True)
class OnnxOptions(OutOptions):
    """Of graphs."""

    GROUP = "export"

    precision: ExportPrecision = "fp32"  # of weights, inputs and outputs
    denoising_steps: list[int] = field(default_factory=list)  # step counts to cover besides 1, 2, 4, 8 and the checkpoint's own
    max_text_tokens: int = 256  # longest prompt, without the tokens of the pictures
    seed: int = 0  # of the random inputs that the graphs are traced with


@dataclass(kw_only=True)
class BuildOptions(OutOptions):
    """Of TensorRT engines."""

    GROUP = "export"

    builder: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"  # auto: what is installed, tensorrt_rtx first
    compute_capability: str = "auto"  # 8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only
    max_text_tokens: int | None = None  # longest prompt, without the tokens of the pictures; default: what was exported
    workspace_mb: int | None = None  # GPU memory that one layer may use; default: the library's own
    optimization_level: Literal[0, 1, 2, 3, 4, 5] | None = None  # how long the builder may search; default: the library's own
    timing_cache: Path | None = None  # a file of measured kernel times, to share between builds (tensorrt)


@dataclass(kw_only=True)
class CalibrationOptions(Flags):
    """Which layers keep 16 bits."""

    GROUP = "calibration"

    limit: float = 1.0  # p99 of the action error, in joint units, that layers are kept in 16 bits for
    trial_frames: int = 8  # frames that decide which layers are kept; 0: keep none, measure nothing
    balance: bool = True  # move outliers from activations into weights where it helps
    seed: int = 0  # of the choice of frames and of the noise
