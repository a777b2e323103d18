"""Feetech protocol v0 as bytes: framing, checksums and the parser a servo uses; and the registers of its STS3215. No I/O, no clock.

Request: `FF FF id length instruction params.. checksum`; status: `FF FF id length error params.. checksum`, where length counts what
follows it and the checksum is the inverted sum of everything between header and checksum. Source: Feetech's STS communication manual; the
constants are those of Feetech's own `scservo_sdk`, so that any program built on it can be the master. A word has its low byte first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

HEADER = b"\xff\xff"
BROADCAST_ID = 0xFE
MAX_LENGTH = 250  # scservo_sdk's TXPACKET_MAX_LEN: a longer length field can only be a damaged byte


class Instruction(IntEnum):
    """What a master may ask for."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


class ErrorBit(IntEnum):
    """Bits of the error byte in a status packet (and of register 65)."""

    VOLTAGE = 0x01
    ANGLE = 0x02
    OVERHEAT = 0x04
    OVERCURRENT = 0x08
    OVERLOAD = 0x20


def checksum(body: Sequence[int]) -> int:
    """Inverted low byte of the sum of everything between header and checksum."""
    return ~sum(body) & 0xFF


def _frame(servo_id: int, kind: int, params: bytes) -> bytes:
    body = bytes((servo_id, len(params) + 2, kind)) + params
    return HEADER + body + bytes((checksum(body),))


@dataclass(frozen=True)
class Request:
    """One well-formed request. `instruction` is an int because a master may send what no servo knows."""

    servo_id: int
    instruction: int
    params: bytes = b""

    def encode(self) -> bytes:
        """The bytes a master sends."""
        return _frame(self.servo_id, self.instruction, self.params)


@dataclass(frozen=True)
class Status:
    """One well-formed status packet."""

    servo_id: int
    error: int
    params: bytes = b""

    def encode(self) -> bytes:
        """The bytes a servo answers with."""
        return _frame(self.servo_id, self.error, self.params)


Packet = TypeVar("Packet", Request, Status)


class PacketParser(Generic[Packet]):
    """Cuts a byte stream into packets of one kind and recovers from anything in between.

    After a bad checksum it searches again from the byte behind the false header, so that one damaged packet never costs the next one.
    """

    def __init__(self, kind: type[Packet]) -> None:
        """`kind`: Request at the servo's end of the line, Status at the master's."""
        self._kind: type[Any] = kind
        self._buffer = bytearray()
        self.rejected = 0  # packets whose length or checksum was wrong

    def feed(self, data: bytes) -> list[Packet]:
        """Add bytes; return every complete packet."""
        self._buffer += data
        packets = []
        while (packet := self._next()) is not None:
            packets.append(packet)
        return packets

    def abandon(self) -> None:
        """Forget a packet that stopped half way (a servo does so when the line stays silent)."""
        self._buffer.clear()

    @property
    def waiting(self) -> bool:
        """True while part of a packet has arrived."""
        return bool(self._buffer)

    def _next(self) -> Packet | None:
        buffer = self._buffer
        while True:
            self._skip_to_header()
            if len(buffer) < 4 or (2 <= buffer[3] <= MAX_LENGTH and len(buffer) < buffer[3] + 4):
                return None
            end = buffer[3] + 4
            if 2 <= buffer[3] <= MAX_LENGTH and buffer[end - 1] == checksum(buffer[2 : end - 1]):
                packet = self._kind(buffer[2], buffer[4], bytes(buffer[5 : end - 1]))
                del buffer[:end]
                return packet
            self.rejected += 1
            del buffer[0]

    def _skip_to_header(self) -> None:
        buffer = self._buffer
        start = buffer.find(HEADER)
        if start < 0:  # keep a last FF: it may be the first half of a header
            start = len(buffer) - 1 if buffer.endswith(b"\xff") else len(buffer)
        del buffer[:start]
        while buffer.startswith(b"\xff\xff\xff"):  # no id is FF, so the header begins one byte later
            del buffer[0]


def encode_signed(value: int, sign_bit: int) -> int:
    """Sign-magnitude: the servo keeps the sign in `sign_bit` and the absolute value below it; too large a value saturates."""
    magnitude = min(abs(value), (1 << sign_bit) - 1)
    return magnitude | (1 << sign_bit if value < 0 else 0)


def decode_signed(raw: int, sign_bit: int) -> int:
    """Inverse of `encode_signed`; bits above the sign are ignored."""
    magnitude = raw & ((1 << sign_bit) - 1)
    return -magnitude if raw >> sign_bit & 1 else magnitude


def sync_read(address: int, length: int, servo_ids: Sequence[int]) -> Request:
    """One request that every listed servo answers, in the order listed."""
    return Request(BROADCAST_ID, Instruction.SYNC_READ, bytes((address, length, *servo_ids)))


def sync_write(address: int, data_by_id: dict[int, bytes]) -> Request:
    """One request that writes to several servos and that none answers. All values have the same length."""
    (length,) = {len(data) for data in data_by_id.values()}
    body = b"".join(bytes((servo_id,)) + data for servo_id, data in data_by_id.items())
    return Request(BROADCAST_ID, Instruction.SYNC_WRITE, bytes((address, length)) + body)


# The STS3215's register table. Source: Feetech's memory table of this servo.

MODEL_STS3215 = 777


class Register(IntEnum):
    """Addresses that something here or in a test refers to by name."""

    FIRMWARE_MAJOR = 0
    FIRMWARE_MINOR = 1
    MODEL = 3
    ID = 5
    RETURN_DELAY = 7  # units of 2 us
    RESPONSE_LEVEL = 8  # 0: answer only PING and READ
    MIN_POSITION = 9
    MAX_POSITION = 11
    MAX_TEMPERATURE = 13
    MAX_VOLTAGE = 14
    MIN_VOLTAGE = 15
    MAX_TORQUE = 16
    PHASE = 18  # bits: 4 speed in ticks/s, 8 a speed of 0 is the largest, 16 positions count turns
    P_GAIN = 21
    D_GAIN = 22
    I_GAIN = 23
    PROTECTION_CURRENT = 28
    HOMING_OFFSET = 31  # sign in bit 11
    PROTECTIVE_TORQUE = 34  # what an overloaded servo still pushes with, per cent
    PROTECTION_TIME = 35  # how long it pushes with OVERLOAD_TORQUE or more before it is overloaded, 10 ms
    OVERLOAD_TORQUE = 36  # per cent
    TORQUE_ENABLE = 40
    ACCELERATION = 41
    GOAL_POSITION = 42  # sign in bit 15
    GOAL_SPEED = 46
    TORQUE_LIMIT = 48
    LOCK = 55
    PRESENT_POSITION = 56  # sign in bit 15
    PRESENT_SPEED = 58  # sign in bit 15
    PRESENT_LOAD = 60  # duty cycle of the drive, 0.1 %, direction in bit 10
    PRESENT_VOLTAGE = 62  # units of 0.1 V
    PRESENT_TEMPERATURE = 63
    STATUS = 65
    MOVING = 66
    PRESENT_CURRENT = 69  # units of 6.5 mA, sign in bit 15
    SPEED_LIMIT = 84
    MAX_ACCELERATION = 85
