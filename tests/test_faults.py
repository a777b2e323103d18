"""The table: each fault a servo bus, a cable or a user can produce, and what the arm makes of it.

`Survives(event)`: the run goes on, the event is counted, and readings are current afterwards. `Stops(text)`: one RobotError that says `text`.
Either way the arm lands: torque register 0 on every servo that can be reached, port closed.
"""

from __future__ import annotations

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

from arm_bench import OFF, ON, assert_landed, connected, make_arm, raising, true_joints

from gr00t_fast.contracts import MotorLoads
from gr00t_fast.errors import RobotError
from gr00t_fast.robots import motor_state
from gr00t_fast.robots.motor_state import SELDOM_AFTER
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.robots.virtual_bus import Register, Servo, VirtualBus
from gr00t_fast.robots.virtual_bus.protocol import Instruction, Request

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the checks of open descriptors need Linux")


class Survives(NamedTuple):
    event: str | None


class Stops(NamedTuple):
    text: str


class Row(NamedTuple):
    when: Literal["connect", "run", "land"]
    fault: str
    outcome: Survives | Stops
    ticks: int = 10


TOO_LATE = Stops("answers came too late: the USB adapter")
TABLE = {
    "servo 3 silent": Row("run", "silent:servo=3", Stops("no plausible joint reading")),
    "servo 3 silent for 0.1 s": Row("run", "silent:servo=3,for_s=0.1", Survives("read_retry")),
    "silent at disconnect": Row("land", "silent:servo=3", Survives(None)),
    "absent at connect": Row("connect", "absent:servo=6", Stops("Missing motor IDs: - 6")),
    "one missed reply at connect": Row("connect", "silent:servo=5,count=4", Survives("read_retry")),
    "silent while being configured": Row("connect", "silent:servo=2,on=write", Stops("configuring the servos")),
    "wrong model": Row("connect", "wrong_model:servo=4", Stops("incorrect model numbers")),
    "bad checksum": Row("run", "checksum:servo=2,count=1", Survives("read_retry")),
    "byte lost in the header": Row("run", "drop:at=0,count=1", Survives("read_retry")),
    "byte lost at the end": Row("run", "drop:at=47,count=1", Survives("read_retry")),
    "random byte loss 0.2 %": Row("run", "loss:rate=0.002", Survives("read_retry"), ticks=60),
    "random byte flips 1 %": Row("run", "flip:rate=0.01", Survives("read_retry"), ticks=40),
    "replies of 30 ms": Row("run", "delay:ms=30", Survives(None)),
    "two replies later than 50 ms": Row("run", "delay:ms=110,count=2", Survives("late_answer")),
    "one reply much later": Row("run", "delay:ms=170,count=1", Survives("read_retry")),
    "every reply 80 ms late from the start": Row("connect", "delay:ms=80", TOO_LATE),
    # a program that is held up for 90 ms finds such an answer, and goes on: the more often, the busier the machine
    "every reading later than 50 ms": Row("run", "delay:ms=140,on=sync_read", TOO_LATE, ticks=400),
    "every reading far later than 50 ms": Row("run", "delay:ms=200,on=sync_read", TOO_LATE, ticks=400),
    "late acks of a write": Row("connect", "delay:ms=110,servo=1,on=write,after=5,count=2", Survives("late_answer")),
    "very late ack of a write": Row("connect", "delay:ms=400,servo=1,on=write,after=5,count=1", Survives("read_retry")),
    "status without data": Row("run", "no_data:servo=4,count=1", Survives("read_retry")),
    "status without data, always": Row("run", "no_data:servo=4,on=sync_read", Stops("no plausible joint reading")),
    "overload": Row("run", "error:servo=3,bits=32", Survives("servo_overload")),
    "overload at disconnect": Row("land", "error:servo=3,bits=32", Survives(None)),
    "overload at connect": Row("connect", "error:servo=3,bits=32", Stops("servo 3 reports overload")),
    "overheating that lasts": Row("run", "error:servo=3,bits=4", Stops("overheat"), ticks=150),
    "unplugged for 0.3 s": Row("run", "unplug:at_s=0.01,for_s=0.3", Survives("reconnect"), ticks=30),
    "unplugged between request and reply": Row("run", "unplug:for_s=0.2", Survives("reconnect"), ticks=30),
    "unplugged while sending": Row("run", "unplug:on=sync_write,for_s=0.2", Survives("reconnect"), ticks=30),
    "unplugged for good": Row("run", "unplug", Stops("did not come back within")),
    "unplugged just before landing": Row("land", "unplug:for_s=0.3", Survives(None)),
    "unplugged in the middle of landing": Row("land", "unplug:for_s=0.3,after=5", Survives(None)),
}


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    with VirtualBus(seed=3) as bus:
        arm = make_arm(bus, tmp_path, reconnect_s=0.6, connect_attempts=1 if isinstance(row.outcome, Stops) else 2)
        if row.when == "connect":
            bus.inject(row.fault)
        if isinstance(row.outcome, Stops):
            with pytest.raises(RobotError, match=row.outcome.text):
                run(bus, arm, row)
        else:
            run(bus, arm, row)
            assert row.outcome.event is None or arm.events[row.outcome.event] > 0, dict(arm.events)
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

    def look() -> bool:
        each()
        arm.observe()
        return done()

    until(look)


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


