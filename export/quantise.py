#!/usr/bin/env python
"""Make an 8-bit version of an ONNX export, calibrated with observations of your robot.

    python export/quantise.py --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --onnx=exports/onnx --out=exports/openvino \\
        --scheme=int8 --target=openvino --calibration=./my-lerobot-dataset

openvino and tensorrt take INT8 weights and activations with scales from the calibration; tensorrt takes FP8 (E4M3) too, on GPUs that have it.
onnxruntime rounds activations with scales found at run time and needs no calibration. Calibration observations come from a LeRobotDataset v3, from a
directory of .npz recordings, or, for networks with random weights and tests, from random:SEED.
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

import yaml

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine.manifest import Target, check_manifest, remedy_for
from gr00t_fast.engine.tables import ExportTables
from gr00t_fast.errors import ConfigError, attempt, exit_code_of
from gr00t_fast.export.directory import check_free, whole_directory
from gr00t_fast.export.observations import MIN_FRAMES, draw, open_frames, read
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.quantisation_report import as_markdown, build_report, write_report
from gr00t_fast.export.quantise import SCHEMES, TARGETS, Outcome, Settings, calibrate, temporary_directory, write_quantised_export
from gr00t_fast.export.samples import draw_noise, stage_samples, transforms_only
from gr00t_fast.measurement import git_commit, machine, peak_rss_bytes, versions
from gr00t_fast.optional import require
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
    print(json.dumps({"out": str(arguments.out), **brief, **facts, "git_commit": git_commit(), "command_line": shlex.join(sys.argv)}))
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    p.add_argument("--revision", help="commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow")
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own")
    p.add_argument("--onnx", type=Path, required=True, help="export to begin with (export/to_onnx.py)")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is there, once the new one is whole")
    p.add_argument("--scheme", choices=SCHEMES, default="int8")
    p.add_argument("--target", choices=TARGETS, required=True, help="the runtime that the files are for")
    p.add_argument("--calibration", help="a LeRobotDataset or recordings directory, or random:SEED (synthetic: says nothing about trained weights)")
    p.add_argument("--camera_map", type=yaml.safe_load, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    p.add_argument("--frames", type=int, default=MIN_FRAMES, help="how many, spread over all episodes")
    p.add_argument("--allow_few", action="store_true", help="calibrate with fewer frames or episodes than it takes; the manifest says so")
    p.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own; calibrate with as many as will run")
    p.add_argument("--limit", type=float, default=1.0, help="p99 of the action error, in joint units, that layers are kept in 16 bits for")
    p.add_argument("--trial_frames", type=int, default=8, help="frames that decide which layers are kept; 0: keep none, measure nothing")
    p.add_argument(
        "--balance", action=argparse.BooleanOptionalAction, default=True, help="move outliers from activations into weights where it helps"
    )
    p.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain")
    p.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    p.add_argument("--device", default="cpu", help="cpu: calibration runs on ONNX Runtime's CPU kernels")
    p.add_argument("--seed", type=int, default=0, help="of the choice of frames and of the noise")
    return p


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check everything small, calibrate, write. Raises Gr00tFastError."""
    _check(arguments)
    checkpoint, config = open_checkpoint(arguments.model_path, revision=arguments.revision), load_data_config(arguments.data_config)
    target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
    remedy = remedy_for(arguments.onnx, target, "to_onnx.py")
    manifest = check_manifest(arguments.onnx, "onnx", target, remedy)
    if manifest.quantisation is not None:
        raise ConfigError(f"--onnx={arguments.onnx} is in {manifest.quantisation.get('format')} already. Give the export it was made from.")
    if arguments.target != "tensorrt" and manifest.precision != "fp32":
        raise ConfigError(f"--onnx={arguments.onnx} is {manifest.precision}; {arguments.target} takes fp32 (export/to_onnx.py --precision=fp32).")
    steps = checkpoint.config.head.denoising_steps if arguments.denoising_steps is None else arguments.denoising_steps
    if steps < 1:
        raise ConfigError(f"--denoising_steps={steps} must be at least 1.")
    settings = Settings(arguments.scheme, arguments.target, steps, arguments.limit, arguments.trial_frames, arguments.balance, arguments.seed)
    outcome, calibration = None, {}
    if arguments.calibration is not None:
        outcome, calibration = _calibrate(arguments, target, settings, manifest.shapes, remedy)
    report = build_report(outcome, settings, calibration)
    with whole_directory(arguments.out, arguments.overwrite) as directory:
        write_report(report, directory)
        flags = _flags(arguments)
        write_quantised_export(arguments.onnx, manifest, directory, outcome, settings, calibration, shlex.join(sys.argv), flags)
    return report


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device not in ("auto", "cpu"):
        raise ConfigError(f"--device={arguments.device}: calibration runs on the CPU. Expected auto or cpu.")
    if arguments.scheme == "fp8" and arguments.target != "tensorrt":
        raise ConfigError(f"--scheme=fp8 --target={arguments.target}: no CPU computes in FP8. Expected --scheme=int8, or --target=tensorrt.")
    if arguments.calibration is None and arguments.target != "onnxruntime":
        raise ConfigError(f"--target={arguments.target} needs --calibration: a LeRobotDataset or recordings directory, or random:SEED.")
    for name in ("frames", "denoising_steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}={getattr(arguments, name)} must be at least 1.")
    if not isinstance(arguments.camera_map, dict):
        raise ConfigError(f'--camera_map={arguments.camera_map}: expected a mapping, e.g. "{{front: webcam}}".')
    for package in ("onnx", "onnxruntime", *(["openvino"] if arguments.target == "openvino" else [])):
        require(package, "openvino" if package == "openvino" else "export")
    check_free(arguments.out, arguments.overwrite)


