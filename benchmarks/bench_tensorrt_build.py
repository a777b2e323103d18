"""How long TensorRT engines take to build, how large they are, and how much memory it takes.

    python benchmarks/bench_tensorrt_build.py --exports fp16=exports/fp16 bf16=exports/bf16 int8=exports/int8 --out=outputs/tensorrt_build

Each directory is what export/to_onnx.py or export/quantise.py (--target=tensorrt) made. Every stage is built once, from nothing, in a process of its
own, one after the other; engines are removed when they are measured unless --keep says otherwise. Nothing runs on a GPU: with `tensorrt_rtx` none is
needed, and its engines are compiled for the GPU at hand when they are first loaded, which is not measured here. Build time is wall time and
says as much about the machine's load as about the builder. There is no floor to compare with. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.program import finish
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.tensorrt_build import BuildOptions, as_table, build_engines
from gr00t_fast.export.tensorrt_display import Display
from gr00t_fast.measurement import git_commit, machine, versions

_STAGE_FACTS = ("layers", "bytes", "parse_s", "build_s", "peak_memory_bytes", "check", "warnings")


def measure(name: str, onnx: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Facts of one export's engines, by stage."""
    options = BuildOptions(onnx, out, arguments.builder, arguments.compute_capability, overwrite=True)
    with Display() as display:
        manifest, rows = build_engines(options, shlex.join(sys.argv), display)
    print(f"{name}\n{as_table(rows)}\n")
    source = read_manifest(onnx, "export/to_onnx.py")
    return {
        "precision": manifest.precision,
        "quantisation": (manifest.quantisation or {}).get("format"),
        "cameras": manifest.shapes["cameras"],
        "builder": f"{manifest.details['builder']} {manifest.details['builder_version']}",
        "compute_capability": manifest.details["compute_capability"] or "any",
        "prompt_tokens": manifest.details["profiles"],
        "graph_bytes": sum(entry["bytes"] for file, entry in source.files.items() if ".onnx" in file),
        "stages": {row.name: {key: row.facts[key] for key in _STAGE_FACTS} for row in rows},
        "build_s": round(sum(row.facts["parse_s"] + row.facts["build_s"] for row in rows), 1),
        "bytes": sum(row.facts["bytes"] for row in rows),
        "peak_memory_bytes": max(row.facts["peak_memory_bytes"] or 0 for row in rows) or None,
        "command_line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every export in turn; an earlier result in --out is added to, so that large ones can be measured one by one."""
    file = arguments.out / "tensorrt_build.json"
    known = json.loads(file.read_text())["exports"] if file.exists() and arguments.add else {}
    for word in arguments.exports:
        name, equals, directory = word.partition("=")
        if not equals:
            raise ConfigError(f"--exports {word}: expected NAME=DIRECTORY, e.g. fp16=exports/onnx.")
        out = arguments.out / f"engines-{name}" if arguments.keep else Path(tempfile.mkdtemp(prefix="engines-", dir=arguments.out))
        try:
            known[name] = measure(name, Path(directory), out, arguments)
        finally:
            if not arguments.keep:
                shutil.rmtree(out, ignore_errors=True)
    return {
        "benchmark": "tensorrt_build",
        "regime": "ahead of time, each stage once, one process per stage, one after the other; nothing is run on a GPU",
        "exports": known,
        "weights": "RANDOM: sizes and times do not depend on them" if arguments.random_weights else "as exported",
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        "| export | target | stage | layers | parse + build, s | engine, MB | peak memory, MB | read back |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in result["exports"].items():
        target = each["compute_capability"] if isinstance(each["compute_capability"], str) else ", ".join(each["compute_capability"])
        for stage, facts in each["stages"].items():
            peak = "-" if facts["peak_memory_bytes"] is None else f"{facts['peak_memory_bytes'] / 1e6:.0f}"
            read_back = {True: "yes", False: "not on this GPU", None: "parsed"}[facts["check"]["deserialised"]]
            seconds = facts["parse_s"] + facts["build_s"]
            lines.append(f"| {name} | {target} | {stage} | {facts['layers']} | {seconds:.1f} | {facts['bytes'] / 1e6:.0f} | {peak} | {read_back} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    titles = {"seconds": "parse + build, s", "size": "engine, MB", "peak": "peak memory of the build, MB"}
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        bottom = [0.0] * len(result["exports"])
        for stage in ("vision", "language", "denoise_step"):
            heights = [_height(each["stages"][stage], what) for each in result["exports"].values()]
            axis.bar(list(result["exports"]), heights, bottom=None if what == "peak" else bottom, label=stage, alpha=0.8)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _height(facts: dict[str, Any], what: str) -> float:
    if what == "seconds":
        return facts["parse_s"] + facts["build_s"]
    return (facts["bytes"] if what == "size" else facts["peak_memory_bytes"] or 0) / 1e6


def main(argv: list[str] | None = None) -> int:
    return finish("tensorrt_build", _parser().parse_args(argv), run, as_markdown, plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--exports", nargs="+", required=True, metavar="NAME=DIR", help="directories of graphs, each with a name for the table")
    parser.add_argument("--builder", default="auto", help="auto, tensorrt_rtx or tensorrt")
    parser.add_argument("--compute_capability", default="auto", help="as in export/to_tensorrt.py")
    parser.add_argument("--add", action="store_true", help="keep what an earlier run in --out has measured")
    parser.add_argument("--keep", action="store_true", help="keep the engines in --out/engines-NAME")
    parser.add_argument("--random_weights", action="store_true", help="say in the result that the weights are random")
    parser.add_argument("--device", default="auto", help="not used: the library finds the GPU itself")
    parser.add_argument("--seed", type=int, default=0, help="not used: nothing is random")
    parser.add_argument("--out", type=Path, default=Path("outputs/tensorrt_build"), help="directory for the JSON, the table and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
