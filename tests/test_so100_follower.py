"""The adapter of the real arm: lerobot's unmodified driver over the virtual servo bus. Faults have their own table in test_faults.py."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")

import virtual_camera
from arm_bench import ON, assert_landed, connected, make_arm, power, raising, true_joints
from waiting import until

from gr00t_fast.cli.run import parse, settings_of
from gr00t_fast.contracts import SO100_JOINTS, Robot
from gr00t_fast.errors import CameraError, ConfigError, MissingExtraError, RobotError
from gr00t_fast.robots import check_ready, lerobot_glue, make_robot, so100
from gr00t_fast.robots import config as ours
from gr00t_fast.robots.lerobot_glue import GAINS, calibration_file, make_follower
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.robots.virtual_bus import Register, Servo, VirtualBus, save_calibration


@pytest.fixture
def arm(bus: VirtualBus, tmp_path: Path) -> Iterator[SO100FollowerArm]:
    """Connected; landed at the end, and that is checked."""
    with connected(tmp_path, bus, engaged=False) as (_, arm):
        yield arm


@pytest.fixture(autouse=True)
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the driver asked a question"))


# Configuration


def defaults(cls: type) -> dict[str, object]:
    """Field -> default, enum values as plain ones."""
    made = {field.name: field.default_factory() for field in dataclasses.fields(cls) if field.default_factory is not dataclasses.MISSING}
    return {field.name: getattr(field.default, "value", field.default) for field in dataclasses.fields(cls)} | made


def test_our_flags_are_lerobots() -> None:
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO100FollowerConfig

    own, newer = {"connect_attempts", "reconnect_s", "watchdog_s"}, {"num_read_retries", *GAINS}  # newer: not in every version of lerobot
    open_there = {"port", "width", "height", "fps", "index_or_path"}  # lerobot refuses a robot's camera without them
    for mine, lerobots in ((ours.SO100FollowerConfig, SO100FollowerConfig), (ours.OpenCVCameraConfig, OpenCVCameraConfig)):
        arm, theirs = defaults(mine), defaults(lerobots)
        assert set(arm) - own - newer == set(theirs) - newer
        assert {name: arm[name] for name in set(theirs) - open_there} == {name: theirs[name] for name in set(theirs) - open_there}
    types, their_types = typing.get_type_hints(ours.SO100FollowerConfig), typing.get_type_hints(SO100FollowerConfig)
    assert all(types[name] == their_types[name] for name in defaults(SO100FollowerConfig) if name != "cameras")


def test_newer_drivers_set_gains_and_one_turn(bus: VirtualBus, tmp_path: Path) -> None:
    from lerobot.robots.so_follower import SO100FollowerConfig

    newer = "position_p_coefficient" in defaults(SO100FollowerConfig)
    gains = {"position_p_coefficient": 24, "position_d_coefficient": 40}
    if not newer:
        with pytest.raises(ConfigError, match="--robot.position_p_coefficient needs lerobot 0.6"):
            make_arm(bus, tmp_path, **gains).connect()
    bus.servos[1].registers[Register.PHASE] |= 16  # positions count turns
    with connected(tmp_path, bus, **(gains if newer else {})):
        registers = [tuple(servo.registers[at] for at in (Register.P_GAIN, Register.I_GAIN, Register.D_GAIN)) for servo in bus.servos]
        assert registers == [(24, 0, 40) if newer else (16, 0, 32)] * 6
        assert [servo.registers[Register.PHASE] for servo in bus.servos] == [12, 12 if newer else 28, 12, 12, 12, 12]


@pytest.mark.parametrize("retries", [0, 4])
def test_so_many_retries_as_the_flag_says(retries: int, tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False, num_read_retries=retries) as (bus, arm):
        before = arm.events["read_retry"]
        bus.inject("checksum:servo=2,count=4,on=sync_read")
        arm.observe()
        assert (arm.events["read_retry"] - before, arm.events["read_failed"]) == (retries, 4 if retries == 0 else 0)


def test_making_an_arm_touches_nothing_and_landing_it_is_fine() -> None:
    arm = make_robot(ours.SO100FollowerConfig(port="/dev/none", cameras={"front": ours.OpenCVCameraConfig(width=1280, height=720)}))
    assert isinstance(arm, SO100FollowerArm)
    assert arm.cameras["front"].width == 1280
    assert arm.land().safe


@pytest.mark.parametrize(
    ("flag", "bad"),
    [
        ("port", ""),
        *(("max_relative_target", bad) for bad in (0, float("nan"), {"gripper": 5.0}, dict.fromkeys(SO100_JOINTS, 5.0) | {"gripper": -1.0})),
        *(("connect_attempts", 0), ("reconnect_s", -1.0), ("reconnect_s", float("inf")), ("watchdog_s", 0.01), ("watchdog_s", float("nan"))),
    ],
)
def test_numbers_that_make_no_sense_are_refused(flag: str, bad: object) -> None:
    with pytest.raises(ConfigError, match=rf"--robot\.{flag}"):
        make_robot(ours.SO100FollowerConfig(**{"port": "/dev/none", flag: bad}))


# A plain run


def test_connect_observe_send_land(arm: SO100FollowerArm, bus: VirtualBus) -> None:
    assert isinstance(arm, Robot)
    arm.observe()
    assert set(bus.torque().values()) == {0}, "looking needs no power"
    arm.reset()
    assert bus.torque() == ON
    arm.send(np.array([10, -20, 30, -40, 50, 60], dtype=np.float32))
    time.sleep(0.6)
    observation = arm.observe()
    np.testing.assert_allclose(observation.joints, [10, -20, 30, -40, 50, 60], atol=0.15)
    assert (observation.joints.dtype, observation.joints.shape, dict(observation.frames)) == (np.float64, (6,), {})
    assert abs(observation.time_s - time.perf_counter()) < 2
    report = arm.land()
    assert (report.safe, report.problems, report.torque) == (True, [], dict.fromkeys(SO100_JOINTS, "off"))
    assert dict(arm.events) == {}
    for call in (arm.observe, lambda: arm.send(np.zeros(6))):  # on this servo a goal would switch the torque on again
        with pytest.raises(RobotError, match="not connected"):
            call()


def test_an_arm_that_is_only_looked_at_is_never_powered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], Servo.write
    monkeypatch.setattr(Servo, "write", lambda servo, at, data: (written.append((at, data[0])), write(servo, at, data))[1])
    with connected(tmp_path, engaged=False) as (_, arm):
        arm.observe()
        assert arm.land().safe
    assert written
    assert (Register.TORQUE_ENABLE, 1) not in written


@pytest.mark.parametrize(("use_degrees", "first"), [(True, (3298 - 796) / 2 * 360 / 4095), (False, 100.0)])
def test_joint_limits_come_from_the_calibration_in_both_units(use_degrees: bool, first: float, tmp_path: Path) -> None:
    with connected(tmp_path, use_degrees=use_degrees) as (bus, arm):
        np.testing.assert_allclose(arm.joint_limits[[0, 5]], [[-first, first], [0, 100]])
        arm.send(arm.joint_limits[:, 1])
        time.sleep(0.9)
        np.testing.assert_allclose(arm.observe().joints, arm.joint_limits[:, 1], atol=0.2)
        assert [servo.position for servo in bus.servos] == pytest.approx([c.range_max for c in bus.calibration.values()], abs=1)
        assert arm.joint_unit == ("degrees" if use_degrees else "range_m100_100")


def test_switching_on_never_moves_the_arm_and_remembers_where_it_lay(arm: SO100FollowerArm, bus: VirtualBus) -> None:
    bus.push("elbow_flex", 40)  # moved by hand: the goal registers still hold the old pose
    lay = true_joints(bus)
    assert arm.rest_pose is None
    arm.reset()
    time.sleep(0.3)
    np.testing.assert_allclose(true_joints(bus), lay, atol=0.1)
    arm.send(lay + 5)
    np.testing.assert_allclose(arm.rest_pose, lay, atol=0.1)
    assert arm.land(as_found=True).safe
    assert set(bus.torque().values()) == {0}


@pytest.mark.parametrize(("side", "beyond"), [(1, 30.0), (-1, 30.0), (1, 3.0)])
def test_an_arm_outside_its_range_is_not_switched_on_and_one_just_beyond_begins_with_a_small_step(
    side: int, beyond: float, arm: SO100FollowerArm, bus: VirtualBus
) -> None:
    bus.push("wrist_flex", arm.joint_limits[3, (side + 1) // 2] + side * beyond - true_joints(bus)[3])
    before = true_joints(bus)
    if beyond > 4:
        with pytest.raises(RobotError, match=r"outside its calibrated range: wrist_flex by 30 degrees.*lerobot-calibrate"):
            arm.reset()
        assert_landed(bus, arm, arm.land())
    else:
        arm.reset()
    time.sleep(0.3)
    assert np.abs(true_joints(bus) - before).max() < (0.1 if beyond > 4 else 4)


STARTS_THAT_FAIL = {  # of an arm that is powered: what happens, options of the arm, raised, torque afterwards, and as what it is reported
    "no camera": (None, {}, RobotError, 1, {"held"}),
    "no camera, and the arm is to hold": (None, {"disable_torque_on_disconnect": False}, RobotError, 1, {"held"}),
    "a stop before any servo was asked": ("handshake", {"cameras": {}}, KeyboardInterrupt, 1, set()),
    "a servo that is silent": ("silent:servo=3", {"cameras": {}, "connect_attempts": 1}, RobotError, 0, set()),  # by a write that none acknowledges
}


@pytest.mark.parametrize("start", STARTS_THAT_FAIL)
def test_a_start_that_fails_leaves_a_powered_arm_so_unless_not_all_servos_answer(
    start: str, bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    what, options, raised, torque, reported = STARTS_THAT_FAIL[start]
    power(bus)
    if what == "handshake":
        monkeypatch.setattr("lerobot.motors.feetech.FeetechMotorsBus._handshake", raising(KeyboardInterrupt()))
    elif what:
        bus.inject(what)
    missing = {"front": ours.OpenCVCameraConfig(index_or_path=Path("/dev/video99"))}
    arm = make_arm(bus, tmp_path, **{"cameras": missing, **options})
    with pytest.raises(raised, match="Missing motor IDs: - 3" if torque == 0 else "front" if raised is RobotError else None):
        arm.connect()
    assert ("was powered already" in caplog.text) == (what is None)
    report = arm.land()
    assert (set(report.torque.values()), report.port_closed) == (reported, True)
    until(lambda: set(bus.torque().values()) == {torque})


def test_an_arm_that_was_found_powered_is_left_so_unless_it_is_to_be_let_go(bus: VirtualBus, tmp_path: Path) -> None:
    power(bus)
    for as_found, torque in ((True, 1), (False, 0)):
        arm = make_arm(bus, tmp_path)
        arm.connect()
        arm.send(arm.observe().joints)
        assert arm.rest_pose is None, "where it would lie is not known"
        arm.land(as_found)
        assert set(bus.torque().values()) == {torque}


def test_torque_is_held_when_asked(bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path, disable_torque_on_disconnect=False)
    arm.connect()
    arm.reset()
    bus.inject("blocked:servo=3")
    arm.send(arm.observe().joints + 12)
    time.sleep(0.4)
    report = arm.land()
    for servo in bus.servos[:5]:
        assert abs(servo.word(Register.GOAL_POSITION) - servo.position) <= 3, "a joint that is held up does not push on"
    assert (report.safe, report.port_closed, set(report.torque.values())) == (True, True, {"held"})
    assert bus.torque() == ON


# Calibration


def test_an_so101_is_called_one(bus: VirtualBus, tmp_path: Path) -> None:
    words = ["--robot.type=so101_follower", f"--robot.port={bus.port}", "--robot.id=blak", f"--robot.calibration_dir={tmp_path}"]
    config = parse([*words, "--model_path=x", "--lang_instruction=go"])
    assert settings_of(config)["robot"]["type"] == "so101_follower"
    arm = make_robot(config.robot)
    assert arm.name == "so101_follower"
    with pytest.raises(RobotError, match=r"lerobot-calibrate --robot.type=so101_follower"):
        arm.connect()


def test_what_is_missing_is_told_before_anything_slow(bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in (None, tmp_path):
        config = ours.SO100FollowerConfig(port="/dev/x", id="black", calibration_dir=directory)
        assert calibration_file(config) == make_follower(config).calibration_fpath, "where lerobot looks"
    now, before = tmp_path / "so_follower", tmp_path / "so100_follower"
    config = ours.SO100FollowerConfig(port=bus.port, calibration_dir=now)

    def refused(error: type[Exception], named: str) -> None:
        with pytest.raises(error, match=named):
            check_ready(config)

    refused(RobotError, r"--robot\.id is missing.*Ids found in .*: none")
    config.id = "black"
    refused(RobotError, r"not calibrated: [^;]*lerobot-calibrate")
    save_calibration(bus.calibration, before / "black.json")
    refused(RobotError, rf"--robot\.calibration_dir={before}")
    save_calibration(bus.calibration, now / "black.json")
    check_ready(config)
    config.port = "/dev/none"
    refused(RobotError, "does not exist")
    config.port, config.cameras = bus.port, {"webcam": ours.SimCameraConfig()}
    monkeypatch.setitem(sys.modules, "mujoco", None)
    refused(MissingExtraError, "sim")


def test_calibration_differs_from_the_servos(bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path)
    content = json.loads((tmp_path / "test.json").read_text())
    content["wrist_roll"]["homing_offset"] += 7
    (tmp_path / "test.json").write_text(json.dumps(content))
    before = [bytes(servo.registers) for servo in bus.servos]
    with pytest.raises(RobotError, match=r"wrist_roll\.homing_offset: file 107, servo 100.*lerobot-calibrate"):
        arm.connect()
    assert [bytes(servo.registers) for servo in bus.servos] == before, "nothing was written"
    assert_landed(bus, arm, arm.land())


@pytest.mark.parametrize("content", [None, "{", '{"gripper": {"id": 6}}', "[]"])
def test_a_calibration_file_that_is_missing_or_damaged(content: str | None, bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path)
    (tmp_path / "test.json").unlink() if content is None else (tmp_path / "test.json").write_text(content)
    with pytest.raises(RobotError, match="lerobot-calibrate"):
        arm.connect()
    assert bus.requests == 0, "the arm is untouched"


# The port


@pytest.mark.parametrize(
    ("name", "text"), [("file", "not a serial device"), ("none", "none does not exist.*lerobot-find-port"), ("tty", "no permission.*dialout")]
)
def test_a_port_that_cannot_be_opened(name: str, text: str, bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tty").symlink_to(bus.port)
    if name == "tty":
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may open everything, so the refusal itself cannot be had here
    arm = make_arm(bus, tmp_path, port=str(tmp_path / name))
    with pytest.raises(RobotError, match=text):
        arm.connect()
    assert arm.land().safe


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="other programs are found through /proc")
def test_a_port_that_is_in_use_is_refused_and_left_alone(bus: VirtualBus, tmp_path: Path) -> None:
    code = f"import os, time; os.open({bus.port!r}, os.O_RDWR | os.O_NOCTTY); print('open', flush=True); time.sleep(60)"
    rival = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert rival.stdout.readline() == "open\n"
        with pytest.raises(RobotError, match=f"in use by pid {rival.pid} "):
            make_arm(bus, tmp_path).connect()
    finally:
        rival.kill()
        rival.wait()
    with connected(tmp_path, bus) as (_, first):
        with pytest.raises(RobotError, match="in use"):
            make_arm(bus, tmp_path).connect()
        with pytest.raises(RobotError, match="already connected"):
            first.connect()
        first.observe()
        assert bus.torque() == ON


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether a terminal is exclusive")
@pytest.mark.parametrize("real", [False, True])
def test_a_real_port_is_exclusive(real: bool, arm: SO100FollowerArm, bus: VirtualBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pseudo-terminal, which the virtual bus keeps open, never; here one stands for a real port."""
    descriptor = arm._bus.line.fileno()
    if real:
        monkeypatch.setattr(lerobot_glue, "_PTYS", ("/nowhere/",))
        lerobot_glue.lock_port(descriptor, bus.port)
    tells_exclusive = 0x80045440  # TIOCGEXCL, of Linux
    assert struct.unpack("i", fcntl.ioctl(descriptor, tells_exclusive, bytes(4))) == (real,)


