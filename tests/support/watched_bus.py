"""A virtual servo bus in a process of its own, which looks at its joints and their torque all the time: as independent of the tested program, and of
the time that the tests themselves take, as a servo bus is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from multiprocessing.managers import BaseManager
from pathlib import Path

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.robots.calibration import save_calibration, to_units
from gr00t_fast.robots.feetech import Register
from gr00t_fast.virtual.bus import VirtualBus

SAMPLE_S = 0.01
Sample = tuple[float, bool, np.ndarray]  # time on the monotonic clock, whether all joints have torque, where they are: (6,) degrees, gripper per cent


class WatchedBus:
    """Made by `started`; its methods are called from another process."""

    def __init__(self, directory: str, powered: tuple[int, ...] = ()) -> None:
        """Writes test.json, the calibration, into the directory. powered: ids of servos that hold from the start."""
        with contextlib.suppress(OSError):
            os.nice(-10)  # a servo does not wait for a busy machine
        self._bus = VirtualBus()
        save_calibration(self._bus.calibration, Path(directory) / "test.json")
        for servo in self._bus.servos:
            if servo.id in powered:
                servo.set_word(Register.GOAL_POSITION, servo.position)
                servo.write(Register.TORQUE_ENABLE, b"\1")
        self._bus.start()
        self._samples: list[Sample] = []
        self._goals: list[tuple[float, list[int]]] = []
        self._ended = False
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._ended:
            self._samples.append((time.monotonic(), all(self._bus.torque().values()), self.joints()))
            goals = [servo.word(Register.GOAL_POSITION) for servo in self._bus.servos]
            if not self._goals or goals != self._goals[-1][1]:
                self._goals.append((time.monotonic(), goals))
            time.sleep(SAMPLE_S)

    def port(self) -> str:
        return self._bus.port

    def joints(self) -> np.ndarray:
        """(6,) where the shafts are, in degrees and gripper per cent."""
        pairs = zip(SO100_JOINTS, self._bus.servos, strict=True)
        return np.array([to_units(joint, self._bus.calibration[joint], servo.position) for joint, servo in pairs])

    def goal_changes(self) -> list[tuple[float, list[int]]]:
        """When the goals of the servos changed, on the monotonic clock, and to what, in steps."""
        return self._goals

    def torque(self) -> dict[str, int]:
        return self._bus.torque()

    def inject(self, fault: str) -> None:
        self._bus.inject(fault)

    def unplug(self) -> None:
        self._bus.unplug()

    def replug(self) -> None:
        self._bus.replug()

    def fall(self, degrees: float) -> None:
        """The supply fails for a moment, and the arm sinks meanwhile."""
        self._bus.power_cycle()
        self._bus.push("shoulder_lift", degrees)

    def let_go(self, servo: int) -> None:
        """A servo loses its torque, and no goal switches it on again."""
        self._bus.servos[servo - 1].goal_enables_torque = False
        self._bus.servos[servo - 1].write(Register.TORQUE_ENABLE, b"\0")

    def close(self) -> list[Sample]:
        """All that was seen."""
        self._ended = True
        self._sampler.join()
        self._bus.close()
        return self._samples


class _Manager(BaseManager):
    pass


_Manager.register("WatchedBus", WatchedBus)


@contextlib.contextmanager
def started(directory: Path, powered: tuple[int, ...] = ()):
    """A WatchedBus in a new process."""
    from multiprocessing import get_context

    with _Manager(ctx=get_context("spawn")) as manager:
        yield manager.WatchedBus(str(directory), powered)
