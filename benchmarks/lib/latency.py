"""How long an inference takes, as drawn for each one: a fixed time, or the distribution that another benchmark measured; how long a chunk must be to
bridge it; a run of the product's loop to a goal; and virtual time, in which inferences pass without waiting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Clock, Observation, Robot
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.planner import Planner
from gr00t_fast.record.session import Session

# One tick because an answer plays from the tick after it came, the others for threads that wake up late.
BRIDGE_MARGIN_TICKS = 4

# What a tick of the plain loop does besides inferring. One read and one write of six servos take about 4 ms; the other half is for fetching the
# frames and for waking up late.
SYNC_MARGIN_S = 0.008


def needed_actions(delay_ticks: int) -> int:
    """For a controller that drops the elapsed actions: as many as are over on arrival, as many again until the next chunk is there, and a margin."""
    return 2 * delay_ticks + BRIDGE_MARGIN_TICKS


_MEASURED = "measured:"
_USUAL_PLACE = "times_ms.ours.total"  # in a result of bench_policy.py
_MAX_S = 60.0
_TAIL = 0.99


@dataclass(frozen=True)
class Latency:
    """Quantiles of the latency (0..1) and their values in seconds; linear in between."""

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


def parse_latency(text: str) -> Latency:
    """`800`: always 800 ms. `measured:FILE` or `measured:FILE#place.in.it`: percentiles in ms from a benchmark's JSON. Raises ConfigError."""
    if text.startswith(_MEASURED):
        return _measured(text.removeprefix(_MEASURED))
    try:
        ms = float(text)
    except ValueError as error:
        raise ConfigError(f"--latency_ms: '{text}' is neither a number of milliseconds (800) nor measured:FILE.") from error
    if not 0 <= ms <= 1000 * _MAX_S:
        raise ConfigError(f"--latency_ms: {text} must be from 0 to {1000 * _MAX_S:g} milliseconds.")
    return Latency(f"{ms:g} ms", (0.0, 1.0), (ms / 1000, ms / 1000))


def _measured(text: str) -> Latency:
    name, _, place = text.partition("#")
    try:
        found: Any = json.loads(Path(name).read_text(encoding="utf-8"))
        for key in (place or _USUAL_PLACE).split("."):
            found = found[int(key) if isinstance(found, list) else key]
        p = {key: float(found[key]) / 1000 for key in ("p50", "p95", "p99")}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"--latency_ms: expected percentiles in ms (p50, p95, p99) at {place or _USUAL_PLACE} of {name}: {type(error).__name__}: {error}. "
            f"Another place: measured:{name}#times_ms.ours.total, say."
        ) from error
    # The faster half is taken as the median: the files do not say how fast it was.
    values_s = (p["p50"], p["p50"], p["p95"], p["p99"], found.get("max", found["p99"]) / 1000)
    return Latency(f"measured, p50 {1000 * p['p50']:.0f} ms", (0.0, 0.5, 0.95, 0.99, 1.0), values_s)


_ROUNDING_S = 1e-9  # a call that ends at a tick is in time for it, whatever the sums of floats say


def play_until(over: Callable[[Observation], bool], reason: str, arm: Robot, planner: Planner, options: LoopOptions, clock: Clock) -> ControlLoop:
    """The product's loop, ended for `reason` where `over` says so of what was observed. Raises KeyboardInterrupt after Ctrl-C, which ends it in good
    order and is to end the study too."""
    stop = StopSignals()

    class Goal:
        def see(self, observation: Observation, tick: object = None, mode: object = None) -> None:
            if over(observation):
                stop.request(reason)

    loop = ControlLoop(arm, planner, options, clock, stop, Session(stop), observers=[Goal()], echo=lambda line: None)
    with stop:
        loop.run()
    if stop.exit_code:
        raise KeyboardInterrupt
    return loop


class VirtualClock:
    """Time that moves only when somebody sleeps: nothing waits, and the same run has the same result."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_until_s(self, deadline_s: float) -> None:
        self.time_s = max(self.time_s, deadline_s)

    def suspended_s(self) -> float:
        return 0.0


class VirtualCall(Future[Any]):
    """What a call came to, at `ready_s` of a clock that waiting moves on."""

    def __init__(self, call: Callable[[], Any]) -> None:
        """Makes the call."""
        super().__init__()
        try:
            self.set_result(call())
        except Exception as error:  # noqa: BLE001 - handed over, as a thread does
            self.set_exception(error)

    def at(self, ready_s: float, clock: Clock) -> VirtualCall:
        """The same, there from `ready_s` on."""
        self._ready_s, self._clock = ready_s, clock
        return self

    def done(self) -> bool:
        return self._clock.now_s() >= self._ready_s - _ROUNDING_S

    def exception(self, timeout: float | None = None) -> BaseException | None:
        end_s = math.inf if timeout is None else self._clock.now_s() + timeout
        self._clock.sleep_until_s(min(self._ready_s, end_s))
        if self._ready_s - _ROUNDING_S > end_s:
            raise TimeoutError
        return super().exception(0)


class VirtualWorker:
    """A `Worker` beside a loop on the same VirtualClock: a call runs at once on time of its own, and its outcome is there when that has passed."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def submit(self, call: Callable[[], Any]) -> VirtualCall:
        began_s = self._clock.now_s()
        made = VirtualCall(call)
        made.at(self._clock.now_s(), self._clock)
        self._clock.time_s = began_s
        return made

    def close(self, timeout_s: float) -> bool:
        return True
