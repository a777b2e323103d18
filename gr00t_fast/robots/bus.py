"""The bus of the real arm: lerobot's Feetech bus with transfers of its own, and switching the torque off over a damaged line.

What the SDK under the driver does by itself, and what `GuardedBus` does in its place:
* it never discards old input, so that one answer later than its 50 ms window shifts every later reading by one: input is flushed before each request;
* a missed or damaged answer is an error at once: the request is repeated;
* an answer with a damaged header is waited for until its 50 ms are over: it is known to be damaged once all its bytes are here, and at 1 % of flipped
  bits, where every third answer of six servos is damaged, that decides whether a reading comes in time;
* a status packet without data reads as zero: a wrong length counts as damaged;
* the error byte of a sync read is dropped: it is kept, so that overload is seen without an extra request;
* it asks the port again and again: here the kernel wakes the program when something has come.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import BusFault
from gr00t_fast.robots.feetech import ErrorBit, Instruction, PacketParser, Register, Request, Status, sync_read, sync_write
from gr00t_fast.robots.lerobot_glue import GRIPPER, lock_port, outside_range

try:
    import termios

    LINK_LOST: tuple[type[Exception], ...] = (termios.error, OSError)
except ImportError:  # Windows has no termios; pyserial reports everything as OSError there
    LINK_LOST = (OSError,)

# What the driver raises for one failed exchange, as opposed to a lost port (ConnectionError is an OSError: catch it before LINK_LOST).
EXCHANGE_FAILED: tuple[type[Exception], ...] = (ConnectionError, RuntimeError)

BAUD_RATE = 1_000_000
ANSWER_S = 0.05  # how long an answer is waited for, as in lerobot's driver
WAIT_S = 0.005  # of it, in the kernel at a time
WRITE_S = 0.5  # a port that takes no byte for so long is lost
STATUS_BYTES = 6  # of a status packet without data
# After a missed answer, wait so long for it to arrive late, and drop it: the protocol has no sequence numbers, so that a late answer of a servo
# passes for its answer to the next request of the same length. While connecting nothing moves, and every single value matters.
LATE_ANSWER_S, LATE_ANSWER_CONNECTING_S = 0.1, 0.3
LATE_ANSWER_UNPOWERED_S = 0.02  # as long as no servo has ever answered: their power is off
QUIET_S = 0.002  # after a damaged answer, the rest of it has passed once the line is silent for so long
ACCELERATION = 254  # lerobot's configure_motors() writes it; of all that is configured, only this does not outlast the servo's power
# Feetech's memory table of the STS series: load is the duty cycle of the motor's drive in 0.1 %, bit 10 its direction; current counts 6.5 mA, bit 15
# its sign. Which direction the bit means is not written there, so that it is dropped: the goal tells which way the motor pushes.
LOAD_PERCENT, LOAD_BITS, CURRENT_MA, CURRENT_BITS = 0.1, 0x3FF, 6.5, 0x7FFF
FULL_LOAD_PERCENT, MOST_CURRENT_MA = 100.0, 10_000.0  # more than a servo can draw: its registers hold something else, and nothing is known


def error_names(bits: int) -> list[str]:
    """The names of the set error bits."""
    return [bit.name.lower() for bit in ErrorBit if bits & bit] or ([f"0x{bits:02x}"] if bits else [])


class Result(IntEnum):
    """How an exchange went; the numbers are those of the SDK (COMM_SUCCESS, COMM_RX_TIMEOUT, COMM_RX_CORRUPT)."""

    ANSWERED = 0
    MISSED = -6
    DAMAGED = -7


def exchange(line: Any, request: Request, ids: Sequence[int], length: int = 0) -> tuple[dict[int, Status], Result]:
    """Send a request and wait for the answers of `ids`, each with `length` bytes of data. Returns those that came by id, and whether all did.

    line: an open `serial.Serial` whose time-out is WAIT_S. Raises one of LINK_LOST.
    """
    line.write(request.encode())
    found: dict[int, Status] = {}
    parser, received, late = PacketParser(Status), 0, False
    awaited = len(ids) * (STATUS_BYTES + length)
    give_up_s = time.monotonic() + ANSWER_S + 10 * awaited / BAUD_RATE
    while len(found) < len(ids):
        if late:
            return found, Result.MISSED
        late = time.monotonic() >= give_up_s  # what came while this program was held up is read all the same
        data = line.read(max(1, line.in_waiting))
        received += len(data)
        for status in parser.feed(data):
            if status.servo_id in ids:  # others are the tail of an earlier exchange
                if len(status.params) != length:
                    return found, Result.DAMAGED
                found[status.servo_id] = status
        if len(found) < len(ids) and (parser.rejected or received >= awaited):
            return found, Result.DAMAGED
    return found, Result.ANSWERED


def drop_input(line: Any, first_s: float, quiet_s: float, limit_s: float) -> int:
    """Drop what comes until the line was silent for `first_s`, or for `quiet_s` after something came; `limit_s` at most. How often it came."""
    begin_s = now_s = time.monotonic()
    came, end_s = 0, begin_s + first_s
    while now_s < min(end_s, begin_s + limit_s):
        if line.in_waiting:
            line.reset_input_buffer()
            came, end_s = came + 1, time.monotonic() + quiet_s
        time.sleep(0.0005)
        now_s = time.monotonic()
    return came


@dataclass(frozen=True)
class ServoState:
    """What a servo says of itself in one reading. Load in per cent of the drive and current in mA: NaN where not told."""

    torque: int
    acceleration: int
    error_bits: int
    load_percent: float = math.nan
    current_ma: float = math.nan

    @classmethod
    def of(cls, data: bytes, error_bits: int) -> ServoState:
        """data: registers indexed by address, at least as far as the status."""
        state = (data[Register.TORQUE_ENABLE], data[Register.ACCELERATION], error_bits | data[Register.STATUS])
        if len(data) <= Register.PRESENT_CURRENT:
            return cls(*state)
        percent = (_word(data, Register.PRESENT_LOAD) & LOAD_BITS) * LOAD_PERCENT
        current_ma = (_word(data, Register.PRESENT_CURRENT) & CURRENT_BITS) * CURRENT_MA
        return cls(*state, percent if percent <= FULL_LOAD_PERCENT else math.nan, current_ma if current_ma <= MOST_CURRENT_MA else math.nan)


class Guard:
    """Transfers that survive a bad line, mixed into lerobot's `FeetechMotorsBus` by `guarded`: its five methods that touch the line, written anew.

    events: counts `read_retry`, `late_answer`, `stale_bytes`. error_bits: id -> error byte of that servo's newest status packet.
    late_answer_s: how long a missed answer may still come.
    """

    def __init__(self, driver: Any, events: Counter[str], on_exchange: Callable[[], object], tries: int, how_to_calibrate: str) -> None:
        """driver: lerobot's bus object, whose place this one takes. on_exchange: called before each request, a heartbeat. tries: of each request."""
        super().__init__(driver.port, driver.motors, driver.calibration)  # FeetechMotorsBus
        self._events, self.beat, self._tries, self._how_to_calibrate = events, on_exchange, tries, how_to_calibrate
        self._heard = False
        self.late_answer_s = LATE_ANSWER_CONNECTING_S
        self.error_bits: dict[int, int] = {}

    # The port

    @property
    def line(self) -> Any:
        """The open `serial.Serial`."""
        return self.port_handler.ser

    def open(self) -> None:
        """Open the port and mark it as ours; nobody is asked. Raises one of LINK_LOST, RobotError when another program has taken it."""
        self.close()
        self.port_handler.openPort()
        try:
            lock_port(self.line.fileno(), self.port)
            self.line.timeout, self.line.write_timeout = WAIT_S, WRITE_S
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the port whatever state it is in; `open` works again afterwards."""
        try:
            if self.line is not None:
                self.line.close()
        except LINK_LOST:  # closing a device that vanished: there is nothing left to close
            self._events["close_failed"] += 1
        self.port_handler.is_open = False

    def check_open(self) -> None:
        """Raises OSError, as for a port that is lost, when it is closed; lerobot's own check takes that for a failed exchange."""
        if not self.port_handler.is_open:
            raise OSError("it is closed")

    # Transfers

    def transfer(
        self, request: Request, ids: Sequence[int], length: int = 0, tries: int | None = None, late_answer_s: float | None = None
    ) -> tuple[dict[int, Status], Result]:
        """As `exchange`, repeated until all have answered. Raises one of LINK_LOST."""
        tries = self._tries if tries is None else tries
        for attempt in range(tries):
            self.beat()
            if self.line.in_waiting:
                self._events["stale_bytes"] += 1
                self.line.reset_input_buffer()
            found, result = exchange(self.line, request, ids, length)
            self._heard |= bool(found)
            self.error_bits.update({servo_id: status.error for servo_id, status in found.items()})
            if result is Result.ANSWERED:
                break
            self._events["read_retry"] += attempt + 1 < tries
            self._let_pass(result, self.late_answer_s if late_answer_s is None else late_answer_s)
        return found, result

    def ask(self, request: Request, length: int = 0, **how: Any) -> Status | None:
        """The answer of one servo, whatever its error bits; None when there is none. `how`: see `transfer`."""
        found, _ = self.transfer(request, [request.servo_id], length, **how)
        return found.get(request.servo_id)

    def poll(self, servo_id: int, loads: bool = True) -> ServoState | None:
        """Ask one servo, once, for its registers from torque to current, or without `loads` to status. None: it did not answer."""
        first, end = Register.TORQUE_ENABLE, Register.PRESENT_CURRENT + 2 if loads else Register.STATUS + 1
        request = Request(servo_id, Instruction.READ, bytes((first, end - first)))
        status = self.ask(request, end - first, tries=1, late_answer_s=LATE_ANSWER_UNPOWERED_S)  # nothing else is read in one piece of this length
        return None if status is None else ServoState.of(bytes(first) + status.params, status.error)

    def ping(self, motor: Any, num_retry: int = 0, raise_on_error: bool = False) -> int | None:
        """The model number of a servo; None when it does not answer, or answers with error bits. lerobot's `ping`, by one reading."""
        model, result, error = self._read(Register.MODEL, 2, self._get_motor_id(motor), raise_on_error=raise_on_error)
        return None if result or error else model

    def _read(
        self, address: int, length: int, motor_id: int, *, num_retry: int = 0, raise_on_error: bool = True, err_msg: str = ""
    ) -> tuple[int, int, int]:
        found, result = self.transfer(Request(motor_id, Instruction.READ, bytes((address, length))), [motor_id], length)
        return self._judged(found.get(motor_id), result, raise_on_error, err_msg)

    def _write(
        self, addr: int, length: int, motor_id: int, value: int, *, num_retry: int = 0, raise_on_error: bool = True, err_msg: str = ""
    ) -> tuple[int, int]:
        data = bytes((addr, *self._serialize_data(value, length)))
        found, result = self.transfer(Request(motor_id, Instruction.WRITE, data), [motor_id])
        return self._judged(found.get(motor_id), result, raise_on_error, err_msg)[1:]

    def _sync_read(
        self, addr: int, length: int, motor_ids: list[int], *, num_retry: int = 0, raise_on_error: bool = True, err_msg: str = ""
    ) -> tuple[dict[int, int], int]:
        found, result = self.transfer(sync_read(addr, length, motor_ids), motor_ids, length)
        if result and raise_on_error:
            raise ConnectionError(f"{err_msg} {self.packet_handler.getTxRxResult(result)}")
        return {servo_id: int.from_bytes(found[servo_id].params, "little") for servo_id in motor_ids if servo_id in found}, result

    def _sync_write(
        self, addr: int, length: int, ids_values: dict[int, int], num_retry: int = 0, raise_on_error: bool = True, err_msg: str = ""
    ) -> int:
        serialize = self._serialize_data
        _, result = self.transfer(sync_write(addr, {servo_id: bytes(serialize(value, length)) for servo_id, value in ids_values.items()}), [])
        return result

    def _judged(self, status: Status | None, result: Result, raise_on_error: bool, err_msg: str) -> tuple[int, int, int]:
        """Value, result and error byte, as lerobot's methods return them. Raises what they raise."""
        error = status.error if status is not None else 0
        if raise_on_error and result:
            raise ConnectionError(f"{err_msg} {self.packet_handler.getTxRxResult(result)}")
        if raise_on_error and error:
            raise RuntimeError(f"{err_msg} {self.packet_handler.getRxPacketError(error)}")
        return int.from_bytes(status.params, "little") if status is not None else 0, result, error

    def _let_pass(self, result: Result, late_answer_s: float) -> None:
        """Drop the rest of a damaged answer, or a late one; then the line is ready for the next request."""
        limit_s = late_answer_s if self._heard else LATE_ANSWER_UNPOWERED_S
        if came := drop_input(self.line, limit_s if result is Result.MISSED else QUIET_S, QUIET_S, limit_s):
            self._heard = True
            self._events["late_answer"] += came * (result is Result.MISSED)

    def restore_settings(self, joint: str) -> None:
        """Write what a servo forgets with its power. Raises what the driver raises."""
        for name in ("Maximum_Acceleration", "Acceleration"):
            self.write(name, joint, ACCELERATION)

    def stop_pushing(self) -> None:
        """Goals become where the joints stand: one that is held up shall not push for ever. The gripper goes on holding what it holds."""
        positions = self.sync_read("Present_Position", normalize=False)
        self.sync_write("Goal_Position", {joint: positions[joint] for joint in SO100_JOINTS[:GRIPPER]}, normalize=False)

    # lerobot's configure() begins with disable_torque() and ends with enable_torque(): servos that hold go on holding in between.

    def disable_torque(self, motors: Any = None, num_retry: int = 0) -> None:
        """Only the lock of the permanent settings: on this servo it is no condition for writing them that the torque is off."""
        for motor in motors or self.motors:
            self.write("Lock", motor, 0)

    def enable_torque(self, motors: Any = None, num_retry: int = 0) -> None:
        """Switch on where the joints stand: first the present position becomes the goal, else the arm leaps to an old one. Raises RobotError for a
        joint outside its calibrated range, and what the driver raises."""
        positions = self.sync_read("Present_Position", motors, normalize=False)
        if outside := outside_range(positions, self.calibration):
            raise BusFault(
                f"the arm stands outside its calibrated range: {outside}. Switching it on would throw it to the border, so it stays without power. "
                f"Move the joint back into its range by hand and start again; if the range is wrong, calibrate again: {self._how_to_calibrate}"
            )
        for motor, position in positions.items():
            self.write("Goal_Position", motor, position, normalize=False)
        super().enable_torque(motors)


