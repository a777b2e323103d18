"""`gr00t-fast tune`: make, check and time every engine that this machine can run, and write the best one into your configuration file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from gr00t_fast.cli.config_file import config_path_in
from gr00t_fast.cli.policy_flags import (
    CameraFlags,
    CheckpointFlags,
    EngineName,
    OutputFlags,
    SampleFlags,
    camera_size,
    check_at_least_one,
    check_checkpoint_flags,
    check_device,
)
from gr00t_fast.cli.program import execute
from gr00t_fast.cli.run_flags import RunConfig
from gr00t_fast.dataset import MIN_FRAMES
from gr00t_fast.flags import CONFIG_FLAG, UsageError, help_text, parse_flags, setting

_NOT_OF_A_RUN = ("out", "json", "quiet", "verbose", "precision", "seed", "camera_map")  # settings of a run's file that mean something else here


@dataclass(kw_only=True)
class TuneConfig(OutputFlags, SampleFlags, CameraFlags, CheckpointFlags):
    """Make, check and time every engine that this machine can run, and write the fastest one whose actions are right into the configuration file.

        gr00t-fast tune --config_path=my_robot.yaml --observations=./my-lerobot-dataset --max_minutes=30

    --config_path is the file of your runs: the checkpoint is read from it, and engine, engine_path and precision are written into it; the file as it
    was is kept beside it. Without --config_path only the table is printed. Exports and calibrations are made in the checkpoint's directory, from your
    observations; those that are there and fit are kept. Then all engines answer the same observations as the plain model in fp32: one whose error is
    above its limit cannot win. Ctrl-C keeps what was finished and leaves the file as it was.
    """

    max_minutes: float = 30.0  # in all; a TensorRT build that has begun is waited for
    engines: list[EngineName] = field(default_factory=list)  # which to try; default: all that this machine can run
    denoising_steps: int | None = None  # of the runs that it is for; default: the checkpoint's own
    frames: int = 100  # how many observations, for the error; fewer where the time is short
    rounds: int = 100  # timed calls of each engine; fewer where the time is short
    calibration_frames: int = MIN_FRAMES  # how many observations 8-bit engines are calibrated with
    trial_frames: int = 8  # frames that decide which layers of 8-bit engines stay in 16 bits
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", former=("dtype",))  # of the engines over the torch model
    exports: Path | None = None  # directory for what is made; default: exports in the checkpoint's
    seed: int = 0  # of observations, noise and order
    out: Path = Path("outputs/tune")  # directory for tune.json and tune.md, which are replaced


_USAGE = "usage: gr00t-fast tune --config_path=FILE --observations=DATASET [--max_minutes=30] [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 no engine keeps its limit on the error, or an error; 2 bad flag, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 no engine keeps its limit or an error, 2 bad flag, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    path = config_path_in(words)
    interrupted = "interrupted: exports that were finished are kept, and the configuration file is as it was"
    work_on = partial(_work, path=path)
    return execute(partial(parse, path=path), work_on, partial(help_text, TuneConfig, _USAGE, _EXITS), words, interrupted)


def parse(argv: Sequence[str], path: Path | None) -> TuneConfig:
    """`path`: of the configuration file, which need not exist. Raises UsageError."""
    if path is not None and path.suffix == ".json":
        raise UsageError(f"--{CONFIG_FLAG}={path} is a report; the engine is written into a YAML file: --{CONFIG_FLAG}=my_robot.yaml.")
    words = list(argv) if path is None or path.exists() else _without_file(argv)
    config, notes = parse_flags(TuneConfig, words, file_of=RunConfig, not_from_file=_NOT_OF_A_RUN)
    check_checkpoint_flags(config)
    check_device(config.device)
    check_at_least_one(config, "frames", "rounds", "denoising_steps", "calibration_frames")
    camera_size(config)
    if not 0 < config.max_minutes < float("inf"):
        raise UsageError(f"--max_minutes={config.max_minutes:g} must be a positive number.")
    if config.observations is None:
        raise UsageError("--observations is missing: a LeRobotDataset or recordings directory, or random:SEED (says nothing about trained weights).")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


def _without_file(argv: Sequence[str]) -> list[str]:
    words, skip = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_file = name.replace("-", "_") == f"__{CONFIG_FLAG}"
        if not (skip or is_file):
            words.append(word)
        skip = is_file and not equals
    return words


def _work(config: TuneConfig, path: Path | None) -> int:
    from gr00t_fast.cli.tuning import work  # imports torch, which --help can do without

    return work(config, path)
