"""How much faster than a policy server, and why: one factor at a time, from camera frame to joint targets.

    python benchmarks/ab_server.py                                          # random demo weights, made in --out; a few minutes on two cores
    python benchmarks/ab_server.py --model_path=DIR --factors transport steps
    python benchmarks/ab_server.py --server=tcp://127.0.0.1:5555            # times a GR00T N1.5 inference service that runs there

Factors: transport (in process, ipc, tcp; the server is `python -m gr00t_fast.serving` in another process), pre-processing (the reference's CPU
path, lib/reference.py, or ours), engine (the reference's modules, transformers and lerobot, or ours), denoising steps, and warm-up (a process's
first calls). In every round each arm is timed once, in random order, with the same observation and noise; only one computes at a time. Arms
that differ in transport alone must give the same bits, and engines the same actions within a tolerance, or the run ends with an error.
Differences are paired by round.
At full size, where weights fit no cache, say --settle=0 and leave ipc out, which would be one more server with 4 GB of weights.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.ab_host import (
    POLICY_FLAGS,
    REFERENCE,
    Addresses,
    ColdStart,
    Policies,
    ServerProcess,
    available_bytes,
    cold_start_in_process,
    cold_start_of_server,
    example_inputs,
    makes_pixels,
    running,
    thread_variables,
)
from benchmarks.lib.program import (
    Flags,
    Size,
    check_counts,
    checkpoint_of,
    conditions,
    count_of,
    drawing,
    finish,
    markdown_table,
    paired_ratio,
    provenance,
    read_flags,
    shuffled_rounds,
    size_of,
    size_text,
    weights_of,
    write_csv,
)
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.errors import ConfigError, Gr00tFastError, ServerError, ServerUnreachableError
from gr00t_fast.flags import setting
from gr00t_fast.inputs.data_config import DataConfig, load_data_config
from gr00t_fast.measurement import percentiles
from gr00t_fast.serving import PolicyClient

Factor = Literal["transport", "preprocessing", "engine", "steps", "warm_up"]
Transport = Literal["none", "ipc", "tcp"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
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
    """Two setups that differ in one factor: `before` minus `after` is what it is worth between them."""

    before: Setup
    after: Setup

    @property
    def factor(self) -> str:
        (name,) = (each.name for each in fields(Setup) if getattr(self.before, each.name) != getattr(self.after, each.name))
        return name

    @property
    def change(self) -> str:
        name = self.factor if self.factor != "preprocessing" else "pre-processing"
        old, new = ("in process" if level == NONE else level for level in (getattr(setup, self.factor) for setup in (self.before, self.after)))
        return f"{name}: {old} → {new}"


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
        return list(starmap(Contrast, pairwise(self.waterfall)))

    @property
    def setups(self) -> list[Setup]:
        """Each once."""
        return list(dict.fromkeys([*self.waterfall, *(setup for c in self.alone for setup in (c.before, c.after))]))


def make_plan(
    factors: Sequence[str],
    transports: Sequence[str],
    engine: str,
    plain_engine: str,
    engines: Sequence[str],
    steps: int,
    other_steps: Sequence[int],
) -> Plan:
    """`engine`, `steps`: ours; `engines`, `other_steps`: what they are compared with; `plain_engine`: one that takes pixels, around which
    pre-processing alone is varied. A factor that is left out stays at our level everywhere."""
    ours = Setup(NONE, OURS, engine, steps)
    remote = [name for name in reversed(TRANSPORTS) if name in transports and name != NONE] if "transport" in factors else []
    waterfall = [
        Setup(
            remote[0] if remote else NONE,
            REFERENCE if "preprocessing" in factors else OURS,
            REFERENCE if "engine" in factors else engine,
            steps,
        )
    ]
    for name in ("transport", "preprocessing", "engine"):
        waterfall.append(replace(waterfall[-1], **{name: getattr(ours, name)}))
    alone = [Contrast(replace(ours, transport=name), ours) for name in remote]
    if "preprocessing" in factors:
        plain = replace(ours, engine=plain_engine)
        alone.append(Contrast(replace(plain, preprocessing=REFERENCE), plain))
    if "engine" in factors:
        alone += [Contrast(replace(ours, engine=name), ours) for name in (REFERENCE, *engines) if name != engine]
    if "steps" in factors:
        alone += [Contrast(ours, replace(ours, steps=count)) for count in other_steps if count != steps]
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


def measure(
    arms: dict[Any, Arm],
    inputs: Sequence[tuple[dict[str, Any], np.ndarray]],
    protocol: Config,
    compare: Mapping[tuple[Setup, Setup], float] = {},
) -> Measurement:
    """Time every arm once a round, in random order, on that round's inputs. Raises DisagreementError at the first wrong action. `protocol`: its
    `rounds` are counted, `warm_up` ones before them are not, and none begins `max_minutes` after the first counted one; that one always is.

    Arms whose setups differ in transport alone must agree bit by bit, in every round. `compare`: pairs whose differences are recorded, with the
    largest that is allowed in joint units.
    """
    result = Measurement({name: [] for name in arms}, {name: {} for name in arms}, {pair: [] for pair in compare})
    deadline_s = math.inf
    for number, (order, counted) in enumerate(shuffled_rounds(arms, protocol.rounds, protocol.warm_up, protocol.seed)):
        if number == protocol.warm_up:
            deadline_s = time.monotonic() + 60 * protocol.max_minutes  # what was loaded, compiled and warmed up before is not in it
        elif time.monotonic() > deadline_s:
            result.stopped_early = True
            break
        targets = {}
        for name in order:
            targets[name], took_ms = _timed(arms[name], inputs[number % len(inputs)], protocol.settle)
            if counted:
                result.add(name, took_ms, arms[name].stages())
        check_agreement(targets)
        for pair, limit in compare.items():
            result.differences[pair].append(_difference(targets, pair, limit))
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


_PUBLISHED_ITEM_BYTES = 2  # checkpoints are published in bf16
_PROCESS_BYTES = 700_000_000  # interpreter, torch and libraries, beside the weights
_FP32_TOLERANCE = 0.005  # of a joint's range, as tests/parity/ asks of the whole policy
_HALF_TOLERANCE = 0.2  # the same in 16 bits and where pictures differ by a grey level: random weights amplify both
_MAX_PIXEL_LEVELS = 1.5  # one level, and the rounding of a narrow number format


def check_memory(plan: Plan, policies: Policies) -> None:
    """Raises ConfigError when the servers' weights will not fit beside what is loaded. Knows nothing of a GPU's memory."""
    ours, free = policies.ours, available_bytes()
    if free is None or ours.device.type != "cpu":
        return
    files = open_checkpoint(policies.model_path).weight_files
    weights = sum(file.stat().st_size for file in files) * ours.dtype.itemsize / _PUBLISHED_ITEM_BYTES
    servers = sum(setup.transport != NONE for setup in plan.setups)
    needed = max(servers, 1) * (weights + _PROCESS_BYTES)
    if needed > free:
        raise ConfigError(
            f"{servers} servers need about {needed / 1e9:.1f} GB beside what is loaded; {free / 1e9:.1f} GB are free. Leave servers out, for example "
            "with --transports none tcp: what transport alone costs is measured without weights."
        )


def pixel_levels_apart(policies: Policies, inputs: tuple[dict[str, Any], np.ndarray]) -> float:
    """Largest difference of the two pre-processings in grey levels. Raises DisagreementError beyond one level, or when the prompts differ."""
    import torch

    place = torch.device("cpu"), torch.float32
    plain = "eager" if makes_pixels(policies.ours.engine) else policies.ours.engine.name
    ours = policies.ours.preprocess(inputs[0]).to(*place)
    theirs = policies.policy(REFERENCE, plain, 1).preprocessing(inputs[0], *place)
    levels = 127.5 * float((ours.pixel_values - theirs.pixel_values).abs().max())
    same_prompt = ours.input_ids.tolist() == theirs.input_ids.tolist()
    if levels > _MAX_PIXEL_LEVELS or not same_prompt:
        raise DisagreementError(
            f"the reference's pre-processing and ours are not the same function: pictures differ by {levels:.1f} grey levels, prompts are "
            f"{'equal' if same_prompt else 'different'}. Comparing their times would be meaningless."
        )
    return round(levels, 3)


def action_limits(plan: Plan, ours: Any) -> dict[tuple[Setup, Setup], float]:
    """Pairs whose actions are compared, and the largest difference allowed in joint units; other step counts are other actions."""
    least = min(float((part.max - part.min).min()) for part in ours.metadata.action_statistics.values())
    exact = str(ours.dtype) == "torch.float32"
    limits = {"engine": (_FP32_TOLERANCE if exact else _HALF_TOLERANCE) * least, "preprocessing": _HALF_TOLERANCE * least, "steps": math.inf}
    return {(pair.before, pair.after): limits[pair.factor] for pair in (*plan.path, *plan.alone) if pair.factor != "transport"}


_QUIET_LOAD = 0.5  # per CPU; above it, other work takes turns with the arms
_TITLE = "Policy server against one process, one factor at a time"


def evaluate(plan: Plan, measured: Measurement, cold: Mapping[Setup, ColdStart], commands: Mapping[Setup, list[str]]) -> dict[str, Any]:
    """The figures as plain values. Times in ms, differences of actions in joint units (degrees; gripper: per cent)."""
    times = measured.times_ms
    latency = {name: percentiles(samples) for name, samples in times.items()}
    stages = {name: {stage: percentiles(samples)["p50"] for stage, samples in each.items()} for name, each in measured.stages_ms.items()}

    def worth(contrast: Contrast) -> dict[str, Any]:
        before, after = contrast.before, contrast.after
        found, gaps = paired(times[before], times[after]), measured.differences.get((before, after))
        return {
            "factor": contrast.factor,
            "change": contrast.change,
            "before": str(before),
            "after": str(after),
            "before_p50_ms": latency[before]["p50"],
            "after_p50_ms": latency[after]["p50"],
            "worth_ms": found,
            "resolved": resolved(found),
            "largest_action_difference": max(gaps) if gaps else 0.0,  # across transports: checked to be none
        }

    def arm(setup: Setup) -> dict[str, Any]:
        command = " ".join(commands[setup][1:3]) if setup in commands else None
        return {"arm": str(setup), **asdict(setup), "latency_ms": latency[setup], "stages_p50_ms": stages[setup], "server": command}

    probes = [name for kind, name in (key for key in times if isinstance(key, tuple)) if kind == "ping"]
    ends = times[plan.baseline], times[plan.ours]
    return {
        "rounds": measured.rounds,
        "arms": [arm(setup) for setup in plan.setups],
        "baseline": str(plan.baseline),
        "ours": str(plan.ours),
        "all_factors": paired(*ends),
        "ratio": paired_ratio(*ends),
        "speed_up_p50": round(latency[plan.baseline]["p50"] / latency[plan.ours]["p50"], 2),
        "waterfall": [worth(contrast) for contrast in plan.path],
        "alone": [worth(contrast) for contrast in plan.alone],
        "transport_alone": {
            name: {"message_ms": latency[_PROBE, name], "ping_ms": latency["ping", name], "stages_p50_ms": stages[_PROBE, name]} for name in probes
        },
        "cold_start": [_cold(setup, each, latency[setup]["p50"]) for setup, each in cold.items()],
        "agreement": {
            "same_bits_across_transports": [str(setup) for setup in plan.setups if setup.transport != NONE],
            "rounds_checked": measured.rounds,
        },
    }


def _cold(setup: Setup, cold: ColdStart, steady_ms: float) -> dict[str, Any]:
    first_ms = percentiles(calls[0] for calls in cold.calls_ms)["p50"]
    return {
        "arm": str(setup),
        "served": setup.transport != NONE,
        "start_to_first_action_s": [round(value, 3) for value in cold.first_action_s],
        "start_to_ready_s": [round(value, 3) for value in cold.ready_s],
        "first_calls_ms": [[round(value, 3) for value in calls] for calls in cold.calls_ms],
        "first_call_p50_ms": first_ms,
        "steady_p50_ms": steady_ms,
        "warm_up_worth_ms": round(first_ms - steady_ms, 3),
    }


# --- words -------------------------------------------------------------------------------------------------------------------------------


def transport_sentence(name: str, probe: dict[str, Any], result: dict[str, Any]) -> str:
    pictures = f"{result['cameras']} x {size_text(result['resolution'])}, {result['request_bytes'] / 1e6:.2f} MB"
    p, ping_ms = probe["message_ms"], probe["ping_ms"]["p50"]
    costs = f"costs {p['p50']:.2f} ms p50, {p['p95']:.2f} p95."
    return f"Transport alone over {name} ({pictures}; the policy answers at once) {costs} A ping takes {ping_ms:.2f} ms."


def sentences(result: dict[str, Any]) -> list[str]:
    """What the figures say, and no more; the ratio that was measured in any case."""
    lines = [transport_sentence(name, probe, result) for name, probe in result["transport_alone"].items()]
    for row in (row for row in result["alone"] if row["factor"] == "transport"):
        lines.append(f"Around our policy, {row['change'].replace('transport: ', '')} is worth {_words(row)}.")
    if not result["waterfall"]:
        return lines
    paired_by_round = f"{ratio_text(result['ratio'])} as long as ours; " if result["ratio"] else ""  # the committed run did not note it
    lines.append(f"The baseline takes {paired_by_round}{result['speed_up_p50']:.2f} times by the arms' p50.")
    total, largest = result["all_factors"], max(result["waterfall"], key=lambda row: row["worth_ms"]["median"])
    if not resolved(total):
        told = f"no difference that {count_of(total['rounds'], 'round')} can tell from zero (median {total['median']:+.2f} ms)"
    elif total["median"] < 0:
        told = f"**slower** by {-total['median']:.1f} ms per call {_quartiles(total, 1)}"
    else:
        gain = f"{total['median']:.1f} ms less per call {_quartiles(total, 1)}"
        told = f"{gain}, at the same number of denoising steps. The largest part is {largest['change']}: {_words(largest)}"
    return [*lines, f"From the baseline to ours: {told}."]


def _quartiles(worth: dict[str, Any], digits: int = 2) -> str:
    return f"(quartiles {worth['p25']:.{digits}f} to {worth['p75']:.{digits}f})"


def _words(row: dict[str, Any]) -> str:
    worth = row["worth_ms"]
    if not row["resolved"]:
        return f"nothing that {count_of(worth['rounds'], 'round')} can tell from zero (median {worth['median']:+.2f} ms)"
    return f"{worth['median']:.2f} ms {_quartiles(worth)}"


# --- table -------------------------------------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any]) -> str:
    parts = [f"# {_TITLE}", _regime_text(result), _arms_table({arm["arm"]: arm["latency_ms"] for arm in result["arms"]})]
    if result["waterfall"]:
        parts.append("## From the baseline to ours, one factor after the other\n\n" + _worth_table(result["waterfall"], result["arms"][0]))
    if result["alone"]:
        parts.append("## Each factor alone, changed from ours\n\n" + _worth_table(result["alone"], None))
    if result["cold_start"]:
        parts.append("## Cold start\n\n" + _cold_table(result["cold_start"]))
    notes = [f"* {line}" for line in [*sentences(result), *_notes(result)]]
    return "\n\n".join([*parts, "\n".join(notes)])


def _regime_text(r: dict[str, Any]) -> str:
    counted = f"{count_of(r['rounds'], 'round')} after {r['warm_up_rounds']} uncounted"
    if r["stopped_early"]:
        counted += f" (**stopped early**: {r['calls_asked']} were asked for, --max_minutes={r['max_minutes']:g})"
    network = f"{r['weights']} weights ({r['weight_bytes'] / 1e6:,.0f} MB), {r['precision']} on {r['device']}"
    cameras = f"{r['cameras']} camera(s) of {size_text(r['resolution'])}, {r['threads_per_process']} CPU thread(s) in every process"
    settled = f", right after {r['settling_calls']} uncounted call(s) of its own" if r["settling_calls"] else ""
    order = f"every arm once a round in random order{settled}, same observation and noise"
    return f"{network}, {cameras}. Camera frame to joint targets; {counted}, {order}. Times in ms."


def _arms_table(latency_ms: Mapping[str, Mapping[str, float]]) -> str:
    return markdown_table(
        ("arm", "p50", "p95", "p99"), [(name, *(f"{p[each]:.2f}" for each in ("p50", "p95", "p99"))) for name, p in latency_ms.items()]
    )


def _worth_table(rows: list[dict[str, Any]], baseline: dict[str, Any] | None) -> str:
    columns = ["factor", "p50 before → after", "worth, paired", "quartiles", *(["of the baseline"] if baseline else []), "actions differ by at most"]
    lines = []
    for row in rows:
        worth = row["worth_ms"]
        told = f"{worth['median']:.2f}" + ("" if row["resolved"] else " (not told from 0)")
        percent = [f"{100 * worth['median'] / baseline['latency_ms']['p50']:.1f} %"] if baseline else []
        gap = f"{row['largest_action_difference']:.2g}" if row["factor"] != "transport" else "0 (checked)"
        levels = f"{row['before_p50_ms']:.2f} → {row['after_p50_ms']:.2f}"
        lines.append((row["change"], levels, told, f"{worth['p25']:.2f} to {worth['p75']:.2f}", *percent, gap))
    return markdown_table(columns, lines)


def _cold_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        starts = row["start_to_first_action_s"]
        calls = [percentiles(call)["p50"] for call in zip(*row["first_calls_ms"], strict=True)]
        first = f"{percentiles(starts)['p50']:.2f} ({min(starts):.2f} to {max(starts):.2f}, n={len(starts)})"
        lines.append((row["arm"], first, ", ".join(f"{call:.0f}" for call in calls), f"{row['steady_p50_ms']:.1f}"))
    return markdown_table(("arm", "process start → first action, s", "first calls, ms (medians)", "steady p50, ms"), lines)


def _notes(r: dict[str, Any]) -> list[str]:
    agreement, notes = r["agreement"], []
    if agreement["same_bits_across_transports"]:
        served = "; ".join(agreement["same_bits_across_transports"])
        notes.append(f"The same bits as in process in all of {count_of(agreement['rounds_checked'], 'round')}: {served}.")
    if agreement["pixel_levels_apart"] is not None:
        notes.append(f"The two pre-processings give pictures {agreement['pixel_levels_apart']:g} grey levels apart, and the same token ids.")
    random = ", on RANDOM weights: they say nothing about a trained policy." if r["weights"] == "RANDOM" else "."
    notes += [
        f"Differences of actions are in joint units (degrees; gripper: per cent) at equal noise{random}",
        "Fewer denoising steps give other actions: those rows are no free gain.",
    ]
    if r["floor_ms"] is not None:
        notes.append(f"The network's own floor on this machine, by measured arithmetic and memory rates: {r['floor_ms']:.1f} ms.")
    if r["cold_start"]:
        notes.append(
            "Cold starts read files that are in the page cache. A server is started alone, its client runs already; ours warms up before it answers, "
            "the reference does not, as NVIDIA's does not."
        )
    cpus, load = r["machine"]["cpus"] or 1, r["load_average_at_start"]
    if load > _QUIET_LOAD * cpus:
        busy = f"**The machine was busy** before the run began (load average {load:.1f} on {cpus} CPUs)"
        notes.append(f"{busy}: repeat it on a quiet one before quoting a figure.")
    return notes + [f"Left out: {reason}" for reason in r["left_out"]]


def write_samples(measured: Measurement, path: Path) -> None:
    """One row per round, one column per arm, ms."""
    names = [" ".join(name) if isinstance(name, tuple) else str(name) for name in measured.times_ms]
    write_csv(path, names, ([f"{value:.4f}" for value in row] for row in zip(*measured.times_ms.values(), strict=True)))


# --- plot --------------------------------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], path: Path) -> None:
    height = 2 + 0.5 * max(len(result["waterfall"]) + 4, len(result["alone"]))
    title = f"{_TITLE}: {result['cameras']} x {size_text(result['resolution'])}, {result['weights']} weights, {conditions(result)}"
    with drawing(path, title, 1, 2, (13, height)) as axes:
        _waterfall(axes[0][0], result)
        _alone(axes[0][1], result["alone"])


def _waterfall(axis: Any, result: dict[str, Any]) -> None:
    """Levels are p50s, so that the bars close; the worth of a factor in the table is the median of the paired differences."""

    def bar(name: str, high: float, low: float = 0.0, text: str | None = None, **look: Any) -> None:
        drawn = axis.barh([name], [abs(high - low)], left=[min(low, high)], **look)
        axis.bar_label(drawn, [f"{high:.1f}" if text is None else text], fontsize=8, padding=3)

    path = result["waterfall"]
    levels = [*(row["before_p50_ms"] for row in path), path[-1]["after_p50_ms"]] if path else [result["arms"][0]["latency_ms"]["p50"]]
    bar("baseline", levels[0], color="C7")
    for row, (before, after) in zip(path, pairwise(levels), strict=True):
        bar(row["change"], before, after, f"{after - before:+.1f}", color=[_colour(row, before - after)])
    bar("ours", levels[-1], color="C0")
    for row in result["alone"]:
        if row["factor"] == "steps" and row["after_p50_ms"] < levels[-1]:
            bar(f"ours, {row['change']}\n(other actions)", row["after_p50_ms"], color="C0", alpha=0.4, hatch="//")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_xlabel("p50, ms")
    axis.set_title("from the server baseline to ours, at the same number of steps", fontsize=10)


def _alone(axis: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        worth = row["worth_ms"]
        spread = [[worth["median"] - worth["p25"]], [worth["p75"] - worth["median"]]]
        axis.barh([row["change"]], [worth["median"]], xerr=spread, color=[_colour(row, worth["median"])], capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("worth per call, ms (paired: median, quartiles)")
    axis.set_title("each factor alone (pale: not told from 0)", fontsize=10)


def _colour(row: dict[str, Any], gain: float) -> Any:
    """Green saves time, red costs it; pale when it cannot be told from nothing."""
    return ("C2" if gain >= 0 else "C3", 1.0 if row["resolved"] else 0.35)


# --- a service that runs already -----------------------------------------------------------------------------------------------------------

_THEIRS, _OURS = "theirs, served", "ours, in process"
_PROBE = "transport alone"
_UNKNOWN = "Unknown endpoint"


def run_remote(arguments: Config) -> dict[str, Any]:
    """Ask what the service takes, and time it. Raises ServerUnreachableError, ServerError and ConfigError."""
    address, config = arguments.server, load_data_config(arguments.data_config)
    if not address.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"--server={address}: expected an address such as tcp://192.168.0.7:5555.")
    with PolicyClient(address=address, timeout_s=arguments.timeout_s, api_token=arguments.api_token) as client, Addresses() as addresses:
        missing = _check_service(client, config)
        ours = _ours(arguments)
        size = arguments.asked_size or (next(iter(ours.metadata.resolutions.values())) if ours else (640, 480))
        inputs = [example_inputs(ours.metadata if ours else None, config, (1, 1, 1), size, arguments.seed + k) for k in range(_OBSERVATIONS)]
        first_ms = []  # whether they are the service's own first calls, it alone knows
        for _ in range(arguments.first_calls):
            began_s = time.perf_counter()
            actions = client.get_action(inputs[0][0])
            first_ms.append(round(1e3 * (time.perf_counter() - began_s), 3))
        arms = {_THEIRS: _plain(client)} | ({} if "ping" in missing else {"ping": _ping(client)}) | ({_OURS: _plain(ours)} if ours else {})
        probe = _instant("tcp", addresses, {key: rows.shape for key, rows in actions.items()}, arguments)
        with running([probe], arguments.timeout_s):
            arms |= {f"{_PROBE} tcp, this machine": _plain(probe.client), "probe ping": _ping(probe.client)}
            measured = measure(arms, inputs, arguments)
    times = measured.times_ms
    latency = {name: percentiles(samples) for name, samples in times.items()}
    about = f"{ours.engine.name} engine, {str(ours.dtype).removeprefix('torch.')} on {ours.device}, {ours.denoising_steps} steps" if ours else None
    return {
        "benchmark": "ab_server",
        "server": address,
        "missing_endpoints": missing,
        "cameras": len(config.video_keys),
        "resolution": list(size),
        "request_bytes": _bytes_of(inputs[0][0].values()),
        "rounds": measured.rounds,
        "calls_asked": arguments.rounds,
        "stopped_early": measured.stopped_early,
        "threads_of_ours": arguments.threads,
        "ours_is": about,
        "latency_ms": latency,
        "first_calls_ms": first_ms,
        "theirs_minus_ours_ms": paired(times[_THEIRS], times[_OURS]) if ours else None,
        "theirs_over_ours": paired_ratio(times[_THEIRS], times[_OURS]) if ours else None,
        "transport_alone": {"tcp on this machine": {"message_ms": latency[f"{_PROBE} tcp, this machine"], "ping_ms": latency["probe ping"]}},
    }


def _check_service(client: PolicyClient, config: DataConfig) -> list[str]:
    """The endpoints it lacks. Raises ServerUnreachableError when nothing answers, ConfigError when it takes other keys than ours."""
    missing: list[str] = []

    def ask(endpoint: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ServerError as error:
            if isinstance(error, ServerUnreachableError) or _UNKNOWN not in str(error):
                raise
            missing.append(endpoint)

    if ask("ping", client.ping) is False:
        raise ServerUnreachableError(f"nothing answers at {client.address}. Is the inference service running there?")
    asked = ask("get_modality_config", client.get_modality_config)
    for name, keys in (("video", config.video_keys), ("state", config.state_keys)) if asked is not None else ():
        theirs = list(asked[name].modality_keys) if name in asked else []
        if set(theirs) != set(keys):
            raise ConfigError(
                f"the service takes {', '.join(theirs) or f'no {name}'}; --data_config has {', '.join(keys)}. Choose the one it serves."
            )
    return missing


def _ours(arguments: Config) -> Any:
    """Our policy, warm, when there is a checkpoint."""
    if arguments.model_path is None:
        return None
    import torch

    from gr00t_fast.policy import load_policy

    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model_path, **arguments.options("denoising_steps", "engine"))
    policy.warm_up()
    return policy


def _plain(policy: Any) -> Arm:
    """Asked without noise, which NVIDIA's service does not take."""

    def call(observation: dict[str, Any], noise: np.ndarray) -> np.ndarray:
        actions = policy.get_action(observation)
        targets = targets_of({key: np.atleast_2d(rows.T).T for key, rows in actions.items()}, sorted(actions))  # NVIDIA's squeezes (H, 1) to (H,)
        if not np.isfinite(targets).all():
            raise DisagreementError("the actions are not finite: a time for them means nothing.")
        return targets

    return Arm(call, lambda: policy.last_timing)


