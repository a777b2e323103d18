"""The virtual servo bus, checked from the outside: raw bytes and lerobot's unmodified driver as masters."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, RobotError
from gr00t_fast.cli import bus as bus_command
from gr00t_fast.cli import demo, run
from gr00t_fast.robots import feetech as p
from gr00t_fast.robots.calibration import HALF_RANGE_DEG, default_calibration, load_calibration, save_calibration
from gr00t_fast.robots.feetech import Register
from gr00t_fast.virtual.bus import Fault, Servo, VirtualBus, faults
from gr00t_fast.virtual.bus.bus import send_command

# The protocol, and one servo


def test_frames_are_what_the_manual_prints_and_survive_any_cut_and_any_damage() -> None:
    assert p.Request(1, p.Instruction.PING).encode() == bytes.fromhex("ffff010201fb")
    assert p.Request(0xFE, p.Instruction.WRITE, bytes((5, 1))).encode() == bytes.fromhex("fffffe04030501f4")
    wanted = [
        p.Request(3, p.Instruction.READ, bytes((56, 2))),
        p.sync_read(Register.PRESENT_POSITION, 2, range(1, 7)),
        p.Request(1, p.Instruction.PING),
    ]
    stream = b"\x00\xff\x07" + b"\xff".join(request.encode() for request in wanted)  # also FF FF FF
    for step in (1, 2, 3, 7, 64):
        parser = p.PacketParser(p.Request)
        assert [request for start in range(0, len(stream), step) for request in parser.feed(stream[start : start + step])] == wanted
    good = wanted[0].encode()
    for position in range(2, len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x40
        parser = p.PacketParser(p.Request)
        parser.feed(bytes(damaged))
        parser.abandon()
        assert parser.feed(good) == [wanted[0]], "a damaged packet does not cost the next one"


def test_what_a_servo_keeps_refuses_and_centres() -> None:
    servo = Servo(1)
    servo.write(Register.MODEL, b"\1\1")
    assert servo.word(Register.MODEL) == 777, "read-only registers stay"
    for lock, kept in ((b"\1", 0), (b"\0", 100)):  # the permanent registers need the lock open to last
        servo.write(Register.LOCK, lock)
        servo.write(Register.MIN_POSITION, (100).to_bytes(2, "little"))
        servo.power_cycle()
        assert servo.word(Register.MIN_POSITION) == kept
    servo.settle(1500.0, 0.01)
    servo.write(Register.TORQUE_ENABLE, bytes((128,)))  # makes here the middle
    assert (servo.word(Register.PRESENT_POSITION), servo.homing_offset, servo.torque) == (2048, -548, False)


def test_the_ranges_are_those_of_the_simulated_arm() -> None:
    scene = pytest.importorskip("gr00t_fast.virtual.sim.scene")
    np.testing.assert_array_equal(scene.LIMITS_DEG[:-1, 1], [HALF_RANGE_DEG[joint] for joint in SO100_JOINTS[:-1]])


def test_calibration_files_and_faults_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_calibration(default_calibration(), path)
    assert load_calibration(path) == default_calibration()
    content = json.loads(path.read_text())
    content["gripper"]["range_max"] = 5000
    for text, named in ((json.dumps(content), r"'gripper'.*range_max"), ("{", "JSON"), ("{}", "elbow_flex")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=named):
            load_calibration(path)
    for spec, text in (
        ("silnt:servo=3", "'silent'"),
        ("silent:srvo=3", "'servo'"),
        ("silent:servo=x", "number"),
        ("silent:on=raed", "'read'"),
        ("silent:servo=9", "from 1 to 6"),
        ("loss:rate=7", "0 to 1"),
        ("delay:ms=-5", "at least 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            Fault.parse(spec)
    assert all(f"    {kind}:" in (faults.__doc__ or "") for kind in faults.KINDS)


# The port


def test_a_link_belongs_to_the_bus_that_lives_and_what_no_bus_has_made_is_not_replaced(tmp_path: Path) -> None:
    link, file, other = tmp_path / "port", tmp_path / "file", tmp_path / "other"
    file.write_text("a file")
    other.symlink_to("/dev/null")
    for path, text in ((file, "not a link"), (other, "points to /dev/null")):
        with pytest.raises(RobotError, match=text):
            VirtualBus(link=path).start()
    link.symlink_to("/dev/pts/of-a-dead-bus")
    with VirtualBus(link=link) as first:
        first.unplug()  # its own also while the cable is out
        with pytest.raises(RobotError, match=rf"{link}.*--send=quit"):
            VirtualBus(link=link).start()
        first.replug()
        assert os.readlink(link) == first.device
    assert (file.read_text(), os.readlink(other), link.is_symlink()) == ("a file", "/dev/null", False)


# lerobot's driver


def follower(port: object, directory: Path, name: str) -> object:
    """lerobot's unmodified SO100Follower, connected; it waits longer than its 50 ms: how quick the machine is, is not what is tested here."""
    pytest.importorskip("scservo_sdk")
    package = pytest.importorskip("lerobot.robots.so_follower")
    robot = package.SO100Follower(package.SO100FollowerConfig(port=str(port), id=name, calibration_dir=directory))
    robot.config.num_read_retries = 0  # newer drivers have it, and cover a part of the failures by 2 immediate repetitions
    handler = robot.bus.port_handler
    handler.setPacketTimeout = lambda length: handler.setPacketTimeoutMillis(300)
    robot.connect()
    return robot


