"""A process beside the program that takes the torque off when the program is killed, crashes, freezes or is stuck in native code.

`Watchdog` starts and feeds it. The process runs this file by itself, and imports nothing of this package:

    python -I watchdog.py PORT off|hold DIRECTORY ID [ID ...]      # DIRECTORY: where pyserial is

Standard input carries the heartbeat: little-endian float32, each the number of seconds within which the next one will come (infinity: at no time).
NaN dismisses the watchdog: the arm has landed. -1 asks it to go on with what the program could not do itself. -2 and a position for each servo, in
encoder steps, say where the arm is to be put down; -3, that it was found powered and is to be left so. The end of the input without NaN or -1 means
that the program is gone. "ready" on standard output once everything that is needed is loaded, and a byte for what is heard each time: so a watchdog
that is frozen is noticed.

When the program is gone, the arm is put down slowly if all servos answer and it is known where. Then, and at once when a heartbeat stays away, the
torque is taken off all servos: by a write to all of them, repeated, then read back from each; with `hold`, goals become where the joints stand. A
program that is still there but silent is killed first, else it would go on sending goals when it wakes up: each goal switches the torque on again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CALL, POSE, HOLD = -1.0, -2.0, -3.0

START_S = 10.0  # an interpreter on a machine that is busy
LOOK_S = 0.1  # meanwhile, between two looks at whether the run is to stop
BEAT_EVERY_S = 0.05  # a write costs some 5 us here and wakes the other process; a limit of a second needs no more
END_S = 1.0
# Frozen: so many heartbeats over so long without an answer. Not time alone, for a machine that stood still as a whole held up both.
UNANSWERED_S, UNANSWERED_BEATS = 1.5, 8


class Watchdog:
    """Watches from `start` to `end`. From the first `beat` on it expects one every `limit_s`; without any it only watches for the end of
    this process."""

    def __init__(self, port: str, limit_s: float | None, holds: bool) -> None:
        """limit_s: None for a watchdog that never starts. `holds`: the arm is to keep its pose when the program is gone
        (disable_torque_on_disconnect=false). Starts nothing."""
        self._port, self._limit_s, self._holds = port, limit_s, holds
        self._process: subprocess.Popen[bytes] | None = None
        self._expected = False  # whether there are to be heartbeats

    def start(self, check_stop: Callable[[], object]) -> None:
        """Returns once it watches; a second call does nothing. `check_stop` is called meanwhile. Raises RobotError when it does not watch within
        START_S."""
        from gr00t_fast.base.contracts import SO100_JOINTS
        from gr00t_fast.base.errors import require

        if self._process is not None or self._limit_s is None:
            return
        self._last_s, self._lives = -math.inf, True
        self._unanswered: list[float] = []  # when the beats since its last answer were sent
        if os.name != "posix":
            log.warning("there is no watchdog on this system: a program that is killed or crashes leaves the arm powered")
            return
        if os.getpid() == 1:
            log.warning(
                "this program is the first process of a container: when it crashes or hangs, the watchdog cannot help and the arm stays powered. "
                "Start the container with an init process (docker run --init)"
            )
        pyserial, mode = str(Path(require("serial", "robot").__file__).parent.parent), "hold" if self._holds else "off"
        command = [sys.executable, "-I", __file__, self._port, mode, pyserial, *(str(index + 1) for index in range(len(SO100_JOINTS)))]
        # a session of its own: what is typed in the terminal, and signals to the program's group, are not for it
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
            self._wait_until_ready(self._process, check_stop)
            for pipe in (self._process.stdin, self._process.stdout):
                os.set_blocking(pipe.fileno(), False)
        except BaseException:  # a signal, too: it must not take the end of its input for the end of this program
            if self._process is not None:
                self._process.kill()
            self.end()
            raise

    @staticmethod
    def _wait_until_ready(process: subprocess.Popen[bytes], check_stop: Callable[[], object]) -> None:
        from gr00t_fast.base.errors import RobotError

        give_up_s = time.monotonic() + START_S
        while not readable(process.stdout.fileno(), LOOK_S):
            check_stop()
            if time.monotonic() > give_up_s:
                raise RobotError(f"the watchdog process did not start within {START_S:g} s; the arm is not switched on without it. Try again.")
        if not process.stdout.read(64):
            raise RobotError("the watchdog process ended while it started (why stands above); the arm is not switched on without it.")

    def beat(self) -> bool:
        """Heartbeat of a control loop. Returns False once the watchdog process has ended, or no longer answers."""
        self._expected = True
        now_s = time.monotonic()
        if self._process is None:
            return True
        if now_s - self._last_s < BEAT_EVERY_S:
            return self._lives
        self._last_s = now_s
        self._lives &= self._write(self._limit_s)
        if self._process.stdout.read(4096):
            self._unanswered.clear()
        self._unanswered.append(now_s)
        self._lives &= len(self._unanswered) <= UNANSWERED_BEATS or now_s - self._unanswered[0] <= UNANSWERED_S
        return self._lives

    def lower_to(self, positions: list[int]) -> None:
        """Where the arm is to be put down when this process is gone: a position for each servo, in encoder steps; none: it holds where it stands."""
        if self._process is not None:
            self._write(*((POSE, *positions) if positions else (HOLD,)))

    def _write(self, *values: float) -> bool:
        """A message, whole or not at all: it is shorter than what a pipe takes at once. Returns whether somebody may read it."""
        try:
            os.write(self._process.stdin.fileno(), struct.pack(f"<{len(values)}f", *values))
        except OSError:
            return False
        return True

    def exchanging(self) -> None:
        """Heartbeat of an exchange with the servos, where heartbeats are expected. A watchdog that has ended is reported by `beat`, not here:
        landing exchanges, too."""
        if self._expected:
            self.beat()

    def end(self, powered: bool = False) -> None:
        """The arm has landed. `powered`: it could not be; the other process goes on trying for a while, a cable may be put back. Never raises."""
        process, self._expected = self._process, False
        if process is None:
            return
        self._write(CALL if powered else math.nan)
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        if powered:
            return
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def readable(descriptor: int, wait_s: float | None) -> bool:
    """Whether there is something to read within `wait_s` (None: wait for it)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if wait_s is None else math.ceil(1000 * wait_s)))


