"""The published format, read strictly: what is complete loads exactly, what is not gives one error that says what and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from random_networks import load_network, write_network
from safetensors.torch import load_file, save_file

from gr00t_fast.base.errors import CheckpointError
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.networks.n1d5 import EMBODIMENT_ROWS

WEIGHTS = "model.safetensors"
DECODER = "action_head.action_decoder.layer2.b"
PROJECTION = "backbone.eagle_model.mlp1.0.weight"


@pytest.fixture
def checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _change(checkpoint: Path, change) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def _parameters(checkpoint: Path, dtype: torch.dtype = torch.bfloat16, tag: str = "new_embodiment") -> dict[str, torch.Tensor]:
    return dict(load_network(checkpoint, dtype, tag).named_parameters())


# --- complete files ------------------------------------------------------------------------------------------------------------------


def test_every_weight_arrives_where_the_table_says(checkpoint: Path) -> None:
    """Independently of the table's code: concatenation in the order q, k, v; k, v; one row of per-embodiment weights."""
    published, ours = load_file(checkpoint / WEIGHTS), _parameters(checkpoint)
    row = EMBODIMENT_ROWS["new_embodiment"]
    qwen = "backbone.eagle_model.language_model.model.layers.0.self_attn."
    siglip = "backbone.eagle_model.vision_model.vision_model.encoder.layers.0.self_attn."
    cross, self_ = "action_head.model.transformer_blocks.0.attn1.", "action_head.model.transformer_blocks.1.attn1."
    expected = {
        "language.blocks.0.attention.qkv.weight": torch.cat([published[f"{qwen}{x}_proj.weight"] for x in "qkv"]),
        "vision.blocks.0.attention.qkv.bias": torch.cat([published[f"{siglip}{x}_proj.bias"] for x in "qkv"]),
        "head.dit.blocks.0.attention.q.weight": published[f"{cross}to_q.weight"],
        "head.dit.blocks.0.attention.kv.weight": torch.cat([published[f"{cross}to_{x}.weight"] for x in "kv"]),
        "head.dit.blocks.1.attention.qkv.bias": torch.cat([published[f"{self_}to_{x}.bias"] for x in "qkv"]),
        "head.action_decoder.layer2.bias": published[DECODER][row],
        "head.action_encoder.w2.weight": published["action_head.action_encoder.W2.W"][row],
        "vision.connector.weight": published[PROJECTION],
    }
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_sharded_and_single_files_are_the_same_network(checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_network(tmp_path, shard_bytes=60_000)
    assert len(list(sharded.glob("model-*.safetensors"))) > 5
    one, many = _parameters(checkpoint), _parameters(sharded)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("tag", EMBODIMENT_ROWS)
def test_each_embodiment_reads_its_own_rows(checkpoint: Path, tag: str) -> None:
    def number_rows(tensors: dict) -> None:
        for name in [name for name in tensors if name.endswith((".W", ".b"))]:
            tensors[name] = torch.arange(32).view(-1, *(1,) * (tensors[name].ndim - 1)).expand_as(tensors[name]).to(tensors[name].dtype).contiguous()

    _change(checkpoint, number_rows)
    own = {name: p for name, p in _parameters(checkpoint, tag=tag).items() if any(x in name for x in ("_encoder.", "_decoder."))}
    assert len(own) == 14
    assert all((p == {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}[tag]).all() for p in own.values())


# --- names and shapes ----------------------------------------------------------------------------------------------------------------


def test_missing_extra_and_misshaped_are_told_together(checkpoint: Path) -> None:
    def damage(tensors: dict) -> None:
        del tensors[DECODER], tensors["action_head.vlln.weight"]
        tensors["action_head.unheard_of.weight"] = torch.zeros(1)
        tensors[PROJECTION] = tensors[PROJECTION].t().contiguous()[:, :-1].contiguous()

    _change(checkpoint, damage)
    with pytest.raises(CheckpointError) as caught:
        load_network(checkpoint)
    message = str(caught.value)
    assert "2 missing:\n    action_head.action_decoder.layer2.b\n    action_head.vlln.weight" in message
    assert "1 unexpected:\n    action_head.unheard_of.weight" in message
    assert f"1 mis-shaped:\n    {PROJECTION}: expected [32, 32], got [32, 31]" in message
    assert "same GR00T N1.5 checkpoint" in message


# --- damaged weight files ------------------------------------------------------------------------------------------------------------


def _expect_damage(checkpoint: Path, pattern: str = "damaged or cut short") -> str:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load_network(checkpoint)
    assert WEIGHTS in str(caught.value)
    return str(caught.value)


def test_a_file_cut_at_any_byte_is_refused(checkpoint: Path) -> None:
    whole = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 2, len(whole) - 1]
    cuts += np.random.default_rng(0).integers(0, len(whole), 40).tolist()
    for cut in cuts:
        (checkpoint / WEIGHTS).write_bytes(whole[:cut])
        assert "Copy or download it again" in _expect_damage(checkpoint), cut
    (checkpoint / WEIGHTS).write_bytes(whole + b"\0")
    _expect_damage(checkpoint)


