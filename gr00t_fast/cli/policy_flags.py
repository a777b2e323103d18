"""Flags that several subcommands have, each written once: the checkpoint, the engine, where observations come from, what is printed."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from gr00t_fast.cli.program import execute
from gr00t_fast.contracts import MAX_FRAME_PX, MIN_FRAME_PX
from gr00t_fast.errors import ConfigError, closest
from gr00t_fast.flags import UsageError, help_text, parse_flags, setting
from gr00t_fast.inputs.data_config import load_data_config

C = TypeVar("C")
# The words of gr00t_fast.engine.choose and .device, which import torch; a test compares them.
ExportedName = Literal["onnxruntime", "openvino", "tensorrt"]
EngineName = Literal["auto", "eager", "cuda_graph", "compiled", "fp8", "onnxruntime", "openvino", "tensorrt"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
_SIZE = re.compile(r"(\d+)x(\d+)")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(kw_only=True)
class CheckpointFlags:
    """Which checkpoint, and how its data is read: options of load_policy."""

    model_path: str = ""  # directory of the checkpoint, or its name on the Hugging Face hub; required
    revision: str | None = None  # commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str | None = None  # of an N1.5 checkpoint: a name of NVIDIA's (so100, so100_dualcam, ...) or module:ClassName; default: so100
    processor_path: Path | None = None  # directory with the tokenizer files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: with the brackets that NVIDIA's clients and server put around the instruction
    letterbox: Literal["auto", "always", "never"] = "auto"  # whether an N1.7 checkpoint was trained on padded pictures; auto: its files tell


@dataclass(kw_only=True)
class CameraFlags:
    """What the cameras deliver, where neither a robot nor a data set tells it."""

    camera_size: str | None = None  # WIDTHxHEIGHT, which decides what an N1.7 export is for; default: as in --observations, or 640x480


@dataclass(kw_only=True)
class PolicyFlags(CheckpointFlags):
    """How the network runs: the other options of load_policy."""

    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    action_horizon: int | None = None  # actions played per inference; default: all that the checkpoint predicts
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", former=("dtype",))  # number format of the network
    engine: EngineName = "auto"  # auto is eager; fp8, onnxruntime, openvino and tensorrt need files (docs/engines.md)
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    seed: int | None = None  # makes the noise, and a simulated scene, repeatable


@dataclass(kw_only=True)
class ObservationFlags:
    """Where observations come from."""

    observations: str | None = setting(None, former=("calibration", "dataset"))  # a LeRobotDataset or recordings directory, or random:SEED
    camera_map: dict[str, str] = dataclasses.field(default_factory=dict)  # which camera of the data set is which of the policy: "{front: webcam}"


@dataclass(kw_only=True)
class SampleFlags(ObservationFlags):
    """Where observations come from that must be enough for a calibration or a verdict."""

    allow_few: bool = False  # go on with fewer frames or episodes than it takes; the result says so


@dataclass(kw_only=True)
class OutputFlags:
    """What is printed."""

    json: bool = False  # print the result as one line of JSON on standard output, and the table on standard error
    quiet: bool = False  # print the verdict, warnings and errors only
    verbose: bool = False  # full tracebacks


def parse_with(config_class: type[C], argv: Sequence[str], check: Callable[[C], None]) -> C:
    """The checked configuration; notes go to stderr. Raises UsageError, also for a ConfigError of `check`: what a flag says cannot be."""
    config, notes = parse_flags(config_class, argv)
    try:
        check(config)
    except UsageError:
        raise
    except ConfigError as error:
        raise UsageError(str(error)) from error
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


def run_command(
    config_class: type[C],
    check: Callable[[C], None],
    work: Callable[[C], int],
    pages: tuple[str, str],
    argv: Sequence[str] | None,
    interrupted: str = "",
) -> int:
    """Read the flags of a program, check them, and do its `work`; returns the exit code. `pages`: the help's usage line and its exit codes."""
    words = sys.argv[1:] if argv is None else list(argv)
    return execute(partial(parse_with, config_class, check=check), work, partial(help_text, config_class, *pages), words, interrupted)


def check_checkpoint_flags(config: CheckpointFlags) -> None:
    """Raises UsageError without importing torch."""
    if not config.model_path.strip():
        raise UsageError("--model_path is missing: the directory of a GR00T checkpoint, or its name on the Hugging Face hub.")
    check_data_config(config.data_config)


def check_data_config(name: str | None) -> None:
    """Raises UsageError for a name that is none."""
    try:
        load_data_config(name)
    except ConfigError as error:
        raise UsageError(f"--data_config={name}: {error}") from error


def check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"--device={device} is not one of auto, cuda, cuda:N, cpu, mps.{closest(device, ('auto', 'cuda', 'cpu', 'mps'))}")


def camera_size(config: CameraFlags) -> tuple[int, int] | None:
    """Width and height. Raises UsageError."""
    if config.camera_size is None:
        return None
    if (found := _SIZE.fullmatch(config.camera_size)) is None or not all(MIN_FRAME_PX <= int(side) <= MAX_FRAME_PX for side in found.groups()):
        raise UsageError(f"--camera_size={config.camera_size}: expected WIDTHxHEIGHT in pixels, such as 640x480.")
    return int(found[1]), int(found[2])


def check_at_least_one(config: Any, *names: str) -> None:
    """Of numbers that count something; None and an empty list are no numbers."""
    for name in names:
        value = getattr(config, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < 1:
                raise UsageError(f"--{name}={each} must be at least 1.")


def policy_options(config: PolicyFlags) -> dict[str, Any]:
    """The keyword arguments of load_policy."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(PolicyFlags) if field.name != "model_path"}


def observation_options(config: Any) -> dict[str, Any]:
    """The keyword arguments of gr00t_fast.export.samples.collect_cases that are flags."""
    return {name: getattr(config, name) for name in ("frames", "seed", "camera_map", "allow_few", "processor_path", "prompt_style")}
