"""Notices a camera that delivers pictures without information: black, noise, or always the same one while the arm moves.

A camera that delivers nothing at all is an error of the robot. These are not: the policy would go on, blind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.errors import RobotError

CameraFault = Literal["warn", "land"]
CHECK_EVERY_S = 0.25
LASTS_S = 1.0  # black or noise: a hand before the lens and a burst of interference pass
FROZEN_S = 2.0
MOVED = 5.0  # joint units; a sensor's noise, or at least the arm in the picture, changes some pixel meanwhile
DARK = 16  # of 255: video black
NOISE_DEVIATION, NOISE_CORRELATION = 20.0, 0.3  # neighbouring pixels of any focused or blurred picture agree above 0.8
_STRIDE = 16
SMALLEST = 64  # pixels a side; too little to judge a picture by

_ADVICE = {
    "black": "Take the lens cap off, switch the light on, check the exposure",
    "noise": "Check its cable and its pixel format (fourcc)",
    "frozen": "Plug it in again",
}


@dataclass
class _Camera:
    sample: np.ndarray
    changed_s: float
    joints: np.ndarray  # when the sample last changed
    fault: str | None = None
    since_s: float = 0.0
    told: bool = False


class CameraWatch:
    """Looks at each camera CHECK_EVERY_S; `events` counts `camera_<fault>` once per onset."""

    def __init__(self, action: CameraFault, echo: Callable[[str], None]) -> None:
        """`action`: warn says it, land raises RobotError too."""
        self._action, self._echo = action, echo
        self._cameras: dict[str, _Camera] = {}
        self._next_s = -np.inf
        self.events: Counter[str] = Counter()

    def __call__(self, observation: Observation) -> None:
        """After each observation. Raises RobotError with `land`."""
        if observation.time_s < self._next_s:
            return
        self._next_s = observation.time_s + CHECK_EVERY_S
        for name, frame in observation.frames.items():
            if min(frame.shape[:2]) >= SMALLEST:
                self._look(name, frame, observation)

    def _look(self, name: str, frame: np.ndarray, observation: Observation) -> None:
        now_s, sample = observation.time_s, frame[::_STRIDE, ::_STRIDE].copy()
        camera = self._cameras.get(name)
        if camera is None or not np.array_equal(camera.sample, sample):
            before, camera = camera, _Camera(sample, now_s, observation.joints)
            if before is not None:
                camera.fault, camera.since_s, camera.told = before.fault, before.since_s, before.told
            self._cameras[name] = camera
        fault = _fault(frame)
        if fault is None and now_s - camera.changed_s >= FROZEN_S and np.abs(observation.joints - camera.joints).max() > MOVED:
            fault = "frozen"
        if fault != camera.fault:
            camera.fault, camera.since_s, camera.told = fault, camera.changed_s if fault == "frozen" else now_s, False
        if fault is not None and now_s - camera.since_s >= LASTS_S and not camera.told:
            camera.told = True
            self._tell(name, fault, now_s - camera.since_s)

    def _tell(self, name: str, fault: str, since_s: float) -> None:
        self.events[f"camera_{fault}"] += 1
        what = {"black": "is black", "noise": "shows noise", "frozen": "shows the same picture while the arm moves"}[fault]
        message = f"camera '{name}' {what}, for {since_s:.1f} s now: the policy is blind on it. {_ADVICE[fault]}."
        if self._action == "land":
            raise RobotError(message)
        self._echo(f"WARNING: {message} (--camera_fault=land ends the run in such a case.)")


def _fault(frame: np.ndarray) -> str | None:
    pixels = frame[::_STRIDE, :: 2 * _STRIDE].astype(np.float32)
    if pixels.size and pixels.max() < DARK:
        return "black"
    beside = frame[::_STRIDE, 1 :: 2 * _STRIDE].astype(np.float32)[:, : pixels.shape[1]]
    pixels = pixels[:, : beside.shape[1]]
    if min(pixels.std(), beside.std()) < NOISE_DEVIATION:  # too plain a picture
        return None
    return "noise" if np.corrcoef(pixels.ravel(), beside.ravel())[0, 1] < NOISE_CORRELATION else None
