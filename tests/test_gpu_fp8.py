"""What only a GPU can show of the engine `fp8`: the products are the twins', and actions stay within the limit. Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.manifest import target_of
from gr00t_fast.engine.quantized import (
    Fp8Linear,
    Fp8WeightLinear,
    InputScale,
    emulated_fp8_product,
    emulated_fp8_weight_product,
    fp8_engine,
    fp8_product,
    has_product,
    inverse_of,
    rewritten,
    to_fp8,
    weight_step_of,
)
from gr00t_fast.export import CalibrationOptions
from gr00t_fast.export.calibrate import TorchNetwork, calibrate
from gr00t_fast.export.verify import ACTION_LIMITS, collect_cases
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.dataset import RandomFrames
from gr00t_fast.policy import Gr00tPolicy, load_policy

pytestmark = pytest.mark.gpu

TRAINED = Path(__file__).parent.parent / "checkpoints" / "so100-sim-reach"
TAG, OBSERVATIONS = "new_embodiment", 100
# (rows, K, N) of the published network: vision, language, its down projection, keys and values, the DiT, its last layer
SHAPES = [(256, 1152, 3456), (256, 4304, 1152), (290, 2048, 6144), (548, 6144, 2048), (290, 2048, 3072)]
SHAPES += [(49, 1536, 6144), (49, 6144, 1536), (32, 1536, 1024)]


def needs() -> None:
    if not has_product(torch.device("cuda")):
        pytest.skip(f"{torch.cuda.get_device_name()} has no FP8 tensor cores")


@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_products_are_the_twins_up_to_the_order_of_sums(rows: int, width: int, outputs: int, with_bias: bool) -> None:
    needs()
    generator = torch.Generator("cuda").manual_seed(rows + width)
    given, weight = (to_fp8(20 * torch.randn(shape, device="cuda", generator=generator)) for shape in ((rows, width), (outputs, width)))
    scales = (torch.tensor(0.02, device="cuda"), torch.tensor(0.003, device="cuda"))
    bias = torch.randn(outputs, device="cuda", generator=generator).bfloat16() if with_bias else None
    for dtype in (torch.bfloat16, torch.float16):
        own = None if bias is None else bias.to(dtype)
        got, expected = (product(given, weight, *scales, own, dtype).float() for product in (fp8_product, emulated_fp8_product))
        assert (got - expected).norm() < 5e-3 * expected.norm()  # 16-bit answers, and 14 bits of running sums on Hopper


@pytest.mark.parametrize("rows", [41, 49, 98])
@pytest.mark.parametrize(("width", "outputs"), [(1536, 1536), (1536, 6144), (6144, 1536), (1536, 4608)])
def test_the_product_of_few_rows_is_its_twins_and_the_same_bits_each_time(rows: int, width: int, outputs: int) -> None:
    """The second half would show races, which the interpreter, running one program after the other, cannot have."""
    needs()
    from gr00t_fast.engine.fp8_kernel import fp8_weight_product

    generator = torch.Generator("cuda").manual_seed(rows + width)
    layer = Fp8WeightLinear(torch.nn.Linear(width, outputs, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
    given = (x, layer.weight, layer.weight_scale, layer.bias)
    got, expected = fp8_weight_product(*given), emulated_fp8_weight_product(*given)
    assert (got.float() - expected.float()).norm() < 5e-3 * expected.float().norm()
    assert all(torch.equal(fp8_weight_product(*given), got) for _ in range(20))


@pytest.fixture(scope="module")
def plain() -> Gr00tPolicy:
    """Eager, fp32, on the GPU: the truth."""
    return load_policy(TRAINED, device="cuda", precision="fp32", engine="eager")


@pytest.fixture(scope="module")
def scales(plain: Gr00tPolicy) -> dict[str, InputScale]:
    needs()
    target = target_of(open_checkpoint(TRAINED), TAG, "so100")
    cases, _ = collect_cases(target, "random:0", frames=64, seed=0, noise_seed=0, allow_few=True)
    network = TorchNetwork(plain.engine.model, 4, emulated=False)
    return dict(calibrate(network, cases, CalibrationOptions(limit=1.0, trial_frames=8))[0])


def test_the_engine_stays_within_the_limit(scales: dict[str, InputScale], plain: Gr00tPolicy) -> None:
    model = load_model(open_checkpoint(TRAINED), TAG, torch.device("cuda"), torch.bfloat16)
    policy, generator = load_policy(TRAINED, engine=fp8_engine(model, scales)), np.random.default_rng(0)
    frames = RandomFrames(1, DATA_CONFIGS["so100"], plain.metadata)
    for steps in (4, 2):
        policy.denoising_steps = plain.denoising_steps = steps
        errors = []
        for index in range(OBSERVATIONS):
            noise = generator.standard_normal((1, 16, 32)).astype(np.float32)
            expected, got = (each.get_action(frames[index], noise=noise) for each in (plain, policy))
            errors += [np.abs(got[key] - expected[key]).ravel() for key in expected]
        assert np.percentile(np.concatenate(errors), 99) < ACTION_LIMITS["fp8"], steps


def test_the_network_on_the_gpu_is_its_twin(scales: dict[str, InputScale], plain: Gr00tPolicy) -> None:
    """Each product on the tensor cores, against the same written out."""
    model = plain.engine.model
    seen, noise = plain.example_observation(), np.random.default_rng(1).standard_normal((1, 16, 32)).astype(np.float32)
    answers = []
    for emulated in (False, True):
        engine = EagerEngine(rewritten(model, scales, emulated))
        engine.device, engine.dtype = model.device, model.dtype
        answers.append(load_policy(TRAINED, engine=engine).get_action(seen, noise=noise)["action.single_arm"])
    assert np.abs(answers[0] - answers[1]).max() < 0.5  # rounding falls to the other side now and then


def test_memory_shrinks() -> None:
    """Of a network large enough that scales and biases do not count."""
    needs()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        stack = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(8)))
    before = torch.cuda.memory_allocated()
    scale, device = InputScale(3.0), torch.device("cuda")
    for index in range(len(stack)):
        layer = stack[index]
        stack[index] = Fp8Linear(layer, scale, inverse_of(scale, 2048, device), weight_step_of([layer], scale), fp8_product)
        del layer
    assert torch.cuda.memory_allocated() < before - 0.45 * 8 * 2 * 2048**2
