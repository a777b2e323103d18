"""Put the block into the bowl with GR00T N1.5's action head, told where things are: a study of denoising steps and horizons without a GPU.

    python training/place_state.py --out=outputs/place_state --trials=1000                          # full
    python training/place_state.py --out=outputs/place_small --episodes=200 --steps=250 --trials=20 # small
    python training/place_state.py --out=outputs/place_tiny --episodes=50 --steps=20 --trials=4 --max_ticks=40 --denoising_steps 2 --horizons 8

Training of the full one took 34 minutes of wall time on one thread of a CPU (`training` and `machine` in benchmarks/results/place_state.json).
Three parts, each of which goes on where the same command was stopped: demonstrations of the scripted expert with the arm disturbed
(place_episodes.py), training with the flow-matching loss (place_network.py), and episodes in closed loop on layouts that training never saw
(place_trial.py), as many actions executed per inference as each of --horizons says. The network is the action head of gr00t_fast.model; instead of
vision and language it gets the poses of block and bowl and whether the block is held. So this is NOT a vision-language-action policy: the figures
say what the head can do with a perfect view of the scene, and nothing about seeing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory


from benchmarks.program import Result, finish, provenance
from gr00t_fast.errors import ConfigError
from gr00t_fast.optional import require
from training.place_episodes import Episodes, load_episodes, write_shards
from training.place_network import PlaceRun
from training.place_report import as_table, plot
from training.place_trial import MAX_TICKS, Outcome, PlaceTrials, expert_outcomes, paired, summary
from training.run import Options
from training.samples import FIRST_LAYOUT_SEED
from training.session import Log, load_undisturbed, pursue, stopped_from_outside

_COLUMNS = ("flow", "gradient_norm", "rate", "held_out_flow", "action_error_deg")
PUBLISHED_STEPS = 4  # denoising steps of the published checkpoint
_HELD_OUT = 50  # layouts for the check during training
_HELD_OUT_SEED = 9_999  # of --seed: their layouts are apart from those that train, and above those that are evaluated


def episodes_of(folder: Path, count: int, seed: int, processes: int) -> Episodes:
    """Made where they are missing, with progress."""
    with require("tqdm", "sim").tqdm(total=count, unit=" layouts", mininterval=1, desc=folder.name) as bar:
        for done in write_shards(folder, count, seed, processes):
            bar.update(min(done, count) - bar.n)
    return load_episodes(folder, count)


def train(arguments: argparse.Namespace, run: PlaceRun) -> dict[str, Any]:
    """To the last step, or as far as --minutes allow. Raises KeyboardInterrupt when somebody stopped it: an evaluation would tell nothing."""
    held_out = episodes_of(arguments.out / "held_out", _HELD_OUT, _HELD_OUT_SEED, 1)
    state = arguments.out / "state.pt"
    if state.exists():
        run.load(state)
    log = Log(arguments.out / "loss.csv", run.steps_done, _COLUMNS)
    reason = pursue(run, log, lambda: run.check(held_out), state, arguments.minutes, arguments.check_every, save_minutes=2)
    if stopped_from_outside(reason):
        print(f"stopped by {reason} at step {run.steps_done} of {run.options.steps}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    log.plot(arguments.out / "loss.png")
    return {"stopped_by": reason, **log.last(), "steps": run.steps_done}


def evaluate(arguments: argparse.Namespace, run: PlaceRun) -> dict[str, Any]:
    """Expert and network on the same layouts."""
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.trials)
    progress = require("tqdm", "sim").tqdm(total=1 + len(arguments.horizons) * len(arguments.denoising_steps), unit=" settings")
    expert = expert_outcomes(seeds, arguments.max_ticks)
    progress.update()
    trials, played = PlaceTrials(run.network, run.scaling, seeds, arguments.max_ticks), {}
    for executed, steps in itertools.product(arguments.horizons, arguments.denoising_steps):
        played[executed, steps] = trials.play(steps, executed, arguments.seed)
        progress.update()
    progress.close()
    episodes = {"expert": expert, **{f"horizon {executed}, steps {steps}": outcomes for (executed, steps), outcomes in played.items()}}
    lines = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in episodes.items()}
    (arguments.out / "episodes.json").write_text(json.dumps(lines) + "\n")
    return {"expert": summary(expert), "settings": settings_of(played)}


def settings_of(played: dict[tuple[int, int], list[Outcome]]) -> list[dict[str, Any]]:
    """(actions executed, denoising steps) -> a summary of each, compared layout by layout with PUBLISHED_STEPS at the same horizon."""
    settings = []
    for (executed, steps), outcomes in played.items():
        setting = {"horizon": executed, "denoising_steps": steps, **summary(outcomes)}
        if steps != PUBLISHED_STEPS and (executed, PUBLISHED_STEPS) in played:
            setting[f"against_{PUBLISHED_STEPS}_steps"] = paired(outcomes, played[executed, PUBLISHED_STEPS])
        settings.append(setting)
    return settings


def study(arguments: argparse.Namespace) -> Result:
    check(arguments)
    load_undisturbed("mujoco", "sim")
    episodes = episodes_of(arguments.out / "episodes", arguments.episodes, arguments.seed, arguments.processes)
    options = Options(arguments.steps, arguments.batch, 1, arguments.rate, arguments.decay, arguments.seed)
    run = PlaceRun(episodes, options)
    trained = train(arguments, run)
    data = {
        "layouts": arguments.episodes,
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
        "max_ticks": arguments.max_ticks,
        **evaluate(arguments, run),
        **provenance(arguments.seed),
    }


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that make no sense."""
    counts = ("episodes", "steps", "batch", "trials", "processes", "threads", "check_every", "max_ticks")
    if min(getattr(arguments, name) for name in counts) < 1 or min(arguments.seed, arguments.first_seed) < 0:
        raise ConfigError(f"{', '.join('--' + name for name in counts)} must be at least 1, --seed and --first_seed not negative.")
    if arguments.first_seed + arguments.trials > FIRST_LAYOUT_SEED or arguments.seed >= _HELD_OUT_SEED:
        raise ConfigError(f"layouts from {FIRST_LAYOUT_SEED} on are for training, and --seed must be below {_HELD_OUT_SEED}.")


