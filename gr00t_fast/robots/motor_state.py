"""Plausibility of the servos' readings, their error bits, and their torque, for one arm; and all that they say about themselves before a run."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, MotorLoads
from gr00t_fast.base.errors import BusFault, Gr00tFastError, RobotError, one_line, require
from gr00t_fast.robots.bus import BAUD_RATE, EXCHANGE_FAILED, LINK_LOST, WAIT_S, ServoState, error_names, exchange
from gr00t_fast.robots.calibration import JointCalibration
from gr00t_fast.robots.feetech import MODEL_STS3215, Instruction, Register, Request, Status, decode_signed
from gr00t_fast.robots.lerobot_glue import GRIPPER, calibration_differences, lock_port, outside_range

log = logging.getLogger(__name__)

MAX_SPEED_DEG_S = 450.0  # an STS3215 turns 290 deg/s without load at 12 V; a hand can push it somewhat faster
SLACK_DEG = 8.0  # what a hand or a servo adds to that speed
LONGEST_GAP_S = 0.1  # after a longer pause any large step asks for a second reading, which is cheap


class JumpGuard:
    """Refuses joint readings that no arm can have produced. One per arm; `forget` after a reconnect.

    The bus checksum has eight bits, so on a noisy line one damaged reading in some hundred passes it. A reading that moved further than the motors
    can turn is read again, and accepted once two in a row agree: the arm may really have moved, or be elsewhere after a pause.
    """

    def __init__(self, units_per_deg: np.ndarray) -> None:
        """units_per_deg: (J,) how much each joint's reading changes per degree."""
        self._scale = np.asarray(units_per_deg, dtype=np.float64)
        self.forget()

    def forget(self) -> None:
        """Accept nothing: the next reading needs a second one that agrees with it."""
        self.last: np.ndarray | None = None  # the last accepted reading (J,)
        self.jumped = False  # whether it was accepted although no joint can have turned so far since the one before
        self._last_s = 0.0
        self._candidate: tuple[np.ndarray, float] | None = None

    def accepts(self, reading: np.ndarray, asked_s: float, got_s: float) -> bool:
        """Whether to use the reading (J,), taken at some time from `asked_s` to `got_s`: a program that is held up gets a fresh one late. When not,
        read again and ask again."""
        accepted = None if self.last is None else (self.last, self._last_s)
        near = any(known is not None and self._near(reading, got_s, *known, LONGEST_GAP_S) for known in (accepted, self._candidate))
        self.jumped = near and accepted is not None and not self._near(reading, got_s, *accepted, np.inf)
        self._candidate = None if near else (reading, asked_s)
        if near:
            self.last, self._last_s = reading, asked_s
        return near

    def _near(self, reading: np.ndarray, got_s: float, other: np.ndarray, other_asked_s: float, longest_s: float) -> bool:
        limit_deg = SLACK_DEG + MAX_SPEED_DEG_S * min(max(got_s - other_asked_s, 0.0), longest_s)
        return bool(np.all(np.abs(reading - other) <= limit_deg * self._scale))


POLL_EVERY_S = 0.2  # one servo each time, so each is asked every 1.2 s; 0.2 ms on a direct line
# A joint that stands still so far from its goal is asked every second time, so that a stall is found before the servo trips (after 2 s at 80 %).
# The others then wait up to 2.4 s. Not the gripper: it stands still against what it holds, and would keep the others waiting.
SUSPECT_DEG, STILL_DEG = 3.0, 1.0
SELDOM_AFTER = 3  # polls in a row without an answer; each costs 70 ms
SELDOM_S = 1.0  # from then on all servos are asked at once whether they hold, in the way that joint readings take
LONGEST_TROUBLE_S = 1.0
FELL_DEG = 20.0  # motors found without torque are switched on again only if the arm moved less
_OVERLOAD = 0x20


class PerMinute:
    """How often something may happen within a minute."""

    def __init__(self, most: int) -> None:
        self._times_s: deque[float] = deque(maxlen=most + 1)

    def exceeded(self, now_s: float) -> bool:
        """It has happened now. Returns whether that is once too often."""
        self._times_s.append(now_s)
        return len(self._times_s) == self._times_s.maxlen and now_s - self._times_s[0] < 60.0


