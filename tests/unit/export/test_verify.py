"""`gr00t-fast verify`: what passes, what fails, and the figures it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import Made, cases_of
from random_networks import TINY

from gr00t_fast.cli import export
from gr00t_fast.engine.manifest import describe_files, read_manifest
from gr00t_fast.export.verify import Case, action_error, joints, judged


@pytest.fixture(scope="module")
def cases(checkpoint: Path) -> list[Case]:
    return cases_of(checkpoint)


def run(checkpoint: Path, engine_path: Path, out: Path, *flags: str) -> tuple[int, dict | None]:
    common = [f"--model_path={checkpoint}", "--engine=onnxruntime", f"--engine_path={engine_path}", f"--out={out}", "--denoising_steps=2"]
    code = export.verify([*common, *flags])
    file = out / "verify.json"
    return code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize(("engine", "few"), [("onnxruntime", ()), ("openvino", ("--frames=16", "--allow_few"))])
def test_an_fp32_export_passes_stage_by_stage(tiny_export: Made, tmp_path: Path, engine: str, few: tuple[str, ...]) -> None:
    code, result = run(*tiny_export, tmp_path / "out", "--precision=fp32", f"--engine={engine}", *few)
    assert (code, result["passed"], result["observations"]) == (0, True, 16 if few else 100)
    assert set(result["relative_l2"]) == {"tokens", "backbone_features", "vl_features", "keys", "values", "actions"}
    assert all(0 < figures["max"] < 1e-5 for figures in result["relative_l2"].values())
    assert result["actions"]["max"] < 0.05
    assert result["source"]["synthetic"]
    assert "| keys |" in (tmp_path / "out" / "verify.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["verify.json", "verify.md"]


def damaged(made: Made, out: Path, stage: str) -> Path:
    """A copy whose manifest is right and one of whose weights is not: as a wrong exporter would make it."""
    out.mkdir()
    for file in made.onnx.glob("[!.]*"):
        (out / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(out / f"{stage}.onnx"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("mlp.down.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(3), weight.name))
    (out / f"{stage}.onnx.data").unlink()
    onnx.save_model(model, str(out / f"{stage}.onnx"), save_as_external_data=True, location=f"{stage}.onnx.data")
    replace(read_manifest(out, ""), files=describe_files(out)).write(out)
    return out


@pytest.mark.parametrize(
    ("stage", "blamed", "others"),
    [("vision", "tokens", ("keys",)), ("language", "keys", ("tokens",)), ("denoise_step", "actions", ("tokens", "keys"))],
)
def test_a_wrong_stage_fails_and_is_named(
    tiny_export: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, blamed: str, others: tuple[str, ...]
) -> None:
    path = damaged(tiny_export, tmp_path / "damaged", stage)
    code, result = run(tiny_export.checkpoint, path, tmp_path / "out", "--frames=2", "--allow_few", "--limit=0.01")
    assert (code, result["passed"]) == (1, False)
    assert any(failure.startswith(blamed) for failure in result["failures"])
    assert all(result["relative_l2"][name]["max"] < 1e-4 for name in others)  # each stage is fed with the plain model's outputs
    assert "FAILED: " in capsys.readouterr().out


def test_errors_are_in_joint_units_and_relative_to_the_displacement(cases: list[Case]) -> None:
    noise = np.concatenate([case.noise.numpy() for case in cases])
    truth = np.random.default_rng(5).standard_normal(noise.shape).astype(np.float32)
    off, padded = truth.copy(), truth.copy()
    off[..., 0] += 0.1  # of the normalised range of 2, which is 80 degrees for the first joint
    error = action_error(off, truth, cases)
    assert error.largest == pytest.approx(4.0, rel=1e-3)
    assert error.per_joint_p99[1:] == (0, 0, 0, 0, 0)
    assert error.displacement == pytest.approx(0.1 * np.sqrt(3 * TINY.horizon) / np.linalg.norm((truth - noise)[..., :6]), rel=1e-3)
    padded[..., 6:] += 5.0  # moves no joint
    assert action_error(padded, truth, cases).largest == 0
    assert joints(truth, cases).shape == (3, TINY.horizon, 6)
    broken, sound = action_error(np.full_like(truth, np.nan), truth, cases), action_error(truth, truth, cases)
    assert judged("int8", {"tokens": [0.0]}, sound, sound, 1.5)["passed"]
    assert judged("int8", {"tokens": [0.0]}, broken, sound, 1.5)["failures"], "NaN passes no limit"
    assert judged("fp32", {"tokens": [float("nan")]}, sound, sound, 1.5)["failures"]
