"""The watchdog's own process: it outlives whatever stops the interpreter that drives the arm. watchdog.py starts it.

It imports nothing of this package.

    python watchdog_process.py PORT off|hold DIRECTORY ID [ID ...]      # DIRECTORY: where pyserial is

Standard input carries the heartbeat, written by the program that drives the arm: little-endian float32, each the number of seconds within which
the next one will come (infinity: at no time). NaN dismisses the watchdog: the arm has landed. A negative number asks it to go on with what the
program could not do itself. The end of the input without either means that the program is gone. "ready" on standard output once everything that
is needed is loaded, and a byte for what is heard each time: a watchdog that is frozen is noticed by its silence.

When the program is gone, or a heartbeat stays away, the torque is taken off all servos: by a write to all of them, repeated, then read back from
each; with `hold`, goals become where the joints stand. A program that is still there but silent is killed first, else it would go on sending goals
when it wakes up, and each goal switches the torque on again.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import signal
import struct
import sys
import time

BAUD_RATE = 1_000_000
TORQUE_REGISTER, GOAL_REGISTER, POSITION_REGISTER = 40, 42, 56  # Feetech's STS3215 memory table; the positions are words
_READ, _WRITE, _SYNC_WRITE, _BROADCAST = 0x02, 0x03, 0x83, 0xFE
DISMISS, CALL = struct.pack("<f", math.nan), struct.pack("<f", -1.0)
DISMISSED, CALLED, GONE, SILENT, UNENDING = "dismissed", "called", "gone", "silent", "unending"
SECOND_LOOK_S = 0.2  # a machine that stood still as a whole held up both: the program gets so long to say so
DEATH_S = 0.5  # a killed program has closed its files within milliseconds; one stuck in the kernel must not hold up the rest
PATIENCE_S = 5.0  # a port that is away gets so long to come back, a servo to answer
BLIND_WRITES = 5  # a broadcast write is not acknowledged
ANSWER_S = 0.03
LOCK_S = 0.05
MESSAGE_S = 10  # a terminal that takes no text for so long does not get it


def main(port: str, mode: str, directory: str, ids: list[int]) -> None:
    """Wait, and act if need be."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):  # meant for the program, which ends this one
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = os.getppid()
    sys.path.append(directory)
    import serial  # before it is needed: a program that is in trouble may be on a disk that is, too

    os.set_blocking(1, False)  # a program that is busy does not read
    say(b"ready\n")
    trouble, silent_s = wait_for_trouble()
    if trouble == DISMISSED:
        return
    if trouble == SILENT:
        with contextlib.suppress(ProcessLookupError):
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
        trouble = SILENT if has_ended(DEATH_S) else UNENDING
    left_on, alone = release(serial, port, ids, trouble == CALLED) if mode == "off" else stop_pushing(serial, port, ids)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MESSAGE_S)
    with contextlib.suppress(OSError):
        os.write(2, f"watchdog: {cause(trouble, port, silent_s)}. {outcome(mode, left_on, alone)}\n".encode())


def wait_for_trouble() -> tuple[str, float]:
    """What came, and the seconds without a heartbeat."""
    buffer, awaited_s, heard_s = b"", math.inf, time.monotonic()
    while True:
        wait_s = None if math.isinf(awaited_s) else max(0.0, heard_s + awaited_s - time.monotonic())
        if not (readable(wait_s) or readable(SECOND_LOOK_S)):
            return SILENT, time.monotonic() - heard_s
        data = os.read(0, 65536)
        if not data:
            return GONE, 0.0
        buffer += data
        whole = len(buffer) // 4 * 4
        if whole:
            limits_s = struct.unpack(f"<{whole // 4}f", buffer[:whole])
            if any(map(math.isnan, limits_s)):
                return DISMISSED, 0.0
            if min(limits_s) < 0:
                return CALLED, 0.0
            awaited_s, heard_s, buffer = limits_s[-1], time.monotonic(), buffer[whole:]
        say(b".")


def say(words: bytes) -> None:
    with contextlib.suppress(OSError):  # the program is gone, or has not read for hours: its own pipe says the rest
        os.write(1, words)


def readable(wait_s: float | None) -> bool:
    return bool(select.select([0], [], [], wait_s)[0])


def has_ended(limit_s: float) -> bool:
    """Whether no process can write to the input any more: then the program no longer holds the port either. The first process of a container
    cannot be killed from within."""
    end_s = time.monotonic() + limit_s
    while (left_s := end_s - time.monotonic()) > 0 and readable(left_s):
        if not os.read(0, 65536):
            return True
    return False


