"""`gr00t-fast calibrate`: the scales of the torch engine `fp8`, from observations of your robot."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gr00t_fast.cli.policy_flags import (
    CheckpointFlags,
    OutputFlags,
    SampleFlags,
    check_at_least_one,
    check_checkpoint_flags,
    check_device,
    observation_options,
    run_command,
)
from gr00t_fast.cli.program import EXIT_OK, end_on_sigterm, show
from gr00t_fast.console import Progress
from gr00t_fast.dataset import MIN_FRAMES
from gr00t_fast.files import check_free, whole_directory
from gr00t_fast.flags import UsageError, setting
from gr00t_fast.measurement import git_commit, machine, peak_rss_bytes, versions

if TYPE_CHECKING:
    from gr00t_fast.engine import Target
    from gr00t_fast.export.calibrate import CalibrationResult, Settings

SCHEME = "fp8"
PartName = Literal["vision", "language", "refine", "dit"]  # PARTS of gr00t_fast.engine.quantized, which imports torch; a test compares them


@dataclass(kw_only=True)
class CalibrateConfig(OutputFlags, SampleFlags, CheckpointFlags):
    """Calibrate the torch engine fp8 with observations of your robot.

        gr00t-fast calibrate --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --observations=./my-lerobot-dataset

    fp8 is for Ada, Hopper and Blackwell GPUs. The result is small (scales, no weights) and belongs to these weights, this robot and these cameras:
    with any other the engine refuses it. Calibration itself runs on any device; 8-bit products that the device lacks are written out. Layers whose
    rounding the actions cannot spare stay in 16 bits (--limit).
    """

    format: Literal["fp8"] = setting("fp8", former=("scheme",))  # the engine that it is for
    out: Path | None = None  # directory to make; default: exports/fp8 in the checkpoint's, where the engine looks
    overwrite: bool = False  # replace a calibration that is there, once the new one is whole
    frames: int = MIN_FRAMES  # how many observations, spread over all episodes
    parts: list[PartName] = field(default_factory=lambda: list(get_args(PartName)))  # to round; the others stay in 16 bits
    denoising_steps: int | None = None  # of the trials; default: the checkpoint's own. The result is good for any count
    limit: float = 1.0  # p99 of the action error, in joint units, that layers are kept in 16 bits for
    trial_frames: int = 8  # frames that decide which layers are kept; 0: keep none, measure nothing
    balance: bool = True  # move outliers from activations into weights where it helps
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("fp32", former=("dtype",))  # of the plain model that trials compare with
    seed: int = 0  # of the choice of frames and of the noise


_USAGE = "usage: gr00t-fast calibrate --model_path=DIR --observations=DATASET [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; nothing is left behind then."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 error, 2 bad flag, 130 interrupted."""
    return run_command(CalibrateConfig, check, work, (_USAGE, _EXITS), argv, "interrupted; nothing was left behind")


def work(config: CalibrateConfig) -> int:
    """Calibrate and print the report, which also lies in the output. Raises Gr00tFastError."""
    from gr00t_fast.export.calibrate import as_markdown

    end_on_sigterm()
    start_s = time.perf_counter()
    report = run(config)
    brief = {key: value for key, value in report.items() if key not in ("groups", "layers")}
    facts = {"seconds": round(time.perf_counter() - start_s, 1), "peak_rss_bytes": peak_rss_bytes(), "machine": machine(), "versions": versions()}
    result = {**brief, **facts, "git_commit": git_commit(), "command_line": shlex.join(sys.argv)}
    show(result, as_markdown(report), f"wrote {report['out']}: run it with --engine=fp8", config)
    return EXIT_OK


def check(config: CalibrateConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_device(config.device)
    check_at_least_one(config, "frames", "denoising_steps")
    if config.observations is None:
        raise UsageError("--observations is missing: a LeRobotDataset or recordings directory, or random:SEED (says nothing about trained weights).")


def run(config: CalibrateConfig) -> dict[str, Any]:
    """Check everything small, load, calibrate, write. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import load_model, open_checkpoint
    from gr00t_fast.engine import select_device, select_precision
    from gr00t_fast.engine.fp8 import has_product
    from gr00t_fast.engine.manifest import target_of
    from gr00t_fast.export.calibrate import Settings, calibrate
    from gr00t_fast.export.networks import TorchNetwork
    from gr00t_fast.export.samples import collect_cases

    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    target = target_of(checkpoint, config.embodiment_tag, config.data_config)
    out = config.out or checkpoint.path / "exports" / SCHEME
    check_free(out, config.overwrite)
    steps = checkpoint.config.head.denoising_steps if config.denoising_steps is None else config.denoising_steps
    device = select_device(config.device)
    dtype = select_precision(config.precision, device)
    progress = Progress()
    cases, data = collect_cases(target, config.observations or "", noise_seed=config.seed, progress=progress, **observation_options(config))
    model = load_model(checkpoint, config.embodiment_tag, device, dtype)
    settings = Settings(SCHEME, "torch", steps, config.limit, config.trial_frames, config.balance, config.seed)
    network = TorchNetwork(model, steps, emulated=not has_product(device))
    result = calibrate(network, cases, settings, progress, config.parts)
    return _write(config, target, out, result, settings, data)


def _write(config: CalibrateConfig, target: Target, out: Path, result: CalibrationResult, settings: Settings, data: dict[str, Any]) -> dict[str, Any]:
    from gr00t_fast.engine.fp8 import Calibration, write_calibration
    from gr00t_fast.engine.manifest import Digests
    from gr00t_fast.export.calibrate import build_report, write_report

    report = {**build_report(result, settings, data), "parts": config.parts, "out": str(out)}
    with whole_directory(out, config.overwrite) as directory:
        write_report(report, directory)
        identity = target.identity(Digests(directory))
        write_calibration(directory, Calibration(result.scales), identity, data, versions(), shlex.join(sys.argv), _flags(config))
    return report


def _flags(config: CalibrateConfig) -> list[str]:
    """What the manifest needs to name the command that makes the same again."""
    names = ("observations", "frames", "denoising_steps", "limit", "trial_frames", "prompt_style", "processor_path", "precision", "seed")
    flags = [f"--{name}={value}" for name in names if (value := getattr(config, name)) is not None]
    if config.camera_map:
        flags.append(f"--camera_map={json.dumps(config.camera_map)}")  # JSON is YAML
    return [*flags, "--parts", *config.parts, *(["--allow_few"] if config.allow_few else []), *([] if config.balance else ["--no-balance"])]
