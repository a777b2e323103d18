"""How long an inference takes, as drawn for each one: a fixed time, or the distribution that another benchmark measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.errors import ConfigError

_MEASURED = "measured:"
_USUAL_PLACE = "times_ms.ours.total"  # in a result of bench_policy.py
_MAX_S = 60.0
_TAIL = 0.99


@dataclass(frozen=True)
class Delay:
    """Quantiles of the delay (0..1) and their values in seconds; linear in between."""

    label: str
    quantiles: tuple[float, ...]
    values_s: tuple[float, ...]

    def at(self, quantile: float) -> float:
        """Seconds."""
        return float(np.interp(quantile, self.quantiles, self.values_s))

    def sample_s(self, generator: np.random.Generator) -> float:
        return self.at(generator.uniform())

    def ticks(self, fps: float) -> int:
        """What all but one in a hundred need, in whole ticks."""
        return math.ceil(self.at(_TAIL) * fps - 1e-9)


def parse_delay(text: str) -> Delay:
    """`0.8`: always 0.8 s. `measured:FILE` or `measured:FILE#place.in.it`: percentiles in ms from a benchmark's JSON. Raises ConfigError."""
    if text.startswith(_MEASURED):
        return _measured(text.removeprefix(_MEASURED))
    try:
        seconds = float(text)
    except ValueError as error:
        raise ConfigError(f"--delays: '{text}' is neither seconds (0.8) nor measured:FILE.") from error
    if not 0 <= seconds <= _MAX_S:
        raise ConfigError(f"--delays: {text} must be from 0 to {_MAX_S:g} seconds (not ms).")
    return Delay(f"{seconds:g} s", (0.0, 1.0), (seconds, seconds))


def _measured(text: str) -> Delay:
    name, _, place = text.partition("#")
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--delays: cannot read '{name}': {error}. Expected the JSON of a benchmark, with percentiles in ms.") from error
    found = dict(_percentiles_in(content))
    if not place:
        place = _USUAL_PLACE if _USUAL_PLACE in found else next(iter(found), "") if len(found) == 1 else ""
    if place not in found:
        raise ConfigError(
            f"--delays: say which of {name}'s latencies, as measured:{name}#PLACE: {', '.join(found) or 'it has none (p50, p95, p99)'}."
        )
    p = {key: value / 1000 for key, value in found[place].items()}
    # The faster half is taken as the median: the files do not say how fast it was.
    values_s = (p["p50"], p["p50"], p["p95"], p["p99"], p.get("max", p["p99"]))
    return Delay(f"measured, p50 {p['p50']:.3f} s", (0.0, 0.5, 0.95, 0.99, 1.0), values_s)


def _percentiles_in(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Everything in a JSON document that looks like percentiles, by its dotted place."""
    if isinstance(content, dict):
        if all(isinstance(content.get(key), int | float) for key in ("p50", "p95", "p99")):
            yield place, {key: float(content[key]) for key in ("p50", "p95", "p99", "max") if isinstance(content.get(key), int | float)}
        for key, value in content.items():
            yield from _percentiles_in(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _percentiles_in(value, f"{place}.{index}" if place else str(index))
