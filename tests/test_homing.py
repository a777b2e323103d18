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
from control_fakes import LIMITS, Bench

from gr00t_fast.cli import run
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S, Poses, SafetyFilter, SafetyOptions
from gr00t_fast.control.pacer import SAME_STOP_S
from gr00t_fast.errors import CameraError, ConfigError, InferenceTimeoutError, PreflightError, RobotError, UnsafeActionError
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
    assert len(run.loop.trace) == 60, "the episodes have their whole time, and the report their ticks alone"
    assert run.robot.calls == ["connect", "reset", "reset", "land"]
    assert run.robot.beats > 120


def after(run: Bench, count: int, act) -> None:
    """`act` when so many targets are out."""
    run.robot.on_send = lambda: act() if len(run.robot.sent) == count else None


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def answers(act):
    """From the second inference on."""

    def ends(run: Bench) -> None:
        run.policy.on_action = lambda targets: targets if len(run.policy.seen) < 2 else act(targets)

    return ends


def twice(run: Bench) -> None:
    """Within milliseconds, as a terminal that closes does, and programs that pass signals on."""
    run.robot.on_send = lambda: send(signal.SIGHUP)() if len(run.robot.sent) in (10, 12) else None


def disk_full(run: Bench) -> None:
    run.loop.observers = [type("Full", (), {"see": raising(OSError(28, "No space left on device"))})]


def closed_terminal(run: Bench) -> None:
    """What is printed fails from the first word of the put-down on."""
    echo = run.loop.echo
    run.loop.echo = lambda line: (echo(line), raising(OSError(5, "closed"))() if "put down" in line else None)
    after(run, 10, lambda: run.stop.request("Esc"))


def suspended_meanwhile(run: Bench) -> None:
    """A lid that is closed once the arm is on its way down."""
    run.clock.suspended_s = lambda: 60.0 if len(run.robot.sent) > 40 else 0.0


