"""From exported ONNX graphs to TensorRT engines, each stage built in a process of its own: the library keeps memory, and a build can only be killed.

    graphs + manifest.json (kind "onnx")  ->  *.engine + tables.safetensors + manifest.json (kind "tensorrt")

The directory appears when all of it is there. torch, which gr00t_fast.engine imports, is left out of the processes that build. What a GPU cannot
compute is refused before minutes are spent. Sources: the support matrices of TensorRT-RTX 1.x ("by default portable" to Ampere and later; Turing only
when named) and what the builder of 1.7.1 itself refuses: bf16, fp8 and fp32 matrix products on 7.5, fp8 below 8.9.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from gr00t_fast import tensorrt_library as library
from gr00t_fast.errors import ConfigError, EngineError, install_command
from gr00t_fast.export.options import BuildOptions, flags_given
from gr00t_fast.files import whole_directory
from gr00t_fast.measurement import peak_rss_bytes
from gr00t_fast.tensorrt_library import ANY_GPU, RTX, STANDARD, gpu_capability, version_tuple

if TYPE_CHECKING:
    from gr00t_fast.engine.manifest import Manifest

KIND = "tensorrt"  # of the manifest, whichever of the two libraries
T = TypeVar("T")
Range = tuple[int, int, int]  # least, usual and most of a dimension
Profiles = Sequence[Mapping[str, Range]]  # for each the range of each named dimension of the graph


def build_engines(onnx: Path, options: BuildOptions, command: str) -> Manifest:
    """Build every stage of the export in the directory `onnx` and write the manifest, whose `stages` hold what is known of each build.

    Raises EngineError for graphs that are missing, damaged or made for another runtime, ConfigError for what the target GPU cannot compute, the
    library refuses, or an `out` that may not be replaced.
    """
    from gr00t_fast.engine.exported import TABLES_NAME
    from gr00t_fast.engine.manifest import TOKENS, describe_files

    source = _read_source(onnx)
    builder = library.choose(options.builder)
    capabilities = check_feasible(builder, options.compute_capability, source.precision, (source.quantisation or {}).get("format"))
    profiles = prompt_profiles(source.shapes, options.max_text_tokens, one=builder == RTX)
    with whole_directory(options.out, options.overwrite) as directory:
        stages = {}
        for name, stage in source.stages.items():
            engine = directory / f"{name}.engine"
            built = run_alone(build, onnx / stage["file"], engine, builder, capabilities, profiles)
            stages[name] = {**stage, "file": engine.name, "source": stage["file"], "build": built}
        try:  # a second name of the same file where the system allows: the embedding alone has 600 MB
            os.link(onnx / TABLES_NAME, directory / TABLES_NAME)
        except OSError:
            shutil.copyfile(onnx / TABLES_NAME, directory / TABLES_NAME)
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
                "onnx": {"command": source.command, "versions": dict(source.versions), "details": dict(source.details)},
            },
            program="to_tensorrt.py",
            flags=(f"--onnx={onnx}", *flags_given(options, "builder", "compute_capability", "max_text_tokens")),
        )
        manifest.write(directory)
    return manifest


def _read_source(directory: Path) -> Manifest:
    """The ONNX export, whole and meant for TensorRT."""
    from gr00t_fast.engine.manifest import Digests, check_files, read_manifest

    remedy = f"gr00t-fast export onnx --model_path=CHECKPOINT --data_config=CONFIG --precision=fp16 --out={directory}"
    manifest = read_manifest(directory, remedy)
    runtime = (manifest.quantisation or {}).get("runtime", KIND)
    if (manifest.kind, runtime) != ("onnx", KIND):
        raise EngineError(
            f"{directory} holds an export of kind '{manifest.kind}' for {runtime}; expected ONNX graphs for TensorRT. Run: {remedy}, or for 8 bits "
            "gr00t-fast quantise --target=tensorrt."
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
    from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, varying_sizes

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


def as_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per stage: layers of the network, size of the engine, seconds and peak memory of the build, and whether the library reads it back.
    stages: as of the manifest."""
    lines = [f"{'stage':<14}{'layers':>8}{'MB':>8}{'parse s':>9}{'build s':>9}{'peak MB':>9}  read back"]
    for name, stage in stages.items():
        facts = stage["build"]
        times = f"{facts['parse_s']:>9.1f}{facts['build_s']:>9.1f}{facts['peak_memory_bytes'] / 1e6:>9.0f}"
        lines.append(f"{name:<14}{facts['layers']:>8}{facts['bytes'] / 1e6:>8.1f}{times}  {facts['read_back']}")
    return "\n".join(lines)


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
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build(onnx: Path, engine: Path, builder_name: str, capabilities: Sequence[str], profiles: Profiles) -> dict[str, Any]:
    """Parse the graph, build, write the file `engine`, check; returns what is known of it. Raises EngineError with the library's message when a step
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
    with _monitored(trt, config, onnx.stem):
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
        "inputs": _described(map(network.get_input, range(network.num_inputs))),
        "outputs": _described(map(network.get_output, range(network.num_outputs))),
        "warnings": sorted({message for severity, message in log.lines if severity == "WARNING"}),
        "read_back": read_back(trt, plan),
        "peak_memory_bytes": peak_rss_bytes(),
        "version": library.version_of(trt),
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
            self.steps[phase] = max(steps, 1)
            self.step_complete(phase, -1)

        def step_complete(self, phase: str, step: int) -> bool:
            bar.set_postfix_str(phase, refresh=False)
            bar.update((step + 1) / self.steps[phase] - bar.n)
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    form = "{desc}: {percentage:3.0f}% {elapsed} {postfix}"
    with tqdm(total=1.0, desc=name, bar_format=form, leave=False, disable=not sys.stderr.isatty()) as bar:
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = Monitor()
        yield


def _described(tensors: Iterator[Any]) -> dict[str, dict[str, Any]]:
    return {tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name} for tensor in tensors}


def read_back(trt: ModuleType, plan: Any) -> str:
    """Whether the library reads what it wrote: `yes`; `parsed`, where there is no CUDA driver to go on with; or why not, where the plan is for
    another GPU than the one that is here. Raises EngineError when it finds the plan malformed: it checks tag, format version, size and table of
    sections before its first CUDA call."""
    log = library.make_log(trt)
    runtime = trt.Runtime(log)
    if runtime.deserialize_cuda_engine(plan) is not None:
        return "yes"
    here, reason = gpu_capability(), log.first_error()
    if "Serialization assertion" in reason or (here is None and "Cuda Runtime" not in reason):
        raise EngineError(f"{trt.__name__} does not recognise the engine it has just built: {reason}")
    return "parsed" if here is None else f"not on this GPU ({here}): {reason}"


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
    words = re.split(r"[,\s]+", text.strip().lower())
    if words in (["auto"], ["any"]):
        here = gpu_capability() if words == ["auto"] else None
        return () if here is None else (here,)
    matches = [re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word) for word in words]
    if not all(matches):
        raise ConfigError(
            f"--compute_capability: '{words[matches.index(None)]}' is none. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0."
        )
    return tuple(dict.fromkeys(f"{int(match[1])}.{match[2]}" for match in matches if match))


def rtx_capabilities(trt: ModuleType) -> dict[str, Any]:
    """`8.6` -> the library's own name for it, for every GPU generation this version of tensorrt_rtx knows."""
    members: Mapping[str, Any] = trt.ComputeCapability.__members__
    return {f"{int(name[2:-1])}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}
