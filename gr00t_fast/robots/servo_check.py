"""What the six servos of an SO-100 say about themselves: read with pyserial alone, nothing is written, no torque changes hands.

lerobot's driver is not used: importing it takes five seconds, and it stops at the first servo that does not answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError, require
from gr00t_fast.robots.bus import BAUD_RATE, LINK_LOST, WAIT_S, error_names, exchange
from gr00t_fast.robots.lerobot_glue import calibration_differences, lock_port, outside_range
from gr00t_fast.robots.virtual_bus.protocol import Instruction, Request, Status, decode_signed, from_word
from gr00t_fast.robots.virtual_bus.servo import MODEL_STS3215, JointCalibration, Register

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
        return from_word(self.memory[register : register + 2])

    @property
    def calibration(self) -> JointCalibration:
        offset = decode_signed(self.word(Register.HOMING_OFFSET), 11)
        return JointCalibration(self.memory[Register.ID], 0, offset, self.word(Register.MIN_POSITION), self.word(Register.MAX_POSITION))


def examine(port: str, calibration: Mapping[str, JointCalibration] | None, how_to_calibrate: str) -> list[Finding]:
    """What is wrong with the arm, and with its calibration file (None: there is none to compare with). Takes 0.01 s, and 0.12 s more for each silent
    servo. Raises RobotError when the port cannot be used, MissingExtraError without pyserial."""
    serial = require("serial", "robot")
    try:
        with serial.Serial(port, BAUD_RATE, timeout=WAIT_S) as line:
            lock_port(line.fileno(), port)
            found = {joint: _ask(line, servo_id) for servo_id, joint in enumerate(SO100_JOINTS, 1)}
    except LINK_LOST as error:
        raise RobotError(
            f"the port {port} cannot be used: {' '.join(str(error).split())}. Plug it in again, or choose another --robot.port."
        ) from error
    there = {joint: servo for joint, servo in found.items() if servo is not None}
    if not there:
        return [Finding("no servo answers", "Switch the arm's power supply on; check the cable from the adapter to servo 1, and --robot.port.")]
    findings = [finding for servo_id, joint in enumerate(SO100_JOINTS, 1) for finding in _of_servo(f"servo {servo_id} ({joint})", found[joint])]
    findings += _of_chain(there)
    if calibration is not None:
        findings.append(_of_calibration(there, calibration, how_to_calibrate))
    return findings


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


def _of_calibration(there: Mapping[str, _Servo], calibration: Mapping[str, JointCalibration], how_to_calibrate: str) -> Finding:
    expected = {joint: calibration[joint] for joint in there}
    if other := calibration_differences(expected, {joint: servo.calibration for joint, servo in there.items()}):
        return Finding(f"the calibration file is of another arm: {other}", f"Give this arm's --robot.id, or calibrate: {how_to_calibrate}")
    positions = {joint: decode_signed(servo.word(Register.PRESENT_POSITION), 15) for joint, servo in there.items()}
    if outside := outside_range(positions, expected):
        return Finding(f"the arm stands outside its calibrated range: {outside}", "Move the joint back by hand.")
    return Finding("the servos hold the file's calibration, and the arm stands within it", state="ok")