def remote_markdown(r: dict[str, Any]) -> str:
    stopped = f" (**stopped early**: {r['calls_asked']} were asked for)" if r["stopped_early"] else ""
    regime = (
        f"{r['cameras']} camera(s) of {size_text(r['resolution'])}, {count_of(r['rounds'], 'round')}{stopped}, arms in random order. Times in ms."
    )
    notes = [f"Our first calls to it took {', '.join(f'{value:.0f}' for value in r['first_calls_ms'])} ms."]
    if d := r["theirs_minus_ours_ms"]:
        notes.append(f"Theirs minus ours ({r['ours_is']}): {d['median']:.2f} ms {_quartiles(d)}, paired by round.")
        notes.append(f"Theirs takes {ratio_text(r['theirs_over_ours'])} as long.")
    notes += [transport_sentence(name, probe, r) for name, probe in r["transport_alone"].items()]
    notes.append("Its steps, precision, machine and noise are its own and not known here: this is a comparison of services, not of one factor.")
    if r["missing_endpoints"]:
        notes.append(f"It does not know: {', '.join(r['missing_endpoints'])}.")
    table = _arms_table(r["latency_ms"])
    return "\n\n".join([f"# The inference service at {r['server']}", regime, table, "\n".join(f"* {note}" for note in notes)])


