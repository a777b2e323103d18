"""The world in MuJoCo's XML: an SO-100, a table, a block and (for `place`) a bowl, all from primitives.

Kinematics, masses and actuator gains are those published for the arm in MuJoCo Menagerie (`trs_so_arm100`), as numbers; no mesh is needed, because
only the finger pads, the gripper body and the forearm touch anything. How the arm looks is in `appearance.py`. SI units, z up, table top at z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, JointUnit
from gr00t_fast.base.errors import ConfigError, closest

Task = Literal["reach", "place"]
INSTRUCTION_OF: dict[str, str] = {"reach": "Reach the block", "place": "Place the block in the bowl"}  # as the demo's data say it

TIMESTEP_S = 0.004
BLOCK_HALF_M = 0.0125
BOWL_RADIUS_M = 0.045
BOWL_HEIGHT_M = 0.036
PAN_AXIS_XY_M = np.array([0.0, -0.0452])  # objects are placed in polar coordinates about the shoulder pan axis; the arm faces -y

# Where an object's centre may lie: the gripper can point straight down there, also when lifted above the bowl.
_BLOCK_RADIUS_M, _BOWL_RADIUS_RANGE_M, _HALF_ANGLE_RAD = (0.15, 0.24), (0.15, 0.235), np.deg2rad(55)
_PATH_STREAM = 97  # of random numbers: apart from those that place the objects
# By how much each motor trails a ramp: damping / stiffness of its position actuator, as MuJoCo computes the damping from `dampratio`.
_MOTOR_LAG_MS = (102.6, 99.2, 92.6, 89.9, 89.5, 89.5)
MAX_SERVO_LAG_MS = 1000.0
_SEPARATION_M = 0.115  # bowl radius + half block + an open finger

FRONT_CAMERA = (np.array([0.14, -0.62, 0.40]), np.array([0.0, -0.15, 0.06]), 48.0)  # position, look-at point, vertical field of view (deg)
WRIST_CAMERA = (np.array([0.0, 0.0, 0.07]), np.array([0.0, -0.1, 0.0]), 75.0)  # in the fixed jaw's frame

# (position, half size) of the finger pads in the frame of their jaw.
_FIXED_PADS = [
    ((0.0089, -0.1014, 0), (0.001, 0.005, 0.004)),
    ((0.0109, -0.0914, 0), (0.001, 0.005, 0.006)),
    ((0.0126, -0.0768, 0), (0.001, 0.010, 0.007)),
    ((0.0143, -0.0572, 0), (0.001, 0.010, 0.008)),
]
_MOVING_PADS = [
    ((-0.0113, -0.077, 0), (0.001, 0.005, 0.004)),
    ((-0.0093, -0.067, 0), (0.001, 0.005, 0.006)),
    ((-0.0073, -0.055, 0), (0.001, 0.010, 0.006)),
    ((-0.0073, -0.035, 0), (0.001, 0.010, 0.008)),
]


@dataclass(frozen=True)
class Layout:
    """Where the objects start: centres on the table (m) and the block's turn about the vertical (rad)."""

    block_xy_m: tuple[float, float]
    block_yaw_rad: float
    bowl_xy_m: tuple[float, float] | None


def sample_layout(task: Task, seed: int) -> Layout:
    """Random positions within reach, block and bowl apart; the same per (task, seed) on every platform. Raises ConfigError for an unknown task."""
    if task not in get_args(Task):
        raise ConfigError(f"task must be one of {', '.join(get_args(Task))}, but it is '{task}'.{closest(task, get_args(Task))}")
    rng = np.random.default_rng([seed, get_args(Task).index(task)])
    block = _polar(rng, _BLOCK_RADIUS_M)
    yaw = float(rng.uniform(-np.pi / 4, np.pi / 4))
    if task == "reach":
        return Layout(block, yaw, None)
    while True:
        bowl = _polar(rng, _BOWL_RADIUS_RANGE_M)
        if np.hypot(bowl[0] - block[0], bowl[1] - block[1]) >= _SEPARATION_M:
            return Layout(block, yaw, bowl)


def _polar(rng: np.random.Generator, radius_m: tuple[float, float]) -> tuple[float, float]:
    radius, angle = rng.uniform(*radius_m), rng.uniform(-_HALF_ANGLE_RAD, _HALF_ANGLE_RAD)
    return (float(PAN_AXIS_XY_M[0] + radius * np.sin(angle)), float(PAN_AXIS_XY_M[1] - radius * np.cos(angle)))


