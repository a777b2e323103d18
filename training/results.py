"""A training log as a table of sample efficiency and throughput.

    lerobot-train ... 2> train.log ; python training/results.py train.log --out=results.md
    python training/results.py outputs/reach/run/loss.csv --batch_size=64

Reads what lerobot-train 0.4.4 prints and the loss.csv of training/train.py (training/training_log.py). Writes Markdown: a summary, and rows of steps,
samples, epochs, loss, gradient norm, learning rate and seconds per step. The last line on the standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from gr00t_fast.errors import ConfigError, attempt
from gr00t_fast.measurement import percentiles
from training.training_log import Row, TrainingLog, read_log

_TIMES = {
    "lerobot-train": "Seconds per step are updt_s (forward, backward, clipping, optimiser) plus data_s (waiting for the loader, preprocessor), "
    "means since the row before; saving and evaluation are not in them.",
    "training/train.py": "Seconds per step are wall time between rows, the check on held-out samples included. The loss is that of the flow.",
}
_COLUMNS = ("step", "samples", "epochs", "loss", "gradient norm", "learning rate", "updt_s", "data_s", "s per step", "samples per s")
_SHARES = (0.5, 0.1, 0.01)  # of the first row's loss: how many samples until there


def summary(log: TrainingLog) -> dict[str, Any]:
    """Of the whole log, as JSON would have it: None for what the log does not say."""
    last, seconds = log.rows[-1], _seconds(log.rows)
    steps = last.step - _first_step_before(log.rows)
    finite = [row.loss for row in log.rows if math.isfinite(row.loss)]
    return {
        "program": log.program,
        "steps": last.step,
        "steps_exact": last.exact,
        "samples_exact": last.samples_exact,
        "batch_size": log.batch,
        "samples": last.samples,
        "epochs": None if last.epochs is None else round(last.epochs, 3),
        "step_s": percentiles(row.step_s for row in log.rows),
        "samples_per_s": round(steps * log.batch / seconds, 3) if log.batch and seconds > 0 else None,
        "first_loss": _number(log.rows[0].loss),
        "last_loss": _number(last.loss),
        "lowest_loss": _number(min(finite)) if finite else None,
        "samples_until": {f"{share:g}": _samples_until(log.rows, share) for share in _SHARES},
        "first_step_without_finite_loss": next((row.step for row in log.rows if not math.isfinite(row.loss)), None),
        "checkpoints": list(log.checkpoints),
    }


def _first_step_before(rows: tuple[Row, ...]) -> int:
    """The step at which the first row's window began; of a resumed run that is not 0. Windows are equally long."""
    return max(0, 2 * rows[0].step - rows[1].step) if len(rows) > 1 else 0


def _seconds(rows: tuple[Row, ...]) -> float:
    before, total = _first_step_before(rows), 0.0
    for row in rows:
        total += row.step_s * max(row.step - before, 0)
        before = row.step
    return total


def _samples_until(rows: tuple[Row, ...], share: float) -> int | None:
    return next((row.samples for row in rows if row.loss <= share * rows[0].loss), None)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def as_markdown(log: TrainingLog, told: dict[str, Any], name: str, most_rows: int) -> str:
    times = told["step_s"]
    lines = [f"# Training: {name}", "", f"By {log.program}.", "", "| | |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in _facts(told).items()]
    lines.append(f"| seconds per step | p50 {times['p50']:.3f}, p95 {times['p95']:.3f} over {times['count']} rows |")
    lines += ["", "| " + " | ".join(_COLUMNS) + " |", "|" + "---:|" * len(_COLUMNS)]
    lines += [_table_row(row, log.batch) for row in _thinned(log.rows, most_rows)]
    notes = [_TIMES[log.program]]
    if not all(row.exact and row.samples_exact for row in log.rows):
        notes.append("~: lerobot printed this number rounded to whole thousands or millions, and it could not be counted from the rows before.")
    if len(log.rows) > most_rows:
        notes.append(f"{most_rows} of {len(log.rows)} rows are shown; the summary is of all.")
    return "\n".join([*lines, "", *notes, ""])


def _facts(told: dict[str, Any]) -> dict[str, str]:
    until = "; ".join(f"{float(share):.0%}: {'not reached' if count is None else count}" for share, count in told["samples_until"].items())
    checkpoints = ", ".join(map(str, told["checkpoints"])) or "none named in this log"
    facts = {
        "steps": f"{_about(told['steps_exact'])}{told['steps']}",
        "batch size": _or_dash(told["batch_size"]),
        "samples": _about(told["samples_exact"]) + _or_dash(told["samples"]),
        "epochs": _or_dash(told["epochs"]),
        "samples per second": _or_dash(told["samples_per_s"]),
        "loss, first to last row (lowest)": f"{told['first_loss']} to {told['last_loss']} ({told['lowest_loss']})",
        "checkpoints saved after step": checkpoints,
    }
    if told["samples"] is not None:
        facts["samples until the loss was this share of the first row's"] = until
    if told["first_step_without_finite_loss"] is not None:
        facts["WARNING"] = f"the loss is not finite at step {told['first_step_without_finite_loss']}"
    return facts


def _about(exact: bool) -> str:
    return "" if exact else "~"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value}"


def _table_row(row: Row, batch: int | None) -> str:
    speed = f"{batch / row.step_s:.2f}" if batch and row.step_s > 0 else "-"
    counts = [f"{_about(row.exact)}{row.step}", _about(row.samples_exact) + _or_dash(row.samples), "-" if row.epochs is None else f"{row.epochs:.3f}"]
    times = ["-" if value is None else f"{value:.3f}" for value in (row.update_s, row.data_s, row.step_s)]
    return "| " + " | ".join([*counts, f"{row.loss:.4g}", f"{row.gradient_norm:.4g}", f"{row.rate:.3g}", *times, speed]) + " |"


def _thinned(rows: tuple[Row, ...], most: int) -> list[Row]:
    """At most `most` rows at equal distances, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    for flag in ("batch_size", "dataset_frames"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {value}.")
    if arguments.rows < 2:
        raise ConfigError(f"--rows must be at least 2, got {arguments.rows}.")
    try:
        text = arguments.log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {arguments.log}: {error.strerror or error}. Give the log of lerobot-train, or loss.csv.") from error
    log = read_log(text, arguments.log.name, arguments.batch_size, arguments.dataset_frames)
    told = summary(log)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(as_markdown(log, told, arguments.log.name, arguments.rows), encoding="utf-8")
    return told


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("log", type=Path, metavar="LOG", help="standard error of lerobot-train, or loss.csv of training/train.py")
    parser.add_argument("--out", type=Path, default=Path("results.md"), help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, help="samples per step over all processes, where the log does not say it")
    parser.add_argument("--dataset_frames", type=int, help="frames or samples in the data set, for epochs, where the log does not say it")
    parser.add_argument("--rows", type=int, default=40, help="most rows in the table (default: %(default)s)")
    arguments = parser.parse_args(argv)
    told, code = attempt(lambda: run(arguments), "interrupted: nothing written")
    if told is not None:
        print(arguments.out.read_text(encoding="utf-8"))
        print(json.dumps({"results": arguments.out.name, **told}))
    return code


if __name__ == "__main__":
    sys.exit(main())
