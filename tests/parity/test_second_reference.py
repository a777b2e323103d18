"""Ours against the reference's own modules (transformers' SigLIP and Qwen3, lerobot's action head) on random networks of many shapes.

fp32: every stage is given the same input on both sides and must agree to 1e-5 relative L2 (measured: 0, bit for bit, on x86 with AVX-512).
bf16: rounding differs between any two implementations, so the distance to the fp32 truth is compared: ours may not exceed the reference's
by more than a fifth.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from golden_cases import matrix_library_is_regular, relative_error, run_stages
from random_networks import Sizes, cast, load_network, random_inputs, write_network

from benchmarks.lib.reference import REFERENCE_HEAD, SecondReference

for _package in ("transformers", "diffusers", "lerobot"):
    pytest.importorskip(_package)
pytest.importorskip(REFERENCE_HEAD, reason="lerobot has GR00T N1.5's action head up to 0.5 only")

CLOSE = 1e-5
STEPS = (1, 3, 4)
SHAPES = {
    "one head": (Sizes(language=(24, 40, 2, 1, 1, 24), vision=(20, 36, 1, 1), dit=(2, 1, 32), vl=(1, 1, 24)), 1),
    "four queries per key": (Sizes(language=(64, 96, 3, 8, 2, 16), vision=(48, 80, 2, 4), dit=(4, 2, 24), vl=(2, 8, 8), hidden=56), 2),
    "no grouping": (Sizes(language=(48, 100, 1, 6, 6, 10), dit=(1, 3, 16), vl=(1, 3, 16)), 1),
    "odd depth": (Sizes(language=(32, 64, 2, 4, 2, 8), dit=(3, 4, 12), vl=(3, 2, 16), extra_language_layers=3), 3),
    "long horizon": (Sizes(horizon=24, future=5, action_dim=7, state_dim=11, hidden=40), 1),
    "horizon of one": (Sizes(horizon=1, future=1, dit=(5, 2, 6)), 2),
    "no vlln": (Sizes(use_vlln=False, language=(40, 64, 2, 5, 1, 14), vl=(2, 5, 8)), 2),
    "head wider than its width": (Sizes(language=(16, 32, 2, 4, 2, 32), vl=(1, 2, 8)), 1),
}
cases = pytest.mark.parametrize(("shape", "batch"), list(itertools.product(SHAPES, (1, 3))))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {name: write_network(root / name, sizes, seed=number) for number, (name, (sizes, _)) in enumerate(SHAPES.items())}


def _stages_of_reference(reference: SecondReference, inputs, noise, given=None):
    """Each stage of the reference, from `given` (our stages) or, when None, from its own."""
    vision = reference.encode_vision(inputs.pixel_values.flatten(0, 1))
    backbone = reference.encode_language(inputs.input_ids, given.vision if given else vision)
    features = (given.backbone if given else backbone).clone()  # the head may write into what it is given
    vl = reference.refine(features.clone())
    return [vision, backbone, vl, *(reference.denoise(features.clone(), inputs.state, noise, steps) for steps in STEPS)]


@cases
def test_fp32(checkpoints: dict[str, Path], shape: str, batch: int) -> None:
    model, reference = load_network(checkpoints[shape]), SecondReference(checkpoints[shape])
    inputs, noise = random_inputs(model.config, batch, cameras=SHAPES[shape][1], seed=batch)
    stages = run_stages(model, inputs, noise, STEPS)
    ours = [stages.vision, stages.backbone, stages.vl, *stages.actions.values()]
    theirs = _stages_of_reference(reference, inputs, noise, given=stages)
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < CLOSE
    if batch == 1 and matrix_library_is_regular(model):
        assert [torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True)] == [True] * 3


def test_bf16_is_as_close_to_the_truth_as_the_reference(checkpoints: dict[str, Path]) -> None:
    """Root mean square over shapes and seeds: a single network's error is a matter of luck. Of actions, the displacement from the noise counts."""
    squares = {"ours": torch.zeros(6), "theirs": torch.zeros(6)}
    for shape, seed in itertools.product(SHAPES, range(3)):
        truth_of, model = SecondReference(checkpoints[shape]), load_network(checkpoints[shape], torch.bfloat16)
        inputs, noise = random_inputs(model.config, 2, cameras=SHAPES[shape][1], seed=seed)
        low, low_noise = cast(inputs, torch.bfloat16), noise.bfloat16()
        rounded = cast(low, torch.float32)  # the truth sees the inputs that bf16 can hold
        truth = _stages_of_reference(truth_of, rounded, low_noise.float())
        stages = run_stages(model, low, low_noise, STEPS)
        theirs = _stages_of_reference(SecondReference(checkpoints[shape], torch.bfloat16), low, low_noise)
        start = [torch.zeros(())] * 3 + [low_noise.float()] * len(STEPS)
        for name, values in (("ours", [stages.vision, stages.backbone, stages.vl, *stages.actions.values()]), ("theirs", theirs)):
            errors = [relative_error(v.float() - s, t - s) for v, t, s in zip(values, truth, start, strict=True)]
            squares[name] += torch.tensor(errors).square()
    assert (squares["theirs"] > 0).all()
    assert (squares["ours"].sqrt() <= 1.2 * squares["theirs"].sqrt()).all(), squares


def test_the_comparison_can_fail(checkpoints: dict[str, Path]) -> None:
    """One changed weight in a thousand is seen by the stage that holds it."""
    shape = "odd depth"
    model, reference = load_network(checkpoints[shape]), SecondReference(checkpoints[shape])
    inputs, noise = random_inputs(model.config, 1, cameras=3)
    for number, name in enumerate(("vision.blocks.0.mlp.up.bias", "language.blocks.1.attention.k_norm.weight", "head.vl_blocks.2.norm2.weight")):
        parameter = model.get_parameter(name)
        before = parameter[0].clone()
        parameter[0] += 0.01
        stages = run_stages(model, inputs, noise, STEPS)
        ours, theirs = [stages.vision, stages.backbone, stages.vl], _stages_of_reference(reference, inputs, noise, given=stages)
        assert [relative_error(a, b) > CLOSE for a, b in zip(ours, theirs[:3], strict=True)] == [number == stage for stage in range(3)]
        parameter[0] = before
