"""act_resolution: a whole run with small networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lerobot")
pytest.importorskip("num2words")

from benchmarks import act_resolution


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--resolutions", "256x192", "64x64", "--rounds=2", "--threads=1", "--device=cpu", "--json"]
    assert act_resolution.main([*flags, f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "act_resolution.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    act, smolvla = (result["networks"][name]["resolutions"] for name in ("act", "smolvla"))
    assert (act["256x192"]["tokens"], act["64x64"]["tokens"]) == (2 + 8 * 6, 2 + 2 * 2), "ResNet18 halves five times; latent and state"
    assert smolvla["256x192"]["tokens"] == smolvla["64x64"]["tokens"], "both are padded to one square"
    assert act["64x64"]["times_faster_than_first"]["training_step_ms"] > 1
    assert all(row["refill_ms"]["count"] == 2 for row in act.values())


@pytest.mark.parametrize(("flag", "named"), [("--resolutions=640", "WIDTHxHEIGHT"), ("--batch_size=0", "--batch_size"), ("--device=mps", "device")])
def test_flags_that_make_no_sense(flag: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert act_resolution.main([flag, f"--out={tmp_path}"]) in (1, 2)
    assert named in capsys.readouterr().err
