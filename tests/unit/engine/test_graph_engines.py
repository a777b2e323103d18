"""The computation that CUDA graphs record, run as it stands on a CPU through the policy: frames to joint units, batches, continued chunks.

On a CPU nothing is recorded, and here nothing is compiled, which takes a minute even for a small network. The whole way with the compiler:
`GR00T_FAST_COMPILE=1 python -m pytest tests/unit/engine/test_graph_engines.py`.
Recordings are for tests/gpu/.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import inputs_for
from random_networks import Sizes, cast, load_network, observation, random_inputs, write_network, write_network_n1d7

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.engine import make_engine
from gr00t_fast.engine.cuda_graph import GraphEngine, check_compiler, compiled, cuda_graph_engine
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.fused import FusedModel, Stages, fused_model
from gr00t_fast.model import Gr00t
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

SIZES = Sizes(language=(48, 96, 2, 4, 2, 16), vl=(2, 4, 12), dit=(3, 4, 12), vision=(32, 64, 2, 2))
CLOSE_DEG = 2e-3  # fp32 in another order of operations; joint ranges are near 100 degrees
UNEQUAL = ["pick", "put the red block into the bowl, then wave", "x"]


@pytest.fixture(
    scope="module", params=[("n1.5", "so100"), ("n1.5", "so100_dualcam"), ("n1.6", "so100_dualcam"), ("n1.7", "so100_dualcam")], ids="-".join
)
def policies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain model and the graph engine, each over a copy of the weights of its own."""
    (network, name), directory = request.param, tmp_path_factory.mktemp("checkpoint")
    if network == "n1.5":
        checkpoint = write_network(directory, SIZES, data_config=name)
    else:
        checkpoint = write_random_checkpoint(directory, "tiny", name, network=network)
    eager = load_policy(checkpoint, data_config=name, device="cpu", precision="fp32", engine="eager", seed=5)
    engine = GraphEngine("uncompiled", fused_model(load_network(checkpoint)))
    return {"eager": eager, "graph": load_policy(checkpoint, data_config=name, engine=engine, seed=5), "name": name}


def noise(policy: Gr00tPolicy, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *policy.chunk_shape)).astype(np.float32)


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
        start = noise(policies["eager"], seed=seed)
        assert_close(policies["graph"].get_action(seen, noise=start), policies["eager"].get_action(seen, noise=start))


def test_a_batch_of_unequal_prompts_is_its_single_calls(policies: dict) -> None:
    batched, start = observation(policies["name"], batch=3, instruction=UNEQUAL), noise(policies["eager"], 3)
    together = policies["graph"].get_action(batched, noise=start)
    assert_close(together, policies["eager"].get_action(batched, noise=start))
    for item in range(3):
        one = {key: value[item] for key, value in batched.items()}
        for policy in (policies["graph"], policies["eager"]):
            alone = policy.get_action(one, noise=start[item : item + 1])
            assert_close({key: rows[item] for key, rows in together.items()}, alone)


@pytest.mark.parametrize("batch", [None, 2])
def test_continued_chunks_are_those_of_eager(policies: dict, batch: int | None) -> None:
    seen, start = observation(policies["name"], batch=batch), noise(policies["eager"], batch or 1)
    before = policies["eager"].get_action(seen, noise=noise(policies["eager"], batch or 1, seed=1))
    plain = policies["eager"].get_action(seen, noise=start)
    for delay in (0, 3):  # contents only: the same buffers
        prefix = ActionPrefix({key: rows[..., 5:, :] for key, rows in before.items()}, delay)
        expected, got = (policies[name].get_action(seen, noise=start, prefix=prefix) for name in ("eager", "graph"))
        assert_close(got, expected)
        assert np.abs(expected["action.single_arm"] - plain["action.single_arm"]).max() > 100 * CLOSE_DEG, "it continues nothing"
    assert_close(policies["graph"].get_action(seen, noise=start), plain)


