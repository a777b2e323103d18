"""Ours against lerobot's port of GR00T N1.7 (transformers' Qwen3-VL inside) on random networks of many shapes.

fp32: positions are equal, and every stage is given the same input on both sides and must agree to 1e-5 relative L2. Measured on x86 with AVX-512, one
observation: language and vision-language blocks 0, bit for bit; vision 1e-6 and actions 2e-7, because of two operations that are written otherwise.
* The patch embedding is a Conv3d there and a matrix product here: the same 1536 products per number, summed in another order.
* A block that sees the text or the pictures alone attends to all tokens through a mask there, and to the gathered ones here.
With these two written our way in the reference, the rest of both stages is equal bit for bit too. In a batch the reference multiplies per-embodiment
weights with `bmm`, which rounds otherwise.
A network with no more layers than deepstack (the published one has 16 and 3) is the one case in which the numbers differ: lerobot reads the last
layer's output before deepstack is added to it. In transformers 4.57, NVIDIA's, the addition is in place, and the features hold it.

bf16: as for N1.5, the distance to the fp32 truth may not exceed the reference's by more than a fifth.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from golden_cases import matrix_library_is_regular, relative_error
from random_networks import SizesN1d7, cast, load_network, random_inputs_n1d7, write_network_n1d7
from torch import Tensor

from benchmarks.lib.reference_n1d7 import SecondReferenceN1d7
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.language import prompt_positions
from gr00t_fast.model.vision import patches_of

for _package in ("transformers", "diffusers", "lerobot.policies.groot.groot_n1_7"):
    pytest.importorskip(_package, reason="needs lerobot 0.6 (Python 3.12) with its `groot` extra", exc_type=ImportError)

CLOSE = 1e-5
STEPS = (1, 3, 4)
_WIDE = {"vision": (48, 80, 4, 3, (0, 1, 3), 81), "language": (64, 96, 5, 8, 2, 16), "sections": (4, 2, 2), "vl": (2, 8, 8), "hidden": 56}
SHAPES: dict[str, tuple[SizesN1d7, int, tuple[int, int]]] = {  # sizes, pictures, rows and columns of patches
    "one head": (SizesN1d7(vision=(20, 36, 2, 1, (1,), 16), language=(24, 40, 2, 1, 1, 8), vl=(1, 1, 24), dit=(2, 1, 32), row=0), 1, (4, 4)),
    "three deep": (SizesN1d7(**_WIDE, dit=(8, 2, 24)), 2, (6, 6)),
    "wide pictures": (SizesN1d7(**_WIDE, dit=(4, 3, 16), row=3), 3, (4, 8)),
    "tall pictures": (SizesN1d7(dit=(6, 4, 8), extra_language_layers=2, row=15), 2, (8, 2)),
    "text in every block": (SizesN1d7(text_every=1, action_dim=32, state_dim=64), 1, (4, 4)),
    "text in one of three": (SizesN1d7(text_every=3, dit=(13, 4, 8), horizon=17), 4, (2, 2)),
    "all tokens in every block": (SizesN1d7(text_every=None, dit=(5, 2, 6)), 2, (4, 4)),
    "no deepstack, vlln or blocks": (SizesN1d7(vision=(32, 64, 1, 2, (), 36), use_vlln=False, vl=(0, 4, 8)), 1, (4, 6)),
    "one layer without deepstack": (SizesN1d7(language=(40, 64, 3, 5, 1, 12), sections=(2, 2, 2), vl=(2, 5, 8)), 1, (4, 4)),
}  # fmt: skip
cases = pytest.mark.parametrize(("shape", "batch"), list(itertools.product(SHAPES, (1, 3))))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {name: write_network_n1d7(root / name, sizes, seed=number) for number, (name, (sizes, *_)) in enumerate(SHAPES.items())}


def _inputs(model: Gr00t, shape: str, batch: int, seed: int = 0) -> tuple[ModelInputs, Tensor]:
    _, pictures, grid = SHAPES[shape]
    return random_inputs_n1d7(model.config, batch, pictures, grid, seed=seed)


@torch.inference_mode()
def _stages(model: Gr00t, inputs: ModelInputs, noise: Tensor) -> list[Tensor]:
    """Vision (1 + deepstack, B, V, D), backbone, refined, and actions of each step count."""
    vision = model.encode_vision(inputs.pixel_values)
    backbone = model.encode_language(inputs, vision)
    vl = model.head.refine(backbone)
    condition = model.head.condition(vl, inputs.state, None, inputs.image_positions)
    return [vision, backbone, vl, *(model.head.denoise(noise, condition, model.head.step_tables(steps)) for steps in STEPS)]


def _stages_of_reference(reference: SecondReferenceN1d7, shape: str, model: Gr00t, inputs: ModelInputs, noise: Tensor, given=None) -> list[Tensor]:
    """Each stage of the reference, from `given` (our stages) or, when None, from its own."""
    sizes, _, grid = SHAPES[shape]
    patches = patches_of(inputs.pixel_values.flatten(0, 1), model.vision.config).flatten(0, 1)
    vision = reference.encode_vision(patches, grid)
    backbone = reference.encode_language(inputs.input_ids, patches, grid, given[0].flatten(1, 2) if given else None)
    vl = reference.refine((given[1] if given else backbone).clone())
    start = given[2] if given else vl
    actions = [reference.denoise(start.clone(), inputs.input_ids, inputs.state, noise, steps, sizes.row) for steps in STEPS]
    return [vision.unflatten(1, (inputs.input_ids.shape[0], -1)), backbone, vl, *actions]


@cases
def test_fp32(checkpoints: dict[str, Path], shape: str, batch: int) -> None:
    model, reference = load_network(checkpoints[shape]), SecondReferenceN1d7(checkpoints[shape])
    inputs, noise = _inputs(model, shape, batch, seed=batch)
    ours = _stages(model, inputs, noise)
    theirs = _stages_of_reference(reference, shape, model, inputs, noise, given=ours)
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < CLOSE
    if batch == 1 and matrix_library_is_regular(model):
        assert [torch.equal(a, b) for a, b in zip(ours[1:3], theirs[1:3], strict=True)] == [True] * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_equal(checkpoints: dict[str, Path], shape: str) -> None:
    model, reference = load_network(checkpoints[shape]), SecondReferenceN1d7(checkpoints[shape])
    inputs, _ = _inputs(model, shape, 2)
    rows, columns = SHAPES[shape][2]
    patches = patches_of(inputs.pixel_values.flatten(0, 1), model.vision.config).flatten(0, 1)
    ours = prompt_positions(inputs.input_ids.shape[1], inputs.image_positions, rows // 2, columns // 2)
    assert torch.equal(ours[:, None].expand(-1, 2, -1), reference.positions(inputs.input_ids, patches, (rows, columns)))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_operations_are_all_that_differs(checkpoints: dict[str, Path], shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = load_network(checkpoints[shape]), SecondReferenceN1d7(checkpoints[shape])
    if not matrix_library_is_regular(model):
        pytest.skip("bits depend on how this machine's matrix library groups products")
    inputs, noise = _inputs(model, shape, 1)
    patch_embedding = reference.qwen.model.visual.patch_embed
    weight, bias = patch_embedding.proj.weight.flatten(1), patch_embedding.proj.bias
    monkeypatch.setattr(patch_embedding, "forward", lambda patches: torch.nn.functional.linear(patches, weight, bias))

    def gather(_block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["encoder_attention_mask"]
        if mask is None:
            return args, kwargs
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][:, mask[0]], "encoder_attention_mask": None}

    for block in reference.model.action_head.model.transformer_blocks:
        block.register_forward_pre_hook(gather, with_kwargs=True)
    ours = _stages(model, inputs, noise)
    theirs = _stages_of_reference(reference, shape, model, inputs, noise, given=ours)
    assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)


def test_deepstack_behind_the_last_layer_is_missing_there(tmp_path: Path) -> None:
    sizes = SizesN1d7(vision=(32, 64, 4, 2, (0, 1, 2), 36), language=(40, 64, 2, 5, 1, 12), sections=(2, 2, 2), vl=(2, 5, 8))
    checkpoint = write_network_n1d7(tmp_path, sizes)
    model, reference = load_network(checkpoint), SecondReferenceN1d7(checkpoint)
    inputs, noise = random_inputs_n1d7(model.config)
    vision, backbone, *_ = _stages(model, inputs, noise)
    patches = patches_of(inputs.pixel_values.flatten(0, 1), model.vision.config).flatten(0, 1)
    theirs = reference.encode_language(inputs.input_ids, patches, (4, 4), vision.flatten(1, 2))
    assert relative_error(backbone, theirs) > 0.01
    assert relative_error(backbone, theirs.index_add(1, inputs.image_positions, vision[2])) < CLOSE


def test_bf16_is_as_close_to_the_truth_as_the_reference(checkpoints: dict[str, Path]) -> None:
    """Root mean square over shapes and seeds: a single network's error is a matter of luck. Of actions, the displacement from the noise counts."""
    squares = {"ours": torch.zeros(3 + len(STEPS)), "theirs": torch.zeros(3 + len(STEPS))}
    for shape in SHAPES:
        truth_of, exact = SecondReferenceN1d7(checkpoints[shape]), load_network(checkpoints[shape])
        model, reference = load_network(checkpoints[shape], torch.bfloat16), SecondReferenceN1d7(checkpoints[shape], torch.bfloat16)
        for seed in range(3):
            inputs, noise = _inputs(model, shape, 2, seed)
            low, low_noise = cast(inputs, torch.bfloat16), noise.bfloat16()
            rounded = cast(low, torch.float32)  # the truth sees the inputs that bf16 can hold
            truth = _stages_of_reference(truth_of, shape, exact, rounded, low_noise.float())
            start = [torch.zeros(())] * 3 + [low_noise.float()] * len(STEPS)
            both = {"ours": _stages(model, low, low_noise), "theirs": _stages_of_reference(reference, shape, model, low, low_noise)}
            for name, values in both.items():
                errors = [relative_error(v.float() - s, t - s) for v, t, s in zip(values, truth, start, strict=True)]
                squares[name] += torch.tensor(errors).square()
    assert (squares["theirs"] > 0).all()
    assert (squares["ours"].sqrt() <= 1.2 * squares["theirs"].sqrt()).all(), squares


def test_the_comparison_can_fail(checkpoints: dict[str, Path]) -> None:
    """One changed weight in a thousand is seen by the stage that holds it, another embodiment's weights by the actions alone."""
    shape = "three deep"
    model, reference = load_network(checkpoints[shape]), SecondReferenceN1d7(checkpoints[shape])
    inputs, noise = _inputs(model, shape, 1)
    names = ("vision.deepstack_mergers.2.norm.bias", "language.blocks.3.attention.k_norm.weight", "head.vl_blocks.1.norm2.weight")
    for number, name in enumerate(names):
        parameter = model.get_parameter(name)
        before = parameter[0].clone()
        parameter[0] += 0.01
        ours = _stages(model, inputs, noise)
        theirs = _stages_of_reference(reference, shape, model, inputs, noise, given=ours)
        assert [relative_error(a, b) > CLOSE for a, b in zip(ours, theirs, strict=True)] == [number == stage for stage in range(len(ours))], name
        parameter[0] = before
    ours = _stages(model, inputs, noise)
    other_row = reference.denoise(ours[2].clone(), inputs.input_ids, inputs.state, noise, STEPS[0], SHAPES[shape][0].row - 1)
    assert relative_error(ours[3], other_row) > 1e-2
