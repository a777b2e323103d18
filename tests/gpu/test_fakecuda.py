"""What engines ask of a CUDA device, on one that is not there: no recording holds what CUDA refuses, a call is one upload, one launch, one download
and one wait, a second one allocates nothing, and graphs and memory are the committed figures (tests/golden/gpu_graphs.json), which stand in
for milliseconds until a GPU gives some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakecuda
import pytest
import torch

if (_why := fakecuda.missing()) is not None:
    pytest.skip(f"the stand-in for CUDA {_why}", allow_module_level=True)

LIMIT_S = 600  # each takes seconds; Inductor, of a few layers, some twenty
ONE_CALL = {"memcpyAsync pinned->device": 1, "graph launch": 1, "memcpyAsync device->pinned": 1, "cudaEventSynchronize": 1}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakecuda.build(tmp_path_factory.mktemp("fakecuda"))


def python(library: Path, *arguments: str, devices: int = 1, **device: float) -> subprocess.CompletedProcess:
    environment = {**fakecuda.environment(library, **device), "FAKECUDA_DEVICES": str(devices)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=fakecuda.ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def found(library: Path) -> dict[str, dict[str, Any]]:
    """Graphs at the published size, and with few layers what Inductor compiles. GR00T_FAST_COMPILE=1: all of it at the published size."""
    quick = "GR00T_FAST_COMPILE" not in os.environ
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda group: fakecuda.run(library, group, LIMIT_S if quick else 3600), fakecuda.groups(quick))
        return {name: figures for result in results for name, figures in result.items()}


def comparable(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Without memory where a network is short: it depends on the engines that ran before in its process."""
    return {key: value for key, value in figures.items() if "short" not in name or not key.endswith("_gb")}


@pytest.mark.slow
def test_what_engines_ask_a_gpu_for(found: dict[str, dict[str, Any]]) -> None:
    """A second call allocates nothing."""
    for name, figures in found.items():
        assert (name, figures["violations"], figures["second_call"], figures["second_call_allocations"]) == (name, 0, ONE_CALL, 0)


@pytest.mark.slow
def test_graphs_and_memory_of_what_engines_ask_a_gpu_for_are_the_committed_ones(found: dict[str, dict[str, Any]]) -> None:
    committed = json.loads(fakecuda.COMMITTED.read_text())
    if committed["torch"] != torch.__version__:
        pytest.skip(f"the figures are of torch {committed['torch']}, and this is {torch.__version__}")
    assert len(found) >= 8
    here = {name: comparable(name, figures) for name, figures in found.items()}
    there = {name: comparable(name, committed["cases"].get(name, {})) for name in found}
    assert here == there, "if it is meant: python tests/support/fakecuda.py"


@pytest.mark.slow
def test_recordings_and_stages_on_the_stand_in(library: Path) -> None:
    """The tests of tests/gpu/on_fakecuda."""
    done = python(library, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/on_fakecuda", devices=2)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