def plot_remote(result: dict[str, Any], path: Path) -> None:
    latency = result["latency_ms"]
    ours = f"; ours: {result['ours_is']}" if result["ours_is"] else ""
    with drawing(
        path, f"the service at {result['server']}, n = {count_of(result['rounds'], 'round')}{ours}", size=(8, 1.5 + 0.5 * len(latency))
    ) as axes:
        middles = [p["p50"] for p in latency.values()]
        axes[0][0].barh(list(latency), middles, xerr=[[0.0] * len(latency), [p["p95"] - p["p50"] for p in latency.values()]], capsize=3)
        axes[0][0].invert_yaxis()
        axes[0][0].set_xlabel("ms: p50, whisker to p95")


# --- the program -------------------------------------------------------------------------------------------------------------------------

_OBSERVATIONS = 16  # different ones, taken in turn
_PATIENCE_S = 600.0  # for a server to load its weights


@dataclass
class Config(Flags):
    model_path: Path | None = None  # checkpoint directory; default: one with random weights of --size is made in --out
    size: Literal["tiny", "demo", "full"] = "demo"  # of the random checkpoint; full: the published sizes, 4.7 GB
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str | None = None  # default: so100, or so100_dualcam with --cameras=2
    cameras: Literal[1, 2] = 1  # of the random checkpoint
    resolution: str | None = None  # of the random checkpoint and its cameras: 640x480 (default), 1280x720, ...
    processor_path: Path | None = None  # tokenizer files, when the checkpoint has none
    factors: list[Factor] = field(default_factory=lambda: list(FACTORS))  # what to vary; the rest stays as ours is
    transports: list[Transport] = field(default_factory=lambda: list(TRANSPORTS))  # each but none is one more server with weights
    denoising_steps: int | None = None  # of all arms but those that vary it; default: the checkpoint's own
    other_denoising_steps: list[int] = setting(default_factory=lambda: [2, 1, 8], former=("steps",))  # that ours is compared with
    engine: str = "auto"  # ours
    engines: list[str] | None = None  # engines to compare with it; default: all that this machine can run
    precision: str = "auto"  # fp32, bf16, fp16; auto: fp32 on a CPU
    threads: int = 1  # CPU threads of every process, clients and servers alike
    rounds: int = setting(200, former=("calls",))  # counted calls of each arm
    warm_up: int = 3  # rounds before them that are not counted
    settle: int = 1  # uncounted calls of the same arm before each counted one
    cold_starts: int = 3  # fresh processes per arm, when warm_up is among the factors
    first_calls: int = 5  # calls timed in each fresh process
    max_minutes: float = 5.0  # begin no further counted round after that long; loading, cold starts and warm-up are not in it
    server: str | None = None  # address of a running GR00T N1.5 inference service to time instead, e.g. tcp://192.168.0.7:5555
    api_token: str | None = None  # of that service
    timeout_s: float = 60.0  # of one call
    out: Path = Path("outputs/ab_server")  # directory for JSON, table, samples and plot

    @property
    def asked_size(self) -> Size | None:
        return size_of(self.resolution) if self.resolution else None

    def options(self, *more: str) -> dict[str, Any]:
        """For `load_policy`: those that all processes share, and `more`."""
        return {name: getattr(self, name) for name in (*POLICY_FLAGS, *more)}


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    config.data_config = config.data_config or {1: "so100", 2: "so100_dualcam"}[config.cameras]
    os.environ.update(thread_variables(config.threads))  # before torch is imported
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that the servers are ended, too
    try:
        work, as_table, draw = (run_remote, remote_markdown, plot_remote) if config.server else (run, as_markdown, plot)
        return finish("ab_server", config, lambda given: _checked(work, given), as_table, draw)
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(work: Callable[[Config], dict[str, Any]], config: Config) -> dict[str, Any]:
    check_counts(config, "denoising_steps", "other_denoising_steps", "threads", "rounds", "cold_starts", "first_calls")
    check_counts(config, "warm_up", "settle", least=0)
    return work(config) | provenance(config.seed)


