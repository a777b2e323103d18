"""Several observations in one call: each item's actions are those of its own single call, whatever the other items are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_networks import Sizes, observation, write_network

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import ObservationError
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

UNEQUAL = ["pick", "put the red block into the bowl, then wave", "pick it up", "x"]
EQUAL = ["pick a", "pick b", "pick c", "pick d"]
CLOSE_DEG = 1e-3  # joint ranges are near 100 degrees: ten digits in fp32 are not there, five are
WORDS = Sizes(language=(48, 96, 2, 4, 2, 16), vl=(2, 4, 12), dit=(4, 4, 12), vision=(32, 64, 2, 2))


@pytest.fixture(
    scope="module", params=[("n1.5", "so100"), ("n1.5", "so100_dualcam"), ("n1.6", "so100_dualcam"), ("n1.7", "so100_dualcam")], ids="-".join
)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gr00tPolicy:
    (network, data_config), directory = request.param, tmp_path_factory.mktemp("checkpoint")
    if network == "n1.5":
        checkpoint = write_network(directory, WORDS, data_config=data_config)
    else:
        checkpoint = write_random_checkpoint(directory, "tiny", data_config, network=network)
    loaded = load_policy(checkpoint, data_config=data_config, device="cpu", precision="fp32", engine="eager")  # which computes them together
    loaded.name = data_config
    return loaded


def _noise(policy: Gr00tPolicy, batch: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, *policy.chunk_shape)).astype(np.float32)


def _single(policy: Gr00tPolicy, batched: dict, noise: np.ndarray, item: int) -> dict[str, np.ndarray]:
    one = {key: value[item] for key, value in batched.items()}
    return policy.get_action(one, noise=noise[item : item + 1])


@pytest.mark.parametrize("instructions", [UNEQUAL, EQUAL, UNEQUAL[::-1]], ids=["unequal", "equal", "reversed"])
def test_each_item_equals_its_own_single_call(policy: Gr00tPolicy, instructions: list[str]) -> None:
    batched, noise = observation(policy.name, batch=4, instruction=instructions), _noise(policy, 4)
    together = policy.get_action(batched, noise=noise)
    for item in range(4):
        for key, alone in _single(policy, batched, noise, item).items():
            assert (together[key].shape, together[key].dtype) == ((4, *alone.shape), np.float32)
            np.testing.assert_allclose(together[key][item], alone, rtol=0, atol=CLOSE_DEG)
    assert np.abs(together["action.single_arm"][0] - together["action.single_arm"][1]).max() > 1, "items are not told apart"


def test_without_the_mask_items_would_leak(policy: Gr00tPolicy) -> None:
    """The check above is sensitive: run the same padded batch without its mask, as the reference does, and the short prompts' actions move."""
    batched, noise = observation(policy.name, batch=4, instruction=UNEQUAL), _noise(policy, 4)
    seen = policy.preprocess(batched)
    inputs = seen.to(policy.device, policy.dtype)
    assert inputs.prompt_mask is not None
    model, tables = policy.engine.model, policy.engine.tables(policy.denoising_steps)
    with torch.inference_mode():
        normalised = [model(i, torch.from_numpy(noise), tables).numpy() for i in (inputs, replace(inputs, prompt_mask=None))]
    masked, unmasked = (policy.postprocess(actions, seen) for actions in normalised)
    moved = np.abs(masked["action.single_arm"] - unmasked["action.single_arm"]).max(axis=(1, 2))
    assert moved[1] == 0, "the longest prompt has no padding"
    assert (moved[[0, 2, 3]] > 100 * CLOSE_DEG).all()


