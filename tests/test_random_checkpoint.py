"""Random checkpoints: the published format, loadable at once, the same for the same seed, and the published sizes where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.lib import random_checkpoint
from benchmarks.lib.random_checkpoint import PUBLISHED_CONFIG, _write_tokenizer, checkpoint_in, main, network_config, write_random_checkpoint
from gr00t_fast import load_policy
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import Gr00t
from gr00t_fast.networks import n1d5
from gr00t_fast.networks.n1d5 import IMAGE_TOKEN, PUBLISHED_EAGLE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), size="tiny", data_config="so100_dualcam", resolution=(320, 240))


def test_it_loads_and_acts(tiny: Path) -> None:
    policy = load_policy(tiny, data_config="so100_dualcam", device="cpu", precision="fp32", seed=0)
    assert policy.metadata.resolutions == {"front": (320, 240), "wrist": (320, 240)}
    actions = policy.get_action(policy.example_observation("pick: the cube"))
    assert actions["action.single_arm"].shape == (16, 5)
    assert abs(actions["action.single_arm"]).max() < 1000  # activations stay of order one


def test_a_seed_decides_the_weights(tiny: Path, tmp_path: Path) -> None:
    same = write_random_checkpoint(tmp_path / "same", size="tiny", data_config="so100_dualcam", resolution=(320, 240))
    other = write_random_checkpoint(tmp_path / "other", size="tiny", seed=1)
    assert (same / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_no_weight_is_zero_or_wild(tiny: Path) -> None:
    for name, tensor in load_file(tiny / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
        assert 0 < tensor.float().abs().mean() < 2, name


def test_shards_hold_the_same_and_stale_ones_go(tiny: Path, tmp_path: Path) -> None:
    many = write_random_checkpoint(tmp_path, size="tiny", max_shard_bytes=50_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(many.glob("model-*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.name.endswith(f"-of-{len(files):05d}.safetensors") for file in files)
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    single = load_file(tiny / "model.safetensors")
    assert joined.keys() == single.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], single[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in joined.values())
    write_random_checkpoint(many, size="tiny")
    assert sorted(file.name for file in many.glob("model*")) == ["model.safetensors"]
    open_checkpoint(many)


def test_one_that_was_interrupted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(random_checkpoint, "_random_tensor", interrupted)
    for name in ("new", "there"):
        with pytest.raises(KeyboardInterrupt):
            write_random_checkpoint(tmp_path / name, size="tiny")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    assert main([f"--out={tmp_path / 'new'}", "--size=tiny"]) == 130
    monkeypatch.undo()
    half = checkpoint_in(tmp_path, "checkpoint", "tiny")
    (half / "model.safetensors").unlink()  # as older versions left it: config.json is there
    assert (checkpoint_in(tmp_path, "checkpoint", "tiny") / "model.safetensors").exists()


def test_one_per_size_data_config_and_seed(tmp_path: Path) -> None:
    first = checkpoint_in(tmp_path, "checkpoint", "tiny")
    written_ns = (first / "model.safetensors").stat().st_mtime_ns
    other = checkpoint_in(tmp_path, "checkpoint", "tiny", "so100_dualcam", seed=1)
    assert (first.name, other.name) == ("checkpoint-tiny", "checkpoint-tiny-so100_dualcam-seed1")
    assert set(open_checkpoint(other).embodiment("new_embodiment", "so100_dualcam").cameras) == {"video.front", "video.wrist"}
    assert checkpoint_in(tmp_path, "checkpoint", "tiny") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written_ns


def test_what_is_no_part_of_a_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "note").write_text("mine")
    write_random_checkpoint(tmp_path, size="tiny")
    assert (tmp_path / "exports" / "note").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "eagle2_hg_model", "experiment_cfg", "exports", "model.safetensors"]
    with pytest.raises(ConfigError, match="is a file; expected a directory"):
        write_random_checkpoint(tmp_path / "config.json", size="tiny")


def test_the_published_sizes() -> None:
    """Millions of parameters of each part, as published; built on the meta device."""
    config, eagle = network_config("full", published_vocabulary=True)
    assert config == PUBLISHED_CONFIG
    with torch.device("meta"):
        model = Gr00t(n1d5.read_config(config, eagle))

    def millions(*prefixes: str) -> float:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes)) / 1e6

    assert millions("vision.connector") == pytest.approx(2.4, abs=0.1)
    assert millions("vision.") == pytest.approx(413 + 2.4, abs=1)
    assert millions("language.blocks", "language.norm") == pytest.approx(604, abs=1)
    assert millions("language.embedding") == pytest.approx(311, abs=1)
    assert millions("head.vl") == pytest.approx(201, abs=1)
    assert millions("head.dit") == pytest.approx(550, abs=4)


def test_the_configuration_is_a_copy() -> None:
    config, eagle = network_config("tiny", published_vocabulary=False)
    config["action_head_cfg"]["action_dim"] = eagle["text_config"]["hidden_size"] = -1
    assert PUBLISHED_CONFIG["action_head_cfg"]["action_dim"] == 32
    assert PUBLISHED_EAGLE["text_config"]["hidden_size"] == 2048


def test_the_published_tokenizer(tmp_path: Path, eagle_dir: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path, size="tiny", published_tokenizer=True)
    assert not (checkpoint / "eagle2_hg_model" / "tokenizer.json").exists()
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


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"data_config": "so101"}])
def test_unknown_names(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="size must be one of tiny, demo, full and data_config one of so100"):
        write_random_checkpoint(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert main([f"--out={out}", "--size=tiny", "--seed=3", "--resolution=64x48"]) == 0
    assert "RANDOM weights. Its actions mean nothing" in capsys.readouterr().out
    checkpoint = open_checkpoint(out)
    assert load_model(checkpoint, "new_embodiment", torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
    before = (out / "model.safetensors").read_bytes()
    assert main([f"--out={out}", "--size=tiny"]) == 2
    assert "exists and is not empty. Choose another --out, or say --overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert main([f"--out={out}", "--size=tiny", "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != before
