"""8-bit linear layers of the torch engines: the arithmetic against references written in another way, the rewritten network, and what a GPU would
be asked to run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_networks import TINY, load_network, random_inputs, write_network
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode

from gr00t_fast.engine.eight_bit import (
    PARTS,
    Calibration,
    EightBitEngine,
    InputScale,
    Rounding,
    check_gpu,
    linear_layers,
    part_of,
    rewritten,
    weight_bytes,
)
from gr00t_fast.engine.eight_bit.engines import check_call
from gr00t_fast.engine.eight_bit.linear import (
    Fp8Linear,
    Int8Linear,
    emulated_fp8_product,
    emulated_int_product,
    fp8_product,
    int_product,
    inverse_of,
    to_fp8,
)
from gr00t_fast.engine.stages import Stages
from gr00t_fast.errors import CheckpointError, ConfigError, EngineError
from gr00t_fast.export.layer_statistics import InputStatistics, plan_inputs
from gr00t_fast.model import Gr00tN1d5

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


def int8_layer(linear: nn.Linear, scale: InputScale, per_token: bool = False, product: Callable = emulated_int_product) -> Int8Linear:
    return Int8Linear(linear, scale, inverse_of(scale, linear.in_features, "int8", per_token, CPU), per_token, product)


def fp8_layer(linear: nn.Linear, scale: InputScale, product: Callable = emulated_fp8_product) -> Fp8Linear:
    return Fp8Linear(linear, scale, inverse_of(scale, linear.in_features, "fp8", False, CPU), product)


# --- arithmetic, against NumPy


@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("product", [int_product, emulated_int_product])
def test_int8_sums_are_those_of_integers(rows: int, width: int, outputs: int, product: Callable) -> None:
    generator = np.random.default_rng(3)
    made = int8_layer(layer(width, outputs), InputScale(3.0), product=product)
    given = generator.integers(-128, 128, (rows, width)).astype(np.int8)
    weight = made.weight.numpy()[:outputs, :width]
    got = made.sums(torch.from_numpy(given))
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), given.astype(np.int64) @ weight.astype(np.int64).T)


def test_int8_sums_at_their_largest_do_not_overflow() -> None:
    width = 6144  # the widest of the published network's inputs
    rows, weight = torch.full((32, width), -128, dtype=torch.int8), torch.full((16, width), -127, dtype=torch.int8)
    for product in (int_product, emulated_int_product):
        assert (product(rows, weight) == 128 * 127 * width).all()


@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_an_int8_layer_computes_what_the_formulas_say(rows: int, width: int, outputs: int, per_token: bool, smooth: bool) -> None:
    smoothing = np.linspace(0.25, 4, width, dtype=np.float32) if smooth else np.ones(width, np.float32)
    scale = InputScale(2.5, torch.from_numpy(smoothing) if smooth else None)
    linear, x = layer(width, outputs), seeded(rows, width)
    got = int8_layer(linear, scale, per_token)(x).detach().numpy()
    weight = linear.weight.detach().numpy().astype(np.float64) * smoothing
    steps = np.abs(weight).max(axis=1) / 127
    inputs = x.numpy().astype(np.float64) / smoothing
    step = np.abs(inputs).max(axis=1, keepdims=True) / 127 if per_token else 2.5 / 127
    rounded_inputs, rounded_weight = np.clip(np.rint(inputs / step), -128, 127), np.rint(weight / steps[:, None])
    expected = rounded_inputs @ rounded_weight.T * step * steps + linear.bias.detach().numpy()
    # a value on the boundary may fall to the other side: one step of one or two inputs
    off = np.abs(got - expected)
    assert np.median(off) < 1e-5 * np.abs(expected).max()
    assert (off <= 2.02 * (np.max(step) * np.abs(weight).max(axis=1) + steps * np.abs(inputs).max()) + 1e-4).all()


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


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hardware_layer_and_its_twin_agree(format: str, dtype: torch.dtype) -> None:
    linear, x, scale = layer(96, 48, dtype=dtype), seeded(2, 25, 96).to(dtype), InputScale(3.0)
    if format == "int8":
        real, twin = int8_layer(linear, scale, product=int_product), int8_layer(linear, scale)
        assert torch.equal(real(x), twin(x))
    else:
        real, twin = fp8_layer(linear, scale, fp8_product), fp8_layer(linear, scale)
        assert (real(x).float() - twin(x).float()).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * twin(x).float().norm()
    assert real(x).dtype == dtype
    assert real(x).shape == (2, 25, 48)


def outliers(rows: int, width: int, seed: int = 0) -> Tensor:
    """As trained transformers have them: some channels a hundred times as large as the others, and some tokens several times."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.where(torch.rand(width, generator=generator) < 0.02, 100.0, 1.0)
    tokens = torch.where(torch.rand(rows, 1, generator=generator) < 0.05, 5.0, 1.0)
    return torch.randn(rows, width, generator=generator) * channels * tokens


