"""Linear layers of 8 bits: the arithmetic against references written in another way, the rewritten network, and what a GPU would be asked to run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_networks import TINY, load_network, write_network
from torch import Tensor, nn

from gr00t_fast.engine.quantized import (
    Fp8Linear,
    Fp8WeightLinear,
    InputScale,
    check_gpu,
    emulated_fp8_product,
    fp8_engine,
    fp8_product,
    inverse_of,
    linear_layers,
    rewritten,
    weight_step_of,
)
from gr00t_fast.errors import CheckpointError, EngineError
from gr00t_fast.model import Gr00t

CPU = torch.device("cpu")
SIZES = [(1, 64, 32), (16, 64, 32), (17, 96, 48), (49, 256, 112), (33, 24, 20), (5, 30, 7)]  # the last two need padding in every direction


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def layer(width: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(width, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(seeded(outputs, width, seed=1) * torch.logspace(-2, 1, outputs)[:, None])
        if bias:
            linear.bias.copy_(seeded(outputs, seed=2))
    return linear.to(dtype)


def fp8_layer(linear: nn.Linear, scale: InputScale, product: Callable = emulated_fp8_product) -> Fp8Linear:
    return Fp8Linear(linear, scale, inverse_of(scale, linear.in_features, CPU), weight_step_of([linear], scale), product)


# --- arithmetic, against NumPy


@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("smooth", [False, True])
def test_an_fp8_layer_computes_what_the_formulas_say(rows: int, width: int, outputs: int, smooth: bool) -> None:
    smoothing = np.linspace(0.25, 4, width, dtype=np.float32) if smooth else np.ones(width, np.float32)
    scale = InputScale(2.5, torch.from_numpy(smoothing) if smooth else None)
    linear, x = layer(width, outputs), seeded(rows, width)
    got = fp8_layer(linear, scale)(x).detach().numpy()
    weight = linear.weight.detach().numpy() * smoothing
    weight_step, step = np.abs(weight).max() / 448, np.float32(2.5 / 448)
    expected = e4m3(x.numpy() * (1 / smoothing / step)) @ e4m3(weight / weight_step).T * step * weight_step + linear.bias.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def e4m3(values: np.ndarray) -> np.ndarray:
    """To 4 significant bits, at least 2**-9, at most 448, ties to even: written from the format's definition."""
    limited = np.clip(values.astype(np.float64), -448, 448)
    exponent = np.floor(np.log2(np.maximum(np.abs(limited), 2.0**-6)))
    grid = 2.0 ** (exponent - 3)
    return np.rint(limited / grid) * grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hardware_layer_and_its_twin_agree(dtype: torch.dtype) -> None:
    linear, x, scale = layer(96, 48, dtype=dtype), seeded(2, 25, 96).to(dtype), InputScale(3.0)
    real, twin = fp8_layer(linear, scale, fp8_product), fp8_layer(linear, scale)
    assert (real(x).float() - twin(x).float()).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * twin(x).float().norm()
    assert real(x).dtype == dtype
    assert real(x).shape == (2, 25, 48)


@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_a_layer_of_8_bit_weights_computes_what_the_formulas_say(rows: int, width: int, outputs: int) -> None:
    linear, x = layer(width, outputs), seeded(rows, width)
    weight = linear.weight.detach().numpy()
    step = np.abs(weight).max(axis=1, keepdims=True) / 448
    expected = x.numpy() @ (e4m3(weight / step) * step).T + linear.bias.detach().numpy()
    np.testing.assert_allclose(Fp8WeightLinear(linear)(x).detach().numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_joined_layers_give_their_outputs_side_by_side() -> None:
    """Of widths that need padding; layers that share a scale share the step of their weights."""
    first, second, scale = layer(30, 7, bias=False), layer(30, 20, bias=False), InputScale(2.5)
    shared = (inverse_of(scale, 30, CPU), weight_step_of([first, second], scale))
    halves = [Fp8Linear(linear, scale, *shared, emulated_fp8_product) for linear in (first, second)]
    x = seeded(5, 30)
    torch.testing.assert_close(halves[0].joined_with(halves[1:])(x), torch.cat([half(x) for half in halves], dim=-1), rtol=0, atol=0)


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = layer(32, 16)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            linear.weight[3, 4] = bad
        for make in (lambda: fp8_layer(linear, InputScale(1.0)), lambda: Fp8WeightLinear(linear)):
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                make()


# --- the network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gr00t:
    return load_network(write_network(tmp_path_factory.mktemp("eight_bit"), TINY))


def test_scales_of_another_network_are_refused(model: Gr00t) -> None:
    with pytest.raises(EngineError, match=r"layers that this network lacks \(head.dit.blocks.99.mlp.up\).*gr00t-fast calibrate"):
        rewritten(model, {"head.dit.blocks.99.mlp.up": InputScale(1.0)})
    name = next(iter(linear_layers(model)))
    with pytest.raises(EngineError, match="calibration is for 5 inputs, the layer has 32"):
        rewritten(model, {name: InputScale(1.0, torch.ones(5))})


def test_the_engine_refuses_what_it_cannot_run(model: Gr00t, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"engine 'fp8' needs a CUDA GPU of compute capability 8.9 .* but the device is cpu"):
        fp8_engine(model, {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA RTX A4000")
    with pytest.raises(EngineError, match=r"NVIDIA RTX A4000 has 8.6. Use --engine=cuda_graph"):
        check_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 9))
    check_gpu(torch.device("cuda"))
