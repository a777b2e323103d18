"""An arm on the virtual bus, for tests: how to make one, where its joints really are, and what must hold when it has landed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from control_fakes import FakeClock, FakePolicy, binding

from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.contracts import SO100_JOINTS, LandingReport, Observation
from gr00t_fast.base.errors import ArmAwayError, BusFault, MissedReadingError
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.control.loop import PATIENCE_S, ControlLoop, LoopOptions
from gr00t_fast.control.planner import Planner, PlannerOptions
from gr00t_fast.record.session import Session
from gr00t_fast.robots import SO100FollowerConfig
from gr00t_fast.robots.calibration import save_calibration, to_units
from gr00t_fast.robots.feetech import Register
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.virtual.bus import VirtualBus
from gr00t_fast.virtual.sim.simulation import RenderedCameras

OFF, ON = dict.fromkeys(SO100_JOINTS, 0), dict.fromkeys(SO100_JOINTS, 1)  # what `VirtualBus.torque` says


class PatientArm(SO100FollowerArm):
    """Looks again where an attempt fails in a way that may pass, as the control loop does."""

    def observe(self, with_frames: bool = True) -> Observation:
        return self._patiently(lambda: super(PatientArm, self).observe(with_frames))

    def send(self, targets: np.ndarray) -> None:
        """A goal that could not be sent is dropped; the next look finds the arm again."""
        try:
            super().send(targets)
        except (ArmAwayError, MissedReadingError):
            self.observe(False)

    def _patiently(self, look: Callable[[], Observation]) -> Observation:
        began_s, away_s, patience_s = time.monotonic(), np.inf, PATIENCE_S
        while True:
            try:
                return look()
            except MissedReadingError as error:
                if time.monotonic() - began_s > PATIENCE_S:
                    raise BusFault(str(error)) from error
            except ArmAwayError as error:
                away_s, patience_s = min(away_s, time.monotonic()), error.patience_s
                if time.monotonic() - away_s > patience_s:
                    raise BusFault(f"{error} It did not come back within {patience_s:g} s.") from error
                began_s = time.monotonic()
            self.check_stop()
            time.sleep(1 / 30)


def make_arm(bus: VirtualBus, directory: Path, kind: type[SO100FollowerArm] = SO100FollowerArm, **options: Any) -> SO100FollowerArm:
    """An arm whose calibration file agrees with the bus's servos; its other flags are the defaults that a user has, but for `options`."""
    save_calibration(bus.calibration, directory / "test.json")
    config = {"port": bus.port, "id": "test", "calibration_dir": directory, **options}
    return kind(SO100FollowerConfig(**config), RenderedCameras)


@contextlib.contextmanager
def connected(directory: Path, bus: VirtualBus | None = None, engaged: bool = True, **options: Any) -> Iterator[tuple[VirtualBus, SO100FollowerArm]]:
    """A bus (`bus`, which runs, or one of its own), and an arm on it that is connected and (`engaged`) switched on; landed at the end, and that is
    checked."""
    with contextlib.nullcontext(bus) if bus else VirtualBus() as bus:
        arm = make_arm(bus, directory, PatientArm, **options)
        arm.connect()
        try:
            if engaged:
                arm.reset()
            yield bus, arm
        finally:
            report = arm.land()
        assert_landed(bus, arm, report)


class Camera:
    """One of lerobot's, as the driver's code uses it."""

    thread = None

    def __init__(self, age_s: float = 0.0) -> None:
        self.is_connected, self._age_s = True, age_s

    @property
    def latest_timestamp(self) -> float:
        return time.perf_counter() - self._age_s

    def read_latest(self, max_age_ms: int) -> np.ndarray:
        if not self.is_connected:
            raise TimeoutError(f"no frame for {max_age_ms} ms")
        return np.zeros((32, 40, 3), np.uint8)

    def disconnect(self) -> None:
        self.is_connected = False


def power(bus: VirtualBus) -> None:
    """As an earlier program that held the arm has left it."""
    for servo in bus.servos:
        servo.set_word(Register.GOAL_POSITION, servo.position)
        servo.write(Register.TORQUE_ENABLE, b"\1")


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """What raises `error` whatever it is called with."""

    def call(*_: object, **named: object) -> NoReturn:
        raise error

    return call


def real_time_loop(
    arm: SO100FollowerArm, controller: str, options: dict[str, Any], stop: StopSignals, *rest: Any, **named: Any
) -> tuple[ControlLoop, FakePolicy]:
    """A loop that drives the arm in real time, and its policy. options: LoopOptions; the rest: what a ControlLoop takes behind the session."""
    policy, clock = FakePolicy(FakeClock(), cameras=()), MonotonicClock()
    horizon = 8 if controller == "sync" else None
    source = Planner(policy, binding({}), "go", clock, 30.0, PlannerOptions(controller, max_hold_s=0.5, action_horizon=horizon))
    source.warm_up()
    return ControlLoop(arm, source, LoopOptions(30.0, **options), clock, stop, Session(stop), *rest, **named), policy


def true_joints(bus: VirtualBus) -> np.ndarray:
    """Where the shafts are, in degrees and gripper per cent, asked behind the driver's back."""
    values = zip(SO100_JOINTS, bus.servos, strict=True)
    return np.array([to_units(joint, bus.calibration[joint], servo.position) for joint, servo in values])


def assert_landed(bus: VirtualBus, arm: SO100FollowerArm, report: LandingReport) -> None:
    """Torque register 0 on every servo the cable reaches, port closed, nothing still open on the terminal."""
    if bus.device is not None:
        assert bus.torque() == OFF
        assert descriptors_on(bus.device) == 1, "only the bus itself may still hold the terminal"
    assert report.port_closed
    assert report.cameras_closed
    assert arm.land() is report, "landing again is harmless"


def descriptors_on(device: str) -> int:
    """How many descriptors of this process are open on `device`."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{entry}") == device
    return count
