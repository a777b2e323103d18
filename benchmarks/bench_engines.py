"""Every engine over the torch model against the plain one: how far its actions are off, in degrees, and how long it takes, side by side.

    python benchmarks/bench_engines.py --model_path=DIR --device=cuda
    python benchmarks/bench_engines.py --model_path=DIR --device=cuda --dataset=./my-lerobot-dataset      # errors on what your arm saw
    python benchmarks/bench_engines.py --size=full --device=cpu --threads=2 --engines=eager,compiled --rounds=10 --observations=4

First eager in fp32 answers all observations: the truth. Then the engines, which share one copy of the weights, answer the same observations with the
same noise; last they take turns at whole calls, camera frame to joint targets, in random order. `reference` is a second, independent implementation
(transformers' towers and lerobot's action head behind our pre-processing), where it is installed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.program import checkpoint_of, finish, provenance, show_progress
from benchmarks.random_observations import random_noise, random_observations
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import CALIBRATED, ENGINES, Engine, check_engine, make_engine, select_device, select_precision
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.errors import ConfigError, EngineError, MissingExtraError
from gr00t_fast.export.verify import ACTION_LIMITS
from gr00t_fast.measurement import peak_rss_bytes, percentiles
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.policy import Gr00tPolicy, load_policy

REFERENCE = "reference"
# Where the plain model in the same precision is itself further from fp32 than the limit (a network with random weights amplifies rounding), an
# engine may be this much further than that.
_OF_EAGER = 1.5

Actions = dict[str, np.ndarray]
Times = dict[str, list[float]]


def main(argv: list[str] | None = None) -> int:
    return finish("bench_engines", _parser().parse_args(argv), run, as_table)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    path = checkpoint_of(arguments, arguments.size)
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    truth = true_actions(path, arguments)
    model = load_model(open_checkpoint(path), arguments.embodiment_tag, device, dtype)
    policies, refused = open_policies(path, arguments, model)
    first_call_s = {name: _seconds(policy.warm_up) for name, policy in policies.items()}
    errors = {name: action_error(policy, truth, arguments) for name, policy in policies.items()}
    steps = arguments.denoising_steps or [next(iter(policies.values())).denoising_steps]
    taken = {str(count): take_turns(policies, count, arguments) for count in steps}
    times = {count: wall for count, (wall, _) in taken.items()}
    precision = next(name for name, kind in _NAMES.items() if kind == dtype)
    return {
        "benchmark": "bench_engines",
        "network": path.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(device),
        "precision": precision,
        "eight_bit": [name for name in policies if name in CALIBRATED],
        "cameras": len(next(iter(policies.values())).facts.resolutions),
        "observations": len(truth),
        "of": Path(arguments.dataset).name if arguments.dataset else "random pictures and joints",
        "rounds": arguments.rounds,
        "error_deg": errors,
        "within_limit": {name: within_limit(name, errors, precision) for name in errors},
        "first_calls_s": first_call_s,
        "times_ms": {steps: {name: percentiles(values) for name, values in each.items()} for steps, each in times.items()},
        "times_as_fast_as_eager": {steps: ratios(each, "eager") for steps, each in times.items()},
        "times_as_fast_as_reference": {steps: ratios(each, REFERENCE) for steps, each in times.items()},
        # on a shared machine what was computed says more than how long it took; a GPU's work is not in it
        "processor_time_as_fast_as_eager": {count: ratios(busy, "eager") for count, (_, busy) in taken.items()} if device.type == "cpu" else None,
        "attention": {name: _attention(policy.engine) for name, policy in policies.items()},
        "refused": refused,
        "peak_rss_bytes": peak_rss_bytes(),
        **provenance(arguments.seed),
    }


_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# --- the engines ------------------------------------------------------------------------------------------------------------------------


def open_policies(path: Path, arguments: argparse.Namespace, model: Gr00tN1d5) -> tuple[dict[str, Gr00tPolicy], dict[str, str]]:
    """Name -> policy, over one copy of the weights; name -> why an engine cannot be used here. A named engine that cannot be used is an error."""
    named = arguments.engines.split(",") if arguments.engines else []
    policies, refused = {}, {}
    skipped = arguments.skip.split(",")
    for name in named or [name for name in (*ENGINES, *arguments.calibration, REFERENCE) if name not in skipped]:
        try:
            policies[name] = open_policy(name, path, arguments, model)
        except (ConfigError, EngineError, MissingExtraError) as error:
            if name in named:
                raise
            refused[name] = str(error)
    return policies, refused


def open_policy(name: str, path: Path, arguments: argparse.Namespace, model: Gr00tN1d5) -> Gr00tPolicy:
    """Raises ConfigError, EngineError or MissingExtraError for an engine that cannot be used on this machine."""
    if name in CALIBRATED:
        precision = next(word for word, kind in _NAMES.items() if kind == model.dtype)
        return _load(path, arguments, device=str(model.device), precision=precision, engine=name, engine_path=arguments.calibration.get(name))
    if name == REFERENCE:
        from benchmarks.reference_policy import ReferenceEngine

        return _load(path, arguments, engine=ReferenceEngine(path, arguments.embodiment_tag, model.device, model.dtype))
    check_engine(name)
    pixels = _load(path, arguments, engine=_on(model, EagerEngine(model))).to_pixels
    return _load(path, arguments, engine=_on(model, make_engine(name, model, pixels)))


def _on(model: Gr00tN1d5, engine: Any) -> Engine:
    """An engine that says where it runs, which load_policy asks of one that it did not make."""
    engine.device, engine.dtype = model.device, model.dtype
    return engine


def _load(path: Path, arguments: argparse.Namespace, **options: Any) -> Gr00tPolicy:
    common = {name: getattr(arguments, name) for name in ("embodiment_tag", "data_config", "processor_path", "seed")}
    return load_policy(path, **common, **options)


def _attention(engine: Any) -> list[dict[str, Any]]:
    return engine.attention.describe() if hasattr(engine, "attention") else []


# --- accuracy ---------------------------------------------------------------------------------------------------------------------------


def true_actions(path: Path, arguments: argparse.Namespace) -> list[Actions]:
    """Eager, fp32, on the same device: freed before the engines come."""
    policy = _load(path, arguments, device=arguments.device, precision="fp32", engine="eager")
    return _answers(policy, arguments)


def observations_of(policy: Gr00tPolicy, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of --dataset, spread over its episodes, or random pictures and joints. Raises ConfigError for a data set of another robot."""
    if arguments.dataset is None:
        return random_observations(policy, arguments.seed, arguments.observations)
    from gr00t_fast.export.observations import draw, open_frames, read

    frames = open_frames(arguments.dataset, load_data_config(arguments.data_config), policy.facts, arguments.camera_map)
    return list(read(frames, draw(frames, arguments.observations, arguments.seed, allow_few=True), policy.facts))


