"""Which graphs the engines are built from: those that were named, or ones exported for the purpose beside the engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, remedy_for
from gr00t_fast.errors import ConfigError, EngineError

_EXPORTER = Path(__file__).resolve().parents[2] / "export" / "to_onnx.py"
_PRECISION = "fp16"  # every GPU that TensorRT knows computes in it; bf16 needs Ampere


@dataclass(frozen=True)
class SourceOptions:
    """What is to be exported, when it is: as the flags of export/to_onnx.py by the same names. `onnx`: None = beside `out`."""

    model_path: str
    embodiment_tag: str
    data_config: str
    out: Path
    onnx: Path | None = None
    precision: str | None = None
    denoising_steps: tuple[int, ...] = ()
    max_text_tokens: int | None = None
    other_flags: tuple[str, ...] = ()  # handed on to export/to_onnx.py as they are

    @property
    def directory(self) -> Path:
        return self.onnx or self.out.with_name(f"{self.out.name}-onnx")

    @property
    def exported_precision(self) -> str | None:
        """Number format of graphs that are exported here; None when they were named."""
        return None if self.onnx is not None else self.precision or _PRECISION

    def flags(self) -> tuple[str, ...]:
        """Those that say which graphs: as on the command line of export/to_tensorrt.py."""
        if self.onnx is not None:
            return (f"--onnx={self.onnx}",)
        steps = ("--denoising_steps", *map(str, self.denoising_steps)) if self.denoising_steps else ()
        return (f"--precision={self.exported_precision}", *steps, *self.other_flags)


def find_source(options: SourceOptions) -> Path:
    """Directory of graphs that belong to the checkpoint; exports them first when `onnx` is None and they are absent, damaged or stale.

    Raises EngineError and StaleEngineError for graphs in `onnx` that do not fit, and EngineError when exporting fails.
    """
    config = load_data_config(options.data_config)
    target = Target(open_checkpoint(options.model_path), options.embodiment_tag, config, options.data_config)
    directory = options.directory
    remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={options.precision or _PRECISION}")
    try:
        _check_content(check_manifest(directory, "onnx", target, remedy), options, remedy)
    except (EngineError, ConfigError) as error:
        if options.onnx is not None:
            raise
        print(f"exporting the graphs to {directory}: {str(error).splitlines()[0]}", file=sys.stderr)
        _export(options)
    return directory


def _check_content(manifest: Manifest, options: SourceOptions, remedy: str) -> None:
    """Raises ConfigError when the graphs hold something else than the flags say."""
    if options.precision not in (None, manifest.precision):
        raise ConfigError(f"the graphs are {manifest.precision}, asked for was --precision={options.precision}. Run: {remedy}")
    absent = [steps for steps in options.denoising_steps if steps not in manifest.denoising_steps]
    if absent:
        there = ", ".join(map(str, manifest.denoising_steps))
        more = " ".join(map(str, absent))
        raise ConfigError(f"the graphs have tables for {there} denoising steps, asked for was {more}. Run: {remedy} --denoising_steps {more}")
    most = manifest.shapes["max_tokens"] - manifest.shapes["image_tokens"]
    if options.max_text_tokens is not None and options.max_text_tokens > most:
        raise ConfigError(f"the graphs take {most} text tokens, asked for were {options.max_text_tokens}. Run: {remedy}")


def _export(options: SourceOptions) -> None:
    """In a process of its own: what it leaves in memory would count against the builder's."""
    given = {
        "model_path": options.model_path,
        "embodiment_tag": options.embodiment_tag,
        "data_config": options.data_config,
        "out": options.directory,
        "max_text_tokens": options.max_text_tokens,
    }
    flags: Sequence[str] = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, str(_EXPORTER), *flags, *options.flags(), "--overwrite"]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise EngineError(f"exporting the graphs ended with code {code}; what went wrong is said above. The command was: {' '.join(command)}")