# Readings


def test_a_program_that_is_held_up_takes_the_answers_that_are_there(arm: SO100FollowerArm, bus: VirtualBus) -> None:
    """Held up for longer than the SDK waits, before an answer is looked for and after a reading was taken, while the arm moves at full speed."""
    serial, sync_read = arm._bus.line, arm._bus.sync_read
    before, after = [], []  # seconds to be held up for, once each

    def read(length: int) -> bytes:
        if not before:
            return type(serial).read(serial, length)
        time.sleep(before.pop())
        until(lambda: serial.in_waiting >= 6 * 8)  # a busy machine may be later than that
        return b""  # it was asked before the answer came, and next is the look at the clock

    def read_all(*args: object, **options: object) -> dict:
        values = sync_read(*args, **options)
        time.sleep(after.pop() if after else 0)
        return values

    here = arm.observe().joints
    serial.read, arm._bus.sync_read = read, read_all
    thrown_away = 0
    for tick in range(40):
        arm.send(here + (60 if tick // 10 % 2 else -60))
        (before, after, [])[tick % 3].append(0.06)
        retries = arm.events["read_retry"]
        arm.observe()
        thrown_away += arm.events["read_retry"] - retries if tick % 3 == 0 else 0
    assert (thrown_away, arm.events["implausible_reading"], arm.events["reading_jumped"]) == (0, 0, 0)
    arm._guard.forget()
    after.append(0.6)  # longer than the arm's patience: a first reading needs a second one, which is asked for all the same
    arm.observe()


def test_an_implausible_reading_never_comes_through_and_one_that_stays_is_believed_and_said(
    arm: SO100FollowerArm, bus: VirtualBus, caplog: pytest.LogCaptureFixture
) -> None:
    before = arm.observe().joints
    original, lies = arm._bus.sync_read, [1]

    def lying(*args: object, **options: object) -> dict:
        values = original(*args, **options)
        return {**values, "elbow_flex": -80.0} if lies and lies.pop() else values

    arm._bus.sync_read = lying  # stands for a damaged byte that passes the 8-bit checksum
    time.sleep(0.3)  # in which a joint could turn so far: after a pause, too, two readings must agree
    np.testing.assert_allclose(arm.observe().joints, before, atol=0.2)
    assert (arm.events["implausible_reading"], arm.events["reading_jumped"]) == (1, 0)
    bus.push("elbow_flex", 80)
    np.testing.assert_allclose(arm.observe().joints, before + [0, 0, 80, 0, 0, 0], atol=0.2)
    assert arm.events["reading_jumped"] == 1
    assert "elbow_flex" in caplog.text


# Landing


def test_ctrl_c_while_landing_does_not_leave_motors_holding(arm: SO100FollowerArm, bus: VirtualBus) -> None:
    """Also where nobody takes note of signals, and each is a KeyboardInterrupt."""
    arm.reset()
    ask, interrupted = arm._bus.ask, []

    def ask_once_interrupted(*args: object, **options: object) -> object:
        if not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), 2)
        return ask(*args, **options)

    arm._bus.ask = ask_once_interrupted
    assert arm.land().safe
    assert interrupted


