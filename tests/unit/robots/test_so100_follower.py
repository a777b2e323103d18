"""The adapter of the real arm: lerobot's unmodified driver over the virtual servo bus. Faults have their own table in test_faults.py."""

from __future__ import annotations

import dataclasses
import fcntl
import os
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

from arm_bench import ON, Camera, assert_landed, connected, make_arm, power, raising, true_joints
from waiting import until

from gr00t_fast import robots as ours
from gr00t_fast.base.contracts import SO100_JOINTS, Robot
from gr00t_fast.base.errors import CameraError, ConfigError, MissingExtraError, RobotError
from gr00t_fast.robots import check_ready, lerobot_glue, so100
from gr00t_fast.robots.calibration import save_calibration
from gr00t_fast.robots.feetech import Register
from gr00t_fast.robots.lerobot_glue import calibration_file, make_follower
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.virtual import make_robot
from gr00t_fast.virtual.bus import Servo, VirtualBus


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

    own, newer = {"reconnect_s", "watchdog_s"}, {"num_read_retries"}  # newer: not in every version of lerobot
    constants = {f"position_{gain}_coefficient" for gain in "pid"}  # flags of lerobot 0.6
    open_there = {"port", "width", "height", "fps", "index_or_path"}  # lerobot refuses a robot's camera without them
    for mine, lerobots in ((ours.SO100FollowerConfig, SO100FollowerConfig), (ours.OpenCVCameraConfig, OpenCVCameraConfig)):
        arm, theirs = defaults(mine), {name: value for name, value in defaults(lerobots).items() if name not in constants}
        assert set(arm) - own - newer == set(theirs) - newer
        assert {name: arm[name] for name in set(theirs) - open_there} == {name: theirs[name] for name in set(theirs) - open_there}
    types, their_types = typing.get_type_hints(ours.SO100FollowerConfig), typing.get_type_hints(SO100FollowerConfig)
    assert all(types[name] == their_types[name] for name in defaults(SO100FollowerConfig) if name not in {"cameras", *constants})


def test_servos_get_the_gains_that_the_stall_limits_reckon_with(bus: VirtualBus, tmp_path: Path) -> None:
    with connected(tmp_path, bus):
        gains = {tuple(servo.registers[at] for at in (Register.P_GAIN, Register.I_GAIN, Register.D_GAIN)) for servo in bus.servos}
    assert gains == {(16, 0, 32)}


@pytest.mark.parametrize("retries", [0, 4])
def test_so_many_retries_as_the_flag_says(retries: int, tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False, num_read_retries=retries) as (bus, arm):
        bus.inject("checksum:servo=2,count=4,on=sync_read")
        arm.observe()
        assert arm.events["read_failed"] == 4 - retries


@pytest.mark.parametrize(
    ("flag", "bad"),
    [("port", ""), ("watchdog_s", 0.01), *(("max_relative_target", bad) for bad in (0, float("nan"), {"gripper": 5.0}))],
)
def test_settings_that_make_no_sense_are_refused(flag: str, bad: object) -> None:
    with pytest.raises(ConfigError, match=rf"--robot\.{flag}"):
        make_robot(ours.SO100FollowerConfig(**{"port": "/dev/none", flag: bad}))


# A plain run


