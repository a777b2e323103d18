"""Training of the demo's network: labels, the loss against the model's own forward, the programs end to end at a tiny size, and what ships."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S, is_there, until

pytest.importorskip("mujoco")
from benchmarks.evaluate import reach_for_still_blocks
from gr00t_fast import load_policy
from gr00t_fast.base.measurement import wilson_interval
from gr00t_fast.virtual.sim.simulation import HOME_DEG
from training import record, samples, train
from training.network import INSTRUCTIONS, draw_times, item_tables
from training.samples import HORIZON, Sampler, Samples
from training.train import Options, Trainer

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "checkpoints" / "so100-sim-reach"
CPU = torch.device("cpu")
SMALL = Options(steps=40, batch_size=8, draws=2, seed=3)


@pytest.fixture(scope="session")
def drawn() -> Samples:
    return Sampler(seed=5).draw(24)


@pytest.fixture
def shards(drawn: Samples, tmp_path: Path) -> str:
    """The flag that names a directory of samples."""
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "shard_0000.npz", **vars(drawn))
    return f"--samples={tmp_path / 'samples'}"


@pytest.fixture
def trainer(drawn: Samples) -> Trainer:
    """With weights without the zeros of the beginning, so that time and every joint matter."""
    made = Trainer(drawn, SMALL, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


# --- the loss --------------------------------------------------------------------------------------------------------------------------------


def test_times_of_the_batch_give_the_velocities_of_the_inference_path(trainer: Trainer) -> None:
    """Item i of a batch with a time each = the model's own velocity of that item alone, at that time, from the tables of inference."""
    model, head, steps = trainer.model, trainer.model.head, 4
    inputs, *_ = trainer.data.batch(np.arange(steps), trainer.prompts, INSTRUCTIONS[0], CPU)
    noisy = torch.randn((steps, HORIZON, 32), generator=torch.Generator().manual_seed(1))
    buckets = torch.tensor([int(step / steps * 1000) for step in range(steps)])
    with torch.no_grad():
        features = head.refine(model.encode_language(inputs, model.encode_vision(inputs.pixel_values)))
        together = head.velocity(noisy, head.condition(features, inputs.state), *item_tables(head, buckets))
        tables = head.step_tables(steps)
        for step in range(steps):
            condition = head.condition(features[step : step + 1], inputs.state[step : step + 1])
            alone = head.velocity(noisy[step : step + 1], condition, tables.tau[step], tables.modulation[step])
            torch.testing.assert_close(together[step : step + 1], alone, rtol=1e-5, atol=1e-5)
    swapped = head.velocity(noisy, head.condition(features, inputs.state), *item_tables(head, buckets.flip(0)))
    assert (swapped - together).abs().max() > 1e-2, "time has no influence: the comparison would prove nothing"


