"""Training logs as rows of one kind: what lerobot-train 0.4.4 prints, and loss.csv of training/train.py.

lerobot prints numbers of 1000 and more rounded to whole thousands or millions (`step:2K` is anything from 1500 to 2499). Lines come every `log_freq`
steps, so the exact step is counted from the line before, and taken only where rounding it gives the step AND the samples that are printed: a lost
line shows there first. The batch size is the one that gives what is printed for all these lines, when only one does. What stays rounded is marked.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gr00t_fast.errors import ConfigError

_LINE = re.compile(r"step:(?P<step>\S+) smpl:(?P<smpl>\S+) ep:(?P<ep>\S+) epch:(?P<epch>\S+) (?P<metrics>\S+:\S+(?: \w+:\S+)*)")
_NUMBER = re.compile(r"(-?\d+)([KMBTQ]?)")
_SUFFIXES = ("", "K", "M", "B", "T", "Q")
_CHECKPOINT = re.compile(r"Checkpoint policy after step (\d+)")
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
        return _of_csv(text, name, batch, frames)
    lines = [found for found in map(_LINE.search, re.split(r"[\r\n]+", text)) if found]  # tqdm's bar returns the carriage in front of lines
    if not lines:
        raise ConfigError(
            f"{name} has no line of lerobot-train such as 'step:200 smpl:2K ep:3 epch:0.10 loss:0.123 grdn:1.2 lr:1.0e-05 updt_s:0.1 data_s:0.0', "
            "and is no loss.csv of training/train.py. Give the standard error of lerobot-train (2> train.log), or DIR/loss.csv."
        )
    steps, sizes = _exact_steps(lines, _number_in(text, r"'log_freq': (\d+)"), name)
    batch = _batch_size(batch, _number_in(text, r"Effective batch size: .* = (\d+)"), sizes, name)
    frames = _agree("number of frames", frames, _number_in(text, r"dataset\.num_frames=(\d+)"), name)
    rows = tuple(_row(line, step, exact, batch, frames, name) for line, (step, exact) in zip(lines, steps, strict=True))
    return TrainingLog("lerobot-train", rows, batch, frames, tuple(dict.fromkeys(map(int, _CHECKPOINT.findall(text)))))


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
        raise ConfigError(f"{name} cannot be of batch size {given}: its samples and steps fit {_range(fitting)}. Count the samples of all processes.")
    batch = _agree("batch size", given, told, name)
    return min(fitting) if batch is None and len(fitting) == 1 else batch


def _range(sizes: set[int]) -> str:
    return str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


Sizes = set[int] | None  # batch sizes that are possible; None: nothing is known yet


def _fitting_sizes(line: re.Match[str], step: int, known: Sizes, name: str) -> set[int]:
    """The batch sizes, of those known, with which lerobot would have printed these samples at this step."""
    if known is None:
        samples = _value(line["smpl"], name)
        off = 0 if line["smpl"].isdigit() else 1000 ** _SUFFIXES.index(line["smpl"][-1])  # more than rounding can be off
        known = set(range(max(1, (samples - off) // step), (samples + off) // step + 2))
    return {size for size in known if shown(size * step) == line["smpl"]}


def _exact_steps(lines: list[re.Match[str]], every: int | None, name: str) -> tuple[list[tuple[int, bool]], set[int]]:
    """(step, exact) per line, and the batch sizes that fit the exact ones. Without `log_freq` in the log, the distance of the first two full numbers
    tells it."""
    full = [int(line["step"]) for line in lines if line["step"].isdigit()]
    every = every or (full[1] - full[0] if len(full) > 1 else full[0] if full else None)
    found: list[tuple[int, bool]] = []
    sizes: Sizes = None
    for number, line in enumerate(lines):
        counted = found[-1][0] + every if found and found[-1][1] and every else None
        if line["step"].isdigit():
            found.append((int(line["step"]), True))
            sizes = _fitting_sizes(line, found[-1][0], sizes, name) if found[-1][0] else sizes
        elif counted is not None and shown(counted) == line["step"] and (fitting := _fitting_sizes(line, counted, sizes, name)):
            found.append((counted, True))
            sizes = fitting
        else:
            if counted is not None:  # a line was lost, perhaps before lines whose rounded figures could not show it
                _doubt(found, lines[:number], every, sizes, name)
            found.append((_value(line["step"], name), False))
    return found, sizes or set()


def _doubt(found: list[tuple[int, bool]], lines: list[re.Match[str]], every: int, sizes: Sizes, name: str) -> None:
    """Takes back, from the end, the steps that would fit their lines as well with a line lost before them."""
    for number in range(len(found) - 1, -1, -1):
        line, later = lines[number], found[number][0] + every
        if line["step"].isdigit() or not (shown(later) == line["step"] and _fitting_sizes(line, later, sizes, name)):
            return
        found[number] = (_value(line["step"], name), False)


def _row(line: re.Match[str], step: int, exact: bool, batch: int | None, frames: int | None, name: str) -> Row:
    metrics = dict(part.split(":", 1) for part in line["metrics"].split())
    if missing := [key for key in _NEEDED if key not in metrics]:
        raise ConfigError(f"{name}: the line '{line[0]}' lacks {', '.join(missing)}. Was the log cut, or written by another version than 0.4.4?")
    try:
        value = {key: float(metrics[key]) for key in _NEEDED}
        logged_epochs = float(line["epch"])
    except ValueError as error:
        raise ConfigError(f"{name}: the line '{line[0]}' holds something that is no number ({error}).") from error
    counted = step * batch if batch and exact else None
    samples = counted if counted is not None and shown(counted) == line["smpl"] else _value(line["smpl"], name)
    samples_exact = samples == counted or line["smpl"].isdigit()
    epochs = samples / frames if frames else logged_epochs
    step_s = value["updt_s"] + value["data_s"]
    return Row(step, exact, samples, samples_exact, epochs, value["loss"], value["grdn"], value["lr"], step_s, value["updt_s"], value["data_s"])


def _of_csv(text: str, name: str, batch: int | None, frames: int | None) -> TrainingLog:
    reader = csv.DictReader(io.StringIO(text.lstrip()))
    if missing := sorted(_CSV_NEEDED.difference(reader.fieldnames or ())):
        raise ConfigError(f"{name} lacks the columns {', '.join(missing)} that training/train.py writes.")
    try:
        rows = tuple(_csv_rows(reader, batch, frames))
    except (ValueError, TypeError) as error:  # an empty or cut field
        raise ConfigError(f"{name} holds a row with something that is no number ({error}).") from error
    if not rows:
        raise ConfigError(f"{name} has no row yet; training/train.py writes one every --check_every steps.")
    return TrainingLog("training/train.py", rows, batch, frames, ())


def _csv_rows(entries: Iterable[dict[str, str]], batch: int | None, frames: int | None) -> Iterable[Row]:
    step_before, minutes_before = 0, 0.0
    for entry in entries:
        step, minutes = int(entry["step"]), float(entry["minutes"])
        step_s = 60 * (minutes - minutes_before) / max(step - step_before, 1)
        samples = step * batch if batch else None
        epochs = samples / frames if samples and frames else None
        yield Row(step, True, samples, True, epochs, float(entry["flow"]), float(entry["gradient_norm"]), float(entry["rate"]), step_s)
        step_before, minutes_before = step, minutes
