"""The virtual bus itself: six servos behind a pseudo-terminal, served by one thread.

    with VirtualBus() as bus:
        robot = SO100Follower(SO100FollowerConfig(port=bus.port, ...))

`port` is a symbolic link to the terminal, so that it stays the same when the cable is pulled and plugged in again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import select
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError
from gr00t_fast.robots.virtual_bus.faults import Fault, FaultTable, Reply, addressed
from gr00t_fast.robots.virtual_bus.protocol import BROADCAST_ID, Instruction, Request, RequestParser, Status, encode_status
from gr00t_fast.robots.virtual_bus.servo import Calibration, Gearbox, Plant, Register, Servo, default_calibration

STEP_S = 0.005  # how often the mechanics move on; a 30 Hz loop cannot see finer
BYTE_S = 10e-6  # ten bits at 1 Mb/s
RETURN_DELAY_UNIT_S = 2e-6
GAP_S = 0.02  # a servo gives up a packet that stops for so long


class VirtualBus:
    """Six STS3215 on a pseudo-terminal. A context manager that runs its own thread; the methods may be called from any thread.

    calibration: what the servos hold in EEPROM; None: `default_calibration()`.
    plant: what they move; None: nothing but themselves.
    faults: in force from the start. link: where to put the port; None: in a new temporary directory.
    usb_latency_ms: added to every answer. wire_time: answers also take the time of their bytes at 1 Mb/s and of the Return_Delay register.
    servo_ids: which of the six are attached.
    """

    def __init__(
        self,
        calibration: Calibration | None = None,
        plant: Plant | None = None,
        faults: Iterable[Fault] = (),
        *,
        link: Path | None = None,
        usb_latency_ms: float = 0.0,
        wire_time: bool = False,
        servo_ids: Sequence[int] = (1, 2, 3, 4, 5, 6),
        goal_enables_torque: bool = True,
        seed: int = 0,
    ) -> None:
        self.calibration = calibration or default_calibration()
        self.servos = [Servo(self.calibration[j].id, self.calibration[j], goal_enables_torque=goal_enables_torque) for j in SO100_JOINTS]
        self.failure: Exception | None = None  # what ended the thread, if anything did
        self.requests = 0  # well-formed requests so far
        self._attached = [servo for servo in self.servos if servo.id in servo_ids]
        self._gearbox = Gearbox(self.servos, self.calibration, plant)
        self._faults = FaultTable(faults, seed)
        self._latency_s, self._wire_time = usb_latency_ms / 1000, wire_time
        self._own_directory = None if link else tempfile.TemporaryDirectory(prefix="virtual_bus_")
        self._link = Path(link) if link else Path(self._own_directory.name) / "port"
        self._claim = LinkClaim(self._link)
        self._terminal: _Terminal | None = None
        self._lock = threading.Lock()  # between the thread and the callers of inject, unplug, replug, push
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._cycle = 0  # rounds of the thread so far
        self._watched: dict[int, Callable[[], None]] = {}
        self._replug_at_s: float | None = None

    @property
    def port(self) -> str:
        """What to give as `--robot.port`."""
        return str(self._link)

    @property
    def device(self) -> str | None:
        """The terminal behind `port`, or None while unplugged."""
        return self._terminal.device if self._terminal else None

    def __enter__(self) -> VirtualBus:
        self.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.close()
        if self.failure is not None and exc_type is None:
            raise RobotError(f"the virtual bus stopped by itself: {type(self.failure).__name__}: {self.failure}") from self.failure

    def start(self) -> None:
        """Create the port and begin to answer. Raises RobotError when the link belongs to a living bus, or cannot be placed."""
        self._claim.take()
        try:
            self.replug()
        except BaseException:
            self._claim.give_back()
            raise
        self._faults.start(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="virtual_bus", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering, close the terminal, remove the link. Calling it again is harmless."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self.unplug()
        self._claim.give_back()
        if self._own_directory is not None:
            self._own_directory.cleanup()

    def inject(self, fault: Fault | str) -> None:
        """Put a fault in force; a string is parsed by `Fault.parse`."""
        fault = Fault.parse(fault) if isinstance(fault, str) else fault
        with self._lock:
            self._faults.add(fault, time.monotonic())

    def clear(self) -> None:
        """End every fault (an unplugged port stays unplugged)."""
        with self._lock:
            self._faults.clear()

    def unplug(self) -> None:
        """Pull the cable: the terminal disappears under whoever has it open. The servos keep their power."""
        with self._lock:
            self._unplug()
            cycle = self._cycle
        # A thread inside select() still holds the closed terminal; it is gone for the driver once that call has returned.
        while self._cycle == cycle and self._thread is not None and self._thread.is_alive():
            if self._thread is threading.current_thread():
                return
            time.sleep(0.0005)

    def replug(self) -> None:
        """Plug the cable in again: a new terminal behind the same link."""
        with self._lock:
            self._replug()

    def power_cycle(self) -> None:
        """Switch the servos' supply off and on."""
        with self._lock:
            for servo in self.servos:
                servo.power_cycle()

    def push(self, joint: str, degrees: float) -> None:
        """Turn a joint by hand."""
        with self._lock:
            self._gearbox.push(SO100_JOINTS.index(joint), degrees)

    def torque(self) -> dict[str, int]:
        """Torque_Enable of each joint."""
        return {joint: servo.registers[Register.TORQUE_ENABLE] for joint, servo in zip(SO100_JOINTS, self.servos, strict=True)}

    def watch(self, descriptor: int, ready: Callable[[], None]) -> None:
        """Call `ready` from the bus thread whenever `descriptor` becomes readable (the control socket)."""
        self._watched[descriptor] = ready

    def unwatch(self, descriptor: int) -> None:
        """Undo `watch`."""
        self._watched.pop(descriptor, None)

    def _run(self) -> None:
        try:
            last_s = time.monotonic()
            while not self._stop.is_set():
                self._wait(last_s + STEP_S)
                self._cycle += 1
                now_s = time.monotonic()
                with self._lock:
                    if now_s - last_s >= STEP_S:
                        self._gearbox.block(self._faults.blocked(now_s, range(1, 1 + len(self.servos))))
                        self._gearbox.advance(now_s - last_s)
                        last_s = now_s
                    self._cable(now_s)
                    if self._terminal is not None:
                        self._serve(self._terminal)
        except Exception as error:  # noqa: BLE001 - a plant may raise anything; the owner of the thread reads it from `failure`
            self.failure = error

    def _wait(self, until_s: float) -> None:
        terminal = self._terminal
        if terminal is not None and terminal.due_s is not None:
            until_s = min(until_s, terminal.due_s)
        descriptors = [*self._watched, *([terminal.master] if terminal else [])]
        with contextlib.suppress(OSError, ValueError):  # the terminal was unplugged by another thread meanwhile
            ready, _, _ = select.select(descriptors, [], [], max(0.0, until_s - time.monotonic()))
            for descriptor in ready:
                if callback := self._watched.get(descriptor):
                    callback()

    def _serve(self, terminal: _Terminal) -> None:
        terminal.flush_due(time.monotonic())
        for request in terminal.requests(time.monotonic()):
            self.requests += 1
            now_s = time.monotonic()
            faults = self._faults.strike(request, now_s)
            if pulled := next((fault for fault in faults if fault.kind == "unplug"), None):
                self._replug_at_s = None if pulled.for_s is None else now_s + pulled.for_s
                self._unplug()
                return
            absent = [fault for fault in faults if fault.kind == "absent"]
            obeying = [servo for servo in self._attached if not any(fault.hits(servo.id) for fault in absent)]
            replies = self._faults.spoil(faults, request, answer(request, obeying))
            self._queue(terminal, replies, now_s)
        terminal.flush_due(time.monotonic())

    def _queue(self, terminal: _Terminal, replies: list[Reply], now_s: float) -> None:
        due_s = now_s + self._latency_s
        for reply in replies:
            due_s += reply.delay_s
            if self._wire_time:
                due_s += len(reply.data) * BYTE_S + self._return_delay_s(reply.servo_id)
            terminal.send(reply.data, due_s)

    def _return_delay_s(self, servo_id: int) -> float:
        units = next((servo.registers[Register.RETURN_DELAY] for servo in self.servos if servo.id == servo_id), 0)
        return units * RETURN_DELAY_UNIT_S

    def _cable(self, now_s: float) -> None:
        if fault := self._faults.due_unplug(now_s):
            self._replug_at_s = None if fault.for_s is None else now_s + fault.for_s
            self._unplug()
        if self._replug_at_s is not None and now_s >= self._replug_at_s:
            self._replug()

    def _unplug(self) -> None:
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            if self._link.is_symlink() and os.readlink(self._link) == terminal.device:
                self._link.unlink()
            terminal.close()

    def _replug(self) -> None:
        self._replug_at_s = None
        if self._terminal is None:
            self._terminal = _Terminal()
            place_link(self._link, self._terminal.device)


