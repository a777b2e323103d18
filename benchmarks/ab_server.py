"""How much faster than a policy server, and why: one factor at a time, from camera frame to joint targets.

    python benchmarks/ab_server.py                                          # random demo weights, made in --out; a few minutes on two cores
    python benchmarks/ab_server.py --model_path=DIR --factors transport steps
    python benchmarks/ab_server.py --model_path=DIR --server=tcp://127.0.0.1:5555     # also times a GR00T N1.5 inference service that runs there

Factors: transport (in process, ipc, tcp; the server is gr00t_fast's in another process), pre-processing (the reference's CPU path,
lib/reference.py, or ours), engine (the reference's modules, transformers and lerobot, or ours) and denoising steps. In every round each arm is
timed once, in random order, with the same observation and noise; only one computes at a time. Arms that differ in transport alone must give the
same bits, and engines the same actions within a tolerance, or the run ends with an error. Differences are paired by round.
At full size, where weights fit no cache, say --settle=0 and leave ipc out, which would be one more server with 4 GB of weights.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib import many_arms, program
from benchmarks.lib.served_policy import ServedPolicy
from gr00t_fast.base.errors import Gr00tFastError, check_ranges
from gr00t_fast.base.flags import size_of
from gr00t_fast.base.measurement import paired_ratio, percentiles
from gr00t_fast.evaluation.bench import observations_of, random_noise
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.serving import PolicyClient

Factor = Literal["transport", "preprocessing", "engine", "steps"]
Transport = Literal["none", "ipc", "tcp"]
OURS, REFERENCE, NONE = "ours", "reference", "none"
_CONFIDENCE_Z = 2.576  # 99 %: a dozen contrasts are judged in one run
_ROUNDS_TO_TELL = 8  # with fewer, even all samples together do not enclose the median with 99 % confidence (1 - 2 / 2**8)
_OBSERVATIONS = 16  # different ones, taken in turn
_FP32_TOLERANCE = 0.005  # of a joint's range, as tests/parity/ asks of the whole policy
_HALF_TOLERANCE = 0.2  # the same in 16 bits and where pictures differ by a grey level: random weights amplify both
_MAX_PIXEL_LEVELS = 1.5  # one level, and the rounding of a narrow number format
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
Inputs = tuple[dict[str, Any], np.ndarray]  # an observation and the noise
Call = Callable[[dict[str, Any], np.ndarray], np.ndarray]  # of an arm: an observation and noise -> joint targets (H, J)


class DisagreementError(Gr00tFastError):
    """Two arms that must give the same actions do not: their times must not be compared."""


# --- what is compared ----------------------------------------------------------------------------------------------------------------------


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
        return f"{place}; {self.preprocessing} pre-processing; {engine}; {self.steps} denoising step(s)"


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
        old, new = ("in process" if level == NONE else level for level in (getattr(setup, self.factor) for setup in (self.before, self.after)))
        return f"{self.factor}: {old} → {new}"


@dataclass(frozen=True)
class Plan:
    """waterfall: baseline -> ... -> ours, one factor at a time; alone: single factors changed from ours."""

    waterfall: list[Setup]
    alone: list[Contrast]

    @property
    def path(self) -> list[Contrast]:
        return list(starmap(Contrast, pairwise(self.waterfall)))

    @property
    def setups(self) -> list[Setup]:
        """Each once."""
        return list(dict.fromkeys([*self.waterfall, *(setup for c in self.alone for setup in (c.before, c.after))]))


def make_plan(config: Config, ours: Setup, takes_pixels: bool = True) -> Plan:
    """takes_pixels: whether our engine takes them from another pre-processing. A factor that is left out stays at our level everywhere."""
    factors = config.factors
    remote = [name for name in ("tcp", "ipc") if name in config.transports] if "transport" in factors else []
    baseline = replace(ours, transport=remote[0] if remote else NONE)
    baseline = replace(baseline, **{name: REFERENCE for name in ("preprocessing", "engine") if name in factors})
    waterfall = [baseline]
    for name in ("transport", "preprocessing", "engine"):
        waterfall.append(replace(waterfall[-1], **{name: getattr(ours, name)}))
    alone = [Contrast(replace(ours, transport=name), ours) for name in remote]
    changed = ("preprocessing", "engine") if takes_pixels else ("engine",)
    alone += [Contrast(replace(ours, **{name: REFERENCE}), ours) for name in changed if name in factors]
    if "steps" in factors:
        alone += [Contrast(ours, replace(ours, steps=count)) for count in config.other_denoising_steps if count != ours.steps]
    return Plan(list(dict.fromkeys(waterfall)), alone)


class Policies:
    """Policies for one checkpoint that share networks: each is loaded when the first policy needs it. `options` are those of `load_policy`."""

    def __init__(self, model_path: Path, options: dict[str, Any]) -> None:
        self.model_path, self._options = model_path, options

    @cached_property
    def ours(self) -> Any:
        """The product's policy with the engine of the options."""
        from gr00t_fast import load_policy

        return load_policy(self.model_path, **self._options)

    @cached_property
    def _reference(self) -> Any:
        from benchmarks.lib.reference import ReferenceEngine
        from gr00t_fast.engine import select_device, select_precision

        device = select_device(self._options["device"])
        return ReferenceEngine(self.model_path, self._options["embodiment_tag"], device, select_precision(self._options["precision"], device))

    @cached_property
    def _over_reference(self) -> Any:
        """Our policy around the reference's modules."""
        from gr00t_fast import load_policy

        return load_policy(self.model_path, **{**self._options, "engine": self._reference})

    def policy(self, setup: Setup) -> Any:
        """In this process, whatever the setup's transport. Raises Gr00tFastError."""
        if setup.preprocessing != REFERENCE:
            policy = copy.copy(self._over_reference if setup.engine == REFERENCE else self.ours)  # only the number of steps is this one's own
            policy.denoising_steps = setup.steps
            return policy
        from benchmarks.lib.reference import ReferencePreprocessingPolicy

        engine = self._reference if setup.engine == REFERENCE else self.ours.engine
        config, tag = load_data_config(self._options["data_config"]), self._options["embodiment_tag"]
        place = (engine.device, engine.dtype)
        return ReferencePreprocessingPolicy(self.model_path, tag, config, self._options["processor_path"], engine, place, setup.steps)


