"""What may be sent to the arm: limits on every target (range, speed, following error, blocked joints, NaN), and slow moves to a pose, whose targets
pass through them too. Pure functions of numbers: no clock, no bus.

Axis alphabet of this file: J joints of the arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, MotorLoads, Robot
from gr00t_fast.base.errors import ConfigError, PreflightError, UnsafeActionError, check_ranges
from gr00t_fast.base.flags import setting

# One and a half times the fastest change of a target seen in a public recording of a real SO-101 (7.7 units per tick at 30 Hz), rounded up: clips no
# ordinary motion, and turns a leap between two chunks into a ramp about as steep as an STS3215 can turn (270 to 290 degrees a second without load).
DEFAULT_MAX_SPEED_DEG_S = 350.0
RECORDED_SPEED_TIMES = 1.5
# That is faster than a servo turns: a first target far away would be a leap. After a start and after a gap the limit grows from the speed of a slow
# move to its maximum, in this time from the first target on (ros2_control bounds a step by the present speed and an acceleration: the same idea).
SPEED_UP_S = 1.0
# A third of a second at 30 Hz: long enough for one bad inference of 8 actions, short enough not to look like a fault of the arm.
MAX_HELD_TICKS = 10
HOME_SPEED_DEG_S = 30.0  # of slow moves: a third of a turn in four seconds, slow enough to see where it goes
# How far a goal may be ahead of a joint that stands still: one that is held up would otherwise wind its goal ahead and leap when it is free. One that
# moves lags: real arms follow 0.13 to 0.2 s behind, and readings are up to a tick old. The rest of a larger step follows as the joint comes after.
DEFAULT_MAX_FOLLOWING_ERROR_DEG = 15.0
LAG_S = 0.3
STEP_SHARE = 0.9  # of the step that the arm lets through: it reads its joints anew, and an encoder's step is no reason to change the goal
SHORTEST_S = 0.02  # between two readings that tell a speed: over less, the encoder's steps (0.09 degrees) would pass for one
GRIPPER = "gripper"  # stalls against what it holds, and lerobot halves its torque

ARRIVED_DEG = 3.0  # gravity and friction leave a servo so far from its goal
STILL_DEG = 1.0
FREE_DEG = 3.0  # so far towards its goal, a blocked joint moves again
BLOCKED_WARN_S, BLOCKED_END_S = 2.0, 5.0  # without readings of the motors' push; with them a joint is found sooner
# A joint that stands still before its goal and pushes, or draws, so much is blocked. An STS3215 drives its motor with gain * 0.166 per radian of
# error (Rhoban's project bam, with an oscilloscope): at lerobot's gain of 16 a goal that is ahead by the following error limit of 15 degrees makes
# 70 %, and its own protection trips at 80 % for 2 s. An SO-101 stretched out level, the worst case of gravity, needs about 45 % (0.39 kg, centre at
# 0.22 m, of 1.9 Nm at 7.4 V: an estimate, no arm was measured). The current is 60 % of the servo's stall current (2.4 to 2.7 A).
STALL_LOAD_PERCENT, STALL_CURRENT_MA = 60.0, 1500.0


@dataclass(frozen=True)
class SafetyOptions:
    """What is limited besides NaN and the calibrated range; fields are flags. None switches a limit off.

    recorded_units_s: the fastest that each joint's target changed in the recordings (J,), joint units a second: where the speed limit is "auto",
    RECORDED_SPEED_TIMES the fastest of them is the limit if that is less than 350 degrees a second.
    """

    max_speed_deg_s: float | Literal["auto"] | None = "auto"  # how fast targets may change; auto: 350, with --recordings less; null: no limit
    max_following_error_deg: float | None = DEFAULT_MAX_FOLLOWING_ERROR_DEG  # how far a goal may be ahead of a joint at rest; null: no limit
    # A start from rest takes 0.2 s; a suspect is asked every 0.4 s, so that it is found within 1.2 s.
    stall_after_s: float | None = 0.7  # how long it is blocked before it is held where it stands; null: no protection
    recorded_units_s: tuple[float, ...] | None = setting(None, flag=False)

    def __post_init__(self) -> None:
        """Raises ConfigError for what makes no sense, generously: beyond, the arm would stand still or push for days."""
        check_ranges(self, max_speed_deg_s=(1.0, 1e4), max_following_error_deg=(1.0, 360.0), stall_after_s=(0.05, 60.0))

    def speed_limit_deg_s(self, units_per_deg: np.ndarray) -> float:
        """Degrees of the shaft a second; infinite without a limit."""
        if self.max_speed_deg_s is None:
            return np.inf
        if self.max_speed_deg_s != "auto":
            return self.max_speed_deg_s
        fastest_deg_s = 0.0 if self.recorded_units_s is None else float(np.max(self.recorded_units_s / units_per_deg))
        return min(DEFAULT_MAX_SPEED_DEG_S, RECORDED_SPEED_TIMES * fastest_deg_s or np.inf)


class Limits:
    """Passes targets on, changed as little as safety asks, and counts every change: `read` what was measured, `apply` once a tick.

    held_ticks: targets with NaN or infinity, replaced by the last goal. clamped, speed_limited, following_limited: int64 (J,), in how many ticks each
    joint's target was changed. blocked: which joints are, and were. wanted: (J,) the last target within the calibrated range.
    """

    def __init__(
        self,
        robot: Robot,
        options: SafetyOptions,
        period_s: float,
        slow_deg_s: float = HOME_SPEED_DEG_S,
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`robot`: its joints, their range and scale, and how far from a joint it lets its goal be; connected. `period_s` between two ticks;
        `slow_deg_s` the speed limit right after a start; `echo` gets a line about a joint that is blocked. Raises ConfigError when the range makes no
        sense."""
        self.options, self.joint_names, self._period_s = options, robot.joint_names, period_s
        joint_names, max_step = robot.joint_names, robot.max_step
        self._limits = np.array(robot.joint_limits, np.float64)
        if self._limits.shape != (len(joint_names), 2) or not (np.isfinite(self._limits).all() and (self._limits[:, 0] < self._limits[:, 1]).all()):
            raise ConfigError(
                f"joint limits must be finite pairs (low, high) for {', '.join(joint_names)}, got {self._limits.tolist()}. Calibrate the arm again."
            )
        self._units_per_deg = np.asarray(robot.units_per_deg, np.float64)
        self.max_speed_deg_s = self.options.speed_limit_deg_s(self._units_per_deg)
        self._slow_deg_s = min(slow_deg_s, self.max_speed_deg_s)
        self._following_deg = self.options.max_following_error_deg
        self._arms_own = np.inf if max_step is None else STEP_SHARE * max_step
        self.blocked = BlockedJoints(joint_names, self.options, self._units_per_deg, echo)
        self.held_ticks = 0
        self.clamped, self.speed_limited, self.following_limited = np.zeros((3, len(joint_names)), np.int64)
        self._last: np.ndarray | None = None

    @property
    def last(self) -> np.ndarray:
        """The last goal that was let through (J,), or the measured pose at `start`. Raises RuntimeError before `start`."""
        if self._last is None:
            raise RuntimeError("Limits.start(measured) must come before the first target")
        return self._last.copy()

    def protect(self) -> None:
        """For the move before the torque goes off, which nobody may be watching: following error and stall protection are on, also where they were
        switched off, and a joint that is blocked does not end it (`Move` has an end in time)."""
        self._following_deg = self._following_deg or DEFAULT_MAX_FOLLOWING_ERROR_DEG
        self.blocked.after_s = self.options.stall_after_s or SafetyOptions.stall_after_s
        self.blocked.ends_run = False

    def start(self, measured: np.ndarray, goal: np.ndarray | None = None) -> None:
        """Begin at the measured pose (J,): the first target is limited, or held, relative to it, or to the `goal` (J,) that the motors still have (a
        gripper squeezes what it holds). Raises UnsafeActionError."""
        measured = self._checked_shape(measured, "the measured pose")
        if not np.isfinite(measured).all():
            raise UnsafeActionError(f"the arm reports the pose {measured.tolist()}, which is not finite; nothing was sent. Check the bus.")
        self.wanted = self._goal = self._last = measured if goal is None else goal  # wanted, within the speed limit, sent
        self._measured, self._measured_s = measured, -np.inf
        self._speed = np.zeros_like(measured)  # joint units a second
        self._speed_from, self._speed_from_s = measured, -np.inf
        self._held_in_a_row = 0
        self.blocked.reset()
        self.slow_start()

    def start_anew(self, measured: np.ndarray) -> None:
        """As `start`, after a gap: a gripper that is near its goal keeps it, for it may hold something."""
        last = measured if self._last is None else self._last
        near = np.abs(last - measured) < DEFAULT_MAX_FOLLOWING_ERROR_DEG * self._units_per_deg
        gripper = np.array([name == GRIPPER for name in self.joint_names])
        self.start(measured, np.where(gripper & near, last, measured))

    def stay(self) -> None:
        """What was wanted is over: the last goal is."""
        self.wanted = self._goal = self.last

    def take_back(self, last: np.ndarray) -> None:
        """What `apply` gave last did not reach the arm, whose goal is still `last` (J,)."""
        self._last = last

    def slow_start(self) -> None:
        """From the next target on the speed limit grows from the slow one to its maximum, in SPEED_UP_S."""
        self._moving_ticks = 0

    def read(self, joints: np.ndarray, time_s: float, loads: MotorLoads | None = None) -> None:
        """Take note of the pose (J,) measured at `time_s`: goals stay within the following error of it. With `loads` a blocked joint is found."""
        if self._last is None:
            return
        measured = self._checked_shape(joints, "the measured pose")
        if time_s - self._speed_from_s >= SHORTEST_S:
            self._speed = (measured - self._speed_from) / (time_s - self._speed_from_s)  # 0 for the first one
            self._speed_from, self._speed_from_s = measured, time_s
        self._measured, self._measured_s = measured, time_s
        if loads is not None:
            found = self.blocked.find(measured, self._last, loads, time_s)
            self._goal, self._last = np.where(found, measured, self._goal), np.where(found, measured, self._last)

    def apply(self, target: np.ndarray | None) -> np.ndarray:
        """The goal (J,) float64 that may be sent in this tick for a target (J,); None: for the last one.

        Raises UnsafeActionError for a wrong shape, when more than MAX_HELD_TICKS targets in a row were not finite, and when a joint has been
        blocked for BLOCKED_END_S.
        """
        last = self.last
        if target is not None:
            target = self._checked_shape(target, "a target")
            if not np.isfinite(target).all():
                return self._hold(target)
            self._held_in_a_row = 0
            inside = target.clip(self._limits[:, 0], self._limits[:, 1])
            self.clamped += inside != target
            self.wanted = inside
        self._moving_ticks += target is not None or self._moving_ticks > 0
        wanted = self.wanted = self.blocked.hold(self.wanted)
        step = self._speed_limit_deg_s() * self._period_s * self._units_per_deg  # (J,) joint units a tick
        too_fast = np.abs(wanted - last) > step
        self.speed_limited += too_fast
        self._goal = np.where(too_fast, last + np.copysign(step, wanted - last), wanted)  # the others exactly, without the rounding of a sum
        self._last = sent = self._within_reach(self._goal)
        self.following_limited += sent != self._goal
        if math.isfinite(self._measured_s) and self._following_deg is not None:
            far = np.abs(wanted - self._measured) > self._following_deg * self._units_per_deg
            self.blocked.watch(self._measured, wanted, far & (sent != self._goal), self._measured_s)
        return sent.copy()

    def _speed_limit_deg_s(self) -> float:
        share = self._moving_ticks * self._period_s / SPEED_UP_S
        if share >= 1 or math.isinf(self.max_speed_deg_s):
            return self.max_speed_deg_s
        return self._slow_deg_s + (self.max_speed_deg_s - self._slow_deg_s) * share

    def _hold(self, target: np.ndarray) -> np.ndarray:
        self.held_ticks += 1
        self._held_in_a_row += 1
        if self._held_in_a_row > MAX_HELD_TICKS:
            bad = [name for name, value in zip(self.joint_names, target, strict=True) if not np.isfinite(value)]
            raise UnsafeActionError(
                f"the policy returned NaN or infinite targets for {', '.join(bad)} in {self._held_in_a_row} ticks in a row "
                f"(held at most {MAX_HELD_TICKS}); none was sent. "
                "Check the checkpoint and its statistics, or try --precision=fp32."
            )
        return self.last

    def _within_reach(self, goal: np.ndarray) -> np.ndarray:
        """Bound the following error, and what the arm would cut off by itself."""
        most = self._arms_own
        if self._following_deg is not None:
            lag = np.maximum(0.0, self._speed * np.sign(goal - self._measured)) * LAG_S  # while it moves towards its goal
            most = np.minimum(self._following_deg * self._units_per_deg + lag, most)
        return goal.clip(self._measured - most, self._measured + most)

    def _checked_shape(self, values: np.ndarray, what: str) -> np.ndarray:
        values = np.array(values, np.float64)
        if values.shape != (len(self.joint_names),):
            raise UnsafeActionError(f"{what} has shape {values.shape}, expected ({len(self.joint_names)},): one number per joint. Nothing was sent.")
        return values


