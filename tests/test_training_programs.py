"""The programs that make samples, train and record: directories that are continued or refused, what they leave, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")
from gr00t_fast.errors import ConfigError
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, Simulation
from training import record, train
from training import samples as make_samples
from training.samples import load_samples, write_shards

ROOT = Path(__file__).parent.parent


# --- samples ---------------------------------------------------------------------------------------------------------------------------


def test_shards_are_continued_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.samples._SHARD", 2)

    class Counter:
        done = 0

        def update(self, count: int) -> None:
            self.done += count

    write_shards(tmp_path, 5, 1, counter := Counter())
    assert counter.done == 5
    first = (tmp_path / "shard_0000.npz").stat().st_mtime_ns
    (tmp_path / "shard_0001.npz").unlink()
    whole = load_samples([tmp_path])
    write_shards(tmp_path, 5, 1, Counter())
    assert (tmp_path / "shard_0000.npz").stat().st_mtime_ns == first
    assert len(whole) == 3
    assert len(load_samples([tmp_path])) == 5


class Silent:
    """Progress that nobody sees."""

    def update(self, count: int) -> None: ...


def test_a_higher_count_fills_the_short_shard_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.samples._SHARD", 4)
    write_shards(tmp_path, 3, 1, Silent())
    before = load_samples([tmp_path])
    write_shards(tmp_path, 6, 1, Silent())
    after = load_samples([tmp_path])
    assert (len(before), len(after)) == (3, 6)
    np.testing.assert_array_equal(after.pictures[:3], before.pictures)
    np.testing.assert_array_equal(after.chunks[:3], before.chunks)
    assert json.loads((tmp_path / "about.json").read_text())["count"] == 6


def test_samples_of_another_seed_or_a_lower_count_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path}"
    assert make_samples.main([out, "--count=3", "--seed=1"]) == 0
    told = (tmp_path / "about.json").read_text()
    for flags, expected in (
        (["--count=5", "--seed=2"], r"'seed': 1,.*asked for.*'seed': 2,.*another --out"),
        (["--count=2", "--seed=1"], "holds 3 samples, more than --count=2"),
        (["--count=0", "--seed=1"], "--count must be at least 1"),
        (["--count=-5", "--seed=1"], "got --count=-5"),
        (["--count=3", "--seed=-1"], "got --count=3 --seed=-1"),
    ):
        capsys.readouterr()
        assert make_samples.main([out, *flags]) == 1, flags
        assert re.search(expected, capsys.readouterr().err), flags
    assert (tmp_path / "about.json").read_text() == told, "what was refused left its mark"
    (tmp_path / "about.json").unlink()
    assert make_samples.main([out, "--count=3", "--seed=1"]) == 1
    assert "'seed': None" in capsys.readouterr().err


def test_no_samples_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples\.py"):
        load_samples([tmp_path])


# --- training --------------------------------------------------------------------------------------------------------------------------


def test_the_command_stops_continues_and_leaves_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("training.samples._SHARD", 16)
    write_shards(tmp_path / "samples", 16, 1, Silent())
    common = [f"--samples={tmp_path / 'samples'}", f"--held_out={tmp_path / 'samples'}", f"--out={tmp_path / 'run'}"]
    common += ["--steps=4", "--batch=8", "--check_every=2", "--device=cpu"]
    assert train.main([*common, "--minutes=1e-6"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (first["steps"], first["stopped_by"]) == (1, "--minutes=1e-06")
    assert train.main(common) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["steps"], last["stopped_by"]) == (4, "the last step")
    assert [row.split(",")[0] for row in (tmp_path / "run" / "loss.csv").read_text().splitlines()] == ["step", "1", "2", "4"]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert train.main([*common, "--seed=1"]) == 1
    assert "another run" in capsys.readouterr().err


def test_without_held_out_samples_nothing_speaks_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn) -> None:
    write_shards(tmp_path / "samples", 8, 1, Silent())
    assert train.main([f"--samples={tmp_path / 'samples'}", f"--out={tmp_path / 'run'}", "--steps=2", "--batch=8", "--device=cpu"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert {name for name in result if "held_out" in name or "error" in name} == set()
    assert isinstance(result["flow"], float)
    assert "action_error_deg" not in told.err
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------------------------


def interrupted(script: str, *flags: str, when: Path, pattern: str) -> subprocess.CompletedProcess[str]:
    """Run a program and press Ctrl-C once a file of `pattern` is below `when`."""
    program = [sys.executable, str(ROOT / "training" / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            while not list(when.rglob(pattern)) and process.poll() is None:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def test_ctrl_c_while_samples_are_made_ends_in_one_line(tmp_path: Path) -> None:
    done = interrupted("samples.py", f"--out={tmp_path / 'samples'}", "--count=100000", when=tmp_path, pattern="about.json")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted: the same command goes on")


def test_ctrl_c_while_recording_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("lerobot")
    flags = [f"--out={tmp_path / 'set'}", "--episodes=500", "--resolution", "64", "48"]
    done = interrupted("record.py", *flags, when=tmp_path, pattern="*.mp4")  # Arrow's files are open by then
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_training_saves_and_says_so_in_the_exit_code(tmp_path: Path) -> None:
    write_shards(tmp_path / "samples", 16, 1, Silent())
    run = tmp_path / "run"
    flags = [f"--samples={tmp_path / 'samples'}", f"--out={run}", "--batch=8", "--device=cpu", "--check_every=1"]
    done = interrupted("train.py", *flags, when=run, pattern="loss.csv")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["stopped_by"] == "SIGINT"
    assert done.stderr.splitlines()[-1].endswith("the same command goes on from there")
    assert (run / "state.pt").exists()


# --- data sets ---------------------------------------------------------------------------------------------------------------------------


def test_layouts_that_nobody_solves_are_no_data_set(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lerobot")
    monkeypatch.setattr(record, "expert", lambda simulation: iter([HOME_DEG]))
    assert record.main([f"--out={tmp_path / 'set'}", "--episodes=2", "--resolution", "64", "48"]) == 1
    assert "solved none of the 2 layouts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_disturbances_move_the_arm_and_not_the_labels() -> None:
    calm, rough = (list(record.rows(Simulation("reach", 3), (32, 24), noise, np.random.default_rng(0))) for noise in (0.0, 3.0))
    np.testing.assert_array_equal(calm[0]["action"], rough[0]["action"])
    assert np.abs(calm[5]["observation.state"] - rough[5]["observation.state"]).max() > 0.5


def test_a_recorded_data_set_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lerobot")
    out = tmp_path / "demonstrations"
    assert record.main([f"--out={out}", "--episodes=2", "--resolution", "64", "48"]) == 0
    assert record.main([f"--out={out}", "--episodes=2"]) == 1
    assert "there already" in capsys.readouterr().err
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data = LeRobotDataset("local/demonstrations", root=out, video_backend="pyav")
    assert (data.num_episodes, data.fps) == (2, 30)
    assert list(tmp_path.iterdir()) == [out], "no unfinished copy is left"
    row = data[0]
    np.testing.assert_allclose(row["observation.state"].numpy(), HOME_DEG, atol=1e-4)
    assert row["observation.images.front"].shape == (3, 48, 64)
    assert row["task"] == "Reach the block"
    assert json.loads((out / "meta" / "modality.json").read_text())["video"]["webcam"]["original_key"] == "observation.images.front"
