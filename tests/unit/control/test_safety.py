"""The gate before the motors, case by case."""

from __future__ import annotations

import numpy as np
import pytest
from control_fakes import LIMITS, joints

from gr00t_fast.base.errors import ConfigError, UnsafeActionError
from gr00t_fast.control.limits import BLOCKED_END_S, DEFAULT_MAX_SPEED_DEG_S, HOME_SPEED_DEG_S, MAX_HELD_TICKS, Limits, SafetyOptions

START = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 50.0])
FPS = 30.0
STEP = DEFAULT_MAX_SPEED_DEG_S / FPS


def gate(limits: np.ndarray = LIMITS, fps: float = FPS, units_per_deg: np.ndarray | None = None, **options: object) -> Limits:
    # at full speed from the start
    return Limits(joints(limits, units_per_deg), SafetyOptions(**options), 1 / fps, slow_deg_s=np.inf)


def started(start: np.ndarray = START, **options: object) -> Limits:
    """Without a limit of the following error, unless it is given: most tests have no arm that follows."""
    safety = gate(**{"max_following_error_deg": None, **options})
    safety.start(start)
    return safety


def at(joint: int, value: float) -> np.ndarray:
    pose = START.copy()
    pose[joint] = value
    return pose


@pytest.mark.parametrize(
    ("max_speed_deg_s", "begin", "target", "sent", "changed"),
    [
        ("auto", at(1, 0.0), at(1, -7.7), [-7.7], {}),  # the most of a recording of a real arm
        ("auto", at(0, 0.0), at(0, 40.0), [STEP], {"speed_limited": 1}),
        (150.0, at(2, 0.0), at(2, -12.0), [-5, -10, -12, -12], {"speed_limited": 2}),
        (None, at(0, 0.0), at(0, 500.0), [110], {"clamped": 1}),
        (None, at(5, 50.0), at(5, -1.0), [0], {"clamped": 1}),
        (150.0, at(1, -125.0), at(1, -125.0), [-120, -115, -110, -110], {"clamped": 4, "speed_limited": 2}),
    ],
    ids=["harmless", "from the measured pose", "a leap becomes a ramp", "range", "gripper", "an arm outside its range is led back, not thrown"],
)
def test_what_is_sent_and_counted(max_speed_deg_s: object, begin: np.ndarray, target: np.ndarray, sent: list[float], changed: dict[str, int]) -> None:
    safety, joint = started(begin, max_speed_deg_s=max_speed_deg_s), int(np.argmax((begin != START) | (target != START)))
    rest = [number for number in range(6) if number != joint]
    for expected in sent:
        got = safety.apply(target)
        assert got[joint] == expected
        assert np.array_equal(got[rest], START[rest])
    for counter in ("clamped", "speed_limited"):
        assert getattr(safety, counter)[joint] == changed.get(counter, 0)
        assert not getattr(safety, counter)[rest].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_held_counted_and_never_sent(bad: float) -> None:
    """Only those in a row count towards the limit."""
    safety, poisoned = started(), at(3, bad)
    assert np.array_equal(safety.apply(poisoned), START), "before anything was sent, the measured pose"
    good = safety.apply(START + 1).copy()
    safety.apply(START + 1)[:] = 1e9
    for _ in range(MAX_HELD_TICKS):
        assert np.array_equal(safety.apply(poisoned), good), "the caller cannot change it"
    with pytest.raises(UnsafeActionError, match=rf"wrist_flex in {MAX_HELD_TICKS + 1} ticks in a row"):
        safety.apply(poisoned)
    assert safety.held_ticks == MAX_HELD_TICKS + 2


@pytest.mark.parametrize("fps", [10.0, 30.0, 200.0])
def test_after_a_start_the_speed_limit_grows_from_a_slow_move_to_its_maximum_within_a_second(fps: float) -> None:
    far = at(0, 1e4)  # further than any joint: what is looked at is the speed
    safety = Limits(joints(LIMITS * 100), SafetyOptions(max_following_error_deg=None), 1 / fps)
    for begin in (safety.start, lambda pose: safety.slow_start()):
        begin(START)
        path = [safety.last[0], *(safety.apply(far)[0] for _ in range(int(2 * fps)))]
        speed_deg_s = np.diff(path) * fps
        slowest = HOME_SPEED_DEG_S + (DEFAULT_MAX_SPEED_DEG_S - HOME_SPEED_DEG_S) / fps
        assert speed_deg_s[0] == pytest.approx(slowest)
        assert (np.diff(speed_deg_s) > -1e-6).all()
        np.testing.assert_allclose(speed_deg_s[int(fps) :], DEFAULT_MAX_SPEED_DEG_S)


def test_a_new_episode_is_limited_against_the_new_pose() -> None:
    safety = started()
    safety.apply(START)
    safety.start(START + 80)
    assert safety.apply(START + 81)[0] == 81


