"""TensorRT at run time: an engine file in GPU memory, and what executes it at fixed shapes.

Only names that both `tensorrt_rtx` and `tensorrt` have are used without asking; what just one has is looked for on the object itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr00t_fast import tensorrt_library as library
from gr00t_fast.errors import EngineError

_DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}  # names in both libraries' DataType


class LoadedStage:
    """One deserialised engine: its weights are on the GPU. Contexts made from it share them."""

    def __init__(self, trt: ModuleType, file: Path, cache: Path, remedy: str) -> None:
        """cache: file for the kernels that TensorRT-RTX compiles on this machine. Raises EngineError when the library refuses `file`."""
        self.name, self._remedy, self._cache_file = file.stem, remedy, cache
        self._log = library.make_log(trt)
        self._runtime = trt.Runtime(self._log)  # kept: the engine must not outlive it
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot load {file}: {self._log.first_error()}. Run: {remedy}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.scratch_bytes = int(
            self._engine.device_memory_size_v2 if hasattr(self._engine, "device_memory_size_v2") else self._engine.device_memory_size
        )
        self._config, self._cache = self._runtime_config(trt)
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def _runtime_config(self, trt: ModuleType) -> tuple[Any, Any]:
        """TensorRT-RTX compiles its kernels here: for the exact shapes and before the call returns (a recording must not hold stand-ins), with what
        an earlier run compiled. Its own CUDA graphs stay off: they cannot lie inside ours."""
        if not hasattr(trt, "IRuntimeCache"):
            return None, None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        cache = config.create_runtime_cache()
        if self._cache_file.is_file():
            cache.deserialize(self._cache_file.read_bytes())  # one of another library or GPU is ignored: it costs only time
        config.set_runtime_cache(cache)
        return config, cache

    def new_context(self) -> Any:
        context = self._engine.create_execution_context(self._strategy if self._config is None else self._config)
        if context is None:
            raise EngineError(f"no execution context for {self.name}: {self._log.last_error()}. Free GPU memory, or run: {self._remedy}")
        return context

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
            if all(_within(shapes[name], least, most) for name, (least, _, most) in limits.items()):
                return index
        return None

    def check_dtypes(self, dtype: torch.dtype) -> None:
        """Raises EngineError when an input or output has another number format: its bytes would be taken for something else."""
        for name in (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)):
            found = self._engine.get_tensor_dtype(name).name
            if found != _DTYPES[dtype]:
                raise EngineError(f"{self.name}: '{name}' is {found}, expected {_DTYPES[dtype]}. Run: {self._remedy}")

    def save_cache(self) -> None:
        """Keep what was compiled for the next start. An engine directory that cannot be written stays without."""
        if self._cache is None:
            return
        part = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            part.write_bytes(memoryview(self._cache.serialize()))
            part.replace(self._cache_file)

    def last_error(self) -> str:
        return self._log.last_error()


def _within(shape: tuple[int, ...], least: Any, most: Any) -> bool:
    return all(low <= size <= high for low, size, high in zip(tuple(least), shape, tuple(most), strict=True))


class StageExecution:
    """One execution context at fixed shapes. A recorded graph keeps using its memory, so each recording has contexts of its own."""

    def __init__(self, stage: LoadedStage, shapes: Mapping[str, tuple[int, ...]], scratch: Tensor, stream: torch.cuda.Stream) -> None:
        """scratch: uint8, at least `stage.scratch_bytes`; contexts that never run at the same time share it. Raises EngineError for other shapes than
        the engine was built for."""
        self._stage, self._context, self._stream = stage, stage.new_context(), stream
        profile = stage.profile_for(shapes)
        if profile is None or not self._context.set_optimization_profile_async(profile, stream.cuda_stream):
            sizes = ", ".join(f"{name} {shapes[name]}" for name in stage.inputs)
            raise EngineError(f"{stage.name} was not built for {sizes}. Run with a larger --max_text_tokens: {stage._remedy}")
        for name in stage.inputs:
            self._context.set_input_shape(name, shapes[name])
        unknown = self._context.infer_shapes()
        if unknown:
            raise EngineError(f"{stage.name}: the shapes of {', '.join(unknown)} do not follow from its inputs. Run: {stage._remedy}")
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def enqueue(self, tensors: Mapping[str, Tensor]) -> None:
        """Submit to the stream; returns at once."""
        for name, tensor in tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"{self._stage.name} could not be started on the GPU: {self._stage.last_error()}")

    @property
    def capturable(self) -> bool:
        """Whether it may be recorded in a CUDA graph: TensorRT-RTX says so, TensorRT always may once it has run at these shapes."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._stream.cuda_stream))
