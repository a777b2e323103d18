"""Switching an arm's torque off, whatever state its bus is in. Nothing here raises: every step is tried, and what failed is reported.

lerobot's own `disconnect()` stops at the first servo that does not answer and leaves the rest holding; hence this sequence.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from gr00t_fast.robots.servo_link import ServoLink

BLIND_WRITES = 3  # a broadcast write is not acknowledged; three times, because a line bad enough to land for may lose one
TRIES_PER_MOTOR = 4
REOPEN_PAUSE_S = 0.01
SILENT_S = 0.03  # a line silent for so long has delivered its late answers, which would pass for acknowledgements of later requests
LONGEST_CHATTER_S = 0.4
_HELD_OFF = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP", "SIGALRM") if hasattr(signal, name))
_TIMER = getattr(signal, "SIGALRM", None)
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


@contextlib.contextmanager
def undisturbed(problems: list[str]) -> Iterator[None]:
    """Hold off Ctrl-C, SIGTERM and their like: an impatient second one must not leave motors holding. They are noted, then forgotten; so is the
    timer that repeats an earlier one (control/stop.py)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    def note(number: int, _frame: object) -> None:
        if number != _TIMER:
            problems.append(f"{signal.Signals(number).name} came while landing; the landing went on")

    before = {number: signal.getsignal(number) for number in _HELD_OFF if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


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
    problems.append(f"{bus.port} is gone: torque could NOT be switched off. Hold the arm and switch its power supply off.")
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
