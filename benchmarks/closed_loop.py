"""Episodes of the simulated arm: the settings that evaluate.py compares (cells and studies), the product's own control loop with a real policy in
simulated time, and processes that play many of them.

Simulated time stands still while the network computes and passes by the injected latency instead, so that a result depends on neither the machine nor
what else it does. Targets, chunks and controllers are those of `so100_inference_optimized.py`. Axis alphabet: N ticks, J joints.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.lib.latency import VirtualWorker, play_until
from benchmarks.lib.program import in_processes
from benchmarks.lib.served_policy import ServedPolicy
from gr00t_fast import load_policy
from gr00t_fast.checkpoint import open_checkpoint, read_policy_metadata
from gr00t_fast.contracts import ActionPrefix, Clock, LandingReport, Observation, Policy
from gr00t_fast.control.auto import AutoController
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.controller import Controller, SyncController
from gr00t_fast.control.loop import LoopOptions
from gr00t_fast.control.pacer import VirtualClock
from gr00t_fast.control.threaded import OverlapOptions, ThreadedController
from gr00t_fast.errors import ConfigError, closest, require
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.robots.config import SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.sim.robot import SimArm
from gr00t_fast.robots.sim.simulation import TICK_S, Simulation

Scene = Literal["still", "moving"]
ControllerName = Literal["sync", "threaded", "auto", "resume", "rtc", "server"]
SCENES: tuple[Scene, ...] = get_args(Scene)
CONTROLLERS: tuple[ControllerName, ...] = get_args(ControllerName)
LATENCIES_MS = (0, 50, 200, 800)
STEPS = (1, 2, 4, 8)
HORIZONS = (4, 8, 16)
DEFAULT_ENGINE = "eager:fp32"


@dataclass(frozen=True, order=True)
class Cell:
    """One setting. action_horizon: actions of a chunk that may play. latency_ms is injected, and all there is: computing takes no simulated time.

    engine: NAME[:PRECISION][=DIRECTORY of an export], as in `eager:bf16` or `openvino:int8=outputs/exports/int8`.
    """

    scene: Scene = "still"
    controller: ControllerName = "sync"
    latency_ms: int = 0
    denoising_steps: int = 4
    action_horizon: int = 8
    engine: str = DEFAULT_ENGINE

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())


FACTORS = tuple(field.name for field in fields(Cell))


def product_of(factors: dict[str, Sequence[Any]]) -> list[Cell]:
    """Every combination of the values given; a factor without any stays at its default."""
    named = {name: values for name, values in factors.items() if values}
    return [Cell(**dict(zip(named, values, strict=True))) for values in itertools.product(*named.values())]


def latency_study(scenes: Sequence[Scene]) -> list[Cell]:
    """Who hides latency? A loop that waits plays 8 or 16 actions per inference; those that think ahead need all 16 to bridge the wait.

    server, resume and rtc could differ from threaded only where chunks come late or overlap for long, and are run there.
    """
    arms = [("sync", 8, LATENCIES_MS), ("sync", 16, LATENCIES_MS), ("threaded", 16, LATENCIES_MS), ("server", 16, LATENCIES_MS[2:3])]
    arms += [("resume", 16, LATENCIES_MS[2:]), ("rtc", 16, LATENCIES_MS[2:3])]
    return [
        Cell(scene, controller, latency_ms, action_horizon=horizon)
        for scene in scenes
        for controller, horizon, latencies_ms in arms
        for latency_ms in latencies_ms
    ]


def steps_study(scenes: Sequence[Scene]) -> list[Cell]:
    """What do fewer denoising steps cost, and longer chunks?"""
    return [Cell(scene, "sync", 0, steps, horizon) for scene in scenes for steps in STEPS for horizon in HORIZONS]


def precision_study(scenes: Sequence[Scene], engines: Sequence[str]) -> list[Cell]:
    """What does a number format cost? The same noise in every engine."""
    return [Cell(scene, "sync", 0, 4, 8, engine) for scene in scenes for engine in dict.fromkeys((DEFAULT_ENGINE, "eager:bf16", *engines))]


STUDIES = ("latency", "steps", "precision")


def cells_of_studies(studies: Iterable[str], scenes: Sequence[Scene], engines: Sequence[str]) -> list[Cell]:
    """The cells of all studies, each once."""
    made = {
        "latency": lambda: latency_study(scenes),
        "steps": lambda: steps_study(scenes),
        "precision": lambda: precision_study(scenes, engines),
    }
    return list(dict.fromkeys(cell for study in studies for cell in made[study]()))


def split_engine(engine: str) -> tuple[str, str, str | None]:
    """`NAME[:PRECISION][=DIRECTORY]` -> name, precision (`auto` unless given; exports bring their own), directory. Raises ConfigError."""
    words, _, directory = engine.partition("=")
    name, _, precision = words.partition(":")
    if not name:
        raise ConfigError(f"--engines: '{engine}' names no engine. Expected NAME[:PRECISION][=DIRECTORY], as in eager:bf16.")
    return name, precision if precision and not directory else "auto", directory or None


def check(cells: Sequence[Cell], trained_horizon: int) -> None:
    """Raises ConfigError for values that no run can have; what a policy or controller cannot do shows when it is asked."""
    if not cells:
        raise ConfigError("nothing to run: no study and no setting was given.")
    for cell in cells:
        if cell.controller not in CONTROLLERS:
            suggestion = closest(cell.controller, CONTROLLERS)
            raise ConfigError(f"unknown controller '{cell.controller}'.{suggestion} Expected one of {', '.join(CONTROLLERS)}.")
        if min(cell.latency_ms, cell.denoising_steps - 1, cell.action_horizon - 1) < 0:
            raise ConfigError(f"latencies must not be negative, steps and horizons at least 1; got {cell.key}.")
        if cell.action_horizon > trained_horizon:
            raise ConfigError(f"this checkpoint predicts {trained_horizon} actions; {cell.action_horizon} of them cannot play.")
        split_engine(cell.engine)


def references_of(cell: Cell) -> list[Cell]:
    """The cells that `cell` may be compared with, layout by layout, the first choice first: a loop that thinks ahead with one that waits as
    long, others with the defaults."""
    return [Cell(cell.scene, "sync", cell.latency_ms) if cell.controller != "sync" else Cell(cell.scene)]


_SOLVED, _TAIL_S = "solved", 0.5  # an episode goes on for a moment after success
Onlooker = Callable[[Simulation], None]
_MOVING_DEG = 0.1  # per tick, by any joint: 3 degrees per second
_BODY = slice(0, 5)  # all joints but the gripper, which is in per cent


@dataclass(frozen=True)
class Outcome:
    """How an episode went. solved_s: simulated time of success, None without one within the episode. jerk_rms_deg_s3: of the five joints in degrees,
    measured at 30 Hz until success, over the ticks in which the arm moves, so that waiting does not count as smooth; None where that was not noted.
    tip_path_m: how far the finger tips travelled. starved_ticks: targets held for want of actions. Those and the distance include the tail."""

    seed: int
    solved_s: float | None
    end_distance_m: float
    jerk_rms_deg_s3: float | None
    tip_path_m: float
    inferences: int
    starved_ticks: int


class LatePolicy(Policy):
    """A policy whose answers take `latency_ms` of simulated time. Inference k of an episode starts from the same noise in every cell."""

    continues = frozenset({"rtc", "prefix"})

    def __init__(self, policy: Any, noise_shape: tuple[int, int], clock: VirtualClock, latency_ms: float, noise_seed: int) -> None:
        self._policy, self._noise_shape, self._clock, self._latency_s, self._noise_seed = policy, noise_shape, clock, latency_ms / 1000, noise_seed
        self.inferences = 0
        self.begin(0)

    def begin(self, seed: int) -> None:
        self._rng, self.inferences = np.random.default_rng([seed, self._noise_seed]), 0

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        drawn = self._rng.standard_normal((1, *self._noise_shape), np.float32) if noise is None else noise
        continued = {} if prefix is None else {"prefix": prefix}
        actions = self._policy.get_action(observation, noise=drawn, **continued)
        self.inferences += 1
        self._clock.time_s += self._latency_s
        return actions

    def get_modality_config(self) -> Any:
        return self._policy.get_modality_config()

    def reset(self) -> None:
        self._policy.reset()

    def warm_up(self, instruction: str, prefix_method: str | None = None) -> dict[str, float]:
        """Nothing to warm; what an inference will take."""
        return {"total": 1000 * self._latency_s}


class LazyFrames(Mapping[str, np.ndarray]):
    """Pictures drawn when they are looked at: most ticks need none. The scene must not move on before; in simulated time it does not, since whoever
    asks for an inference gets it at once."""

    def __init__(self, arm: SimArm) -> None:
        self._arm = arm

    def __getitem__(self, name: str) -> np.ndarray:
        camera = self._arm.config.cameras[name]
        return self._arm.simulation.render(camera.view, camera.width, camera.height)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arm.config.cameras)

    def __len__(self) -> int:
        return len(self._arm.config.cameras)


class ConnectedArm:
    """A Robot over an arm that stays connected from episode to episode: building the world takes longer than playing in it."""

    name = "so100_sim"
    episodes_solved = success = rest_pose = None

    def __init__(self, clock: Clock, resolutions: Mapping[str, tuple[int, int]], block_speed_m_s: float, servo_lag_ms: float | None = None) -> None:
        """resolutions: (width, height) of the checkpoint's one camera. Raises ConfigError when it has more, and for a lag that cannot be."""
        if len(resolutions) != 1:
            raise ConfigError(f"the evaluation shows one camera, from the front; this checkpoint wants {len(resolutions)}: {', '.join(resolutions)}.")
        cameras = {"front": SimCameraConfig(*next(iter(resolutions.values())))}
        world = SO100SimConfig(task="reach", cameras=cameras, block_speed_m_s=block_speed_m_s, servo_lag_ms=servo_lag_ms)
        self.arm = SimArm(world, clock)
        self.arm.connect()
        self.joint_names, self.joint_unit = self.arm.joint_names, self.arm.joint_unit
        self.joint_limits, self.cameras, self.events = self.arm.joint_limits, self.arm.cameras, self.arm.events
        self.watch: Callable[[], None] | None = None  # of the episode that comes

    def connect(self) -> None:
        """Connected already."""

    @property
    def units_per_deg(self) -> np.ndarray:
        return self.arm.units_per_deg

    def keep_alive(self) -> None:
        """Nothing is powered."""

    def reset(self, seed: int | None = None) -> None:
        self.arm.reset(seed)
        self.arm.simulation.watch = self.watch  # not before: what is left of the episode before is none of its business

    def observe(self, with_frames: bool = True) -> Observation:
        seen = self.arm.observe(with_frames=False)
        return Observation(seen.joints, LazyFrames(self.arm) if with_frames else {}, seen.time_s)

    def send(self, targets: np.ndarray) -> None:
        self.arm.send(targets)

    def land(self, as_found: bool = False) -> LandingReport:
        return LandingReport()


