"""TensorRT engines behind the policy: one stream, buffers that stay, and one CUDA graph from pixels to actions.

A graph is recorded once per prompt length and step count: vision, the placing of the image tokens, language and every denoising step, with no
synchronisation between them. Files are checked before any of them is opened, so that an engine of other weights, cameras, GPU or TensorRT is
refused with the command that makes the right one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gr00t_fast import tensorrt_library as library
from gr00t_fast.checkpoint.tensor_file import TensorFile
from gr00t_fast.engine.base import tell_new
from gr00t_fast.engine.capture import CapturedGraph
from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.exported import STAGES, ExportedEngine, check_precision
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, remedy_for
from gr00t_fast.engine.select import PRECISIONS
from gr00t_fast.engine.stage_program import Shape, StageProgram, stage_shapes
from gr00t_fast.engine.tables import EMBEDDING, TABLES_NAME
from gr00t_fast.engine.tensorrt_runtime import LoadedStage, StageExecution
from gr00t_fast.errors import ConfigError, EngineError, StaleEngineError
from gr00t_fast.model import ModelInputs
from gr00t_fast.timing import StageTimer

log = logging.getLogger(__name__)
KIND = "tensorrt"
_KEPT_RECORDINGS = 8  # prompt lengths and step counts in use by turns; each holds keys, values and features, some 60 MB
_OLDEST = "8.0"  # of engines built for any GPU


class TensorRTEngine(ExportedEngine):
    """An Engine over the files of export/to_tensorrt.py. Not thread-safe, as its policy is not."""

    name = "tensorrt"

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check files, library and GPU, then load the engines onto the GPU.

        Raises EngineError and StaleEngineError for files that are not whole, not this checkpoint's, or not for this library or GPU;
        MissingExtraError without the library they were built with; ConfigError for a device or precision that they do not have.
        """
        remedy = remedy_for(directory, target, "to_tensorrt.py")
        manifest = check_manifest(directory, KIND, target, remedy)
        check_precision(manifest, precision, target.command("to_tensorrt.py", f"--out={directory}", f"--precision={precision}"))
        check_details(manifest, directory, remedy)
        trt = library.load(manifest.details["builder"])
        check_version(manifest, library.version_of(trt), remedy)
        where = cuda_device(device)
        check_capability(manifest, "{}.{}".format(*torch.cuda.get_device_capability(where)), remedy)
        with torch.cuda.device(where):
            torch.cuda.synchronize()  # a CUDA context must be there before the library is asked what fits it
            stages = _load(trt, directory, manifest, remedy)
            runtime = TensorRTStages(stages, manifest, where)
        super().__init__(runtime, directory, manifest, remedy)
        self.warming_up = False
        self._stages = runtime
        self._embedding = _read_embedding(directory, where)
        self._recordings: OrderedDict[tuple[int, int], tuple[StageProgram, CapturedGraph]] = OrderedDict()

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        """As `Engine.run`; timed as one stage, `graph`. A chunk that continues another one is made step by step, without the graph."""
        stream = self._stages.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if goal is not None:
                actions = super().run(inputs, noise, denoising_steps, timer, goal)
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

    def _embed(self, ids: Tensor, image_positions: Tensor, tokens: Tensor) -> Tensor:
        text = self._embedding[ids.to(self.device, non_blocking=True)].unsqueeze(0)  # (1, S, width)
        return text.index_copy_(1, image_positions, tokens)

    def _recording(self, prompt_tokens: int, steps: int) -> tuple[StageProgram, CapturedGraph]:
        """With the stages' stream current."""
        key = (prompt_tokens, steps)
        if key not in self._recordings:
            tell_new(log, self, f"{prompt_tokens} prompt tokens, {steps} denoising steps")
            self._recordings[key] = self._record(*key)
            self._stages.save_caches()
            if len(self._recordings) > _KEPT_RECORDINGS:
                self._stages.stream.synchronize()  # the oldest may still be running
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _record(self, prompt_tokens: int, steps: int) -> tuple[StageProgram, CapturedGraph]:
        """Contexts that the library declares unfit for a graph are started one by one, which is slower."""
        shapes = stage_shapes(self.manifest.stages, prompt_tokens)
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
        at_hand = self._single[0] if self._single else self._manifest.shapes["image_tokens"] + 1  # vision does not care
        executions, shapes = self._at(_prompt_length(inputs) or at_hand)
        outputs = {name: torch.empty(shape, dtype=self._dtype, device=self.device) for name, shape in shapes[stage].items() if name not in inputs}
        executions[stage].enqueue({**inputs, **outputs})
        for tensor in inputs.values():
            tensor.record_stream(self.stream)
        return outputs

    def _at(self, prompt_tokens: int) -> tuple[dict[str, StageExecution], dict[str, dict[str, Shape]]]:
        """Contexts for single stages, of one prompt length at a time, and the shapes."""
        shapes = stage_shapes(self._manifest.stages, prompt_tokens)
        if self._single is None or self._single[0] != prompt_tokens:
            self.stream.synchronize()  # the ones that are dropped may still be running
            self._single = (prompt_tokens, self.executions(shapes))
        return self._single[1], shapes

    def save_caches(self) -> None:
        for stage in self._stages.values():
            stage.save_cache()


