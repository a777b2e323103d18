"""Camera frames to actions as one CUDA graph: one upload, one launch, one download, and nothing in between that asks the GPU a question.

Eager PyTorch launches some 1,500 kernels per inference, and the CPU that launches them is slower than the GPU that runs them: that is most of
the time on a fast GPU. A graph is recorded once per shape of call (batch, cameras and their sizes, prompt bucket, denoising steps) and
replayed with a single launch. `cuda_graph` records the plain model's own kernels; `compiled` lets Inductor fuse them first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.stages import Stages
from gr00t_fast.engine.static_call import CallShape, RawInputs, StaticCall, ToPixels
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.timing import StageTimer

log = logging.getLogger(__name__)
_CALLS_BEFORE_RECORDING = 3  # libraries choose kernels and allocate workspaces in their first calls, which a graph cannot hold
_KEPT_RECORDINGS = 8  # each holds its own buffers and intermediate results, some 100 MB


class Recording:
    """A StaticCall recorded as a CUDA graph, with the stream it runs on."""

    def __init__(self, call: StaticCall, pool: tuple[int, int]) -> None:
        """`pool`: where intermediate results live; recordings that never run at the same time may share one."""
        self.call = call
        self._stream = torch.cuda.Stream(priority=-1)  # before whatever keeps the clocks up
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

    def launch(self, raw: RawInputs, noise: Tensor) -> None:
        """Start one inference; returns before it has run."""
        self.call.fill(raw, noise)
        with torch.cuda.stream(self._stream):
            self.call.upload()
            self._graph.replay()
            self.call.download()
            self._done.record()

    def wait(self) -> np.ndarray:
        """Actions (B, H, A), normalised, fp32: a copy, since the next call writes the same memory."""
        self._done.synchronize()
        return self.call.answer.numpy().copy()


class CudaGraphEngine:
    """An Engine that also takes frames as they are (`run_raw`). Not thread-safe, as its policy is not."""

    name = "cuda_graph"
    continues = False

    def __init__(self, model: Gr00tN1d5, to_pixels: ToPixels | None) -> None:
        """Raises ConfigError without a CUDA GPU, or without `to_pixels`."""
        if model.device.type != "cuda":
            raise ConfigError(f"engine '{self.name}' needs a CUDA GPU, but the model is on {model.device}. Use --device=cuda, or --engine=eager.")
        if to_pixels is None:
            raise ConfigError(f"engine '{self.name}' runs from camera frames, not from tensors. Measure it with benchmarks/bench_stages.py.")
        self.model, self.to_pixels = model, to_pixels
        self._recordings: OrderedDict[CallShape, Recording] = OrderedDict()
        self._eager = EagerEngine(model)
        self._pool = torch.cuda.graph_pool_handle()
        self.stages = self._make_stages()

    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        """From tensors instead of frames, for comparisons: the eager engine's own path. The policy calls `run_raw`."""
        return self._eager.run(inputs, noise, denoising_steps, timer, goal)

    @torch.inference_mode()
    def run_raw(self, raw: RawInputs, noise: Tensor, denoising_steps: int, timer: StageTimer) -> np.ndarray:
        """noise fp32 (B, H, A) on the host -> normalised actions float32 (B, H, A). The first call of a shape records it, which takes seconds: warm
        the policy up with the instruction that it will get."""
        shape = CallShape.of(raw, denoising_steps)
        recording = self._recordings.get(shape) or self._record(shape, raw, noise)
        self._recordings.move_to_end(shape)
        with timer.stage("graph"):
            recording.launch(raw, noise)
            return recording.wait()

    def _record(self, shape: CallShape, raw: RawInputs, noise: Tensor) -> Recording:
        log.info("recording a CUDA graph for %d prompt tokens, %d denoising steps", shape.prompt_tokens, shape.denoising_steps)
        call = self._static_call(shape)
        call.fill(raw, noise)
        recording = Recording(call, self._pool)
        self._recordings[shape] = recording
        while len(self._recordings) > _KEPT_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording

    def _static_call(self, shape: CallShape) -> StaticCall:
        return StaticCall(self.model, shape, self.to_pixels, self.stages)

    def _make_stages(self) -> Stages:
        return Stages.of(self.model)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.model.device)


class CompiledEngine(CudaGraphEngine):
    """The same with kernels that Inductor fuses: the first call takes minutes."""

    name = "compiled"

    def _make_stages(self) -> Stages:
        return Stages.of(self.model).compiled()
