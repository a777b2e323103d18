"""Inverse kinematics of the simulated arm: damped least squares on MuJoCo's site Jacobian."""

from __future__ import annotations

import numpy as np

from gr00t_fast.errors import RobotError
from gr00t_fast.robots.so100_sim.simulation import Simulation
from gr00t_fast.robots.so100_sim.units import GRIPPER, LIMITS_DEG, degrees_to_radians, radians_to_degrees

_DAMPING = 0.02
_ANGLE_WEIGHT_M = 0.08  # one radian of tilt counts as much as this distance
_MAX_STEP_RAD = 0.25
_DONE_M = 2e-4


class GraspKinematics:
    """Joint angles that put the point between the finger tips somewhere, fingers straight down. Works on its own copy of the arm's state."""

    def __init__(self, simulation: Simulation) -> None:
        self._mujoco, self._model = simulation._mujoco, simulation.model
        self._data = self._mujoco.MjData(self._model)
        self._site = self._model.site("tcp").id
        self._low, self._high = degrees_to_radians(LIMITS_DEG.T)[:, :GRIPPER]

    def solve(self, tcp_m: np.ndarray, yaw_rad: float | None, start_deg: np.ndarray, tolerance_m: float = 0.004) -> np.ndarray:
        """Joints (6,) in degrees for `tcp_m` (3,); the gripper is that of `start_deg`, where the search begins.

        yaw_rad: direction about the vertical in which the jaws close, modulo a quarter turn (a block has four sides); None: any.
        Raises RobotError when no pose within the limits comes within `tolerance_m`.
        """
        joints = degrees_to_radians(start_deg)
        for _ in range(120):
            error, jacobian = self._error(joints, tcp_m, yaw_rad)
            if np.abs(error).max() < _DONE_M:
                break
            square = jacobian.T @ jacobian + _DAMPING**2 * np.eye(GRIPPER)
            step = np.linalg.solve(square, jacobian.T @ error)
            joints[:GRIPPER] += step * min(1.0, _MAX_STEP_RAD / max(np.abs(step).max(), 1e-9))
            joints[:GRIPPER] = np.clip(joints[:GRIPPER], self._low, self._high)
        miss_m = float(np.linalg.norm(self._error(joints, tcp_m, yaw_rad)[0][:3]))
        if miss_m > tolerance_m:
            raise RobotError(f"the simulated arm cannot reach {np.round(tcp_m, 3)} m from above: the nearest pose is {1000 * miss_m:.0f} mm off.")
        return radians_to_degrees(joints)

    def _error(self, joints_rad: np.ndarray, tcp_m: np.ndarray, yaw_rad: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Weighted error (6,) of position and orientation, and its Jacobian (6, 5)."""
        self._data.qpos[:6] = joints_rad
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        jacobian = np.zeros((6, self._model.nv))
        self._mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._site)
        jacobian = jacobian[:, :GRIPPER]
        closing, backward = self._data.site_xmat[self._site].reshape(3, 3)[:, :2].T  # the site's x and y axes
        turn = np.cross(backward, [0.0, 0.0, 1.0])  # fingers point along -y: turn y up
        if yaw_rad is None:
            jacobian[5] = 0
            turn[2] = 0
        else:
            ahead = yaw_rad - np.arctan2(closing[1], closing[0])
            turn[2] = (ahead + np.pi / 4) % (np.pi / 2) - np.pi / 4
        error = np.concatenate([tcp_m - self._data.site_xpos[self._site], _ANGLE_WEIGHT_M * turn])
        jacobian[3:] *= _ANGLE_WEIGHT_M
        return error, jacobian
