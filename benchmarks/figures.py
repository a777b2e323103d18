"""Remake the figures that README.md and docs/ quote, one command each, as far as this machine can.

    make figures                                # all; those that cannot be made here are named, with the reason
    make figures FIGURES="open_loop evaluate"   # some
    python benchmarks/figures.py --plan         # say what would run, and how long it takes
    python benchmarks/figures.py --quotes       # what the files in benchmarks/results say of each sentence that quotes them

A result goes to outputs/figures first, and at the end, from an unchanged checkout, to benchmarks/results. Minutes are those of two quiet cores.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib.program import Flags, read_flags
from benchmarks.lib.quotes import QUOTES
from benchmarks.lib.results import RESULTS, ROOT, publish
from gr00t_fast.base.errors import ConfigError, closest
from gr00t_fast.base.measurement import git_commit, linux_says
from gr00t_fast.cli.main import guarded

_OUT = ROOT / "outputs" / "figures"
_DEMO = "--model_path=checkpoints/so100-sim-reach"
_HELD_OUT, _TRAINING = "outputs/figures/held_out", "outputs/figures/training"
_RECORD_HELD_OUT = f"training/record.py --episodes=12 --first_layout=1000 --seed=7 --out={_HELD_OUT}"
_ENGINES = "benchmarks/bench_engines.py --size=full --device=cpu --threads=2"
_OF_INT8 = "--model_path={out}/checkpoint-full"
_TWO_CAMERAS = "--data_config=so100_dualcam"
_OF_INT8_TWO = f"{_OF_INT8}-so100_dualcam {_TWO_CAMERAS}"
_OF_VLA_CPP = "needs vla.cpp, built and named as benchmarks/bench_vla_cpp.py --help says"
_RECORD_TRAINING = f"training/record.py --episodes=16 --seed=3 --out={_TRAINING}"


def _memory(gb: float) -> Callable[[], str]:
    def obstacle() -> str:
        free_gb = float((linux_says("meminfo", "MemAvailable") or "1e12 kB").split()[0]) / 1e6
        return f"needs {gb:g} GB of free memory, here are {free_gb:.0f}" if free_gb < gb else ""

    return obstacle


def _bf16_memory(gb: float) -> Callable[[], str]:
    """Where bf16 is not built in it is emulated, slower than fp32 by far, and says nothing."""

    def obstacle() -> str:
        built_in = {"avx512_bf16", "amx_bf16"} & set(linux_says("cpuinfo", "flags").split())
        return _memory(gb)() if built_in else "needs a CPU with bf16 (AVX512-BF16 or AMX)"

    return obstacle


def _package(name: str, what: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) is not None else what


def _processor() -> str:
    return "" if os.environ.get("GR00T_PROCESSOR") else "needs NVIDIA's tokenizer files: name their directory in GR00T_PROCESSOR"


@dataclass(frozen=True)
class Figure:
    """One thing that is measured. commands: run one after the other at the repository's root; `{out}` is outputs/figures/NAME. leaves: file there ->
    file in benchmarks/results. minutes: of two quiet cores."""

    commands: tuple[str, ...]
    leaves: Mapping[str, str]
    minutes: float
    obstacle: Callable[[], str] = field(default=lambda: "")


def _lerobot(version: str, module: str, network: str) -> Figure:
    """lerobot's own code of a network, for which an environment has one version of it."""
    extra = f"needs lerobot {version} with its extra groot"
    return Figure(
        ("benchmarks/bench_lerobot.py --processor_path=$GR00T_PROCESSOR --size=full --threads=2 --rounds=6 --out={out}",),
        {"bench_lerobot.json": f"bench_lerobot/{network}.json"},
        8,
        lambda: (
            _package("lerobot", extra)()
            or _package(f"lerobot.policies.groot.{module}", extra)()
            or _package("peft", extra)()
            or _processor()
            or _bf16_memory(14)()
        ),
    )


