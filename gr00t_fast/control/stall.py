"""Blocked joints: found by how hard their motors push, held where they stand. Pure functions of numbers: no clock, no robot.

A joint is stalled when, for a while, its motor pushes hard (load or current), its goal lies ahead of it and it stands still. One that is sped up
pushes hard and moves; one that carries a weight pushes hard and is near its goal; one that waits stands still and does not push.

Axis alphabet of this file: J joints of the arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gr00t_fast.contracts import MotorLoads
from gr00t_fast.errors import ConfigError

# An STS3215 drives its motor with gain * 0.166 per radian of error (Rhoban's project bam, with an oscilloscope): at lerobot's gain of 16 a goal that
# is ahead by the following error limit of 15 degrees makes 70 %, and its own protection trips at 80 % for 2 s. An SO-101 stretched out level, the
# worst case of gravity, needs about 45 % (0.39 kg, centre at 0.22 m, of 1.9 Nm at 7.4 V: an estimate, no arm was measured).
DEFAULT_STALL_LOAD_PERCENT = 60.0
DEFAULT_STALL_CURRENT_MA = 1500.0  # 60 % of an STS3215's stall current (2.4 to 2.7 A)
DEFAULT_STALL_AFTER_S = 0.7  # a start from rest takes 0.2 s; a suspect is asked every 0.4 s, so that it is found within 1.2 s
AHEAD_DEG = 3.0  # gravity and friction leave a servo so far from its goal
STILL_DEG = 1.0
FREE_DEG = 3.0  # so far towards its goal, a stalled joint moves again
EXEMPT = "gripper"  # stalls against what it holds: that is its work, and lerobot halves its torque


@dataclass(frozen=True)
class StallOptions:
    """From which load or current on, and for how long, a joint that stands still is stalled. None: not judged by that; after_s None: never."""

    load_percent: float | None = DEFAULT_STALL_LOAD_PERCENT
    current_ma: float | None = DEFAULT_STALL_CURRENT_MA
    after_s: float | None = DEFAULT_STALL_AFTER_S

    def __post_init__(self) -> None:
        for name in ("load_percent", "current_ma", "after_s"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ConfigError(f"stall_{name} must be a positive number (or null for no limit), got {value}.")

    @property
    def enabled(self) -> bool:
        return self.after_s is not None and (self.load_percent is not None or self.current_ma is not None)


class StallWatch:
    """Finds stalled joints and holds them.

    held: bool (J,), which are stalled now. count, total_s: (J,), how often each was, and how long in all.
    """

    def __init__(self, joint_names: tuple[str, ...], options: StallOptions, units_per_deg: np.ndarray, echo: Callable[[str], None]) -> None:
        """`units_per_deg` (J,); `echo` is told when a stall begins and when it ends."""
        self._names, self._options, self._echo = joint_names, options, echo
        self._ahead, self._still, self._free = (degrees * units_per_deg for degrees in (AHEAD_DEG, STILL_DEG, FREE_DEG))
        self._load_percent = np.inf if options.load_percent is None else options.load_percent
        self._current_ma = np.inf if options.current_ma is None else options.current_ma
        self._judged = np.array([name != EXEMPT for name in joint_names])
        joints = len(joint_names)
        self.held: np.ndarray = np.zeros(joints, bool)
        self.count: np.ndarray = np.zeros(joints, np.int64)
        self.total_s = np.zeros(joints)
        self._at, self._way = np.zeros(joints), np.zeros(joints)  # where each stands still, and on which side its goal is
        self._hard_since_s = np.full(joints, np.nan)  # when it was first found pushing hard there
        self._began_s = np.zeros(joints)
        self.reset()

    def reset(self) -> None:
        """The arm begins anew from where it is: nothing is held, and readings so far prove nothing."""
        self._release(self.held, "the arm begins anew")
        self._hard_since_s[:] = np.nan
        self._read_s: np.ndarray | None = None
        self._now_s: float | None = None

    def judge(self, measured: np.ndarray, goal: np.ndarray, loads: MotorLoads, now_s: float) -> np.ndarray:
        """`measured` and `goal` (J,) at `now_s`. Returns which joints (J,) have just been found stalled: their goal is to be where they stand."""
        self._count_time(now_s)
        self._release(self.held & (self._way * (measured - self._at) >= self._free), "it moves")
        way = np.sign(goal - measured)
        pushing = np.abs(goal - measured) >= self._ahead
        same = pushing & (way == self._way) & (np.abs(measured - self._at) < self._still)
        begins = ~same & ~self.held
        self._at, self._way = np.where(begins, measured, self._at), np.where(begins, way, self._way)
        self._hard_since_s[begins] = np.nan
        if loads.time_s is self._read_s:
            return np.zeros_like(self.held)
        # An old reading says nothing about the present: only those that are new since the last look count, and it takes two.
        new = np.zeros_like(self.held) if self._read_s is None else (loads.time_s > self._read_s) | (np.isnan(self._read_s) & ~np.isnan(loads.time_s))
        self._read_s = loads.time_s
        hard = (loads.percent >= self._load_percent) | (loads.current_ma >= self._current_ma)
        self._hard_since_s[new & ~hard] = np.nan
        first = new & hard & pushing & np.isnan(self._hard_since_s)
        self._hard_since_s[first] = loads.time_s[first]
        after_s = self._options.after_s if self._options.enabled else np.inf
        found = new & hard & pushing & self._judged & ~self.held & (loads.time_s - self._hard_since_s >= after_s)
        for index in np.flatnonzero(found):
            self._hold(index, measured[index], goal[index], loads, now_s)
        return found

    def __call__(self, target: np.ndarray) -> np.ndarray:
        """The target (J,) with stalled joints where they stand; one whose target is on the other side of that follows it again."""
        self._release(self.held & (self._way * (target - self._at) < 0), "its target turned back")
        return np.where(self.held, self._at, target)

    def _hold(self, index: int, at: float, goal: float, loads: MotorLoads, now_s: float) -> None:
        self.held[index], self._at[index], self._began_s[index] = True, at, now_s
        self.count[index] += 1
        told = ((loads.percent[index], "% of its drive"), (loads.current_ma[index], "mA"))
        pushes = " and ".join(f"{value:.0f} {unit}" for value, unit in told if np.isfinite(value))
        self._echo(
            f"WARNING: joint {self._names[index]} is blocked: it stands at {at:.1f}, its goal is {goal:.1f}, and its motor pushes with {pushes}. "
            "It is held where it is until it moves or its target turns back; free it (--stall_after_s=null: push on)."
        )

    def _release(self, which: np.ndarray, why: str) -> None:
        for index in np.flatnonzero(which):
            self.held[index], self._hard_since_s[index] = False, np.nan
            for_s = 0.0 if self._now_s is None else self._now_s - self._began_s[index]
            self._echo(f"joint {self._names[index]} follows its target again after {for_s:.1f} s: {why}")

    def _count_time(self, now_s: float) -> None:
        if self._now_s is not None:
            self.total_s[self.held] += now_s - self._now_s
        self._now_s = now_s
