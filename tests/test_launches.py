"""What a GPU would be asked to do, on a machine without one: no operation mixes devices, attention is never masked, and launches are the committed
figures (benchmarks/results/launches.json), which stand in for milliseconds until a GPU gives some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux: pip install 'gr00t_fast[triton]'")

from compiled_kernels import with_8_bit_steps
from launches import CASES, OneCamera, counted, counting_triton, on_a_gpu_that_is_not_there, published_network, stages_of

from gr00t_fast.engine.fused import Kernels, fused_model
from gr00t_fast.engine.static_call import CallShape, StaticCall
from gr00t_fast.model import Network

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text())
# Which layers of a stage there are several of, and how many in the published network.
PUBLISHED_DEPTH = {
    "n1.5": {"encode_vision": 27, "encode_language": 12, "refine": 4, "velocity": 16},
    "n1.7": {"encode_vision": 24, "encode_language": 16, "refine": 4, "velocity": 32},
}


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of addresses, which tensors without memory have none of
        yield patch


@dataclass(frozen=True)
class Published:
    version: str
    model: Network

    @property
    def case(self) -> OneCamera:
        return CASES[self.version]

    @property
    def committed(self) -> dict[str, Any]:
        return COMMITTED[self.version]


@pytest.fixture(scope="module", params=["n1.5", "n1.7"])
def published(request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> Iterator[Published]:
    """The published network on a GPU that is not there; everything that runs meanwhile is on it too."""
    with on_a_gpu_that_is_not_there(patch):
        yield Published(request.param, published_network(request.param))


def launches_of_a_call(published: Published, towers: Kernels, steps: Kernels, continuation: str | None, patch: pytest.MonkeyPatch) -> int:
    case = published.case
    with torch.no_grad():
        shape = CallShape((case.frame,), case.prompt_tokens, case.image_tokens, 4, continuation)
        call = StaticCall(fused_model(published.model, towers, steps), shape)
    with counting_triton(patch) as triton:
        launches, mixed = counted(call.compute)
    assert mixed == []
    return launches + sum(triton.values())


@pytest.mark.parametrize("continuation", [None, "prefix"])
@pytest.mark.parametrize(("name", "towers", "steps"), [("cuda_graph", "torch", "torch"), ("cuda_graph+triton", "triton", "triton")])
def test_a_whole_call_launches_what_is_committed(
    published: Published, name: str, towers: Kernels, steps: Kernels, continuation: str | None, patch: pytest.MonkeyPatch
) -> None:
    found = launches_of_a_call(published, towers, steps, continuation, patch)
    assert found == published.committed["call_4_steps"][name]["prefix" if continuation else "plain"], (
        "correct benchmarks/results/launches.json if it is meant"
    )


def test_guidance_mixes_no_devices(published: Published, patch: pytest.MonkeyPatch) -> None:
    """Without its backward pass, which torch begins on a GPU that is there."""
    patch.setattr(torch.autograd, "grad", lambda end, start, gap: (torch.zeros_like(start),))
    for towers, steps in (("torch", "torch"), ("triton", "triton")):
        assert launches_of_a_call(published, towers, steps, "rtc", patch) > 1000


@pytest.mark.parametrize("name", ["cuda_graph", "cuda_graph+triton", "fp8"])
def test_stages_launch_what_is_committed(published: Published, name: str, patch: pytest.MonkeyPatch) -> None:
    """Of fp8 the step, which is not compiled."""
    made = with_8_bit_steps(published.model) if name == "fp8" else published.model
    kernels: Kernels = "torch" if name == "cuda_graph" else "triton"
    found = {}
    for stage, function, arguments in stages_of(fused_model(made, kernels, kernels), published.case):
        if name != "fp8" or stage == "velocity":
            with counting_triton(patch) as triton:
                launches, mixed = counted(lambda function=function, arguments=arguments: function(*arguments))
            assert mixed == []
            found[stage] = launches + sum(triton.values())
    assert found == {stage: published.committed["stages"][name][stage] for stage in found}, "correct benchmarks/results/launches.json if it is meant"


@pytest.mark.parametrize("version", ["n1.5", "n1.7"])
def test_compiled_stages_launch_what_is_committed(version: str) -> None:
    """Inductor lowers them for sm_90 at two depths; each further layer launches as many as the ones before."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-W", "ignore", "tests/lowering.py", version]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    few, more = CASES[version].depths
    depth, committed = PUBLISHED_DEPTH[version], COMMITTED[version]["stages"]
    whole = {
        format: {stage: low + (high - low) * (depth.get(stage, few) - few) // (more - few) for stage, (low, high) in stages.items()}
        for format, stages in found.items()
    }
    assert all((high - low) % (more - few) == 0 for stages in found.values() for low, high in stages.values())
    names = {"bf16": "compiled", "fp8": "fp8"}
    expected = {format: {stage: committed[names[format]][stage] for stage in stages} for format, stages in whole.items()}
    assert whole == expected, "correct benchmarks/results/launches.json if it is meant"


@pytest.mark.parametrize("version", ["n1.5", "n1.7"])
def test_the_committed_stages_add_up_to_the_committed_calls(version: str) -> None:
    """But for pixels, formats and joint units, which are the call's own, and an addition per step."""
    for name, calls in COMMITTED[version]["call_4_steps"].items():
        stages = COMMITTED[version]["stages"][name]
        total = sum(stages.values()) + 3 * stages["velocity"] + 4
        assert 0 < calls["plain"] - total < 20, name
