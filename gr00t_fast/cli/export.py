"""`gr00t-fast export onnx | export tensorrt | quantise | verify`: files for the engines that need some, and what they are worth.

Each checks what is small (flags, data, the exports it begins with) before weights are read. torch is imported in the functions that need it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gr00t_fast.base.errors import AT_LEAST_1, ConfigError, check_ranges, require
from gr00t_fast.base.files import check_free, whole_directory
from gr00t_fast.base.measurement import command_line, peak_rss_bytes, provenance
from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command, end_on_sigterm, show
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import (
    DATA_SETS,
    CameraFlags,
    CheckpointFlags,
    ExportedName,
    ObservationFlags,
    OutputFlags,
    PrecisionName,
    check_device,
)
from gr00t_fast.export import BuildOptions, CalibrationOptions, ExportPrecision, OnnxOptions, OutOptions, flags_given
from gr00t_fast.inputs.dataset import MIN_FRAMES

if TYPE_CHECKING:
    from gr00t_fast.checkpoint import Checkpoint
    from gr00t_fast.engine.manifest import Target
    from gr00t_fast.export.qdq import InputScale
    from gr00t_fast.export.verify import Case

C = TypeVar("C", bound="ExportFlags")
Made = tuple[dict[str, Any], str, str]  # the result for --json, and as a table; and the verdict, one line
FP8 = "fp8"
LEAST_VERIFIED = 100  # observations
_SYNTHETIC = "random:0"
_EXITS = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted; what was being made is removed then."
_NOT_OF_A_RUN = ("precision", "seed", "camera_map")  # settings of a run's file that mean something else here


@dataclass(kw_only=True)
class ExportFlags(OutputFlags, CheckpointFlags):
    """What all of them take."""

    GROUP = "export"

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        check_device(getattr(self, "device", "auto"))
        counts = ("denoising_steps", "max_text_tokens", "frames")
        check_ranges(self, **{name: AT_LEAST_1 for name in counts if hasattr(self, name)})


def _opened(config: ExportFlags) -> tuple[Checkpoint, Target]:
    """Small files only."""
    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.engine.manifest import target_of

    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    return checkpoint, target_of(checkpoint, config.embodiment_tag, config.data_config)


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
    return Command(flags, work, usage, exits, interrupted, RunConfig, _NOT_OF_A_RUN)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


# --- export onnx --------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class OnnxConfig(CameraFlags, OnnxOptions, ExportFlags):
    """Export a checkpoint to ONNX: vision, language and one denoising step, for your cameras and your embodiment.

        gr00t-fast export onnx --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/onnx --precision=fp32

    What comes out is run with --engine=onnxruntime --engine_path=exports/onnx, and is what `gr00t-fast quantise` and
    `gr00t-fast export tensorrt` begin with. fp32 is for CPUs; fp16 and bf16 are for GPUs (ONNX Runtime computes fp16 on a CPU as fp32, and bf16
    not at all). The full size needs up to twice the largest stage in memory: one stage is held at a time.
    """

    GROUP = "export"

    lang_instruction: str = "Place the block in the bowl"  # an instruction of the usual length; others can be given later


def make_onnx(config: OnnxConfig) -> Made:
    """Check everything small, then export. Raises Gr00tFastError."""
    import torch

    from gr00t_fast.export.onnx import export_onnx
    from gr00t_fast.export.verify import transforms_only

    for package in ("onnx", "onnxscript"):
        require(package, "export")
    check_free(config.out, config.overwrite)
    _, target = _opened(config)
    policy = transforms_only(config.model_path, **config.options())
    if (size := config.camera_px()) is not None:
        policy.expect_cameras(dict.fromkeys(policy.metadata.resolutions, size))
    example = policy.preprocess(policy.example_observation(config.lang_instruction))
    if size is not None and example.camera_size is None:
        raise ConfigError(f"--camera_size={config.camera_size} is for GR00T N1.6 and N1.7; N1.5 resizes frames of any size to one. Leave it out.")
    usual = example.to(torch.device("cpu"), torch.float32)
    manifest = export_onnx(target, config, usual, command_line(), example.camera_size)
    size_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    table = _table(("file", "MB"), ((name, f"{entry['bytes'] / 1e6:.1f}") for name, entry in manifest.files.items()))
    result = {"out": str(config.out), "precision": manifest.precision, "bytes": size_bytes}
    return result, table, f"wrote {config.out}: {size_bytes / 1e6:.1f} MB in {manifest.precision}"


onnx = _command("export onnx --model_path=DIR --out=DIR", OnnxConfig, make_onnx)


# --- export tensorrt ----------------------------------------------------------------------------------------------------------------------

_PRECISION: ExportPrecision = "fp16"  # every GPU that TensorRT knows computes in it; bf16 needs Ampere
_EXPORTED = ("precision", "denoising_steps", "camera_size", "lang_instruction")  # flags of graphs that are exported here


@dataclass(kw_only=True)
class TensorRTConfig(CameraFlags, BuildOptions, ExportFlags):
    """Build TensorRT engines for a checkpoint: for your cameras, your embodiment and your GPU.

        gr00t-fast export tensorrt --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --out=exports/tensorrt

    exports the graphs first, into exports/tensorrt-onnx (fp16 unless --precision says otherwise), or begins with those in --onnx: from
    `gr00t-fast export onnx`, or 8-bit ones from `gr00t-fast quantise`. What comes out is run with --engine=tensorrt
    --engine_path=exports/tensorrt. tensorrt_rtx (GeForce and RTX GPUs) builds on any machine, with or without a GPU; tensorrt (Jetson, data
    centre) on the machine that will run the engines.
    """

    GROUP = "export"

    overwrite: bool = False  # replace engines, and graphs in OUT-onnx, that are there, once the new ones are whole
    onnx: Path | None = None  # graphs to begin with; default: exported into OUT-onnx
    precision: ExportPrecision | None = None  # of graphs that are exported here; default: fp16
    denoising_steps: list[int] = field(default_factory=list)  # when exporting: step counts besides the usual ones
    lang_instruction: str | None = None  # when exporting: an instruction of the usual length; others can be given later

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if self.onnx is not None and (given := [f"--{name}" for name in _EXPORTED if getattr(self, name) not in (None, [])]):
            raise ConfigError(f"{', '.join(given)} with --onnx: the graphs there have theirs. Leave it out, or leave out --onnx to export others.")


def make_tensorrt(config: TensorRTConfig) -> Made:
    """Check everything small, export the graphs where none are named, build. Raises Gr00tFastError."""
    from gr00t_fast.engine.manifest import check_manifest, remedy_for
    from gr00t_fast.export.tensorrt import build_engines, check_feasible, run_alone

    check_free(config.out, config.overwrite)
    check_feasible(config.builder, config.compute_capability, None if config.onnx else config.precision or _PRECISION)
    graphs = config.onnx or config.out.with_name(f"{config.out.name}-onnx")
    if config.onnx is None:
        run_alone(make_onnx, _of_graphs(config, graphs))  # the builder needs the memory that exporting leaves taken
    _, target = _opened(config)
    source = check_manifest(graphs, "onnx", target, remedy_for(graphs, target, "to_onnx.py", f"--precision={_PRECISION}"))
    manifest = build_engines(graphs, source, config, command_line())
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
    return result, _table(("stage", "layers", "MB", "parse s", "build s", "peak MB"), rows), f"wrote {config.out}"


def _of_graphs(config: TensorRTConfig, out: Path) -> OnnxConfig:
    """What exports the graphs: flags that are not given keep its defaults."""
    names = {each.name for each in fields(TensorRTConfig)} & {each.name for each in fields(OnnxConfig)}
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return OnnxConfig(**{**given, "out": out, "precision": config.precision or _PRECISION})


tensorrt = _command("export tensorrt --model_path=DIR --out=DIR", TensorRTConfig, make_tensorrt)


# --- quantise ---------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SampleFlags(ObservationFlags, ExportFlags):
    """Which observations are taken."""

    GROUP = "observations"

    allow_few: bool = False  # go on with fewer frames or episodes than it takes; the result says so
    frames: int = MIN_FRAMES  # how many observations, spread over all episodes
    denoising_steps: int | None = None  # default: the checkpoint's own; calibrate with as many as will run
    seed: int = 0  # of the choice of frames and of the noise

    def cases(self, target: Target, **options: Any) -> tuple[list[Case], dict[str, Any]]:
        """Preprocessed observations, and what is to be said of them. options: others of `collect_cases`."""
        from gr00t_fast.export.verify import collect_cases

        names = ("frames", "seed", "camera_map", "allow_few", "processor_path", "prompt_style")
        return collect_cases(target, self.observations or _SYNTHETIC, **{name: getattr(self, name) for name in names}, **options)


def _written(directory: Path, name: str, result: Mapping[str, Any], text: str) -> None:
    """NAME.json and NAME.md."""
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def _calibration_table(report: Mapping[str, Any]) -> str:
    """report: `Manifest.quantisation` and that of a calibration, if there was one."""
    parts = [f"# {report['format'].upper()} for {report['runtime']}"]
    if data := report["calibration"]:
        parts.append(f"Calibrated with {data['frames']} frames of {data['episodes']} episodes from `{data['source']}`.")
        parts += [f"**Warning: {warning}.**" for warning in data["warnings"]]
    if "groups" not in report:
        return "\n\n".join([*parts, "All linear layers, activations rounded with scales found at run time."])
    if error := report["action_error_on_trial_samples"]:
        figures = ", ".join(_figures(error))
        parts.append(f"Actions on {report['trial_samples']} of these frames, {report['denoising_steps']} steps, against fp32: {figures}.")
    parts.append(f"{report['work_in_8_bits']:.1%} of the multiplications are in 8 bits. Each group rounded alone:")
    rows = [
        (
            f"{group['group']} ({group['layers']})",
            f"{group['share_of_multiplications']:.2%}",
            *(_figures(group["alone"]) if group["alone"] else [""] * len(_ERRORS)),
            group["kept_in_16_bits"] or "",
        )
        for group in report["groups"]
    ]
    return "\n\n".join([*parts, _table(("layers", "of the work", *_ERRORS, "kept in 16 bits because"), rows)])


_ERRORS = ("p50", "p99", "largest", "of the displacement")  # joint units


def _figures(error: Mapping[str, float]) -> list[str]:
    """By `_ERRORS`. error: of `ActionError.describe`."""
    return [*(f"{error[key]:.3g}" for key in ("p50", "p99", "max")), f"{error['relative_to_displacement']:.3%}"]


@dataclass(kw_only=True)
class QuantiseConfig(OutOptions, CalibrationOptions, SampleFlags):
    """Make an 8-bit version of an ONNX export, calibrated with observations of your robot.

        gr00t-fast quantise --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --onnx=exports/onnx --out=exports/openvino \\
            --format=int8 --target=openvino --observations=./my-lerobot-dataset

    openvino and tensorrt take INT8 weights and activations with scales from the calibration; tensorrt takes FP8 (E4M3) too, on GPUs that have it.
    onnxruntime rounds activations with scales found at run time and needs no --observations. Calibration runs in torch, on the CPU.
    """

    GROUP = "export"

    onnx: Path  # export to begin with (gr00t-fast export onnx)
    target: Literal["openvino", "onnxruntime", "tensorrt"]  # the runtime that the files are for
    format: Literal["int8", "fp8"] = "int8"  # of the numbers

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if self.format == FP8 and self.target != "tensorrt":
            raise ConfigError(f"--format=fp8 --target={self.target}: no CPU computes in FP8. Expected --format=int8, or --target=tensorrt.")
        if self.observations is None and self.target != "onnxruntime":
            raise ConfigError(f"--target={self.target} needs --observations: {DATA_SETS}.")

    def made_with(self) -> list[str]:
        """Flags by which the manifest names the command that makes the same again."""
        names = ("onnx", "format", "target", "observations", "frames", "denoising_steps", "limit", "trial_frames", "prompt_style")
        return list(flags_given(self, *names, "processor_path", "seed", "camera_map", "allow_few"))


def make_quantised(config: QuantiseConfig) -> Made:
    """Check everything small, calibrate, write. Raises Gr00tFastError."""
    from gr00t_fast.engine.manifest import check_manifest, remedy_for
    from gr00t_fast.export.qdq import write_quantised_export

    require("onnx", "export")
    if config.target != "tensorrt":  # its files are ONNX
        require(config.target, "openvino" if config.target == "openvino" else "export")
    check_free(config.out, config.overwrite)
    checkpoint, target = _opened(config)
    remedy = remedy_for(config.onnx, target, "to_onnx.py")
    manifest = check_manifest(config.onnx, "onnx", target, remedy)
    if manifest.quantisation is not None:
        raise ConfigError(f"--onnx={config.onnx} is in {manifest.quantisation.get('format')} already. Give the export it was made from.")
    if config.target != "tensorrt" and manifest.precision != "fp32":
        raise ConfigError(f"--onnx={config.onnx} is {manifest.precision}; {config.target} takes fp32 (gr00t-fast export onnx --precision=fp32).")
    steps = config.denoising_steps or checkpoint.config.head.denoising_steps
    scales, found, data = (None, {}, {}) if config.observations is None else _calibrated_graphs(config, target, steps, manifest.shapes, remedy)
    quantisation = {"format": config.format, "runtime": config.target, "calibration": data}
    report = quantisation | found
    with whole_directory(config.out, config.overwrite) as directory:
        _written(directory, "quantisation", report, _calibration_table(report))
        write_quantised_export(config.onnx, manifest, directory, scales, quantisation, command_line(), config.made_with())
    brief = {key: value for key, value in report.items() if key != "groups"}  # which lie in the output
    return {"out": str(config.out), **brief}, _calibration_table(report), f"wrote {config.out} for {config.target}"


def _calibrated_graphs(
    config: QuantiseConfig, target: Target, steps: int, shapes: Mapping[str, Any], remedy: str
) -> tuple[dict[str, InputScale], dict[str, Any], dict[str, Any]]:
    """Scales, how they were found, and what of."""
    from gr00t_fast.engine.exported import ExportTables
    from gr00t_fast.engine.manifest import check_picture
    from gr00t_fast.export.calibrate import GraphNetwork, calibrate

    tables = ExportTables(config.onnx, remedy)
    tables.steps(steps)  # a count that was not exported is refused before minutes pass
    cases, data = config.cases(target, noise_seed=config.seed, camera_size=shapes.get("camera_size"))
    for case in cases:
        check_picture(shapes, case.inputs.pixel_values.shape[-2:], None, remedy)
    return *calibrate(GraphNetwork(target, shapes, tables, steps, config.format), cases, config), data


_OF_QUANTISE = "quantise --model_path=DIR --onnx=DIR --out=DIR --target=RUNTIME --observations=DATASET"
quantise = _command(_OF_QUANTISE, QuantiseConfig, make_quantised)


# --- verify -------------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class VerifyConfig(SampleFlags):
    """Compare an exported engine with the plain model in fp32: every stage, and the actions in joint units.

        gr00t-fast verify --model_path=./gr00t-n1.5-so100-finetuned --data_config=so100 --engine=openvino --engine_path=exports/openvino \\
            --observations=./my-lerobot-dataset --out=outputs/verify

    Joint units are those of the data: degrees, and per cent for the gripper, in most. Without --observations the pictures are synthetic: that finds
    wrong graphs and says little about your arm.
    """

    GROUP = "export"

    engine: ExportedName  # which runtime the export is for
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    frames: int = LEAST_VERIFIED  # how many observations, spread over all episodes
    limit: float | None = None  # p99 of the action error in joint units; default: 0.5 for 16 bits and more, 1.5 for 8
    device: str = "auto"  # of the engine; the plain model runs on the CPU
    precision: PrecisionName = "auto"  # of the engine, where it has a choice
    out: Path = Path("outputs/verify")  # directory for verify.json and verify.md, which are replaced


def make_verification(config: VerifyConfig) -> Made:
    """Check the data and the export, run the plain model, free it, run the engine; leave verify.json and verify.md. Raises Gr00tFastError."""
    from gr00t_fast.engine import open_engine
    from gr00t_fast.engine.exported import ExportTables
    from gr00t_fast.export.verify import compare, record_reference

    if config.observations is None and not config.quiet:
        print(f"note: no --observations: pictures and joints are synthetic ({_SYNTHETIC}).", file=sys.stderr)
    checkpoint, target = _opened(config)
    directory = config.engine_path or checkpoint.path / "exports" / config.engine
    size = open_engine(config.engine, directory, target, config.device, config.precision).camera_size  # refused now rather than in ten minutes
    steps = config.denoising_steps or checkpoint.config.head.denoising_steps
    tables = ExportTables(directory, target.command("to_onnx.py"))
    tables.steps(steps)
    noise_seed = (config.seed, 1)  # not the noise of the calibration
    cases, source = config.cases(target, least=LEAST_VERIFIED, noise_seed=noise_seed, camera_size=size)
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".reference-") as work:
        record_reference(target, cases, steps, Path(work))
        engine = open_engine(config.engine, directory, target, config.device, config.precision)
        judged = compare(engine, tables.embed, cases, steps, Path(work), config.limit)
    facts = {"program": "verify", "engine": config.engine, "device": str(engine.device), "denoising_steps": steps, "source": source}
    result = {**facts, **judged, **provenance(), "seed": config.seed}
    table, verdict = _verify_table(result), _verify_verdict(result)
    _written(config.out, "verify", result, f"{table}\n\n{verdict}")
    return result, table, verdict


def _verify_table(result: Mapping[str, Any]) -> str:
    source = result["source"]
    stages = [(name, *(f"{values[key]:.2e}" for key in ("p50", "p99", "max"))) for name, values in result["relative_l2"].items()]
    actions = {"pixels to actions": result["actions"], "denoising alone": result["actions_of_denoise_alone"]}
    parts = [
        f"{result['engine']} ({result['format']}), {result['denoising_steps']} steps, {result['observations']} observations of {source['source']}",
        *(f"Warning: {warning}." for warning in source["warnings"]),
        _table(("relative L2 against the plain model in fp32", "p50", "p99", "largest"), stages),
        _table(("actions, joint units", *_ERRORS), [(name, *_figures(error)) for name, error in actions.items()]),
    ]
    return "\n\n".join(parts)


def _verify_verdict(result: Mapping[str, Any]) -> str:
    """One line; it says when the observations were synthetic."""
    verdict = "passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"])
    synthetic = "; on synthetic observations: --observations=DATASET judges it on your recordings" if result["source"]["synthetic"] else ""
    return f"{verdict} (limit: p99 {result['action_limit_p99']:g} joint units){synthetic}"


_VERIFY_EXITS = "exit codes: 0 passed, 1 failed (an action error above --limit, or a stage of an fp32 export that is off) or error, 2 bad flag."
verify = _command("verify --model_path=DIR --engine=NAME [--observations=DATASET]", VerifyConfig, make_verification, _VERIFY_EXITS)
