"""The real SO-100 through lerobot's driver, and the flags of every arm (`--robot.*`): which arm, on which port, with which cameras.

The fields of the real arm are lerobot's own (`SOFollowerRobotConfig`, `OpenCVCameraConfig`; all that versions 0.4.3 to 0.6.1 have, but for the gains
of the servos), so that a command line written for lerobot works unchanged. They are declared here once more because importing lerobot takes five
seconds, which `--help` must not; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from gr00t_fast.base.errors import AT_LEAST_1, check_ranges, require
from gr00t_fast.base.flags import Choice, Flags, setting


@dataclass
class CameraConfig(Choice):
    """A camera by `type`; width, height and fps are what it is asked to deliver. Types beyond those here are the installed lerobot's."""

    width: int = 640
    height: int = 480
    fps: int = 30

    @classmethod
    def find_types(cls) -> None:
        from gr00t_fast.robots.lerobot_glue import find_camera_types

        find_camera_types()


@dataclass
class OpenCVCameraConfig(CameraConfig, type="opencv"):
    """A camera that OpenCV opens by number or device path (lerobot's `type: opencv`)."""

    index_or_path: int | Path = 0
    color_mode: Literal["rgb", "bgr"] = "rgb"
    rotation: Literal[0, 90, 180, -90] = 0
    warmup_s: int = 1
    fourcc: str | None = None
    backend: int = 0  # OpenCV's number of a capture backend; 0: any


@dataclass
class SimCameraConfig(CameraConfig, type="sim"):
    """A rendered camera of the simulated scene; for a servo bus, of that scene with the arm in the pose its servos report."""

    view: Literal["front", "wrist"] = "front"


_ONE_ARM = "gr00t_fast drives one arm. For a policy of two arms use lerobot-rollout with NVIDIA's or lerobot's own policy."


@dataclass
class RobotConfig(Choice):
    """An arm by `type`."""

    instead: ClassVar = {
        **{former: f"Expected {former}_follower." for former in ("so100", "so101")},  # lerobot's before version 0.2
        **dict.fromkeys(("bi_so_follower", "bi_so100_follower", "bi_so101_follower"), _ONE_ARM),
        **dict.fromkeys(("lekiwi", "lekiwi_client"), "gr00t_fast drives an SO-100 or SO-101 on a table, without a mobile base."),
    }

    id: str | None = None  # names the calibration file
    calibration_dir: Path | None = None  # where that file is; default: where lerobot keeps it


@dataclass
class SO100FollowerConfig(RobotConfig, type="so100_follower"):
    """The real arm, driven by lerobot's unmodified `SO100Follower`."""

    port: str = ""  # serial device, e.g. /dev/ttyACM0; required
    cameras: dict[str, CameraConfig] = field(default_factory=dict)  # "{name: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}"
    disable_torque_on_disconnect: bool = True  # False: hold the last pose when the run ends
    max_relative_target: float | dict[str, float] | None = None  # lerobot's own step limit, on top of ours
    use_degrees: bool = True  # body joints in degrees; false: -100 to 100 over the calibrated range
    num_read_retries: int = 2  # so often a request that a servo missed or answered damaged is repeated
    reconnect_s: float = 5.0  # how long an unplugged port may stay away before the run ends
    watchdog_s: float | None = 1.0  # without a heartbeat for so long, a process beside the program ends it and takes the torque off; null: never


@dataclass
class SO101FollowerConfig(SO100FollowerConfig, type="so101_follower"):
    """The same driver and settings; reports and recordings name this arm."""


@dataclass
class SO100SimConfig(RobotConfig, type="so100_sim"):
    """A MuJoCo SO-100 on a table with a block and a bowl; needs no hardware and no OpenGL."""

    task: Literal["reach", "place"] = "place"  # what stands on the table, and what counts as solved
    cameras: dict[str, CameraConfig] = field(default_factory=lambda: {"front": SimCameraConfig()})
    use_degrees: bool = True
    disable_torque_on_disconnect: bool = True
    # Of programs that measure. Reach only: the block is carried to and fro on an arc about the arm; slow inference then misses it.
    block_speed_m_s: float = setting(0.0, flag=False)
    servo_lag_ms: float | None = setting(None, flag=False)  # see Simulation


@dataclass(kw_only=True)
class ArmOptions(Flags):
    """The arm, and what is checked before it may move."""

    GROUP = "arm"

    robot: RobotConfig | None = None
    preflight: Literal["refuse", "warn"] = "refuse"  # warn: go on although the arm and the data contradict each other

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.robot is None:
            yield "robot.type", f"choose from {', '.join(sorted(RobotConfig.types))}"
        elif isinstance(self.robot, SO100FollowerConfig) and not self.robot.port.strip():
            yield "robot.port", "the arm's serial device, /dev/ttyACM0 (Linux) or /dev/tty.usbmodem... (macOS). `lerobot-find-port` finds it"
        yield from super().missing()

    def check(self) -> None:
        super().check()
        for name, camera in getattr(self.robot, "cameras", {}).items():
            check_ranges(camera, f"robot.cameras.{name}.", width=AT_LEAST_1, height=AT_LEAST_1, fps=AT_LEAST_1)
        if isinstance(self.robot, SO100FollowerConfig):
            from gr00t_fast.robots.lerobot_glue import check_numbers

            check_numbers(self.robot)

    def notes(self) -> list[str]:
        """A policy that looks at pictures of another world moves the arm blindly: right for a virtual bus, wrong for an arm of metal."""
        drawn = ", ".join(rendered(getattr(self.robot, "cameras", {})))
        if not drawn or not isinstance(self.robot, SO100FollowerConfig):
            return super().notes()
        what = f"camera {drawn} has type sim: it draws the simulated scene with the arm where its servos say it is, and shows nothing real."
        return [*super().notes(), f"{what} Meant for the virtual servo bus; a real camera is {{type: opencv, ...}}."]


def filmed(config: RobotConfig | None) -> dict[str, CameraConfig]:
    """The cameras that lerobot opens."""
    return {name: camera for name, camera in getattr(config, "cameras", {}).items() if not isinstance(camera, SimCameraConfig)}


def rendered(cameras: Mapping[str, CameraConfig]) -> dict[str, SimCameraConfig]:
    """Those that are drawn, not filmed."""
    return {name: camera for name, camera in cameras.items() if isinstance(camera, SimCameraConfig)}


def check_ready(config: RobotConfig) -> None:
    """What can be known of an arm in no time, to be asked before anything slow is done: are its port and its calibration file there?

    Raises RobotError, or MissingExtraError for cameras of `type: sim` without MuJoCo.
    """
    if isinstance(config, SO100FollowerConfig):
        if rendered(config.cameras):
            require("mujoco", "sim")
        from gr00t_fast.robots.lerobot_glue import check_calibration_exists, check_port

        check_port(config.port)
        check_calibration_exists(config)
