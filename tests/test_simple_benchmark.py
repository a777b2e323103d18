"""The policy benchmark: steps and refills are told apart by the queue, failures are counted, and the real architectures answer."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import simple_benchmark
from benchmarks.policy_zoo import BUILDERS, JOINTS, Setting, observation_of


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


def arguments(steps: int = 12, minutes: float = 1.0) -> argparse.Namespace:
    return argparse.Namespace(steps=steps, minutes=minutes)


def test_what_a_call_was_is_read_from_the_queue() -> None:
    times, failures, stopped = simple_benchmark.time_calls(SlowStepArm(), [{}], arguments())
    assert (len(times["refill"]), len(times["step"]), failures, stopped) == (3, 9, [], False)
    assert max(times["refill"]) < min(times["step"])


def test_failures_are_counted_and_told() -> None:
    times, failures, _ = simple_benchmark.time_calls(SlowStepArm(broken=2, bad=5), [{}], arguments(steps=8))
    assert sum(map(len, times.values())) == 6
    assert "out of memory" in failures[0]
    assert "NaN" in failures[1]


def test_a_time_limit_is_kept_and_said() -> None:
    times, _, stopped = simple_benchmark.time_calls(SlowStepArm(), [{}], arguments(steps=10**6, minutes=0.05 / 60))
    assert stopped
    assert 1 <= sum(map(len, times.values())) < 10**4


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
