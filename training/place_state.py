"""Put the block into the bowl with GR00T N1.5's action head, told where things are: a study of denoising steps and horizons without a GPU.

    python training/place_state.py --out=outputs/place_state --trials=1000                          # full
    python training/place_state.py --out=outputs/place_small --episodes=200 --steps=250 --trials=20 # small
    python training/place_state.py --out=outputs/place_tiny --episodes=50 --steps=20 --trials=4 --max_ticks=40 --denoising_steps 2 --action_horizon 8

Training of the full one took 34 minutes of wall time on one thread of a CPU (`training` and `machine` in benchmarks/results/place_state.json).
Three parts, each of which goes on where the same command was stopped: demonstrations of the scripted expert with the arm disturbed (place_world.py),
training with the flow-matching loss (network.py), and episodes in closed loop on layouts that training never saw, as many actions executed per
inference as each of --action_horizon says. The network is the action head of gr00t_fast.model; instead of vision and language it gets the poses of
block and bowl and whether the block is held. So this is NOT a vision-language-action policy: the figures say what the head can do with a perfect view
of the scene, and nothing about seeing. The last line is JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.program import Result, check_counts, drawing, execute, finish, markdown_table, provenance
from gr00t_fast.config import ActionHeadConfig, TransformerConfig
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError
from gr00t_fast.flags import UsageError
from gr00t_fast.measurement import wilson_interval
from gr00t_fast.model.action_head import ActionHead, Condition, StepTables
from gr00t_fast.optional import require
from gr00t_fast.robots.so100_sim.scripted_expert import expert
from gr00t_fast.robots.so100_sim.units import GRIPPER
from training.network import begin_quietly, flow_loss, initialise
from training.place_world import SCENE_PARTS, Episodes, PlaceWorld, Stage, load_episodes, write_shards
from training.run import Options, Run, TrainingConfig, load_undisturbed, pursue, stopped_from_outside
from training.samples import FIRST_LAYOUT_SEED, FPS, HORIZON

# --- network ------------------------------------------------------------------------------------------------------------------------------------

_HEADS, _HEAD_DIM, _LAYERS, _FUTURE_TOKENS = 4, 32, 4, 4  # published: 32, 48, 16, 32
_JOINTS = len(SO100_JOINTS)


def head_config() -> ActionHeadConfig:
    """Published but for the sizes: 32 padded actions, 64 padded state values, 16 actions in a chunk, 1000 times."""
    width = _HEADS * _HEAD_DIM
    return ActionHeadConfig(
        action_dim=32,
        state_dim=64,
        action_horizon=HORIZON,
        hidden_size=width,
        future_tokens=_FUTURE_TOKENS,
        max_positions=HORIZON,
        embodiments=32,
        denoising_steps=4,
        timestep_buckets=1000,
        output_dim=width,
        use_vlln=True,
        dit=TransformerConfig(_LAYERS, _HEADS, _HEAD_DIM),
        vl_attention=TransformerConfig(1, _HEADS, _HEAD_DIM),
    )


class SceneTokens(nn.Module):
    """Scene vector (B, SCENE_WIDTH), normalised -> tokens (B, S, D). The learned part of each says which it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Embedding(len(SCENE_PARTS), width)
        self.parts = nn.ModuleList(nn.Linear(part.stop - part.start, width, bias=False) for part in SCENE_PARTS.values())

    def forward(self, scene: Tensor) -> Tensor:
        tokens = [linear(scene[:, part]) for linear, part in zip(self.parts, SCENE_PARTS.values(), strict=True)]
        return torch.stack(tokens, 1) + self.kinds.weight  # (B, S, D)


class PlaceNetwork(nn.Module):
    """Trainable, fp32, with first weights from `seed`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        config = head_config()
        self.head = ActionHead(config, config.dit.width)
        self.tokens = SceneTokens(config.dit.width)
        initialise(self, torch.Generator().manual_seed(seed))
        begin_quietly(self.head)

    def condition(self, joints: Tensor, scene: Tensor) -> Condition:
        """joints (B, 6) and scene (B, SCENE_WIDTH), both normalised -> what the head's velocity is conditioned on."""
        state = F.pad(joints, (0, self.head.config.state_dim - joints.shape[-1]))
        return self.head.condition(self.head.refine(self.tokens(scene)), state)

    def forward(self, joints: Tensor, scene: Tensor, noise: Tensor, tables: StepTables) -> Tensor:
        """noise (B, H, 32) -> normalised actions (B, H, 6)."""
        return self.head.denoise(noise, self.condition(joints, scene), tables)[..., :_JOINTS]


