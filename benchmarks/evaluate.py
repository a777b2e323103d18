"""Success in the simulated arm: what denoising steps, chunk length, controller, latency and number format cost.

    python benchmarks/evaluate.py                                        # latency and controllers on 20 layouts, minutes
    python benchmarks/evaluate.py --full                                 # all studies on 200 layouts, an hour of two cores
    python benchmarks/evaluate.py --controllers sync threaded --latency_ms 100 --action_horizon 8 16 --scenes moving

It plays one-camera networks (data_config so100) that were trained in this simulator, as the demo's was; networks of other cameras are refused.
The policy drives the arm through the product's own loop and controllers. Time is simulated: it passes by the injected latency while the network
computes, so the figures do not depend on the machine. A scene that lies still hides latency, so the block also moves, and success is also counted
within deadlines. Every cell meets the same layouts and the same noise. Episodes are kept in OUT/episodes.jsonl: a run that was stopped goes on from
there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib.latency import VirtualClock, VirtualWorker, play_until
from benchmarks.lib.program import finish, in_processes, markdown_table, provenance, read_flags
from gr00t_fast import load_policy
from gr00t_fast.base.contracts import ActionPrefix, Clock, LandingReport, Observation, Policy
from gr00t_fast.base.errors import ConfigError, check_ranges, require
from gr00t_fast.base.measurement import wilson_interval
from gr00t_fast.checkpoint import open_checkpoint, read_policy_metadata
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.loop import LoopOptions
from gr00t_fast.control.planner import Planner, PlannerOptions
from gr00t_fast.engine.manifest import sha256
from gr00t_fast.robots import SimCameraConfig, SO100SimConfig
from gr00t_fast.virtual.sim.scene import scene_xml
from gr00t_fast.virtual.sim.simulation import FIRST_LAYOUT_SEED, SimArm

Scene = Literal["still", "moving"]
ControllerName = Literal["sync", "threaded", "auto", "prefix"]
Study = Literal["latency", "steps", "precision"]
EMBODIMENT_TAG, DATA_CONFIG = "new_embodiment", "so100"  # what training/ writes, and the simulation shows
ROOT = Path(__file__).resolve().parent.parent

# --- settings ------------------------------------------------------------------------------------------------------------------------------


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
    engine: str = "eager:fp32"


FACTORS = tuple(field.name for field in fields(Cell))


def cells_of_study(study: Study, scenes: Sequence[Scene], engines: Sequence[str]) -> list[Cell]:
    """latency: loops that wait play 8 or 16 actions per inference, those that think ahead need all 16 to bridge the wait; prefix could
    differ from threaded only where chunks overlap for long. steps: fewer denoising steps, longer chunks. precision: number formats."""
    if study == "steps":
        return [Cell(scene, "sync", 0, steps, horizon) for scene in scenes for steps in (1, 2, 4, 8) for horizon in (4, 8, 16)]
    if study == "precision":
        return [Cell(scene, engine=engine) for scene in scenes for engine in dict.fromkeys(("eager:fp32", "eager:bf16", *engines))]
    all_ms = (0, 50, 200, 800)
    arms = [("sync", 8, all_ms), ("sync", 16, all_ms), ("threaded", 16, all_ms), ("prefix", 16, all_ms[2:3])]
    return [Cell(scene, name, ms, action_horizon=horizon) for scene in scenes for name, horizon, latencies_ms in arms for ms in latencies_ms]


def cells_of(config: Config) -> list[Cell]:
    """The product of the settings given, or the cells of the studies. Raises ConfigError."""
    values_of = (config.scenes, config.controllers, config.latency_ms, config.denoising_steps, config.action_horizon, config.engines)
    given = dict(zip(FACTORS, values_of, strict=True))
    named = {name: values for name, values in given.items() if values}
    studies = config.study or (get_args(Study) if config.full else ())
    if studies and set(named) - {"scene", "engine"}:
        raise ConfigError("a study has settings of its own; leave out --study and --full, or the settings. --scenes and --engines go with both.")
    scenes = config.scenes or list(get_args(Scene))
    if studies or not set(named) - {"scene"}:
        cells = [cell for study in studies or ("latency",) for cell in cells_of_study(study, scenes, config.engines or ())]
    else:
        named["scene"] = scenes
        cells = [Cell(**dict(zip(named, values, strict=True))) for values in itertools.product(*named.values())]
    check_ranges(config, latency_ms=(0, math.inf))
    check_ranges(config, denoising_steps=(1, math.inf), action_horizon=(1, math.inf))
    trained = open_checkpoint(config.model_path).config.head.action_horizon
    if any(cell.action_horizon > trained for cell in cells):
        raise ConfigError(f"this checkpoint predicts {trained} actions; more of them cannot play. Lower --action_horizon.")
    return list(dict.fromkeys(cells))


# --- an episode ----------------------------------------------------------------------------------------------------------------------------

_SOLVED, _TAIL_S = "solved", 0.5  # an episode goes on for a moment after success


@dataclass(frozen=True)
class Outcome:
    """How an episode went. solved_s: simulated time of success, None without one within the episode. underrun_ticks: targets held for want of
    actions, the tail included."""

    seed: int
    solved_s: float | None
    inferences: int
    underrun_ticks: int


class LatePolicy(Policy):
    """A policy whose answers take `latency_ms` of simulated time. Inference k of an episode starts from the same noise in every cell."""

    continues = True

    def __init__(self, policy: Any, noise_shape: tuple[int, int], clock: VirtualClock, latency_ms: float, seed: tuple[int, int]) -> None:
        self._policy, self._noise_shape, self._clock, self._latency_s = policy, noise_shape, clock, latency_ms / 1000
        self._rng, self.inferences = np.random.default_rng(seed), 0

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

    def warm_up(self, instruction: str, continuing: bool = False) -> dict[str, float]:
        """Nothing to warm; what an inference will take."""
        return {"total": 1000 * self._latency_s}


class LazyFrames(Mapping[str, np.ndarray]):
    """Pictures drawn when they are looked at: most ticks need none. In simulated time the scene does not move on before, since whoever asks for an
    inference gets it at once."""

    def __init__(self, arm: SimArm) -> None:
        self._arm = arm

    def __getitem__(self, name: str) -> np.ndarray:
        camera = self._arm.config.cameras[name]
        return self._arm.simulation.render(camera.view, camera.width, camera.height)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arm.config.cameras)

    def __len__(self) -> int:
        return len(self._arm.config.cameras)


class EvaluatedArm(SimArm):
    """The simulated arm, which stays connected from episode to episode (building the world takes longer than playing in it) and looks for success at
    every tick of the simulation, whatever the loop is doing."""

    def __init__(self, config: SO100SimConfig, clock: Clock, episode_s: float) -> None:
        super().__init__(config, clock)
        super().connect()
        self._episode_s = episode_s
        self.solved_s: float | None = None

    def connect(self) -> None:
        """Connected already; what the last episode came to is over."""
        self.solved_s = None

    def land(self, as_found: bool = False) -> LandingReport:
        """Stays connected, and no longer watched: what is left of this episode is none of the next one's business."""
        self.simulation.watch = None
        return LandingReport()

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.solved_s, self.simulation.watch = None, self._look

    def observe(self, with_frames: bool = True) -> Observation:
        seen = super().observe(with_frames=False)
        return Observation(seen.joints, LazyFrames(self) if with_frames else {}, seen.time_s)

    def over(self, observation: Observation) -> bool:
        return self.solved_s is not None and self.simulation.time_s >= self.solved_s + _TAIL_S

    def _look(self) -> None:
        # a loop that waits may finish its last inference after the time is up: the world is still judged by its own clock
        if self.solved_s is None and self.simulation.success and self.simulation.time_s <= self._episode_s:
            self.solved_s = self.simulation.time_s


