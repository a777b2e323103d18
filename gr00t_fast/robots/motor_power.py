"""Switches the motors on without a leap, and finds out whether they lost their torque behind our back.

A servo whose supply dips comes back without torque, and the next goal switches it on again: an arm that fell meanwhile would leap back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError
from gr00t_fast.robots.lerobot_glue import TICKS

FELL_DEG = 20.0  # motors found without torque are switched on again only if the arm moved less
# A servo clamps its goal to the calibrated range: one that stands outside is moved to the border at full speed as soon as it is switched on.
# So much, less than a tick of ordinary motion, is tolerated: readings and stops are not exact.
OUTSIDE_DEG = 4.0


class MotorPower:
    """The torque of one arm. `engaged` is whether this run has switched it on (or tried to)."""

    def __init__(self, follower: Any, units_per_deg: np.ndarray, events: Counter[str], how_to_calibrate: str) -> None:
        """Replaces the bus object's `enable_torque`; touches no hardware. units_per_deg: (6,), as in `JumpGuard`."""
        self._follower, self._fell, self._events = follower, FELL_DEG * units_per_deg, events
        self._how_to_calibrate = how_to_calibrate
        self._enable_torque = follower.bus.enable_torque
        follower.bus.enable_torque = self._hold_here  # lerobot's configure() ends with enable_torque()
        self.engaged = False

    def engage(self) -> None:
        """Configure the servos and hold the arm where it is. Raises what the driver raises."""
        self.engaged = True  # before the first write: whatever goes wrong in it, landing has motors to switch off
        self._follower.configure()

    def restore_if_lost(self, before: np.ndarray | None) -> bool:
        """Ask every motor whether it holds; if one does not, switch on again where the arm is, and return True.

        before: (6,) the joints while it still held. Raises RobotError when the arm moved further than FELL_DEG from there.
        """
        bus = self._follower.bus
        if not self.engaged or all(bus.sync_read("Torque_Enable").values()):
            return False
        now = bus.sync_read("Present_Position")
        if before is not None and np.any(np.abs(before - [now[joint] for joint in SO100_JOINTS]) > self._fell):
            raise RobotError(
                f"the servos lost power for a moment, and the arm moved more than {FELL_DEG:g} degrees. It is not switched on again by "
                "itself. Check the power supply (voltage, current, plug), put the arm upright and start the run again."
            )
        self._follower.configure()
        self._events["torque_restored"] += 1
        return True

    def _hold_here(self, motors: Any = None, num_retry: int = 0) -> None:
        """First make the present position the goal, else the arm leaps to an old one. Raises RobotError for a joint outside its calibrated range."""
        bus = self._follower.bus
        positions = bus.sync_read("Present_Position", normalize=False)
        self._check_inside(positions)
        for motor, position in positions.items():
            bus.write("Goal_Position", motor, position, normalize=False)
        self._enable_torque(motors, num_retry)

    def _check_inside(self, positions: dict[str, int]) -> None:
        outside = []
        for joint, position in positions.items():
            calibration = self._follower.bus.calibration[joint]
            beyond_deg = max(calibration.range_min - position, position - calibration.range_max) * 360 / TICKS
            if beyond_deg > OUTSIDE_DEG:
                outside.append(f"{joint} by {beyond_deg:.0f} degrees")
        if outside:
            raise RobotError(
                f"the arm stands outside its calibrated range: {', '.join(outside)}. Switching it on would throw it to the border, so it stays "
                "without power. Move the joint back into its range by hand and start again; if the range is wrong, calibrate again: "
                f"{self._how_to_calibrate}"
            )
