"""The policy benchmark: steps and refills are told apart by the queue, and the real architectures answer."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import simple_benchmark
from benchmarks.lib.policy_zoo import BUILDERS, JOINTS, Setting, observation_of


class SlowStepArm:
    """Its steps take longer than its refills: whoever guesses from time gets it wrong. Call number `bad` answers NaN."""

    actions_per_chunk = 4

    def __init__(self, bad: int = -1) -> None:
        self.waiting, self.calls, self.bad = 0, 0, bad

    def act(self, observation: dict) -> np.ndarray:
        self.calls += 1
        if not self.waiting:
            self.waiting = self.actions_per_chunk
        else:
            time.sleep(0.002)
        self.waiting -= 1
        return np.full(JOINTS, np.nan if self.calls == self.bad else 0.0)


def test_what_a_call_was_is_read_from_the_queue() -> None:
    times = simple_benchmark.time_calls(SlowStepArm(), [{}], 12)
    assert (len(times["refill"]), len(times["step"])) == (3, 9)
    with pytest.raises(ValueError, match="call 4"):
        simple_benchmark.time_calls(SlowStepArm(bad=5), [{}], 12)


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
