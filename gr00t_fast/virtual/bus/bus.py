"""The virtual bus itself: six servos behind a pseudo-terminal, served by one thread, and its control socket.

    with VirtualBus() as bus:
        robot = SO100Follower(SO100FollowerConfig(port=bus.port, ...))

`port` is a symbolic link to the terminal, so that it stays the same when the cable is pulled and plugged in again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import tempfile
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import IO

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import Gr00tFastError, RobotError, closest
from gr00t_fast.robots.calibration import Calibration, default_calibration
from gr00t_fast.robots.feetech import BROADCAST_ID, Instruction, PacketParser, Register, Request, Status
from gr00t_fast.virtual.bus.faults import Fault, FaultTable, Reply, addressed
from gr00t_fast.virtual.bus.servo import Gearbox, Plant, Servo

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
        self._faults = FaultTable(seed)
        self._latency_s, self._wire_time = usb_latency_ms / 1000, wire_time
        self._own_directory = None if link else tempfile.TemporaryDirectory(prefix="virtual_bus_")
        self._link = Path(link) if link else Path(self._own_directory.name) / "port"  # type: ignore[union-attr]
        self._claim: IO[str] | None = None  # from start to close
        self._terminal: _Terminal | None = None
        self._lock = threading.Lock()  # between the thread and the callers of inject, unplug, replug, push
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._cycle = 0  # rounds of the thread so far
        self._replug_at_s: float | None = None
        for fault in faults:
            self.inject(fault)

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
        self._claim = claim(self._link)
        try:
            self.replug()
        except BaseException:
            self._give_back()
            raise
        self._thread = threading.Thread(target=self._run, name="virtual_bus", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering, close the terminal, remove the link. Calling it again is harmless."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.unplug()
        self._give_back()
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

    def state(self) -> dict:
        """Torque, position and goal registers of every joint, and whether the cable is in."""
        joints = {
            joint: {
                "id": servo.id,
                "torque": int(servo.torque),
                "position": servo.position,
                "goal": round(servo.goal_encoder() - servo.homing_offset),
            }
            for joint, servo in zip(SO100_JOINTS, self.servos, strict=True)
        }
        return {"port": self.port, "device": self.device, "requests": self.requests, "joints": joints}

    def _give_back(self) -> None:
        """Let the next bus have the link."""
        claimed, self._claim = self._claim, None
        if claimed is not None:
            Path(claimed.name).unlink(missing_ok=True)  # first: who waits for the lock of a removed file asks anew
            claimed.close()

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
        with contextlib.suppress(OSError, ValueError):  # the terminal was unplugged by another thread meanwhile
            select.select([terminal.master] if terminal else [], [], [], max(0.0, until_s - time.monotonic()))

    def _serve(self, terminal: _Terminal) -> None:
        terminal.flush_due(time.monotonic())
        for request in terminal.requests(time.monotonic()):
            self.requests += 1
            now_s = time.monotonic()
            faults = self._faults.strike(request, now_s)
            if pulled := next((fault for fault in faults if fault.kind == "unplug"), None):
                return self._pull(pulled, now_s)
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
                units = next((servo.registers[Register.RETURN_DELAY] for servo in self.servos if servo.id == reply.servo_id), 0)
                due_s += len(reply.data) * BYTE_S + units * RETURN_DELAY_UNIT_S
            terminal.send(reply.data, due_s)

    def _cable(self, now_s: float) -> None:
        if fault := self._faults.due_unplug(now_s):
            self._pull(fault, now_s)
        if self._replug_at_s is not None and now_s >= self._replug_at_s:
            self._replug()

    def _pull(self, fault: Fault, now_s: float) -> None:
        self._replug_at_s = None if fault.for_s is None else now_s + fault.for_s
        self._unplug()

    def _unplug(self) -> None:
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            if self._link.is_symlink() and os.readlink(self._link) == terminal.device:
                self._link.unlink()
            terminal.close()

    def _replug(self) -> None:
        self._replug_at_s = None
        if self._terminal is None:
            _check_replaceable(self._link)
            self._terminal = _Terminal()
            temporary = self._link.with_name(f".{self._link.name}.{os.getpid()}.{threading.get_ident()}")
            temporary.symlink_to(self._terminal.device)
            temporary.replace(self._link)  # in one step, also over a link that a dead bus left behind


class _Terminal:
    """One pseudo-terminal: the master side read and written without ever blocking, answers leaving in order at their time."""

    def __init__(self) -> None:
        self.master, self._slave = os.openpty()  # our own slave descriptor stays open, else reads fail while no driver is there
        tty.setraw(self._slave)  # before anyone learns the path: a cooked terminal would echo our answers back as requests
        os.set_blocking(self.master, False)
        self.device = os.ttyname(self._slave)
        self._parser = PacketParser(Request)
        self._last_byte_s = 0.0
        self._out: deque[tuple[float, bytes]] = deque()
        self._last_due_s = 0.0

    @property
    def due_s(self) -> float | None:
        """When the next answer has to leave."""
        return self._out[0][0] if self._out else None

    def requests(self, now_s: float) -> list[Request]:
        """Whatever arrived since the last call, parsed."""
        try:
            data = os.read(self.master, 65536)
        except BlockingIOError:
            data = b""
        if data:
            self._last_byte_s = now_s
        elif self._parser.waiting and now_s - self._last_byte_s > GAP_S:
            self._parser.abandon()
        return self._parser.feed(data)

    def send(self, data: bytes, due_s: float) -> None:
        """Queue an answer; a delayed one holds up those behind it, as on a wire."""
        self._last_due_s = max(self._last_due_s, due_s)
        self._out.append((self._last_due_s, data))

    def flush_due(self, now_s: float) -> None:
        """Write the answers whose time has come; what a full buffer refuses is lost, as on a wire nobody reads."""
        while self._out and self._out[0][0] <= now_s:
            data = self._out.popleft()[1]
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
    """Let the servos obey one request. Returns their answers in the order they go over the line; a malformed or unknown request has none."""
    params, to_all = request.params, request.servo_id == BROADCAST_ID
    by_id = {servo.id: servo for servo in servos}
    named = [by_id[servo_id] for servo_id in (sorted(by_id) if addressed(request) == [BROADCAST_ID] else addressed(request)) if servo_id in by_id]
    match request.instruction:
        case Instruction.PING:
            return [_reply(servo) for servo in named]
        case Instruction.READ if len(params) == 2 and not to_all:
            return [_reply(servo, servo.read(*params)) for servo in named]
        case Instruction.SYNC_READ if len(params) >= 3 and to_all:
            return [_reply(servo, servo.read(params[0], params[1])) for servo in named]
        case Instruction.WRITE if len(params) >= 2:
            replies = [_reply(servo) for servo in named]  # before acting: a change of id is acknowledged under the old one
            for servo in named:
                servo.write(params[0], params[1:])
            return [reply for servo, reply in zip(named, replies, strict=True) if servo.registers[Register.RESPONSE_LEVEL] and not to_all]
        case Instruction.SYNC_WRITE if len(params) >= 2 and to_all:
            address, length = params[:2]
            for start in range(2, len(params) - length, length + 1):
                if there := by_id.get(params[start]):
                    there.write(address, params[start + 1 : start + 1 + length])
    return []


def _reply(servo: Servo, params: bytes = b"") -> Reply:
    return Reply(servo.id, Status(servo.id, servo.registers[Register.STATUS], params).encode())


# The name under which a bus can be found: a symbolic link that one living bus owns, and that a dead one leaves to the next.


_TERMINALS = ("/dev/pts/", "/dev/ttys")  # pseudo-terminals on Linux and macOS: all that a bus ever points its link at


def claim(link: Path) -> IO[str]:
    """The right to a link: a locked file beside it, which ends with the process, so that a killed bus does not block the next one. The link itself
    tells nothing: the terminal of a dead bus may belong to somebody else by now.

    Raises RobotError when a living bus has the link, or something that no bus has made is in its place.
    """
    _check_replaceable(link)
    try:
        file = link.with_name(f".{link.name}.lock").open("w")
    except OSError as error:
        raise RobotError(f"the link {link} cannot be placed: {error.strerror}. Its directory must exist and be writable.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RobotError(
            f"another virtual bus is running at {link}. Use that one, end it (Ctrl-C, or --link={link} --send=quit), or choose another --link."
        ) from error
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()  # its owner has removed it in between: the next bus would find another file
    return claim(link)


def _check_replaceable(link: Path) -> None:
    if link.is_symlink():
        target = os.readlink(link)
        if not target.startswith(_TERMINALS):
            raise RobotError(f"the link {link} cannot be placed: it points to {target}, which is no virtual bus. Choose another path.")
    elif link.exists():
        raise RobotError(f"the link {link} cannot be placed: a file that is not a link is already there. Choose another path.")


# Steering a running bus from another shell.


_COMMAND_S = 5.0  # a client that says nothing for so long makes room for the next


class ControlSocket:
    """A Unix socket that takes commands as text and answers each in JSON, one client after the other, in a thread of its own:

    inject SPEC | clear | unplug | replug | power-cycle | push JOINT DEGREES | state | quit
    """

    def __init__(self, bus: VirtualBus, path: Path, quit_program: Callable[[], None]) -> None:
        """Raises RobotError when the socket cannot be made. `quit_program` is called by the command `quit`."""
        self._bus, self._quit = bus, quit_program
        self._listener = _listen(path)
        threading.Thread(target=self._serve, name="virtual_bus-control", daemon=True).start()

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client = self._listener.accept()
            except OSError:  # closed
                return
            with client, contextlib.suppress(EOFError, OSError):  # a client that went away does not need its answer
                while client.poll(_COMMAND_S):
                    line = client.recv_bytes(4096).decode(errors="replace").strip()
                    client.send_bytes(json.dumps({"ok": None} if line == "quit" else self._answer(line)).encode())
                    if line == "quit":  # after the answer, which the end of the program would cut off
                        self._quit()

    def _answer(self, line: str) -> dict:
        command, _, argument = line.partition(" ")
        actions: dict[str, Callable[[], object]] = {
            "inject": lambda: self._bus.inject(argument.strip()),
            "clear": self._bus.clear,
            "unplug": self._bus.unplug,
            "replug": self._bus.replug,
            "power-cycle": self._bus.power_cycle,
            "push": lambda: self._push(argument),
            "state": self._bus.state,
        }
        if command not in actions:
            return {"error": f"unknown command '{command}'; expected one of {', '.join([*actions, 'quit'])}.{closest(command, [*actions, 'quit'])}"}
        try:
            return {"ok": actions[command]()}
        except Gr00tFastError as error:
            return {"error": str(error)}

    def _push(self, argument: str) -> None:
        joint, _, degrees = argument.partition(" ")
        if joint not in SO100_JOINTS:
            raise RobotError(f"push needs a joint and degrees, got '{argument}'.{closest(joint, SO100_JOINTS)}")
        try:
            self._bus.push(joint, float(degrees))
        except ValueError as error:
            raise RobotError(f"push needs a number of degrees, got '{degrees}'.") from error


def send_command(path: Path, command: str) -> dict:
    """Send one command to a running bus; returns its answer. Raises RobotError when no bus listens at `path`."""
    try:
        with Client(str(path), family="AF_UNIX") as client:
            client.send_bytes(command.encode())
            if not client.poll(_COMMAND_S):
                raise TimeoutError("it took the command and said nothing")
            return json.loads(client.recv_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise RobotError(f"no virtual bus answers at the control socket {path} ({error}). Start one with --link first.") from error


def _listen(path: Path) -> Listener:
    try:
        if path.is_socket() and not _is_served(path):  # that of a bus that was killed
            path.unlink()
        return Listener(str(path), family="AF_UNIX")
    except OSError as error:
        raise RobotError(
            f"the control socket {path} cannot be made: {error.strerror or error}. If another virtual bus listens there, end it "
            f"(--control={path} --send=quit); else choose another --control."
        ) from error


def _is_served(path: Path) -> bool:
    try:
        Client(str(path), family="AF_UNIX").close()
    except ConnectionRefusedError:
        return False
    return True
