"""A stand-in for what engines ask of CUDA, on the CPU: streams that run at once, and graphs that repeat what was recorded.

It shows that an engine's own steps fit together. It shows nothing about CUDA, TensorRT or the order in which a GPU runs things.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gr00t_fast.engine import tensorrt
from gr00t_fast.engine.tensorrt import RunStage, StageProgram


class StandInCuda:
    """`torch.cuda` with one stream's worth of meaning: work runs at once, and a graph repeats what was recorded. `log` says what was asked for,
    `devices` of which GPUs. What is not here, asking for fails: to wait for a whole GPU, for one."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.devices: list[torch.device | None] = []
        self.capture_modes: list[str] = []
        self.recording: RepeatingGraph | None = None
        self.Stream = lambda device: EagerStream(self, device)
        self.CUDAGraph = lambda: RepeatingGraph(self)
        self.Event = lambda: StandInEvent(self)

    def note(self, what: str) -> None:
        self.log.append(what)

    @contextlib.contextmanager
    def graph(self, graph: RepeatingGraph, pool: Any, stream: EagerStream, capture_error_mode: str) -> Iterator[None]:
        self.capture_modes.append(capture_error_mode)
        self.devices.append(stream.device)
        self.recording = graph
        yield
        self.recording = None

    def stream(self, stream: EagerStream) -> contextlib.AbstractContextManager:
        self.devices.append(stream.device)
        return contextlib.nullcontext()

    def device(self, device: torch.device | None) -> contextlib.AbstractContextManager:
        self.devices.append(device)
        return contextlib.nullcontext()

    def current_stream(self, device: torch.device | None = None) -> EagerStream:
        self.devices.append(device)
        return EagerStream(self, device)


class EagerStream:
    """Everything on it has already run."""

    def __init__(self, cuda: StandInCuda, device: torch.device | None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        """It has run."""

    def synchronize(self) -> None:
        """It has run."""


class StandInEvent:
    def __init__(self, cuda: StandInCuda) -> None:
        self._cuda = cuda

    def record(self, stream: EagerStream) -> None:
        self._cuda.note("event recorded")

    def synchronize(self) -> None:
        self._cuda.note("event waited for")


class RepeatingGraph:
    """Repeats the sequence that was submitted while it was recorded, on the same tensors."""

    def __init__(self, cuda: StandInCuda) -> None:
        self._cuda = cuda
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        self._cuda.note("replay")
        for submit in self.work:
            submit()


class StandInStage:
    scratch_bytes = 64

    def __init__(self, name: str) -> None:
        self.name = name

    def check_dtypes(self, dtype: torch.dtype) -> None:
        """Nothing is loaded."""

    def save_cache(self) -> None:
        """Nothing is compiled."""


def install(monkeypatch: pytest.MonkeyPatch, run_stage: RunStage) -> None:
    """Replace CUDA and the execution of stages in gr00t_fast.engine.tensorrt."""

    cuda = StandInCuda()
    cuda.synchronize = lambda *_: None
    cuda.get_device_capability = lambda _: (8, 6)

    class StandInExecution:
        capturable = True

        def __init__(self, stage: StandInStage, shapes: Mapping[str, tuple[int, ...]], scratch: Tensor, stream: Any) -> None:
            self._name, self._shapes = stage.name, shapes

        def enqueue(self, tensors: Mapping[str, Tensor]) -> None:
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(self._shapes), self._name
            run_stage(self._name, tensors)

    class RecordedProgram(StageProgram):
        def enqueue(self, run_stage: RunStage) -> None:
            if cuda.recording is None:
                super().enqueue(run_stage)
            else:  # what is recorded does not run
                cuda.recording.work.append(functools.partial(StageProgram.enqueue, self, run_stage))

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(tensorrt, "StageExecution", StandInExecution)
    monkeypatch.setattr(tensorrt, "StageProgram", RecordedProgram)
    monkeypatch.setattr(tensorrt, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "LoadedStage", lambda trt, file, cache, remedy: StandInStage(file.stem))
