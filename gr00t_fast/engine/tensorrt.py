"""TensorRT engines behind the policy: one stream, buffers that stay, and one CUDA graph from pixels to actions.

A graph is recorded once per prompt length and step count: vision, the placing of the image tokens, language and every denoising step, with no
synchronisation between them. Files are checked before any of them is opened, so that an engine of other weights, cameras, GPU or TensorRT is
refused with the command that makes the right one.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.engine.cuda_graph import CapturedGraph
from gr00t_fast.engine.eager import PRECISIONS, Continuation, Inputs, tell_new
from gr00t_fast.engine.exported import ExportedEngine, check_precision
from gr00t_fast.engine.manifest import STAGES, Manifest, Target, check_manifest, prompt_tokens_of, remedy_for, varying_sizes
from gr00t_fast.engine.tensorrt_library import ANY_GPU, BUILDERS, load, make_log, scratch_bytes, version_tuple
from gr00t_fast.errors import ConfigError, EngineError, StaleEngineError
from gr00t_fast.files import atomic_write
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import ModelInputs, StepTables

log = logging.getLogger(__name__)
KIND = "tensorrt"
_KEPT_RECORDINGS = 8  # prompt lengths and step counts in use by turns; each holds keys, values and features, some 60 MB


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
        with torch.cuda.device(where):
            torch.cuda.synchronize()  # a CUDA context must be there before the library is asked what fits it
            stages = {name: LoadedStage(trt, name, directory, manifest, remedy) for name in STAGES}
            runtime = TensorRTStages(stages, manifest, where)
        super().__init__(runtime, directory, manifest, remedy)
        self._stages = runtime
        self._embedding = self._tables.read().to(where)  # (vocabulary, width): prompts are looked up on the GPU
        self.recordings: OrderedDict[tuple[int, int], tuple[StageProgram, CapturedGraph]] = OrderedDict()

    @torch.inference_mode()
    def run(self, inputs: Inputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        """As `Engine.run`; timed as one stage, `graph`. A chunk that continues another one is made step by step, without the graph."""
        stream = self._stages.stream
        self._check_pictures(inputs)
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if continuation is not None:
                actions = super().run(inputs, noise, denoising_steps, timer, continuation)
            else:
                with timer.stage("graph"):
                    actions = torch.cat([self._run_one(inputs, noise, item, denoising_steps) for item in range(noise.shape[0])])
        torch.cuda.current_stream(self.device).wait_stream(stream)
        actions.record_stream(torch.cuda.current_stream(self.device))
        return actions

    def _run_one(self, inputs: ModelInputs, noise: Tensor, item: int, steps: int) -> Tensor:
        one, ids = slice(item, item + 1), self._prompt(inputs, item)
        program, graph = self._recording(len(ids), steps)
        program.fill(inputs.pixel_values[one], ids, inputs.image_positions, inputs.state[one], noise[one])
        graph.launch()
        return program.actions.clone()  # the next call writes the same memory

    def _prompt(self, inputs: ModelInputs, item: int) -> Tensor:
        """Stays where it is: without padding its length is known without asking the GPU."""
        if inputs.prompt_mask is None and inputs.input_ids.shape[1] <= self.manifest.shapes["max_tokens"]:
            return inputs.input_ids[item]
        return super()._prompt(inputs, item)

    def _embed(self, prompts: Sequence[Tensor], image_positions: Tensor, tokens: Tensor) -> Tensor:
        text = self._embedding[torch.stack([*prompts]).to(self.device, non_blocking=True)]  # (B, S, width)
        return text.index_copy_(1, image_positions, tokens)

    def _recording(self, prompt_tokens: int, steps: int) -> tuple[StageProgram, CapturedGraph]:
        """With the stages' stream current."""
        key = (prompt_tokens, steps)
        if key not in self.recordings:
            tell_new(log, self, f"{prompt_tokens} prompt tokens, {steps} denoising steps")
            self.recordings[key] = self._record(*key)
            self._stages.save_caches()
            if len(self.recordings) > _KEPT_RECORDINGS:
                self._stages.stream.synchronize()  # the oldest may still be running
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    def _record(self, prompt_tokens: int, steps: int) -> tuple[StageProgram, CapturedGraph]:
        """Contexts that the library declares unfit for a graph are started one by one, which is slower."""
        shapes = stage_shapes(self.manifest.stages, varying_sizes(self.manifest.shapes, prompt_tokens))
        program = StageProgram(shapes, self.manifest.shapes["image_tokens"], self.tables(steps), self._embedding)
        executions = self._stages.executions(shapes)

        def work() -> None:
            program.enqueue(lambda stage, tensors: executions[stage].enqueue(tensors))

        graph = CapturedGraph(work, self._stages.stream, capturable=lambda: all(execution.capturable for execution in executions.values()))
        if not graph.recorded:
            unfit = ", ".join(name for name, execution in executions.items() if not execution.capturable)
            log.warning("TensorRT cannot record %s in a CUDA graph: its kernels are started one by one, which is slower", unfit)
        return program, graph


