"""How far a new chunk jumps from the one it takes over from, by delay and by way of joining them.

    python benchmarks/chunk_continuity.py --out=outputs/chunk_continuity          # random demo weights, made in --out

The simulated arm of the demo runs in virtual time; an inference takes exactly `delay` ticks, and the next one begins when it is done. Two figures
for each tick at which a chunk enters, both of the joint that jumps most, in degrees per second:

* takeover jump: the target that is sent against the one that would have been sent without the new chunk (held, where the old one has run out),
  times the control rate;
* velocity change: the commanded velocity into this tick against that into the tick before. It is what the arm feels, and has a floor: the changes
  that a chunk makes by itself, printed as `within chunks`.

Two policies: `network`, the checkpoint, and `smooth`, an exactly known flow with smooth chunks (smooth_flow.py) in the network's place, because
RANDOM weights make chunks that are neither smooth nor related to one another: there, only what is carried over from the old chunk can join, and
the velocity change cannot be cut by much, because from row to row within a chunk it is as large as between two chunks.

The column `jitter`: an inference takes 3 ticks, now and then 6 (8 of 100). rtc and prefix commit to the longest of the last 20, as the controller
does; `late` counts the chunks that took longer than that. No safety limit is applied to the figures. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.program import checkpoint_of, finish, provenance
from benchmarks.smooth_flow import SmoothFlow
from gr00t_fast import load_policy
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.chunk_buffer import ChunkBuffer, DelayEstimate, TimedChunk
from gr00t_fast.control.controller import PolicyRunner
from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.safety import SafetyFilter, SafetyOptions
from gr00t_fast.engine.continuation import denoise_towards
from gr00t_fast.measurement import percentiles
from gr00t_fast.robots.config import SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.robot import SimArm

SMOOTHINGS = ("none", "ensemble", "prefix", "rtc")
METRICS = {"takeover_jump": "takeover jump", "velocity_change_at_boundaries": "velocity change"}
JITTER, JITTER_TICKS, JITTER_PARTS = "jitter", (3, 6), (0.92, 0.08)
INSTRUCTION = "Place the block in the bowl"


class SmoothEngine:
    """Runs the known flow instead of a network."""

    name, continues = "smooth-flow", True

    def run(self, inputs, noise, denoising_steps, timer, goal=None):
        velocity = SmoothFlow(noise.shape[1], denoising_steps)
        with timer.stage("denoise"), torch.no_grad():
            if goal is not None:
                return denoise_towards(velocity, noise, denoising_steps, goal)
            actions = noise
            for step in range(denoising_steps):
                actions = actions + velocity(actions, step) / denoising_steps
            return actions

    def synchronise(self) -> None:
        """Nothing runs apart."""


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
        facts = policy.facts
        camera_map = resolve_camera_map(self.arm.cameras, facts.resolutions, None)
        binding = RobotBinding(policy.get_modality_config(), facts.state_widths, facts.action_widths, self.arm.joint_names, camera_map)
        self.runner = PolicyRunner(policy, binding, INSTRUCTION, self.clock)
        self.buffer = ChunkBuffer(ensemble=smoothing == "ensemble")
        self.safety = SafetyFilter(
            self.arm.joint_limits,
            self.arm.joint_names,
            SafetyOptions(max_following_error_deg=None),  # the plan is studied, not the arm
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
    for number in range(rounds + 2):
        for method, samples in times.items():
            prefix = None if method == "none" else ActionPrefix({key: rows[2:] for key, rows in old.items()}, 4, method)
            policy.get_action(observation, prefix=prefix)
            if number >= 2:
                samples.append(policy.last_timing["denoise"] / policy.denoising_steps)
    result = {method: percentiles(samples) for method, samples in times.items()}
    return {"ms_per_step": result, "rtc_over_none": round(result["rtc"]["p50"] / result["none"]["p50"], 2)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    path = checkpoint_of(arguments)
    policies = {name: _load(path, arguments) for name in arguments.policies}
    for name, policy in policies.items():
        if name == "smooth":
            policy.engine = SmoothEngine()
    table: dict[str, Any] = {}
    for name, policy in policies.items():
        for delay in (*map(str, arguments.delays), JITTER):
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


def _load(path: Path, arguments: argparse.Namespace) -> Any:
    return load_policy(
        path,
        arguments.embodiment_tag,
        arguments.data_config,
        denoising_steps=arguments.denoising_steps,
        device=arguments.device,
        precision=arguments.precision,
        engine="eager",
        seed=arguments.seed,
    )


def as_table(result: dict[str, Any]) -> str:
    lines = []
    for name, arms in result["jumps"].items():
        for metric, cuts in zip(METRICS, (result["cut_of_the_largest_jump"], result["cut_of_the_largest_velocity_change"]), strict=True):
            lines += ["", f"{name}: largest {METRICS[metric]} at a chunk boundary, {result['unit']}", *_block(arms, metric, cuts[name])]
        lines.append(_line("late", [rows["late_chunks"] for rows in arms["rtc"].values()]))
    if result["cost"]:
        steps = ", ".join(f"{way} {row['p50']:.2f}" for way, row in result["cost"]["ms_per_step"].items())
        lines += ["", f"one denoising step (p50, ms): {steps}; rtc costs {result['cost']['rtc_over_none']}x"]
    return "\n".join([*lines, f"weights: {result['weights']}"])


def _block(arms: dict[str, Any], metric: str, cuts: dict[str, Any]) -> Iterator[str]:
    yield _line("delay (ticks)", arms["none"])
    for way, rows in arms.items():
        yield _line(way, [_largest(row[metric]) for row in rows.values()])
    if metric == "velocity_change_at_boundaries":
        yield _line("within chunks", [_largest(row["velocity_change_within_chunks"]) for row in arms["none"].values()])
    for way, by_delay in cuts.items():
        yield _line(f"cut by {way}", ["-" if cut is None else f"{cut}x" for cut in by_delay.values()])


def _line(name: str, cells: Iterable[object]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>9}" for cell in cells)


def _largest(figures: dict[str, float] | None) -> str:
    return "-" if figures is None else f"{figures['max']:.0f}"


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(result["jumps"]), figsize=(5.5 * len(result["jumps"]), 7), squeeze=False, sharex=True, sharey=True)
    titles = {"network": "the checkpoint's network", "smooth": "a known flow with smooth chunks"}
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
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    return finish("chunk_continuity", _parser().parse_args(argv), run, as_table, plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of demo size is made in --out")
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--delays", type=int, nargs="+", default=list(range(9)), help="ticks per inference")
    parser.add_argument("--policies", nargs="+", choices=("network", "smooth"), default=["network", "smooth"])
    parser.add_argument("--ticks", type=int, default=90, help="per run")
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=20, help="calls per way when timing a step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/chunk_continuity"), help="directory for the JSON and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
