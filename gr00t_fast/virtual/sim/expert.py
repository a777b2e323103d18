"""A scripted expert for both tasks, and the inverse kinematics it needs (damped least squares on MuJoCo's site Jacobian).

The expert reads the poses of block and bowl from the simulation. It shows that a scene can be solved, and makes demonstrations: a generator of joint
targets, one per control tick (30 Hz), straight lines in joint space between a few poses, at limited speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gr00t_fast.base.errors import RobotError
from gr00t_fast.virtual.sim.scene import BOWL_HEIGHT_M, GRIPPER, LIMITS_DEG, PAN_AXIS_XY_M, degrees_to_radians, radians_to_degrees
from gr00t_fast.virtual.sim.simulation import HOME_DEG, Simulation

# --- inverse kinematics -------------------------------------------------------------------------------------------------------------------------

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


# --- expert -------------------------------------------------------------------------------------------------------------------------------------

_STEP_DEG = 4.0  # per tick and joint, 120 deg/s: what the servos of the arm manage
_JAW_STEP = 8.0  # per cent per tick
_ARRIVED_DEG, _SETTLE_TICKS = 1.5, 12  # a waypoint counts as reached when measured so near, or after waiting so long
_JAW_OPEN, _JAW_SHUT = 55.0, 2.0  # per cent
# Heights of the point between the finger tips. Fingers straight down, the arm gets no higher than about 85 mm (the wrist bends 95 degrees).
_HOVER_M = 0.062  # above the block's centre: the block clears the bowl's rim by 20 mm
_CARRY_M, _DROP_M = 0.038, 0.018  # above the rim
_WAYPOINT_M = 0.012  # how far off a pose in passing may be: at the rim of the workspace it tilts instead
_GRASP_M = 0.006  # above the block's centre: the tips reach 15 mm further down and must clear the table
_REACH_M = 0.012  # above the block's centre; within the 3 cm that count, without poking the block
_CLOSE_TICKS, _OPEN_TICKS = 10, 6


def expert(simulation: Simulation) -> Iterator[np.ndarray]:
    """Targets (6,) in degrees for each tick of the task from where the simulation is now; ends when the script is over.

    The caller sends each to the simulation and advances it by a tick. Raises RobotError when the scene is out of reach.
    """
    script = _reach if simulation.task == "reach" else _place
    yield from script(simulation, GraspKinematics(simulation))


def _reach(simulation: Simulation, kinematics: GraspKinematics) -> Iterator[np.ndarray]:
    hover = kinematics.solve(simulation.block_m + [0, 0, _HOVER_M], None, simulation.joints_deg, _WAYPOINT_M)
    goal = kinematics.solve(simulation.block_m + [0, 0, _REACH_M], None, hover)
    hover[GRIPPER] = goal[GRIPPER] = _JAW_OPEN
    yield from _move(simulation, hover, near_deg=12.0)
    yield from _move(simulation, goal)
    yield from _hold(simulation, goal, 10)


def _place(simulation: Simulation, kinematics: GraspKinematics) -> Iterator[np.ndarray]:
    block, bowl, yaw = simulation.block_m, simulation.bowl_m, simulation.block_yaw_rad
    hover = kinematics.solve(block + [0, 0, _HOVER_M], yaw, _preferred(simulation), _WAYPOINT_M)
    grasp = kinematics.solve(block + [0, 0, _GRASP_M], yaw, hover)
    rim = np.array([*bowl[:2], BOWL_HEIGHT_M])  # type: ignore[index]
    over = kinematics.solve(rim + [0, 0, _CARRY_M], None, hover, _WAYPOINT_M)
    drop = kinematics.solve(rim + [0, 0, _DROP_M], None, over)
    yield from _move(simulation, _jaw(hover, _JAW_OPEN))
    yield from _move(simulation, _jaw(grasp, _JAW_OPEN), speed=0.7)
    yield from _hold(simulation, _jaw(grasp, _JAW_SHUT), _CLOSE_TICKS)
    yield from _move(simulation, _jaw(hover, _JAW_SHUT))
    yield from _move(simulation, _jaw(over, _JAW_SHUT))
    yield from _move(simulation, _jaw(drop, _JAW_SHUT))
    yield from _hold(simulation, _jaw(drop, _JAW_OPEN), _OPEN_TICKS)
    yield from _move(simulation, _jaw(over, _JAW_OPEN))
    yield from _hold(simulation, _jaw(over, _JAW_OPEN), 8)


def _preferred(simulation: Simulation) -> np.ndarray:
    """Start of the search for a grasp: the home pose turned towards the block, so that of four ways to grasp it the natural one is found."""
    start = HOME_DEG.copy()
    x, y = simulation.block_m[:2] - PAN_AXIS_XY_M
    start[0] = np.rad2deg(np.arctan2(x, -y))
    return start


def _jaw(pose_deg: np.ndarray, percent: float) -> np.ndarray:
    return np.array([*pose_deg[:GRIPPER], percent])


def _move(simulation: Simulation, goal_deg: np.ndarray, speed: float = 1.0, near_deg: float = _ARRIVED_DEG) -> Iterator[np.ndarray]:
    """Joint-space line from the measured pose, all joints arriving together; then wait until the arm is near."""
    start = simulation.joints_deg
    start[GRIPPER] = simulation.targets_deg[GRIPPER]  # closed on a block, the jaw's target must not become what was measured
    limit = np.array([_STEP_DEG] * GRIPPER + [_JAW_STEP]) * speed
    ticks = max(1, int(np.ceil(np.max(np.abs(goal_deg - start) / limit))))
    for tick in range(1, ticks + 1):
        yield start + (goal_deg - start) * tick / ticks
    for _ in range(_SETTLE_TICKS):
        if np.abs(simulation.joints_deg - goal_deg)[:GRIPPER].max() < near_deg:
            return
        yield goal_deg


def _hold(simulation: Simulation, goal_deg: np.ndarray, ticks: int) -> Iterator[np.ndarray]:
    """Keep the arm and let the jaw move at its speed."""
    jaw = simulation.targets_deg[GRIPPER]
    for _ in range(ticks):
        jaw += np.clip(goal_deg[GRIPPER] - jaw, -_JAW_STEP, _JAW_STEP)
        yield _jaw(goal_deg, jaw)  # type: ignore[arg-type]
