"""Names and shapes between robot and policy."""

from __future__ import annotations

import numpy as np
import pytest
from control_fakes import modality_config

from gr00t_fast.base.contracts import SO100_JOINTS, ModalityConfig, Observation
from gr00t_fast.base.errors import PreflightError, UnsafeActionError
from gr00t_fast.control.binding import RobotBinding, joints_of_parts, resolve_camera_map

WIDTHS = {"single_arm": 5, "gripper": 1}


def binding(camera_map: dict[str, str] | None = None, **changes: ModalityConfig) -> RobotBinding:
    config = {**modality_config(), **changes}
    return RobotBinding(config, WIDTHS, WIDTHS, SO100_JOINTS, camera_map or {"front": "webcam"})


def observation(cameras: tuple[str, ...] = ("front",)) -> Observation:
    return Observation(np.arange(6.0), {name: np.full((6, 8, 3), 7, np.uint8) for name in cameras}, 0.0)


def test_actions_come_back_in_robot_order_whatever_the_order_of_parts() -> None:
    swapped = ModalityConfig(list(range(16)), ["action.gripper", "action.single_arm"])
    actions = {"action.gripper": np.full((4, 1), 9.0), "action.single_arm": np.tile(np.arange(5.0), (4, 1))}
    for bound in (binding(), binding(action=swapped)):
        targets = bound.action_targets(actions)
        assert targets.dtype == np.float32
        assert targets.tolist() == [[0, 1, 2, 3, 4, 9]] * 4
        assert all(np.array_equal(values, actions[key]) for key, values in bound.action_parts(targets).items())


@pytest.mark.parametrize(
    "actions",
    [
        {},
        {"action.single_arm": np.zeros((16, 5))},
        {"action.single_arm": np.zeros((16, 6)), "action.gripper": np.zeros((16, 1))},
        {"action.single_arm": np.zeros((16, 5)), "action.gripper": np.zeros((15, 1))},
        {"action.single_arm": np.zeros((16, 5)), "action.gripper": np.zeros(16)},
        {"action.single_arm": np.zeros((0, 5)), "action.gripper": np.zeros((0, 1))},
        {"action.single_arm": np.zeros((16, 5)), "action.gripper": np.full((16, 1), "1.5")},
        {"action.single_arm": np.zeros((16, 5)), "action.gripper": np.full((16, 1), 1 + 2j)},
    ],
)
def test_wrong_actions_are_refused(actions: dict) -> None:
    with pytest.raises(UnsafeActionError, match="policy"):
        binding().action_targets(actions)


def _seen_at(tick: int, fps: float, jitter_s: float = 0.0) -> Observation:
    return Observation(np.full(6, float(tick)), {"front": np.full((6, 8, 3), tick, np.uint8)}, tick / fps + jitter_s)


def test_earlier_frames_are_shown_to_a_policy_that_reads_them() -> None:
    config, fps = {**modality_config(), "video": ModalityConfig([-15, 0], ["video.webcam"])}, 30.0
    with pytest.raises(PreflightError, match="fps"):
        RobotBinding(config, WIDTHS, WIDTHS, SO100_JOINTS, {"front": "webcam"})
    bound = RobotBinding(config, WIDTHS, WIDTHS, SO100_JOINTS, {"front": "webcam"}, fps)

    def shown(observation: Observation) -> list[int]:
        built = bound.policy_observation(observation, "go")
        assert built["state.single_arm"].shape == (1, 5)
        return built["video.webcam"][:, 0, 0, 0].tolist()

    assert shown(_seen_at(0, fps)) == [0, 0]
    for tick in range(40):
        bound.remember(_seen_at(tick, fps, 0.002 * (-1) ** tick))
        if tick in (3, 14, 15, 16, 39):
            assert shown(_seen_at(tick, fps)) == [max(0, tick - 15), tick]
    bound.reset()
    assert shown(_seen_at(41, fps)) == [41, 41]


@pytest.mark.parametrize("widths", [{"single_arm": 5}, {"left_arm": 7, "right_arm": 7}, {"single_arm": 6, "gripper": 1}])
def test_parts_of_another_robot_are_refused(widths: dict[str, int]) -> None:
    with pytest.raises(PreflightError, match="another robot"):
        joints_of_parts(widths, SO100_JOINTS, "state")


@pytest.mark.parametrize(
    ("robot", "policy", "requested", "message"),
    [
        (["front", "wrist"], ["webcam"], None, r'--camera_map="\{front: webcam\}"'),
        (["front"], ["front", "wrist"], None, "no camera of the robot provides 'wrist'"),
        ([], ["webcam"], None, r'The robot has none.*Add to --robot.cameras="\{webcam: \{type: opencv'),
        (["front"], ["front", "wrist"], None, r"Add to --robot.cameras=.*wrist: \{type"),
        (["front"], ["webcam"], {"webcam": "front"}, r'other way round.*--camera_map="\{front: webcam\}"'),
        (["front"], ["webcam"], {"frnot": "webcam"}, "no camera 'frnot'.*Did you mean 'front'"),
        (["front"], ["webcam"], {"front": "webcm"}, "Did you mean 'webcam'"),
        (["a", "b"], ["front"], {"a": "front", "b": "front"}, "same policy camera"),
        (["front", "b"], ["front", "wrist"], {"front": "wrist"}, "provides 'front'"),
    ],
)
def test_camera_map_errors_name_both_sides_and_the_flag(robot: list[str], policy: list[str], requested: dict | None, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        resolve_camera_map(robot, policy, requested)
