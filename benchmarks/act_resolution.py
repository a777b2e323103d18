"""What the training resolution costs: ACT at several resolutions, and SmolVLA, which pads them all to one square.

    python benchmarks/act_resolution.py                                       # a smaller transformer behind ResNet18, two minutes on two CPU cores
    python benchmarks/act_resolution.py --published --rounds=10               # the published sizes: 52 and 450 million parameters, 4 GB of memory
    python benchmarks/act_resolution.py --dataset=DIR --batch_size=8          # your own LeRobotDataset v3

For each resolution: encoder tokens, memory, time of a refill (one chunk for one observation), and of a training step with the times that
lerobot-train logs: data_s = next(dataloader) + preprocessor, updt_s = update_policy. Frames come from a real data set (a short one is recorded
when none is given) through pyav, in this process. Weights are random: speed does not depend on them. Arms take turns on one network, shuffled
anew every round (by --seed), so that none always follows the same one. Memory is measured in a process for each resolution. The last line is JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.act_training import ActTraining, Arm, Options, measure_memory, tiny_dataset
from benchmarks.policy_zoo import Setting
from benchmarks.program import finish, provenance, show_progress
from benchmarks.work import Ceilings, Work, measure_ceilings
from gr00t_fast.engine import select_device
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import percentiles
from gr00t_fast.optional import require
from training.picture_size import Size, parse_size, size_text

_SIZES = ((640, 480), (320, 240), (224, 224))
_RESIZERS = ("pipeline", "loader")
_STEP_TIMES = ("loader_s", "preprocessor_s", "data_s", "updt_s", "step_s")
_CALL_TIMES = ("preprocess_ms", "refill_ms")
_TOKENS_WITHOUT_PICTURES = 2  # of ACT's encoder: latent and state

Samples = dict[str, dict[str, list[float]]]  # arm -> what -> one value per call


def main(argv: Sequence[str] | None = None) -> int:
    return finish("act_resolution", parser().parse_args(argv), run, as_table, plot)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--published", action="store_true", help="networks of the published sizes instead of small ones")
    p.add_argument("--resolutions", nargs="+", type=parse_size, default=list(_SIZES), metavar="WxH", help="what the network sees")
    p.add_argument("--resize_in", nargs="+", choices=_RESIZERS, default=list(_RESIZERS), help="who resizes in training; an arm for each")
    p.add_argument("--dataset", type=Path, help="a LeRobotDataset v3; default: one episode at 640x480, recorded in --out")
    p.add_argument("--batch_size", type=int, default=2, help="(default: %(default)s)")
    p.add_argument("--rounds", type=int, default=8, help="turns of each arm, after one that is not counted (default: %(default)s)")
    p.add_argument("--steps", type=int, default=1, help="training steps in a turn (default: %(default)s)")
    p.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it, in processes of their own")
    p.add_argument("--smolvla", action=argparse.BooleanOptionalAction, default=True, help="time SmolVLA too")
    p.add_argument("--smolvla_training", action="store_true", help="its training step as well; published: 2 GB more memory")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("outputs/act_resolution"), help="directory for the JSON, the table, the plot and the data set")
    return p


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    _check(arguments)
    device = select_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {device}: memory and times are read in ways of these two.")
    dataset = arguments.dataset or tiny_dataset(arguments.out, arguments.seed)
    options = Options(dataset.resolve(), arguments.batch_size, arguments.published, device.type, arguments.seed, arguments.threads)
    act = measure_act(options, arguments)
    cameras = tuple(f"camera{number}" for number in range(act["cameras"]))
    setting = Setting(arguments.published, cameras, _SIZES[0], device, torch.float32, arguments.out, arguments.seed)
    return {
        "benchmark": "act_resolution",
        "published_sizes": arguments.published,
        "device": device.type,
        "dtype": "float32",
        "dataset": "recorded: one episode" if arguments.dataset is None else dataset.name,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "steps_per_turn": arguments.steps,
        "act": act,
        "smolvla": measure_smolvla(setting, arguments) if arguments.smolvla else None,
        **provenance(arguments.seed),
    }


def _check(arguments: argparse.Namespace) -> None:
    for flag in ("batch_size", "rounds", "steps"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}.")
    if arguments.seed < 0:
        raise ConfigError(f"--seed must not be negative, got {arguments.seed}.")
    for flag in ("resolutions", "resize_in"):
        if len(set(getattr(arguments, flag))) != len(getattr(arguments, flag)):
            raise ConfigError(f"--{flag} names something twice; each is one arm.")


def measure_act(options: Options, arguments: argparse.Namespace) -> dict[str, Any]:
    memory = _memory(options, arguments.resolutions) if arguments.memory else {}  # first, while this process is small
    training = ActTraining(options, arguments.resolutions, arguments.resize_in)
    device = torch.device(options.device)
    before = measure_ceilings(device, torch.float32)
    observation = training.observation()
    fixed = {arm.name: _fixed_facts(training, arm, observation) for arm in training.arms}  # warms up, too
    samples = _interleave(training, observation, arguments)
    ceilings = before.best(measure_ceilings(device, torch.float32))
    parameters = sum(parameter.numel() for parameter in training.policy.parameters())
    base = training.arms[0].name
    return {
        "parameters": parameters,
        "cameras": training.cameras,
        "ceilings": {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)},
        "arms": {
            arm.name: {
                "resolution": list(arm.size),
                "resized_by": arm.resized_by,
                **fixed[arm.name],
                "floor_ms": _floors(fixed[arm.name]["gflop"], 4 * parameters, ceilings),
                "memory_bytes": memory.get(arm.size),
                **_statistics(samples[arm.name], options.batch),
                "times_faster_than_first": {what: _ratio(samples[base][what], samples[arm.name][what]) for what in ("refill_ms", "step_s")},
            }
            for arm in training.arms
        },
    }


def _memory(options: Options, sizes: list[Size]) -> dict[Size, dict[str, int]]:
    found = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for number, size in enumerate(sizes):
            show_progress("memory", number, len(sizes))
            found[size] = pool.submit(measure_memory, options, size).result()
    show_progress("memory", len(sizes), len(sizes))
    return found


def _fixed_facts(training: ActTraining, arm: Arm, observation: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tokens, and the FLOP of matrix products and convolutions of one refill and one training step, as torch counts them."""
    tokens = training.encoder_tokens(arm, observation)
    per_camera = (tokens - _TOKENS_WITHOUT_PICTURES) // training.cameras
    flop = {}
    for name, call in (("refill", lambda: training.refill(arm, observation)), ("training_step", lambda: training.train_step(arm))):
        with FlopCounterMode(display=False) as counter:
            call()
        flop[name] = round(counter.get_total_flops() / 1e9, 3)
    return {"encoder_tokens": tokens, "tokens_per_camera": per_camera, "gflop": flop}


