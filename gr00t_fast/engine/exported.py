"""What all engines over exported files share: batches, embeddings, step tables and the loop; a runtime only executes stages. And the two for CPUs:
ONNX Runtime, on any CPU (on a GPU never executed); OpenVINO, the fastest way to run on a CPU, in 8 bits above all.

OpenVINO runs what `gr00t-fast quantise --target=openvino` makes, and fp32 ONNX exports as they are. What goes in and out of its stages is fp32; the
number format of the arithmetic (of layers that are not in 8 bits) is chosen when the export is opened.

Axis alphabet: B batch, C cameras, S prompt tokens, V image tokens, H horizon, A padded action width.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError, EngineError, ObservationError, install_command, require
from gr00t_fast.base.measurement import StageTimer, saturates_8_bits
from gr00t_fast.checkpoint.tensor_file import TensorFile
from gr00t_fast.engine.eager import PRECISIONS, Continuation, Engine, Inputs, denoise_towards
from gr00t_fast.engine.manifest import STAGES, Manifest, Target, check_manifest, check_picture, read_manifest, remedy_for, varying_sizes
from gr00t_fast.model import ModelInputs, StepTables

log = logging.getLogger(__name__)

TABLES_NAME = "tables.safetensors"
EMBEDDING, TAU, MODULATION = "embedding", "tau", "modulation"


class Runtime(Protocol):
    """Executes the stages of an export; the contract of names and shapes is `gr00t_fast/export/graphs.py`'s."""

    device: torch.device

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        """Contiguous inputs of the export's dtype on `device`, of so many observations -> the `wanted` outputs. Outputs of vision and language may
        live in memory that the next call of the same stage writes again; those of denoise_step may not."""