class ServoHealth:
    """Watches the servos' error bits, which the driver's sync read hides, and their torque. loads: as last answered.

    Overload is survived: the servo limits its own force, and a gripper that holds a block may stay in it. Wrong voltage, heat, current or a broken
    encoder that lasts ends the run, by a RobotError that is raised once. Each error is counted as `servo_<error>` and logged once per onset.
    """

    def __init__(self, bus: Any, units_per_deg: np.ndarray, events: Counter[str]) -> None:
        """Touches no hardware. bus: a `bus.Guard`. units_per_deg: (6,), as in `JumpGuard`."""
        self._bus, self._scale, self._events = bus, units_per_deg, events
        self._states: dict[int, ServoState] = {}  # by id, as last answered
        self._accelerations: dict[int, int] = {}  # by id, as first seen while holding: another one after a reset
        never = np.full(len(SO100_JOINTS), np.nan)
        self.loads = MotorLoads(never, never, never)
        self._next_poll_s, self._next_joint = 0.0, 0
        self._polled_at: np.ndarray | None = None  # the joints at the last poll
        self._suspected = False  # whether the last poll was out of turn
        self._silent: np.ndarray = np.zeros(len(SO100_JOINTS), bool)  # who did not answer when last asked: not asked out of turn, it costs 70 ms
        self._missed = 0  # polls in a row
        self._tell_loads = True  # whether servos answer a poll that asks for load and current too
        self._known: dict[int, int] = {}
        self._ended = False  # whether an error that lasts has ended the run
        self._since_s: dict[int, float] = {}

    def check(self, now_s: float, holding: bool, joints: np.ndarray, goal: np.ndarray | None = None) -> None:
        """Ask the next servo if it is time, then judge all error bits seen so far. `holding`: torque is meant to be on. `joints`, `goal` (6,): where
        the joints are and were sent to, which decides who is asked. Raises RobotError."""
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + (POLL_EVERY_S if self._missed < SELDOM_AFTER else SELDOM_S)
            self._poll(holding, now_s, self._whom(joints, goal))
        for servo_id in self._bus.error_bits:
            self._judge(servo_id, self._error_bits(servo_id), now_s)

    def restore_if_lost(self, before: np.ndarray | None) -> bool:
        """Ask every motor whether it holds; those that do not are switched on again where they are, and then it returns True.

        A servo whose supply dips comes back without torque, and the next goal switches it on again: an arm that fell meanwhile would leap back.
        before: (6,) the joints while all still held. Raises RobotError when the arm moved further than FELL_DEG from there.
        """
        lost = [joint for joint, on in self._bus.sync_read("Torque_Enable").items() if not on]
        if not lost:
            return False
        self._check_not_fallen(before)
        self._bus.enable_torque(lost)
        for joint in lost:
            self._bus.restore_settings(joint)
        self._check_not_fallen(before)
        self._events["torque_restored"] += 1
        log.warning("%s lost power for a moment and holds again; check the power supply (voltage, current, plug)", ", ".join(lost))
        return True

    def _check_not_fallen(self, before: np.ndarray | None) -> None:
        now = self._bus.sync_read("Present_Position")
        if before is not None and np.any(np.abs(before - [now[joint] for joint in SO100_JOINTS]) > FELL_DEG * self._scale):
            raise BusFault(
                f"the servos lost power for a moment, and the arm moved more than {FELL_DEG:g} degrees. It is not switched on again by "
                "itself. Check the power supply (voltage, current, plug), put the arm upright and start the run again."
            )

    def _error_bits(self, servo_id: int) -> int:
        """The error bits of its newest status packet, and of its status register when last polled."""
        state = self._states.get(servo_id)
        return self._bus.error_bits.get(servo_id, 0) | (state.error_bits if state is not None else 0)

    def _whom(self, joints: np.ndarray, goal: np.ndarray | None) -> int:
        """The joint to be asked: in turn, and in between the one that stands still furthest from its goal."""
        before, self._polled_at = self._polled_at, joints
        if goal is not None and before is not None and not self._suspected:
            candidates = (np.abs(joints - before) < STILL_DEG * self._scale) & ~self._silent
            away_deg = np.where(candidates, np.abs(goal - joints) / self._scale, 0.0)[:GRIPPER]
            if away_deg.max() >= SUSPECT_DEG:
                self._suspected = True
                return int(away_deg.argmax())
        self._suspected = False
        joint, self._next_joint = self._next_joint, (self._next_joint + 1) % len(SO100_JOINTS)
        return joint

    def _poll(self, holding: bool, now_s: float, joint: int) -> None:
        servo_id = joint + 1
        state = self._answered(lambda: self._bus.poll(servo_id, self._tell_loads))
        if state is None and self._missed == SELDOM_AFTER - 1 and np.isnan(self.loads.time_s).all():
            state = self._answered(lambda: self._bus.poll(servo_id, loads=False))
            self._tell_loads = state is None
            if state is not None:
                log.warning("the servos do not answer for their load and current: blocked joints are not found (no stall protection)")
        self._silent[joint] = state is None
        if state is not None:
            self._take(state, servo_id, holding, now_s)
        if self._missed >= SELDOM_AFTER and holding:
            for name, torque in (self._answered(lambda: self._bus.sync_read("Torque_Enable")) or {}).items():
                self._demand_torque(self._bus.motors[name].id, torque)
        self._missed = 0 if state is not None else self._missed + 1
        if state is None:
            self._events["status_poll_missed"] += 1
        if self._missed == SELDOM_AFTER:
            log.warning(
                "the servos answer late or not at all for their status register; it is asked less often, their torque all the same. "
                "Blocked joints are found late or not at all (no stall protection)"
            )

    @staticmethod
    def _answered(poll: Callable[[], Any]) -> Any:
        try:
            return poll()
        except Gr00tFastError:
            raise
        except (*EXCHANGE_FAILED, *LINK_LOST):  # type: ignore[misc]  # the next joint reading meets the same line, and handles it
            return None

    def _take(self, state: ServoState, servo_id: int, holding: bool, now_s: float) -> None:
        self._states[servo_id] = state
        new = np.arange(len(SO100_JOINTS)) == servo_id - 1  # new arrays: the old ones belong to an observation
        values = (self.loads.percent, state.load_percent), (self.loads.current_ma, state.current_ma), (self.loads.time_s, now_s)
        self.loads = MotorLoads(*(np.where(new, value, known) for known, value in values))
        if holding:
            self._demand_torque(servo_id, state.torque)
            self._demand_settings(servo_id, state)

    def _demand_torque(self, servo_id: int, torque: int) -> None:
        """An overloaded servo may let go to protect itself; any other one without torque lost its power, and the next goal is a leap."""
        if not torque and not self._error_bits(servo_id) & _OVERLOAD:
            raise BusFault(
                f"servo {servo_id} ({SO100_JOINTS[servo_id - 1]}) lost its torque while it should hold: its supply dipped, or another program "
                "switched it off. Check the power supply (voltage, current, plug), put the arm upright and start the run again."
            )

    def _demand_settings(self, servo_id: int, state: ServoState) -> None:
        """A servo that was reset has forgotten what this run wrote (the next goal switched it on again)."""
        joint = SO100_JOINTS[servo_id - 1]
        if self._accelerations.setdefault(servo_id, state.acceleration) != state.acceleration:
            self._events["servo_reset"] += 1
            log.warning("servo %d (%s) was reset while it held, and is on again; check the power supply (voltage, current, plug)", servo_id, joint)
            self._answered(lambda: self._bus.restore_settings(joint))

    def _judge(self, servo_id: int, bits: int, now_s: float) -> None:
        joint = SO100_JOINTS[servo_id - 1]
        for name in error_names(bits & ~self._known.get(servo_id, 0)):
            self._events[f"servo_{name}"] += 1
            log.warning("servo %d (%s) reports %s", servo_id, joint, name)
        self._known[servo_id] = bits
        if not bits & ~_OVERLOAD:
            self._since_s.pop(servo_id, None)
        elif now_s - self._since_s.setdefault(servo_id, now_s) > LONGEST_TROUBLE_S and not self._ended:
            self._ended = True  # the arm is put down now, which the same servo must not end half-way
            raise RobotError(
                f"servo {servo_id} ({joint}) reports {', '.join(error_names(bits))} for more than {LONGEST_TROUBLE_S:g} s. "
                "Check the supply voltage and that the joint moves freely, let it cool down, then switch its power off and on."
            )


