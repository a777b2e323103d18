"""ACT's resize step: the same pixels in training and at inference, through a policy that lerobot itself saves and loads."""

from __future__ import annotations

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
from training.act_resize import ActResize, insert_resize, save_with_resize

ROOT = Path(__file__).parent.parent
HEIGHT, WIDTH = 48, 64
FRONT = "observation.images.front"
FEATURES = {"observation.state": PolicyFeature(FeatureType.STATE, (6,)), FRONT: PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH))}


def small_act() -> tuple[Any, Any, Any]:
    """A real ACT with its pipelines; statistics as a data set would have them."""
    sizes = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1}
    sizes |= {"chunk_size": 4, "n_action_steps": 4}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
    config = ACTConfig(input_features=FEATURES, output_features=outputs, pretrained_backbone_weights=None, device="cpu", **sizes)
    shapes = {"observation.state": (6,), "action": (6,), FRONT: (3, 1, 1)}
    statistics = {key: {"mean": torch.full(shape, 0.4), "std": torch.full(shape, 0.3)} for key, shape in shapes.items()}
    return ACTPolicy(config), *make_pre_post_processors(config, dataset_stats=statistics)


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
    taken = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
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
    assert torch.isfinite(policy.forward(batch)[0])


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


def test_only_pictures_are_resized_whatever_their_axes_layout_and_dtype() -> None:
    step, pictures = ActResize(20, 30), torch.rand(2, 3, HEIGHT, WIDTH, 3).permute(0, 1, 4, 2, 3)  # (B, T, C, H, W) as a camera lays it out
    others = {
        f"{FRONT}_is_pad": torch.ones(2, 5, dtype=torch.bool),
        f"{FRONT}_padding_mask": torch.ones(2, dtype=torch.bool),
        "observation.state": torch.rand(2, 6),
        "observation.image_sharpness": torch.rand(2, 1),
        "task": "reach",
    }
    got = step.observation({**others, FRONT: pictures, "observation.image": pictures[:, 0].contiguous().to(torch.bfloat16)})
    assert all(got[key] is value for key, value in others.items())
    assert got[FRONT].shape == (2, 3, 3, 20, 30)
    assert torch.equal(got[FRONT][1, 2], step.observation({FRONT: pictures[1:, 2].contiguous()})[FRONT][0])
    assert got["observation.image"].dtype == torch.bfloat16
    torch.testing.assert_close(got["observation.image"].float(), got[FRONT][:, 0], atol=0.01, rtol=0)
    told = step.transform_features({PipelineFeatureType.OBSERVATION: dict(FEATURES)})[PipelineFeatureType.OBSERVATION]
    assert (told[FRONT].shape, told["observation.state"].shape) == ((3, 20, 30), (6,))


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (torch.rand(3, HEIGHT, WIDTH), r"\(3, 48, 64\).*to_batch_processor"),
        (torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8), "torch.uint8.*255"),
        (torch.rand(1, HEIGHT, WIDTH, 3), "channels before height and width"),
        (np.zeros((1, 3, HEIGHT, WIDTH)), "ndarray"),
    ],
)
def test_other_pictures_are_refused(picture: Any, told: str) -> None:
    with pytest.raises(ObservationError, match=rf"{FRONT}.*{told}"):
        ActResize(20, 30).observation({FRONT: picture})


def test_the_step_goes_before_the_normaliser_once_and_leaves_no_state_file_of_an_earlier_save(tmp_path: Path) -> None:
    policy, preprocessor, postprocessor = small_act()
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(tmp_path)  # the normaliser is step 3 here
    (tmp_path / "policy_preprocessor_notes.safetensors").write_bytes(b"not lerobot's")
    for _ in range(2):
        save_with_resize(tmp_path, policy, preprocessor, postprocessor, ActResize(24, 32))
    kinds = [type(step) for step in preprocessor.steps]
    assert (kinds.count(ActResize), kinds.index(ActResize)) == (1, kinds.index(NormalizerProcessorStep) - 1)
    pipelines = [json.loads((tmp_path / f"policy_{name}.json").read_text()) for name in ("preprocessor", "postprocessor")]
    named = {step["state_file"] for pipeline in pipelines for step in pipeline["steps"] if "state_file" in step}
    assert {file.name for file in tmp_path.glob("*_step_*.safetensors")} == named
    assert (tmp_path / "policy_preprocessor_notes.safetensors").exists()
    _, other, _ = small_act()
    other.steps = [ImageCropResizeProcessorStep(resize_size=(24, 32)), *other.steps]
    for pipeline, told in ((preprocessor, r"ActResize\(height=24, width=32"), (postprocessor, "normalizer_processor"), (other, "image_crop_resize")):
        with pytest.raises(ConfigError, match=told):
            insert_resize(pipeline, ActResize(24, 40))


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
    for dataset, size, out, code, told in (
        ("none", "32x24", "act", 1, "no LeRobotDataset"),
        ("none", "32x24", ".", 1, "there already"),
        *(("none", size, "act", 2, "WIDTHxHEIGHT") for size in ("320", "0x240", "320x240x3", "a x b")),
    ):
        assert act_resize.main([f"--dataset={tmp_path / dataset}", f"--resolution={size}", f"--out={tmp_path / out}"]) == code
        assert told in capsys.readouterr().err
    for values in ({"height": 0, "width": 8}, {"height": 8, "width": 8.0}, {"height": True, "width": 8}):
        with pytest.raises(ConfigError, match="whole number of pixels"):
            ActResize(**values)
