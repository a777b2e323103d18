"""`gr00t-fast quantise`: an 8-bit version of an ONNX export, calibrated with observations of your robot."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gr00t_fast.cli.policy_flags import (
    CheckpointFlags,
    OutputFlags,
    SampleFlags,
    check_at_least_one,
    check_checkpoint_flags,
    observation_options,
    run_command,
)
from gr00t_fast.cli.program import EXIT_OK, end_on_sigterm, show
from gr00t_fast.console import Progress
from gr00t_fast.dataset import MIN_FRAMES
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import check_free, whole_directory
from gr00t_fast.flags import UsageError, setting
from gr00t_fast.measurement import git_commit, machine, peak_rss_bytes, versions

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Target
    from gr00t_fast.export.calibrate import CalibrationResult, Settings


@dataclass(kw_only=True)
class QuantiseConfig(OutputFlags, SampleFlags, CheckpointFlags):
    """Make an 8-bit version of an ONNX export, calibrated with observations of your robot.

        gr00t-fast quantise --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --onnx=exports/onnx --out=exports/openvino \\
            --format=int8 --target=openvino --observations=./my-lerobot-dataset

    openvino and tensorrt take INT8 weights and activations with scales from the calibration; tensorrt takes FP8 (E4M3) too, on GPUs that have it.
    onnxruntime rounds activations with scales found at run time and needs no --observations. Calibration runs in torch, on the CPU.
    """

    onnx: Path  # export to begin with (gr00t-fast export onnx)
    out: Path  # directory to make
    target: Literal["openvino", "onnxruntime", "tensorrt"]  # the runtime that the files are for
    format: Literal["int8", "fp8"] = setting("int8", former=("scheme",))  # of the numbers
    overwrite: bool = False  # replace an export that is there, once the new one is whole
    frames: int = MIN_FRAMES  # how many observations, spread over all episodes
    denoising_steps: int | None = None  # default: the checkpoint's own; calibrate with as many as will run
    limit: float = 1.0  # p99 of the action error, in joint units, that layers are kept in 16 bits for
    trial_frames: int = 8  # frames that decide which layers are kept; 0: keep none, measure nothing
    balance: bool = True  # move outliers from activations into weights where it helps
    device: Literal["cpu", "auto"] = "cpu"  # calibration runs on the CPU
    seed: int = 0  # of the choice of frames and of the noise


_USAGE = "usage: gr00t-fast quantise --model_path=DIR --onnx=DIR --out=DIR --target=RUNTIME --observations=DATASET [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; nothing is left behind then."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 error, 2 bad flag, 130 interrupted."""
    return run_command(QuantiseConfig, check, work, (_USAGE, _EXITS), argv, "interrupted; nothing was left behind")


def work(config: QuantiseConfig) -> int:
    """Quantise and print the report, which also lies in the output. Raises Gr00tFastError."""
    from gr00t_fast.export.calibrate import as_markdown

    end_on_sigterm()
    start_s = time.perf_counter()
    report = run(config)
    brief = {key: value for key, value in report.items() if key not in ("groups", "layers")}
    facts = {"seconds": round(time.perf_counter() - start_s, 1), "peak_rss_bytes": peak_rss_bytes(), "machine": machine(), "versions": versions()}
    result = {"out": str(config.out), **brief, **facts, "git_commit": git_commit(), "command_line": shlex.join(sys.argv)}
    show(result, as_markdown(report), f"wrote {config.out} for {config.target}", config)
    return EXIT_OK


def check(config: QuantiseConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_at_least_one(config, "frames", "denoising_steps")
    if config.format == "fp8" and config.target != "tensorrt":
        raise UsageError(f"--format=fp8 --target={config.target}: no CPU computes in FP8. Expected --format=int8, or --target=tensorrt.")
    if config.observations is None and config.target != "onnxruntime":
        raise UsageError(f"--target={config.target} needs --observations: a LeRobotDataset or recordings directory, or random:SEED.")


def run(config: QuantiseConfig) -> dict[str, Any]:
    """Check everything small, calibrate, write. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.engine.manifest import check_manifest, remedy_for, target_of
    from gr00t_fast.export.calibrate import Settings, build_report, write_report
    from gr00t_fast.export.quantize import write_quantised_export

    require("onnx", "export")
    if config.target != "tensorrt":  # its files are ONNX
        require(config.target, "openvino" if config.target == "openvino" else "export")
    check_free(config.out, config.overwrite)
    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    target = target_of(checkpoint, config.embodiment_tag, config.data_config)
    remedy = remedy_for(config.onnx, target, "to_onnx.py")
    manifest = check_manifest(config.onnx, "onnx", target, remedy)
    if manifest.quantisation is not None:
        raise ConfigError(f"--onnx={config.onnx} is in {manifest.quantisation.get('format')} already. Give the export it was made from.")
    if config.target != "tensorrt" and manifest.precision != "fp32":
        raise ConfigError(f"--onnx={config.onnx} is {manifest.precision}; {config.target} takes fp32 (gr00t-fast export onnx --precision=fp32).")
    steps = checkpoint.config.head.denoising_steps if config.denoising_steps is None else config.denoising_steps
    settings = Settings(config.format, config.target, steps, config.limit, config.trial_frames, config.balance, config.seed)
    result: CalibrationResult | None = None
    data: dict[str, Any] = {}
    if config.observations is not None:
        result, data = _calibrate(config, target, settings, manifest.shapes, remedy)
    report = build_report(result, settings, data)
    with whole_directory(config.out, config.overwrite) as directory:
        write_report(report, directory)
        flags = _flags(config)
        write_quantised_export(config.onnx, manifest, directory, result, settings, data, shlex.join(sys.argv), flags)
    return report


def _calibrate(
    config: QuantiseConfig, target: Target, settings: Settings, shapes: Mapping[str, Any], remedy: str
) -> tuple[CalibrationResult, dict[str, Any]]:
    from gr00t_fast.engine.exported import ExportTables
    from gr00t_fast.engine.manifest import check_picture
    from gr00t_fast.export.calibrate import calibrate
    from gr00t_fast.export.networks import GraphNetwork
    from gr00t_fast.export.samples import collect_cases

    tables, progress = ExportTables(config.onnx, remedy), Progress()
    tables.steps(settings.denoising_steps)  # a count that was not exported is refused before minutes pass
    options = {**observation_options(config), "noise_seed": config.seed, "camera_size": shapes.get("camera_size")}
    cases, data = collect_cases(target, config.observations or "", progress=progress, **options)
    for case in cases:
        check_picture(shapes, case.inputs.pixel_values.shape[-2:], None, remedy)
    network = GraphNetwork(target, shapes, tables, settings.denoising_steps, settings.scheme)
    return calibrate(network, cases, settings, progress), data


def _flags(config: QuantiseConfig) -> list[str]:
    """What the manifest needs to name the command that makes the same again."""
    names = (
        "onnx",
        "format",
        "target",
        "observations",
        "frames",
        "denoising_steps",
        "limit",
        "trial_frames",
        "prompt_style",
        "processor_path",
        "seed",
    )
    flags = [f"--{name}={value}" for name in names if (value := getattr(config, name)) is not None]
    if config.camera_map:
        flags.append(f"--camera_map={json.dumps(config.camera_map)}")  # JSON is YAML
    return [*flags, *(["--allow_few"] if config.allow_few else []), *([] if config.balance else ["--no-balance"])]
