"""What the training resolution costs: ACT at several resolutions, and SmolVLA, which pads them all to one square.

    python benchmarks/act_resolution.py                                       # a smaller transformer behind ResNet18, two minutes on two CPU cores
    python benchmarks/act_resolution.py --published --rounds=10               # the published sizes: 52 and 450 million parameters, 4 GB of memory
    python benchmarks/act_resolution.py --dataset=DIR --batch_size=8          # your own LeRobotDataset v3

For each resolution: encoder tokens, memory, time of a refill (one chunk for one observation), and of a training step with the times that
lerobot-train logs: data_s = next(dataloader) + preprocessor, updt_s = update_policy. Frames come from a real data set (a short one is recorded
when none is given) through pyav, in this process. Weights are random: speed does not depend on them. Arms take turns on one network, shuffled
anew every round (by --seed), so that none always follows the same one. Memory is measured in a process for each resolution.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.act_training import ActTraining, Arm, Options, measure_memory, tiny_dataset
from benchmarks.lib.policy_zoo import Setting
from benchmarks.lib.program import (
    Flags,
    Result,
    Size,
    check_counts,
    conditions,
    drawing,
    finish,
    in_processes,
    markdown_table,
    paired_ratio,
    provenance,
    read_flags,
    show_progress,
    shuffled_rounds,
    size_of,
    size_text,
)
from benchmarks.lib.work import Work, measure_ceilings
from gr00t_fast.engine import select_device
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.measurement import percentiles

_MEGABYTE = 1e6
_NOTES = (
    "data_s is next(dataloader) + preprocessor and updt_s is update_policy (forward, backward, clipping, AdamW), as lerobot-train 0.4.4 logs "
    "them; a step is both. Frames are decoded by pyav in the training process (num_workers=0), so nothing is hidden.",
    "Where a resize is billed. `pipeline`: the policy's preprocessor (training/act_resize.py), which is always in data_s. `loader`: the data "
    "set resizes each frame (lerobot's image_transforms), which is in data_s here, and with workers only where they do not keep up. lerobot "
    "does not save image_transforms with the policy: these arms have the pipeline's resize as well, which passes small pictures through.",
    "data_s is unresolved between arms at so few steps (rounds times steps in a turn): all arms decode the same frames of the same video, so "
    "differences of the loader's p50 that are no larger than its way from p50 to p95 are noise. The resize itself is in `of it preprocessor`.",
    "Neither makes decoding cheaper: the video has its own resolution in all arms. Fewer pixels to decode take a transcoded data set.",
    "Memory is what a process needs beyond an idle one with everything imported: weights and one refill; then also gradients, AdamW's "
    "moments, activations and a batch. On a CPU the growth of the largest resident size, on a GPU what torch allocates.",
    "Floor: matrix and convolution FLOP as torch counts them over the best matrix rate of this machine in the same run, or the weights' "
    "bytes over the best read rate. `faster`: against the first arm, the median of ratios paired by round.",
    "Weights are random. This says nothing about how well a policy of lower resolution does its task.",
)


def as_table(result: Result) -> str:
    act = result["act"]
    parts = [_regime(result), _network_table(act), _training_table(act)]
    if result["smolvla"] is not None:
        parts.append(_smolvla_table(result["smolvla"]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _NOTES)])


def _regime(result: Result) -> str:
    size = "published size" if result["published_sizes"] else "small transformer behind ResNet18"
    act, host = result["act"], result["machine"]
    where = host["gpu"] if result["device"] == "cuda" else f"{host['processor']}, {host.get('torch_threads')} threads"
    return (
        f"ACT, {size} ({act['parameters'] / 1e6:.1f} M parameters), {result['dtype']}, {act['cameras']} camera(s), batch {result['batch_size']}, "
        f"on {result['device']} ({where}). Data set: {result['dataset']}. {result['rounds']} rounds of {result['steps_per_turn']} training step(s) "
        f"and a refill for each arm, in turn, after a round that is not counted. Best rates seen: {act['ceilings']['tflop_per_s']} TFLOP/s, "
        f"{act['ceilings']['gb_per_s']} GB/s."
    )


def _network_table(act: Result) -> str:
    columns = ("ACT sees", "encoder tokens", "of one camera", "memory, inference MB", "memory, training MB")
    columns += ("refill p50 ms", "p95", "floor", "faster", "its preprocessor p50 ms", "p95")
    twins = {tuple(arm["resolution"]) for arm in act["arms"].values() if arm["resized_by"] == "pipeline"}
    rows = []
    for name, arm in act["arms"].items():
        if arm["resized_by"] == "loader" and tuple(arm["resolution"]) in twins:
            continue  # at inference there is no loader: its pipeline twin stands for both
        refill, before, memory = arm["refill_ms"], arm["preprocess_ms"], arm["memory_bytes"]
        row = [name.split()[0], arm["encoder_tokens"], arm["tokens_per_camera"]]
        row += ["-" if memory is None else f"{memory[what] / _MEGABYTE:.0f}" for what in ("inference", "training")]
        row += [f"{value:.1f}" for value in (refill["p50"], refill["p95"], arm["floor_ms"]["refill"])]
        rows.append([*row, f"{arm['times_faster_than_first']['refill_ms']:.2f}x", f"{before['p50']:.2f}", f"{before['p95']:.2f}"])
    return markdown_table(columns, rows)


def _training_table(act: Result) -> str:
    columns = ("training step", "resized by", "data_s p50", "p95", "of it loader", "of it preprocessor")
    columns += ("updt_s p50", "p95", "floor", "samples per s", "faster")
    rows = []
    for name, arm in act["arms"].items():
        data, update = arm["data_s"], arm["updt_s"]
        row = [name.split()[0], arm["resized_by"]]
        row += [f"{value:.4f}" for value in (data["p50"], data["p95"], arm["loader_s"]["p50"], arm["preprocessor_s"]["p50"])]
        row += [f"{value:.3f}" for value in (update["p50"], update["p95"], arm["floor_ms"]["training_step"] / 1e3)]
        rows.append([*row, f"{arm['samples_per_s']:.2f}", f"{arm['times_faster_than_first']['step_s']:.2f}x"])
    return markdown_table(columns, rows)


def _smolvla_table(smolvla: Result) -> str:
    columns = ("SmolVLA, camera gives", "network sees", "image tokens per camera", "patches that are padding")
    rows = []
    for name, found in smolvla["resolutions"].items():
        row = [name, size_text(found["square"]), found["image_tokens_per_camera"], f"{found['padded_share']:.0%}"]
        row += [f"{found['forward_ms'][p]:.1f}" for p in ("p50", "p95")]
        rows.append(row + (["-", "-"] if found["updt_s"] is None else [f"{found['updt_s'][p]:.3f}" for p in ("p50", "p95")]))
    size = f"{smolvla['parameters'] / 1e6:.1f} M parameters, {smolvla['dtype']}, {smolvla['cameras']} camera(s)"
    said = f"SmolVLA ({size}) brings every picture to one square: its tokens do not depend on the camera's resolution."
    return f"{said}\n\n{markdown_table((*columns, 'forward p50 ms', 'p95', 'updt_s p50', 'p95'), rows)}"


def plot(result: Result, path: Path) -> None:
    """Tokens, refill and training step per arm."""
    arms = result["act"]["arms"]
    names, rows = [name.replace(" ", "\n") for name in arms], list(arms.values())
    size = "published size" if result["published_sizes"] else "small"
    with drawing(path, f"ACT, {size}, {result['dtype']}, {conditions(result)}", 1, 3, (13, 4)) as axes:
        left, middle, right = axes[0]
        bars = left.bar(names, [row["encoder_tokens"] for row in rows])
        left.bar_label(bars, fontsize=8)
        left.set_title("tokens in ACT's encoder")
        bars = middle.bar(names, [row["refill_ms"]["p50"] for row in rows], label="refill")
        middle.bar_label(bars, fmt="%.0f", fontsize=8)
        middle.set_title("refill, one observation: p50 (ms)")
        bottom = [0.0] * len(rows)
        for what, label in (("loader_s", "data_s: loader"), ("preprocessor_s", "data_s: preprocessor"), ("updt_s", "updt_s")):
            values = [row[what]["p50"] for row in rows]
            right.bar(names, values, bottom=bottom, label=label)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        right.set_title(f"training step, batch {result['batch_size']}: p50 (s)")
        right.legend(fontsize=8)
        for axis in axes[0]:
            axis.tick_params(axis="x", labelsize=7)


_STEP_TIMES = ("loader_s", "preprocessor_s", "data_s", "updt_s", "step_s")
_CALL_TIMES = ("preprocess_ms", "refill_ms")
_TOKENS_WITHOUT_PICTURES = 2  # of ACT's encoder: latent and state

Samples = Mapping[str, list[float]]  # what was timed -> one value per call


@dataclass
class Config(Flags):
    published: bool = False  # networks of the published sizes instead of small ones
    resolutions: list[str] = field(default_factory=lambda: ["640x480", "320x240", "224x224"])  # what the network sees, WIDTHxHEIGHT
    resize_in: list[Literal["pipeline", "loader"]] = field(default_factory=lambda: ["pipeline", "loader"])  # who resizes in training; an arm for each
    dataset: Path | None = None  # a LeRobotDataset v3; default: one episode at 640x480, recorded in --out
    batch_size: int = 2  # samples of a training step
    rounds: int = 8  # turns of each arm, after one that is not counted
    training_steps: int = 1  # in a turn
    memory: bool = True  # measure it, in processes of their own
    smolvla: bool = True  # time SmolVLA too
    smolvla_training: bool = False  # its training step as well; published: 2 GB more memory
    out: Path = Path("outputs/act_resolution")  # directory for JSON, table, plot and data set

    @property
    def sizes(self) -> list[Size]:
        return [size_of(text, "resolutions") for text in self.resolutions]


def main(argv: Sequence[str] | None = None) -> int:
    return finish("act_resolution", read_flags(Config, argv, __doc__), run, as_table, plot)


def run(arguments: Config) -> dict[str, Any]:
    _check(arguments)
    device = select_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {device}: memory and times are read in ways of these two.")
    dataset = arguments.dataset or tiny_dataset(arguments.out, arguments.seed)
    options = Options(dataset.resolve(), arguments.batch_size, arguments.published, device.type, arguments.seed, arguments.threads)
    act = measure_act(options, arguments)
    cameras = tuple(f"camera{number}" for number in range(act["cameras"]))
    setting = Setting(arguments.published, cameras, (640, 480), device, torch.float32, arguments.out, arguments.seed)
    return {
        "benchmark": "act_resolution",
        "published_sizes": arguments.published,
        "device": device.type,
        "dtype": "float32",
        "dataset": "recorded: one episode" if arguments.dataset is None else dataset.name,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "steps_per_turn": arguments.training_steps,
        "act": act,
        "smolvla": measure_smolvla(setting, arguments) if arguments.smolvla else None,
        **provenance(arguments.seed),
    }


def _check(arguments: Config) -> None:
    check_counts(arguments, "batch_size", "rounds", "training_steps")
    check_counts(arguments, "seed", least=0)
    for flag, values in (("resolutions", arguments.sizes), ("resize_in", arguments.resize_in)):
        if len(set(values)) != len(values) or not values:
            raise ConfigError(f"--{flag} must name one arm or more, each once.")


def measure_act(options: Options, arguments: Config) -> dict[str, Any]:
    memory = _memory(options, arguments.sizes) if arguments.memory else {}  # first, while this process is small
    training = ActTraining(options, arguments.sizes, arguments.resize_in)
    device = torch.device(options.device)
    before = measure_ceilings(device, torch.float32)
    observation = training.observation()
    fixed = {arm.name: _fixed_facts(training, arm, observation) for arm in training.arms}  # warms up, too
    arms = {arm.name: arm for arm in training.arms}

    def turn(name: str) -> list[dict[str, float]]:
        return [training.refill(arms[name], observation), *(training.train_step(arms[name]) for _ in range(arguments.training_steps))]

    samples = _take_turns(list(arms), turn, arguments, "ACT")
    ceilings = before.best(measure_ceilings(device, torch.float32))
    parameters = sum(parameter.numel() for parameter in training.policy.parameters())

    def floors_ms(gflop: dict[str, float]) -> dict[str, float]:
        return {name: round(Work(1e9 * value, 4.0 * parameters).floor_ms(ceilings), 2) for name, value in gflop.items()}

    def faster(name: str, what: str) -> float:
        return paired_ratio(samples[base][what], samples[name][what])["median"]

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
                "floor_ms": floors_ms(fixed[arm.name]["gflop"]),
                "memory_bytes": memory.get(arm.size),
                **_statistics(samples[arm.name], options.batch),
                "times_faster_than_first": {what: faster(arm.name, what) for what in ("refill_ms", "step_s")},
            }
            for arm in training.arms
        },
    }


def _memory(options: Options, sizes: list[Size]) -> dict[Size, dict[str, int]]:
    """Each in a fresh process."""
    found: dict[Size, dict[str, int]] = {}
    for number, size in enumerate(sizes):
        ((_, found[size]),) = in_processes(measure_memory, [(options, size)], 1)
        show_progress("memory", number + 1, len(sizes))
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


def _take_turns(arms: Sequence[str], turn: Callable[[str], list[dict[str, float]]], arguments: Config, what: str) -> dict[str, Samples]:
    """arm -> what was timed -> samples, after a round that is not counted. `turn` makes the calls of an arm's turn."""
    samples: dict[str, dict[str, list[float]]] = {arm: defaultdict(list) for arm in arms}
    for order, counted in shuffled_rounds(arms, arguments.rounds, 1, arguments.seed, what):
        for arm in order:
            for call in turn(arm):
                for name, value in call.items() if counted else ():
                    samples[arm][name].append(value)
    return samples