def guarded(driver: Any, events: Counter[str], on_exchange: Callable[[], object], tries: int, how_to_calibrate: str) -> Any:
    """lerobot's bus object anew, with the transfers of `Guard`; touches no hardware."""
    return type("GuardedBus", (Guard, type(driver)), {})(driver, events, on_exchange, tries, how_to_calibrate)


def _word(data: bytes, register: int) -> int:
    return int.from_bytes(data[register : register + 2], "little")


# Switching an arm's torque off, whatever state its bus is in. Nothing here raises: every step is tried, and what failed is reported.
#
# lerobot's own `disconnect()` stops at the first servo that does not answer and leaves the rest holding; hence this sequence.


BLIND_WRITES = 3  # a broadcast write is not acknowledged; three times, because a line bad enough to land for may lose one
TRIES_PER_MOTOR = 4
REOPEN_PAUSE_S = 0.01
SILENT_S = 0.03  # a line silent for so long has delivered its late answers, which would pass for acknowledgements of later requests
LONGEST_CHATTER_S = 0.4
Torque = Literal["off", "held", "unknown"]


def attempt(what: str, step: Callable[[], Any], problems: list[str]) -> bool:
    """Run one step. Returns whether it worked; if not, `problems` says why.

    A second Ctrl-C (or a SIGTERM handler that raises) must not leave motors holding, so it ends one step, never the landing.
    """
    try:
        step()
    except (KeyboardInterrupt, SystemExit) as interruption:
        problems.append(f"{what}: interrupted by {type(interruption).__name__}; the landing went on")
        return False
    except Exception as error:  # noqa: BLE001 - reported in `problems`; landing must reach the next step
        problems.append(f"{what}: {type(error).__name__}: {str(error).strip()}")
        return False
    return True


