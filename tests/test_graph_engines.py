"""The computation that CUDA graphs record, run as it stands on a CPU through the policy: frames to joint units, batches, continued chunks.

`Unrecorded` is what engine `compiled` runs on a CPU; here without the compiler, which takes a minute even for a small network. The whole way with
it: `GR00T_FAST_COMPILE=1 python -m pytest tests/test_graph_engines.py`. Recordings themselves are for tests/test_gpu_graph.py.
"""

from __future__ import annotations

import os
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from random_networks import Sizes, cast, load_network, observation, random_inputs, write_network

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.cuda_graph import CompiledEngine, CudaGraphEngine
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.laid_out import laid_out_stages
from gr00t_fast.engine.static_call import PROMPT_BUCKET
from gr00t_fast.errors import ConfigError
from gr00t_fast.timing import StageTimer

SIZES = Sizes(language=(48, 96, 2, 4, 2, 16), vl=(2, 4, 12), dit=(3, 4, 12), vision=(32, 64, 2, 2))
CLOSE_DEG = 2e-3  # fp32 in another order of operations; joint ranges are near 100 degrees
UNEQUAL = ["pick", "put the red block into the bowl, then wave", "x"]


class Uncompiled(CompiledEngine):
    """What `compiled` would compile, as it is."""

    def _make_stages(self):
        return laid_out_stages(self.model)

    def _burst(self):
        return self.burst


@pytest.fixture(scope="module", params=["so100", "so100_dualcam"])
def policies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gr00tPolicy]:
    """The plain model and the graph engine, each over a copy of the weights of its own."""
    checkpoint = write_network(tmp_path_factory.mktemp(request.param), SIZES, data_config=request.param)
    eager = load_policy(checkpoint, data_config=request.param, device="cpu", precision="fp32", engine="eager", seed=5)
    engine = Uncompiled(load_network(checkpoint), eager.to_pixels)
    engine.device, engine.dtype = torch.device("cpu"), torch.float32
    return {"eager": eager, "graph": load_policy(checkpoint, data_config=request.param, engine=engine, seed=5), "name": request.param}