@pytest.mark.parametrize("fault", [None, "blocked:servo=3"])
def test_the_load_is_read_without_a_further_request_and_most_often_of_who_stands_still(fault: str | None, often: float, tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        target = arm.observe().joints + 12
        if fault:
            bus.inject(fault)
        time.sleep(0.5)  # the others are there by then
        requests, ticks, began_s, read = bus.requests, 0, time.monotonic(), []
        while time.monotonic() < began_s + 1.5:
            arm.send(target)
            read.append(arm.observe().loads)
            ticks += 1
            time.sleep(0.01)
        polls = bus.requests - requests - 2 * ticks
        assert polls <= (time.monotonic() - began_s) / often + 3, "as many as before there was a load to read"
        each = [len({loads.time_s[joint] for loads in read if loads.time_s[joint] > 0}) for joint in range(6)]  # NaN: not yet
        others = max(count for joint, count in enumerate(each) if joint != 2)
        if fault:
            assert each[2] > 2 * others
            assert read[-1].percent[2] == pytest.approx(16 * 0.166 * np.radians(12) * 100, abs=2)
            assert read[-1].current_ma[2] > 1000
        else:
            assert each[2] <= others + 1
        assert np.nanmax(read[-1].percent[[0, 1, 3, 4, 5]]) < 5


def test_a_blocked_servo_that_does_not_tell_its_load_is_not_asked_more_often_than_in_turn(often: float, tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("blocked:servo=3")
        bus.inject(f"silent:servo=3,register={int(Register.STATUS)},on=read")
        arm.send(arm.observe().joints + 12)
        requests, asked = bus.requests, [0]
        look_until(arm, lambda: bus.requests - requests - asked[0] > 24, lambda: asked.__setitem__(0, asked[0] + 1))  # so many polls
        assert 0 < arm.events["status_poll_missed"] <= 24 / 6 + 2


def test_servos_that_answer_no_reading_as_far_as_the_current_are_asked_for_their_status_alone(often: float, tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False) as (bus, arm):
        bus.inject(f"silent:register={int(Register.PRESENT_CURRENT)},on=read")
        arm.reset()
        loads = all_loads(arm)
        assert arm.events["status_poll_missed"] == SELDOM_AFTER - 1, "no further one, each of which costs 70 ms"
        assert np.isnan(loads.percent).all()


@pytest.mark.parametrize(("load", "current"), [(b"\xff\xff", b"\xff\xff"), (b"\xff\x03", b"\xfe\xff")])
def test_a_load_that_no_servo_can_have_is_none(load: bytes, current: bytes, often: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers that read as ones, or that hold a negative number as its two's complement."""
    read = Servo.read

    def lies(servo: Servo, address: int, length: int) -> bytes:
        servo.registers[Register.PRESENT_LOAD : Register.PRESENT_LOAD + 2] = load
        servo.registers[Register.PRESENT_CURRENT : Register.PRESENT_CURRENT + 2] = current
        return read(servo, address, length)

    with connected(tmp_path, engaged=False) as (_, arm):
        monkeypatch.setattr(Servo, "read", lies)
        loads = all_loads(arm)
        assert np.isnan([loads.percent, loads.current_ma]).all()


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
        asked_s = all_loads(arm).time_s
        look_until(arm, lambda: bool((arm.observe().loads.time_s > asked_s).all()))
        assert (arm.events["servo_reset"], arm.events["foreign_goal"]) == (1, 0)


def test_goals_of_another_program_are_told_and_end_the_run_when_they_go_on(often: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with connected(tmp_path, engaged=False) as (bus, arm):
        here = arm.observe().joints
        arm.send(here)
        all_loads(arm)
        rivals = bus.servos[4].word(Register.GOAL_POSITION) + 40

        def drive_both() -> None:
            arm.send(here)
            time.sleep(0.01)  # the goal has arrived
            bus.servos[4].set_word(Register.GOAL_POSITION, rivals)

        with pytest.raises(RobotError, match=r"servo 5 \(wrist_roll\).*another program"):
            look_until(arm, lambda: False, drive_both)
        assert arm.events["foreign_goal"] == 3
        assert caplog.text.count("another program") == 2


# A damaged line while the arm lands


def test_landing_switches_the_others_off_before_a_silent_one_is_asked_which_is_reported_as_unknown(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("silent:servo=1")
        ask, seen_off = arm._bus.ask, []

        def first_asked(*request: object, **how: object) -> object:
            arm._bus.ask = ask
            until(lambda: not any(list(bus.torque().values())[1:]))
            seen_off.append(True)  # landing itself survives whatever is raised here
            return ask(*request, **how)

        arm._bus.ask = first_asked
        report = arm.land()
        assert seen_off
        assert [(joint, state) for joint, state in report.torque.items() if state != "off"] == [("shoulder_pan", "unknown")]
        assert any("shoulder_pan (id 1)" in problem for problem in report.problems)
        assert not report.safe


def test_late_answers_pass_neither_for_the_next_one_nor_for_an_acknowledgement(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        here, line = arm.observe().joints, arm._bus.line
        line.write(Request(2, Instruction.READ, bytes((56, 2))).encode())  # nobody reads this answer
        time.sleep(0.05)
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
            patch.setattr(type(arm._bus.line), "in_waiting", property(raising(OSError("Input/output error"))))
            report = arm.land()
        assert set(report.torque.values()) == {"unknown"}
        assert "power supply" in report.problems[0]
        until(lambda: bus.torque() == OFF)  # by the watchdog


def test_a_port_that_another_program_has_taken_meanwhile_is_left_to_it(bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path)
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


def test_a_stop_is_seen_between_two_requests_while_servos_are_looked_for(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("silent")
        bus.unplug()
        bus.replug()
        requests = bus.requests

        def stop() -> None:
            if bus.requests > requests:
                raise KeyboardInterrupt

        arm.check_stop = stop
        with pytest.raises(KeyboardInterrupt):
            arm.observe()
        assert bus.requests - requests < 6, "of the eighteen that silent servos are asked"
        bus.clear()
        arm.check_stop = lambda: None
        arm.observe()


def test_connecting_again_works_after_a_failed_connection(bus: VirtualBus, tmp_path: Path) -> None:
    arm = make_arm(bus, tmp_path, connect_attempts=1)
    bus.inject("silent:servo=3")
    with pytest.raises(RobotError, match="Missing motor IDs: - 3"):
        arm.connect()
    bus.clear()
    arm.connect()
    arm.reset()
    arm.observe()
    assert_landed(bus, arm, arm.land())


def out_of_power(bus: VirtualBus, sag_deg: float) -> None:
    bus.power_cycle()
    bus.push("shoulder_lift", sag_deg)


def cable_out(bus: VirtualBus, sag_deg: float) -> None:
    """The supply fails while the cable is out."""
    bus.unplug()
    out_of_power(bus, sag_deg)
    threading.Timer(0.1, bus.replug).start()


def brown_out(bus: VirtualBus, sag_deg: float) -> None:
    """The servos lose their supply for 0.25 s while USB stays alive."""
    bus.inject("silent:for_s=0.25")
    threading.Timer(0.1, out_of_power, (bus, sag_deg)).start()


def unseen(bus: VirtualBus, sag_deg: float) -> None:
    """Between two requests, during a long inference."""
    time.sleep(0.15)
    out_of_power(bus, sag_deg)


@pytest.mark.parametrize("sag_deg", [-10.0, -40.0])
@pytest.mark.parametrize("dip", [cable_out, brown_out, unseen])
def test_a_dip_of_the_supply_is_survived_where_the_arm_is_unless_it_fell(
    dip: Callable[[VirtualBus, float], None], sag_deg: float, tmp_path: Path
) -> None:
    with connected(tmp_path, reconnect_s=2) as (bus, arm):
        here = arm.observe().joints
        arm.send(here)
        arm.observe()
        dip(bus, sag_deg)
        look = (lambda: arm.send(here)) if dip is unseen else arm.observe
        if sag_deg < -20:
            with pytest.raises(RobotError, match="lost power"):
                look()
            assert bus.torque() == OFF
        else:
            look()
            np.testing.assert_allclose(true_joints(bus), here + [0, sag_deg, 0, 0, 0, 0], atol=0.3)
            assert arm.events["torque_restored"] == 1
            assert bus.torque() == ON


@pytest.mark.parametrize("fault", [None, "silent:servo=2,on=write,register=21"])
def test_one_servo_that_loses_its_power_does_not_cost_the_others_theirs(fault: str | None, tmp_path: Path) -> None:
    """With an arm that can fall, found powered; and where another servo cannot be configured. On a USB adapter with 4 ms of latency."""
    simulation = pytest.importorskip("gr00t_fast.robots.sim.simulation")
    with VirtualBus(plant=simulation.ScenePlant(), usb_latency_ms=4.0) as bus:
        switched_off = []
        for servo in bus.servos:
            servo.write(Register.GOAL_POSITION, servo.read(Register.PRESENT_POSITION, 2))
            servo.write = lambda address, data, servo=servo: (
                switched_off.append(servo.id) if address == Register.TORQUE_ENABLE and not data[0] else None,
                Servo.write(servo, address, data),
            )
        arm = make_arm(bus, tmp_path)
        arm.connect()
        before = true_joints(bus)
        arm.reset()
        np.testing.assert_allclose(true_joints(bus), before, atol=1.5)
        if fault:
            bus.inject(fault)
        accelerations = [servo.registers[Register.ACCELERATION] for servo in bus.servos]
        bus.servos[2].power_cycle()
        bus.inject("silent:count=1,on=sync_read")
        arm.observe()
        assert switched_off == []
        assert bus.torque() == ON
        assert [servo.registers[Register.ACCELERATION] for servo in bus.servos] == accelerations
        np.testing.assert_allclose(true_joints(bus), before, atol=8)
        assert_landed(bus, arm, arm.land())


def test_a_cable_that_comes_and_goes_ends_the_run(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        with pytest.raises(RobotError, match="lost more than 5 times"):
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


@pytest.mark.parametrize("where", ["sync_read", "configure"])
def test_ctrl_c_half_way(where: str, tmp_path: Path) -> None:
    with connected(tmp_path, engaged=False) as (_, arm):
        owner = arm._bus if where == "sync_read" else arm._follower
        setattr(owner, where, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            arm.reset()
        delattr(owner, where)


def test_two_threads(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        bus.inject("delay:ms=40,count=1")
        first = threading.Thread(target=arm.observe)
        first.start()
        time.sleep(0.01)
        with pytest.raises(RobotError, match="one thread at a time"):
            arm.observe()
        first.join()
        arm.observe()


def test_goals_that_no_motor_can_take_are_refused_and_others_stay_inside_the_calibration(tmp_path: Path) -> None:
    with connected(tmp_path) as (bus, arm):
        goals = [servo.word(Register.GOAL_POSITION) for servo in bus.servos]
        for bad in (np.full(6, np.nan), np.full(6, np.inf), np.zeros(5), np.zeros((1, 6)), {}):
            with pytest.raises(RobotError, match=r"6 finite joint targets|failed"):
                arm.send(bad)
        assert [servo.word(Register.GOAL_POSITION) for servo in bus.servos] == goals
        for wild in (1e6, -500.0):
            arm.send(np.full(6, wild))
            arm.observe()  # the sync write is not acknowledged; the answer to this one comes after it
            for servo, values in zip(bus.servos, bus.calibration.values(), strict=True):
                assert values.range_min <= servo.word(Register.GOAL_POSITION) <= values.range_max
        assert arm.events["target_clipped"] == 2


def test_step_limit_of_the_driver(tmp_path: Path) -> None:
    with connected(tmp_path, max_relative_target=5) as (bus, arm):
        assert arm.max_step.tolist() == [5.0] * 6
        arm.send(np.full(6, 45.0))
        arm.observe()
        assert abs(bus.servos[0].word(Register.GOAL_POSITION) - 2047) * 360 / 4095 < 6
