"""ACT's resize step: the same pixels in training and at inference, through a policy that lerobot itself saves and loads."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lerobot")
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import ImageCropResizeProcessorStep, NormalizerProcessorStep

from gr00t_fast.errors import ConfigError, ObservationError
from training import act_resize
from training.act_resize import ActResize, insert_resize, is_picture, save_with_resize
from training.picture_size import parse_size, size_text

ROOT = Path(__file__).parent.parent
HEIGHT, WIDTH = 48, 64
FRONT = "observation.images.front"


def small_act() -> tuple[Any, Any, Any]:
    """A real ACT with its pipelines; statistics as a data set would have them."""
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (6,)), FRONT: PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
    sizes = {
        "dim_model": 32,
        "n_heads": 2,
        "dim_feedforward": 32,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
        "chunk_size": 4,
        "n_action_steps": 4,
    }
    config = ACTConfig(input_features=inputs, output_features=outputs, pretrained_backbone_weights=None, device="cpu", **sizes)
    shapes = {"observation.state": (6,), "action": (6,), FRONT: (3, 1, 1)}
    statistics = {key: {"mean": torch.full(shape, 0.4), "std": torch.full(shape, 0.3)} for key, shape in shapes.items()}
    return ACTPolicy(config), *make_pre_post_processors(config, dataset_stats=statistics)


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def as_the_loader_gives(pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """A training batch: floats in 0..1, channels first, and the flags of delta_timestamps."""
    count = len(pictures)
    pixels = torch.stack([torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures])
    flags = {f"{FRONT}_is_pad": torch.zeros(count, 1, dtype=torch.bool), "action_is_pad": torch.zeros(count, 4, dtype=torch.bool)}
    return {FRONT: pixels, "observation.state": torch.zeros(count, 6), "action": torch.zeros(count, 4, 6), **flags}


@pytest.mark.parametrize("antialias", [True, False])
def test_inference_sees_the_pixels_of_training(antialias: bool, tmp_path: Path) -> None:
    policy, preprocessor, postprocessor = small_act()
    save_with_resize(tmp_path, policy, preprocessor, postprocessor, ActResize(24, 40, antialias))
    taken = frames(3)
    batch = preprocessor(as_the_loader_gives(taken))
    config = PreTrainedConfig.from_pretrained(tmp_path)
    loaded = ACTPolicy.from_pretrained(tmp_path, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(tmp_path))
    for number, frame in enumerate(taken):
        raw = {FRONT: frame.copy(), "observation.state": np.zeros(6, np.float32)}
        seen = before(prepare_observation_for_inference(raw, torch.device("cpu"), "reach"))
        assert seen[FRONT].shape == (1, 3, 24, 40)
        assert torch.equal(seen[FRONT][0], batch[FRONT][number])
    assert torch.isfinite(after(loaded.select_action(seen))).all()
    loss, _ = policy.forward(batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_are_those_of_a_resize_before_the_statistics(antialias: bool) -> None:
    """Against torch, in the order resize, then (x - mean) / std. A pattern of one bright column in four tells the two filters apart."""
    _, preprocessor, _ = small_act()
    insert_resize(preprocessor, ActResize(HEIGHT // 4, WIDTH // 4, antialias))
    pictures = torch.zeros(1, 3, HEIGHT, WIDTH)
    pictures[..., ::4] = 1
    resized = F.interpolate(pictures, (HEIGHT // 4, WIDTH // 4), mode="bilinear", antialias=antialias, align_corners=False)
    seen = preprocessor({FRONT: pictures, "observation.state": torch.zeros(1, 6)})[FRONT]
    torch.testing.assert_close(seen, (resized - 0.4) / (0.3 + 1e-8))
    inner = seen[..., 1:-1] * 0.3 + 0.4
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25 if antialias else 0.0), atol=0.02, rtol=0)


def test_pictures_over_time_are_resized_one_by_one() -> None:
    pictures = torch.rand(2, 3, 3, HEIGHT, WIDTH)  # (B, T, C, H, W)
    step = ActResize(20, 30)
    got = step.observation({FRONT: pictures})[FRONT]
    assert got.shape == (2, 3, 3, 20, 30)
    for item in range(2):
        for moment in range(3):
            assert torch.equal(got[item, moment], step.observation({FRONT: pictures[item : item + 1, moment]})[FRONT][0])


def test_only_pictures_are_touched() -> None:
    others = {
        f"{FRONT}_is_pad": torch.ones(2, 5, dtype=torch.bool),
        f"{FRONT}_padding_mask": torch.ones(2, dtype=torch.bool),
        "observation.state": torch.rand(2, 6),
        "observation.image_sharpness": torch.rand(2, 1),
        "task": "reach",
    }
    got = ActResize(20, 30).observation({**others, "observation.image": torch.rand(2, 3, HEIGHT, WIDTH)})
    assert all(got[key] is value for key, value in others.items())
    assert got["observation.image"].shape == (2, 3, 20, 30)
    assert [is_picture(key) for key in ("observation.images.wrist", "observation.images", "action")] == [True, False, False]


def test_layout_and_dtype_do_not_change_pixels() -> None:
    """Cameras give height, width, channels: permuted, such a tensor has another memory layout than the loader's."""
    step, picture = ActResize(20, 30), torch.rand(1, HEIGHT, WIDTH, 3).permute(0, 3, 1, 2)
    got = step.observation({FRONT: picture})[FRONT]
    assert torch.equal(got, step.observation({FRONT: picture.contiguous()})[FRONT])
    half = step.observation({FRONT: picture.to(torch.bfloat16)})[FRONT]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), got, atol=0.01, rtol=0)
    same = torch.rand(1, 3, 20, 30)
    assert step.observation({FRONT: same})[FRONT] is same


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (torch.rand(3, HEIGHT, WIDTH), r"got shape \(3, 48, 64\).*to_batch_processor"),
        (torch.rand(2, 2, 2, 3, HEIGHT, WIDTH), "got shape"),
        (torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8), "got torch.uint8. Divide frames by 255"),
        (torch.rand(1, HEIGHT, WIDTH, 3), "channels before height and width"),
        (np.zeros((1, 3, HEIGHT, WIDTH)), "got ndarray"),
    ],
)
def test_other_pictures_are_refused(picture: Any, told: str) -> None:
    with pytest.raises(ObservationError, match=told) as caught:
        ActResize(20, 30).observation({FRONT: picture})
    assert FRONT in str(caught.value)


