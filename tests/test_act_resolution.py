"""The study of training resolutions: tokens, times and memory come from lerobot's own network and its own training step."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")
pytest.importorskip("mujoco")
pytest.importorskip("psutil")
from benchmarks import act_resolution
from benchmarks.act_training import ActTraining, Options, SmolVlaAtResolutions, measure_memory, tiny_dataset
from benchmarks.lib.policy_zoo import Setting
from benchmarks.lib.program import size_text
from gr00t_fast.errors import ConfigError
from training import record

ROOT = Path(__file__).parent.parent
FULL, HALF = (128, 96), (64, 48)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("act_resolution") / "dataset"
    assert record.main([f"--out={path}", "--episodes=1", f"--resolution={size_text(FULL)}"]) == 0
    return path


@pytest.fixture(scope="module")
def training(dataset: Path) -> ActTraining:
    return ActTraining(Options(dataset, 2, False, "cpu", 0), [FULL, HALF], ["pipeline", "loader"])


def test_arms_differ_in_the_pictures_alone(training: ActTraining) -> None:
    assert [(arm.name, arm.resized_by) for arm in training.arms] == [
        ("128x96", "nobody"),
        ("64x48 pipeline", "pipeline"),
        ("64x48 loader", "loader"),
    ]
    loaded = [next(arm.batches) for arm in training.arms]
    assert all(torch.equal(batch["action"], loaded[0]["action"]) for batch in loaded)  # the same frames
    camera = next(iter(training.policy.config.image_features))
    assert [tuple(batch[camera].shape) for batch in loaded] == [(2, 3, 96, 128), (2, 3, 96, 128), (2, 3, 48, 64)]
    seen = [arm.preprocessor(batch)[camera] for arm, batch in zip(training.arms, loaded, strict=True)]
    assert [tuple(pixels.shape) for pixels in seen] == [(2, 3, 96, 128), (2, 3, 48, 64), (2, 3, 48, 64)]
    torch.testing.assert_close(seen[1], seen[2], atol=1e-4, rtol=0)  # whoever resizes, the network sees the same


def test_a_step_trains_and_its_times_add_up(training: ActTraining) -> None:
    before = training.policy.model.action_head.weight.detach().clone()
    taken = training.train_step(training.arms[1])
    assert not torch.equal(before, training.policy.model.action_head.weight)
    assert taken["data_s"] == pytest.approx(taken["loader_s"] + taken["preprocessor_s"])
    assert 0 < taken["data_s"] + taken["updt_s"] <= taken["step_s"]


def test_the_program_leaves_a_table_and_ends_in_json(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [
        "--resolutions",
        "128x96",
        "64x48",
        "--resize_in",
        "pipeline",
        "--rounds=2",
        "--memory=false",
        "--smolvla=false",
        "--device=cpu",
        "--json",
    ]
    assert act_resolution.main([*flags, f"--dataset={dataset}", f"--out={tmp_path}"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((tmp_path / "act_resolution.json").read_text())
    arms = told["act"]["arms"]
    assert [arm["encoder_tokens"] for arm in arms.values()] == [14, 6]
    assert all(arm[what]["count"] == 2 for arm in arms.values() for what in ("refill_ms", "data_s", "updt_s", "step_s"))
    assert arms["128x96"]["gflop"]["training_step"] > 2 * arms["128x96"]["gflop"]["refill"]
    assert arms["128x96"]["gflop"]["refill"] > 2 * arms["64x48 pipeline"]["gflop"]["refill"]
    table = (tmp_path / "act_resolution.md").read_text()
    assert "| 64x48 | pipeline |" in table
    assert "Where a resize is billed" in table


def test_memory_of_training_holds_gradients_and_moments(dataset: Path) -> None:
    options = Options(dataset, 2, False, "cpu", 0, 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(measure_memory, options, HALF).result()
    parameters_bytes = 4 * 12_319_622
    assert parameters_bytes < found["inference"]
    assert found["training"] > found["inference"] + 2 * parameters_bytes  # gradients and two moments, less what inference had freed


def test_a_peak_is_ones_own() -> None:
    """A process started by a large one reports what itself has held: getrusage would report the parent's."""
    big = np.ones(2**28 // 8)  # 256 MiB, written to
    code = "from gr00t_fast.measurement import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert big.sum() == len(big)
    assert 2**20 < int(done.stdout) < 2**28


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rounds=0"], "--rounds=0"),
        (["--resolutions", "64x48", "64x48"], "each once"),
        (["--seed=-1"], "--seed=-1"),
        (["--dataset=/nowhere/at/all", "--memory=false"], "no LeRobotDataset"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert act_resolution.main([*flags, "--device=cpu", f"--out={tmp_path}"]) == 1
    assert told in capsys.readouterr().err


def test_a_recording_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(flags: list[str]) -> int:
        out = Path(flags[0].removeprefix("--out="))
        assert not out.exists()
        out.mkdir()
        return 0

    monkeypatch.setattr(record, "main", recorded)
    path = tiny_dataset(tmp_path, 0)
    assert path == tmp_path / "dataset-640x480-0"
    assert tiny_dataset(tmp_path, 0) == path  # and only once
    monkeypatch.setattr(record, "main", lambda _: 1)
    with pytest.raises(ConfigError, match="recorded nothing"):
        tiny_dataset(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_smolvla_sees_one_square_whatever_the_camera_gives(tmp_path: Path) -> None:
    pytest.importorskip("num2words")
    setting = Setting(False, ("front",), (1, 1), torch.device("cpu"), torch.float32, tmp_path)
    network = SmolVlaAtResolutions(setting, [FULL, (64, 64)], batch=2)
    wide, square = (network.look_inside(size) for size in (FULL, (64, 64)))
    assert (wide.square, square.square) == ((64, 64), (64, 64))
    assert wide.image_tokens == square.image_tokens
    assert (wide.padded_share, square.padded_share) == (0.25, 0.0)
    assert network.training_s((64, 64)) > 0
    assert network.forward_ms(FULL) > 0
