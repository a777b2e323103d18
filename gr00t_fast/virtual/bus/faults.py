"""Everything that goes wrong on a servo bus, as data: what, on whom, when, how often.

A fault is written `kind:key=value,key=value`, on the command line, over the control socket and in tests alike:

    silent:servo=3                      receives and obeys, never answers
    absent:servo=3                      neither obeys nor answers
    wrong_model:servo=3,model=1284      the model register shows another number
    checksum:servo=2,count=1            the answer has a bad checksum
    drop:at=20,count=1                  one byte of the answer is lost (counted over the whole answer)
    loss:rate=0.002                     every byte of an answer is lost with this probability
    flip:rate=0.01                      every byte of an answer gets one flipped bit with this probability
    delay:ms=30                         slow answers; `count=1` with ms > 50 is the one late reply
    delay:ms=60,servo=1,on=write,count=1   the late acknowledgement of a write
    no_data:servo=4,count=1             a status packet without the data that was asked for
    error:servo=3,bits=32               error bits in every status packet (32 = overload)
    unplug:for_s=1                      the port disappears instead of answering, and comes back after a second
    blocked:servo=3,side=1              the shaft cannot turn on to larger positions than where it stands (-1: to smaller ones, 0: neither way)

Every fault also takes `on=` (read, write, ping, sync_read, ..), `register=` (address touched), `after=` (skip that many requests first),
`at_s=` (begin so long after the injection), `for_s=` (end so long after the beginning), `count=` (so many requests).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, check_ranges, closest
from gr00t_fast.robots.feetech import ErrorBit, Instruction, Register, Request, Status

Kind = Literal["silent", "absent", "wrong_model", "checksum", "drop", "loss", "flip", "delay", "no_data", "error", "unplug", "blocked"]
KINDS: tuple[str, ...] = get_args(Kind)
OTHER_MODEL = 1284  # an SCS0009, the wrong servo people really have


@dataclass(frozen=True)
class Fault:
    """One fault; see the module's text for the kinds. None means: any, or for ever."""

    kind: Kind
    servo: int | None = None
    on: str | None = None
    register: int | None = None
    count: int | None = None
    after: int = 0
    at_s: float = 0.0
    for_s: float | None = None
    ms: float = 0.0
    rate: float = 0.0
    at: int = 0
    bits: int = int(ErrorBit.OVERLOAD)
    model: int = OTHER_MODEL
    side: int = 0

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """`kind:key=value,..` -> Fault. Raises ConfigError with the closest known word."""
        kind, _, rest = spec.partition(":")
        if kind not in KINDS:
            raise ConfigError(f"unknown fault '{kind}' in '{spec}'; expected one of {', '.join(KINDS)}.{closest(kind, KINDS)}")
        values = dict(_option(spec, item) for item in rest.split(",") if item.strip())
        fault = cls(kind, **values)  # type: ignore[arg-type]
        check_ranges(
            fault, f"fault={kind}:", servo=(1, len(SO100_JOINTS)), rate=(0.0, 1.0), ms=(0.0, math.inf), for_s=(0.0, math.inf), at_s=(0.0, math.inf)
        )
        return fault

    def matches(self, request: Request) -> bool:
        """Whether the request is one this fault is about (whatever its timing)."""
        return (
            (self.on is None or request.instruction == Instruction[self.on.upper()])
            and (self.register is None or self.register in touched_registers(request))
            and (self.servo is None or self.servo in addressed(request))
        )

    def hits(self, servo_id: int) -> bool:
        """Whether this servo's answer is affected."""
        return self.servo is None or self.servo == servo_id


@dataclass
class Reply:
    """One servo's answer on its way to the master."""

    servo_id: int
    data: bytes
    delay_s: float = 0.0


