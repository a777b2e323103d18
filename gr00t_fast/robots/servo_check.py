"""What the six servos of an SO-100 say about themselves: read with pyserial alone, nothing is written, no torque changes hands.

lerobot's driver is not used: importing it takes five seconds, and it stops at the first servo that does not answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError, require
from gr00t_fast.robots.bus import BAUD_RATE, LINK_LOST, OUTSIDE_DEG, WAIT_S, error_names, exchange
from gr00t_fast.robots.lerobot_glue import TICKS, lock_port
from gr00t_fast.robots.virtual_bus.protocol import Instruction, Request, Status, decode_signed, from_word
from gr00t_fast.robots.virtual_bus.servo import MODEL_STS3215, JointCalibration, Register

TRIES = 2
_BLOCKS = ((0, 6), (9, 24), (40, 31))  # (address, bytes): who it is, what it was set to, how it is now
WARM_C = 55  # a joint that holds a load for minutes gets there; the servo itself lets go at its limit, 70 as delivered
LOW_V = 4.5  # a 5 V supply under load; below it servos reset in motion
SPREAD_V = 1.0  # between servos of one chain at rest: more is a bad plug


@dataclass(frozen=True)
class ServoFacts:
    """Registers of one servo. Positions, offset and limits are encoder ticks."""

    id: int
    model: int
    firmware: str
    voltage_v: float
    temperature_c: int
    max_temperature_c: int
    min_voltage_v: float
    max_voltage_v: float
    torque_on: bool
    position: int
    homing_offset: int
    range_min: int
    range_max: int
    errors: tuple[str, ...]  # what it complains about: voltage, overheat, overload, ...


@dataclass(frozen=True)
class Finding:
    """`state` is ok, warn or fail."""

    state: str
    what: str
    what_to_do: str = ""


def look(port: str, ids: Sequence[int] = tuple(range(1, len(SO100_JOINTS) + 1))) -> dict[int, ServoFacts | None]:
    """Id -> what it says, None for one that does not answer. Takes 0.01 s, and 0.12 s more for each silent servo. Raises RobotError when the port
    cannot be used, MissingExtraError without pyserial."""
    serial = require("serial", "robot")
    try:
        with serial.Serial(port, BAUD_RATE, timeout=WAIT_S) as line:
            lock_port(line.fileno(), port)
            return {servo_id: _facts(line, servo_id) for servo_id in ids}
    except LINK_LOST as error:
        raise RobotError(
            f"the port {port} cannot be used: {' '.join(str(error).split())}. Plug it in again, or choose another --robot.port."
        ) from error


def _facts(line: Any, servo_id: int) -> ServoFacts | None:
    memory, errors = bytearray(256), 0
    for address, length in _BLOCKS:
        answer = _read(line, servo_id, address, length)
        if answer is None:
            return None
        memory[address : address + length] = answer.params
        errors |= answer.error
    errors |= memory[Register.STATUS]
    return ServoFacts(
        id=servo_id,
        model=_word(memory, Register.MODEL),
        firmware=f"{memory[Register.FIRMWARE_MAJOR]}.{memory[Register.FIRMWARE_MINOR]}",
        voltage_v=memory[Register.PRESENT_VOLTAGE] / 10,
        temperature_c=memory[Register.PRESENT_TEMPERATURE],
        max_temperature_c=memory[Register.MAX_TEMPERATURE],
        min_voltage_v=memory[Register.MIN_VOLTAGE] / 10,
        max_voltage_v=memory[Register.MAX_VOLTAGE] / 10,
        torque_on=bool(memory[Register.TORQUE_ENABLE]),
        position=decode_signed(_word(memory, Register.PRESENT_POSITION), 15),
        homing_offset=decode_signed(_word(memory, Register.HOMING_OFFSET), 11),
        range_min=_word(memory, Register.MIN_POSITION),
        range_max=_word(memory, Register.MAX_POSITION),
        errors=tuple(error_names(errors)),
    )


def _word(memory: bytearray, address: int) -> int:
    return from_word(memory[address : address + 2])


def _read(line: Any, servo_id: int, address: int, length: int) -> Status | None:
    for _ in range(TRIES):
        line.reset_input_buffer()
        found, _ = exchange(line, Request(servo_id, Instruction.READ, bytes((address, length))), [servo_id], length)
        if servo_id in found:
            return found[servo_id]
    return None


def judge(found: Mapping[int, ServoFacts | None], calibration: Mapping[str, JointCalibration] | None, how_to_calibrate: str) -> list[Finding]:
    """What is wrong with an arm whose servos say this, and with its calibration file (None: there is none to compare with)."""
    there = [facts for facts in found.values() if facts is not None]
    if not there:
        return [
            Finding("fail", "no servo answers", "Switch the arm's power supply on; check the cable from the adapter to servo 1, and --robot.port.")
        ]
    findings = [finding for servo_id, facts in found.items() for finding in _of_servo(servo_id, facts)]
    if len({facts.firmware for facts in there}) > 1:
        listed = ", ".join(f"servo {facts.id} {facts.firmware}" for facts in there)
        findings.append(Finding("fail", f"firmware differs: {listed}", "lerobot refuses that: bring all to one version with Feetech's FD software."))
    low, high = min(facts.voltage_v for facts in there), max(facts.voltage_v for facts in there)
    if high - low > SPREAD_V:
        findings.append(Finding("warn", f"voltages differ along the chain: {low:g} to {high:g} V", "A plug or cable has a bad contact."))
    if calibration is not None:
        findings += _of_calibration({facts.id: facts for facts in there}, calibration, how_to_calibrate)
    return findings


def _of_servo(servo_id: int, facts: ServoFacts | None) -> list[Finding]:
    joint = SO100_JOINTS[servo_id - 1] if servo_id <= len(SO100_JOINTS) else "?"
    name = f"servo {servo_id} ({joint})"
    if facts is None:
        return [Finding("fail", f"{name} does not answer", "Check its two plugs; `lerobot-setup-motors` repairs an id.")]
    found = []
    if facts.model != MODEL_STS3215:
        found.append(Finding("fail", f"{name} is of model {facts.model}, not an STS3215 ({MODEL_STS3215})", "Replace the servo."))
    if facts.temperature_c >= facts.max_temperature_c or "overheat" in facts.errors:
        what = f"{name} is too hot: {facts.temperature_c} C, its limit is {facts.max_temperature_c}"
        found.append(Finding("fail", what, "Switch the arm off and let it cool down; look for a joint that binds or holds a load."))
    elif facts.temperature_c >= WARM_C:
        found.append(Finding("warn", f"{name} is warm: {facts.temperature_c} C, it lets go at {facts.max_temperature_c}", "Let it rest."))
    if not facts.min_voltage_v <= facts.voltage_v <= facts.max_voltage_v or "voltage" in facts.errors:
        what = f"{name} has {facts.voltage_v:g} V, outside its {facts.min_voltage_v:g} to {facts.max_voltage_v:g} V"
        found.append(Finding("fail", what, "Check the power supply (voltage, current, plug)."))
    elif facts.voltage_v < LOW_V:
        found.append(Finding("warn", f"{name} has only {facts.voltage_v:g} V", "Check the power supply: it will reset under load."))
    if others := [error for error in facts.errors if error not in ("overheat", "voltage")]:
        found.append(Finding("fail", f"{name} reports {', '.join(others)}", "Relieve the joint, then switch the arm's power off and on."))
    if facts.torque_on:
        found.append(Finding("warn", f"{name} is powered: an earlier program left it so", "Hold the arm, and switch its power off and on."))
    return found or [Finding("ok", f"{name}: {facts.voltage_v:g} V, {facts.temperature_c} C, firmware {facts.firmware}")]


def _of_calibration(there: Mapping[int, ServoFacts], calibration: Mapping[str, JointCalibration], how_to_calibrate: str) -> list[Finding]:
    other, outside = [], []
    for joint, expected in calibration.items():
        facts = there.get(expected.id)
        if facts is None:
            continue
        for name in ("homing_offset", "range_min", "range_max"):
            if getattr(facts, name) != getattr(expected, name):
                other.append(f"{joint}.{name}: file {getattr(expected, name)}, servo {getattr(facts, name)}")
        beyond_deg = max(expected.range_min - facts.position, facts.position - expected.range_max) * 360 / TICKS
        if beyond_deg > OUTSIDE_DEG:
            outside.append(f"{joint} by {beyond_deg:.0f} degrees")
    if other:
        listed = "; ".join(other[:3]) + ("; .." if len(other) > 3 else "")
        return [Finding("fail", f"the calibration file is of another arm: {listed}", f"Give this arm's --robot.id, or calibrate: {how_to_calibrate}")]
    if outside:
        return [Finding("fail", f"the arm stands outside its calibrated range: {', '.join(outside)}", "Move the joint back by hand.")]
    return [Finding("ok", "the servos hold the file's calibration, and the arm stands within it")]
