"""Camera frames to actions as one CUDA graph: one upload, one launch, one download, and nothing in between that asks the GPU a question.

Eager PyTorch launches some 1,500 kernels per inference, and the CPU that launches them is slower than the GPU that runs them: that is most of
the time on a fast GPU. A graph is recorded once per shape of call (batch, cameras and their sizes, prompt length, denoising steps, and whether and
how a chunk continues another one) and replayed with a single launch. All engines here run the fused model: `cuda_graph` records it as it is,
`compiled` lets Inductor fuse it first, and runs on a CPU too, where nothing is recorded; `fp8` is made in engine/fp8.py.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor

from gr00t_fast.engine.base import Engine, PolicyInputs, tell_new
from gr00t_fast.engine.capture import CapturedGraph
from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.continuation import Continuation
from gr00t_fast.engine.fused import FusedModel, Stages, compiled, fused_model
from gr00t_fast.engine.static_call import CallShape, StaticCall
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import Gr00t

log = logging.getLogger(__name__)
_KEPT_RECORDINGS = 8  # each holds its own buffers; intermediate results are in one pool of all


class GraphEngine(Engine):
    """Over a fused model: camera frames in one upload, the rest recorded. Not thread-safe, as its policy is not."""

    precision = ""

    def __init__(self, name: str, model: FusedModel, stages: Stages | None = None, continues: frozenset[str] = frozenset({"rtc", "prefix"})) -> None:
        """stages: the model's own, or those compiled. continues: without `rtc` where layers have no gradient."""
        self.name, self.model, self.stages, self.continues = name, model, stages or model.stages(), continues
        self.device, self.dtype = model.device, model.dtype
        self.warming_up = False
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

    @torch.no_grad()  # not inference mode: guidance needs tensors that autograd takes, and compiled stages are compiled for one mode
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
            return torch.cat(
                [
                    self._run(inputs.item(index), noise[index : index + 1], denoising_steps, continuation and continuation.item(index))
                    for index in range(inputs.batch)
                ]
            )

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
        continued = f", a chunk continued by {shape.continuation}" if shape.continuation else ""
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
    check_cuda("cuda_graph", model.device)
    return GraphEngine("cuda_graph", fused_model(model))


def compiled_engine(model: Gr00t) -> GraphEngine:
    """`compiled`: on a CUDA GPU, or on a CPU, where it needs a C++ compiler, and memory for a second copy of the weights, packed as the matrix
    products want them. Raises ConfigError for another device, or without the compiler."""
    check_compiled("compiled", model.device)
    fused = fused_model(model)
    return GraphEngine("compiled", fused, compiled(fused.stages(), any_length=model.device.type == "cuda"))


def check_compiled(engine: str, device: torch.device) -> None:
    """Raises ConfigError where `compiled` cannot run."""
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"engine '{engine}' runs on CUDA and CPUs, but the model is on {device}. Use --engine=eager.")
    check_compiler(engine, device.type)


def check_cuda(engine: str, device: torch.device) -> None:
    """Raises ConfigError where `device` is no CUDA GPU."""
    if device.type != "cuda":
        raise ConfigError(f"engine '{engine}' needs a CUDA GPU, but the model is on {device}. Use --device=cuda, or --engine=eager.")
