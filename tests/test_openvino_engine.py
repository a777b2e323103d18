"""OpenVINO against the plain model at the same noise, in fp32, bf16 and INT8, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from random_networks import TINY, edit_json, observation

from gr00t_fast import load_policy
from gr00t_fast.cli import export
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.engine.exported import choose_arithmetic
from gr00t_fast.errors import ConfigError, EngineError

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


def test_fp32_gives_the_plain_models_actions(made: Made) -> None:
    seen, noise = observation(), _noise()
    got, truth = (_together(policy.get_action(seen, noise)) for policy in (made.policy(made.onnx), made.eager()))
    assert np.abs(got - truth).max() < 1e-3  # joint units, of ranges up to 100


def test_int8_is_near_and_another_format(made: Made) -> None:
    seen, noise = observation(), _noise()
    truth = _together(made.eager().get_action(seen, noise))
    errors = {precision: np.abs(_together(made.policy(made.int8, precision).get_action(seen, noise)) - truth).max() for precision in ("fp32", "auto")}
    assert all(1e-3 < error < 5.0 for error in errors.values()), errors


def test_the_precision_is_what_is_computed_in(made: Made) -> None:
    import openvino

    arithmetic = choose_arithmetic("auto", openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    assert [made.policy(made.onnx, word).precision for word in ("auto", "fp32")] == [arithmetic, "fp32"]
    assert arithmetic in made.policy(made.onnx, "auto").describe()
    assert made.policy(made.int8, "auto").precision == "int8"


def test_items_of_a_batch_are_as_alone_and_prompts_may_differ_in_length(made: Made) -> None:
    policy, noise = made.policy(made.int8), _noise(2)
    both = observation(batch=2, instruction=["pick", "put the cube into the bowl"])
    together = _together(policy.get_action(both, noise))
    for item in range(2):
        alone = {key: value[item] if isinstance(value, np.ndarray) else [value[item]] for key, value in both.items()}
        assert (_together(policy.get_action(alone, noise[item : item + 1])) == together[item]).all()


def test_a_chunk_is_continued_by_prefix(made: Made) -> None:
    policy, seen, noise = made.policy(made.onnx), observation(), _noise()
    known = {key: value[:6] + 1 for key, value in policy.get_action(seen, noise).items()}
    got, truth = (p.get_action(seen, noise, prefix=ActionPrefix(known, 4, "prefix")) for p in (policy, made.eager()))
    for key, rows in got.items():
        assert (rows[:4] == known[key][:4].astype(np.float32)).all()
        assert np.abs(rows - truth[key]).max() < 1e-3


def test_only_cpus_and_formats_that_they_compute_in(made: Made) -> None:
    with pytest.raises(ConfigError, match="Expected auto or cpu"):
        made.policy(made.int8, device="cuda")
    assert choose_arithmetic("auto", ["FP32", "INT8", "BF16"]) == "bf16"
    assert choose_arithmetic("auto", ["FP32", "INT8"]) == choose_arithmetic("fp32", ["FP32"]) == "fp32"
    with pytest.raises(ConfigError, match="computes in fp32 on this CPU"):
        choose_arithmetic("bf16", ["FP32", "INT8"])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("quantisation", {"format": "int8", "runtime": "tensorrt"}, "made for 'tensorrt'.*--engine=tensorrt"),
        ("precision", "bf16", r"bf16 export; .* runs fp32 ones.*gr00t-fast export onnx"),
    ],
)
def test_files_for_another_runtime_and_16_bit_exports_are_refused(made: Made, tmp_path: Path, key: str, value: object, told: str) -> None:
    shutil.copytree(made.onnx, tmp_path / "altered")
    edit_json(tmp_path / "altered" / "manifest.json", key, value)
    with pytest.raises(EngineError, match=told):
        made.policy(tmp_path / "altered")
