"""`gr00t-fast verify`: compare an exported engine with the plain model in fp32."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gr00t_fast.cli.policy_flags import (
    CheckpointFlags,
    ExportedName,
    OutputFlags,
    SampleFlags,
    check_at_least_one,
    check_checkpoint_flags,
    check_device,
    observation_options,
    run_command,
)
from gr00t_fast.cli.program import EXIT_ERROR, EXIT_OK, show
from gr00t_fast.console import Progress
from gr00t_fast.flags import setting
from gr00t_fast.measurement import git_commit, machine, versions

LEAST = 100  # observations


@dataclass(kw_only=True)
class VerifyConfig(OutputFlags, SampleFlags, CheckpointFlags):
    """Compare an exported engine with the plain model in fp32: every stage, and the actions in joint units.

        gr00t-fast verify --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --engine=openvino --engine_path=exports/openvino \\
            --observations=./my-lerobot-dataset --out=outputs/verify

    Joint units are those of the data: degrees, and per cent for the gripper, in most. Without --observations the pictures are synthetic: that finds
    wrong graphs and says little about your arm.
    """

    engine: ExportedName  # which runtime the export is for
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    frames: int = LEAST  # how many observations, spread over all episodes
    denoising_steps: int | None = None  # default: the checkpoint's own
    limit: float | None = None  # p99 of the action error in joint units; default: 0.5 for 16 bits and more, 1.5 for 8
    device: str = "auto"  # of the engine; the plain model runs on the CPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", former=("dtype",))  # of the engine, where it has a choice
    seed: int = 0  # of the choice of frames and of the noise
    out: Path = Path("outputs/verify")  # directory for verify.json and verify.md, which are replaced


_USAGE = "usage: gr00t-fast verify --model_path=DIR --engine=NAME [--observations=DATASET] [--flag=value ...]"
_EXITS = "exit codes: 0 passed, 1 failed (an action error above --limit, or a stage of an fp32 export that is off) or error, 2 bad flag."
_SYNTHETIC = "random:0"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 passed, 1 failed or error, 2 bad flag."""
    return run_command(VerifyConfig, check, work, (_USAGE, _EXITS), argv, "interrupted")


def work(config: VerifyConfig) -> int:
    """Verify, print, and leave verify.json and verify.md. Raises Gr00tFastError."""
    if config.observations is None and not config.quiet:
        print(f"note: no --observations: pictures and joints are synthetic ({_SYNTHETIC}).", file=sys.stderr)
    result = run(config)
    table, verdict = as_markdown(result), verdict_of(result)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "verify.json").write_text(json.dumps(result, indent=2) + "\n")
    (config.out / "verify.md").write_text(f"{table}\n\n{verdict}\n")
    show(result, table, verdict, config)
    return EXIT_OK if result["passed"] else EXIT_ERROR


def check(config: VerifyConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_device(config.device)
    check_at_least_one(config, "frames", "denoising_steps")


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check the data and the export, run the plain model, free it, run the engine. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import open_checkpoint, read_policy_metadata
    from gr00t_fast.dataset import draw, open_frames
    from gr00t_fast.engine.choose import open_engine
    from gr00t_fast.engine.exported import ExportTables
    from gr00t_fast.engine.manifest import target_of
    from gr00t_fast.export.samples import collect_cases
    from gr00t_fast.export.verify import ReferenceOutputs, compare, record_reference

    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    target = target_of(checkpoint, config.embodiment_tag, config.data_config)
    directory = config.engine_path or checkpoint.path / "exports" / config.engine
    source = config.observations or _SYNTHETIC
    metadata = read_policy_metadata(checkpoint.path, target.embodiment_tag, target.data_config)
    frames = open_frames(source, target.data_config, metadata, config.camera_map)
    draw(frames, config.frames, config.seed, config.allow_few, LEAST)  # too few are told before the export is opened
    size = open_engine(config.engine, directory, target, config.device, config.precision).camera_size  # refused now rather than in ten minutes
    steps = checkpoint.config.head.denoising_steps if config.denoising_steps is None else config.denoising_steps
    tables = ExportTables(directory, target.command("to_onnx.py"))
    tables.steps(steps)
    progress, noise_seed = Progress(), (config.seed, 1)  # not the noise of the calibration
    options = {**observation_options(config), "noise_seed": noise_seed, "camera_size": size}
    cases, sample = collect_cases(target, source, progress=progress, least=LEAST, **options)
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".reference-") as work:
        files = ReferenceOutputs(Path(work))
        record_reference(target, cases, steps, files, progress)
        engine = open_engine(config.engine, directory, target, config.device, config.precision)
        verification = compare(engine, tables.embed, cases, steps, files, config.limit, progress)
    return {
        "program": "verify",
        "engine": config.engine,
        "device": str(engine.device),
        "denoising_steps": steps,
        "source": sample,
        **verification.describe(),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": shlex.join(sys.argv),
        "seed": config.seed,
    }


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
    return "\n".join(lines)


def verdict_of(result: dict[str, Any]) -> str:
    """One line; it says when the observations were synthetic."""
    verdict = "passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"])
    synthetic = "; on synthetic observations: --observations=DATASET judges it on your recordings" if result["source"]["synthetic"] else ""
    return f"{verdict} (limit: p99 {result['action_limit_p99']:g} joint units){synthetic}"