@dataclass(frozen=True)
class Scaling:
    """Smallest and largest values in the training data; -1 to 1 for the network, as the policy normalises. Each (width,)."""

    joints: np.ndarray
    scene: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, episodes: Episodes) -> Scaling:
        columns = (getattr(episodes, field.name) for field in fields(cls))
        return cls(*(np.stack((values.min(0), values.max(0))).astype(np.float64) for values in columns))

    def normalised(self, values: np.ndarray, of: str) -> Tensor:
        """float32 (..., width); a value that never changes becomes 0."""
        low, high = getattr(self, of)
        span = np.where(high > low, high - low, 1.0)
        return torch.from_numpy(np.where(high > low, 2 * (values - low) / span - 1, 0.0).astype(np.float32))

    def targets_deg(self, actions: Tensor) -> np.ndarray:
        """Normalised actions (..., 6) -> degrees and per cent."""
        low, high = self.targets
        return (actions.double().numpy() + 1) / 2 * (high - low) + low


class PlaceRun(Run):
    """The run that trains `PlaceNetwork` on demonstrations."""

    def __init__(self, episodes: Episodes, options: Options) -> None:
        self.network, self.scaling, self._episodes = PlaceNetwork(options.seed), Scaling.of(episodes), episodes
        super().__init__({"network": self.network}, len(episodes), options, torch.device("cpu"))

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        return {"flow": (self._flow(self._episodes, rows, generator), 1.0)}

    def _flow(self, episodes: Episodes, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        joints, scene, actions = self._tensors(episodes, rows)
        return flow_loss(self.network.head, self.network.condition(joints, scene), actions, self.options.draws, generator)

    def _tensors(self, episodes: Episodes, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        normalised = self.scaling.normalised
        chunks = normalised(episodes.chunks(rows), "targets")
        return normalised(episodes.joints[rows], "joints"), normalised(episodes.scene[rows], "scene"), chunks

    @torch.no_grad()
    def check(self, held_out: Episodes, steps: int = 4, rows: int = 500) -> dict[str, float]:
        """On layouts that training does not see: the loss, and how far denoised actions are from the expert's, in degrees (body joints)."""
        generator = torch.Generator().manual_seed(1)
        chosen = np.linspace(0, len(held_out) - 1, min(rows, len(held_out))).astype(int)
        flow = self._flow(held_out, chosen, generator)
        joints, scene, _ = self._tensors(held_out, chosen)
        noise = torch.randn((len(chosen), HORIZON, self.network.head.config.action_dim), generator=generator)
        actions = self.scaling.targets_deg(self.network(joints, scene, noise, self.network.head.step_tables(steps)))
        error = np.abs(actions - held_out.chunks(chosen))[..., :GRIPPER].mean()
        return {"held_out_flow": flow.item(), "action_error_deg": float(error)}


# --- closed loop --------------------------------------------------------------------------------------------------------------------------------

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


# --- report -------------------------------------------------------------------------------------------------------------------------------------

_TITLE = "# Block into bowl, told where things are"
_WHAT = """\
GR00T N1.5's action head (`gr00t_fast.model`, flow-matching loss) in closed loop with the simulated SO-100, in simulated time. In place of vision and
language it gets three tokens: pose of the block, place of the bowl, whether both fingers touch the block. **State-conditioned: not a
vision-language-action policy.** Intervals are Wilson's, 95 %; all settings meet the same layouts and the same noise. Solved: block in the bowl and
let go of, for 5 ticks in a row. p: exact sign test over the layouts that only one of two settings solved, two-sided, not corrected for the number of
settings compared."""
_NOT = """\
What this does not prove: anything about seeing, about language, about the published network (which is two thousand times larger and pretrained), or
about a real arm. Poses are exact, the scene is one block and one bowl, and the demonstrations come from a script, not from people. One network was
trained, once; between settings the intervals are those of the layouts, not of training."""


def as_table(result: dict[str, Any]) -> str:
    """Markdown: what was measured, the settings, where episodes failed, and what it does not prove."""
    rows = [_row("scripted expert (the ceiling)", "", result["expert"])]
    rows += [_row(setting["horizon"], setting["denoising_steps"], setting) for setting in result["settings"]]
    columns = ("actions per inference", "denoising steps", "solved", "rate", "95 % interval", "seconds, p50 / p95")
    columns += ("failed at grasp / transport / release", "solved after the block fell", "only here / only with 4 steps (p)")
    return "\n\n".join([_TITLE, _WHAT, markdown_table(columns, rows), _how(result), _NOT])


def _row(horizon: int | str, steps: int | str, found: dict[str, Any]) -> tuple[object, ...]:
    low, high = (f"{100 * bound:.1f}" for bound in found["wilson_95"])
    seconds = " / ".join(f"{value:.2f}" for value in found["seconds_p50_p95"]) if found["seconds_p50_p95"] else "never"
    failed = " / ".join(str(count) for count in found["failed_at"].values())
    pairs = found.get("against_4_steps")
    against = f"{pairs['only_here']} / {pairs['only_there']} ({pairs['p']:.2g})" if pairs else ""
    solved = f"{found['successes']} of {found['episodes']}", f"{100 * found['rate']:.1f} %", f"{low} to {high}"
    return horizon, steps, *solved, seconds, failed, found["solved_after_a_fall"], against


def _how(result: dict[str, Any]) -> str:
    data, training, options = result["data"], result["training"], result["options"]
    error = f", {training['action_error_deg']:.2f} degrees from the expert's actions on held-out layouts" if "action_error_deg" in training else ""
    return (
        f"{result['parameters'] / 1e6:.2f} million parameters; {data['samples']} samples of {data['episodes']} disturbed demonstrations "
        f"({data['with_second_attempts']} with a second attempt, {data['layouts'] - data['episodes']} more left out as failed), layouts from seed "
        f"{data['first_layout_seed']} on; {training['steps']} of {options['steps']} updates of {options['batch']}, "
        f"{training['minutes']:.0f} minutes of wall time on {result['machine']['torch_threads']} thread(s) of a CPU{error}. Episodes end after "
        f"{result['max_ticks'] / 30:.0f} s. `{result['command_line']}`"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Success with its interval against denoising steps, one line per horizon; the expert as a band."""
    low, high = result["expert"]["wilson_95"]
    horizons = sorted({setting["horizon"] for setting in result["settings"]})
    marks = sorted({setting["denoising_steps"] for setting in result["settings"]})
    title = f"action head told where things are, {result['expert']['episodes']} layouts, 95 % intervals"
    with drawing(path, title, size=(6.4, 3.8)) as grid:
        axes = grid[0][0]
        axes.axhspan(100 * low, 100 * high, color="0.88", label="scripted expert")
        for place, horizon in enumerate(horizons):
            settings = sorted((s for s in result["settings"] if s["horizon"] == horizon), key=lambda s: s["denoising_steps"])
            steps = [s["denoising_steps"] * 1.03 ** (place - (len(horizons) - 1) / 2) for s in settings]  # apart, so that the bars are seen
            rates = [100 * s["rate"] for s in settings]
            bounds = [[abs(100 * s["wilson_95"][side] - rate) for s, rate in zip(settings, rates, strict=True)] for side in (0, 1)]
            axes.errorbar(steps, rates, bounds, marker="o", capsize=3, label=f"{horizon} actions per inference")
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, [str(mark) for mark in marks])
        axes.set_xlabel("denoising steps")
        axes.set_ylabel("block in the bowl, % (axis not from 0)")
        axes.legend(loc="lower right", fontsize=9)


# --- the program --------------------------------------------------------------------------------------------------------------------------------


_COLUMNS = ("flow", "gradient_norm", "rate", "held_out_flow", "action_error_deg")
PUBLISHED_STEPS = 4  # denoising steps of the published checkpoint
_HELD_OUT = 50  # layouts for the check during training
_HELD_OUT_SEED = 9_999  # of --seed: their layouts are apart from those that train, and above those that are evaluated


@dataclass(kw_only=True)
class PlaceConfig(TrainingConfig):
    episodes: int = 4000  # layouts to demonstrate, in shards of 50; failures are left out
    processes: int = 2  # that make them
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 1e-3
    check_every: int = 200
    save_minutes: float = 2.0
    trials: int = 200  # layouts to evaluate on, each once per setting
    first_seed: int = 0  # of those layouts; training's begin at 1000000
    denoising_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    action_horizon: list[int] = field(default_factory=lambda: [8, 16])  # actions executed per inference
    max_ticks: int = MAX_TICKS  # of an episode, at 30 Hz


def check(config: PlaceConfig) -> None:
    """Raises UsageError for numbers that make no sense."""
    check_counts(config, "episodes", "processes", "trials", "max_ticks")
    check_counts(config, "first_seed", least=0)
    for name, most in (("denoising_steps", None), ("action_horizon", HORIZON)):
        if not getattr(config, name) or min(getattr(config, name)) < 1 or (most and max(getattr(config, name)) > most):
            raise UsageError(f"--{name} must be one or more numbers from 1{f' to {most}' if most else ''}.")
    if config.first_seed + config.trials > FIRST_LAYOUT_SEED or config.seed >= _HELD_OUT_SEED:
        raise UsageError(f"--first_seed and --trials: layouts from {FIRST_LAYOUT_SEED} on are for training. --seed must be below {_HELD_OUT_SEED}.")


def episodes_of(folder: Path, count: int, seed: int, processes: int) -> Episodes:
    """Made where they are missing, with progress."""
    with require("tqdm", "sim").tqdm(total=count, unit=" layouts", mininterval=1, desc=folder.name) as bar:
        for done in write_shards(folder, count, seed, processes):
            bar.update(min(done, count) - bar.n)
    return load_episodes(folder, count)


def train(config: PlaceConfig, run: PlaceRun) -> dict[str, Any]:
    """To the last step, or as far as --max_minutes allow. Raises KeyboardInterrupt when somebody stopped it: an evaluation would tell nothing."""
    held_out = episodes_of(config.out / "held_out", _HELD_OUT, _HELD_OUT_SEED, 1)
    reason, log = pursue(run, config, _COLUMNS, lambda: run.check(held_out))
    if stopped_from_outside(reason):
        raise KeyboardInterrupt
    log.plot(config.out / "loss.png")
    return {"stopped_by": reason, **log.last(), "steps": run.steps_done}


def evaluate(config: PlaceConfig, run: PlaceRun) -> dict[str, Any]:
    """Expert and network on the same layouts."""
    seeds = range(config.first_seed, config.first_seed + config.trials)
    expert_found = expert_outcomes(seeds, config.max_ticks)
    trials = PlaceTrials(run.network, run.scaling, seeds, config.max_ticks)
    settings = list(itertools.product(config.action_horizon, config.denoising_steps))
    played = {
        (executed, steps): trials.play(steps, executed, config.seed) for executed, steps in require("tqdm", "sim").tqdm(settings, unit=" settings")
    }
    episodes = {"expert": expert_found, **{f"horizon {executed}, steps {steps}": outcomes for (executed, steps), outcomes in played.items()}}
    lines = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in episodes.items()}
    (config.out / "episodes.json").write_text(json.dumps(lines) + "\n")
    return {"expert": summary(expert_found), "settings": settings_of(played)}


def settings_of(played: dict[tuple[int, int], list[Outcome]]) -> list[dict[str, Any]]:
    """(actions executed, denoising steps) -> a summary of each, compared layout by layout with PUBLISHED_STEPS at the same horizon."""
    settings = []
    for (executed, steps), outcomes in played.items():
        setting = {"horizon": executed, "denoising_steps": steps, **summary(outcomes)}
        if steps != PUBLISHED_STEPS and (executed, PUBLISHED_STEPS) in played:
            setting[f"against_{PUBLISHED_STEPS}_steps"] = paired(outcomes, played[executed, PUBLISHED_STEPS])
        settings.append(setting)
    return settings


def study(config: PlaceConfig) -> Result:
    load_undisturbed("mujoco", "sim")
    episodes = episodes_of(config.out / "episodes", config.episodes, config.seed, config.processes)
    options = config.options(draws=1)
    run = PlaceRun(episodes, options)
    trained = train(config, run)
    data = {
        "layouts": config.episodes,
        "episodes": len(episodes.ends),
        "with_second_attempts": int((episodes.attempts > 1).sum()),
        "samples": len(episodes),
        "first_layout_seed": int(episodes.seeds.min()),
    }
    return {
        "evaluation": "place, state-conditioned",
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "data": data,
        "options": asdict(options),
        "training": trained,
        "max_ticks": config.max_ticks,
        **evaluate(config, run),
        **provenance(config.seed),
    }


def run_study(config: PlaceConfig) -> int:
    check(config)
    config.options(draws=1)
    return finish("place_state", config, study, as_table, plot)


def main(argv: Sequence[str] | None = None) -> int:
    return execute(PlaceConfig, run_study, lambda _, code: code, argv, __doc__, "interrupted: no result")


if __name__ == "__main__":
    sys.exit(main())