class _Terminal:
    """One pseudo-terminal: the master side read and written without ever blocking, answers leaving in order at their time."""

    def __init__(self) -> None:
        self.master, self._slave = os.openpty()  # our own slave descriptor stays open, else reads fail while no driver is there
        tty.setraw(self._slave)  # before anyone learns the path: a cooked terminal would echo our answers back as requests
        os.set_blocking(self.master, False)
        self.device = os.ttyname(self._slave)
        self._parser = RequestParser()
        self._last_byte_s = 0.0
        self._out: list[tuple[float, int, bytes]] = []
        self._sent = 0
        self._last_due_s = 0.0

    @property
    def due_s(self) -> float | None:
        """When the next answer has to leave."""
        return self._out[0][0] if self._out else None

    def requests(self, now_s: float) -> list:
        """Whatever arrived since the last call, parsed."""
        try:
            data = os.read(self.master, 65536)
        except BlockingIOError:
            data = b""
        if data:
            self._last_byte_s = now_s
        elif self._parser.waiting and now_s - self._last_byte_s > GAP_S:
            self._parser.abandon()
        return self._parser.requests(data) if data else []

    def send(self, data: bytes, due_s: float) -> None:
        """Queue an answer; a delayed one holds up those behind it, as on a wire."""
        self._last_due_s = max(self._last_due_s, due_s)
        self._sent += 1
        heapq.heappush(self._out, (self._last_due_s, self._sent, data))

    def flush_due(self, now_s: float) -> None:
        """Write the answers whose time has come; what a full buffer refuses is lost, as on a wire nobody reads."""
        while self._out and self._out[0][0] <= now_s:
            data = heapq.heappop(self._out)[2]
            try:
                os.write(self.master, data)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EIO):
                    raise

    def close(self) -> None:
        """Both ends; the driver's next access fails with EIO."""
        os.close(self.master)
        os.close(self._slave)