class EpisodeTrace:
    """Notes what happens at every tick of the simulation, whatever the loop is doing."""

    def __init__(self, arm: ConnectedArm, episode_s: float, onlooker: Onlooker | None = None) -> None:
        self._simulation, self._episode_s, self._onlooker = arm.arm.simulation, episode_s, onlooker
        self.joints_deg: list[np.ndarray] = []
        self.tips_m: list[np.ndarray] = []
        self.solved_s: float | None = None

    def __call__(self) -> None:
        self.tips_m.append(self._simulation.tcp_m)
        if self.solved_s is None:
            self.joints_deg.append(self._simulation.joints_deg)
            # a loop that waits may finish its last inference after the time is up: the world is still judged by its own clock
            if self._simulation.success and self._simulation.time_s <= self._episode_s:
                self.solved_s = self._simulation.time_s
        if self._onlooker is not None:
            self._onlooker(self._simulation)


class EpisodeRunner:
    """The simulated arm before a block that lies still or moves, for policies to drive. `metadata` are those of the checkpoint."""

    def __init__(
        self,
        metadata: Any,
        noise_shape: tuple[int, int],
        instruction: str,
        block_speed_m_s: float,
        episode_s: float,
        servo_lag_ms: float | None = None,
    ) -> None:
        """noise_shape: trained horizon and padded action width. block_speed_m_s: in the moving scene. servo_lag_ms: as SO100SimConfig."""
        self._metadata, self._noise_shape, self._instruction = metadata, noise_shape, instruction
        self._speed_m_s, self._episode_s, self._servo_lag_ms = block_speed_m_s, episode_s, servo_lag_ms
        self._arms: dict[str, tuple[VirtualClock, ConnectedArm]] = {}

    def prepare(self, cell: Cell) -> None:
        """Build the world of a cell, once. Raises ConfigError for a world that cannot be."""
        self._arm(cell)

    def play(self, policy: Any, cell: Cell, seed: int, noise_seed: int = 0, onlooker: Onlooker | None = None) -> Outcome:
        """One episode. `onlooker` sees the world at every tick of simulated time. Raises ConfigError where a controller cannot bridge the latency."""
        clock, arm = self._arm(cell)
        clock.time_s = 0.0  # the same instants, to the last bit, whatever was played before
        late = LatePolicy(policy, self._noise_shape, clock, cell.latency_ms, noise_seed)
        late.begin(seed)
        trace = EpisodeTrace(arm, self._episode_s, onlooker)
        options = LoopOptions(self._metadata.fps, timeout_s=self._episode_s, seed=seed, camera_fault=None)  # pictures are drawn when looked at
        controller = self._controller(cell, late, arm, clock)

        def over(observation: Observation) -> bool:
            return trace.solved_s is not None and arm.arm.simulation.time_s >= trace.solved_s + _TAIL_S

        arm.watch = trace
        try:
            loop = play_until(over, _SOLVED, arm, controller, options, clock)
        finally:
            arm.watch = arm.arm.simulation.watch = None
        starved = int(loop.trace.arrays()["starved"].sum())
        return _outcome(seed, trace, arm, late.inferences, starved)

    def _arm(self, cell: Cell) -> tuple[VirtualClock, ConnectedArm]:
        if cell.scene not in self._arms:
            clock, speed_m_s = VirtualClock(), self._speed_m_s if cell.scene == "moving" else 0.0
            self._arms[cell.scene] = clock, ConnectedArm(clock, self._metadata.resolutions, speed_m_s, self._servo_lag_ms)
        return self._arms[cell.scene]

    def _controller(self, cell: Cell, policy: LatePolicy, arm: ConnectedArm, clock: VirtualClock) -> Controller:
        metadata = self._metadata
        cameras = resolve_camera_map(arm.cameras, metadata.resolutions, None)
        binding = RobotBinding(policy.get_modality_config(), metadata.state_widths, metadata.action_widths, arm.joint_names, cameras)
        worker = VirtualWorker(clock)
        waiting = SyncController(policy, binding, self._instruction, clock, cell.action_horizon, max_hold_s=None, worker=worker)
        if cell.controller == "sync":
            return waiting
        overlap = OverlapOptions(
            smoothing="rtc" if cell.controller == "rtc" else "none",
            when_late="resume" if cell.controller == "resume" else "hold",
            max_hold_s=None,
        )
        moving = ThreadedController(policy, binding, self._instruction, clock, metadata.fps, overlap, cell.action_horizon, worker)
        if cell.controller != "auto":
            return moving
        auto = AutoController(waiting, moving, metadata.fps, cell.action_horizon, metadata.trained_horizon, lambda line: None)
        auto.warm_up()
        return auto


