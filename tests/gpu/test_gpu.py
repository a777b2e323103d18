"""What only a GPU can show: the same policy on CUDA gives the CPU's actions. Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gr00t_fast.policy import Gr00tPolicy, load_policy
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "demo")


def displacement(policy: Gr00tPolicy, noise: np.ndarray) -> np.ndarray:
    """Normalised actions less the noise they began from: what the network contributed."""
    policy.get_action(policy.example_observation(), noise=noise)
    low, high = (policy.metadata.action_statistics["single_arm"].min, policy.metadata.action_statistics["single_arm"].max)
    actions = policy.get_action(policy.example_observation(), noise=noise)["action.single_arm"]
    return (actions - low) / (high - low) * 2 - 1 - noise[0, :, :5]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_cuda_gives_the_actions_of_the_cpu(checkpoint: Path, precision: str, tolerance: float) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 16, 32)).astype(np.float32)
    expected = displacement(load_policy(checkpoint, device="cpu", precision="fp32"), noise)
    got = displacement(load_policy(checkpoint, device="cuda", precision=precision), noise)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < tolerance


def test_a_seed_means_the_same_noise_on_every_device(checkpoint: Path) -> None:
    on = {device: load_policy(checkpoint, device=device, precision="fp32", seed=3) for device in ("cpu", "cuda")}
    actions = {device: policy.get_action(policy.example_observation())["action.gripper"] for device, policy in on.items()}
    np.testing.assert_allclose(actions["cpu"], actions["cuda"], atol=0.05)


def test_batch_of_unequal_prompts_on_cuda(checkpoint: Path) -> None:
    policy = load_policy(checkpoint, device="cuda", precision="fp32")
    one, noise = policy.example_observation("pick"), np.random.default_rng(1).standard_normal((2, 16, 32)).astype(np.float32)
    two = {**one, "annotation.human.task_description": ["place the block in the bowl"]}
    both = {key: np.stack([value, value]) for key, value in one.items() if not key.startswith("annotation")}
    both["annotation.human.task_description"] = ["pick", "place the block in the bowl"]
    together = policy.get_action(both, noise=noise)["action.single_arm"]
    for index, single in enumerate((one, two)):
        alone = policy.get_action(single, noise=noise[index : index + 1])["action.single_arm"]
        np.testing.assert_allclose(together[index], alone, atol=0.05)
