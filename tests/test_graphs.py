"""The exported graphs, run as torch modules, are the plain model: every stage, for many shapes of network, without a line of ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import stages_of
from golden_cases import relative_error
from random_networks import Sizes, cast, load_network, random_inputs, write_network

from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.export.graphs import GRAPHS, TABLE_PARAMETERS, example_inputs, graph_tables

SHAPES = {
    "tiny": Sizes(),
    "deeper": Sizes(language=(48, 96, 3, 4, 2, 16), vl=(2, 4, 12), dit=(4, 4, 12), vision=(32, 64, 2, 2)),
    "last block crosses": Sizes(dit=(3, 4, 8)),
    "one block": Sizes(dit=(1, 4, 8)),
    "no vlln": Sizes(use_vlln=False),
    "as many key heads": Sizes(language=(32, 64, 1, 4, 4, 8)),
    "horizon 8": Sizes(horizon=8, future=4, state_dim=12, action_dim=7),
}
# fp32: summation order alone. bf16 keeps 8 bits, and the plain model rounds at other places: a few roundings of 2^-9 each.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_network(tmp_path_factory.mktemp("graphs"), sizes, dtype=torch.float32) for name, sizes in SHAPES.items()}


def _run(checkpoint: Path, stage: str, cameras: int, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = load_network(checkpoint, dtype)
    with torch.inference_mode():
        outputs = GRAPHS[stage].build(model, cameras, 128).eval()(**inputs)
    return dict(zip(GRAPHS[stage].outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


@pytest.mark.parametrize("stage", GRAPHS)
@pytest.mark.parametrize(("shape", "cameras"), [*((shape, 1) for shape in SHAPES), ("deeper", 2), ("horizon 8", 3)])
def test_each_graph_is_the_stage_of_the_model(checkpoints: dict[str, Path], shape: str, cameras: int, stage: str) -> None:
    model = load_network(checkpoints[shape])
    inputs, noise = random_inputs(model.config, cameras=cameras)
    given, expected = stages_of(model, inputs, noise, steps=3)[stage]
    got = _run(checkpoints[shape], stage, cameras, torch.float32, given)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name], value) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", GRAPHS)
def test_in_sixteen_bits(checkpoints: dict[str, Path], stage: str, dtype: torch.dtype) -> None:
    truth, low = load_network(checkpoints["deeper"]), load_network(checkpoints["deeper"], dtype)
    inputs, noise = random_inputs(truth.config)
    _, expected = stages_of(truth, inputs, noise, steps=2)[stage]
    given, as_eager = stages_of(low, cast(inputs, dtype), noise.to(dtype), steps=2)[stage]
    for name, value in _run(checkpoints["deeper"], stage, 1, dtype, given).items():
        assert value.dtype == dtype
        error, of_eager = relative_error(value, expected[name]), relative_error(as_eager[name], expected[name])
        assert error < TOLERANCE[dtype], name
        assert error < 1.5 * of_eager + 1e-3, f"{name}: the graph loses precision that the plain model keeps"


def test_every_parameter_is_in_a_graph_or_in_the_tables(checkpoints: dict[str, Path]) -> None:
    """What one of them forgets to load stays on the meta device, and building or running it would raise."""
    checkpoint = open_checkpoint(checkpoints["deeper"])
    needed = {"language.embedding.", *TABLE_PARAMETERS}.union(*(spec.parameters(checkpoint.config) for spec in GRAPHS.values()))
    assert [name for name, _ in load_network(checkpoints["deeper"]).named_parameters() if not name.startswith(tuple(needed))] == []
    for stage, spec in GRAPHS.items():
        model = load_model(checkpoint, "new_embodiment", torch.device("cpu"), torch.float32, only=spec.parameters(checkpoint.config))
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        graph = spec.build(model, 1, 128)
        assert {value.device.type for value in (*graph.parameters(), *graph.buffers())} == {"cpu"}
        graph(*example_inputs(stage, checkpoint.config, 1, 30, torch.float32))
    graph_tables(load_model(checkpoint, "new_embodiment", torch.device("cpu"), torch.float32, only=TABLE_PARAMETERS), 4)
