"""What stands in for hardware and trained weights: servos that any program can open, a simulated arm and its cameras, random checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gr00t_fast.base.contracts import JointUnit, Robot
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.robots import RobotConfig, SimCameraConfig, SO100FollowerConfig, SO100SimConfig

if TYPE_CHECKING:
    from gr00t_fast.virtual.sim.simulation import RenderedCameras


def make_robot(config: RobotConfig) -> Robot:
    """The arm that `config` describes, real or simulated, not yet connected. Raises ConfigError, or MissingExtraError when its packages are not
    installed."""
    if isinstance(config, SO100FollowerConfig):
        from gr00t_fast.robots.so100 import SO100FollowerArm

        return SO100FollowerArm(config, rendered_cameras)  # type: ignore[return-value]
    if isinstance(config, SO100SimConfig):
        from gr00t_fast.virtual.sim.simulation import SimArm

        return SimArm(config)  # type: ignore[return-value]
    raise ConfigError(f"no arm is known for a configuration of type {type(config).__name__}; expected so100_follower, so101_follower or so100_sim.")


def rendered_cameras(cameras: Mapping[str, SimCameraConfig], unit: JointUnit) -> RenderedCameras:
    """Those of `type: sim` on a servo bus. Raises MissingExtraError without MuJoCo, and ConfigError for what cannot be drawn."""
    from gr00t_fast.virtual.sim.simulation import RenderedCameras

    return RenderedCameras(cameras, unit)