@pytest.mark.parametrize(("format", "per_token", "bound"), [("int8", False, 0.03), ("int8", True, 0.02), ("fp8", False, 0.06)])
def test_outliers_cost_little_once_balanced(format: str, per_token: bool, bound: float) -> None:
    linear, seen, fresh = nn.Linear(256, 128), outliers(400, 256), outliers(100, 256, seed=1)
    with torch.no_grad():
        linear.weight.copy_(seeded(128, 256) * 0.05 / torch.where(seen.abs().amax(dim=0) > 50, 10.0, 1.0))  # weights of outliers are smaller
    fresh *= seen.abs().amax(dim=0) / fresh.abs().amax(dim=0)  # the same channels
    statistics = InputStatistics(seen.abs().amax(dim=0).numpy(), 400, [seen.numpy()])
    plans, _ = plan_inputs(statistics, {"a": linear.weight.detach().numpy().T}, format)
    plan = plans["a"]
    scale = InputScale(plan.range, None if plan.smoothing is None else torch.from_numpy(plan.smoothing))
    made = int8_layer(linear, scale, per_token) if format == "int8" else fp8_layer(linear, scale)
    truth = linear(fresh).detach()
    assert 1e-3 < float((made(fresh).detach() - truth).norm() / truth.norm()) < bound


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = layer(32, 16)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            linear.weight[3, 4] = bad
        for make in (int8_layer, fp8_layer):
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                make(linear, InputScale(1.0))


def test_inputs_that_are_always_zero_are_no_division_by_zero() -> None:
    x, linear, nothing = torch.zeros(20, 32), layer(32, 16), InputScale(0.0)
    for made in (int8_layer(linear, nothing), int8_layer(linear, nothing, per_token=True), fp8_layer(linear, nothing)):
        torch.testing.assert_close(made(x), linear(x))


# --- the network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gr00tN1d5:
    return load_network(write_network(tmp_path_factory.mktemp("eight_bit"), TINY))


def scales_for(model: Gr00tN1d5) -> dict[str, InputScale]:
    return {name: InputScale(8.0) for name in linear_layers(model)}


def test_every_layer_that_runs_per_observation_is_found(model: Gr00tN1d5) -> None:
    found = linear_layers(model)
    vision_layers, language_layers, dit_layers, vl_layers = TINY.vision[2], TINY.language[2], TINY.dit[0], TINY.vl[0]
    assert [part_of(name) for name in found] == sorted((part_of(name) for name in found), key=list(PARTS).index)
    assert len(found) == 4 * vision_layers + 5 * language_layers + 4 * vl_layers + dit_layers // 2 * (5 + 4) + 1
    assert not any("ada_norm" in name or "time" in name for name in found)


def test_a_rewritten_network_shares_all_but_the_replaced_layers(model: Gr00tN1d5) -> None:
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    scales = {name: scale for name, scale in scales_for(model).items() if part_of(name) == "dit"}
    made = rewritten(model, scales, Rounding("int8"))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert {name: id(parameter) for name, parameter in made.named_parameters()} == {
        name: key for name, key in before.items() if name.rpartition(".")[0] not in scales
    }
    assert made.vision is not model.vision
    assert isinstance(made.head.dit.out, Int8Linear)
    assert isinstance(model.head.dit.out, nn.Linear)
    assert made.dtype == model.dtype
    assert isinstance(made, Gr00tN1d5)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_memory_shrinks_once_the_plain_network_is_dropped(tmp_path, format: str) -> None:
    plain = load_network(write_network(tmp_path, TINY), torch.bfloat16)
    whole, replaced = weight_bytes(plain), sum(layer.weight.numel() for layer in linear_layers(plain).values())
    gone = [weakref.ref(layer.weight) for layer in linear_layers(plain).values()]
    made = rewritten(plain, scales_for(plain), Rounding(format))
    del plain
    gc.collect()
    assert all(reference() is None for reference in gone)
    spared, overhead = 2 * replaced, 1.6 * replaced  # of 16-bit weights; 8-bit ones, their scales and the input scales (much, at this size)
    assert weight_bytes(made) < whole - spared + overhead


@pytest.mark.parametrize(("format", "per_token"), [("int8", False), ("int8", True), ("fp8", False)])
def test_a_rewritten_network_gives_nearly_the_same_actions(model: Gr00tN1d5, format: str, per_token: bool) -> None:
    inputs, noise = random_inputs(model.config)
    tables = model.head.step_tables(2)
    with torch.inference_mode():
        truth = model(inputs, noise, tables)
        got = rewritten(model, scales_for(model), Rounding(format, per_token, emulated=True))(inputs, noise, tables)
    error = float((got - truth).norm() / (truth - noise).norm())
    assert 1e-5 < error < 0.4  # random weights, scales by guess: rounded, and still this network


def test_scales_of_another_network_are_refused(model: Gr00tN1d5) -> None:
    with pytest.raises(EngineError, match=r"layers that this network lacks \(head.dit.blocks.99.mlp.up\).*export/calibrate.py"):
        rewritten(model, {"head.dit.blocks.99.mlp.up": InputScale(1.0)}, Rounding("int8"))
    name = next(iter(linear_layers(model)))
    with pytest.raises(EngineError, match="calibration is for 5 inputs, the layer has 32"):
        rewritten(model, {name: InputScale(1.0, torch.ones(5))}, Rounding("int8"))


