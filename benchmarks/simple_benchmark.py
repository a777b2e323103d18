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
that was interrupted leaves the finished ones, marked as unfinished. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.policy_zoo import BUILDERS, JOINTS, Arm, Setting, observation_of
from benchmarks.program import end_with_parent, make_directory, provenance, show_progress
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.errors import Gr00tFastError, MissingExtraError, attempt
from gr00t_fast.measurement import peak_rss_bytes

CONTROL_HZ = 30.0
_OBSERVATIONS = 8  # different ones in turn
_WARM_UP_CALLS = 2
# What one policy can fail with: counted or told, since its fault must not hide the others' figures.
_FAULTS = (Gr00tFastError, RuntimeError, ImportError, ValueError, LookupError, TypeError, AttributeError, OSError, MemoryError)
NOTES = (
    "policies ran one after the other, each in a process of its own, not in turns: what the machine did meanwhile is in the ratios between them",
    "lerobot's arms are select_action on frames that were converted to floats on every call, steps too. Left out is what lerobot's loop runs around "
    "it on every call: preprocessor (normaliser, device; SmolVLA's also the tokenizer, here fixed token ids) and postprocessor (unnormaliser)",
    "GR00T's refill contains its whole pre- and postprocessing (resize, normaliser, prompt, unnormaliser); its step takes an action from a list and "
    "converts no frame",
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result, code = attempt(lambda: run(arguments), "interrupted before a policy was finished: nothing was written")
    if result is None:
        return code
    print(as_table(result))
    print(summary(result))
    print(json.dumps(result))
    if result["unfinished"]:
        done = f"{len(result['policies'])} of {len(result['policies']) + len(result['unfinished'])} policies"
        print(f"interrupted: {done} are in {arguments.out / 'simple_benchmark.json'}, marked as unfinished, and in .csv and .md", file=sys.stderr)
        return 130
    return 0 if all(policy["success_rate"] == 1.0 for policy in result["policies"].values()) else 1


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes what there is as each policy ends. An interrupt ends it with those that are finished; it is raised where none is."""
    device = select_device(arguments.device)
    setting = Setting(
        published=arguments.published,
        cameras=("front", "wrist")[: arguments.cameras],
        resolution=arguments.resolution,
        device=device,
        dtype=select_precision(arguments.dtype, device),
        scratch=arguments.out,
        seed=arguments.seed,
    )
    make_directory(arguments.out)
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
        write(result, arguments.out)
    return result


def measure_alone(name: str, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; a row without figures, with the reason, where that failed or the process died."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _child_begins) as pool:
            try:
                with _interrupts_blocked():
                    future = pool.submit(measure, name, setting, arguments)
                return future.result()
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.terminate()  # or leaving the pool would wait until the policy has been measured
                raise
    except _FAULTS as error:
        reason = f"not measured: {type(error).__name__}: {error}"
        print(f"{name}: {reason}", file=sys.stderr)
        told = ("network", "dtype", "parameters", "actions_per_chunk", "memory_bytes", "build_s")
        absent = (*told, "step_ms", "refill_ms", "all_ms", "amortised_ms_per_tick")
        return {"name": name, **dict.fromkeys(absent), "success_rate": 0.0, "failures": [reason], "stopped_early": False}


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that begins now never sees Ctrl-C, which a terminal sends to all: the parent ends it. One that comes meanwhile waits for us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child_begins() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that half a checkpoint and other scratch are removed on the way out
    end_with_parent()


def measure(name: str, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
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


def time_calls(arm: Arm, observations: list[dict[str, Any]], arguments: argparse.Namespace) -> tuple[dict[str, list[float]], list[str], bool]:
    """ms of each call, by what it was. A call that raises or gives anything but finite joints is a failure, and is told."""
    times: dict[str, list[float]] = {"step": [], "refill": []}
    failures: list[str] = []
    deadline_s = time.monotonic() + 60 * arguments.minutes
    for number in range(arguments.steps):
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
                failures.append(
                    f"call {number}: an action of shape {action.shape}" if action.shape != (JOINTS,) else f"call {number}: NaN or infinity"
                )
        show_progress(arm.name, number + 1, arguments.steps)
        if time.monotonic() > deadline_s:
            return times, failures, True
    return times, failures, False


def statistics_of(samples: list[float]) -> dict[str, float] | None:
    if not samples:
        return None
    values = np.asarray(samples)
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    found = {"mean": values.mean(), "median": p50, "min": values.min(), "max": values.max(), "p95": p95, "p99": p99}
    return {"count": len(samples), **{key: round(float(value), 3) for key, value in found.items()}}


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
    policies = result["policies"].values()
    labels = {p["name"]: p["name"] + "*" * p["stopped_early"] for p in policies}
    head = f"{'policy':<18} {'call':<7} {'count':>6} {'mean':>10} {'median':>10} {'min':>10} {'max':>10} {'p95':>10} {'p99':>10}  ms"
    rows = [f"UNFINISHED: interrupted before {', '.join(result['unfinished'])}", ""] if result["unfinished"] else []
    rows.append(head)
    for policy in policies:
        for kind in ("step", "refill", "all"):
            s = policy[f"{kind}_ms"]
            if s is None:
                rows.append(f"{labels[policy['name']]:<18} {kind:<7} {0:>6}")
                continue
            figures = " ".join(f"{s[key]:>10.2f}" for key in ("mean", "median", "min", "max", "p95", "p99"))
            rows.append(f"{labels[policy['name']]:<18} {kind:<7} {s['count']:>6} {figures}")
    rows += ["", f"{'policy':<18} {'parameters':>12} {'memory MB':>10} {'chunk':>6} {'ms per tick':>12} {'success':>8}  network, dtype"]
    for p in policies:
        if p["parameters"] is None:
            rows.append(f"{p['name']:<18} {'-':>12} {'-':>10} {'-':>6} {'-':>12} {0:>7.1f}%  not measured")
            continue
        amortised = "-" if p["amortised_ms_per_tick"] is None else f"{p['amortised_ms_per_tick']:.2f}"
        rows.append(
            f"{labels[p['name']]:<18} {p['parameters']:>12,} {p['memory_bytes'] / 1e6:>10.0f} {p['actions_per_chunk']:>6} {amortised:>12} "
            f"{100 * p['success_rate']:>7.1f}%  {p['network']}, {p['dtype']}"
        )
    if any(p["stopped_early"] for p in policies):
        rows += ["", "* stopped by --minutes before all --steps calls were made"]
    return "\n".join(rows)


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each policy to the fastest, by median: refill against refill and amortised against amortised, never one against the other."""
    found = {}
    for kind, value in (("refill", lambda p: (p["refill_ms"] or {}).get("median")), ("amortised", lambda p: p["amortised_ms_per_tick"])):
        values = {p["name"]: value(p) for p in result["policies"].values() if value(p)}
        if values:
            found[kind] = {name: round(ms / min(values.values()), 1) for name, ms in values.items()}
    return found


def summary(result: dict[str, Any]) -> str:
    lines = [""]
    if not result["published_sizes"]:
        lines.append("small networks: these figures try out the benchmark and say nothing about the policies; --published does")
    for kind, values in ratios(result).items():
        lines.append(
            f"{kind}, times the fastest: " + ", ".join(f"{name} {ratio:g}x" for name, ratio in sorted(values.items(), key=lambda item: item[1]))
        )
    budget_ms = 1000 / result["control_hz"]
    for p in result["policies"].values():
        if p["refill_ms"]:
            ticks = p["refill_ms"]["median"] / budget_ms
            lines.append(f"{p['name']}: a refill takes {ticks:.1f} ticks at {result['control_hz']:g} Hz" + (": the arm waits" if ticks > 1 else ""))
        if p["stopped_early"]:
            lines.append(f"{p['name']}: stopped by --minutes after {p['all_ms']['count'] if p['all_ms'] else 0} calls")
        lines += [f"{p['name']}: {failure}" for failure in p["failures"]]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def write(result: dict[str, Any], out: Path) -> None:
    """JSON, table and CSV of what is finished; the plot once all is."""
    (out / "simple_benchmark.md").write_text(f"```text\n{as_table(result)}\n{summary(result)}\n```\n")
    (out / "simple_benchmark.json").write_text(json.dumps(result | {"ratios": ratios(result)}, indent=2) + "\n")
    with (out / "simple_benchmark.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("policy", "call", "count", "mean_ms", "median_ms", "min_ms", "max_ms", "p95_ms", "p99_ms"))
        for policy in result["policies"].values():
            for kind in ("step", "refill", "all"):
                if s := policy[f"{kind}_ms"]:
                    table.writerow((policy["name"], kind, *(s[key] for key in ("count", "mean", "median", "min", "max", "p95", "p99"))))
        table.writerows((name, "not measured yet", 0) for name in result["unfinished"])
    (out / "simple_benchmark.png").unlink(missing_ok=True)  # of an earlier run
    if result["unfinished"]:
        return
    try:
        plot(result, out / "simple_benchmark.png")
    except MissingExtraError as error:  # the figures are what counts; a bare GPU machine has no matplotlib
        print(f"no plot: {error}", file=sys.stderr)


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    policies = list(result["policies"].values())
    for offset, kind in enumerate(("step", "refill")):
        values = [(p[f"{kind}_ms"] or {}).get("median", np.nan) for p in policies]
        axis.bar(np.arange(len(policies)) + 0.3 * (offset - 1), values, 0.3, label=f"{kind}, median")
    amortised = [np.nan if p["amortised_ms_per_tick"] is None else p["amortised_ms_per_tick"] for p in policies]
    axis.bar(np.arange(len(policies)) + 0.3, amortised, 0.3, label="per tick, chunk played out")
    axis.axhline(1000 / result["control_hz"], color="k", lw=0.8, ls="--", label=f"one tick at {result['control_hz']:g} Hz")
    axis.set_xticks(range(len(policies)), [p["name"] for p in policies])
    axis.set_yscale("log")
    axis.set_ylabel("ms")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _resolution(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) >= 32 and int(height) >= 32):
        raise argparse.ArgumentTypeError(f"'{text}' is no resolution; expected WIDTHxHEIGHT such as 640x480, each at least 32")
    return int(width), int(height)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--policies", nargs="+", choices=tuple(BUILDERS), default=list(BUILDERS), metavar="POLICY", help=", ".join(BUILDERS))
    parser.add_argument("--published", action="store_true", help="the published sizes instead of small networks")
    parser.add_argument("--steps", type=_positive, default=210, help="calls per policy, one action each")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most this long per policy; what was cut is said")
    parser.add_argument("--cameras", type=int, choices=(1, 2), default=2)
    parser.add_argument("--resolution", type=_resolution, default=(640, 480), help="of the cameras, WIDTHxHEIGHT")
    parser.add_argument(
        "--dtype", default="fp32", choices=("auto", "fp32", "bf16"), help="of SmolVLA's language model and GR00T; the others run in fp32"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=_positive, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/simple_benchmark"), help="directory for JSON, CSV, table and plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
