"""The table: each fault a servo bus, a cable or a user can produce, and what the arm makes of it.

Either the run goes on, an event is counted, and readings are current afterwards; or one RobotError says what is wrong. Either way the arm lands:
torque register 0 on every servo that can be reached, port closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
from waiting import until

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")

from arm_bench import OFF, ON, PatientArm, assert_landed, connected, make_arm, raising, true_joints

from gr00t_fast.base.contracts import MotorLoads
from gr00t_fast.base.errors import RobotError
from gr00t_fast.robots import motor_state
from gr00t_fast.robots.bus import ServoState
from gr00t_fast.robots.feetech import Instruction, Register, Request
from gr00t_fast.robots.motor_state import SELDOM_AFTER
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.virtual.bus import Servo, VirtualBus

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the checks of open descriptors need Linux")


class Row(NamedTuple):
    when: Literal["connect", "run", "land"]
    fault: str
    counted: str | None = None  # the event that is counted, where the run goes on
    says: str | None = None  # what the error says that ends it
    ticks: int = 10


TOO_LATE = "answers came too late: the USB adapter"
TABLE = {
    "servo 3 silent": Row("run", "silent:servo=3", says="no plausible joint reading"),
    "servo 3 silent for 0.1 s": Row("run", "silent:servo=3,for_s=0.1", "read_retry"),
    "absent at connect": Row("connect", "absent:servo=6", says="Missing motor IDs: - 6"),
    "one missed reply at connect": Row("connect", "silent:servo=5,count=4", "read_retry"),
    "silent while being configured": Row("connect", "silent:servo=2,on=write", says="configuring the servos"),
    "wrong model": Row("connect", "wrong_model:servo=4", says="incorrect model numbers"),
    "byte lost in the header": Row("run", "drop:at=0,count=1", "read_retry"),
    "random byte loss 0.2 %": Row("run", "loss:rate=0.002", "read_retry", ticks=40),
    "random byte flips 1 %": Row("run", "flip:rate=0.01", "read_retry", ticks=40),
    "replies of 30 ms": Row("run", "delay:ms=30"),
    "two replies later than 50 ms": Row("run", "delay:ms=110,count=2", "late_answer"),
    "every reply 80 ms late from the start": Row("connect", "delay:ms=80", says=TOO_LATE),
    # a program that is held up for 90 ms finds such an answer, and goes on: the more often, the busier the machine
    "every reading later than 50 ms": Row("run", "delay:ms=140,on=sync_read", says=TOO_LATE, ticks=400),
    "very late ack of a write": Row("connect", "delay:ms=400,servo=1,on=write,after=5,count=1", "read_retry"),
    "status without data": Row("run", "no_data:servo=4,count=1", "read_retry"),
    "status without data, always": Row("run", "no_data:servo=4,on=sync_read", says="no plausible joint reading"),
    "overload": Row("run", "error:servo=3,bits=32", "servo_overload"),
    "overload at connect": Row("connect", "error:servo=3,bits=32", says="servo 3 reports overload"),
    "overheating that lasts": Row("run", "error:servo=3,bits=4", says="overheat", ticks=150),
    "unplugged for 0.3 s": Row("run", "unplug:at_s=0.01,for_s=0.3", "reconnect", ticks=30),
    "unplugged while sending": Row("run", "unplug:on=sync_write,for_s=0.2", "reconnect", ticks=30),
    "unplugged for good": Row("run", "unplug", says="did not come back within"),
    "unplugged just before landing": Row("land", "unplug:for_s=0.3"),
    "unplugged in the middle of landing": Row("land", "unplug:for_s=0.3,after=5"),
}


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    with VirtualBus(seed=3) as bus:
        arm = make_arm(bus, tmp_path, PatientArm, reconnect_s=0.6)
        if row.when == "connect":
            bus.inject(row.fault)
        with pytest.raises(RobotError, match=row.says) if row.says else contextlib.nullcontext():
            run(bus, arm, row)
        assert row.counted is None or arm.events[row.counted] > 0, dict(arm.events)
        if row.when == "land":
            bus.inject(row.fault)
        report = arm.land()
        if name == "unplugged for good":
            assert not report.safe
            assert set(report.torque.values()) == {"unknown"}
            assert "torque could NOT be switched off" in report.problems[0]
        elif row.fault.startswith("unplug"):
            until(lambda: bus.device is not None)  # only a plugged-in bus is looked at by `assert_landed`
            assert report.safe, report.problems
        assert_landed(bus, arm, report)


def run(bus: VirtualBus, arm: SO100FollowerArm, row: Row) -> None:
    """Connect, move the arm slowly, and compare the last reading with where the joints are."""
    arm.connect()
    target = arm.observe().joints
    for tick in range(row.ticks):
        if tick == 3 and row.when == "run":
            bus.inject(row.fault)
        joints = arm.observe().joints
        assert np.all(np.abs(joints - target) < 12), "a damaged or stale reading came through"
        target = target + (0.5 if tick // 40 % 2 == 0 else -0.5)
        arm.send(target)
        time.sleep(0.01)
    bus.clear()
    time.sleep(0.08)
    np.testing.assert_allclose(arm.observe().joints, true_joints(bus), atol=0.2)


def look_until(arm: SO100FollowerArm, done: Callable[[], bool], each: Callable[[], object] = lambda: None) -> None:
    """Observe, and do `each` before, until it is so."""
    until(lambda: (each(), arm.observe(), done())[-1])


def all_loads(arm: SO100FollowerArm) -> MotorLoads:
    """The first observation for which every servo has been asked."""
    look_until(arm, lambda: not np.isnan(arm.observe().loads.time_s).any())
    return arm.observe().loads


# What the servos say of themselves: each is asked in turn, here more often than on a real arm


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds between two servos' turns."""
    monkeypatch.setattr(motor_state, "POLL_EVERY_S", 0.05)
    monkeypatch.setattr(motor_state, "SELDOM_S", 0.1)
    return 0.05


