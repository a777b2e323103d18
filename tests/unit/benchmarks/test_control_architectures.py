"""The study of control architectures: whole runs in virtual time, one in real time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import control_architectures


def run(out: Path, *flags: str) -> dict[tuple[str, str, str, int], dict[str, float]]:
    assert control_architectures.main([*flags, f"--out={out}"]) == 0
    rows = json.loads((out / "control_architectures.json").read_text())["rows"]
    keys = [(row["scene"], row["architecture"], row.get("delay", ""), row.get("actions_per_chunk", 0)) for row in rows]
    return {key: {name: figure["mean"] for name, figure in row["figures"].items()} for key, row in zip(keys, rows, strict=True)}


@pytest.mark.slow
def test_a_run_shows_what_each_architecture_costs(tmp_path: Path) -> None:
    rows = run(tmp_path, "--virtual", "--rounds=2", "--seconds=5")
    for scene in ("moving", "still"):
        floor, sync, threaded = rows[scene, "floor", "", 0], rows[scene, "sync", "800 ms", 100], rows[scene, "threaded", "800 ms", 100]
        assert floor["mae_aligned"] < threaded["mae_aligned"]
        assert threaded["frozen_ticks"] == 0, "a chunk that lasts twice the delay bridges it"
        assert sync["frozen_ticks"] > 35
        assert rows[scene, "threaded", "800 ms", 50]["never_played_s"] > 0.5
        assert rows[scene, "naive_async", "800 ms", 50]["went_back_s"] > 0
    assert rows["moving", "threaded", "800 ms", 100]["mae_raw"] < rows["moving", "sync", "800 ms", 100]["mae_raw"]
    assert rows["still", "sync", "800 ms", 50]["duration_s"] > rows["still", "sync", "0 ms", 50]["duration_s"] + 2
    assert rows["moving", "sync", "0 ms", 50]["tracking_delay_s"] == pytest.approx(0.06, abs=0.03), "the arm's own lag"
    table = (tmp_path / "control_architectures.md").read_text()
    assert "| moving | 800 ms | 100 | 84 | threaded |" in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "control_architectures.png").stat().st_size > 10_000
