"""ACT, Diffusion, SmolVLA and GR00T N1.5 on the same observations: what one action costs, and what a chunk costs.

    python benchmarks/simple_benchmark.py                      # small networks of the same architectures, two minutes on two slow cores
    python benchmarks/simple_benchmark.py --published          # the published sizes (12 GB of free memory; half an hour on two CPU cores)

Every call ends with one action. A **step** pops it from the policy's queue, a **refill** computes a chunk first: which of the two a call was is
read from the queue before it, never guessed from its duration. Weights are random: speed does not depend on them. All arms start from raw
uint8 frames and joints and end with an action on the host.

Unlike in the other benchmarks arms do NOT take turns: each runs alone in a process of its own, so that its memory is its own, and minutes after the
one before. What the machine does meanwhile is in the ratios; on a busy one only large ratios mean something. lerobot's arms are select_action on
converted frames: the pre- and postprocessor that lerobot's loop runs at every tick are left out, GR00T's own are in its refill (`NOTES`). A policy
that cannot be built or warmed up is told in its row, the others are measured, and the exit code is 1. Files are written as each policy ends: a run
that was interrupted leaves the finished ones, marked as unfinished.
"""

from __future__ import annotations

import signal
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
from benchmarks.lib.program import (
    Flags,
    check_counts,
    drawing,
    end_with_parent,
    figure,
    finish,
    in_processes,
    markdown_table,
    provenance,
    read_flags,
    show_progress,
    size_of,
    write_csv,
    write_json,
)
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.errors import Gr00tFastError
from gr00t_fast.flags import setting as flag
from gr00t_fast.measurement import peak_rss_bytes, percentiles

CONTROL_HZ = 30.0
Name = Literal["act", "diffusion", "diffusion_ddim", "smolvla", "gr00t"]
_OBSERVATIONS = 8  # different ones in turn
_WARM_UP_CALLS = 2
_KINDS, _FIGURES = ("step", "refill", "all"), ("mean", "median", "min", "max", "p95", "p99")
# What one policy can fail with: counted or told, since its fault must not hide the others' figures.
_FAULTS = (Gr00tFastError, RuntimeError, ImportError, ValueError, LookupError, TypeError, AttributeError, OSError, MemoryError)
NOTES = (
    "policies ran one after the other, each in a process of its own, not in turns: what the machine did meanwhile is in the ratios between them",
    "lerobot's arms are select_action on frames that were converted to floats on every call, steps too. Left out is what lerobot's loop runs around "
    "it on every call: preprocessor (normaliser, device; SmolVLA's also the tokenizer, here fixed token ids) and postprocessor (unnormaliser)",
    "GR00T's refill contains its whole pre- and postprocessing (resize, normaliser, prompt, unnormaliser); its step takes an action from a list and "
    "converts no frame",
)


def run(arguments: Config) -> dict[str, Any]:
    """Writes what there is as each policy ends. An interrupt ends it with those that are finished; it is raised where none is."""
    check_counts(arguments, "rounds", "threads")
    device = select_device(arguments.device)
    setting = Setting(
        published=arguments.published,
        cameras=("front", "wrist")[: arguments.cameras],
        resolution=size_of(arguments.resolution),
        device=device,
        dtype=select_precision(arguments.precision, device),
        scratch=arguments.out,
        seed=arguments.seed,
    )
    policies: dict[str, dict[str, Any]] = {}
    unfinished = list(dict.fromkeys(arguments.policies))
    result = {
        "benchmark": "simple_benchmark",
        "unfinished": unfinished,
        "published_sizes": setting.published,
        "device": str(device),
        "dtype_asked": str(setting.dtype).removeprefix("torch."),
        "cameras": len(setting.cameras),
        "resolution": list(setting.resolution),
        "control_hz": CONTROL_HZ,
        "policies": policies,
        "notes": NOTES,
        **provenance(setting.seed),
    }
    while unfinished:
        try:
            policies[unfinished[0]] = measure_alone(unfinished[0], setting, arguments)
        except KeyboardInterrupt:
            if not policies:
                raise
            break
        del unfinished[0]
        keep(result, arguments.out)
    return result


def measure_alone(name: str, setting: Setting, arguments: Config) -> dict[str, Any]:
    """`measure` in a process of its own; a row without figures, with the reason, where that failed or the process died."""
    try:
        ((_, row),) = in_processes(measure, [(name, setting, arguments)], 1, _child_begins)
        return row
    except _FAULTS as error:
        reason = f"not measured: {type(error).__name__}: {error}"
        print(f"{name}: {reason}", file=sys.stderr)
        told = ("network", "dtype", "parameters", "actions_per_chunk", "memory_bytes", "build_s")
        absent = (*told, "step_ms", "refill_ms", "all_ms", "amortised_ms_per_tick")
        return {"name": name, **dict.fromkeys(absent), "success_rate": 0.0, "failures": [reason], "stopped_early": False}


