"""GR00T N1.7 as exported files: the same commands as N1.5's, two cameras at two times, against the plain model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import FEW, Made, network_inputs
from random_networks import edit_json

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import EngineError, ObservationError, StaleEngineError
from gr00t_fast.base.measurement import StageTimer, saturates_8_bits
from gr00t_fast.cli import export
from gr00t_fast.cli.main import main
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.slow

for package in ("onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(package, reason="needs `pip install 'gr00t_fast[export,openvino]'`")

LANGUAGE = "annotation.human.task_description"
CLOSE_DEG = 2e-3  # fp32 in another order of operations; joint ranges are near 100 degrees
OUTPUTS = {"tokens", "deepstack", "backbone_features", "vl_features", "text_keys", "text_values", "image_keys", "image_values", "actions"}


OPTIONS: dict[str, Any] = {"network": "n1.7", "data_config": "so100_dualcam", "dtype": torch.float32, "frame_offsets": (-2, 0)}
WIDE, USUAL = (64, 36), (64, 48)  # cameras of 16:9, which the export is for, and of the 4:3 that it would be for by default


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("n1d7")
    checkpoint = write_random_checkpoint(directory / "checkpoint", "tiny", **OPTIONS)
    assert export.onnx([f"--model_path={checkpoint}", f"--out={directory / 'onnx'}", "--camera_size=640x360", "--batch_sizes=2"]) == 0
    return Made(checkpoint, directory / "onnx")


@pytest.fixture(scope="module")
def eager(made: Made) -> Gr00tPolicy:
    return load_policy(made.checkpoint, device="cpu", precision="fp32", engine="eager")


def observation(seed: int = 0, instruction: str = "pick it", batch: int | None = None, size: tuple[int, int] = WIDE) -> dict[str, Any]:
    generator, lead = np.random.default_rng(seed), () if batch is None else (batch,)
    frames = {f"video.{camera}": generator.integers(0, 256, (*lead, 2, size[1], size[0], 3), dtype=np.uint8) for camera in ("front", "wrist")}
    joints = {"state.single_arm": generator.uniform(-30, 30, (*lead, 1, 5)), "state.gripper": generator.uniform(0, 60, (*lead, 1, 1))}
    return {**frames, **joints, LANGUAGE: instruction if batch is None else [instruction, "put the cube into the bowl"][:batch]}


def recorded(policy: Gr00tPolicy, directory: Path, size: tuple[int, int]) -> Path:
    directory.mkdir()
    seen = policy.example_observation() | {key: value for key, value in observation(size=size).items() if key.startswith("video.")}
    np.savez(directory / "one.npz", **{key: "go" if key == LANGUAGE else np.repeat(value[-1:], 5, axis=0) for key, value in seen.items()})
    return directory


def noise_of(policy: Gr00tPolicy, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((batch, *policy.chunk_shape)).astype(np.float32)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for key, rows in expected.items():
        np.testing.assert_allclose(got[key], rows, rtol=0, atol=CLOSE_DEG)


def test_verify_finds_each_stage_equal(made: Made, tmp_path: Path) -> None:
    flags = [f"--model_path={made.checkpoint}", "--engine=onnxruntime", f"--engine_path={made.onnx}", "--precision=fp32", f"--out={tmp_path}"]
    assert export.verify([*flags, *FEW]) == 0
    result = json.loads((tmp_path / "verify.json").read_text())
    assert result["relative_l2"].pop("actions, 2 at once")["max"] < 1e-5
    assert set(result["relative_l2"]) == OUTPUTS
    assert all(0 < figures["max"] < 1e-5 for figures in result["relative_l2"].values())
    assert result["actions"]["max"] < CLOSE_DEG


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_policy_gives_the_eager_actions(made: Made, eager: Gr00tPolicy, engine: str) -> None:
    """Pictures of two times, instructions of two lengths, other step counts, batches, and a chunk continued by prefix."""
    exported = load_policy(made.checkpoint, engine=engine, engine_path=made.onnx, precision="fp32", device="cpu")
    start = noise_of(eager)
    for steps, words in ((4, "pick it"), (1, "put it all away"), (2, "pick it")):
        exported.denoising_steps = eager.denoising_steps = steps
        seen = observation(steps, words)
        before, got = (policy.get_action(seen, noise=start) for policy in (eager, exported))
        assert_close(got, before)
    moved = observation(9)
    known = ActionPrefix({key: rows[4:] for key, rows in before.items()}, 2)
    continued, expected = (policy.get_action(moved, noise=start, prefix=known) for policy in (exported, eager))
    assert_close(continued, expected)
    assert np.abs(expected["action.single_arm"][:2] - before["action.single_arm"][4:6]).max() == 0
    both = observation(3, batch=2)
    assert_close(*(policy.get_action(both, noise=noise_of(eager, 2)) for policy in (exported, eager)))


def test_an_export_of_other_statistics_or_for_other_prompts_is_refused(made: Made, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "checkpoint", "tiny", **OPTIONS)
    exported = load_policy(other, engine="onnxruntime", engine_path=made.onnx, device="cpu")  # the same content elsewhere
    inputs, start = network_inputs(exported, exported.example_observation()), torch.from_numpy(noise_of(exported))
    elsewhere = dataclasses.replace(inputs, image_positions=inputs.image_positions + 1)
    with pytest.raises(EngineError, match=r"pictures in other places.*--processor_path.*gr00t-fast export onnx"):
        exported.engine.run(elsewhere, start, 1, StageTimer())
    edit_json(other / "processor_config.json", "processor_kwargs.color_jitter_params", {"brightness": 0.1})  # of training: no matter
    load_policy(other, engine="onnxruntime", engine_path=made.onnx, device="cpu")
    edit_json(other / "statistics.json", "new_embodiment.state.gripper.q99", [59.0])
    with pytest.raises(StaleEngineError, match=r"other metadata(.|\n)*gr00t-fast export onnx"):
        load_policy(other, engine="onnxruntime", engine_path=made.onnx, device="cpu")


def test_an_export_is_for_one_shape_of_camera(made: Made, eager: Gr00tPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses cameras of another shape and names the export to make, in the policy, in `doctor` and where it is quantised."""
    flags, shapes = [f"--model_path={made.checkpoint}"], read_manifest(made.onnx, "").shapes
    assert (shapes["camera_size"], shapes["picture"], shapes["image_tokens"]) == ([640, 360], [256, 448], 4 * 112)
    policy = load_policy(made.checkpoint, engine="onnxruntime", engine_path=made.onnx, device="cpu")
    policy.warm_up()  # with frames of the shape that it is for
    with pytest.raises(ObservationError, match=r"gr00t-fast export onnx.*--camera_size=64x48"):
        policy.get_action(observation(size=USUAL))
    policy.expect_cameras({"front": (640, 480), "wrist": (640, 480)})
    with pytest.raises(ObservationError, match="--camera_size=640x480"):
        policy.warm_up()
    asked = ["--robot.type=so100_sim", "--robot.cameras={front: {type: sim, width: 64, height: 48}, wrist: {type: sim, width: 64, height: 48}}"]
    assert main(["doctor", *flags, *asked, "--engine=onnxruntime", f"--engine_path={made.onnx}"]) == 1
    said = capsys.readouterr().out
    assert "pictures of 352x256, 88 tokens" in said
    assert re.search(r"cannot be used\n.*--camera_size=64x48", said)
    quantise = [*flags, f"--onnx={made.onnx}", "--target=onnxruntime", "--trial_frames=0", *FEW]
    assert export.quantise([*quantise, f"--out={tmp_path / 'other'}", f"--observations={recorded(eager, tmp_path / 'usual', (640, 480))}"]) == 1
    assert "--camera_size=" in capsys.readouterr().err
    assert export.onnx([*flags, f"--out={tmp_path / 'x'}", "--camera_size=640"]) == 2
    assert "--camera_size=640" in capsys.readouterr().err
    with pytest.raises(StaleEngineError, match=r"letterbox: made for False, here True(.|\n)*--letterbox=always"):
        load_policy(made.checkpoint, engine="onnxruntime", engine_path=made.onnx, device="cpu", letterbox="always")


