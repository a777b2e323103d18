"""The stages of one inference as calls that can be repeated and timed: their inputs are made once and stay where they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gr00t_fast.engine.stages import Stages
from gr00t_fast.engine.static_call import CallShape, RawInputs, StaticCall
from gr00t_fast.policy import Gr00tPolicy

_CALLS_BEFORE_RECORDING = 3  # as in engine/cuda_graph.py
_PROFILED_CALLS = 5

Call = Callable[[], Any]


def stages_of(policy: Gr00tPolicy, raw: RawInputs, seed: int) -> dict[str, Call]:
    """pixels, vision, language, refine, denoise for one observation, each from what the stage before left."""
    engine = policy.engine
    stages: Stages = getattr(engine, "stages", None) or Stages.of(engine.model)
    call = StaticCall(engine.model, CallShape.of(raw, policy.denoising_steps), policy.to_pixels, stages)
    call.fill(raw, torch.randn(call.actions.shape, generator=torch.Generator().manual_seed(seed)))
    call.upload()
    with torch.no_grad(), _attention_of(policy):  # as the engines do: another mode would compile everything once more
        inputs, noise = call.model_inputs(call.pixels()), call.noise()
        tokens = stages.encode_vision(inputs.pixel_values)
        features = stages.encode_language(inputs, tokens)
        condition = stages.prepare(features, inputs)
    return {
        "pixels": call.pixels,
        "vision": lambda: stages.encode_vision(inputs.pixel_values),
        "language": lambda: stages.encode_language(inputs, tokens),
        "refine": lambda: stages.prepare(features, inputs),
        "denoise": lambda: stages.denoise(noise, condition, call.tables),
    }


def _attention_of(policy: Gr00tPolicy) -> AbstractContextManager[Any]:
    """The engine's choice of back ends, which its stages are recorded with."""
    choice = getattr(policy.engine, "attention", None)
    return choice if choice is not None and choice.candidates else nullcontext()


def recorded(call: Call, policy: Gr00tPolicy) -> Call:
    """On CUDA the replay of a graph of `call`; elsewhere `call` itself, without autograd."""
    device = policy.device

    def plain() -> Any:
        with torch.no_grad(), _attention_of(policy):
            return call()

    if device.type != "cuda":
        return plain
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_CALLS_BEFORE_RECORDING):
            plain()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        plain()
    return graph.replay


def timed_ms(call: Call, device: torch.device) -> float:
    """Time of one call: between two events on the GPU, or on the host's clock."""
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began_s)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def kernels_of(call: Call) -> dict[str, Any]:
    """Per call, from the CUDA profiler: kernels, their time (ms), and the time between the first and the last in which none ran."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    spans = []
    for _ in range(_PROFILED_CALLS):
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            call()
            torch.cuda.synchronize()
        # the host's calls of the CUDA runtime are among the events: one that waits for the device would cover every gap
        on_device = [event.time_range for event in recording.events() if event.device_type == DeviceType.CUDA]
        spans.append([(span.start, span.end) for span in on_device if span.end > span.start])
    middle = sorted(map(busy_and_idle_ms, spans), key=sum)[len(spans) // 2]
    return {"kernels": len(spans[-1]), "busy_ms": round(middle[0], 4), "idle_ms": round(middle[1], 4)}


def busy_and_idle_ms(spans_us: list[tuple[float, float]]) -> tuple[float, float]:
    """Of intervals that may overlap: the time that at least one covers, and the gaps between them."""
    if not spans_us:
        return 0.0, 0.0
    busy, reached = 0.0, min(begin for begin, _ in spans_us)
    first = reached
    for begin, end in sorted(spans_us):
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return busy / 1000, (reached - first - busy) / 1000