def _statistics(samples: Samples, batch: int) -> dict[str, Any]:
    calls = {what: percentiles(samples[what]) for what in _CALL_TIMES}
    steps = {what: _of_seconds(samples[what]) for what in _STEP_TIMES}
    return {**calls, **steps, "samples_per_s": round(batch / statistics.median(samples["step_s"]), 3)}


def _of_seconds(values: list[float]) -> dict[str, float]:
    """`percentiles` keeps three decimals: too few for seconds."""
    told = percentiles(1e3 * value for value in values)
    return {name: value if name == "count" else round(value / 1e3, 6) for name, value in told.items()}


def measure_smolvla(setting: Setting, arguments: Config) -> dict[str, Any]:
    require("num2words", "bench")
    from benchmarks.act_training import SmolVlaAtResolutions

    network, sizes = SmolVlaAtResolutions(setting, arguments.sizes, arguments.batch_size), {size_text(size): size for size in arguments.sizes}
    seen = {name: network.look_inside(size) for name, size in sizes.items()}  # warms up, too
    calls: dict[str, Callable[[Size], float]] = {"forward_ms": network.forward_ms}
    if arguments.smolvla_training:
        calls["updt_s"] = network.training_s
    samples = _take_turns(list(sizes), lambda name: [{what: call(sizes[name]) for what, call in calls.items()}], arguments, "SmolVLA")
    return {
        "parameters": network.parameters,
        "dtype": network.dtype,
        "cameras": len(setting.cameras),
        "resolutions": {
            name: {
                "square": list(seen[name].square),
                "image_tokens_per_camera": seen[name].image_tokens,
                "padded_share": round(seen[name].padded_share, 4),
                "forward_ms": percentiles(samples[name]["forward_ms"]),
                "updt_s": _of_seconds(samples[name]["updt_s"]) if "updt_s" in calls else None,
            }
            for name in sizes
        },
    }


if __name__ == "__main__":
    sys.exit(main())