@pytest.mark.parametrize("fault", ["delay:ms=60,register=65,on=read", "silent:register=65,on=read"])
def test_torque_is_watched_also_where_the_status_register_is_not_answered_in_time(fault: str, often: float, tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject(fault)
        look_until(arm, lambda: arm.events["status_poll_missed"] >= 4)
        bus.servos[4].write(Register.TORQUE_ENABLE, b"\0")
        with pytest.raises(RobotError, match=r"servo 5 \(wrist_roll\) lost its torque"):
            look_until(arm, lambda: False)


def test_the_load_is_read_and_most_often_of_who_stands_still(often: float, tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        target = arm.observe().joints + 12
        bus.inject("blocked:servo=3")
        time.sleep(0.5)  # the others are there by then
        began_s, read = time.monotonic(), []
        while time.monotonic() < began_s + 1.2:
            arm.send(target)
            read.append(arm.observe().loads)
            time.sleep(0.01)
        each = [len({loads.time_s[joint] for loads in read if loads.time_s[joint] > 0}) for joint in range(6)]  # NaN: not yet
        assert each[2] > 2 * max(count for joint, count in enumerate(each) if joint != 2)
        assert read[-1].percent[2] == pytest.approx(16 * 0.166 * np.radians(12) * 100, abs=2)
        assert read[-1].current_ma[2] > 1000
        assert np.nanmax(read[-1].percent[[0, 1, 3, 4, 5]]) < 5


def test_servos_that_answer_no_reading_as_far_as_the_current_are_asked_for_their_status_alone(often: float, tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False) as (bus, arm):
        bus.inject(f"silent:register={int(Register.PRESENT_CURRENT)},on=read")
        arm.reset()
        loads = all_loads(arm)
        assert arm.events["status_poll_missed"] == SELDOM_AFTER - 1, "no further one, each of which costs 70 ms"
        assert np.isnan(loads.percent).all()


@pytest.mark.parametrize(("load", "current"), [(b"\xff\xff", b"\xff\xff"), (b"\xff\x03", b"\xfe\xff")])
def test_a_load_that_no_servo_can_have_is_none(load: bytes, current: bytes) -> None:
    """Registers that read as ones, or that hold a negative number as its two's complement."""
    registers = bytearray(Register.PRESENT_CURRENT + 2)
    registers[Register.PRESENT_LOAD : Register.PRESENT_LOAD + 2], registers[Register.PRESENT_CURRENT :] = load, current
    state = ServoState.of(bytes(registers), 0)
    assert np.isnan([state.load_percent, state.current_ma]).all()


def test_a_servo_that_is_reset_between_two_requests_is_told_and_set_up_again(often: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It never falls silent, and the next goal switches it on again."""
    with connected(tmp_path, engaged=False) as (bus, arm):
        here = arm.observe().joints
        arm.send(here)
        all_loads(arm)
        bus.servos[2].power_cycle()
        look_until(arm, lambda: arm.events["servo_reset"] > 0, lambda: arm.send(here))
        assert "servo 3 (elbow_flex) was reset" in caplog.text
        assert len({servo.registers[Register.ACCELERATION] for servo in bus.servos}) == 1
        assert arm.events["servo_reset"] == 1


# A damaged line while the arm lands


def test_landing_switches_the_others_off_before_a_silent_one_is_asked_which_is_reported_as_unknown(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("silent:servo=1")
        seen_off: list[bool] = []

        def first_asked(*request: object, **how: object) -> object:
            del arm.bus.ask
            until(lambda: not any(list(bus.torque().values())[1:]))
            seen_off.append(True)  # landing itself survives whatever is raised here
            return arm.bus.ask(*request, **how)

        arm.bus.ask = first_asked
        report = arm.land()
        assert seen_off
        assert [(joint, state) for joint, state in report.torque.items() if state != "off"] == [("shoulder_pan", "unknown")]
        assert any("shoulder_pan (id 1)" in problem for problem in report.problems)
        assert not report.safe


def test_late_answers_pass_neither_for_the_next_one_nor_for_an_acknowledgement(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        here, line = arm.observe().joints, arm.bus.line
        line.write(Request(2, Instruction.READ, bytes((56, 2))).encode())  # nobody reads this answer
        until(lambda: line.in_waiting >= 8)
        np.testing.assert_allclose(arm.observe().joints, here, atol=0.2)
        assert (arm.events["stale_bytes"], arm.events["read_retry"]) == (1, 0)
        assert line.in_waiting == 0, "dropped, not left for the next request"
        bus.inject("delay:ms=190,on=read,count=1")
        line.write(Request(1, Instruction.READ, bytes((40, 1))).encode())  # its answer comes while servo 1 is asked to let go
        report = arm.land()
        assert report.safe, report.problems


def test_a_port_that_opens_and_cannot_be_read_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gr00t_fast.robots.so100.LAND_REOPEN_S", 0.2)
    with connected(tmp_path) as (bus, arm):
        with monkeypatch.context() as patch:
            patch.setattr(type(arm.bus.line), "in_waiting", property(raising(OSError("Input/output error"))))
            report = arm.land()
        assert set(report.torque.values()) == {"unknown"}
        assert "power supply" in report.problems[0]
        until(lambda: bus.torque() == OFF)  # by the watchdog


def test_a_port_that_another_program_has_taken_meanwhile_is_left_to_it(bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path, PatientArm)
    arm.connect()
    arm.reset()
    bus.unplug()
    bus.replug()
    with open(bus.port, "rb", buffering=0) as rival:
        fcntl.flock(rival, fcntl.LOCK_EX)
        report = arm.land()
        assert set(report.torque.values()) == {"unknown"}
        time.sleep(0.5)  # the watchdog, too, leaves it alone
        assert bus.torque() == ON


# Losing the servos and finding them again


def dip(bus: VirtualBus, kind: str, sag_deg: float) -> None:
    """The supply of the servos fails for a moment: while the cable is out, or USB stays alive; or between two requests, during a long inference."""

    def happen() -> None:
        bus.power_cycle()
        bus.push("shoulder_lift", sag_deg)
        bus.replug()

    if kind == "unseen":
        time.sleep(0.15)
        happen()
    else:
        bus.unplug() if kind == "cable out" else bus.inject("silent:for_s=0.25")
        threading.Timer(0.1, happen).start()


@pytest.mark.parametrize("sag_deg", [-10.0, -40.0])
@pytest.mark.parametrize("kind", ["cable out", "brown out", "unseen"])
def test_a_dip_of_the_supply_is_survived_where_the_arm_is_unless_it_fell(kind: str, sag_deg: float, tmp_path: Path) -> None:
    with connected(tmp_path, reconnect_s=2) as (bus, arm):
        here = arm.observe().joints
        arm.send(here)
        arm.observe()
        dip(bus, kind, sag_deg)
        look = (lambda: arm.send(here)) if kind == "unseen" else arm.observe
        if sag_deg < -20:
            with pytest.raises(RobotError, match="lost power"):
                look()
            assert bus.torque() == OFF
        else:
            look()
            np.testing.assert_allclose(true_joints(bus), here + [0, sag_deg, 0, 0, 0, 0], atol=0.3)
            assert arm.events["torque_restored"] == 1
            assert bus.torque() == ON


def test_one_servo_that_loses_its_power_does_not_cost_the_others_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another servo cannot be configured."""
    with connected(tmp_path) as (bus, arm):
        bus.inject("silent:servo=2,on=write,register=21")
        accelerations = [servo.registers[Register.ACCELERATION] for servo in bus.servos]
        bus.servos[2].power_cycle()
        bus.inject("silent:count=1,on=sync_read")
        written, write = [], Servo.write
        with monkeypatch.context() as patch:
            patch.setattr(Servo, "write", lambda servo, at, data: (written.append((at, data[0])), write(servo, at, data)))
            arm.observe()
        assert (Register.TORQUE_ENABLE, 1) in written
        assert (Register.TORQUE_ENABLE, 0) not in written
        assert bus.torque() == ON
        assert [servo.registers[Register.ACCELERATION] for servo in bus.servos] == accelerations


def test_a_cable_that_comes_and_goes_ends_the_run(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        with pytest.raises(RobotError, match=r"\b5 times.*cable"):
            look_until(arm, lambda: False, lambda: bus.inject("unplug:for_s=0.1"))
        assert arm.events["reconnect"] == 5
        until(lambda: bus.device is not None)


def test_another_arm_behind_the_port_after_reconnecting_is_refused(tmp_path: Path) -> None:
    with connected(tmp_path, reconnect_s=2) as (bus, arm):
        bus.unplug()
        bus.servos[2].set_word(Register.MIN_POSITION, 5)
        threading.Timer(0.1, bus.replug).start()
        with pytest.raises(RobotError, match=r"elbow_flex\.range_min: file \d+, servo 5"):
            arm.observe()


# What a caller does


def test_ctrl_c_half_way(tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False) as (_, arm):
        arm.follower.configure = raising(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            arm.reset()


def test_two_threads(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("delay:ms=40,count=1")
        first = threading.Thread(target=arm.observe)
        first.start()
        time.sleep(0.01)
        with pytest.raises(RobotError, match="another thread"):
            arm.observe()
        first.join()


@pytest.mark.parametrize("max_step", [None, 5])
def test_goals_that_no_motor_can_take_are_refused_and_others_stay_inside_the_limits(max_step: int | None, tmp_path: Path) -> None:
    with connected(tmp_path, max_relative_target=max_step) as (bus, arm):
        goals = [servo.word(Register.GOAL_POSITION) for servo in bus.servos]
        for bad in (np.full(6, np.nan), np.full(6, np.inf), np.zeros(5), np.zeros((1, 6)), {}):
            with pytest.raises(RobotError, match=r"6 finite joint targets|failed"):
                arm.send(bad)
        assert [servo.word(Register.GOAL_POSITION) for servo in bus.servos] == goals
        arm.send(np.full(6, 1e6))
        arm.observe()  # the sync write is not acknowledged; the answer to this one comes after it
        for servo, values in zip(bus.servos, bus.calibration.values(), strict=True):
            assert values.range_min <= servo.word(Register.GOAL_POSITION) <= values.range_max
        assert arm.events["target_clipped"] == 1
        assert max_step is None or abs(bus.servos[0].word(Register.GOAL_POSITION) - 2047) * 360 / 4095 < max_step + 1
