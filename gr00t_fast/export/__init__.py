"""From a checkpoint to files that other runtimes run: graphs, 8-bit versions of them, and the proof that they agree.

Here is what the exporters can be asked for: flags of their commands, so nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gr00t_fast.base.flags import Flags

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
    batch_sizes: list[int] = field(default_factory=list)  # observations at once besides one, e.g. 2,4: for a server; more graphs, the same weights


@dataclass(kw_only=True)
class BuildOptions(OutOptions):
    """Of TensorRT engines."""

    GROUP = "export"

    builder: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"  # auto: what is installed, tensorrt_rtx first
    compute_capability: str = "auto"  # 8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only
    max_text_tokens: int | None = None  # longest prompt, without the tokens of the pictures; default: what was exported


@dataclass(kw_only=True)
class CalibrationOptions(Flags):
    """Which layers keep 16 bits."""

    GROUP = "calibration"

    limit: float = 1.0  # p99 of the action error, in joint units, that layers are kept in 16 bits for
    trial_frames: int = 8  # frames that decide which layers are kept; 0: keep none, measure nothing
    seed: int = 0  # of the choice of frames and of the noise


def flags_given(options: Any, *names: str) -> Iterator[str]:
    """Flags by which a manifest names the command that makes the same again; what is empty or off is left out."""
    for name in names:
        value = getattr(options, name)
        if value is None or value is False or value in ([], {}):
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        yield f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
