"""Linear layers of 8 bits: the arithmetic against references written in another way, the rewritten network, and what a GPU would be asked to run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_networks import TINY, load_network, random_inputs, write_network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gr00t_fast.engine.fp8 import Calibration, check_gpu, fp8_engine
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.engine.quantized import (
    PARTS,
    Fp8Linear,
    Fp8WeightLinear,
    InputScale,
    emulated_fp8_product,
    fp8_product,
    inverse_of,
    linear_layers,
    part_of,
    rewritten,
    to_fp8,
    weight_bytes,
    weight_step_of,
)
from gr00t_fast.errors import CheckpointError, EngineError
from gr00t_fast.export.calibrate import InputStatistics, choose_scale
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


def test_fp8_is_e4m3_and_saturates() -> None:
    values = torch.cat((seeded(4096) * 10, seeded(4096) * 1e-3, seeded(512) * 1e4))
    np.testing.assert_array_equal(to_fp8(values).float().numpy(), e4m3(values.numpy()))
    assert to_fp8(torch.tensor([1e9, -1e9])).float().tolist() == [448, -448]


def test_torch_has_the_fp8_product_on_the_cpu_too_and_it_is_the_twins() -> None:
    rows, weight = to_fp8(seeded(49, 96)), to_fp8(seeded(48, 96, seed=1))
    scales, bias = (torch.tensor(0.5), torch.tensor(0.25)), seeded(48, seed=2)
    for dtype, given in ((torch.float32, None), (torch.bfloat16, bias.bfloat16())):
        real, twin = (product(rows, weight, *scales, given, dtype).float() for product in (fp8_product, emulated_fp8_product))
        assert (real - twin).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * twin.norm()


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


def outliers(rows: int, width: int, seed: int = 0) -> Tensor:
    """As trained transformers have them: some channels a hundred times as large as the others, and some tokens several times."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.where(torch.rand(width, generator=generator) < 0.02, 100.0, 1.0)
    tokens = torch.where(torch.rand(rows, 1, generator=generator) < 0.05, 5.0, 1.0)
    return torch.randn(rows, width, generator=generator) * channels * tokens


def test_outliers_cost_little_once_balanced() -> None:
    linear, seen, fresh = nn.Linear(256, 128), outliers(400, 256), outliers(100, 256, seed=1)
    with torch.no_grad():
        linear.weight.copy_(seeded(128, 256) * 0.05 / torch.where(seen.abs().amax(dim=0) > 50, 10.0, 1.0))  # weights of outliers are smaller
    fresh *= seen.abs().amax(dim=0) / fresh.abs().amax(dim=0)  # the same channels
    scale, _ = choose_scale(InputStatistics(("a",), seen.abs().amax(dim=0), 400, [seen]), [linear.weight.detach().t()], "fp8")
    made = fp8_layer(linear, scale)
    truth = linear(fresh).detach()
    assert 1e-3 < float((made(fresh).detach() - truth).norm() / truth.norm()) < 0.06


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = layer(32, 16)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            linear.weight[3, 4] = bad
        for make in (lambda: fp8_layer(linear, InputScale(1.0)), lambda: Fp8WeightLinear(linear)):
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                make()


def test_inputs_that_are_always_zero_are_no_division_by_zero() -> None:
    x, linear = torch.zeros(20, 32), layer(32, 16)
    torch.testing.assert_close(fp8_layer(linear, InputScale(0.0))(x), linear(x))


# --- the network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gr00t:
    return load_network(write_network(tmp_path_factory.mktemp("eight_bit"), TINY))


def scales_for(model: Gr00t) -> dict[str, InputScale]:
    """Gate and up read one tensor."""
    found = {name: InputScale(8.0) for name in linear_layers(model)}
    return found | {name: found[name.replace("mlp.up", "mlp.gate")] for name in found if name.startswith("language") and name.endswith("mlp.up")}


def test_every_layer_that_runs_per_observation_is_found(model: Gr00t) -> None:
    """But the keys and values of the DiT, which are read once, and its last layer, which is multiplied with the decoder's."""
    found = linear_layers(model)
    vision_layers, language_layers, dit_layers, vl_layers = TINY.vision[2], TINY.language[2], TINY.dit[0], TINY.vl[0]
    assert [part_of(name) for name in found] == sorted((part_of(name) for name in found), key=list(PARTS).index)
    assert len(found) == 4 * vision_layers + 5 * language_layers + 4 * vl_layers + dit_layers * 4
    assert not any("ada_norm" in name or "time" in name for name in found)


