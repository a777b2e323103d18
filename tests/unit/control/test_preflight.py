"""What is refused, what is warned about, and that all of it is said at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from control_fakes import FakeClock, FakeRobot, policy_metadata

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import PreflightError
from gr00t_fast.control.preflight import Finding, Preflight

DEGREES = {"low": [-107, -70, -60, -117, -105, 0], "high": [113, 27, 33, 115, 82, 100]}
NORMALISED = {"low": [-55, -100, -90, 12, -40, 0], "high": [48, 60, 100, 95, 33, 99]}
EITHER = {"low": [-60] * 5 + [0], "high": [60] * 5 + [90]}
RADIANS = {"low": [-1.5] * 5 + [0], "high": [1.6] * 5 + [90]}
TWO_ARMS = {"widths": {"left_arm": 7}, "low": [0] * 7, "high": [9] * 7}
UNREACHABLE = {"low": [-90, 120, -80, -70, -60, 0], "high": [90, 190, 85, 80, 65, 99]}
SMALL = (40, 32)


def preflight(cameras: dict | None = None, unit: str = "degrees", told: list[str] | None = None, led: bool = False, **changes: Any) -> Preflight:
    robot = FakeRobot(FakeClock(), cameras, unit)
    strict = changes.pop("strict", True)
    return Preflight(robot, policy_metadata(**changes), strict, (told if told is not None else []).append, led=led)


def looked(fps: float | None = None, camera_map: dict | None = None, horizon: int | None = None, **changes: Any) -> list[Finding]:
    return preflight(**changes).look(fps, camera_map, horizon)


BEFORE: list[tuple[dict[str, Any], str | None, tuple[str, ...]]] = [  # what differs, which kind of finding that is, what it names
    ({}, "note", ("'front'", "'webcam'", "only camera")),
    ({"fps": 15}, "warning", ("0.50 times",)),
    ({"fps": 60}, "warning", ("2.00 times",)),
    ({"fps": 60}, "warning", ("front", "repeated")),
    ({"cameras": {"front": (1280, 960)}, "resolution": (640, 480)}, "note", ("1280x960", "640x480", "resized")),
    ({"cameras": {"front": (640, 480)}, "resolution": (1280, 720)}, "warning", ("ASPECT RATIO", "width: 1280, height: 720")),
    ({"cameras": {"webcam": SMALL, "top": SMALL}}, "note", ("'top'", "not used")),
    ({"cameras": {"left": SMALL, "right": SMALL}}, "impossible", ("--camera_map",)),
    ({"camera_map": {"frnt": "webcam"}}, "impossible", ("front",)),
    ({"horizon": 32}, "problem", ("--action_horizon=32",)),
    ({"tag": "gr1"}, "problem", ("'gr1'", "--embodiment_tag=new_embodiment")),
    (TWO_ARMS, "impossible", ("another robot",)),
    ({"unit": "degrees", **DEGREES}, None, ()),
    ({"unit": "range_m100_100", **NORMALISED}, None, ()),
    ({"unit": "degrees", **EITHER}, None, ()),
    ({"unit": "range_m100_100", **EITHER}, None, ()),
    ({"unit": "range_m100_100", **DEGREES}, "problem", ("--robot.use_degrees=true",)),
    ({"unit": "degrees", **NORMALISED}, "problem", ("--robot.use_degrees=false",)),
    ({"unit": "degrees", **RADIANS}, "problem", ("radians",)),
    ({"low": [-90] * 5 + [-83], "high": [90] * 5 + [71]}, "warning", ("gripper", "degrees")),
    ({"low": [-90] * 5 + [0], "high": [90] * 5 + [0.9]}, "warning", ("gripper", "fraction")),
]


@pytest.mark.parametrize(("changes", "kind", "named"), BEFORE)
def test_before_connecting(changes: dict[str, Any], kind: str | None, named: tuple[str, ...]) -> None:
    changes = dict(changes)
    if resolution := changes.pop("resolution", None):
        changes["cameras"], camera = changes["cameras"], {"webcam": resolution}
        found = Preflight(FakeRobot(FakeClock(), changes["cameras"]), policy_metadata(camera)).look(None, None)
    else:
        found = looked(**changes)
    assert {each for each, _ in found} <= {kind, "note"}
    assert kind is None or [text for each, text in found if each == kind and all(word in text for word in named)]


CONNECTED: list[tuple[list[float], dict[str, Any], str | None, tuple[str, ...]]] = [  # where the arm stands, and as above
    ([0, 0, 0, 0, 0, 50], {}, None, ()),
    ([0, 95, 0, 0, 0, 50], {}, "warning", ("shoulder_lift", "95", "--home")),
    ([0, 95, 0, 0, 0, 50], {"led": True}, None, ()),
    (
        [0, 0, 0, 0, 105, 50],
        {"low": [-90, -95, -80, -70, -20, 0], "high": [90, 60, 85, 80, 5, 99]},
        "refused",
        ("wrist_roll", "--home", "use_degrees"),
    ),
    ([0, 0, 0, 0, 105, 50], {"low": [-90, -95, -80, -70, -20, 0], "high": [90, 60, 85, 80, 5, 99], "led": True}, "warning", ("wrist_roll", "slowly")),
    ([0, 0, 0, 0, 0, 50], UNREACHABLE, "refused", ("shoulder_lift", "can only reach")),
    ([0, 0, 0, 0, 0, 50], {"high": [150, 60, 85, 80, 65, 99]}, "warning", ("shoulder_pan", "clamped")),
]


@pytest.mark.parametrize(("pose", "changes", "kind", "named"), CONNECTED)
def test_the_pose_and_the_reach_of_the_arm(pose: list[float], changes: dict[str, Any], kind: str | None, named: tuple[str, ...]) -> None:
    told: list[str] = []
    checks, seen = preflight(told=told, **changes), Observation(np.array(pose, float), {}, 0.0)
    if kind == "refused":
        with pytest.raises(PreflightError) as caught:
            checks.connected(seen)
        told.append(str(caught.value))
    else:
        checks.connected(seen)
    assert len(told) == (kind is not None)
    assert all(word in told[0] for word in named)


def test_every_problem_is_in_one_error_and_what_is_impossible_is_refused_whatever_the_user_wishes() -> None:
    for strict in (True, False):
        told: list[str] = []
        checks = preflight({"left": SMALL, "right": SMALL}, tag="gr1", told=told, strict=strict, **TWO_ARMS)
        with pytest.raises(PreflightError, match="4 problems") as caught:
            checks.before_connecting(None, None, 32)
        for part in ("embodiment 'gr1'", "--camera_map", "--action_horizon=32", "another robot"):
            assert part in str(caught.value)
        assert told == []


def test_strict_refuses_and_warn_goes_on_saying_so() -> None:
    with pytest.raises(PreflightError, match="use_degrees"):
        preflight(unit="range_m100_100", **DEGREES).before_connecting(None, None)
    told: list[str] = []
    lenient = preflight(unit="range_m100_100", told=told, strict=False, **DEGREES)
    assert lenient.before_connecting(None, None) == 30
    assert "use_degrees" in lenient.warnings[0]
    assert [line for line in told if line.startswith("WARNING: ignored")]


@pytest.mark.parametrize(("recorded", "asked", "rate"), [(15, None, 15), (15, 20, 20), (None, 20, 20), *((odd, None, None) for odd in (0.01, 250.0))])
def test_the_rate_comes_from_the_flag_then_from_the_data_and_never_from_nowhere(
    recorded: float | None, asked: float | None, rate: float | None
) -> None:
    for strict in (True, False):
        if rate is None:
            with pytest.raises(PreflightError, match="--fps=30"):
                preflight(fps=recorded, strict=strict).before_connecting(asked, None)
        else:
            assert preflight(fps=recorded, strict=strict).before_connecting(asked, None) == rate


@pytest.mark.parametrize("resolution", [None, (640, 480)])
def test_a_checkpoint_that_never_tells_the_rate_runs_at_lerobot_s(resolution: tuple[int, int] | None) -> None:
    """N1.7's files have neither rate nor resolution, lerobot's no rate."""
    metadata, robot = replace(policy_metadata(fps=None), resolutions={"webcam": resolution}), FakeRobot(FakeClock())
    checks = Preflight(robot, metadata, echo=lambda _: None)
    assert checks.before_connecting(None, None) == 30
    assert any("30 Hz" in warning for warning in checks.warnings)
    assert not [text for kind, text in Preflight(robot, metadata).look(15.0, None) if kind == "warning" and "Hz" in text]
    with pytest.raises(PreflightError, match="--fps=30"):
        Preflight(robot, replace(metadata, state_statistics={}), strict=False).before_connecting(None, None)
