"""GR00T N1.6 as exported files: pictures behind the text, so that their places count from the prompt's end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exports import FEW, Made
from test_n1d7_exports import OPTIONS, assert_close, noise_of, observation

from benchmarks.lib.random_checkpoint import write_random_checkpoint
from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.cli import export
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.measurement import saturates_8_bits

OUTPUTS = {"tokens", "backbone_features", "vl_features", "text_keys", "text_values", "image_keys", "image_values", "actions", "actions, 2 at once"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("n1d6")
    checkpoint = write_random_checkpoint(directory / "checkpoint", "tiny", **{**OPTIONS, "network": "n1.6"})
    assert export.onnx([f"--model_path={checkpoint}", f"--out={directory / 'onnx'}", "--camera_size=640x360", "--batch_sizes=2"]) == 0
    return Made(checkpoint, directory / "onnx")


@pytest.fixture(scope="module")
def eager(made: Made) -> Gr00tPolicy:
    return load_policy(made.checkpoint, device="cpu", precision="fp32", engine="eager")


def test_verify_finds_each_stage_equal(made: Made, tmp_path: Path) -> None:
    shapes = read_manifest(made.onnx, "").shapes
    assert (shapes["picture"], shapes["image_tokens"]) == ([252, 448], 4 * 144)
    assert all(-shapes["max_tokens"] < first < behind < 0 and behind - first == 144 for first, behind in shapes["image_spans"])
    flags = [f"--model_path={made.checkpoint}", "--engine=onnxruntime", f"--engine_path={made.onnx}", "--precision=fp32", f"--out={tmp_path}"]
    assert export.verify([*flags, *FEW]) == 0
    result = json.loads((tmp_path / "verify.json").read_text())["relative_l2"]
    assert set(result) == OUTPUTS
    assert all(0 < figures["max"] < 1e-5 for name, figures in result.items() if name != "actions, 2 at once")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_policy_gives_the_eager_actions(made: Made, eager: Gr00tPolicy, engine: str) -> None:
    """Instructions of several lengths move the pictures; batches of unequal and of equal ones; a chunk continued by prefix."""
    exported = load_policy(made.checkpoint, engine=engine, engine_path=made.onnx, precision="fp32", device="cpu")
    start = noise_of(eager)
    for steps, words in ((4, "pick it"), (1, "put it all away into the box"), (2, "go")):
        exported.denoising_steps = eager.denoising_steps = steps
        before, got = (policy.get_action(observation(steps, words), noise=start) for policy in (eager, exported))
        assert_close(got, before)
    known = ActionPrefix({key: rows[4:] for key, rows in before.items()}, 2, "prefix")
    assert_close(*(policy.get_action(observation(9), noise=start, prefix=known) for policy in (exported, eager)))
    both = observation(3, batch=2)
    assert_close(*(policy.get_action(both, noise=noise_of(eager, 2)) for policy in (exported, eager)))
    alike = both | {key: ["pick it", "take it"] for key in both if key.startswith("annotation")}
    assert_close(*(policy.get_action(alike, noise=noise_of(eager, 2)) for policy in (exported, eager)))


def test_int8_is_near_on_random_weights(made: Made, eager: Gr00tPolicy, tmp_path: Path) -> None:
    flags = [f"--model_path={made.checkpoint}", f"--onnx={made.onnx}", f"--out={tmp_path / 'int8'}", "--target=openvino", "--trial_frames=1"]
    assert export.quantise([*flags, *FEW]) == 0
    rounded = load_policy(made.checkpoint, engine="openvino", engine_path=tmp_path / "int8", device="cpu")
    rounded.denoising_steps = eager.denoising_steps = 4
    got, expected = (policy.get_action(observation(), noise=noise_of(eager)) for policy in (rounded, eager))
    assert np.abs(got["action.single_arm"] - expected["action.single_arm"]).max() > 1e-4
    assert np.abs(got["action.single_arm"] - expected["action.single_arm"]).max() < 1.0 or saturates_8_bits()
    verified = [f"--model_path={made.checkpoint}", "--engine=openvino", f"--engine_path={tmp_path / 'int8'}", f"--out={tmp_path / 'verify'}"]
    assert export.verify([*verified, *FEW]) == 0 or saturates_8_bits()


def test_tensorrt_builds_the_graphs(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
    from gr00t_fast.export.tensorrt import build, prompt_profiles

    shapes = read_manifest(made.onnx, "").shapes
    (profile,) = profiles = prompt_profiles(shapes, None, one=True)
    assert profile["tokens"][0] == 2 - shapes["image_spans"][0][0]
    for stage in ("vision", "language", "denoise_step"):
        given = () if stage == "vision" else profiles
        assert build(made.onnx / f"{stage}.onnx", tmp_path / f"{stage}.engine", "tensorrt_rtx", (), given)["layers"] >= 5
