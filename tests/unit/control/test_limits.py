"""What one call may cost is bounded before anything is computed: batch, pictures, history, instruction. Each refusal names the limit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import observation, write_network

from gr00t_fast import load_policy
from gr00t_fast.base.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX
from gr00t_fast.base.errors import ObservationError
from gr00t_fast.inputs.observation import MAX_BATCH, MAX_INSTRUCTION_CHARACTERS
from gr00t_fast.inputs.prompt import MAX_TEXT_TOKENS
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.serving.wire import MAX_MESSAGE_BYTES

TASK = "annotation.human.task_description"
SOON_S = 10.0  # the attacks took 20 to 80 s


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Gr00tPolicy:
    return load_policy(write_network(tmp_path_factory.mktemp("checkpoint")), device="cpu", denoising_steps=1)


def frames(batch: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (batch, 1, height, width, 3))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"video.webcam": frames(400, 1, 1)}, ("video.webcam", str(MIN_FRAME_PX), "1x1")),
        ({"video.webcam": frames(1, 40, MIN_FRAME_PX - 1)}, ("video.webcam", str(MIN_FRAME_PX))),
        ({"video.webcam": frames(1, 40, MAX_FRAME_PX + 1)}, ("video.webcam", str(MAX_FRAME_PX))),
        ({"video.webcam": frames(MAX_BATCH + 1, 40, 40)}, ("video.webcam", str(MAX_BATCH))),
        ({"video.webcam": frames(1, MAX_FRAME_PX, MAX_FRAME_PX)}, (str(MAX_FRAME_PX**2), str(MAX_PIXELS))),
        ({"video.webcam": frames(2, 40, 40)[0].repeat(9, 0)}, ("video.webcam", "one time step", "9")),
        ({"state.gripper": np.zeros((10**6, 1, 1))}, ("state.gripper", str(MAX_BATCH))),
        ({TASK: np.zeros(10**6, "<U1")}, (TASK, "1000000")),
        ({TASK: "a b " * 16_000}, (TASK, str(MAX_INSTRUCTION_CHARACTERS))),
        ({TASK: np.array(["x" * 10**6])}, (TASK, str(MAX_INSTRUCTION_CHARACTERS))),
        ({TASK: "é" * (MAX_TEXT_TOKENS // 2)}, (str(MAX_TEXT_TOKENS),)),  # two bytes each, and the test's tokenizer has one token per byte
    ],
)
def test_what_is_too_large_is_refused_at_once(policy: Gr00tPolicy, changes: dict[str, Any], named: tuple[str, ...]) -> None:
    began_s = time.monotonic()
    with pytest.raises(ObservationError) as caught:
        policy.get_action(observation() | changes)
    assert time.monotonic() - began_s < SOON_S
    assert all(word in str(caught.value) for word in named)
    assert len(str(caught.value)) < 400


def test_a_small_frame_of_a_large_camera_counts_as_what_it_becomes(tmp_path: Path) -> None:
    """A batch of little pictures is enlarged to what training saw, which may be much more than what came."""
    large = load_policy(write_network(tmp_path, resolution=(4000, 3000)), device="cpu", denoising_steps=1)
    with pytest.raises(ObservationError, match=f"36000000.*{MAX_PIXELS}"):
        large.get_action(observation(batch=3))


def test_the_wire_carries_eight_observations_of_two_usual_cameras() -> None:
    assert MAX_MESSAGE_BYTES > 8 * 2 * 1280 * 720 * 3