def release_torque(bus: Any, patience_s: float, problems: list[str]) -> dict[str, Torque]:
    """Torque off on every motor. Returns how each joint was left; `problems` gets a line for each that is unknown.

    A port that vanished, before or in the middle, is given `patience_s` to come back: motors keep their power, and hold, without it. One that another
    program has taken meanwhile is left to it.
    """
    give_up_s = time.monotonic() + patience_s
    while _line_is_open(bus, give_up_s):
        trouble: list[str] = []
        torque = _release_all(bus, trouble)
        if "unknown" not in torque.values() or _is_there(bus):
            problems.extend(trouble)
            return torque
        if time.monotonic() > give_up_s:  # a port that opens again and again, and fails each time
            break
    problems.append(
        f"{bus.port} is gone, cannot be read, or another program has taken it: torque could NOT be switched off. "
        "Hold the arm and switch its power supply off"
    )
    return dict.fromkeys(bus.motors, "unknown")


def broadcast_torque_off(bus: Any) -> list[str]:
    """Torque off on whoever listens, without asking who that is. Returns what failed, each once."""
    failed: list[str] = []
    if _line_is_open(bus, give_up_s=0.0):
        for _ in range(BLIND_WRITES):
            attempt("torque off to all servos", lambda: bus.sync_write("Torque_Enable", 0), failed)
    return list(dict.fromkeys(failed))