class ExportedEngine(Engine):
    """Over a `Runtime`. The torch weights are never read."""

    continues = True
    equal_prompts = True
    name: str

    def __init__(self, runtime: Runtime, directory: Path, manifest: Manifest, remedy: str) -> None:
        """`remedy`: the command that makes this export again."""
        self.manifest, self.device = manifest, runtime.device
        self.dtype = PRECISIONS[manifest.precision]
        self.precision = (manifest.quantisation or {}).get("format") or ""
        self.runtime, self._remedy = runtime, remedy
        self._tables = ExportTables(directory, remedy)
        self._steps: dict[int, StepTables] = {}
        self.batch_sizes = sorted({size for _, size in manifest.stage_files})
        self.max_batch = self.batch_sizes[-1]
        spans = manifest.shapes.get("image_spans")
        self._image_positions = spans and [place for first, behind in spans for place in range(first, behind)]
        self.camera_size = tuple(manifest.shapes["camera_size"]) if "camera_size" in manifest.shapes else None
        # outputs that the next stage takes as they are
        self.handed_on = {
            stage: tuple(name for name in manifest.stages[stage]["outputs"] if name in manifest.stages[following]["inputs"])
            for stage, following in itertools.pairwise(STAGES)
        }

    @torch.inference_mode()
    def run(self, inputs: Inputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        """As `Engine.run`. Items of a batch run as many at once as the export has graphs for and whose prompts are of one length.

        Raises ConfigError for a step count that the export cannot do, ObservationError for a prompt beyond its longest and for pictures of another
        size.
        """
        tables = self.tables(denoising_steps)
        self._check_pictures(inputs)
        with timer.stage("preprocess"):
            inputs, noise = inputs.to(self.device, self.dtype), noise.to(self.device)
            continuation = continuation and continuation.to(self.device)
        prompts = [self._prompt(inputs, item) for item in range(noise.shape[0])]
        chunks = torch.empty_like(noise)
        for items in self._batches([len(ids) for ids in prompts]):
            with timer.stage("vision"):
                seen = self._call("vision", {"pixel_values": inputs.pixel_values[items]}, "tokens", *self.handed_on["vision"], batch=len(items))
            with timer.stage("language"):
                places = inputs.image_positions if inputs.image_positions.dim() == 1 else inputs.image_positions[items[0]]  # of prompts as long
                embeddings = self.embed([prompts[item] for item in items], places, seen.pop("tokens"))
                condition = self._call("language", {"embeddings": embeddings, **seen}, *self.handed_on["language"], batch=len(items))
            with timer.stage("denoise"):
                fixed = {"state": inputs.state[items], **condition}
                continued = continuation and Continuation.together([continuation.item(item) for item in items])
                chunks[items] = self.denoise(noise[items], fixed, tables, continued).to(chunks.dtype)
        return chunks

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Items of a batch, by the lengths of their prompts, that are computed together."""
        left = sorted(range(len(lengths)), key=lengths.__getitem__)
        while left:
            alike = [item for item in left if lengths[item] == lengths[left[0]]]
            size = max(size for size in self.batch_sizes if size <= len(alike))
            yield alike[:size]
            left = [item for item in left if item not in alike[:size]]

    def tables(self, steps: int) -> StepTables:
        """The tables of one step count, on the device; kept. Raises ConfigError for a count that was not exported."""
        if steps not in self._steps:
            tables = self._tables.steps(steps)
            self._steps[steps] = StepTables(tables.tau.to(self.device), tables.modulation.to(self.device))
        return self._steps[steps]

    def _check_pictures(self, inputs: Inputs) -> None:
        """Raises ObservationError for pictures of another size than the graphs were made for, EngineError for a prompt that has them elsewhere."""
        if isinstance(inputs, ModelInputs):
            check_picture(self.manifest.shapes, inputs.pixel_values.shape[-2:], None, self._remedy)
        elif inputs.camera_size is not None:
            check_picture(self.manifest.shapes, inputs.frames[0].shape[1:3], inputs.camera_size, self._remedy)
        if self._image_positions is not None and not self._in_their_places(inputs):
            raise EngineError(
                "the prompt has its pictures in other places than the prompts that this export is made for: another tokenizer (--processor_path)? "
                f"Run with the one that it was exported with, or run: {self._remedy}"
            )

    def _in_their_places(self, inputs: Inputs) -> bool:
        """Whether each prompt has its pictures where the graphs have them."""
        tokens, places = inputs.input_ids.shape[1], np.array(inputs.image_positions.tolist())
        if isinstance(inputs, ModelInputs):
            lengths = [tokens] if inputs.prompt_mask is None else inputs.prompt_mask.sum(1).tolist()
        else:
            lengths = inputs.lengths
        built_in = np.array(self._image_positions)
        expected = built_in + np.array(lengths)[:, None] if built_in[0] < 0 else built_in
        return places.shape[-1] == len(built_in) and bool((places == expected).all())

    def _prompt(self, inputs: ModelInputs, item: int) -> Tensor:
        """Ids (S,) of one item on the CPU, without padding."""
        ids = inputs.input_ids[item] if inputs.prompt_mask is None else inputs.input_ids[item][inputs.prompt_mask[item]]
        most = self.manifest.shapes["max_tokens"]
        if len(ids) > most:
            text = len(ids) - self.manifest.shapes["image_tokens"]
            raise ObservationError(
                f"the instruction makes a prompt of {len(ids)} tokens; this export takes {most}. Shorten it, or make the graphs again "
                f"with gr00t-fast export onnx and --max_text_tokens={text}, and what was made from them: {self._remedy}"
            )
        return ids.cpu()

    def embed(self, prompts: Sequence[Tensor], image_positions: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, S, width) with the image tokens in their places."""
        return torch.cat([self._tables.embed(ids) for ids in prompts]).to(self.device).index_copy(1, image_positions, tokens)

    def denoise(self, noise: Tensor, fixed: dict[str, Tensor], tables: StepTables, continuation: Continuation | None = None) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A). fixed: the inputs of denoise_step that all steps share, of the export's dtype."""

        def step(actions: Tensor, index: int, size: float) -> Tensor:
            of_step = {"tau": tables.tau[index], "modulation": tables.modulation[index]}
            length = torch.full((1,), size, dtype=self.dtype, device=self.device)
            given = {"actions": actions, **fixed, **of_step, "step_size": length}
            return self._call("denoise_step", given, "next_actions", batch=len(actions))["next_actions"]

        def velocity(actions: Tensor, index: int) -> Tensor:
            rounded = actions.to(self.dtype)  # what is rounded away must not become part of the velocity
            return step(rounded, index, 1.0).float() - rounded.float()  # a step of length 1 moves by the velocity itself

        if continuation is not None:
            return denoise_towards(velocity, noise, tables.steps, continuation)
        actions = noise.to(self.dtype)
        for index in range(tables.steps):
            actions = step(actions, index, 1.0 / tables.steps)
        return actions

    def _call(self, stage: str, inputs: dict[str, Tensor], *wanted: str, batch: int) -> dict[str, Tensor]:
        more = {} if batch == 1 else {"batch": batch}
        outputs = self.runtime.run_stage(stage, {name: value.contiguous() for name, value in inputs.items()}, wanted, **more)
        return dict(zip(wanted, outputs, strict=True))


def check_precision(manifest: Manifest, asked: str, remedy: str) -> None:
    """An export has one precision, its own. Raises ConfigError when another one was asked for; `remedy` is the command that makes that."""
    if asked not in ("auto", manifest.precision):
        raise ConfigError(f"this export computes in {manifest.precision}, but --precision={asked} was asked for. Leave it out, or run: {remedy}")


# --- what an export keeps outside its graphs: the token embedding, and the tables of each step count


