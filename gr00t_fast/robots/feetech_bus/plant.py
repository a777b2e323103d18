"""What the servos move: nothing but themselves (`FreePlant`), or any arm that implements `Plant`, such as the MuJoCo scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError
from gr00t_fast.robots.feetech_bus.calibration import Calibration, from_units, to_units
from gr00t_fast.robots.feetech_bus.servo import Servo

MAX_STEP_S = 0.1  # after a stall of the machine the arm continues from here instead of leaping


class Plant(Protocol):
    """The mechanics behind six servos. Positions and targets are lerobot degrees, the gripper 0..100."""

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Let `dt_s` pass while each motor pulls towards its target (None: torque off). Returns the six positions."""


class FreePlant:
    """Motors that reach every set-point at once and stay where they are without torque."""

    def __init__(self, positions_deg: Sequence[float]) -> None:
        self.positions_deg = list(positions_deg)

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Each position becomes its target."""
        del dt_s
        pairs = zip(targets_deg, self.positions_deg, strict=True)
        self.positions_deg = [old if target is None else target for target, old in pairs]
        return list(self.positions_deg)


class Gearbox:
    """Joins servos and plant: encoder ticks on one side, lerobot's units on the other.

    The calibration of the start fixes how shafts sit on the arm. A later re-calibration changes registers, never the mechanics.
    """

    def __init__(self, servos: Sequence[Servo], calibration: Calibration, plant: Plant | None) -> None:
        self._servos = servos
        self._joints = [(joint, calibration[joint]) for joint in SO100_JOINTS]
        self.plant: Plant = plant or FreePlant([self._to_deg(i, servo.encoder) for i, servo in enumerate(servos)])
        self.advance(0.0)  # a plant has its own rest pose

    def advance(self, dt_s: float) -> None:
        """Move set-points, plant and feedback registers on by `dt_s`."""
        dt_s = min(dt_s, MAX_STEP_S)
        planned = [servo.plan(dt_s) for servo in self._servos]
        targets = [None if tick is None else self._to_deg(i, tick) for i, tick in enumerate(planned)]
        positions = self.plant.step(targets, dt_s)
        if len(positions) != len(self._servos):
            raise RobotError(f"the plant must return {len(self._servos)} positions, got {len(positions)}. Check its step().")
        for i, servo in enumerate(self._servos):
            servo.settle(self._to_encoder(i, positions[i]), dt_s)

    def push(self, index: int, degrees: float) -> None:
        """Turn a joint by hand, as far as its torque and the plant allow it (only a `FreePlant` can be moved so)."""
        if not isinstance(self.plant, FreePlant):
            raise RobotError("only the free-standing servos can be turned by hand; a simulated arm moves by its own physics.")
        self.plant.positions_deg[index] += degrees
        self.advance(0.0)

    def _to_deg(self, index: int, encoder: float) -> float:
        joint, values = self._joints[index]
        return to_units(joint, values, encoder - values.homing_offset)

    def _to_encoder(self, index: int, degrees: float) -> float:
        joint, values = self._joints[index]
        return from_units(joint, values, degrees) + values.homing_offset