def _release_all(bus: Any, problems: list[str]) -> dict[str, Torque]:
    """All at once without asking, then each by name; what stayed unknown is asked once more on a line that has become quiet. Where no servo answers
    (their supply is off), each is asked once and no more."""
    problems.extend(broadcast_torque_off(bus))
    powered, trouble, heard = list(bus.motors), list[str](), list[int]()
    ids = [motor.id for motor in bus.motors.values()]
    attempt("asking all servos", lambda: heard.extend(bus.transfer(sync_read(Register.TORQUE_ENABLE, 1, ids), ids, 1)[0]), [])
    tries, rounds = (TRIES_PER_MOTOR, 2) if heard else (1, 1)
    for _ in range(rounds):
        # a lost line shows in the next step
        attempt("waiting for late answers", lambda: drop_input(bus.line, SILENT_S, SILENT_S, LONGEST_CHATTER_S), [])
        trouble = []
        powered = [joint for joint in powered if not _is_released(bus, joint, tries, trouble)]
        if not powered or not _is_there(bus):
            break
    problems.extend(trouble)
    return {joint: "unknown" if joint in powered else "off" for joint in bus.motors}


def _is_released(bus: Any, joint: str, tries: int, problems: list[str]) -> bool:
    servo_id, wrong = bus.motors[joint].id, ["it does not answer"]
    what = f"torque off, {joint} (id {servo_id})"
    if attempt(what, lambda: wrong.append(_let_go(bus, servo_id, tries)), problems) and wrong[-1]:
        problems.append(f"{what}: {wrong[-1]}")
    return not wrong[-1]


def _let_go(bus: Any, servo_id: int, tries: int) -> str:
    """Torque off on one servo. Returns what is wrong, empty for nothing. Error bits are not looked at: a servo in overload acknowledges with one,
    and lets go all the same."""
    off = Request(servo_id, Instruction.WRITE, bytes((Register.TORQUE_ENABLE, 0)))
    acknowledged = bus.ask(off, tries=tries) is not None
    answer = bus.ask(Request(servo_id, Instruction.READ, bytes((Register.TORQUE_ENABLE, 1))), 1, tries=tries if acknowledged else 1)
    if answer is None:
        return "" if acknowledged else "it does not answer"
    return f"the servo still reports torque register {answer.params[0]}" if answer.params[0] else ""


def _is_there(bus: Any) -> bool:
    """Whether the port is still there."""
    return bool(bus.is_connected) and attempt("asking the port", lambda: bus.line.in_waiting, [])


def _line_is_open(bus: Any, give_up_s: float) -> bool:
    while True:
        bus.beat()
        if _is_there(bus) or (attempt("reopening the port", bus.open, []) and _is_there(bus)):
            return True
        if time.monotonic() > give_up_s:
            return False
        time.sleep(REOPEN_PAUSE_S)
