"""What loading costs: memory at its peak, and time from file to first action.

    python benchmarks/bench_load.py --model_path=DIR --processor_path=DIR

Each round starts a fresh process (peak memory is a property of a process) and, in turn, reads the same files into memory with nothing
else done: the floor for anything that loads them. The first read warms the page cache and is not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib.program import check_counts, count_of, finish, in_processes, provenance, read_flags
from gr00t_fast.measurement import peak_rss_bytes, percentiles


@dataclass
class Config:
    model_path: Path | None = None  # checkpoint directory; required
    processor_path: Path | None = None  # tokenizer files, when the checkpoint has none
    precision: str = "bf16"  # of the loaded weights
    rounds: int = 3  # fresh processes of each kind
    json: bool = False  # also print the result as one line of JSON, the last of the output
    out: Path = Path("outputs/bench_load")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    return finish("bench_load", read_flags(Config, argv, __doc__, required=("model_path",)), run, as_table)


def run(arguments: Config) -> dict[str, Any]:
    check_counts(arguments, "rounds")
    files = sorted(arguments.model_path.glob("model*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)

    def alone(what: str) -> dict[str, float]:
        ((_, found),) = in_processes(measure_once, [(what, arguments.model_path, arguments.processor_path, arguments.precision)], 1)
        return found

    alone("read")  # warms the page cache
    reads, loads = zip(*((alone("read"), alone("load")) for _ in range(arguments.rounds)), strict=True)
    read_s = [each["read_s"] for each in reads]
    first_s = [each["load_s"] + each["first_action_s"] for each in loads]
    peak, base = max(each["peak_bytes"] for each in loads), min(each["base_bytes"] for each in loads)
    return {
        "benchmark": "bench_load",
        "file_bytes": file_bytes,
        "loaded_weight_bytes": loads[0]["weight_bytes"],
        "peak_bytes": peak,
        "peak_over_weights": round(peak / file_bytes, 3),
        "peak_growth_over_weights": round((peak - base) / loads[0]["weight_bytes"], 3),
        "read_s": percentiles(read_s),
        "load_s": percentiles(each["load_s"] for each in loads),
        "first_action_s": percentiles(each["first_action_s"] for each in loads),
        "first_action_over_read": round(percentiles([f / r for f, r in zip(first_s, read_s, strict=True)])["p50"], 3),
        "rounds": arguments.rounds,
        **provenance(),
    }


def measure_once(what: str, model_path: Path, processor_path: Path | None, precision: str) -> dict[str, float]:
    """In a fresh process: read the files into memory, or load the policy and infer once."""
    if what == "read":
        start = time.perf_counter()
        for file in sorted(model_path.glob("model*.safetensors")):
            content = file.read_bytes()
            del content
        return {"read_s": time.perf_counter() - start}
    from gr00t_fast.policy import load_policy

    base = peak_rss_bytes()
    start = time.perf_counter()
    policy = load_policy(model_path, processor_path=processor_path, device="cpu", precision=precision)
    loaded = time.perf_counter()
    policy.get_action(policy.example_observation())
    done = time.perf_counter()
    weights = sum(p.numel() * p.element_size() for p in policy.engine.model.parameters())
    times = {"load_s": loaded - start, "first_action_s": done - loaded}
    return {**times, "base_bytes": base, "peak_bytes": peak_rss_bytes(), "weight_bytes": weights}


def as_table(result: dict[str, Any]) -> str:
    return (
        f"peak memory {result['peak_over_weights']}x the weights ({result['peak_growth_over_weights']}x without the interpreter and torch); "
        f"file to first action {result['first_action_over_read']}x the time to read the files ({count_of(result['rounds'], 'round')})"
    )


if __name__ == "__main__":
    sys.exit(main())