def test_features_tell_the_new_shape() -> None:
    features = {
        PipelineFeatureType.OBSERVATION: {
            FRONT: PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH)),
            "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
        },
        PipelineFeatureType.ACTION: {"action": PolicyFeature(FeatureType.ACTION, (6,))},
    }
    told = ActResize(20, 30).transform_features(features)
    assert told[PipelineFeatureType.OBSERVATION][FRONT] == PolicyFeature(FeatureType.VISUAL, (3, 20, 30))
    assert told[PipelineFeatureType.OBSERVATION]["observation.state"].shape == (6,)
    assert told[PipelineFeatureType.ACTION] == features[PipelineFeatureType.ACTION]
    assert features[PipelineFeatureType.OBSERVATION][FRONT].shape == (3, HEIGHT, WIDTH)


def test_no_state_file_of_an_earlier_save_stays(tmp_path: Path) -> None:
    policy, preprocessor, postprocessor = small_act()
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(tmp_path)  # the normaliser is step 3 here
    (tmp_path / "policy_preprocessor_notes.safetensors").write_bytes(b"not lerobot's")
    old = tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    assert old.exists()
    save_with_resize(tmp_path, policy, preprocessor, postprocessor, ActResize(24, 32))
    named = {
        step["state_file"]
        for pipeline in ("preprocessor", "postprocessor")
        for step in json.loads((tmp_path / f"policy_{pipeline}.json").read_text())["steps"]
        if "state_file" in step
    }
    assert not old.exists()
    assert {file.name for file in tmp_path.glob("*_step_*.safetensors")} == named
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "policy_preprocessor_notes.safetensors").exists()
    save_with_resize(tmp_path, policy, preprocessor, postprocessor, ActResize(24, 32))  # once more: nothing is added
    assert sum(isinstance(step, ActResize) for step in preprocessor.steps) == 1


def test_the_step_goes_before_the_normaliser_and_never_twice() -> None:
    _, preprocessor, postprocessor = small_act()
    insert_resize(preprocessor, ActResize(24, 32))
    kinds = [type(step) for step in preprocessor.steps]
    assert kinds.index(ActResize) == kinds.index(NormalizerProcessorStep) - 1
    with pytest.raises(ConfigError, match=r"resizes already \(ActResize\(height=24, width=32"):
        insert_resize(preprocessor, ActResize(24, 40))
    with pytest.raises(ConfigError, match="normalizer_processor"):
        insert_resize(postprocessor, ActResize(24, 32))
    _, other, _ = small_act()
    other.steps = [ImageCropResizeProcessorStep(resize_size=(24, 32)), *other.steps]
    with pytest.raises(ConfigError, match="image_crop_resize_processor"):
        insert_resize(other, ActResize(24, 32))


@pytest.mark.parametrize("values", [{"height": 0, "width": 8}, {"height": 8, "width": 8.0}, {"height": True, "width": 8}])
def test_sizes_are_whole_pixels(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="whole number of pixels"):
        ActResize(**values)


def test_another_process_needs_the_module_and_nothing_else(tmp_path: Path) -> None:
    policy, preprocessor, postprocessor = small_act()
    save_with_resize(tmp_path, policy, preprocessor, postprocessor, ActResize(24, 32, antialias=False))
    script = f"""
from lerobot.processor import PolicyProcessorPipeline
load = lambda: PolicyProcessorPipeline.from_pretrained({str(tmp_path)!r}, config_filename="policy_preprocessor.json")
try:
    load()
except ImportError as error:
    print("without:", "gr00t_fast_act_resize" in str(error))
import training.act_resize
print([step.get_config() for step in load().steps if type(step).__name__ == "ActResize"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["without: True", "[{'height': 24, 'width': 32, 'antialias': False}]"], done.stderr


def test_the_program_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert act_resize.main([f"--dataset={tmp_path / 'none'}", "--size=32x24", f"--out={tmp_path / 'act'}"]) == 1
    assert "no LeRobotDataset" in capsys.readouterr().err
    assert act_resize.main([f"--dataset={tmp_path}", "--size=32x24", f"--out={tmp_path}"]) == 1
    assert "is there already" in capsys.readouterr().err


def test_sizes_as_flags() -> None:
    assert size_text(parse_size("320x240")) == "320x240"
    for wrong in ("320", "320x", "0x240", "320x240x3", "-1x2", "a x b"):
        with pytest.raises(argparse.ArgumentTypeError, match="WIDTHxHEIGHT"):
            parse_size(wrong)
