"""What is refused, what is warned about, and that all of it is said at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from control_fakes import FakeClock, FakeRobot, policy_metadata

from gr00t_fast.contracts import Observation
from gr00t_fast.control.preflight import Findings, Preflight, check_before_connecting, check_connected
from gr00t_fast.errors import PreflightError

DEGREES = {"low": [-107, -70, -60, -117, -105, 0], "high": [113, 27, 33, 115, 82, 100]}
NORMALISED = {"low": [-55, -100, -90, 12, -40, 0], "high": [48, 60, 100, 95, 33, 99]}


def before(robot: FakeRobot | None = None, fps: float | None = None, camera_map: dict | None = None, horizon: int | None = None, **changes):
    robot = robot or FakeRobot(FakeClock())
    return check_before_connecting(robot, policy_metadata(**changes), fps, camera_map, horizon)


def test_a_fitting_pair_has_nothing_to_report_but_the_implied_camera() -> None:
    found = before()
    assert (found.problems, found.warnings) == ([], [])
    assert found.notes == ["camera 'front' is the policy's 'webcam' (the only camera on both sides)."]


def test_every_problem_is_in_one_error() -> None:
    robot = FakeRobot(FakeClock(), {"left": (40, 32), "right": (40, 32)})
    found = before(robot, horizon=32, tag="gr1", widths={"left_arm": 7}, low=[0] * 7, high=[9] * 7)
    with pytest.raises(PreflightError, match=r"4 problems") as caught:
        found.refuse()
    for part in ("embodiment 'gr1'", "--embodiment_tag=new_embodiment", "--camera_map", "--action_horizon=32", "another robot"):
        assert part in str(caught.value)


def test_no_rate_anywhere() -> None:
    found = check_before_connecting(FakeRobot(FakeClock()), policy_metadata(fps=None), None, None)
    assert "--fps=30" in found.impossible[0]


def test_a_checkpoint_that_never_tells_rate_and_resolution_runs_at_lerobot_s() -> None:
    """N1.7's files have neither."""
    metadata, robot = replace(policy_metadata(fps=None), resolutions={"webcam": None}), FakeRobot(FakeClock())
    found = check_before_connecting(robot, metadata, None, None)
    assert (found.problems, found.impossible) == ([], [])
    assert "30 Hz" in found.warnings[0]
    assert Preflight(robot, metadata, echo=lambda _: None).before_connecting(None, None, None) == 30
    assert check_before_connecting(robot, metadata, 15.0, None).warnings == []


def test_another_resolution_of_the_same_shape_is_only_noted() -> None:
    found = before(FakeRobot(FakeClock(), {"front": (1280, 960)}), cameras={"webcam": (640, 480)})
    assert found.warnings == []
    assert any("1280x960" in note and "640x480" in note and "resized" in note for note in found.notes)


def test_another_aspect_ratio_is_warned_about_loudly() -> None:
    found = before(FakeRobot(FakeClock(), {"front": (640, 480)}), cameras={"webcam": (1280, 720)})
    assert found.problems == []
    assert "ASPECT RATIO" in found.warnings[0]
    assert "width: 1280, height: 720" in found.warnings[0]


def test_loop_rate_other_than_the_data() -> None:
    assert "2.00 times as fast" in before(fps=60).warnings[0]
    assert any("repeat a frame" in warning for warning in before(fps=60).warnings)


def test_unused_cameras_are_named() -> None:
    robot = FakeRobot(FakeClock(), {"webcam": (40, 32), "top": (40, 32)})
    assert before(robot).notes == ["camera 'top' is not used by the policy."]


@pytest.mark.parametrize(
    ("unit", "statistics", "expected"),
    [
        ("degrees", DEGREES, None),
        ("range_m100_100", NORMALISED, None),
        ("range_m100_100", DEGREES, "--robot.use_degrees=true"),
        ("degrees", NORMALISED, "--robot.use_degrees=false"),
        ("degrees", {"low": [-60] * 5 + [0], "high": [60] * 5 + [90]}, None),  # could be either: not a contradiction
        ("range_m100_100", {"low": [-60] * 5 + [0], "high": [60] * 5 + [90]}, None),
        ("degrees", {"low": [-1.5] * 5 + [0], "high": [1.6] * 5 + [1.0]}, "radians"),
    ],
)
def test_units_against_the_statistics(unit: str, statistics: dict, expected: str | None) -> None:
    found = before(FakeRobot(FakeClock(), unit=unit), **statistics)
    assert bool(found.problems) == (expected is not None)
    if expected:
        assert expected in found.problems[0]


@pytest.mark.parametrize(("low", "high", "word"), [(-83, 71, "0 to 100"), (0, 0.9, "fraction")])
def test_gripper_statistics_out_of_the_ordinary(low: float, high: float, word: str) -> None:
    found = before(low=[-90] * 5 + [low], high=[90] * 5 + [high])
    assert found.problems == []
    assert word in found.warnings[0]


def connected(pose: list[float], **changes) -> Findings:
    return check_connected(FakeRobot(FakeClock()), policy_metadata(**changes), np.array(pose, float))


