"""ONNX exports with graphs for several observations at once: the same weights, and each item's own actions. N1.7's: test_n1d7_exports.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import FEW, Made
from random_networks import observation

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import EngineError
from gr00t_fast.cli import export
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.slow

SENTENCE = "put the red block into the bowl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("batched")
    checkpoint = write_random_checkpoint(directory / "checkpoint", "tiny", "so100_dualcam")
    flags = [f"--model_path={checkpoint}", "--data_config=so100_dualcam", f"--out={directory / 'onnx'}", "--batch_sizes=2"]
    assert export.onnx(flags) == 0
    return Made(checkpoint, directory / "onnx")


@pytest.fixture(params=["onnxruntime", "openvino"])
def policy(made: Made, request: pytest.FixtureRequest) -> Gr00tPolicy:
    return load_policy(made.checkpoint, data_config="so100_dualcam", engine=request.param, engine_path=made.onnx, precision="fp32")


@pytest.mark.parametrize("continued", [False, True])
def test_each_item_gets_its_own_actions(policy: Gr00tPolicy, made: Made, continued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of one length go together, also when they are not neighbours; the third goes alone."""
    assert policy.max_batch == 2
    words = [SENTENCE, "pick", SENTENCE]
    batched, noise = observation("so100_dualcam", batch=3, instruction=words), np.random.default_rng(1)
    noises = noise.standard_normal((3, *policy.chunk_shape)).astype(np.float32)
    calls = [{"observation": {key: value[item] for key, value in batched.items()}, "noise": noises[item : item + 1]} for item in range(3)]
    if continued:
        before = policy.get_action(**calls[0])
        for item, call in enumerate(calls):
            call["prefix"] = ActionPrefix({key: rows[: 8 - item] for key, rows in before.items()}, item)
    alone = [policy.get_action(**call) for call in calls]
    run, sizes = policy.engine.runtime.run_stage, []

    def noted(stage: str, *given: Any, batch: int = 1) -> Any:
        sizes.append((stage, batch))
        return run(stage, *given, batch=batch)

    monkeypatch.setattr(policy.engine.runtime, "run_stage", noted)
    together = policy.get_actions(calls)
    assert [size for stage, size in sizes if stage == "vision"] == [1, 2]
    for found, expected in zip(together, alone, strict=True):
        for key, rows in expected.items():
            np.testing.assert_allclose(found[key], rows, rtol=0, atol=1e-3)


def test_weights_are_on_the_disk_once_and_verify_compares_items_with_single_calls(made: Made, tmp_path: Path) -> None:
    assert {path.name for path in made.onnx.glob("*.data")} == {f"{stage}.onnx.data" for stage in ("vision", "language", "denoise_step")}
    assert len([*made.onnx.glob("*.batch2.onnx")]) == 3
    flags = [f"--model_path={made.checkpoint}", "--data_config=so100_dualcam", f"--engine_path={made.onnx}", f"--out={tmp_path}"]
    assert export.verify([*flags, "--engine=onnxruntime", *FEW]) == 0
    assert json.loads((tmp_path / "verify.json").read_text())["relative_l2"]["actions, 2 at once"]["max"] < 1e-5


def test_what_is_quantised_is_for_one_observation(made: Made, tmp_path: Path) -> None:
    flags = [f"--model_path={made.checkpoint}", "--data_config=so100_dualcam", f"--onnx={made.onnx}", f"--out={tmp_path / 'int8'}"]
    assert export.quantise([*flags, "--target=openvino", *FEW, "--trial_frames=0"]) == 0
    policy = load_policy(made.checkpoint, data_config="so100_dualcam", engine="openvino", engine_path=tmp_path / "int8", precision="fp32")
    assert policy.max_batch == 1
    manifest = json.loads((made.onnx / "manifest.json").read_text())
    manifest["details"]["batches"]["2"]["vision"] = "elsewhere.onnx"
    (made.onnx / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="not among the files"):
        load_policy(made.checkpoint, data_config="so100_dualcam", engine="onnxruntime", engine_path=made.onnx)


def test_sizes_that_make_no_sense(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--model_path={made.checkpoint}", "--data_config=so100_dualcam", f"--out={tmp_path / 'onnx'}", "--batch_sizes=2,1"]
    assert export.onnx(flags) != 0
    assert "expected whole numbers from 2 to 8" in capsys.readouterr().err
