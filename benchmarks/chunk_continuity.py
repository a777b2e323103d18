"""How far a new chunk jumps from the one it takes over from, by delay and by way of joining them.

    python benchmarks/chunk_continuity.py --out=outputs/chunk_continuity          # random demo weights, made in --out

The simulated arm of the demo runs in virtual time; an inference takes `--latency_ms` in whole ticks; the next one begins when it is done. Two figures
for each tick at which a chunk enters, both of the joint that jumps most, in degrees per second:

* takeover jump: the target that is sent against the one that would have been sent without the new chunk (held, where the old one has run out),
  times the control rate;
* velocity change: the commanded velocity into this tick against that into the tick before. It is what the arm feels, and has a floor: the changes
  that a chunk makes by itself, printed as `within chunks`.

Two policies: `network`, the checkpoint, and `smooth`, an exactly known flow with smooth chunks (SmoothFlow) in the network's place, because
RANDOM weights make chunks that are neither smooth nor related to one another: there, only what is carried over from the old chunk can join, and
the velocity change cannot be cut by much, because from row to row within a chunk it is as large as between two chunks.

The column `jitter`: an inference takes 3 ticks, now and then 6 (8 of 100). rtc and prefix commit to the longest of the last 20, as the controller
does; late counts the chunks that took longer than that. No safety limit is applied to the figures.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.program import (
    RandomFlags,
    Result,
    check_counts,
    checkpoint_of,
    conditions,
    drawing,
    finish,
    markdown_table,
    provenance,
    read_flags,
    shuffled_rounds,
)
from gr00t_fast import load_policy
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.chunk_buffer import ChunkBuffer, DelayEstimate, TimedChunk
from gr00t_fast.control.controller import PolicyRunner
from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.safety import SafetyFilter, SafetyOptions
from gr00t_fast.engine import Engine
from gr00t_fast.engine.continuation import denoise_towards
from gr00t_fast.measurement import percentiles
from gr00t_fast.model.action_head import integrate
from gr00t_fast.robots.config import SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.robot import SimArm

LENGTH_ROWS = 6.0  # over which actions stay similar: a fifth of a second at 30 Hz
ROUGHNESS = 0.01  # deviation of the white part; the smooth part has 0.5 (joints then use about half of their range)
DEVIATION = 0.5


class SmoothFlow:
    """Callable as `velocity(actions (B, H, A), step)` for `steps` Euler steps."""

    def __init__(self, horizon: int, steps: int) -> None:
        rows = torch.arange(horizon, dtype=torch.float64)
        self.covariance = DEVIATION**2 * torch.exp(-0.5 * ((rows[:, None] - rows) / LENGTH_ROWS) ** 2) + ROUGHNESS**2 * torch.eye(horizon)
        self.steps = steps
        self._matrices = [self._matrix(step / steps) for step in range(steps)]

    def _matrix(self, t: float) -> Tensor:
        s, one = self.covariance, torch.eye(len(self.covariance), dtype=torch.float64)
        return ((t * s - (1 - t) * one) @ torch.linalg.inv(t**2 * s + (1 - t) ** 2 * one)).float()

    def __call__(self, actions: Tensor, step: int) -> Tensor:
        return self._matrices[step] @ actions


SMOOTHINGS = ("none", "ensemble", "prefix", "rtc")
METRICS = {"takeover_jump": "takeover jump", "velocity_change_at_boundaries": "velocity change"}
JITTER, JITTER_TICKS, JITTER_PARTS = "jitter", (3, 6), (0.92, 0.08)
INSTRUCTION = "Place the block in the bowl"


class SmoothEngine(Engine):
    """Runs the known flow instead of a network."""

    name, continues = "smooth-flow", frozenset({"rtc", "prefix"})
    device, dtype = torch.device("cpu"), torch.float32

    def run(self, inputs, noise, denoising_steps, timer, continuation=None):
        velocity = SmoothFlow(noise.shape[1], denoising_steps)
        with timer.stage("denoise"), torch.no_grad():
            if continuation is not None:
                return denoise_towards(velocity, noise, denoising_steps, continuation)
            return integrate(velocity, noise, denoising_steps)


class Episode:
    """The arm, the policy and the chunk that plays, in lock-step."""

    def __init__(self, policy: Any, smoothing: str, delay: str, fps: float, seed: int) -> None:
        """`delay`: ticks, or `jitter`."""
        self.clock, self.fps, self.smoothing = VirtualClock(), fps, smoothing
        self._delays, usual = (_jitter(seed), JITTER_TICKS[0]) if delay == JITTER else (itertools.repeat(int(delay)), int(delay))
        self._expected = DelayEstimate(1.0)
        self._expected.add(usual)
        self._instant = usual == 0
        self.late_chunks = 0
        camera = SimCameraConfig(width=640, height=480, fps=30)
        self.arm = SimArm(SO100SimConfig(cameras={"front": camera}), self.clock)
        self.arm.connect()
        self.arm.reset(seed)
        policy.reset()
        metadata = policy.metadata
        camera_map = resolve_camera_map(self.arm.cameras, metadata.resolutions, None)
        binding = RobotBinding(policy.get_modality_config(), metadata.state_widths, metadata.action_widths, self.arm.joint_names, camera_map)
        self.runner = PolicyRunner(policy, binding, INSTRUCTION, self.clock)
        self.buffer = ChunkBuffer(ensemble=smoothing == "ensemble")
        self.safety = SafetyFilter(
            self.arm.joint_limits,
            self.arm.joint_names,
            SafetyOptions(max_speed_deg_s=180.0, max_following_error_deg=None),  # the plan is studied, not the arm
            fps=self.fps,
            units_per_deg=self.arm.units_per_deg,
        )

    def play(self, ticks: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Per tick the target (J,), and at a boundary the target that would have been sent without the new chunk."""
        self.safety.start(self.arm.observe(with_frames=False).joints)
        self.buffer.offer(self._think(0), 0)
        coming: TimedChunk | None = None
        arrives = 0
        for tick in range(ticks):
            self.clock.sleep_until_s(tick / self.fps)
            without = None
            if self._instant and tick > 0:
                coming, arrives = self._think(tick), tick
            if coming is not None and tick >= arrives:
                without = copy.copy(self.buffer).due(tick).target
                self.buffer.offer(coming, tick)
                self._note_delay(tick - coming.observed)
                coming = None
            target = self.buffer.due(tick).target
            self.arm.send(self.safety(target))
            if coming is None and not self._instant:
                coming, arrives = self._think(tick), tick + next(self._delays)
            yield target, without
        self.arm.land()

    def _note_delay(self, ticks: int) -> None:
        self.late_chunks += ticks > self._expected.ticks  # what was committed: nothing is noted while an inference runs
        self._expected.add(ticks)

    def _think(self, tick: int) -> TimedChunk:
        options, left = {}, self.buffer.leftover(tick)
        if left and self.smoothing in ("rtc", "prefix"):
            rows = min(len(values) for values in left.values())
            options = {"prefix": ActionPrefix(left, min(self._expected.ticks, rows), self.smoothing)}
        chunk, actions = self.runner.infer(self.arm.observe(), **options)
        return TimedChunk(chunk, tick, 0, actions)


