"""Random checkpoints: the published format, loadable at once, the same for the same seed, and the published sizes where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.lib import random_checkpoint
from benchmarks.lib.random_checkpoint import _write_tokenizer, checkpoint_in, main, network_config, write_random_checkpoint
from gr00t_fast import load_policy
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import Gr00t
from gr00t_fast.networks import n1d5
from gr00t_fast.networks.n1d5 import IMAGE_TOKEN, PUBLISHED_EAGLE

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


def test_shards_hold_the_same_and_stale_ones_go(tiny: Path, tmp_path: Path) -> None:
    many = write_random_checkpoint(tmp_path, size="tiny", max_shard_bytes=50_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(many.glob("model-*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.name.endswith(f"-of-{len(files):05d}.safetensors") for file in files)
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    single = load_file(tiny / WEIGHTS)
    assert joined.keys() == single.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], single[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in joined.values())
    write_random_checkpoint(many, size="tiny")
    assert sorted(file.name for file in many.glob("model*")) == [WEIGHTS]
    open_checkpoint(many)


def test_one_that_was_interrupted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "_random_tensor", interrupted)
    assert main([f"--out={tmp_path / 'new'}", "--size=tiny"]) == 130
    assert not (tmp_path / "new" / "config.json").exists()
    monkeypatch.undo()
    half = checkpoint_in(tmp_path, "checkpoint", "tiny")
    (half / WEIGHTS).unlink()
    assert (checkpoint_in(tmp_path, "checkpoint", "tiny") / WEIGHTS).exists()


def test_one_per_size_data_config_and_seed(tmp_path: Path) -> None:
    first = checkpoint_in(tmp_path, "checkpoint", "tiny")
    written_ns = (first / WEIGHTS).stat().st_mtime_ns
    other = checkpoint_in(tmp_path, "checkpoint", "tiny", "so100_dualcam", seed=1)
    assert (first.name, other.name) == ("checkpoint-tiny", "checkpoint-tiny-so100_dualcam-seed1")
    assert set(open_checkpoint(other).embodiment("new_embodiment", "so100_dualcam").cameras) == {"video.front", "video.wrist"}
    assert checkpoint_in(tmp_path, "checkpoint", "tiny") == first
    assert (first / WEIGHTS).stat().st_mtime_ns == written_ns


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


def test_the_published_tokenizer(tmp_path: Path, eagle_dir: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path, size="tiny", published_tokenizer=True)
    assert open_checkpoint(checkpoint).config.language.image_token_id == 151669
    policy = load_policy(checkpoint, device="cpu", precision="bf16", processor_path=eagle_dir)
    assert len(policy.processor.prompts("Place the block in the bowl", 256)) == 288


def test_the_full_size_reads_any_instruction_without_other_files(tmp_path: Path) -> None:
    """Its vocabulary is the published one; bytes and the image token are all that its tokenizer uses of it."""
    _write_tokenizer(tmp_path / "tokenizer.json", PUBLISHED_EAGLE["image_token_index"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(f"<img>{IMAGE_TOKEN}</img>ä", add_special_tokens=False).ids
    assert ids[1] == PUBLISHED_EAGLE["image_token_index"]
    assert len(ids) == 5
    assert max(ids[:1] + ids[2:]) < 300


@pytest.mark.parametrize(("wrong", "named"), [({"size": "huge"}, "tiny, demo, full"), ({"data_config": "so101"}, "so100")])
def test_unknown_names(tmp_path: Path, wrong: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        write_random_checkpoint(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seed decides the weights; what is no part of a checkpoint stays."""
    out, words = tmp_path / "made", [f"--out={tmp_path / 'made'}", "--size=tiny"]
    assert main([*words, "--seed=3", "--resolution=64x48"]) == 0
    assert "RANDOM weights" in capsys.readouterr().out
    before = (out / WEIGHTS).read_bytes()
    (out / "exports").mkdir()
    (out / "exports" / "note").write_text("mine")
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--seed=3", "--overwrite"]) == 0
    assert (out / WEIGHTS).read_bytes() == before
    assert main([*words, "--overwrite"]) == 0
    assert (out / WEIGHTS).read_bytes() != before
    assert (out / "exports" / "note").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "eagle2_hg_model", "experiment_cfg", "exports", WEIGHTS]
    assert main([f"--out={out / 'config.json'}", "--size=tiny"]) == 2
    assert "is a file" in capsys.readouterr().err
