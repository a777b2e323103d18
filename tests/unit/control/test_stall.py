"""Stall protection: what counts as blocked and what does not, what happens to the joint then, and to everything else. Virtual time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from control_fakes import TICK_S, Bench, joints

from gr00t_fast.base.contracts import SO100_JOINTS, MotorLoads, Observation
from gr00t_fast.base.errors import UnsafeActionError
from gr00t_fast.control.limits import Limits, Poses, SafetyOptions
from gr00t_fast.control.modes import Mode
from gr00t_fast.record.report import build_report, sections, text_of

START = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 50.0])
ELBOW, GRIPPER = 2, 5
POLL_TICKS = 12  # each joint is asked every 0.4 s


class Arm:
    """A gate, and joints whose motors push as a servo does: in proportion to how far the goal is ahead. Joints reach their goal at once, but for
    `blocked` ones, which stand still. `push` (J,) replaces that load where it is not NaN; `current_ma` is the same for all."""

    def __init__(self, **options: object) -> None:
        self.said: list[str] = []
        safety = SafetyOptions(max_speed_deg_s=None, **options)
        self.safety = Limits(joints(), safety, 1 / 30, echo=self.said.append)
        self.safety.start(START)
        self.joints, self.goal = START.copy(), START.copy()
        self.blocked, self.push, self.current_ma = np.zeros(6, bool), np.full(6, np.nan), 0.0
        never = np.full(6, np.nan)
        self.loads = MotorLoads(never, never, never)
        self.asked = np.ones(6, bool)  # who answers the polls
        self.ticks = 0

    @property
    def held(self) -> list[str]:
        return [name for name, held in zip(SO100_JOINTS, self.safety.blocked.held, strict=True) if held]

    def play(self, target: np.ndarray, ticks: int = 1) -> np.ndarray:
        """Returns the last goal (J,)."""
        for _ in range(ticks):
            self.goal = self.safety.apply(target)
            self.joints = np.where(self.blocked, self.joints, self.goal)
            self.look()
        return self.goal

    def look(self) -> None:
        self.ticks += 1
        now_s = self.ticks * TICK_S
        if self.ticks % POLL_TICKS == 0:
            percent = np.where(np.isnan(self.push), np.minimum(100, 4.65 * np.abs(self.goal - self.joints)), self.push)
            read = [np.where(self.asked, new, old) for new, old in ((percent, self.loads.percent), (self.current_ma, self.loads.current_ma))]
            self.loads = MotorLoads(*read, np.where(self.asked, now_s, self.loads.time_s))
        self.safety.read(self.joints, now_s, self.loads)


def ahead(joint: int, degrees: float) -> np.ndarray:
    target = START.copy()
    target[joint] += degrees
    return target


def test_a_blocked_joint_is_held_where_it_stands_and_the_others_go_on() -> None:
    arm = Arm()
    arm.blocked[ELBOW] = True
    arm.play(START + [20, 0, 60, 0, 0, 0], ticks=int(1.3 * 30))
    assert arm.held == ["elbow_flex"]
    assert arm.goal[ELBOW] == 0.0, "the servo has nothing left to push for"
    assert arm.goal[0] == 20.0
    arm.play(START + [50, 0, 60, 0, 0, 0], ticks=300)
    assert arm.goal[ELBOW] == 0.0, "nor does the run end, as it does where a joint pushes on"
    assert arm.joints[0] == 50.0
    assert len(arm.said) == 1
    for word in ("WARNING", "elbow_flex", "--stall_after_s"):
        assert word in arm.said[0]


def stalled(joint: int = ELBOW, degrees: float = 60.0) -> Arm:
    arm = Arm()
    arm.blocked[joint] = True
    arm.play(ahead(joint, degrees), ticks=45)
    assert arm.safety.blocked.held[joint]
    return arm


@pytest.mark.parametrize("degrees", [60.0, -60.0])
def test_it_follows_a_target_that_turns_back(degrees: float) -> None:
    arm = stalled(degrees=degrees)
    arm.play(ahead(ELBOW, degrees / 10), ticks=30)
    assert arm.held, "still on the same side of where it stands"
    arm.blocked[ELBOW] = False
    arm.play(ahead(ELBOW, -degrees / 4), ticks=3)
    assert not arm.held
    assert arm.joints[ELBOW] == -degrees / 4
    assert [word in line for word, line in zip(("blocked", "elbow_flex"), arm.said, strict=True)] == [True, True]


def test_it_goes_on_when_it_moves_towards_its_target_and_not_when_it_sinks_back() -> None:
    arm = stalled()
    arm.joints[ELBOW], arm.push[ELBOW] = -8.0, 95.0  # its weight is more than it can hold there
    arm.play(ahead(ELBOW, 60), ticks=60)
    assert arm.held
    assert arm.goal[ELBOW] == 0.0
    assert len(arm.said) == 1, "no further stall, from which it would sink on"
    arm.joints[ELBOW] = 4.0  # somebody has freed it and turned it on
    arm.look()
    assert not arm.held
    arm.blocked[ELBOW] = False
    arm.play(ahead(ELBOW, 60), ticks=30)
    assert arm.joints[ELBOW] == 60.0


def test_every_stall_is_counted_and_timed() -> None:
    arm = stalled()
    began = arm.ticks
    for _ in range(2):
        arm.play(ahead(ELBOW, -1))
        arm.play(ahead(ELBOW, 60), ticks=45)
    arm.play(ahead(ELBOW, -1))
    stall = arm.safety.blocked
    assert stall.count.tolist() == [0, 0, 3, 0, 0, 0]
    assert 0.3 < stall.total_s[ELBOW] < (arm.ticks - began + 45) * TICK_S
    assert len(arm.said) == 6


def fast_start(arm: Arm) -> None:
    """Full drive from rest and all the way, at 30 degrees a second."""
    arm.push[:] = 100.0
    for tick in range(90):
        arm.play(START + np.minimum(tick, 90.0) * np.array([1, 1, 1, 1, 1, 0.5]))


def slow_joint(arm: Arm) -> None:
    arm.push[:], arm.blocked[:] = 95.0, True
    for tick in range(600):
        arm.joints[ELBOW] = 0.1 * tick  # 3 degrees a second
        arm.play(ahead(ELBOW, 100.0))


def push_now_and_then(arm: Arm) -> None:
    """Hard at every other reading, 0.8 s apart: a joint that is about to move."""
    arm.blocked[ELBOW] = True
    for tick in range(120):
        arm.push[ELBOW] = 95.0 if (tick + 1) // POLL_TICKS % 2 else 20.0
        arm.play(ahead(ELBOW, 12))


def readings_from_before_an_episode(arm: Arm) -> None:
    arm.blocked[ELBOW] = True
    arm.play(ahead(ELBOW, 60), ticks=POLL_TICKS + 1)
    arm.safety.start(arm.joints)
    arm.ticks += 60 - arm.ticks % POLL_TICKS
    arm.play(ahead(ELBOW, 60), ticks=POLL_TICKS + 1)


def target_to_and_fro(arm: Arm) -> None:
    """Each chunk in another direction."""
    arm.blocked[ELBOW], arm.push[ELBOW] = True, 95.0
    for tick in range(300):
        arm.play(ahead(ELBOW, 14.0 if tick // 15 % 2 else -14.0))


def always_full_load(arm: Arm) -> None:
    """A servo that reports nonsense, of an arm that follows."""
    arm.push[:], arm.current_ma = 102.3, 1e9
    for tick in range(300):
        arm.play(START + 40 * np.sin(tick / 20) * np.array([1, 1, 1, 1, 1, 0]))
    arm.play(START, ticks=120)


def stands(offset: np.ndarray, push: float | None = None, ticks: int = 300):
    """Joints with a goal that far ahead stand still, and push with so many per cent, or as a servo does."""

    def act(arm: Arm) -> None:
        arm.blocked = offset != 0
        if push is not None:
            arm.push[arm.blocked] = push
        arm.play(START + offset, ticks=ticks)

    return act


NO_STALL = {
    "a fast start": fast_start,
    "a slow joint": slow_joint,
    "a push now and then": push_now_and_then,
    "readings from before an episode": readings_from_before_an_episode,
    "a target to and fro about the joint": target_to_and_fro,
    "always full load": always_full_load,
    "a weight held at the goal, sagged as gravity and friction leave it": stands(np.array([0, 2.5, 0, 0, 0, 0]), 90.0),
    "sagging under a weight that needs half the drive": stands(np.array([0, 11.0, 0, 0, 0, 0]), 50.0),
    "lying on a stop short of the goal": stands(np.array([0.0, -8, 8, 8, 0, 0])),  # 37 %
    "a gripper that holds something": stands(np.array([0, 0, 0, 0, 0, -40.0]), ticks=600),
}


@pytest.mark.parametrize("what", NO_STALL)
def test_what_is_no_stall(what: str) -> None:
    arm = Arm()
    NO_STALL[what](arm)
    assert not arm.said


# In the loop


def arm_bench(**options: object) -> Bench:
    """A loop whose robot has blockable joints and load readings as `Arm` has: see `blocked`."""
    run = Bench(camera_fault=None, **options)
    robot = run.robot
    run.blocked = np.zeros(6, bool)
    observe, looks = robot.observe, [0]
    never = np.full(6, np.nan)
    robot.loads = MotorLoads(never, never, never)

    def with_loads(*with_frames: bool) -> Observation:
        seen = observe(*with_frames)
        looks[0] += 1
        if looks[0] % POLL_TICKS == 0 and robot.sent:
            percent = np.minimum(100, 4.65 * np.abs(robot.sent[-1][1] - robot.pose))
            robot.loads = MotorLoads(percent, np.zeros(6), np.full(6, seen.time_s))
        return dataclasses.replace(seen, loads=robot.loads)

    robot.stopped_at, robot.observe = lambda goal: np.where(run.blocked, robot.pose, goal), with_loads
    return run


def towards(degrees: float):
    """What the policy wants: `degrees` for all joints, whatever it sees."""
    return lambda targets: np.full_like(targets, degrees)


def test_a_run_goes_on_with_what_is_not_blocked_and_reports_it() -> None:
    run = arm_bench(inference_s=0.01, timeout_s=20.0)
    run.policy.on_action = towards(40.0)
    run.blocked[ELBOW] = True
    run.loop.run()
    np.testing.assert_array_equal(run.sent()[-1], [40, 40, 0, 40, 40, 40])
    np.testing.assert_array_equal(run.loop.trace.arrays()["commanded"], run.sent()[: len(run.loop.trace)])
    report = build_report(run.loop, {}, [])
    assert report["safety"]["stalled"]["elbow_flex"]["times"] == 1
    assert list(report["safety"]["stalled"]) == ["elbow_flex"]
    assert report["safety"]["stalled"]["elbow_flex"]["total_s"] > 10
    assert "elbow_flex 1 time(s)" in text_of(sections(report))
    assert not [line for line in run.said if "no stall protection" in line]
    assert run.robot.calls[-1] == "land"


@pytest.mark.parametrize("horizon", [7, 11])  # found with the last target of a chunk out: nothing is sent before the next chunk
def test_an_arm_that_waits_for_inferences_does_not_push_meanwhile(horizon: int) -> None:
    run = arm_bench(inference_s=1.8, horizon=horizon, timeout_s=30.0)
    run.policy.on_action = towards(40.0)
    run.blocked[ELBOW] = True
    goals, infer = [], run.policy.get_action

    def get_action(*args: object, **options: object) -> dict[str, np.ndarray]:
        if run.loop.limits.blocked.held[ELBOW]:
            goals.append(run.sent()[-1][ELBOW])
        return infer(*args, **options)

    run.policy.get_action = get_action
    run.loop.run()
    assert len(goals) > 3
    assert set(goals) == {0.0}
    assert build_report(run.loop, {}, [])["safety"]["stalled"]["elbow_flex"]["times"] == 1


def test_a_joint_found_blocked_in_the_pause_is_held_too() -> None:
    run = arm_bench(episodes=2, timeout_s=0.5, reset_time_s=5.0)
    run.policy.on_action = towards(30.0)
    run.blocked[ELBOW] = True
    pause = []
    run.robot.on_send = lambda: pause.append(run.loop.mode is Mode.BETWEEN)
    run.loop.run()
    in_pause = [goal for goal, paused in zip(run.sent(), pause, strict=True) if paused]
    assert in_pause[-1][ELBOW] == 0.0
    assert "elbow_flex" in "".join(line for line in run.said if "blocked" in line)
    assert not [line for line in run.said if "turned back" in line]


def test_a_blocked_way_home_ends_the_run_at_once() -> None:
    run = arm_bench(poses=Poses((60.0, 60.0, 60.0, 0.0, 0.0, 50.0), None, 60.0))
    run.blocked[ELBOW] = True
    with pytest.raises(UnsafeActionError, match="elbow_flex.*home"):
        run.loop.run()
    assert run.clock.now_s() - 100 < 3.0
    assert run.robot.calls[-1] == "land"
    assert not run.policy.seen


@pytest.mark.parametrize("stall_after_s", [0.7, None])
def test_a_blocked_way_to_rest_lands_after_the_others_have_arrived(stall_after_s: float | None) -> None:
    """The joint is held, also where the run has no stall protection."""
    safety = SafetyOptions(stall_after_s=stall_after_s)
    run = arm_bench(poses=Poses(None, (-60.0, -60.0, -60.0, 0.0, 0.0, 50.0), 60.0), timeout_s=0.5, safety=safety)
    run.policy.on_action = towards(0.0)
    run.robot.on_send = lambda: run.blocked.__setitem__(ELBOW, run.loop.mode is Mode.PUT_DOWN)
    run.loop.run()
    np.testing.assert_allclose(run.sent()[-1][[0, 1, 3, 4]], [-60, -60, 0, 0])
    assert abs(run.sent()[-1][ELBOW]) < 3, "it does not push on"
    assert run.loop.trace.ended_by == "done"
    assert [line for line in run.said if "not quite" in line and "elbow_flex" in line]
    assert run.robot.calls[-1] == "land"