class EpisodeRunner:
    """The simulated arm before a block that lies still or moves, for policies to drive; worlds are made once. `metadata`: the checkpoint's."""

    def __init__(self, metadata: Any, noise_shape: tuple[int, int], config: Config) -> None:
        """noise_shape: trained horizon and padded action width. Raises ConfigError for a checkpoint of several cameras."""
        if len(metadata.resolutions) != 1:
            raise ConfigError(f"the evaluation shows one camera, from the front; this checkpoint wants {', '.join(metadata.resolutions)}.")
        self._metadata, self._noise_shape, self._config = metadata, noise_shape, config
        self._arms: dict[Scene, tuple[VirtualClock, EvaluatedArm]] = {}

    def play(self, policy: Any, cell: Cell, seed: int) -> Outcome:
        """One episode. Raises ConfigError where a controller cannot bridge the latency."""
        metadata, config, (clock, arm) = self._metadata, self._config, self._arm(cell)
        clock.time_s = 0.0  # the same instants, to the last bit, whatever was played before
        late = LatePolicy(policy, self._noise_shape, clock, cell.latency_ms, (seed, config.seed))
        cameras = resolve_camera_map(arm.cameras, metadata.resolutions, None)
        binding = RobotBinding(late.get_modality_config(), metadata.state_widths, metadata.action_widths, arm.joint_names, cameras)
        overlap = PlannerOptions(
            cell.controller if cell.controller in ("sync", "auto") else "threaded",
            "prefix" if cell.controller == "prefix" else "none",
            None,
            cell.action_horizon,
        )
        planner = Planner(late, binding, config.lang_instruction, clock, metadata.fps, overlap, VirtualWorker(clock))
        if cell.controller == "auto":
            planner.warm_up()
        options = LoopOptions(metadata.fps, timeout_s=config.episode_s, seed=seed, camera_fault=None)  # pictures are drawn when looked at
        loop = play_until(arm.over, _SOLVED, arm, planner, options, clock)
        solved_s = None if arm.solved_s is None else round(arm.solved_s, 4)
        return Outcome(seed, solved_s, late.inferences, int(loop.trace.arrays()["underrun"].sum()))

    def _arm(self, cell: Cell) -> tuple[VirtualClock, EvaluatedArm]:
        if cell.scene not in self._arms:
            clock, speed_m_s = VirtualClock(), self._config.block_speed_m_s if cell.scene == "moving" else 0.0
            (resolution,) = self._metadata.resolutions.values()
            cameras = {"front": SimCameraConfig(*resolution)}
            world = SO100SimConfig(task="reach", cameras=cameras, block_speed_m_s=speed_m_s, servo_lag_ms=self._config.servo_lag_ms)
            self._arms[cell.scene] = clock, EvaluatedArm(world, clock, self._config.episode_s)
        return self._arms[cell.scene]


