"""What each instruction makes the servos on the line do and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gr00t_fast.robots.feetech_bus.faults import Reply, addressed
from gr00t_fast.robots.feetech_bus.protocol import BROADCAST_ID, Instruction, Request, Status, encode_status
from gr00t_fast.robots.feetech_bus.servo import Register, Servo


def answer(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    """Let the servos obey one request. Returns their answers in the order they go over the line; an unknown instruction has none."""
    handler = _HANDLERS.get(request.instruction)
    return handler(request, servos) if handler else []


def _ping(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    return [_reply(servo) for servo in _listening(request, servos)]  # a broadcast ping is answered by all, in order of id


def _read(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    if len(request.params) != 2:
        return []
    return [_reply(servo, servo.read(*request.params)) for servo in _unicast(request, servos)]


def _write(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    return _obey(request, servos, lambda servo: servo.write(request.params[0], request.params[1:]), at_least=2)


def _reg_write(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    return _obey(request, servos, lambda servo: servo.write_later(request.params[0], request.params[1:]), at_least=2)


def _action(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    return _obey(request, servos, lambda servo: servo.action(), at_least=0)


def _sync_read(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    if request.servo_id != BROADCAST_ID or len(request.params) < 3:
        return []
    by_id = {servo.id: servo for servo in servos}
    address, length = request.params[:2]
    return [_reply(by_id[servo_id], by_id[servo_id].read(address, length)) for servo_id in addressed(request) if servo_id in by_id]


def _sync_write(request: Request, servos: Sequence[Servo]) -> list[Reply]:
    if request.servo_id != BROADCAST_ID or len(request.params) < 2:
        return []
    address, length = request.params[:2]
    by_id = {servo.id: servo for servo in servos}
    body = request.params[2:]
    for start in range(0, len(body) - length, length + 1):
        servo = by_id.get(body[start])
        if servo is not None:
            servo.write(address, body[start + 1 : start + 1 + length])
    return []


def _obey(request: Request, servos: Sequence[Servo], act: Callable[[Servo], None], at_least: int) -> list[Reply]:
    if len(request.params) < at_least:
        return []
    replies = []
    for servo in _listening(request, servos):
        reply = _reply(servo)  # before acting: a change of id is acknowledged under the old one
        act(servo)
        if request.servo_id != BROADCAST_ID and servo.answers_writes:
            replies.append(reply)
    return replies


def _listening(request: Request, servos: Sequence[Servo]) -> list[Servo]:
    listening = [servo for servo in servos if request.servo_id in (servo.id, BROADCAST_ID)]
    return sorted(listening, key=lambda servo: servo.id)


def _unicast(request: Request, servos: Sequence[Servo]) -> list[Servo]:
    return [servo for servo in servos if servo.id == request.servo_id]


def _reply(servo: Servo, params: bytes = b"") -> Reply:
    return Reply(servo.id, encode_status(Status(servo.id, servo.registers[Register.STATUS], params)))


_HANDLERS: dict[int, Callable[[Request, Sequence[Servo]], list[Reply]]] = {
    Instruction.PING: _ping,
    Instruction.READ: _read,
    Instruction.WRITE: _write,
    Instruction.REG_WRITE: _reg_write,
    Instruction.ACTION: _action,
    Instruction.SYNC_READ: _sync_read,
    Instruction.SYNC_WRITE: _sync_write,
}