def served_setup(model_path: Path, options: dict[str, Any], setup: Setup, threads: int) -> Any:
    """The policy of a setup, made in a server's process."""
    import torch

    torch.set_num_threads(threads)
    return Policies(model_path, options).policy(setup)


# --- measuring -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """Per arm and counted round the time in ms; per contrast the largest difference of targets in joint units."""

    times_ms: dict[Any, list[float]] = field(default_factory=dict)
    differences: dict[Contrast, float] = field(default_factory=dict)
    stopped_early: bool = False


def measure(arms: Mapping[Any, Call], inputs: Sequence[Inputs], config: Config, limits: Mapping[Contrast, float]) -> Measurement:
    """Time every arm once a round, in random order, on that round's inputs. `limits`: the largest difference that is allowed between the two of a
    contrast, in joint units. Raises DisagreementError at the first wrong action."""
    result, deadline_s = Measurement({name: [] for name in arms}, dict.fromkeys(limits, 0.0)), math.inf
    for number, (order, counted) in enumerate(program.shuffled_rounds(arms, config.rounds, config.warm_up, config.seed)):
        if number == config.warm_up:
            deadline_s = time.monotonic() + 60 * config.max_minutes  # loading, compiling and warming up are not in it
        elif time.monotonic() > deadline_s:
            result.stopped_early = True
            break
        targets = {}
        for name in order:
            targets[name], took_ms = _timed(arms[name], inputs[number % len(inputs)], config.settle)
            result.times_ms[name] += [took_ms] if counted else []
        for contrast, limit in limits.items():
            result.differences[contrast] = max(_difference(targets, contrast, limit), result.differences[contrast])
    return result


def _timed(call: Call, inputs: Inputs, settle: int) -> tuple[np.ndarray, float]:
    for _ in range(settle):
        call(*inputs)
    began_s = time.perf_counter()
    targets = call(*inputs)
    return targets, 1e3 * (time.perf_counter() - began_s)


