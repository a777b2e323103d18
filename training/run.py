"""One training run, whatever the network: updates, learning rate, epochs, what a resumed run must find again; progress, loss.csv, limits, Ctrl-C.

All randomness of a step comes from (seed, step), so a run that is stopped and continued does bit for bit what one in a piece does.
"""

from __future__ import annotations

import csv
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lib.program import check_counts, drawing
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import atomic_write

# --- updates ------------------------------------------------------------------------------------------------------------------------------------

_WARM_UP_STEPS = 100
_FINAL_RATE = 0.01  # of the peak
_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_STEP_SEEDS = 1_000_003  # steps never share a generator's seed with those of the next --seed


@dataclass(frozen=True)
class Options:
    """What decides a run; a resumed one must have the same."""

    steps: int = 4000
    batch: int = 64
    draws: int = 2  # of noise and time per observation
    rate: float = 1.5e-3
    decay: float = 0.01
    seed: int = 0


class Run(ABC):
    """`step` until `done`; `save` and `load` carry a run over. A subclass says what the losses of some rows of its samples are.

    Raises ConfigError for samples or a state that do not fit.
    """

    def __init__(self, modules: dict[str, nn.Module], samples: int, options: Options, device: torch.device) -> None:
        if samples < options.batch:
            raise ConfigError(f"{samples} samples are fewer than a batch of {options.batch}. Make more of them, or lower --batch_size.")
        self.modules, self.samples, self.options, self.device, self.steps_done = modules, samples, options, device, 0
        matrices = [p for p in self._parameters() if p.dim() > 1]
        vectors = [p for p in self._parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=_BETAS)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @abstractmethod
    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        """Name -> loss of the samples `rows`, and its weight in the sum."""

    @property
    def done(self) -> bool:
        return self.steps_done >= self.options.steps

    def step(self) -> dict[str, float]:
        """One update; the losses before it."""
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.options.seed * _STEP_SEEDS + self.steps_done)
        losses = self.losses(self._rows(), generator)
        self.optimiser.zero_grad(set_to_none=True)
        sum(weight * loss for loss, weight in losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), _CLIP_NORM)
        self.optimiser.step()
        self.steps_done += 1
        return {**{name: loss.item() for name, (loss, _) in losses.items()}, "gradient_norm": float(norm), "rate": rate}

    def save(self, path: Path) -> None:
        state = {
            "options": asdict(self.options),
            "samples": self.samples,
            "steps_done": self.steps_done,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_write(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ConfigError when it is of other options or samples."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        told, here = {**state["options"], "samples": state["samples"]}, {**asdict(self.options), "samples": self.samples}
        if told != here:
            different = ", ".join(f"{name} {told[name]} there, {here[name]} here" for name in here if told.get(name) != here[name])
            raise ConfigError(f"{path} is of another run ({different}). Give the same options, or another --out.")
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done = state["steps_done"]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to one per cent."""
        options, step = self.options, self.steps_done
        warm_up = min(1.0, (step + 1) / min(_WARM_UP_STEPS, max(1, options.steps // 10)))
        cosine = (1 + math.cos(math.pi * step / options.steps)) / 2
        return options.rate * warm_up * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _rows(self) -> np.ndarray:
        """Of this step. Each epoch is a permutation of the samples; what does not fill a batch is left to the next epoch."""
        size, seed = self.options.batch, self.options.seed
        epoch, place = divmod(self.steps_done, self.samples // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, epoch]).permutation(self.samples)
        return np.sort(self._order[place * size : (place + 1) * size])


# --- the run as a program sees it ---------------------------------------------------------------------------------------------------------------

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
        panels = {title: lines for title, names in _PANELS.items() if (lines := {name: p for name in names if (p := self._points(name))})}
        if not panels:  # loss.csv was taken away from a run that is over
            return
        with drawing(path, path.parent.name, 1, len(panels), (5 * len(panels), 3.6)) as grid:
            for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
                for name, points in lines.items():
                    axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linestyle="--" if "held_out" in name else "-")
                axes.set_title(title)
                axes.set_xlabel("step")
                axes.set_yscale("log")
                axes.legend()

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]


@dataclass(kw_only=True)
class TrainingConfig:
    out: Path  # directory to create, or to continue
    steps: int = Options.steps  # updates in the whole run; the learning rate falls over them
    max_minutes: float | None = None  # end training after so long; the same command continues
    batch_size: int = Options.batch  # observations per step
    learning_rate: float = Options.rate  # the highest one
    weight_decay: float = Options.decay  # of matrices
    seed: int = 0  # of first weights, batches and noise
    threads: int = 1  # of a CPU; on a machine that has other work, two are slower than one
    check_every: int = 100  # steps between rows of loss.csv
    save_minutes: float = 3.0  # minutes between saved states

    def options(self, draws: int) -> Options:
        """Checked. Raises UsageError."""
        check_counts(self, "steps", "batch_size", "threads", "check_every")
        check_counts(self, "seed", "learning_rate", "weight_decay", "save_minutes", least=0)
        return Options(self.steps, self.batch_size, draws, self.learning_rate, self.weight_decay, self.seed)


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


def pursue(run: Run, config: TrainingConfig, columns: Sequence[str], check: Callable[[], dict[str, float]]) -> tuple[str, Log]:
    """Go on from DIR/state.pt where there is one; step until the run is done, its time is over or somebody stops it; save. `columns`: of loss.csv,
    beside step and minutes. Returns why it ended (LAST_STEP when done), and the log."""
    state = config.out / "state.pt"
    if state.exists():
        run.load(state)
        print(f"continuing {config.out} at step {run.steps_done}", file=sys.stderr)
    log = Log(config.out / "loss.csv", run.steps_done, columns)
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
            reason = stop.reason or (f"--max_minutes={config.max_minutes:g}" if config.max_minutes and taken >= config.max_minutes else None)
            if run.steps_done % config.check_every == 0 or run.done or reason:
                log.write_row(run.steps_done, check(), taken)
                bar.set_postfix({name: log.rows[-1][name] for name in _SHOWN if log.rows[-1][name]})
            if time.monotonic() - saved_s > 60 * config.save_minutes:
                run.save(state)
                saved_s = time.monotonic()
        run.save(state)
    if stopped_from_outside(reason):
        print(f"stopped by {reason} at step {run.steps_done} of {run.options.steps}; the same command goes on from there", file=sys.stderr)
    return reason, log
