"""Limits on every target before it is sent: range, speed, following error, stall, NaN. Pure functions of numbers: no clock, no robot.

Axis alphabet of this file: J joints of the arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from gr00t_fast.contracts import MotorLoads
from gr00t_fast.control.stall import StallOptions, StallWatch
from gr00t_fast.errors import ConfigError, UnsafeActionError

# One and a half times the fastest change of a target seen in a public recording of a real SO-101 (7.7 units per tick at 30 Hz), rounded up: clips no
# ordinary motion, and turns a leap between two chunks into a ramp about as steep as an STS3215 can turn (270 to 290 degrees a second without load).
DEFAULT_MAX_SPEED_DEG_S = 350.0
RECORDED_SPEED_TIMES = 1.5
# How far a goal may be ahead of a joint that stands still: one that is held up would otherwise wind its goal ahead and leap when it is free. One that
# moves lags: real arms follow 0.13 to 0.2 s behind, and readings are up to a tick old. The rest of a larger step follows as the joint comes after
# (`again`).
DEFAULT_MAX_FOLLOWING_ERROR_DEG = 15.0
LAG_S = 0.3
PROGRESS_DEG = 3.0  # a joint that comes so much nearer to its target is late, not blocked
SHORTEST_S = 0.02  # between two readings that tell a speed: over less, the encoder's steps (0.09 degrees) would pass for one
BLOCKED_WARN_S, BLOCKED_END_S = 2.0, 5.0  # stall protection, where there is one, comes first
GRIPPER = "gripper"  # stands still against what it holds: that is its work
# A third of a second at 30 Hz: long enough for one bad inference of 8 actions, short enough not to look like a fault of the arm.
DEFAULT_MAX_HELD_TICKS = 10


@dataclass(frozen=True)
class SafetyOptions:
    """What is limited besides NaN. None switches a limit off.

    recorded_units_s: the fastest that each joint's target changed in the recordings (J,), joint units a second: RECORDED_SPEED_TIMES the fastest of
    them limits the speed too, where that is less. stall: works where the robot measures how hard its motors push.
    """

    clamp_to_limits: bool = True
    max_speed_deg_s: float | None = DEFAULT_MAX_SPEED_DEG_S
    max_following_error_deg: float | None = DEFAULT_MAX_FOLLOWING_ERROR_DEG
    max_held_ticks: int = DEFAULT_MAX_HELD_TICKS
    recorded_units_s: tuple[float, ...] | None = None
    stall: StallOptions = field(default_factory=StallOptions)


class SafetyFilter:
    """Passes targets on, changed as little as safety asks, and counts every change.

    held_ticks: targets with NaN or infinity, replaced by the last one sent.
    clamped, speed_limited, following_limited: int64 (J,), how often each joint's target was changed. stall: which joints are blocked, and were.
    """

    def __init__(
        self,
        limits: np.ndarray,
        joint_names: tuple[str, ...],
        options: SafetyOptions | None = None,
        *,
        fps: float,
        units_per_deg: np.ndarray,
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`limits` (J, 2), lowest and highest target in joint units; `units_per_deg` (J,) how many of these a degree of the shaft is; `fps` targets a
        second; `echo` is told of a joint that is blocked. Raises ConfigError when limits or options make no sense."""
        self.options = options or SafetyOptions()
        self._limits = _checked_limits(limits, joint_names)
        self._fps, self._units_per_deg, self._echo = fps, np.asarray(units_per_deg, np.float64), echo
        self.options = self._with_recorded_speed()
        for name in ("max_speed_deg_s", "max_following_error_deg"):
            value = getattr(self.options, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number (or null for no limit), got {value}.")
        if self.options.max_held_ticks < 0:
            raise ConfigError(f"max_held_ticks must not be negative, got {self.options.max_held_ticks}.")
        self.joint_names = joint_names
        self.stall = StallWatch(joint_names, self.options.stall, self._units_per_deg, echo)
        self.held_ticks = 0
        self.clamped = np.zeros(len(joint_names), np.int64)
        self.speed_limited = np.zeros(len(joint_names), np.int64)
        self.following_limited = np.zeros(len(joint_names), np.int64)
        self._last: np.ndarray | None = None
        self._measured = np.zeros(len(joint_names))
        self._measured_s: float | None = None
        self._speed = np.zeros(len(joint_names))  # measured, joint units a second
        self._speed_from, self._speed_from_s = self._measured, -np.inf
        self._goal, self._target = np.zeros(len(joint_names)), np.zeros(len(joint_names))  # of this tick: within the speed limit, and before it
        self._blocked_since_s = np.full(len(joint_names), np.nan)
        self._blocked_at = np.zeros(len(joint_names))  # where each joint was when it last made progress
        self._told = np.zeros(len(joint_names), bool)  # that it does not follow
        self._held_in_a_row = 0
        self._ends_when_blocked = True

    def _with_recorded_speed(self) -> SafetyOptions:
        recorded, limit = self.options.recorded_units_s, self.options.max_speed_deg_s
        if recorded is None or limit is None or not np.any(recorded):
            return self.options
        return replace(self.options, max_speed_deg_s=min(limit, RECORDED_SPEED_TIMES * float(np.max(recorded / self._units_per_deg))))

    @property
    def last(self) -> np.ndarray:
        """The last target that was let through (J,), or the measured pose at `start`. Raises RuntimeError before `start`."""
        if self._last is None:
            raise RuntimeError("SafetyFilter.start(measured) must come before the last target")
        return self._last.copy()

    def protect(self) -> None:
        """For the move before the torque goes off, which nobody may be watching: following error and stall protection are on, also where they were
        switched off, and a joint that is blocked does not end it (`Move` has an end in time)."""
        self._ends_when_blocked = False
        self.options = replace(self.options, max_following_error_deg=self.options.max_following_error_deg or DEFAULT_MAX_FOLLOWING_ERROR_DEG)
        if not self.options.stall.enabled:
            self.options = replace(self.options, stall=StallOptions())
            self.stall = StallWatch(self.joint_names, self.options.stall, self._units_per_deg, self._echo)

    def start(self, measured: np.ndarray, goal: np.ndarray | None = None) -> None:
        """Begin an episode at the measured pose (J,): the first target is limited, or held, relative to it, or to the `goal` (J,) that the motors
        still have (a gripper squeezes what it holds). Raises UnsafeActionError."""
        measured = self._checked_shape(measured, "the measured pose")
        if not np.isfinite(measured).all():
            raise UnsafeActionError(f"the arm reports the pose {measured.tolist()}, which is not finite; nothing was sent. Check the bus.")
        self._measured = measured
        self._last = self._goal = self._target = measured if goal is None else goal
        self._measured_s, self._speed = None, np.zeros_like(measured)
        self._speed_from_s = -np.inf
        self._held_in_a_row = 0
        self._blocked_since_s[:] = np.nan
        self.stall.reset()

    def measured(self, joints: np.ndarray, time_s: float, loads: MotorLoads | None = None) -> bool:
        """Take note of the pose (J,) measured at `time_s`: goals stay within the following error of it. With `loads` a blocked joint is found.
        Returns whether the last goal should be another one now, `again`."""
        measured = self._checked_shape(joints, "the measured pose")
        if time_s - self._speed_from_s >= SHORTEST_S:
            self._speed = (measured - self._speed_from) / (time_s - self._speed_from_s)  # 0 for the first one
            self._speed_from, self._speed_from_s = measured, time_s
        self._measured, self._measured_s = measured, time_s
        if self._last is None:
            return False
        stalled = np.zeros(len(measured), bool) if loads is None else self.stall.judge(measured, self._last, loads, time_s)
        self._last, self._goal = np.where(stalled, measured, self._last), np.where(stalled, measured, self._goal)
        return bool(stalled.any()) or not np.array_equal(self._within_reach(self._goal), self._last)

    def again(self) -> np.ndarray:
        """The goal (J,) float64 of the last target once more, after a look between two: as near to it as the joints are by now. Raises
        UnsafeActionError as for a target."""
        self._last = self._within_reach(self._goal)
        self._watch_progress(self._last != self._goal)
        return self._last.copy()

    def __call__(self, target: np.ndarray) -> np.ndarray:
        """Return the target (J,) float64 that may be sent.

        Raises UnsafeActionError for a wrong shape, when more than `max_held_ticks` targets in a row were not finite, and when a joint has been
        blocked for BLOCKED_END_S.
        """
        if self._last is None:
            raise RuntimeError("SafetyFilter.start(measured) must come before the first target")
        target = self._checked_shape(target, "a target")
        if not np.isfinite(target).all():
            return self._hold(target)
        self._held_in_a_row = 0
        self._target = self.stall(self._clamped(target))
        self._goal = self._speed_limited(self._target)
        sent = self.again()
        self.following_limited += sent != self._goal
        return sent

    def _hold(self, target: np.ndarray) -> np.ndarray:
        self.held_ticks += 1
        self._held_in_a_row += 1
        if self._held_in_a_row > self.options.max_held_ticks:
            bad = [name for name, value in zip(self.joint_names, target, strict=True) if not np.isfinite(value)]
            raise UnsafeActionError(
                f"the policy returned NaN or infinite targets for {', '.join(bad)} in {self._held_in_a_row} ticks in a row "
                f"(held at most {self.options.max_held_ticks}, --max_held_ticks); none was sent. "
                "Check the checkpoint and its statistics, or try --precision=fp32."
            )
        return self._last.copy()

    def _clamped(self, target: np.ndarray) -> np.ndarray:
        if not self.options.clamp_to_limits:
            return target
        inside = np.clip(target, self._limits[:, 0], self._limits[:, 1])
        self.clamped += inside != target
        return inside

    def _speed_limited(self, target: np.ndarray) -> np.ndarray:
        """Limit the change against the last target sent. Comes after clamping and is not clamped again: an arm that starts outside its
        calibrated range is led back into it step by step instead of being thrown to the border."""
        if self.options.max_speed_deg_s is None:
            return target
        step = self.options.max_speed_deg_s / self._fps * self._units_per_deg  # (J,) joint units per tick
        limited = self._last + np.clip(target - self._last, -step, step)
        changed = np.abs(target - self._last) > step
        self.speed_limited += changed
        return np.where(changed, limited, target)  # the unchanged ones exactly, without the rounding of the sum

    def _within_reach(self, goal: np.ndarray) -> np.ndarray:
        """Bound the following error."""
        if self.options.max_following_error_deg is None:
            return goal
        lag = np.maximum(0.0, self._speed * np.sign(goal - self._measured)) * LAG_S  # while it moves towards its goal
        most = self.options.max_following_error_deg * self._units_per_deg + lag
        return np.clip(goal, self._measured - most, self._measured + most)

    def _watch_progress(self, limited: np.ndarray) -> None:
        if self._measured_s is None:
            return
        progress = (self._measured - self._blocked_at) * np.sign(self._target - self._measured)
        begins = ~limited | np.isnan(self._blocked_since_s) | (progress >= PROGRESS_DEG * self._units_per_deg)
        self._blocked_at = np.where(begins, self._measured, self._blocked_at)
        self._blocked_since_s = np.where(begins, np.where(limited, self._measured_s, np.nan), self._blocked_since_s)
        self._told &= ~begins
        for index in np.flatnonzero(~np.isnan(self._blocked_since_s)):
            if (name := self.joint_names[index]) == GRIPPER:
                continue
            for_s, at = (
                self._measured_s - self._blocked_since_s[index],
                f"it is at {self._measured[index]:.1f} and shall go to {self._target[index]:.1f}",
            )
            if for_s >= BLOCKED_END_S and self._ends_when_blocked:
                raise UnsafeActionError(
                    f"joint {name} has not followed its goal for {BLOCKED_END_S:g} s: {at}. Something blocks it, its motor is weak or without "
                    "power, or its reading is wrong. Free it, check servo and horn, and start again (--max_following_error_deg=null: no limit)."
                )
            if for_s >= BLOCKED_WARN_S and not self._told[index]:
                self._told[index] = True
                self._echo(f"WARNING: joint {name} does not follow: {at}. Its goal is held within --max_following_error_deg of it; is it blocked?")

    def _checked_shape(self, values: np.ndarray, what: str) -> np.ndarray:
        values = np.array(values, np.float64)
        if values.shape != (len(self.joint_names),):
            raise UnsafeActionError(f"{what} has shape {values.shape}, expected ({len(self.joint_names)},): one number per joint. Nothing was sent.")
        return values


def _checked_limits(limits: np.ndarray, joint_names: tuple[str, ...]) -> np.ndarray:
    limits = np.array(limits, np.float64)
    if limits.shape != (len(joint_names), 2) or not np.isfinite(limits).all() or (limits[:, 0] >= limits[:, 1]).any():
        raise ConfigError(
            f"joint limits must be finite pairs (low, high) for {', '.join(joint_names)}, got {limits.tolist()}. Calibrate the arm again."
        )
    return limits
