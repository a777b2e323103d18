"""One STS3215: its register table, what a write does, and the trapezoid it moves along.

Register addresses and defaults: Feetech's STS3215 memory table. Positions are encoder ticks (4096 a turn); speed is ticks/s,
acceleration register units are 100 ticks/s^2, the speed limit register 50 ticks/s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import RobotError
from gr00t_fast.robots.calibration import OFFSET_LIMIT, Calibration, JointCalibration, from_units, to_units
from gr00t_fast.robots.feetech import MODEL_STS3215, ErrorBit, Register, decode_signed, encode_signed

FIRMWARE = (3, 10)
EEPROM_END = 40  # addresses below survive a power cycle (when Lock is 0 as they are written)
ADDRESS_SPACE = 256
CENTRE = 2048  # where "write 128 to Torque_Enable" puts the present position
MAKE_HERE_THE_MIDDLE = 128
MAX_SPEED = 3300.0  # ticks/s = 290 deg/s, no load at 12 V
DEFAULT_ACCELERATION = 254  # register units; what an acceleration of 0 ("no limit") amounts to
PROFILE_STEP_S = 0.001
# Share of the full drive voltage for each unit of the P gain and each tick of error: 0.166 per radian, measured with an oscilloscope on 7.4 V servos
# by Rhoban's project bam. With lerobot's gain of 16 a tick is 0.4 %, 15 degrees are 70 %.
DUTY_PER_GAIN_AND_TICK = 0.166 * 2 * math.pi / 4096
STALL_CURRENT_MA = 2700.0  # of the 12 V servo, data sheet; 7.4 V: 2400 to 2500
CURRENT_UNIT_MA = 6.5
PROTECTION_TIME_UNIT_S = 0.01


READ_ONLY = frozenset([*range(5), *range(56, 71)])
_FACTORY_BYTES = {
    Register.FIRMWARE_MAJOR: FIRMWARE[0],
    Register.FIRMWARE_MINOR: FIRMWARE[1],
    Register.RETURN_DELAY: 250,  # 500 us, which the driver sets to 0
    Register.RESPONSE_LEVEL: 1,
    Register.MAX_TEMPERATURE: 70,
    Register.MAX_VOLTAGE: 140,
    Register.MIN_VOLTAGE: 40,
    Register.PHASE: 12,
    Register.P_GAIN: 32,
    Register.D_GAIN: 32,
    Register.PROTECTIVE_TORQUE: 20,
    Register.PROTECTION_TIME: 200,
    Register.OVERLOAD_TORQUE: 80,
    Register.LOCK: 1,
    Register.PRESENT_VOLTAGE: 121,
    Register.PRESENT_TEMPERATURE: 31,
    Register.SPEED_LIMIT: 66,
    Register.MAX_ACCELERATION: 254,
}
_FACTORY_WORDS = {
    Register.MODEL: MODEL_STS3215,
    Register.MAX_POSITION: 4095,
    Register.MAX_TORQUE: 1000,
    Register.PROTECTION_CURRENT: 500,
    Register.TORQUE_LIMIT: 1000,
}


class Servo:
    """A servo without its wire: bytes in and out of `registers`, and a motion set-point that follows the goal.

    `encoder` is the shaft's absolute angle in ticks; the register Present_Position shows `encoder - Homing_Offset`.
    """

    def __init__(self, servo_id: int, calibration: JointCalibration | None = None, *, goal_enables_torque: bool = True) -> None:
        """`goal_enables_torque`: a write to Goal_Position also switches torque on, as reported in huggingface/lerobot#3585."""
        self.registers = bytearray(ADDRESS_SPACE)
        self.goal_enables_torque = goal_enables_torque
        self._deliver()
        self.registers[Register.ID] = servo_id
        if calibration is not None:
            self.set_word(Register.HOMING_OFFSET, encode_signed(calibration.homing_offset, 11))
            self.set_word(Register.MIN_POSITION, calibration.range_min)
            self.set_word(Register.MAX_POSITION, calibration.range_max)
        self._eeprom = bytes(self.registers[:EEPROM_END])
        self.encoder = float(round(calibration.middle) + calibration.homing_offset) if calibration else float(CENTRE)
        self.set_point = self.encoder
        self._speed = 0.0
        self._overload_s = 0.0  # how long it has been pushing too hard
        self._power_on()

    @property
    def id(self) -> int:
        """The id it answers to."""
        return self.registers[Register.ID]

    @property
    def torque(self) -> bool:
        """Whether the motor holds."""
        return self.registers[Register.TORQUE_ENABLE] == 1

    @property
    def position(self) -> int:
        """Present position in ticks, as the register shows it."""
        return math.floor(self.encoder + 0.5) - self.homing_offset  # the encoder itself counts whole ticks

    @property
    def homing_offset(self) -> int:
        """Ticks subtracted from the encoder."""
        return decode_signed(self.word(Register.HOMING_OFFSET), 11)

    def word(self, address: int) -> int:
        """The unsigned two-byte register at `address`."""
        return int.from_bytes(self.registers[address : address + 2], "little")

    def set_word(self, address: int, value: int) -> None:
        """Put a two-byte value into the table, whatever its access rights."""
        self.registers[address : address + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def read(self, address: int, length: int) -> bytes:
        """What a READ returns; addresses behind the table read as zero."""
        return bytes(self.registers[address : address + length]).ljust(length, b"\0")

    def write(self, address: int, data: bytes) -> None:
        """Store what may be written and do what it means. Read-only addresses are skipped, as the servo does."""
        touched = set()
        for offset, value in enumerate(data):
            target = address + offset
            if target in READ_ONLY or target >= ADDRESS_SPACE:
                continue
            self.registers[target] = value
            touched.add(target)
        if not self.registers[Register.LOCK]:  # unlocked: EEPROM values are kept; locked: they last until power-off
            self._eeprom = bytes(self.registers[:EEPROM_END])
        self._react(touched)

    def power_cycle(self) -> None:
        """Lose everything that was not in EEPROM; torque is off afterwards."""
        self.registers[:] = bytes(ADDRESS_SPACE)
        self._deliver()
        self.registers[:EEPROM_END] = self._eeprom
        self.set_word(Register.TORQUE_LIMIT, self.word(Register.MAX_TORQUE))
        self._power_on()

    def goal_encoder(self) -> float:
        """The goal as an encoder angle, clamped to the position limits as the servo itself does."""
        goal = decode_signed(self.word(Register.GOAL_POSITION), 15)
        low, high = self.word(Register.MIN_POSITION), self.word(Register.MAX_POSITION)
        if low or high:  # both zero means multi-turn: no limits
            goal = min(max(goal, low), high)
        return float(goal + self.homing_offset)

    def plan(self, dt_s: float) -> float | None:
        """Advance the set-point along its trapezoid by `dt_s`. Returns it (encoder ticks), or None when torque is off."""
        if not self.torque:
            self._speed = 0.0
            return None
        goal, acceleration, limit = self.goal_encoder(), self._acceleration(), self._speed_limit()
        while dt_s > 1e-9 and not (self.set_point == goal and self._speed == 0.0):
            step_s = min(dt_s, PROFILE_STEP_S)
            self._trapezoid(goal, acceleration, limit, step_s)
            dt_s -= step_s
        return self.set_point

    def settle(self, encoder: float, dt_s: float) -> None:
        """Take over where the shaft really is (from the plant) and show it in the feedback registers."""
        speed = (encoder - self.encoder) / dt_s if dt_s > 0 else 0.0
        self.encoder = encoder
        if not self.torque:
            self.set_point = encoder
        self.set_word(Register.PRESENT_SPEED, encode_signed(round(speed), 15))
        self.registers[Register.MOVING] = int(abs(speed) > 1.0)
        self._push(speed, dt_s)
        self._show_position()

    def freed(self) -> None:
        """What blocked the shaft is gone: the set-point, which has run ahead, starts again from where the shaft is."""
        self.set_point, self._speed = self.encoder, 0.0

    def _push(self, speed: float, dt_s: float) -> None:
        """Show load and current, and protect against overload: a P controller on the set-point, plus the drive that the motor's own voltage asks
        for at this speed. The latter makes no torque, so that it neither counts as overload nor draws current. Friction is left out."""
        share = self.registers[Register.PROTECTIVE_TORQUE] / 100 if self.registers[Register.STATUS] & ErrorBit.OVERLOAD else 1.0
        limit = min(share, self.word(Register.MAX_TORQUE) / 1000, self.word(Register.TORQUE_LIMIT) / 1000)
        push = self.registers[Register.P_GAIN] * DUTY_PER_GAIN_AND_TICK * (self.set_point - self.encoder) if self.torque else 0.0
        push = max(-limit, min(limit, push))
        duty = max(-limit, min(limit, push + speed / MAX_SPEED)) if self.torque else 0.0
        self.set_word(Register.PRESENT_LOAD, encode_signed(round(1000 * duty), 10))
        self.set_word(Register.PRESENT_CURRENT, encode_signed(round(STALL_CURRENT_MA / CURRENT_UNIT_MA * push), 15))
        too_hard = 100 * abs(push) >= self.registers[Register.OVERLOAD_TORQUE]
        self._overload_s = self._overload_s + dt_s if too_hard else 0.0
        if self._overload_s >= self.registers[Register.PROTECTION_TIME] * PROTECTION_TIME_UNIT_S > 0:
            self.registers[Register.STATUS] |= ErrorBit.OVERLOAD

    def _react(self, touched: set[int]) -> None:
        if touched & {Register.HOMING_OFFSET, Register.HOMING_OFFSET + 1}:
            self._show_position()
        if Register.TORQUE_ENABLE in touched:
            self._torque_written()
        if touched & {Register.GOAL_POSITION, Register.GOAL_POSITION + 1} and self.goal_enables_torque and not self.torque:
            self.registers[Register.TORQUE_ENABLE] = 1
            self.set_point = self.encoder

    def _torque_written(self) -> None:
        value = self.registers[Register.TORQUE_ENABLE]
        if value == MAKE_HERE_THE_MIDDLE:
            offset = max(-OFFSET_LIMIT, min(OFFSET_LIMIT, round(self.encoder) - CENTRE))
            self.set_word(Register.HOMING_OFFSET, encode_signed(offset, 11))
            self._eeprom = bytes(self.registers[:EEPROM_END])  # the servo stores this one by itself
            self.registers[Register.TORQUE_ENABLE] = 0
            self._show_position()
        if not self.torque:  # ends an overload, as far as is known
            self.registers[Register.STATUS] &= ~ErrorBit.OVERLOAD
        self.set_point, self._speed = self.encoder, 0.0

    def _trapezoid(self, goal: float, acceleration: float, limit: float, dt_s: float) -> None:
        distance = goal - self.set_point
        change = acceleration * dt_s
        brakeable = math.sqrt(change**2 / 4 + 2 * acceleration * abs(distance)) - change / 2  # stops at the goal in steps of dt_s
        wanted = math.copysign(min(limit, brakeable), distance)
        self._speed += max(-change, min(change, wanted - self._speed))
        step = self._speed * dt_s
        if abs(distance) <= max(abs(step), 0.5) and abs(self._speed) <= 2 * change:
            self.set_point, self._speed = goal, 0.0
        else:
            self.set_point += step

    def _acceleration(self) -> float:
        asked = self.registers[Register.ACCELERATION] or DEFAULT_ACCELERATION
        return 100.0 * max(1, min(asked, self.registers[Register.MAX_ACCELERATION] or DEFAULT_ACCELERATION))

    def _speed_limit(self) -> float:
        asked = self.word(Register.GOAL_SPEED) & 0x7FFF or MAX_SPEED
        return float(max(1, min(asked, 50 * self.registers[Register.SPEED_LIMIT] or MAX_SPEED, MAX_SPEED)))

    def _show_position(self) -> None:
        self.set_word(Register.PRESENT_POSITION, encode_signed(self.position, 15))

    def _deliver(self) -> None:
        """The registers as the factory delivers them."""
        for address, value in _FACTORY_BYTES.items():
            self.registers[address] = value
        for address, value in _FACTORY_WORDS.items():
            self.set_word(address, value)

    def _power_on(self) -> None:
        self.registers[Register.TORQUE_ENABLE] = 0
        self.registers[Register.STATUS] = 0
        self.set_point, self._speed = self.encoder, 0.0
        self.set_word(Register.GOAL_POSITION, encode_signed(self.position, 15))
        self._show_position()


# What the servos move: nothing but themselves (`FreePlant`), or any arm that implements `Plant`, such as the MuJoCo scene.


MAX_STEP_S = 0.1  # after a stall of the machine the arm continues from here instead of leaping


class Plant(Protocol):
    """The mechanics behind six servos. Positions and targets are lerobot degrees, the gripper 0..100."""

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Let `dt_s` pass while each motor pulls towards its target (None: torque off). Returns the six positions."""


class FreePlant:
    """Motors that reach every set-point at once and stay where they are without torque."""

    def __init__(self, positions_deg: Sequence[float]) -> None:
        self.positions_deg = list(positions_deg)

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Each position becomes its target."""
        pairs = zip(targets_deg, self.positions_deg, strict=True)
        self.positions_deg = [old if target is None else target for target, old in pairs]
        return list(self.positions_deg)


class Gearbox:
    """Joins servos and plant: encoder ticks on one side, lerobot's units on the other.

    The calibration of the start fixes how shafts sit on the arm. A later re-calibration changes registers, never the mechanics.
    """

    def __init__(self, servos: Sequence[Servo], calibration: Calibration, plant: Plant | None) -> None:
        self._servos = servos
        self._joints = [(joint, calibration[joint]) for joint in SO100_JOINTS]
        self._walls: dict[int, tuple[float, int]] = {}  # index -> (encoder, side)
        self.plant: Plant = plant or FreePlant([self._to_deg(i, servo.encoder) for i, servo in enumerate(servos)])
        self.advance(0.0)  # a plant has its own rest pose

    def advance(self, dt_s: float) -> None:
        """Move set-points, plant and feedback registers on by `dt_s`."""
        dt_s = min(dt_s, MAX_STEP_S)
        planned = [servo.plan(dt_s) for servo in self._servos]
        targets = [None if tick is None else self._to_deg(i, self._stopped(i, tick)) for i, tick in enumerate(planned)]
        positions = self.plant.step(targets, dt_s)
        if len(positions) != len(self._servos):
            raise RobotError(f"the plant must return {len(self._servos)} positions, got {len(positions)}. Check its step().")
        for i, servo in enumerate(self._servos):
            servo.settle(self._to_encoder(i, positions[i]), dt_s)

    def block(self, sides: Mapping[int, int]) -> None:
        """Shafts that cannot turn on, by servo id: with side 1 to larger positions than where they stood when it began, with -1 to smaller ones,
        with 0 neither way."""
        for index, servo in enumerate(self._servos):
            if servo.id in sides:
                self._walls.setdefault(index, (servo.encoder, sides[servo.id]))
            elif self._walls.pop(index, None):
                servo.freed()

    def _stopped(self, index: int, encoder: float) -> float:
        wall, side = self._walls.get(index, (encoder, 0))
        return wall if side == 0 else min(encoder, wall) if side > 0 else max(encoder, wall)

    def push(self, index: int, degrees: float) -> None:
        """Turn a joint by hand, as far as its torque and the plant allow it (only a `FreePlant` can be moved so)."""
        if not isinstance(self.plant, FreePlant):
            raise RobotError("only the free-standing servos can be turned by hand; a simulated arm moves by its own physics.")
        self.plant.positions_deg[index] += degrees
        self.advance(0.0)

    def _to_deg(self, index: int, encoder: float) -> float:
        joint, values = self._joints[index]
        return to_units(joint, values, encoder - values.homing_offset)

    def _to_encoder(self, index: int, degrees: float) -> float:
        joint, values = self._joints[index]
        return from_units(joint, values, degrees) + values.homing_offset
