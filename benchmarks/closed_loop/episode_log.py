"""Episodes that were played, on disk as they come in, so that a run that was stopped loses nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.closed_loop.cells import Cell
from benchmarks.closed_loop.episode import Outcome
from benchmarks.closed_loop.workers import Report
from gr00t_fast.errors import ConfigError


class EpisodeLog:
    """DIRECTORY/episodes.jsonl: its first line says under which conditions the episodes were played; the others are one episode each,
    or the commit of a run that began there."""

    def __init__(self, directory: Path, conditions: Mapping[str, Any], commit: str | None = None) -> None:
        """Reads what is there. Raises ConfigError when it was played under other conditions, or is damaged before its last line."""
        self.path = directory / "episodes.jsonl"
        self._outcomes: dict[Cell, dict[int, Outcome]] = defaultdict(dict)
        self.refused: dict[Cell, str] = {}
        self.commits: list[str | None] = []  # under which the episodes were played, oldest first
        if self.path.exists():
            self._read(dict(conditions))
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"conditions": dict(conditions)}) + "\n", encoding="utf-8")
        self._commit = commit

    def missing(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[tuple[Cell, list[int]]]:
        """What has yet to be played."""
        wanted = [(cell, [seed for seed in seeds if seed not in self._outcomes[cell]]) for cell in cells if cell not in self.refused]
        return [(cell, left) for cell, left in wanted if left]

    def outcomes(self, cell: Cell, seeds: Sequence[int]) -> list[Outcome]:
        return [self._outcomes[cell][seed] for seed in seeds if seed in self._outcomes[cell]]

    def add(self, report: Report) -> None:
        lines = report.lines()
        if self._commit not in self.commits:
            self.commits.append(self._commit)
            lines.insert(0, {"commit": self._commit})
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        self._note(report)

    def _note(self, report: Report) -> None:
        if report.refused is not None:
            self.refused.setdefault(report.cell, report.refused)
        self._outcomes[report.cell].update({outcome.seed: outcome for outcome in report.outcomes})

    def _read(self, conditions: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the run was killed while it wrote: that episode is played again
            self.path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines = lines[:-1]
        try:
            found, *entries = [json.loads(line) for line in lines]
            played = found["conditions"]
            for entry in entries:
                if "commit" in entry:
                    self.commits.append(entry["commit"])
                    continue
                cell = Cell(**entry["cell"])
                outcomes = (Outcome(**entry["outcome"]),) if "outcome" in entry else ()
                self._note(Report(cell, outcomes, entry.get("refused")))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is damaged ({type(error).__name__}: {error}). Remove it, or choose another --out.") from error
        if played != conditions:
            changed = [name for name in conditions if played.get(name) != conditions[name]]
            raise ConfigError(f"{self.path} holds episodes played with other {', '.join(changed)}. Remove it, or choose another --out.")
