"""lerobot's calibration file: reading, checking, writing, and converting encoder ticks to the units lerobot shows.

The virtual bus preloads its servos from the same file that the driver compares them with; when both agree, connecting asks nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError

TICKS_PER_TURN = 4096  # 12-bit magnetic encoder
DEG_PER_TICK = 360 / (TICKS_PER_TURN - 1)  # lerobot divides by 4095, not 4096; its datasets carry that scale
OFFSET_LIMIT = 2047  # Homing_Offset is sign-magnitude in 11 bits
GRIPPER = "gripper"
# Half of each joint's range. The body joints have the limits of the simulated arm (a test compares them): the bus can move it everywhere.
HALF_RANGE_DEG = {"shoulder_pan": 110, "shoulder_lift": 100, "elbow_flex": 90, "wrist_flex": 95, "wrist_roll": 160, GRIPPER: 55}


@dataclass(frozen=True)
class JointCalibration:
    """One joint of a calibration file, in encoder ticks (the field names are lerobot's)."""

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int

    @property
    def middle(self) -> float:
        """The position lerobot calls zero degrees."""
        return (self.range_min + self.range_max) / 2


Calibration = dict[str, JointCalibration]


def default_calibration() -> Calibration:
    """A plausible SO-100: every joint's range is around the middle of the encoder, offsets differ so that mixing them up shows."""
    calibration = {}
    for index, joint in enumerate(SO100_JOINTS):
        half = round(HALF_RANGE_DEG[joint] / DEG_PER_TICK)
        middle = 2047 + 5 * index
        calibration[joint] = JointCalibration(index + 1, 0, (-1) ** index * (40 + 15 * index), middle - half, middle + half)
    return calibration


def load_calibration(path: Path) -> Calibration:
    """Read and check a lerobot calibration file. Raises ConfigError naming joint and field."""
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"expected a lerobot calibration file at {path}, but it cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"expected JSON in the calibration file {path}, but: {error}. Re-create it with lerobot-calibrate.") from error
    if not isinstance(raw, dict) or set(raw) != set(SO100_JOINTS):
        got = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ConfigError(f"the calibration file {path} must hold the joints {list(SO100_JOINTS)}, got {got}.")
    return {joint: _joint(path, joint, raw[joint]) for joint in SO100_JOINTS}


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file as lerobot does (four spaces, five keys a joint)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({joint: asdict(values) for joint, values in calibration.items()}, indent=4))


def to_units(joint: str, values: JointCalibration, position: float) -> float:
    """Register position -> degrees about mid-range, or 0..100 for the gripper (lerobot's `use_degrees`)."""
    if joint != GRIPPER:
        return (position - values.middle) * DEG_PER_TICK
    percent = (position - values.range_min) / (values.range_max - values.range_min) * 100
    return 100 - percent if values.drive_mode else percent


def from_units(joint: str, values: JointCalibration, target: float) -> float:
    """Inverse of `to_units`, not rounded."""
    if joint != GRIPPER:
        return target / DEG_PER_TICK + values.middle
    percent = 100 - target if values.drive_mode else target
    return percent / 100 * (values.range_max - values.range_min) + values.range_min


def _joint(path: Path, joint: str, raw: object) -> JointCalibration:
    fields = JointCalibration.__dataclass_fields__
    if not isinstance(raw, dict) or set(raw) != set(fields) or not all(isinstance(raw[name], int) for name in fields):
        raise ConfigError(f"joint '{joint}' in {path} needs the whole numbers {list(fields)}, got {raw!r}. Re-create it with lerobot-calibrate.")
    values = JointCalibration(**raw)
    if not 0 <= values.range_min < values.range_max < TICKS_PER_TURN or abs(values.homing_offset) > OFFSET_LIMIT:
        raise ConfigError(
            f"joint '{joint}' in {path}: expected 0 <= range_min < range_max <= 4095 and |homing_offset| <= {OFFSET_LIMIT}, got {raw!r}."
        )
    return values
