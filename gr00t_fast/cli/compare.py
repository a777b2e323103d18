"""`gr00t-fast compare`: two runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from gr00t_fast.cli.main import EXIT_OK, Command, show
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.control.comparison import as_table, compare_runs, read_run, verdict
from gr00t_fast.flags import UsageError, setting


@dataclass(kw_only=True)
class CompareConfig(OutputFlags):
    """Compare two runs by what each left in its --out: settings that differ, timing, smoothness of the motion, limits that bit, outcome.

        gr00t-fast compare outputs/sync outputs/threaded

    One run of each kind says little; missed ticks show that the machine was busy.
    """

    runs: list[Path] = setting(default_factory=list, whole_words=True)  # the two directories; they may also come first, without the flag

    def check(self) -> None:
        """Raises UsageError."""
        super().check()
        if len(self.runs) != 2:
            raise UsageError(f"expected two directories of runs, got {len(self.runs)}: gr00t-fast compare RUN RUN.")


def work(config: CompareConfig) -> int:
    first, second = config.runs
    comparison = compare_runs(read_run(first), read_run(second))
    show(comparison, as_table(comparison), verdict(comparison), config)
    return EXIT_OK


_compare = Command(
    CompareConfig,
    work,
    "usage: gr00t-fast compare RUN RUN [--flag=value ...]",
    "exit codes: 0 compared, 1 a directory that holds no run, 2 bad flag.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 compared, 1 error, 2 bad flag."""
    words = sys.argv[1:] if argv is None else list(argv)
    directories = list(takewhile(lambda word: not word.startswith("-"), words))
    if directories:
        words = ["--runs", *directories, *words[len(directories) :]]
    return _compare(words)
