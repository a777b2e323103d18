"""TensorRT engines behind the policy: a call per stage, each waited for, as with the exports for CPUs.

Files are checked before any of them is opened, so that an engine of other weights, cameras, GPU or TensorRT is refused with the command that makes
the right one.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError, EngineError, StaleEngineError
from gr00t_fast.base.files import atomic_write
from gr00t_fast.engine.eager import PRECISIONS, tell_new
from gr00t_fast.engine.exported import ExportedEngine, check_precision
from gr00t_fast.engine.manifest import STAGES, Manifest, Target, check_manifest, remedy_for
from gr00t_fast.engine.tensorrt_library import ANY_GPU, BUILDERS, load, make_log, version_tuple

log = logging.getLogger(__name__)
KIND = "tensorrt"
_ALIGNMENT_BYTES = 256  # of what the library reads and writes: whole allocations have it, a row of a table need not


class TensorRTEngine(ExportedEngine):
    """An Engine over the files of gr00t-fast export tensorrt. Not thread-safe, as its policy is not."""

    name = "tensorrt"

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check files, library and GPU, then load the engines onto the GPU.

        Raises EngineError and StaleEngineError for files that are not whole, not this checkpoint's, or not for this library or GPU;
        MissingExtraError without the library they were built with; ConfigError for a device or precision that they do not have.
        """
        remedy = remedy_for(directory, target, "to_tensorrt.py")
        manifest = check_manifest(directory, KIND, target, remedy)
        check_precision(manifest, precision, target.command("to_tensorrt.py", f"--out={directory}", f"--precision={precision}", "--overwrite"))
        check_details(manifest, directory, remedy)
        trt = load(manifest.details["builder"])
        check_version(manifest, trt.__version__, remedy)
        where = cuda_device(device)
        check_capability(manifest, "{}.{}".format(*torch.cuda.get_device_capability(where)), remedy)
        super().__init__(TensorRTStages(trt, directory, manifest, where, remedy), directory, manifest, remedy)
        self._lengths: set[int] = set()

    def embed(self, prompts: Sequence[Tensor], image_positions: Tensor, tokens: Tensor) -> Tensor:
        """As ExportedEngine's; says when a prompt has a length that was not met before, for which the library compiles."""
        if (length := len(prompts[0])) not in self._lengths:
            tell_new(log, self, f"{length} prompt tokens")
            self._lengths.add(length)
        return super().embed(prompts, image_positions, tokens)


class TensorRTStages:
    """The loaded engines on a stream of their own. A `Runtime`."""

    def __init__(self, trt: ModuleType, directory: Path, manifest: Manifest, device: torch.device, remedy: str) -> None:
        """Raises EngineError when the library refuses a file, or one has another number format than the manifest says."""
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # a CUDA context must be there before the library is asked what fits it
            self._stages = {name: LoadedStage(trt, name, directory, manifest, remedy) for name in STAGES}
            self._stream = torch.cuda.Stream(device)  # on the default one the library waits for the whole GPU, and warns of it

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        """As `Runtime.run_stage`; every output has memory of its own. Returns when the stage has run."""
        with torch.cuda.device(self.device):
            outputs = self._stages[stage].run(inputs, self._stream)
        return tuple(outputs[name] for name in wanted)


def check_details(manifest: Manifest, directory: Path, remedy: str) -> None:
    """Raises EngineError when the manifest does not say what built the engines and for which GPUs."""
    absent = [name for name in ("builder", "builder_version", "compute_capability") if name not in manifest.details]
    if absent or manifest.details["builder"] not in BUILDERS:
        raise EngineError(f"the manifest in {directory} is incomplete ({', '.join(absent) or 'unknown builder'}). Run: {remedy}")


def check_version(manifest: Manifest, version: str, remedy: str) -> None:
    """Engines belong to the exact version that built them. Raises StaleEngineError."""
    builder, built_by = manifest.details["builder"], manifest.details["builder_version"]
    if built_by != version:
        raise StaleEngineError(f"these engines were built by {builder} {built_by}, and {builder} {version} is installed. Run: {remedy}")


def check_capability(manifest: Manifest, here: str, remedy: str) -> None:
    """Raises StaleEngineError when the engines were built for other GPUs than the one that is here."""
    targets = manifest.details["compute_capability"]
    fits = here in targets if targets else version_tuple(here) >= version_tuple(ANY_GPU)
    if not fits:
        made_for = ", ".join(targets) or f"{ANY_GPU} and newer"
        raise StaleEngineError(
            f"these engines were built for compute capability {made_for}, and this GPU has {here}. Run, with --compute_capability={here}: {remedy}"
        )


