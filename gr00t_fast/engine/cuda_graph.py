"""Camera frames to actions as one CUDA graph: one upload, one launch, one download, and nothing in between that asks the GPU a question.

Eager PyTorch launches some 1,500 kernels per inference, and the CPU that launches them is slower than the GPU that runs them: that is most of
the time on a fast GPU. A graph is recorded once per shape of call (batch, cameras and their sizes, prompt length, denoising steps, and whether a
chunk continues another one) and replayed with a single launch. All engines here run the fused model: `cuda_graph` records it as it is,
`compiled` lets Inductor fuse it first, and runs on a CPU too, where nothing is recorded.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import shutil
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.engine.eager import MAX_BATCH, Continuation, Engine, PolicyInputs, denoise_towards, tell_new
from gr00t_fast.engine.fused import FusedModel, Stages, fused_model
from gr00t_fast.model import Gr00t, ModelInputs

log = logging.getLogger(__name__)
_KEPT_RECORDINGS = 32  # a prompt in four sizes of batch, begun and continued, takes eight; intermediate results are in one pool of all
_CALLS_BEFORE_RECORDING = 3  # libraries choose kernels and allocate workspaces in their first calls, which a graph cannot hold
Work = Callable[[], None]
_ALIGNMENT_BYTES = 256  # of each part of the packed buffer: what CUDA's own allocations have


class GraphEngine(Engine):
    """Over a fused model: camera frames in one upload, the rest recorded. Not thread-safe, as its policy is not."""

    max_batch = MAX_BATCH
    equal_prompts = True
    continues = True

    def __init__(self, name: str, model: FusedModel, stages: Stages | None = None) -> None:
        """stages: the model's own, or those compiled."""
        self.name, self.model, self.stages = name, model, stages or model.stages()
        self.device, self.dtype = model.device, model.dtype
        self._prepared: OrderedDict[CallShape, tuple[StaticCall, CapturedGraph | None]] = OrderedDict()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: tuple[int, int] | None = None

    @property
    def prepared(self) -> tuple[CallShape, ...]:
        """The shapes of call that are recorded (on a CPU: whose buffers are there)."""
        return tuple(self._prepared)

    def forget(self) -> None:
        """Drop what is recorded, and the memory that it holds."""
        self._prepared.clear()

    @torch.no_grad()  # not inference mode: compiled stages are compiled for one mode
    def run(self, inputs: PolicyInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        """As `Engine.run`, on the host; timed as one stage, `graph`. The first call of a shape records it, which takes seconds (compiling takes
        minutes): warm the policy up with the instruction that it will get. Prompts of unequal length run one after the other, as each would alone.

        Raises ConfigError for tensors in place of frames.
        """
        if not isinstance(inputs, PolicyInputs):
            raise ConfigError(f"engine '{self.name}' runs from camera frames (PolicyInputs), not from tensors. Measure it with gr00t-fast bench.")
        with timer.stage("graph"):
            if not inputs.padded:
                return self._run(inputs, noise, denoising_steps, continuation)
            items = [(inputs.item(index), noise[index : index + 1], continuation and continuation.item(index)) for index in range(inputs.batch)]
            return torch.cat([self._run(item, start, denoising_steps, continued) for item, start, continued in items])

    def _run(self, inputs: PolicyInputs, noise: Tensor, denoising_steps: int, continuation: Continuation | None) -> Tensor:
        shape = CallShape.of(inputs, denoising_steps, continuation)
        if shape not in self._prepared:
            self._prepare(shape, inputs, noise, continuation)
        self._prepared.move_to_end(shape)
        call, graph = self._prepared[shape]
        call.fill(inputs, noise, continuation)
        if graph is None:
            call.upload()
            call.compute()
            call.download()
        else:
            graph.launch()
            graph.wait()
        return call.answer.clone()  # the next call writes the same memory

    def _prepare(self, shape: CallShape, inputs: PolicyInputs, noise: Tensor, continuation: Continuation | None) -> None:
        """With real contents, so that kernels are chosen for them."""
        continued = ", a chunk that continues another one" if shape.continues else ""
        tell_new(log, self, f"{shape.prompt_tokens} prompt tokens, {shape.denoising_steps} denoising steps, batch {shape.batch}{continued}")
        call, graph = StaticCall(self.model, shape, self.stages), None
        call.fill(inputs, noise, continuation)
        if self._stream is not None:
            if not self._prepared:  # a pool goes with the last recording that used it
                self._pool = torch.cuda.graph_pool_handle()
            graph = CapturedGraph(call.compute, self._stream, call.upload, call.download, self._pool)
        self._prepared[shape] = (call, graph)
        while len(self._prepared) > _KEPT_RECORDINGS:
            self._prepared.popitem(last=False)

    def synchronise(self) -> None:
        """Nothing to do: `run` returns when what it launched has run, and waits for nothing else on the GPU."""


def cuda_graph_engine(model: Gr00t) -> GraphEngine:
    """`cuda_graph`. Raises ConfigError for a device that cannot be used."""
    check_device("cuda_graph", model.device)
    return GraphEngine("cuda_graph", fused_model(model))


def compiled_engine(model: Gr00t) -> GraphEngine:
    """`compiled`: on a CUDA GPU, or on a CPU, where it needs a C++ compiler, and memory for a second copy of the weights, packed as the matrix
    products want them. Raises ConfigError for another device, or without the compiler."""
    check_device("compiled", model.device)
    fused = fused_model(model)
    return GraphEngine("compiled", fused, compiled(fused.stages(), any_length=model.device.type == "cuda"))


def check_device(engine: str, device: torch.device) -> None:
    """Whether `engine`, by its name, can run on `device`. Raises ConfigError."""
    if engine == "fused" and device.type != "cpu":
        raise ConfigError(f"engine 'fused' needs a CPU, but the model is on {device}. Use --device=cpu, or --engine=eager.")
    if engine == "cuda_graph" and device.type != "cuda":
        raise ConfigError(f"engine '{engine}' needs a CUDA GPU, but the model is on {device}. Use --device=cuda, or --engine=eager.")
    if engine == "compiled":
        if device.type not in ("cuda", "cpu"):
            raise ConfigError(f"engine '{engine}' runs on CUDA and CPUs, but the model is on {device}. Use --engine=eager.")
        check_compiler(engine, device.type)


# --- one recording


class CapturedGraph:
    """`work` recorded once; `launch` does `upload`, one replay and `download`, and `wait` waits for them.

    Everything that `work` reads and writes has to stay where it is: the graph holds addresses, and this object holds `work`, hence what it owns.
    """

    def __init__(
        self,
        work: Work,
        stream: torch.cuda.Stream,
        upload: Work = lambda: None,
        download: Work = lambda: None,
        pool: tuple[int, int] | None = None,
    ) -> None:
        """Runs on `stream` and its GPU, which need not be the current one. upload, download: copies to and from pinned memory.

        pool: memory for what `work` allocates; graphs that never run at the same time may share one, on the same stream.
        """
        self.stream = stream
        self._work, self._upload, self._download = work, upload, download
        with torch.cuda.device(stream.device):
            self._done = torch.cuda.Event()
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            with torch.cuda.stream(stream):
                for _ in range(_CALLS_BEFORE_RECORDING):
                    upload()
                    work()
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: cameras and recorders may allocate memory meanwhile, which would break a recording of mode "global"
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()

    def launch(self) -> None:
        """Start; returns before it has run. Nothing launched before may still be under way."""
        with torch.cuda.stream(self.stream):
            self._upload()
            self._graph.replay()
            self._download()
            self._done.record(self.stream)

    def wait(self) -> None:
        """Until what was launched has run: of the whole GPU only this."""
        self._done.synchronize()


# --- one inference with every shape fixed and every buffer made beforehand


@dataclass(frozen=True)
class CallShape:
    """What one recording is good for."""

    frames: tuple[tuple[int, ...], ...]  # (B, H, W, 3) per camera
    prompt_tokens: int
    image_positions: tuple[int, ...]  # in the prompt
    denoising_steps: int
    continues: bool = False  # whether a chunk continues another one, or begins afresh

    @classmethod
    def of(cls, inputs: PolicyInputs, denoising_steps: int, continuation: Continuation | None = None) -> CallShape:
        frames = tuple(view.shape for view in inputs.frames)
        return cls(frames, inputs.input_ids.shape[1], tuple(inputs.image_positions.tolist()), denoising_steps, continuation is not None)

    @property
    def batch(self) -> int:
        return self.frames[0][0]


class PackedBuffers:
    """Named tensors in one block of memory on the host (pinned, for CUDA) and one on the device; parts: name -> dtype and shape."""

    def __init__(self, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in parts.items()}
        aligned = [_ALIGNMENT_BYTES * math.ceil(size / _ALIGNMENT_BYTES) for size in sizes.values()]
        begins = dict(zip(parts, itertools.accumulate(aligned, initial=0), strict=False))
        self._host = torch.zeros(sum(aligned), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else torch.zeros_like(self._host, device=device)

        def views(block: Tensor) -> dict[str, Tensor]:
            return {name: block.narrow(0, begins[name], sizes[name]).view(dtype).view(shape) for name, (dtype, shape) in parts.items()}

        self.host, self.device = views(self._host), views(self._device)

    def upload(self) -> None:
        """One copy, which returns at once on CUDA."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


class StaticCall:
    """`fill` writes host memory, `upload` copies it, `compute` makes `actions` from what is on the device, `download` copies them back.
    `compute` always touches the same memory and never waits for the device, so it can be recorded. To be made and used without autograd."""

    def __init__(self, model: FusedModel, shape: CallShape, stages: Stages) -> None:
        """`stages`: the model's own, or those compiled."""
        head, batch = model.config.head, shape.batch
        self._model, self._shape, self._stages = model, shape, stages
        size = (batch, head.action_horizon, head.action_dim)
        continuation = {} if not shape.continues else {"known_actions": (torch.float32, size), "known_weights": (torch.float32, size)}
        self._inputs = PackedBuffers(
            {
                **{f"frames{index}": (torch.uint8, frames) for index, frames in enumerate(shape.frames)},
                "input_ids": (torch.int64, (batch, shape.prompt_tokens)),
                "state": (torch.float32, (batch, head.state_dim)),
                "noise": (torch.float32, size),
                **continuation,
            },
            model.device,
        )
        self.upload = self._inputs.upload
        self._image_positions = torch.tensor(shape.image_positions, device=model.device)
        self._tables, self._constants = model.step_tables(shape.denoising_steps), model.constants(self._model_inputs())
        self.actions = torch.zeros(size, device=model.device)  # fp32 (B, H, A), normalised
        self.answer = torch.zeros(size, pin_memory=model.device.type == "cuda")  # the same on the host

    def fill(self, inputs: PolicyInputs, noise: Tensor, continuation: Continuation | None = None) -> None:
        """Write one observation, its noise, fp32 (B, H, A), and what it continues. Nothing uploaded before may still be under way."""
        host = self._inputs.host
        for index, frames in enumerate(inputs.frames):
            host[f"frames{index}"].numpy()[...] = frames
        host["input_ids"].numpy()[...] = inputs.input_ids
        host["state"].numpy()[...] = inputs.state
        host["noise"].copy_(noise)
        if continuation is not None:
            host["known_actions"].copy_(continuation.actions)
            host["known_weights"].copy_(continuation.weights)

    def compute(self) -> None:
        given, inputs = self._inputs.device, self._model_inputs()
        if not self._shape.continues:
            self.actions.copy_(self._stages(inputs, self._constants, given["noise"].to(self._model.dtype), self._tables))
            return
        velocity = self._tables.at_each(self._stages.velocity, self._stages.prepare(inputs, self._constants))
        continuation = Continuation(given["known_actions"], given["known_weights"])
        self.actions.copy_(denoise_towards(velocity, given["noise"], self._shape.denoising_steps, continuation))

    def _model_inputs(self) -> ModelInputs:
        """From what is on the device: pixels fp32 (B, C, 3, h, w) of its frames."""
        model, given = self._model, self._inputs.device
        pixels = torch.stack([model.to_pixels(given[f"frames{index}"]) for index in range(len(self._shape.frames))], dim=1)
        return ModelInputs(
            pixel_values=pixels.to(model.dtype),
            input_ids=given["input_ids"],
            image_positions=self._image_positions,
            state=given["state"].to(model.dtype),
        )

    def download(self) -> None:
        """Start copying the actions to the host; `answer` is complete once the stream has got there."""
        self.answer.copy_(self.actions, non_blocking=True)


# --- the engine `compiled`


def compiled(stages: Stages, any_length: bool = True, **options: Any) -> Stages:
    """The stages through torch.compile, with `options`, when they are first called: one denoising step is compiled once and called N times. Whole
    graphs only: a break costs launches.

    any_length: compiled once for prompts of every length; otherwise once more for each length, which lets Inductor pack fp32 weights on a CPU.
    """
    return Stages(**{name: _Compiled(stage, name, any_length, options) for name, stage in vars(stages).items()})


class _Compiled:
    """One stage. What has to be set while it is traced goes with it, so that nobody can call it without."""

    def __init__(self, stage: Callable[..., Any], name: str, any_length: bool, options: dict[str, Any]) -> None:
        self._stage = torch.compile(stage, fullgraph=True, dynamic=None if any_length else False, **options)
        self._lengths = _PROMPT_AXES.get(name) if any_length else None
        self._freezing = not any_length

    def __call__(self, *arguments: Any) -> Any:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        for tensor, axis in self._lengths(*arguments) if self._lengths else ():
            torch._dynamo.mark_dynamic(tensor, axis)
        # Freezing makes constants of weights, which Inductor packs for a CPU: as an option of torch.compile it comes too late. And the usual limit
        # of 8 versions is for programs that compile by accident: here each is a prompt length, a batch size or a way to continue.
        with dynamo.patch(recompile_limit=_MOST_VERSIONS, accumulated_recompile_limit=_MOST_VERSIONS), inductor.patch(freezing=self._freezing):
            return self._stage(*arguments)


_MOST_VERSIONS = 10_000
# Where the arguments of a stage have the prompt's length.
_PROMPT_AXES: dict[str, Callable[..., list[tuple[Tensor, int]]]] = {
    "encode_language": lambda input_ids, _, constants: [(input_ids, 1), (constants.cos, 0), (constants.sin, 0)],
    "refine": lambda features: [(features, 1)],
    "condition": lambda features, _, constants: [(features, 1), *([] if constants.text_positions is None else [(constants.text_positions, 0)])],
    "velocity": lambda _, condition, *__: [(tensor, 2) for pair in condition.cross for tensor in pair],
}


# Language, variable and names, in the order in which Inductor (C++) and triton (C) look; and the engine that needs none. C is what loads a kernel.
_COMPILERS = {"cpu": ("C++", "CXX", ("g++", "clang++", "c++"), "eager"), "cuda": ("C", "CC", ("gcc", "clang"), "cuda_graph")}


def check_compiler(engine: str, device_type: str) -> None:
    """Raises ConfigError where Inductor would find no C++ compiler for a CPU, or triton no C compiler or no headers of Python for a GPU."""
    if device_type != "cpu" and _has_built_before():
        return
    language, variable, usual, instead = _COMPILERS["cpu" if device_type == "cpu" else "cuda"]
    named = os.environ.get(variable)
    if not any(shutil.which(compiler) for compiler in ((named,) if named else usual)):
        looked = f"{variable}={named}" if named else ", ".join(usual)
        raise ConfigError(
            f"engine '{engine}' needs a {language} compiler, but there is none (looked for {looked}). Install {usual[0]} or name yours with "
            f"{variable}=..., or use --engine={instead}."
        )
    include = Path(sysconfig.get_paths("posix_prefix")["include"])
    if device_type != "cpu" and not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ConfigError(
            f"engine '{engine}' needs the headers of Python {version}, but there is no {include}/Python.h. Install python{version}-dev, or use "
            f"--engine={instead}."
        )


def _has_built_before() -> bool:
    """Whether triton can load kernels with what it keeps on disk, or builds in a way of its own: an image may come without a compiler."""
    if importlib.util.find_spec("triton") is None:
        return True  # the engine says so itself, or does without
    try:
        from triton import knobs
    except ImportError:  # before triton 3.3: where it looks is not known
        return True
    return knobs.build.impl is not None or any(Path(knobs.cache.dir).glob(f"*/*{sysconfig.get_config_var('EXT_SUFFIX')}"))