def run(arguments: Config) -> dict[str, Any]:
    """Load, time cold starts, start the servers, call in turn, and end the servers. Raises Gr00tFastError."""
    import torch

    began_s, load = time.monotonic(), os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    weights = weights_of(arguments)
    if arguments.model_path is None:
        arguments = replace(arguments, model_path=checkpoint_of(arguments, arguments.size, arguments.asked_size or (640, 480)))
    policies = Policies(arguments.model_path, arguments.options("engine"))
    ours = policies.ours
    steps = arguments.denoising_steps or ours.denoising_steps
    engines, left_out = _other_engines(policies, arguments)
    plain = "eager" if makes_pixels(ours.engine) else ours.engine.name
    plan = make_plan(arguments.factors, arguments.transports, ours.engine.name, plain, engines, steps, arguments.other_denoising_steps)
    check_memory(plan, policies)
    inputs = _inputs(policies, arguments)
    levels_apart = pixel_levels_apart(policies, inputs[0]) if "preprocessing" in arguments.factors else None
    arms: dict[Any, Arm] = {setup: _arm(policies.policy(*levels_of(setup)), ours) for setup in plan.setups if setup.transport == NONE}
    with Addresses() as addresses:
        cold = _cold_starts(plan, addresses, inputs, arguments)
        servers = {setup: _server(setup, addresses, arguments) for setup in plan.setups if setup.transport != NONE}
        shapes = {key: rows.shape for key, rows in ours.get_action(*inputs[0]).items()}
        remote = [name for name in arguments.transports if name != NONE and "transport" in arguments.factors]
        probes = {name: _instant(name, addresses, shapes, arguments) for name in remote}
        with running([*servers.values(), *probes.values()], _PATIENCE_S):
            arms |= {setup: _arm(server.client, ours) for setup, server in servers.items()}
            arms |= {(_PROBE, name): _arm(server.client, ours) for name, server in probes.items()}
            arms |= {("ping", name): _ping(server.client) for name, server in probes.items()}
            measured = measure(arms, inputs, arguments, action_limits(plan, ours))
    write_samples(measured, arguments.out / "ab_server_samples.csv")
    result = evaluate(plan, measured, cold, {setup: server.command for setup, server in servers.items()})
    result["agreement"]["pixel_levels_apart"] = levels_apart
    return {
        "benchmark": "ab_server",
        "weights": weights,
        "weight_bytes": sum(file.stat().st_size for file in arguments.model_path.glob("model*.safetensors")),
        "device": str(ours.device),
        "precision": str(ours.dtype).removeprefix("torch."),
        "engine": ours.engine.name,
        "denoising_steps": steps,
        "cameras": len(ours.metadata.resolutions),
        "resolution": list(next(iter(ours.metadata.resolutions.values()))),
        "threads_per_process": arguments.threads,
        "request_bytes": _bytes_of((*inputs[0][0].values(), inputs[0][1])),
        "calls_asked": arguments.rounds,
        "warm_up_rounds": arguments.warm_up,
        "settling_calls": arguments.settle,
        "max_minutes": arguments.max_minutes,
        "stopped_early": measured.stopped_early,
        "load_average_at_start": round(load, 2),
        **result,
        "left_out": left_out,
        "floor_ms": _floor_ms(ours, steps),
        "minutes": round((time.monotonic() - began_s) / 60, 2),
    }


