"""The small files of a checkpoint: configuration, metadata, and where the directory comes from. Every mistake gives one error that names it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_networks import edit_json, load_network, observation

from gr00t_fast import load_policy
from gr00t_fast.base.errors import CheckpointError, ConfigError
from gr00t_fast.checkpoint import open_checkpoint, read_policy_metadata
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.serving.wire import metadata_to_message


@pytest.fixture
def checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


# --- configuration -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("model_type", "gr00t_n1_6", r"'gr00t_n1_6', expected 'gr00t_n1_5'.*N1.6"),
        ("model_type", ..., "model_type None"),
        ("action_head_cfg", ..., "no 'action_head_cfg' section"),
        ("action_head_cfg.diffusion_model_cfg.norm_type", "layer_norm", "norm_type is 'layer_norm'; .* 'ada_norm' only"),
        ("action_head_cfg.add_pos_embed", False, "add_pos_embed is False"),
        ("action_head_cfg.diffusion_model_cfg.interleave_self_attention", False, "interleave_self_attention is False"),
        # an absent key means the default of the reference's class
        ("action_head_cfg.diffusion_model_cfg.interleave_self_attention", ..., "interleave_self_attention is not given, which means False"),
        ("action_head_cfg.diffusion_model_cfg.positional_embeddings", ..., "diffusion_model_cfg: positional_embeddings .*'sinusoidal'"),
        ("backbone_cfg.project_to_dim", ..., "project_to_dim .*1536"),
        # said in two places
        ("action_dim", 16, "action_dim is 16, expected 32"),
        ("backbone_cfg.select_layer", 99, "select_layer .* between 1 and 1, got 99"),
        ("action_head_cfg.action_horizon", 0, "'action_horizon' must be a whole number from 1 to .*, got 0"),
        ("action_head_cfg.num_inference_timesteps", ..., "'num_inference_timesteps' must be a whole number from 1"),
        ("action_head_cfg.max_seq_len", 8, "max_seq_len is at least action_horizon"),
        ("action_head_cfg.num_timestep_buckets", 3, "num_timestep_buckets is at least num_inference_timesteps"),
        ("action_head_cfg.use_vlln", 1, "'use_vlln' must be true or false, got 1"),
        ("action_head_cfg.max_action_dim", 16, "max_action_dim is 16, expected 32"),
        ("action_head_cfg.vl_self_attention_cfg.num_attention_heads", 3, "vl_self_attention_cfg .*24, expected 32"),
    ],
)
def test_a_configuration_that_cannot_be_run(checkpoint: Path, key: str, value: object, pattern: str) -> None:
    edit_json(checkpoint / "config.json", key, value)
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(checkpoint)


def test_keys_that_nothing_reads_are_named_in_a_warning(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("use_vln", "a_setting_of_next_year"):
        edit_json(checkpoint / "config.json", f"action_head_cfg.{key}", True)
    assert load_network(checkpoint)
    (warning,) = caplog.messages
    for named in ("config.json action_head_cfg", "'use_vln' Did you mean 'use_vlln'", "'a_setting_of_next_year'"):
        assert named in warning


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("use_pixel_shuffle", True, "use_pixel_shuffle is True"),
        ("use_pixel_shuffle", ..., "use_pixel_shuffle is not given, which means True"),
        ("select_layer", ..., "select_layer is not given, which means -4"),
        ("text_config.model_type", "qwen2", "text_config: model_type is 'qwen2'; .* 'qwen3' only"),
        ("text_config.rope_scaling", {"type": "yarn"}, "rope_scaling"),
        ("text_config", "qwen3", "no 'text_config' section"),
        ("text_config.num_key_value_heads", 3, "multiple of num_key_value_heads"),
        ("text_config.rms_norm_eps", float("nan"), "NaN is no number"),
        ("image_token_index", 200_000, "image token's id is below vocab_size"),
    ],
)
def test_an_eagle_configuration_that_cannot_be_run(checkpoint: Path, key: str, value: object, pattern: str) -> None:
    edit_json(checkpoint / "eagle2_hg_model" / "config.json", key, value)
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(checkpoint)


# --- metadata ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "experiment_cfg/metadata.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xff", b"[" * 100_000])
def test_small_files_absent_or_damaged(checkpoint: Path, file: str, content: bytes | None) -> None:
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} (is missing|cannot be read|must hold)"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("tag", "pattern"),
    [
        ("new_embodyment", "unknown embodiment_tag 'new_embodyment'. Did you mean 'new_embodiment'.*has: --embodiment_tag=new_embodiment."),
        ("", "unknown embodiment_tag ''"),
        ("gr1", "no statistics for embodiment_tag 'gr1'. This checkpoint has: --embodiment_tag=new_embodiment"),
    ],
)
def test_an_embodiment_that_is_not_there(checkpoint: Path, tag: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        open_checkpoint(checkpoint).embodiment(tag)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("statistics", ...),
        ("statistics.state.gripper.min", ...),
        ("statistics.action.gripper.max", [1.0, 2.0]),
        ("statistics.state.single_arm.mean", [[1.0] * 5]),
        ("statistics.state.gripper.min", "low"),
        ("modalities.video", ...),
        ("modalities.video.webcam.resolution", [640.5, 480]),
        ("modalities.video.webcam.resolution", [31, 480]),
        ("modalities.video.webcam.resolution", [20_000, 20_000]),
        ("modalities.video.webcam.fps", 10**400),
        ("statistics.state.gripper.min", [10**400]),
        ("modalities.video.webcam.fps", -30),
        ("statistics.state.gripper.q99", [float("nan")]),
        ("statistics.state.gripper.max", [50.0]),  # below q99
        ("statistics.state.gripper.min", [40.0]),  # above q01
        ("statistics.state.gripper.std", [-1.0]),
    ],
)
def test_damaged_metadata(checkpoint: Path, key: str, value: object) -> None:
    edit_json(checkpoint / "experiment_cfg" / "metadata.json", f"new_embodiment.{key}", value)
    with pytest.raises(CheckpointError, match=r"metadata\.json.*'new_embodiment'"):
        open_checkpoint(checkpoint).embodiment("new_embodiment")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("action.single_arm.absolute", False, "action.single_arm, absolute is False"),
        ("action.gripper.rotation_type", "quaternion", "action.gripper, rotation_type is 'quaternion'"),
        ("state.gripper.shape", [2], r"state.gripper, shape is \[2\], but its statistics have 1"),
    ],
)
def test_parts_that_are_no_joint_positions_or_contradict_their_statistics_are_refused(checkpoint: Path, key: str, value: object, says: str) -> None:
    edit_json(checkpoint / "experiment_cfg" / "metadata.json", f"new_embodiment.modalities.{key}", value)
    with pytest.raises(CheckpointError, match=says):
        load_policy(checkpoint, device="cpu")


def test_a_deviation_that_is_nan_is_refused_where_it_is_used(checkpoint: Path) -> None:
    """NVIDIA's merging of data sets writes NaN for a joint that never moves."""
    edit_json(checkpoint / "experiment_cfg" / "metadata.json", "new_embodiment.statistics.state.gripper.std", [float("nan")])
    actions = load_policy(checkpoint, device="cpu").get_action(observation())
    assert all(np.isfinite(values).all() for values in actions.values())
    with pytest.raises(CheckpointError, match="state.gripper .* std holds NaN"):
        load_policy(checkpoint, device="cpu", data_config=replace(DATA_CONFIGS["so100"], normalisation={"state.gripper": "mean_std"}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_none(checkpoint: Path, number: str) -> None:
    for file in ("config.json", "eagle2_hg_model/config.json", *(["experiment_cfg/metadata.json"] if number != "NaN" else [])):
        text = (checkpoint / file).read_text()
        (checkpoint / file).write_text(f'{{"extra": {number}, {text.lstrip()[1:]}')
        with pytest.raises(CheckpointError, match=f"{file}.*{number}"):
            open_checkpoint(checkpoint)
        (checkpoint / file).write_text(text)


@pytest.mark.parametrize("file", ["config.json", "eagle2_hg_model/config.json", "experiment_cfg/metadata.json", "eagle2_hg_model/tokenizer.json"])
def test_a_directory_in_the_place_of_a_file(checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=str(path.parent)):
        load_policy(checkpoint, device="cpu")


def test_statistics_of_no_values(checkpoint: Path) -> None:
    """Also where all of them agree: a part without values would leave the arm's joints to the other parts."""
    for names in (("min",), ("min", "max", "mean", "std", "q01", "q99")):
        for name in names:
            edit_json(checkpoint / "experiment_cfg" / "metadata.json", f"new_embodiment.statistics.state.gripper.{name}", [])
        with pytest.raises(CheckpointError, match="statistics of no values"):
            open_checkpoint(checkpoint).embodiment("new_embodiment")


def test_facts_need_no_weights(checkpoint: Path) -> None:
    expected = metadata_to_message(read_policy_metadata(checkpoint, "new_embodiment", "so100"))
    for file in checkpoint.glob("model*"):
        file.unlink()
    assert metadata_to_message(read_policy_metadata(checkpoint, "new_embodiment", "so100")) == expected
    assert expected["state_widths"] == {"single_arm": 5, "gripper": 1}
    assert expected["resolutions"] == {"webcam": [64, 48]}
    with pytest.raises(ConfigError, match="reads video.front, video.wrist"):
        read_policy_metadata(checkpoint, "new_embodiment", "so100_dualcam")
    edit_json(checkpoint / "experiment_cfg" / "metadata.json", "new_embodiment.statistics.state.gripper", ...)
    with pytest.raises(ConfigError, match=r"state\.gripper.*statistics"):
        read_policy_metadata(checkpoint, "new_embodiment", "so100")
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        open_checkpoint(checkpoint)


# --- where it comes from -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(checkpoint: Path, file: str) -> None:
    (checkpoint / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967\n")
    with pytest.raises(CheckpointError, match=rf"{file} .*git lfs pull"):
        load_network(checkpoint)


def test_the_directory_above_a_checkpoint_names_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    checkpoint.rename(tmp_path / "run" / "checkpoint-1000")
    with pytest.raises(CheckpointError, match=r"N1\.7.*Did you mean .*run/checkpoint-1000\?"):
        open_checkpoint(tmp_path / "run")


def test_paths_that_are_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"file.*directory.*config\.json"):
        open_checkpoint(checkpoint / "config.json")
    for path in (tmp_path / "nowhere", "./some/where", "a/b/c", "nowhere", ""):
        with pytest.raises(CheckpointError, match=r"does not exist|is missing"):
            open_checkpoint(path)


def test_a_mistyped_path_asks_no_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the directory before the slash is here; with a revision it is the hub's all the same."""
    import huggingface_hub

    shutil.copytree(checkpoint, tmp_path / "outputs" / "checkpoint-demo")
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: object) -> str:
        asked.append(repo_id)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for path in ("outputs/checkpoint-dem", "outputs/checkpoint-dem/", tmp_path / "outputs/checkpoint-dem"):
        with pytest.raises(CheckpointError, match=r"'\S*outputs/checkpoint-demo'"):
            open_checkpoint(path)
    assert not asked
    open_checkpoint("outputs/checkpoint-dem", revision="main")
    open_checkpoint("someone/checkpoint-dem")
    assert asked == ["outputs/checkpoint-dem", "someone/checkpoint-dem"]


def test_a_hub_id_is_downloaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("someone/so100-finetune").config == open_checkpoint(checkpoint).config
    (repo, patterns), *_ = asked
    assert repo == "someone/so100-finetune"
    for file in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "experiment_cfg/metadata.json"):
        assert any(Path(file).match(pattern) for pattern in patterns), file
    assert not any(Path(file).match(pattern) for pattern in patterns for file in ("optimizer.pt", "training_args.bin", "global_step1/x.pt"))
    open_checkpoint("someone/so100-finetune", with_weights=False)
    assert set(patterns) - set(asked[-1][1]) == {"model*.safetensors*", "adapter_model.safetensors"}


def test_a_hub_id_without_a_commit_is_warned_of_and_can_be_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    commit = "c0ffee" + 34 * "0"
    snapshot = Path(shutil.copytree(checkpoint, tmp_path / "snapshots" / commit))
    asked: list[str | None] = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for revision in (None, "main"):
        open_checkpoint("someone/so100-finetune", revision=revision)
        assert f"--revision={commit}" in caplog.text
        caplog.clear()
    load_policy("someone/so100-finetune", device="cpu", revision=commit)
    read_policy_metadata("someone/so100-finetune", "new_embodiment", "so100", revision=commit)
    assert asked == [None, "main", commit, commit]
    assert not caplog.records
    with pytest.raises(ConfigError, match="local directory"):
        open_checkpoint(checkpoint, revision=commit)


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("repository not found")])
def test_a_hub_that_does_not_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"'a/b'.*{error}"):
        open_checkpoint("a/b")
