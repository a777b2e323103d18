"""A stand-in for what the TensorRT engine asks of CUDA, on the CPU: streams that run at once, and graphs that repeat what was recorded.

It shows that the engine's own steps fit together. It shows nothing about CUDA, TensorRT or the order in which a GPU runs things.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gr00t_fast.engine import tensorrt_engine as module
from gr00t_fast.engine.stage_program import RunStage, StageProgram


class EagerStream:
    """Everything on it has already run."""

    def __init__(self, *_: Any) -> None:
        """Whatever the device."""

    def wait_stream(self, other: Any) -> None:
        """It has run."""

    def synchronize(self) -> None:
        """It has run."""


class RepeatingGraph:
    """Repeats the sequence that was submitted while it was recorded, on the same tensors."""

    recording: RepeatingGraph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
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
    """Replace CUDA and the execution of stages in gr00t_fast.engine.tensorrt_engine."""

    @contextlib.contextmanager
    def record(graph: RepeatingGraph, **_: Any) -> Iterator[None]:
        RepeatingGraph.recording = graph
        yield
        RepeatingGraph.recording = None

    class StandInExecution:
        capturable = True

        def __init__(self, stage: StandInStage, shapes: Mapping[str, tuple[int, ...]], scratch: Tensor, stream: Any) -> None:
            self._name, self._shapes = stage.name, shapes

        def enqueue(self, tensors: Mapping[str, Tensor]) -> None:
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(self._shapes), self._name
            run_stage(self._name, tensors)

    class RecordedProgram(StageProgram):
        def enqueue(self, run_stage: RunStage) -> None:
            if RepeatingGraph.recording is None:
                super().enqueue(run_stage)
            else:  # what is recorded does not run
                RepeatingGraph.recording.work.append(functools.partial(StageProgram.enqueue, self, run_stage))

    cuda = SimpleNamespace(
        Stream=EagerStream,
        CUDAGraph=RepeatingGraph,
        graph=record,
        stream=lambda _: contextlib.nullcontext(),
        current_stream=lambda *_: EagerStream(),
        device=lambda _: contextlib.nullcontext(),
        synchronize=lambda *_: None,
        get_device_capability=lambda _: (8, 6),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(module, "StageExecution", StandInExecution)
    monkeypatch.setattr(module, "StageProgram", RecordedProgram)
    monkeypatch.setattr(module, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(module, "LoadedStage", lambda trt, file, cache, remedy: StandInStage(file.stem))
