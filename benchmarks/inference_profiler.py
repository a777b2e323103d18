"""How many actions a chunk must have, from measured latency.

    python benchmarks/inference_profiler.py --model_path=DIR --fps=30
    python benchmarks/inference_profiler.py --latency_ms=measured:outputs/bench_policy/bench_policy.json --fps=50

An observation is `delay` ticks old when its actions arrive: delay = ceil(p99 of the latency * fps). A controller that drops the elapsed actions and
must never run out needs

    actions per chunk >= 2 * delay + margin      (delay rows are over on arrival, delay more play while the next chunk is made)

`sync` is enough when an inference and 8 ms more fit between two ticks: the loop also reads and writes the servo bus (about 4 ms) and fetches the
frames there. The margin is 4 ticks: one for the tick an answer arrives in, the rest for threads that
wake up late. p99, not the mean: one late chunk in a hundred still comes every minute or so, and it is the one that is seen. The latency is of
`get_action`; a camera's own delay comes on top and is not measured here. One configuration, calls one after the other, after warm-up; for its
floor see bench_policy.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib import program
from benchmarks.lib.latency import BRIDGE_MARGIN_TICKS, SYNC_MARGIN_S, needed_actions, parse_latency
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.measurement import percentiles
from gr00t_fast.evaluation.bench import seconds_of

_ENOUGH_CALLS = 50  # with fewer, p99 is the maximum and little else
_TRAINED_HORIZON = 16  # of SO-100 fine-tunes, N1.5's and N1.7's
_INSTRUCTION = "Place the block in the bowl"


def advise(p99_s: float, fps: float, actions_per_chunk: int) -> dict[str, Any]:
    """What to set for a policy that answers `actions_per_chunk` actions within `p99_s`. Raises ConfigError for figures that are none."""
    if not (0 < p99_s < math.inf and fps > 0 and actions_per_chunk >= 1):
        raise ConfigError(f"expected a latency, a rate and a chunk length, got {p99_s} s, {fps} Hz, {actions_per_chunk} actions.")
    delay = math.ceil(p99_s * fps - 1e-9)
    needed, sync = needed_actions(delay), p99_s + SYNC_MARGIN_S <= 1 / fps
    bridges = actions_per_chunk >= needed
    longest = max(0, (actions_per_chunk - BRIDGE_MARGIN_TICKS) // 2)  # delay in ticks that the chunk bridges
    if sync:
        reason = f"an inference and {1000 * SYNC_MARGIN_S:g} ms for bus and cameras fit between two ticks: the plain loop does not pause"
    elif bridges:
        reason = f"a chunk lasts {actions_per_chunk} ticks, at least twice the delay of {delay} and {BRIDGE_MARGIN_TICKS} more"
    else:
        reason = (
            f"a chunk of {actions_per_chunk} actions is too short for a delay of {delay} ticks ({needed} are needed): with overlap the arm "
            "runs out of actions and leaves out what was due meanwhile; sync pauses, but plays every action. Lower the rate, "
            "the denoising steps or the latency"
        )
    return {
        "fps": fps,
        "delay_ticks": delay,
        "needed_actions_per_chunk": needed,
        "actions_per_chunk": actions_per_chunk,
        "controller": "threaded" if bridges and not sync else "sync",
        "highest_fps_without_pauses": math.floor(10 * max(longest / p99_s, 1 / (p99_s + SYNC_MARGIN_S)) + 1e-6) / 10,  # with overlap or without
        "reason": reason,
    }


def run(arguments: Config) -> dict[str, Any]:
    check_ranges(arguments, rounds=(_ENOUGH_CALLS, math.inf))
    if arguments.latency_ms:
        delay = parse_latency(arguments.latency_ms)
        measured: dict[str, Any] = {"latency_ms": {f"p{percent}": 1000 * delay.at(percent / 100) for percent in (50, 95, 99)}}
        horizon, weights = arguments.actions_per_chunk or _TRAINED_HORIZON, f"latency {Path(arguments.latency_ms).name}"
    else:
        from gr00t_fast import load_policy  # imports torch

        policy, weights = load_policy(program.checkpoint_of(arguments), **arguments.options()), program.weights_of(arguments)
        observation = policy.example_observation(_INSTRUCTION)
        horizon = arguments.actions_per_chunk or len(next(iter(policy.get_action(observation).values())))
        calls = program.shuffled_rounds(["call"], arguments.rounds, arguments.warm_up, what="calls")
        samples_ms = [1000 * seconds_of(partial(policy.get_action, observation)) for _ in calls][arguments.warm_up :]
        measured = {"latency_ms": percentiles(samples_ms), "samples_ms": [round(each, 3) for each in samples_ms], "rounds": len(samples_ms)}
        measured |= {"engine": policy.engine.name, "device": str(policy.device)}
    advice = [advise(measured["latency_ms"]["p99"] / 1000, fps, horizon) for fps in arguments.fps]
    return {"benchmark": "inference_profiler", **measured, "advice": advice, "weights": weights, **program.provenance(arguments.seed)}


def as_table(result: dict[str, Any]) -> str:
    p = result["latency_ms"]
    keys = ("delay_ticks", "needed_actions_per_chunk", "actions_per_chunk", "controller", "highest_fps_without_pauses")
    rows = [(f"{row['fps']:g}", *(row[key] for key in keys)) for row in result["advice"]]
    measured = f"latency p50 {p['p50']:.1f} ms, p95 {p['p95']:.1f} ms, p99 {p['p99']:.1f} ms ({result['weights']})"
    reasons = "\n".join(f"* {row['fps']:g} Hz: {row['reason']}." for row in result["advice"])
    return "\n\n".join([measured, program.markdown_table(("fps", *keys), rows), reasons])


@dataclass
class Config(program.RandomFlags):
    latency_ms: str | None = None  # instead of measuring: milliseconds, or measured:FILE[#PLACE] (percentiles in a benchmark's JSON)
    fps: list[float] = field(default_factory=lambda: [30.0, 50.0])  # control rates to advise on
    actions_per_chunk: int | None = None  # default: what the policy answers; with --latency_ms 16
    rounds: int = 100  # timed calls, at least 50
    warm_up: int = 3  # calls before them that are not counted
    processor_path: Path | None = None  # directory with the tokenizer's files; default: looked up
    out: Path = Path("outputs/inference_profiler")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    return program.finish("inference_profiler", program.read_flags(Config, argv, __doc__), run, as_table)


if __name__ == "__main__":
    sys.exit(main())
