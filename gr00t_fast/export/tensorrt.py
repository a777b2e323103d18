"""From exported ONNX graphs to TensorRT engines, each stage built in a process of its own: the library keeps memory, and a build can only be killed.

    graphs + manifest.json (kind "onnx")  ->  *.engine + tables.safetensors + manifest.json (kind "tensorrt")

The directory appears when all of it is there. What a GPU cannot compute is refused before minutes are spent. Sources: the support matrices of
TensorRT-RTX 1.x ("by default portable" to Ampere and later; Turing only when named) and what the builder of 1.7.1 itself refuses: bf16, fp8 and fp32
matrix products on 7.5, fp8 below 8.9.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from gr00t_fast import tensorrt_library as library
from gr00t_fast.engine.exported import TABLES_NAME
from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, Digests, Manifest, check_files, describe_files, read_manifest, varying_sizes
from gr00t_fast.errors import ConfigError, EngineError, Gr00tFastError, install_command, require
from gr00t_fast.export.options import BuildOptions
from gr00t_fast.files import atomic_write, whole_directory
from gr00t_fast.measurement import peak_rss_bytes
from gr00t_fast.tensorrt_library import ANY_GPU, RTX, STANDARD, gpu_capability, version_tuple

KIND = "tensorrt"  # of the manifest, whichever of the two libraries
Range = tuple[int, int, int]  # least, usual and most of a dimension
Profiles = Sequence[Mapping[str, Range]]  # for each the range of each named dimension of the graph
# Of the command that makes the same engines again.
_FLAGS = ("builder", "compute_capability", "max_text_tokens", "workspace_mb", "optimization_level", "timing_cache")


def build_engines(onnx: Path, options: BuildOptions, command: str) -> Manifest:
    """Build every stage of the export in the directory `onnx` and write the manifest, whose `stages` hold what is known of each build.

    Raises EngineError for graphs that are missing, damaged or made for another runtime, ConfigError for what the target GPU cannot compute, the
    library refuses, or an `out` that may not be replaced.
    """
    source = _read_source(onnx)
    builder = library.choose(options.builder)
    capabilities = check_feasible(builder, options.compute_capability)
    for name, stage in source.stages.items():
        check_precisions(precisions_of(onnx / stage["file"]), capabilities, builder, name)
    profiles = prompt_profiles(source.shapes, options.max_text_tokens, one=builder == RTX)
    with whole_directory(options.out, options.overwrite) as directory:
        stages = {}
        for name, stage in source.stages.items():
            engine = directory / f"{name}.engine"
            built = run_alone(build, onnx / stage["file"], engine, builder, capabilities, profiles, options)
            stages[name] = {**stage, "file": engine.name, "source": stage["file"], "build": built}
        _take_tables(onnx / TABLES_NAME, directory / TABLES_NAME)
        version = library.version_of(library.load(builder))
        manifest = replace(
            source,
            kind=KIND,
            shapes={**source.shapes, "max_tokens": max(profile[TOKENS][2] for profile in profiles)},
            stages=stages,
            files=describe_files(directory),
            versions={**source.versions, builder: version},
            command=command,
            details={
                "builder": builder,
                "builder_version": version,
                "compute_capability": list(capabilities),
                "profiles": [dict(profile) for profile in profiles],
                "workspace_mb": options.workspace_mb,
                "onnx": {"command": source.command, "versions": dict(source.versions), "details": dict(source.details)},
            },
            program="to_tensorrt.py",
            flags=(f"--onnx={onnx}", *(f"--{name}={value}" for name in _FLAGS if (value := getattr(options, name)) not in (None, "auto"))),
        )
        manifest.write(directory)
    return manifest


def _read_source(directory: Path) -> Manifest:
    """The ONNX export, whole and meant for TensorRT."""
    remedy = f"gr00t-fast export onnx --model_path=CHECKPOINT --data_config=CONFIG --precision=fp16 --out={directory}"
    manifest = read_manifest(directory, remedy)
    if manifest.kind != "onnx":
        raise EngineError(f"{directory} holds an export of kind '{manifest.kind}', expected 'onnx'. Run: {remedy}")
    runtime = (manifest.quantisation or {}).get("runtime", KIND)
    if runtime != KIND:
        raise EngineError(
            f"the graphs in {directory} are quantised for {runtime}, whose Q/DQ pattern TensorRT does not take. Run gr00t-fast quantise with "
            "--target=tensorrt."
        )
    check_files(directory, manifest, Digests(directory), remedy)
    return manifest


def prompt_profiles(shapes: Mapping[str, Any], max_text_tokens: int | None, one: bool) -> tuple[dict[str, Range], ...]:
    """Ranges of the sizes that vary with the prompt: (shortest, the one to tune for, longest). The shortest prompt is the pictures' tokens and one
    more, or, where the graphs have the places of the pictures built in, two behind the last one.

    `one`: a single range tuned for the usual length. TensorRT-RTX compiles for each length when it first meets it, and further ranges only make the
    engine larger (demo network: 7.6 MB with one, 16.8 MB with three). `tensorrt` chooses its kernels now: one range per bucket, and they meet.
    Raises ConfigError when `max_text_tokens` is out of range.
    """
    images, exported, spans = shapes["image_tokens"], shapes["max_tokens"], shapes.get("image_spans")
    most = exported if max_text_tokens is None else images + max_text_tokens
    if not images < most <= exported:
        raise ConfigError(
            f"--max_text_tokens must be from 1 to {exported - images} (what was exported), got {max_text_tokens}. For longer prompts export again "
            "with a larger --max_text_tokens (gr00t-fast export onnx)."
        )
    least = spans[-1][1] + 2 if spans else images + 1
    edges = [*(length for length in sorted(set(shapes["prompt_buckets"])) if least <= length < most), most]
    starts = [least, *(edge + 1 for edge in edges[:-1])]
    prompts = [(least, edges[0], most)] if one else [(start, edge, edge) for start, edge in zip(starts, edges, strict=True)]
    names = (TOKENS, TEXT_TOKENS) if spans else (TOKENS,)
    return tuple({name: tuple(varying_sizes(shapes, length)[name] for length in lengths) for name in names} for lengths in prompts)


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
        read_back = {True: "yes", False: "not on this GPU", None: "parsed"}[facts["check"]["deserialised"]]
        times = f"{facts['parse_s']:>9.1f}{facts['build_s']:>9.1f}{facts['peak_memory_bytes'] / 1e6:>9.0f}"
        lines.append(f"{name:<14}{facts['layers']:>8}{facts['bytes'] / 1e6:>8.1f}{times}  {read_back}")
    return "\n".join(lines)


# --- a process of its own


def run_alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in a process of its own that ends with this one, as by Ctrl-C.

    Raises the Gr00tFastError that `work` raises, and EngineError when the process ends in another way.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_alone, args=(there, work, arguments), daemon=True)
    child.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        memory = " Probably the system ran out of memory: close other programs, or use a machine with more." if killed else ""
        raise EngineError(f"the process that was to {work.__name__} {arguments[0]} ended with code {child.exitcode}.{memory}") from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, Gr00tFastError):
        raise answer
    return answer


def _alone(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = work(*arguments)
    except Gr00tFastError as error:
        answer = error
    pipe.send(answer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def build(onnx: Path, engine: Path, builder_name: str, capabilities: Sequence[str], profiles: Profiles, options: BuildOptions) -> dict[str, Any]:
    """Parse the graph, build, write the file `engine`, check; returns what is known of it. Raises EngineError with the library's message when a step
    fails."""
    trt = library.load(builder_name)
    log = library.make_log(trt)
    start_s = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(library.strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # kept: the network refers to weights that the parser owns
    _parse(parser, onnx)
    parsed_s = time.perf_counter()
    config = _configure(trt, builder, options, capabilities)
    _set_profiles(builder, config, network, profiles)
    with _monitored(trt, config, onnx.stem):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{builder_name} {trt.__version__} cannot build {onnx.name}: {log.first_error()}")
    built_s = time.perf_counter()
    engine.write_bytes(memoryview(plan))  # straight from the library's memory
    if options.timing_cache is not None and builder_name != RTX:
        with atomic_write(options.timing_cache) as partial:
            partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {
        "layers": network.num_layers,
        "bytes": plan.nbytes,
        "parse_s": round(parsed_s - start_s, 2),
        "build_s": round(built_s - parsed_s, 2),
        "inputs": _described(map(network.get_input, range(network.num_inputs))),
        "outputs": _described(map(network.get_output, range(network.num_outputs))),
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


def _configure(trt: ModuleType, builder: Any, options: BuildOptions, capabilities: Sequence[str]) -> Any:
    config, is_rtx = builder.create_builder_config(), trt.__name__ == RTX
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.timing_cache is not None and not is_rtx:  # TensorRT-RTX measures nothing ahead of time
        file = options.timing_cache
        config.set_timing_cache(config.create_timing_cache(file.read_bytes() if file.exists() else b""), ignore_mismatch=False)
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:  # TensorRT-RTX: no allocation at run time, without which a CUDA graph cannot be captured
        config.set_flag(flag)
    if is_rtx:
        config.num_compute_capabilities = len(capabilities)  # none: any GPU from Ampere on
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(rtx_capabilities(trt)[capability], index)
    elif not capabilities:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _set_profiles(builder: Any, config: Any, network: Any, profiles: Profiles) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if all(-1 not in tuple(tensor.shape) for tensor in inputs):
        return
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            sizes = [_extent(tensor, axis, ranges) for axis in range(len(tensor.shape))]
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))  # least, usual and most of all axes
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"the builder refuses the profile {dict(ranges)} of {network.name or 'the graph'}")


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


@contextlib.contextmanager
def _monitored(trt: ModuleType, config: Any, name: str) -> Iterator[None]:
    """A bar on the terminal: the innermost phase that the builder is in, and how far that is."""
    from tqdm import tqdm

    class Monitor(trt.IProgressMonitor):  # called from the builder's own threads; the base class exists only once the library is loaded
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            self.step_complete(phase, -1)

        def step_complete(self, phase: str, step: int) -> bool:
            bar.set_postfix_str(phase, refresh=False)
            bar.update((step + 1) / max(self.steps.get(phase, 1), 1) - bar.n)
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    form = "{desc}: {percentage:3.0f}% {elapsed} {postfix}"
    with tqdm(total=1.0, desc=name, bar_format=form, leave=False, disable=not sys.stderr.isatty()) as bar:
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = Monitor()
        yield


def _described(tensors: Iterator[Any]) -> dict[str, dict[str, Any]]:
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
    here, reason = gpu_capability(), log.first_error()
    if "Serialization assertion" in reason or (here is None and "Cuda Runtime" not in reason):
        raise EngineError(f"{trt.__name__} does not recognise the engine it has just built: {reason}")
    if here is None:
        return {"parsed": True, "deserialised": None, "reason": "no CUDA driver here"}
    return {"parsed": True, "deserialised": False, "reason": f"on this GPU ({here}): {reason}"}


# --- for which GPUs

# Oldest compute capability with the arithmetic. fp32 is not listed: only Turing under TensorRT-RTX lacks its matrix products.
_OLDEST = {"bf16": ("8.0", "Ampere"), "fp8": ("8.9", "Ada and Hopper"), "int8": ("7.5", "Turing"), "fp4": ("10.0", "Blackwell")}
_ONNX_TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}
_MATRIX_NODES = ("MatMul", "Gemm", "Conv", "Attention")
_EXPECTED = "Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0."


def check_feasible(builder: str, compute_capability: str, precision: str | None = None) -> tuple[str, ...]:
    """What can be refused before any graph is there; returns the compute capabilities, empty for any. Raises ConfigError, and MissingExtraError
    without the library."""
    name = library.choose(builder)
    capabilities = _parse_capabilities(compute_capability)
    here, asked = gpu_capability(), ", ".join(capabilities) or f"any, {ANY_GPU} and newer"
    if name == STANDARD and (here is None or (capabilities and capabilities != (here,))):
        raise ConfigError(
            f"`tensorrt` builds for the GPU it runs on: this machine has {here or 'none'}, --compute_capability asks for {asked}. Build on the "
            "machine that will run the engine; for RTX GPUs, --builder=tensorrt_rtx builds without one, and for several at once."
        )
    trt = library.load(name)
    if name == RTX and (foreign := [each for each in capabilities if each not in rtx_capabilities(trt)]):
        raise ConfigError(
            f"tensorrt_rtx {trt.__version__} builds for compute capability {', '.join(rtx_capabilities(trt))}; got {', '.join(foreign)}. For that "
            f"GPU use --builder=tensorrt on the machine that has it (Jetson: part of JetPack; data centre: {install_command('tensorrt')})."
        )
    if precision is not None:
        check_precisions({precision}, capabilities, name, "all stages")
    return capabilities


def _parse_capabilities(text: str) -> tuple[str, ...]:
    """`8.6`, `8.6,8.9`, `any`, or `auto`: the GPU that is here, else `any`. Returns compute capabilities, empty for any. Raises ConfigError."""
    words = re.split(r"[,\s]+", text.strip().lower())
    if words == ["auto"]:
        here = gpu_capability()
        return () if here is None else (here,)
    if words == ["any"]:
        return ()
    matches = [re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word) for word in words]
    if not all(matches):
        raise ConfigError(f"--compute_capability: '{words[matches.index(None)]}' is none. {_EXPECTED}")
    return tuple(dict.fromkeys(f"{int(match[1])}.{match[2]}" for match in matches if match))


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


def rtx_capabilities(trt: ModuleType) -> dict[str, Any]:
    """`8.6` -> the library's own name for it, for every GPU generation this version of tensorrt_rtx knows."""
    members: Mapping[str, Any] = trt.ComputeCapability.__members__
    return {f"{int(name[2:-1])}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}


def check_precisions(precisions: Collection[str], capabilities: Sequence[str], builder: str, stage: str) -> None:
    """Raises ConfigError when a target GPU is known not to compute in one of the graph's formats."""
    for precision in sorted(precisions):
        for capability in capabilities or (ANY_GPU,):
            if reason := _why_not(precision, capability, builder):
                asked = f"compute capability {capability}" if capabilities else f"any GPU ({ANY_GPU} and newer)"
                raise ConfigError(f"{stage}: the graph is in {precision}, which {asked} cannot compute: {reason}. {_instead(precision)}")


def _why_not(precision: str, capability: str, builder: str) -> str | None:
    if precision == "fp32":
        turing = builder == RTX and version_tuple(capability) < version_tuple("8.0")
        return "TensorRT-RTX has no fp32 matrix products for Turing" if turing else None
    oldest, family = _OLDEST.get(precision, ("0", ""))
    return f"{precision} needs {oldest} or newer ({family})" if version_tuple(capability) < version_tuple(oldest) else None


def _instead(precision: str) -> str:
    if precision not in ("fp8", "fp4"):
        return "Export it again with --precision=fp16 (gr00t-fast export onnx)."
    newer = f"Name newer GPUs alone, as in --compute_capability={_OLDEST[precision][0]},12.0"
    return f"{newer}, or use an INT8 variant (gr00t-fast quantise) or the 16-bit graphs (gr00t-fast export onnx)."
