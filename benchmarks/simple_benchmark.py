"""ACT, Diffusion, SmolVLA and GR00T N1.5 on the same observations: what one action costs, and what a chunk costs.

    python benchmarks/simple_benchmark.py                      # small networks of the same architectures, two minutes on two slow cores
    python benchmarks/simple_benchmark.py --published          # the published sizes (12 GB of free memory; half an hour on two CPU cores)

Every call ends with one action. A **step** pops it from the policy's queue, a **refill** computes a chunk first: which of the two a call was is
read from the queue before it, never guessed from its duration. Weights are random: speed does not depend on them. All arms start from raw
uint8 frames and joints and end with an action on the host.

Unlike in the other benchmarks arms do NOT take turns: each runs alone in a process of its own, so that its memory is its own. On a busy machine only
large ratios mean something. What else is not compared: `NOTES`. A policy that cannot be built, or fails at a
call, is told in its row, the others are measured, and the exit code is 1.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.lib.policy_zoo import BUILDERS, JOINTS, Arm, Setting, observation_of
from benchmarks.lib.program import Flags, figure, finish, in_processes, markdown_table, provenance, read_flags
from gr00t_fast.base.errors import Gr00tFastError, check_ranges
from gr00t_fast.base.flags import size_of
from gr00t_fast.base.measurement import peak_rss_bytes, percentiles
from gr00t_fast.engine import select_device, select_precision

CONTROL_HZ = 30.0
Name = Literal["act", "diffusion", "diffusion_ddim", "smolvla", "gr00t"]
_OBSERVATIONS = 8  # different ones in turn
_WARM_UP_CALLS = 2
_KINDS, _FIGURES = ("step", "refill", "all"), ("p50", "p95", "p99", "max")
# What one policy can fail with: told in its row, since its fault must not hide the others' figures.
_FAULTS = (Gr00tFastError, RuntimeError, ImportError, ValueError, LookupError, TypeError, AttributeError, OSError, MemoryError)
NOTES = (
    "policies ran one after the other, each in a process of its own, not in turns: what the machine did meanwhile is in the ratios between them",
    "lerobot's arms are select_action on frames that were converted to floats on every call, steps too. Left out is what lerobot's loop runs around "
    "it on every call: preprocessor (normaliser, device; SmolVLA's also the tokenizer, here fixed token ids) and postprocessor (unnormaliser)",
    "GR00T's refill contains its whole pre- and postprocessing (resize, normaliser, prompt, unnormaliser); its step takes an action from a list and "
    "converts no frame",
)


@dataclass
class Config(Flags):
    policies: list[Name] = field(default_factory=lambda: list(BUILDERS))  # which to measure
    published: bool = False  # the published sizes instead of small networks
    rounds: int = 210  # calls per policy, one action each
    cameras: Literal[1, 2] = 2  # pictures of one observation
    resolution: str = "640x480"  # of the cameras, WIDTHxHEIGHT
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # of SmolVLA's language model and GR00T; the others run in fp32
    out: Path = Path("outputs/simple_benchmark")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    return finish("simple_benchmark", read_flags(Config, argv, __doc__), run, as_table, exit_code=lambda result: int(bool(result["not_measured"])))


def run(config: Config) -> dict[str, Any]:
    check_ranges(config, rounds=(1, math.inf), threads=(1, math.inf))
    device = select_device(config.device)
    cameras, dtype = ("front", "wrist")[: config.cameras], select_precision(config.precision, device)
    setting = Setting(config.published, cameras, size_of(config.resolution), device, dtype, config.out, config.seed)
    policies: dict[str, dict[str, Any]] = {}
    not_measured: dict[str, str] = {}
    for name in dict.fromkeys(config.policies):
        print(f"{name} ...", file=sys.stderr)
        try:
            ((_, policies[name]),) = in_processes(measure, [(name, setting, config)], 1)
        except _FAULTS as error:
            not_measured[name] = f"{type(error).__name__}: {error}"
    return {
        **{"benchmark": "simple_benchmark", "published_sizes": setting.published, "device": str(device), "control_hz": CONTROL_HZ},
        **{"dtype_asked": str(dtype).removeprefix("torch."), "cameras": len(cameras), "resolution": list(setting.resolution)},
        "policies": policies,
        "not_measured": not_measured,
        "notes": NOTES,
        **provenance(setting.seed),
    }


def measure(name: str, setting: Setting, config: Config) -> dict[str, Any]:
    """Build, warm up and time one policy; in a process that does nothing else."""
    if config.threads:
        torch.set_num_threads(config.threads)
    generator = np.random.default_rng(setting.seed)
    observations = [observation_of(setting, generator) for _ in range(_OBSERVATIONS)]
    before, began_s = memory_bytes(setting.device), time.perf_counter()
    arm = BUILDERS[name](setting)
    built_s = time.perf_counter() - began_s
    for observation in observations[:_WARM_UP_CALLS]:
        arm.reset()
        arm.act(observation)
    arm.reset()
    times = time_calls(arm, observations, config.rounds)
    return {
        "name": name,
        "network": arm.name,
        "dtype": arm.dtype,
        "parameters": arm.parameters,
        "actions_per_chunk": arm.actions_per_chunk,
        "memory_bytes": memory_bytes(setting.device) - before,
        "build_s": round(built_s, 2),
        **{f"{kind}_ms": percentiles(times["step"] + times["refill"] if kind == "all" else times[kind]) for kind in _KINDS},
        "amortised_ms_per_tick": amortised_ms(times, arm.actions_per_chunk),
    }


def time_calls(arm: Arm, observations: list[dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """ms of each call, by what it was. Raises what a call raises, and ValueError for anything but finite joints."""
    times: dict[str, list[float]] = {"step": [], "refill": []}
    for number in range(rounds):
        kind, began_s = "step" if arm.waiting else "refill", time.perf_counter()
        action = arm.act(observations[number % len(observations)])
        times[kind].append(1000 * (time.perf_counter() - began_s))
        if action.shape != (JOINTS,) or not np.isfinite(action).all():
            raise ValueError(f"call {number}: expected {JOINTS} finite joints, got {action}")
    return times


def amortised_ms(times: dict[str, list[float]], chunk: int) -> float | None:
    """What a control tick costs on average when each chunk is played to its end: one refill and chunk - 1 steps."""
    if not times["refill"] or (chunk > 1 and not times["step"]):
        return None
    steps_ms = (chunk - 1) * float(np.median(times["step"])) if chunk > 1 else 0.0
    return round((float(np.median(times["refill"])) + steps_ms) / chunk, 3)


def memory_bytes(device: torch.device) -> int:
    """On a GPU the peak that torch allocated; on a CPU the peak resident size of the process, libraries included."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def as_table(result: dict[str, Any]) -> str:
    calls, facts = [], []
    for p in result["policies"].values():
        for kind in _KINDS:
            found = p[f"{kind}_ms"] or {"count": 0}
            calls.append((p["name"], kind, found["count"], *(figure(found.get(name)) for name in _FIGURES)))
        sizes = (f"{p['parameters']:,}", f"{p['memory_bytes'] / 1e6:.0f}", p["actions_per_chunk"])
        facts.append((p["name"], f"{p['network']}, {p['dtype']}", *sizes, figure(p["amortised_ms_per_tick"])))
    parts = [markdown_table(("policy", "call", "count", *(f"{name}, ms" for name in _FIGURES)), calls, 2)]
    parts.append(markdown_table(("policy", "network", "parameters", "memory MB", "chunk", "ms per tick"), facts, 2))
    return "\n\n".join([*parts, "\n".join(f"* {line}" for line in sentences(result))])


