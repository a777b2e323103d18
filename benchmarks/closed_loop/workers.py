"""Episodes over processes of this machine, or over machines with Ray. A job is a few episodes of one cell."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.closed_loop.cells import Cell
from benchmarks.closed_loop.episode import EpisodeRunner, Outcome
from benchmarks.closed_loop.policies import Policies
from benchmarks.program import end_with_parent
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import DATA_CONFIGS
from gr00t_fast.errors import ConfigError
from gr00t_fast.facts import read_facts
from gr00t_fast.optional import require

_EPISODES_PER_JOB = 10
EMBODIMENT_TAG, DATA_CONFIG = "new_embodiment", "so100"  # what training/ writes, and the simulation shows


@dataclass(frozen=True)
class Settings:
    """What all episodes of an evaluation share."""

    model_path: str
    instruction: str
    block_speed_m_s: float
    episode_s: float
    noise_seed: int
    device: str


def check_playable(model_path: str) -> None:
    """Before processes begin. Raises ConfigError for a checkpoint of another robot or other cameras; whether it was trained in this simulator
    cannot be told."""
    checkpoint, wanted = open_checkpoint(model_path), DATA_CONFIGS[DATA_CONFIG].video_keys
    known = EMBODIMENT_TAG in checkpoint.raw_metadata
    cameras = tuple(checkpoint.embodiment(EMBODIMENT_TAG).cameras) if known else ()
    if not set(wanted) <= set(cameras):
        had = f"cameras {', '.join(cameras) or 'none'}" if known else f"embodiment {', '.join(checkpoint.raw_metadata) or 'none'}"
        raise ConfigError(
            f"--model_path={model_path}: trained with {had}. evaluate plays one-camera networks of the data config '{DATA_CONFIG}' (embodiment "
            f"{EMBODIMENT_TAG}, camera {', '.join(wanted)}) that were trained in this simulator, as checkpoints/so100-sim-reach. Name such a one."
        )
    read_facts(model_path, EMBODIMENT_TAG, DATA_CONFIG)


@dataclass(frozen=True)
class Job:
    settings: Settings
    cell: Cell
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What came of a job; `refused` says why no episode of its cell can be played."""

    cell: Cell
    outcomes: tuple[Outcome, ...]
    refused: str | None = None

    def lines(self) -> list[dict[str, Any]]:
        if self.refused is not None:
            return [{"cell": asdict(self.cell), "refused": self.refused}]
        return [{"cell": asdict(self.cell), "outcome": asdict(outcome)} for outcome in self.outcomes]


def jobs_of(settings: Settings, wanted: Sequence[tuple[Cell, Sequence[int]]]) -> list[Job]:
    """Cells take turns, so that a run that is cut short has some of each."""
    chunks = [
        (start, Job(settings, cell, tuple(seeds[start : start + _EPISODES_PER_JOB])))
        for cell, seeds in wanted
        for start in range(0, len(seeds), _EPISODES_PER_JOB)
    ]
    return [job for _, job in sorted(chunks, key=lambda chunk: chunk[0])]


def reports(jobs: Sequence[Job], processes: int, ray_address: str | None = None) -> Iterator[Report]:
    """As they come in. Raises what a job raises; then, and when the caller stops, what has not begun is dropped."""
    if ray_address is not None:
        yield from _reports_of_ray(jobs, ray_address)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes to come, and their servers, share the cores among them
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        running = [pool.submit(play, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _reports_of_ray(jobs: Sequence[Job], address: str) -> Iterator[Report]:
    """Every machine needs this checkout and the checkpoint at the same paths. `local` starts a Ray of its own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "ray")
    where: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {"address": address}
    ray.init(log_to_driver=False, **where)
    try:
        remote = ray.remote(num_cpus=1)(play)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            (done,), waiting = ray.wait(waiting)
            yield ray.get(done)
    finally:
        ray.shutdown()


_here: dict[Settings, tuple[Policies, EpisodeRunner]] = {}  # of this process: weights and worlds are made once


def play(job: Job) -> Report:
    """Run in a process of the pool."""
    policies, runner = runner_of(job.settings)
    policy = policies.of(job.cell)
    runner.prepare(job.cell)
    try:
        return Report(job.cell, tuple(runner.play(policy, job.cell, seed, job.settings.noise_seed) for seed in job.seeds))
    except ConfigError as error:  # the controller says so before the arm moves: a chunk that is over before it arrives
        return Report(job.cell, (), str(error))


def runner_of(settings: Settings) -> tuple[Policies, EpisodeRunner]:
    """The policies and the arms of this process."""
    if settings not in _here:
        head = open_checkpoint(settings.model_path).config.head
        facts = read_facts(settings.model_path, EMBODIMENT_TAG, DATA_CONFIG)
        shape = head.action_horizon, head.action_dim
        runner = EpisodeRunner(facts, shape, settings.instruction, settings.block_speed_m_s, settings.episode_s)
        _here[settings] = Policies(settings.model_path, settings.device), runner
    return _here[settings]
