"""OpenVINO against the plain model at the same noise, in fp32, bf16 and INT8, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from random_networks import TINY, edit_json, observation

from gr00t_fast import load_policy
from gr00t_fast.base.errors import ConfigError, EngineError
from gr00t_fast.base.measurement import saturates_8_bits
from gr00t_fast.cli import export
from gr00t_fast.engine.exported import choose_arithmetic

pytestmark = pytest.mark.slow

STEPS = 3


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    onnx: Path
    int8: Path

    def policy(self, directory: Path, precision: str = "fp32", **options):
        return load_policy(self.checkpoint, engine="openvino", engine_path=directory, precision=precision, denoising_steps=STEPS, **options)

    def eager(self):
        return load_policy(self.checkpoint, device="cpu", precision="fp32", denoising_steps=STEPS)


@pytest.fixture(scope="module")
def made(tiny_export: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    checkpoint, onnx = tiny_export
    directory = tmp_path_factory.mktemp("openvino")
    flags = [f"--model_path={checkpoint}", f"--onnx={onnx}", f"--out={directory / 'int8'}", "--target=openvino", f"--denoising_steps={STEPS}"]
    assert export.quantise([*flags, "--observations=random:0", "--frames=8", "--allow_few", "--trial_frames=0"]) == 0
    return Made(checkpoint, onnx, directory / "int8")


def _noise(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((batch, TINY.horizon, TINY.action_dim)).astype(np.float32)


def _together(actions: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(actions.values()), axis=-1)


def test_fp32_is_the_plain_model_and_int8_is_near(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    import openvino

    seen, noise = observation(), _noise()
    exact, rounded, wide = (made.policy(path, word) for path, word in ((made.onnx, "fp32"), (made.int8, "auto"), (made.int8, "fp32")))
    truth = _together(made.eager().get_action(seen, noise))
    errors = [np.abs(_together(policy.get_action(seen, noise)) - truth).max() for policy in (exact, rounded, wide)]
    assert errors[0] < 1e-3  # joint units, of ranges up to 100
    assert ("no VNNI" in caplog.text) == saturates_8_bits()
    assert all(1e-3 < error < 5.0 for error in errors[1:]) or saturates_8_bits(), errors  # large products of random weights
    arithmetic, usual = choose_arithmetic("auto", openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")), made.policy(made.onnx, "auto")
    assert [policy.precision for policy in (usual, exact, rounded)] == [arithmetic, "fp32", "int8"]
    assert arithmetic in usual.describe()


def test_only_cpus_and_formats_that_they_compute_in(made: Made) -> None:
    with pytest.raises(ConfigError, match="Expected auto or cpu"):
        made.policy(made.int8, device="cuda")
    assert choose_arithmetic("auto", ["FP32", "INT8", "BF16"]) == "bf16"
    assert choose_arithmetic("auto", ["FP32", "INT8"]) == choose_arithmetic("fp32", ["FP32"]) == "fp32"
    with pytest.raises(ConfigError, match="computes in fp32 on this CPU"):
        choose_arithmetic("bf16", ["FP32", "INT8"])


def test_16_bit_exports_are_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.onnx, tmp_path / "altered")
    edit_json(tmp_path / "altered" / "manifest.json", "precision", "bf16")
    with pytest.raises(EngineError, match=r"bf16 export; .* runs fp32 ones.*gr00t-fast export onnx"):
        made.policy(tmp_path / "altered")
