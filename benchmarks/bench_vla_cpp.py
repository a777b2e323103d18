"""How much faster than vla.cpp, a C++ engine over ggml, on a CPU, with the same weights, picture, prompt and noise? Of N1.5.

    git clone https://github.com/VinRobotics/vla.cpp && cmake -S vla.cpp -B vla.cpp/build && cmake --build vla.cpp/build --target vla
    .venv/bin/pip install gguf
    export VLA_CPP=$PWD/vla.cpp VLA_LIBRARY=$PWD/vla.cpp/build/libvla.so PYTHONPATH=$PWD/vla.cpp/bindings/python
    make figures FIGURES=vla_cpp     # writes a checkpoint of published size, converts it, and runs this program

It measures the library that VLA_LIBRARY names (also one that was built without llama.cpp, which this network does not call). Both take turns in one
process, and their normalised actions are compared first. Ours begins with a frame of 640x480; vla.cpp prepares no pictures and is given one that is
ready.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib import program
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.measurement import paired_ratio, percentiles

IMAGE_TOKEN = 151669  # vla.cpp knows pictures by it, whatever the checkpoint's tokenizer says
NEW_EMBODIMENT = "31"


@dataclass
class BenchVlaCppFlags(program.PolicyFlags):
    gguf: Path = Path("n1.5.gguf")  # what vla.cpp's converter made of --model_path
    rounds: int = 10  # timed calls of each side
    out: Path = Path("outputs/bench_vla_cpp")  # directory for JSON and table

    def __post_init__(self) -> None:
        check_ranges(self, rounds=(1, math.inf))


def main(argv: Sequence[str] | None = None) -> int:
    return program.finish("bench_vla_cpp", program.read_flags(BenchVlaCppFlags, argv, __doc__), measure, as_table)


def measure(config: BenchVlaCppFlags) -> program.Result:
    """Raises ConfigError without vla.cpp's Python package, a checkpoint or its GGUF file."""
    import torch

    from gr00t_fast import load_policy

    try:
        import vla_cpp  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError("this needs vla.cpp's own Python package: PYTHONPATH=vla.cpp/bindings/python. Its steps: --help.") from error
    if config.model_path is None or not config.gguf.is_file():
        raise ConfigError(f"--model_path={config.model_path}, --gguf={config.gguf}: expected a checkpoint, and the file made of it. Steps: --help.")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    os.environ |= {"VLA_GR00T_EMBODIMENT": NEW_EMBODIMENT, "VLA_N_THREADS": str(torch.get_num_threads())}
    ours = load_policy(config.model_path, **config.options())
    theirs = vla_cpp.load(str(config.gguf))
    generator = np.random.default_rng(config.seed)
    observation = ours.example_observation()
    for key in [key for key in observation if key.startswith("video.")]:
        observation[key] = generator.integers(0, 256, (1, 480, 640, 3), dtype=np.uint8)
    noise = generator.standard_normal((1, *ours.chunk_shape), np.float32)
    inputs = ours.preprocess(observation)
    pixels = inputs.to(torch.device("cpu"), torch.float32).pixel_values[0]  # (C, 3, h, w) in [-1, 1]
    pictures = [np.ascontiguousarray((each.permute(1, 2, 0).numpy() + 1) / 2) for each in pixels]
    tokens = inputs.input_ids[0].copy()
    tokens[inputs.image_positions] = IMAGE_TOKEN

    def vla_cpp_s() -> np.ndarray:
        return theirs.predict(pictures, tokens.tolist(), inputs.state[0], noise.ravel(), pixel_format=vla_cpp.PIXEL_F32_RGB_01)

    def gr00t_fast_s() -> np.ndarray:
        return ours.infer(ours.preprocess(observation), noise)[0]

    calls = {"vla_cpp": vla_cpp_s, "gr00t_fast": gr00t_fast_s}
    actions = {name: call() for name, call in calls.items()}
    times_ms = program.times_in_turns(calls, config.rounds, warm_up=2, seed=config.seed)
    difference = np.linalg.norm(actions["gr00t_fast"] - actions["vla_cpp"]) / np.linalg.norm(actions["vla_cpp"])
    clone = ["git", "-C", str(Path(vla_cpp.__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return {
        "vla_cpp_commit": subprocess.run(clone, capture_output=True, text=True).stdout.strip(),
        **{"engine": ours.engine.name, "precision": ours.precision, "denoising_steps": ours.denoising_steps, "rounds": config.rounds},
        **{"threads": torch.get_num_threads(), "cameras": len(pictures), "prompt_tokens": len(tokens)},
        "times_ms": {name: percentiles(times) for name, times in times_ms.items()},
        "speed_up": paired_ratio(times_ms["vla_cpp"], times_ms["gr00t_fast"]),
        "relative_difference": float(difference),
        **program.provenance(config.seed),
    }


def as_table(result: program.Result) -> str:
    rows = [(name, *(f"{result['times_ms'][name][p]:.0f}" for p in ("p50", "p95", "p99"))) for name in ("vla_cpp", "gr00t_fast")]
    ratio, sizes = result["speed_up"], ("cameras", "prompt_tokens", "denoising_steps", "threads")
    return "\n\n".join(
        (
            ", ".join(f"{name.replace('_', ' ')}: {result[name]}" for name in sizes),
            program.markdown_table(("picture to normalised actions, ms", "p50", "p95", "p99"), rows),
            f"Paired by round, gr00t_fast ({result['engine']}, {result['precision']}) is {ratio['median']:.2f} times as fast (quartiles "
            f"{ratio['p25']:.2f} to {ratio['p75']:.2f}). Actions differ by {result['relative_difference']:.4f} (L2, relative).",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
