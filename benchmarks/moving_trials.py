"""Blinded trials in real time: the simulated arm reaches for a block that moves, and an inference takes 200 ms.

    python benchmarks/moving_trials.py                                # waits for inferences, against moves meanwhile
    python benchmarks/moving_trials.py --a= --b=                      # A against A: what chance makes of a difference

It is `gr00t-fast trials` with two things that no flag of a run gives: the block moves, and an inference takes --latency_ms at least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib.program import read_flags
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.cli import run, trials
from gr00t_fast.cli.main import guarded
from gr00t_fast.robots import SO100SimConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    a: str = "--controller=sync"  # flags of the first setting
    b: str = "--controller=threaded"  # flags of the second
    runs: int = 20  # trials of each
    latency_ms: float = 200.0  # of an inference, what it takes to compute included
    block_speed_m_s: float = 0.06  # how fast the block is carried
    timeout: float = 2.0  # seconds after which a trial has failed
    action_horizon: int = 16  # actions of a chunk that may play
    model_path: Path = Path("checkpoints/so100-sim-reach")  # a network of the simulated arm; default: the demo's
    order_seed: int | None = None  # of the random order; default: a new one
    resume: bool = False  # go on with the study in --out
    out: Path = Path("outputs/moving_trials")  # directory of the study


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    return guarded(lambda: study(config), "interrupted: --resume goes on")


def study(config: Config) -> int:
    check_ranges(config, latency_ms=(0, 10_000), block_speed_m_s=(0, 1))
    words = [f"--config_path={ROOT / 'configs' / 'so100_sim.yaml'}", f"--a={config.a}", f"--b={config.b}", f"--out={config.out}"]
    words += [f"--{name}={getattr(config, name)}" for name in ("runs", "timeout", "action_horizon", "model_path")]
    words += [f"--order_seed={config.order_seed}"] * (config.order_seed is not None) + ["--resume"] * config.resume
    found = trials.main.parse(words)
    for name, setting in found.settings.items():
        if not isinstance(setting.robot, SO100SimConfig):
            raise ConfigError(f"--{name}: the block moves before the simulated arm alone. Leave --robot.type out.")
        setting.robot = replace(setting.robot, block_speed_m_s=config.block_speed_m_s)
    conditions = {name: getattr(config, name) for name in ("latency_ms", "block_speed_m_s")}
    return trials.work(found, lambda setting: late(run.load(setting), config.latency_ms / 1000), conditions)


def late(policy: Any, latency_s: float) -> Any:
    """The policy, whose answers take that long at least."""
    infer = policy.get_action

    def get_action(*arguments: Any, **options: Any) -> Any:
        ready_s = time.perf_counter() + latency_s
        answer = infer(*arguments, **options)
        time.sleep(max(0.0, ready_s - time.perf_counter()))
        return answer

    policy.get_action = get_action
    return policy


if __name__ == "__main__":
    sys.exit(main())
