"""What loading costs: memory at its peak, and time from file to first action.

    python benchmarks/bench_load.py --model_path=DIR --processor_path=DIR

Each round starts a fresh process (peak memory is a property of a process) and, in turn, reads the same files into memory with nothing
else done: the floor for anything that loads them. The first read warms the page cache and is not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.program import provenance
from gr00t_fast.measurement import peak_rss_bytes, percentiles


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.child:
        print(json.dumps(load_once(arguments)))
        return 0
    result = run(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench_load.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"peak memory {result['peak_over_weights']}x the weights ({result['peak_growth_over_weights']}x without the interpreter and torch); "
        f"file to first action {result['first_action_over_read']}x the time to read the files"
    )
    print(json.dumps(result))
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    files = sorted(arguments.model_path.glob("model*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    _in_child("read", arguments)  # warms the page cache
    rounds = [{"read": _in_child("read", arguments), "load": _in_child("load", arguments)} for _ in range(arguments.rounds)]
    read_s = [r["read"]["read_s"] for r in rounds]
    first_s = [r["load"]["load_s"] + r["load"]["first_action_s"] for r in rounds]
    peak = max(r["load"]["peak_bytes"] for r in rounds)
    base = min(r["load"]["base_bytes"] for r in rounds)
    return {
        "benchmark": "bench_load",
        "file_bytes": file_bytes,
        "loaded_weight_bytes": rounds[0]["load"]["weight_bytes"],
        "peak_bytes": peak,
        "peak_over_weights": round(peak / file_bytes, 3),
        "peak_growth_over_weights": round((peak - base) / rounds[0]["load"]["weight_bytes"], 3),
        "read_s": percentiles(read_s),
        "load_s": percentiles([r["load"]["load_s"] for r in rounds]),
        "first_action_s": percentiles([r["load"]["first_action_s"] for r in rounds]),
        "first_action_over_read": round(percentiles([f / r for f, r in zip(first_s, read_s, strict=True)])["p50"], 3),
        "rounds": arguments.rounds,
        **provenance(),
    }


def load_once(arguments: argparse.Namespace) -> dict[str, float]:
    """In a fresh process: read the files into memory, or load the policy and infer once."""
    if arguments.child == "read":
        start = time.perf_counter()
        for file in sorted(arguments.model_path.glob("model*.safetensors")):
            content = file.read_bytes()
            del content
        return {"read_s": time.perf_counter() - start}
    from gr00t_fast.policy import load_policy

    base = peak_rss_bytes()
    start = time.perf_counter()
    policy = load_policy(arguments.model_path, processor_path=arguments.processor_path, device="cpu", precision=arguments.precision)
    loaded = time.perf_counter()
    policy.get_action(policy.example_observation())
    done = time.perf_counter()
    weights = sum(p.numel() * p.element_size() for p in policy.engine.model.parameters())
    times = {"load_s": loaded - start, "first_action_s": done - loaded}
    return {**times, "base_bytes": base, "peak_bytes": peak_rss_bytes(), "weight_bytes": weights}


def _in_child(what: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, f"--child={what}", f"--model_path={arguments.model_path}", f"--precision={arguments.precision}"]
    if arguments.processor_path:
        command.append(f"--processor_path={arguments.processor_path}")
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--processor_path", type=Path, help="tokenizer files, when the checkpoint has none")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_load"))
    parser.add_argument("--child", choices=("read", "load"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