def _answers(policy: Gr00tPolicy, arguments: argparse.Namespace) -> list[Actions]:
    observations = observations_of(policy, arguments)
    found = []
    for index, observation in enumerate(observations):
        found.append(policy.get_action(observation, noise=random_noise(policy, arguments.seed + index)))
        show_progress("observation", index + 1, len(observations))
    return found


def action_error(policy: Gr00tPolicy, truth: list[Actions], arguments: argparse.Namespace) -> dict[str, float]:
    """|difference| to the truth over all observations, times and joints, in joint units: degrees, per cent for the gripper."""
    got = _answers(policy, arguments)
    gaps = np.concatenate([np.abs(mine[key] - theirs[key]).ravel() for mine, theirs in zip(got, truth, strict=True) for key in theirs])
    p50, p99 = np.percentile(gaps, (50, 99))  # NaN where an action is NaN
    return {"p50": float(p50), "p99": float(p99), "max": float(gaps.max())}


def within_limit(name: str, errors: Mapping[str, dict[str, float]], precision: str) -> bool:
    """NaN is no pass."""
    limit = ACTION_LIMITS[name if name in CALIBRATED else precision]
    if name not in CALIBRATED and "eager" in errors and errors["eager"]["p99"] > limit:
        limit = _OF_EAGER * errors["eager"]["p99"]
    return bool(errors[name]["p99"] <= limit)


# --- time -------------------------------------------------------------------------------------------------------------------------------