def test_lerobot_moves_calibrates_and_lets_go_and_fails_as_on_a_real_bus(bus: VirtualBus, tmp_path: Path) -> None:
    save_calibration(bus.calibration, tmp_path / "arm.json")
    driver = follower(bus.port, tmp_path, "arm")
    assert set(bus.torque().values()) == {1}
    driver.send_action({f"{joint}.pos": 30.0 for joint in SO100_JOINTS})
    time.sleep(0.4)
    np.testing.assert_allclose(list(driver.get_observation().values()), 30.0, atol=0.2)
    for fault, error in (("checksum:servo=2,count=1", "Incorrect status packet"), ("silent:servo=3,count=1", "no status packet")):
        bus.inject(fault)
        with pytest.raises(ConnectionError, match=error):
            driver.get_observation()
    bus.inject("no_data:servo=1,count=1,on=sync_read")
    assert driver.get_observation()["shoulder_pan.pos"] < -170, "silently read as zero"
    driver.bus.disable_torque()
    bus.push("elbow_flex", 20)
    driver.bus.set_half_turn_homings()
    assert set(driver.bus.sync_read("Present_Position", normalize=False).values()) == {2047}
    driver.bus.write_calibration(driver.calibration)
    assert driver.bus.is_calibrated
    assert driver.bus.broadcast_ping() == dict.fromkeys(range(1, 7), 777)
    driver.bus.enable_torque()
    bus.inject("silent:servo=3")
    with pytest.raises(ConnectionError, match="after 6 tries"):
        driver.disconnect()
    assert list(bus.torque().values()) == [0, 0, 0, 1, 1, 1], "motors behind a silent one are left holding"
    bus.clear()
    driver.bus.disconnect()
    assert set(bus.torque().values()) == {0}


@pytest.mark.realtime
def test_lerobot_gives_a_servo_its_id_also_over_a_slow_line() -> None:
    motors = pytest.importorskip("lerobot.motors")
    feetech = pytest.importorskip("lerobot.motors.feetech")
    pytest.importorskip("scservo_sdk")
    with VirtualBus(servo_ids=[1], usb_latency_ms=8, wire_time=True) as bus:
        line = feetech.FeetechMotorsBus(bus.port, {"gripper": motors.Motor(6, "sts3215", motors.MotorNormMode.RANGE_0_100)})
        began_s = time.monotonic()
        line.setup_motor("gripper", initial_baudrate=1_000_000)
        assert time.monotonic() - began_s > bus.requests * 0.008
        line.port_handler.closePort()
        assert (bus.servos[0].id, bus.requests > 2) == (6, True)


# The command line


def program(*arguments: object) -> subprocess.Popen:
    """The bus as a program of its own."""
    command = [sys.executable, "-m", "gr00t_fast", "bus", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_program_of_its_own_is_driven_and_steered_and_a_second_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    link, control = tmp_path / "so100", tmp_path / "so100.ctl"
    process = program("--link", link, "--write_calibration", tmp_path / "cal", "--id", "virtual")
    try:
        words = [process.stdout.readline()]
        while words[-1] and "--send state" not in words[-1]:
            words.append(process.stdout.readline())
        (typed,) = [shlex.split(line) for line in words if "gr00t-fast run" in line]
        config = run.parse(typed[2:])
        assert (config.robot.port, config.robot.id, list(config.robot.cameras)) == (str(link), "virtual", ["webcam"])
        (make,) = [shlex.split(line) for line in words if "random-checkpoint" in line]
        assert f"--out={config.model_path}" in make
        robot = follower(link, tmp_path / "cal", "virtual")
        assert [joint["torque"] for joint in send_command(control, "state")["ok"]["joints"].values()] == [1] * 6
        assert "'silent'" in send_command(control, "inject silnt")["error"]
        send_command(control, "inject silent:servo=3")
        with pytest.raises(ConnectionError):
            robot.get_observation()
        send_command(control, "clear")
        robot.disconnect()
        device = os.readlink(link)
        for words in ((f"--link={link}", f"--control={tmp_path / 'c'}"), (f"--link={tmp_path / 'p'}", f"--control={control}")):
            assert bus_command.main(words) == 1
            assert "another virtual bus" in capsys.readouterr().err
        assert os.readlink(link) == device
    finally:
        process.kill()  # a dead bus leaves everything lying about, and is in nobody's way
        process.wait()
    third = program(f"--link={link}", "--scene=reach", f"--write_calibration={tmp_path / 'cal'}")
    try:
        assert third.stdout.readline().startswith("Virtual servo bus")
        assert "network of the demo" in third.stdout.readline()
        config = run.parse([*demo.main.before, *shlex.split(third.stdout.readline())[2:]])
        assert (config.robot.port, config.robot.id, list(config.robot.cameras)) == (str(link), "virtual", ["front"])
        assert bus_command.main([f"--control={control}", "--send=quit"]) == 0
        assert third.wait(timeout=60) == 0
    finally:
        third.kill()
    assert list(tmp_path.glob("so100*")) == []
    assert bus_command.main([f"--control={control}", "--send=state"]) == 1
    assert "no virtual bus answers" in capsys.readouterr().err
