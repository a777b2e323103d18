"""`type: sim` cameras of a real (or virtual) servo bus: pictures for an arm that has no camera, so that a whole run can be tried on a desk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gr00t_fast.contracts import JointUnit
from gr00t_fast.robots.config import CameraConfig, SimCameraConfig


class TwinCameras:
    """Draws the simulated scene with its arm in the pose that the servos report. The objects on the table stay where they are: no physics runs
    here, and nothing of the real surroundings is in the picture."""

    def __init__(self, cameras: Mapping[str, SimCameraConfig], unit: JointUnit) -> None:
        """Loads the scene, and draws once so that the first tick is as quick as the next. Raises MissingExtraError without MuJoCo, ConfigError for
        a picture size or view that cannot be drawn."""
        from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, Simulation

        self._cameras, self._unit = cameras, unit
        self._simulation = Simulation("place", 0)
        self._draw(HOME_DEG)

    def frames(self, joints: np.ndarray) -> dict[str, np.ndarray]:
        """Camera name -> uint8 RGB (height, width, 3), of the arm with these joints (6,) in its unit."""
        from gr00t_fast.robots.so100_sim.units import to_degrees

        return self._draw(to_degrees(joints, self._unit))

    def _draw(self, joints_deg: np.ndarray) -> dict[str, np.ndarray]:
        self._simulation.place_arm(joints_deg)
        return {name: self._simulation.render(camera.view, camera.width, camera.height) for name, camera in self._cameras.items()}


def rendered(cameras: Mapping[str, CameraConfig]) -> dict[str, SimCameraConfig]:
    """Those that are drawn, not filmed."""
    return {name: camera for name, camera in cameras.items() if isinstance(camera, SimCameraConfig)}
