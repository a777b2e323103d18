"""export/verify.py: what passes, what fails, and the figures it gives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import target_for
from random_networks import TINY

from gr00t_fast.cli import export
from gr00t_fast.console import Progress
from gr00t_fast.engine.manifest import Manifest, describe_files, read_manifest
from gr00t_fast.export.samples import Case, collect_cases
from gr00t_fast.export.verify import Verification, action_error, joints


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    onnx: Path


@pytest.fixture(scope="module")
def made(tiny_export: tuple[Path, Path]) -> Made:
    return Made(*tiny_export)


@pytest.fixture(scope="module")
def cases(made: Made) -> list[Case]:
    return collect_cases(target_for(made.checkpoint), "random:0", frames=3, seed=0, noise_seed=0, progress=Progress(), allow_few=True)[0]


def _run(made: Made, out: Path, *flags: str, engine: str = "onnxruntime", path: Path | None = None) -> tuple[int, dict | None]:
    common = [f"--model_path={made.checkpoint}", f"--engine={engine}", f"--engine_path={path or made.onnx}", f"--out={out}", "--denoising_steps=2"]
    code = export.verify([*common, *flags])
    file = out / "verify.json"
    return code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_fp32_export_passes_stage_by_stage(made: Made, tmp_path: Path, engine: str) -> None:
    code, result = _run(made, tmp_path / "out", "--frames=100", "--precision=fp32", engine=engine)
    assert code == 0
    assert result["passed"]
    assert result["observations"] == 100
    assert set(result["relative_l2"]) == {"tokens", "backbone_features", "vl_features", "keys", "values", "actions"}
    assert all(0 < figures["max"] < 1e-5 for figures in result["relative_l2"].values())
    assert result["actions"]["max"] < 0.05
    assert result["source"]["synthetic"]
    assert "| keys |" in (tmp_path / "out" / "verify.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["verify.json", "verify.md"]


def test_too_few_observations_are_told_before_the_export_is_opened(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "out", "--frames=4", path=tmp_path / "no-export") == (1, None)
    assert "4 frames, expected at least 100" in capsys.readouterr().err


def _damaged(made: Made, out: Path, stage: str, factor: float) -> Path:
    """A copy whose manifest is right and one of whose weights is not: as a wrong exporter would make it."""
    out.mkdir()
    for file in made.onnx.iterdir():
        if file.is_file() and not file.name.startswith("."):
            (out / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(out / f"{stage}.onnx"))
    name = next(node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1].endswith("mlp.down.weight"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), name))
    (out / f"{stage}.onnx.data").unlink()
    onnx.save_model(model, str(out / f"{stage}.onnx"), save_as_external_data=True, location=f"{stage}.onnx.data")
    manifest = read_manifest(out, "")
    Manifest(**{**vars(manifest), "files": describe_files(out)}).write(out)
    return out


@pytest.mark.parametrize(("stage", "blamed"), [("vision", "tokens"), ("language", "keys"), ("denoise_step", "actions")])
def test_a_wrong_stage_fails_and_is_named(made: Made, tmp_path: Path, stage: str, blamed: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = _damaged(made, tmp_path / "damaged", stage, 3.0)
    code, result = _run(made, tmp_path / "out", "--frames=2", "--allow_few", "--limit=0.01", path=path)
    assert code == 1
    assert not result["passed"]
    assert any(failure.startswith(blamed) for failure in result["failures"])
    others = {"vision": ("keys",), "language": ("tokens",), "denoise_step": ("tokens", "keys")}[stage]
    assert all(result["relative_l2"][name]["max"] < 1e-4 for name in others)  # each stage is fed with the plain model's outputs
    assert "FAILED: " in capsys.readouterr().out


def test_too_few_observations_are_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "out", "--frames=5") == (1, None)
    assert "5 frames, expected at least 100" in capsys.readouterr().err


def test_errors_are_in_joint_units_and_relative_to_the_displacement(cases: list[Case]) -> None:
    noise = np.concatenate([case.noise.numpy() for case in cases])
    truth = np.random.default_rng(5).standard_normal(noise.shape).astype(np.float32)
    off = truth.copy()
    off[..., 0] += 0.1  # of the normalised range of 2, which is 80 degrees for the first joint
    error = action_error(off, truth, cases)
    assert error.largest == pytest.approx(4.0, rel=1e-3)
    assert error.per_joint_p99[1:] == (0, 0, 0, 0, 0)
    assert error.displacement == pytest.approx(0.1 * np.sqrt(3 * TINY.horizon) / np.linalg.norm((truth - noise)[..., :6]), rel=1e-3)
    off = truth.copy()
    off[..., 6:] += 5.0  # padding moves no joint
    assert action_error(off, truth, cases).largest == 0
    assert joints(truth, cases).shape == (3, TINY.horizon, 6)


def test_nan_passes_no_limit(cases: list[Case]) -> None:
    truth = np.zeros((3, TINY.horizon, TINY.action_dim), np.float32)
    broken = action_error(np.full_like(truth, np.nan), truth, cases)
    assert Verification("int8", {"tokens": [0.0]}, broken, broken, 1.5).failures
    assert Verification("fp32", {"tokens": [float("nan")]}, action_error(truth, truth, cases), broken, 1.5).failures


def test_long_work_tells_how_far_it_is_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gr00t_fast.console.TELL_EVERY_S", -1.0)
    with Progress().bar("calibrating", 4) as tick:
        for _ in range(4):
            tick()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" after")[0] for line in told[:-1]] == [f"calibrating: {done} of 4" for done in (1, 2, 3)]
    assert told[-1].startswith("calibrating: 4 in")