def main(argv: list[str] | None = None) -> int:
    defaults = Options(steps=3000, batch=128, rate=1e-3)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to create, or to go on in")
    add("--episodes", type=int, default=4000, help="layouts to demonstrate, in shards of 50; failures are left out (default: %(default)s)")
    add("--processes", type=int, default=2, help="that make them (default: %(default)s)")
    add("--steps", type=int, default=defaults.steps, help="updates in the whole run; the learning rate falls over them (default: %(default)s)")
    add("--minutes", type=float, help="end training after so long and evaluate what there is; the same command continues")
    add("--batch", type=int, default=defaults.batch, help="(default: %(default)s)")
    add("--rate", type=float, default=defaults.rate, help="highest learning rate (default: %(default)s)")
    add("--decay", type=float, default=defaults.decay, help="weight decay of matrices (default: %(default)s)")
    add("--trials", type=int, default=200, help="layouts to evaluate on, each once per setting (default: %(default)s)")
    add("--first_seed", type=int, default=0, help=f"of those layouts; training's begin at {FIRST_LAYOUT_SEED}")
    add("--denoising_steps", type=int, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    add("--horizons", type=int, nargs="+", default=[8, 16], help="actions executed per inference (default: 8 16)")
    add("--max_ticks", type=int, default=MAX_TICKS, help="of an episode, at 30 Hz (default: %(default)s)")
    add("--check_every", type=int, default=200, help="steps between rows of loss.csv (default: %(default)s)")
    add("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    add("--seed", type=int, default=0, help="of demonstrations, first weights, batches, and noise (default: 0)")
    arguments = parser.parse_args(argv)
    return finish("place_state", arguments, study, as_table, plot)


if __name__ == "__main__":
    sys.exit(main())