# From here on: the process itself.

BAUD_RATE = 1_000_000
TORQUE_REGISTER, GOAL_REGISTER, POSITION_REGISTER = 40, 42, 56  # Feetech's STS3215 memory table; the positions are words
READ, WRITE, SYNC_WRITE, BROADCAST = 0x02, 0x03, 0x83, 0xFE
DISMISSED, CALLED, GONE = "has landed it", "could not switch the torque off itself", "ended without landing it"  # what the program did
SILENT, UNENDING = "sent no heartbeat and was ended", "sent no heartbeat and could not be ended: end it by hand before it goes on"
SECOND_LOOK_S = 0.2  # a machine that stood still as a whole held up both: the program gets so long to say so
DEATH_S = 0.5  # a killed program has closed its files within milliseconds; one stuck in the kernel must not hold up the rest
PATIENCE_S = 5.0  # a port that is away gets so long to come back, a servo to answer
BLIND_WRITES = 5  # a broadcast write is not acknowledged
ANSWER_S = 0.03
SILENT_S = 0.5  # an arm in mid-air holds while a servo is asked again: one lost answer must not let go of it
LOCK_S = 0.05
# The slow move of an arm whose program is gone, in encoder steps (4096 a turn): 30 degrees a second, goals at most 15 degrees ahead of a joint.
MOVE_TICK_S, MOVE_STEPS_S, MOST_AHEAD, ARRIVED, MOVE_SETTLE_S = 1 / 30, 341.0, 170.0, 34, 1.0
PUT_DOWN = "The arm was moved down slowly. "
MESSAGE_S = 10  # a terminal that takes no text for so long does not get it