OPTIONS = {"max_speed_deg_s": (0, np.nan), "max_following_error_deg": (0,), "stall_after_s": (0,)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_options_must_make_sense(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        gate(**{name: value})


def test_random_targets_stay_inside_both_limits() -> None:
    rng = np.random.default_rng(0)
    safety, last = started(), START
    for target in rng.normal(0, 120, (500, 6)):
        sent = safety.apply(target)
        assert (np.abs(sent - last) <= STEP + 1e-9).all()
        assert (sent >= LIMITS[:, 0]).all()
        assert (sent <= LIMITS[:, 1]).all()
        last = sent


@pytest.mark.parametrize("fps", [1.0, 10.0, 30.0, 200.0])
def test_the_speed_limit_is_per_second_whatever_the_rate(fps: float) -> None:
    """In degrees of the shaft, gripper and normalised units too."""
    units_per_deg = np.array([1.0, 0.5, 2.0, 1.0, 1.0, 100 / 118])
    safety = started(START, fps=fps, units_per_deg=units_per_deg)
    path = [START, *(safety.apply(np.array([110.0, 110, 110, 110, 110, 100])) for _ in range(5))]
    speed_deg_s = np.diff(path, axis=0).max(0) * fps / units_per_deg
    assert (speed_deg_s <= DEFAULT_MAX_SPEED_DEG_S * (1 + 1e-9)).all()
    if fps >= 10:
        np.testing.assert_allclose(speed_deg_s, DEFAULT_MAX_SPEED_DEG_S)


@pytest.mark.parametrize("fps", [5.0, 10.0, 30.0])
def test_a_blocked_joint_does_not_wind_its_goal_ahead_at_any_rate(fps: float) -> None:
    safety = gate(fps=fps, max_following_error_deg=15.0)
    safety.start(START)
    target = START + [90, -90, 0, 0, 0, 0]
    for tick in range(round(2 * fps)):
        safety.read(START, tick / fps)
        ahead = safety.apply(target)[:2]
        step = min(15.0, STEP * FPS / fps) if tick == 0 else 15.0
        assert ahead.tolist() == pytest.approx([step, -step])
    assert (safety.following_limited > 0).tolist() == [True] * 2 + [False] * 4
    safety.read(START + [1, 0, 0, 0, 0, 0], 2.0)  # free again
    assert 16.0 <= safety.apply(target)[0] <= 15.0 + STEP * FPS / fps


def test_a_goal_that_was_held_back_goes_on_as_the_joint_comes_after() -> None:
    safety = gate(fps=5.0, max_following_error_deg=15.0)
    safety.start(START)
    safety.read(START, 0.0)
    assert safety.apply(START + [50, 0, 0, 0, 0, 0])[0] == 15.0
    safety.read(START + [10, 0, 0, 0, 0, 0], 0.1)
    assert safety.apply(None)[0] == 50.0, "10 + 15 + 0.3 s at 100 deg/s are more"
    safety.read(START + [10.2, 0, 0, 0, 0, 0], 0.102)
    assert safety.apply(None)[0] == 50.0, "two readings of about one instant tell no speed"
    safety.read(START + [12, 0, 0, 0, 0, 0], 0.4)
    assert safety.apply(None)[0] == pytest.approx(12 + 15 + 2), "it hardly moves: blocked"
    safety.stay()
    safety.read(START + [29, 0, 0, 0, 0, 0], 0.6)
    assert safety.apply(None)[0] == pytest.approx(29), "what was wanted before a pause is over"


def test_a_joint_that_only_lags_moves_on() -> None:
    """Five ticks behind at 150 deg/s, as a real arm: 25 degrees, and nothing is limited."""
    safety = gate()
    safety.start(START)
    goals = [START]
    for tick in range(60):  # half a degree per tick and tick up to five, then on at that speed
        safety.read(goals[max(0, len(goals) - 6)], tick / FPS)
        goals.append(safety.apply(START + [min(0.25 * tick**2 if tick <= 10 else 5.0 * tick - 25.0, 90.0), 0, 0, 0, 0, 0]))
    assert not safety.following_limited.any()
    assert goals[-1][0] == 90.0


@pytest.mark.parametrize("drift_deg", [0.0, -0.5], ids=["blocked", "drifts away from its goal"])
def test_a_joint_that_does_not_follow_is_said_and_ends_the_run(drift_deg: float) -> None:
    said: list[str] = []
    safety = Limits(joints(), SafetyOptions(), 1 / FPS, echo=said.append)
    stands = START + [0, 30, 0, 0, 0, 0]
    safety.start(stands)
    ended_at = None
    for tick in range(400):
        safety.read(stands + [0, drift_deg * tick, 0, 0, 0, 0], tick / FPS)
        try:
            safety.apply(START + [0, 90, 0, 0, 0, 0])
        except UnsafeActionError as error:
            ended_at, message = tick, str(error)
            break
    assert ended_at is not None
    assert FPS * BLOCKED_END_S <= ended_at < FPS * BLOCKED_END_S + 10
    assert "shoulder_lift" in message
    assert "--max_following_error_deg" in message
    assert len(said) == 1
    assert "shoulder_lift" in said[0]
