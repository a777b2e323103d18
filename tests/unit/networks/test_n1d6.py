"""What GR00T N1.6's files may say: computed as NVIDIA's code does, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import edit_json, observation

from gr00t_fast import load_policy
from gr00t_fast.base.errors import CheckpointError, ConfigError, ObservationError
from gr00t_fast.cli.run import main
from gr00t_fast.networks import n1d6
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.virtual import random_checkpoint as rc

PROCESSOR, KWARGS, MODALITIES = "processor_config.json", "processor_kwargs", "processor_kwargs.modality_configs.new_embodiment"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rc.write_random_checkpoint(tmp_path_factory.mktemp("pristine"), "tiny", "so100_dualcam", network="n1.6", dtype=torch.float32)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def load(checkpoint: Path, **options: Any) -> Gr00tPolicy:
    return load_policy(checkpoint, device="cpu", precision="fp32", engine="eager", seed=0, **options)


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        (PROCESSOR, "processor_class", "Gr00tN1d7Processor", r"'Gr00tN1d7Processor', expected Gr00tN1d6Processor.*'Gr00tN1d6'"),
        ("config.json", "model_type", "Gr00tN1d7", "backbone_config.json"),
        (PROCESSOR, f"{KWARGS}.model_type", "qwen", "model_type is 'qwen'.*'eagle'"),
        (PROCESSOR, f"{KWARGS}.max_state_dim", ..., "max_state_dim is 29, expected 128"),
        (PROCESSOR, f"{KWARGS}.exclude_state", True, "exclude_state is True"),
        (PROCESSOR, f"{KWARGS}.use_relative_action", False, "use_relative_action is False in processor_config.json and True in config.json"),
        (PROCESSOR, f"{MODALITIES}.state.delta_indices", [-1, 0], "2 time steps; the network takes 1.*a token of each time"),
        ("config.json", "max_state_dim", ..., "max_state_dim is 128, expected 29"),
        ("config.json", "add_pos_embed", False, "add_pos_embed is False"),
        ("backbone_config.json", "vision_config.use_rope", True, "use_rope is True"),
        ("backbone_config.json", "vision_config.num_patches", 35, "the square of a whole number"),
        ("backbone_config.json", "vision_config.patch_size", 16, "patch_size is 14"),
    ],
)
def test_files_that_do_not_go_together_are_refused_by_name(checkpoint: Path, file: str, key: str, value: Any, says: str) -> None:
    edit_json(checkpoint / file, key, value)
    with pytest.raises(CheckpointError, match=says):
        load(checkpoint)


def test_absent_sizes_are_those_of_nvidias_class(checkpoint: Path) -> None:
    """29 values and 16 actions; and the padded width of the processor's file is 29 where that does not say it."""
    for file, keys in (("config.json", ("max_state_dim", "max_action_dim", "action_horizon")), (PROCESSOR, ("max_state_dim", "max_action_dim"))):
        for key in keys:
            edit_json(checkpoint / file, key if file == "config.json" else f"{KWARGS}.{key}", ...)
    sizes = [json.loads((checkpoint / file).read_text()) for file in ("config.json", "backbone_config.json")]
    rc.write_weights(checkpoint, n1d6.read_config(*sizes), 0, torch.float32, 10**9)
    policy = load(checkpoint)
    assert policy.chunk_shape == (16, 29)
    assert policy.get_action(observation("so100_dualcam"))["action.single_arm"].shape == (16, 5)
    edit_json(checkpoint / PROCESSOR, f"{KWARGS}.shortest_image_edge", ...)
    assert load(checkpoint).processor.embodiment.images.edge == 512


def test_what_the_files_leave_to_nvidias_code(checkpoint: Path) -> None:
    """Keys of N1.7 are not read; a tag has the row of NVIDIA's table; the outer folder of a fine-tune has its files in processor/."""
    before = load(checkpoint).get_action(observation("so100_dualcam"))
    for key, value in (("state_history_length", 3), ("vl_self_attention_cfg", {"num_layers": 4})):
        edit_json(checkpoint / "config.json", key, value)
    (checkpoint / "processor").mkdir()
    for name in n1d6.PROCESSOR_FILES:
        (checkpoint / name).rename(checkpoint / "processor" / name)
    (checkpoint / "processor" / "embodiment_id.json").unlink()
    after = load(checkpoint).get_action(observation("so100_dualcam"))
    assert all(np.array_equal(after[key], before[key]) for key in before)
    with pytest.raises(ConfigError, match="has: --embodiment_tag=new_embodiment"):
        load(checkpoint, embodiment_tag="gr1")
    edit_json(checkpoint / "processor" / "statistics.json", "new_embodiment", ...)
    with pytest.raises(ConfigError, match="no statistics for embodiment_tag 'new_embodiment'"):
        load(checkpoint)


def test_pictures_by_torchvision_are_padded_unless_a_flag_says_otherwise(checkpoint: Path) -> None:
    """They were in all of NVIDIA's code that knows no flag."""
    for key, value in (("use_albumentations", False), ("image_target_size", [224, 224]), ("image_crop_size", [216, 216])):
        edit_json(checkpoint / PROCESSOR, f"{KWARGS}.{key}", value)
    policy = load(checkpoint)
    assert (policy.metadata.letterbox.pads, policy.metadata.letterbox.known) == (True, True)
    assert policy.preprocess(observation("so100_dualcam")).frames[0].shape == (1, 224, 224, 3)
    edit_json(checkpoint / PROCESSOR, f"{KWARGS}.letter_box_transform", False)
    assert not load(checkpoint).metadata.letterbox.pads


def test_a_run_says_that_nothing_tells_of_padding(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    cameras = "{front: {type: sim, width: 64, height: 48}, wrist: {type: sim, width: 64, height: 48}}"
    argv = ["--robot.type=so100_sim", f"--robot.cameras={cameras}", f"--model_path={pristine}", "--lang_instruction=pick", "--device=cpu"]
    for flags, warns in (((), True), (("--letterbox=never",), False)):
        assert main([*argv, "--timeout=0.3", *flags]) == 0
        said = "".join(capsys.readouterr())
        assert ("has no letter_box_transform" in said and "WARNING: camera 'front' is 64x48" in said) == warns


def test_observations_that_nvidias_code_cannot_take_are_refused(checkpoint: Path) -> None:
    seen = observation("so100_dualcam")
    wide, placed = seen | {"video.front": np.zeros((1, 180, 320, 3), np.uint8)}, seen | {"annotation.human.task_description": "see <image-1>"}
    with pytest.raises(ObservationError, match=r"views of one size.*--letterbox=always"):
        load(checkpoint).get_action(wide)
    load(checkpoint, letterbox="always").get_action(wide)
    load(checkpoint).get_action(placed)  # formalised, which leaves no brackets
    for file, key in ((PROCESSOR, f"{KWARGS}.formalize_language"), ("config.json", "formalize_language")):
        edit_json(checkpoint / file, key, False)
    with pytest.raises(ObservationError, match="contains '<image-1>'"):
        load(checkpoint).get_action(placed)