FIGURES = {
    "control_architectures": Figure(
        ("benchmarks/control_architectures.py --virtual --out={out}",),
        {"control_architectures.json": "control_architectures/control_architectures.json"},
        0.3,
    ),
    "open_loop": Figure(
        (_RECORD_HELD_OUT, f"-m gr00t_fast eval {_DEMO} --dataset={_HELD_OUT} --episodes=all --out={{out}}"),
        {"eval.json": "open_loop/eval.json"},
        1,
    ),
    "steps": Figure(
        ("benchmarks/evaluate.py --study steps --scenes still --episodes=200 --jobs=2 --out={out}",),
        {"evaluate.json": "evaluate/evaluate.json"},
        10,
    ),
    "sync": Figure(
        ("benchmarks/evaluate.py --scenes moving --controllers sync --latency_ms 0 200 --action_horizon 8 --episodes=200 --jobs=2 --out={out}",),
        {"evaluate.json": "evaluate/speed_up_sync.json"},
        5,
    ),
    "threaded": Figure(
        (
            "benchmarks/evaluate.py --scenes moving --controllers threaded auto --latency_ms 200 --action_horizon 16 --episodes=200 --jobs=2 "
            "--out={out}",
        ),
        {"evaluate.json": "evaluate/speed_up_threaded.json"},
        5,
    ),
    "reach_real_time": Figure(
        (
            f"so100_inference_optimized.py --config_path=configs/so100_sim.yaml {_DEMO} --timeout=2.5 --episodes=200 --seed=0 --overwrite "
            "--out={out}",
        ),
        {"report.json": "reach_real_time.json"},
        9,
    ),
    "certificate": Figure(
        (
            _RECORD_TRAINING,
            f"-m gr00t_fast tune {_DEMO} --exports={{out}}/exports --observations={_TRAINING} --engines eager fused onnxruntime openvino --threads=1 "
            "--out={out} --certificate={out}/certificate.json",
        ),
        {},
        2,
        _package("onnxscript", "needs the extra export"),
    ),
    "ab_server": Figure(("benchmarks/ab_server.py --max_minutes=4 --out={out}",), {"ab_server.json": "ab_server/ab_server.json"}, 5),
    "arms": Figure(
        ("benchmarks/ab_server.py --clients=8 --size=demo --chunks 2.6 1.2 --max_minutes=2 --out={out}",),
        {"ab_server.json": "ab_server/arms.json"},
        3,
    ),
    "n1.5_fp32": Figure(
        ("benchmarks/bench_policy.py --engine=eager --size=full --device=cpu --precision=fp32 --threads=2 --rounds=5 --warm_up=1 --out={out}",),
        {"bench_policy.json": "bench_policy/n1.5_fp32.json"},
        6,
        _memory(21),
    ),
    "n1.5_bf16": Figure(
        ("benchmarks/bench_policy.py --engine=fused --size=full --device=cpu --precision=bf16 --threads=2 --rounds=12 --out={out}",),
        {"bench_policy.json": "bench_policy/n1.5_bf16.json"},
        4,
        _bf16_memory(12),
    ),
    "n1.6_fp32": Figure(
        (
            "benchmarks/bench_policy.py --engine=eager --network=n1.6 --size=full --device=cpu --precision=fp32 --rounds=5 --warm_up=1 --threads=1 "
            "--reference=false --out={out}",
        ),
        {"bench_policy.json": "bench_policy_n1d6_cpu.json"},
        7,
        _memory(18),
    ),
    "n1.7_fp32": Figure(
        (
            "benchmarks/bench_policy.py --engine=eager --network=n1.7 --size=full --device=cpu --precision=fp32 --rounds=5 --warm_up=1 --threads=2 "
            "--reference=false --out={out}",
        ),
        {"bench_policy.json": "bench_policy/n1.7_fp32.json"},
        5,
        _memory(17),
    ),
    "fused_fp32": Figure(
        (f"{_ENGINES} --engines eager fused --denoising_steps 4 2 --frames=4 --rounds=6 --precision=fp32 --out={{out}}",),
        {"bench_engines.json": "bench_engines/n1.5_fp32.json"},
        6,
        _memory(22),
    ),
    "fused_bf16": Figure(
        (f"{_ENGINES} --engines eager fused compiled reference --denoising_steps 4 2 --frames=24 --rounds=8 --precision=bf16 --out={{out}}",),
        {"bench_engines.json": "bench_engines/n1.5_bf16.json"},
        15,
        _bf16_memory(21),
    ),
    "int8": Figure(
        (
            "benchmarks/bench_policy.py --size=full --device=cpu --threads=2 --rounds=1 --reference=false --out={out}",  # writes the checkpoint
            f"-m gr00t_fast export onnx {_OF_INT8} --out={{out}}/onnx --overwrite",
            f"-m gr00t_fast quantise {_OF_INT8} --onnx={{out}}/onnx --observations=random:0 --allow_few --frames=4 --trial_frames=0 "
            "--target=openvino --out={out}/int8 --overwrite",
            f"benchmarks/bench_engines.py {_OF_INT8} --engines eager fused openvino={{out}}/int8 --denoising_steps 4 2 --frames=2 --rounds=8 "
            "--precision=bf16 --device=cpu --threads=2 --out={out}",
            f"benchmarks/bench_policy.py {_OF_INT8} --engine=openvino --engine_path={{out}}/int8 --device=cpu --threads=2 --rounds=12 "
            "--reference=false --out={out}",
        ),
        {"bench_engines.json": "bench_engines/n1.5_int8.json", "bench_policy.json": "bench_policy/n1.5_int8.json"},
        8,
        _bf16_memory(16),
    ),
    "int8_two_cameras": Figure(
        (
            f"benchmarks/bench_policy.py {_TWO_CAMERAS} --size=full --device=cpu --threads=2 --rounds=1 --reference=false --out={{out}}",
            f"-m gr00t_fast export onnx {_OF_INT8_TWO} --out={{out}}/onnx --overwrite",
            f"-m gr00t_fast quantise {_OF_INT8_TWO} --onnx={{out}}/onnx --observations=random:0 --allow_few --frames=4 "
            "--trial_frames=0 --target=openvino --out={out}/int8 --overwrite",
            f"benchmarks/bench_engines.py {_OF_INT8_TWO} --engines eager fused openvino={{out}}/int8 --denoising_steps 4 2 --frames=2 "
            "--rounds=6 --precision=bf16 --device=cpu --threads=2 --out={out}",
        ),
        {"bench_engines.json": "bench_engines/n1.5_int8_two_cameras.json"},
        12,
        _bf16_memory(16),
    ),
    "fused_bf16_two_cameras": Figure(
        (f"{_ENGINES} {_TWO_CAMERAS} --engines eager fused reference --denoising_steps 4 2 --frames=12 --rounds=6 --precision=bf16 --out={{out}}",),
        {"bench_engines.json": "bench_engines/n1.5_bf16_two_cameras.json"},
        12,
        _bf16_memory(16),
    ),
    "fused_bf16_n1.7": Figure(
        (f"{_ENGINES} --network=n1.7 --engines eager fused --denoising_steps 4 2 --frames=2 --rounds=6 --precision=bf16 --out={{out}}",),
        {"bench_engines.json": "bench_engines/n1.7_bf16.json"},
        5,
        _bf16_memory(16),
    ),
    "lerobot": _lerobot("0.4", "groot_n1", "n1d5"),
    "lerobot_n1.7": _lerobot("0.6", "groot_n1_7", "n1d7"),
    "vla_cpp": Figure(
        (
            "-m gr00t_fast random-checkpoint --size=full --out={out}/checkpoint --overwrite",
            "$VLA_CPP/scripts/convert_gr00t_n1_5_to_gguf.py --ckpt={out}/checkpoint --out={out}/n1.5.gguf",
            "benchmarks/bench_vla_cpp.py --model_path={out}/checkpoint --gguf={out}/n1.5.gguf --device=cpu --precision=bf16 --threads=2 --out={out}",
        ),
        {"bench_vla_cpp.json": "bench_vla_cpp/n1.5_bf16.json"},
        4,
        lambda: (
            ("" if os.environ.get("VLA_CPP") else _OF_VLA_CPP)
            or _package("vla_cpp", _OF_VLA_CPP)()
            or _package("gguf", _OF_VLA_CPP)()
            or _bf16_memory(12)()
        ),
    ),
    "policies": Figure(
        ("benchmarks/simple_benchmark.py --published --policies act smolvla diffusion_ddim gr00t --rounds=60 --threads=2 --out={out}",),
        {"simple_benchmark.json": "simple_benchmark/simple_benchmark.json"},
        6,
        _memory(14),
    ),
    "scene": Figure(("benchmarks/scene.py --full --out={out}",), {"scene.json": "scene/scene.json"}, 15),
    "scene_success": Figure(("benchmarks/scene.py --looks=false --success=20 --out={out}",), {"scene.json": "scene/success.json"}, 5),
    "page": Figure(("benchmarks/page_cost.py --rounds=6 --seconds=12 --out={out}",), {"page_cost.json": "page/page_cost.json"}, 4),
    "trials": Figure(("benchmarks/moving_trials.py --order_seed=1 --out={out}",), {"study.json": "trials/sync_or_threaded.json"}, 6),
    "trials_twice": Figure(
        ("benchmarks/moving_trials.py --order_seed=2 --a=--controller=threaded --b=--controller=threaded --out={out}",),
        {"study.json": "trials/threaded_twice.json"},
        6,
    ),
    "gpu": Figure(
        ("-m benchmarks.gpu_check --out={out}",),
        {},
        29,
        lambda: "" if Path("/proc/driver/nvidia/version").exists() else "needs a CUDA GPU",
    ),
}