def _child_begins() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that half a checkpoint and other scratch are removed on the way out
    end_with_parent()


def measure(name: str, setting: Setting, arguments: Config) -> dict[str, Any]:
    """Build, warm up and time one policy; in a process that does nothing else."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    generator = np.random.default_rng(setting.seed)
    observations = [observation_of(setting, generator) for _ in range(_OBSERVATIONS)]
    before, began_s = memory_bytes(setting.device), time.perf_counter()
    arm = BUILDERS[name](setting)
    built_s = time.perf_counter() - began_s
    for observation in observations[:_WARM_UP_CALLS]:
        arm.reset()
        arm.act(observation)
    arm.reset()
    times, failures, stopped_early = time_calls(arm, observations, arguments)
    return {
        "name": name,
        "network": arm.name,
        "dtype": arm.dtype,
        "parameters": arm.parameters,
        "actions_per_chunk": arm.actions_per_chunk,
        "memory_bytes": memory_bytes(setting.device) - before,
        "build_s": round(built_s, 2),
        "step_ms": statistics_of(times["step"]),
        "refill_ms": statistics_of(times["refill"]),
        "all_ms": statistics_of(times["step"] + times["refill"]),
        "amortised_ms_per_tick": amortised_ms(times, arm.actions_per_chunk),
        "success_rate": round(1 - len(failures) / max(sum(map(len, times.values())) + len(failures), 1), 4),
        "failures": failures[:5],
        "stopped_early": stopped_early,
    }


def time_calls(arm: Arm, observations: list[dict[str, Any]], arguments: Config) -> tuple[dict[str, list[float]], list[str], bool]:
    """ms of each call, by what it was. A call that raises or gives anything but finite joints is a failure, and is told."""
    times: dict[str, list[float]] = {"step": [], "refill": []}
    failures: list[str] = []
    deadline_s = time.monotonic() + 60 * arguments.max_minutes
    for number in range(arguments.rounds):
        kind = "step" if arm.waiting else "refill"
        began_s = time.perf_counter()
        try:
            action = arm.act(observations[number % len(observations)])
        except _FAULTS as error:
            failures.append(f"call {number}: {type(error).__name__}: {error}")
            arm.reset()
        else:
            taken_ms = 1000 * (time.perf_counter() - began_s)
            if action.shape == (JOINTS,) and np.isfinite(action).all():
                times[kind].append(taken_ms)
            else:
                failures.append(f"call {number}: {'NaN or infinity' if action.shape == (JOINTS,) else f'an action of shape {action.shape}'}")
        show_progress(arm.name, number + 1, arguments.rounds)
        if time.monotonic() > deadline_s:
            return times, failures, True
    return times, failures, False


def statistics_of(samples: list[float]) -> dict[str, float] | None:
    told = percentiles(samples)
    if told is None:
        return None
    return {"mean": round(float(np.mean(samples)), 3), "median": told.pop("p50"), "min": round(min(samples), 3)} | told


def amortised_ms(times: dict[str, list[float]], chunk: int) -> float | None:
    """What a control tick costs on average when each chunk is played to its end: one refill and chunk - 1 steps."""
    if not times["refill"] or (chunk > 1 and not times["step"]):
        return None
    steps_ms = (chunk - 1) * float(np.median(times["step"])) if chunk > 1 else 0.0
    return round((float(np.median(times["refill"])) + steps_ms) / chunk, 3)


def memory_bytes(device: torch.device) -> int:
    """On a GPU the peak that torch allocated; on a CPU the peak resident size of the process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


