"""A run as a program sees it: progress, loss.csv, limits of time, Ctrl-C, and a state that is saved now and then."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gr00t_fast.optional import require
from training.run import Run

_PANELS = {"losses": ("flow", "held_out_flow", "finder", "held_out_finder"), "denoised actions against the expert's, held out": ("action_error_deg",)}
_SHOWN = ("flow", "action_error_deg")  # beside the progress bar
LAST_STEP = "the last step"


class Log:
    """loss.csv: means since the last row, and the check on held-out samples. Rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, first_step: int, columns: Sequence[str]) -> None:
        """columns: what steps and checks say, in this order, between `step` and `minutes`."""
        self.path, self.rows, self._pending = path, [], []
        self._columns = ("step", *columns, "minutes")
        if path.exists() and first_step:
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        self.minutes_before = float(self.rows[-1]["minutes"]) if self.rows else 0.0

    def note(self, step: dict[str, float]) -> None:
        self._pending.append(step)

    def write_row(self, steps_done: int, check: dict[str, float], minutes: float) -> None:
        if not self._pending:
            return
        means = {name: float(np.mean([step[name] for step in self._pending])) for name in self._pending[0]}
        row = {"step": steps_done, **means, **check, "minutes": self.minutes_before + minutes}
        self.rows.append({name: f"{row[name]:.6g}" if name in row else "" for name in self._columns})
        self._pending = []
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def last(self) -> dict[str, float]:
        """The figures of the last row by name; what was not checked is left out."""
        row = self.rows[-1] if self.rows else {}
        return {name: float(value) for name, value in row.items() if value and name != "step"}

    def plot(self, path: Path) -> None:
        """Losses, and the error of held-out actions where that was checked."""
        require("matplotlib", "plots").use("Agg")
        pyplot = require("matplotlib.pyplot", "plots")
        panels = {title: lines for title, names in _PANELS.items() if (lines := {name: p for name in names if (p := self._points(name))})}
        if not panels:  # loss.csv was taken away from a run that is over
            return
        figure, grid = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
        for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
            for name, points in lines.items():
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linestyle="--" if "held_out" in name else "-")
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.legend()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]


def stopped_from_outside(reason: str) -> bool:
    """Whether what `pursue` or a StopRequest says is the name of a signal."""
    return reason.startswith("SIG")


class StopRequest:
    """Ctrl-C and SIGTERM are noted, not raised: the work ends after the step that is under way, so that what is saved is whole."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.reason = signal.Signals(number).name


def load_undisturbed(module: str, extra: str) -> None:
    """Import before the work what it will want, with Ctrl-C raised afterwards: the initialisation of a C library turns it into an ImportError."""
    with StopRequest() as stop:
        require(module, extra)
    if stop.reason:
        raise KeyboardInterrupt


def pursue(
    run: Run, log: Log, check: Callable[[], dict[str, float]], state: Path, minutes: float | None, check_every: int, save_minutes: float
) -> str:
    """Step until the run is done, its time is over or somebody stops it, and save `state`. Returns why it ended: "the last step" when done."""
    began_s = saved_s = time.monotonic()
    bar = require("tqdm", "sim").tqdm(total=run.options.steps, initial=run.steps_done, unit=" steps", mininterval=2)
    with bar, StopRequest() as stop:
        reason = None
        while reason is None:
            if run.done:
                reason = LAST_STEP
                break
            log.note(run.step())
            bar.update(1)
            taken = (time.monotonic() - began_s) / 60
            reason = stop.reason or (f"--minutes={minutes:g}" if minutes and taken >= minutes else None)
            if run.steps_done % check_every == 0 or run.done or reason:
                log.write_row(run.steps_done, check(), taken)
                bar.set_postfix({name: log.rows[-1][name] for name in _SHOWN if log.rows[-1][name]})
            if time.monotonic() - saved_s > 60 * save_minutes:
                run.save(state)
                saved_s = time.monotonic()
        run.save(state)
    return reason
