"""`gr00t-fast bench`: which engine is the fastest here, and whether its actions are right."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

import torch

from gr00t_fast.cli.comparison import Bench, BenchConfig, compare, table_rows, verdict, word_of
from gr00t_fast.cli.policy_flags import check_at_least_one, check_checkpoint_flags, check_device, run_command
from gr00t_fast.cli.program import EXIT_ERROR, EXIT_OK, show
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.measurement import git_commit, machine, versions

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


def work(config: BenchConfig) -> int:
    """Compare, print, and leave bench.json and bench.md. Raises Gr00tFastError."""
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