class BlockedJoints:
    """Joints that do not come nearer to their goals. The gripper is exempt.

    Where the motors tell how hard they push (load or current), a joint that does so for a while, with its goal ahead of it, and stands still is held
    where it stands. (One that is sped up pushes hard and moves; one that carries a weight pushes hard and is near its goal; one that waits does not
    push.) Where they do not, or push less, a joint whose goal is held back and that makes no progress is warned of, and ends the run.

    held: bool (J,), which are held now. count, total_s: (J,), how often each was, and how long in all.
    """

    def __init__(self, joint_names: tuple[str, ...], options: SafetyOptions, units_per_deg: np.ndarray, echo: Callable[[str], None]) -> None:
        """`units_per_deg` (J,); `echo` gets a line when a joint is held, when it is free, and when it does not follow."""
        self.after_s, self.ends_run = options.stall_after_s, True
        self._names, self._echo = joint_names, echo
        self._ahead, self._still, self._free = (degrees * units_per_deg for degrees in (ARRIVED_DEG, STILL_DEG, FREE_DEG))
        self._judged = np.array([name != GRIPPER for name in joint_names])
        joints = len(joint_names)
        self.held, self._told = np.zeros((2, joints), bool)  # told: that it does not follow
        self.count: np.ndarray = np.zeros(joints, np.int64)
        self.total_s, self._began_s = np.zeros((2, joints))
        self._at, self._way = np.zeros((2, joints))  # where each stands still, and on which side its goal is
        self._hard_since_s, self._late_since_s = np.full((2, joints), np.nan)  # when it was first found pushing hard there, and held back
        self._late_at = np.zeros(joints)  # where each was when it last made progress
        self.reset()

    def reset(self) -> None:
        """The arm begins anew from where it is: nothing is held, and readings so far prove nothing."""
        self._release(self.held, "the arm begins anew")
        self._hard_since_s[:] = self._late_since_s[:] = np.nan
        self._read_s = np.full(len(self._names), np.inf)  # that what is read first is not new
        self._now_s = np.nan

    def find(self, measured: np.ndarray, goal: np.ndarray, loads: MotorLoads, now_s: float) -> np.ndarray:
        """`measured` and `goal` (J,) at `now_s`. Returns which joints (J,) have just been found blocked: their goal is to be where they stand."""
        self.total_s[self.held] += now_s - self._now_s
        self._now_s = now_s
        self._release(self.held & (self._way * (measured - self._at) >= self._free), "it moves")
        way = np.sign(goal - measured)
        pushing = np.abs(goal - measured) >= self._ahead
        same = pushing & (way == self._way) & (np.abs(measured - self._at) < self._still)
        begins = ~same & ~self.held
        self._at, self._way = np.where(begins, measured, self._at), np.where(begins, way, self._way)
        self._hard_since_s[begins] = np.nan
        if self.after_s is None:
            return np.zeros_like(self.held)
        # An old reading says nothing about the present: only those that are new since the last look count, and it takes two.
        new = loads.time_s > np.where(np.isnan(self._read_s), -np.inf, self._read_s)
        self._read_s = loads.time_s
        hard = (loads.percent >= STALL_LOAD_PERCENT) | (loads.current_ma >= STALL_CURRENT_MA)
        self._hard_since_s[new & ~hard] = np.nan
        suspect = new & hard & pushing
        self._hard_since_s = np.where(suspect & np.isnan(self._hard_since_s), loads.time_s, self._hard_since_s)
        found = suspect & self._judged & ~self.held & (loads.time_s - self._hard_since_s >= self.after_s)
        for index in np.flatnonzero(found):
            self._hold(index, measured[index], goal[index], loads, now_s)
        return found

    def hold(self, target: np.ndarray) -> np.ndarray:
        """The target (J,) with held joints where they stand; one whose target is on the other side of that follows it again."""
        self._release(self.held & (self._way * (target - self._at) < 0), "its target turned back")
        return np.where(self.held, self._at, target)

    def watch(self, measured: np.ndarray, target: np.ndarray, limited: np.ndarray, now_s: float) -> None:
        """`limited` (J,): which goals are held back, near the joint. Raises UnsafeActionError for a joint that has made no progress for
        BLOCKED_END_S."""
        progress = (measured - self._late_at) * np.sign(target - measured)
        begins = ~limited | np.isnan(self._late_since_s) | (progress >= self._free)
        self._late_at = np.where(begins, measured, self._late_at)
        self._late_since_s = np.where(begins, np.where(limited, now_s, np.nan), self._late_since_s)
        self._told &= ~begins
        for index in np.flatnonzero(self._judged & (now_s - self._late_since_s >= BLOCKED_WARN_S)):
            at = f"it is at {measured[index]:.1f} and shall go to {target[index]:.1f}"
            if now_s - self._late_since_s[index] >= BLOCKED_END_S and self.ends_run:
                raise UnsafeActionError(
                    f"joint {self._names[index]} has not followed its goal for {BLOCKED_END_S:g} s: {at}. Something blocks it, its motor is weak or "
                    "without power, or its reading is wrong. Free it, check servo and horn, and start again (--max_following_error_deg=null: no "
                    "limit)."
                )
            if not self._told[index]:
                self._told[index] = True
                self._echo(
                    f"WARNING: joint {self._names[index]} does not follow: {at}. Its goal is held within --max_following_error_deg of it; is it "
                    "blocked?"
                )

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
            self._echo(f"joint {self._names[index]} follows its target again after {self._now_s - self._began_s[index]:.1f} s: {why}")