class TensorRTStages:
    """The loaded engines, their stream and their scratch memory. A `Runtime`: it also runs single stages, unrecorded."""

    def __init__(self, stages: Mapping[str, LoadedStage], manifest: Manifest, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._stages, self._manifest, self._dtype = stages, manifest, PRECISIONS[manifest.precision]
        for stage in stages.values():
            stage.check_dtypes(self._dtype)
        # one for all: stages never overlap on one stream
        self._scratch = torch.empty(max(stage.scratch_bytes for stage in stages.values()), dtype=torch.uint8, device=device)
        self._single: tuple[int, dict[str, StageExecution]] | None = None

    def executions(self, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, StageExecution]:
        """New contexts at these shapes."""
        return {name: StageExecution(stage, shapes[name], self._scratch, self.stream) for name, stage in self._stages.items()}

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        """As `Runtime.run_stage`: on the stages' own stream, after what the current one was given so far and before what it gets next."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            outputs = self._run_stage(stage, inputs)
        caller.wait_stream(self.stream)
        for tensor in outputs.values():
            tensor.record_stream(caller)
        return tuple(outputs[name] for name in wanted)

    def _run_stage(self, stage: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        at_hand = self._single[0] if self._single else self._manifest.shapes["max_tokens"]  # vision has no prompt: any length will do
        executions, shapes = self._at(prompt_tokens_of(self._manifest.stages[stage], inputs, self._manifest.shapes) or at_hand)
        outputs = {name: torch.empty(shape, dtype=self._dtype, device=self.device) for name, shape in shapes[stage].items() if name not in inputs}
        executions[stage].enqueue({**inputs, **outputs})
        for tensor in inputs.values():
            tensor.record_stream(self.stream)
        return outputs

    def _at(self, prompt_tokens: int) -> tuple[dict[str, StageExecution], dict[str, dict[str, Shape]]]:
        """Contexts for single stages, of one prompt length at a time, and the shapes."""
        shapes = stage_shapes(self._manifest.stages, varying_sizes(self._manifest.shapes, prompt_tokens))
        if self._single is None or self._single[0] != prompt_tokens:
            self.stream.synchronize()  # the ones that are dropped may still be running
            self._single = (prompt_tokens, self.executions(shapes))
        return self._single[1], shapes

    def save_caches(self) -> None:
        for stage in self._stages.values():
            stage.save_cache()


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
    """One deserialised engine: its weights are on the GPU. Contexts made from it share them."""

    def __init__(self, trt: ModuleType, name: str, directory: Path, manifest: Manifest, remedy: str) -> None:
        """Raises EngineError when the library refuses the file."""
        file, self.name, self._remedy, self._log = directory / manifest.stages[name]["file"], name, remedy, make_log(trt)
        self._cache_file = directory / f".{name}.{manifest.details['builder_version']}.kernels"  # that TensorRT-RTX compiles on this machine
        self._runtime = trt.Runtime(self._log)  # kept: the engine must not outlive it
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot load {file}: {self._log.first_error()}. Run: {remedy}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.scratch_bytes = scratch_bytes(self._engine)
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
        with contextlib.suppress(OSError), atomic_write(self._cache_file) as file:
            file.write_bytes(memoryview(self._cache.serialize()))

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


Shape = tuple[int, ...]
RunStage = Callable[[str, Mapping[str, Tensor]], None]  # stage, tensor of each of its inputs and outputs


def stage_shapes(stages: Mapping[str, Mapping[str, Any]], varying: Mapping[str, int]) -> dict[str, dict[str, Shape]]:
    """Stage -> the shape of each of its inputs and outputs, for prompts of one length, from `Manifest.stages`. varying: of `varying_sizes`."""
    return {
        stage: {name: tuple(varying[size] if isinstance(size, str) else int(size) for size in shape) for name, shape in (*_items(entry),)}
        for stage, entry in stages.items()
    }


def _items(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [*entry["inputs"].items(), *entry["outputs"].items()]


class StageProgram:
    """One inference at one prompt length and step count: `fill`, `enqueue`, then read `actions`."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Shape]], image_tokens: int, tables: StepTables, embedding: Tensor) -> None:
        """shapes: of `stage_shapes`. tables, embedding (vocabulary, width): on the device and in the number format of the stages.

        One buffer per tensor name: what one stage writes, the next reads.
        """
        self._embedding, device, dtype = embedding, embedding.device, embedding.dtype
        self._shapes = shapes
        self.buffers = {name: torch.zeros(shape, dtype=dtype, device=device) for each in shapes.values() for name, shape in each.items()}
        self._ids = torch.zeros(self.buffers["embeddings"].shape[1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(image_tokens, dtype=torch.int64, device=device)
        # each row a tensor of its own: libraries want the alignment of whole allocations
        self._steps = [(tau.clone(), modulation.clone()) for tau, modulation in zip(tables.tau, tables.modulation, strict=True)]
        self.buffers["step_size"].fill_(1.0 / tables.steps)
        # the last step's output lies in either of two buffers, by turns
        self.actions = self.buffers["next_actions" if tables.steps % 2 else "actions"]

    def fill(self, pixel_values: Tensor, input_ids: Tensor, image_positions: Tensor, state: Tensor, noise: Tensor) -> None:
        """pixel_values (1, C, 3, h, w), input_ids (S,), image_positions (V,), state (1, state_dim), noise (1, H, A)."""
        self.buffers["pixel_values"].copy_(pixel_values, non_blocking=True)
        self._ids.copy_(input_ids, non_blocking=True)
        self._positions.copy_(image_positions, non_blocking=True)
        self.buffers["state"].copy_(state, non_blocking=True)
        self.buffers["actions"].copy_(noise, non_blocking=True)

    def enqueue(self, run_stage: RunStage) -> None:
        """Submit the inference: vision, the prompt's rows of the embedding with the image tokens in their places, language, every denoising step."""
        buffers = self.buffers
        run_stage("vision", self._of("vision"))
        torch.index_select(self._embedding, 0, self._ids, out=buffers["embeddings"][0])  # (S, width)
        buffers["embeddings"].index_copy_(1, self._positions, buffers["tokens"])
        run_stage("language", self._of("language"))
        now, later = buffers["actions"], buffers["next_actions"]
        for tau, modulation in self._steps:
            step = {"tau": tau, "modulation": modulation, "actions": now, "next_actions": later}
            run_stage("denoise_step", {**self._of("denoise_step"), **step})
            now, later = later, now

    def _of(self, stage: str) -> dict[str, Tensor]:
        return {name: self.buffers[name] for name in self._shapes[stage]}
