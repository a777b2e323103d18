"""The fixed-shape inference that CUDA graphs record, run as it stands on a CPU: packed buffers and traced stages change no action."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_networks import load_network, random_inputs, write_network

from gr00t_fast.engine import PolicyInputs
from gr00t_fast.engine.cuda_graph import CallShape, PackedBuffers, StaticCall
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import Gr00t, ModelInputs

FRAME = (60, 80)  # height, width


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gr00t:
    return load_network(write_network(tmp_path_factory.mktemp("network")))


@pytest.fixture(scope="module")
def fused(model: Gr00t) -> FusedModel:
    return FusedModel(model)


def raw_inputs(model: Gr00t, batch: int = 1, cameras: int = 1, seed: int = 0) -> tuple[PolicyInputs, ModelInputs, torch.Tensor]:
    """The same observations as bytes on the host and as the tensors that the eager engine takes."""
    inputs, noise = random_inputs(model.config, batch, cameras, seed=seed)
    frames = [np.random.default_rng((seed, index)).integers(0, 256, (batch, *FRAME, 3), dtype=np.uint8) for index in range(cameras)]
    mask = inputs.prompt_mask if inputs.prompt_mask is not None else torch.ones_like(inputs.input_ids, dtype=torch.bool)
    state = inputs.state.float().numpy()
    raw = PolicyInputs(frames, inputs.input_ids.numpy(), mask.sum(1).numpy(), inputs.image_positions.numpy(), state, model.to_pixels)
    return raw, raw.to(torch.device("cpu"), torch.float32), noise


def computed(call: StaticCall, raw: PolicyInputs, noise: torch.Tensor) -> torch.Tensor:
    call.fill(raw, noise)
    call.upload()
    with torch.inference_mode():
        call.compute()
    call.download()
    return call.answer.clone()


def displacement_error(got: torch.Tensor, expected: torch.Tensor, noise: torch.Tensor) -> float:
    return float((got - expected).norm() / (expected - noise).norm())


@pytest.mark.parametrize(("batch", "cameras", "steps"), [(1, 1, 4), (1, 2, 1), (3, 1, 2)])
def test_a_static_call_gives_the_eager_actions(model: Gr00t, fused: FusedModel, batch: int, cameras: int, steps: int) -> None:
    raw, inputs, noise = raw_inputs(model, batch, cameras)
    call = StaticCall(fused, CallShape.of(raw, steps))
    expected = EagerEngine(model).run(inputs, noise, steps, StageTimer())
    assert displacement_error(computed(call, raw, noise), expected, noise) < 1e-4


def test_the_same_memory_serves_other_contents(fused: FusedModel) -> None:
    """Nothing of the first observation is left in the buffers."""
    first, _, noise = raw_inputs(fused, seed=1)
    second, _, _ = raw_inputs(fused, seed=2)
    shape = CallShape.of(first, 2)
    assert CallShape.of(second, 2) == shape
    call, fresh = (StaticCall(fused, shape) for _ in range(2))
    computed(call, first, noise)
    torch.testing.assert_close(computed(call, second, noise), computed(fresh, second, noise), rtol=0, atol=0)
    assert not torch.equal(computed(call, first, noise), computed(call, second, noise))


def test_shapes_that_differ_are_recorded_apart(fused: FusedModel) -> None:
    one, _, _ = raw_inputs(fused)
    two, _, _ = raw_inputs(fused, cameras=2)
    assert len({CallShape.of(one, 4), CallShape.of(one, 2), CallShape.of(two, 4)}) == 3
    assert CallShape.of(one, 4).prompt_tokens == one.input_ids.shape[1], "nothing is padded"


def test_packed_parts_do_not_overlap() -> None:
    parts = {"a": (torch.uint8, (3, 5)), "b": (torch.int64, (7,)), "c": (torch.bool, (2, 2)), "d": (torch.float32, (1,))}
    packed = PackedBuffers(parts, torch.device("cpu"))
    for name, (dtype, shape) in parts.items():
        assert (packed.host[name].dtype, tuple(packed.host[name].shape)) == (dtype, shape)
        packed.host[name].fill_(1)
    packed.upload()
    assert [int(packed.device[name].sum()) for name in parts] == [15, 7, 4, 1]
    packed.host["b"].fill_(9)
    assert [int(packed.host[name].sum()) for name in ("a", "c", "d")] == [15, 4, 1]