def as_table(result: dict[str, Any]) -> str:
    policies = list(result["policies"].values())
    labels = [p["name"] + "*" * p["stopped_early"] for p in policies]
    calls, facts = [], []
    for label, p in zip(labels, policies, strict=True):
        for kind in _KINDS:
            found = p[f"{kind}_ms"] or {"count": 0}
            calls.append((label, kind, found["count"], *(figure(found.get(name)) for name in _FIGURES)))
        built = p["parameters"] is not None
        sizes = (f"{p['parameters']:,}", f"{p['memory_bytes'] / 1e6:.0f}", p["actions_per_chunk"]) if built else ("-", "-", "-")
        network = f"{p['network']}, {p['dtype']}" if built else "not measured"
        facts.append((label, network, *sizes, figure(p["amortised_ms_per_tick"]), f"{100 * p['success_rate']:.1f}%"))
    parts = [f"UNFINISHED: interrupted before {', '.join(result['unfinished'])}"] if result["unfinished"] else []
    parts.append(markdown_table(("policy", "call", "count", *(f"{name}, ms" for name in _FIGURES)), calls, 2))
    parts.append(markdown_table(("policy", "network", "parameters", "memory MB", "chunk", "ms per tick", "success"), facts, 2))
    if any(p["stopped_early"] for p in policies):
        parts.append("\\* stopped by --max_minutes before all --rounds calls were made")
    return "\n\n".join([*parts, "\n".join(f"* {line}" for line in sentences(result))])


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each policy to the fastest, by median: refill against refill and amortised against amortised, never one against the other."""
    found = {}
    for kind, value in (("refill", lambda p: (p["refill_ms"] or {}).get("median")), ("amortised", lambda p: p["amortised_ms_per_tick"])):
        values = {p["name"]: value(p) for p in result["policies"].values() if value(p)}
        if values:
            found[kind] = {name: round(ms / min(values.values()), 1) for name, ms in values.items()}
    return found


def sentences(result: dict[str, Any]) -> Iterator[str]:
    if not result["published_sizes"]:
        yield "small networks: these figures try out the benchmark and say nothing about the policies; --published does"
    for kind, values in ratios(result).items():
        ordered = sorted(values.items(), key=lambda item: item[1])
        yield f"{kind}, times the fastest: {', '.join(f'{name} {ratio:g}x' for name, ratio in ordered)}"
    for p in result["policies"].values():
        if p["refill_ms"]:
            ticks = p["refill_ms"]["median"] * result["control_hz"] / 1000
            yield f"{p['name']}: a refill takes {ticks:.1f} ticks at {result['control_hz']:g} Hz{': the arm waits' if ticks > 1 else ''}"
        if p["stopped_early"]:
            yield f"{p['name']}: stopped by --max_minutes after {p['all_ms']['count'] if p['all_ms'] else 0} calls"
        yield from (f"{p['name']}: {failure}" for failure in p["failures"])
    yield from (f"note: {note}" for note in result["notes"])


def keep(result: dict[str, Any], out: Path) -> None:
    """What is finished so far; the plot comes once all is."""
    result["ratios"] = ratios(result)
    (out / "simple_benchmark.md").write_text(as_table(result) + "\n")
    write_json(out / "simple_benchmark.json", result)
    found = ((p["name"], kind, p[f"{kind}_ms"]) for p in result["policies"].values() for kind in _KINDS)
    rows = [(name, kind, *(calls[key] for key in ("count", *_FIGURES))) for name, kind, calls in found if calls]
    rows += [(name, "not measured yet", 0) for name in result["unfinished"]]
    write_csv(out / "simple_benchmark.csv", ("policy", "call", "count", *(f"{name}_ms" for name in _FIGURES)), rows)
    (out / "simple_benchmark.png").unlink(missing_ok=True)  # of an earlier run


def plot(result: dict[str, Any], path: Path) -> None:
    if result["unfinished"]:
        return
    policies = list(result["policies"].values())
    size = "published sizes" if result["published_sizes"] else "small networks"
    calls = ", ".join(str(p["all_ms"]["count"]) for p in policies if p["all_ms"])
    with drawing(path, f"one action, {size}, random weights, on {result['device']}, n = {calls} calls", size=(8, 4)) as axes:
        axis, places = axes[0][0], np.arange(len(policies))
        for offset, kind in enumerate(("step", "refill")):
            values = [(p[f"{kind}_ms"] or {}).get("median", np.nan) for p in policies]
            axis.bar(places + 0.3 * (offset - 1), values, 0.3, label=f"{kind}, median")
        amortised = [np.nan if p["amortised_ms_per_tick"] is None else p["amortised_ms_per_tick"] for p in policies]
        axis.bar(places + 0.3, amortised, 0.3, label="per tick, chunk played out")
        axis.axhline(1000 / result["control_hz"], color="k", lw=0.8, ls="--", label=f"one tick at {result['control_hz']:g} Hz")
        axis.set_xticks(places, [p["name"] for p in policies])
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.legend(fontsize=8)


@dataclass
class Config(Flags):
    policies: list[Name] = field(default_factory=lambda: list(BUILDERS))  # which to measure
    published: bool = False  # the published sizes instead of small networks
    rounds: int = flag(210, former=("steps",))  # calls per policy, one action each
    max_minutes: float = flag(10.0, former=("minutes",))  # at most this long per policy, without building it; what was cut is said
    cameras: Literal[1, 2] = 2  # pictures of one observation
    resolution: str = "640x480"  # of the cameras, WIDTHxHEIGHT
    precision: Literal["auto", "fp32", "bf16"] = flag("fp32", former=("dtype",))  # of SmolVLA's language model and GR00T; the others run in fp32
    out: Path = Path("outputs/simple_benchmark")  # directory for JSON, CSV, table and plot


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    nothing = "interrupted before a policy was finished: nothing was written"
    return finish("simple_benchmark", config, run, as_table, plot, lambda result: exit_code(result, config.out), nothing)


def exit_code(result: dict[str, Any], out: Path) -> int:
    done, left = len(result["policies"]), len(result["unfinished"])
    if left:
        told = f"{done} of {done + left} policies are in {out / 'simple_benchmark.json'}, marked as unfinished, and in .csv and .md"
        print(f"interrupted: {told}", file=sys.stderr)
        return 130
    return 0 if all(policy["success_rate"] == 1.0 for policy in result["policies"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
