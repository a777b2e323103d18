"""GR00T N1.6 as exported files: pictures behind the text, so that their places count from the prompt's end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import test_n1d7_exports as n1d7
from exports import FEW, Made

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.measurement import saturates_8_bits
from gr00t_fast.cli import export
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("n1d6")
    checkpoint = write_random_checkpoint(directory / "checkpoint", "tiny", **{**n1d7.OPTIONS, "network": "n1.6"})
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
    assert result.pop("actions, 2 at once")["max"] < 1e-5
    assert set(result) == n1d7.OUTPUTS - {"deepstack"}
    assert all(0 < figures["max"] < 1e-5 for figures in result.values())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_policy_gives_the_eager_actions(made: Made, eager: Gr00tPolicy, engine: str) -> None:
    n1d7.test_the_policy_gives_the_eager_actions(made, eager, engine)
    exported = load_policy(made.checkpoint, engine=engine, engine_path=made.onnx, precision="fp32", device="cpu")
    alike, eager.denoising_steps = n1d7.observation(3, batch=2) | {n1d7.LANGUAGE: ["pick it", "take it"]}, 4  # of one length: one call
    n1d7.assert_close(*(policy.get_action(alike, noise=n1d7.noise_of(eager, 2)) for policy in (exported, eager)))


def test_int8_is_near_on_random_weights(made: Made, eager: Gr00tPolicy, tmp_path: Path) -> None:
    flags = [f"--model_path={made.checkpoint}", f"--onnx={made.onnx}", f"--out={tmp_path / 'int8'}", "--target=openvino", "--trial_frames=1"]
    assert export.quantise([*flags, *FEW]) == 0
    rounded = load_policy(made.checkpoint, engine="openvino", engine_path=tmp_path / "int8", device="cpu")
    rounded.denoising_steps = eager.denoising_steps = 4
    got, expected = (policy.get_action(n1d7.observation(), noise=n1d7.noise_of(eager))["action.single_arm"] for policy in (rounded, eager))
    assert np.abs(got - expected).max() > 1e-4
    verified = [f"--model_path={made.checkpoint}", "--engine=openvino", f"--engine_path={tmp_path / 'int8'}", f"--out={tmp_path / 'verify'}"]
    assert (np.abs(got - expected).max() < 1.0 and export.verify([*verified, *FEW]) == 0) or saturates_8_bits()


def test_tensorrt_builds_the_graphs(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
    from gr00t_fast.export.tensorrt import build, prompt_profiles

    shapes = read_manifest(made.onnx, "").shapes
    (profile,) = profiles = prompt_profiles(shapes, None, one=True)
    assert profile["tokens"][0] == 2 - shapes["image_spans"][0][0]
    for stage in ("vision", "language", "denoise_step"):
        given = () if stage == "vision" else profiles
        assert build(made.onnx / f"{stage}.onnx", tmp_path / f"{stage}.engine", "tensorrt_rtx", (), given)["layers"] >= 5