def test_one_preparation_per_shape(policies: dict) -> None:
    """Another instruction of the same length, other pictures and another prefix change contents; steps, batch and a prefix change the shape."""
    policy = policies["graph"]
    policy.denoising_steps = 2
    policy.engine.forget()
    for seed, instruction in enumerate(("pick it", "drop it", "pick at")):
        seen = observation(policies["name"], instruction=instruction, seed=seed)
        actions = policy.get_action(seen, noise=noise(policy))
    assert len(policy.engine.prepared) == 1
    for length in (4, 9):
        policy.get_action(seen, prefix=ActionPrefix({key: rows[:length] for key, rows in actions.items()}, 1))
    assert len(policy.engine.prepared) == 2
    policy.denoising_steps = 1
    policy.get_action(seen)
    policy.get_action(observation(policies["name"], batch=2))
    assert len(policy.engine.prepared) == 4
    policy.engine.forget()
    policy.get_action(observation(policies["name"], batch=3, instruction=UNEQUAL))
    assert [shape.batch for shape in policy.engine.prepared] == [1, 1, 1], "prompts of unequal length are not padded"


def test_warm_up_prepares_continuing_too(policies: dict) -> None:
    policy = policies["graph"]
    policy.engine.forget()
    policy.warm_up("pick", continuing=True)
    assert {shape.continues for shape in policy.engine.prepared} == {False, True}


def test_a_new_length_in_mid_run_is_said_aloud(policies: dict, caplog: pytest.LogCaptureFixture) -> None:
    policy = policies["graph"]
    policy.engine.forget()
    with caplog.at_level(logging.WARNING):
        policy.warm_up("pick")
        policy.get_action(observation(policies["name"], instruction="drop"))
        assert not caplog.records, "warmed up with one of the same length"
        policy.get_action(observation(policies["name"], instruction="drop it there"))
    (record,) = caplog.records
    assert f"{policy.engine.prepared[-1].prompt_tokens} prompt tokens" in record.getMessage()
    assert not policy.engine.warming_up


def test_where_engines_cannot_run_they_say_so(policies: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = policies["eager"]
    model = eager.engine.model
    with pytest.raises(ConfigError, match="'cuda_graph' needs a CUDA GPU.*--device=cuda, or --engine=eager"):
        cuda_graph_engine(model)
    tensors = eager.preprocess(observation(policies["name"])).to(eager.device, eager.dtype)
    with pytest.raises(ConfigError, match="from camera frames"):
        policies["graph"].engine.run(tensors, torch.zeros(1, *eager.chunk_shape), 1, StageTimer())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*CXX=no-such-compiler"):
        make_engine("compiled", model)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"looked for g\+\+, clang\+\+, c\+\+.*--engine=eager"):
        make_engine("compiled", model)


def test_on_a_gpu_what_loads_a_kernel_is_looked_for_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"engine 'compiled' needs a C compiler, .*CC=no-such-compiler.*--engine=cuda_graph"):
        check_compiler("compiled", "cuda")
    monkeypatch.setenv("CC", "sh")  # anything that is there
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"headers of Python .* no {tmp_path}/Python.h.*python3\.\d+-dev"):
        check_compiler("compiled", "cuda")
    (tmp_path / "Python.h").touch()
    check_compiler("compiled", "cuda")
    monkeypatch.setenv("CC", "no-such-compiler")
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    check_compiler("compiled", "cuda")  # what it keeps on disk needs none


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
        expected, plain, got = (policy.get_action(seen, noise=noise(truth, seed=seed)) for policy in (truth, eager, compiled))
        if precision == "fp32":
            assert_close(got, expected)
        else:
            off = {name: max(np.abs(actions[key] - expected[key]).max() for key in expected) for name, actions in (("plain", plain), ("got", got))}
            assert off["got"] < 2 * off["plain"] + 0.1
    prefix = ActionPrefix({key: rows[3:] for key, rows in expected.items()}, 2)
    if precision == "fp32":
        assert_close(*(policy.get_action(seen, noise=noise(truth), prefix=prefix) for policy in (compiled, truth)))


# --- stages traced as the compiled engines trace them --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["n1.5", "n1.6", "n1.7"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gr00t:
    directory = tmp_path_factory.mktemp("traced")
    if request.param == "n1.5":
        return load_network(write_network(directory, SIZES))
    return load_network(write_network_n1d7(directory) if request.param == "n1.7" else write_random_checkpoint(directory, "tiny", network="n1.6"))


