"""`gr00t-fast export tensorrt`: engines for your cameras, your embodiment and your GPU."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gr00t_fast.cli.policy_flags import (
    CameraFlags,
    CheckpointFlags,
    OutputFlags,
    PrecisionName,
    camera_size,
    check_at_least_one,
    check_checkpoint_flags,
    run_command,
)
from gr00t_fast.cli.program import EXIT_OK, show
from gr00t_fast.flags import setting
from gr00t_fast.measurement import git_commit, machine, versions

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Manifest


@dataclass(kw_only=True)
class ExportTensorRTConfig(OutputFlags, CameraFlags, CheckpointFlags):
    """Build TensorRT engines for a checkpoint: for your cameras, your embodiment and your GPU.

        gr00t-fast export tensorrt --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/tensorrt

    exports the graphs first (fp16 unless --precision says otherwise), or begins with those in --onnx: from `gr00t-fast export onnx`, or 8-bit
    ones from `gr00t-fast quantise`. What comes out is run with --engine=tensorrt --engine_path=exports/tensorrt. tensorrt_rtx (GeForce and RTX
    GPUs) builds on any machine, with or without a GPU; tensorrt (Jetson, data centre) on the machine that will run the engines. A second run
    builds only what is stale. Ctrl-C stops at once and keeps the stages that are done.
    """

    out: Path  # directory of the engines; made, or brought up to date
    onnx: Path | None = None  # graphs to begin with; default: OUT-onnx, exported there when absent or not this checkpoint's
    precision: PrecisionName | None = setting(None, former=("dtype",))  # of graphs that are exported here; default: fp16
    denoising_steps: list[int] = field(default_factory=list)  # when exporting: step counts besides the usual ones
    overwrite: bool = False  # build stages that are up to date, too
    builder: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"  # auto: what is installed, tensorrt_rtx first
    compute_capability: str = "auto"  # 8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only
    max_text_tokens: int | None = None  # longest prompt, without the tokens of the pictures; default: what was exported
    workspace_mb: int | None = None  # GPU memory that one layer may use; default: the library's own
    optimization_level: Literal[0, 1, 2, 3, 4, 5] | None = None  # how long the builder may search; default: the library's own
    timing_cache: Path | None = None  # measured kernel times to share between builds (tensorrt); default: a hidden file in OUT
    lang_instruction: str | None = None  # when exporting: an instruction of the usual length; others can be given later


_USAGE = "usage: gr00t-fast export tensorrt --model_path=DIR --out=DIR [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; the stages that are done are kept."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 error, 2 bad flag, 130 interrupted."""
    interrupted = "interrupted; the stages that were finished are kept, run the same command to go on"
    return run_command(ExportTensorRTConfig, check, work, (_USAGE, _EXITS), argv, interrupted)


def work(config: ExportTensorRTConfig) -> int:
    """Build and print what was built. Raises Gr00tFastError."""
    from gr00t_fast.export.tensorrt import as_table

    start_s = time.perf_counter()
    manifest, rows = run(config)
    result = {
        "program": "to_tensorrt",
        "out": str(config.out),
        "seconds": round(time.perf_counter() - start_s, 1),
        "precision": manifest.precision,
        "quantisation": (manifest.quantisation or {}).get("format"),
        **{key: manifest.details[key] for key in ("builder", "builder_version", "compute_capability", "profiles")},
        "stages": {row.name: {"reason": row.reason, **row.facts} for row in rows},
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": manifest.command,
    }
    built = sum(row.built for row in rows)
    verdict = f"{built} of {len(rows)} stages built, the others were up to date: {config.out}" if built < len(rows) else f"wrote {config.out}"
    show(result, as_table(rows), verdict, config)
    return EXIT_OK


def run(config: ExportTensorRTConfig) -> tuple[Manifest, list[Any]]:
    """The manifest, and a row of facts for each stage. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.export.tensorrt import BuildOptions, Display, SourceOptions, build_engines, check_feasible, find_source

    with Display() as display:
        pinned = config.revision is not None
        source = SourceOptions(
            model_path=str(open_checkpoint(config.model_path, revision=config.revision).path) if pinned else config.model_path,
            embodiment_tag=config.embodiment_tag,
            data_config=config.data_config,
            out=config.out,
            onnx=config.onnx,
            precision=config.precision,
            denoising_steps=tuple(config.denoising_steps),
            max_text_tokens=config.max_text_tokens,
            letterbox=config.letterbox,
            camera_size=camera_size(config),
            other_flags=_handed_on(config),
        )
        check_feasible(config.builder, config.compute_capability, source.exported_precision)
        options = BuildOptions(
            onnx=find_source(source),
            out=config.out,
            builder=config.builder,
            compute_capability=config.compute_capability,
            max_text_tokens=config.max_text_tokens,
            workspace_mb=config.workspace_mb,
            optimization_level=config.optimization_level,
            timing_cache=config.timing_cache,
            overwrite=config.overwrite,
            source_flags=source.flags(),
        )
        return build_engines(options, shlex.join(sys.argv), display)


def check(config: ExportTensorRTConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_at_least_one(config, "denoising_steps", "max_text_tokens", "workspace_mb")
    camera_size(config)


def _handed_on(config: ExportTensorRTConfig) -> tuple[str, ...]:
    """Flags for `gr00t-fast export onnx` that differ from its defaults."""
    names = ("processor_path", "lang_instruction", "prompt_style", "camera_size")
    defaults = {each.name: each.default for each in fields(ExportTensorRTConfig)}
    return tuple(f"--{name}={getattr(config, name)}" for name in names if getattr(config, name) != defaults[name])
