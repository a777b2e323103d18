"""Chunks that continue another one: nothing changes without, committed actions come out the same with, and the joint is smooth.

The algorithm is tried on a flow whose answer is known (SmoothFlow), the wiring on a network with random weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix, NetworkName
from gr00t_fast.base.errors import ConfigError, ObservationError
from gr00t_fast.engine.eager import Continuation, denoise_towards, prefix_weights
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

LENGTH_ROWS = 6.0  # over which actions stay similar: a fifth of a second at 30 Hz
ROUGHNESS = 0.01  # deviation of the white part; the smooth part has 0.5 (joints then use about half of their range)
DEVIATION = 0.5
HORIZON = 16


class SmoothFlow:
    """The exact flow from noise to chunks whose rows are alike, callable as `velocity(actions (B, H, A), step)` for `steps` Euler steps."""

    def __init__(self, horizon: int, steps: int) -> None:
        rows = torch.arange(horizon, dtype=torch.float64)
        self.covariance = DEVIATION**2 * torch.exp(-0.5 * ((rows[:, None] - rows) / LENGTH_ROWS) ** 2) + ROUGHNESS**2 * torch.eye(horizon)
        self.steps = steps
        self._matrices = [self._matrix(step / steps) for step in range(steps)]

    def _matrix(self, t: float) -> torch.Tensor:
        s, one = self.covariance, torch.eye(len(self.covariance), dtype=torch.float64)
        return ((t * s - (1 - t) * one) @ torch.linalg.inv(t**2 * s + (1 - t) ** 2 * one)).float()

    def __call__(self, actions: torch.Tensor, step: int) -> torch.Tensor:
        return self._matrices[step] @ actions


@pytest.mark.parametrize(("delay", "overlap"), [(4, 12), (0, 0), (0, 16), (16, 16), (8, 8)])
def test_the_mask_is_committed_then_fading_then_free(delay: int, overlap: int) -> None:
    mask = prefix_weights(16, delay, overlap)
    assert mask[:delay].tolist() == [1.0] * delay
    assert not mask[overlap:].any()
    for row in range(delay, overlap):  # the paper's formula
        c = (overlap - row) / (overlap - delay + 1)
        assert mask[row] == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1))


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def goal_of(rows: torch.Tensor, delay: int) -> Continuation:
    """rows (L, A) are known."""
    actions = torch.zeros(1, HORIZON, rows.shape[1])
    actions[0, : len(rows)] = rows
    return Continuation(actions, prefix_weights(HORIZON, delay, len(rows))[:, None].expand(-1, rows.shape[1]))


class TestFlow:
    """On the flow whose conditional distribution is known."""

    def velocity_changes(self, continuing: bool, delay: int, boundaries: int = 60) -> np.ndarray:
        """Change of the commanded velocity at each boundary, the largest joint, when thinking never stops and each chunk takes `delay` ticks."""
        flow, generator = SmoothFlow(HORIZON, 4), torch.Generator().manual_seed(7)
        elapsed = max(1, delay)  # rows of a chunk that play
        played: list[torch.Tensor] = []
        rest = torch.empty(0, 6)
        for _ in range(boundaries + 1):
            noise = torch.randn(1, HORIZON, 6, generator=generator)
            continuation = goal_of(rest if continuing else rest[:0], min(delay, len(rest)) if continuing else 0)
            chunk = denoise_towards(flow, noise, 4, continuation)[0]
            chunk[: min(delay, len(rest))] = rest[: min(delay, len(rest))]  # what plays while the network thinks
            played.append(chunk[:elapsed])
            rest = chunk[elapsed:]
        second = torch.cat(played).diff(n=2, dim=0).abs().amax(1).numpy()  # entry i is about tick i + 2
        return second[2 * elapsed - 2 :: elapsed]  # the first chunk joins nothing; the second one's own rows begin at tick 2 * elapsed

    @pytest.mark.parametrize("delay", [0, 3, 6, 7, 8])
    def test_the_change_of_velocity_at_a_boundary_is_cut(self, delay: int) -> None:
        """At delays of 7 and 8 of sixteen rows, about half of which a new chunk may still change, the factor sinks to 2.7 and 1.6."""
        plain, smooth = self.velocity_changes(False, delay), self.velocity_changes(True, delay)
        assert len(plain) >= 50
        cut = plain.max() / smooth.max()
        assert cut > (3 if delay <= 6 else 2 if delay == 7 else 1.4)


@pytest.fixture(scope="module", params=get_args(NetworkName))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", network=request.param)


@pytest.fixture(scope="module")
def policy(checkpoint: Path):
    return load_policy(checkpoint, device="cpu", precision="fp32", seed=0)


def noise_of(policy: Gr00tPolicy, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, *policy.chunk_shape)).astype(np.float32)


def observation(seed: int, batch: int | None = None) -> dict:
    rng = np.random.default_rng(seed)
    lead = (1,) if batch is None else (batch, 1)
    return {
        "video.webcam": rng.integers(0, 255, (*lead, 480, 640, 3), dtype=np.uint8),
        "state.single_arm": rng.uniform(-20, 20, (*lead, 5)),
        "state.gripper": rng.uniform(0, 60, (*lead, 1)),
        "annotation.human.task_description": ["go"] * (batch or 1),
    }


def later(actions: dict[str, np.ndarray], elapsed: int) -> dict[str, np.ndarray]:
    return {key: rows[..., elapsed:, :] for key, rows in actions.items()}


def joined(actions: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([actions["action.single_arm"], actions["action.gripper"]], axis=-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_off_is_bit_identical(checkpoint: Path, precision: str) -> None:
    """No prefix, one without rows, and a call after a continued one: all the same bits as a policy that never heard of it."""
    fresh, used = (load_policy(checkpoint, device="cpu", precision=precision, seed=0) for _ in range(2))
    noise = noise_of(fresh)
    expected = joined(fresh.get_action(observation(1), noise=noise))
    empty = {"action.single_arm": np.empty((0, 5), np.float32), "action.gripper": np.empty((0, 1), np.float32)}
    used.get_action(observation(2), noise=noise, prefix=ActionPrefix(later(fresh.get_action(observation(2)), 4), 4))
    assert np.array_equal(joined(used.get_action(observation(1), noise=noise)), expected)
    assert np.array_equal(joined(used.get_action(observation(1), noise=noise, prefix=ActionPrefix(empty, 0))), expected)


@pytest.mark.parametrize(("precision", "action_horizon", "delay"), [("fp32", None, 0), ("fp32", None, 8), ("bf16", None, 3), ("fp32", 10, 3)])
def test_committed_actions_come_out_exactly(checkpoint: Path, precision: str, action_horizon: int | None, delay: int) -> None:
    policy = load_policy(checkpoint, device="cpu", precision=precision, action_horizon=action_horizon, seed=0)
    old = later(policy.get_action(observation(1)), delay if action_horizon is None else 2)
    new = policy.get_action(observation(2), noise=noise_of(policy), prefix=ActionPrefix(old, delay))
    assert np.array_equal(joined(new)[:delay], joined(old)[:delay])
    assert joined(new).shape == (action_horizon or HORIZON, 6)


def test_batched_as_single(policy) -> None:
    old = [policy.get_action(observation(seed)) for seed in (1, 2)]
    prefix = ActionPrefix({key: np.stack([later(a, 4)[key] for a in old]) for key in old[0]}, 3)
    single, noise = observation(5), noise_of(policy)
    both = {key: np.stack([value, value]) if isinstance(value, np.ndarray) else value * 2 for key, value in single.items()}
    got = joined(policy.get_action(both, noise=np.concatenate([noise, noise]), prefix=prefix))
    for index, actions in enumerate(old):
        alone = joined(policy.get_action(single, noise=noise, prefix=ActionPrefix(later(actions, 4), 3)))
        assert np.allclose(got[index], alone, atol=2e-2)  # degrees; products of other shapes round differently


GOOD = {"action.single_arm": np.zeros((8, 5), np.float32), "action.gripper": np.zeros((8, 1), np.float32)}


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        (ActionPrefix({"action.single_arm": GOOD["action.single_arm"]}, 1), "action.gripper"),
        (ActionPrefix({**GOOD, "action.gripper": np.zeros((7, 1), np.float32)}, 1), "equal length"),
        (ActionPrefix({**GOOD, "action.gripper": np.full((8, 1), np.nan, np.float32)}, 1), "finite"),
        (ActionPrefix(GOOD, 9), "delay"),
    ],
)
def test_a_prefix_that_makes_no_sense(policy, prefix: ActionPrefix, says: str) -> None:
    with pytest.raises(ObservationError, match=says):
        policy.get_action(observation(1), prefix=prefix)


def test_an_engine_that_cannot(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(policy.engine), "continues", False)
    with pytest.raises(ConfigError, match="--engine=eager"):
        policy.get_action(observation(1), prefix=ActionPrefix(GOOD, 1))
    policy.get_action(observation(1), prefix=ActionPrefix({key: rows[:0] for key, rows in GOOD.items()}, 0))  # no rows: the same as no prefix