def test_connect_observe_send_land(arm: SO100FollowerArm, bus: VirtualBus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(arm, Robot)
    written, write = [], Servo.write
    monkeypatch.setattr(Servo, "write", lambda servo, at, data: (written.append((at, data[0])), write(servo, at, data))[1])
    arm.observe()
    assert (Register.TORQUE_ENABLE, 1) not in written, "looking needs no power"
    bus.push("elbow_flex", 40)  # moved by hand: the goal registers still hold the old pose
    lay = true_joints(bus)
    assert arm.rest_pose is None
    arm.reset()
    time.sleep(0.3)
    np.testing.assert_allclose(true_joints(bus), lay, atol=0.1)
    np.testing.assert_allclose(arm.rest_pose, lay, atol=0.1)
    assert bus.torque() == ON
    arm.send(np.array([10, -20, 30, -40, 50, 60], dtype=np.float32))
    time.sleep(0.6)
    observation = arm.observe()
    np.testing.assert_allclose(observation.joints, [10, -20, 30, -40, 50, 60], atol=0.15)
    assert (observation.joints.dtype, dict(observation.frames)) == (np.float64, {})
    report = arm.land()
    assert (report.safe, report.problems, report.torque) == (True, [], dict.fromkeys(SO100_JOINTS, "off"))
    assert set(arm.events) <= {"implausible_reading", "reading_jumped"}, "a hand moved it"
    for call in (arm.observe, lambda: arm.send(np.zeros(6))):  # on this servo a goal would switch the torque on again
        with pytest.raises(RobotError, match="not connected"):
            call()


@pytest.mark.parametrize(("use_degrees", "first"), [(True, (3298 - 796) / 2 * 360 / 4095), (False, 100.0)])
def test_joint_limits_come_from_the_calibration_in_both_units(use_degrees: bool, first: float, tmp_path: Path) -> None:
    with connected(tmp_path, use_degrees=use_degrees) as (bus, arm):
        np.testing.assert_allclose(arm.joint_limits[[0, 5]], [[-first, first], [0, 100]])
        arm.send(arm.joint_limits[:, 1])
        time.sleep(0.9)
        np.testing.assert_allclose(arm.observe().joints, arm.joint_limits[:, 1], atol=0.2)
        assert [servo.position for servo in bus.servos] == pytest.approx([c.range_max for c in bus.calibration.values()], abs=1)
        assert arm.joint_unit == ("degrees" if use_degrees else "range_m100_100")


@pytest.mark.parametrize("side", [1, -1])
def test_an_arm_outside_its_range_is_not_switched_on(side: int, arm: SO100FollowerArm, bus: VirtualBus) -> None:
    bus.push("wrist_flex", arm.joint_limits[3, (side + 1) // 2] + side * 30 - true_joints(bus)[3])
    before = true_joints(bus)
    with pytest.raises(RobotError, match=r"outside its calibrated range: wrist_flex by 30 degrees.*lerobot-calibrate"):
        arm.reset()
    assert_landed(bus, arm, arm.land())
    time.sleep(0.3)
    assert np.abs(true_joints(bus) - before).max() < 0.1


NO_CAMERA = {"front": ours.OpenCVCameraConfig(index_or_path=Path("/dev/video99"))}
STARTS_THAT_FAIL = {  # of an arm that is powered: what happens, cameras, raised, named, torque afterwards, and as what it is reported
    "no camera": (None, NO_CAMERA, RobotError, "front", 1, {"held"}),
    "a stop before any servo was asked": ("handshake", {}, KeyboardInterrupt, None, 1, set()),
    "a servo that is silent": ("silent:servo=3", {}, RobotError, "Missing motor IDs: - 3", 0, set()),  # by a write that none acknowledges
}


@pytest.mark.parametrize("start", STARTS_THAT_FAIL)
def test_a_start_that_fails_leaves_a_powered_arm_so_unless_not_all_servos_answer(
    start: str, bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, cameras, raised, named, torque, reported = STARTS_THAT_FAIL[start]
    power(bus)
    arm = make_arm(bus, tmp_path, cameras=cameras)
    if what == "handshake":
        monkeypatch.setattr("lerobot.motors.feetech.FeetechMotorsBus._handshake", raising(KeyboardInterrupt()))
    elif what:
        bus.inject(what)
    with pytest.raises(raised, match=named):
        arm.connect()
    report = arm.land()
    assert (set(report.torque.values()), report.port_closed) == (reported, True)
    until(lambda: set(bus.torque().values()) == {torque})
    if raised is RobotError and what:  # and the same arm connects once the fault is mended
        bus.clear()
        arm.connect()
        assert arm.land().safe


def test_an_arm_that_was_found_powered_is_left_so_unless_it_is_to_be_let_go(
    bus: VirtualBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    power(bus)
    for as_found, torque in ((True, 1), (False, 0)):
        arm = make_arm(bus, tmp_path)
        arm.connect()
        assert "was powered already" in caplog.text
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


def test_what_is_missing_is_told_before_anything_slow(bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in (None, tmp_path):
        config = ours.SO101FollowerConfig(port="/dev/x", id="black", calibration_dir=directory)
        assert calibration_file(config) == make_follower(config).calibration_fpath, "where lerobot looks"
    now, before = tmp_path / "so_follower", tmp_path / "so100_follower"
    config = ours.SO101FollowerConfig(port=bus.port, calibration_dir=now)
    assert make_robot(config).name == "so101_follower"

    def refused(error: type[Exception], named: str) -> None:
        with pytest.raises(error, match=named):
            check_ready(config)

    refused(RobotError, r"--robot\.id is missing.*Ids found in .*: none")
    config.id = "black"
    refused(RobotError, r"not calibrated: [^;]*lerobot-calibrate --robot.type=so101_follower")
    save_calibration(bus.calibration, before / "black.json")
    refused(RobotError, rf"--robot\.calibration_dir={before}")
    save_calibration(bus.calibration, now / "black.json")
    check_ready(config)
    for config.port, named in (("/dev/none", "none does not exist.*lerobot-find-port"), (str(now / "black.json"), "not a serial device")):
        refused(RobotError, named)
    config.port, config.cameras = bus.port, {"webcam": ours.SimCameraConfig()}
    monkeypatch.setitem(sys.modules, "mujoco", None)
    refused(MissingExtraError, "sim")
    config.cameras = {}
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may open everything, so the refusal itself cannot be had here
    refused(RobotError, "no permission.*dialout")


@pytest.mark.parametrize("content", [None, "{", '{"gripper": {"id": 6}}', "another arm"])
def test_a_calibration_file_that_is_missing_or_damaged_or_of_another_arm(content: str | None, bus: VirtualBus, tmp_path: Path) -> None:
    arm, file, named = make_arm(bus, tmp_path), tmp_path / "test.json", ""
    if content == "another arm":
        content, named = file.read_text().replace('"homing_offset": 100', '"homing_offset": 107'), r"wrist_roll\.homing_offset: file 107, servo 100"
    file.unlink() if content is None else file.write_text(content)
    before = [bytes(servo.registers) for servo in bus.servos]
    with pytest.raises(RobotError, match=f"{named}.*lerobot-calibrate"):
        arm.connect()
    assert [bytes(servo.registers) for servo in bus.servos] == before, "nothing was written"
    assert_landed(bus, arm, arm.land())


# The port


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="other programs are found through /proc")
def test_a_port_that_is_in_use_is_refused_and_left_alone(bus: VirtualBus, tmp_path: Path) -> None:
    code = f"import os, time; os.open({bus.port!r}, os.O_RDWR | os.O_NOCTTY); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rival:
        try:
            assert rival.stdout.readline() == "open\n"
            with pytest.raises(RobotError, match=f"in use by pid {rival.pid} "):
                make_arm(bus, tmp_path).connect()
        finally:
            rival.kill()
    with connected(tmp_path, bus) as (_, first):
        with pytest.raises(RobotError, match="in use"):
            make_arm(bus, tmp_path).connect()
        with pytest.raises(RobotError, match="already connected"):
            first.connect()
        first.observe()
        assert bus.torque() == ON


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether a terminal is exclusive")
def test_a_real_port_is_exclusive(arm: SO100FollowerArm, bus: VirtualBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pseudo-terminal, which the virtual bus keeps open, never; here one stands for a real port."""
    descriptor, tells_exclusive = arm.bus.line.fileno(), 0x80045440  # TIOCGEXCL, of Linux
    assert struct.unpack("i", fcntl.ioctl(descriptor, tells_exclusive, bytes(4))) == (0,)
    monkeypatch.setattr(lerobot_glue, "PTYS", ("/nowhere/",))
    lerobot_glue.lock_port(descriptor, bus.port)
    assert struct.unpack("i", fcntl.ioctl(descriptor, tells_exclusive, bytes(4))) == (1,)


# Readings


def test_a_program_that_is_held_up_takes_the_answers_that_are_there(arm: SO100FollowerArm, bus: VirtualBus) -> None:
    """Held up for longer than the SDK waits, before an answer is looked for."""
    line = arm.bus.line

    def late_read(length: int) -> bytes:
        del line.read  # once
        time.sleep(0.06)
        until(lambda: line.in_waiting >= 6 * 8)  # a busy machine may be later than that
        return b""  # it was asked before the answer came, and next is the look at the clock

    line.read = late_read
    arm.observe()
    assert arm.events["read_retry"] == 0, "what came meanwhile was thrown away"


def test_an_implausible_reading_never_comes_through_and_one_that_stays_is_believed_and_said(
    arm: SO100FollowerArm, bus: VirtualBus, caplog: pytest.LogCaptureFixture
) -> None:
    before = arm.observe().joints
    original, lies = arm.bus.sync_read, [1]

    def lying(*args: object, **options: object) -> dict:
        values = original(*args, **options)
        return {**values, "elbow_flex": -80.0} if lies and lies.pop() else values

    arm.bus.sync_read = lying  # stands for a damaged byte that passes the 8-bit checksum
    time.sleep(0.3)  # in which a joint could turn so far: after a pause, too, two readings must agree
    np.testing.assert_allclose(arm.observe().joints, before, atol=0.2)
    assert (arm.events["implausible_reading"], arm.events["reading_jumped"]) == (1, 0)
    bus.push("elbow_flex", 80)
    np.testing.assert_allclose(arm.observe().joints, before + [0, 0, 80, 0, 0, 0], atol=0.2)
    assert arm.events["reading_jumped"] == 1
    assert "elbow_flex" in caplog.text


# Landing


def test_a_landing_that_is_broken_off_is_said_and_can_be_repeated_and_ctrl_c_does_not_end_it(
    arm: SO100FollowerArm, bus: VirtualBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm.reset()
    with monkeypatch.context() as patch:
        patch.setattr(so100, "release_torque", lambda *_: 1 / 0)
        report = arm.land()
    assert "ZeroDivisionError" in report.problems[0]
    assert not report.safe
    assert bus.torque() == ON

    def interrupted(*_: object, **options: object) -> None:
        del arm.bus.ask  # once
        os.kill(os.getpid(), 2)

    arm.bus.ask = interrupted
    assert arm.land().safe
    assert "ask" not in vars(arm.bus)


# Cameras


def test_an_arm_without_a_camera_can_have_a_drawn_one(bus: VirtualBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = pytest.importorskip("gr00t_fast.virtual.sim.simulation").Simulation
    over = threading.Event()
    with connected(tmp_path, bus, cameras={"webcam": ours.SimCameraConfig(width=64, height=48)}) as (_, arm):
        here = arm.observe()
        assert here.frames["webcam"].shape == (48, 64, 3)
        arm.send(here.joints + [40.0, 0, 0, 0, 0, 0])
        time.sleep(0.6)
        there = arm.observe()
        assert (there.frames["webcam"] != here.frames["webcam"]).any(), "the picture shows the pose that the servos report"
        monkeypatch.setattr(simulation, "render", raising(RuntimeError("out of memory")))
        with pytest.raises(CameraError, match="out of memory"):
            arm.observe()
        monkeypatch.setattr(simulation, "render", lambda *_: over.wait())
        monkeypatch.setattr("gr00t_fast.virtual.sim.simulation.LONGEST_DRAWING_S", 0.3)
        with pytest.raises(CameraError, match="0.3 s"):
            arm.observe()
        arm.observe(with_frames=False)  # the arm can still be put down
    over.set()


def test_a_frame_has_its_age_and_a_camera_that_froze_is_waited_for_a_moment_alone(arm: SO100FollowerArm) -> None:
    arm.follower.cameras["front"] = camera = Camera(age_s=0.3)
    assert 0.3 <= arm.observe().frame_ages_s["front"] < 0.5
    camera.is_connected = False
    threading.Timer(0.1, lambda: setattr(camera, "is_connected", True)).start()
    assert arm.observe().frames["front"].shape == (32, 40, 3)
    camera.is_connected = False
    with pytest.raises(CameraError, match="camera 'front' stopped delivering"):
        arm.observe()
    arm.observe(with_frames=False)  # the arm can still be put down
