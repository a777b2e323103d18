"""From exported ONNX graphs to TensorRT engines, each stage built in a process of its own: the library keeps memory, and a build can only be killed.

    graphs + manifest.json (kind "onnx")  ->  *.engine + tables.safetensors + manifest.json (kind "tensorrt")

The directory appears when all of it is there. torch, which gr00t_fast.engine imports, is left out of the processes that build. What a GPU cannot
compute is refused before minutes are spent. Sources: the support matrices of TensorRT-RTX 1.x ("by default portable" to Ampere and later; Turing only
when named) and what the builder of 1.7.1 itself refuses: bf16, fp8 and fp32 matrix products on 7.5, fp8 below 8.9.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.errors import ConfigError, EngineError, install_command
from gr00t_fast.base.files import check_free, whole_directory
from gr00t_fast.base.measurement import command_line, peak_rss_bytes
from gr00t_fast.engine import tensorrt_library as library
from gr00t_fast.engine.tensorrt_library import ANY_GPU, RTX, STANDARD, gpu_capability, version_tuple
from gr00t_fast.export import DEFAULT_PRECISION, BuildOptions, OnnxOptions, flags_given

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Manifest

KIND = "tensorrt"  # of the manifest, whichever of the two libraries
T = TypeVar("T")
Range = tuple[int, int, int]  # least, usual and most of a dimension
Profiles = Sequence[Mapping[str, Range]]  # for each the range of each named dimension of the graph


def build_checkpoint(options: BuildOptions) -> Manifest:
    """Check everything small, export the graphs where none are named, build. Raises Gr00tFastError."""
    from gr00t_fast.engine.manifest import check_manifest, remedy_for
    from gr00t_fast.export.onnx import export_checkpoint

    check_free(options.out, options.overwrite)
    check_feasible(options.builder, options.compute_capability, None if options.onnx else options.precision or DEFAULT_PRECISION)
    graphs = options.onnx or options.out.with_name(f"{options.out.name}-onnx")
    if options.onnx is None:
        run_alone(export_checkpoint, _of_graphs(options, graphs))  # the builder needs the memory that exporting leaves taken
    _, target = options.opened()
    source = check_manifest(graphs, "onnx", target, remedy_for(graphs, target, "to_onnx.py", f"--precision={DEFAULT_PRECISION}"))
    return build_engines(graphs, source, options, command_line())


def _of_graphs(options: BuildOptions, out: Path) -> OnnxOptions:
    """What exports the graphs: options that are not given keep its defaults."""
    names = {each.name for each in fields(BuildOptions)} & {each.name for each in fields(OnnxOptions)}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return OnnxOptions(**{**given, "out": out, "precision": options.precision or DEFAULT_PRECISION})


def build_engines(onnx: Path, source: Manifest, options: BuildOptions, command: str) -> Manifest:
    """Build every stage of the export in the directory `onnx`, whose checked manifest is `source`, and write the manifest of the engines; its
    `stages` hold what is known of each build.

    Raises EngineError for graphs of another runtime, ConfigError for what the target GPU cannot compute, the library refuses, or an `out` that may
    not be replaced.
    """
    from gr00t_fast.engine.exported import TABLES_NAME
    from gr00t_fast.engine.manifest import TOKENS, describe_files

    quantisation = source.quantisation or {}
    if (runtime := quantisation.get("runtime", KIND)) != KIND:
        raise EngineError(f"{onnx} holds 8-bit graphs for {runtime}. Make some for TensorRT with gr00t-fast quantise --target=tensorrt.")
    builder = library.choose(options.builder)
    capabilities = check_feasible(builder, options.compute_capability, source.precision, quantisation.get("format"))
    profiles = prompt_profiles(source.shapes, options.max_text_tokens, one=builder == RTX)
    with whole_directory(options.out, options.overwrite) as directory, progress_bar("building", len(source.stages)) as tick:
        stages = {}
        for name, stage in source.stages.items():
            engine = directory / f"{name}.engine"
            built = run_alone(build, onnx / stage["file"], engine, builder, capabilities, profiles)
            stages[name] = {**stage, "file": engine.name, "source": stage["file"], "build": built}
            tick()
        try:  # a second name of the same file where the system allows: the embedding alone has 600 MB
            os.link(onnx / TABLES_NAME, directory / TABLES_NAME)
        except OSError:
            shutil.copyfile(onnx / TABLES_NAME, directory / TABLES_NAME)
        version = str(library.load(builder).__version__)
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
                "onnx": {"command": source.command, "versions": dict(source.versions), "details": dict(source.details)},
            },
            program="to_tensorrt.py",
            flags=(f"--onnx={onnx}", *flags_given(options, "builder", "compute_capability", "max_text_tokens")),
        )
        manifest.write(directory)
    return manifest


def prompt_profiles(shapes: Mapping[str, Any], max_text_tokens: int | None, one: bool) -> tuple[dict[str, Range], ...]:
    """Ranges of the sizes that vary with the prompt: (shortest, the one to tune for, longest). The shortest prompt is the pictures' tokens and one
    more, or, where the graphs have the places of the pictures built in, two behind the last one (or before the first).

    `one`: a single range tuned for the usual length. TensorRT-RTX compiles for each length when it first meets it, and further ranges only make the
    engine larger (demo network: 7.6 MB with one, 16.8 MB with three). `tensorrt` chooses its kernels now: one range per bucket, and they meet.
    Raises ConfigError when `max_text_tokens` is out of range.
    """
    from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, least_tokens, varying_sizes

    images, exported, spans = shapes["image_tokens"], shapes["max_tokens"], shapes.get("image_spans")
    most = exported if max_text_tokens is None else images + max_text_tokens
    if not images < most <= exported:
        raise ConfigError(
            f"--max_text_tokens must be from 1 to {exported - images} (what was exported), got {max_text_tokens}. For longer prompts export again "
            "with a larger --max_text_tokens (gr00t-fast export onnx)."
        )
    least = least_tokens(spans, images)
    edges = [*(length for length in sorted(set(shapes["prompt_buckets"])) if least <= length < most), most]
    starts = [least, *(edge + 1 for edge in edges[:-1])]
    prompts = [(least, edges[0], most)] if one else [(start, edge, edge) for start, edge in zip(starts, edges, strict=True)]
    names = (TOKENS, TEXT_TOKENS) if spans else (TOKENS,)
    sizes = [[varying_sizes(shapes, length) for length in lengths] for lengths in prompts]
    return tuple({name: (low[name], usual[name], high[name]) for name in names} for low, usual, high in sizes)


# --- a process of its own


def run_alone(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a process of its own that ends with this one, as by Ctrl-C.

    Raises what `work` raises, and EngineError when the process was killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the process that was to {work.__name__} {arguments[0]} was killed. Probably the system ran out of memory: close other programs, or "
                "use a machine with more."
            ) from error
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()  # or leaving the pool would wait for it
            raise


def _end_with_parent() -> None:
    """What the process begins with. Ctrl-C reaches both: the parent ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build(onnx: Path, engine: Path, builder_name: str, capabilities: Sequence[str], profiles: Profiles) -> dict[str, Any]:
    """Parse the graph, build, write the file `engine`; returns what is known of it. Raises EngineError with the library's message when a step
    fails."""
    trt = library.load(builder_name)
    log = library.make_log(trt)
    start_s = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(library.strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # kept: the network refers to weights that the parser owns
    if not parser.parse_from_file(str(onnx)):  # from the file: the weights beside it are read without a second copy
        errors = [parser.get_error(index) for index in range(min(parser.num_errors, 3))]
        told = [f"node '{e.node_name() or e.node()}' ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors]
        raise EngineError(f"cannot read {onnx.name}: {'; '.join(told) or 'the parser gave no reason'}")
    parsed_s = time.perf_counter()
    config = _configure(trt, builder, capabilities)
    _set_profiles(builder, config, network, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{builder_name} {trt.__version__} cannot build {onnx.name}: {log.first_error()}")
    built_s = time.perf_counter()
    engine.write_bytes(memoryview(plan))  # straight from the library's memory
    return {
        "layers": network.num_layers,
        "bytes": plan.nbytes,
        "parse_s": round(parsed_s - start_s, 2),
        "build_s": round(built_s - parsed_s, 2),
        "warnings": sorted({message for severity, message in log.lines if severity == "WARNING"}),
        "peak_memory_bytes": peak_rss_bytes(),
        "version": str(trt.__version__),
    }


def _configure(trt: ModuleType, builder: Any, capabilities: Sequence[str]) -> Any:
    config = builder.create_builder_config()
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:  # TensorRT-RTX: no allocation at run time, without which a CUDA graph cannot be captured
        config.set_flag(flag)
    if trt.__name__ == RTX:
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
            sizes = [ranges[tensor.get_dimension_name(axis)] if size < 0 else (size,) * 3 for axis, size in enumerate(tensor.shape)]
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))  # least, usual and most of all axes
        config.add_optimization_profile(profile)


# --- for which GPUs

_OLDEST = {"bf16": "8.0", "fp8": "8.9", "int8": "7.5"}  # compute capability with the arithmetic: Ampere, Ada and Hopper, Turing
_OLDEST_RTX = {**_OLDEST, "fp32": "8.0"}  # without fp32 matrix products for Turing


def check_feasible(builder: str, compute_capability: str, *formats: str | None) -> tuple[str, ...]:
    """What can be refused before any graph is there; returns the compute capabilities, empty for any. formats: of the graphs' numbers, fp32, fp16,
    bf16, int8, fp8. Raises ConfigError, and MissingExtraError without the library."""
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
    for precision in filter(None, formats):
        oldest = (_OLDEST_RTX if name == RTX else _OLDEST).get(precision, "0")
        if any(version_tuple(each) < version_tuple(oldest) for each in capabilities or (ANY_GPU,)):
            raise ConfigError(
                f"{precision} needs compute capability {oldest} or newer, --compute_capability asks for {asked}. Name newer GPUs alone, as in "
                f"--compute_capability={oldest},12.0, or use other graphs (gr00t-fast export onnx --precision=fp16, gr00t-fast quantise for INT8)."
            )
    return capabilities


def _parse_capabilities(text: str) -> tuple[str, ...]:
    """`8.6`, `8.6,8.9`, `any`, or `auto`: the GPU that is here, else `any`. Returns compute capabilities, empty for any. Raises ConfigError."""
    if text in ("auto", "any"):
        here = gpu_capability() if text == "auto" else None
        return () if here is None else (here,)
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not re.fullmatch(r"\d+\.\d", word)]:
        raise ConfigError(f"--compute_capability: '{wrong[0]}' is none. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0.")
    return tuple(dict.fromkeys(words))


def rtx_capabilities(trt: ModuleType) -> dict[str, Any]:
    """`8.6` -> the library's own name for it, for every GPU generation this version of tensorrt_rtx knows."""
    members: Mapping[str, Any] = trt.ComputeCapability.__members__
    return {f"{int(name[2:-1])}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}