# What the six servos say about themselves: read with pyserial alone, nothing is written, no torque changes hands. lerobot's driver is not used:
# importing it takes five seconds, and it stops at the first servo that does not answer.


TRIES = 2
_BLOCKS = ((0, 6), (9, 24), (40, 31))  # (address, bytes): who it is, what it was set to, how it is now
WARM_C = 55  # a joint that holds a load for minutes gets there; the servo itself lets go at its limit, 70 as delivered
LOW_V = 4.5  # a 5 V supply under load; below it servos reset in motion
SPREAD_V = 1.0  # between servos of one chain at rest: more is a bad plug


class Finding(NamedTuple):
    """`state` is ok, warn or fail."""

    what: str
    what_to_do: str = ""
    state: str = "fail"


@dataclass(frozen=True)
class _Servo:
    """What a servo says: its registers by address, and its complaints (voltage, overheat, overload, ...)."""

    memory: bytearray
    errors: list[str]

    @property
    def voltage_v(self) -> float:
        return self.memory[Register.PRESENT_VOLTAGE] / 10

    @property
    def firmware(self) -> str:
        return f"{self.memory[Register.FIRMWARE_MAJOR]}.{self.memory[Register.FIRMWARE_MINOR]}"

    def word(self, register: Register) -> int:
        return int.from_bytes(self.memory[register : register + 2], "little")

    @property
    def calibration(self) -> JointCalibration:
        offset = decode_signed(self.word(Register.HOMING_OFFSET), 11)
        return JointCalibration(self.memory[Register.ID], 0, offset, self.word(Register.MIN_POSITION), self.word(Register.MAX_POSITION))


