"""The recording of a CUDA graph: in which order, on which GPU, in which mode, and what it keeps alive. On a stand-in, which shows that the steps are
the right ones and nothing about CUDA."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cuda_stand_in import StandInCuda

from gr00t_fast.engine.capture import CapturedGraph

SECOND = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandInCuda:
    stand_in = StandInCuda()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


def noting(cuda: StandInCuda, what: str) -> Callable[[], None]:
    return lambda: cuda.note(what)


def test_a_launch_is_one_upload_one_replay_and_one_download(cuda: StandInCuda) -> None:
    graph = CapturedGraph(noting(cuda, "work"), cuda.Stream(SECOND), noting(cuda, "upload"), noting(cuda, "download"))
    assert graph.recorded
    assert cuda.log.count("work") > 1, "libraries choose kernels in their first calls"
    cuda.log.clear()
    graph.launch()
    assert cuda.log == ["upload", "replay", "download", "event recorded"]
    graph.wait()
    assert cuda.log[-1] == "event waited for"


def test_other_threads_may_allocate_while_it_is_recorded(cuda: StandInCuda) -> None:
    CapturedGraph(noting(cuda, "work"), cuda.Stream(SECOND))
    assert cuda.capture_modes == ["thread_local"]


def test_everything_happens_on_the_gpu_of_the_stream(cuda: StandInCuda) -> None:
    """The stand-in's current GPU is another one, and it has no way to wait for a whole GPU."""
    graph = CapturedGraph(noting(cuda, "work"), cuda.Stream(SECOND))
    graph.launch()
    graph.wait()
    assert set(cuda.devices) == {SECOND}


def test_what_the_graph_reads_lives_as_long_as_the_graph(cuda: StandInCuda) -> None:
    class Inputs:
        """What a closure owns."""

    inputs = Inputs()
    watched = weakref.ref(inputs)

    def work(inputs: Inputs = inputs) -> None:
        cuda.note("work")

    launch = CapturedGraph(work, cuda.Stream(SECOND)).launch  # all that a benchmark keeps
    del work, inputs
    gc.collect()
    assert watched() is not None
    launch()
    del launch
    gc.collect()
    assert watched() is None


def test_what_cannot_be_recorded_is_submitted_anew(cuda: StandInCuda) -> None:
    graph = CapturedGraph(noting(cuda, "work"), cuda.Stream(SECOND), capturable=lambda: False)
    assert not graph.recorded
    cuda.log.clear()
    graph.launch()
    graph.launch()
    assert cuda.log.count("work") == 2
    assert cuda.capture_modes == []
