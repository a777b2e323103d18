"""Slow moves to a pose: where they go, how fast, and what stops them; and what recordings say. Virtual time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from arm_bench import raising
from control_fakes import Bench, joints

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ArmAwayError, BusFault, CameraError, ConfigError, MissedReadingError, PreflightError, RobotError
from gr00t_fast.base.signals import FURTHER_AFTER_S
from gr00t_fast.cli import run
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S, Limits, Poses, SafetyOptions
from gr00t_fast.inputs.dataset import read_recordings

HOME, REST = (10.0, -60.0, 45.0, 20.0, 0.0, 30.0), (0.0, -90.0, 85.0, 60.0, 0.0, 5.0)
SPEED = 60.0  # 2 degrees a tick


START = (1.0, -20.0, 30.0, 15.0, 5.0, 40.0)  # where the arm lay when its torque went on


def bench(home=None, rest="start", lay=START, **options) -> Bench:
    run = Bench(poses=Poses(home, rest, SPEED), camera_fault=None, **options)
    run.robot.rest_pose = None if lay is None else np.array(lay)
    return run


def steps(sent: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(np.vstack([[0, 0, 0, 0, 0, 50], sent]), axis=0)).max(axis=1)


def test_the_arm_is_at_home_before_the_first_look_of_the_network_and_between_episodes() -> None:
    run = bench(HOME, episodes=2, reset_time_s=2.0)
    run.loop.run()
    seen = np.concatenate([run.policy.seen[0]["state.single_arm"][0], run.policy.seen[0]["state.gripper"][0]])
    np.testing.assert_allclose(seen, HOME)
    np.testing.assert_allclose(steps(run.sent())[:30], SPEED / 30)
    back = [index for index, line in enumerate(run.said) if "home pose" in line]
    holds = next(index for index, line in enumerate(run.said) if "put things back" in line)
    assert len(back) == 2, "before each episode; the second move comes before the pause"
    assert back[1] < holds
    assert len(run.loop.trace) == 56, "the episodes have their whole time, and the report their ticks alone"
    assert run.robot.calls == ["connect", "reset", "reset", "land"]
    assert run.robot.beats > 120


def after(run: Bench, count: int, act) -> None:
    """`act` when so many targets are out."""
    run.robot.on_send = lambda: act(run) if len(run.robot.sent) == count else None


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def terminal_closes(run: Bench) -> None:
    """What is printed fails from the first word of the put-down on."""
    echo = run.loop.echo
    run.loop.echo = lambda line: (echo(line), raising(OSError(5, "closed"))() if "put down" in line else None)
    run.stop.request("Esc", by_person=True)


def once(run: Bench, error: Exception):
    """What raises when the robot is observed, and then no more."""

    def hook() -> None:
        run.robot.on_observe = lambda: None
        raise error

    return hook


def cable_out(run: Bench, seconds: float) -> None:
    """From the goal that is sent now on."""
    back_s = run.clock.now_s() + seconds

    def away() -> None:
        if run.clock.now_s() < back_s:
            raise ArmAwayError("the port is lost.", 5.0)

    run.robot.on_send = run.robot.on_observe = away
    away()


FULL = type("Full", (), {"see": raising(OSError(28, "No space left on device"))})
ENDS = {  # after so many targets, of which the episode has 30; what happens; raised
    "a key": (10, lambda run: run.stop.request("Esc", by_person=True), None),
    "SIGTERM": (10, lambda run: send(signal.SIGTERM), None),
    "one that is delivered twice": (10, lambda run: (send(signal.SIGHUP), send(signal.SIGHUP)), None),  # as a terminal that closes does
    "a policy that raises": (10, lambda run: setattr(run.policy, "on_action", raising(ValueError("a bug"))), ValueError),
    "a camera": (10, lambda run: setattr(run.robot, "on_frames", raising(CameraError("no frame"))), CameraError),
    "a hot servo": (10, lambda run: setattr(run.robot, "on_observe", once(run, RobotError("too hot"))), RobotError),
    "three within 0.4 s": (10, lambda run: [send(signal.SIGINT) or time.sleep(0.15) for _ in range(3)], None),
    "a terminal that closes on the way": (34, lambda run: (time.sleep(FURTHER_AFTER_S + 0.05), send(signal.SIGHUP)), None),
    "one Ctrl-C after the end": (34, lambda run: (time.sleep(FURTHER_AFTER_S + 0.05), send(signal.SIGINT)), None),
    "a full disk": (10, lambda run: setattr(run.loop, "observers", [FULL()]), OSError),
    "a terminal that is gone": (10, terminal_closes, None),
    "suspended on its way": (40, lambda run: setattr(run.clock, "asleep_s", 60.0), None),
    "held up on its way": (40, lambda run: run.clock.advance(30.0), None),  # longer than the move may take
    "a cable out on its way": (40, lambda run: cable_out(run, 4.5), None),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_the_arm_goes_back_to_where_it_lay(end: str) -> None:
    run = bench()
    count, act, raised = ENDS[end]
    after(run, count, act)
    with run.stop, pytest.raises(raised) if raised else contextlib.nullcontext():
        run.loop.run()
    np.testing.assert_allclose(run.sent()[-1], START)
    assert steps(run.sent())[-10:].max() <= SPEED / 30 + 1e-9
    assert run.robot.calls[-1] == "land"
    assert [line for line in run.said if "put down" in line and "Ctrl-C" in line and "torque goes off" in line]


def stop_again(run: Bench) -> None:
    time.sleep(FURTHER_AFTER_S + 0.05)
    send(signal.SIGINT)


def bus_fails(run: Bench) -> None:
    raise BusFault("the bus is gone")


AT_ONCE = {  # what happens after 10 and 15 targets; the sent ones then, the exit code, and how often it is said that the arm stays powered
    "the bus": (bus_fails, None, 10, None, 0),
    "the bus, on the way": (lambda run: send(signal.SIGINT), bus_fails, 15, 130, 1),
    "a further stop": (lambda run: send(signal.SIGINT), stop_again, 16, 130, 2),
    "a stop after a key": (lambda run: run.stop.request("Esc", by_person=True), stop_again, 16, 0, 2),
}


@pytest.mark.parametrize("trouble", AT_ONCE)
def test_a_fault_of_the_bus_and_a_further_stop_take_the_torque_off_at_once(trouble: str) -> None:
    first, second, sent, exit_code, lines = AT_ONCE[trouble]
    run = bench(rest=START)
    run.robot.stays_powered = True
    run.robot.on_send = lambda: {10: first, 15: second}.get(len(run.robot.sent), lambda run: None)(run)
    with run.stop, pytest.raises(RobotError) if "bus" in trouble else contextlib.nullcontext():
        run.loop.run()
    assert len(run.robot.sent) == sent
    assert (run.robot.calls[-1], run.robot.left_as_found) == ("land", False)
    assert run.stop.exit_code == exit_code
    said = [line for line in run.said if "put down" in line or "stopped" in line]
    assert (len(said), all("stays powered" in line for line in said)) == (lines, True), said


@pytest.mark.parametrize("trouble", ["a camera", "a missed reading, and a stop", "a stop"])
def test_trouble_as_soon_as_the_torque_is_on_puts_the_arm_down_at_a_named_pose(trouble: str) -> None:
    """The arm may have been held up."""
    run = bench(rest=HOME)
    run.robot.pose = np.array(START)

    def once_on(what: str, error: Exception) -> None:
        if "reset" in run.robot.calls and what in trouble and not run.robot.sent:
            if "stop" in trouble:
                send(signal.SIGINT)
            raise error

    run.robot.on_frames = lambda: once_on("a camera", CameraError("no frame"))
    run.robot.on_observe = lambda: once_on("a missed reading", MissedReadingError("nothing"))
    run.robot.lower_if_killed = lambda pose: send(signal.SIGINT) if trouble == "a stop" else None
    with run.stop, pytest.raises(CameraError) if trouble == "a camera" else contextlib.nullcontext():
        run.loop.run()
    np.testing.assert_allclose(run.sent()[-1], HOME)
    assert np.abs(np.diff(np.vstack([START, run.sent()]), axis=0)).max() <= SPEED / 30 + 1e-9
    assert run.robot.calls == ["connect", "reset", "land"]


def test_a_stop_on_the_way_home_puts_the_arm_down() -> None:
    run = bench(HOME)
    after(run, 5, lambda run: send(signal.SIGINT))
    with run.stop:
        run.loop.run()
    np.testing.assert_allclose(run.sent()[-1], START)
    assert run.stop.exit_code == 130
    assert not run.policy.seen


@pytest.mark.parametrize(("fps", "line_s"), [(1.0, 0.0), (200.0, 0.025), (30.0, 0.15)])
def test_a_slow_move_is_slow_and_arrives_whatever_the_runs_rate_and_the_arms_line(fps: float, line_s: float) -> None:
    far = (100.0, -100.0, *START[2:])
    run = bench(fps=fps, home=far)
    run.robot.on_observe = lambda: run.clock.advance(line_s)
    home_s: list[float] = []
    run.robot.on_send = lambda: home_s.append(run.clock.now_s()) if not run.loop.trace.episodes else None
    run.loop.run()
    times, moves = run.times(), steps(run.sent())[1:]
    slow = (times[1:] <= home_s[-1]) | (times[1:] > times[-1] - 1.5)
    assert slow.sum() > 20
    assert moves[slow].max() <= SPEED / 20, "no leaps"
    assert (moves[slow] / np.diff(times)[slow]).max() <= 1.01 * SPEED
    np.testing.assert_allclose(run.sent()[np.searchsorted(times, home_s[-1])], far)
    np.testing.assert_allclose(run.sent()[-1], START)


def test_an_arm_that_cuts_off_larger_steps_is_put_down_all_the_way() -> None:
    """Its joints trail, so that goals which run ahead would be at the pose long before them."""
    run = bench(lay=(-80.0, *START[1:]), timeout_s=4.0)
    run.robot.max_step, cut = np.ones(6), []
    at_s = [run.clock.now_s()]

    def trails() -> None:
        passed_s, at_s[0] = run.clock.now_s() - at_s[0], run.clock.now_s()
        if run.robot.sent:
            goal = run.robot.sent[-1][1]
            cut.append(np.abs(goal - run.robot.pose).max() - 1)
            run.robot.pose = run.robot.pose + (goal - run.robot.pose) * (1 - np.exp(-passed_s / 0.15))

    run.robot.move = trails
    run.loop.run()
    assert max(cut) <= 0
    assert np.abs(run.robot.pose - run.robot.rest_pose).max() < 3.0


@pytest.mark.parametrize(("rest", "lay", "left"), [("start", None, True), (REST, None, False), (None, START, True)])
def test_an_arm_without_a_pose_is_left_as_it_was_found(rest, lay, left: bool) -> None:
    run = bench(rest=rest, lay=lay)
    run.loop.run()
    assert run.robot.left_as_found == left
    assert np.allclose(run.sent()[-1], REST) == (rest == REST)


def holding(pose: np.ndarray) -> np.ndarray:
    """The gripper closes no further."""
    return np.append(pose[:5], max(pose[5], 40.0))


def test_a_gripper_that_holds_something_does_not_keep_the_arm_from_home() -> None:
    run = bench((*HOME[:5], 0.0), rest=None)
    run.robot.stopped_at = holding
    run.loop.run()
    assert [line for line in run.said if "not quite" in line and "gripper" in line]
    assert run.policy.seen


def test_a_gripper_keeps_its_squeeze_from_one_episode_to_the_next() -> None:
    """Its goal lies within what it holds; begun anew at where it stands, it would open its hand."""
    run = bench(rest=None, episodes=2, safety=SafetyOptions(max_speed_deg_s=60.0))
    run.policy.on_action = lambda targets: np.tile([0.0, 0, 0, 0, 0, 30], (len(targets), 1))
    run.robot.stopped_at, begins = holding, []
    run.robot.reset = lambda seed: begins.append(len(run.robot.sent))
    run.loop.run()
    squeezed = run.sent()[:, 5]
    assert squeezed[begins[1] - 1] == pytest.approx(30)
    assert squeezed[begins[1] :].max() == pytest.approx(30)


@pytest.mark.parametrize("pose", ["home", "rest"])
def test_the_gripper_moves_when_the_body_is_there_and_is_waited_for(pose: str) -> None:
    """What it holds is put down, and does not fall from the air. The body has little to go, the gripper much."""
    far = (2.0, -2.0, 2.0, 0.0, 0.0, 95.0)
    run = bench(far if pose == "home" else None, rest="start", lay=far, timeout_s=0.1)
    run.policy.on_action = lambda targets: np.tile(run.robot.pose, (len(targets), 1))
    run.loop.run()
    sent = run.sent()
    begins = int(np.flatnonzero(np.abs(np.diff(sent[:, 5])) > 0.1)[0])
    np.testing.assert_allclose(sent[begins, :5], far[:5], atol=0.1)
    np.testing.assert_allclose(run.robot.pose, far, atol=SPEED / 30)
    assert not [line for line in run.said if "not quite" in line]


def test_a_gripper_keeps_its_squeeze_over_a_gap_on_the_way_down() -> None:
    """Its goal lies within what it holds; begun anew at where it stands, it would open its hand in the air."""
    run = bench(lay=(-40.0, *START[1:5], 50.0))
    run.policy.on_action = lambda targets: np.tile([20.0, 0, 0, 0, 0, 30], (len(targets), 1))
    run.robot.stopped_at = holding
    after(run, 45, lambda run: cable_out(run, 1.0))  # the episode has 29
    run.loop.run()
    sent = run.sent()
    moving = np.abs(sent[:, 0] + 40) > 0.1
    assert sent[40:][moving[40:], 5].max() == pytest.approx(30, abs=0.1), "until the body is there"


@pytest.mark.parametrize("flag", ["home", "rest"])
def test_a_pose_the_arm_cannot_take_is_refused_before_the_torque(flag: str) -> None:
    run = Bench(poses=Poses(**{flag: (200.0, *HOME[1:])}))
    with pytest.raises(PreflightError, match=f"--{flag}"):
        run.loop.run()
    assert run.robot.calls == ["connect", "land"]
    assert not run.robot.sent


FLAGS = ["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go"]


@pytest.mark.parametrize("word", ["--home=nowhere", "--home=[1, 2]", "--home=recordings", "--rest=home", "--home_speed_deg_s=0"])
def test_poses_that_mean_nothing_are_usage_errors(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        run.parse([*FLAGS, word])


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    config = run.parse([*FLAGS, "--home=[0, -90, 90, 60, 0, 10]", "--rest=home", "--dry_run"])
    assert (config.poses.home, config.poses.rest, config.safety.max_speed_deg_s) == ([0, -90, 90, 60, 0, 10], "home", "auto")
    assert "--home and --rest" in capsys.readouterr().err, "a dry run makes no moves"
    assert [run.parse([*FLAGS, *words]).poses.rest for words in ([], ["--rest=null"])] == ["start", None]


def test_recordings_say_where_they_begin_and_how_fast_they_are(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match="no LeRobotDataset"):
        read_recordings(tmp_path, SO100_JOINTS)
    feature = {"dtype": "float32", "shape": [6], "names": [f"{name}.pos" for name in SO100_JOINTS]}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"fps": 30, "features": {"observation.state": feature, "action": feature}}))
    for episode, begin in enumerate((10.0, 12.0, 50.0)):
        path = [[begin + 2.0 * row] * 5 + [min(99.0, 4.0 * row)] for row in range(20)]
        columns = {"observation.state": path, "action": path, "episode_index": [episode] * 20, "frame_index": list(range(20))}
        file = tmp_path / "data" / f"chunk-{episode:03d}" / "file-000.parquet"
        file.parent.mkdir(parents=True)
        parquet.write_table(arrow.table(columns), file)
    with pytest.raises(ConfigError, match="this kind of arm"):
        read_recordings(tmp_path, ("a", "b", "c", "d", "e", "f"))
    found = read_recordings(tmp_path, SO100_JOINTS)
    np.testing.assert_allclose(found.begin, [12.0] * 5 + [0.0])
    np.testing.assert_allclose(found.fastest_units_s, [60.0] * 5 + [120.0])
    assert found.episodes == 3
    for recorded, limit_deg_s in ((tuple(found.fastest_units_s.tolist()), 180.0), ((9000.0,) * 6, DEFAULT_MAX_SPEED_DEG_S)):
        safety = Limits(joints(), SafetyOptions(recorded_units_s=recorded), 1 / 30)
        assert safety.max_speed_deg_s == pytest.approx(limit_deg_s)
