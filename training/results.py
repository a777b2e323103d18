"""A training log as a table of sample efficiency and throughput.

    lerobot-train ... 2> train.log ; python training/results.py --log=train.log --out=results.md
    python training/results.py --log=outputs/reach/run/loss.csv --batch_size=64

Reads what lerobot-train 0.4.4 prints and the loss.csv of training/train.py. Writes Markdown: a summary, and rows of steps, samples, epochs, loss,
gradient norm, learning rate and seconds per step. The last line on the standard output is JSON.

lerobot prints numbers of 1000 and more rounded to whole thousands or millions (`step:2K` is anything from 1500 to 2499). Lines come every `log_freq`
steps, so the exact step is counted from the line before, and the batch size is the one that gives the samples that are printed for all lines, when
only one does. Where any line contradicts the count (one was lost), all rounded numbers stay rounded. They are marked.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib.program import check_counts, execute, figure, markdown_table
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import percentiles

# --- logs -----------------------------------------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"step:(?P<step>\S+) smpl:(?P<smpl>\S+) ep:(?P<ep>\S+) epch:(?P<epch>\S+) (?P<metrics>\S+:\S+(?: \w+:\S+)*)")
_NUMBER = re.compile(r"(-?\d+)([KMBTQ]?)")
_SUFFIXES = ("", "K", "M", "B", "T", "Q")
_NEEDED = ("loss", "grdn", "lr", "updt_s", "data_s")
_CSV_NEEDED = frozenset({"step", "flow", "gradient_norm", "rate", "minutes"})


@dataclass(frozen=True)
class Row:
    """Means since the row before. `exact`, `samples_exact`: not a rounded figure. None: not in this log."""

    step: int
    exact: bool
    samples: int | None
    samples_exact: bool
    epochs: float | None
    loss: float
    gradient_norm: float
    rate: float
    step_s: float
    update_s: float | None = None
    data_s: float | None = None


@dataclass(frozen=True)
class TrainingLog:
    """`program` wrote it; `batch` samples a step, over all processes; `frames` in the data set; `checkpoints`: steps after which one was saved."""

    program: str
    rows: tuple[Row, ...]
    batch: int | None
    frames: int | None
    checkpoints: tuple[int, ...]


def read_log(text: str, name: str, batch: int | None = None, frames: int | None = None) -> TrainingLog:
    """Either kind of log. `batch` and `frames` fill in what the log does not say; raises ConfigError when it says otherwise, or has no rows."""
    if text.lstrip().startswith("step,"):
        return TrainingLog("training/train.py", tuple(_csv_rows(text, name, batch, frames)), batch, frames, ())
    lines = [found for found in map(_LINE.search, re.split(r"[\r\n]+", text)) if found]  # tqdm's bar returns the carriage in front of lines
    if not lines:
        raise ConfigError(
            f"{name} has no line of lerobot-train such as 'step:200 smpl:2K ep:3 epch:0.10 loss:0.123 grdn:1.2 lr:1.0e-05 updt_s:0.1 data_s:0.0', "
            "and is no loss.csv of training/train.py. Give the standard error of lerobot-train (2> train.log), or DIR/loss.csv."
        )
    steps, sizes = _exact_steps(lines, _number_in(text, r"'log_freq': (\d+)"), name)
    batch = _batch_size(batch, _number_in(text, r"Effective batch size: .* = (\d+)"), sizes, name)
    frames = _agree("number of frames", frames, _number_in(text, r"dataset\.num_frames=(\d+)"), name)
    rows = tuple(_row(line, step, batch, frames, name) for line, step in zip(lines, steps, strict=True))
    checkpoints = re.findall(r"Checkpoint policy after step (\d+)", text)
    return TrainingLog("lerobot-train", rows, batch, frames, tuple(dict.fromkeys(map(int, checkpoints))))


def shown(number: int) -> str:
    """As lerobot prints it: 1500 -> 2K."""
    value = float(number)
    for suffix in _SUFFIXES:
        if abs(value) < 1000:
            return f"{value:.0f}{suffix}"
        value /= 1000
    return str(value)


def _value(text: str, name: str) -> int:
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name}: expected a number as lerobot prints it, such as 950 or 2K, got '{text}'. Is the line damaged?")
    return int(found[1]) * 1000 ** _SUFFIXES.index(found[2])


def _number_in(text: str, pattern: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _agree(what: str, given: int | None, told: int | None, name: str) -> int | None:
    if given is not None and told is not None and given != told:
        raise ConfigError(f"{name} says that the {what} was {told}, the flag says {given}. Leave the flag out.")
    return told if given is None else given


def _batch_size(given: int | None, told: int | None, fitting: set[int], name: str) -> int | None:
    """As given or told; else the only one that fits the lines, if there is one."""
    if told is None and given is not None and fitting and given not in fitting:
        sizes = str(min(fitting)) if len(fitting) == 1 else f"{min(fitting)} to {max(fitting)}"
        raise ConfigError(f"{name} cannot be of batch size {given}: its samples and steps fit {sizes}. Count the samples of all processes.")
    batch = _agree("batch size", given, told, name)
    return min(fitting) if batch is None and len(fitting) == 1 else batch


def _exact_steps(lines: Sequence[re.Match[str]], every: int | None, name: str) -> tuple[list[int | None], set[int]]:
    """The step of each line, None where only the rounded one is known, and the batch sizes that fit. Where the log has no `log_freq`, it is the
    distance of the first two full numbers."""
    printed = [int(line["step"]) if line["step"].isdigit() else None for line in lines]
    full = [step for step in printed if step is not None]
    every = every or (full[1] - full[0] if len(full) > 1 else full[0] if full else None)
    counted: list[int | None] = []
    for step in printed:
        counted.append(step if step is not None or not every or not counted or counted[-1] is None else counted[-1] + every)
    sizes = _fitting_sizes(lines, counted, name)
    if sizes == set() or any(step is not None and shown(step) != line["step"] for line, step in zip(lines, counted, strict=True)):
        counted, sizes = printed, _fitting_sizes(lines, printed, name)
    return counted, sizes or set()


def _fitting_sizes(lines: Sequence[re.Match[str]], steps: Sequence[int | None], name: str) -> set[int] | None:
    """Batch sizes with which lerobot would have printed these samples at these steps; None where no step is known."""
    known: Iterable[int] | None = None
    for line, step in zip(lines, steps, strict=True):
        if not step:
            continue
        if known is None:
            samples = _value(line["smpl"], name)
            off = 0 if line["smpl"].isdigit() else 1000 ** _SUFFIXES.index(line["smpl"][-1])  # more than rounding can be off
            known = range(max(1, (samples - off) // step), (samples + off) // step + 2)
        known = {size for size in known if shown(size * step) == line["smpl"]}
    return None if known is None else set(known)


def _row(line: re.Match[str], step: int | None, batch: int | None, frames: int | None, name: str) -> Row:
    metrics = dict(part.split(":", 1) for part in line["metrics"].split())
    if missing := [key for key in _NEEDED if key not in metrics]:
        raise ConfigError(f"{name}: the line '{line[0]}' lacks {', '.join(missing)}. Was the log cut, or written by another version than 0.4.4?")
    try:
        loss, norm, rate, update_s, data_s = (float(metrics[key]) for key in _NEEDED)
        logged_epochs = float(line["epch"])
    except ValueError as error:
        raise ConfigError(f"{name}: the line '{line[0]}' holds something that is no number ({error}).") from error
    counted = step * batch if batch and step is not None else None
    samples = counted if counted is not None and shown(counted) == line["smpl"] else _value(line["smpl"], name)
    samples_exact = samples == counted or line["smpl"].isdigit()
    epochs = samples / frames if frames else logged_epochs
    shown_step = _value(line["step"], name) if step is None else step
    return Row(shown_step, step is not None, samples, samples_exact, epochs, loss, norm, rate, update_s + data_s, update_s, data_s)


def _csv_rows(text: str, name: str, batch: int | None, frames: int | None) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text.lstrip()))
    if missing := sorted(_CSV_NEEDED.difference(reader.fieldnames or ())):
        raise ConfigError(f"{name} lacks the columns {', '.join(missing)} that training/train.py writes.")
    rows: list[Row] = []
    step_before, minutes_before = 0, 0.0
    try:
        for entry in reader:
            step, minutes = int(entry["step"]), float(entry["minutes"])
            step_s = 60 * (minutes - minutes_before) / max(step - step_before, 1)
            samples = step * batch if batch else None
            epochs = samples / frames if samples and frames else None
            rows.append(Row(step, True, samples, True, epochs, float(entry["flow"]), float(entry["gradient_norm"]), float(entry["rate"]), step_s))
            step_before, minutes_before = step, minutes
    except (ValueError, TypeError) as error:  # an empty or cut field
        raise ConfigError(f"{name} holds a row with something that is no number ({error}).") from error
    if not rows:
        raise ConfigError(f"{name} has no row yet; training/train.py writes one every --check_every steps.")
    return rows


# --- the report -----------------------------------------------------------------------------------------------------------------------------------

_TIMES = {
    "lerobot-train": "Seconds per step are updt_s (forward, backward, clipping, optimiser) plus data_s (waiting for the loader, preprocessor), "
    "means since the row before; saving and evaluation are not in them.",
    "training/train.py": "Seconds per step are wall time between rows, the check on held-out samples included. The loss is that of the flow.",
}
_SHARES = (0.5, 0.1, 0.01)  # of the first row's loss: how many samples until there


def summary(log: TrainingLog) -> dict[str, Any]:
    """Of the whole log, as JSON would have it: None for what the log does not say."""
    rows, last = log.rows, log.rows[-1]
    began = max(0, 2 * rows[0].step - rows[1].step) if len(rows) > 1 else 0  # of the first row's means; of a resumed run that is not 0
    seconds = sum(row.step_s * max(row.step - before, 0) for row, before in zip(rows, (began, *(row.step for row in rows)), strict=False))
    finite = [row.loss for row in rows if math.isfinite(row.loss)]
    return {
        "program": log.program,
        "steps": last.step,
        "steps_exact": last.exact,
        "samples_exact": last.samples_exact,
        "batch_size": log.batch,
        "samples": last.samples,
        "epochs": None if last.epochs is None else round(last.epochs, 3),
        "step_s": percentiles(row.step_s for row in rows),
        "samples_per_s": round((last.step - began) * log.batch / seconds, 3) if log.batch and seconds > 0 else None,
        "first_loss": _number(rows[0].loss),
        "last_loss": _number(last.loss),
        "lowest_loss": _number(min(finite)) if finite else None,
        "samples_until": {f"{share:g}": next((row.samples for row in rows if row.loss <= share * rows[0].loss), None) for share in _SHARES},
        "first_step_without_finite_loss": next((row.step for row in rows if not math.isfinite(row.loss)), None),
        "checkpoints": list(log.checkpoints),
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def as_markdown(log: TrainingLog, found: dict[str, Any], name: str, most_rows: int) -> str:
    """Summary and rows; at most `most_rows` of them, at equal distances, the first and the last among them."""
    times, rows = found["step_s"], log.rows
    if len(rows) > most_rows:
        rows = [rows[round(index * (len(rows) - 1) / (most_rows - 1))] for index in range(most_rows)]
    columns = ("step", "samples", "epochs", "loss", "gradient norm", "learning rate", "updt_s", "data_s", "s per step", "samples per s")
    facts = _facts(found) | {"seconds per step": f"p50 {times['p50']:.3f}, p95 {times['p95']:.3f} over {times['count']} rows"}
    notes = [_TIMES[log.program]]
    if not all(row.exact and row.samples_exact for row in log.rows):
        notes.append("~: lerobot printed this number rounded to whole thousands or millions, and it could not be counted from the rows before.")
    if len(log.rows) > most_rows:
        notes.append(f"{most_rows} of {len(log.rows)} rows are shown; the summary is of all.")
    tables = [markdown_table(("", ""), list(facts.items()), 2), markdown_table(columns, [_table_row(row, log.batch) for row in rows], 0)]
    return "\n\n".join([f"# Training: {name}", f"By {log.program}.", *tables, "\n".join(notes)]) + "\n"


def _facts(found: dict[str, Any]) -> dict[str, str]:
    until = "; ".join(f"{float(share):.0%}: {'not reached' if count is None else count}" for share, count in found["samples_until"].items())
    facts = {
        "steps": f"{_about(found['steps_exact'])}{found['steps']}",
        "batch size": figure(found["batch_size"], 0),
        "samples": _about(found["samples_exact"]) + figure(found["samples"], 0),
        "epochs": figure(found["epochs"], 3),
        "samples per second": figure(found["samples_per_s"], 3),
        "loss, first to last row (lowest)": f"{found['first_loss']} to {found['last_loss']} ({found['lowest_loss']})",
        "checkpoints saved after step": ", ".join(map(str, found["checkpoints"])) or "none named in this log",
    }
    if found["samples"] is not None:
        facts["samples until the loss was this share of the first row's"] = until
    if found["first_step_without_finite_loss"] is not None:
        facts["WARNING"] = f"the loss is not finite at step {found['first_step_without_finite_loss']}"
    return facts


def _about(exact: bool) -> str:
    return "" if exact else "~"


def _table_row(row: Row, batch: int | None) -> list[str]:
    speed = batch / row.step_s if batch and row.step_s > 0 else None
    counts = [f"{_about(row.exact)}{row.step}", _about(row.samples_exact) + figure(row.samples, 0), figure(row.epochs, 3)]
    times = [figure(value, 3) for value in (row.update_s, row.data_s, row.step_s)]
    return [*counts, f"{row.loss:.4g}", f"{row.gradient_norm:.4g}", f"{row.rate:.3g}", *times, figure(speed)]


# --- the program ----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class ResultsConfig:
    log: Path  # standard error of lerobot-train, or loss.csv of training/train.py
    out: Path = Path("results.md")  # Markdown file to write
    batch_size: int | None = None  # samples per step over all processes, where the log does not say it
    dataset_frames: int | None = None  # frames or samples in the data set, for epochs, where the log does not say it
    rows: int = 40  # most rows in the table


def run(config: ResultsConfig) -> dict[str, Any]:
    check_counts(config, "batch_size", "dataset_frames")
    check_counts(config, "rows", least=2)
    try:
        text = config.log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {config.log}: {error.strerror or error}. Give the log of lerobot-train, or loss.csv.") from error
    log = read_log(text, config.log.name, config.batch_size, config.dataset_frames)
    found = summary(log)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(as_markdown(log, found, config.log.name, config.rows), encoding="utf-8")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    def tell(config: ResultsConfig, found: dict[str, Any]) -> None:
        print(config.out.read_text(encoding="utf-8"))
        print(json.dumps({"results": config.out.name, **found}))

    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words[:1] = ["--log", words[0]]  # the former spelling
    return execute(ResultsConfig, run, tell, words, __doc__, "interrupted: nothing written")


if __name__ == "__main__":
    sys.exit(main())