def _difference(targets: Mapping[Any, np.ndarray], contrast: Contrast, limit: float) -> float:
    far = float(np.abs(targets[contrast.before] - targets[contrast.after]).max())
    if not far <= limit:  # NaN is wrong too
        raise DisagreementError(
            f"'{contrast.before}' and '{contrast.after}' gave actions {far:.3g} joint units apart for the same observation and noise; {limit:.3g} "
            "are allowed. Do both run the same code, weights, device and thread count?"
        )
    return far


def action_limits(plan: Plan, ours: Any) -> dict[Contrast, float]:
    """The largest difference allowed, in joint units: transport must not change a bit, and other step counts are other actions."""
    least = min(float((part.max - part.min).min()) for part in ours.metadata.action_statistics.values())
    exact = str(ours.dtype) == "torch.float32"
    limits = {"engine": (_FP32_TOLERANCE if exact else _HALF_TOLERANCE) * least, "preprocessing": _HALF_TOLERANCE * least}
    return {contrast: {**limits, "transport": 0.0, "steps": math.inf}[contrast.factor] for contrast in (*plan.path, *plan.alone)}


def pixel_levels_apart(policies: Policies, engine: str, observation: dict[str, Any]) -> float:
    """Largest difference of the two pre-processings in grey levels. Raises DisagreementError beyond one level, or when the prompts differ."""
    import torch

    place = torch.device("cpu"), torch.float32
    ours = policies.ours.preprocess(observation).to(*place)
    theirs = policies.policy(Setup(NONE, REFERENCE, engine, 1)).preprocessing(observation, *place)
    levels = 127.5 * float((ours.pixel_values - theirs.pixel_values).abs().max())
    same_prompt = ours.input_ids.tolist() == theirs.input_ids.tolist()
    if levels > _MAX_PIXEL_LEVELS or not same_prompt:
        raise DisagreementError(
            f"the reference's pre-processing and ours are not the same function: pictures differ by {levels:.1f} grey levels, prompts are "
            f"{'equal' if same_prompt else 'different'}. Comparing their times would be meaningless."
        )
    return round(levels, 3)


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Differences round by round in ms: quartiles, and whether the median can be told from zero with 99 % confidence (ranks: no distribution is
    assumed)."""
    differences = np.sort(np.asarray(before) - np.asarray(after))
    count = len(differences)
    low = max(math.floor(count / 2 - _CONFIDENCE_Z * math.sqrt(count) / 2), 0)
    p25, median, p75 = np.percentile(differences, (25, 50, 75))
    resolved = count >= _ROUNDS_TO_TELL and (differences[low] > 0 or differences[count - 1 - low] < 0)
    return {name: round(float(value), 3) for name, value in (("median", median), ("p25", p25), ("p75", p75))} | {"resolved": bool(resolved)}


# --- the result ----------------------------------------------------------------------------------------------------------------------------


def figures(plan: Plan, measured: Measurement) -> dict[str, Any]:
    """Times in ms, differences of actions in joint units (degrees; gripper: per cent)."""
    times = measured.times_ms
    latency = {name: percentiles(samples) for name, samples in times.items()}

    def worth(contrast: Contrast) -> dict[str, Any]:
        return {
            "factor": contrast.factor,
            "change": contrast.change,
            "before_p50_ms": latency[contrast.before]["p50"],
            "after_p50_ms": latency[contrast.after]["p50"],
            "worth_ms": paired(times[contrast.before], times[contrast.after]),
            "largest_action_difference": measured.differences[contrast],
        }

    baseline, ours = plan.waterfall[0], plan.waterfall[-1]
    return {
        "rounds": len(times[ours]),
        "stopped_early": measured.stopped_early,
        "arms": [{"arm": str(setup), **asdict(setup), "latency_ms": latency[setup]} for setup in plan.setups],
        "others": {name: p for name, p in latency.items() if isinstance(name, str)},
        "all_factors": paired(times[baseline], times[ours]),
        "ratio": paired_ratio(times[baseline], times[ours]),
        "waterfall": [worth(contrast) for contrast in plan.path],
        "alone": [worth(contrast) for contrast in plan.alone],
    }


def as_table(result: dict[str, Any]) -> str:
    early = " (**stopped early** by --max_minutes)" if result["stopped_early"] else ""
    regime = (
        f"{result['weights']} weights, {result['precision']} on {result['device']}, {result['cameras']} camera(s) of "
        f"{'x'.join(map(str, result['resolution']))}, {result['threads']} CPU thread(s) in every process. Camera frame to joint "
        f"targets; {result['rounds']} rounds{early}, every arm once a round in random order. Times in ms."
    )
    latency = {arm["arm"]: arm["latency_ms"] for arm in result["arms"]} | result["others"]
    rows = [(name, *(f"{p[q]:.2f}" for q in ("p50", "p95", "p99"))) for name, p in latency.items()]
    parts = [regime, program.markdown_table(("arm", "p50", "p95", "p99"), rows)]
    if result["waterfall"]:
        parts += ["## From the baseline to ours, one factor after the other", _worth_table(result["waterfall"])]
        parts.append(
            "The baseline takes {median:.2f} times as long as ours (quartiles {p25:.2f} to {p75:.2f}, paired by round).".format(**result["ratio"])
        )
    if result["alone"]:
        parts += ["## Each factor alone, changed from ours", _worth_table(result["alone"])]
    note = "* Differences of actions are in joint units at equal noise. Fewer denoising steps give other actions: those rows are no free gain."
    return "\n\n".join([*parts, note])


def _worth_table(rows: list[dict[str, Any]]) -> str:
    columns = ("factor", "p50 before → after", "worth, paired", "quartiles", "actions differ by at most")
    lines = []
    for row in rows:
        worth = row["worth_ms"]
        told = f"{worth['median']:.2f}" + ("" if worth["resolved"] else " (not told from 0)")
        levels, quartiles = f"{row['before_p50_ms']:.2f} → {row['after_p50_ms']:.2f}", f"{worth['p25']:.2f} to {worth['p75']:.2f}"
        lines.append((row["change"], levels, told, quartiles, f"{row['largest_action_difference']:.2g}"))
    return program.markdown_table(columns, lines)


# --- the program ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(program.PolicyFlags):
    size: Literal["tiny", "demo", "full"] = "demo"  # of the random checkpoint; full: the published sizes, 4.7 GB
    resolution: str = "640x480"  # of the random checkpoint and its cameras
    processor_path: Path | None = None  # tokenizer files, when the checkpoint has none
    factors: list[Factor] = field(default_factory=lambda: list(get_args(Factor)))  # what to vary; the rest stays as ours is
    transports: list[Transport] = field(default_factory=lambda: list(get_args(Transport)))  # each but none is one more server with weights
    other_denoising_steps: list[int] = field(default_factory=lambda: [2, 1, 8])  # that ours is compared with
    threads: int = 1  # CPU threads of every process, clients and servers alike
    rounds: int = 200  # counted calls of each arm
    warm_up: int = 3  # rounds before them that are not counted
    settle: int = 1  # uncounted calls of the same arm before each counted one
    max_minutes: float = 5.0  # begin no further counted round after that long; loading and warm-up are not in it
    server: str | None = None  # address of a running GR00T N1.5 inference service to time beside, e.g. tcp://192.168.0.7:5555
    api_token: str | None = None  # of that service
    clients: int = 0  # instead of all that: so many arms with one server, requests together by deadline against one at a time
    chunks: list[float] = field(default_factory=lambda: [1.75, 0.8])  # --clients: a chunk lasts so many times what a request of each arm takes
    round_s: float = 5.0  # --clients: each server's turn; there are as many as --max_minutes allows
    out: Path = Path("outputs/ab_server")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    config = program.read_flags(Config, argv, __doc__)
    config.data_config = config.data_config or "so100"
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(config.threads)))  # before torch is imported; the servers inherit them
    return program.finish("ab_server", config, run_arms if config.clients else run, many_arms.as_table if config.clients else as_table)


def run(config: Config) -> dict[str, Any]:
    """Load, start the servers, call in turn, and end the servers. Raises Gr00tFastError."""
    from gr00t_fast.engine.cuda_graph import GraphEngine  # whose pre-processing is part of it

    check_ranges(config, **dict.fromkeys(("denoising_steps", "other_denoising_steps", "threads", "rounds"), (1, math.inf)))
    check_ranges(config, warm_up=(0, math.inf), settle=(0, math.inf))
    weights = program.weights_of(config)
    model_path = program.checkpoint_of(config, config.size, size_of(config.resolution))
    policies = Policies(model_path, config.options("denoising_steps"))
    ours = policies.ours
    takes_pixels = not isinstance(ours.engine, GraphEngine)
    plan = make_plan(config, Setup(NONE, OURS, ours.engine.name, config.denoising_steps or ours.denoising_steps), takes_pixels)
    inputs = _inputs(ours, config)
    behind = ours.engine.name if takes_pixels else REFERENCE
    levels = pixel_levels_apart(policies, behind, inputs[0][0]) if "preprocessing" in config.factors else None
    with ExitStack() as servers:
        arms = _arms(plan, policies, config, servers)
        measured = measure(arms, inputs, config, action_limits(plan, ours))
    return {
        "benchmark": "ab_server",
        "weights": weights,
        "device": str(ours.device),
        "precision": str(ours.dtype).removeprefix("torch."),
        "cameras": len(ours.metadata.resolutions),
        "resolution": list(next(iter(ours.metadata.resolutions.values()))),
        "threads": config.threads,
        "pixel_levels_apart": levels,
        **figures(plan, measured),
        **program.provenance(config.seed),
    }


def run_arms(config: Config) -> dict[str, Any]:
    """`--clients`: several arms with one server. Raises Gr00tFastError."""
    check_ranges(config, clients=(1, math.inf), threads=(1, math.inf))
    rounds = max(int(60 * config.max_minutes / config.round_s / len(config.chunks) / len(many_arms.MODES)), 1)
    weights, model_path = program.weights_of(config), program.checkpoint_of(config, config.size, size_of(config.resolution))
    policies = Policies(model_path, config.options("denoising_steps"))
    ours, observation = policies.ours, _inputs(policies.ours, config)[0][0]
    setup = Setup("tcp", OURS, ours.engine.name, config.denoising_steps or ours.denoising_steps)
    make = partial(served_setup, model_path, config.options("denoising_steps"), setup, config.threads)
    found = many_arms.drive(make, observation, config.clients, config.chunks, rounds, config.round_s)
    return {"benchmark": "ab_server", "weights": weights, "device": str(ours.device), **found, **program.provenance(config.seed)}


def _arms(plan: Plan, policies: Policies, config: Config, servers: ExitStack) -> dict[Any, Call]:
    """Every setup, and the service that runs elsewhere."""
    keys = policies.ours.get_modality_config()["action"].modality_keys
    arms: dict[Any, Call] = {}
    for setup in plan.setups:
        if setup.transport == NONE:
            arms[setup] = _call(policies.policy(setup), keys)
        else:
            make = partial(served_setup, policies.model_path, config.options("denoising_steps"), setup, config.threads)
            arms[setup] = _call(servers.enter_context(ServedPolicy(make, setup.transport)), keys)
    if config.server:
        service = servers.enter_context(PolicyClient(address=config.server, api_token=config.api_token))
        arms[f"the service at {config.server}"] = _call(service, keys, with_noise=False)  # which NVIDIA's does not take
    return arms


def _call(policy: Any, keys: Sequence[str], with_noise: bool = True) -> Call:
    """A policy of this process or a client to one -> what a control loop sends: action parts side by side, (H, J)."""

    def call(observation: dict[str, Any], noise: np.ndarray) -> np.ndarray:
        actions = policy.get_action(observation, noise) if with_noise else policy.get_action(observation)
        return np.concatenate([np.atleast_2d(actions[key].T).T for key in keys], axis=-1)  # NVIDIA's squeezes (H, 1) to (H,)

    return call


def _inputs(ours: Any, config: Config) -> list[Inputs]:
    """Pictures of the size that training saw (the reference takes no other), joints in their range, and noise."""
    observations = observations_of(ours, f"random:{config.seed}", _OBSERVATIONS, config.seed)
    return [(observation, random_noise(ours, seed)) for seed, observation in enumerate(observations, config.seed)]


if __name__ == "__main__":
    sys.exit(main())
