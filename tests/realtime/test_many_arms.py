"""Several arms with one server, as benchmarks/ab_server.py --clients drives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ab_server
from benchmarks.lib.many_arms import simulate

GPU = {1: 0.100, 2: 0.105, 4: 0.120, 8: 0.160}


def missed(seconds: dict[int, float], most: int, chunk_s: float) -> list[float]:
    """Share of each of eight arms."""
    return [arm.missed / len(arm.latencies_s) for arm in simulate(seconds, most, 8, chunk_s, 120.0)]


def test_together_all_are_in_time_where_one_at_a_time_misses_more_than_half() -> None:
    assert max(missed(GPU, 8, 0.5)) == 0
    assert min(missed(GPU, 1, 0.5)) > 0.5


@pytest.mark.parametrize("most", [1, 8])
def test_a_load_that_cannot_be_met_is_shared_evenly(most: int) -> None:
    shares = missed(GPU, most, 0.2)
    assert min(shares) > 0.5
    assert max(shares) - min(shares) < 0.05
    served = [len(arm.latencies_s) for arm in simulate(GPU, most, 8, 0.2, 120.0)]
    assert max(served) - min(served) <= 1


@pytest.mark.slow
def test_the_program_from_end_to_end(tmp_path: Path) -> None:
    arguments = ["--clients=2", "--size=tiny", "--max_minutes=0.02", "--round_s=0.4", "--chunks=[4.0]", f"--out={tmp_path}"]
    assert ab_server.main(arguments) == 0
    result = json.loads((tmp_path / "ab_server.json").read_text())
    assert [row["server"] for row in result["rows"]] == ["one at a time", "together"]
    assert all(row["latency_ms"]["count"] > 2 for row in result["rows"])
    assert result["batch_ms"].keys() == {"1", "2", "4", "8"}
