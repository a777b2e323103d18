"""`gr00t-fast export onnx`: vision, language and one denoising step as ONNX graphs, for your cameras and your embodiment."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import check_free
from gr00t_fast.flags import setting
from gr00t_fast.measurement import peak_rss_bytes

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Manifest


@dataclass(kw_only=True)
class ExportOnnxConfig(OutputFlags, CameraFlags, CheckpointFlags):
    """Export a checkpoint to ONNX: vision, language and one denoising step, for your cameras and your embodiment.

        gr00t-fast export onnx --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/onnx --precision=fp32

    What comes out is run with --engine=onnxruntime --engine_path=exports/onnx, and is what `gr00t-fast quantise` and
    `gr00t-fast export tensorrt` begin with. fp32 is for CPUs; fp16 and bf16 are for GPUs (ONNX Runtime computes fp16 on a CPU as fp32, and bf16
    not at all). The full size needs up to twice the largest stage in memory: one stage is held at a time.
    """

    out: Path  # directory to make
    overwrite: bool = False  # replace an export that is there, once the new one is whole
    precision: PrecisionName = setting("fp32", former=("dtype",))  # of weights, inputs and outputs
    denoising_steps: list[int] = field(default_factory=list)  # step counts to cover besides 1, 2, 4, 8 and the checkpoint's own
    max_text_tokens: int = 256  # longest prompt, without the tokens of the pictures
    lang_instruction: str = "Place the block in the bowl"  # an instruction of the usual length; others can be given later
    device: Literal["cpu", "auto"] = "cpu"  # the export computes nothing
    seed: int = 0  # of the random inputs that the graphs are traced with


_USAGE = "usage: gr00t-fast export onnx --model_path=DIR --out=DIR [--flag=value ...]"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; nothing is left behind then."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 error, 2 bad flag, 130 interrupted."""
    return run_command(ExportOnnxConfig, check, work, (_USAGE, _EXITS), argv, "interrupted; nothing was left behind")


def work(config: ExportOnnxConfig) -> int:
    """Export and print what was written. Raises Gr00tFastError."""
    end_on_sigterm()
    start_s = time.perf_counter()
    manifest = run(config)
    table = "\n".join(f"{name:<26} {entry['bytes'] / 1e6:>9.1f} MB" for name, entry in manifest.files.items())
    result = {"out": str(config.out), "precision": manifest.precision, "seconds": round(time.perf_counter() - start_s, 1)}
    size_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    result |= {"bytes": size_bytes, "peak_rss_bytes": peak_rss_bytes(), "versions": dict(manifest.versions)}
    show(result, table, f"wrote {config.out}: {size_bytes / 1e6:.1f} MB in {manifest.precision}", config)
    return EXIT_OK


def check(config: ExportOnnxConfig) -> None:
    """Raises UsageError."""
    check_checkpoint_flags(config)
    check_at_least_one(config, "denoising_steps", "max_text_tokens")
    camera_size(config)


def run(config: ExportOnnxConfig) -> Manifest:
    """Check everything small, then export. Raises Gr00tFastError."""
    import torch

    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.engine.manifest import target_of
    from gr00t_fast.export.onnx import Options, export_onnx
    from gr00t_fast.export.samples import transforms_only

    for package in ("onnx", "onnxscript"):
        require(package, "export")
    check_free(config.out, config.overwrite)
    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    target = target_of(checkpoint, config.embodiment_tag, config.data_config)
    names = ("embodiment_tag", "data_config", "processor_path", "prompt_style", "letterbox")
    policy = transforms_only(checkpoint.path, **{name: getattr(config, name) for name in names})
    if (size := camera_size(config)) is not None:
        policy.expect_cameras(dict.fromkeys(policy.metadata.resolutions, size))
    example = policy.preprocess(policy.example_observation(config.lang_instruction))
    if size is not None and example.camera_size is None:
        raise ConfigError(f"--camera_size={config.camera_size} is for GR00T N1.7; N1.5 resizes frames of any size to one. Leave it out.")
    options = Options(
        out=config.out,
        precision=config.precision,
        denoising_steps=tuple(config.denoising_steps),
        usual=example.to(torch.device("cpu"), torch.float32),
        camera_size=example.camera_size,
        max_text_tokens=config.max_text_tokens,
        overwrite=config.overwrite,
        seed=config.seed,
    )
    return export_onnx(target, options, shlex.join(sys.argv))
