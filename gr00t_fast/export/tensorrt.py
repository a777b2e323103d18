"""From exported ONNX graphs to TensorRT engines, each stage built in a process of its own: the library keeps memory, and a build can only be killed.

    graphs + manifest.json (kind "onnx")  ->  *.engine + tables.safetensors + manifest.json (kind "tensorrt")

The directory appears when all of it is there. What a GPU cannot compute is refused before minutes are spent. Sources: the support matrices of
TensorRT-RTX 1.x ("by default portable" to Ampere and later; Turing only when named) and what the builder of 1.7.1 itself refuses: bf16, fp8 and fp32
matrix products on 7.5, fp8 below 8.9.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from gr00t_fast import tensorrt_library as library
from gr00t_fast.engine.exported import TABLES_NAME
from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, Digests, Manifest, describe_files, read_manifest, varying_sizes
from gr00t_fast.errors import ConfigError, EngineError, Gr00tFastError, install_command, require
from gr00t_fast.files import atomic_write, whole_directory
from gr00t_fast.measurement import peak_rss_bytes
from gr00t_fast.tensorrt_library import ANY_GPU, RTX, STANDARD, gpu_capability, version_tuple

KIND = "tensorrt"  # of the manifest, whichever of the two libraries
Range = tuple[int, int, int]  # least, usual and most of a dimension
Tell = Callable[[str, float], None]  # a phase of the build, and the share of it that is done


@dataclass(frozen=True)
class BuildOptions:
    """onnx: directory of the export; out: directory of the engines; the rest as the flags of gr00t-fast export tensorrt."""

    onnx: Path
    out: Path
    builder: str = "auto"
    compute_capability: str = "auto"
    max_text_tokens: int | None = None  # longest prompt besides the pictures' tokens; None = what was exported
    workspace_mb: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    overwrite: bool = False  # replace the engines that are there

    def flags(self) -> tuple[str, ...]:
        """As on the command line: enough to make the same engines again."""
        names = ("onnx", "builder", "compute_capability", "max_text_tokens", "workspace_mb", "optimization_level", "timing_cache")
        return tuple(f"--{name}={value}" for name in names if (value := getattr(self, name)) not in (None, "auto"))


@dataclass(frozen=True)
class Request:
    """One stage to build. `profiles`: for each one the range of each named dimension of the graph."""

    onnx: Path
    engine: Path  # file to write
    builder: str
    capabilities: tuple[str, ...]
    profiles: tuple[Mapping[str, Range], ...]
    workspace_mb: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None  # read if it is there, written afterwards; `tensorrt` only


def build_engines(options: BuildOptions, command: str) -> Manifest:
    """Build every stage and write the manifest, whose `stages` hold what is known of each build.

    Raises EngineError for graphs that are missing, damaged or made for another runtime, ConfigError for what the target GPU cannot compute, the
    library refuses, or an `out` that may not be replaced.
    """
    source = _read_source(options)
    builder = library.choose(options.builder)
    capabilities = check_feasible(builder, options.compute_capability)
    for name, stage in source.stages.items():
        check_precisions(precisions_of(options.onnx / stage["file"]), capabilities, builder, name)
    profiles = prompt_profiles(source.shapes, options.max_text_tokens, one=builder == RTX)
    with whole_directory(options.out, options.overwrite) as directory:
        stages = {}
        for name, stage in source.stages.items():
            file = f"{name}.engine"
            settings = (options.workspace_mb, options.optimization_level, options.timing_cache)
            request = Request(options.onnx / stage["file"], directory / file, builder, capabilities, profiles, *settings)
            stages[name] = {**stage, "file": file, "source": stage["file"], "build": build_stage(request)}
        _take_tables(options.onnx / TABLES_NAME, directory / TABLES_NAME)
        version = library.version_of(library.load(builder))
        details = {
            "builder": builder,
            "builder_version": version,
            "compute_capability": list(capabilities),
            "profiles": [dict(profile) for profile in profiles],
            "workspace_mb": options.workspace_mb,
            "onnx": {"command": source.command, "versions": dict(source.versions), "details": dict(source.details)},
        }
        manifest = replace(
            source,
            kind=KIND,
            shapes={**source.shapes, "max_tokens": max(profile[TOKENS][2] for profile in profiles)},
            stages=stages,
            files=describe_files(directory),
            versions={**source.versions, builder: version},
            command=command,
            details=details,
            program="to_tensorrt.py",
            flags=options.flags(),
        )
        manifest.write(directory)
    return manifest


def _read_source(options: BuildOptions) -> Manifest:
    """The ONNX export, whole and meant for TensorRT."""
    remedy = "gr00t-fast export onnx --model_path=CHECKPOINT --data_config=CONFIG --precision=fp16 " + f"--out={options.onnx}"
    manifest = read_manifest(options.onnx, remedy)
    if manifest.kind != "onnx":
        raise EngineError(f"{options.onnx} holds an export of kind '{manifest.kind}', expected 'onnx'. Run: {remedy}")
    runtime = (manifest.quantisation or {}).get("runtime", KIND)
    if runtime != KIND:
        raise EngineError(
            f"the graphs in {options.onnx} are quantised for {runtime}, whose Q/DQ pattern TensorRT does not take. Run gr00t-fast quantise with "
            "--target=tensorrt."
        )
    digests = Digests(options.onnx)
    for name, entry in manifest.files.items():
        file = options.onnx / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or digests.of([file]) != [entry["sha256"]]:
            raise EngineError(f"{file} is missing, cut short or altered: it is not what the manifest beside it describes. Run: {remedy}")
    return manifest


def prompt_profiles(shapes: Mapping[str, Any], max_text_tokens: int | None, one: bool) -> tuple[dict[str, Range], ...]:
    """Ranges of the sizes that vary with the prompt: (shortest, the one to tune for, longest). The shortest prompt is the pictures' tokens and one
    more, or, where the graphs have the places of the pictures built in, two behind the last one.

    `one`: a single range tuned for the usual length. TensorRT-RTX compiles for each length when it first meets it, and further ranges only make the
    engine larger (demo network: 7.6 MB with one, 16.8 MB with three). `tensorrt` chooses its kernels now: one range per bucket, and they meet.
    Raises ConfigError when `max_text_tokens` is out of range.
    """
    images, exported = shapes["image_tokens"], shapes["max_tokens"]
    most = exported if max_text_tokens is None else images + max_text_tokens
    if not images < most <= exported:
        raise ConfigError(
            f"--max_text_tokens must be from 1 to {exported - images} (what was exported), got {max_text_tokens}. For longer prompts export again "
            "with a larger --max_text_tokens (gr00t-fast export onnx)."
        )
    least = shapes["image_spans"][-1][1] + 2 if shapes.get("image_spans") else images + 1
    usual = [length for length in sorted(set(shapes["prompt_buckets"])) if least <= length < most]
    if one:
        return (_ranges(shapes, (least, usual[0] if usual else most, most)),)
    edges = [*usual, most]
    starts = [least, *(edge + 1 for edge in edges[:-1])]
    return tuple(_ranges(shapes, (start, edge, edge)) for start, edge in zip(starts, edges, strict=True))


def _ranges(shapes: Mapping[str, Any], prompts: Range) -> dict[str, Range]:
    """Of each size that varies, for prompts of these lengths. shapes: as of the manifest."""
    names = (TOKENS, TEXT_TOKENS) if shapes.get("image_spans") else (TOKENS,)
    return {name: tuple(varying_sizes(shapes, length)[name] for length in prompts) for name in names}


def _take_tables(theirs: Path, ours: Path) -> None:
    """As a second name of the same file where the system allows: the embedding alone has 600 MB."""
    try:
        os.link(theirs, ours)
    except OSError:
        shutil.copyfile(theirs, ours)


def as_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per stage: layers of the network, size of the engine, seconds and peak memory of the build, and whether the library reads it back:
    "parsed" is as far as it goes without a CUDA driver. stages: as of the manifest."""
    lines = [f"{'stage':<14}{'layers':>8}{'MB':>8}{'parse s':>9}{'build s':>9}{'peak MB':>9}  read back"]
    for name, stage in stages.items():
        facts = stage["build"]
        peak = f"{facts['peak_memory_bytes'] / 1e6:.0f}"
        read_back = {True: "yes", False: "not on this GPU", None: "parsed"}[facts["check"]["deserialised"]]
        numbers = f"{facts['layers']:>8}{facts['bytes'] / 1e6:>8.1f}{facts['parse_s']:>9.1f}{facts['build_s']:>9.1f}{peak:>9}"
        lines.append(f"{name:<14}{numbers}  {read_back}")
    return "\n".join(lines)


