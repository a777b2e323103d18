"""What `ab_server.py` compares, in which order it calls, what it checks meanwhile, and the arithmetic on the times.

An arm is one way from camera frame to joint targets; two arms that differ in one factor make a contrast. In each round every arm is timed once,
in random order, with the same observation and the same noise. `settle` calls of the same arm go before the timed one, uncounted: otherwise an arm
would pay for what its neighbours left in the caches, and one whose weights several arms share would not. H horizon, J joints.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.ab_host import REFERENCE
from benchmarks.program import show_progress
from gr00t_fast.errors import Gr00tFastError

FACTORS = ("transport", "preprocessing", "engine", "steps", "warm_up")
TRANSPORTS = ("none", "ipc", "tcp")
OURS, NONE = "ours", "none"
_CONFIDENCE_Z = 2.576  # 99 %: a dozen contrasts are judged in one run
_ROUNDS_TO_TELL = 8  # with fewer, even all samples together do not enclose the median with 99 % confidence (1 - 2 / 2**8)


class DisagreementError(Gr00tFastError):
    """Two arms that must give the same actions do not: their times must not be compared."""


@dataclass(frozen=True)
class Setup:
    """The level of each factor."""

    transport: str
    preprocessing: str
    engine: str
    steps: int

    def __str__(self) -> str:
        place = "in process" if self.transport == NONE else f"server, {self.transport}"
        engine = "reference modules" if self.engine == REFERENCE else f"{self.engine} engine"
        return f"{place}; {self.preprocessing} pre-processing; {engine}; {self.steps} step{'s' * (self.steps > 1)}"


@dataclass(frozen=True)
class Contrast:
    """`before` minus `after` is what the factor is worth between them."""

    factor: str
    before: Setup
    after: Setup

    @property
    def change(self) -> str:
        name = self.factor if self.factor != "preprocessing" else "pre-processing"
        old, new = (getattr(setup, self.factor) for setup in (self.before, self.after))
        return f"{name}: {_level(old)} → {_level(new)}"


def _level(value: object) -> str:
    return "in process" if value == NONE else str(value)


@dataclass(frozen=True)
class Plan:
    """baseline -> ... -> ours one factor at a time, and single factors changed from ours."""

    waterfall: list[Setup]
    alone: list[Contrast]

    @property
    def baseline(self) -> Setup:
        return self.waterfall[0]

    @property
    def ours(self) -> Setup:
        return self.waterfall[-1]

    @property
    def path(self) -> list[Contrast]:
        return [Contrast(_changed(a, b), a, b) for a, b in zip(self.waterfall, self.waterfall[1:], strict=False)]

    @property
    def setups(self) -> list[Setup]:
        """Each once."""
        return list(dict.fromkeys([*self.waterfall, *(setup for c in self.alone for setup in (c.before, c.after))]))


def _changed(a: Setup, b: Setup) -> str:
    (name,) = (name for name in ("transport", "preprocessing", "engine", "steps") if getattr(a, name) != getattr(b, name))
    return name


@dataclass(frozen=True)
class Levels:
    """What each factor may be. `engines`: other ones of ours. `plain_engine`: one that takes pixels; pre-processing alone is varied around it."""

    transports: Sequence[str]
    engine: str
    plain_engine: str
    engines: Sequence[str]
    steps: int
    other_steps: Sequence[int]


def make_plan(factors: Sequence[str], levels: Levels) -> Plan:
    """A factor that is left out stays at our level everywhere."""
    engine, steps = levels.engine, levels.steps
    ours = Setup(NONE, OURS, engine, steps)
    remote = [name for name in reversed(TRANSPORTS) if name in levels.transports and name != NONE] if "transport" in factors else []
    baseline = Setup(
        remote[0] if remote else NONE,
        REFERENCE if "preprocessing" in factors else OURS,
        REFERENCE if "engine" in factors else engine,
        steps,
    )
    waterfall = [baseline]
    for name in ("transport", "preprocessing", "engine"):
        waterfall.append(replace(waterfall[-1], **{name: getattr(ours, name)}))
    alone = [Contrast("transport", replace(ours, transport=name), ours) for name in remote]
    if "preprocessing" in factors:
        plain = replace(ours, engine=levels.plain_engine)
        alone.append(Contrast("preprocessing", replace(plain, preprocessing=REFERENCE), plain))
    if "engine" in factors:
        alone += [Contrast("engine", replace(ours, engine=name), ours) for name in (REFERENCE, *levels.engines) if name != engine]
    if "steps" in factors:
        alone += [Contrast("steps", ours, replace(ours, steps=count)) for count in levels.other_steps if count != steps]
    return Plan(list(dict.fromkeys(waterfall)), alone)


@dataclass(frozen=True)
class Arm:
    """call: (observation, noise) -> joint targets (H, J). stages: what the last call's parts took, in ms."""

    call: Callable[[dict[str, Any], np.ndarray], np.ndarray]
    stages: Callable[[], dict[str, float]] = dict


def targets_of(actions: dict[str, np.ndarray], keys: Sequence[str]) -> np.ndarray:
    """What a control loop sends: action parts side by side, (H, J)."""
    return np.concatenate([actions[key] for key in keys], axis=-1)