class FaultTable:
    """The faults in force, with how often each has struck."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._active: list[_Active] = []

    def add(self, fault: Fault, now_s: float) -> None:
        """Put a fault in force from now on."""
        self._active.append(_Active(fault, now_s + fault.at_s))

    def clear(self) -> None:
        """Heal everything."""
        self._active = []

    def strike(self, request: Request, now_s: float) -> list[Fault]:
        """The faults that apply to this request; their counts go down."""
        return [active.fault for active in self._active if active.fault.kind != "blocked" and active.strike(request, now_s)]

    def blocked(self, now_s: float, servo_ids: Iterable[int]) -> dict[int, int]:
        """Id -> side of the servos whose shafts are blocked now."""
        faults = [active.fault for active in self._active if active.fault.kind == "blocked" and active.due(now_s)]
        return {servo_id: fault.side for servo_id in servo_ids for fault in faults if fault.hits(servo_id)}

    def due_unplug(self, now_s: float) -> Fault | None:
        """A fault `unplug` with `at_s` whose moment has come."""
        for active in self._active:
            if active.fault.kind == "unplug" and active.fault.at_s > 0 and active.struck == 0 and now_s >= active.begin_s:
                active.struck += 1
                return active.fault
        return None

    def spoil(self, faults: list[Fault], request: Request, replies: list[Reply]) -> list[Reply]:
        """Apply faults to the answers of one request."""
        for fault in faults:
            hit = [reply for reply in replies if reply.data and fault.hits(reply.servo_id)]
            if fault.kind == "drop":
                _drop_byte(hit, fault.at)
            elif fault.kind == "delay" and hit:
                hit[0].delay_s += fault.ms / 1000  # the answers behind it wait for it anyway
            elif fault.kind in _SPOILED:
                for reply in hit:
                    reply.data = _SPOILED[fault.kind](reply.data, fault, request, self._random)
        return [reply for reply in replies if reply.data]


@dataclass
class _Active:
    fault: Fault
    begin_s: float
    seen: int = 0
    struck: int = 0

    def due(self, now_s: float) -> bool:
        fault = self.fault
        return now_s >= self.begin_s and (fault.kind == "unplug" or fault.for_s is None or now_s < self.begin_s + fault.for_s)

    def strike(self, request: Request, now_s: float) -> bool:
        fault = self.fault
        spent = self.struck >= (1 if fault.kind == "unplug" and fault.count is None else fault.count or float("inf"))
        if not self.due(now_s) or spent or not fault.matches(request):
            return False
        self.seen += 1
        if self.seen <= fault.after:
            return False
        self.struck += 1
        return True


def addressed(request: Request) -> list[int]:
    """The ids a SYNC_READ or SYNC_WRITE names, else the packet's own id (254: everybody)."""
    if request.instruction == Instruction.SYNC_READ:
        return list(request.params[2:])
    if request.instruction == Instruction.SYNC_WRITE and len(request.params) >= 2:
        return list(request.params[2 :: request.params[1] + 1])
    return [request.servo_id]


def touched_registers(request: Request) -> range:
    """The addresses a request reads or writes; empty for PING."""
    params = request.params
    if request.instruction == Instruction.WRITE and params:
        return range(params[0], params[0] + len(params) - 1)
    if request.instruction in (Instruction.READ, Instruction.SYNC_READ, Instruction.SYNC_WRITE) and len(params) >= 2:
        return range(params[0], params[0] + params[1])
    return range(0)


def _drop_byte(replies: list[Reply], position: int) -> None:
    for reply in replies:
        if position < len(reply.data):
            reply.data = reply.data[:position] + reply.data[position + 1 :]
            return
        position -= len(reply.data)


def _with_model(data: bytes, fault: Fault, request: Request, _: random.Random) -> bytes:
    registers, payload = touched_registers(request), bytearray(data[5:-1])
    for address, byte in zip((Register.MODEL, Register.MODEL + 1), (fault.model & 0xFFFF).to_bytes(2, "little"), strict=True):
        if address in registers and address - registers[0] < len(payload):
            payload[address - registers[0]] = byte
    return Status(data[2], data[4], bytes(payload)).encode()


def _lost(data: bytes, fault: Fault, _: Request, numbers: random.Random) -> bytes:
    return bytes(byte for byte in data if numbers.random() >= fault.rate)


def _flipped(data: bytes, fault: Fault, _: Request, numbers: random.Random) -> bytes:
    return bytes(byte ^ (1 << numbers.randrange(8) if numbers.random() < fault.rate else 0) for byte in data)


# What becomes of a status packet: FF FF id length error data.. checksum
_SPOILED: dict[str, Callable[[bytes, Fault, Request, random.Random], bytes]] = {
    "silent": lambda *_: b"",
    "absent": lambda *_: b"",
    "checksum": lambda data, *_: data[:-1] + bytes((data[-1] ^ 0x55,)),
    "no_data": lambda data, *_: Status(data[2], data[4]).encode(),
    "error": lambda data, fault, *_: Status(data[2], data[4] | fault.bits, data[5:-1]).encode(),
    "wrong_model": _with_model,
    "loss": _lost,
    "flip": _flipped,
}


def _option(spec: str, item: str) -> tuple[str, object]:
    name, _, text = item.strip().partition("=")
    known = {field.name: str(field.type) for field in fields(Fault) if field.name != "kind"}
    if name not in known:
        raise ConfigError(f"unknown option '{name}' in fault '{spec}'; expected one of {', '.join(known)}.{closest(name, known)}")
    if name == "on":
        names = [instruction.name.lower() for instruction in Instruction]
        if text.lower() not in names:
            raise ConfigError(f"'{item}' in fault '{spec}': expected one of {', '.join(names)}.{closest(text, names)}")
        return name, text.lower()
    try:
        return name, float(text) if "float" in known[name] else int(text, 0)
    except ValueError as error:
        raise ConfigError(f"'{item}' in fault '{spec}': expected a number, got '{text}'.") from error