def take_turns(policies: Mapping[str, Gr00tPolicy], steps: int, arguments: argparse.Namespace) -> tuple[Times, Times]:
    """ms of whole calls, by the clock and of processor time. Each round calls every engine once, in an order of its own: a disturbance hits all
    alike."""
    generator, names = np.random.default_rng(arguments.seed), list(policies)
    for policy in policies.values():
        policy.denoising_steps = steps
        policy.warm_up()
    observations = random_observations(policies[names[0]], arguments.seed, 8)
    times, busy = ({name: [] for name in names} for _ in range(2))
    for number in range(arguments.rounds):
        observation = observations[number % len(observations)]
        for name in generator.permutation(names):
            busy_s = time.process_time()
            times[name].append(1000 * _seconds(partial(policies[name].get_action, observation)))
            busy[name].append(1000 * (time.process_time() - busy_s))
        show_progress("round", number + 1, arguments.rounds)
    return times, busy


def _seconds(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return round(time.perf_counter() - began_s, 6)


def ratios(times: Mapping[str, list[float]], of: str) -> dict[str, dict[str, float]] | None:
    """How many times as fast as engine `of` each one is, paired by round: median and quartiles. None where `of` did not run."""
    if of not in times:
        return None
    found = {}
    for name, values in times.items():
        if name != of:
            paired = [theirs / max(mine, 1e-6) for mine, theirs in zip(values, times[of], strict=True)]
            low, high = np.percentile(paired, (25, 75))
            found[name] = {"median": round(statistics.median(paired), 3), "p25": round(float(low), 3), "p75": round(float(high), 3)}
    return found


def as_table(result: dict[str, Any]) -> str:
    compared = f"joint units, {result['observations']} observations of {result['of']}, against eager fp32"
    rows = [f"{'engine':<12} {'error p50':>10} {'p99':>9} {'max':>9}  limit ({compared})"]
    for name, e in result["error_deg"].items():
        verdict = "kept" if result["within_limit"][name] else "EXCEEDED"
        rows.append(f"{name:<12} {e['p50']:>10.4f} {e['p99']:>9.4f} {e['max']:>9.4f}  {verdict}")
    for steps, each in result["times_ms"].items():
        rows += ["", f"{steps + ' steps':<12} {'p50':>9} {'p95':>9} {'p99':>9}  ms; times as fast as eager (quartiles), as the reference modules"]
        for name, t in each.items():
            faster = [_faster(result[f"times_as_fast_as_{of}"][steps], name) for of in ("eager", REFERENCE)]
            rows.append(f"{name:<12} {t['p50']:>9.3f} {t['p95']:>9.3f} {t['p99']:>9.3f}  {faster[0]:<24} {faster[1]}".rstrip())
        busy = (result["processor_time_as_fast_as_eager"] or {}).get(steps) or {}
        rows += [f"{name}: {_faster(busy, name)} times as fast as eager in processor time" for name in busy]
    rows += [f"{name}: not used here: {reason}" for name, reason in result["refused"].items()]
    return "\n".join(rows)


def _faster(ratio: dict[str, dict[str, float]] | None, name: str) -> str:
    return "{median:.3f} ({p25:.3f} to {p75:.3f})".format(**ratio[name]) if ratio and name in ratio else "-"


def _calibrations(text: str) -> dict[str, Path]:
    found = {}
    for word in filter(None, text.split(",")):
        name, _, directory = word.partition("=")
        if name not in CALIBRATED or not directory:
            raise argparse.ArgumentTypeError(f"expected ENGINE=DIR with ENGINE one of {', '.join(CALIBRATED)}, got '{word}'")
        found[name] = Path(directory)
    return found


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--observations", type=int, default=100, help="for the error")
    parser.add_argument("--dataset", help="a LeRobotDataset or recordings directory to take them from, instead of random pictures and joints")
    parser.add_argument(
        "--camera_map", type=_camera_map, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"'
    )


def _camera_map(text: str) -> dict[str, str]:
    import yaml  # a bare GPU machine has none, and needs none without this flag

    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'expected a mapping, e.g. "{{front: webcam}}", got {text}')
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--processor_path", help="tokenizer files, when the checkpoint has none")
    parser.add_argument("--engines", default="", help=f"comma-separated; default: every one that this machine can run, of {', '.join(ENGINES)}")
    parser.add_argument("--skip", default="", help="comma-separated engines to leave out of that default")
    parser.add_argument("--calibration", type=_calibrations, default={}, metavar="fp8=DIR,int8=DIR", help="engines with files of their own")
    parser.add_argument("--denoising_steps", type=int, nargs="*", help="step counts to time; default: the checkpoint's own")
    add_dataset_flags(parser)
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each engine")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_engines"), help="directory for JSON and table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
