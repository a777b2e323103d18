"""Episodes of the scripted expert for `place`, with the arm disturbed and the labels not; in shards, made by several processes.

What is recorded at a tick is what the arm measures, where block and bowl are, and the target that the expert wants there. Then the arm is sent
elsewhere: a drift, a shove now and then where the fingers are clear of things, and a first pose beside home. So the network sees states that the
expert alone never comes to, with what it would do there (disturbances for augmenting robot training, Laskey et al. 2017). Where the grasp fails or
the block falls, the script begins again, and those ticks stay in: they show how to try again. An episode that does not end in success is left out.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import ConfigError, RobotError
from gr00t_fast.robots.so100_sim.expert import expert
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG
from gr00t_fast.robots.so100_sim.units import GRIPPER
from training.labels import HORIZON
from training.place_world import PlaceWorld
from training.samples import FIRST_LAYOUT_SEED

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
    for _ in _in_processes([(out, start, seed, SHARD) for start in missing], processes):
        done += SHARD
        yield done


def _starts(count: int) -> range:
    return range(0, count, SHARD)


def _path(out: Path, start: int) -> Path:
    return out / f"episodes_{start:06d}.npz"


def _in_processes(jobs: list[tuple[Path, int, int, int]], processes: int) -> Iterable[None]:
    if processes == 1 or len(jobs) < 2:
        yield from map(_write_shard, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        with (
            _interrupts_ignored()
        ):  # by the processes that are started here, for good: a terminal's Ctrl-C goes to all, and each would print its traceback
            shards = [pool.submit(_write_shard, job) for job in jobs]
        try:
            for shard in shards:
                yield shard.result()
        except BaseException:
            for process in active_children():  # otherwise the pool waits for the shards that have begun; cancelled ones would confuse it
                process.terminate()
            raise


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write_shard(job: tuple[Path, int, int, int]) -> None:
    out, start, seed, count = job
    episodes = make_shard(FIRST_LAYOUT_SEED + seed * _SEED_STRIDE + start, count)
    half_written = _path(out, start).with_suffix(".tmp")
    with half_written.open("wb") as file:
        np.savez(file, **vars(episodes))
    half_written.replace(_path(out, start))


def load_episodes(directory: Path, count: int) -> Episodes:
    """What `write_shards` made of the first `count` layouts, however many there are by now. Raises ConfigError when there are none."""
    shards = [dict(np.load(_path(directory, start))) for start in _starts(count)]
    if not sum(len(shard["ends"]) for shard in shards):
        raise ConfigError(f"the expert solved none of the {count} layouts in {directory}. Ask for more: --episodes.")
    starts = np.cumsum([0, *(len(shard["joints"]) for shard in shards)])
    for shard, start in zip(shards, starts, strict=False):
        shard["ends"] = shard["ends"] + start
    return Episodes(**{name: np.concatenate([shard[name] for shard in shards]) for name in Episodes.__annotations__})
