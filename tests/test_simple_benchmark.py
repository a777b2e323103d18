"""The policy benchmark: steps and refills are told apart by the queue, failures are counted, and the real architectures answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import simple_benchmark, verify_benchmark_setup
from benchmarks.lib.policy_zoo import BUILDERS, JOINTS, Setting, observation_of


class SlowStepArm:
    """Its steps take longer than its refills: whoever guesses from time gets it wrong. Call number `broken` fails."""

    name, dtype, parameters, actions_per_chunk = "slow", "float32", 0, 4

    def __init__(self, broken: int = -1, bad: int = -1) -> None:
        self.waiting, self.calls, self.broken, self.bad = 0, 0, broken, bad

    def act(self, observation: dict) -> np.ndarray:
        self.calls += 1
        if self.calls == self.broken:
            raise RuntimeError("out of memory")
        if not self.waiting:
            self.waiting = self.actions_per_chunk
        else:
            time.sleep(0.002)
        self.waiting -= 1
        return np.full(JOINTS, np.nan if self.calls == self.bad else 0.0)

    def reset(self) -> None:
        self.waiting = 0


def arguments(rounds: int = 12, minutes: float = 1.0) -> simple_benchmark.Config:
    return simple_benchmark.Config(rounds=rounds, max_minutes=minutes)


def test_what_a_call_was_is_read_from_the_queue() -> None:
    times, failures, stopped = simple_benchmark.time_calls(SlowStepArm(), [{}], arguments())
    assert (len(times["refill"]), len(times["step"]), failures, stopped) == (3, 9, [], False)
    assert max(times["refill"]) < min(times["step"])


def test_a_time_limit_is_kept_and_said() -> None:
    times, _, stopped = simple_benchmark.time_calls(SlowStepArm(), [{}], arguments(rounds=10**6, minutes=0.05 / 60))
    assert stopped
    assert 1 <= sum(map(len, times.values())) < 10**4


def test_a_policy_that_cannot_be_built_costs_its_own_row_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gr00t-tiny-so100_dualcam").write_text("no directory")  # GR00T's random checkpoint cannot be written there
    flags = ["--policies", "act", "gr00t", "--steps=3", "--json", "--resolution=96x64", "--threads=1", "--device=cpu", f"--out={tmp_path}"]
    assert simple_benchmark.main(flags) == 1
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result["policies"]["act"]["refill_ms"]["count"] >= 1
    assert "not measured: " in result["policies"]["gr00t"]["failures"][0]
    assert result["policies"]["gr00t"]["refill_ms"] is None
    assert "not in turns" in shown
    assert "tokenizer" in shown
    assert json.loads((tmp_path / "simple_benchmark.json").read_text())["policies"].keys() == {"act", "gr00t"}


FLAGS = ["--policies", "act", "gr00t", "diffusion", "--device=cpu", "--json"]
ROW = {"dtype": "float32", "parameters": 1, "actions_per_chunk": 2, "memory_bytes": 1, "build_s": 0.1, "amortised_ms_per_tick": 1.0}
CALLS = {f"{kind}_ms": simple_benchmark.statistics_of([1.0, 2.0]) for kind in ("step", "refill", "all")}


def row(name: str, stopped_early: bool = False) -> dict:
    return {"name": name, "network": f"{name}_network", **ROW, **CALLS, "success_rate": 1.0, "failures": [], "stopped_early": stopped_early}


@pytest.mark.parametrize("at", ["act", "gr00t"])
def test_an_interrupt_leaves_the_policies_that_are_finished(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def measured(name: str, *_: object) -> dict:
        if name == at:
            raise KeyboardInterrupt
        return row(name, stopped_early=True)

    monkeypatch.setattr(simple_benchmark, "measure_alone", measured)
    (tmp_path / "simple_benchmark.png").write_bytes(b"of an earlier run")
    assert simple_benchmark.main([*FLAGS, f"--out={tmp_path}"]) == 130
    shown = capsys.readouterr()
    if at == "act":
        assert "nothing was written" in shown.err
        assert [file.name for file in tmp_path.iterdir()] == ["simple_benchmark.png"]
        return
    assert f"1 of 3 policies are in {tmp_path / 'simple_benchmark.json'}, marked as unfinished" in shown.err
    result = json.loads((tmp_path / "simple_benchmark.json").read_text())
    assert (list(result["policies"]), result["unfinished"]) == (["act"], ["gr00t", "diffusion"])
    assert json.loads(shown.out.splitlines()[-1])["unfinished"] == result["unfinished"]
    for table in (shown.out, (tmp_path / "simple_benchmark.md").read_text()):
        assert "UNFINISHED: interrupted before gr00t, diffusion" in table
        assert "act* " in table
        assert "* stopped by --max_minutes" in table
    assert "gr00t,not measured yet,0" in (tmp_path / "simple_benchmark.csv").read_text()
    assert not (tmp_path / "simple_benchmark.png").exists()


def test_an_interrupt_from_outside_ends_the_policy_that_runs(tmp_path: Path) -> None:
    program = [sys.executable, simple_benchmark.__file__, *FLAGS, "--rounds=100000000", "--resolution=96x64", "--threads=1", f"--out={tmp_path}"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and _children(running.pid) == 0 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        try:
            os.kill(running.pid, signal.SIGINT)  # to the parent alone: the policy would go on for ten minutes
            _, told = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert told.splitlines()[-1].startswith("interrupted before a policy was finished")
    assert "Traceback" not in told


def _children(pid: int) -> int:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return len(listed.read_text().split()) if listed.exists() else 0


def test_an_interrupted_check_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_benchmark_setup, "_policy", interrupted)
    assert verify_benchmark_setup.main(["--device=cpu"]) == 130
    assert capsys.readouterr().err == "interrupted: not everything was checked\n"


def test_amortised_cost_counts_one_refill_per_chunk() -> None:
    assert simple_benchmark.amortised_ms({"refill": [100.0], "step": [1.0, 1.0]}, 50) == pytest.approx(149 / 50)
    assert simple_benchmark.amortised_ms({"refill": [100.0], "step": []}, 1) == 100.0
    assert simple_benchmark.amortised_ms({"refill": [], "step": [1.0]}, 50) is None


@pytest.mark.parametrize("name", BUILDERS)
def test_each_architecture_answers_and_its_queue_is_seen(name: str, tmp_path: Path) -> None:
    setting = Setting(False, ("front", "wrist"), (96, 64), torch.device("cpu"), torch.float32, tmp_path)
    observation, arm = observation_of(setting, np.random.default_rng(0)), BUILDERS[name](setting)
    assert arm.waiting == 0
    for left in range(arm.actions_per_chunk - 1, arm.actions_per_chunk - 4, -1):
        action = arm.act(observation)
        assert action.shape == (JOINTS,)
        assert np.isfinite(action).all()
        assert arm.waiting == left
    arm.reset()
    assert arm.waiting == 0
    assert arm.parameters > 10_000