# --- a process of its own


def build_stage(request: Request) -> dict[str, Any]:
    """What is known of the engine that was built. Raises EngineError with the library's message, or what is known when its process died."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}% {elapsed} {postfix}"
    with tqdm(total=1.0, desc=request.onnx.stem, bar_format=form, leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(phase: str, done: float) -> None:
            bar.set_postfix_str(phase, refresh=False)
            bar.update(done - bar.n)

        return run_alone(build, request, tell=show)


def run_alone(work: Callable[..., Any], *arguments: Any, tell: Tell | None = None) -> Any:
    """`work(*arguments, tell=tell)` in a process of its own that ends with this one, as by Ctrl-C; without `tell`, `work(*arguments)`.

    Raises the Gr00tFastError that `work` raises, and EngineError when the process ends in another way.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_alone, args=(there, work, arguments, tell is not None), daemon=True)
    child.start()
    there.close()
    try:
        while True:
            kind, value = here.recv()
            if kind == "answer":
                return value
            if kind == "error":
                raise value
            tell(*value)
    except EOFError:
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        memory = " Probably the system ran out of memory: close other programs, or use a machine with more." if killed else ""
        raise EngineError(f"the process that was to {work.__name__} {arguments[0]} ended with code {child.exitcode}.{memory}") from None
    finally:
        child.kill()
        child.join()


