"""The last gate before the motors. Pure: no clock, no robot, only numbers in and numbers out.

Axis alphabet of this file: J joints of the arm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr00t_fast.errors import ConfigError, UnsafeActionError

# 6 deg per tick is 180 deg/s at 30 Hz, two thirds of an STS3215's no-load speed (45 rpm, 0.22 s per 60 deg, by its data sheet): a choice,
# meant to let ordinary motion pass and to turn a leap between two chunks into a ramp. The gripper counts in per cent of its travel.
DEFAULT_MAX_STEP_DEG = 6.0
# A third of a second at 30 Hz: long enough for one bad inference of 8 actions, short enough that nobody wonders why the arm stands still.
DEFAULT_MAX_HELD_TICKS = 10


@dataclass(frozen=True)
class SafetyOptions:
    """What the gate does besides refusing NaN. `max_step_deg=None` switches the step limit off."""

    clamp_to_limits: bool = True
    max_step_deg: float | None = DEFAULT_MAX_STEP_DEG
    max_held_ticks: int = DEFAULT_MAX_HELD_TICKS


class SafetyFilter:
    """Passes targets on, changed as little as safety asks, and counts every change.

    held_ticks: targets with NaN or infinity, replaced by the last one sent.
    clamped, step_limited: int64 (J,), how often each joint's target was changed.
    """

    def __init__(self, limits: np.ndarray, joint_names: tuple[str, ...], options: SafetyOptions | None = None) -> None:
        """`limits` (J, 2), lowest and highest target in joint units. Raises ConfigError when limits or options make no sense."""
        self.options = options or SafetyOptions()
        self._limits = _checked_limits(limits, joint_names)
        step = self.options.max_step_deg
        if step is not None and not (np.isfinite(step) and step > 0):
            raise ConfigError(f"max_step_deg must be a positive number of degrees per tick (or null for no limit), got {step}.")
        if self.options.max_held_ticks < 0:
            raise ConfigError(f"max_held_ticks must not be negative, got {self.options.max_held_ticks}.")
        self.joint_names = joint_names
        self.held_ticks = 0
        self.clamped = np.zeros(len(joint_names), np.int64)
        self.step_limited = np.zeros(len(joint_names), np.int64)
        self._last: np.ndarray | None = None
        self._held_in_a_row = 0

    def start(self, measured: np.ndarray) -> None:
        """Begin an episode at the measured pose (J,): the first target is limited, or held, relative to it. Raises UnsafeActionError."""
        measured = self._checked_shape(measured, "the measured pose")
        if not np.isfinite(measured).all():
            raise UnsafeActionError(f"the arm reports the pose {measured.tolist()}, which is not finite; nothing was sent. Check the bus.")
        self._last = measured
        self._held_in_a_row = 0

    def __call__(self, target: np.ndarray) -> np.ndarray:
        """Return the target (J,) float64 that may be sent.

        Raises UnsafeActionError for a wrong shape, and when more than `max_held_ticks` targets in a row were not finite.
        """
        if self._last is None:
            raise RuntimeError("SafetyFilter.start(measured) must come before the first target")
        target = self._checked_shape(target, "a target")
        if not np.isfinite(target).all():
            return self._hold(target)
        self._held_in_a_row = 0
        self._last = self._step_limited(self._clamped(target))
        return self._last.copy()

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

    def _step_limited(self, target: np.ndarray) -> np.ndarray:
        """Limit the change against the last target sent. Comes after clamping and is not clamped again: an arm that starts outside its
        calibrated range is led back into it step by step instead of being thrown to the border."""
        step = self.options.max_step_deg
        if step is None:
            return target
        limited = self._last + np.clip(target - self._last, -step, step)
        changed = np.abs(target - self._last) > step
        self.step_limited += changed
        return np.where(changed, limited, target)  # the unchanged ones exactly, without the rounding of the sum

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