class ExportTables:
    """tables.safetensors, opened but not read: an inference looks up a row for each token of its prompt, of 150 000."""

    def __init__(self, directory: Path, remedy: str) -> None:
        """`remedy`: the command that makes the export with other step counts. Raises CheckpointError for a damaged file."""
        self._file, self._remedy = TensorFile(directory / TABLES_NAME), remedy
        self.dtype = self._file.entries[EMBEDDING].dtype
        self._embedding = self._file.read(EMBEDDING)

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 (S,) on the CPU -> embeddings (1, S, width)."""
        return self._embedding[ids].unsqueeze(0)

    def steps(self, count: int) -> StepTables:
        """tau (count, D) and modulation (count, L + 1, 2, D) as `denoise_step` takes them. Raises ConfigError for a count that was not exported."""
        if f"{TAU}.{count}" not in self._file.entries:
            there = sorted(int(name.rpartition(".")[2]) for name in self._file.entries if name.startswith(f"{TAU}."))
            raise ConfigError(
                f"denoising_steps={count}: this export holds tables for {', '.join(map(str, there))} steps. Choose one of them, or make "
                f"the graphs again with gr00t-fast export onnx and --denoising_steps={count}, and what was made from them: {self._remedy}"
            )
        return StepTables(*(self._file.read(f"{kind}.{count}").clone() for kind in (TAU, MODULATION)))


ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
_ERRORS_ONLY = 3
_FORMATS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # OpenVINO's words; in its device property OPTIMIZATION_CAPABILITIES ours, in capitals


class OnnxRuntimeEngine(ExportedEngine):
    name = ONNXRUNTIME

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it. device: of a GPU "cuda" or "cuda:1".

        Raises MissingExtraError without onnxruntime, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or
        cannot run here, ConfigError for a device or precision that it does not have.
        """
        ort = require("onnxruntime", "export")
        where = torch.device(device if re.fullmatch(r"cuda(:\d+)?", device) else "cpu")
        if where.type == "cpu":
            _check_device(self.name, device)
        remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={'fp32' if precision == 'auto' else precision}")
        manifest = check_manifest(directory, "onnx", target, remedy)
        check_precision(manifest, precision, target.command("to_onnx.py", f"--out={directory}", f"--precision={precision}", "--overwrite"))
        _check_runnable(self.name, manifest, directory, target, ("fp32", "fp16"))
        super().__init__(OrtStages(ort, directory, manifest, remedy, where), directory, manifest, remedy)


