"""What the benchmarks have in common: one dialect of flags, where they write, the random checkpoint they measure, and results that stay readable."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import bench_engines, bench_policy, inference_profiler
from benchmarks.lib import work
from benchmarks.lib.program import PolicyFlags, in_processes, read_flags
from benchmarks.lib.reference import REFERENCE_HEAD
from benchmarks.lib.work import Ceilings, stage_work
from gr00t_fast.base.measurement import without_machine_paths
from gr00t_fast.engine import packed
from gr00t_fast.model import Gr00t
from gr00t_fast.networks import n1d5, n1d6, n1d7
from gr00t_fast.virtual.random_checkpoint import network_config


@dataclass
class Config(PolicyFlags):
    """Flags of a program."""

    latency_ms: list[float] = field(default_factory=lambda: [0.0, 50.0])  # injected
    engines: list[str] | None = None  # which
    out: Path = Path("outputs")  # where


def flags(*words: str) -> Config:
    return read_flags(Config, words, "What it does.")


@pytest.mark.parametrize(("words", "told"), [(["--presision=fp32"], "--precision"), (["--latency_ms", "soon"], "--latency_ms")])
def test_a_mistake_names_the_flag_and_ends_with_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        flags(*words)
    assert told in capsys.readouterr().err


def test_what_is_published_has_no_machine_paths() -> None:
    words = ["/root/x/study.py", "--out=/tmp/a b/c/", "--latency_ms", "800", "measured:/tmp/r.json#a.b", "outputs/x", "--server=tcp://a:1"]
    assert without_machine_paths(words) == "study.py --out=c --latency_ms 800 'measured:r.json#a.b' outputs/x --server=tcp://a:1"


@pytest.mark.slow
@pytest.mark.parametrize(("network", "modules"), [("n1.5", REFERENCE_HEAD), ("n1.7", "lerobot.policies.groot.groot_n1_7")])
def test_the_policy_benchmark_from_end_to_end(network: str, modules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its reference, each where its lerobot is installed."""
    pytest.importorskip(modules, exc_type=ImportError)
    words = ["--size=tiny", "--rounds=2", "--warm-up=1", "--device=cpu", "--precision=fp32", "--json", f"--network={network}", "--cameras=2"]
    assert bench_policy.main([*words, f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "bench_policy.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    assert {arm: stages["total"]["count"] for arm, stages in result["times_ms"].items()} == {"ours": 2, "reference": 2}
    assert result["difference"]["relative_to_displacement"] < 1e-4
    (path,) = (directory for directory in tmp_path.glob("checkpoint-tiny*"))
    words = [f"--model_path={path}", "--engines", "eager", "reference", "--rounds=2", "--frames=2", "--device=cpu", "--precision=fp32"]
    assert bench_engines.main([*words, f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "bench_engines.json").read_text())["engines"]["reference"]["within_limit"]


@pytest.mark.slow
def test_benchmarks_take_a_random_n1d7_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--network=n1.7", "--device=cpu", "--precision=fp32", "--threads=1", f"--out={tmp_path}"]
    assert bench_policy.main([*common, "--size=tiny", "--rounds=2", "--cameras=2", "--reference=false"]) == 0
    assert {"vision", "language", "refine", "denoise"} < json.loads((tmp_path / "bench_policy.json").read_text())["floor_ms"].keys()
    path = tmp_path / "checkpoint-tiny-n1.7"
    assert inference_profiler.main([*common[1:], f"--model_path={path}", "--rounds=50"]) == 0
    assert json.loads((tmp_path / "inference_profiler.json").read_text())["advice"][0]["actions_per_chunk"] == 16
    capsys.readouterr()
    if importlib.util.find_spec("lerobot.policies.groot.groot_n1_7") is None:
        assert bench_engines.main([*common, "--size=tiny", "--rounds=2", "--frames=2", "--engines", "reference"]) == 1
        assert "lerobot==0.6.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "tokens", "pictures", "gflop", "weight_gb", "floor_ms"),
    [
        (lambda: n1d5.read_config(*network_config("full", True)), (288, 256), 1, 887, 5.93, 1.43),
        (lambda: n1d6.read_config(*network_config("full", True, "n1.6")), (254, 216), 2, 1542, 9.3, 2.63),
        (lambda: n1d7.read_config(*network_config("full", True, "n1.7")), (79, 64), 1, 619, 9.74, 2.04),
        (lambda: n1d7.read_config(*network_config("full", True, "n1.7")), (145, 128), 2, 935, 9.74, 2.21),
    ],
    ids=["n1.5", "n1.6, two pictures", "n1.7", "n1.7, two pictures"],
)
def test_the_work_of_the_published_networks(config, tokens: tuple[int, int], pictures: int, gflop: float, weight_gb: float, floor_ms: float) -> None:
    """Four steps in bf16, and the floor on an H200, as docs/results.md has them; counted by hand, apart from this code, for N1.6
    and N1.7."""
    with torch.device("meta"):
        work = stage_work(Gr00t(config()).to(torch.bfloat16), *tokens, pictures, 4).values()
    assert sum(each.flop for each in work) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert sum(each.weight_bytes for each in work) / 1e9 == pytest.approx(weight_gb, rel=0.01)
    assert sum(each.floor_ms(Ceilings(989e12, 4.8e12)) for each in work) == pytest.approx(floor_ms, rel=0.01)


@pytest.mark.slow
def test_a_floor_is_measured_with_the_best_product_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU whose packed products take no time, the matrix rate is theirs."""
    plain, device = work.measure_ceilings(torch.device("cpu"), torch.float32), torch.device("cpu")

    def product(rows: torch.Tensor, weight: torch.Tensor, way: int, *rest: object) -> torch.Tensor:
        return rows if way else packed.product(rows, weight, way, *rest)

    monkeypatch.setattr(work, "product", product)
    monkeypatch.setattr(work, "packed", lambda weight, rows: weight)
    monkeypatch.setattr(work, "packing_obstacle", lambda dtype: "")
    assert work.measure_ceilings(device, torch.float32).flop_per_s > 100 * plain.flop_per_s
    monkeypatch.setattr(work, "packing_obstacle", lambda dtype: "not built in")
    assert work.measure_ceilings(device, torch.float32).flop_per_s < 10 * plain.flop_per_s
    monkeypatch.setattr(work, "product", lambda *_: pytest.fail("not in 8 bits"))
    assert work.measure_ceilings(device, torch.float32, int8=True).flop_per_s > plain.flop_per_s / 2  # without VNNI about twice


def test_an_interrupt_ends_the_processes() -> None:
    def jobs() -> Iterator[tuple[float]]:
        yield (600.0,)
        signal.raise_signal(signal.SIGINT)

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_processes(time.sleep, jobs(), 1))
    assert time.monotonic() - began_s < 300
    assert multiprocessing.active_children() == []
