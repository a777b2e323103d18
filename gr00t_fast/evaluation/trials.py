"""Trials that tell whether setting A is better than B: their order, what is kept of them, and what may be said at the end.

study.json holds both settings, the seed of the order and how each trial ended. Until the end, the report of a trial alone says which one it played.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Robot
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import atomic_write, read_json
from gr00t_fast.base.keyboard import ENTER, LEFT
from gr00t_fast.base.measurement import provenance, wilson_interval, without_machine_paths
from gr00t_fast.evaluation.compare import differences, read_run, seam_jerk
from gr00t_fast.record.report import Section, as_plain_page, cell, flat, new_figure, png_of, text_of, without_secrets, write_files
from gr00t_fast.record.session import Session

SCHEMA, VERSION, FILE = "gr00t_fast.trials", 1, "study.json"
CUT_OFF, STOPPED, LEFT_OUT, NOT_JUDGED = "cut off", "stopped", "left out by a person", "not judged"  # reasons not to count a trial
KEYS_HELP = "keys: s success, f failure, right arrow ends the trial, left arrow leaves it out, space pauses, Esc ends the study"
_FEW = 10  # trials of a setting below which a rate says little
_RESAMPLES = 4000
_MEANS = {"time_s": "time to success (s)", "seam_jerk": "jerk at seams (units/s^3)", "underruns": "ticks without an action (%)"}


def newcombe_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the rate of `first` minus that of `second`, each (successes, trials): Newcombe's hybrid score interval (Statistics in Medicine
    17, 1998, 873-890, method 10)."""
    (low, high), (other_low, other_high) = wilson_interval(*first), wilson_interval(*second)
    rate, other = first[0] / first[1], second[0] / second[1]
    return rate - other - math.hypot(rate - low, other_high - other), rate - other + math.hypot(high - rate, other - other_low)