def _calibrate(
    arguments: argparse.Namespace, target: Target, settings: Settings, shapes: dict[str, Any], remedy: str
) -> tuple[Outcome, dict[str, Any]]:
    policy = transforms_only(
        target.checkpoint.path,
        embodiment_tag=arguments.embodiment_tag,
        data_config=target.data_config,
        processor_path=arguments.processor_path,
        prompt_style=arguments.prompt_style,
    )
    frames = open_frames(arguments.calibration, target.data_config, policy.facts, arguments.camera_map)
    sample = draw(frames, arguments.frames, arguments.seed, arguments.allow_few)
    tables = ExportTables(arguments.onnx, remedy)
    tables.steps(settings.denoising_steps)  # a count that was not exported is refused before minutes pass
    progress = Progress()
    with progress.bar("observations", len(sample.indices)) as tick:
        observations = _counted(read(frames, sample, policy.facts), tick)
        samples = stage_samples(policy, tables, observations, draw_noise(shapes, len(sample.indices), arguments.seed))
    transform = ActionTransform(target.data_config, target.checkpoint.embodiment(arguments.embodiment_tag), shapes["action_dim"])
    with temporary_directory(arguments.out) as work:
        return calibrate(arguments.onnx, samples, settings, transform, Path(work), progress), sample.describe()


def _counted(items, tick):
    for item in items:
        yield item
        tick()


def _flags(arguments: argparse.Namespace) -> list[str]:
    """What the manifest needs to name the command that makes the same again."""
    names = (
        "onnx",
        "scheme",
        "target",
        "calibration",
        "frames",
        "denoising_steps",
        "limit",
        "trial_frames",
        "prompt_style",
        "processor_path",
        "seed",
    )
    flags = [f"--{name}={value}" for name in names if (value := getattr(arguments, name)) is not None]
    if arguments.camera_map:
        flags.append(f"--camera_map={json.dumps(arguments.camera_map)}")  # JSON is YAML
    return [*flags, *(["--allow_few"] if arguments.allow_few else []), *([] if arguments.balance else ["--no-balance"])]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
