"""Which kernel computes attention: measured once per shape, not guessed.

On a GPU `scaled_dot_product_attention` has several back ends (flash, cuDNN, memory-efficient, written out) and takes the first of a fixed order
that can do a call. Which one is fastest depends on the GPU, on the shape and on the mask: a prompt padded to its bucket needs a mask, and flash
has none. A recorded inference has few shapes, each of which occurs many times, so each is tried before the recording.
Axis alphabet: B batch, N heads, T queries, S keys, K head dim.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_CUDA_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_CALLS_PER_MEASUREMENT = 20  # one kernel takes some microseconds, as long as an event's resolution
_MEASUREMENTS = 7
# Relative L2 distance from attention in fp32 that a back end may have: a few roundings of the format, and tf32 products in fp32.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}

# (B, N, T, K) of the queries, (B, M, S, K) of the keys, format, masked, causal, with a gradient
AttentionShape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool, bool, bool]


class AttentionChoice(TorchFunctionMode):
    """Inside `with choice:` attention of a measured shape runs on its fastest back end; everything else runs as it would without.

    `fastest` says what was chosen, `times_ms` what each candidate took. Without candidates (on a CPU, which has one fused kernel) nothing is
    measured and nothing changes.
    """

    def __init__(self, candidates: Sequence[SDPBackend] = ()) -> None:
        self.candidates = tuple(candidates)
        self.fastest: dict[AttentionShape, SDPBackend] = {}
        self.times_ms: dict[AttentionShape, dict[str, float]] = {}

    @classmethod
    def of(cls, device: torch.device) -> AttentionChoice:
        """With the back ends of the device."""
        return cls(_CUDA_BACKENDS if device.type == "cuda" else ())

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            backend = self.fastest.get(_shape_of(args, kwargs))
            if backend is not None:
                with sdpa_kernel(backend):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def measure(self, work: Callable[[], Any]) -> None:
        """Run `work` once and time the candidates for each shape of attention in it that is not known yet. Waits for the device."""
        if self.candidates:
            with _Measuring(self):
                work()

    def describe(self) -> list[dict[str, Any]]:
        """For reports: shapes, choice, and ms of each candidate that can do the call."""
        return [
            {"queries": list(shape[0]), "keys": list(shape[1]), "masked": shape[3], "causal": shape[4], "gradient": shape[5]}
            | {"back_end": self.fastest[shape].name, "times_ms": times}
            for shape, times in self.times_ms.items()
        ]

    def _try(self, shape: AttentionShape, call: Callable[[], Tensor], truth: Tensor) -> None:
        times = {}
        for backend in self.candidates:
            taken_ms = _time_of(backend, call, truth)
            if taken_ms is not None:
                times[backend] = taken_ms
        if times:
            self.fastest[shape] = min(times, key=times.__getitem__)
            self.times_ms[shape] = {backend.name: round(taken_ms, 5) for backend, taken_ms in times.items()}


class _Measuring(TorchFunctionMode):
    """Every call of attention as it would run anyway, after its shape has been tried."""

    def __init__(self, choice: AttentionChoice) -> None:
        self._choice = choice

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            shape = _shape_of(args, kwargs)
            if shape not in self._choice.fastest:
                self._choice._try(shape, lambda: func(*args, **kwargs), _in_fp32(args, kwargs))
        return func(*args, **kwargs)


def _shape_of(args: tuple, kwargs: Mapping[str, Any]) -> AttentionShape:
    query, key = args[0], args[1]
    masked = (args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None
    gradient = torch.is_grad_enabled() and query.requires_grad
    return tuple(query.shape), tuple(key.shape), query.dtype, masked, bool(kwargs.get("is_causal", False)), gradient


def _in_fp32(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    def wide(value: Any) -> Any:
        return value.detach().float() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})


def _time_of(backend: SDPBackend, call: Callable[[], Tensor], truth: Tensor) -> float | None:
    """ms of one call, or None for a back end that cannot do it, or does something else."""
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each refusal comes with a warning per reason
        try:
            out = call().detach()
            error = (out.float() - truth).norm() / truth.norm()
            if not bool(error < _TOLERANCE.get(out.dtype, 2e-3)):  # NaN is no pass either
                return None
            return _on_the_gpu_ms(call, out.device) if out.device.type == "cuda" else _on_the_host_ms(call)
        except RuntimeError:  # what torch raises when the one back end allowed has no kernel for the call, or none that can be recorded
            return None


def _on_the_gpu_ms(call: Callable[[], Tensor], device: torch.device) -> float:
    """From replays of a graph: launches one by one take longer than the kernels, and would all look alike."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_CALLS_PER_MEASUREMENT):
            call()
    times = []
    for _ in range(_MEASUREMENTS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / _CALLS_PER_MEASUREMENT


def _on_the_host_ms(call: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(_MEASUREMENTS):
        began_s = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began_s))
    return statistics.median(times)