def cuda_device(name: str) -> torch.device:
    """`auto` or `cuda` -> the current CUDA GPU. Raises EngineError without one, ConfigError for another kind of device."""
    if name != "auto" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ConfigError(f"the engine 'tensorrt' runs on CUDA GPUs, asked for was --device={name}. Use --device=cuda, or --engine=onnxruntime.")
    if not torch.cuda.is_available():
        raise EngineError(
            f"the engine 'tensorrt' needs a CUDA GPU, and torch {torch.__version__} sees none here (no GPU, no driver, or a torch without CUDA). "
            "Run it where there is one, or use --engine=onnxruntime with what gr00t-fast export onnx makes, or --engine=eager --device=cpu."
        )
    index = torch.device("cuda" if name == "auto" else name).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


_DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}  # names in both libraries' DataType


class LoadedStage:
    """One deserialised engine, whose weights are on the GPU, and what executes it."""

    def __init__(self, trt: ModuleType, name: str, directory: Path, manifest: Manifest, remedy: str) -> None:
        """Raises EngineError when the library refuses the file, or its inputs or outputs have another number format."""
        file, self.name, self._remedy, self._log = directory / manifest.stages[name]["file"], name, remedy, make_log(trt)
        self._cache_file = directory / f".{name}.{manifest.details['builder_version']}.kernels"  # that TensorRT-RTX compiles on this machine
        self._runtime = trt.Runtime(self._log)  # kept: the engine must not outlive it
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot load {file}: {self._log.first_error()}. Run: {remedy}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self._dtype = PRECISIONS[manifest.precision]
        self.check_dtypes(self._dtype)
        config, self._cache = self._runtime_config(trt)
        self._context = self._engine.create_execution_context() if config is None else self._engine.create_execution_context(config)
        if self._context is None:
            raise EngineError(f"no execution context for {self.name}: {self._log.last_error()}. Free GPU memory, or run: {remedy}")
        self._met: set[tuple[tuple[int, ...], ...]] = set()

    def _runtime_config(self, trt: ModuleType) -> tuple[Any, Any]:
        """TensorRT-RTX compiles its kernels here: for the exact shapes and before the call returns, so that warming up leaves nothing to be compiled
        beside the control loop, and with what an earlier run compiled."""
        if not hasattr(trt, "IRuntimeCache"):
            return None, None
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if self._cache_file.is_file():
            cache.deserialize(self._cache_file.read_bytes())  # one of another library or GPU is ignored: it costs only time
        config.set_runtime_cache(cache)
        return config, cache

    def run(self, inputs: Mapping[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Execute it on `stream`, after what the current one was given so far, and wait for it.

        Raises EngineError for other shapes than the engine was built for, and when it cannot be started.
        """
        given = {name: inputs[name] if inputs[name].data_ptr() % _ALIGNMENT_BYTES == 0 else inputs[name].clone() for name in self.inputs}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        self._set_shapes(shapes, stream)
        outputs = {name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype, device=stream.device) for name in self.outputs}
        for name, tensor in {**given, **outputs}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"{self.name} could not be started on the GPU: {self._log.last_error()}")
        stream.synchronize()
        if (met := tuple(shapes.values())) not in self._met:
            self._met.add(met)
            self.save_cache()
        return outputs

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream) -> None:
        profile = self.profile_for(shapes)
        if profile is None or not self._context.set_optimization_profile_async(profile, stream.cuda_stream):
            sizes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise EngineError(f"{self.name} was not built for {sizes}. Run with a larger --max_text_tokens: {self._remedy}")
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        if unknown := self._context.infer_shapes():
            raise EngineError(f"{self.name}: the shapes of {', '.join(unknown)} do not follow from its inputs. Run: {self._remedy}")

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The first optimisation profile whose limits hold `shapes`; None when there is none, or when a size that does not vary differs."""
        varying = []
        for name in self.inputs:
            built = tuple(self._engine.get_tensor_shape(name))
            if len(built) != len(shapes[name]) or any(size not in (-1, here) for size, here in zip(built, shapes[name], strict=True)):
                return None
            varying += [name] if -1 in built else []
        for index in range(self._engine.num_optimization_profiles):
            limits = {name: self._engine.get_tensor_profile_shape(name, index) for name in varying}
            bounds = [each for name, (least, _, most) in limits.items() for each in zip(least, shapes[name], most, strict=True)]
            if all(low <= size <= high for low, size, high in bounds):
                return index
        return None

    def check_dtypes(self, dtype: torch.dtype) -> None:
        """Raises EngineError when an input or output has another number format: its bytes would be taken for something else."""
        for name in (*self.inputs, *self.outputs):
            found = self._engine.get_tensor_dtype(name).name
            if found != _DTYPES[dtype]:
                raise EngineError(f"{self.name}: '{name}' is {found}, expected {_DTYPES[dtype]}. Run: {self._remedy}")

    def save_cache(self) -> None:
        """Keep what was compiled for the next start. An engine directory that cannot be written stays without."""
        if self._cache is None:
            return
        with contextlib.suppress(OSError), atomic_write(self._cache_file) as file:
            file.write_bytes(memoryview(self._cache.serialize()))
