"""An arm that follows its targets with a first-order lag, in a scene that either moves on by itself or waits for the arm.

The arm has one axis more than the recording: the *marker*, whose target is the moment of the recording that an action is from. It travels with the
actions like any joint, so at every tick it is known which moment was played; and its reading tells the policy where in the recording it is.
Axis alphabet of this file: J joints of the recording (the arm has J + 1), G instants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np

from benchmarks.replay_study.policy import CAMERA
from benchmarks.replay_study.recording import MARKER, Recording
from gr00t_fast.contracts import CameraSpec, Clock, JointUnit, LandingReport, Observation

SceneKind = Literal["moving", "still"]
# Not measured on an arm: a plain figure for a small position-controlled servo under load. The row `floor` shows what it costs by itself.
DEFAULT_TIME_CONSTANT_S = 0.06
_PICTURE = (480, 640, 3)  # as large as a usual camera's, so that the server's transport carries what it would
_BEYOND_DEG = 60.0


class Scene(Protocol):
    """Where in the recording the world is. `played`: the moment that the arm was last told to be at."""

    def sent(self, played_s: float, now_s: float) -> None: ...

    def time_s(self, now_s: float) -> float: ...


class MovingScene:
    """The world moves on, whatever the arm does (a conveyor, a person): its time runs from the first target on."""

    def __init__(self) -> None:
        self._began_s: float | None = None

    def sent(self, played_s: float, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = now_s

    def time_s(self, now_s: float) -> float:
        return 0.0 if self._began_s is None else now_s - self._began_s


class StillScene:
    """The world waits for the arm (a cube on a table): its time is the moment last played, and one tick later the arm is there."""

    def __init__(self, period_s: float) -> None:
        self._period_s, self._played_s, self._since_s = period_s, 0.0, None

    def sent(self, played_s: float, now_s: float) -> None:
        if self._since_s is None or played_s != self._played_s:  # a target that is held moves nothing
            self._played_s, self._since_s = played_s, now_s

    def time_s(self, now_s: float) -> float:
        return 0.0 if self._since_s is None else self._played_s + min(now_s - self._since_s, self._period_s)


class FollowerArm:
    """A `Robot`. Every joint approaches its last target exponentially; nothing else acts on it. `sends`: instant, targets (J + 1,) and pose (J,)."""

    name = "follower"
    events: Mapping[str, int] = {}

    def __init__(self, recording: Recording, scene: Scene, clock: Clock, fps: float, time_constant_s: float) -> None:
        self.joint_names = (*recording.joint_names, MARKER)
        self.cameras = {CAMERA: CameraSpec(_PICTURE[1], _PICTURE[0], fps)}
        self.sends: list[tuple[float, np.ndarray, np.ndarray]] = []
        self.joint_unit: JointUnit = "degrees"
        self._recording, self._scene, self._clock, self._lag_s = recording, scene, clock, time_constant_s
        self._picture = np.random.default_rng(0).integers(0, 256, _PICTURE, np.uint8)
        self._picture.setflags(write=False)

    @property
    def joint_limits(self) -> np.ndarray:
        values = self._recording.values
        low, high = values.min(0) - _BEYOND_DEG, values.max(0) + _BEYOND_DEG
        marker = 2 * self._recording.duration_s + 60.0
        return np.column_stack([np.append(low, -marker), np.append(high, marker)])

    @property
    def units_per_deg(self) -> np.ndarray:
        return np.ones(len(self.joint_names))

    def keep_alive(self) -> None:
        """Nothing is powered."""

    def connect(self) -> None:
        """Nothing to open."""

    def reset(self, seed: int | None = None) -> None:
        """Stands at the recording's first pose."""
        self.sends.clear()

    def observe(self) -> Observation:
        now_s = self._clock.now_s()
        joints = np.append(self.poses(np.array([now_s]))[0], self._scene.time_s(now_s))
        return Observation(joints, {CAMERA: self._picture}, now_s)

    def send(self, targets: np.ndarray) -> None:
        now_s = self._clock.now_s()
        self.sends.append((now_s, targets.copy(), self.poses(np.array([now_s]))[0]))
        self._scene.sent(float(targets[-1]), now_s)

    def poses(self, times_s: np.ndarray) -> np.ndarray:
        """The pose (G, J) at each of `times_s` (G,), exact."""
        if not self.sends:
            return np.repeat(self._recording.values[:1], len(times_s), axis=0)
        recent = self.sends if len(times_s) > 1 else self.sends[-1:]
        instants = np.array([instant for instant, _, _ in recent])
        index = np.searchsorted(instants, times_s, side="right") - 1
        before = np.where(index < 0, 0, index)
        targets = np.stack([target[:-1] for _, target, _ in recent])[before]  # (G, J)
        starts = np.stack([pose for _, _, pose in recent])[before]  # (G, J)
        passed_s = np.where(index < 0, 0.0, times_s - instants[before])
        return targets + (starts - targets) * np.exp(-passed_s / self._lag_s)[:, None]

    def land(self) -> LandingReport:
        return LandingReport(port_closed=True, cameras_closed=True)
