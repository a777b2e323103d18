"""The engine `fused` on a CPU: the plain engine's actions, in fewer passes, over weights that may be packed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import Sizes, observation, write_network

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.engine import choose, packed
from gr00t_fast.engine.packed import PLAIN, packing_obstacle, product
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

SIZES = Sizes(language=(48, 96, 2, 4, 2, 16), vl=(2, 4, 12), dit=(3, 4, 12), vision=(32, 64, 2, 2))
UNEQUAL = ["pick", "put the red block into the bowl, then wave", "x"]
CLOSE_DEG = 2e-3  # fp32 in another order of operations; joint ranges are near 100 degrees
needs_packing = pytest.mark.skipif(bool(packing_obstacle(torch.float32)), reason=f"no packed fp32 products here: {packing_obstacle(torch.float32)}")


@pytest.fixture(params=["plain", pytest.param("measured", marks=needs_packing), pytest.param("packed", marks=needs_packing)])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the small networks' layers, which a user gets plain: `measured` takes any, `packed` all that come for the second time."""
    if request.param != "plain":
        monkeypatch.setattr(packed, "MIN_WEIGHT_BYTES", 0)
        monkeypatch.setattr(packed, "chosen_ways", {})
        monkeypatch.setattr(packed, "FASTER", 1.1 if request.param == "measured" else 0.0)
    return request.param


def noise(policy: Gr00tPolicy, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *policy.chunk_shape)).astype(np.float32)


def policies(directory: Path, network: str, precision: str = "fp32") -> tuple[Gr00tPolicy, Gr00tPolicy]:
    """Eager and fused."""
    name = "so100_dualcam"
    if network == "n1.5":
        checkpoint = write_network(directory, SIZES, data_config=name)
    else:
        checkpoint = write_random_checkpoint(directory, "tiny", name, network=network)
    eager, fused = (load_policy(checkpoint, data_config=name, device="cpu", precision=precision, engine=each) for each in ("eager", "fused"))
    return eager, fused


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for key, rows in expected.items():
        assert (got[key].shape, got[key].dtype) == (rows.shape, np.float32)
        np.testing.assert_allclose(got[key], rows, rtol=0, atol=CLOSE_DEG)


@pytest.mark.parametrize("network", ["n1.5", "n1.6", "n1.7"])
def test_it_answers_as_eager(tmp_path: Path, network: str, form: str) -> None:
    """One observation and the next, other step counts, a batch of unequal prompts, a chunk that continues another one."""
    eager, fused = policies(tmp_path / "network", network)
    assert fused.engine.name == "fused"
    for seed, steps in enumerate((4, 4, 2, 1)):
        eager.denoising_steps = fused.denoising_steps = steps
        seen, start = observation("so100_dualcam", seed=seed), noise(eager, seed=seed)
        expected = eager.get_action(seen, noise=start)
        assert_close(fused.get_action(seen, noise=start), expected)
    prefix = ActionPrefix({key: rows[5:] for key, rows in expected.items()}, 2)
    continued = eager.get_action(seen, noise=start + 1, prefix=prefix)
    assert_close(fused.get_action(seen, noise=start + 1, prefix=prefix), continued)
    assert np.abs(continued["action.single_arm"] - eager.get_action(seen, noise=start + 1)["action.single_arm"]).max() > 100 * CLOSE_DEG
    several, starts = observation("so100_dualcam", batch=3, instruction=UNEQUAL), noise(eager, 3)
    assert_close(fused.get_action(several, noise=starts), eager.get_action(several, noise=starts))
    assert set(eager.last_timing) == set(fused.last_timing), "stages are timed alike"


def test_small_networks_give_the_same_bits_in_every_call(tmp_path: Path) -> None:
    _, fused = policies(tmp_path / "network", "n1.5")
    seen, start = observation("so100_dualcam"), noise(fused)
    first, *later = (fused.get_action(seen, noise=start) for _ in range(3))
    assert all(np.array_equal(actions[key], first[key]) for actions in later for key in first)


def test_bf16_is_as_near_to_fp32_as_eager_bf16(tmp_path: Path, form: str) -> None:
    """Packed where this processor packs bf16, else as it falls back."""
    truth, _ = policies(tmp_path / "network", "n1.5")
    low, fused = policies(tmp_path / "network", "n1.5", "bf16")
    gaps: dict[Gr00tPolicy, list[float]] = {low: [], fused: []}
    for seed in range(24):
        seen, start = observation("so100_dualcam", seed=seed), noise(truth, seed=seed)
        expected = truth.get_action(seen, noise=start)
        for policy, found in gaps.items():
            actions = policy.get_action(seen, noise=start)
            found.append(np.linalg.norm(np.concatenate([(actions[key] - expected[key]).ravel() for key in expected])))
    assert np.linalg.norm(gaps[fused]) < 1.1 * np.linalg.norm(gaps[low])