def block_path(layout: Layout, seed: int, speed_m_s: float, time_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Position (2,) m and velocity (2,) m/s of a block that is carried on an arc about the pan axis, so that it stays where objects may lie.

    It begins at its place in `layout`, to the side that `seed` says, and turns round at the edges.
    """
    offset = np.asarray(layout.block_xy_m) - PAN_AXIS_XY_M
    radius, angle = np.hypot(*offset), np.arctan2(offset[0], -offset[1])
    side = 1 if np.random.default_rng([seed, _PATH_STREAM]).random() < 0.5 else -1
    span = 2 * _HALF_ANGLE_RAD
    # unfolded: an angle that runs on for ever, mirrored back into the span at every edge
    unfolded = (angle * side + _HALF_ANGLE_RAD + speed_m_s / radius * time_s) % (2 * span)
    forth = unfolded <= span
    angle = side * ((unfolded if forth else 2 * span - unfolded) - _HALF_ANGLE_RAD)
    turning_m_s = speed_m_s * side * (1 if forth else -1)
    position = PAN_AXIS_XY_M + radius * np.array([np.sin(angle), -np.cos(angle)])
    return position, turning_m_s * np.array([np.cos(angle), np.sin(angle)])


# --- XML ---------------------------------------------------------------------------------------------------------------------------------


def scene_xml(task: Task, servo_lag_ms: float | None = None) -> str:
    """The whole world as MJCF; it also opens in MuJoCo's own viewer. `servo_lag_ms`: see Simulation. Raises ConfigError."""
    lags_ms = [0.0] * len(SO100_JOINTS) if servo_lag_ms is None else _filter_ms(servo_lag_ms)
    filters = [f' timeconst="{lag_ms / 1e3:.6g}"' if lag_ms else "" for lag_ms in lags_ms]
    actuators = "\n    ".join(f'<position name="{n}" joint="{n}" class="servo"{f}/>' for n, f in zip(SO100_JOINTS, filters, strict=True))
    return f"""<mujoco model="so100_{task}">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP_S}" cone="elliptic" impratio="10" integrator="implicitfast"/>
  <default>
    <default class="servo">
      <joint armature="0.1" frictionloss="0.1"/>
      <position kp="50" dampratio="1" forcerange="-35 35"/>
    </default>
    <default class="pad"><geom type="box" friction="1 0.01 0.0005" condim="4" rgba=".3 .3 .3 1" {_touch(arm=True)}/></default>
    <default class="shell"><geom friction="0.5" rgba=".9 .9 .88 1" {_touch(arm=True)}/></default>
  </default>
  <worldbody>
    <light pos="0 0 1.5" dir="0 0 -1" directional="true"/>
    <geom name="table" type="plane" size="0.6 0.6 0.1" friction="1" rgba=".7 .55 .4 1" {_touch(arm=False)}/>
    {_camera_xml("front", *FRONT_CAMERA)}
{_arm_xml()}
{_block_xml()}
{_bowl_xml() if task == "place" else ""}
  </worldbody>
  <actuator>
    {actuators}
  </actuator>
</mujoco>"""


def _filter_ms(servo_lag_ms: float) -> list[float]:
    """Time constant per joint of the low-pass that, with the motor's own lag behind it, makes a joint trail a ramp by `servo_lag_ms`."""
    least_ms = max(_MOTOR_LAG_MS)
    if not least_ms < servo_lag_ms <= MAX_SERVO_LAG_MS:
        raise ConfigError(
            f"the servos' lag must be above {least_ms:g} ms, which the motors of the model have of themselves, and at most {MAX_SERVO_LAG_MS:g} ms; "
            f"it is {servo_lag_ms}. Leave it out for the motors alone."
        )
    return [servo_lag_ms - own_ms for own_ms in _MOTOR_LAG_MS]


def _touch(arm: bool) -> str:
    """Contact bits: the arm touches table and objects, never itself; those touch everything."""
    return 'contype="2" conaffinity="1"' if arm else 'contype="1" conaffinity="3"'


def _numbers(values: Any) -> str:
    return " ".join(f"{float(v):.6g}" for v in values)


def _camera_xml(name: str, position: np.ndarray, target: np.ndarray, fovy_deg: float) -> str:
    backward = (position - target) / np.linalg.norm(position - target)
    up_hint = np.array([0.0, 0.0, 1.0]) if name == "front" else np.array([0.0, 1.0, 0.0])
    right = np.cross(up_hint, backward)
    right /= np.linalg.norm(right)
    axes = _numbers([*right, *np.cross(backward, right)])
    return f'<camera name="{name}" pos="{_numbers(position)}" xyaxes="{axes}" fovy="{fovy_deg:g}"/>'


def _pads_xml(prefix: str, pads: list) -> str:
    return "".join(
        f'\n<geom name="{prefix}_pad{i}" class="pad" pos="{_numbers(position)}" size="{_numbers(half)}"/>' for i, (position, half) in enumerate(pads)
    )


def _arm_xml() -> str:
    """Nested links; joints carry lerobot's motor names. Inertias of the links are small next to the armature, so spheres stand in for them."""
    return f"""    <body name="base">
      <geom class="shell" type="box" pos="0 -0.02 0.03" size="0.045 0.065 0.028" {_touch(arm=True)}/>
      <body name="shoulder" pos="0 -0.0452 0.0165" quat="0.7071068 0.7071068 0 0">
        <inertial mass="0.119" pos="-.0001 .0591 .0311" diaginertia="6e-5 5e-5 5e-5"/>
        <joint name="shoulder_pan" class="servo" axis="0 1 0" range="-2.2 2.2"/>
        <body name="upper_arm" pos="0 0.1025 0.0306" euler="1.5707963 0 0">
          <inertial mass="0.162" pos="0 .0702 .0031" diaginertia="2e-4 6e-5 2e-4"/>
          <joint name="shoulder_lift" class="servo" axis="1 0 0" range="-3.5 0.3"/>
          <body name="lower_arm" pos="0 0.11257 0.028" euler="-1.5707963 0 0">
            <inertial mass="0.148" pos="-.0034 .0014 .0768" diaginertia="2e-4 2e-4 6e-5"/>
            <joint name="elbow_flex" class="servo" axis="1 0 0" range="-0.2 3.3"/>
            <geom class="shell" type="capsule" fromto="0 0.003 0.02 0 0.005 0.13" size="0.018"/>
            <body name="wrist" pos="0 0.0052 0.1349" euler="-1.5707963 0 0">
              <inertial mass="0.066" pos="-.0085 -.0352 0" diaginertia="3e-5 3e-5 3e-5"/>
              <joint name="wrist_flex" class="servo" axis="1 0 0" range="-2.0 1.8"/>
              <body name="gripper_body" pos="0 -0.0601 0" euler="0 1.5707963 0">
                <inertial mass="0.093" pos=".0055 -.0280 .0005" diaginertia="6e-5 4e-5 5e-5"/>
                <joint name="wrist_roll" class="servo" axis="0 1 0" range="-3.1416 3.1416"/>
                <site name="tcp" pos="-0.012 -0.092 0" size="0.004"/>
                {_camera_xml("wrist", *WRIST_CAMERA)}
                <geom class="shell" type="box" pos="-0.002 -0.02 0" size="0.028 0.02 0.018"/>{_pads_xml("fixed", _FIXED_PADS)}
                <body name="moving_jaw" pos="-0.0202 -0.0244 0" quat="0 0 1 0">
                  <inertial mass="0.020" pos="-.0016 -.0303 .0004" diaginertia="1e-5 3e-6 1e-5"/>
                  <joint name="gripper" class="servo" axis="0 0 1" range="-0.2 2.0"/>{_pads_xml("moving", _MOVING_PADS)}
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>"""


def _block_xml() -> str:
    return f"""    <body name="block" pos="0 -0.25 {BLOCK_HALF_M}"><freejoint name="block"/>
      <geom name="block" type="box" size="{_numbers([BLOCK_HALF_M] * 3)}" mass="0.02" friction="1.2 0.01 0.0005" condim="4" rgba=".85 .15 .1 1"
        {_touch(arm=False)}/></body>"""


def _bowl_xml() -> str:
    """A ring of twelve thin boxes on a plate, heavy enough not to skid when the block lands in it."""
    sides = 12
    half_width = BOWL_RADIUS_M * np.tan(np.pi / sides) + 0.002
    walls = []
    for i in range(sides):
        angle = 2 * np.pi * i / sides
        # 1 mm up: only the plate rests on the table
        pos = _numbers([BOWL_RADIUS_M * np.cos(angle), BOWL_RADIUS_M * np.sin(angle), BOWL_HEIGHT_M / 2 + 0.001])
        size = _numbers([0.002, half_width, BOWL_HEIGHT_M / 2 - 0.001])
        walls.append(f'<geom type="box" pos="{pos}" euler="0 0 {angle:.6f}" size="{size}" mass="0.01" {_touch(arm=False)}/>')
    plate = f'<geom type="cylinder" pos="0 0 0.002" size="{BOWL_RADIUS_M} 0.002" mass="0.08" {_touch(arm=False)}/>'
    return '    <body name="bowl" pos="0.1 -0.2 0"><freejoint name="bowl"/>\n      ' + "\n      ".join([plate, *walls]) + "</body>"


# The arm's joints in lerobot's numbers, and their conversion to the radians of the MuJoCo model.
#
# Degrees follow lerobot since its calibration change (pull request 777): zero is the middle of each joint's range.
# The gripper is 0..100 per cent open.


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
