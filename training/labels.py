"""What the expert would do next, from any state of the arm: the label of a sample, without a roll-out.

The script of `so100_sim.expert` for `reach` (above the block, then down to it), as a function of the present joints alone: a network that sees one
frame cannot know how long the script has been running. Axis alphabet: H horizon, J joints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.robots.so100_sim.kinematics import GraspKinematics
from gr00t_fast.robots.so100_sim.scene import PAN_AXIS_XY_M
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, Simulation

HORIZON = 16  # actions in a chunk, as the published network
FPS = 30
GRIPPER = SO100_JOINTS.index("gripper")
HOVER_M, REACH_M = 0.062, 0.012  # above the block's centre: where the expert turns downwards, and where it holds
_HOVER_TOLERANCE_M = 0.012  # at the rim of the workspace the hover pose tilts instead
_OPEN_PERCENT = 55.0
_STEP = np.array([4.0] * GRIPPER + [8.0])  # largest change of a target per tick: 120 degrees per second, jaw in per cent
_NEAR_DEG = 12.0  # this close to the line from hover to goal, the way down is free
# A servo in motion trails its target by about three ticks. A chunk that began at the measured joints would brake the arm at every
# inference: with a new one every 8 ticks, 18.5 ticks to success instead of 14.9.
_LEAD_TICKS = 2


@dataclass(frozen=True)
class Waypoints:
    """Joints (J,) in degrees, jaw open: above the block, and at it."""

    hover: np.ndarray
    goal: np.ndarray


def waypoints(simulation: Simulation, kinematics: GraspKinematics) -> Waypoints:
    """Of the block where it lies now. The search starts at the home pose turned towards the block, so equal blocks have equal poses.

    Raises RobotError when the block is out of reach.
    """
    block = simulation.block_m
    x, y = block[:2] - PAN_AXIS_XY_M
    start = HOME_DEG.copy()
    start[0] = np.rad2deg(np.arctan2(x, -y))
    hover = kinematics.solve(block + [0, 0, HOVER_M], None, start, _HOVER_TOLERANCE_M)
    goal = kinematics.solve(block + [0, 0, REACH_M], None, hover)
    hover[GRIPPER] = goal[GRIPPER] = _OPEN_PERCENT
    return Waypoints(hover, goal)


def expert_chunk(joints_deg: np.ndarray, points: Waypoints, horizon: int = HORIZON) -> np.ndarray:
    """Targets (H, J) in degrees from `joints_deg` (J,) on: straight lines in joint space at limited speed, then hold."""
    joints, targets = np.array(joints_deg, np.float64), []
    for _ in range(horizon + _LEAD_TICKS):
        joints = _step(joints, points.goal if _way_down_is_free(joints, points) else points.hover)
        targets.append(joints)
    return np.array(targets[_LEAD_TICKS:])


def _step(joints: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """One tick towards `goal`, all body joints in proportion; the jaw opens at its own speed."""
    away = goal - joints
    ratio = max(1.0, float(np.max(np.abs(away[:GRIPPER]) / _STEP[:GRIPPER])))
    moved = joints + away / ratio
    moved[GRIPPER] = joints[GRIPPER] + np.clip(away[GRIPPER], -_STEP[GRIPPER], _STEP[GRIPPER])
    return moved


def _way_down_is_free(joints: np.ndarray, points: Waypoints) -> bool:
    """Whether the body joints are near the line from hover to goal; from elsewhere the fingers would push the block away."""
    line = (points.goal - points.hover)[:GRIPPER]
    along = float(np.clip((joints - points.hover)[:GRIPPER] @ line / max(line @ line, 1e-9), 0, 1))
    return bool(np.abs(joints[:GRIPPER] - points.hover[:GRIPPER] - along * line).max() < _NEAR_DEG)
