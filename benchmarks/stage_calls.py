"""The stages of one inference, and the Triton kernels one by one, as calls that can be repeated and timed: inputs are made once and stay in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.lib.program import show_progress
from benchmarks.lib.work import Ceilings, measure_ceilings, stage_work
from gr00t_fast.engine import PolicyInputs
from gr00t_fast.engine.capture import CapturedGraph
from gr00t_fast.engine.graph import GraphEngine
from gr00t_fast.engine.static_call import CallShape, StaticCall
from gr00t_fast.measurement import percentiles
from gr00t_fast.model import network
from gr00t_fast.policy import Gr00tPolicy

_PROFILED_CALLS = 5
_SLEEP_CYCLES = 2_000_000  # some milliseconds in which the host gets ahead: an event would else wait for the launch of what it measures

Call = Callable[[], Any]
Repeatable = CapturedGraph | Call  # of `repeatable`


def stages_of(engine: GraphEngine, inputs: PolicyInputs, denoising_steps: int, seed: int) -> dict[str, Call]:
    """pixels, vision, language, refine, denoise for one observation, each from what the stage before left."""
    call = StaticCall(engine.model, CallShape.of(inputs, denoising_steps), engine.stages)
    call.fill(inputs, torch.randn(call.actions.shape, generator=torch.Generator().manual_seed(seed)))
    call.upload()
    stages = engine.stages
    with torch.no_grad():  # as the engine does: another mode would compile everything once more
        tensors, noise = call.model_inputs(call.pixels()), call.noise()
        tokens = stages.encode_vision(tensors.pixel_values)
        features = stages.encode_language(tensors, tokens)
        condition = stages.condition(stages.refine(features), tensors.state, tensors.image_positions)
    return {
        "pixels": call.pixels,
        "vision": lambda: stages.encode_vision(tensors.pixel_values),
        "language": lambda: stages.encode_language(tensors, tokens),
        "refine": lambda: stages.condition(stages.refine(features), tensors.state, tensors.image_positions),
        "denoise": lambda: stages.denoise(noise, condition, call.tables),
    }


def measure_stages(policy: Gr00tPolicy, observation: dict[str, Any], rounds: int, seed: int) -> dict[str, Any]:
    """Of a policy with a GraphEngine. Per stage: time, FLOP and bytes of weights, and the floor at ceilings measured here. On a GPU each stage is a
    graph of its own; kernels are counted last, because the profiler slows down what comes after it."""
    engine, raw = policy.engine, policy.preprocess(observation)
    calls = {name: repeatable(call, engine.device) for name, call in stages_of(engine, raw, policy.denoising_steps, seed).items()}
    before = measure_ceilings(engine.device, engine.dtype)
    times = in_turns(calls, rounds, engine.device)
    ceilings = before.best(measure_ceilings(engine.device, engine.dtype))
    with torch.device("meta"):
        plain = network(engine.model.config).to(engine.dtype)
    tokens, image_tokens = raw.input_ids.shape[1], len(raw.image_positions)
    work = stage_work(plain, tokens, image_tokens, len(raw.frames), policy.denoising_steps)
    found: dict[str, Any] = {name: {"time_ms": percentiles(taken)} for name, taken in times.items()}
    for name, each in work.items():
        found[name] |= {"gflop": round(each.flop / 1e9, 2), "weight_mb": round(each.weight_bytes / 1e6, 1), "floor_ms": each.floor_ms(ceilings)}
    if engine.device.type == "cuda":
        for name, call in calls.items():
            found[name] |= kernels_of(call, engine.device)
    return {"stages": found, "floor_ms": sum(each.floor_ms(ceilings) for each in work.values()), "ceilings": _described(ceilings)}


def measure_kernels(pairs: Mapping[str, Any], device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Each pair of benchmarks/lib/kernel_pairs.py: error against fp64 and, on a GPU, microseconds of the kernel, of torch and of torch.compile in its
    place, each call with inputs of its own, more than the caches hold, because weights come from memory in an inference too."""
    found: dict[str, Any] = {name: {"error": pair.error()} for name, pair in pairs.items()}
    if device.type != "cuda":
        return found
    ceilings = measure_ceilings(device, dtype)
    for number, (name, pair) in enumerate(pairs.items()):
        sets, moved = pair.sets(), pair.moved_bytes()
        torch.compiler.reset()
        contenders = {"triton": pair.kernel, "torch": pair.twin, "compiled": torch.compile(pair.twin, fullgraph=True, dynamic=False)}
        calls = {
            each: repeatable(lambda function=function, sets=sets: [function(*given) for given in sets], device)
            for each, function in contenders.items()
        }
        times = in_turns(calls, rounds, device)
        us = {each: round(1e3 * percentiles(taken)["p50"] / len(sets), 3) for each, taken in times.items()}
        floor_us = 1e6 * max(moved / ceilings.bytes_per_s, pair.flop / ceilings.flop_per_s)
        found[name] |= {"us": us, "floor_us": round(floor_us, 3), "mb": round(moved / 1e6, 3)}
        show_progress("kernel", number + 1, len(pairs))
    return found


def repeatable(call: Call, device: torch.device) -> Repeatable:
    """On CUDA a graph of `call`, which owns what it reads; elsewhere `call` itself, without autograd."""

    def plain() -> None:
        with torch.no_grad():
            call()

    return CapturedGraph(plain, torch.cuda.Stream(device)) if device.type == "cuda" else plain


def in_turns(calls: Mapping[str, Repeatable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """ms of each call, which take turns, so that a disturbance hits all alike; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + rounds):
        for name, call in calls.items():
            taken_ms = timed_ms(call, device)
            if number > 0:
                times[name].append(taken_ms)
        show_progress("round", number, rounds)
    return times


def timed_ms(call: Repeatable, device: torch.device) -> float:
    """Time of one call: between two events on the GPU, submitted while the GPU sleeps, so that launching is not in it; or on the host's clock."""
    if not isinstance(call, CapturedGraph):
        began_s = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began_s)
    graph = call
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(graph.stream):
            torch.cuda._sleep(_SLEEP_CYCLES)
            begin.record(graph.stream)
            graph.launch()
            end.record(graph.stream)
        end.synchronize()
    return begin.elapsed_time(end)


def kernels_of(graph: CapturedGraph, device: torch.device) -> dict[str, Any]:
    """Per call, from the CUDA profiler: kernels, their time (ms), and the time between the first and the last in which none ran."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    spans = []
    for _ in range(_PROFILED_CALLS):
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            graph.launch()
            graph.wait()
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


def _described(ceilings: Ceilings) -> dict[str, float]:
    return {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)}