def main(port: str, mode: str, directory: str, ids: list[int]) -> None:
    """Wait, and act if need be."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # meant for the program, which ends this one
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    sys.path.append(directory)
    import serial  # noqa: F401 - before it is needed: a program that is in trouble may be on a disk that is, too

    os.set_blocking(1, False)  # a program that is busy does not read
    say(b"ready\n")
    trouble, pose = wait_for_trouble(len(ids))
    if trouble == DISMISSED:
        return
    if trouble == SILENT:
        with contextlib.suppress(ProcessLookupError):
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
        trouble = SILENT if has_ended(DEATH_S) else UNENDING
    mode = "hold" if trouble == GONE and pose == [] else mode
    lowered = bool(trouble == GONE and mode == "off" and pose) and lower(port, ids, pose)
    left_on, alone = release(port, ids, trouble == CALLED or lowered) if mode == "off" else stop_pushing(port, ids)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MESSAGE_S)
    with contextlib.suppress(OSError):
        os.write(2, f"watchdog: the program that drives the arm on {port} {trouble}. {PUT_DOWN * lowered}{outcome(mode, left_on, alone)}\n".encode())


def wait_for_trouble(servos: int) -> tuple[str, list[int] | None]:
    """What the program did, and where the arm is to be put down, a position for each of so many `servos`; empty: it holds; None: not known."""
    awaited_s, heard_s, pose = math.inf, time.monotonic(), None
    while True:
        wait_s = None if math.isinf(awaited_s) else max(0.0, heard_s + awaited_s - time.monotonic())
        if not (readable(0, wait_s) or readable(0, SECOND_LOOK_S)):
            return SILENT, pose
        data = os.read(0, 65536)
        if not data:
            return GONE, pose
        values = iter(struct.unpack(f"<{len(data) // 4}f", data))
        for value in values:
            if math.isnan(value) or value == CALL:
                return DISMISSED if math.isnan(value) else CALLED, pose
            if value in (POSE, HOLD):
                pose = [round(next(values)) for _ in range(servos if value == POSE else 0)]
            else:
                awaited_s, heard_s = value, time.monotonic()
        say(b".")


def say(words: bytes) -> None:
    with contextlib.suppress(OSError):  # the program is gone, or has not read for hours: its own pipe says the rest
        os.write(1, words)


def has_ended(limit_s: float) -> bool:
    """Whether no process can write to the input any more: then the program no longer holds the port either. The first process of a container
    cannot be killed from within."""
    end_s = time.monotonic() + limit_s
    while (left_s := end_s - time.monotonic()) > 0 and readable(0, left_s):
        if not os.read(0, 65536):
            return True
    return False


def opened(port: str) -> Any:
    import serial

    return serial.Serial(port, BAUD_RATE, timeout=0, write_timeout=0.5)


def release(port: str, ids: list[int], had: bool) -> tuple[list[int], bool]:
    """Torque off. Returns the ids of the servos that did not confirm it, and whether the port was ours alone. Ends when a new run takes the port,
    which it has once the port was given up by the program (`had`) or by this one."""
    give_up_s, left_on, alone = time.monotonic() + PATIENCE_S, ids, True
    while True:
        with contextlib.suppress(Exception), opened(port) as line:
            alone = locked(line)
            if had and not alone:
                break
            had = alone
            for _ in range(BLIND_WRITES):
                line.write(packet(BROADCAST, SYNC_WRITE, TORQUE_REGISTER, 1, *(value for servo in ids for value in (servo, 0))))
                time.sleep(0.002)
            left_on = [servo for servo in ids if register(line, servo, TORQUE_REGISTER) != 0]
        if not left_on or time.monotonic() > give_up_s:
            break
        time.sleep(0.02)
    return left_on, alone


def lower(port: str, ids: list[int], pose: list[int]) -> bool:
    """Move slowly to the `pose` (encoder steps), the last servo, the gripper, after the others. Returns False where the arm cannot be moved: the port
    is not ours, a servo does not answer or is without torque."""
    with contextlib.suppress(Exception), opened(port) as line:
        if locked(line, DEATH_S) and all(known(line, servo, TORQUE_REGISTER) == 1 for servo in ids):
            goals = [position(line, servo) for servo in ids]
            body, gripper = range(len(ids) - 1), range(len(ids) - 1, len(ids))
            return all(moved(line, ids, goals, pose, group) for group in (body, gripper))
    return False


def moved(line: Any, ids: list[int], goals: list[float], pose: list[int], group: range) -> bool:
    """Move the servos at the indices in `group`, which arrive together; `goals` (encoder steps) are kept up to date, never further from a joint than
    MOST_AHEAD. Returns False once a servo does not answer. A joint that is held up is not waited for longer than MOVE_SETTLE_S."""
    ways = {index: pose[index] - goals[index] for index in group}
    ticks = math.ceil(max(map(abs, ways.values())) / MOVE_STEPS_S / MOVE_TICK_S)
    begin_s = time.monotonic()
    for tick in range(1, ticks + math.ceil(MOVE_SETTLE_S / MOVE_TICK_S)):
        here = {index: position(line, ids[index]) for index in group}
        for index, way in ways.items():
            wanted = goals[index] + max(-abs(way) / max(1, ticks), min(abs(way) / max(1, ticks), pose[index] - goals[index]))
            goals[index] = max(here[index] - MOST_AHEAD, min(here[index] + MOST_AHEAD, wanted))
        if all(abs(here[index] - pose[index]) <= ARRIVED for index in group):
            return True
        words = (byte for index in group for byte in (ids[index], *max(0, round(goals[index])).to_bytes(2, "little")))
        line.write(packet(BROADCAST, SYNC_WRITE, GOAL_REGISTER, 2, *words))
        time.sleep(max(0.0, begin_s + tick * MOVE_TICK_S - time.monotonic()))
    return True


def position(line: Any, servo: int) -> int:
    """In encoder steps; bit 15 is the sign."""
    word = known(line, servo, POSITION_REGISTER, 2)
    return -(word & 0x7FFF) if word & 0x8000 else word


def known(line: Any, servo: int, address: int, length: int = 1) -> int:
    """As `register`, asked again for SILENT_S. Raises OSError when there is no answer."""
    end_s = time.monotonic() + SILENT_S
    while (value := register(line, servo, address, length)) is None:
        if time.monotonic() > end_s:
            raise OSError("a servo does not answer")
    return value


def locked(line: Any, wait_s: float = LOCK_S) -> bool:
    """Mark the port as ours, as every run does: a program that starts meanwhile is refused. The mark goes with a program that is ending."""
    import fcntl

    end_s = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(line.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end_s:
            return False
        time.sleep(0.002)


def stop_pushing(port: str, ids: list[int]) -> tuple[list[int], bool]:
    """The arm holds: goals become where the joints stand, for one that is held up shall not push for ever. The last servo is the gripper, which goes
    on holding what it holds. Returns as `release`."""
    with contextlib.suppress(Exception), opened(port) as line:
        for servo in ids[:-1] if locked(line) else ():
            position = register(line, servo, POSITION_REGISTER, 2)
            if position is not None and register(line, servo, TORQUE_REGISTER) == 1:  # a goal would switch on one that has let go
                line.write(packet(servo, WRITE, GOAL_REGISTER, *position.to_bytes(2, "little")))
                time.sleep(0.002)
    return [], True


def register(line: Any, servo: int, address: int, length: int = 1) -> int | None:
    """What the servo answers when asked; None when it does not."""
    while line.in_waiting:  # answers to the program's last requests
        line.reset_input_buffer()
        time.sleep(0.002)
    line.write(packet(servo, READ, address, length))
    heard, late, end_s = b"", False, time.monotonic() + ANSWER_S
    while not late:
        late = time.monotonic() >= end_s  # what came while this process was held up is read all the same
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


def outcome(mode: str, left_on: list[int], alone: bool) -> str:
    if left_on:
        servos = ", ".join(map(str, left_on))
        return f"THE ARM MAY STILL BE POWERED: servo {servos} did not confirm that its torque is off. Hold the arm and switch its power supply off."
    if mode == "hold":
        return "The arm holds its last pose, as configured (disable_torque_on_disconnect=false) or as it was found: it is still powered."
    return "The torque is off on all servos." + ("" if alone else " Another program has the port open, and may switch it on again: end it.")


if __name__ == "__main__":
    port, mode, directory, *ids = sys.argv[1:]
    main(port, mode, directory, list(map(int, ids)))
