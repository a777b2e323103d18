"""Does a policy reach the block? Closed loop in the simulated arm, through the real policy, in simulated time.

    python training/reach.py --model_path=checkpoints/so100-sim-reach --episodes=200

The world stands still while the network thinks, so the figures do not depend on the machine's speed. Success is that of the simulation: the point
between the finger tips within 3 cm of the block's centre for 5 ticks in a row, here within 75 ticks (2.5 s). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from gr00t_fast import load_policy
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.safety import SafetyFilter
from gr00t_fast.errors import ConfigError, Gr00tFastError
from gr00t_fast.measurement import git_commit, machine, versions, wilson_interval
from gr00t_fast.optional import require
from gr00t_fast.robots.config import SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.robot import SimArm
from training.network import INSTRUCTIONS
from training.samples import FIRST_LAYOUT_SEED, RESOLUTION

MAX_TICKS = 75


@dataclass(frozen=True)
class Outcome:
    """ticks: until success, or None. distance_m: from finger tips to block at the end. pushed_m: how far the block was moved."""

    seed: int
    ticks: int | None
    distance_m: float
    pushed_m: float


class ReachTrial:
    """A policy before the simulated arm. `play` one episode per seed."""

    def __init__(self, policy: Any, noise_shape: tuple[int, int], instruction: str = INSTRUCTIONS[0], max_ticks: int = MAX_TICKS) -> None:
        """noise_shape: trained horizon and padded action width of the checkpoint."""
        self._policy, self._noise_shape, self._instruction, self._max_ticks = policy, noise_shape, instruction, max_ticks
        self._clock, facts = VirtualClock(), policy.facts
        width, height = RESOLUTION
        self._arm = SimArm(SO100SimConfig(task="reach", cameras={"front": SimCameraConfig(width, height)}), self._clock)
        self._arm.connect()
        cameras = resolve_camera_map(self._arm.cameras, facts.resolutions, None)
        modalities = policy.get_modality_config()
        self._binding = RobotBinding(modalities, facts.state_widths, facts.action_widths, self._arm.joint_names, cameras)
        self._tick_s = 1 / facts.fps

    def play(self, seed: int, policy_seed: int = 0) -> Outcome:
        """One episode to the last tick; the policy's noise is that of (`seed`, `policy_seed`), so two policies meet the same."""
        arm, simulation = self._arm, self._arm.simulation
        arm.reset(seed)
        start_m, safety = simulation.block_m, SafetyFilter(arm.joint_limits, arm.joint_names)
        safety.start(arm.observe(with_frames=False).joints)
        noise = np.random.default_rng([seed, policy_seed])
        solved, tick = None, 0
        while tick < self._max_ticks:
            for target in self._chunk(noise)[: self._max_ticks - tick]:
                arm.send(safety(target))
                self._clock.time_s += self._tick_s
                arm.observe(with_frames=False)  # lets the simulation catch up
                tick += 1
                solved = tick if solved is None and arm.success else solved
        end_m = simulation.block_m
        return Outcome(seed, solved, float(np.linalg.norm(simulation.tcp_m - end_m)), float(np.linalg.norm(end_m - start_m)))

    def _chunk(self, noise: np.random.Generator) -> np.ndarray:
        """(action horizon, J): one inference from what the arm sees now."""
        observation = self._binding.policy_observation(self._arm.observe(), self._instruction)
        drawn = noise.standard_normal((1, *self._noise_shape), np.float32)
        return self._binding.action_targets(self._policy.get_action(observation, noise=drawn))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Success rate with its interval, time to success, and where the arm ended."""
    ticks = [outcome.ticks for outcome in outcomes if outcome.ticks is not None]
    low, high = wilson_interval(len(ticks), len(outcomes))
    return {
        "successes": len(ticks),
        "episodes": len(outcomes),
        "rate": round(len(ticks) / len(outcomes), 4),
        "wilson_95": [round(low, 4), round(high, 4)],
        "median_ticks": float(np.median(ticks)) if ticks else None,
        "median_end_mm": round(1000 * float(np.median([outcome.distance_m for outcome in outcomes])), 1),
        "median_pushed_mm": round(1000 * float(np.median([outcome.pushed_m for outcome in outcomes])), 1),
        "failed_seeds": [outcome.seed for outcome in outcomes if outcome.ticks is None],
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    policy = load_policy(
        arguments.model_path,
        denoising_steps=arguments.denoising_steps,
        action_horizon=arguments.action_horizon,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        engine_path=arguments.engine_path,
        seed=arguments.seed,
    )
    head = open_checkpoint(arguments.model_path).config.head
    trial = ReachTrial(policy, (head.action_horizon, head.action_dim), arguments.lang_instruction)
    outcomes = []
    for seed in require("tqdm", "sim").tqdm(range(arguments.first_seed, arguments.first_seed + arguments.episodes), unit=" episodes"):
        outcomes.append(trial.play(seed, arguments.seed))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "reach.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n")
    settings = {name: getattr(policy, name) for name in ("denoising_steps", "action_horizon")}
    settings |= {"dtype": str(policy.dtype), "engine": policy.engine.name}
    return {"evaluation": "reach", **summary(outcomes), **settings}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--episodes", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--first_seed", type=int, default=0, help=f"of the layouts; training used those from {FIRST_LAYOUT_SEED} on")
    parser.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--action_horizon", type=int, default=8, help="actions executed per inference (default: %(default)s)")
    parser.add_argument("--lang_instruction", default=INSTRUCTIONS[0], help="(default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--engine", default="auto", help="eager, or an export with onnxruntime and its like (default: %(default)s)")
    parser.add_argument("--engine_path", type=Path, help="directory of the export")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    parser.add_argument("--out", type=Path, help="directory for reach.json, one entry per episode")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.episodes < 1 or arguments.first_seed < 0:
            raise ConfigError("--episodes must be at least 1 and --first_seed not negative.")
        result = run(arguments)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = "python training/reach.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    print(json.dumps({**result, "machine": machine(), "versions": versions(), "commit": git_commit(), "command": command}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