def test_a_landing_that_is_broken_off_is_said_and_can_be_repeated(arm: SO100FollowerArm, bus: VirtualBus, monkeypatch: pytest.MonkeyPatch) -> None:
    arm.reset()
    with monkeypatch.context() as patch:
        patch.setattr(so100, "release_torque", lambda *_: 1 / 0)
        report = arm.land()
    assert "ZeroDivisionError" in report.problems[0]
    assert not report.safe
    assert bus.torque() == ON
    assert arm.land().safe


# Cameras


def test_an_arm_without_a_camera_can_have_a_drawn_one(bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = pytest.importorskip("gr00t_fast.robots.sim.simulation").Simulation
    over = threading.Event()
    with connected(tmp_path, bus, cameras={"webcam": ours.SimCameraConfig(width=64, height=48)}) as (_, arm):
        here = arm.observe()
        assert here.frames["webcam"].shape == (48, 64, 3)
        arm.send(here.joints + [40.0, 0, 0, 0, 0, 0])
        time.sleep(1.0)
        there = arm.observe()
        assert there.joints[0] > here.joints[0] + 30
        assert (there.frames["webcam"] != here.frames["webcam"]).any(), "the picture shows the pose that the servos report"
        assert np.array_equal(arm._rendered.frames(here.joints)["webcam"], here.frames["webcam"]), "and nothing else has moved"
        monkeypatch.setattr(simulation, "render", raising(RuntimeError("out of memory")))
        with pytest.raises(CameraError, match="out of memory"):
            arm.observe()
        monkeypatch.setattr(simulation, "render", lambda *_: over.wait())
        monkeypatch.setattr("gr00t_fast.robots.sim.robot.LONGEST_DRAWING_S", 0.3)
        with pytest.raises(CameraError, match="0.3 s"):
            arm.observe()
        arm.observe(with_frames=False)  # the arm can still be put down
    over.set()


@pytest.fixture(scope="module")
def camera_results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every camera scenario, from a process of its own: OpenCV looks for plugins once."""
    cv2 = pytest.importorskip("cv2")
    if virtual_camera.compiler() is None or not sys.platform.startswith("linux") or not cv2.__version__.startswith("4."):
        pytest.skip("the virtual camera needs Linux, a C compiler and OpenCV 4")
    directory = tmp_path_factory.mktemp("cameras")
    virtual_camera.build_plugin(directory)
    command = [sys.executable, str(Path(__file__).with_name("camera_faults.py")), str(directory)]
    environment = virtual_camera.plugin_environment(directory)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_real_camera_delivers_rgb_and_the_age_of_a_slow_ones_pictures(camera_results: dict) -> None:
    good, slow = camera_results["good"], camera_results["slow"]
    assert (good["error"], slow["error"]) == (None, None)
    assert good["frame"] == [[48, 64, 3], "uint8", [0, 0, 250]]
    assert camera_results["turned"]["frame"][0] == [64, 48, 3]
    assert 0.2 < slow["oldest_s"] < 0.5, "three a second"


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("missing", r"camera 'wrist' of --robot.cameras \(index_or_path: 7\) cannot be used.*lerobot-find-cameras opencv"),
        ("wrong size", "camera 'front' .*width=1280.*64.*lerobot-find-cameras"),
        ("wrong rate", "camera 'front' .*fps=60.*30.*lerobot-find-cameras"),
        ("closed", "camera .*front.* (closed|stopped delivering)"),
        ("failing", "camera 'front' stopped delivering"),
        ("frozen", "camera 'front' stopped delivering: .*too old"),
    ],
)
def test_camera_faults_end_the_run_and_land(scenario: str, text: str, camera_results: dict) -> None:
    result = camera_results[scenario]
    assert re.search(text, result["error"] or "none"), result["error"]
    assert (result["safe"], result["threads"]) == (True, [])
    assert ("torque_after_connect" in result) == (scenario in ("closed", "failing", "frozen")), "what cannot be used is refused before the torque"
