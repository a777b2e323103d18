"""`gr00t-fast compare`: two runs side by side, from what each left in its `--out`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.flags import setting
from gr00t_fast.cli.main import EXIT_OK, Command, show
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.evaluation.compare import as_table, compare_runs, read_run, verdict


@dataclass(kw_only=True)
class CompareConfig(OutputFlags):
    """Compare two runs by what each left in its --out: settings that differ, timing, smoothness of the motion, limits that bit, outcome.

        gr00t-fast compare outputs/sync outputs/threaded

    One run of each kind says little; missed ticks show that the machine was busy.
    """

    runs: list[Path] = setting(default_factory=list, whole_words=True)  # the two directories; they may also come first, without the flag

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if len(self.runs) != 2:
            raise ConfigError(f"expected two directories of runs, got {len(self.runs)}: gr00t-fast compare RUN RUN.")


def work(config: CompareConfig) -> int:
    first, second = config.runs
    comparison = compare_runs(read_run(first), read_run(second))
    show(comparison, as_table(comparison), verdict(comparison), config)
    return EXIT_OK


main = Command(CompareConfig, work, "usage: gr00t-fast compare RUN RUN [--flag=value ...]", first_words="runs")
