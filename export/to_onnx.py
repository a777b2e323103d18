#!/usr/bin/env python
"""Export a checkpoint to ONNX: vision, language and one denoising step, for your cameras and your embodiment.

    python export/to_onnx.py --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/onnx --precision=fp32

What comes out is run with `--engine=onnxruntime --engine_path=exports/onnx`, and is what `export/quantise.py` and `export/to_tensorrt.py` begin
with. fp32 is for CPUs; fp16 and bf16 are for GPUs (ONNX Runtime computes fp16 on a CPU as fp32, and bf16 not at all). The full size needs up to
twice the largest stage in memory: one stage is held at a time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine.manifest import Manifest, Target
from gr00t_fast.engine.select import PRECISIONS
from gr00t_fast.errors import ConfigError, attempt, exit_code_of
from gr00t_fast.export.directory import check_free
from gr00t_fast.export.to_onnx import Options, export_onnx
from gr00t_fast.facts import check_cameras
from gr00t_fast.measurement import peak_rss_bytes
from gr00t_fast.optional import require
from gr00t_fast.prompt import PROMPT_STYLES, PromptEncoder, find_tokenizer


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    start_s = time.perf_counter()
    manifest, code = attempt(lambda: run(arguments), "interrupted; nothing was left behind")
    if manifest is None:
        return code
    for name, entry in manifest.files.items():
        print(f"{name:<26} {entry['bytes'] / 1e6:>9.1f} MB")
    result = {"out": str(arguments.out), "precision": manifest.precision, "seconds": round(time.perf_counter() - start_s, 1)}
    size_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    print(json.dumps({**result, "bytes": size_bytes, "peak_rss_bytes": peak_rss_bytes(), "versions": dict(manifest.versions)}))
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    p.add_argument("--revision", help="commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow")
    p.add_argument("--embodiment_tag", default="new_embodiment", help="which category weights and statistics of the checkpoint")
    p.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own: says how many cameras")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is there, once the new one is whole")
    p.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of weights, inputs and outputs")
    p.add_argument(
        "--denoising_steps",
        type=int,
        nargs="+",
        action="extend",
        default=[],
        metavar="N",
        help="step counts to cover besides 1, 2, 4, 8 and the checkpoint's own",
    )
    p.add_argument("--max_text_tokens", type=int, default=256, help="longest prompt, without the tokens of the pictures")
    p.add_argument("--lang_instruction", default="Place the block in the bowl", help="an instruction of the usual length; others can be given later")
    p.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain", help="as at run time: brackets count as tokens")
    p.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    p.add_argument("--device", default="cpu", help="cpu; the export computes nothing")
    p.add_argument("--seed", type=int, default=0, help="of the random inputs that the graphs are traced with")
    return p


def run(arguments: argparse.Namespace) -> Manifest:
    """Check everything small, then export. Raises Gr00tFastError."""
    if arguments.device not in ("auto", "cpu"):
        raise ConfigError(f"--device={arguments.device}: exporting computes nothing and runs on the CPU. Expected auto or cpu.")
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    check_free(arguments.out, arguments.overwrite)
    checkpoint = open_checkpoint(arguments.model_path, revision=arguments.revision)
    config = load_data_config(arguments.data_config)
    metadata = checkpoint.embodiment(arguments.embodiment_tag)
    check_cameras(metadata, config)
    tokenizer = find_tokenizer(arguments.processor_path, checkpoint.base)
    prompts = PromptEncoder(
        tokenizer, len(config.video_keys), checkpoint.config.vision.tokens, checkpoint.config.language.image_token_id, arguments.prompt_style
    )
    options = Options(
        out=arguments.out,
        precision=arguments.precision,
        denoising_steps=tuple(arguments.denoising_steps),
        usual_tokens=len(prompts(arguments.lang_instruction)),
        max_text_tokens=arguments.max_text_tokens,
        overwrite=arguments.overwrite,
        seed=arguments.seed,
    )
    target = Target(checkpoint, arguments.embodiment_tag, config, arguments.data_config)
    return export_onnx(target, options, shlex.join(sys.argv))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