def traced(fused: FusedModel, any_length: bool) -> Stages:
    """`backend="eager"` traces as Inductor would and runs the trace as it is; a graph break is an error."""
    torch.compiler.reset()
    return compiled(fused.stages(), any_length, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("any_length", "mode"),
    [(True, contextlib.nullcontext()), (False, torch.device("cpu")), (True, torch.device("cpu"))],
    ids=["on a GPU", "on a CPU", "on a GPU with a default device"],
)
def test_every_stage_is_traced_whole(network: Gr00t, any_length: bool, mode) -> None:
    """In what the engines call them in; twice where a caller has chosen a default device, which is a TorchFunctionMode: dynamo cannot trace all of
    torch's methods in one (Tensor.unflatten is such a method)."""
    fused = fused_model(network)
    stages, tables = traced(fused, any_length), fused.step_tables(2)
    inputs, start = inputs_for(network.config)
    with torch.no_grad():
        expected = fused.stages()(inputs, fused.constants(inputs), start, tables)
        with mode:
            got = stages(inputs, fused.constants(inputs), start, tables)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["n1.6", "n1.7"])
@pytest.mark.parametrize("patches", [(4, 4), (4, 6), (6, 2)])
def test_pictures_of_any_shape_give_the_eager_actions(tmp_path: Path, patches: tuple[int, int], name: str) -> None:
    """Another grid has other positions in the tower, other tokens and, in N1.7, other places in the prompt."""
    model = load_network(write_network_n1d7(tmp_path) if name == "n1.7" else write_random_checkpoint(tmp_path, "tiny", network=name))
    inputs, start = inputs_for(model.config, 2, patches=patches)
    expected, fused = EagerEngine(model).run(inputs, start, 2, StageTimer()), fused_model(model)
    with torch.no_grad():
        got = fused.stages()(inputs, fused.constants(inputs), start, fused.step_tables(2))
    assert (got - expected).norm() / (expected - start).norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("any_length", [True, False])
def test_many_prompt_lengths_can_be_compiled(tmp_path: Path, any_length: bool) -> None:
    """More than dynamo's usual limit of 8 versions; on a GPU all of them by one."""
    fused, versions = FusedModel(load_network(write_network(tmp_path, Sizes(image=28, horizon=4, future=2)))), 0

    def backend(graph: torch.fx.GraphModule, _) -> Any:
        nonlocal versions
        versions += 1
        return graph.forward

    torch.compiler.reset()
    stages, tables = compiled(fused.stages(), any_length=any_length, backend=backend), fused.step_tables(1)
    for extra in range(9):
        inputs, start = random_inputs(fused.config, text_tokens=7 + extra)
        with torch.no_grad():
            torch.testing.assert_close(
                stages(inputs, fused.constants(inputs), start, tables),
                fused.stages()(inputs, fused.constants(inputs), start, tables),
                rtol=1e-4,
                atol=1e-5,
            )
    assert versions == (5 if any_length else 1 + 4 * 9)


# --- weights packed once -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, Sizes(use_vlln=False), Sizes(dit=(1, 4, 8)), Sizes(horizon=8, future=4, state_dim=12, action_dim=7)])
def test_the_fused_network_is_the_plain_one_and_loses_no_precision(tmp_path: Path, sizes: Sizes) -> None:
    """In fp32 up to rounding; in bf16 as near to fp32 as the plain model. Engines over one model share its packed weights."""
    checkpoint = write_network(tmp_path / "network", sizes)
    truth, low = load_network(checkpoint), load_network(checkpoint, torch.bfloat16)
    inputs, start = random_inputs(truth.config, batch=2, cameras=2)
    with torch.no_grad():
        expected = truth(inputs, start, truth.head.step_tables(2))
    errors = {}
    for model in (truth, low):
        given, noisy = cast(inputs, model.dtype), start.to(model.dtype)
        with torch.no_grad():
            plain = model(given, noisy, model.head.step_tables(2)).float()
            fused, again = FusedModel(model), FusedModel(model)
            got = fused.stages()(given, fused.constants(given), noisy, fused.step_tables(2)).float()
        errors[model.dtype] = [(actions - expected).norm() / (expected - start).norm() for actions in (got, plain)]
        assert all(mine[0].weight.data_ptr() == theirs[0].weight.data_ptr() for mine, theirs in zip(fused.gate_up, again.gate_up, strict=True))
    assert errors[torch.float32][0] < 2e-5
    assert errors[torch.bfloat16][0] < 1.5 * errors[torch.bfloat16][1] + 2e-3
