"""Steering a running bus from another shell: a Unix socket that takes one command a line and answers one JSON line.

inject SPEC | clear | unplug | replug | power-cycle | push JOINT DEGREES | state | quit
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import Gr00tFastError, RobotError, closest
from gr00t_fast.robots.virtual_bus.bus import VirtualBus

LONGEST_SOCKET_PATH = 100  # the kernel's limit is 108 bytes on Linux, 104 on macOS


class ControlSocket:
    """Serves commands for one bus, from the bus's own thread."""

    def __init__(self, bus: VirtualBus, path: Path, quit_program: Callable[[], None]) -> None:
        """Raises RobotError when the socket cannot be made. `quit_program` is called by the command `quit`."""
        self._bus, self._path, self._quit = bus, path, quit_program
        self._listener = _listen(path)
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        bus.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._bus.unwatch(self._listener.fileno())
        self._listener.close()
        for client, _ in self._clients.values():
            client.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(1.0)
        descriptor = client.fileno()
        self._clients[descriptor] = (client, bytearray())
        self._bus.watch(descriptor, lambda: self._read(descriptor))

    def _read(self, descriptor: int) -> None:
        client, buffer = self._clients[descriptor]
        data = b""
        with contextlib.suppress(OSError):
            data = client.recv(4096)
        if not data:
            self._bus.unwatch(descriptor)
            del self._clients[descriptor]
            client.close()
            return
        buffer += data
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            answer, then = self._obey(line.decode(errors="replace"))
            with contextlib.suppress(OSError):  # a client that went away does not need its answer
                client.sendall(json.dumps(answer).encode() + b"\n")
            then()

    def _obey(self, line: str) -> tuple[dict, Callable[[], None]]:
        """The answer, and what is to be done once it is sent: the end of the program would cut it off."""
        if line.strip() == "quit":
            return {"ok": None}, self._quit
        return self._answer(line), lambda: None

    def _answer(self, line: str) -> dict:
        command, _, argument = line.strip().partition(" ")
        actions: dict[str, Callable[[], object]] = {
            "inject": lambda: self._bus.inject(argument.strip()),
            "clear": self._bus.clear,
            "unplug": self._bus.unplug,
            "replug": self._bus.replug,
            "power-cycle": self._bus.power_cycle,
            "push": lambda: self._push(argument),
            "state": lambda: state(self._bus),
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


def state(bus: VirtualBus) -> dict:
    """Torque, position and goal registers of every joint, and whether the cable is in."""
    joints = {
        joint: {
            "id": servo.id,
            "torque": int(servo.torque),
            "position": servo.position,
            "goal": round(servo.goal_encoder() - servo.homing_offset),
        }
        for joint, servo in zip(SO100_JOINTS, bus.servos, strict=True)
    }
    return {"port": bus.port, "device": bus.device, "requests": bus.requests, "joints": joints}


def send_command(path: Path, command: str) -> dict:
    """Send one command to a running bus; returns its answer. Raises RobotError when no bus listens at `path`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(5.0)
            client.connect(str(path))
            client.sendall(command.encode() + b"\n")
            return json.loads(client.makefile().readline())
    except (OSError, ValueError) as error:
        raise RobotError(f"no virtual bus answers at the control socket {path} ({error}). Start one with --link first.") from error


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise RobotError(f"the control socket path {path} is longer than {LONGEST_SOCKET_PATH} bytes. Give a shorter one with --control.")
    _clear_place(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise RobotError(f"the control socket {path} cannot be made: {error.strerror}.") from error
    return listener


def _clear_place(path: Path) -> None:
    """Remove the socket of a dead bus. Raises RobotError when a living one listens there, or a file is no socket."""
    if not path.exists():
        return
    if not path.is_socket():
        raise RobotError(f"the control socket {path} cannot be made: a file that is no socket is already there. Choose another --control.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise RobotError(f"the control socket {path} cannot be made: {error.strerror}. Choose another --control.") from error
    raise RobotError(f"another virtual bus listens at the control socket {path}. End it (--control={path} --send=quit) or choose another --control.")
