"""An export is refused, with the command to run, unless it is whole and was made for this checkpoint, embodiment, cameras and data configuration."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from exports import target_for
from random_networks import edit_json, write_network

from gr00t_fast.base.errors import EngineError
from gr00t_fast.engine import Target
from gr00t_fast.engine.manifest import (
    MANIFEST_NAME,
    STAGES,
    Digests,
    Manifest,
    check_manifest,
    describe_files,
)

REMEDY = "python export/somehow.py"
METADATA = "experiment_cfg/metadata.json"
ARM = "new_embodiment"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and an export whose files no runtime could open: only their bytes count here."""
    checkpoint, export = write_network(tmp_path_factory.mktemp("checkpoint")), tmp_path_factory.mktemp("export")
    (export / "vision.onnx").write_bytes(bytes(range(256)) * 40)
    (export / "vision.onnx.data").write_bytes(b"weights" * 1000)
    manifest = Manifest(
        kind="onnx",
        precision="fp32",
        identity=target_for(checkpoint).identity(Digests(export)),
        shapes={"cameras": 1},
        denoising_steps=(1, 2),
        stages={stage: {"file": "vision.onnx", "inputs": {}, "outputs": {}} for stage in STAGES},
        files=describe_files(export),
        versions={"python": "3"},
        command="as it was",
        program="to_onnx.py",
        flags=("--precision=fp32",),
    )
    manifest.write(export)
    return checkpoint, export


@pytest.fixture
def checkpoint(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "checkpoint"))


@pytest.fixture
def export(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "export"))


def _refused(export: Path, target: Target, kind: str = "onnx") -> str:
    with pytest.raises(EngineError) as caught:
        check_manifest(export, kind, target, REMEDY)
    assert str(caught.value).endswith(f"Run: {REMEDY}")
    return f"{type(caught.value).__name__}: {caught.value}"


def _other_weights(checkpoint: Path) -> Target:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    file.write_bytes(content)
    return target_for(checkpoint)


def _edited(checkpoint: Path, file: str, key: str, value: object) -> Target:
    edit_json(checkpoint / file, key, value)
    return target_for(checkpoint)


def _other_embodiment(checkpoint: Path) -> Target:
    edit_json(checkpoint / METADATA, "gr1", json.loads((checkpoint / METADATA).read_text())["new_embodiment"])
    return target_for(checkpoint, tag="gr1")


def _other_data_config(checkpoint: Path) -> Target:
    target = target_for(checkpoint)
    other = replace(target.data_config, state_keys=target.data_config.state_keys[::-1])
    return replace(target, embodiment=replace(target.embodiment, data_config=other))


def _two_cameras(checkpoint: Path) -> Target:
    return target_for(write_network(checkpoint.parent / "two", data_config="so100_dualcam"), "so100_dualcam")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_weights, "other weights"),
        (lambda at: _edited(at, METADATA, f"{ARM}.statistics.state.gripper.max", [61.0]), "other metadata"),
        (
            lambda at: _edited(at, METADATA, f"{ARM}.modalities.video.webcam.resolution", [128, 96]),
            "64, 48]], here [['video.webcam', 128",
        ),
        (lambda at: _edited(at, "config.json", "action_head_cfg.num_inference_timesteps", 5), "other config"),
        (_other_embodiment, "embodiment_tag: made for new_embodiment, here gr1"),
        (_other_data_config, "data_config: made for"),
        (_two_cameras, "cameras: made for [['video.webcam', 64, 48]], here [['video.front', 64, 48], ['video.wrist', 64, 48]]"),
    ],
)
def test_stale(export: Path, checkpoint: Path, change, told: str) -> None:
    message = _refused(export, change(checkpoint))
    assert message.startswith("StaleEngineError")
    assert told in message


def _flip(export: Path) -> None:
    """One byte, of a file whose size and modification time stay."""
    file = export / "vision.onnx.data"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[3] ^= 0xFF
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda export: os.truncate(export / "vision.onnx.data", 6999), "vision.onnx.data is cut short or altered: expected 7000 bytes, got 6999"),
        (_flip, "vision.onnx.data is altered: its content is not what was exported"),
        (lambda export: (export / "vision.onnx").unlink(), "vision.onnx is missing from the export"),
        (lambda export: (export / MANIFEST_NAME).unlink(), "holds no exported engine"),
        (lambda export: os.truncate(export / MANIFEST_NAME, 100), "cannot be read"),
        (lambda export: edit_json(export / MANIFEST_NAME, "format", 99), "has format 99; this version reads format 1"),
        (lambda export: edit_json(export / MANIFEST_NAME, "files", {"../outside": {"bytes": 1, "sha256": ""}}), "leaves the directory"),
        (lambda export: edit_json(export / MANIFEST_NAME, "stages.vision.file", "/elsewhere/vision.onnx"), "cannot be read"),
        (lambda export: edit_json(export / MANIFEST_NAME, "stages.language", ...), "has the stages vision, denoise_step"),
        (lambda export: edit_json(export / MANIFEST_NAME, "quantisation", "int8"), "cannot be read"),
    ],
)
def test_damaged(export: Path, checkpoint: Path, damage, told: str) -> None:
    check_manifest(export, "onnx", target_for(checkpoint), REMEDY)  # digests are remembered now
    damage(export)
    assert told in _refused(export, target_for(checkpoint))