def cable_out_meanwhile(run: Bench) -> None:
    """For longer than the move may take."""
    after(run, 35, lambda: (run.clock.advance(30.0), run.robot.events.update(reconnect=1)))


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDS = {
    "the time limit": (lambda run: None, None),
    "a key": (lambda run: after(run, 10, lambda: run.stop.request("Esc")), None),
    "a recording that failed": (lambda run: after(run, 10, lambda: run.stop.request("the disk is full", 1)), None),
    **{number.name: (lambda run, number=number: after(run, 10, send(number)), None) for number in STOPS},
    "a policy that raises": (answers(raising(ValueError("a bug"))), ValueError),
    "an inference that hangs": (answers(raising(InferenceTimeoutError("held for 2 s"))), InferenceTimeoutError),
    "rows of NaN": (answers(lambda targets: targets * np.nan), UnsafeActionError),
    "one that is delivered twice": (twice, None),
    "a camera": (lambda run: after(run, 10, lambda: setattr(run.robot, "on_frames", raising(CameraError("no frame")))), CameraError),
    "a full disk": (disk_full, OSError),
    "a terminal that is gone": (closed_terminal, None),
    "suspended on its way": (suspended_meanwhile, None),
    "a cable out on its way": (cable_out_meanwhile, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_the_arm_goes_back_to_where_it_lay(end: str) -> None:
    run = bench()
    cause, raised = ENDS[end]
    cause(run)
    with run.stop, pytest.raises(raised) if raised else contextlib.nullcontext():
        run.loop.run()
    np.testing.assert_allclose(run.sent()[-1], START)
    assert steps(run.sent())[-10:].max() <= SPEED / 30 + 1e-9
    assert run.robot.calls[-1] == "land"
    assert [line for line in run.said if "put down" in line and "Ctrl-C" in line and "torque goes off" in line]


def stop_later() -> None:
    time.sleep(SAME_STOP_S)
    send(signal.SIGINT)()


AT_ONCE = {  # what happens when so many targets are out; the sent ones then, the exit code, and what is said of it
    "the bus": ({10: raising(RobotError("the bus is gone"))}, 10, None, 0),
    "the bus, on the way": ({10: send(signal.SIGINT), 15: raising(RobotError("the bus is gone"))}, 15, 130, 1),
    "a further stop": ({10: send(signal.SIGINT), 15: stop_later}, 16, 130, 2),
    "a stop after a key": ({10: lambda: None, 15: stop_later}, 16, 0, 2),
}


@pytest.mark.parametrize("trouble", AT_ONCE)
def test_a_fault_of_the_bus_and_a_further_stop_take_the_torque_off_at_once(trouble: str) -> None:
    acts, sent, exit_code, lines = AT_ONCE[trouble]
    run = bench(rest=START)
    run.robot.stays_powered = True
    run.robot.on_send = lambda: acts.get(len(run.robot.sent), lambda: None)()
    if "key" in trouble:
        acts = {**acts, 10: lambda: run.stop.request("Esc")}
    with run.stop, pytest.raises(RobotError) if "bus" in trouble else contextlib.nullcontext():
        run.loop.run()
    assert len(run.robot.sent) == sent
    assert (run.robot.calls[-1], run.robot.left_as_found) == ("land", False)
    assert run.stop.exit_code == exit_code
    said = [line for line in run.said if "put down" in line or "stopped" in line]
    assert (len(said), all("stays powered" in line for line in said)) == (lines, True), said


def test_a_stop_on_the_way_home_puts_the_arm_down() -> None:
    run = bench(HOME)
    after(run, 5, send(signal.SIGINT))
    with run.stop:
        run.loop.run()
    np.testing.assert_allclose(run.sent()[-1], START)
    assert run.stop.exit_code == 130
    assert not run.policy.seen


@pytest.mark.parametrize("following_deg", [15.0, None])
def test_a_joint_that_is_stuck_does_not_keep_the_arm_powered(following_deg: float | None) -> None:
    """Nor does it push, also where the run's following error has no limit."""
    far = (110.0, *START[1:])  # further than a joint may be blocked in an episode
    run = bench(lay=far, safety=SafetyOptions(max_following_error_deg=following_deg))
    pose = run.robot.pose.copy()
    run.robot.stopped_at = lambda goal: np.where(np.arange(6) == 1, pose, goal)
    run.loop.run()
    assert run.robot.calls[-1] == "land"
    assert run.clock.now_s() - 100 < 14
    np.testing.assert_allclose(run.sent()[-1][[0, 2, 3, 4, 5]], np.array(far)[[0, 2, 3, 4, 5]])
    assert max(abs(sent[1] - pose[1]) for _, sent in run.robot.sent) <= 15, "its goal stays near"
    assert [line for line in run.said if "WARNING" in line and "shoulder_lift" in line]


@pytest.mark.parametrize(("fps", "line_s"), [(1.0, 0.0), (2.0, 0.0), (200.0, 0.025), (30.0, 0.15)])
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


@pytest.mark.parametrize("own", [1.0, 8.0])
def test_an_arm_that_cuts_off_larger_steps_is_put_down_all_the_way(own: float) -> None:
    """Its joints trail, so that goals which run ahead would be at the pose long before them."""
    run = bench(lay=(-80.0, *START[1:]), timeout_s=4.0)
    run.robot.max_step, cut = np.full(6, own), []
    at_s = [run.clock.now_s()]

    def trails() -> None:
        passed_s, at_s[0] = run.clock.now_s() - at_s[0], run.clock.now_s()
        if run.robot.sent:
            goal = run.robot.sent[-1][1]
            cut.append(np.abs(goal - run.robot.pose).max() - own)
            run.robot.pose = run.robot.pose + (goal - run.robot.pose) * (1 - np.exp(-passed_s / 0.15))

    run.robot._move = trails
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


@pytest.mark.parametrize("flag", ["home", "rest"])
def test_a_pose_the_arm_cannot_take_is_refused_before_the_torque(flag: str) -> None:
    for pose in (HOME[:5], (float("nan"), *HOME[1:])):
        with pytest.raises(ConfigError, match=f"--{flag}"):
            Poses(**{flag: pose})
    run = Bench(poses=Poses(**{flag: (200.0, *HOME[1:])}))
    with pytest.raises(PreflightError, match=f"--{flag}"):
        run.loop.run()
    assert run.robot.calls == ["connect", "land"]
    assert not run.robot.sent


FLAGS = ["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go"]
MEANINGLESS = ("--home=nowhere", "--home=[1, 2]", "--home=recordings", "--home=start", "--rest=home", "--home_speed_deg_s=0")
ABSURD = ("--home_speed_deg_s=1e-6", "--max_speed_deg_s=1e-6", "--max_following_error_deg=1e-9", "--max_hold_s=1e9", "--reset_time_s=1e9")


@pytest.mark.parametrize("words", [*((word,) for word in (*MEANINGLESS, *ABSURD)), ("--home_speed_deg_s=20", "--rest=null")])
def test_poses_that_mean_nothing_are_usage_errors(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=words[0].split("=")[0]):
        run.parse([*FLAGS, *words])


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    poses = ["--home=[0, -90, 90, 60, 0, 10]", "--rest=home"]
    config = run.parse([*FLAGS, *poses])
    assert (config.poses.home, config.poses.rest, config.safety.max_speed_deg_s) == ([0, -90, 90, 60, 0, 10], "home", "auto")
    assert [run.parse([*FLAGS, *words]).poses.rest for words in ([], ["--rest=null"])] == ["start", None]
    assert "dry run" not in capsys.readouterr().err
    run.parse([*FLAGS, *poses, "--dry_run"])
    said = capsys.readouterr().err
    assert "--home and --rest" in said
    assert "dry run" in said


def write_recordings(directory: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    feature = {"dtype": "float32", "shape": [6], "names": [f"{name}.pos" for name in SO100_JOINTS]}
    (directory / "meta").mkdir(parents=True)
    (directory / "meta" / "info.json").write_text(json.dumps({"fps": 30, "features": {"observation.state": feature, "action": feature}}))
    for episode, begin in enumerate((10.0, 12.0, 50.0)):
        path = [[begin + 2.0 * row] * 5 + [min(99.0, 4.0 * row)] for row in range(20)]
        columns = {"observation.state": path, "action": path, "episode_index": [episode] * 20, "frame_index": list(range(20))}
        file = directory / "data" / f"chunk-{episode:03d}" / "file-000.parquet"
        file.parent.mkdir(parents=True)
        parquet.write_table(arrow.table(columns), file)


def test_recordings_say_where_they_begin_and_how_fast_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LeRobotDataset"):
        read_recordings(tmp_path, SO100_JOINTS)
    write_recordings(tmp_path)
    with pytest.raises(ConfigError, match="this kind of arm"):
        read_recordings(tmp_path, ("a", "b", "c", "d", "e", "f"))
    found = read_recordings(tmp_path, SO100_JOINTS)
    np.testing.assert_allclose(found.begin, [12.0] * 5 + [0.0])
    np.testing.assert_allclose(found.fastest_units_s, [60.0] * 5 + [120.0])
    assert found.episodes == 3
    options = SafetyOptions(recorded_units_s=tuple(found.fastest_units_s.tolist()))
    safety = SafetyFilter(LIMITS, SO100_JOINTS, options, fps=30.0, units_per_deg=np.ones(6))
    assert safety.max_speed_deg_s == pytest.approx(180.0)
    leap = SafetyOptions(recorded_units_s=(9000.0,) * 6)
    assert SafetyFilter(LIMITS, SO100_JOINTS, leap, fps=30.0, units_per_deg=np.ones(6)).max_speed_deg_s == DEFAULT_MAX_SPEED_DEG_S