def levels_of(setup: Setup) -> tuple[str, str, int]:
    return setup.preprocessing, setup.engine, setup.steps


def _bytes_of(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


# --- what runs where ---------------------------------------------------------------------------------------------------------------------


def _other_engines(policies: Policies, arguments: Config) -> tuple[list[str], list[str]]:
    """Names of further engines that run here, and why others do not. One that was asked for by name must."""
    from gr00t_fast.engine import ENGINES, EXPORTED

    if "engine" not in arguments.factors:
        return [], []
    policies.policy(OURS, REFERENCE, 1)  # now, so that what is missing is said before anything takes long
    exports = policies.model_path / "exports"
    possible = arguments.engines if arguments.engines is not None else [*ENGINES, *(name for name in EXPORTED if (exports / name).is_dir())]
    usable, left_out = [], []
    for name in possible:
        try:
            policies.policy(OURS, name, 1)
            usable.append(name)
        except Gr00tFastError as error:
            if arguments.engines is not None:
                raise
            left_out.append(f"engine {name}: {error}")
    return usable, left_out


def _arm(policy: Any, ours: Any) -> Arm:
    """A policy of this process or a client to one."""
    keys = ours.get_modality_config()["action"].modality_keys
    return Arm(lambda observation, noise: targets_of(policy.get_action(observation, noise), keys), lambda: getattr(policy, "last_timing", {}))


def _ping(client: PolicyClient) -> Arm:
    def call(observation: dict[str, Any], noise: np.ndarray) -> np.ndarray:
        if not client.ping():
            raise ServerUnreachableError(f"the server at {client.address} stopped answering.")
        return np.empty(0)

    return Arm(call)


def _server(setup: Setup, addresses: Addresses, arguments: Config) -> ServerProcess:
    address = addresses.new(setup.transport)
    flags = [*_flags(arguments), f"--engine={setup.engine}", f"--denoising_steps={setup.steps}", f"--address={address}"]
    if setup.preprocessing == OURS and setup.engine != REFERENCE:
        command = [sys.executable, "-m", "gr00t_fast.serving", *flags]
    else:
        command = [sys.executable, "-m", "benchmarks.ab_host", *flags, f"--preprocessing={setup.preprocessing}", f"--threads={arguments.threads}"]
    kind = "ours" if "gr00t_fast.serving" in command else "baseline"
    return ServerProcess(command, address, arguments.threads, arguments.out / f"server-{kind}-{setup.transport}.log", arguments.timeout_s)


def _flags(arguments: Config) -> list[str]:
    given = {"model_path": arguments.model_path, **arguments.options()}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _instant(transport: str, addresses: Addresses, shapes: Mapping[str, Sequence[int]], arguments: Config) -> ServerProcess:
    """A server that answers at once with actions of these shapes: the same messages, and nothing but transport."""
    address = addresses.new(transport)
    command = [sys.executable, "-m", "benchmarks.ab_host", f"--answer={json.dumps(shapes)}", f"--address={address}"]
    return ServerProcess(command, address, arguments.threads, arguments.out / f"server-instant-{transport}.log", arguments.timeout_s)


def _cold_starts(plan: Plan, addresses: Addresses, inputs: list[tuple[dict[str, Any], np.ndarray]], arguments: Config) -> dict[Setup, ColdStart]:
    """Process start to first action of the ends of the comparison, in process and served; one process at a time, in random order."""
    if "warm_up" not in arguments.factors:
        return {}
    wanted = (plan.baseline, replace(plan.baseline, transport=NONE), plan.ours, replace(plan.ours, transport=plan.baseline.transport))
    ends = [setup for setup in dict.fromkeys(wanted) if setup in plan.setups]
    cold, shuffled = {setup: ColdStart() for setup in ends}, random.Random(arguments.seed)
    file, log = arguments.out / "inputs.npz", arguments.out / "cold.log"
    np.savez(file, **inputs[0][0], noise=inputs[0][1])
    began_s = time.monotonic()
    for repeat in range(arguments.cold_starts):
        for setup in shuffled.sample(ends, len(ends)):
            if repeat and time.monotonic() > began_s + 60 * arguments.max_minutes:
                return cold
            print(f"cold start {repeat + 1}/{arguments.cold_starts}: {setup}", file=sys.stderr)
            if setup.transport != NONE:
                cold_start_of_server(_server(setup, addresses, arguments), inputs[0], arguments.first_calls, _PATIENCE_S, cold[setup])
                continue
            flags = [*_flags(arguments), f"--preprocessing={setup.preprocessing}", f"--engine={setup.engine}", f"--denoising_steps={setup.steps}"]
            own = [f"--inputs={file}", f"--calls={arguments.first_calls}", f"--threads={arguments.threads}"]
            cold_start_in_process([sys.executable, "-m", "benchmarks.ab_host", *flags, *own], arguments.threads, log, cold[setup])
    return cold


# --- what they get -----------------------------------------------------------------------------------------------------------------------


def _inputs(policies: Policies, arguments: Config) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Frames of the size that training saw: the reference takes no other."""
    metadata, head = policies.ours.metadata, open_checkpoint(policies.model_path).config.head
    sizes = set(metadata.resolutions.values())
    if arguments.asked_size is not None and sizes != {arguments.asked_size}:
        trained = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise ConfigError(f"--resolution={arguments.resolution}: this checkpoint was trained with {trained}. Leave the flag out.")
    if len(sizes) != 1:
        raise ConfigError(f"the cameras of this checkpoint differ in resolution ({sorted(sizes)}); the comparison needs one for all.")
    (size,), shape = sizes, (1, head.action_horizon, head.action_dim)
    config = load_data_config(arguments.data_config)
    return [example_inputs(metadata, config, shape, size, arguments.seed + number) for number in range(_OBSERVATIONS)]


def _floor_ms(ours: Any, steps: int) -> float | None:
    """What the network alone could not undercut on this machine, by measured arithmetic and memory rates; None for an export, whose work differs."""
    from benchmarks.lib.work import measure_ceilings, stage_work

    if not hasattr(ours.engine, "model"):
        return None
    ceilings, images = measure_ceilings(ours.device, ours.dtype), len(ours.metadata.resolutions)
    image_tokens = images * ours.engine.model.config.vision.tokens
    works = stage_work(ours.engine.model, image_tokens + 32, image_tokens, images, steps).values()  # 32: a short instruction and the template
    return round(sum(work.floor_ms(ceilings) for work in works), 3)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