@dataclass
class Config(Flags):
    figures: list[str] = field(default_factory=lambda: list(FIGURES))  # which
    plan: bool = False  # say what would run, and end
    quotes: bool = False  # print what the kept files say of each sentence that quotes them, and end
    keep: bool = True  # put the results into benchmarks/results at the end


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    return guarded(lambda: run(config), "interrupted: results of figures that were finished are kept")


def run(config: Config) -> int:
    """Exit code: 1 where a figure failed. Raises ConfigError."""
    if config.quotes:
        for quote in QUOTES:
            print(f"{quote.page}: {quote.said()}")
        return 0
    for name in config.figures:
        if name not in FIGURES:
            raise ConfigError(f"FIGURES: unknown figure '{name}'.{closest(name, FIGURES)} Known: {', '.join(FIGURES)}.")
    reasons = {name: FIGURES[name].obstacle() for name in config.figures}
    able = [name for name in config.figures if not reasons[name]]
    for name, why in reasons.items():
        print(f"skipped: {name}: {why}" if why else f"to make: {name}, about {FIGURES[name].minutes:g} min", flush=True)
    print(f"about {sum(FIGURES[name].minutes for name in able):.0f} min in all", flush=True)
    commit = git_commit()
    if config.plan:
        return 0
    if config.keep and (commit is None or commit.endswith("-dirty")):
        raise ConfigError(f"this checkout is changed ({commit}): its figures could not be made again. Commit first, or say --keep=false.")
    done: list[str] = []
    try:
        for number, name in enumerate(able, 1):
            began_s = time.monotonic()
            print(f"{number} of {len(able)}: {name} ...", flush=True)
            if make(name, _OUT / name):
                done.append(name)
            print(f"{'made' if name in done else 'FAILED'} in {(time.monotonic() - began_s) / 60:.1f} min: {name}, log {_OUT / name}.log", flush=True)
    finally:
        if config.keep:
            publish([(_OUT / name / made, RESULTS / kept) for name in done for made, kept in FIGURES[name].leaves.items()])
            print(f"kept in benchmarks/results: {', '.join(done) or 'nothing'}; a certificate goes to benchmarks/certificates by hand")
    return 0 if done == able else 1


def make(name: str, out: Path) -> bool:
    """Whether every command of the figure ended well; what they print goes to a log beside `out`. A recording that is there is used again."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with out.with_name(f"{out.name}.log").open("w") as log:  # a name may have a point: n1.5
        for command in FIGURES[name].commands:
            words = [os.path.expandvars(word) for word in words_of(command, out)]
            if words[0] == "training/record.py" and (ROOT / words[-1].removeprefix("--out=")).is_dir():
                continue
            if subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
                return False
    return True


def words_of(command: str, out: Path) -> list[str]:
    return shlex.split(command.format(out=out.relative_to(ROOT) if out.is_relative_to(ROOT) else out))


if __name__ == "__main__":
    sys.exit(main())
