#!/usr/bin/env python
"""Compare an exported engine with the plain model in fp32: every stage, and the actions in joint units.

    python export/verify.py --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --engine=openvino --engine_path=exports/openvino \\
        --observations=./my-lerobot-dataset --out=outputs/verify

Ends with exit code 1 when the p99 of the action error is above 0.5 (fp32, fp16, bf16) or 1.5 joint units (int8, fp8), or a stage of an fp32 export
is not the plain model's up to rounding. Joint units are those of the data: degrees, and per cent for the gripper, in most.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
import yaml

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.select import EXPORTED, open_engine
from gr00t_fast.engine.tables import ExportTables
from gr00t_fast.errors import ConfigError, attempt, exit_code_of
from gr00t_fast.export.observations import draw, open_frames, read
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.samples import network_inputs, transforms_only
from gr00t_fast.export.verify import Case, TruthFiles, compare, record_truth
from gr00t_fast.measurement import git_commit, machine, versions
from gr00t_fast.prompt import PROMPT_STYLES
from gr00t_fast.transforms import ActionTransform

LEAST = 100  # observations


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    result, code = attempt(lambda: run(arguments), "interrupted")
    if result is None:
        return code
    table = as_markdown(result)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "verify.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "verify.md").write_text(table + "\n")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    p.add_argument("--revision", help="commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow")
    p.add_argument("--embodiment_tag", default="new_embodiment")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own")
    p.add_argument("--engine", choices=tuple(EXPORTED), required=True)
    p.add_argument("--engine_path", type=Path, help="directory of the export; default: <checkpoint>/exports/<engine>")
    p.add_argument("--observations", default="random:0", help="a LeRobotDataset or recordings directory, or random:SEED (synthetic)")
    p.add_argument("--camera_map", type=yaml.safe_load, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    p.add_argument("--frames", type=int, default=LEAST, help="how many, spread over all episodes")
    p.add_argument("--allow_few", action="store_true", help=f"go on with fewer than {LEAST} frames, or frames of few episodes")
    p.add_argument("--denoising_steps", type=int, help="default: the checkpoint's own")
    p.add_argument("--limit", type=float, help="p99 of the action error in joint units; default: 0.5 for 16 bits and more, 1.5 for 8")
    p.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain")
    p.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    p.add_argument("--device", default="auto", help="of the engine; the plain model runs on the CPU")
    p.add_argument("--precision", default="auto", help="of the engine, where it has a choice")
    p.add_argument("--seed", type=int, default=0, help="of the choice of frames and of the noise")
    p.add_argument("--out", type=Path, default=Path("outputs/verify"), help="directory for the table and the JSON")
    return p


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the export, run the plain model, free it, run the engine. Raises Gr00tFastError."""
    if arguments.frames < 1:
        raise ConfigError(f"--frames={arguments.frames} must be at least 1.")
    checkpoint, config = open_checkpoint(arguments.model_path, revision=arguments.revision), load_data_config(arguments.data_config)
    target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
    directory = arguments.engine_path or checkpoint.path / "exports" / arguments.engine
    open_engine(arguments.engine, directory, target, arguments.device, arguments.precision)  # refused now rather than in ten minutes; freed at once
    steps = checkpoint.config.head.denoising_steps if arguments.denoising_steps is None else arguments.denoising_steps
    if steps < 1:
        raise ConfigError(f"--denoising_steps={steps} must be at least 1.")
    tables = ExportTables(directory, target.command("to_onnx.py"))
    tables.steps(steps)
    cases, sample = _cases(arguments, target)
    transform = ActionTransform(config, checkpoint.embodiment(arguments.embodiment_tag), checkpoint.config.head.action_dim)
    progress = Progress()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".truth-") as work:
        files = TruthFiles(Path(work))
        record_truth(target, cases, steps, files, progress)
        engine = open_engine(arguments.engine, directory, target, arguments.device, arguments.precision)
        verification = compare(engine, tables.embed, cases, steps, files, transform, arguments.limit, progress)
    return {
        "program": "verify",
        "engine": arguments.engine,
        "device": str(engine.device),
        "denoising_steps": steps,
        "source": sample,
        **verification.describe(),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": shlex.join(sys.argv),
        "seed": arguments.seed,
    }


def _cases(arguments: argparse.Namespace, target: Target) -> tuple[list[Case], dict[str, Any]]:
    policy = transforms_only(
        target.checkpoint.path,
        embodiment_tag=arguments.embodiment_tag,
        data_config=target.data_config,
        processor_path=arguments.processor_path,
        prompt_style=arguments.prompt_style,
    )
    frames = open_frames(arguments.observations, target.data_config, policy.facts, arguments.camera_map)
    sample = draw(frames, arguments.frames, arguments.seed, arguments.allow_few, least=LEAST)
    head = target.checkpoint.config.head
    generator = np.random.default_rng((arguments.seed, 1))  # not the noise of the calibration
    cases = []
    for observation in read(frames, sample, policy.facts):
        noise = generator.standard_normal((1, head.action_horizon, head.action_dim)).astype(np.float32)
        cases.append(Case(network_inputs(policy, observation), torch.from_numpy(noise)))
    return cases, sample.describe()


def as_markdown(result: dict[str, Any]) -> str:
    source, actions = result["source"], result["actions"]
    lines = [
        f"{result['engine']} ({result['format']}), {result['denoising_steps']} steps, {result['observations']} observations of {source['source']}",
        *(f"Warning: {warning}." for warning in source["warnings"]),
        "",
        "| relative L2 against the plain model in fp32 | p50 | p99 | largest |",
        "|---|---|---|---|",
        *(f"| {name} | {v['p50']:.2e} | {v['p99']:.2e} | {v['max']:.2e} |" for name, v in result["relative_l2"].items()),
        "",
        "| actions, joint units | p50 | p99 | largest | of the displacement |",
        "|---|---|---|---|---|",
    ]
    for name, error in (("pixels to actions", actions), ("denoising alone", result["actions_of_denoise_alone"])):
        lines.append(f"| {name} | {error['p50']:.4f} | {error['p99']:.4f} | {error['max']:.4f} | {error['relative_to_displacement']:.3%} |")
    verdict = "passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"])
    return "\n".join([*lines, "", f"{verdict} (limit: p99 {result['action_limit_p99']:g} joint units)"])


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
