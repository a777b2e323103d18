"""Closed loop of many `place` episodes at once, in simulated time, and the same for the scripted expert.

The worlds stand still while the network thinks, so nothing depends on the machine's speed, and all worlds ask at the same ticks, so one inference
serves them all. The noise of an episode's k-th inference depends on its layout and k alone: settings are compared on the same draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gr00t_fast.errors import RobotError
from gr00t_fast.measurement import wilson_interval
from gr00t_fast.robots.so100_sim.expert import expert
from training.labels import FPS, HORIZON
from training.place_network import PlaceNetwork, Scaling
from training.place_world import PlaceWorld, Stage

MAX_TICKS = 180  # 6 s; the expert needs 3 to 3.5


@dataclass(frozen=True)
class Outcome:
    """ticks: until solved, or None. failed_at: what the episode never came to, or None. lifts: more than one means that the block fell."""

    seed: int
    ticks: int | None
    failed_at: Stage | None
    lifts: int = 1


class PlaceTrials:
    """One world per layout, used again for every setting."""

    def __init__(self, network: PlaceNetwork, scaling: Scaling, seeds: Sequence[int], max_ticks: int = MAX_TICKS) -> None:
        self._network, self._scaling, self._max_ticks = network, scaling, max_ticks
        self._seeds, self._worlds = tuple(seeds), [PlaceWorld() for _ in seeds]

    def play(self, denoising_steps: int, executed: int, noise_seed: int = 0) -> list[Outcome]:
        """Every layout once, with `executed` actions of each chunk. A world that is solved stops."""
        noises = [np.random.default_rng([seed, noise_seed]) for seed in self._seeds]
        tables = self._network.head.step_tables(denoising_steps)
        for world, seed in zip(self._worlds, self._seeds, strict=True):
            world.reset(seed)
        tick = 0
        while tick < self._max_ticks and (running := [i for i, world in enumerate(self._worlds) if world.solved is None]):
            count = min(executed, self._max_ticks - tick)
            chunks = self._chunks([self._worlds[i] for i in running], [noises[i] for i in running], tables)
            for i, chunk in zip(running, chunks, strict=True):
                _execute(self._worlds[i], chunk[:count])
            tick += count
        return [_outcome(world) for world in self._worlds]

    @torch.no_grad()
    def _chunks(self, worlds: Sequence[PlaceWorld], noises: Iterable[np.random.Generator], tables: Any) -> np.ndarray:
        """(n, H, 6) in degrees: one inference for all."""
        shape = (HORIZON, self._network.head.config.action_dim)
        noise = torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in noises]))
        joints = self._scaling.normalised(np.stack([world.joints for world in worlds]), "joints")
        scene = self._scaling.normalised(np.stack([world.scene for world in worlds]), "scene")
        return self._scaling.targets_deg(self._network(joints, scene, noise, tables))


def _execute(world: PlaceWorld, targets: np.ndarray) -> None:
    for target in targets:
        if world.solved is None:
            world.send(target)


def expert_outcomes(seeds: Sequence[int], max_ticks: int = MAX_TICKS) -> list[Outcome]:
    """The scripted expert on the same layouts, by the same rules: the ceiling."""
    world, outcomes = PlaceWorld(), []
    for seed in seeds:
        world.reset(seed)
        try:
            for target in expert(world.simulation):
                if world.solved is not None or world.tick >= max_ticks:
                    break
                world.send(target)
        except RobotError:
            pass  # a layout that it cannot reach counts as failed
        outcomes.append(_outcome(world))
    return outcomes


def _outcome(world: PlaceWorld) -> Outcome:
    return Outcome(world.seed, world.solved, world.failed_at, world.lifts)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Success rate with its interval, time to success, and where the others failed."""
    ticks = [outcome.ticks for outcome in outcomes if outcome.ticks is not None]
    low, high = wilson_interval(len(ticks), len(outcomes))
    failed = Counter(outcome.failed_at for outcome in outcomes if outcome.failed_at)
    return {
        "successes": len(ticks),
        "episodes": len(outcomes),
        "rate": round(len(ticks) / len(outcomes), 4),
        "wilson_95": [round(low, 4), round(high, 4)],
        "seconds_p50_p95": [round(float(value), 2) for value in np.percentile(ticks, (50, 95)) / FPS] if ticks else None,
        "failed_at": {stage: failed[stage] for stage in ("grasp", "transport", "release")},
        "solved_after_a_fall": sum(outcome.ticks is not None and outcome.lifts > 1 for outcome in outcomes),
        "failed_seeds": [outcome.seed for outcome in outcomes if outcome.ticks is None],
    }


def paired(here: Sequence[Outcome], there: Sequence[Outcome]) -> dict[str, Any]:
    """Layouts that only one of two settings solved, and how likely so uneven a split is if neither is better (exact sign test, two-sided).

    Raises ValueError when they are not the same layouts in the same order.
    """
    solved = [(a.ticks is not None, b.ticks is not None, a.seed == b.seed) for a, b in zip(here, there, strict=True)]
    if not all(same for _, _, same in solved):
        raise ValueError("paired outcomes must be of the same layouts")
    only_here = sum(a and not b for a, b, _ in solved)
    only_there = sum(b and not a for a, b, _ in solved)
    n, fewer = only_here + only_there, min(only_here, only_there)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    return {"only_here": only_here, "only_there": only_there, "p": round(p, 4)}
