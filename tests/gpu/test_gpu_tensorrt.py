"""TensorRT engines on a GPU: built for it, loaded and compared with the plain model. Run by `make gpu-check`.

Needs onnx, onnxscript and a TensorRT that knows the GPU: `tensorrt_rtx` for GeForce and RTX, `tensorrt` for the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine import tensorrt_library as library
from gr00t_fast.engine.manifest import target_of
from gr00t_fast.export import BuildOptions, OnnxOptions
from gr00t_fast.export.tensorrt import build_engines, rtx_capabilities
from gr00t_fast.policy import Gr00tPolicy, load_policy
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.gpu
TOLERANCE = 0.05  # of the displacement: 16-bit against fp32, as in test_gpu.py
OTHER = "pick up the red cube and put it down gently beside the bowl"


@pytest.fixture(scope="module")
def builder() -> str:
    """The installed library that builds for this GPU."""
    here = library.gpu_capability()
    if library.RTX in library.installed() and here in rtx_capabilities(library.load(library.RTX)):
        return library.RTX
    if library.STANDARD in library.installed():
        return library.STANDARD
    pytest.skip(f"no TensorRT for compute capability {here}: pip install 'gr00t_fast[tensorrt_rtx]' (RTX) or 'gr00t_fast[tensorrt]' (others)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "demo")


@pytest.fixture(scope="module")
def engines(checkpoint: Path, builder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp16 engines for this GPU."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs `pip install 'gr00t_fast[export]'`")
    from exports import network_inputs

    from gr00t_fast.export.onnx import export_onnx
    from gr00t_fast.export.verify import transforms_only

    graphs, out = (tmp_path_factory.mktemp(name) / "export" for name in ("graphs", "engines"))
    target = target_of(open_checkpoint(checkpoint), "new_embodiment", "so100")
    policy = transforms_only(checkpoint)
    source = export_onnx(target, OnnxOptions(out=graphs, precision="fp16"), network_inputs(policy, policy.example_observation()), "test")
    build_engines(graphs, source, BuildOptions(out=out, builder=builder), "test")
    return out


@pytest.fixture(scope="module")
def policy(checkpoint: Path, engines: Path) -> Gr00tPolicy:
    return load_policy(checkpoint, engine="tensorrt", engine_path=engines, seed=0)


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Gr00tPolicy:
    return load_policy(checkpoint, device="cpu", precision="fp32", engine="eager", seed=0)


def noise_of(seed: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 16, 32)).astype(np.float32)


def displacement(policy: Gr00tPolicy, noise: np.ndarray, instruction: str = "pick") -> np.ndarray:
    """Normalised actions less the noise they began from: what the network contributed."""
    actions = policy.get_action(policy.example_observation(instruction), noise=noise)["action.single_arm"]
    statistics = policy.metadata.action_statistics["single_arm"]
    return (actions - statistics.min) / (statistics.max - statistics.min) * 2 - 1 - noise[0, :, :5]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("instruction", ["pick", OTHER])
def test_tensorrt_gives_the_actions_of_the_plain_model(policy: Gr00tPolicy, eager: Gr00tPolicy, steps: int, instruction: str) -> None:
    policy.denoising_steps = eager.denoising_steps = steps
    expected = displacement(eager, noise_of(steps), instruction)
    got = displacement(policy, noise_of(steps), instruction)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < TOLERANCE


def test_calls_do_not_see_each_other(policy: Gr00tPolicy) -> None:
    """Prompt lengths and step counts by turns, each with its own noise: every call repeats exactly."""
    calls = [(4, "pick", 1), (2, OTHER, 2), (4, OTHER, 3), (1, "pick", 4)]
    rounds = []
    for _ in range(3):
        found = []
        for steps, instruction, seed in calls:
            policy.denoising_steps = steps
            found.append(displacement(policy, noise_of(seed), instruction))
        rounds.append(found)
    for later in rounds[1:]:
        for first, again in zip(rounds[0], later, strict=True):
            np.testing.assert_array_equal(first, again)


def test_a_batch_of_unequal_prompts_gives_each_its_own_actions(policy: Gr00tPolicy) -> None:
    policy.denoising_steps = 4
    one, noise = policy.example_observation("pick"), noise_of(1, batch=2)
    two = {**one, "annotation.human.task_description": [OTHER]}
    both = {key: np.stack([value, value]) for key, value in one.items() if not key.startswith("annotation")}
    both["annotation.human.task_description"] = ["pick", OTHER]
    together = policy.get_action(both, noise=noise)["action.single_arm"]
    for index, single in enumerate((one, two)):
        alone = policy.get_action(single, noise=noise[index : index + 1])["action.single_arm"]
        np.testing.assert_array_equal(together[index], alone)


def test_a_chunk_is_continued_as_by_the_plain_model(policy: Gr00tPolicy, eager: Gr00tPolicy) -> None:
    policy.denoising_steps = eager.denoising_steps = 4
    observation, noise = policy.example_observation("pick"), noise_of(5)
    known = {key: rows[4:] for key, rows in eager.get_action(observation, noise=noise).items()}
    prefix = ActionPrefix(known, 3)
    expected = eager.get_action(observation, noise=noise, prefix=prefix)["action.single_arm"]
    got = policy.get_action(observation, noise=noise, prefix=prefix)["action.single_arm"]
    np.testing.assert_array_equal(got[:3], known["action.single_arm"][:3])
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < TOLERANCE


def test_memory_does_not_grow_with_calls(policy: Gr00tPolicy) -> None:
    observation = policy.example_observation()
    policy.get_action(observation)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        policy.get_action(observation)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20