def test_int8_is_near_on_random_weights(made: Made, eager: Gr00tPolicy, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    flags = [f"--model_path={made.checkpoint}", f"--onnx={made.onnx}", f"--out={out}", "--target=openvino", "--trial_frames=1"]
    assert export.quantise([*flags, *FEW]) == 0
    report = json.loads((out / "quantisation.json").read_text())
    assert "synthetic observations" in str(report["calibration"]["warnings"])
    assert report["action_error_on_trial_samples"]["rms"] > 0
    assert "deepstack_mergers" in (out / "quantisation.md").read_text()
    rounded = load_policy(made.checkpoint, engine="openvino", engine_path=out, device="cpu")
    assert rounded.precision == "int8"
    rounded.denoising_steps = eager.denoising_steps = 4
    got, expected = (policy.get_action(observation(), noise=noise_of(eager)) for policy in (rounded, eager))
    gap = np.abs(got["action.single_arm"] - expected["action.single_arm"]).max()
    assert gap > 1e-4
    assert gap < 1.0 or saturates_8_bits()  # degrees, of relative ranges of some 4 to 34


def test_tensorrt_builds_the_graphs(made: Made, tmp_path: Path) -> None:
    """Those whose sizes vary in two ways; the command is test_tensorrt_build.py's."""
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
    from gr00t_fast.export.tensorrt import build, prompt_profiles

    manifest = read_manifest(made.onnx, "")
    spans, images = manifest.shapes["image_spans"], manifest.shapes["image_tokens"]
    assert (len(spans), images) == (4, 4 * 112)
    assert manifest.stages["language"]["outputs"]["text_keys"][2] == "text_tokens"
    (profile,) = profiles = prompt_profiles(manifest.shapes, None, one=True)
    assert profile["tokens"][0] == spans[-1][1] + 2
    assert [length - images for length in profile["tokens"]] == list(profile["text_tokens"])
    for stage in ("language", "denoise_step"):
        assert build(made.onnx / f"{stage}.onnx", tmp_path / f"{stage}.engine", "tensorrt_rtx", (), profiles)["layers"] >= 5
