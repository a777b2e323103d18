"""Watches the error bits of the servos, which the driver's sync read hides.

Overload is survived: the servo limits its own force, and a gripper that holds a block may stay in it. Wrong voltage, heat, current or a
broken encoder that lasts ends the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import RobotError
from gr00t_fast.robots.servo_link import EXCHANGE_FAILED, LINK_LOST, ServoLink, error_names

log = logging.getLogger(__name__)

POLL_EVERY_S = 0.2  # one servo each time, so each is asked every 1.2 s; 0.2 ms on a direct line
SELDOM_AFTER = 3  # polls in a row without an answer; each costs 70 ms
SELDOM_S = 1.0  # from then on all servos are asked at once whether they hold, in the way that joint readings take
LONGEST_TROUBLE_S = 1.0
_OVERLOAD = 0x20


class ServoHealth:
    """Counts `servo_<error>` once per onset, logs it with the joint's name, and raises when it is serious and lasts."""

    def __init__(self, link: ServoLink, events: Counter[str]) -> None:
        self._link, self._events = link, events
        self._next_poll_s, self._next_joint = 0.0, 0
        self._missed = 0  # polls in a row
        self._known: dict[int, int] = {}
        self._since_s: dict[int, float] = {}

    def check(self, now_s: float, holding: bool) -> None:
        """Ask the next servo if it is time, then judge all error bits seen so far. `holding`: torque is meant to be on. Raises RobotError."""
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + (POLL_EVERY_S if self._missed < SELDOM_AFTER else SELDOM_S)
            self._poll(holding)
        for servo_id, bits in self._link.error_bits.items():
            self._judge(servo_id, bits | self._link.status_bits.get(servo_id, 0), now_s)

    def _poll(self, holding: bool) -> None:
        servo_id = self._next_joint + 1
        self._next_joint = servo_id % len(SO100_JOINTS)
        answered = self._answered(lambda: self._link.poll_status(servo_id))
        if answered and holding:
            self._demand_torque(servo_id)
        if self._missed >= SELDOM_AFTER and holding and self._answered(self._link.poll_torque):
            for each in range(1, len(SO100_JOINTS) + 1):
                self._demand_torque(each)
        self._missed = 0 if answered else self._missed + 1
        if not answered:
            self._events["status_poll_missed"] += 1
        if self._missed == SELDOM_AFTER:
            log.warning("the servos answer late or not at all for their status register; it is asked less often, their torque all the same")

    @staticmethod
    def _answered(poll: Callable[[], bool]) -> bool:
        try:
            return poll()
        except (*EXCHANGE_FAILED, *LINK_LOST):  # the next joint reading meets the same line, and handles it
            return False

    def _demand_torque(self, servo_id: int) -> None:
        """An overloaded servo may let go to protect itself; any other one without torque lost its power, and the next goal is a leap."""
        overload = (self._link.error_bits.get(servo_id, 0) | self._link.status_bits.get(servo_id, 0)) & _OVERLOAD
        if not self._link.torque[servo_id] and not overload:
            raise RobotError(
                f"servo {servo_id} ({SO100_JOINTS[servo_id - 1]}) lost its torque while it should hold: its supply dipped, or another program "
                "switched it off. Check the power supply (voltage, current, plug), put the arm upright and start the run again."
            )

    def _judge(self, servo_id: int, bits: int, now_s: float) -> None:
        joint = SO100_JOINTS[servo_id - 1]
        for name in error_names(bits & ~self._known.get(servo_id, 0)):
            self._events[f"servo_{name}"] += 1
            log.warning("servo %d (%s) reports %s", servo_id, joint, name)
        self._known[servo_id] = bits
        if not bits & ~_OVERLOAD:
            self._since_s.pop(servo_id, None)
        elif now_s - self._since_s.setdefault(servo_id, now_s) > LONGEST_TROUBLE_S:
            raise RobotError(
                f"servo {servo_id} ({joint}) reports {', '.join(error_names(bits))} for more than {LONGEST_TROUBLE_S:g} s. "
                "Check the supply voltage and that the joint moves freely, let it cool down, then switch its power off and on."
            )