def test_layers_with_one_scale_share_its_tensor(model: Gr00tN1d5) -> None:
    shared = InputScale(4.0)
    block = rewritten(model, {f"language.blocks.0.mlp.{name}": shared for name in ("gate", "up")}, Rounding("int8")).language.blocks[0]
    assert block.mlp.gate.inverse is block.mlp.up.inverse


# --- what a GPU would be asked


@pytest.mark.parametrize(("format", "per_token"), [("int8", False), ("int8", True), ("fp8", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_strides_and_types_are_those_that_cuda_takes(format: str, per_token: bool, dtype: torch.dtype, tmp_path) -> None:
    """Torch's own checks of the CUDA operators, on tensors without memory."""
    plain = load_network(write_network(tmp_path, TINY), dtype)
    called = []

    def watched_int_product(rows: Tensor, weight: Tensor) -> Tensor:
        assert rows.shape[0] > 16  # what torch's own check of tensors without memory does not know
        assert rows.shape[1] % 8 == weight.shape[0] % 8 == 0
        called.append(rows.device.type)
        return int_product(rows, weight)

    def watched_fp8_product(*arguments) -> Tensor:
        called.append(arguments[0].device.type)
        return fp8_product(*arguments)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, linear in linear_layers(plain).items():
            fake = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="cuda", dtype=dtype)
            scale = InputScale(1.0)
            inverse = torch.ones(linear.in_features, device="cuda")
            if format == "int8":
                made: nn.Module = _without_checks(Int8Linear, fake, scale, inverse, per_token, watched_int_product)
            else:
                made = _without_checks(Fp8Linear, fake, scale, inverse, watched_fp8_product)
            for rows in (1, 16, 49):
                y = made(torch.empty(1, rows, linear.in_features, device="cuda", dtype=dtype))
                assert (y.shape, y.dtype, y.device.type) == ((1, rows, linear.out_features), dtype, "cuda"), name
    assert set(called) == {"cuda"}


def _without_checks(kind: type, *arguments) -> nn.Module:
    """A tensor without memory cannot be asked whether it is finite."""
    import gr00t_fast.engine.eight_bit.linear as module

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(module, "_finite", lambda sizes: sizes)
        return kind(*arguments)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_compiler_takes_every_stage_whole(model: Gr00tN1d5, format: str) -> None:
    inputs, noise = random_inputs(model.config)
    made = rewritten(model, scales_for(model), Rounding(format, emulated=format == "fp8"))
    plain, compiled = Stages.of(made), Stages.of(made).compiled(backend="aot_eager")
    tables = made.head.step_tables(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs, noise, tables), plain(inputs, noise, tables), rtol=1e-4, atol=1e-5)


def test_gate_and_up_are_rounded_once_when_compiled(model: Gr00tN1d5) -> None:
    """They read one tensor, and the compiler sees that: one rounding in the graph, two products."""
    shared = InputScale(4.0)
    mlp = rewritten(model, {f"language.blocks.0.mlp.{name}": shared for name in ("gate", "up")}, Rounding("int8")).language.blocks[0].mlp
    counted: dict[str, int] = {}

    def count(graph: torch.fx.GraphModule, _) -> Callable:
        for node in fx_graph_cse(graph.graph).nodes:
            counted[str(node.target)] = counted.get(str(node.target), 0) + 1
        return graph.forward

    with torch.no_grad():
        torch.compile(mlp, backend=aot_autograd(fw_compiler=count), fullgraph=True)(seeded(1, 20, mlp.gate.weight.shape[1]))
    assert counted["aten._int_mm.default"] == 2
    assert counted["aten.round.default"] == 1


def test_engines_refuse_what_they_cannot_run(model: Gr00tN1d5, monkeypatch: pytest.MonkeyPatch) -> None:
    for format, needed in (("fp8", "8.9"), ("int8", "8.0")):
        with pytest.raises(EngineError, match=rf"engine '{format}' needs a CUDA GPU of compute capability {needed} .* but the device is cpu"):
            EightBitEngine(model, None, calibration=Calibration(format, False, {}, (4,)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA RTX A4000")
    check_gpu("int8", torch.device("cuda"))
    with pytest.raises(EngineError, match=r"NVIDIA RTX A4000 has 8.6. Use --engine=int8"):
        check_gpu("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    with pytest.raises(EngineError, match=r"has 7.5. Use --engine=cuda_graph"):
        check_gpu("int8", torch.device("cuda"))


def test_calls_that_were_not_calibrated_are_refused() -> None:
    calibration = Calibration("int8", False, {}, (1, 2, 4))
    check_call(calibration, 2, None)
    with pytest.raises(ConfigError, match=r"denoising_steps=8: the int8 calibration was made with 1, 2, 4.*--denoising_steps 1 2 4 8"):
        check_call(calibration, 8, None)