def noise(batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 16, 32)).astype(np.float32)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = CLOSE_DEG) -> None:
    for key, rows in expected.items():
        assert (got[key].shape, got[key].dtype) == (rows.shape, np.float32)
        np.testing.assert_allclose(got[key], rows, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_frames_to_joints_as_eager(policies: dict, steps: int) -> None:
    for policy in (policies["eager"], policies["graph"]):
        policy.denoising_steps = steps
    for seed in range(3):
        seen = observation(policies["name"], seed=seed)
        assert_close(policies["graph"].get_action(seen, noise=noise(seed=seed)), policies["eager"].get_action(seen, noise=noise(seed=seed)))


def test_without_given_noise_too(policies: dict) -> None:
    """Both draw from a generator of the same seed; a shorter horizon is the beginning of the same chunk."""
    seen = observation(policies["name"])
    for policy in (policies["eager"], policies["graph"]):
        policy.reset()
        policy.action_horizon = 8
    try:
        assert_close(policies["graph"].get_action(seen), policies["eager"].get_action(seen))
    finally:
        for policy in (policies["eager"], policies["graph"]):
            policy.action_horizon = None


def test_joint_units_are_made_inside_bit_for_bit(policies: dict) -> None:
    """What the computation ends with is what the policy's transform makes of the same actions on the host."""
    policy, seen = policies["graph"], observation(policies["name"])
    inside = policy.get_action(seen, noise=noise())
    to_joints, policy.engine.to_joints = policy.engine.to_joints, None
    try:
        start = torch.from_numpy(noise())
        normalised = policy.engine.run_raw(policy.raw_inputs(seen), start, policy.denoising_steps, StageTimer())
    finally:
        policy.engine.to_joints = to_joints
    for key, rows in policy._pieces.action(normalised).items():
        np.testing.assert_array_equal(inside[key], rows[0])
        assert np.abs(rows).max() > 2, "joint units, not normalised ones"


def test_a_batch_of_unequal_prompts_is_its_single_calls(policies: dict) -> None:
    batched, start = observation(policies["name"], batch=3, instruction=UNEQUAL), noise(3)
    together = policies["graph"].get_action(batched, noise=start)
    assert_close(together, policies["eager"].get_action(batched, noise=start))
    for item in range(3):
        one = {key: value[item] for key, value in batched.items()}
        for policy in (policies["graph"], policies["eager"]):
            alone = policy.get_action(one, noise=start[item : item + 1])
            assert_close({key: rows[item] for key, rows in together.items()}, alone)


@pytest.mark.parametrize("method", ["prefix", "rtc"])
@pytest.mark.parametrize("batch", [None, 2])
def test_continued_chunks_are_those_of_eager(policies: dict, method: str, batch: int | None) -> None:
    seen, start = observation(policies["name"], batch=batch), noise(batch or 1)
    before = policies["eager"].get_action(seen, noise=noise(batch or 1, seed=1))
    plain = policies["eager"].get_action(seen, noise=start)
    for delay in (0, 3):  # contents only: the same buffers
        prefix = ActionPrefix({key: rows[..., 5:, :] for key, rows in before.items()}, delay, method)
        expected, got = (policies[name].get_action(seen, noise=start, prefix=prefix) for name in ("eager", "graph"))
        assert_close(got, expected)
        assert np.abs(expected["action.single_arm"] - plain["action.single_arm"]).max() > 100 * CLOSE_DEG, "it continues nothing"
    assert_close(policies["graph"].get_action(seen, noise=start), plain)


def test_one_preparation_per_shape(policies: dict) -> None:
    """Another instruction of the same bucket, other pictures and another prefix change contents; steps, batch and method change the shape."""
    policy = policies["graph"]
    policy.denoising_steps = 2
    policy.engine.to_joints = policy.engine.to_joints  # forgets
    kept = policy.engine._recordings
    assert not kept
    for seed, instruction in enumerate(("pick it", "drop it", "pick at")):
        seen = observation(policies["name"], instruction=instruction, seed=seed)
        actions = policy.get_action(seen, noise=noise())
    assert len(kept) == 1
    assert next(iter(kept)).prompt_tokens % PROMPT_BUCKET == 0
    for length, method in ((4, "prefix"), (9, "prefix"), (9, "rtc")):
        policy.get_action(seen, prefix=ActionPrefix({key: rows[:length] for key, rows in actions.items()}, 1, method))
    assert len(kept) == 3
    policy.denoising_steps = 1
    policy.get_action(seen)
    policy.get_action(observation(policies["name"], batch=2))
    assert len(kept) == 5


def test_warm_up_prepares_continuing_too(policies: dict) -> None:
    policy = policies["graph"]
    policy.engine.to_joints = policy.engine.to_joints
    policy.warm_up("pick", prefix_method="rtc")
    assert {shape.goal for shape in policy.engine._recordings} == {None, "rtc"}


def test_an_inference_has_the_gpu_to_itself_while_kept_warm(policies: dict) -> None:
    """A burst on the CPU in place of the GPU's: while the computation runs, the thread that makes them is held."""
    policy, running = policies["graph"], threading.Event()
    engine, to_joints, held = policy.engine, policy.engine.to_joints, []
    engine.burst = running.set
    seen = observation(policies["name"])
    expected = policy.get_action(seen, noise=noise())

    def watched(actions: torch.Tensor) -> torch.Tensor:
        held.append(engine._warm._turn.locked())
        return to_joints(actions)

    engine.to_joints = watched
    try:
        with engine.kept_warm():
            assert running.wait(10)
            got = policy.get_action(seen, noise=noise())
            assert held
            assert all(held)
            running.clear()
            assert running.wait(10), "bursts go on afterwards"
    finally:
        engine.to_joints = to_joints
    assert engine._warm is None
    assert_close(got, expected, atol=0)
    with pytest.raises(ConfigError, match="keep_warm is for CUDA graphs"):
        policy.kept_warm()


def test_where_engines_cannot_run_they_say_so(policies: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, to_pixels = policies["eager"].engine.model, policies["eager"].to_pixels
    with pytest.raises(ConfigError, match="'cuda_graph' needs a CUDA GPU"):
        CudaGraphEngine(model, to_pixels)
    with pytest.raises(ConfigError, match="from camera frames"):
        CompiledEngine(model, None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*CXX=no-such-compiler"):
        CompiledEngine(model, to_pixels)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"looked for g\+\+, clang\+\+, c\+\+.*--engine=eager"):
        CompiledEngine(model, to_pixels)


def test_on_a_gpu_what_loads_a_kernel_is_looked_for_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"engine 'triton' needs a C compiler, .*CC=no-such-compiler.*--engine=cuda_graph"):
        check_compiler("triton", "cuda")
    monkeypatch.setenv("CC", "sh")  # anything that is there
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"headers of Python .* no {tmp_path}/Python.h.*python3\.\d+-dev"):
        check_compiler("triton", "cuda")
    (tmp_path / "Python.h").touch()
    check_compiler("triton", "cuda")
    monkeypatch.setenv("CC", "no-such-compiler")
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    check_compiler("triton", "cuda")  # what it keeps on disk needs none


