"""Attention by measurement, tried on the two back ends that a CPU has: torch's fused kernel and the product written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from gr00t_fast.engine import attention as module
from gr00t_fast.engine.attention import AttentionChoice

FUSED, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
KERNEL = {FUSED: "aten::_scaled_dot_product_flash_attention_for_cpu", MATH: "aten::_scaled_dot_product_attention_math"}


def tensors(queries: int = 6, keys: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, tokens, 8, generator=generator) for tokens in (queries, keys, keys))


def kernels(choice: AttentionChoice, *args, **kwargs) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recording, choice:
        F.scaled_dot_product_attention(*args, **kwargs)
    return {event.name for event in recording.events()}


def test_each_shape_runs_on_the_one_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are given, so that either can win: small shapes the fused kernel, the others the product."""
    choice, measured = AttentionChoice((FUSED, MATH)), []

    def time_of(call) -> float:
        with profile(activities=[ProfilerActivity.CPU]) as recording:
            out = call()
        fused = KERNEL[FUSED] in {event.name for event in recording.events()}
        measured.append(fused)
        return 1.0 if fused == (out.shape[2] < 10) else 2.0

    monkeypatch.setattr(module, "_on_the_host_ms", time_of)
    small, large = tensors(), tensors(queries=20)

    def work() -> None:
        for q, k, v in (small, large, small):
            F.scaled_dot_product_attention(q, k, v)

    choice.measure(work)
    assert measured == [True, False, True, False], "each candidate once per shape"
    assert KERNEL[FUSED] in kernels(choice, *small)
    assert KERNEL[MATH] in kernels(choice, *large)
    described = choice.describe()
    assert [entry["back_end"] for entry in described] == ["FLASH_ATTENTION", "MATH"]
    assert described[1] == {
        **{"queries": [2, 4, 20, 8], "keys": [2, 4, 9, 8], "masked": False, "causal": False, "gradient": False},
        **{"back_end": "MATH", "times_ms": {"FLASH_ATTENTION": 2.0, "MATH": 1.0}},
    }
    choice.measure(work)
    assert len(measured) == 4, "known shapes are not measured again"


def test_masks_and_causality_are_shapes_of_their_own() -> None:
    choice, (q, k, v) = AttentionChoice((FUSED, MATH)), tensors(9, 9)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with torch.enable_grad():
            F.scaled_dot_product_attention(q.clone().requires_grad_(), k, v)

    choice.measure(work)
    kinds = [(entry["masked"], entry["causal"], entry["gradient"]) for entry in choice.describe()]
    assert kinds == [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]
    with choice:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), F.scaled_dot_product_attention(q, k, v))


def test_a_back_end_that_cannot_is_left_out() -> None:
    choice, (q, k, v) = AttentionChoice((SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, MATH)), tensors()
    choice.measure(lambda: F.scaled_dot_product_attention(q, k, v))
    (entry,) = choice.describe()
    assert list(entry["times_ms"]) == ["MATH"]


@pytest.mark.parametrize("wrong", [torch.nan, 1.0])
def test_a_back_end_that_is_fast_and_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    choice, (q, k, v) = AttentionChoice((FUSED, MATH)), tensors()
    monkeypatch.setattr(module, "_in_fp32", lambda args, kwargs: torch.full_like(args[0], wrong))
    choice.measure(lambda: F.scaled_dot_product_attention(q, k, v))
    assert choice.fastest == {}
    assert KERNEL[FUSED] in kernels(choice, q, k, v), "then nothing changes"


def test_on_a_cpu_nothing_is_measured_and_nothing_changes() -> None:
    choice, (q, k, v) = AttentionChoice.of(torch.device("cpu")), tensors()
    choice.measure(lambda: pytest.fail("nothing to measure"))
    assert KERNEL[FUSED] in kernels(choice, q, k, v)
    assert choice.describe() == []


@pytest.mark.parametrize("backend", [FUSED, MATH])
def test_the_choice_is_traced_into_compiled_code(backend: SDPBackend) -> None:
    """A compiled stage is traced inside the choice; without a graph break, and with the chosen kernel in it."""
    choice, (q, k, v) = AttentionChoice((backend,)), tensors()
    with torch.no_grad():
        choice.measure(lambda: F.scaled_dot_product_attention(q, k, v))
        torch.compiler.reset()
        compiled = torch.compile(lambda a, b, c: F.scaled_dot_product_attention(a, b, c) + 1, fullgraph=True, dynamic=False, backend="aot_eager")
        with profile(activities=[ProfilerActivity.CPU]) as recording, choice:
            got = compiled(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v) + 1
    torch.testing.assert_close(got, expected)
    names = {event.name for event in recording.events()}
    assert (KERNEL[FUSED] in names) == (backend == FUSED)
