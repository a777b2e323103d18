"""The stages of one inference as calls that can be repeated and timed: inputs are made once and stay in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.lib.program import show_progress
from benchmarks.lib.work import Ceilings, measure_ceilings, stage_work
from gr00t_fast.engine import PolicyInputs
from gr00t_fast.engine.cuda_graph import CallShape, CapturedGraph, GraphEngine, StaticCall
from gr00t_fast.measurement import percentiles
from gr00t_fast.model import Gr00t
from gr00t_fast.policy import Gr00tPolicy

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
        tokens = stages.encode_vision(tensors.pixel_values, call.constants)
        features = stages.encode_language(tensors.input_ids, tokens, call.constants)
        condition = stages.condition(stages.refine(features), tensors.state, call.constants)
    return {
        "pixels": call.pixels,
        "vision": lambda: stages.encode_vision(tensors.pixel_values, call.constants),
        "language": lambda: stages.encode_language(tensors.input_ids, tokens, call.constants),
        "refine": lambda: stages.condition(stages.refine(features), tensors.state, call.constants),
        "denoise": lambda: stages.denoise(noise, condition, call.tables),
    }


def measure_stages(policy: Gr00tPolicy, observation: dict[str, Any], rounds: int, seed: int) -> dict[str, Any]:
    """Of a policy with a GraphEngine. Per stage: time, FLOP and bytes of weights, and the floor at ceilings measured here. On a GPU each stage is a
    graph of its own."""
    engine, raw = policy.engine, policy.preprocess(observation)
    calls = {name: repeatable(call, engine.device) for name, call in stages_of(engine, raw, policy.denoising_steps, seed).items()}
    before = measure_ceilings(engine.device, engine.dtype)
    times = in_turns(calls, rounds, engine.device)
    ceilings = before.best(measure_ceilings(engine.device, engine.dtype))
    with torch.device("meta"):
        plain = Gr00t(engine.model.config).to(engine.dtype)
    tokens, image_tokens = raw.input_ids.shape[1], len(raw.image_positions)
    work = stage_work(plain, tokens, image_tokens, len(raw.frames), policy.denoising_steps)
    found: dict[str, Any] = {name: {"time_ms": percentiles(taken)} for name, taken in times.items()}
    for name, each in work.items():
        found[name] |= {"gflop": round(each.flop / 1e9, 2), "weight_mb": round(each.weight_bytes / 1e6, 1), "floor_ms": each.floor_ms(ceilings)}
    return {"stages": found, "floor_ms": sum(each.floor_ms(ceilings) for each in work.values()), "ceilings": _described(ceilings)}


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


def _described(ceilings: Ceilings) -> dict[str, float]:
    return {"tflop_per_s": round(ceilings.flop_per_s / 1e12, 3), "gb_per_s": round(ceilings.bytes_per_s / 1e9, 2)}