def reach_for_still_blocks(policy: Any, noise_shape: tuple[int, int], seeds: Iterable[int], action_horizon: int = 8) -> list[Outcome]:
    """Does a policy do the task at all? Episodes of 2.5 s without latency, the block at rest."""
    runner = EpisodeRunner(policy.metadata, noise_shape, Config(episode_s=2.5))
    return [runner.play(policy, Cell(action_horizon=action_horizon), seed) for seed in seeds]


# --- many of them --------------------------------------------------------------------------------------------------------------------------

_EPISODES_PER_JOB = 10


@dataclass(frozen=True)
class Report:
    """What came of some episodes of a cell; `refused` says why none of it can be played."""

    cell: Cell
    outcomes: tuple[Outcome, ...]
    refused: str | None = None


_runners: dict[str, EpisodeRunner] = {}  # of this process: weights and worlds are made once
_policies: dict[str, Any] = {}


def play(config: Config, cell: Cell, seeds: Sequence[int]) -> Report:
    """Run in a process of the pool."""
    import torch

    torch.set_num_threads(1)  # a core per process, and the same sums in every process
    if (settings := str(config)) not in _runners:
        head = open_checkpoint(config.model_path).config.head
        metadata = read_policy_metadata(str(config.model_path), EMBODIMENT_TAG, DATA_CONFIG)
        _runners[settings] = EpisodeRunner(metadata, (head.action_horizon, head.action_dim), config)
    if (opened := f"{config.model_path} {cell.engine}") not in _policies:
        words, _, directory = cell.engine.partition("=")
        name, _, precision = words.partition(":")
        options = {"precision": precision if precision and not directory else "auto", "engine_path": directory or None}  # exports bring theirs
        _policies[opened] = load_policy(config.model_path, engine=name, device=config.device, seed=0, **options)
    policy = _policies[opened]
    policy.denoising_steps = cell.denoising_steps
    try:
        return Report(cell, tuple(_runners[settings].play(policy, cell, seed) for seed in seeds))
    except ConfigError as error:  # the controller says so before the arm moves: a chunk that is over before it arrives
        return Report(cell, (), str(error))