def _interleave(training: ActTraining, observation: dict[str, torch.Tensor], arguments: argparse.Namespace) -> Samples:
    arms = training.arms
    samples: Samples = {arm.name: {what: [] for what in (*_STEP_TIMES, *_CALL_TIMES)} for arm in arms}
    order = random.Random(arguments.seed)
    for number in range(arguments.rounds + 1):
        for place, arm in enumerate(order.sample(arms, len(arms))):
            calls = [training.refill(arm, observation), *(training.train_step(arm) for _ in range(arguments.steps))]
            show_progress("ACT", number * len(arms) + place + 1, (arguments.rounds + 1) * len(arms))
            if number:  # the first round warms up
                for what, value in (pair for call in calls for pair in call.items()):
                    samples[arm.name][what].append(value)
    return samples


def _floors(gflop: dict[str, float], weight_bytes: float, ceilings: Ceilings) -> dict[str, float]:
    return {name: round(Work(1e9 * value, weight_bytes).floor_ms(ceilings), 2) for name, value in gflop.items()}


def _statistics(samples: dict[str, list[float]], batch: int) -> dict[str, Any]:
    calls = {what: percentiles(samples[what]) for what in _CALL_TIMES}
    steps = {what: _of_seconds(samples[what]) for what in _STEP_TIMES}
    return {**calls, **steps, "samples_per_s": round(batch / statistics.median(samples["step_s"]), 3)}


def _of_seconds(values: list[float]) -> dict[str, float]:
    """`percentiles` keeps three decimals: too few for seconds."""
    told = percentiles(1e3 * value for value in values)
    return {name: value if name == "count" else round(value / 1e3, 6) for name, value in told.items()}


def _ratio(slow: list[float], fast: list[float]) -> float:
    """Paired by turn: a disturbance of the machine hits the arms of a round alike."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


def measure_smolvla(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    require("num2words", "bench")
    from benchmarks.smolvla_padding import SmolVlaAtResolutions

    network, sizes = SmolVlaAtResolutions(setting, arguments.resolutions, arguments.batch_size), arguments.resolutions
    seen = {size: network.look_inside(size) for size in sizes}  # warms up, too
    calls: dict[str, Callable[[Size], float]] = {"forward_ms": network.forward_ms}
    if arguments.smolvla_training:
        calls["updt_s"] = network.training_s
    samples: dict[str, dict[Size, list[float]]] = {what: {size: [] for size in sizes} for what in calls}
    order = random.Random(arguments.seed)
    for number in range(arguments.rounds + 1):
        for place, size in enumerate(order.sample(sizes, len(sizes))):
            taken = {what: call(size) for what, call in calls.items()}
            show_progress("SmolVLA", number * len(sizes) + place + 1, (arguments.rounds + 1) * len(sizes))
            if number:
                for what, value in taken.items():
                    samples[what][size].append(value)
    return {
        "parameters": network.parameters,
        "dtype": network.dtype,
        "cameras": len(setting.cameras),
        "resolutions": {
            size_text(size): {
                "square": list(seen[size].square),
                "image_tokens_per_camera": seen[size].image_tokens,
                "padded_share": round(seen[size].padded_share, 4),
                "forward_ms": percentiles(samples["forward_ms"][size]),
                "updt_s": _of_seconds(samples["updt_s"][size]) if "updt_s" in samples else None,
            }
            for size in sizes
        },
    }


def as_table(result: dict[str, Any]) -> str:
    from benchmarks.act_resolution_report import markdown

    return markdown(result)


def plot(result: dict[str, Any], path: Path) -> None:
    from benchmarks.act_resolution_report import draw

    draw(result, path)


if __name__ == "__main__":
    sys.exit(main())