def _jitter(seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield int(generator.choice(JITTER_TICKS, p=JITTER_PARTS))


def jumps_of(episode: Episode, ticks: int) -> dict[str, Any]:
    """Jumps in degrees (gripper: per cent) per second, the largest joint of each boundary."""
    played = list(episode.play(ticks))
    targets = np.array([target for target, _ in played])
    boundaries = [tick for tick, (_, without) in enumerate(played) if without is not None]
    takeover = [episode.fps * np.abs(targets[tick] - played[tick][1]).max() for tick in boundaries]
    change = episode.fps * np.abs(np.diff(targets, 2, axis=0)).max(axis=1)  # entry i: velocity into tick i + 2 against that into i + 1
    ticks_of_change = np.arange(2, len(targets))
    at_boundary = np.isin(ticks_of_change, boundaries)
    after_boundary = np.isin(ticks_of_change - 1, boundaries)  # the way back from a jump is part of it
    return {
        "boundaries": len(boundaries),
        "takeover_jump": percentiles(takeover),
        "velocity_change_at_boundaries": percentiles(change[at_boundary]),
        "velocity_change_within_chunks": percentiles(change[~at_boundary & ~after_boundary]),
        "starved_ticks": episode.buffer.starved_ticks,
        "late_chunks": episode.late_chunks,
    }


def cost_of_a_step(policy: Any, rounds: int) -> dict[str, Any]:
    """Denoising time per step in ms, the ways taking turns."""
    observation = policy.example_observation(INSTRUCTION)
    old, times = policy.get_action(observation), {"none": [], "prefix": [], "rtc": []}
    for order, counted in shuffled_rounds(times, rounds, 2):
        for method in order:
            prefix = None if method == "none" else ActionPrefix({key: rows[2:] for key, rows in old.items()}, 4, method)
            policy.get_action(observation, prefix=prefix)
            if counted:
                times[method].append(policy.last_timing["denoise"] / policy.denoising_steps)
    result = {method: percentiles(samples) for method, samples in times.items()}
    return {"ms_per_step": result, "rtc_over_none": round(result["rtc"]["p50"] / result["none"]["p50"], 2)}


def run(arguments: Config) -> dict[str, Any]:
    check_counts(arguments, "ticks", "rounds")
    check_counts(arguments, "latency_ms", least=0)
    ticks = dict.fromkeys(str(round(arguments.fps * ms / 1000)) for ms in arguments.latency_ms)
    path = checkpoint_of(arguments)
    policies = {name: load_policy(path, **arguments.options()) for name in arguments.policies}
    for name, policy in policies.items():
        if name == "smooth":
            policy.engine = SmoothEngine()
    table: dict[str, Any] = {}
    for name, policy in policies.items():
        for delay in (*ticks, JITTER):
            for smoothing in SMOOTHINGS:
                episode = Episode(policy, smoothing, delay, arguments.fps, arguments.seed)
                table.setdefault(name, {}).setdefault(smoothing, {})[delay] = jumps_of(episode, arguments.ticks)
            if sys.stderr.isatty():
                print(f"{name}: delay {delay} done", file=sys.stderr)
    return {
        "benchmark": "chunk_continuity",
        "unit": "degrees (gripper: per cent) per second",
        "jumps": table,
        "cut_of_the_largest_jump": _cuts(table, "takeover_jump"),
        "cut_of_the_largest_velocity_change": _cuts(table, "velocity_change_at_boundaries"),
        "cost": cost_of_a_step(policies["network"], arguments.rounds) if "network" in policies else None,
        "denoising_steps": next(iter(policies.values())).denoising_steps,
        "weights": str(arguments.model_path) if arguments.model_path else "RANDOM (demo size): chunks are unrelated to each other and to the scene",
        "device": str(next(iter(policies.values())).device),
        "engine": next(iter(policies.values())).engine.name,
        "rounds": arguments.rounds,
        "ticks": arguments.ticks,
        "fps": arguments.fps,
        **provenance(arguments.seed),
    }


def _cuts(table: dict[str, Any], metric: str) -> dict[str, Any]:
    """Largest figure without smoothing over the largest with it, by policy, way and delay."""
    return {
        name: {way: {delay: _ratio(arms["none"][delay], row, metric) for delay, row in rows.items()} for way, rows in arms.items() if way != "none"}
        for name, arms in table.items()
    }


def _ratio(without: dict[str, Any], with_it: dict[str, Any], metric: str) -> float | None:
    """None where nothing is to be compared: no boundary, or no jump left."""
    high, low = without[metric], with_it[metric]
    return round(high["max"] / low["max"], 1) if high and low and low["max"] else None


def as_table(result: Result) -> str:
    parts = []
    for name, arms in result["jumps"].items():
        delays = list(arms["none"])
        for metric, cuts in zip(METRICS, (result["cut_of_the_largest_jump"], result["cut_of_the_largest_velocity_change"]), strict=True):
            rows = [(way, *(_largest(row[metric]) for row in by_delay.values())) for way, by_delay in arms.items()]
            if metric == "velocity_change_at_boundaries":
                rows.append(("within chunks", *(_largest(row["velocity_change_within_chunks"]) for row in arms["none"].values())))
            rows += [(f"cut by {way}", *("-" if cut is None else f"{cut}x" for cut in by_delay.values())) for way, by_delay in cuts[name].items()]
            parts.append(f"{name}: largest {METRICS[metric]} at a chunk boundary, {result['unit']}")
            parts.append(markdown_table(("delay (ticks)", *delays), rows))
        late = ", ".join(f"{rows['late_chunks']} at {delay}" for delay, rows in arms["rtc"].items() if rows["late_chunks"])
        parts.append(f"Chunks that came later than was committed (late): {late or 'none'}.")
    if result["cost"]:
        steps = ", ".join(f"{way} {row['p50']:.2f}" for way, row in result["cost"]["ms_per_step"].items())
        parts.append(f"One denoising step (p50, ms): {steps}; rtc costs {result['cost']['rtc_over_none']}x.")
    return "\n\n".join([*parts, f"Weights: {result['weights']}."])


def _largest(figures: dict[str, float] | None) -> str:
    return "-" if figures is None else f"{figures['max']:.0f}"


def plot(result: dict[str, Any], path: Path) -> None:
    titles = {"network": "the checkpoint's network", "smooth": "a known flow with smooth chunks"}
    said = f"chunk boundaries, weights {result['weights'].split(' (')[0]}, {conditions(result)}, {result['ticks']} ticks at {result['fps']:g} Hz"
    size = (5.5 * len(result["jumps"]), 7)
    with drawing(path, said, 2, len(result["jumps"]), size, sharex=True, sharey=True) as axes:
        for line, metric in zip(axes, METRICS, strict=True):
            for axis, (name, arms) in zip(line, result["jumps"].items(), strict=True):
                for way, rows in arms.items():
                    points = [(int(delay), row[metric]["max"]) for delay, row in rows.items() if delay != JITTER and row[metric]]
                    axis.semilogy(*zip(*points, strict=True), marker="o", markersize=4, label=way)
                axis.set_title(titles[name], fontsize=10)
                axis.set_xlabel("delay (ticks)")
                axis.grid(alpha=0.3, which="both")
            line[0].set_ylabel(f"largest {METRICS[metric]}\n({result['unit']})", fontsize=9)
        axes[0][0].legend(fontsize=8)


@dataclass
class Config(RandomFlags):
    engine: str = "eager"  # how the network is run; one that can continue a chunk
    latency_ms: list[float] = field(default_factory=lambda: [0.0, 33.0, 67.0, 100.0, 133.0, 167.0, 200.0, 233.0, 267.0])  # rounded to ticks of --fps
    policies: list[Literal["network", "smooth"]] = field(default_factory=lambda: ["network", "smooth"])  # see above
    ticks: int = 90  # of the control loop per run
    fps: float = 30.0  # control rate
    rounds: int = 20  # calls per way when timing a step
    out: Path = Path("outputs/chunk_continuity")  # directory for JSON, table and plot


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    return finish("chunk_continuity", config, run, as_table, plot)


if __name__ == "__main__":
    sys.exit(main())