def _outcome(seed: int, trace: EpisodeTrace, arm: ConnectedArm, inferences: int, starved_ticks: int) -> Outcome:
    simulation, tips = arm.arm.simulation, np.array(trace.tips_m)  # (N, 3)
    return Outcome(
        seed,
        None if trace.solved_s is None else round(trace.solved_s, 4),
        float(np.linalg.norm(simulation.tcp_m - simulation.block_m)),
        jerk_rms(np.array(trace.joints_deg)[:, _BODY]),
        float(np.linalg.norm(np.diff(tips, axis=0), axis=1).sum()),
        inferences,
        starved_ticks,
    )


def jerk_rms(joints_deg: np.ndarray) -> float | None:
    """Of poses (N, J), one per tick: root mean square of the third difference (deg/s^3) where the arm moves. None where it never does."""
    moving = (np.abs(np.diff(joints_deg, axis=0)) > _MOVING_DEG).any(axis=1)  # (N - 1,)
    jerk = np.diff(joints_deg, n=3, axis=0) / TICK_S**3  # (N - 3, J)
    counted = jerk[moving[:-2] | moving[1:-1] | moving[2:]]
    return float(np.sqrt(np.mean(counted**2))) if len(counted) else None


def reach_for_still_blocks(policy: Any, noise_shape: tuple[int, int], seeds: Iterable[int], action_horizon: int = 8) -> list[Outcome]:
    """Does a policy do the task at all? Episodes of 2.5 s without latency, the block at rest."""
    runner = EpisodeRunner(policy.metadata, noise_shape, "Reach the block", 0.0, episode_s=2.5)
    return [runner.play(policy, Cell(action_horizon=action_horizon), seed) for seed in seeds]