def examine(port: str, calibration: Mapping[str, JointCalibration] | None, how_to_calibrate: str) -> tuple[list[Finding], dict[str, int]]:
    """What is wrong with the arm, and with its calibration file (None: there is none to compare with); and joint -> ticks of those that answer. Takes
    0.01 s, and 0.12 s more for each silent servo. Raises RobotError when the port cannot be used, MissingExtraError without pyserial."""
    serial = require("serial", "robot")
    try:
        with serial.Serial(port, BAUD_RATE, timeout=WAIT_S) as line:
            lock_port(line.fileno(), port)
            found = {joint: _ask(line, servo_id) for servo_id, joint in enumerate(SO100_JOINTS, 1)}
    except LINK_LOST as error:
        raise RobotError(f"the port {port} cannot be used: {one_line(error)}. Plug it in again, or choose another --robot.port.") from error
    there = {joint: servo for joint, servo in found.items() if servo is not None}
    if not there:
        return [Finding("no servo answers", "Switch the arm's power supply on; check the cable from the adapter to servo 1, and --robot.port.")], {}
    findings = [finding for servo_id, joint in enumerate(SO100_JOINTS, 1) for finding in _of_servo(f"servo {servo_id} ({joint})", found[joint])]
    findings += _of_chain(there)
    positions = {joint: decode_signed(servo.word(Register.PRESENT_POSITION), 15) for joint, servo in there.items()}
    if calibration is not None:
        findings.append(_of_calibration(there, positions, calibration, how_to_calibrate))
    return findings, positions


