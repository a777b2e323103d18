"""What 8-bit linear layers do to the actions, part by part of the network.

    python benchmarks/eight_bit_accuracy.py --model_path=checkpoints/so100-sim-reach --calibration=DATASET --observations=OTHER_DATASET

Calibrates each format with --frames of --calibration and compares actions with those of the plain model in fp32, at the same noise, on --held_out
frames of --observations: with one part of the network in 8 bits and the rest in fp32, with all of it, with the layers that opting out leaves
(--limit), and with those over bf16, as the engines run. Figures are |difference| over all observations, times and joints, in joint units of the data.
With --episodes also closed loop in the simulated arm (networks of the reach task). Where the device lacks an 8-bit product it is written out: the
same arithmetic, and no statement on speed. There is no floor: 0 is the plain model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch
import yaml

from benchmarks.program import Result, finish, provenance
from export.calibrate import collect_cases
from gr00t_fast import load_policy
from gr00t_fast.checkpoint import Checkpoint, load_model, open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import Target, select_device
from gr00t_fast.engine.eight_bit import PARTS, Calibration, EightBitTwin, Rounding, has_product, rewritten, rounded_layers, weight_bytes
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.eight_bit import TARGET, Recorded, TorchTrials, calibrate, input_scales, plan, record
from gr00t_fast.export.observations import MIN_FRAMES
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.quantise import Settings
from gr00t_fast.export.verify import ACTION_LIMITS, Case
from gr00t_fast.measurement import wilson_interval
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.prompt import PROMPT_STYLES
from gr00t_fast.transforms import ActionTransform

VARIANTS = {"int8": ("int8", False), "int8, per token": ("int8", True), "fp8": ("fp8", False)}  # name -> format, per token
LEAST = 100


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    arguments: argparse.Namespace
    checkpoint: Checkpoint
    model: Gr00tN1d5  # plain, fp32
    narrow: Gr00tN1d5  # plain, bf16
    stages: dict[str, Recorded]
    calibration: Sequence[Case]
    held_out: Sequence[Case]
    transform: ActionTransform
    steps: int

    def trials(self, layers: dict[str, torch.nn.Module]) -> TorchTrials:
        return TorchTrials(self.model, self.held_out, self.steps, layers, self.transform)


def run(arguments: argparse.Namespace) -> Result:
    if arguments.held_out < LEAST and not arguments.allow_few:
        raise ConfigError(f"--held_out={arguments.held_out}: expected at least {LEAST} observations, or --allow_few.")
    bench, sources = prepare(arguments)
    plain = bench.trials({})
    result = {
        "benchmark": "eight_bit_accuracy",
        "regime": "one observation at a time, the same noise in both; the plain model in fp32 is the truth",
        "model": Path(arguments.model_path).name,
        "denoising_steps": bench.steps,
        **sources,
        "limit_p99": arguments.limit,
        "bf16": plain.error_of(bench.narrow, PARTS).describe(),
        "bf16_weight_bytes": weight_bytes(bench.narrow),
        "variants": {name: measure(bench, plain, *VARIANTS[name]) for name in arguments.variants},
        "passes_at_p99": ACTION_LIMITS["int8"],
    }
    return result | provenance(arguments.seed)


def prepare(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    checkpoint, config = open_checkpoint(arguments.model_path), load_data_config(arguments.data_config)
    target, progress = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config), Progress()
    calibration, seen = collect_cases(arguments, target, progress)
    other = argparse.Namespace(
        **vars(arguments) | {"calibration": arguments.observations, "frames": arguments.held_out, "allow_few": True, "seed": arguments.seed + 1}
    )
    held_out, fresh = collect_cases(other, target, progress)
    device, steps = select_device(arguments.device), checkpoint.config.head.denoising_steps
    model, narrow = (load_model(checkpoint, arguments.embodiment_tag, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    stages = record(model, calibration, sorted({1, 2, steps}), arguments.seed, progress)
    transform = ActionTransform(config, checkpoint.embodiment(arguments.embodiment_tag), checkpoint.config.head.action_dim)
    sources = {"calibration": _named(seen), "held_out": _named(fresh)}
    return Bench(arguments, checkpoint, model, narrow, stages, calibration, held_out, transform, steps), sources


def measure(bench: Bench, plain: TorchTrials, format: str, per_token: bool) -> dict[str, Any]:
    """Errors by what is rounded."""
    arguments, device = bench.arguments, bench.model.device
    settings = Settings(format, TARGET, bench.steps, arguments.limit, arguments.trial_frames, seed=arguments.seed)
    rounding = Rounding(format, per_token, emulated=not has_product(format, device))
    outcome, groups = plan(bench.model, bench.stages, settings, tuple(PARTS), Progress())
    scales = {label: scale for part in PARTS for label, scale in input_scales(outcome.plans[part]).items()}
    trials = bench.trials(rounded_layers(bench.model, scales, rounding))
    errors = {part: trials.error([group for group in groups if group.stage == part]) for part in PARTS}
    errors["all"] = trials.error(groups)
    steps = sorted({1, 2, bench.steps})
    chosen, calibration = calibrate(bench.model, bench.calibration, settings, rounding, steps, tuple(PARTS), bench.transform, Progress())
    errors["chosen"] = plain.error_of(rewritten(bench.model, calibration.scales, rounding), PARTS)
    narrow = rewritten(bench.narrow, calibration.scales, rounding)
    errors["chosen, over bf16"] = plain.error_of(narrow, PARTS)
    kept = [verdict.group.name for verdict in chosen.groups if verdict.kept]
    return {
        "errors": {name: error.describe() for name, error in errors.items()},
        "kept_in_16_bits": kept,
        "work_in_8_bits": round(1 - sum(verdict.group.work for verdict in chosen.groups if verdict.kept), 4),
        "weight_bytes": weight_bytes(narrow),
        **({"reach": reach(bench, calibration)} if arguments.episodes else {}),
    }


def reach(bench: Bench, calibration: Calibration) -> dict[str, Any]:
    """Closed loop with the chosen layers in 8 bits over bf16."""
    from benchmarks.closed_loop.episode import reach_for_still_blocks

    twin = EightBitTwin(bench.narrow, calibration, emulated=not has_product(calibration.format, bench.narrow.device))
    policy = load_policy(bench.arguments.model_path, data_config=bench.arguments.data_config, engine=twin, seed=0)
    head = bench.checkpoint.config.head
    outcomes = reach_for_still_blocks(policy, (head.action_horizon, head.action_dim), range(bench.arguments.episodes))
    solved = sum(outcome.solved_s is not None for outcome in outcomes)
    return {"successes": solved, "episodes": len(outcomes), "wilson_95": wilson_interval(solved, len(outcomes))}


def as_markdown(result: Result) -> str:
    lines = [
        f"{result['model']}, {result['denoising_steps']} steps, calibrated with {result['calibration']['frames']} frames, checked on "
        f"{result['held_out']['frames']} others. Joint units; weights in MB.",
        "",
        "| format | in 8 bits | p50 | p99 | largest | of the displacement |",
        "|---|---|--:|--:|--:|--:|",
        _row("bf16", f"nothing ({result['bf16_weight_bytes'] / 1e6:.1f} MB)", result["bf16"]),
    ]
    for name, variant in result["variants"].items():
        lines += [_row(name, part, error) for part, error in variant["errors"].items()]
        reached = variant.get("reach")
        closed = f"; reached {reached['successes']} of {reached['episodes']}" if reached else ""
        kept = ", ".join(variant["kept_in_16_bits"]) or "nothing"
        lines.append(
            f"| | chosen: {variant['work_in_8_bits']:.0%} of the work, {variant['weight_bytes'] / 1e6:.1f} MB{closed}; kept: {kept} | | | | |"
        )
    return "\n".join(lines)


def _row(name: str, part: str, error: dict[str, Any]) -> str:
    return f"| {name} | {part} | {error['p50']:.3f} | {error['p99']:.3f} | {error['max']:.2f} | {error['relative_to_displacement']:.2%} |"


def plot(result: Result, path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.5))
    width = 0.8 / len(result["variants"])
    for number, (name, variant) in enumerate(result["variants"].items()):
        places = [index + number * width for index in range(len(variant["errors"]))]
        axis.bar(places, [error["p99"] for error in variant["errors"].values()], width, label=name)
    axis.set_xticks(range(len(variant["errors"])), list(variant["errors"]), fontsize=8)
    axis.axhline(result["bf16"]["p99"], color="grey", linestyle=":", label="bf16")
    axis.axhline(result["passes_at_p99"], color="black", linestyle="--", label="limit")
    axis.set_ylabel("p99 of the action error, joint units")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _named(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "source": Path(source["source"]).name}


def main(argv: list[str] | None = None) -> int:
    return finish("eight_bit_accuracy", _parser().parse_args(argv), run, as_markdown, plot)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint")
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own")
    p.add_argument("--calibration", required=True, help="a LeRobotDataset or recordings directory, or random:SEED")
    p.add_argument("--observations", required=True, help="the same of other episodes, to compare on")
    p.add_argument("--camera_map", type=yaml.safe_load, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    p.add_argument("--frames", type=int, default=MIN_FRAMES, help="to calibrate with")
    p.add_argument("--held_out", type=int, default=LEAST, help="frames to compare on")
    p.add_argument("--allow_few", action="store_true", help="go on with fewer frames or episodes than it takes")
    p.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    p.add_argument("--limit", type=float, default=1.0, help="p99 that layers are kept in 16 bits for")
    p.add_argument("--trial_frames", type=int, default=8, help="calibration frames that decide which layers are kept")
    p.add_argument("--episodes", type=int, default=0, help="closed loop in the simulated arm, as benchmarks/evaluate.py")
    p.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain")
    p.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, help="of a CPU")
    p.add_argument("--seed", type=int, default=0, help="of the choice of frames and of the noise")
    p.add_argument("--out", type=Path, default=Path("outputs/eight_bit_accuracy"), help="directory for the JSON, the table and the plot")
    return p


if __name__ == "__main__":
    sys.exit(main())
