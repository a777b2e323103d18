"""Train the small GR00T N1.5 that reaches for the block of the simulated arm.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1
    python training/train.py --samples=outputs/reach/samples --held_out=outputs/reach/held_out --out=outputs/reach/run
    python training/reach.py --model_path=outputs/reach/run/checkpoint

Behaviour cloning with GR00T N1.5's flow-matching loss (flow.py), AdamW, cosine. The same command continues a run that was stopped, by Ctrl-C or by
--minutes, to the same bits. Leaves DIR/checkpoint (the published format), DIR/state.pt, DIR/loss.csv, DIR/loss.png; the last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from gr00t_fast.engine import select_device
from gr00t_fast.errors import ConfigError, Gr00tFastError
from gr00t_fast.measurement import git_commit, machine, versions
from gr00t_fast.optional import require
from training.data import TrainingSet
from training.samples import load_samples
from training.trainer import Options, Trainer

_COLUMNS = ("step", "flow", "finder", "gradient_norm", "rate", "held_out_flow", "held_out_finder", "action_error_deg", "minutes")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Log:
    """loss.csv: means since the last row, and the check on held-out samples. Rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path, self.rows, self._pending = path, [], []
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
        self.rows.append({name: f"{row[name]:.6g}" if name in row else "" for name in _COLUMNS})
        self._pending = []
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: Path) -> None:
        require("matplotlib", "plots").use("Agg")
        pyplot = require("matplotlib.pyplot", "plots")
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for axes, names in ((left, ("flow", "held_out_flow", "finder", "held_out_finder")), (right, ("action_error_deg",))):
            for name in names:
                points = [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linestyle="--" if "held_out" in name else "-")
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.legend()
        right.set_title("denoised actions against the expert's, held out")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


class StopRequest:
    """Ctrl-C and SIGTERM end the run after the step that is under way, so that what is saved is whole."""

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


def run(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_samples([arguments.samples]), options, select_device(arguments.device))
    state = out / "state.pt"
    if state.exists():
        trainer.load(state)
        print(f"continuing {out} at step {trainer.steps_done}", file=sys.stderr)
    held_out = TrainingSet.of(load_samples([arguments.held_out]), trainer.metadata, trainer.config.head.state_dim) if arguments.held_out else None
    log = Log(out / "loss.csv", trainer.steps_done)
    reason = _train(trainer, held_out, log, arguments, state)
    trainer.write_checkpoint(out / "checkpoint", _DTYPES[arguments.dtype])
    log.plot(out / "loss.png")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "run": "training",
        "stopped_by": reason,
        "steps": trainer.steps_done,
        "samples": len(trainer.data),
        "parameters": parameters,
        **log.rows[-1],
    }


def _train(trainer: Trainer, held_out: TrainingSet | None, log: Log, arguments: argparse.Namespace, state: Path) -> str:
    began_s = saved_s = time.monotonic()
    bar = require("tqdm", "sim").tqdm(total=trainer.options.steps, initial=trainer.steps_done, unit=" steps", mininterval=2)
    with bar, StopRequest() as stop:
        reason = None
        while reason is None:
            if trainer.done:
                reason = "the last step"
                break
            log.note(trainer.step())
            bar.update(1)
            minutes = (time.monotonic() - began_s) / 60
            reason = stop.reason or (f"--minutes={arguments.minutes:g}" if arguments.minutes and minutes >= arguments.minutes else None)
            if trainer.steps_done % arguments.check_every == 0 or trainer.done or reason:
                check = trainer.check(held_out) if held_out else {}
                log.write_row(trainer.steps_done, check, minutes)
                bar.set_postfix({name: log.rows[-1][name] for name in ("flow", "action_error_deg")})
            if time.monotonic() - saved_s > 60 * arguments.save_minutes:
                trainer.save(state)
                saved_s = time.monotonic()
        trainer.save(state)
    return reason


def main(argv: list[str] | None = None) -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="directory of samples, sub-directories included")
    parser.add_argument("--held_out", type=Path, help="directory of samples to check on")
    parser.add_argument("--out", type=Path, required=True, help="directory to create, or to continue")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="updates in the whole run; the learning rate falls over them")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command continues")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="observations per step")
    parser.add_argument("--draws", type=int, default=defaults.draws, help="noise and time drawn per observation")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=defaults.decay, help="weight decay of matrices")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; on a machine that has other work, two are slower than one")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the checkpoint's weights; training is in fp32")
    parser.add_argument("--check_every", type=int, default=100, help="steps between rows of loss.csv")
    parser.add_argument("--save_minutes", type=float, default=3.0, help="minutes between saved states")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if min(arguments.steps, arguments.batch, arguments.draws, arguments.check_every, arguments.threads) < 1 or arguments.seed < 0:
            raise ConfigError("--steps, --batch, --draws, --check_every and --threads must be at least 1, and --seed not negative.")
        options = Options(arguments.steps, arguments.batch, arguments.draws, arguments.rate, arguments.decay, arguments.seed)
        result = run(arguments, options)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = "python training/train.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    print(json.dumps({**result, "machine": machine(), "versions": versions(), "commit": git_commit(), "command": command}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
