"""What stands in for hardware and trained weights: servos that any program can open, a simulated arm and its cameras, random checkpoints."""

from __future__ import annotations

from gr00t_fast.base.contracts import Robot
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.robots import RobotConfig, SO100FollowerConfig, SO100SimConfig


def make_robot(config: RobotConfig) -> Robot:
    """The arm that `config` describes, real or simulated, not yet connected. Raises ConfigError, or MissingExtraError when its packages are not
    installed."""
    from gr00t_fast.robots.so100 import SO100FollowerArm
    from gr00t_fast.virtual.sim.simulation import RenderedCameras, SimArm

    if isinstance(config, SO100FollowerConfig):
        return SO100FollowerArm(config, RenderedCameras)  # type: ignore[return-value]
    if isinstance(config, SO100SimConfig):
        return SimArm(config)  # type: ignore[return-value]
    raise ConfigError(f"no arm is known for a configuration of type {type(config).__name__}; expected so100_follower, so101_follower or so100_sim.")
