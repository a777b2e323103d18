"""`place` without pixels: what is known of the scene, one tick of an episode, and how far an episode came.

Targets pass the control loop's safety filter, so no joint may change by more than 6 degrees (the jaw: 6 per cent) per tick, for the expert that makes
the data and for the policy alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.lib.program import in_processes
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.safety import SafetyFilter, SafetyOptions
from gr00t_fast.errors import ConfigError, RobotError
from gr00t_fast.robots.so100_sim.scene import BLOCK_HALF_M, BOWL_RADIUS_M
from gr00t_fast.robots.so100_sim.scripted_expert import expert
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, TICK_S, Simulation
from gr00t_fast.robots.so100_sim.units import GRIPPER, LIMITS_DEG
from training.samples import FIRST_LAYOUT_SEED, HORIZON, write_arrays

# --- one episode --------------------------------------------------------------------------------------------------------------------------------

SUCCESS_TICKS = 5  # in a row: a block that bounces through the bowl does not count
SHUT_PERCENT = 12.0  # a jaw target below this means to hold: the script's 2, and the ticks before
# Of the scene vector: block x y z (m), cos and sin of four times its turn (it has four equal sides), bowl x y (m), held (0 or 1).
SCENE_PARTS = {"block": slice(0, 5), "bowl": slice(5, 7), "grip": slice(7, 8)}
SCENE_WIDTH = 8
_LIFTED_M, _DOWN_M = 0.02, 0.01  # off the table, and on it again
_LOST_M = 0.04  # from the fingers' middle: farther than any grasp

Stage = Literal["grasp", "transport", "release"]


class PlaceWorld:
    """One episode at a time. `reset` first; then look (`joints`, `scene`) and `send`, a tick each.

    solved: tick at which SUCCESS_TICKS in a row were complete, or None. lifts: how often the block was taken off the table; more than once, it fell
    in between. over_bowl: whether it was ever held there.
    """

    def __init__(self) -> None:
        self.simulation = Simulation("place", 0)
        model = self.simulation.model
        pads = {name: [i for i in range(model.ngeom) if model.geom(i).name.startswith(f"{name}_pad")] for name in ("fixed", "moving")}
        self._fixed, self._moving, self._block = set(pads["fixed"]), set(pads["moving"]), model.geom("block").id
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.simulation.reset(seed)
        self.seed, self.tick, self.solved = seed, 0, None
        self.lifts, self.over_bowl, self._up = 0, False, False
        self._good_ticks = 0
        options = SafetyOptions(max_speed_deg_s=180.0, max_following_error_deg=None)
        self._safety = SafetyFilter(LIMITS_DEG, SO100_JOINTS, options, fps=1 / TICK_S, units_per_deg=np.ones(6))
        self._safety.start(self.simulation.joints_deg)

    def begin_at(self, joints_deg: np.ndarray) -> None:
        """Put the arm elsewhere (6,) before the first tick, and let it hold there."""
        self.simulation.place_arm(joints_deg)
        self.simulation.set_targets(joints_deg)
        self._safety.start(joints_deg)

    def send(self, targets_deg: np.ndarray) -> None:
        """Targets (6,) in degrees for one tick."""
        self.simulation.set_targets(self._safety(targets_deg))
        self.simulation.advance(TICK_S)
        self.tick += 1
        self._good_ticks = self._good_ticks + 1 if self.simulation.success else 0
        if self.solved is None and self._good_ticks >= SUCCESS_TICKS:
            self.solved = self.tick
        self._note_height()

    def _note_height(self) -> None:
        block, bowl = self.simulation.block_m, self.simulation.bowl_m
        height_m = block[2] - BLOCK_HALF_M
        if not self._up and height_m > _LIFTED_M and self.held:
            self.lifts, self._up = self.lifts + 1, True
        elif height_m < _DOWN_M:
            self._up = False
        self.over_bowl |= bool(self._up and self.held and np.hypot(*(block - bowl)[:2]) < BOWL_RADIUS_M)

    # --- what is known -----------------------------------------------------------------------------------------------------------------

    @property
    def joints(self) -> np.ndarray:
        """Measured (6,), degrees and per cent."""
        return self.simulation.joints_deg

    @property
    def scene(self) -> np.ndarray:
        """(SCENE_WIDTH,): see SCENE_PARTS."""
        yaw = 4 * self.simulation.block_yaw_rad
        return np.array([*self.simulation.block_m, np.cos(yaw), np.sin(yaw), *self.simulation.bowl_m[:2], float(self.held)])

    @property
    def held(self) -> bool:
        """Whether both jaws touch the block."""
        pairs = self.simulation.data.contact.geom[: self.simulation.data.ncon]
        touching = {int(other) for pair in pairs if self._block in pair for other in pair}
        return bool(touching & self._fixed and touching & self._moving)

    @property
    def lost(self) -> bool:
        """The jaw is told to hold, and the block is elsewhere and not in the bowl: the grasp has failed, or the block fell on the way."""
        simulation = self.simulation
        away_m = np.linalg.norm(simulation.tcp_m - simulation.block_m)
        return bool(simulation.targets_deg[GRIPPER] < SHUT_PERCENT and away_m > _LOST_M and not simulation.block_in_bowl)

    @property
    def failed_at(self) -> Stage | None:
        """Of an episode that is over: what never happened first. None when solved."""
        if self.solved is not None:
            return None
        return "grasp" if not self.lifts else "transport" if not self.over_bowl else "release"


# --- demonstrations -----------------------------------------------------------------------------------------------------------------------------

SHARD = 50  # episodes per file: what an interruption can lose
_SEED_STRIDE = 100_003  # layouts of one --seed, as in record.py
_ATTEMPTS = 3  # of the script in one episode
_DRIFT_DEG, _DRIFT_KEPT = 2.0, (0.8, 0.96)  # per episode: standard deviation up to this, and what is left of the drift a tick later
_START_DEG = 4.0
_SHOVE_PROBABILITY, _SHOVE_DEG, _SHOVE_TICKS = 0.025, 5.0, (4, 12)
_CLEAR_M = 0.055  # from finger tips to block, below which nobody shoves: the fingers are about to close
_BODY = np.arange(len(SO100_JOINTS)) != GRIPPER


@dataclass(frozen=True)
class Episodes:
    """Ticks of all episodes behind one another. joints (T, 6) measured, targets (T, 6) wanted, both degrees; scene (T, SCENE_WIDTH); ends (E,)
    the tick after each episode's last; seeds (E,) of the layouts; attempts (E,) of the script."""

    joints: np.ndarray
    scene: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    seeds: np.ndarray
    attempts: np.ndarray

    def __len__(self) -> int:
        return len(self.joints)

    def chunks(self, rows: np.ndarray, horizon: int = HORIZON) -> np.ndarray:
        """(n, horizon, 6): the targets from each row on; an episode's last one is held."""
        last = self.ends[np.searchsorted(self.ends, rows, side="right")] - 1
        return self.targets[np.minimum(rows[:, None] + np.arange(horizon), last[:, None])]


