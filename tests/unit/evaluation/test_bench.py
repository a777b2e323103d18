"""`gr00t-fast bench --make` and `tune`: what is made, what can win, and what is told to paste."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from gr00t_fast.cli.main import main
from gr00t_fast.evaluation.bench import fastest

TRAINED = Path(__file__).resolve().parents[3] / "checkpoints" / "so100-sim-reach"


def test_an_engine_whose_error_is_above_its_limit_never_wins() -> None:
    def arm(ms: float, within: bool) -> dict[str, object]:
        return {"within_limit": within, "times_ms": {"4": {"p50": ms}}}

    arms = {"eager": arm(9, True), "quick": arm(5, True), "wrong": arm(1, False)}
    assert fastest({"engines": arms}) == "quick"
    assert fastest({"engines": arms}, apart_from="quick") == "eager"
    assert fastest({"engines": {"wrong": arms["wrong"]}}) is None


@pytest.mark.slow
def test_what_is_needed_is_made_once_and_the_settings_of_the_fastest_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    shutil.copytree(TRAINED, tmp_path / "checkpoint")
    file = tmp_path / "my.yaml"
    file.write_text(f"robot: {{type: so100_sim}}\nlang_instruction: go\nmodel_path: {tmp_path / 'checkpoint'}\n")
    few = ["--frames=4", "--rounds=5", "--engines=eager,onnxruntime,tensorrt", f"--out={tmp_path / 'out'}"]
    words = [f"--config_path={file}", "--observations=random:0", *few]
    assert main(["tune", *words, "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert set(result["engines"]) == {"eager", "onnxruntime fp32", "onnxruntime int8"}
    assert "tensorrt" in result["refused"]
    assert "making it" in told.err
    best = result["engines"][result["winner"]]
    assert best["within_limit"]
    assert all(best["times_ms"]["4"]["p50"] <= arm["times_ms"]["4"]["p50"] for arm in result["engines"].values() if arm["within_limit"])
    pasted = (tmp_path / "out" / "tune.md").read_text().partition("for the file of your runs:\n")[2]
    assert yaml.safe_load(pasted) == result["settings"]
    assert result["settings"]["engine"] == best["engine"]
    assert main(["bench", "--make", *words]) == 0
    assert "is there and fits, kept" in capsys.readouterr().err


def test_observations_of_another_robot_are_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TRAINED, tmp_path / "checkpoint")
    rows = {"state.single_arm": np.full((20, 5), 9000.0), "state.gripper": np.full((20, 1), 50.0)}
    np.savez(tmp_path / "episode.npz", **{"video.webcam": np.zeros((20, 48, 64, 3), np.uint8), "annotation.human.task_description": "Reach"}, **rows)
    assert main(["tune", f"--model_path={tmp_path / 'checkpoint'}", f"--observations={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert "far outside the checkpoint's training range" in told
    assert "making it" not in told
    assert not (tmp_path / "checkpoint" / "exports").exists()