def test_no_change_of_the_header_reaches_the_network(checkpoint: Path) -> None:
    """One byte after another is changed: either the file is refused, or it still means the same (a space, a name in `__metadata__`)."""
    whole = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    before, generator, refused = _parameters(checkpoint), np.random.default_rng(0), 0
    for position in sorted({*range(12), *generator.integers(0, header, 150).tolist()}):
        damaged = bytearray(whole)
        damaged[position] ^= int(generator.integers(1, 256))
        (checkpoint / WEIGHTS).write_bytes(damaged)
        try:
            after = _parameters(checkpoint)
        except CheckpointError:
            refused += 1
            continue
        assert all(torch.equal(before[name], after[name]) for name in before), position
    assert refused > 100


def _with_header(checkpoint: Path, header: dict | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[" * 100_000,
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},  # overlap
        {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]}},  # hole
    ],
    ids=str,
)
def test_impossible_headers(checkpoint: Path, header: dict | bytes) -> None:
    _with_header(checkpoint, header, b"\0" * 4)
    _expect_damage(checkpoint)


def test_a_wrong_dtype_is_named(checkpoint: Path) -> None:
    _change(checkpoint, lambda tensors: tensors.update({DECODER: tensors[DECODER].to(torch.int64)}))
    message = _expect_damage(checkpoint, "has it as I64")
    assert DECODER in message
    assert "damaged" not in message, "the file is whole; copying it again would not help"


def test_whole_numbers_that_nothing_reads_are_left_alone(checkpoint: Path) -> None:
    before = _parameters(checkpoint)
    _change(checkpoint, lambda tensors: tensors.update({"backbone.position_ids": torch.arange(7), "steps": torch.ones(2, dtype=torch.bool)}))
    after = _parameters(checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_16_bit_formats_are_refused_and_fp32_beside_one_is_not(checkpoint: Path) -> None:
    """Bytes of one that the header calls the other are other numbers."""
    name = "action_head.vlln.weight"
    _change(checkpoint, lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items() if key != name}))
    _parameters(checkpoint)
    before = load_file(checkpoint / WEIGHTS)
    _change(checkpoint, lambda tensors: tensors.update({name: tensors[name].bfloat16().view(torch.float16)}))
    with pytest.raises(CheckpointError, match=rf"float16 and bfloat16(.|\n)*1 of the rarer one:\s*{name}"):
        _parameters(checkpoint)
    save_file({key: value.half() for key, value in before.items()}, checkpoint / WEIGHTS)
    _parameters(checkpoint)


def test_weight_files_that_are_not_there(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ({"weight_map": {"a": "model-1.safetensors", "b": WEIGHTS}}, r"names weight files that are not there: model-1.safetensors"),
        ({"weight_map": {"a": 3}}, "must give a file name"),
        ({"weight_map": {"a": WEIGHTS, "b": "../model.safetensors"}}, r"names files outside the checkpoint's directory: \.\./model.safetensors"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the checkpoint's directory: /etc/passwd"),
        ({"weight_map": {"a": f"sub/{WEIGHTS}"}}, f"outside the checkpoint's directory: sub/{WEIGHTS}"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_a_wrong_index(checkpoint: Path, index: object, pattern: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(checkpoint)