def test_padding_is_never_read(policy: Gr00tPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another token in the padding changes nothing."""
    batched, noise = observation(policy.name, batch=4, instruction=UNEQUAL), _noise(policy, 4)
    inputs = policy.preprocess(batched).to(policy.device, policy.dtype)
    other = replace(inputs, input_ids=inputs.input_ids.masked_fill(~inputs.prompt_mask, 97))
    assert not torch.equal(other.input_ids, inputs.input_ids)
    with torch.inference_mode():
        a, b = (policy.engine.model(i, torch.from_numpy(noise), policy.engine.tables(2)) for i in (inputs, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_one_instruction_serves_the_whole_batch(policy: Gr00tPolicy) -> None:
    noise = _noise(policy, 3)
    one = policy.get_action(observation(policy.name, batch=3, instruction="pick"), noise=noise)
    each = policy.get_action(observation(policy.name, batch=3, instruction=["pick"] * 3), noise=noise)
    assert all(np.array_equal(one[key], each[key]) for key in one)


def test_wrong_batches_are_refused(policy: Gr00tPolicy) -> None:
    with pytest.raises(ObservationError, match="expected 3 instructions for a batch of 3, got 2"):
        policy.get_action(observation(policy.name, batch=3, instruction=["a", "b"]))
    uneven = observation(policy.name, batch=3) | {"state.gripper": np.zeros((2, 1, 1))}
    with pytest.raises(ObservationError, match=r"one batch size.*state.gripper': 2"):
        policy.get_action(uneven)
    half = observation(policy.name, batch=1) | {"state.gripper": np.zeros((1, 1))}
    with pytest.raises(ObservationError, match="batched or unbatched alike"):
        policy.get_action(half)
    with pytest.raises(ObservationError, match=r"noise: .*\(3, \d+, \d+\).*got shape \(1, \d+, \d+\)"):
        policy.get_action(observation(policy.name, batch=3), noise=_noise(policy, 1))


def _call(batched: dict, item: int, noise: np.ndarray, **options: object) -> dict:
    """The arguments of a client's own call."""
    return {"observation": {key: value[item] for key, value in batched.items()}, "noise": noise[item : item + 1], **options}


@pytest.mark.parametrize("continuing", [False, True])
def test_calls_of_several_clients_get_together_what_each_gets_alone(policy: Gr00tPolicy, continuing: bool) -> None:
    """With prefixes of other lengths and delays, and instructions of other lengths."""
    batched, noise = observation(policy.name, batch=3, instruction=UNEQUAL[:3]), _noise(policy, 3)
    calls = [_call(batched, item, noise) for item in range(3)]
    if continuing:
        before = policy.get_action(**calls[0])
        for item, (rows, delay) in enumerate([(9, 2), (5, 0), (12, 7)]):
            calls[item]["prefix"] = ActionPrefix({key: values[:rows] for key, values in before.items()}, delay)
    together = policy.get_actions(calls)
    for call, found in zip(calls, together, strict=True):
        for key, alone in policy.get_action(**call).items():
            assert (found[key].shape, found[key].dtype) == (alone.shape, np.float32)
            np.testing.assert_allclose(found[key], alone, rtol=0, atol=CLOSE_DEG)


def test_a_call_that_cannot_be_used_fails_alone(policy: Gr00tPolicy) -> None:
    batched, noise = observation(policy.name, batch=3, instruction=EQUAL[:3]), _noise(policy, 3)
    calls = [_call(batched, item, noise) for item in range(3)]
    calls[1]["observation"]["state.gripper"] = np.full((1, 1), np.nan)
    first, second, third = policy.get_actions(calls)
    assert isinstance(second, ObservationError)
    assert "state.gripper" in str(second)
    for call, found in ((calls[0], first), (calls[2], third)):
        np.testing.assert_allclose(found["action.single_arm"], policy.get_action(**call)["action.single_arm"], rtol=0, atol=CLOSE_DEG)


def test_a_prefix_without_rows_is_none_in_a_batch_too(policy: Gr00tPolicy) -> None:
    batched, noise = observation(policy.name, batch=3, instruction=EQUAL[:3]), _noise(policy, 3)
    calls = [_call(batched, item, noise) for item in range(3)]
    alone = [policy.get_action(**call) for call in calls]
    calls[0]["prefix"] = ActionPrefix({key: values[:7] for key, values in alone[2].items()}, 2)
    calls[1]["prefix"] = ActionPrefix({key: values[:0] for key, values in alone[2].items()}, 0)
    alone[0] = policy.get_action(**calls[0])
    for found, expected in zip(policy.get_actions(calls), alone, strict=True):
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, rtol=0, atol=CLOSE_DEG)
