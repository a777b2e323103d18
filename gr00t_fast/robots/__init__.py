"""Arms: the real SO-100 through lerobot's driver, a simulated one, and a virtual servo bus. Each is imported when it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gr00t_fast.contracts import Robot
    from gr00t_fast.robots.config import RobotConfig


def check_ready(config: RobotConfig) -> None:
    """What can be known of an arm in no time, to be asked before anything slow is done: are its port and its calibration file there?

    Raises RobotError, or MissingExtraError for cameras of `type: sim` without MuJoCo.
    """
    from gr00t_fast.errors import require
    from gr00t_fast.robots.config import SO100FollowerConfig, rendered

    if isinstance(config, SO100FollowerConfig):
        if rendered(config.cameras):
            require("mujoco", "sim")
        from gr00t_fast.robots.lerobot_glue import check_calibration_exists, check_port

        check_port(config.port)
        check_calibration_exists(config)


def make_robot(config: RobotConfig) -> Robot:
    """The arm that `config` describes, not yet connected. Raises ConfigError, or MissingExtraError when its packages are not installed."""
    from gr00t_fast.errors import ConfigError
    from gr00t_fast.robots.config import SO100FollowerConfig, SO100SimConfig

    if isinstance(config, SO100FollowerConfig):
        from gr00t_fast.robots.so100 import SO100FollowerArm

        return SO100FollowerArm(config)
    if isinstance(config, SO100SimConfig):
        from gr00t_fast.robots.sim.robot import SimArm

        return SimArm(config)
    raise ConfigError(f"no arm is known for a configuration of type {type(config).__name__}; expected so100_follower, so101_follower or so100_sim.")