def release(serial, port: str, ids: list[int], had: bool) -> tuple[list[int], bool]:  # type: ignore[no-untyped-def]
    """Torque off. Returns the ids of the servos that did not confirm it, and whether the port was ours alone. Ends when a new run takes the port,
    which it has once the port was given up by the program (`had`) or by this one."""
    give_up_s, left_on, alone = time.monotonic() + PATIENCE_S, ids, True
    while True:
        with contextlib.suppress(OSError, ValueError, *_termios_error()), serial.Serial(port, BAUD_RATE, timeout=0, write_timeout=0.5) as line:
            alone = locked(line)
            if had and not alone:
                break
            had = alone
            for _ in range(BLIND_WRITES):
                line.write(packet(_BROADCAST, _SYNC_WRITE, TORQUE_REGISTER, 1, *(value for servo in ids for value in (servo, 0))))
                time.sleep(0.002)
            left_on = [servo for servo in ids if register(line, servo, TORQUE_REGISTER) != 0]
        if not left_on or time.monotonic() > give_up_s:
            break
        time.sleep(0.02)
    return left_on, alone


def locked(line) -> bool:  # type: ignore[no-untyped-def]
    """Mark the port as ours, as every run does: a program that starts meanwhile is refused. Of a program that is ending the mark goes with it."""
    end_s = time.monotonic() + LOCK_S
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(line.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end_s:
            return False
        time.sleep(0.002)


def stop_pushing(serial, port: str, ids: list[int]) -> tuple[list[int], bool]:  # type: ignore[no-untyped-def]
    """The arm holds: goals become where the joints stand, for one that is held up shall not push for ever. The last servo is the gripper, which goes
    on holding what it holds. Returns as `release`."""
    with contextlib.suppress(OSError, ValueError, *_termios_error()), serial.Serial(port, BAUD_RATE, timeout=0, write_timeout=0.5) as line:
        for servo in ids[:-1] if locked(line) else ():
            position = register(line, servo, POSITION_REGISTER, 2)
            if position is not None and register(line, servo, TORQUE_REGISTER) == 1:  # a goal would switch on one that has let go
                line.write(packet(servo, _WRITE, GOAL_REGISTER, *position.to_bytes(2, "little")))
                time.sleep(0.002)
    return [], True


def register(line, servo: int, address: int, length: int = 1) -> int | None:  # type: ignore[no-untyped-def]
    """What the servo answers when asked; None when it does not."""
    while line.in_waiting:  # answers to the program's last requests
        line.reset_input_buffer()
        time.sleep(0.002)
    line.write(packet(servo, _READ, address, length))
    heard, end_s = b"", time.monotonic() + ANSWER_S
    while time.monotonic() < end_s:
        heard += line.read(64)
        start = heard.find(bytes((0xFF, 0xFF, servo, 2 + length)))
        if start >= 0 and len(heard) >= start + 6 + length:
            *body, check = heard[start + 2 : start + 6 + length]
            return int.from_bytes(body[3:], "little") if sum(body) & 0xFF == 0xFF - check else None
        time.sleep(0.001)
    return None


def packet(servo: int, instruction: int, *parameters: int) -> bytes:
    """Feetech's protocol: header, id, length, instruction, parameters, inverted sum."""
    body = bytes((servo, len(parameters) + 2, instruction, *parameters))
    return b"\xff\xff" + body + bytes((~sum(body) & 0xFF,))


def cause(trouble: str, port: str, silent_s: float) -> str:
    silent = f"the program that drives the arm on {port} sent no heartbeat for {silent_s:.1f} s"
    return {
        SILENT: f"{silent} and was ended",
        UNENDING: f"{silent} and could not be ended: end it by hand before it goes on",
        GONE: f"the program that drove the arm on {port} ended without landing it",
        CALLED: f"the program could not switch the torque off on {port} itself",
    }[trouble]


def outcome(mode: str, left_on: list[int], alone: bool) -> str:
    if left_on:
        servos = ", ".join(map(str, left_on))
        return f"THE ARM MAY STILL BE POWERED: servo {servos} did not confirm that its torque is off. Hold the arm and switch its power supply off."
    if mode == "hold":
        return "The arm holds its last pose, as configured (disable_torque_on_disconnect=false): it is still powered."
    return "The torque is off on all servos." + ("" if alone else " Another program has the port open, and may switch it on again: end it.")


def _termios_error() -> tuple[type[Exception], ...]:
    import termios

    return (termios.error,)


if __name__ == "__main__":
    main(*sys.argv[1:4], [int(word) for word in sys.argv[4:]])