class Disturbance:
    """Degrees to add to the expert's targets (6,), tick by tick. The jaw is left alone."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._kept = rng, rng.uniform(*_DRIFT_KEPT)
        self._per_tick_deg = rng.uniform(0, _DRIFT_DEG) * np.sqrt(1 - self._kept**2)
        self._drift = self._shove = np.zeros(len(SO100_JOINTS))
        self._shove_left = 0

    def __call__(self, clear: bool) -> np.ndarray:
        self._drift = self._kept * self._drift + self._rng.normal(0, self._per_tick_deg, len(_BODY)) * _BODY
        if self._shove_left == 0 and clear and self._rng.random() < _SHOVE_PROBABILITY:
            self._shove, self._shove_left = self._rng.normal(0, _SHOVE_DEG, len(_BODY)) * _BODY, int(self._rng.integers(*_SHOVE_TICKS))
        pushed = self._shove if self._shove_left and clear else np.zeros_like(self._shove)
        self._shove_left = max(0, self._shove_left - 1)
        return self._drift + pushed


def episode(world: PlaceWorld, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Per tick: joints, scene, the expert's target, and which attempt of the script it is (1 is the first). Ends when solved or given up."""
    rng = np.random.default_rng([seed, 11])
    disturbance = Disturbance(rng)
    world.reset(seed)
    world.begin_at(HOME_DEG + rng.normal(0, _START_DEG, len(_BODY)) * _BODY)
    for attempt in range(1, _ATTEMPTS + 1):
        for targets in expert(world.simulation):
            yield world.joints, world.scene, targets, attempt
            apart_m = np.linalg.norm(world.simulation.tcp_m - world.simulation.block_m)
            world.send(targets + disturbance(clear=bool(apart_m > _CLEAR_M or (world.held and world.lifts))))
            if world.lost:
                break
        if world.solved is not None:
            return


