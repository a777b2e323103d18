"""The gate before the motors, case by case."""

from __future__ import annotations

import numpy as np
import pytest
from control_fakes import LIMITS

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.safety import DEFAULT_MAX_STEP_DEG, SafetyFilter, SafetyOptions
from gr00t_fast.errors import ConfigError, UnsafeActionError

START = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 50.0])


def started(start: np.ndarray = START, **options: object) -> SafetyFilter:
    safety = SafetyFilter(LIMITS, SO100_JOINTS, SafetyOptions(**options))
    safety.start(start)
    return safety


def test_a_harmless_target_passes_exactly() -> None:
    safety = started()
    target = START + np.array([0.1, -5.999, 3.3, 0.7, 1e-9, 2.0])
    assert np.array_equal(safety(target), target)
    assert not safety.clamped.any()
    assert not safety.step_limited.any()


def test_the_first_target_is_limited_against_the_measured_pose() -> None:
    safety = started()
    assert safety(START + 40)[0] == DEFAULT_MAX_STEP_DEG
    assert safety.step_limited.tolist() == [1] * 6


def test_a_leap_becomes_a_ramp_relative_to_the_last_command() -> None:
    safety = started(max_step_deg=5.0)
    leap = START.copy()
    leap[2] = -12
    assert [safety(leap)[2] for _ in range(4)] == [-5, -10, -12, -12]
    assert safety.step_limited.tolist() == [0, 0, 2, 0, 0, 0]


def test_clamps_to_limits_and_counts_per_joint() -> None:
    safety = started(max_step_deg=None)
    target = np.array([500.0, -500.0, 0, 0, 0, 101.0])
    assert safety(target).tolist() == [110, -110, 0, 0, 0, 100]
    assert safety.clamped.tolist() == [1, 1, 0, 0, 0, 1]


def test_clamping_can_be_switched_off() -> None:
    safety = started(max_step_deg=None, clamp_to_limits=False)
    assert safety(np.full(6, 150.0)).tolist() == [150] * 6
    assert not safety.clamped.any()


def test_an_arm_outside_its_range_is_led_back_not_thrown() -> None:
    outside = START.copy()
    outside[1] = -125
    safety = started(outside, max_step_deg=5.0)
    assert [safety(outside)[1] for _ in range(4)] == [-120, -115, -110, -110]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_held_counted_and_never_sent(bad: float) -> None:
    safety = started(max_held_ticks=2)
    good = safety(START + 1)
    poisoned = START + 2
    poisoned[3] = bad
    for _ in range(2):
        assert np.array_equal(safety(poisoned), good)
    with pytest.raises(UnsafeActionError, match=r"wrist_flex in 3 ticks in a row.*max_held_ticks"):
        safety(poisoned)
    assert safety.held_ticks == 3


def test_held_ticks_count_in_a_row_only() -> None:
    safety = started(max_held_ticks=1)
    for _ in range(5):
        safety(np.full(6, np.nan))
        safety(START)
    assert safety.held_ticks == 5


def test_a_first_target_of_nan_holds_the_measured_pose() -> None:
    assert np.array_equal(started()(np.full(6, np.nan)), START)


def test_max_held_ticks_zero_refuses_at_once() -> None:
    with pytest.raises(UnsafeActionError):
        started(max_held_ticks=0)(np.full(6, np.nan))


def test_the_caller_cannot_change_what_is_held() -> None:
    safety = started()
    safety(START)[:] = 1e9
    assert np.array_equal(safety(np.full(6, np.nan)), START)


def test_a_new_episode_is_limited_against_the_new_pose() -> None:
    safety = started()
    safety(START)
    safety.start(START + 80)
    assert safety(START + 81)[0] == 81


@pytest.mark.parametrize("shape", [(5,), (7,), (1, 6), ()])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsafeActionError, match=r"expected \(6,\)"):
        started()(np.zeros(shape))


def test_a_pose_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UnsafeActionError, match="not finite"):
        started(np.full(6, np.nan))


@pytest.mark.parametrize("limits", [LIMITS[:5], LIMITS[:, ::-1], LIMITS * np.nan])
def test_limits_must_make_sense(limits: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="Calibrate"):
        SafetyFilter(limits, SO100_JOINTS)


@pytest.mark.parametrize("options", [{"max_step_deg": 0}, {"max_step_deg": float("nan")}, {"max_held_ticks": -1}])
def test_options_must_make_sense(options: dict) -> None:
    with pytest.raises(ConfigError):
        SafetyFilter(LIMITS, SO100_JOINTS, SafetyOptions(**options))


def test_random_targets_stay_inside_both_limits() -> None:
    rng = np.random.default_rng(0)
    safety, last = started(), START
    for target in rng.normal(0, 120, (500, 6)):
        sent = safety(target)
        assert (np.abs(sent - last) <= DEFAULT_MAX_STEP_DEG + 1e-9).all()
        assert (sent >= LIMITS[:, 0]).all()
        assert (sent <= LIMITS[:, 1]).all()
        last = sent