def _alone(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], tells: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def tell(phase: str, done: float) -> None:
        with lock:  # the builder has threads
            pipe.send(("phase", (phase, done)))

    try:
        answer = work(*arguments, tell=tell) if tells else work(*arguments)
    except Gr00tFastError as error:
        pipe.send(("error", error))
    else:
        pipe.send(("answer", answer))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def build(request: Request, tell: Tell) -> dict[str, Any]:
    """Parse, build, write, check. Raises EngineError with the library's message when a step fails."""
    trt = library.load(request.builder)
    log = library.make_log(trt)
    start_s = time.perf_counter()
    tell("parsing", 0.0)
    builder = trt.Builder(log)
    network = builder.create_network(library.strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # kept: the network refers to weights that the parser owns
    _parse(parser, request.onnx)
    parsed_s = time.perf_counter()
    config = _configure(trt, builder, network, request, tell)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.builder} {trt.__version__} cannot build {request.onnx.name}: {log.first_error()}")
    built_s = time.perf_counter()
    request.engine.write_bytes(memoryview(plan))  # straight from the library's memory
    _save_timing_cache(config, request)
    tell("checking", 1.0)
    return {
        "layers": network.num_layers,
        "bytes": plan.nbytes,
        "parse_s": round(parsed_s - start_s, 2),
        "build_s": round(built_s - parsed_s, 2),
        "inputs": _tensors(network, "input"),
        "outputs": _tensors(network, "output"),
        "warnings": sorted({message for severity, message in log.lines if severity == "WARNING"}),
        "check": check_plan(trt, plan),
        "peak_memory_bytes": peak_rss_bytes(),
        "version": library.version_of(trt),
    }


def _parse(parser: Any, onnx_file: Path) -> None:
    """From the file, so that the parser finds the weights beside it and reads them without a second copy."""
    if parser.parse_from_file(str(onnx_file)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [f"node '{e.node_name() or e.node()}' ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors[:3]]
    raise EngineError(f"cannot read {onnx_file.name}: {'; '.join(told) or 'the parser gave no reason'}")


def _configure(trt: ModuleType, builder: Any, network: Any, request: Request, tell: Tell) -> Any:
    config = builder.create_builder_config()
    if request.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb << 20)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:  # TensorRT-RTX: no allocation at run time, without which a CUDA graph cannot be captured
        config.set_flag(flag)
    _set_capabilities(trt, config, request)
    _set_profiles(builder, config, network, request)
    _load_timing_cache(config, request)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, tell)
    return config


def _set_capabilities(trt: ModuleType, config: Any, request: Request) -> None:
    if request.builder == RTX:
        config.num_compute_capabilities = len(request.capabilities)  # none: any GPU from Ampere on
        for index, capability in enumerate(request.capabilities):
            config.set_compute_capability(rtx_capabilities(trt)[capability], index)
    elif not request.capabilities:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _set_profiles(builder: Any, config: Any, network: Any, request: Request) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if all(-1 not in tuple(tensor.shape) for tensor in inputs):
        return
    for ranges in request.profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = [tuple(_extent(tensor, axis, ranges)[which] for axis in range(len(tensor.shape))) for which in range(3)]
            profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{request.builder} refuses the profile {dict(ranges)} of {request.onnx.name}")


def _extent(tensor: Any, axis: int, ranges: Mapping[str, Range]) -> Range:
    size = tensor.shape[axis]
    if size >= 0:
        return (size, size, size)
    name = tensor.get_dimension_name(axis)
    if name not in ranges:
        raise EngineError(
            f"input '{tensor.name}' varies along axis {axis} ('{name}'), for which no range is known ({', '.join(ranges) or 'none'}). "
            "Export the graphs again with gr00t-fast export onnx."
        )
    return ranges[name]