def _prompt_length(inputs: Mapping[str, Tensor]) -> int | None:
    """S from a stage's inputs; vision has none."""
    if "embeddings" in inputs:
        return inputs["embeddings"].shape[1]
    return inputs["keys"].shape[2] if "keys" in inputs else None


def check_details(manifest: Manifest, directory: Path, remedy: str) -> None:
    """Raises EngineError when the manifest does not say what built the engines and for which GPUs, or has not all the stages."""
    needed = ("builder", "builder_version", "compute_capability")
    absent = [name for name in needed if name not in manifest.details] + [stage for stage in STAGES if stage not in manifest.stages]
    if absent or manifest.details["builder"] not in library.BUILDERS:
        raise EngineError(f"the manifest in {directory} is incomplete ({', '.join(absent) or 'unknown builder'}). Run: {remedy}")


def check_version(manifest: Manifest, version: str, remedy: str) -> None:
    """Engines belong to the exact version that built them. Raises StaleEngineError."""
    builder, built_by = manifest.details["builder"], manifest.details["builder_version"]
    if built_by != version:
        raise StaleEngineError(f"these engines were built by {builder} {built_by}, and {builder} {version} is installed. Run: {remedy}")


def check_capability(manifest: Manifest, here: str, remedy: str) -> None:
    """Raises StaleEngineError when the engines were built for other GPUs than the one that is here."""
    targets = manifest.details["compute_capability"]
    fits = here in targets if targets else _key(here) >= _key(_OLDEST)
    if not fits:
        made_for = ", ".join(targets) or f"{_OLDEST} and newer"
        raise StaleEngineError(
            f"these engines were built for compute capability {made_for}, and this GPU has {here}. Run, with --compute_capability={here}: {remedy}"
        )


def cuda_device(name: str) -> torch.device:
    """`auto` or `cuda` -> the current CUDA GPU. Raises EngineError without one, ConfigError for another kind of device."""
    if name != "auto" and torch.device(name).type != "cuda":
        raise ConfigError(f"the engine 'tensorrt' runs on CUDA GPUs, asked for was --device={name}. Use --device=cuda, or --engine=onnxruntime.")
    if not torch.cuda.is_available():
        raise EngineError(
            f"the engine 'tensorrt' needs a CUDA GPU, and torch {torch.__version__} sees none here (no GPU, no driver, or a torch without CUDA). "
            "Run it where there is one, or use --engine=onnxruntime with what export/to_onnx.py makes, or --engine=eager --device=cpu."
        )
    index = torch.device("cuda" if name == "auto" else name).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _load(trt: object, directory: Path, manifest: Manifest, remedy: str) -> dict[str, LoadedStage]:
    loaded = {}
    for name in STAGES:
        cache = directory / f".{name}.{manifest.details['builder_version']}.kernels"
        loaded[name] = LoadedStage(trt, directory / manifest.stages[name]["file"], cache, remedy)
    return loaded


def _read_embedding(directory: Path, device: torch.device) -> Tensor:
    """The token embedding (vocabulary, width) on the GPU, where prompts are looked up."""
    with TensorFile(directory / TABLES_NAME) as file:
        entry = file.entries[EMBEDDING]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        file.read_into(tensor, entry)
    return tensor.to(device)


def _key(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