def sentences(result: dict[str, Any]) -> Iterator[str]:
    """Ratios are of refill to refill and amortised to amortised, never of one to the other."""
    if not result["published_sizes"]:
        yield "small networks: these figures try out the benchmark and say nothing about the policies; --published does"
    yield from (f"{name}: not measured: {reason}" for name, reason in result["not_measured"].items())
    policies = result["policies"].values()
    for kind, values in (
        ("refill", {p["name"]: p["refill_ms"]["p50"] for p in policies if p["refill_ms"]}),
        ("amortised", {p["name"]: p["amortised_ms_per_tick"] for p in policies if p["amortised_ms_per_tick"]}),
    ):
        ordered = sorted(values.items(), key=lambda item: item[1])
        yield f"{kind}, times the fastest: {', '.join(f'{name} {ms / ordered[0][1]:.1f}x' for name, ms in ordered)}"
    for p in policies:
        if p["refill_ms"]:
            ticks = p["refill_ms"]["p50"] * result["control_hz"] / 1000
            yield f"{p['name']}: a refill takes {ticks:.1f} ticks at {result['control_hz']:g} Hz{': the arm waits' if ticks > 1 else ''}"
    yield from (f"note: {note}" for note in result["notes"])


if __name__ == "__main__":
    sys.exit(main())
