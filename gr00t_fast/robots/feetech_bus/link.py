"""The name under which a bus can be found: a symbolic link that one living bus owns, and that a dead one leaves to the next."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from gr00t_fast.errors import RobotError

_TERMINALS = ("/dev/pts/", "/dev/ttys")  # pseudo-terminals on Linux and macOS: all that a bus ever points its link at


class LinkClaim:
    """The right to a link, from `take` to `give_back`. It ends with the process, so a bus that was killed is in nobody's way.

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
