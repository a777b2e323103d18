"""The study of training resolutions: tokens, times and memory come from lerobot's own network and its own training step."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")
pytest.importorskip("mujoco")
pytest.importorskip("psutil")
from benchmarks import act_resolution
from benchmarks.act_training import ActTraining, Arm, Options, measure_memory, tiny_dataset
from benchmarks.policy_zoo import Setting
from benchmarks.smolvla_padding import SmolVlaAtResolutions, padded_share
from gr00t_fast.errors import ConfigError
from training import record

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")  # lerobot's reader
FULL, HALF = (128, 96), (64, 48)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("act_resolution") / "dataset"
    assert record.main([f"--out={path}", "--episodes=1", "--resolution", *map(str, FULL)]) == 0
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


def test_encoder_tokens_are_places_of_resnets_last_map(training: ActTraining) -> None:
    observation = training.observation()
    for arm in training.arms:
        width, height = arm.size
        assert training.encoder_tokens(arm, observation) == 2 + math.ceil(width / 32) * math.ceil(height / 32)


def test_a_step_trains_and_its_times_add_up(training: ActTraining) -> None:
    before = training.policy.model.action_head.weight.detach().clone()
    taken = training.train_step(training.arms[1])
    assert not torch.equal(before, training.policy.model.action_head.weight)
    assert taken["data_s"] == pytest.approx(taken["loader_s"] + taken["preprocessor_s"])
    assert 0 < taken["data_s"] + taken["updt_s"] <= taken["step_s"]


def test_a_refill_is_a_refill(training: ActTraining) -> None:
    observation = training.observation()
    for _ in range(2):
        assert training.refill(training.arms[0], observation)["refill_ms"] > 0
        assert len(training.policy._action_queue) == training.policy.config.n_action_steps - 1


class OrderedArms:
    """Stands in for the training: says in which order arms were called."""

    arms: ClassVar = [Arm(str(number), HALF, "nobody", None, None) for number in range(4)]

    def __init__(self) -> None:
        self.called: list[str] = []

    def refill(self, arm: Arm, observation: dict) -> dict[str, float]:
        self.called.append(arm.name)
        return {}

    def train_step(self, arm: Arm) -> dict[str, float]:
        return {}


def test_arms_are_shuffled_each_round_by_the_seed() -> None:
    def orders(seed: int) -> list[tuple[str, ...]]:
        training = OrderedArms()
        act_resolution._interleave(training, {}, argparse.Namespace(rounds=7, steps=1, seed=seed))
        return [tuple(training.called[start : start + 4]) for start in range(0, 32, 4)]

    found = orders(0)
    assert all(sorted(order) == list("0123") for order in found)
    followers = {(one, other) for order in found for one, other in itertools.pairwise(order)}
    assert len(followers) > 6  # turning one order round gives the same four neighbours again and again
    assert found == orders(0) != orders(1)


def test_the_program_leaves_a_table_and_ends_in_json(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--resolutions", "128x96", "64x48", "--resize_in", "pipeline", "--rounds=2", "--no-memory", "--no-smolvla", "--device=cpu"]
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
        (["--rounds=0"], "--rounds must be at least 1"),
        (["--resolutions", "64x48", "64x48"], "names something twice"),
        (["--seed=-1"], "--seed must not be negative"),
        (["--dataset=/nowhere/at/all", "--no-memory"], "no LeRobotDataset"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert act_resolution.main([*flags, "--device=cpu", f"--out={tmp_path}"]) == 1
    assert told in capsys.readouterr().err


def test_a_batch_must_fit_the_data_set(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="fewer than a batch of 100000"):
        ActTraining(Options(dataset, 100_000, False, "cpu", 0), [HALF], ["pipeline"])


def test_a_recording_that_was_stopped_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(flags: list[str]) -> int:
        out = Path(flags[0].removeprefix("--out="))
        assert not out.exists()
        out.mkdir()
        return 0

    (tmp_path / "dataset-640x480-0.tmp").mkdir()
    monkeypatch.setattr(record, "main", recorded)
    path = tiny_dataset(tmp_path, 0)
    assert path == tmp_path / "dataset-640x480-0"
    assert tiny_dataset(tmp_path, 0) == path  # and only once
    monkeypatch.setattr(record, "main", lambda _: 1)
    with pytest.raises(ConfigError, match="recorded nothing"):
        tiny_dataset(tmp_path, 1)


def test_padding_is_counted_in_whole_patches() -> None:
    pixels = torch.rand(2, 3, 64, 64)
    pixels[:, :, :24] = -1  # a row of patches and a half
    assert padded_share(pixels, 16) == 0.25
    assert padded_share(torch.rand(1, 3, 64, 64), 16) == 0


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
