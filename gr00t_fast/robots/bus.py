"""Requests to the servos with retries and flushing, and switching the torque off over a damaged line.

Makes one lerobot `FeetechMotorsBus` object survive a bad line, by replacing four methods on that object; no class is touched.

What the SDK under the driver does by itself, and what is done about it here:
* it never discards old input, so one answer later than its 50 ms window shifts every later reading by one: flush input before each request;
* a missed or damaged answer is an error at once: repeat the request;
* an answer with a damaged header is waited for until its 50 ms are over, as if nothing had come: it is known to be damaged once all its bytes are
  here, and at 1 % of flipped bits, where every third answer of six servos is damaged, that decides whether a reading comes in time;
* a status packet without data reads as zero: a wrong length counts as damaged;
* the error byte of a sync read is dropped: keep it here, so that overload is seen without an extra request.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

try:
    import termios

    LINK_LOST: tuple[type[Exception], ...] = (termios.error, OSError)
except ImportError:  # Windows has no termios; pyserial reports everything as OSError there
    LINK_LOST = (OSError,)

# What the driver raises for one failed exchange, as opposed to a lost port (ConnectionError is an OSError: catch it before LINK_LOST).
EXCHANGE_FAILED = (ConnectionError, RuntimeError, IndexError)

TRIES = 3  # per request; with the SDK's 50 ms window a silent servo costs 0.2 s
# After a missed answer, wait so long for it to arrive late, and drop it: the protocol has no sequence numbers, so that a late answer of a servo
# passes for its answer to the next request of the same length. While connecting nothing moves, and every single value matters.
LATE_ANSWER_S, LATE_ANSWER_CONNECTING_S = 0.1, 0.3
LATE_ANSWER_UNPOWERED_S = 0.02  # as long as no servo has ever answered: their power is off
QUIET_S = 0.002  # after a damaged answer, the rest of it has passed once the line is silent for so long
# One contiguous read tells all of these, each as one or two bytes, low byte first.
TORQUE_REGISTER, ACCELERATION_REGISTER, GOAL_REGISTER, LOAD_REGISTER, STATUS_REGISTER, CURRENT_REGISTER = 40, 41, 42, 60, 65, 69
GOALS_KNOWN = 8  # the newest ones sent: a write to all is not acknowledged, and a bad line may lose some
# Feetech's memory table of the STS series: load is the duty cycle of the motor's drive in 0.1 %, bit 10 its direction; current counts 6.5 mA, bit 15
# its sign. Which direction the bit means is not written there, so that it is dropped: the goal tells which way the motor pushes.
LOAD_PERCENT, LOAD_BITS, CURRENT_MA, CURRENT_BITS = 0.1, 0x3FF, 6.5, 0x7FFF
FULL_LOAD_PERCENT, MOST_CURRENT_MA = 100.0, 10_000.0  # more than a servo can draw: its registers hold something else, and nothing is known
_ID, _LENGTH, _INSTRUCTION, _ERROR, _ADDRESS, _DATA = 2, 3, 4, 4, 5, 5  # byte positions in a packet
_READ, _WRITE, _SYNC_WRITE = 0x02, 0x03, 0x83
ERROR_BITS = {0x01: "voltage", 0x02: "angle", 0x04: "overheat", 0x08: "overcurrent", 0x20: "overload"}


def error_names(bits: int) -> list[str]:
    """The names of the set error bits."""
    return [name for bit, name in ERROR_BITS.items() if bits & bit] or ([f"0x{bits:02x}"] if bits else [])


class ServoLink:
    """The guarded line to the servos of one bus object.

    events: counts `read_retry`, `late_answer`, `stale_bytes`. error_bits: id -> error byte of that servo's newest status packet;
    status_bits: id -> its status register when last polled. torque: id -> its Torque_Enable then. loads: id -> (load in per cent, current in mA)
    then, NaN where not told. accelerations, goals: id -> these registers then. sent_goals: id -> the newest goals sent, as in the register.
    late_answer_s: how long a missed answer may still come. on_exchange: called before each request.
    """

    def __init__(self, bus: Any, events: Counter[str], on_exchange: Callable[[], object] = lambda: None, tries: int = TRIES) -> None:
        self._bus, self._events, self._on_exchange = bus, events, on_exchange
        self._heard = False
        self.late_answer_s = LATE_ANSWER_CONNECTING_S
        self._port, self._packets, self._reader = bus.port_handler, bus.packet_handler, bus.sync_reader
        self._request, self._sync_read = self._packets.txRxPacket, self._reader.txRxPacket
        self._read_port, self._is_timeout = self._port.readPort, self._port.isPacketTimeout
        self._awaited_bytes, self._received_bytes = math.inf, 0  # of the answer to the request under way, where its length is known
        self.tries = tries
        self.error_bits: dict[int, int] = {}
        self.status_bits: dict[int, int] = {}
        self.torque: dict[int, int] = {}
        self.loads: dict[int, tuple[float, float]] = {}
        self.accelerations: dict[int, int] = {}
        self.goals: dict[int, int] = {}
        self.sent_goals: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=GOALS_KNOWN))
        import scservo_sdk

        self._ok, self._timeout, self._corrupt = scservo_sdk.COMM_SUCCESS, scservo_sdk.COMM_RX_TIMEOUT, scservo_sdk.COMM_RX_CORRUPT
        self._broadcast = scservo_sdk.BROADCAST_ID

    def install(self) -> ServoLink:
        """Replace the methods. The SDK looks all of them up on its objects, so every path of the driver goes through them."""
        self._port.clearPort = self._flush_input
        self._port.readPort = self._counted_read
        self._port.isPacketTimeout = self._nothing_more_comes
        self._packets.txRxPacket = self._guarded_request
        self._packets.readRx = self._guarded_answer
        self._reader.txRxPacket = self._guarded_sync_read
        return self

    def free(self) -> None:
        """Clear the SDK's busy mark, which an interrupted or failed exchange leaves set for ever."""
        self._on_exchange()
        self._port.is_using = False

    def poll_status(self, servo_id: int, loads: bool = True) -> bool:
        """Ask one servo, once, for its registers from torque to current, or without `loads` to status. Returns whether it answered; see `error_bits`,
        `status_bits`, `torque`, `loads`."""
        self.free()
        before = self.tries, self.late_answer_s
        self.tries, self.late_answer_s = 1, LATE_ANSWER_UNPOWERED_S  # nothing else is read in one piece of this length
        try:
            length = (CURRENT_REGISTER + 2 if loads else STATUS_REGISTER + 1) - TORQUE_REGISTER
            data, result, error = self._packets.readTxRx(self._port, servo_id, TORQUE_REGISTER, length)
        finally:
            self.tries, self.late_answer_s = before
        if result != self._ok:
            return False
        self.error_bits[servo_id], self.status_bits[servo_id] = error, data[STATUS_REGISTER - TORQUE_REGISTER]
        self.torque[servo_id], self.accelerations[servo_id] = data[0], data[ACCELERATION_REGISTER - TORQUE_REGISTER]
        self.goals[servo_id] = _word(data, GOAL_REGISTER)
        self.loads[servo_id] = _load_and_current(data) if loads else (math.nan, math.nan)
        return True

    def poll_torque(self) -> bool:
        """Ask all servos at once whether they hold. Returns whether all answered; see `torque`. Raises what the driver raises."""
        self.free()
        values = self._bus.sync_read("Torque_Enable")
        self.torque.update({self._bus.motors[joint].id: value for joint, value in values.items()})
        return True

    def close_port(self) -> None:
        """Close the serial port whatever state it is in; afterwards the bus object can connect again."""
        self.free()
        try:
            if self._port.ser is not None:
                self._port.ser.close()
        except LINK_LOST:  # closing a device that vanished: there is nothing left to close
            self._events["close_failed"] += 1
        self._port.is_open = False

    def _flush_input(self) -> None:
        self._received_bytes = 0
        waiting = self._port.ser.in_waiting
        if waiting:
            self._events["stale_bytes"] += 1
            self._port.ser.reset_input_buffer()

    def _counted_read(self, length: int) -> Any:
        data = self._read_port(length)
        self._received_bytes += len(data)
        return data

    def _nothing_more_comes(self) -> bool:
        """The time being up says nothing about what came while this program was held up."""
        return self._all_received or (self._is_timeout() and not self._port.ser.in_waiting)

    @property
    def _all_received(self) -> bool:
        return self._received_bytes >= self._awaited_bytes

    @contextlib.contextmanager
    def _awaiting(self, length: int) -> Iterator[None]:
        """During the request of an answer (or the answers of several servos) of `length` bytes together."""
        self._awaited_bytes = length
        try:
            yield
        finally:
            self._awaited_bytes = math.inf

    def _note_goals(self, packet: list[int]) -> None:
        if packet[_INSTRUCTION] == _WRITE and packet[_ADDRESS] == GOAL_REGISTER:
            self.sent_goals[packet[_ID]].append(packet[_ADDRESS + 1] | packet[_ADDRESS + 2] << 8)
        elif packet[_INSTRUCTION] == _SYNC_WRITE and packet[_ADDRESS] == GOAL_REGISTER:
            for at in range(_ADDRESS + 2, packet[_LENGTH] + _LENGTH, 3):  # id, low byte, high byte; behind the last a checksum
                self.sent_goals[packet[at]].append(packet[at + 1] | packet[at + 2] << 8)

    def _guarded_request(self, port: Any, packet: list[int]) -> tuple[Any, int, int]:
        self._note_goals(packet)
        for attempt in range(self.tries):
            self.free()
            with self._awaiting(4 + self._expected_length(packet)):
                answer, result, error = self._request(port, packet)
                result = self._corrupt if result == self._timeout and self._all_received else result
            if packet[_ID] == self._broadcast or answer is None:
                return answer, result, error
            if result == self._ok and answer[_LENGTH] != self._expected_length(packet):
                result = self._corrupt
            if result == self._ok:
                self._heard = True
                self.error_bits[packet[_ID]] = error
                return answer, result, error
            self._after_failure(result, last=attempt + 1 == self.tries)
        return answer, result, error

    def _guarded_sync_read(self) -> int:
        result = self._corrupt
        for attempt in range(self.tries):
            self.free()
            with self._awaiting(len(self._reader.data_dict) * (6 + self._reader.data_length)):
                result = self._sync_read()
                result = self._corrupt if result == self._timeout and self._all_received else result
            if result == self._ok:
                break
            self._after_failure(result, last=attempt + 1 == self.tries)
        return result

    def _guarded_answer(self, port: Any, servo_id: int, length: int) -> tuple[list[int], int, int]:
        while True:
            packet, result = self._packets.rxPacket(port)
            if result != self._ok:
                return [], result, 0
            self._heard = True
            if packet[_ID] == servo_id:  # others are the tail of an earlier exchange
                break
        if packet[_LENGTH] != length + 2:
            return [], self._corrupt, 0
        self.error_bits[servo_id] = packet[_ERROR]
        return list(packet[_DATA : _DATA + length]), result, packet[_ERROR]

    @staticmethod
    def _expected_length(packet: list[int]) -> int:
        return 2 + (packet[_DATA + 1] if packet[_INSTRUCTION] == _READ else 0)

    def _after_failure(self, result: int, last: bool) -> None:
        """Let the rest of a damaged answer, or a late one, pass by; then the line is ready for the next request."""
        if not last:
            self._events["read_retry"] += 1
        serial = self._port.ser
        limit_s = time.monotonic() + (self.late_answer_s if self._heard else LATE_ANSWER_UNPOWERED_S)
        quiet_s = limit_s if result == self._timeout else time.monotonic() + QUIET_S
        while time.monotonic() < min(quiet_s, limit_s):
            if serial.in_waiting:
                serial.reset_input_buffer()
                self._heard = True
                if result == self._timeout:
                    self._events["late_answer"] += 1
                quiet_s = time.monotonic() + QUIET_S
            time.sleep(0.0005)