def _ask(line: Any, servo_id: int) -> _Servo | None:
    memory, errors = bytearray(256), 0
    for address, length in _BLOCKS:
        answer = _read(line, servo_id, address, length)
        if answer is None:
            return None
        memory[address : address + length] = answer.params
        errors |= answer.error
    return _Servo(memory, error_names(errors | memory[Register.STATUS]))


def _read(line: Any, servo_id: int, address: int, length: int) -> Status | None:
    for _ in range(TRIES):
        line.reset_input_buffer()
        found, _ = exchange(line, Request(servo_id, Instruction.READ, bytes((address, length))), [servo_id], length)
        if servo_id in found:
            return found[servo_id]
    return None


def _of_servo(name: str, servo: _Servo | None) -> list[Finding]:
    if servo is None:
        return [Finding(f"{name} does not answer", "Check its two plugs; `lerobot-setup-motors` repairs an id.")]
    heat_c, hottest_c = servo.memory[Register.PRESENT_TEMPERATURE], servo.memory[Register.MAX_TEMPERATURE]
    low_v, high_v = servo.memory[Register.MIN_VOLTAGE] / 10, servo.memory[Register.MAX_VOLTAGE] / 10
    volts, model = servo.voltage_v, servo.word(Register.MODEL)
    too_hot = heat_c >= hottest_c or "overheat" in servo.errors
    wrong_voltage = not low_v <= volts <= high_v or "voltage" in servo.errors
    others = [error for error in servo.errors if error not in ("overheat", "voltage")]
    checks = (  # whether it is so, and what then
        (model != MODEL_STS3215, f"is of model {model}, not an STS3215 ({MODEL_STS3215})", "Replace the servo.", "fail"),
        (too_hot, f"is too hot: {heat_c} C, its limit is {hottest_c}", "Switch the arm off; look for a joint that binds or holds a load.", "fail"),
        (not too_hot and heat_c >= WARM_C, f"is warm: {heat_c} C, it lets go at {hottest_c}", "Let it rest.", "warn"),
        (wrong_voltage, f"has {volts:g} V, outside its {low_v:g} to {high_v:g} V", "Check the power supply (voltage, current, plug).", "fail"),
        (not wrong_voltage and volts < LOW_V, f"has only {volts:g} V", "Check the power supply: it will reset under load.", "warn"),
        (others, f"reports {', '.join(others)}", "Relieve the joint, then switch the arm's power off and on.", "fail"),
        (servo.memory[Register.TORQUE_ENABLE], "is powered: an earlier program left it so", "Hold the arm, and switch its power off and on.", "warn"),
    )
    found = [Finding(f"{name} {what}", what_to_do, state) for is_so, what, what_to_do, state in checks if is_so]
    return found or [Finding(f"{name}: {volts:g} V, {heat_c} C, firmware {servo.firmware}", state="ok")]


def _of_chain(there: Mapping[str, _Servo]) -> list[Finding]:
    found, volts = [], [servo.voltage_v for servo in there.values()]
    if len({servo.firmware for servo in there.values()}) > 1:
        listed = ", ".join(f"servo {servo.memory[Register.ID]} {servo.firmware}" for servo in there.values())
        found.append(Finding(f"firmware differs: {listed}", "lerobot refuses that: bring all to one version with Feetech's FD software."))
    if max(volts) - min(volts) > SPREAD_V:
        found.append(Finding(f"voltages differ along the chain: {min(volts):g} to {max(volts):g} V", "A plug has a bad contact.", "warn"))
    return found


def _of_calibration(
    there: Mapping[str, _Servo], positions: Mapping[str, int], calibration: Mapping[str, JointCalibration], how_to_calibrate: str
) -> Finding:
    expected = {joint: calibration[joint] for joint in there}
    if other := calibration_differences(expected, {joint: servo.calibration for joint, servo in there.items()}):
        return Finding(f"the calibration file is of another arm: {other}", f"Give this arm's --robot.id, or calibrate: {how_to_calibrate}")
    if outside := outside_range(positions, expected):
        return Finding(f"the arm stands outside its calibrated range: {outside}", "Move the joint back by hand.")
    return Finding("the servos hold the file's calibration, and the arm stands within it", state="ok")
