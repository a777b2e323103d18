"""`gr00t-fast export onnx | export tensorrt | quantise | verify`: files for the engines that need some, and what they are worth.

Each checks what is small (flags, data, the exports it begins with) before weights are read. torch is imported in the functions that need it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gr00t_fast.base.measurement import peak_rss_bytes, provenance
from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command, end_on_sigterm, show
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import MEAN_SOMETHING_ELSE, OutputFlags
from gr00t_fast.export import SYNTHETIC, BuildOptions, OnnxOptions, QuantiseOptions, VerifyOptions
from gr00t_fast.export.report import quantisation_table, table_of, verification_table, verification_verdict

C = TypeVar("C", bound=OutputFlags)
Made = tuple[dict[str, Any], str, str]  # the result for --json, and as a table; and the verdict, one line
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; what was being made is removed then."


def _command(words: str, flags: type[C], make: Callable[[C], Made], exits: str = _EXITS) -> Command[C]:
    """words: of the command and its required flags. A result that has not `passed` is an error."""

    def work(config: C) -> int:
        end_on_sigterm()
        start_s = time.perf_counter()
        result, table, verdict = make(config)
        measured = {"seconds": round(time.perf_counter() - start_s, 1), "peak_rss_bytes": peak_rss_bytes(), **provenance()}
        show({**result, **measured}, table, verdict, config)
        return EXIT_OK if result.get("passed", True) else EXIT_ERROR

    usage, interrupted = f"usage: gr00t-fast {words} [--flag=value ...]", "interrupted; what was being made is removed"
    return Command(flags, work, usage, exits, interrupted, RunConfig, MEAN_SOMETHING_ELSE)


@dataclass(kw_only=True)
class OnnxConfig(OutputFlags, OnnxOptions):
    """Export a checkpoint to ONNX: vision, language and one denoising step, for your cameras and your embodiment.

        gr00t-fast export onnx --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/onnx --precision=fp32

    What comes out is run with --engine=onnxruntime --engine_path=exports/onnx, and is what `gr00t-fast quantise` and
    `gr00t-fast export tensorrt` begin with. fp32 is for CPUs; fp16 and bf16 are for GPUs (ONNX Runtime computes fp16 on a CPU as fp32, and bf16
    not at all). The full size needs up to twice the largest stage in memory: one stage is held at a time.
    """


def make_onnx(config: OnnxConfig) -> Made:
    from gr00t_fast.export.onnx import export_checkpoint

    manifest = export_checkpoint(config)
    size_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    table = table_of(("file", "MB"), ((name, f"{entry['bytes'] / 1e6:.1f}") for name, entry in manifest.files.items()))
    result = {"out": str(config.out), "precision": manifest.precision, "bytes": size_bytes}
    return result, table, f"wrote {config.out}: {size_bytes / 1e6:.1f} MB in {manifest.precision}"


@dataclass(kw_only=True)
class TensorRTConfig(OutputFlags, BuildOptions):
    """Build TensorRT engines for a checkpoint: for your cameras, your embodiment and your GPU.

        gr00t-fast export tensorrt --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/tensorrt

    exports the graphs first, into exports/tensorrt-onnx (fp16 unless --precision says otherwise), or begins with those in --onnx: from
    `gr00t-fast export onnx`, or 8-bit ones from `gr00t-fast quantise`. What comes out is run with --engine=tensorrt
    --engine_path=exports/tensorrt. tensorrt_rtx (GeForce and RTX GPUs) builds on any machine, with or without a GPU; tensorrt (Jetson, data
    centre) on the machine that will run the engines.
    """


def make_tensorrt(config: TensorRTConfig) -> Made:
    from gr00t_fast.export.tensorrt import build_checkpoint

    manifest = build_checkpoint(config)
    stages = {name: stage["build"] for name, stage in manifest.stages.items()}
    result = {
        "program": "to_tensorrt",
        "out": str(config.out),
        "precision": manifest.precision,
        "quantisation": (manifest.quantisation or {}).get("format"),
        **{key: manifest.details[key] for key in ("builder", "builder_version", "compute_capability", "profiles")},
        "stages": stages,
    }
    rows = (
        (name, made["layers"], f"{made['bytes'] / 1e6:.1f}", made["parse_s"], made["build_s"], f"{made['peak_memory_bytes'] / 1e6:.0f}")
        for name, made in stages.items()
    )
    return result, table_of(("stage", "layers", "MB", "parse s", "build s", "peak MB"), rows), f"wrote {config.out}"


@dataclass(kw_only=True)
class QuantiseConfig(OutputFlags, QuantiseOptions):
    """Make an 8-bit version of an ONNX export, calibrated with observations of your robot.

        gr00t-fast quantise --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --onnx=exports/onnx --out=exports/openvino \\
            --format=int8 --target=openvino --observations=./my-lerobot-dataset

    openvino and tensorrt take INT8 weights and activations with scales from the calibration; tensorrt takes FP8 (E4M3) too, on GPUs that have it.
    onnxruntime rounds activations with scales found at run time and needs no --observations. Calibration runs in torch, on the CPU.
    """


def make_quantised(config: QuantiseConfig) -> Made:
    from gr00t_fast.export.quantise import quantise

    report = quantise(config)
    brief = {key: value for key, value in report.items() if key != "groups"}  # which lie in the output
    return {"out": str(config.out), **brief}, quantisation_table(report), f"wrote {config.out} for {config.target}"


@dataclass(kw_only=True)
class VerifyConfig(OutputFlags, VerifyOptions):
    """Compare an exported engine with the plain model in fp32: every stage, and the actions in joint units.

        gr00t-fast verify --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --engine=openvino --engine_path=exports/openvino \\
            --observations=./my-lerobot-dataset --out=outputs/verify

    Joint units are those of the data: degrees, and per cent for the gripper, in most. Without --observations the pictures are synthetic: that finds
    wrong graphs and says little about your arm.
    """


def make_verification(config: VerifyConfig) -> Made:
    from gr00t_fast.export.verify import verify

    if config.observations is None:
        config.tell(f"note: no --observations: pictures and joints are synthetic ({SYNTHETIC}).")
    result = verify(config)
    return result, verification_table(result), verification_verdict(result)


onnx = _command("export onnx --model_path=DIR --out=DIR", OnnxConfig, make_onnx)
tensorrt = _command("export tensorrt --model_path=DIR --out=DIR", TensorRTConfig, make_tensorrt)
_OF_QUANTISE = "quantise --model_path=DIR --onnx=DIR --out=DIR --target=RUNTIME --observations=DATASET"
quantise = _command(_OF_QUANTISE, QuantiseConfig, make_quantised)
_VERIFY_EXITS = "exit codes: 0 passed, 1 failed (an action error above --limit, or a stage of an fp32 export that is off) or error, 2 bad flag."
verify = _command("verify --model_path=DIR --engine=NAME [--observations=DATASET]", VerifyConfig, make_verification, _VERIFY_EXITS)