@pytest.mark.skipif("GR00T_FAST_COMPILE" not in os.environ, reason="compiles for a minute or more: enable with GR00T_FAST_COMPILE=1")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_on_a_cpu(tmp_path: Path, precision: str) -> None:
    checkpoint = write_network(tmp_path / "network", SIZES)
    truth, eager, compiled = (
        load_policy(checkpoint, device="cpu", precision=kind, engine=engine)
        for kind, engine in (("fp32", "eager"), (precision, "eager"), (precision, "compiled"))
    )
    for seed in range(4):
        seen = observation(seed=seed)
        expected, plain, got = (policy.get_action(seen, noise=noise(seed=seed)) for policy in (truth, eager, compiled))
        if precision == "fp32":
            assert_close(got, expected)
        else:
            off = {name: max(np.abs(actions[key] - expected[key]).max() for key in expected) for name, actions in (("plain", plain), ("got", got))}
            assert off["got"] < 2 * off["plain"] + 0.1
    prefix = ActionPrefix({key: rows[3:] for key, rows in expected.items()}, 2, "rtc")
    if precision == "fp32":
        assert_close(*(policy.get_action(seen, noise=noise(), prefix=prefix) for policy in (compiled, truth)))


# --- weights laid out once -----------------------------------------------------------------------------------------------------------------


def _storage_bytes(module_or_tensors) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in module_or_tensors}
    return sum(storages.values())


def test_joining_weights_moves_them_and_changes_no_value(tmp_path: Path) -> None:
    model = load_network(write_network(tmp_path / "network", SIZES))
    before, names = _storage_bytes(model.parameters()), {name: value.clone() for name, value in model.named_parameters()}
    inputs, start = random_inputs(model.config)
    expected = EagerEngine(model).run(inputs, start, 2, StageTimer())
    laid_out_stages(model)
    assert all(torch.equal(value, names[name]) for name, value in model.named_parameters())
    assert _storage_bytes(model.parameters()) <= before, "nothing is held twice"
    torch.testing.assert_close(EagerEngine(model).run(inputs, start, 2, StageTimer()), expected, rtol=1e-6, atol=1e-6)


def test_a_second_engine_over_the_same_model_shares_the_joined_weights(tmp_path: Path) -> None:
    model = load_network(write_network(tmp_path / "network", SIZES))
    first, second = (laid_out_stages(model) for _ in range(2))
    for mine, theirs in zip(first.encode_language.gate_up, second.encode_language.gate_up, strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert torch.equal(mine, theirs)
    assert torch.equal(first.encode_language.gate_up[0], torch.cat([getattr(model.language.blocks[0].mlp, name).weight for name in ("gate", "up")]))
    assert first.condition.__self__.cross.weight.data_ptr() == second.condition.__self__.cross.weight.data_ptr()


@pytest.mark.parametrize("sizes", [SIZES, Sizes(use_vlln=False), Sizes(dit=(1, 4, 8)), Sizes(horizon=8, future=4, state_dim=12, action_dim=7)])
def test_in_sixteen_bits_no_precision_is_lost(tmp_path: Path, sizes: Sizes) -> None:
    """Against fp32, as near as the plain model in bf16, with a padded batch."""
    checkpoint = write_network(tmp_path / "network", sizes)
    truth, low, other = load_network(checkpoint), load_network(checkpoint, torch.bfloat16), load_network(checkpoint, torch.bfloat16)
    inputs, start = random_inputs(truth.config, batch=2)
    mask = torch.ones_like(inputs.input_ids, dtype=torch.bool)
    mask[1, -5:] = False
    inputs = type(inputs)(inputs.pixel_values, inputs.input_ids, inputs.image_positions, inputs.state, mask)
    with torch.no_grad():
        expected = truth(inputs, start, truth.head.step_tables(2))
        small, noisy = cast(inputs, torch.bfloat16), start.to(torch.bfloat16)
        plain = low(small, noisy, low.head.step_tables(2)).float()
        got = laid_out_stages(other)(small, noisy, other.head.step_tables(2)).float()
    moved = (expected - start).norm()
    assert (got - expected).norm() / moved < 1.5 * (plain - expected).norm() / moved + 2e-3


def test_layers_of_others_are_left_alone(tmp_path: Path) -> None:
    class Eight(torch.nn.Linear):
        """Some other kind of layer."""

    model = load_network(write_network(tmp_path / "network"))
    gate = model.language.blocks[0].mlp.gate
    gate.__class__ = Eight
    weight = gate.weight
    stages = laid_out_stages(model)
    assert stages.encode_vision == model.encode_vision
    assert gate.weight is weight
