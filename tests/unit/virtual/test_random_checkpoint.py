"""Random checkpoints: the published format, loadable at once, the same for the same seed, and the published sizes where that is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.lib.program import checkpoint_in
from gr00t_fast import load_policy
from gr00t_fast.cli.random_checkpoint import main
from gr00t_fast.model import Gr00t
from gr00t_fast.networks import n1d5
from gr00t_fast.networks.n1d5 import IMAGE_TOKEN, PUBLISHED_EAGLE
from gr00t_fast.virtual import random_checkpoint
from gr00t_fast.virtual.random_checkpoint import network_config, write_random_checkpoint, write_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), size="tiny", data_config="so100_dualcam", resolution=(320, 240))


def test_it_loads_and_acts(tiny: Path) -> None:
    policy = load_policy(tiny, data_config="so100_dualcam", device="cpu", precision="fp32", seed=0)
    assert policy.metadata.resolutions == {"front": (320, 240), "wrist": (320, 240)}
    actions = policy.get_action(policy.example_observation("pick: the cube"))
    assert actions["action.single_arm"].shape == (16, 5)
    assert abs(actions["action.single_arm"]).max() < 1000  # activations stay of order one
    for name, tensor in load_file(tiny / WEIGHTS).items():
        assert 0 < tensor.float().abs().mean() < 2, name  # and NaN is not below 2


def test_one_that_was_interrupted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "random_tensor", interrupted)
    assert main([f"--out={tmp_path / 'new'}", "--size=tiny"]) == 130
    assert not (tmp_path / "new" / "config.json").exists()
    monkeypatch.undo()
    half = checkpoint_in(tmp_path, "checkpoint", "tiny")
    (half / WEIGHTS).unlink()
    assert (checkpoint_in(tmp_path, "checkpoint", "tiny") / WEIGHTS).exists()


def test_the_published_sizes() -> None:
    """Millions of parameters of each part, as published; built on the meta device."""
    with torch.device("meta"):
        model = Gr00t(n1d5.read_config(*network_config("full", published_vocabulary=True)))

    def millions(*prefixes: str) -> float:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes)) / 1e6

    assert millions("vision.") == pytest.approx(413 + 2.4, abs=1)
    assert millions("language.blocks", "language.norm") == pytest.approx(604, abs=1)
    assert millions("language.embedding") == pytest.approx(311, abs=1)
    assert millions("head.vl") == pytest.approx(201, abs=1)
    assert millions("head.dit") == pytest.approx(550, abs=4)


def test_the_full_size_reads_any_instruction_without_other_files(tmp_path: Path) -> None:
    """Its vocabulary is the published one; bytes and the image token are all that its tokenizer uses of it."""
    write_tokenizer(tmp_path / "tokenizer.json", PUBLISHED_EAGLE["image_token_index"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(f"<img>{IMAGE_TOKEN}</img>ä", add_special_tokens=False).ids
    assert ids[1] == PUBLISHED_EAGLE["image_token_index"]
    assert len(ids) == 5
    assert max(ids[:1] + ids[2:]) < 300