def test_times_follow_the_published_distribution() -> None:
    times = draw_times(200_000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = ((0.999 - torch.distributions.Beta(1.5, 1.0).sample((200_000,))) / 0.999).clamp(min=0)
    levels = torch.linspace(0.01, 0.99, 21)
    torch.testing.assert_close(times.quantile(levels), expected.quantile(levels), rtol=0, atol=0.01)


# --- the programs ----------------------------------------------------------------------------------------------------------------------------


def test_samples_are_continued_and_others_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("training.samples._SHARD", 2)
    out = f"--out={tmp_path}"
    assert samples.main([out, "--count=3", "--seed=1"]) == 0
    before, first = samples.load_samples([tmp_path]), (tmp_path / "shard_0000.npz").stat().st_mtime_ns
    assert samples.main([out, "--count", "5", "--seed", "1"]) == 0
    after = samples.load_samples([tmp_path])
    assert (len(before), len(after), (tmp_path / "shard_0000.npz").stat().st_mtime_ns) == (3, 5, first)
    np.testing.assert_array_equal(after.pictures[:3], before.pictures)
    np.testing.assert_array_equal(after.chunks[:3], before.chunks)
    for flags, expected in ((["--count=5", "--seed=2"], r"'seed': 1,.*'seed': 2,.*--out"), (["--count=0"], "--count=0")):
        capsys.readouterr()
        assert samples.main([out, *flags]) == 2
        assert re.search(expected, capsys.readouterr().err)


@pytest.mark.slow
def test_training_stops_continues_to_the_same_bits_and_leaves_everything(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([f"--samples={tmp_path / 'none'}", f"--out={tmp_path / 'run'}"]) == 2
    assert "samples.py" in capsys.readouterr().err
    common = [shards, f"--held_out={tmp_path / 'samples'}", "--steps=4", "--batch_size=8", "--check_every=2", "--device=cpu"]

    def result(run: str, *flags: str) -> dict:
        capsys.readouterr()
        assert train.main([*common, f"--out={tmp_path / run}", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    first = result("run", "--max_minutes=1e-6")
    assert (first["steps"], first["stopped_by"]) == (1, "--max_minutes=1e-06")
    continued, straight = result("run"), result("straight")
    assert (continued["steps"], continued["stopped_by"]) == (4, "the last step")
    assert [row.split(",")[0] for row in (tmp_path / "run" / "loss.csv").read_text().splitlines()] == ["step", "1", "2", "4"]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    one, two = ((tmp_path / run / "checkpoint" / "model.safetensors").read_bytes() for run in ("run", "straight"))
    assert one == two
    assert continued["action_error_deg"] == straight["action_error_deg"]
    assert train.main([*common, f"--out={tmp_path / 'run'}", "--learning_rate=0.1"]) == 2
    assert "learning_rate 0.0015 there, 0.1 here" in capsys.readouterr().err
    untrained = load_policy(tmp_path / "run" / "checkpoint", device="cpu")
    assert [outcome.solved_s for outcome in reach_for_still_blocks(untrained, (HORIZON, 32), (0,))] == [None]


def interrupted(script: str, *flags: str, when: Path, pattern: str) -> tuple[str, str]:
    """Run a program and press Ctrl-C once a file of `pattern` is below `when`, which tells that its handler is in place. Returns its output, and the
    last line of its errors."""
    program = [sys.executable, str(ROOT / "training" / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            until(lambda: is_there(when, pattern) or process.poll() is not None, pattern)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return out, err.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_made(shards: str, tmp_path: Path) -> None:
    _, last = interrupted("samples.py", f"--out={tmp_path / 'half'}", "--count=100000", when=tmp_path, pattern="about.json")
    assert "the same command goes on" in last
    run = tmp_path / "run"
    flags = [shards, f"--out={run}", "--batch_size=8", "--device=cpu", "--check_every=1"]
    out, last = interrupted("train.py", *flags, when=run, pattern="loss.csv")
    assert json.loads(out.splitlines()[-1])["stopped_by"] == "SIGINT"
    assert "the same command goes on" in last
    assert (run / "state.pt").exists()


# --- recording -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recorded_data_set_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    out = tmp_path / "demonstrations"
    flags = [f"--out={out}", "--resolution=64x48"]
    _, last = interrupted("record.py", *flags, "--episodes=500", when=tmp_path, pattern="*.mp4")  # Arrow's files are open by then
    assert "nothing was written" in last
    with monkeypatch.context() as patched:
        patched.setattr(record, "expert", lambda simulation: iter([HOME_DEG]))
        assert record.main([*flags, "--episodes=2"]) == 2
    assert "none of the 2 layouts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert record.main([*flags, "--episodes=2"]) == 0
    data = lerobot.LeRobotDataset("local/demonstrations", root=out, video_backend="pyav")
    assert (data.num_episodes, data.fps, list(tmp_path.iterdir())) == (2, 30, [out])
    row = data[0]
    np.testing.assert_allclose(row["observation.state"].numpy(), HOME_DEG, atol=1e-4)
    assert (row["observation.images.front"].shape, row["task"]) == ((3, 48, 64), "Reach the block")
    assert json.loads((out / "meta" / "modality.json").read_text())["video"]["webcam"]["original_key"] == "observation.images.front"
    assert record.main(flags) == 2
    assert "there already" in capsys.readouterr().err


# --- what ships ------------------------------------------------------------------------------------------------------------------------------


class SeesGrey:
    """The policy behind a covered lens."""

    def __init__(self, policy) -> None:
        self._policy, self.metadata = policy, policy.metadata
        self.get_modality_config, self.reset = policy.get_modality_config, policy.reset

    def get_action(self, observation: dict, noise=None) -> dict[str, np.ndarray]:
        return self._policy.get_action({**observation, "video.webcam": np.full_like(observation["video.webcam"], 127)}, noise=noise)


@pytest.mark.slow
def test_the_shipped_network_is_small_looks_and_reaches_the_block() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 15e6
    shipped = load_policy(SHIPPED, device="cpu", action_horizon=8)
    for policy, layouts, least, most in ((shipped, 6, 5, 6), (SeesGrey(shipped), 4, 0, 1)):
        outcomes = reach_for_still_blocks(policy, (HORIZON, 32), range(layouts))
        assert least <= sum(outcome.solved_s is not None for outcome in outcomes) <= most, outcomes


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (38, 40, 0.8350, 0.9862), (200, 200, 0.9812, 1.0)])
def test_wilson_interval_of_known_cases(successes: int, trials: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=5e-5)
