"""Our client at a server that handles its inputs as NVIDIA's does: texts, types, batches."""

from __future__ import annotations

import numpy as np
import nvidia_style_service as reference
import pytest
from serving_fakes import ArithmeticPolicy, assert_same, observation

from gr00t_fast.errors import ObservationError
from gr00t_fast.serving import PolicyClient

TASK = "annotation.human.task_description"


@pytest.mark.parametrize("batch", [None, 3])
def test_an_instruction_travels_as_a_list(batch: int | None) -> None:
    handling = reference.InputHandling(ArithmeticPolicy())
    with reference.Server(handling) as server, PolicyClient(port=server.port) as client:
        actions = client.get_action(observation(batch, **{TASK: "pick: the cube"}))
        assert server.requests[-1]["data"][TASK] == ["pick: the cube"] * (batch or 1)
    assert_same(actions, ArithmeticPolicy().get_action(observation(batch)))
    assert handling.prompts == ["['pick: the cube']" if batch is None else "pick: the cube"]


@pytest.mark.parametrize("other", [np.float32, np.int64, list])
def test_states_travel_as_float64(other: type) -> None:
    """A service that has seen one type takes no other until it is started again."""
    seen = observation()
    changed = {key: value.tolist() if other is list else value.astype(other) for key, value in seen.items() if key.startswith("state.")}
    with reference.Server(reference.InputHandling(ArithmeticPolicy())) as server, PolicyClient(port=server.port) as client:
        client.get_action({**seen, **changed})
        client.get_action(seen)
        with reference.Client(server.port) as nvidias:
            assert_same(nvidias.get_action(seen), ArithmeticPolicy().get_action(seen))


def test_a_state_without_numbers_is_not_sent() -> None:
    policy = ArithmeticPolicy()
    with reference.Server(policy) as server, PolicyClient(port=server.port) as client:
        for value in ("up", [[1.0], [2.0, 3.0]]):
            with pytest.raises(ObservationError, match="state.gripper"):
                client.get_action(observation(**{"state.gripper": value}))
    assert policy.calls == 0
