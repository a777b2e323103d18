"""What the benchmarks have in common as programs: a checkpoint to measure, progress, and one way to end."""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gr00t_fast.errors import ConfigError, MissingExtraError, attempt
from gr00t_fast.measurement import git_commit, machine, versions

# A path from the root, at the begin of a word or after `--flag=` and `measured:`, down to its last name.
_DIRECTORIES = re.compile(r"(^|[=:])/(?:[^/]*/)*(?=[^/])")

Result = dict[str, Any]


def without_machine_paths(words: Sequence[str]) -> str:
    """The words as a shell would need them, absolute paths shortened to their last name: fit to be published."""
    return shlex.join(_DIRECTORIES.sub(r"\1", word.rstrip("/")) for word in words)


def provenance(seed: int | None = None) -> Result:
    """Where a result comes from: machine, versions, commit, command, and the seed where there is one."""
    found = {"machine": machine(), "versions": versions(), "git_commit": git_commit(), "command_line": without_machine_paths(sys.argv)}
    return found if seed is None else found | {"seed": seed}


def checkpoint_of(arguments: argparse.Namespace, size: str = "demo") -> Path:
    """--model_path, or a checkpoint with random weights in --out, written once per size, --data_config and --seed. Raises ConfigError."""
    if arguments.model_path is not None:
        return arguments.model_path
    from gr00t_fast.random_checkpoint import SO100_CONFIGS, checkpoint_in

    asked = getattr(arguments, "data_config", "so100")
    data_config = asked if asked in SO100_CONFIGS else "so100"  # a class of the user's own names cameras; loading says if so100 has them not
    return checkpoint_in(arguments.out, "checkpoint", size, data_config, arguments.seed)


def make_directory(out: Path) -> None:
    """--out, with its parents. Raises ConfigError where it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if out.is_file() else f"{error.strerror}"
        raise ConfigError(f"--out={out}: expected a directory to write to, but {why}. Name another.") from error


def end_with_parent() -> None:
    """In a process that another one started with multiprocessing: end when that one does, also when it was killed and could tell nobody."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def show_progress(what: str, done: int, total: int) -> None:
    """One line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def finish(
    name: str,
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace], Result],
    as_table: Callable[[Result], str],
    plot: Callable[[Result, Path], None] | None = None,
) -> int:
    """Run, print the table, leave NAME.json, NAME.md and NAME.png in --out, and end with one line of JSON. Returns the exit code."""
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)

    def run_in_out() -> Result:
        make_directory(arguments.out)
        return run(arguments)

    result, code = attempt(run_in_out, "interrupted: no result")
    if result is None:
        return code
    print(as_table(result))
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / f"{name}.md").write_text(as_table(result) + "\n")
    if plot is not None:
        try:
            plot(result, arguments.out / f"{name}.png")
        except MissingExtraError as error:  # the figures are what counts; a bare GPU machine has no matplotlib
            print(f"no plot: {error}", file=sys.stderr)
    print(json.dumps(result))
    return 0
