"""Camera frames to joint targets as one CUDA graph: one upload, one launch, one download, and nothing in between that asks the GPU a question.

Eager PyTorch launches some 1,500 kernels per inference, and the CPU that launches them is slower than the GPU that runs them: that is most of
the time on a fast GPU. A graph is recorded once per shape of call (batch, cameras and their sizes, prompt bucket, denoising steps, and whether and
how a chunk continues another one) and replayed with a single launch. `cuda_graph` records torch's own kernels over weights laid out once;
`compiled` lets Inductor fuse them first, and runs on a CPU too, where nothing is recorded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.attention import AttentionChoice
from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.keep_warm import KeepWarm, matrix_burst
from gr00t_fast.engine.laid_out import laid_out_stages
from gr00t_fast.engine.stages import Stages
from gr00t_fast.engine.static_call import CallShape, RawInputs, StaticCall, ToJoints, ToPixels
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.timing import StageTimer

log = logging.getLogger(__name__)
_CALLS_BEFORE_RECORDING = 3  # libraries choose kernels and allocate workspaces in their first calls, which a graph cannot hold
_KEPT_RECORDINGS = 8  # each holds its own buffers and intermediate results, some 100 MB


class Recording:
    """A StaticCall recorded as a CUDA graph, with the stream it runs on."""

    def __init__(self, call: StaticCall, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        """`pool`: where intermediate results live; recordings that never run at the same time may share one, on the same stream."""
        self.call = call
        self._stream = stream
        self._done = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_CALLS_BEFORE_RECORDING):
                call.upload()
                call.compute()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool, stream=self._stream):
            call.compute()

    def launch(self, raw: RawInputs, noise: Tensor, goal: Goal | None = None) -> None:
        """Start one inference; returns before it has run."""
        self.call.fill(raw, noise, goal)
        with torch.cuda.stream(self._stream):
            self.call.upload()
            self._graph.replay()
            self.call.download()
            self._done.record()

    def wait(self) -> np.ndarray:
        """Actions fp32 (B, H, A): a copy, since the next call writes the same memory."""
        self._done.synchronize()
        return self.call.answer.numpy().copy()


class Unrecorded:
    """The same computation on a CPU, which has no graphs: `launch` runs it."""

    def __init__(self, call: StaticCall) -> None:
        self.call = call

    def launch(self, raw: RawInputs, noise: Tensor, goal: Goal | None = None) -> None:
        self.call.fill(raw, noise, goal)
        self.call.upload()
        self.call.compute()
        self.call.download()

    def wait(self) -> np.ndarray:
        return self.call.answer.numpy().copy()


class CudaGraphEngine:
    """An Engine that also takes frames as they are (`run_raw`). Not thread-safe, as its policy is not.

    Subclasses give other stages (`_make_stages`). `attention` says which back end was measured as the fastest for each shape of attention.
    """

    name = "cuda_graph"
    continues = True
    device_types: tuple[str, ...] = ("cuda",)

    def __init__(self, model: Gr00tN1d5, to_pixels: ToPixels | None) -> None:
        """Raises ConfigError for a model on a device that the engine cannot use, or without `to_pixels`."""
        if model.device.type not in self.device_types:
            where = "a CUDA GPU" if self.device_types == ("cuda",) else f"one of {', '.join(self.device_types)}"
            raise ConfigError(f"engine '{self.name}' needs {where}, but the model is on {model.device}. Use --device=cuda, or --engine=eager.")
        if to_pixels is None:
            raise ConfigError(f"engine '{self.name}' runs from camera frames, not from tensors. Measure it with benchmarks/bench_stages.py.")
        self.model, self.to_pixels = model, to_pixels
        self._to_joints: ToJoints | None = None
        self._recordings: OrderedDict[CallShape, Recording | Unrecorded] = OrderedDict()
        self._eager = EagerEngine(model)
        self._pool: tuple[int, int] | None = None
        # of higher priority than whatever keeps the clocks up
        self._stream = torch.cuda.Stream(model.device, priority=-1) if model.device.type == "cuda" else None
        self.attention = AttentionChoice.of(model.device)
        self._warm: KeepWarm | None = None
        self.stages = self._make_stages()

    @property
    def to_joints(self) -> ToJoints | None:
        """What the recorded computation ends with. Setting it forgets what was recorded."""
        return self._to_joints

    @to_joints.setter
    def to_joints(self, to_joints: ToJoints | None) -> None:
        self._to_joints = to_joints
        self._recordings.clear()

    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        """From tensors instead of frames, for comparisons: the eager engine's own path. The policy calls `run_raw`."""
        return self._eager.run(inputs, noise, denoising_steps, timer, goal)

    @torch.no_grad()  # not inference mode: guidance needs tensors that autograd takes, and compiled stages are compiled for one mode
    def run_raw(self, raw: RawInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> np.ndarray:
        """noise fp32 (B, H, A), and `goal` to continue a chunk, on the host -> actions float32 (B, H, A). The first call of a shape records it,
        which takes seconds: warm the policy up with the instruction that it will get."""
        shape = CallShape.of(raw, denoising_steps, goal)
        with timer.stage("graph"), self._warm.paused() if self._warm else nullcontext():  # a recording bears no launches of other threads
            recording = self._recordings.get(shape) or self._record(shape, raw, noise, goal)
            self._recordings.move_to_end(shape)
            recording.launch(raw, noise, goal)
            return recording.wait()

    def _record(self, shape: CallShape, raw: RawInputs, noise: Tensor, goal: Goal | None) -> Recording | Unrecorded:
        log.info("preparing %s for %d prompt tokens, %d denoising steps", self.name, shape.prompt_tokens, shape.denoising_steps)
        self._choose_attention(shape, raw, noise, goal)
        call = self._static_call(shape)
        call.fill(raw, noise, goal)
        if self._stream is None:
            recording = Unrecorded(call)
            with self._while_preparing():
                call.compute()
        else:
            if not self._recordings:  # a pool goes with the last recording that used it
                self._pool = torch.cuda.graph_pool_handle()
            with self.attention:
                recording = Recording(call, self._pool, self._stream)
        self._recordings[shape] = recording
        while len(self._recordings) > _KEPT_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording

    def _choose_attention(self, shape: CallShape, raw: RawInputs, noise: Tensor, goal: Goal | None) -> None:
        """On a GPU, by running the stages once. A compiled one would take minutes and show nothing."""
        if not self.attention.candidates:
            return
        call = StaticCall(self.model, shape, self.to_pixels, self._stages_to_measure())
        call.fill(raw, noise, goal)
        call.upload()
        self.attention.measure(call.compute)

    def _static_call(self, shape: CallShape) -> StaticCall:
        return StaticCall(self.model, shape, self.to_pixels, self.stages, self._to_joints)

    def _make_stages(self) -> Stages:
        return laid_out_stages(self.model)

    def _stages_to_measure(self) -> Stages:
        """Whose attention is measured: the same shapes as in `stages`."""
        return self.stages

    def _while_preparing(self) -> AbstractContextManager[Any]:
        """Around the first computation of a shape on a CPU."""
        return nullcontext()

    @contextmanager
    def kept_warm(self) -> Iterator[KeepWarm]:
        """Inside, a little work between inferences keeps the GPU's clocks up, for electricity; an inference has the GPU to itself."""
        with KeepWarm(self._burst()) as self._warm:
            try:
                yield self._warm
            finally:
                self._warm = None

    def _burst(self) -> Callable[[], None]:
        return matrix_burst(self.model.device)

    def synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class CompiledEngine(CudaGraphEngine):
    """The same with kernels that Inductor fuses: the first call takes minutes. On a CPU a C++ compiler is needed, and memory for a second copy of
    the weights, packed as the matrix products want them."""

    name = "compiled"
    device_types = ("cuda", "cpu")
    compiles = True
    _uncompiled: Stages | None = None

    def _make_stages(self) -> Stages:
        if self.compiles:
            check_compiler(self.name, self.model.device.type)
        self._uncompiled = laid_out_stages(self.model)
        return self._uncompiled.compiled()

    def _stages_to_measure(self) -> Stages:
        return self._uncompiled or self.stages

    def _while_preparing(self) -> AbstractContextManager[Any]:
        """Weights become constants, which Inductor packs. The setting has to be there when a stage is traced: as an option of torch.compile it comes
        too late, and the weights stay arguments."""
        import torch._inductor.config as inductor

        return inductor.patch(freezing=True)
