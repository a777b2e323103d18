"""The recording of a CUDA graph: what CUDA refuses meanwhile, what one launch asks for, on which GPU, and what it keeps alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from fakecuda import ROOT, Device
from torch import Tensor

from gr00t_fast import load_policy
from gr00t_fast.engine.cuda_graph import CapturedGraph

SECOND = torch.device("cuda", 1)


def recorded(work: Callable[[Tensor], object]) -> CapturedGraph:
    seen = torch.ones(4, device="cuda")
    return CapturedGraph(lambda: work(seen), torch.cuda.Stream())


@pytest.mark.parametrize(
    ("work", "allowed"),
    [
        (lambda x: x + 1, True),
        (lambda x: x.sum().item(), False),
        (lambda x: x.nonzero(), False),
        (lambda x: x[x > 0], False),
        (lambda x: x + torch.tensor([1.0, 2, 3, 4], device="cuda"), False),
        (lambda x: torch.cuda.synchronize(), False),
        (lambda x: torch.empty(1 << 24, pin_memory=True), False),
    ],
)
def test_the_stand_in_refuses_what_a_recording_may_not_hold(work: Callable[[Tensor], object], allowed: bool, device: Device) -> None:
    """Without which its word on the engines would be worth nothing."""
    graph = torch.cuda.CUDAGraph()
    seen = torch.ones(4, device="cuda")
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            work(seen)
    except RuntimeError:
        assert not allowed
    else:
        assert allowed
    assert bool(device.violations) is not allowed


def test_a_launch_is_one_upload_one_replay_and_one_download(device: Device) -> None:
    host, there = torch.zeros(4, pin_memory=True), torch.zeros(4, device="cuda")

    def upload() -> None:
        there.copy_(host, non_blocking=True)

    def download() -> None:
        host.copy_(there, non_blocking=True)

    runs = []
    graph = CapturedGraph(lambda: runs.append(there + 1), torch.cuda.Stream(), upload, download)
    assert len(runs) > 2, "libraries choose kernels in their first calls"
    device.reset()
    graph.launch()
    once = {"graph launch": 1, "memcpyAsync pinned->device": 1, "memcpyAsync device->pinned": 1}
    assert device.counted() == once
    graph.wait()
    assert device.counted() == once | {"cudaEventSynchronize": 1}


def test_other_threads_may_allocate_while_it_is_recorded(device: Device) -> None:
    """Cameras and recorders use pinned memory."""
    sizes = (1 << power for power in range(20, 30))  # none fits where another one was

    def work(x: Tensor) -> None:
        thread = threading.Thread(target=lambda: torch.empty(next(sizes), dtype=torch.uint8, pin_memory=True))
        thread.start()
        thread.join()
        x.add_(1)

    recorded(work)
    assert device.hostallocs > 3
    assert device.violations == 0


def test_everything_happens_on_the_gpu_of_the_stream() -> None:
    """Which is not the current one."""
    used = []
    graph = CapturedGraph(lambda: used.append(torch.cuda.current_device()), torch.cuda.Stream(SECOND))
    graph.launch()
    graph.wait()
    assert set(used) == {1}
    assert torch.cuda.current_device() == 0


def test_what_the_graph_reads_lives_as_long_as_the_graph() -> None:
    seen = torch.ones(4, device="cuda")
    watched = weakref.ref(seen)
    launch = CapturedGraph(lambda seen=seen: seen.add_(1), torch.cuda.Stream()).launch  # all that a benchmark keeps
    del seen
    gc.collect()
    assert watched() is not None
    launch()
    del launch
    gc.collect()
    assert watched() is None


def test_eager_waits_for_its_own_work_and_not_for_the_whole_gpu(device: Device) -> None:
    policy = load_policy(ROOT / "checkpoints" / "so100-sim-reach", device="cuda", engine="eager")
    with torch.backends.cudnn.flags(enabled=False):  # of which there is no stand-in
        policy.get_action(policy.example_observation())
    counted = device.counted()
    assert counted["cudaStreamSynchronize"] > 0
    assert counted["cudaDeviceSynchronize"] == 0