@dataclass(frozen=True)
class PolicyRecipe:
    """What load_policy is asked for; travels to another process."""

    model_path: str
    engine: str  # as in Cell
    denoising_steps: int
    device: str = "auto"

    def build(self, clock: Clock | None = None) -> Any:
        import torch

        torch.set_num_threads(1)  # a core per process, and the same sums in every process
        name, precision, directory = split_engine(self.engine)
        return load_policy(
            self.model_path,
            engine=name,
            precision=precision,
            engine_path=directory,
            denoising_steps=self.denoising_steps,
            device=self.device,
            seed=0,
        )


class Policies:
    """Context manager. `of` gives the policy of a cell."""

    def __init__(self, model_path: str, device: str) -> None:
        self._model_path, self._device = model_path, device
        self._local: dict[str, Any] = {}
        self._served: dict[tuple[str, int], Any] = {}
        self._servers = ExitStack()

    def __enter__(self) -> Policies:
        return self

    def __exit__(self, *error: object) -> None:
        self._servers.close()

    def of(self, cell: Cell) -> Any:
        """Raises Gr00tFastError when the engine cannot be had."""
        if cell.controller == "server":
            return self._from_server(cell)
        if cell.engine not in self._local:
            self._local[cell.engine] = PolicyRecipe(self._model_path, cell.engine, cell.denoising_steps, self._device).build()
        policy = self._local[cell.engine]
        policy.denoising_steps = cell.denoising_steps
        return policy

    def _from_server(self, cell: Cell) -> Any:
        key = cell.engine, cell.denoising_steps
        if key not in self._served:
            recipe = PolicyRecipe(self._model_path, cell.engine, cell.denoising_steps, self._device)
            self._served[key] = self._servers.enter_context(ServedPolicy(recipe))
        return self._served[key]


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
    servo_lag_ms: float | None = None


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
    read_policy_metadata(model_path, EMBODIMENT_TAG, DATA_CONFIG)


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
    yield from (report for _, report in in_processes(play, [(job,) for job in jobs], processes))


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
        metadata = read_policy_metadata(settings.model_path, EMBODIMENT_TAG, DATA_CONFIG)
        shape = head.action_horizon, head.action_dim
        runner = EpisodeRunner(metadata, shape, settings.instruction, settings.block_speed_m_s, settings.episode_s, settings.servo_lag_ms)
        _here[settings] = Policies(settings.model_path, settings.device), runner
    return _here[settings]
