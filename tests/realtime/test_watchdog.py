"""What stops the interpreter must not leave a powered arm: runs in another process on the virtual servo bus, killed, frozen, crashed and hung."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")

from arm_bench import OFF, ON, make_arm
from waiting import PATIENCE_S, until

from gr00t_fast.base.errors import RobotError
from gr00t_fast.robots.calibration import save_calibration
from gr00t_fast.robots.feetech import Register
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.virtual.bus import VirtualBus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and processes as on Linux")

ROOT = Path(__file__).resolve().parents[2]
OFF_LIMIT_S, OFF_WHEN_FROZEN_S = 3.0, 4.0


class Program:
    """The program that runs scenarios, and what it and its watchdogs say."""

    def __init__(self, directory: Path) -> None:
        self.said = directory / "stderr"
        command = [sys.executable, str(ROOT / "tests" / "support" / "watchdog_arm.py")]
        with self.said.open("w") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=lambda: [self._lines.put(line.strip()) for line in self._process.stdout], daemon=True).start()

    def start(self, bus: VirtualBus, directory: Path, **scenario: Any) -> int:
        """Begin a run and return its process id."""
        save_calibration(bus.calibration, directory / "test.json")
        plain = {"controller": "sync", "phase": "none", "trouble": "none", "options": {}}
        self._process.stdin.write(json.dumps({"port": bus.port, "directory": str(directory), **plain, **scenario}) + "\n")
        return int(self.hear("pid").split()[1])

    def hear(self, beginning: str) -> str:
        """The next line that begins so."""
        return next(line for line in iter(lambda: self._lines.get(timeout=PATIENCE_S), None) if line.startswith(beginning))

    def words(self) -> list[str]:
        """The lines that it and its watchdogs have said."""
        return self.said.read_text().splitlines()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("program"))
    yield program
    program.close()


def stays_off(bus: VirtualBus) -> None:
    """No goal comes after the landing: on this servo each would switch the torque on."""
    goals = [servo.word(Register.GOAL_POSITION) for servo in bus.servos]
    time.sleep(0.3)
    assert bus.torque() == OFF
    assert [servo.word(Register.GOAL_POSITION) for servo in bus.servos] == goals


@pytest.mark.parametrize(
    ("trouble", "phase", "controller"),
    [
        pytest.param("segfault", "get_action", "threaded", marks=pytest.mark.slow),
        ("native", "reset", "sync"),
        ("gil", "get_action", "threaded"),
        ("gil", "land", "sync"),
    ],
)
def test_a_run_that_hangs_or_crashes_in_native_code(
    trouble: str, phase: str, controller: str, program: Program, bus: VirtualBus, tmp_path: Path
) -> None:
    """The hang begins with or after the line `ready`; that of `reset` as soon as the torque is on."""
    program.start(bus, tmp_path, controller=controller, trouble=trouble, phase=phase, timeout_s=1.0 if phase == "land" else None)
    if phase == "reset":
        until(lambda: bus.torque() == ON)
    else:
        program.hear("ready")
    pause_s = {"get_action": 16 / 30, "land": 1.0, "reset": 0.0}[phase]  # until the next inference, or the end of the episode
    until(lambda: bus.torque() == OFF, "torque off", pause_s + OFF_LIMIT_S)
    program.hear("ended")
    stays_off(bus)


@pytest.mark.slow
def test_random_kills_leave_no_powered_servo(program: Program, bus: VirtualBus, tmp_path: Path) -> None:
    """Any signal, SIGKILL and SIGSTOP first, at any moment from the first write on, with either controller.

    `GR00T_FAST_KILLS=200 pytest tests/realtime/test_watchdog.py -k random -s`
    """
    rng = random.Random(0)
    numbers = [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = len(program.words())
    for index in range(int(os.environ.get("GR00T_FAST_KILLS", "5"))):
        number, requests = numbers[index] if index < 2 else rng.choice(numbers), bus.requests
        pid = program.start(bus, tmp_path, controller=rng.choice(["sync", "threaded"]))
        until(lambda requests=requests: bus.requests > requests)
        time.sleep(rng.uniform(0.0, 0.8))
        os.kill(pid, number)
        was_on, killed_s = bus.torque() != OFF, time.monotonic()
        until(lambda: bus.torque() == OFF, "torque off", OFF_WHEN_FROZEN_S if number == signal.SIGSTOP else OFF_LIMIT_S)
        print(f"{number.name}: off after {time.monotonic() - killed_s:.2f} s")
        if number == signal.SIGSTOP and not was_on:  # frozen before its first heartbeat, perhaps: then nobody ends it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.hear("ended")
        stays_off(bus)
    said = program.words()[before:]
    assert [line for line in said if not (line.startswith("watchdog: ") and "off on all servos" in line)] == []


def test_an_arm_that_is_to_hold_is_held(program: Program, bus: VirtualBus, tmp_path: Path) -> None:
    before = len(program.words())
    pid = program.start(bus, tmp_path, options={"disable_torque_on_disconnect": False})
    program.hear("ready")
    bus.inject("blocked:servo=2,side=1")  # the targets rise: it falls behind
    blocked = bus.servos[1]
    until(lambda: blocked.word(Register.GOAL_POSITION) - blocked.position > 20)
    os.kill(pid, signal.SIGKILL)
    program.hear("ended")
    until(lambda: any("still powered" in line for line in program.words()[before:]))
    requests = bus.requests
    time.sleep(0.3)
    assert bus.torque() == ON
    assert bus.requests == requests, "nobody writes any more"
    assert all(abs(servo.word(Register.GOAL_POSITION) - servo.position) <= 3 for servo in bus.servos[:5]), "no joint pushes on"


def test_a_watchdog_never_speaks_while_the_program_lives(program: Program, bus: VirtualBus, tmp_path: Path) -> None:
    before = program.words()
    program.start(bus, tmp_path, timeout_s=1.2)
    program.hear("ready")
    assert program.hear("ended") == "ended 0"
    stays_off(bus)
    assert not _watchdogs(bus), "it ends with the run"
    assert program.words() == before


def beating(bus: VirtualBus, directory: Path, **options: Any) -> SO100FollowerArm:
    """An arm that is switched on, and whose control loop beats."""
    arm = make_arm(bus, directory, **options)
    arm.connect()
    arm.keep_alive()
    arm.reset()
    arm.keep_alive()
    return arm


@pytest.mark.slow
def test_a_watchdog_that_is_frozen_ends_the_run_but_not_a_machine_that_stood_still(bus: VirtualBus, tmp_path: Path) -> None:
    arm = beating(bus, tmp_path)
    (pid,) = _watchdogs(bus)

    def loop(for_s: float) -> None:
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s:
            arm.keep_alive()
            time.sleep(1 / 30)

    loop(0.2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.0)  # both stand still
    os.kill(pid, signal.SIGCONT)
    loop(0.3)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RobotError, match="watchdog.*frozen"):
        loop(2.0)
    assert arm.land().safe
    assert bus.torque() == OFF
    assert not _watchdogs(bus)


@pytest.mark.slow
def test_a_watchdog_keeps_the_port_from_the_next_run_while_it_works(program: Program, bus: VirtualBus, tmp_path: Path) -> None:
    pid = program.start(bus, tmp_path)
    program.hear("ready")
    bus.inject("silent:servo=3")
    os.kill(pid, signal.SIGKILL)
    program.hear("ended")
    refusals = []

    def over() -> bool:
        with open(bus.port, "rb", buffering=0) as rival:
            try:
                fcntl.flock(rival, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refusals.append(True)
        return not _watchdogs(bus)

    until(over)
    assert len(refusals) > 10
    assert "servo 3 did not confirm" in program.words()[-1]


def test_it_can_be_switched_off_and_an_arm_without_a_loop_owes_no_beats(bus: VirtualBus, tmp_path: Path) -> None:
    arm = beating(bus, tmp_path, watchdog_s=None)
    assert not _watchdogs(bus)
    arm.land()
    arm = make_arm(bus, tmp_path, watchdog_s=0.5)
    arm.connect()
    arm.reset()
    time.sleep(1.2)
    arm.send(arm.observe().joints)
    assert bus.torque() == ON
    assert arm.land().safe


def _watchdogs(bus: VirtualBus) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if bus.port in words and any(word.endswith("robots/watchdog.py") for word in words):
            found.append(int(directory.name))
    return found
