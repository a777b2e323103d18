"""An ONNX export to an 8-bit one for a runtime.

One calibration serves two runtimes: TensorRT and OpenVINO both read explicit Q/DQ (gr00t_fast/export/qdq.py). ONNX Runtime does not execute such
graphs in 8 bits; for it, activations are rounded with scales found at run time, which needs no calibration.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gr00t_fast.engine.exported import TABLES_NAME
from gr00t_fast.engine.manifest import Manifest, describe_files
from gr00t_fast.engine.quantized import InputScale
from gr00t_fast.export.calibrate import CalibrationResult, Settings
from gr00t_fast.export.qdq import write_stage
from gr00t_fast.measurement import versions

SCHEMES = ("int8", "fp8")
TARGETS = ("tensorrt", "openvino", "onnxruntime")


def write_quantised_export(
    source: Path,
    manifest: Manifest,
    out: Path,
    result: CalibrationResult | None,
    settings: Settings,
    calibration: Mapping[str, Any],
    command: str,
    flags: Sequence[str],
) -> Manifest:
    """Fill the directory `out` with files for `settings.target`, tables and manifest. `result` None: only ONNX Runtime's dynamic rounding.

    `flags`: as `Manifest.flags`.
    """
    stages = {}
    for stage in manifest.stages:
        scales = None if result is None else _of_stage(result.scales, stage)
        stages[stage] = {**manifest.stages[stage], "file": write_stage(source / f"{stage}.onnx", out, scales, settings.scheme, settings.target)}
    shutil.copyfile(source / TABLES_NAME, out / TABLES_NAME)
    made = Manifest(
        kind="openvino" if settings.target == "openvino" else "onnx",
        precision=manifest.precision,
        identity=manifest.identity,
        shapes=manifest.shapes,
        denoising_steps=manifest.denoising_steps,
        stages=stages,
        files=describe_files(out),
        versions=versions(),
        command=command,
        program="quantise.py",
        flags=tuple(flags),
        quantisation={"format": settings.scheme, "runtime": settings.target, "calibration": dict(calibration)},
        details={**manifest.details, "made_from": manifest.command},
    )
    made.write(out)
    return made


def _of_stage(scales: Mapping[str, InputScale], stage: str) -> dict[str, InputScale]:
    """By the names that the layers have in the stage's own graph."""
    return {name.removeprefix(f"{stage}."): scale for name, scale in scales.items() if name.startswith(f"{stage}.")}
