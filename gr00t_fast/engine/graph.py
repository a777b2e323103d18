"""Camera frames to joint targets as one CUDA graph: one upload, one launch, one download, and nothing in between that asks the GPU a question.

Eager PyTorch launches some 1,500 kernels per inference, and the CPU that launches them is slower than the GPU that runs them: that is most of
the time on a fast GPU. A graph is recorded once per shape of call (batch, cameras and their sizes, prompt length, denoising steps, and whether and
how a chunk continues another one) and replayed with a single launch. All engines here run the fused model: `cuda_graph` records it as it is,
`compiled` lets Inductor fuse it first, and runs on a CPU too, where nothing is recorded; `fp8` is made in engine/fp8.py.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.base import tell_new
from gr00t_fast.engine.capture import CapturedGraph
from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.fused import FusedModel, Kernels, Stages, compiled
from gr00t_fast.engine.static_call import CallShape, RawInputs, StaticCall, ToJoints, ToPixels
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.timing import StageTimer

log = logging.getLogger(__name__)
_KEPT_RECORDINGS = 8  # each holds its own buffers and intermediate results, some 100 MB
_TRITON_CAPABILITY = (8, 0)  # bf16 tensor cores, and asynchronous copies to shared memory, which the tile sizes count on

CheckCall = Callable[[int, Goal | None], None]  # (denoising steps, goal) -> raises ConfigError for a call that the engine cannot do


class GraphEngine:
    """A FrameEngine over a fused model. Not thread-safe, as its policy is not."""

    continues = True

    def __init__(
        self, name: str, model: FusedModel, to_pixels: ToPixels | None, stages: Stages | None = None, check_call: CheckCall | None = None
    ) -> None:
        """stages: the model's own, or those compiled. Raises ConfigError without `to_pixels`."""
        if to_pixels is None:
            raise ConfigError(f"engine '{name}' runs from camera frames, not from tensors. Measure it with benchmarks/bench_engines.py.")
        self.name, self.model, self.to_pixels, self.stages = name, model, to_pixels, stages or model.stages()
        self.device, self.dtype = model.device, model.dtype
        self.warming_up = False
        self._check_call = check_call
        self._to_joints: ToJoints | None = None
        self._prepared: OrderedDict[CallShape, tuple[StaticCall, CapturedGraph | None]] = OrderedDict()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: tuple[int, int] | None = None

    @property
    def to_joints(self) -> ToJoints | None:
        """What the recorded computation ends with. Setting it forgets what was recorded."""
        return self._to_joints

    @to_joints.setter
    def to_joints(self, to_joints: ToJoints | None) -> None:
        self._to_joints = to_joints
        self._prepared.clear()

    @property
    def prepared(self) -> tuple[CallShape, ...]:
        """The shapes of call that are recorded (on a CPU: whose buffers are there)."""
        return tuple(self._prepared)

    @torch.no_grad()  # not inference mode: guidance needs tensors that autograd takes, and compiled stages are compiled for one mode
    def run_raw(self, raw: RawInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> np.ndarray:
        """As `FrameEngine.run_raw`; timed as one stage, `graph`. The first call of a shape records it, which takes seconds (compiling takes minutes):
        warm the policy up with the instruction that it will get. Prompts of unequal length run one after the other, each as it would alone.

        Raises ConfigError for a step count or a continuation that the engine cannot do.
        """
        if self._check_call is not None:
            self._check_call(denoising_steps, goal)
        with timer.stage("graph"):
            if not raw.padded:
                return self._run(raw, noise, denoising_steps, goal)
            return np.concatenate(
                [self._run(raw.item(index), noise[index : index + 1], denoising_steps, _of_item(goal, index)) for index in range(raw.batch)]
            )

    def _run(self, raw: RawInputs, noise: Tensor, denoising_steps: int, goal: Goal | None) -> np.ndarray:
        shape = CallShape.of(raw, denoising_steps, goal)
        if shape not in self._prepared:
            self._prepare(shape, raw, noise, goal)
        self._prepared.move_to_end(shape)
        call, graph = self._prepared[shape]
        call.fill(raw, noise, goal)
        if graph is None:
            call.upload()
            call.compute()
            call.download()
        else:
            graph.launch()
            graph.wait()
        return call.answer.numpy().copy()  # the next call writes the same memory

    def _prepare(self, shape: CallShape, raw: RawInputs, noise: Tensor, goal: Goal | None) -> None:
        """With real contents, so that kernels are chosen for them."""
        continued = f", a chunk continued by {shape.goal}" if shape.goal else ""
        tell_new(log, self, f"{shape.prompt_tokens} prompt tokens, {shape.denoising_steps} denoising steps, batch {shape.batch}{continued}")
        call, graph = StaticCall(self.model, shape, self.to_pixels, self.stages, self._to_joints), None
        call.fill(raw, noise, goal)
        if self._stream is not None:
            if not self._prepared:  # a pool goes with the last recording that used it
                self._pool = torch.cuda.graph_pool_handle()
            graph = CapturedGraph(call.compute, self._stream, call.upload, call.download, self._pool)
        self._prepared[shape] = (call, graph)
        while len(self._prepared) > _KEPT_RECORDINGS:
            self._prepared.popitem(last=False)

    def synchronise(self) -> None:
        """Nothing to do: `run_raw` returns when what it launched has run, and waits for nothing else on the GPU."""


def _of_item(goal: Goal | None, index: int) -> Goal | None:
    return None if goal is None else Goal(goal.actions[index : index + 1], goal.weights, goal.method)


def cuda_graph_engine(model: Gr00tN1d5, to_pixels: ToPixels | None, kernels: Kernels = "torch") -> GraphEngine:
    """`cuda_graph`; kernels="triton": over the hand-written ones. Raises ConfigError for a device that cannot be used, and MissingExtraError without
    triton."""
    check_cuda("cuda_graph", model.device)
    if kernels == "triton":
        check_triton("cuda_graph", model.device)
    return GraphEngine("cuda_graph", FusedModel(model, kernels, kernels), to_pixels)


def compiled_engine(model: Gr00tN1d5, to_pixels: ToPixels | None) -> GraphEngine:
    """`compiled`: on a CUDA GPU, or on a CPU, where it needs a C++ compiler, and memory for a second copy of the weights, packed as the matrix
    products want them. Raises ConfigError for another device, or without the compiler."""
    if model.device.type not in ("cuda", "cpu"):
        raise ConfigError(f"engine 'compiled' runs on CUDA and CPUs, but the model is on {model.device}. Use --engine=eager.")
    check_compiler("compiled", model.device.type)
    fused = FusedModel(model)
    return GraphEngine("compiled", fused, to_pixels, compiled(fused.stages(), any_length=model.device.type == "cuda"))


def check_cuda(engine: str, device: torch.device) -> None:
    """Raises ConfigError where `device` is no CUDA GPU."""
    if device.type != "cuda":
        raise ConfigError(f"engine '{engine}' needs a CUDA GPU, but the model is on {device}. Use --device=cuda, or --engine=eager.")


def check_triton(engine: str, device: torch.device) -> None:
    """Raises ConfigError where Triton's kernels cannot run: an older GPU, one that is not NVIDIA's, or no C compiler to load them."""
    if torch.version.hip is not None:
        raise ConfigError("the Triton kernels are written for NVIDIA GPUs, but this is a ROCm build of torch. Use --engine=cuda_graph.")
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        needed, got = (".".join(map(str, version)) for version in (_TRITON_CAPABILITY, capability))
        raise ConfigError(f"the Triton kernels need compute capability {needed}, but this GPU has {got}. Use --engine=cuda_graph.")
    check_compiler(engine, device.type)
