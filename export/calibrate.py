#!/usr/bin/env python
"""Calibrate the torch engine `fp8` with observations of your robot.

    python export/calibrate.py --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --calibration=./my-lerobot-dataset

fp8 is for Ada, Hopper and Blackwell GPUs. The result is small (scales, no weights) and belongs to these weights, this robot and these cameras: with
any other the engine refuses it. Calibration itself runs on any device; 8-bit products that the device lacks are written out. Observations come from a
LeRobotDataset v3, from a directory of .npz recordings, or, for networks with random weights and tests, from random:SEED. Layers whose rounding the
actions cannot spare stay in 16 bits (--limit).
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory


from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import Target, select_device, select_precision
from gr00t_fast.engine.calibration import Calibration, write_calibration
from gr00t_fast.engine.digests import Digests
from gr00t_fast.engine.fp8 import has_product
from gr00t_fast.engine.quantized import PARTS
from gr00t_fast.errors import ConfigError, attempt, exit_code_of
from gr00t_fast.export.directory import check_free, whole_directory
from gr00t_fast.export.fp8 import SCHEME, TARGET, calibrate, digest_of
from gr00t_fast.export.observations import MIN_FRAMES, draw, open_frames
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.quantisation_report import as_markdown, build_report, write_report
from gr00t_fast.export.quantise import Outcome, Settings
from gr00t_fast.export.samples import network_cases, transforms_only
from gr00t_fast.export.verify import Case
from gr00t_fast.measurement import git_commit, machine, peak_rss_bytes, versions
from gr00t_fast.prompt import PROMPT_STYLES
from gr00t_fast.transforms import ActionTransform


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    start_s = time.perf_counter()
    report, code = attempt(lambda: run(arguments), "interrupted; nothing was left behind")
    if report is None:
        return code
    print(as_markdown(report))
    facts = {"seconds": round(time.perf_counter() - start_s, 1), "peak_rss_bytes": peak_rss_bytes(), "machine": machine(), "versions": versions()}
    brief = {key: value for key, value in report.items() if key not in ("groups", "layers")}
    print(json.dumps({**brief, **facts, "git_commit": git_commit(), "command_line": shlex.join(sys.argv)}))
    return 0


def _camera_map(text: str) -> dict[str, str]:
    import yaml  # a bare GPU machine has none, and needs none without this flag

    return yaml.safe_load(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    p.add_argument("--revision", help="commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow")
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own")
    p.add_argument("--format", choices=(SCHEME,), default=SCHEME, help="the engine that it is for")
    p.add_argument("--out", type=Path, help="directory to make; default: exports/fp8 in the checkpoint's, where the engine looks")
    p.add_argument("--overwrite", action="store_true", help="replace a calibration that is there, once the new one is whole")
    p.add_argument(
        "--calibration", required=True, help="a LeRobotDataset or recordings directory, or random:SEED (says nothing about trained weights)"
    )
    p.add_argument("--camera_map", type=_camera_map, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    p.add_argument("--frames", type=int, default=MIN_FRAMES, help="how many, spread over all episodes")
    p.add_argument("--allow_few", action="store_true", help="calibrate with fewer frames or episodes than it takes; the manifest says so")
    p.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="of the network to round; the others stay in 16 bits")
    p.add_argument("--denoising_steps", type=int, help="of the trials; default: the checkpoint's own. The result is good for any count")
    p.add_argument("--limit", type=float, default=1.0, help="p99 of the action error, in joint units, that layers are kept in 16 bits for")
    p.add_argument("--trial_frames", type=int, default=8, help="frames that decide which layers are kept; 0: keep none, measure nothing")
    p.add_argument(
        "--balance", action=argparse.BooleanOptionalAction, default=True, help="move outliers from activations into weights where it helps"
    )
    p.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain")
    p.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="fp32", help="of the plain model: fp32 (8 GB at full size) is the truth that trials compare with")
    p.add_argument("--seed", type=int, default=0, help="of the choice of frames and of the noise")
    return p


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check everything small, load, calibrate, write. Raises Gr00tFastError."""
    _check(arguments)
    checkpoint, config = open_checkpoint(arguments.model_path, revision=arguments.revision), load_data_config(arguments.data_config)
    target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
    out = arguments.out or checkpoint.path / "exports" / SCHEME
    check_free(out, arguments.overwrite)
    steps = checkpoint.config.head.denoising_steps if arguments.denoising_steps is None else arguments.denoising_steps
    device = select_device(arguments.device)
    dtype = select_precision(arguments.precision, device)
    progress = Progress()
    cases, data = collect_cases(arguments, target, progress)
    model = load_model(checkpoint, arguments.embodiment_tag, device, dtype)
    settings = Settings(SCHEME, TARGET, steps, arguments.limit, arguments.trial_frames, arguments.balance, arguments.seed)
    transform = ActionTransform(config, checkpoint.embodiment(arguments.embodiment_tag), checkpoint.config.head.action_dim)
    outcome, calibration = calibrate(model, cases, settings, not has_product(device), arguments.parts, transform, progress)
    return _write(arguments, target, out, outcome, settings, calibration, data)


def collect_cases(arguments: argparse.Namespace, target: Target, progress: Progress) -> tuple[list[Case], dict[str, Any]]:
    """Observations as the network gets them, with noise, and where they come from."""
    policy = transforms_only(
        target.checkpoint.path,
        embodiment_tag=arguments.embodiment_tag,
        data_config=target.data_config,
        processor_path=arguments.processor_path,
        prompt_style=arguments.prompt_style,
    )
    frames = open_frames(arguments.calibration, target.data_config, policy.facts, arguments.camera_map)
    sample = draw(frames, arguments.frames, arguments.seed, arguments.allow_few)
    with progress.bar("observations", len(sample.indices)) as tick:
        cases = network_cases(policy, frames, sample, arguments.seed, tick)
    return cases, {**sample.describe(), "digest": digest_of(cases)}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.frames < 1:
        raise ConfigError(f"--frames={arguments.frames} must be at least 1.")
    if arguments.denoising_steps is not None and arguments.denoising_steps < 1:
        raise ConfigError(f"--denoising_steps={arguments.denoising_steps} must be at least 1.")
    if not isinstance(arguments.camera_map, dict):
        raise ConfigError(f'--camera_map={arguments.camera_map}: expected a mapping, e.g. "{{front: webcam}}".')


def _write(
    arguments: argparse.Namespace,
    target: Target,
    out: Path,
    outcome: Outcome,
    settings: Settings,
    calibration: Calibration,
    data: dict[str, Any],
) -> dict[str, Any]:
    report = build_report(outcome, settings, data)
    report |= {"parts": arguments.parts, "out": str(out)}
    with whole_directory(out, arguments.overwrite) as directory:
        write_report(report, directory)
        identity = target.identity(Digests(directory))
        write_calibration(directory, calibration, identity, data, versions(), shlex.join(sys.argv), _flags(arguments))
    return report


def _flags(arguments: argparse.Namespace) -> list[str]:
    """What the manifest needs to name the command that makes the same again."""
    names = ("calibration", "frames", "denoising_steps", "limit", "trial_frames", "prompt_style", "processor_path", "precision", "seed")
    flags = [f"--{name}={value}" for name in names if (value := getattr(arguments, name)) is not None]
    if arguments.camera_map:
        flags.append(f"--camera_map={json.dumps(arguments.camera_map)}")  # JSON is YAML
    return [*flags, "--parts", *arguments.parts, *(["--allow_few"] if arguments.allow_few else []), *([] if arguments.balance else ["--no-balance"])]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