# What each instruction makes the servos on the line do and answer.


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


# The name under which a bus can be found: a symbolic link that one living bus owns, and that a dead one leaves to the next.


_TERMINALS = ("/dev/pts/", "/dev/ttys")  # pseudo-terminals on Linux and macOS: all that a bus ever points its link at


class LinkClaim:
    """The right to a link, from `take` to `give_back`. It ends with the process, so a killed bus does not block the next one.

    A lock on a file beside the link and not a look at the link itself: the terminal of a dead bus may belong to somebody else by now.
    """

    def __init__(self, link: Path) -> None:
        self._link = link
        self._lock = link.with_name(f".{link.name}.lock")
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises RobotError when a living bus has the link, or something that no bus has made is in its place."""
        _check_replaceable(self._link)
        while self._descriptor is None:
            try:
                descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise RobotError(f"the link {self._link} cannot be placed: {error.strerror}. Its directory must exist and be writable.") from error
            if not _locked(descriptor):
                os.close(descriptor)
                raise RobotError(
                    f"another virtual bus is running at {self._link}. Use that one, end it (Ctrl-C, or --link={self._link} --send=quit), "
                    "or choose another --link."
                )
            if _is_still_at(self._lock, descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def give_back(self) -> None:
        """Let the next bus have the link. Calling it again is harmless."""
        if self._descriptor is not None:
            self._lock.unlink(missing_ok=True)  # first: who waits for the lock of a removed file asks anew
            os.close(self._descriptor)
            self._descriptor = None


def place_link(link: Path, target: str) -> None:
    """Point `link` at `target` in one step, replacing a link a dead bus left behind. Raises RobotError when something else is there."""
    _check_replaceable(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.symlink_to(target)
        temporary.replace(link)
    except OSError as error:
        raise RobotError(f"the link {link} cannot be placed: {error.strerror}. Its directory must exist and be writable.") from error


def _check_replaceable(link: Path) -> None:
    if link.is_symlink():
        target = os.readlink(link)
        if not target.startswith(_TERMINALS):
            raise RobotError(f"the link {link} cannot be placed: it points to {target}, which is no virtual bus. Choose another path.")
    elif link.exists():
        raise RobotError(f"the link {link} cannot be placed: a file that is not a link is already there. Choose another path.")


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_at(path: Path, descriptor: int) -> bool:
    """Whether the locked file is the one that the next bus will find: its owner may have removed it in between."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
