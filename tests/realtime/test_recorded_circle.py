"""Runs are recorded, judged by keys, killed, continued, played again and read back: whole commands at a terminal."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from exports import cases_of
from person import Person
from recorded import entries, info, left_beside, read_back
from waiting import PATIENCE_S

from gr00t_fast.cli import replay

pytest.importorskip("lerobot")
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "so100-sim-reach"
SIZE = (48, 64, 3)


ROBOT = ("--robot.type=so100_sim", "--robot.task=reach", "--robot.cameras={front: {type: sim, width: 64, height: 48}}", "--seed=0")


def run_command(*flags: str) -> list[str]:
    """Its inferences take longer than a tick, on any machine: the arm waits for each, and each is said."""
    settled = ("--lang_instruction=Reach the block", "--action_horizon=8", "--controller=sync", "--denoising_steps=64")
    return [sys.executable, "-m", "gr00t_fast", "run", *ROBOT, f"--model_path={CHECKPOINT}", *settled, *flags]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to find the processes of a run")
def test_the_whole_circle(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    out = tmp_path / "recorded"
    person = Person(run_command("--timeout=20", "--episodes=5", "--reset_time_s=0.2", f"--record={out}"))
    for heard, keys in (
        ("Direct inference time", b"s\x1b[C"),  # solved; the right arrow ends the episode
        ("episode 0 recorded", b""),
        ("Episode 2 of 5", b""),
        ("Direct inference time", b"\x1b[D"),  # not this one
        ("is played again", b""),
        ("Direct inference time", b"\x1b[C"),
        ("episode 1 recorded", b""),
        ("Direct inference time", b""),
    ):
        for _ in range(3 if heard.startswith("Direct") else 1):  # some chunks
            person.wait_for(heard)
        person.press(keys)
    person.kill()
    assert entries(out)[0]["success"] is True
    assert info(out)["total_episodes"] == 2
    assert {int(row["episode_index"]) for row in read_back(out)} == {0, 1}
    assert left_beside(out) != []

    person = Person(run_command("--timeout=20", f"--record={out}", "--record_append=true", f"--out={tmp_path / 'run'}"))
    for _ in range(3):
        person.wait_for("Direct inference time")
    person.press(b"\x03")  # Ctrl-C reaches every process of the terminal
    person.wait_for("1 episode(s) recorded")
    assert person.process.wait(PATIENCE_S) == 130
    assert left_beside(out) == []
    rows, run = read_back(out), np.load(tmp_path / "run" / "run.npz")
    assert (info(out)["total_episodes"], info(out)["total_frames"]) == (3, len(rows))
    late = [row for row in rows if int(row["episode_index"]) == 2]
    assert np.array_equal(np.stack([row["action"].numpy() for row in late]), run["commanded"].astype(np.float32))
    assert np.array_equal(np.stack([row["observation.state"].numpy() for row in late]), run["measured"].astype(np.float32))

    capfd.readouterr()
    assert replay.main([*ROBOT, f"--dataset={out}", "--episode=2", f"--record={tmp_path / 'replayed'}"]) == 0
    said = capfd.readouterr().out
    assert "ended by the end of the recording" in said
    assert "no keys" in said
    assert not {word for word in ("policy", "inference time", "per inference", "warming up", "checkpoint") if word in said}
    told = json.loads((tmp_path / "replayed" / "meta" / "modality.json").read_text())
    assert told == json.loads((out / "meta" / "modality.json").read_text())
    assert told["video"] == {"webcam": {"original_key": "observation.images.front"}}
    (entry,) = entries(tmp_path / "replayed")
    assert (entry["replay_of"], entry["replayed_episode"]) == (str(out), 2)
    assert "model_path" not in entry
    assert replay.main([*ROBOT, f"--dataset={out}", "--episode=3"]) == 2
    assert "0 to 2" in capfd.readouterr().err
    fast = Path(shutil.copytree(out, tmp_path / "fast"))
    (fast / "meta" / "info.json").write_text(json.dumps({**info(out), "fps": 300}))
    assert replay.main([*ROBOT, f"--dataset={fast}"]) == 1
    assert "300 Hz" in (said := capfd.readouterr().err)
    assert "--fps" not in said, "it has no such flag"

    monkeypatch.setattr(
        sys, "argv", ["open_loop.py", f"--model_path={CHECKPOINT}", f"--dataset={out}", "--episodes=0", f"--out={tmp_path / 'open_loop'}"]
    )
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "benchmarks" / "open_loop.py"), run_name="__main__")
    assert left.value.code == 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(cases_of(CHECKPOINT, 4, str(out))) == 4, "what calibration and verification read"
    assert not [warning for warning in told if "torchvision" in str(warning.message)], "about which reader lerobot uses"
