"""Every engine that can be used here against the plain one: how far its actions are off, how long it takes, what memory it wants, side by side.

    python benchmarks/bench_engines.py --model_path=checkpoints/so100-sim-reach
    python benchmarks/bench_engines.py --model_path=DIR --observations=./my-lerobot-dataset                  # errors on what your arm saw
    python benchmarks/bench_engines.py --model_path=DIR --engines eager openvino=exports/openvino-int8  # these two; the export lies there
    python benchmarks/bench_engines.py --size=full --device=cuda --rounds=1000                          # random weights, made on the GPU
    python benchmarks/bench_engines.py --network=n1.7                                                    # random weights of N1.7's network

`gr00t-fast bench` compares them; this adds networks with random weights, calls at a rate, and one more to compare with: `reference` is a second,
independent implementation (transformers' towers and lerobot's action head behind our pre-processing).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch

from benchmarks.lib.program import checkpoint_of, finish, provenance, read_flags
from gr00t_fast.base.contracts import NetworkName
from gr00t_fast.base.measurement import percentiles
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.engine import select_device, select_precision
from gr00t_fast.evaluation.bench import ARMS, Bench, BenchOptions, compare, seconds_of, table_rows, verdict, word_of
from gr00t_fast.inputs.data_config import DEFAULT_DATA_CONFIG
from gr00t_fast.model import Gr00t
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.virtual.random_checkpoint import random_network, write_random_checkpoint

REFERENCE = "reference"


@dataclass(kw_only=True)
class BenchEnginesConfig(OutputFlags, BenchOptions):
    """Every engine that can be used here against the plain one; without --model_path on random weights of --size (on a CPU written to --out)."""

    network: NetworkName = "n1.5"  # with random weights; a --model_path tells its own
    size: Literal["tiny", "demo", "full"] = "demo"  # of the network with random weights
    at_hz: float = 0.0  # also calls at this rate, idle in between as in a control loop; 0: none
    at_hz_seconds: float = 20.0  # how long
    out: Path = Path("outputs/bench_engines")  # directory for JSON and table

    def needs_checkpoint(self) -> bool:
        return False


class LaboratoryBench(Bench):
    """With networks of random weights, and engines that are no user's choice."""

    names = (*ARMS, REFERENCE)
    compared_with = (*Bench.compared_with, REFERENCE)
    options: BenchEnginesConfig

    @property
    def _on_device(self) -> bool:
        return not self.options.model_path and self.device.type == "cuda"

    def _checkpoint(self) -> Path:
        if not self._on_device:
            return checkpoint_of(self.options, self.options.size)
        options = self.options
        path = options.out / f"random-{options.size}-{options.network}"
        return write_random_checkpoint(path, options.size, options.data_config or DEFAULT_DATA_CONFIG, weights=False, network=options.network)

    def weights(self) -> list[str]:
        return [] if self._on_device else super().weights()

    def network(self, dtype: torch.dtype, meta: bool = False) -> Gr00t:
        if meta or not self._on_device:
            return super().network(dtype, meta)
        config = open_checkpoint(self.path, with_weights=False).config
        return random_network(config, self.device, self.dtype, self.options.seed).to(dtype)

    def open(self, name: str, directory: Path | None) -> tuple[Gr00tPolicy, str]:
        if name == REFERENCE:
            from benchmarks.lib.reference import reference_engine

            return self.policy(reference_engine(self.path, self.options.embodiment_tag, self.device, self.dtype)), word_of(self.dtype)
        return super().open(name, directory)


def main(argv: Sequence[str] | None = None) -> int:
    return finish("bench_engines", read_flags(BenchEnginesConfig, argv, __doc__), run, as_table)


def run(options: BenchEnginesConfig) -> dict[str, Any]:
    """Raises Gr00tFastError."""
    device = select_device(options.device)
    dtype = select_precision(options.precision, device)
    bench = LaboratoryBench(options, device, dtype, options.tell)
    found = compare(bench) | {"at_hz": options.at_hz}
    policies = {name: arm.pop("policy") for name, arm in found["engines"].items()}
    if options.at_hz:
        for name, arm in found["engines"].items():
            arm["at_hz_ms"] = percentiles(paced(policies[name], bench))
    return {"benchmark": "bench_engines", "device": str(device), "precision": word_of(dtype)} | found | provenance(options.seed)


def paced(policy: Gr00tPolicy, bench: LaboratoryBench) -> list[float]:
    """ms of each call when the machine idles until the next tick, as in a control loop: an idle GPU lowers its clocks."""
    options, observations, times, began_s = bench.options, bench.observations, [], time.perf_counter()
    for tick in range(round(options.at_hz * options.at_hz_seconds)):
        time.sleep(max(began_s + tick / options.at_hz - time.perf_counter(), 0))
        times.append(1000 * seconds_of(partial(policy.get_action, observations[tick % len(observations)])))
    return times


def as_table(result: dict[str, Any]) -> str:
    def at_rate(arm: Mapping[str, Any]) -> list[str]:
        times = arm.get("at_hz_ms")
        line = times and f"{'':<18} at {result['at_hz']:g} Hz, idle in between: p50 {times['p50']:.3f}, p99 {times['p99']:.3f} ms"
        return [line] if line else []

    return "\n".join([*table_rows(result, at_rate), verdict(result, apart_from=REFERENCE)])


if __name__ == "__main__":
    sys.exit(main())
