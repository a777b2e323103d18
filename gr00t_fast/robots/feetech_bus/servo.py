"""One STS3215: its register table, what a write does, and the trapezoid it moves along.

Register addresses and defaults: Feetech's STS3215 memory table. Positions are encoder ticks (4096 a turn); speed is ticks/s,
acceleration register units are 100 ticks/s^2, the speed limit register 50 ticks/s.
"""

from __future__ import annotations

import math
from enum import IntEnum

from gr00t_fast.robots.feetech_bus.calibration import OFFSET_LIMIT, JointCalibration
from gr00t_fast.robots.feetech_bus.protocol import decode_signed, encode_signed, from_word, to_word

MODEL_STS3215 = 777
FIRMWARE = (3, 10)
EEPROM_END = 40  # addresses below survive a power cycle (when Lock is 0 as they are written)
ADDRESS_SPACE = 256
CENTRE = 2048  # where "write 128 to Torque_Enable" puts the present position
MAKE_HERE_THE_MIDDLE = 128
MAX_SPEED = 3300.0  # ticks/s = 290 deg/s, no load at 12 V
DEFAULT_ACCELERATION = 254  # register units; what an acceleration of 0 ("no limit") amounts to
PROFILE_STEP_S = 0.001


class Register(IntEnum):
    """Addresses that something here or in a test refers to by name."""

    FIRMWARE_MAJOR = 0
    FIRMWARE_MINOR = 1
    MODEL = 3
    ID = 5
    BAUD_RATE = 6
    RETURN_DELAY = 7  # units of 2 us
    RESPONSE_LEVEL = 8  # 0: answer only PING and READ
    MIN_POSITION = 9
    MAX_POSITION = 11
    MAX_TEMPERATURE = 13
    MAX_VOLTAGE = 14
    MIN_VOLTAGE = 15
    MAX_TORQUE = 16
    P_GAIN = 21
    D_GAIN = 22
    I_GAIN = 23
    PROTECTION_CURRENT = 28
    HOMING_OFFSET = 31  # sign in bit 11
    MODE = 33
    OVERLOAD_TORQUE = 36
    TORQUE_ENABLE = 40
    ACCELERATION = 41
    GOAL_POSITION = 42  # sign in bit 15
    GOAL_SPEED = 46
    TORQUE_LIMIT = 48
    LOCK = 55
    PRESENT_POSITION = 56  # sign in bit 15
    PRESENT_SPEED = 58  # sign in bit 15
    PRESENT_LOAD = 60
    PRESENT_VOLTAGE = 62  # units of 0.1 V
    PRESENT_TEMPERATURE = 63
    STATUS = 65
    MOVING = 66
    PRESENT_CURRENT = 69
    SPEED_LIMIT = 84
    MAX_ACCELERATION = 85


READ_ONLY = frozenset([*range(5), *range(56, 71)])
_FACTORY_BYTES = {
    Register.FIRMWARE_MAJOR: FIRMWARE[0],
    Register.FIRMWARE_MINOR: FIRMWARE[1],
    Register.RETURN_DELAY: 250,  # 500 us, which the driver sets to 0
    Register.RESPONSE_LEVEL: 1,
    Register.MAX_TEMPERATURE: 70,
    Register.MAX_VOLTAGE: 140,
    Register.MIN_VOLTAGE: 40,
    Register.P_GAIN: 32,
    Register.D_GAIN: 32,
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
        self._goal_enables_torque = goal_enables_torque
        self._pending: tuple[int, bytes] | None = None
        for address, value in _FACTORY_BYTES.items():
            self.registers[address] = value
        for address, value in _FACTORY_WORDS.items():
            self.set_word(address, value)
        self.registers[Register.ID] = servo_id
        if calibration is not None:
            self._calibrate(calibration)
        self._eeprom = bytes(self.registers[:EEPROM_END])
        self.encoder = float(round(calibration.middle) + calibration.homing_offset) if calibration else float(CENTRE)
        self.set_point = self.encoder
        self._speed = 0.0
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
    def answers_writes(self) -> bool:
        """Whether the response level asks for an acknowledgement of everything."""
        return self.registers[Register.RESPONSE_LEVEL] != 0

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
        return from_word(self.registers[address : address + 2])

    def set_word(self, address: int, value: int) -> None:
        """Put a two-byte value into the table, whatever its access rights."""
        self.registers[address : address + 2] = to_word(value)

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

    def write_later(self, address: int, data: bytes) -> None:
        """REG_WRITE: keep the values until `action`."""
        self._pending = (address, data)

    def action(self) -> None:
        """ACTION: carry out the pending REG_WRITE, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.write(*pending)

    def power_cycle(self) -> None:
        """Lose everything that was not in EEPROM; torque is off afterwards."""
        self.registers[:EEPROM_END] = self._eeprom
        self.registers[Register.LOCK] = 1
        self._pending = None
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
        self._show_position()

    def _react(self, touched: set[int]) -> None:
        if touched & {Register.HOMING_OFFSET, Register.HOMING_OFFSET + 1}:
            self._show_position()
        if Register.TORQUE_ENABLE in touched:
            self._torque_written()
        if touched & {Register.GOAL_POSITION, Register.GOAL_POSITION + 1} and self._goal_enables_torque and not self.torque:
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

    def _calibrate(self, values: JointCalibration) -> None:
        self.set_word(Register.HOMING_OFFSET, encode_signed(values.homing_offset, 11))
        self.set_word(Register.MIN_POSITION, values.range_min)
        self.set_word(Register.MAX_POSITION, values.range_max)

    def _power_on(self) -> None:
        self.registers[Register.TORQUE_ENABLE] = 0
        self.set_point, self._speed = self.encoder, 0.0
        self.set_word(Register.GOAL_POSITION, encode_signed(self.position, 15))
        self._show_position()
