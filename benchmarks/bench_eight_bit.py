"""Calibrate `fp8` and `int8`, then time them beside the 16-bit engines and compare their actions: one command.

    python benchmarks/bench_eight_bit.py --model_path=DIR --device=cuda --calibration=DATASET
    python benchmarks/bench_eight_bit.py --size=full --device=cuda          # random weights: tells speed, and no accuracy

Calibrations go to --out and are taken again by a second run. The comparison is benchmarks/bench_engines.py's: whole calls, engines in turn in
random order, errors against eager fp32 in joint units, p50, p95 and p99, ratios paired by round. Formats that this GPU lacks are left out, with
the reason in the result; without a CUDA GPU both are, and the exit code is 1. The floor is that of benchmarks/bench_stages.py, with half the bytes.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks import bench_engines
from benchmarks.program import Result, checkpoint_of, finish
from export import calibrate
from gr00t_fast.engine import select_device
from gr00t_fast.engine.eight_bit import FORMATS, check_gpu
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.export.observations import MIN_FRAMES

_RANDOM_FRAMES = 16
_CALIBRATED_WITH = ("calibration", "frames", "trial_frames", "seed", "denoising_steps", "embodiment_tag", "data_config")
_BESIDE = ("eager", "cuda_graph", "compiled")


def run(arguments: argparse.Namespace) -> Result:
    device, usable, refused = select_device(arguments.device), [], {}
    for format in arguments.formats:
        try:
            check_gpu(format, device)
            usable.append(format)
        except EngineError as error:
            refused[format] = str(error)
    if not usable:
        raise ConfigError(" ".join(refused.values()))
    arguments = with_defaults(arguments)
    path = checkpoint_of(arguments, arguments.size)
    directories = {format: calibrated(format, path, arguments) for format in usable}
    given = {"model_path": path, "engines": ",".join((*arguments.beside, *usable)), "calibration": directories, "skip": "", "processor_path": None}
    result = bench_engines.run(argparse.Namespace(**vars(arguments) | given))
    return {**result, "benchmark": "bench_eight_bit", "calibrated_with": arguments.calibration, "refused": result["refused"] | refused}


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """As export/calibrate.py where there is a data set to calibrate with. Random frames tell speed and little else, so few will do."""
    random = arguments.calibration.startswith("random:")
    usual = {"frames": _RANDOM_FRAMES if random else MIN_FRAMES, "trial_frames": 0 if random else 8}
    chosen = {name: value if getattr(arguments, name) is None else getattr(arguments, name) for name, value in usual.items()}
    return argparse.Namespace(**vars(arguments) | chosen | {"allow_few": arguments.allow_few or random})


def calibrated(format: str, path: Path, arguments: argparse.Namespace) -> Path:
    """Directory of the calibration, made when there is none with these settings. Raises Gr00tFastError."""
    out, settings = arguments.out / f"calibration-{format}", {name: getattr(arguments, name) for name in _CALIBRATED_WITH}
    asked = out.with_suffix(".json")  # beside it: what it was made with
    if (out / "manifest.json").is_file() and asked.is_file() and json.loads(asked.read_text()) == settings:
        return out  # one of other weights is refused when it is opened
    steps = ["--denoising_steps", *map(str, arguments.denoising_steps)] if arguments.denoising_steps else []
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("embodiment_tag", "data_config", "calibration", "frames", "device", "trial_frames")]
    few = ["--allow_few"] if arguments.allow_few else []
    given = [f"--model_path={path}", f"--format={format}", f"--out={out}", "--overwrite", f"--seed={arguments.seed}", *few, *flags, *steps]
    with contextlib.redirect_stdout(sys.stderr):  # the last line of stdout is ours
        calibrate.run(calibrate.parser().parse_args(given))
    asked.write_text(json.dumps(settings))
    return out


def main(argv: list[str] | None = None) -> int:
    return finish("bench_eight_bit", _parser().parse_args(argv), run, bench_engines.as_table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo", "full"))
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--beside", nargs="*", default=list(_BESIDE), help="engines to compare with")
    parser.add_argument("--calibration", default="random:0", help="as in export/calibrate.py")
    parser.add_argument("--frames", type=int, help=f"to calibrate with; default: {MIN_FRAMES} of a data set, {_RANDOM_FRAMES} random ones")
    parser.add_argument("--trial_frames", type=int, help="frames that decide which layers stay in 16 bits; default: 8 of a data set, else none")
    parser.add_argument("--allow_few", action="store_true", help="calibrate with fewer frames or episodes of a data set than it takes")
    parser.add_argument("--denoising_steps", type=int, nargs="+", help="step counts; default: the checkpoint's own")
    bench_engines.add_dataset_flags(parser)
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each engine")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of the 16-bit engines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_eight_bit"), help="directory for calibrations, the JSON and the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