def _word(data: list[int], register: int) -> int:
    """A register of two bytes, among those from torque on."""
    at = register - TORQUE_REGISTER
    return data[at] | data[at + 1] << 8


def _load_and_current(data: list[int]) -> tuple[float, float]:
    """Per cent and mA, from the registers from torque on."""
    load, current = _word(data, LOAD_REGISTER), _word(data, CURRENT_REGISTER)
    percent, current_ma = (load & LOAD_BITS) * LOAD_PERCENT, (current & CURRENT_BITS) * CURRENT_MA
    return percent if percent <= FULL_LOAD_PERCENT else math.nan, current_ma if current_ma <= MOST_CURRENT_MA else math.nan


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


def release_torque(bus: Any, link: ServoLink, patience_s: float, problems: list[str]) -> dict[str, Torque]:
    """Torque off on every motor. Returns how each joint was left; `problems` gets a line for each that is unknown.

    A port that vanished, before or in the middle, is given `patience_s` to come back: motors keep their power, and hold, without it.
    """
    give_up_s = time.monotonic() + patience_s
    while _line_is_open(bus.port_handler, link, give_up_s):
        trouble: list[str] = []
        torque = _release_all(bus, link, trouble)
        if "unknown" not in torque.values() or _answers(bus.port_handler):
            problems.extend(trouble)
            return torque
    problems.append(f"{bus.port} is gone: torque could NOT be switched off")
    return dict.fromkeys(bus.motors, "unknown")