class OrtStages:
    """A session per stage; torch tensors are read in place. bound: outputs are torch's memory, too, as on a GPU they have to be."""

    def __init__(self, ort: ModuleType, directory: Path, manifest: Manifest, remedy: str, device: torch.device) -> None:
        """Raises EngineError when ONNX Runtime refuses a file, or takes the CPU in place of the GPU that was asked for, of which it only warns."""
        self.device, self.bound = device, device.type == "cuda"
        self._shapes, self._dtype = manifest.shapes, PRECISIONS[manifest.precision]
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.bound:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = _ERRORS_ONLY
        # threads that spin for work took a third more CPU time, no less wall time, and the control loop and cameras live in this process
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions = {}
        for stage, file in manifest.stage_files.items():
            path = directory / file
            try:
                self._sessions[stage] = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # its exception classes have no common base
                advice = f"Install the onnxruntime version that the export names in manifest.json, or run: {remedy}"
                raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {path}: {error}. {advice}") from error
            if self.bound and (taken := self._sessions[stage].get_providers()[0]) != "CUDAExecutionProvider":
                raise EngineError(
                    f"--device={device}: ONNX Runtime {ort.__version__} takes {taken}, expected CUDAExecutionProvider. In place of onnxruntime "
                    f"install onnxruntime-gpu for this CUDA: {install_command('onnxruntime_gpu')}. Or use --engine=cuda_graph, or --device=cpu."
                )

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        if self.bound:
            return self._run_bound(self._sessions[stage, batch], inputs, wanted)
        arrays = {name: value.detach().numpy() for name, value in inputs.items()}
        return tuple(map(torch.from_numpy, self._sessions[stage, batch].run(wanted, arrays)))

    def _run_bound(self, session: Any, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        sizes = varying_sizes(self._shapes, inputs["embeddings"].shape[1]) if "embeddings" in inputs else {}
        shapes = {node.name: [sizes.get(size, size) for size in node.shape] for node in session.get_outputs()}
        outputs = {name: torch.empty(shapes[name], dtype=self._dtype, device=self.device) for name in wanted}
        binding, kind = session.io_binding(), torch.empty(0, dtype=self._dtype).numpy().dtype.type
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, self.device.type, self.device.index or 0, kind, list(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return tuple(outputs.values())


class OpenVinoEngine(ExportedEngine):
    name = OPENVINO

    def __init__(self, directory: Path, target: Target, device: str, precision: str) -> None:
        """Check the export, then open it. `precision`: of the arithmetic; `auto` is bf16 where this CPU computes in it, else fp32.

        Raises MissingExtraError without openvino, EngineError and StaleEngineError for an export that is not whole, not this checkpoint's or not
        for this runtime, ConfigError for a device or precision that it does not have.
        """
        openvino = require("openvino", "openvino")
        _check_device(self.name, device)
        remedy = remedy_for(directory, target, "to_onnx.py", "--precision=fp32")  # one command; INT8 needs this one first
        kind = read_manifest(directory, remedy).kind
        manifest = check_manifest(directory, "onnx" if kind == "onnx" else OPENVINO, target, remedy)
        _check_runnable(self.name, manifest, directory, target, ("fp32",))
        core = openvino.Core()
        arithmetic = choose_arithmetic(precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        super().__init__(OpenVinoStages(openvino, core, directory, manifest, arithmetic, remedy), directory, manifest, remedy)
        self.precision = self.precision or arithmetic


class OpenVinoStages:
    """One compiled model and one inference request per stage; torch tensors are read in place."""

    device = torch.device("cpu")

    def __init__(self, openvino: ModuleType, core: Any, directory: Path, manifest: Manifest, arithmetic: str, remedy: str) -> None:
        """Raises EngineError when OpenVINO refuses a file."""
        self._openvino, self._requests = openvino, {}
        self._given: dict[tuple[str, int], dict[str, Tensor]] = {}  # what each request reads; held, so that an identity means one tensor
        options = {
            "INFERENCE_PRECISION_HINT": _FORMATS[arithmetic],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,  # one observation at a time: all threads work on it
            "PERFORMANCE_HINT": "LATENCY",
        }
        for stage, file in manifest.stage_files.items():
            path = directory / file
            try:
                self._requests[stage] = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
                self._given[stage] = {}
            except RuntimeError as error:
                raise EngineError(f"OpenVINO {openvino.__version__} cannot open {path}: {error}. Run: {remedy}") from error

    def run_stage(self, stage: str, inputs: Mapping[str, Tensor], wanted: tuple[str, ...], batch: int = 1) -> tuple[Tensor, ...]:
        request, given = self._requests[stage, batch], self._given[stage, batch]
        for name, value in inputs.items():
            if given.get(name) is not value:  # most inputs of a denoising step are those of the step before
                request.set_tensor(name, self._openvino.Tensor(value.detach().numpy(), shared_memory=True))
                given[name] = value
        request.infer()
        outputs = tuple(torch.from_numpy(request.get_tensor(name).data) for name in wanted)
        # large outputs may stay where the request has them; a step's are the next step's inputs
        return tuple(output.clone() for output in outputs) if stage == "denoise_step" else outputs


def choose_arithmetic(precision: str, capabilities: list[str]) -> str:
    """`precision` of the command line to fp32, bf16 or fp16. Raises ConfigError for one that this CPU does not compute in."""
    able = [name for name in _FORMATS if name.upper() in capabilities]
    if precision == "auto":
        return "bf16" if "bf16" in able else "fp32"
    if precision not in able:
        raise ConfigError(f"--precision={precision}: OpenVINO computes in {', '.join(able)} on this CPU. Expected auto or one of these.")
    return precision


def _check_device(name: str, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ConfigError(
            f"device '{device}' is not supported by the engine '{name}', which runs on CPUs. Expected auto or cpu. On a GPU use "
            "--engine=cuda_graph, or --engine=tensorrt."
        )


def _check_runnable(name: str, manifest: Manifest, directory: Path, target: Target, precisions: tuple[str, ...]) -> None:
    """Raises EngineError for files that are quantised for another runtime, or in a number format that this one does not run."""
    quantisation = manifest.quantisation or {}
    runtime = quantisation.get("runtime", name)
    if runtime != name:
        flags = (f"--target={name}", "--onnx=<fp32 export>", "--observations=<data set>", "--out=<directory>")
        raise EngineError(
            f"the {quantisation.get('format')} files in {directory} are made for '{runtime}'. Use --engine={runtime}, or quantise for this engine: "
            f"{target.command('quantise.py', *flags)}"
        )
    if quantisation.get("format") == "int8" and saturates_8_bits():
        log.warning(
            "%s is in 8 bits, and this processor has no VNNI: sums of large products saturate, and actions may be wrong. Compare them first: "
            "gr00t-fast verify, or gr00t-fast tune",
            directory,
        )
    if manifest.precision not in precisions:
        raise EngineError(
            f"{directory} holds a {manifest.precision} export; the engine '{name}' runs {' and '.join(precisions)} ones. Use --engine=eager, or run: "
            f"{target.command('to_onnx.py', f'--out={directory}', '--precision=fp32', '--overwrite')}"
        )