def test_a_pose_within_the_data_is_fine() -> None:
    found = connected([0, 0, 0, 0, 0, 50])
    assert (found.problems, found.warnings) == ([], [])


def test_a_pose_outside_the_data_is_a_warning() -> None:
    found = connected([0, 95, 0, 0, 0, 50])
    assert found.problems == []
    assert "shoulder_lift: the arm stands at 95" in found.warnings[0]
    assert "--home" in found.warnings[0]


def test_an_arm_that_is_led_to_where_it_begins_may_stand_elsewhere() -> None:
    ranges = {"low": [-90, -95, -80, -70, -20, 0], "high": [90, 60, 85, 80, 5, 99]}

    def told(pose: list[float], led: bool) -> list[str]:
        said: list[str] = []
        preflight = Preflight(FakeRobot(FakeClock()), policy_metadata(**ranges), echo=said.append, led=led)
        preflight.connected(Observation(np.array(pose, float), {}, 0.0))
        return said

    assert "shoulder_lift" in told([0, 95, 0, 0, 0, 50], led=False)[0]
    assert told([0, 95, 0, 0, 0, 50], led=True) == []
    assert "wrist_roll" in told([0, 0, 0, 0, 105, 50], led=True)[0], "from far away it is led home slowly"
    with pytest.raises(PreflightError, match="--home"):
        told([0, 0, 0, 0, 105, 50], led=False)


def test_a_pose_of_another_zero_point_is_refused() -> None:
    found = connected([0, 0, 0, 0, 105, 50], low=[-90, -95, -80, -70, -20, 0], high=[90, 60, 85, 80, 5, 99])
    assert "wrist_roll" in found.problems[0]
    assert "--robot.use_degrees" in found.problems[0]


def test_data_that_the_arm_cannot_reach_is_refused() -> None:
    found = connected([0, 0, 0, 0, 0, 50], low=[-90, 120, -80, -70, -60, 0], high=[90, 190, 85, 80, 65, 99])
    assert "can only reach" in found.problems[0]


def test_data_somewhat_beyond_the_arm_is_a_warning() -> None:
    found = connected([0, 0, 0, 0, 0, 50], high=[150, 60, 85, 80, 65, 99])
    assert found.problems == []
    assert "clamped" in found.warnings[0]


def test_strict_refuses_and_warn_goes_on_saying_so() -> None:
    robot, said = FakeRobot(FakeClock(), unit="range_m100_100"), []
    with pytest.raises(PreflightError, match="use_degrees"):
        Preflight(robot, policy_metadata(**DEGREES)).before_connecting(None, None, None)
    lenient = Preflight(robot, policy_metadata(**DEGREES), strict=False, echo=said.append)
    assert lenient.before_connecting(None, None, None) == 30
    assert "ignored at your wish" in lenient.warnings[0]
    assert any(line.startswith("WARNING: ignored") for line in said)


@pytest.mark.parametrize(("camera_map", "widths", "named"), [({"frnt": "webcam"}, None, "front"), (None, {"left_arm": 7}, "another robot")])
def test_what_makes_a_run_impossible_is_refused_in_both_ways_and_told_once(camera_map: dict | None, widths: dict | None, named: str) -> None:
    said: list[str] = []
    changes = {} if widths is None else {"widths": widths, "low": [0] * 7, "high": [9] * 7}
    with pytest.raises(PreflightError, match=named):
        Preflight(FakeRobot(FakeClock()), policy_metadata(**changes), strict=False, echo=said.append).before_connecting(None, camera_map, None)
    assert said == []


def test_the_loop_rate_comes_from_the_flag_then_from_the_data() -> None:
    robot = FakeRobot(FakeClock())
    assert Preflight(robot, policy_metadata(fps=15)).before_connecting(None, None, None) == 15
    assert Preflight(robot, policy_metadata(fps=15)).before_connecting(20, None, None) == 20
    with pytest.raises(PreflightError, match="--fps=30"):
        Preflight(robot, policy_metadata(fps=None), strict=False).before_connecting(None, None, None)


def test_connected_round_raises_too() -> None:
    preflight = Preflight(FakeRobot(FakeClock()), policy_metadata(low=[-90, 120, -80, -70, -60, 0], high=[90, 190, 85, 80, 65, 99]))
    with pytest.raises(PreflightError, match="shoulder_lift"):
        preflight.connected(Observation(np.zeros(6), {}, 0.0))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fps", [0.01, 250.0, 1000.0])
def test_a_rate_that_no_bus_can_keep_is_refused_also_from_a_checkpoint(fps: float, strict: bool) -> None:
    robot = FakeRobot(FakeClock(), {"webcam": (8, 6)})
    with pytest.raises(PreflightError, match=f"{fps:g} Hz.*--fps"):
        Preflight(robot, policy_metadata(fps=fps), strict=strict).before_connecting(None, None, None)
    assert Preflight(robot, policy_metadata(fps=fps), strict=False).before_connecting(30.0, None, None) == 30.0
