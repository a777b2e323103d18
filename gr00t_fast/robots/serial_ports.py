"""Whether a serial port exists, may be opened and is free; errors say what to do."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from pathlib import Path

from gr00t_fast.errors import RobotError, require

try:
    import fcntl
    import termios
except ImportError:  # Windows opens a COM port for one program only, so no lock is needed there
    fcntl = None  # type: ignore[assignment]

_PATTERNS = ("/dev/ttyACM*", "/dev/ttyUSB*", "/dev/tty.usbmodem*", "/dev/tty.usbserial*", "/dev/cu.usbmodem*")
_PTYS = ("/dev/pts/", "/dev/ttys")  # Linux, macOS
_PTY_MASTERS = ("/dev/ptmx", "/dev/pts/ptmx")


def serial_ports_seen() -> list[str]:
    """Device names of the serial ports that look like a servo adapter's."""
    ports = {port.device for port in require("serial.tools.list_ports", "robot").comports() if port.vid is not None}
    ports.update(path for pattern in _PATTERNS for path in glob.glob(pattern))
    return sorted(ports)


def ports_message() -> str:
    """For an error message."""
    seen = serial_ports_seen()
    return f"Serial ports seen: {', '.join(seen)}" if seen else "No USB serial port is seen: check cable and power"


def check_port(port: str) -> None:
    """Raise RobotError when `port` is absent, not a serial device, not permitted, or open in another program. Opens nothing."""
    if os.name != "posix":
        return  # COM3 is not a path; opening it tells
    path = Path(port)
    if not path.exists():
        raise RobotError(f"the serial port {port} does not exist. {ports_message()}. Find the right one with `lerobot-find-port`.")
    if not stat.S_ISCHR(path.stat().st_mode):
        raise RobotError(f"{port} is not a serial device. {ports_message()}. Find the right one with `lerobot-find-port`.")
    if not os.access(path, os.R_OK | os.W_OK):
        raise RobotError(
            f"no permission to read and write {port}. On Linux join its group: `sudo usermod -aG dialout $USER`, then log in again "
            f"(or, until the next plug-in: `sudo chmod 666 {port}`)."
        )
    if users := programs_using(port):
        raise RobotError(f"the serial port {port} is in use by {'; '.join(users)}. Stop that program, or choose another --robot.port.")


def lock_port(descriptor: int, port: str) -> None:
    """Mark the open port as ours; the mark goes with the process. Raises RobotError when another program holds one.

    Nobody but root can open a real serial port afterwards. Not so a pseudo-terminal, which would stay exclusive after a crash for as long as the
    virtual bus keeps it open; nor where this is the first process of a container, which the watchdog cannot end: it has to open the port, too.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        users = "; ".join(programs_using(port)) or "another program (or another arm object of this one)"
        raise RobotError(f"the serial port {port} is in use by {users}. Stop it, or choose another --robot.port.") from error
    if not os.path.realpath(port).startswith(_PTYS) and os.getpid() != 1:
        with contextlib.suppress(OSError):  # not every driver has it
            fcntl.ioctl(descriptor, termios.TIOCEXCL)


def programs_using(port: str) -> list[str]:
    """Other programs that have `port` open, as `pid 123 (lerobot-teleoperate ..)`. Linux only, and only what /proc lets us see.

    A program that also holds the master side of a pseudo-terminal is the virtual bus behind the port, not a rival.
    """
    target = os.path.realpath(port)
    users = []
    for directory in Path("/proc").glob("[0-9]*"):
        if int(directory.name) == os.getpid():
            continue
        opened = _open_files(directory)
        if target in opened and not opened.intersection(_PTY_MASTERS):
            users.append(f"pid {directory.name} ({_command(directory)})")
    return users


def _open_files(process: Path) -> set[str]:
    try:
        return {os.readlink(entry) for entry in (process / "fd").iterdir()}
    except OSError:  # ended meanwhile, or of another user: not visible is not an error
        return set()


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended meanwhile"
    return " ".join(words).strip()[:80] or "no command line"