def broadcast_torque_off(bus: Any, link: ServoLink) -> None:
    """Torque off on whoever listens, without asking who that is."""
    if _line_is_open(bus.port_handler, link, give_up_s=0.0):
        for _ in range(BLIND_WRITES):
            attempt("torque off to all servos", lambda: _write_all(bus, link), [])


def _release_all(bus: Any, link: ServoLink, problems: list[str]) -> dict[str, Torque]:
    """All at once without asking, then each by name; what stayed unknown is asked once more on a line that has become quiet."""
    for _ in range(BLIND_WRITES):
        failed: list[str] = []
        if not attempt("torque off to all servos", lambda: _write_all(bus, link), failed):
            problems.extend(line for line in failed if line not in problems)
    attempt("waiting for late answers", lambda: _wait_for_silence(bus.port_handler.ser), [])  # a lost line shows in the next step
    found = {joint: _release_one(bus, link, joint, []) for joint in bus.motors}
    if "unknown" in found.values() and _answers(bus.port_handler):
        attempt("waiting for late answers", lambda: _wait_for_silence(bus.port_handler.ser), [])
        for joint in [joint for joint, state in found.items() if state == "unknown"]:
            found[joint] = _release_one(bus, link, joint, problems)
    return found


def _answers(handler: Any) -> bool:
    """Whether the port is still there."""
    return bool(handler.is_open) and attempt("asking the port", lambda: handler.ser.in_waiting, [])


