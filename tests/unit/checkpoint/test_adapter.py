"""LoRA adapters: merged while loading by peft's formula, and everything that is not that formula refused with the command that merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import load_network, observation, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gr00t_fast import load_policy
from gr00t_fast.base.errors import CheckpointError, ConfigError
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine.manifest import Digests, target_of

DIT = "action_head.model.transformer_blocks"
QUERY, KEY, VALUE, OWN = f"{DIT}.0.attn1.to_q", f"{DIT}.0.attn1.to_k", f"{DIT}.0.attn1.to_v", f"{DIT}.1.attn1.to_q"
WHOLE = "action_head.state_encoder.layer1"
RANK, FP32, BF16 = 4, torch.float32, torch.bfloat16


@pytest.fixture
def base(checkpoint: Path) -> Path:
    return checkpoint


def _published(base: Path) -> dict[str, Tensor]:
    return load_file(base / "model.safetensors")


def _adapter(directory: Path, base: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """As peft writes it for the LoRA that NVIDIA's scripts train."""
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False},
        **{"init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": None, "r": RANK, "target_modules": [QUERY, VALUE]},
        **{"use_dora": False, "use_rslora": False, "loftq_config": {}, "rank_pattern": {}, "alpha_pattern": {}},
    }
    write_json(directory / "adapter_config.json", {key: value for key, value in (settings | changes).items() if value is not ...})
    write_json(directory / "experiment_cfg" / "metadata.json", json.loads((base / "experiment_cfg" / "metadata.json").read_text()))
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def _sides(base: Path, module: str, rank: int = RANK, seed: int = 0, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    rows, columns = _published(base)[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return {f"{module}.lora_A.weight": a.to(dtype), f"{module}.lora_B.weight": b.to(dtype)}


def _merged(base: Path, changed: dict[str, Tensor], directory: Path) -> Path:
    """The same checkpoint with other weights (fp32, so that nothing is rounded)."""
    for name in ("config.json", "eagle2_hg_model/config.json", "experiment_cfg/metadata.json"):
        write_json(directory / name, json.loads((base / name).read_text()))
    (directory / "eagle2_hg_model" / "tokenizer.json").write_bytes((base / "eagle2_hg_model" / "tokenizer.json").read_bytes())
    save_file({name: changed.get(name, value.float()).contiguous() for name, value in _published(base).items()}, directory / "model.safetensors")
    return directory


def _assert_equal(ours: Path, expected: Path, dtype: torch.dtype = FP32) -> None:
    theirs = dict(load_network(expected, dtype).named_parameters())
    for name, parameter in load_network(ours, dtype).named_parameters():
        assert torch.equal(parameter, theirs[name]), name


SCALES = {  # options, and by module its rank and scale; use_rslora divides by the root of the rank; alpha_pattern looks the module's name up
    "as NVIDIA trains": ({}, dict.fromkeys((QUERY, KEY, VALUE, OWN), (RANK, 16 / RANK))),
    "patterns": (
        {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 5}, "rank_pattern": {"to_q": 2, "to_v": 9}},
        {QUERY: (2, 5 / 2**0.5), VALUE: (9, 16 / 3)},
    ),
}


@pytest.mark.parametrize(
    ("scales", "stored", "dtype"), [(scales, BF16, dtype) for scales in SCALES for dtype in (FP32, BF16)] + [("patterns", FP32, FP32)]
)
def test_the_sum_is_rounded_once(base: Path, tmp_path: Path, scales: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Of matrices that are one published tensor each, or a part of one that is fused here (to_k and to_v)."""
    options, modules = SCALES[scales]
    weights, tensors, changed = _published(base), {}, {}
    for seed, (module, (rank, scale)) in enumerate(modules.items()):
        sides = _sides(base, module, rank, seed, stored)
        product = sides[f"{module}.lora_B.weight"].float() @ sides[f"{module}.lora_A.weight"].float()
        changed[f"{module}.weight"] = weights[f"{module}.weight"].float() + product * scale
        tensors |= sides
    adapter = _adapter(tmp_path / "a", base, tensors, target_modules=list(modules), **options)
    _assert_equal(adapter, _merged(base, changed, tmp_path / "m"), dtype)


def test_modules_trained_as_a_whole_replace_the_bases(base: Path, tmp_path: Path) -> None:
    weights = _published(base)
    whole = {name: torch.randn(value.shape) for name, value in weights.items() if name.startswith(WHOLE)}
    assert len(whole) == 2
    _assert_equal(_adapter(tmp_path / "a", base, whole, modules_to_save=[WHOLE]), _merged(base, whole, tmp_path / "m"))


def test_a_policy_on_an_adapter(base: Path, tmp_path: Path) -> None:
    """Tokenizer and sizes are the base's, statistics the adapter's; another adapter is another network for exports."""
    adapter = _adapter(tmp_path / "a", base, _sides(base, QUERY))
    options = {"device": "cpu", "precision": "fp32"}
    noise = np.random.default_rng(0).standard_normal((1, 16, 32)).astype(np.float32)
    adapted, plain = (load_policy(path, **options).get_action(observation(), noise=noise) for path in (adapter, base))
    assert not np.array_equal(adapted["action.single_arm"], plain["action.single_arm"])
    changed = _adapter(tmp_path / "b", base, _sides(base, QUERY), lora_alpha=17)
    targets = [target_of(open_checkpoint(path), "new_embodiment", "so100") for path in (adapter, changed)]
    assert targets[0].identity(Digests(tmp_path)) != targets[1].identity(Digests(tmp_path))
    with pytest.raises(ConfigError, match="gr1"):
        load_policy(adapter, embodiment_tag="gr1")


def test_as_peft_merges(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    weights = _published(base)
    root = nn.Module()
    root.config = {"model_type": "custom"}
    for module in (QUERY, KEY, VALUE, OWN):
        owner = root
        *parents, leaf = module.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        weight = weights[f"{module}.weight"].float()
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data = weight.clone()
        owner.add_module(leaf, linear)
    options = {"r": RANK, "lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"to_k": 3}, "rank_pattern": {"to_v": 7}, "init_lora_weights": False}
    adapted = peft.get_peft_model(root, peft.LoraConfig(target_modules=[QUERY, KEY, VALUE, OWN], **options))
    adapted.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    write_json(tmp_path / "a" / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
    write_json(tmp_path / "a" / "experiment_cfg" / "metadata.json", json.loads((base / "experiment_cfg" / "metadata.json").read_text()))
    merged = {f"{name}": value.detach() for name, value in adapted.merge_and_unload().state_dict().items() if name.endswith("weight")}
    _assert_equal(tmp_path / "a", _merged(base, merged, tmp_path / "m"))


# --- what is not merged --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        *({"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"peft_type": "IA3"}, {"peft_type": ...}, {"init_lora_weights": "pissa"}),
        *({"layer_replication": [[0, 2]]}, {"something_new": 3}, {"alpha_pattern": {"(a+)+": 3}}),
    ],
)
def test_other_methods_are_refused_with_the_command_that_merges(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = _adapter(tmp_path, base, _sides(base, QUERY), **changes)
    with pytest.raises(CheckpointError, match=rf"(?s){next(iter(changes))}.*merge_and_unload"):
        open_checkpoint(adapter)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all.*base_model_name_or_path"),
        ({"base_model_name_or_path": ...}, "base_model_name_or_path"),
        ({"lora_alpha": float("nan")}, "adapter_config.json"),
        ({"alpha_pattern": [1]}, "adapter_config.json"),
    ],
)
def test_configurations_that_say_too_little(base: Path, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(_adapter(tmp_path, base, _sides(base, QUERY), **changes))


def test_an_adapter_of_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    first = _adapter(tmp_path / "a", base, _sides(base, QUERY))
    with pytest.raises(CheckpointError, match="LoRA adapter itself"):
        open_checkpoint(_adapter(tmp_path / "b", first, _sides(base, QUERY)))


def test_weights_that_are_missing_pickled_or_beside_a_whole_checkpoint(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path, base, _sides(base, QUERY))
    (adapter / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        open_checkpoint(adapter)
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin"):
        open_checkpoint(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="found none"):
        open_checkpoint(adapter)


@pytest.mark.parametrize("fault", ["other shape", "half", "unknown module", "unknown tensor", "embedding", "nothing"])
def test_tensors_that_fit_nothing(base: Path, tmp_path: Path, fault: str) -> None:
    good = _sides(base, QUERY)
    tensors = {
        "other shape": {f"{QUERY}.lora_A.weight": torch.zeros(RANK, 5), f"{QUERY}.lora_B.weight": torch.zeros(5, RANK)},
        "half": {f"{QUERY}.lora_A.weight": good[f"{QUERY}.lora_A.weight"]},
        "unknown module": {f"action_head.other.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"},
        "unknown tensor": {**good, f"{QUERY}.lora_magnitude_vector": torch.zeros(3)},
        "embedding": {**good, "action_head.future_tokens.lora_embedding_A": torch.zeros(4, 4)},
        "nothing": {},
    }[fault]
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_network(_adapter(tmp_path, base, tensors))