def _load_timing_cache(config: Any, request: Request) -> None:
    """Measured kernel times from earlier builds. TensorRT-RTX measures nothing ahead of time, so there it is left out."""
    if request.timing_cache is None or request.builder == RTX:
        return
    file = request.timing_cache
    config.set_timing_cache(config.create_timing_cache(file.read_bytes() if file.exists() else b""), ignore_mismatch=False)


def _save_timing_cache(config: Any, request: Request) -> None:
    if request.timing_cache is None or request.builder == RTX:
        return
    file = request.timing_cache
    with atomic_write(file) as partial:
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _tensors(network: Any, kind: str) -> dict[str, dict[str, Any]]:
    tensors = [getattr(network, f"get_{kind}")(index) for index in range(getattr(network, f"num_{kind}s"))]
    return {tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name} for tensor in tensors}


def check_plan(trt: ModuleType, plan: Any) -> dict[str, Any]:
    """Whether the library reads back what it wrote. Raises EngineError when it finds the plan malformed.

    Before its first CUDA call it checks the plan's tag, format version, size and table of sections: that much happens on any machine (`parsed`).
    `deserialised`: True; None where there is no CUDA driver to go on with; False with a `reason` where the plan is for another GPU than the one
    that is here.
    """
    log = library.make_log(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is not None:
        facts = {"device_memory_bytes": library.scratch_bytes(engine), "engine_layers": engine.num_layers}
        return {"parsed": True, "deserialised": True, "reason": None, **facts}
    here, reason = library.gpu_capability(), log.first_error()
    if "Serialization assertion" in reason or (here is None and "Cuda Runtime" not in reason):
        raise EngineError(f"{trt.__name__} does not recognise the engine it has just built: {reason}")
    if here is None:
        return {"parsed": True, "deserialised": None, "reason": "no CUDA driver here"}
    return {"parsed": True, "deserialised": False, "reason": f"on this GPU ({here}): {reason}"}


def _monitor(trt: ModuleType, tell: Tell) -> Any:
    """Names the innermost phase that the builder is in, and how far it is."""

    class Monitor(trt.IProgressMonitor):  # called from the builder's own threads
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            tell(phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            tell(phase, (step + 1) / max(self.steps.get(phase, 1), 1))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


# --- for which GPUs

ANY, AUTO = "any", "auto"
# Oldest compute capability with the arithmetic. fp32 is not listed: only Turing under TensorRT-RTX lacks its matrix products.
_OLDEST = {"bf16": ("8.0", "Ampere"), "fp8": ("8.9", "Ada and Hopper"), "int8": ("7.5", "Turing"), "fp4": ("10.0", "Blackwell")}
_FAMILIES = {"7.5": "Turing", "8.0": "A100", "8.6": "RTX 30", "8.7": "Jetson Orin", "8.9": "RTX 40", "9.0": "H100, H200", "10.0": "B200"}
_FAMILIES |= {"11.0": "Jetson Thor", "12.0": "RTX 50", "12.1": "GB10"}
_ONNX_TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}
_MATRIX_NODES = ("MatMul", "Gemm", "Conv", "Attention")


def check_feasible(builder: str, compute_capability: str, precision: str | None = None) -> tuple[str, ...]:
    """What can be refused before any graph is there; returns the compute capabilities, empty for any. Raises ConfigError, and MissingExtraError
    without the library."""
    name = library.choose(builder)
    capabilities = parse_capabilities(compute_capability, name)
    check_capabilities(library.load(name), name, capabilities)
    if precision is not None:
        check_precisions({precision}, capabilities, name, "all stages")
    return capabilities


def parse_capabilities(text: str, builder: str) -> tuple[str, ...]:
    """`8.6`, `8.6,8.9`, `any`, or `auto`: the GPU that is here, else `any`. Returns compute capabilities, empty for any. Raises ConfigError."""
    words = [word for word in re.split(r"[,\s]+", str(text).strip()) if word]
    if words == [AUTO]:
        here = gpu_capability()
        return () if here is None else (here,)
    if words == [ANY]:
        return ()
    capabilities = tuple(dict.fromkeys(_capability(word) for word in words))
    if not capabilities:
        raise ConfigError("--compute_capability is empty. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0.")
    if builder == STANDARD and len(capabilities) > 1:
        raise ConfigError(
            f"`tensorrt` builds for the GPU it runs on; got {', '.join(capabilities)}. Build on each machine with --compute_capability=auto, "
            "or name --builder=tensorrt_rtx for one engine for several RTX GPUs."
        )
    return capabilities


def _capability(word: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word.lower())
    if not match:
        raise ConfigError(f"--compute_capability: '{word}' is none. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0.")
    return f"{int(match[1])}.{match[2]}"


def describe(capabilities: Sequence[str]) -> str:
    named = (f"{each} ({_FAMILIES[each]})" if each in _FAMILIES else each for each in capabilities)
    return ", ".join(named) or f"any, {ANY_GPU} and newer"


def precisions_of(onnx_file: Path) -> set[str]:
    """Number formats a graph computes and stores in, among fp32, fp16, bf16, int8, fp8, fp4; its weights are not read.

    fp32 counts only where it enters a matrix product: norms in fp32 are no hindrance.
    """
    onnx = require("onnx", "export")
    graph = onnx.load(str(onnx_file), load_external_data=False).graph
    names = {code: name for name, code in onnx.TensorProto.DataType.items()}
    types = {tensor.name: names[tensor.data_type] for tensor in graph.initializer}
    types |= {value.name: names[value.type.tensor_type.elem_type] for value in (*graph.input, *graph.output, *graph.value_info)}
    found = {_ONNX_TYPES[kind] for kind in types.values() if kind in _ONNX_TYPES} - {"fp32"}
    in_products = {types.get(name) for node in graph.node if node.op_type in _MATRIX_NODES for name in node.input}
    return found | ({"fp32"} if "FLOAT" in in_products else set())


def check_capabilities(trt: ModuleType, builder: str, capabilities: Sequence[str]) -> None:
    """Raises ConfigError for a GPU the library cannot build for, naming the one that can."""
    if builder == RTX:
        known = rtx_capabilities(trt)
        foreign = [capability for capability in capabilities if capability not in known]
        if foreign:
            raise ConfigError(
                f"tensorrt_rtx {trt.__version__} builds for compute capability {', '.join(known)}; got {describe(foreign)}. For that GPU use "
                f"--builder=tensorrt on the machine that has it (Jetson: part of JetPack; data centre: {install_command('tensorrt')})."
            )
        return
    here = gpu_capability()
    if here is None:
        raise ConfigError(
            "`tensorrt` measures kernels on the GPU it builds for, and this machine has no CUDA GPU. Build on the machine that will run the engine; "
            "for an RTX GPU, --builder=tensorrt_rtx builds without one."
        )
    if capabilities and capabilities[0] != here:
        raise ConfigError(f"`tensorrt` builds for the GPU it runs on: this one is {describe([here])}, asked for was {describe(capabilities)}.")


def rtx_capabilities(trt: ModuleType) -> dict[str, Any]:
    """`8.6` -> the library's own name for it, for every GPU generation this version of tensorrt_rtx knows."""
    members: Mapping[str, Any] = trt.ComputeCapability.__members__
    return {f"{int(name[2:-1])}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}


def check_precisions(precisions: Collection[str], capabilities: Sequence[str], builder: str, stage: str) -> None:
    """Raises ConfigError when a target GPU is known not to compute in one of the graph's formats."""
    for precision in sorted(precisions):
        for capability in capabilities or (ANY_GPU,):
            reason = _why_not(precision, capability, builder)
            if reason:
                asked = f"compute capability {describe([capability])}" if capabilities else "any GPU (8.0 and newer)"
                remedy = _instead(precision, bool(capabilities))
                raise ConfigError(f"{stage}: the graph is in {precision}, which {asked} cannot compute: {reason}. {remedy}")


def _why_not(precision: str, capability: str, builder: str) -> str | None:
    if precision == "fp32" and builder == RTX and version_tuple(capability) < version_tuple("8.0"):
        return "TensorRT-RTX has no fp32 matrix products for Turing"
    if precision not in _OLDEST:
        return None
    oldest, family = _OLDEST[precision]
    return f"{precision} needs {oldest} or newer ({family})" if version_tuple(capability) < version_tuple(oldest) else None


def _instead(precision: str, named: bool) -> str:
    if precision not in ("fp8", "fp4"):
        return "Export it again with --precision=fp16 (gr00t-fast export onnx)."
    other = "use an INT8 variant (gr00t-fast quantise) or the 16-bit graphs (gr00t-fast export onnx)."
    return f"For those GPUs, {other}" if named else f"Name the GPUs, e.g. --compute_capability={_OLDEST[precision][0]},12.0, or {other}"
