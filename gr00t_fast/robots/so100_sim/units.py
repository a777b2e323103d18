"""The arm's joints in lerobot's numbers, and their conversion to the radians of the MuJoCo model.

Degrees follow lerobot since its calibration change (pull request 777): zero is the middle of each joint's range. The gripper is 0..100 per cent open.
"""

from __future__ import annotations

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, JointUnit
from gr00t_fast.errors import ConfigError

GRIPPER = SO100_JOINTS.index("gripper")

# Model radians at lerobot's zero. Lift and elbow differ because the model's zero is the stretched arm; signs and zeros are inferred from geometry.
_ZERO_RAD = np.deg2rad([0.0, -90.0, 90.0, 0.0, 0.0, 0.0])

# Jaw angle when closed and when fully open, from the joint limits of the MuJoCo Menagerie model of the arm.
JAW_CLOSED_RAD, JAW_OPEN_RAD = -0.174, 1.75

# Lowest and highest target. Menagerie's limits, made symmetric because lerobot's zero is the middle of the calibrated range: the elbow
# loses the 10 degrees beyond stretched, which no task uses, and in return every unit and the servo bus agree on one table.
LIMITS_DEG = np.array([[-110, 110], [-100, 100], [-90, 90], [-95, 95], [-160, 160], [0, 100]], dtype=np.float64)
LIMITS_DEG.setflags(write=False)


def units_per_deg(unit: JointUnit) -> np.ndarray:
    """(6,) how much each joint's reading changes when its shaft turns by a degree."""
    scale = np.ones(6) if unit == "degrees" else 200 / (LIMITS_DEG[:, 1] - LIMITS_DEG[:, 0])
    scale[GRIPPER] = 100 / np.rad2deg(JAW_OPEN_RAD - JAW_CLOSED_RAD)
    return scale


def degrees_to_radians(joints_deg: np.ndarray) -> np.ndarray:
    """lerobot degrees (..., 6), gripper in per cent -> model radians (..., 6)."""
    joints_deg = np.asarray(joints_deg, dtype=np.float64)
    radians = np.deg2rad(joints_deg) + _ZERO_RAD
    radians[..., GRIPPER] = JAW_CLOSED_RAD + joints_deg[..., GRIPPER] / 100 * (JAW_OPEN_RAD - JAW_CLOSED_RAD)
    return radians


def radians_to_degrees(joints_rad: np.ndarray) -> np.ndarray:
    """Model radians (..., 6) -> lerobot degrees (..., 6), gripper in per cent."""
    joints_rad = np.asarray(joints_rad, dtype=np.float64)
    degrees = np.rad2deg(joints_rad - _ZERO_RAD)
    degrees[..., GRIPPER] = (joints_rad[..., GRIPPER] - JAW_CLOSED_RAD) / (JAW_OPEN_RAD - JAW_CLOSED_RAD) * 100
    return degrees


def from_degrees(joints_deg: np.ndarray, unit: JointUnit) -> np.ndarray:
    """lerobot degrees (..., 6) -> `unit`; in `range_m100_100` a body joint runs from -100 to 100 over its range."""
    joints_deg = np.array(joints_deg, dtype=np.float64)
    if unit == "degrees":
        return joints_deg
    low, high = LIMITS_DEG[:GRIPPER, 0], LIMITS_DEG[:GRIPPER, 1]
    joints_deg[..., :GRIPPER] = (joints_deg[..., :GRIPPER] - low) / (high - low) * 200 - 100
    return joints_deg


def to_degrees(joints: np.ndarray, unit: JointUnit) -> np.ndarray:
    """Inverse of `from_degrees`."""
    joints = np.array(joints, dtype=np.float64)
    if unit == "degrees":
        return joints
    low, high = LIMITS_DEG[:GRIPPER, 0], LIMITS_DEG[:GRIPPER, 1]
    joints[..., :GRIPPER] = (joints[..., :GRIPPER] + 100) / 200 * (high - low) + low
    return joints


def check_joints(joints: np.ndarray, what: str) -> np.ndarray:
    """Return `joints` as float64 (6,); ConfigError when the shape is another or a value is not finite."""
    array = np.asarray(joints, dtype=np.float64)
    if array.shape != (len(SO100_JOINTS),) or not np.isfinite(array).all():
        raise ConfigError(f"{what} must be six finite numbers in the order {', '.join(SO100_JOINTS)}, but it is {joints!r}")
    return array
