"""`gr00t-fast bench`: which engine is the fastest here, and whether its actions are right."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gr00t_fast.cli.policy_flags import (
    CameraFlags,
    CheckpointFlags,
    ObservationFlags,
    OutputFlags,
    camera_size,
    check_at_least_one,
    check_checkpoint_flags,
    check_device,
    run_command,
)
from gr00t_fast.cli.program import EXIT_ERROR, EXIT_OK, show
from gr00t_fast.flags import setting
from gr00t_fast.measurement import git_commit, machine, versions


@dataclass(kw_only=True)
class BenchConfig(OutputFlags, ObservationFlags, CameraFlags, CheckpointFlags):
    """Time get_action of a checkpoint on every engine that can run here, and compare its actions with the plain model's in fp32.

        gr00t-fast bench --model_path=./gr00t-n1.5-so100-finetuned --observations=./my-lerobot-dataset

    First eager in fp32 answers all observations: the truth. Then the engines answer the same ones with the same noise; last they take turns at whole
    calls, camera frame to joint targets, in random order: ratios are paired by round. An engine that cannot be used here gets a line that says why;
    one that was named ends the program. Errors are in joint units: degrees, and per cent for the gripper, in most.
    """

    engines: list[str] = field(default_factory=list)  # NAME or NAME=DIRECTORY of its files; default: all that work here
    denoising_steps: list[int] = field(default_factory=list)  # step counts to time; default: the checkpoint's own
    frames: int = 100  # how many observations, for the error
    rounds: int = 100  # timed calls of each engine; a GPU deserves 1000
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: str = setting("auto", former=("dtype",))  # of the engines over the torch model: auto, fp32, bf16, fp16
    threads: int | None = None  # CPU threads of torch; default: torch's own choice
    seed: int = 0  # of observations, noise and order
    out: Path = Path("outputs/bench")  # directory for bench.json and bench.md, which are replaced


_USAGE = "usage: gr00t-fast bench --model_path=DIR [--observations=DATASET] [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 no engine keeps its limit on the error, or an error; 2 bad flag, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 no engine keeps its limit or an error, 2 bad flag, 130 interrupted."""
    return run_command(BenchConfig, check, work, (_USAGE, _EXITS), argv, "interrupted: no result")


def check(config: BenchConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_device(config.device)
    check_at_least_one(config, "frames", "rounds", "denoising_steps", "threads")
    camera_size(config)


def work(config: BenchConfig) -> int:
    """Compare, print, and leave bench.json and bench.md. Raises Gr00tFastError."""
    import torch

    from gr00t_fast.cli.comparison import Bench, compare, table_rows, verdict, word_of
    from gr00t_fast.engine import select_device, select_precision

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = select_device(config.device)
    dtype = select_precision(config.precision, device)
    config.out.mkdir(parents=True, exist_ok=True)  # a directory that cannot be made is found out before the minutes
    result = {"program": "bench", "device": str(device), "precision": word_of(dtype), **compare(Bench(config, device, dtype))}
    result["engines"] = {name: {key: value for key, value in arm.items() if key != "policy"} for name, arm in result["engines"].items()}
    result |= {"machine": machine(), "versions": versions(), "git_commit": git_commit(), "command_line": shlex.join(sys.argv), "seed": config.seed}
    table, judged = "\n".join(table_rows(result)), verdict(result)
    (config.out / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "bench.md").write_text(f"{table}\n{judged}\n", encoding="utf-8")
    show(result, table, judged, config)
    return EXIT_OK if any(arm["within_limit"] for arm in result["engines"].values()) else EXIT_ERROR
