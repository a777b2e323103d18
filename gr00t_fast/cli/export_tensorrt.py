"""`gr00t-fast export tensorrt`: engines for your cameras, your embodiment and your GPU."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gr00t_fast.cli import export_onnx
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
from gr00t_fast.cli.program import EXIT_OK, end_on_sigterm, show
from gr00t_fast.files import check_free
from gr00t_fast.flags import UsageError, setting
from gr00t_fast.measurement import git_commit, machine, versions

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Manifest


@dataclass(kw_only=True)
class ExportTensorRTConfig(OutputFlags, CameraFlags, CheckpointFlags):
    """Build TensorRT engines for a checkpoint: for your cameras, your embodiment and your GPU.

        gr00t-fast export tensorrt --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/tensorrt

    exports the graphs first, into exports/tensorrt-onnx (fp16 unless --precision says otherwise), or begins with those in --onnx: from
    `gr00t-fast export onnx`, or 8-bit ones from `gr00t-fast quantise`. What comes out is run with --engine=tensorrt
    --engine_path=exports/tensorrt. tensorrt_rtx (GeForce and RTX GPUs) builds on any machine, with or without a GPU; tensorrt (Jetson, data
    centre) on the machine that will run the engines.
    """

    out: Path  # directory to make
    onnx: Path | None = None  # graphs to begin with; default: exported into OUT-onnx
    precision: PrecisionName | None = setting(None, former=("dtype",))  # of graphs that are exported here; default: fp16
    denoising_steps: list[int] = field(default_factory=list)  # when exporting: step counts besides the usual ones
    overwrite: bool = False  # replace engines, and graphs in OUT-onnx, that are there, once the new ones are whole
    builder: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"  # auto: what is installed, tensorrt_rtx first
    compute_capability: str = "auto"  # 8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only
    max_text_tokens: int | None = None  # longest prompt, without the tokens of the pictures; default: what was exported
    workspace_mb: int | None = None  # GPU memory that one layer may use; default: the library's own
    optimization_level: Literal[0, 1, 2, 3, 4, 5] | None = None  # how long the builder may search; default: the library's own
    timing_cache: Path | None = None  # a file of measured kernel times, to share between builds (tensorrt)
    lang_instruction: str | None = None  # when exporting: an instruction of the usual length; others can be given later


_PRECISION: PrecisionName = "fp16"  # every GPU that TensorRT knows computes in it; bf16 needs Ampere
_USAGE = "usage: gr00t-fast export tensorrt --model_path=DIR --out=DIR [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; no engines are left behind then."
_EXPORTED = ("precision", "denoising_steps", "camera_size", "lang_instruction")  # flags of graphs that are exported here


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 error, 2 bad flag, 130 interrupted."""
    return run_command(ExportTensorRTConfig, check, work, (_USAGE, _EXITS), argv, "interrupted; no engines were left behind")


def work(config: ExportTensorRTConfig) -> int:
    """Build and print what was built. Raises Gr00tFastError."""
    from gr00t_fast.export.tensorrt import as_table

    end_on_sigterm()
    start_s = time.perf_counter()
    manifest = run(config)
    result = {
        "program": "to_tensorrt",
        "out": str(config.out),
        "seconds": round(time.perf_counter() - start_s, 1),
        "precision": manifest.precision,
        "quantisation": (manifest.quantisation or {}).get("format"),
        **{key: manifest.details[key] for key in ("builder", "builder_version", "compute_capability", "profiles")},
        "stages": {name: stage["build"] for name, stage in manifest.stages.items()},
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "command_line": manifest.command,
    }
    show(result, as_table(manifest.stages), f"wrote {config.out}", config)
    return EXIT_OK


def run(config: ExportTensorRTConfig) -> Manifest:
    """Check everything small, export the graphs where none are named, build. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.engine.manifest import check_manifest, remedy_for, target_of
    from gr00t_fast.export.tensorrt import BuildOptions, build_engines, check_feasible, run_alone

    check_free(config.out, config.overwrite)
    check_feasible(config.builder, config.compute_capability, None if config.onnx else config.precision or _PRECISION)
    graphs = config.onnx or config.out.with_name(f"{config.out.name}-onnx")
    if config.onnx is None:
        run_alone(export_onnx.run, _of_graphs(config, graphs))  # the builder needs the memory that exporting leaves taken
    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    target = target_of(checkpoint, config.embodiment_tag, config.data_config)
    check_manifest(graphs, "onnx", target, remedy_for(graphs, target, "to_onnx.py", f"--precision={_PRECISION}"))
    names = ("builder", "compute_capability", "max_text_tokens", "workspace_mb", "optimization_level", "timing_cache", "overwrite")
    return build_engines(BuildOptions(graphs, config.out, **{name: getattr(config, name) for name in names}), shlex.join(sys.argv))


def _of_graphs(config: ExportTensorRTConfig, out: Path) -> export_onnx.ExportOnnxConfig:
    """What exports the graphs: flags that are not given keep its defaults."""
    names = {each.name for each in fields(ExportTensorRTConfig)} & {each.name for each in fields(export_onnx.ExportOnnxConfig)}
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return export_onnx.ExportOnnxConfig(**{**given, "out": out, "precision": config.precision or _PRECISION})


def check(config: ExportTensorRTConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_at_least_one(config, "denoising_steps", "max_text_tokens", "workspace_mb")
    camera_size(config)
    if config.onnx is not None and (given := [f"--{name}" for name in _EXPORTED if getattr(config, name) not in (None, [])]):
        raise UsageError(f"{', '.join(given)} with --onnx: the graphs there have theirs. Leave it out, or leave out --onnx to export others.")