@dataclass
class Measurement:
    """Per arm and counted round the time in ms, and that of its stages; per pair of setups the largest difference of targets in joint units."""

    times_ms: dict[Any, list[float]] = field(default_factory=dict)
    stages_ms: dict[Any, dict[str, list[float]]] = field(default_factory=dict)
    differences: dict[tuple[Setup, Setup], list[float]] = field(default_factory=dict)
    stopped_early: bool = False

    @property
    def rounds(self) -> int:
        return min(map(len, self.times_ms.values()))

    def add(self, name: Any, took_ms: float, stages_ms: dict[str, float]) -> None:
        self.times_ms[name].append(took_ms)
        for stage, value in stages_ms.items():
            self.stages_ms[name].setdefault(stage, []).append(value)


@dataclass(frozen=True)
class Protocol:
    """rounds are counted, `warm_up` ones before them are not; no round begins after `deadline_s` (monotonic), but one is always counted."""

    rounds: int
    warm_up: int
    settle: int
    deadline_s: float
    seed: int


def measure(
    arms: dict[Any, Arm],
    inputs: Sequence[tuple[dict[str, Any], np.ndarray]],
    protocol: Protocol,
    compare: Mapping[tuple[Setup, Setup], float] = {},
) -> Measurement:
    """Time every arm once a round, in random order, on that round's inputs. Raises DisagreementError at the first wrong action.

    Arms whose setups differ in transport alone must agree bit by bit, in every round. `compare`: pairs whose differences are recorded, with the
    largest that is allowed in joint units.
    """
    shuffled = random.Random(protocol.seed)
    result = Measurement({name: [] for name in arms}, {name: {} for name in arms}, {pair: [] for pair in compare})
    total = protocol.warm_up + protocol.rounds
    for number in range(total):
        if number > protocol.warm_up and time.monotonic() > protocol.deadline_s:
            result.stopped_early = True
            break
        targets = {}
        for name in shuffled.sample(list(arms), len(arms)):
            targets[name], took_ms = _timed(arms[name], inputs[number % len(inputs)], protocol.settle)
            if number >= protocol.warm_up:
                result.add(name, took_ms, arms[name].stages())
        check_agreement(targets)
        for pair, limit in compare.items():
            result.differences[pair].append(_difference(targets, pair, limit))
        show_progress("round", number + 1, total)
    return result


def _timed(arm: Arm, inputs: tuple[dict[str, Any], np.ndarray], settle: int) -> tuple[np.ndarray, float]:
    for _ in range(settle):
        arm.call(*inputs)
    began_s = time.perf_counter()
    targets = arm.call(*inputs)
    return targets, 1e3 * (time.perf_counter() - began_s)


def _difference(targets: dict[Any, np.ndarray], pair: tuple[Setup, Setup], limit: float) -> float:
    far = float(np.abs(targets[pair[0]] - targets[pair[1]]).max())
    if far > limit:
        raise DisagreementError(
            f"'{pair[0]}' and '{pair[1]}' must be the same function, but are {far:.3g} joint units apart; {limit:.3g} are allowed."
        )
    return far


def check_agreement(targets: dict[Any, np.ndarray]) -> None:
    """Setups that differ in transport only give the same bits. Raises DisagreementError, with how far they are apart."""
    first: dict[Setup, tuple[Setup, np.ndarray]] = {}
    for arm, values in targets.items():
        if not isinstance(arm, Setup):
            continue  # transport alone: its answer means nothing
        if not np.isfinite(values).all():
            raise DisagreementError(f"{arm}: the actions are not finite.")
        other, expected = first.setdefault(replace(arm, transport=NONE), (arm, values))
        if values.shape != expected.shape or not np.array_equal(values, expected):
            far = float(np.abs(values - expected).max()) if values.shape == expected.shape else math.inf
            raise DisagreementError(
                f"the same observation and noise gave different actions, at most {far:.3g} joint units apart, in '{arm}' and '{other}'. Transport "
                "must not change a bit: do both run the same code, weights, device and thread count?"
            )


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Differences round by round in ms: quartiles, and a 99 % confidence interval of the median that assumes no distribution."""
    differences = np.sort(np.asarray(before) - np.asarray(after))
    low, high = _median_interval(len(differences))
    p25, median, p75 = np.percentile(differences, (25, 50, 75))
    values = {"median": median, "p25": p25, "p75": p75, "median_low": differences[low], "median_high": differences[high]}
    return {name: round(float(value), 3) for name, value in values.items()} | {"rounds": len(differences)}


def paired_ratio(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """How many times longer, round by round: a disturbance of the machine hits both arms of a round alike. Median and quartiles."""
    p25, median, p75 = np.percentile(np.asarray(before) / np.asarray(after), (25, 50, 75))
    return {name: round(float(value), 3) for name, value in (("median", median), ("p25", p25), ("p75", p75))}


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} times (quartiles {ratio['p25']:.2f} to {ratio['p75']:.2f}, paired by round)"


def _median_interval(count: int) -> tuple[int, int]:
    """Ranks between which the median lies with 99 % confidence (binomial, normal approximation); all of a few samples."""
    half = _CONFIDENCE_Z * math.sqrt(count) / 2
    low = max(math.floor(count / 2 - half), 0)
    return low, count - 1 - low


def resolved(worth: dict[str, float]) -> bool:
    """Whether the difference can be told from none at all."""
    return worth["rounds"] >= _ROUNDS_TO_TELL and (worth["median_low"] > 0 or worth["median_high"] < 0)