def _wait_for_silence(serial: Any) -> None:
    begin_s = quiet_since_s = time.monotonic()
    while (now_s := time.monotonic()) - quiet_since_s < SILENT_S and now_s - begin_s < LONGEST_CHATTER_S:
        if serial.in_waiting:
            serial.reset_input_buffer()
            quiet_since_s = now_s
        time.sleep(0.001)


def close_camera(name: str, camera: Any, problems: list[str]) -> bool:
    """Stop a lerobot camera and its thread. A thread alive at exit can abort the interpreter, so it is looked at."""
    thread = getattr(camera, "thread", None)
    if thread is None and not camera.is_connected:
        return True
    closed = attempt(f"closing camera '{name}'", camera.disconnect, problems)
    if thread is not None and thread.is_alive():
        problems.append(f"camera '{name}': its reading thread is stuck in the capture driver; unplug the camera")
        return False
    return closed


def _line_is_open(handler: Any, link: ServoLink, give_up_s: float) -> bool:
    while True:
        if _answers(handler):
            return True
        link.close_port()
        if not attempt("reopening the port", handler.openPort, []):
            if time.monotonic() > give_up_s:
                return False
            time.sleep(REOPEN_PAUSE_S)


def _write_all(bus: Any, link: ServoLink) -> None:
    link.free()
    bus.sync_write("Torque_Enable", 0)


def _release_one(bus: Any, link: ServoLink, joint: str, problems: list[str]) -> Torque:
    trouble: list[str] = []
    name = f"torque off, {joint} (id {bus.motors[joint].id})"
    # A servo in overload acknowledges with an error bit, which the driver raises although torque went off: so ask it afterwards.
    link.tries = TRIES_PER_MOTOR
    acknowledged = attempt(name, lambda: bus.write("Torque_Enable", joint, 0), trouble)
    link.tries = TRIES_PER_MOTOR if acknowledged else 1
    answered, value = _torque_register(bus, link, joint)
    if answered and value == 0:
        return "off"
    if acknowledged and not answered:
        return "off"
    if answered:
        trouble.append(f"{name}: the servo still reports torque register {value}")
    problems.extend(trouble)
    return "unknown"


def _torque_register(bus: Any, link: ServoLink, joint: str) -> tuple[bool, int]:
    """(did it answer, Torque_Enable), error bits ignored."""
    value = -1

    def read() -> None:
        nonlocal value
        link.free()
        address, length = bus.model_ctrl_table[bus.motors[joint].model]["Torque_Enable"]
        answer, result, _ = bus._read(address, length, bus.motors[joint].id, raise_on_error=False)
        if bus._is_comm_success(result):
            value = answer

    attempt("read back", read, [])  # the caller reports the motor's state; a failed read-back is no news of its own
    return value >= 0, value
