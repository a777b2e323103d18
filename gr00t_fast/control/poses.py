"""Slow moves to a pose, before and between episodes and before the torque goes off: what may be asked for, and the next target on the way.

No network has a part in it. The targets pass through the same limits as a policy's. J joints of the arm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, Robot
from gr00t_fast.control.limits import GRIPPER
from gr00t_fast.errors import ConfigError, PreflightError, check_ranges

SETTLE_S = 1.0  # a servo trails its target by 0.13 to 0.2 s
ARRIVED_DEG = 3.0  # gravity and friction leave a servo so far from its goal
SPEEDS_DEG_S = (1.0, 180.0)  # slower, a move would take minutes to hours; faster, it is no slow move
_SLOWEST = 0.2  # of the speed asked for
MOVE_HZ = 30.0  # whatever rate the run has: at 2 Hz a slow move would be one of leaps, at 200 a slow line would let half of the ticks go by
_LONGEST_TIMES, _LONGEST_SLACK_S = 3.0, 6.0  # a move ends, also where a joint comes no nearer; a blocked one is noticed before (BLOCKED_END_S)
_TRAILS_S = 0.2  # behind its goal, of which an arm that cuts off larger steps lets through no more than one: that bounds its speed
_SLACK_DEG = 2.0  # a pose recorded at the end of a joint's travel may lie a little outside the calibrated range
Pose = Sequence[float]  # (J,) in the arm's units


@dataclass(frozen=True)
class Poses:
    """Where the arm goes without the network; fields are flags. None: nowhere. `home`: before and between episodes. `rest`: before the torque goes
    off; "start": to where the arm lay when the torque went on, for there it lies without, too (Robot.rest_pose). "recordings": where these begin."""

    home: Pose | str | None = None  # before each episode, move slowly to "[0, -90, 90, 60, 0, 10]" or where the `recordings` begin
    rest: Pose | str | None = "start"  # before the torque goes off; start: where it lay; or as --home, `home`, null
    # A third of a turn in four seconds: slow enough to see where it goes.
    home_speed_deg_s: float = 30.0  # how fast the arm moves to these poses

    def __post_init__(self) -> None:
        check_ranges(self, home_speed_deg_s=SPEEDS_DEG_S)
        for name, words in (("home", ("recordings",)), ("rest", ("start", "recordings", "home"))):
            pose = getattr(self, name)
            if isinstance(pose, str) and pose not in words:
                raise ConfigError(
                    f"--{name}={pose} is no known pose. Give six joint values, --{name}='[0, -90, 90, 60, 0, 10]', or {' or '.join(words)}."
                )
            if pose is not None and not isinstance(pose, str) and not (len(pose) == len(SO100_JOINTS) and all(map(math.isfinite, pose))):
                raise ConfigError(f"--{name}={list(pose)} needs {len(SO100_JOINTS)} finite numbers: {', '.join(SO100_JOINTS)}.")
        if self.rest == "home" and self.home is None:
            raise ConfigError("--rest=home needs --home=.")

    def resolved(self, begin: Pose | None) -> Poses:
        """With joint values instead of "recordings" and "home". `begin`: where the recordings begin, if there are any. Raises ConfigError."""
        if begin is None and "recordings" in (self.home, self.rest):
            raise ConfigError("--home=recordings and --rest=recordings need --recordings=DIR, the data set behind the checkpoint.")
        home = begin if self.home == "recordings" else self.home
        rest = begin if self.rest == "recordings" else home if self.rest == "home" else self.rest
        return replace(self, home=home, rest=rest)

    def check(self, limits: np.ndarray, joint_names: tuple[str, ...], units_per_deg: np.ndarray) -> None:
        """Raises PreflightError for a pose that the calibrated arm cannot take; `limits` (J, 2)."""
        for flag, pose in (("home", self.home), ("rest", self.rest)):
            if pose is None or isinstance(pose, str):
                continue
            slack = _SLACK_DEG * units_per_deg
            outside = [
                f"{name} {value:g}, calibrated {low:.0f} to {high:.0f}"
                for name, value, (low, high), more in zip(joint_names, pose, limits, slack, strict=True)
                if not low - more <= value <= high + more
            ]
            if outside:
                raise PreflightError(f"--{flag} lies outside what the arm can reach: {'; '.join(outside)}. Give another pose, in the arm's units.")


class Move:
    """From wherever the last target is to a pose, in MOVE_HZ steps a second or as many as the arm's line can take; all joints arrive together."""

    def __init__(self, pose: Pose, start: np.ndarray, robot: Robot, speed_deg_s: float) -> None:
        """`start` (J,): the last target."""
        self.pose = np.clip(np.array(pose, np.float64), robot.joint_limits[:, 0], robot.joint_limits[:, 1])
        step = speed_deg_s / MOVE_HZ * robot.units_per_deg  # (J,)
        if robot.max_step is not None:
            step = np.minimum(step, robot.max_step / _TRAILS_S / MOVE_HZ)
        self._near = ARRIVED_DEG * robot.units_per_deg
        way = np.abs(self.pose - start)
        self.ticks = int(np.ceil((way / step).max() - 1e-9))
        self._most_ticks = math.ceil(_LONGEST_TIMES * self.ticks + _LONGEST_SLACK_S * MOVE_HZ)
        # A joint that the limits hold back does not slow the others; one that was pushed off its way comes back.
        self._steps = np.maximum(way / max(1, self.ticks), _SLOWEST * step)
        self._played = self._settled = 0  # ticks: in all, and since no goal is held back
        self._body = np.array([name != GRIPPER for name in robot.joint_names])

    def next_target(self, last: np.ndarray) -> np.ndarray:
        """The target (J,) after `last`, which the limits may have held back."""
        self._played += 1
        return last + np.clip(self.pose - last, -self._steps, self._steps)

    def away(self, measured: np.ndarray) -> np.ndarray:
        """Which joints (J,) are not there."""
        return np.abs(measured - self.pose) > self._near

    def over(self, last: np.ndarray, measured: np.ndarray, stalled: np.ndarray) -> bool:
        """Asked once a tick: whether the arm has arrived, or has had its time. One whose goal is still held back is waited for, but for `stalled`
        (J,) joints, which get no further, and a gripper, which may go on holding what it holds."""
        reached = np.isclose(last, self.pose) | stalled
        arrived = bool(reached.all()) and not self.away(measured).any()
        self._settled = self._settled + 1 if reached[self._body].all() else 0
        return arrived or self._settled > SETTLE_S * MOVE_HZ or self._played >= self._most_ticks
