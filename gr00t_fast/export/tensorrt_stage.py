"""Builds one TensorRT engine from one ONNX file, in a process of its own: the library keeps memory, and a build can only be killed whole.

    python -m gr00t_fast.export.tensorrt_stage < request.json

Reads a `Request` as one line of JSON from standard input and ends when that is closed, so that it never outlives its parent. Writes JSON lines to
standard output: {"phase", "done"} while it works, then {"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from gr00t_fast import tensorrt_library as library
from gr00t_fast.errors import EngineError, Gr00tFastError
from gr00t_fast.export.tensorrt_capability import rtx_capabilities
from gr00t_fast.files import atomic_write
from gr00t_fast.measurement import peak_rss_bytes

Range = tuple[int, int, int]  # least, usual and most of a dimension
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True)
class Request:
    """What to build. `profiles`: for each one the range of each named dimension of the graph."""

    onnx: str
    engine: str  # file to write
    builder: str
    capabilities: tuple[str, ...]
    profiles: tuple[Mapping[str, Range], ...]
    workspace_mb: int | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None  # read if it is there, written afterwards; `tensorrt` only

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        raw = json.loads(text)
        profiles = tuple({name: tuple(limits) for name, limits in profile.items()} for profile in raw.pop("profiles"))
        return cls(**{**raw, "capabilities": tuple(raw["capabilities"]), "profiles": profiles})


class Reporter:
    """Writes progress as JSON lines, at most a few a second."""

    def __init__(self) -> None:
        self._last_s, self._lock = 0.0, threading.Lock()

    def phase(self, name: str, done: float | None = None, now: bool = False) -> None:
        with self._lock:
            time_s = time.monotonic()
            if now or time_s - self._last_s >= _REPORT_EVERY_S:
                self._last_s = time_s
                _write({"phase": name, "done": done})


def _write(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def build(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Parse, build, write, check. Raises EngineError with the library's message when a step fails."""
    trt = library.load(request.builder)
    log = library.make_log(trt)
    start_s = time.perf_counter()
    reporter.phase("parsing", now=True)
    builder = trt.Builder(log)
    network = builder.create_network(library.strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # kept: the network refers to weights that the parser owns
    _parse(parser, request.onnx)
    parsed_s = time.perf_counter()
    config = _configure(trt, builder, network, request, reporter)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.builder} {trt.__version__} cannot build {Path(request.onnx).name}: {log.first_error()}")
    built_s = time.perf_counter()
    reporter.phase("writing", now=True)
    digest = _write_plan(plan, Path(request.engine))
    _save_timing_cache(config, request)
    facts = {
        "layers": network.num_layers,
        "bytes": plan.nbytes,
        "sha256": digest,
        "parse_s": round(parsed_s - start_s, 2),
        "build_s": round(built_s - parsed_s, 2),
        "inputs": _tensors(network, "input"),
        "outputs": _tensors(network, "output"),
        "warnings": sorted({message for severity, message in log.lines if severity == "WARNING"}),
    }
    reporter.phase("checking", now=True)
    return {**facts, "check": check_plan(trt, plan), "peak_memory_bytes": peak_rss_bytes(), "version": library.version_of(trt)}


def _parse(parser: Any, onnx_file: str) -> None:
    """From the file, so that the parser finds the weights beside it and reads them without a second copy."""
    if parser.parse_from_file(onnx_file):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [f"node '{e.node_name() or e.node()}' ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors[:3]]
    raise EngineError(f"cannot read {Path(onnx_file).name}: {'; '.join(told) or 'the parser gave no reason'}")


def _configure(trt: ModuleType, builder: Any, network: Any, request: Request, reporter: Reporter) -> Any:
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
        config.progress_monitor = _monitor(trt, reporter)
    return config


def _set_capabilities(trt: ModuleType, config: Any, request: Request) -> None:
    if request.builder == library.RTX:
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
            raise EngineError(f"{request.builder} refuses the profile {dict(ranges)} of {Path(request.onnx).name}")


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
    if request.timing_cache is None or request.builder == library.RTX:
        return
    file = Path(request.timing_cache)
    config.set_timing_cache(config.create_timing_cache(file.read_bytes() if file.exists() else b""), ignore_mismatch=False)


def _save_timing_cache(config: Any, request: Request) -> None:
    if request.timing_cache is None or request.builder == library.RTX:
        return
    file = Path(request.timing_cache)
    with atomic_write(file) as partial:
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _write_plan(plan: Any, file: Path) -> str:
    """Straight from the library's memory; returns the SHA-256."""
    content = memoryview(plan)
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


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


def _monitor(trt: ModuleType, reporter: Reporter) -> Any:
    """Names the innermost phase that the builder is in, and how far it is."""

    class Monitor(trt.IProgressMonitor):  # called from the builder's own threads
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            reporter.phase(phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            reporter.phase(phase, (step + 1) / max(self.steps.get(phase, 1), 1))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _end_with_parent(engine: Path, finished: threading.Event) -> None:
    sys.stdin.read()  # blocks until the parent closes its end or dies
    if not finished.is_set():
        engine.unlink(missing_ok=True)
        os._exit(1)


def main() -> int:
    request, finished = Request.from_json(sys.stdin.readline()), threading.Event()
    threading.Thread(target=_end_with_parent, args=(Path(request.engine), finished), daemon=True).start()
    try:
        answer = {"result": build(request, Reporter())}
    except Gr00tFastError as error:
        answer = {"error": str(error)}
    finished.set()
    _write(answer)
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())


OnPhase = Callable[[str | None, float | None], None]  # name of the phase and the share of it that is done; (None, None) once a second
_ROOT = Path(__file__).resolve().parents[2]
BUILDER = (sys.executable, "-m", "gr00t_fast.export.tensorrt_stage")
_TAIL_CHARACTERS = 600
_KILL_AFTER_S = 5.0


def run_stage(request: Request, on_phase: OnPhase) -> dict[str, Any]:
    """Return the facts of the built engine. Raises EngineError with the library's message, or what is known when the process died.

    The child is in a session of its own: Ctrl-C reaches this process only, which then ends the child and leaves no half-written engine in place.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        child = subprocess.Popen(BUILDER, env=environment, text=True, start_new_session=True, **pipes)
        try:
            child.stdin.write(request.to_json() + "\n")
            child.stdin.flush()  # left open: the child ends when it is closed
            answer = _follow(child, on_phase)
        finally:
            _end(child)
        if answer is None:
            raise EngineError(_failure_of(Path(request.onnx).name, child.returncode, errors))
    if "error" in answer:
        raise EngineError(answer["error"])
    return answer["result"]


def _follow(child: subprocess.Popen, on_phase: OnPhase) -> dict[str, Any] | None:
    """Hand on phases until the answer comes; None when the child ends without one."""
    for line in _lines(child.stdout):
        try:
            message = json.loads(line) if line else {"phase": None, "done": None}
        except ValueError:
            continue  # something else printed by the library
        if "phase" not in message:
            return message
        on_phase(message["phase"], message["done"])
    return None


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines as they come, and an empty one for each second without any, so that the caller's clock goes on."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line


def _end(child: subprocess.Popen) -> None:
    child.stdin.close()
    try:
        child.wait(timeout=_KILL_AFTER_S if child.poll() is None else None)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _failure_of(graph: str, code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    tail = errors.read().decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
    memory = " Probably the system ran out of memory: close other programs, or build on a machine with more." if code in (-9, 137) else ""
    return f"building {graph} ended with code {code} and no result.{memory}{' It printed last: ' + tail if tail else ''}"