def make_shard(first_seed: int, count: int) -> Episodes:
    """Of layouts `first_seed` and following, those that end in success. The same arguments give the same episodes."""
    world, kept, attempts, seeds = PlaceWorld(), [], [], []
    for seed in range(first_seed, first_seed + count):
        try:
            ticks = list(episode(world, seed))
        except RobotError:
            continue  # a block that was pushed out of reach: nothing to learn from
        if world.solved is not None:
            kept.append(ticks)
            attempts.append(ticks[-1][3])
            seeds.append(seed)
    columns = [np.array([tick[column] for ticks in kept for tick in ticks], np.float32).reshape(-1, width) for column, width in enumerate((6, 8, 6))]
    return Episodes(*columns, np.cumsum([len(ticks) for ticks in kept], dtype=np.int64), np.array(seeds), np.array(attempts))


def write_shards(out: Path, count: int, seed: int, processes: int) -> Iterator[int]:
    """Make what is missing of `count` layouts (rounded up to whole shards); yields how many are done. ConfigError for a folder of another seed."""
    out.mkdir(parents=True, exist_ok=True)
    about = {"seed": seed, "shard": SHARD}
    if (out / "about.json").exists() and (told := json.loads((out / "about.json").read_text())) != about:
        raise ConfigError(f"{out} holds episodes of {told}, asked for were {about}. Choose another --out, or the same --seed.")
    (out / "about.json").write_text(json.dumps(about) + "\n")
    missing = [start for start in _starts(count) if not _path(out, start).exists()]
    done = SHARD * (len(_starts(count)) - len(missing))
    yield done
    jobs = [(out, start, seed, SHARD) for start in missing]
    alone = processes == 1 or len(jobs) < 2
    for _ in (_write_shard(*job) for job in jobs) if alone else in_processes(_write_shard, jobs, processes):
        done += SHARD
        yield done


def _starts(count: int) -> range:
    return range(0, count, SHARD)


def _path(out: Path, start: int) -> Path:
    return out / f"episodes_{start:06d}.npz"


def _write_shard(out: Path, start: int, seed: int, count: int) -> None:
    write_arrays(_path(out, start), vars(make_shard(FIRST_LAYOUT_SEED + seed * _SEED_STRIDE + start, count)))


def load_episodes(directory: Path, count: int) -> Episodes:
    """What `write_shards` made of the first `count` layouts, however many there are by now. Raises ConfigError when there are none."""
    shards = [dict(np.load(_path(directory, start))) for start in _starts(count)]
    if not sum(len(shard["ends"]) for shard in shards):
        raise ConfigError(f"the expert solved none of the {count} layouts in {directory}. Ask for more: --episodes.")
    starts = np.cumsum([0, *(len(shard["joints"]) for shard in shards)])
    for shard, start in zip(shards, starts, strict=False):
        shard["ends"] = shard["ends"] + start
    return Episodes(**{name: np.concatenate([shard[name] for shard in shards]) for name in Episodes.__annotations__})