def test_a_rewritten_network_shares_all_but_the_replaced_layers(model: Gr00t) -> None:
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    scales = {name: scale for name, scale in scales_for(model).items() if part_of(name) in ("vision", "dit")}
    made = rewritten(model, scales, emulated=True)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert {name: id(parameter) for name, parameter in made.named_parameters()} == {
        name: key for name, key in before.items() if name.rpartition(".")[0] not in scales
    }
    assert isinstance(made.vision.blocks[0].mlp.up, Fp8Linear)
    assert isinstance(made.head.dit.blocks[0].mlp.up, Fp8WeightLinear)
    assert isinstance(model.head.dit.blocks[0].mlp.up, nn.Linear)
    assert made.dtype == model.dtype
    assert isinstance(made, Gr00t)


def test_memory_shrinks_once_the_plain_network_is_dropped(tmp_path) -> None:
    """The fused model keeps nothing of it either."""
    plain = load_network(write_network(tmp_path, TINY), torch.bfloat16)
    whole, replaced = weight_bytes(plain), sum(layer.weight.numel() for layer in linear_layers(plain).values())
    gone = [weakref.ref(layer.weight) for layer in linear_layers(plain).values()]
    made = rewritten(plain, scales_for(plain), emulated=True)
    fused = FusedModel(made)
    del plain
    gc.collect()
    assert all(reference() is None for reference in gone)
    spared, overhead = 2 * replaced, 1.6 * replaced  # of 16-bit weights; 8-bit ones, their scales and the input scales (much, at this size)
    assert weight_bytes(made) < whole - spared + overhead
    mlp = made.language.blocks[0].mlp
    gate, up, both = (layer.weight.view(torch.uint8) for layer in (mlp.gate, mlp.up, fused.gate_up[0]))
    assert torch.equal(torch.cat((gate, up)), both)
    assert gate.data_ptr() == both.data_ptr(), "nothing is held twice"
    assert fused.dtype == torch.bfloat16


def test_a_rewritten_network_gives_nearly_the_same_actions(model: Gr00t) -> None:
    inputs, noise = random_inputs(model.config)
    tables = model.head.step_tables(2)
    with torch.inference_mode():
        truth = model(inputs, noise, tables)
        got = rewritten(model, scales_for(model), emulated=True)(inputs, noise, tables)
    error = float((got - truth).norm() / (truth - noise).norm())
    assert 1e-5 < error < 0.4  # random weights, scales by guess: rounded, and still this network


def test_scales_of_another_network_are_refused(model: Gr00t) -> None:
    with pytest.raises(EngineError, match=r"layers that this network lacks \(head.dit.blocks.99.mlp.up\).*gr00t-fast calibrate"):
        rewritten(model, {"head.dit.blocks.99.mlp.up": InputScale(1.0)})
    name = next(iter(linear_layers(model)))
    with pytest.raises(EngineError, match="calibration is for 5 inputs, the layer has 32"):
        rewritten(model, {name: InputScale(1.0, torch.ones(5))})


# --- what a GPU would be asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_strides_and_types_are_those_that_cuda_takes(dtype: torch.dtype, tmp_path) -> None:
    """Torch's own checks of the CUDA operators, on tensors without memory."""
    plain = load_network(write_network(tmp_path, TINY), dtype)
    called = []

    def watched_fp8_product(*arguments) -> Tensor:
        called.append(arguments[0].device.type)
        return fp8_product(*arguments)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, linear in linear_layers(plain).items():
            fake = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="cuda", dtype=dtype)
            inverse, step = torch.ones(linear.in_features, device="cuda"), torch.ones((), device="cuda")
            made = Fp8Linear(fake, InputScale(1.0), inverse, step, watched_fp8_product)
            for rows in (1, 16, 49):
                y = made(torch.empty(1, rows, linear.in_features, device="cuda", dtype=dtype))
                assert (y.shape, y.dtype, y.device.type) == ((1, rows, linear.out_features), dtype, "cuda"), name
    assert set(called) == {"cuda"}


def test_the_engine_refuses_what_it_cannot_run(model: Gr00t, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"engine 'fp8' needs a CUDA GPU of compute capability 8.9 .* but the device is cpu"):
        fp8_engine(model, Calibration({}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA RTX A4000")
    with pytest.raises(EngineError, match=r"NVIDIA RTX A4000 has 8.6. Use --engine=cuda_graph"):
        check_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 9))
    check_gpu(torch.device("cuda"))
