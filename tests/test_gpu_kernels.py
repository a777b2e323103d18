"""What only a GPU can show of the Triton kernels: each computes there what its twin does, and the engine made of them gives the eager actions.
Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux: pip install 'gr00t_fast[triton]'")

from kernel_cases import TOLERANCE, cases, full_size_cases
from random_networks import Sizes, cast, load_network, random_inputs, write_network

from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.engine.graph import cuda_graph_engine
from gr00t_fast.policy import load_policy
from gr00t_fast.random_checkpoint import write_random_checkpoint
from gr00t_fast.timing import StageTimer

pytestmark = pytest.mark.gpu

MAX_ERROR_DEG = {"fp32": 0.01, "bf16": 0.5}  # 99th percentile over joints, actions and observations, as for the other engines
OBSERVATIONS = 50
# Head dim 48, several tiles of everything
SIZES = Sizes(vision=(96, 200, 2, 4), language=(128, 384, 2, 4, 2, 32), hidden=96, dit=(4, 4, 48), vl=(2, 4, 32), image=112)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [cases, full_size_cases])
def test_a_kernel_computes_what_its_twin_does(make, dtype: torch.dtype) -> None:
    """fp32 at full size: up to 6144 products are added up one after the other, each of which rounds."""
    tolerance = max(TOLERANCE[dtype], 1e-5 if make is full_size_cases else 0.0)
    for seed in range(3):
        errors = {case.name: case.error() for case in make(dtype, "cuda", seed)}
        assert {name: error for name, error in errors.items() if not error < tolerance} == {}


def test_the_same_inputs_give_the_same_bits() -> None:
    """Also shows races, which the interpreter, running one program after the other, cannot have."""
    for case in full_size_cases(torch.bfloat16, "cuda"):
        first = case.run()
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True)), case.name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, None)], ids=["fp32", "bf16"])
def test_the_fused_stages_give_the_eager_actions(tmp_path: Path, dtype: torch.dtype, tolerance: float | None) -> None:
    """fp32 to 1e-3 of the displacement, the bound of the other engines on CUDA; bf16 no further from fp32 on a CPU than twice the plain model's own
    distance."""
    checkpoint = write_network(tmp_path, SIZES)
    truth_model, model = load_network(checkpoint), load_network(checkpoint, dtype).cuda()
    inputs, noise = random_inputs(truth_model.config, batch=2, cameras=2)
    noise = noise.to(dtype).float()
    truth = EagerEngine(truth_model).run(inputs, noise, 4, StageTimer())
    here = cast(inputs, dtype)
    here = type(inputs)(*(value.cuda() for value in (here.pixel_values, here.input_ids, here.image_positions, here.state)))
    plain = EagerEngine(model).run(here, noise.to("cuda", dtype), 4, StageTimer()).float().cpu()
    with torch.no_grad():
        fused = FusedModel(model, "triton", "triton")
        fused = fused.stages()(here, noise.to("cuda", dtype), fused.step_tables(4)).float().cpu()
    limit = tolerance * (truth - noise).norm() if tolerance else 2 * (plain - truth).norm()
    assert (fused - truth).norm() < limit


@pytest.mark.parametrize("precision", MAX_ERROR_DEG)
def test_the_engine_gives_the_actions_of_eager_fp32(tmp_path: Path, precision: str) -> None:
    checkpoint = write_random_checkpoint(tmp_path, "demo")
    truth = load_policy(checkpoint, device="cpu", precision="fp32", engine="eager")
    plain = load_policy(checkpoint, device="cuda", precision=precision, engine="eager")
    fast = load_policy(checkpoint, engine=cuda_graph_engine(plain.engine.model, "triton"))
    generator, example, errors = np.random.default_rng(0), truth.example_observation(), {plain: [], fast: []}
    for seed in range(OBSERVATIONS):
        frames = {k: generator.integers(0, 256, v.shape, dtype=np.uint8) for k, v in example.items() if k.startswith("video.")}
        noise = np.random.default_rng(seed).standard_normal((1, 16, 32)).astype(np.float32)
        expected = truth.get_action(example | frames, noise=noise)
        for policy, gaps in errors.items():
            got = policy.get_action(example | frames, noise=noise)
            gaps += [np.abs(got[key] - expected[key]).ravel() for key in expected]
    p99 = {policy: np.percentile(np.concatenate(gaps), 99) for policy, gaps in errors.items()}
    # On random weights 16 bits alone move actions by more than the limit: then no further than half as much again as the plain model in 16 bits.
    assert p99[fast] < (MAX_ERROR_DEG[precision] if precision == "fp32" else max(MAX_ERROR_DEG[precision], 1.5 * p99[plain]))