class EpisodeLog:
    """DIRECTORY/episodes.jsonl: its first line says under which conditions the episodes were played, each other one is a report."""

    def __init__(self, directory: Path, conditions: Mapping[str, Any]) -> None:
        """Reads what is there. Raises ConfigError when it was played under other conditions, or is damaged before its last line."""
        self.path = directory / "episodes.jsonl"
        self.outcomes: dict[Cell, dict[int, Outcome]] = {}
        self.refused: dict[Cell, str] = {}
        first = json.dumps({"conditions": conditions})
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else [first + "\n"]
        if lines[0].strip() != first:
            raise ConfigError(f"{self.path} holds episodes of another checkpoint or other settings. Remove it, or choose another --out.")
        whole = [line for line in lines if line.endswith("\n")]  # the run was killed while it wrote the last one: it is played again
        try:
            for line in whole[1:]:
                found = json.loads(line)
                self._note(Report(Cell(**found["cell"]), tuple(Outcome(**each) for each in found["outcomes"]), found["refused"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is damaged ({type(error).__name__}: {error}). Remove it, or choose another --out.") from error
        self.path.write_text("".join(whole), encoding="utf-8")

    def missing(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[tuple[Cell, tuple[int, ...]]]:
        """What has yet to be played, in pieces. Cells take turns, so that a run that is cut short has some of each."""
        left = {cell: [seed for seed in seeds if seed not in self.outcomes.get(cell, {})] for cell in cells if cell not in self.refused}
        starts = range(0, max(map(len, left.values()), default=0), _EPISODES_PER_JOB)
        pieces = [(cell, tuple(some[start : start + _EPISODES_PER_JOB])) for start in starts for cell, some in left.items()]
        return [piece for piece in pieces if piece[1]]

    def add(self, report: Report) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(report)) + "\n")
        self._note(report)

    def _note(self, report: Report) -> None:
        if report.refused is not None:
            self.refused[report.cell] = report.refused
        self.outcomes.setdefault(report.cell, {}).update({outcome.seed: outcome for outcome in report.outcomes})


# --- figures -------------------------------------------------------------------------------------------------------------------------------

_RESAMPLES = 4000


def figures_of(outcomes: Mapping[int, Outcome], episode_s: float, deadlines_s: Sequence[float]) -> dict[str, Any]:
    """Success within the episode and within each deadline, and time to success. JSON-ready. mean_time_s counts an episode without success as
    the whole episode (a restricted mean), so that slow and failed ones both show and none is left out."""
    times_s = np.array([math.inf if each.solved_s is None else each.solved_s for each in outcomes.values()])
    bounded_s = np.minimum(times_s, episode_s)
    return {
        "episodes": len(outcomes),
        "success": rate_of(np.isfinite(times_s)),
        "within": {f"{deadline_s:g}": rate_of(times_s <= deadline_s) for deadline_s in deadlines_s},
        "mean_time_s": round(float(bounded_s.mean()), 3),
        "mean_time_95_s": mean_interval(bounded_s),
        "mean_inferences": round(float(np.mean([each.inferences for each in outcomes.values()])), 2),
        "mean_underrun_ticks": round(float(np.mean([each.underrun_ticks for each in outcomes.values()])), 2),
        "failed_seeds": [each.seed for each in outcomes.values() if each.solved_s is None],
    }


def rate_of(solved: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(solved.sum()), len(solved))
    return {"successes": int(solved.sum()), "rate": round(float(solved.mean()), 4), "wilson_95": [round(low, 4), round(high, 4)]}


def mean_interval(values: np.ndarray) -> list[float]:
    """95 % of the mean: percentile bootstrap over episodes; the same resamples for the same number of episodes."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return [round(float(bound), 3) for bound in np.percentile(values[picks].mean(axis=1), (2.5, 97.5))]


def as_table(result: Mapping[str, Any]) -> str:
    deadlines = [f"{deadline:g}" for deadline in result["deadlines_s"]]
    columns = ("block", "controller", "latency ms", "steps", "actions", "engine", "success % (95 %)")
    columns += (*(f"within {deadline} s" for deadline in deadlines), "mean time s (95 %)", "inferences")
    lag = "the motors' own, about 100 ms" if result["servo_lag_ms"] is None else f"{result['servo_lag_ms']:g} ms"
    preface = (
        f"Reach, {result['episodes']} layouts unseen in training, the same layouts and noise in every row; {result['episode_s']:g} s at 30 Hz; the "
        f"moving block goes {100 * result['block_speed_m_s']:g} cm/s; joints trail their targets by {lag}. Simulated time: an inference takes the "
        f"latency given and nothing more. Mean time counts an episode without success as {result['episode_s']:g} s."
    )
    reasons = dict.fromkeys(f"Cannot run: {row['refused']}" for row in result["rows"] if "refused" in row)
    table = markdown_table(columns, [_line(row, deadlines) for row in result["rows"]], len(columns))
    return "\n\n".join([preface, table, *reasons])


def _line(row: Mapping[str, Any], deadlines: Sequence[str]) -> list[object]:
    setting = [*(row[factor] for factor in FACTORS[:-1]), row["engine"].partition("=")[0]]
    if "refused" in row:
        return [*setting, "cannot run", *["-"] * (len(deadlines) + 2)]
    rates = (row["success"], *(row["within"][deadline] for deadline in deadlines))
    mean_time = f"{row['mean_time_s']:.2f} ({row['mean_time_95_s'][0]:.2f} to {row['mean_time_95_s'][1]:.2f})"
    return [*setting, *(_percent(rate["rate"], rate["wilson_95"]) for rate in rates), mean_time, f"{row['mean_inferences']:.1f}"]


def _percent(rate: float, interval: Sequence[float]) -> str:
    return f"{100 * rate:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


# --- the program ---------------------------------------------------------------------------------------------------------------------------

_EPISODES, _EPISODES_FULL = 20, 200


@dataclass
class Config:
    model_path: Path = ROOT / "checkpoints" / "so100-sim-reach"  # a one-camera network trained in this simulator; default: the demo's
    full: bool = False  # all studies, 200 layouts unless said otherwise
    study: list[Study] | None = None  # default: latency, where no setting is given
    episodes: int | None = None  # layouts per setting; default: 20
    first_seed: int = 0  # of the layouts; training used other ones
    scenes: list[Scene] | None = None  # default: both
    controllers: list[ControllerName] | None = None  # who drives the arm
    latency_ms: list[int] | None = None  # injected into every inference
    denoising_steps: list[int] | None = None  # from noise to action
    action_horizon: list[int] | None = None  # actions of a chunk that may play
    engines: list[str] | None = None  # NAME[:PRECISION][=DIRECTORY], as in openvino:int8=outputs/exports/int8; another export, another --out
    block_speed_m_s: float = 0.06  # of the moving block
    servo_lag_ms: float | None = None  # how far a moving joint trails its target; default: the motors' 90 to 103; a real SO-101: 133 to 200
    episode_s: float = 10.0  # length of an episode
    deadlines_s: list[float] = field(default_factory=lambda: [1.0, 2.0])  # success is also counted within these
    lang_instruction: str = "Reach the block"  # the instruction that the policy gets
    jobs: int = os.cpu_count() or 1  # processes; default: one per core
    device: str = "cpu"  # of the torch engines
    seed: int = 0  # of the noise
    json: bool = False  # also print the result as one line of JSON, the last of the output
    out: Path = ROOT / "outputs" / "evaluate"  # directory for episodes, JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    interrupted = f"interrupted: what was played is in {config.out}; the same command goes on from there"
    return finish("evaluate", config, run, as_table, interrupted=interrupted)


def run(config: Config) -> dict[str, Any]:
    cells, seeds = cells_of(config), seeds_of(config)
    read_policy_metadata(str(config.model_path), EMBODIMENT_TAG, DATA_CONFIG)  # refuses another robot or camera; who trained it cannot be told
    scene_xml("reach", config.servo_lag_ms)
    log = EpisodeLog(config.out, conditions_of(config))
    jobs = [(config, *piece) for piece in log.missing(cells, seeds)]
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes to come share the cores among them
    with require("tqdm", "sim").tqdm(total=sum(len(job[2]) for job in jobs), unit=" episodes") as bar:
        for job, report in in_processes(play, jobs, config.jobs):
            log.add(report)
            bar.update(len(job[2]))
    return {
        "benchmark": "evaluate",
        "checkpoint": config.model_path.name,
        "episodes": len(seeds),
        "first_seed": seeds[0],
        **{name: getattr(config, name) for name in ("episode_s", "deadlines_s", "block_speed_m_s", "servo_lag_ms", "lang_instruction")},
        "rows": [row_of(cell, seeds, log, config) for cell in cells],
        **provenance(config.seed),
    }


def row_of(cell: Cell, seeds: Sequence[int], log: EpisodeLog, config: Config) -> dict[str, Any]:
    if cell in log.refused:
        return asdict(cell) | {"refused": log.refused[cell]}
    played = {seed: log.outcomes[cell][seed] for seed in seeds}
    return asdict(cell) | figures_of(played, config.episode_s, config.deadlines_s)


def conditions_of(config: Config) -> dict[str, Any]:
    """What all episodes share, the checkpoint by the SHA-256 of every file that decides about its actions."""
    directory = open_checkpoint(config.model_path).path
    files = sorted(file for file in directory.rglob("*") if file.suffix in (".json", ".safetensors") and "exports" not in file.parts)
    shared = {name: getattr(config, name) for name in ("lang_instruction", "block_speed_m_s", "episode_s", "seed", "device", "servo_lag_ms")}
    return shared | {"model_path": {str(file.relative_to(directory)): sha256(file) for file in files}}


def seeds_of(config: Config) -> list[int]:
    check_ranges(config, episodes=(1, math.inf), jobs=(1, math.inf))
    check_ranges(config, **dict.fromkeys(("first_seed", "seed", "deadlines_s"), (0, math.inf)))
    check_ranges(config, episode_s=(0.5, math.inf))
    count = config.episodes or (_EPISODES_FULL if config.full else _EPISODES)
    if config.first_seed > FIRST_LAYOUT_SEED - count:
        raise ConfigError(f"layouts are held out below seed {FIRST_LAYOUT_SEED}; got {count} from {config.first_seed} on.")
    return list(range(config.first_seed, config.first_seed + count))


if __name__ == "__main__":
    sys.exit(main())