@needs_packing
@pytest.mark.parametrize("way", [PLAIN, 1, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "added"), [(None, False), (None, True), ("gelu", False), ("silu", False), ("relu", False), ("silu", True)])
def test_every_way_computes_the_same_product(way: int, bias: bool, activation: Any, added: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight, shift, other = (torch.randn(size, generator=generator) for size in ((49, 96), (64, 96), (64,), (49, 64)))
    kept = other.clone()
    wide = rows.double() @ weight.double().t() + (shift if bias else 0)
    functions = {None: lambda x: x, "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "silu": torch.nn.functional.silu}
    expected = {**functions, "relu": torch.relu}[activation](wide) + (other if added else 0)
    form = weight if way == PLAIN else packed.packed(weight, len(rows))
    got = product(rows, form, way, activation, shift if bias else None, other if added else None)
    assert (got - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(other, kept), "the residual is not written over"


@pytest.mark.skipif(bool(packing_obstacle(torch.bfloat16)), reason=f"no packed bf16 products here: {packing_obstacle(torch.bfloat16)}")
def test_packed_bf16_rounds_no_worse_than_plain() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight, other = (torch.randn(size, generator=generator).bfloat16() for size in ((49, 96), (64, 96), (49, 64)))
    exact = rows.double() @ weight.double().t() + other.double()
    plain, quick = (product(rows, form, way, None, None, other) for form, way in ((weight, PLAIN), (packed.packed(weight, 49), 1)))
    assert (quick - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.parametrize(("packs", "engine"), [pytest.param(True, "fused", marks=needs_packing), (False, "eager")])
def test_the_default_is_fused_where_weights_can_be_packed(
    packs: bool, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not packs:
        monkeypatch.setattr(choose, "packing_obstacle", lambda dtype: "not built in")
    checkpoint = write_network(tmp_path / "network", SIZES, data_config="so100")
    policy, plain = (load_policy(checkpoint, device="cpu", precision="fp32", **options) for options in ({}, {"engine": "eager"}))
    assert (policy.engine.name, plain.engine.name) == (engine, "eager")
    assert [record.getMessage().endswith("not built in") for record in caplog.records] == [True] * (not packs)
    seen, start = observation("so100"), noise(plain)
    assert_close(policy.get_action(seen, noise=start), plain.get_action(seen, noise=start))


def test_where_nothing_can_be_packed_it_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_such_operation(*_: object) -> None:
        raise NotImplementedError("packing is not built in")

    monkeypatch.setattr(packed, "packed", no_such_operation)
    monkeypatch.setattr(packed, "MIN_WEIGHT_BYTES", 0)
    packing_obstacle.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            eager, fused = policies(tmp_path / "network", "n1.5")
            for seed in range(2):
                seen, start = observation("so100_dualcam", seed=seed), noise(eager, seed=seed)
                assert_close(fused.get_action(seen, noise=start), eager.get_action(seen, noise=start))
    finally:
        packing_obstacle.cache_clear()
    (record,) = caplog.records
    assert "packing is not built in" in record.getMessage()


def test_a_processor_with_avx2_alone_computes_bf16_plainly(tmp_path: Path) -> None:
    """oneDNN told so by its own variable, in a process of its own: it reads it once."""
    program = f"""
import logging, sys; logging.basicConfig(stream=sys.stdout)
import numpy as np
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2] / "support")!r}]
from pathlib import Path
from test_packed import noise, observation, policies
_, fused = policies(Path({str(tmp_path / "network")!r}), "n1.5", "bf16")
for seed in range(2):
    actions = fused.get_action(observation("so100_dualcam", seed=seed), noise=noise(fused, seed=seed))
print("finite", np.isfinite(actions["action.single_arm"]).all())
"""
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=limited, timeout=300)
    assert "finite True" in ran.stdout, ran.stdout + ran.stderr
    assert ran.stdout.count("stay plain") == 1, ran.stdout


def test_tensors_of_unequal_prompts_are_refused(tmp_path: Path) -> None:
    eager, fused = policies(tmp_path / "network", "n1.5")
    inputs = eager.preprocess(observation("so100_dualcam", batch=3, instruction=UNEQUAL)).to(eager.device, eager.dtype)
    with pytest.raises(ConfigError, match="unequal prompts.*--engine=eager"):
        fused.engine.run(inputs, torch.zeros(3, *fused.chunk_shape), 1, StageTimer())


@needs_packing
def test_no_weight_is_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was called twice has its packed weight alone, and the model counts as many numbers as before."""
    monkeypatch.setattr(packed, "MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr(packed, "chosen_ways", {})
    monkeypatch.setattr(packed, "FASTER", 0.0)
    eager, fused = policies(tmp_path / "network", "n1.5")
    for seed in range(2):
        fused.get_action(observation("so100_dualcam", seed=seed))
    before, after = (dict(policy.engine.model.named_parameters()) for policy in (eager, fused))
    assert {name: weight.numel() for name, weight in after.items()} == {name: weight.numel() for name, weight in before.items()}
    kinds = ("language.blocks.0.mlp.gate", "head.dit.blocks.1.attention.qkv", "head.dit.blocks.0.attention.kv", "vision.blocks.0.mlp.down")
    assert all(after[f"{kind}.weight"].is_mkldnn for kind in kinds)