# Slow moves to a pose, before and between episodes and before the torque goes off. No network has a part in them.

SETTLE_S = 1.0  # a servo trails its target by 0.13 to 0.2 s
SPEEDS_DEG_S = (1.0, 180.0)  # slower, a move would take minutes to hours; faster, it is no slow move
_SLOWEST = 0.2  # of the speed asked for
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
    home_speed_deg_s: float = HOME_SPEED_DEG_S  # how fast the arm moves to these poses

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
    """From wherever the last goal is to a pose, a step in each tick: first the body, all its joints arriving together, then the gripper, which may
    hold something that must not fall on the way."""

    def __init__(self, pose: Pose, start: np.ndarray, robot: Robot, speed_deg_s: float, period_s: float) -> None:
        """`start` (J,): the last goal. `period_s` between two ticks."""
        self.pose, self._period_s = np.clip(np.array(pose, np.float64), robot.joint_limits[:, 0], robot.joint_limits[:, 1]), period_s
        step = speed_deg_s * period_s * robot.units_per_deg  # (J,)
        if robot.max_step is not None:
            step = np.minimum(step, robot.max_step / _TRAILS_S * period_s)
        self._near = ARRIVED_DEG * robot.units_per_deg
        self._body = np.array([name != GRIPPER for name in robot.joint_names])
        way = np.abs(self.pose - start)
        ticks = np.ceil(way / step - 1e-9)  # (J,)
        body_ticks = int(max(ticks[self._body], default=0))
        self.ticks = body_ticks + int(max(ticks[~self._body], default=0))
        self.most_ticks = math.ceil(_LONGEST_TIMES * self.ticks + _LONGEST_SLACK_S / period_s)
        # A joint that the limits hold back does not slow the others; one that was pushed off its way comes back.
        self._steps = np.maximum(way / max(1, body_ticks), _SLOWEST * step)
        self._steps[~self._body] = step[~self._body]
        self._moving = self._body  # (J,) bool: which joints do now
        self._played = self._settled = 0  # ticks: in all, and since no goal goes on
        self._before = start

    def next_target(self, last: np.ndarray) -> np.ndarray:
        """The target (J,) after `last`, which the limits may have held back."""
        self._played += 1
        return np.where(self._moving, last + np.clip(self.pose - last, -self._steps, self._steps), last)

    def away(self, measured: np.ndarray) -> np.ndarray:
        """Which joints (J,) are not there."""
        return np.abs(measured - self.pose) > self._near

    def over(self, last: np.ndarray, measured: np.ndarray, stalled: np.ndarray) -> bool:
        """Asked once a tick: whether the arm has arrived, or has had its time. A joint whose goal is still held back is waited for, but for `stalled`
        (J,) joints, which get no further, and a gripper whose goal stands still: it goes on holding what it holds."""
        reached = np.isclose(last, self.pose) | stalled
        ready = reached | (~self._body & (last == self._before))
        self._settled, self._before = (self._settled + 1 if ready[self._moving].all() else 0), last
        if (reached & ~self.away(measured))[self._moving].all() or self._settled * self._period_s > SETTLE_S:
            if self._moving is not self._body:
                return True
            self._moving, self._settled = ~self._body, 0
        return self._played >= self.most_ticks
