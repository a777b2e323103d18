"""`gr00t-fast tune`: what wins, what can never win, and what becomes of the configuration file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gr00t_fast.cli.config_file import updated, write_settings
from gr00t_fast.cli.main import main
from gr00t_fast.errors import ConfigError

TRAINED = Path(__file__).parent.parent / "checkpoints" / "so100-sim-reach"
FILE = """# my arm
robot:
  type: so100_sim            # on the desk
engine: eager     # until something better
dtype: fp32
lang_instruction: "yes"
"""


def test_a_file_keeps_its_comments_its_order_and_its_other_settings() -> None:
    changed = updated(FILE, {"engine": "openvino", "engine_path": "a: b", "precision": "auto", "denoising_steps": 2})
    assert "engine: openvino     # until something better" in changed
    assert "precision: auto" in changed
    assert "dtype" not in changed
    assert changed.startswith("# my arm\nrobot:\n  type: so100_sim            # on the desk\n")
    read = yaml.safe_load(changed)
    assert (read["engine_path"], read["denoising_steps"], read["lang_instruction"]) == ("a: b", 2, "yes")
    assert updated(changed, {"engine": "openvino"}) == changed


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{engine: eager, seed: 3}\n", "engine:\nseed: 3\n", "seed: 3"])
def test_files_of_every_form_are_written(text: str) -> None:
    before = yaml.safe_load(text) or {}
    assert yaml.safe_load(updated(text, {"engine": "eager", "engine_path": None})) == {**before, "engine": "eager", "engine_path": None}


def test_no_earlier_file_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    assert write_settings(path, {"seed": 1}) is None
    first, second = write_settings(path, {"seed": 2}), write_settings(path, {"seed": 3})
    assert (first.read_text(), second.read_text(), path.read_text()) == ("seed: 1\n", "seed: 2\n", "seed: 3\n")
    with pytest.raises(ConfigError):
        updated("- a list\n", {"seed": 1})


def test_an_engine_whose_error_is_above_its_limit_or_that_cannot_smooth_never_wins() -> None:
    pytest.importorskip("torch")
    from types import SimpleNamespace

    from gr00t_fast.cli.tuning import winner

    def arm(ms: float, within: bool, continues: set[str]) -> dict[str, Any]:
        return {"within_limit": within, "times_ms": {"4": {"p50": ms}}, "policy": SimpleNamespace(continues=continues)}

    arms = {"eager": arm(9, True, {"rtc", "prefix"}), "quick": arm(5, True, {"prefix"}), "wrong": arm(1, False, {"rtc", "prefix"})}
    assert winner(arms, "", {}) == "quick"
    assert winner(arms, "rtc", refused := {}) == "eager"
    assert "--smoothing=rtc" in str(refused)
    assert winner({"wrong": arms["wrong"]}, "", {}) is None


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        ([], "--model_path"),
        ([f"--model_path={TRAINED}"], "--observations"),
        (["--config_path=report.json"], "YAML"),
        ([f"--model_path={TRAINED}", "--observations=random:0", "--max_minutes=0"], "--max_minutes"),
    ):
        assert main(["tune", *words]) == 2
        assert named in capsys.readouterr().err


def test_the_winner_is_written_and_what_was_made_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs `pip install 'gr00t_fast[export]'`")
    shutil.copytree(TRAINED, tmp_path / "checkpoint")
    file = tmp_path / "my.yaml"
    file.write_text(f"{FILE}model_path: {tmp_path / 'checkpoint'}\n")
    few = ["--frames=8", "--rounds=10", "--allow_few", "--calibration_frames=8", "--trial_frames=1", "--max_minutes=15"]
    words = ["tune", f"--config_path={file}", "--observations=random:0", "--engines=eager,onnxruntime", *few, f"--out={tmp_path / 'out'}"]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert set(result["engines"]) == {"eager", "onnxruntime fp32", "onnxruntime int8"}
    best = result["engines"][result["winner"]]
    assert best["within_limit"]
    assert all(best["times_ms"]["4"]["p50"] <= arm["times_ms"]["4"]["p50"] for arm in result["engines"].values() if arm["within_limit"])
    written = yaml.safe_load(file.read_text())
    assert written["engine"] == result["settings"]["engine"]
    assert "# until something better" in file.read_text()
    assert (tmp_path / "my.yaml.bak").read_text().startswith(FILE)
    assert "making it" in told.err
    assert main(words) == 0
    assert "is there and fits, kept" in capsys.readouterr().err
