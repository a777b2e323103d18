#!/usr/bin/env python
"""Build TensorRT engines for a checkpoint: for your cameras, your embodiment and your GPU.

    python export/to_tensorrt.py --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/tensorrt

exports the graphs first (fp16 unless --precision says otherwise), or begins with those in --onnx: from export/to_onnx.py, or 8-bit ones from
export/quantise.py. What comes out is run with `--engine=tensorrt --engine_path=exports/tensorrt`. `tensorrt_rtx` (GeForce and RTX GPUs) builds on
any machine, with or without a GPU; `tensorrt` (Jetson, data centre) on the machine that will run the engines. A second run builds only
what is stale. Ctrl-C stops at once and keeps the stages that are done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from gr00t_fast import tensorrt_library as library
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine.select import PRECISIONS
from gr00t_fast.errors import Gr00tFastError, exit_code_of
from gr00t_fast.export.tensorrt_build import BuildOptions, as_table, build_engines, check_feasible
from gr00t_fast.export.tensorrt_display import Display
from gr00t_fast.export.tensorrt_source import SourceOptions, find_source
from gr00t_fast.measurement import git_commit, machine, versions


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    start_s = time.perf_counter()
    try:
        with Display() as display:
            pinned = arguments.revision is not None
            source = SourceOptions(
                model_path=str(open_checkpoint(arguments.model_path, revision=arguments.revision).path) if pinned else arguments.model_path,
                embodiment_tag=arguments.embodiment_tag,
                data_config=arguments.data_config,
                out=arguments.out,
                onnx=arguments.onnx,
                precision=arguments.precision,
                denoising_steps=tuple(arguments.denoising_steps),
                max_text_tokens=arguments.max_text_tokens,
                other_flags=_handed_on(arguments),
            )
            check_feasible(arguments.builder, arguments.compute_capability, source.exported_precision)
            options = BuildOptions(
                onnx=find_source(source),
                out=arguments.out,
                builder=arguments.builder,
                compute_capability=arguments.compute_capability,
                max_text_tokens=arguments.max_text_tokens,
                workspace_mb=arguments.workspace_mb,
                optimization_level=arguments.optimization_level,
                timing_cache=arguments.timing_cache,
                overwrite=arguments.overwrite,
                source_flags=source.flags(),
            )
            manifest, rows = build_engines(options, shlex.join(sys.argv), display)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the stages that were finished are kept, run the same command to go on", file=sys.stderr)
        return 130
    print(as_table(rows))
    result = {
        "program": "to_tensorrt",
        "out": str(arguments.out),
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
    print(json.dumps(result))
    return 0


def _handed_on(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Flags for export/to_onnx.py that differ from its defaults."""
    names = ("processor_path", "lang_instruction", "prompt_style")
    return tuple(f"--{name}={getattr(arguments, name)}" for name in names if getattr(arguments, name) is not None)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    p.add_argument("--revision", help="commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow")
    p.add_argument("--embodiment_tag", default="new_embodiment", help="which category weights and statistics of the checkpoint")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own: says how many cameras")
    p.add_argument("--out", type=Path, required=True, help="directory of the engines; made, or brought up to date")
    p.add_argument("--onnx", type=Path, help="graphs to begin with; default: OUT-onnx, exported there when absent or not this checkpoint's")
    p.add_argument("--precision", choices=tuple(PRECISIONS), help="of graphs that are exported here; default fp16")
    p.add_argument("--denoising_steps", type=int, nargs="+", default=[], metavar="N", help="when exporting: step counts besides the usual ones")
    p.add_argument("--overwrite", action="store_true", help="build stages that are up to date, too")
    p.add_argument("--builder", choices=("auto", *library.BUILDERS), default="auto", help="auto: what is installed, tensorrt_rtx first")
    p.add_argument(
        "--compute_capability", default="auto", help="8.6 | 8.9,12.0 | any (8.0 and newer) | auto: the GPU that is here, else any; tensorrt_rtx only"
    )
    p.add_argument("--max_text_tokens", type=int, help="longest prompt, without the tokens of the pictures; default: what was exported")
    p.add_argument("--workspace_mb", type=int, help="GPU memory that one layer may use; default: the library's own")
    p.add_argument("--optimization_level", type=int, choices=range(6), help="how long the builder may search; default: the library's own")
    p.add_argument("--timing_cache", type=Path, help="measured kernel times to share between builds (tensorrt); default: a hidden file in OUT")
    p.add_argument("--processor_path", type=Path, help="when exporting: directory with the Eagle tokenizer files")
    p.add_argument("--lang_instruction", help="when exporting: an instruction of the usual length; others can be given later")
    p.add_argument("--prompt_style", help="when exporting: plain or nvidia, as at run time")
    p.add_argument("--device", default="auto", help="not used: the library finds the GPU itself")
    p.add_argument("--seed", type=int, default=0, help="not used: nothing is random")
    return p


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
