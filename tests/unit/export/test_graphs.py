"""The exported graphs, run as torch modules, are the plain model: every stage, for many shapes of both networks, without a line of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import inputs_for, layout_of, stages_of
from golden_cases import relative_error
from random_networks import Sizes, SizesN1d7, cast, load_network, write_network, write_network_n1d7

from gr00t_fast.export.graphs import Layout, graphs_of

SHAPES = {
    "tiny": Sizes(),
    "deeper": Sizes(language=(48, 96, 3, 4, 2, 16), vl=(2, 4, 12), dit=(4, 4, 12), vision=(32, 64, 2, 2)),
    "last block crosses": Sizes(dit=(3, 4, 8)),
    "one block": Sizes(dit=(1, 4, 8)),
    "no vlln": Sizes(use_vlln=False),
    "as many key heads": Sizes(language=(32, 64, 1, 4, 4, 8)),
    "horizon 8": Sizes(horizon=8, future=4, state_dim=12, action_dim=7),
    "n1.7": SizesN1d7(),
    "n1.7, more text blocks than image blocks": SizesN1d7(
        dit=(5, 4, 8), vision=(32, 64, 4, 2, (0, 1, 2), 36), language=(48, 96, 4, 4, 2, 16), sections=(3, 3, 2), vl=(2, 4, 12)
    ),
    "n1.7, text alone": SizesN1d7(dit=(2, 4, 8), use_vlln=False),
    "n1.7, all tokens": SizesN1d7(text_every=None, horizon=17, state_dim=12, action_dim=7),
}
# fp32: summation order alone. bf16 keeps 8 bits, and the plain model rounds at other places: a few roundings of 2^-9 each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, sizes in SHAPES.items():
        write: Any = write_network if isinstance(sizes, Sizes) else write_network_n1d7
        made[name] = write(tmp_path_factory.mktemp("graphs"), sizes, dtype=torch.float32)
    return made


def _run(checkpoint: Path, stage: str, layout: Layout, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = load_network(checkpoint, dtype)
    spec = graphs_of(model.config)[stage]
    with torch.inference_mode():
        outputs = spec.build(model, layout).eval()(*inputs.values())
    return dict(zip(spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


@pytest.mark.parametrize(
    ("shape", "pictures", "options"),
    [
        *((shape, 1, {}) for shape in SHAPES),
        ("deeper", 2, {}),
        ("horizon 8", 3, {}),
        ("n1.7", 3, {}),
        ("n1.7", 2, {"patches": (4, 6)}),
    ],
)
def test_each_graph_is_the_stage_of_the_model(checkpoints: dict[str, Path], shape: str, pictures: int, options: dict) -> None:
    model = load_network(checkpoints[shape])
    inputs, noise = inputs_for(model.config, pictures, **options)
    layout = layout_of(model.config, inputs)
    for stage, (given, expected) in stages_of(model, inputs, noise, steps=3).items():
        got = _run(checkpoints[shape], stage, layout, torch.float32, given)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(got[name], value) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["deeper", "n1.7"])
def test_in_sixteen_bits(checkpoints: dict[str, Path], shape: str, dtype: torch.dtype) -> None:
    truth, low = load_network(checkpoints[shape]), load_network(checkpoints[shape], dtype)
    inputs, noise = inputs_for(truth.config)
    expected, as_eager = stages_of(truth, inputs, noise, steps=2), stages_of(low, cast(inputs, dtype), noise.to(dtype), steps=2)
    for stage, (given, of_low) in as_eager.items():
        for name, value in _run(checkpoints[shape], stage, layout_of(truth.config, inputs), dtype, given).items():
            assert value.dtype == dtype
            error, of_eager = (relative_error(found, expected[stage][1][name]) for found in (value, of_low[name]))
            assert error < TOLERANCE[dtype], name
            assert error < 1.5 * of_eager + 1e-3, f"{name}: the graph loses precision that the plain model keeps"