def trials_needed(rate: float, other: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """How many of each setting, for a test of two proportions that finds this difference (Fleiss, Statistical Methods for Rates and Proportions,
    1981, without continuity correction). None where there is no difference."""
    if rate == other:
        return None
    mean, normal = (rate + other) / 2, NormalDist()
    chance = normal.inv_cdf(1 - alpha / 2) * math.sqrt(2 * mean * (1 - mean))
    effect = normal.inv_cdf(power) * math.sqrt(rate * (1 - rate) + other * (1 - other))
    return math.ceil(((chance + effect) / (rate - other)) ** 2)


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """With its 95 % interval from two values on: percentile bootstrap (Efron 1979), the same resamples for the same number of values."""
    found: dict[str, Any] = {"count": len(values), "mean": round(float(np.mean(values)), 3) if values else None, "bootstrap_95": None}
    if len(values) > 1:
        picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
        found["bootstrap_95"] = np.percentile(np.asarray(values)[picks].mean(axis=1), (2.5, 97.5)).round(3).tolist()
    return found


def order_of(runs: int, names: Sequence[str], seed: int) -> list[str]:
    """Which setting each trial plays: `runs` of each, in blocks of two of each, shuffled within the block; an odd last block has one of each."""
    rng = np.random.default_rng(seed)
    sizes = [2] * (runs // 2) + [1] * (runs % 2)
    return [str(name) for size in sizes for name in rng.permutation(list(names) * size)]


@dataclass
class Trial:
    """number: its place in the order. time_s: from the episode's begin to success, where the moment is known. excluded: why it does not count;
    written before it begins, so that one that ends with its program is seen."""

    number: int
    directory: str
    success: bool | None = None
    time_s: float | None = None
    excluded: str = CUT_OFF


class TrialSession(Session):
    """The one episode of a trial: success or failure ends it, as a person's key says or an arm that can tell; nothing is played twice."""

    def __init__(self, *arguments: Any, robot: Robot, on_begin: Callable[[], None], **options: Any) -> None:
        """As `Session`. on_begin: called when the episode begins."""
        super().__init__(*arguments, **options)
        self._robot, self._on_begin, self._began_s = robot, on_begin, math.inf
        self.success: bool | None = None
        self.time_s: float | None = None
        self.begun = self.left_out = False

    @property
    def stopped(self) -> bool:
        """Whether somebody has ended the run."""
        return self._stop.reason is not None

    @property
    def excluded(self) -> str:
        """Why the trial does not count, as far as that is known when the run is over; empty: it does."""
        whole = self._outcome.get("ended_by") in ("a key", "the time limit")
        return LEFT_OUT if self.left_out else "" if whole else STOPPED

    def begin(self, instruction: str) -> None:
        super().begin(instruction)
        self._on_begin()
        self.begun, self._began_s = True, self._now_s()

    def poll(self) -> None:
        super().poll()
        if self._playing and self.success is None and self._robot.success:
            self._judge(True)

    def end(self, ended_by: str, solved: bool | None) -> None:
        if self._playing and self.success is None:
            self.success = solved
        super().end(ended_by, solved)

    def _pressed(self, key: str) -> None:
        if key in ("t", ENTER):  # trials keep their instruction
            return
        if key == LEFT and not self._settled:
            self.over, self.left_out = self._playing, True
            self._echo("this trial is left out")
            return
        super()._pressed(key)
        if key in ("s", "f") and not self._settled:
            self._judge(key == "s")

    def _instruct(self, text: str) -> None:
        """Trials keep their instruction."""

    def _judge(self, success: bool) -> None:
        """May be called again, also while the arm is put down."""
        if self._playing:
            self.over, self.time_s = True, self._now_s() - self._began_s
        self.success = success


class Study:
    """DIRECTORY/study.json, and a directory of each trial beside it."""

    def __init__(self, directory: Path, conditions: Mapping[str, Any], order_seed: int | None, resume: bool) -> None:
        """A new study, or with `resume` the one that is there. conditions, JSON-ready: `flags` and `settings` by name of the setting, the number of
        `runs`, and what else must not change. order_seed: None: draw one. Raises ConfigError for a study that is not expected, not there, or another.
        """
        self.directory, self.conditions, self._file = directory, conditions, directory / FILE
        self.order_seed = int(np.random.SeedSequence().generate_state(1)[0]) if order_seed is None else order_seed
        self.trials: list[Trial] = []
        if resume:
            self._read(order_seed)
        elif self._file.exists():
            raise ConfigError(f"{self._file} is of an earlier study. Go on with it (--resume), or choose another --out.")
        self.names = list(conditions["flags"])
        self.order = order_of(conditions["runs"], self.names, self.order_seed)

    def _read(self, order_seed: int | None) -> None:
        try:
            found = read_json(self._file)
            if (found["schema"], found["schema_version"]) != (SCHEMA, VERSION):
                raise ValueError(f"it is {found['schema']} {found['schema_version']}, not {SCHEMA} {VERSION}")
            self.trials, self.order_seed, earlier = [Trial(**row) for row in found["trials"]], int(found["order_seed"]), flat(found["conditions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"--resume: {self._file} cannot be read ({type(error).__name__}: {error})."
            raise ConfigError(f"{what} Name the --out of a study, or leave --resume out to begin one.") from error
        now = flat(self.conditions) | {"order_seed": self.order_seed if order_seed is None else order_seed}
        if changed := differences(earlier | {"order_seed": self.order_seed}, now):
            what = "; ".join(f"{name}: {before} there, {asked} now" for name, (before, asked) in changed.items())
            raise ConfigError(f"--resume: {self.directory} holds another study. {what}. Give its flags again, or choose another --out.")

    @property
    def left(self) -> list[int]:
        """Places in the order whose trial has yet to be played, or did not count."""
        counted = {trial.number for trial in self.trials if not trial.excluded}
        return [number for number in range(len(self.order)) if number not in counted]

    def trial(self, number: int) -> Trial:
        """A new one, not yet begun, with a directory of its own."""
        again = sum(trial.number == number for trial in self.trials)
        return Trial(number, f"trial_{number + 1:02d}" + (f"_{again + 1}" if again else ""))

    def begin(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.write()

    def write(self, **more: Any) -> None:
        """Raises OSError."""
        told = {"schema": SCHEMA, "schema_version": VERSION, "conditions": self.conditions, "order_seed": self.order_seed}
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps({**told, "trials": [asdict(trial) for trial in self.trials], **more}, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> dict[str, Any]:
        """The result, JSON-ready, when all has been played; also written, with the order, as study.json, .txt, .html and .png."""
        result = {"flags": self.conditions["flags"], **self._result()}
        self.write(result=result, order=self.order, **{**provenance(), "command_line": without_machine_paths(without_secrets(sys.argv))})
        found, picture, title = sections(result), png_of(_figure(result)), verdict(result)
        page = as_plain_page(title, found, [("rates and their 95 % intervals", picture)])
        text = f"{text_of(found)}\n{title}\n"
        write_files(self.directory, [("study.txt", text.encode()), ("study.html", page.encode()), ("study.png", picture)])
        return result

    def _result(self) -> dict[str, Any]:
        found, difference = {name: self._figures(name) for name in self.names}, None
        rates = [(row["successes"], row["trials"]) for row in found.values()]
        if len(rates) == 2 and all(trials for _, trials in rates):
            rate, other = (successes / trials for successes, trials in rates)
            low, high, needed = *newcombe_interval(rates[0], rates[1]), trials_needed(rate, other)
            more = None if needed is None else max(0, needed - min(trials for _, trials in rates))
            difference = {"rate": round(rate - other, 4), "newcombe_95": [round(low, 4), round(high, 4)], "more_trials_each": more}
        few = [f"{name.upper()} has {row['trials']}" for name, row in found.items() if row["trials"] < _FEW]
        warnings = [f"fewer than {_FEW} trials that count say little: {', '.join(few)}."] if few else []
        return {"settings": found, "difference": difference, "warnings": warnings}

    def _figures(self, name: str) -> dict[str, Any]:
        of_it = [trial for trial in self.trials if self.order[trial.number] == name]
        counted = [trial for trial in of_it if not trial.excluded]
        runs, solved = [read_run(self.directory / trial.directory) for trial in counted], sum(bool(trial.success) for trial in counted)
        waited = [(run.report["pacing"]["waiting_for_inference_ticks"], run.report["run"]["ticks"]) for run in runs]
        return {
            "trials": len(counted),
            "successes": solved,
            "rate": round(solved / len(counted), 4) if counted else None,
            "wilson_95": [round(bound, 4) for bound in wilson_interval(solved, len(counted))] if counted else None,
            "time_s": mean_of([trial.time_s for trial in counted if trial.success and trial.time_s is not None]),
            "seam_jerk": mean_of([jerk for run in runs if (jerk := seam_jerk(run)) is not None]),
            "underruns": mean_of([100 * waiting / max(1, waiting + ticks) for waiting, ticks in waited]),
            "excluded": dict(Counter(trial.excluded for trial in of_it if trial.excluded)),
        }


def sections(result: Mapping[str, Any]) -> list[Section]:
    """For people, of a result as `Study.finish` makes it."""
    found, difference, columns = result["settings"], result["difference"], [name.upper() for name in result["settings"]]
    rows = [("success", *map(_rate, found.values())), *((words, *(_mean(row[key]) for row in found.values())) for key, words in _MEANS.items())]
    reasons = dict.fromkeys(reason for row in found.values() for reason in row["excluded"])
    left_out = [(reason, *(row["excluded"].get(reason, 0) for row in found.values())) for reason in reasons]
    told = [("warning", text) for text in result["warnings"]]
    if difference is not None:
        needed = difference["more_trials_each"]
        more = "no number tells equal rates apart" if needed is None else f"{needed} of each, were the rates these (power 0.8, two-sided 0.05)"
        told = [("success, A - B", _points(difference)), ("more trials needed", more), *told]
    notes = ["Means, and 95 % intervals, of the trials that count; time to success, of those whose moment of success is known."]
    return [
        Section("settings", (), [(name.upper(), flags or "as the other flags say") for name, flags in result["flags"].items()]),
        Section("result", ("", *columns), rows, notes),
        Section("trials that do not count", ("does not count", *columns), left_out or [("none", *[0] * len(columns))]),
        Section("conclusion", (), told),
    ]


def verdict(result: Mapping[str, Any]) -> str:
    """One line."""
    rates = ", ".join(f"{name.upper()} {_rate(row)}" for name, row in result["settings"].items())
    if result["difference"] is None:
        return rates
    low, high = result["difference"]["newcombe_95"]
    return f"{rates}; A - B {_points(result['difference'])}: {'A is better' if low > 0 else 'B is better' if high < 0 else 'not told apart'}"


def _rate(row: Mapping[str, Any]) -> str:
    if row["rate"] is None:
        return "no trial counts"
    return "{}/{}, {:.0f} % ({:.0f} to {:.0f})".format(row["successes"], row["trials"], *(100 * value for value in (row["rate"], *row["wilson_95"])))


def _mean(mean: Mapping[str, Any]) -> str:
    return cell(mean["mean"]) + (" ({} to {})".format(*map(cell, mean["bootstrap_95"])) if mean["bootstrap_95"] else "")


def _points(difference: Mapping[str, Any]) -> str:
    return "{:+.0f} points ({:+.0f} to {:+.0f})".format(*(100 * value for value in (difference["rate"], *difference["newcombe_95"])))


def _figure(result: Mapping[str, Any]) -> Any:
    """Each rate, and their difference, with intervals. Raises MissingExtraError without matplotlib."""
    rows = [(name.upper(), row["rate"], row["wilson_95"]) for name, row in result["settings"].items() if row["rate"] is not None]
    rows += [("A - B", each["rate"], each["newcombe_95"]) for each in [result["difference"]] if each is not None]
    figure = new_figure(2.5)
    axis = figure.subplots()
    for height, (_, rate, bounds) in enumerate(rows):
        axis.plot([100 * bound for bound in bounds], [height, height], linewidth=3, color="tab:blue")
        axis.plot(100 * rate, height, "o", color="tab:red")
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set(yticks=range(len(rows)), yticklabels=[name for name, _, _ in rows], xlabel="success (%), difference (points)", xlim=(-105, 105))
    axis.invert_yaxis()
    return figure
