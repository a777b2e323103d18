"""Detects a camera whose pictures do not show what is: blank, noise, always the same one while the arm moves, or too old.

A camera that delivers nothing at all raises in the robot; these cases raise nothing by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import CameraError

CameraFault = Literal["warn", "land"]
CHECK_EVERY_S = 0.25
LASTS_S = 1.0  # blank or noise: a hand before the lens and a burst of interference pass
FROZEN_S = 2.0
OLD_S = 0.15  # at 30 Hz a policy sees pictures of up to 0.04 s; older ones show where the arm was four ticks ago
OLD_SHARE, OLD_AGAIN_SHARE = 0.2, 0.05  # of the newest pictures: one hiccup of half a second gives no warning
OLD_WEIGHT = 0.02  # of one picture in that share
MOVED = 5.0  # joint units; a sensor's noise, or at least the arm in the picture, changes some pixel meanwhile
DARK = 24  # of 255: a covered lens with the noise of an amplifier at its limit
PLAIN_DEVIATION = 1.5  # of each colour over the picture: even a white wall has corners that are darker
NOISE_DEVIATION = 20.0
NOISE_CORRELATION = 0.3  # at some small distance pixels of any picture agree (or alternate) by more; those of noise at none
LINES = 16  # whole rows and columns are looked at, so many of each: a grid of single pixels falls in step with patterns
SMALLEST = 64  # pixels a side; too little to judge a picture by

_WORDS = {
    "blank": ("is black or of one colour: the policy is blind on it", "Take the lens cap off, switch the light on, check exposure and cable"),
    "noise": ("shows noise: the policy is blind on it", "Check its cable and its pixel format (fourcc)"),
    "frozen": ("shows the same picture while the arm moves: the policy is blind on it", "Plug it in again"),
    "old": (
        f"often has no picture younger than {OLD_S} s: the policy acts on what was",
        "Check the light (long exposures), its rate, its fourcc (MJPG is quicker than YUYV over a hub), and the load of this machine",
    ),
}


@dataclass
class _Camera:
    frame: np.ndarray
    changed_s: float
    joints: np.ndarray  # when the frame last changed
    fault: str | None = None
    since_s: float = 0.0
    told: bool = False


class CameraWatch:
    """Looks at each camera every CHECK_EVERY_S; `events` counts `camera_<fault>` once per onset."""

    def __init__(self, action: CameraFault, echo: Callable[[str], None]) -> None:
        """`action`: warn says it, land raises CameraError."""
        self._action, self._echo = action, echo
        self._cameras: dict[str, _Camera] = {}
        self._next_s = -np.inf
        self._old_share: dict[str, float] = {}
        self._told_old: set[str] = set()
        self.events: Counter[str] = Counter()

    def __call__(self, observation: Observation) -> None:
        """After each observation. Raises CameraError with `land`."""
        for name, age_s in observation.frame_ages_s.items():
            self._judge_age(name, age_s)
        if observation.time_s < self._next_s:
            return
        self._next_s = observation.time_s + CHECK_EVERY_S
        for name, frame in observation.frames.items():
            if min(frame.shape[:2]) >= SMALLEST:
                self._look(name, frame, observation)

    def _judge_age(self, name: str, age_s: float) -> None:
        before = self._old_share.get(name, 0.0)
        share = self._old_share[name] = before + OLD_WEIGHT * ((age_s > OLD_S) - before)
        if share < OLD_AGAIN_SHARE:
            self._told_old.discard(name)
        elif share > OLD_SHARE and name not in self._told_old:
            self._told_old.add(name)
            self._tell(name, "old")

    def _look(self, name: str, frame: np.ndarray, observation: Observation) -> None:
        now_s = observation.time_s
        camera = self._cameras.get(name)
        if camera is None:
            camera = self._cameras[name] = _Camera(frame.copy(), now_s, observation.joints)
        elif not np.array_equal(camera.frame, frame):
            camera.frame, camera.changed_s, camera.joints = frame.copy(), now_s, observation.joints
        fault = _fault(frame)
        if fault is None and now_s - camera.changed_s >= FROZEN_S and np.abs(observation.joints - camera.joints).max() > MOVED:
            fault = "frozen"
        if fault != camera.fault:
            camera.fault, camera.since_s, camera.told = fault, camera.changed_s if fault == "frozen" else now_s, False
        if fault is not None and now_s - camera.since_s >= LASTS_S and not camera.told:
            camera.told = True
            self._tell(name, fault)

    def _tell(self, name: str, fault: str) -> None:
        self.events[f"camera_{fault}"] += 1
        what, advice = _WORDS[fault]
        message = f"camera '{name}' {what}. {advice}."
        if self._action == "land":
            raise CameraError(message)
        self._echo(f"WARNING: {message} (--camera_fault=land ends the run in such a case.)")


def fault_of(frame: np.ndarray) -> tuple[str, str] | None:
    """What is wrong with a single picture, and what to do; None: nothing. uint8 (height, width, 3), SMALLEST pixels a side at least."""
    fault = _fault(frame)
    return None if fault is None else _WORDS[fault]


def _fault(frame: np.ndarray) -> str | None:
    height, width = frame.shape[:2]
    rows: np.ndarray = frame[height // (2 * LINES) :: height // LINES].astype(np.float32)  # (LINES, W, 3)
    columns: np.ndarray = frame[:, width // (2 * LINES) :: width // LINES].astype(np.float32).swapaxes(0, 1)  # (LINES, H, 3)
    if np.percentile(rows, 98) < DARK or rows.reshape(-1, rows.shape[-1]).std(axis=0).max() < PLAIN_DEVIATION:
        return "blank"
    if rows.std() < NOISE_DEVIATION:
        return None
    return "noise" if max(_alikeness(rows), _alikeness(columns)) < NOISE_CORRELATION else None


def _alikeness(lines: np.ndarray) -> float:
    """The largest correlation, of either sign, of pixels 1 to 4 apart along the lines (N, L, 3)."""
    centred = lines - lines.mean()
    power = float((centred**2).mean())
    return max(abs(float((centred[:, apart:] * centred[:, :-apart]).mean())) for apart in range(1, 5)) / power
