"""`--robot.type=so100_sim`: the simulated arm as a Robot, with cameras that look at the scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, CameraSpec, Clock, JointUnit, LandingReport, Observation
from gr00t_fast.errors import ConfigError, RobotError
from gr00t_fast.robots.config import CameraConfig, SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.drives import BusDrive, DirectDrive, Drive
from gr00t_fast.robots.so100_sim.simulation import CAMERA_VIEWS, Simulation
from gr00t_fast.robots.so100_sim.units import check_joints, units_per_deg


class SimArm:
    """`contracts.Robot` for the simulated arm. Time passes in it as on `clock` (default: real time), so slow inference has consequences.

    With `config.through_bus` the motors are driven by lerobot's driver over a virtual servo bus; that works in real time only.
    """

    name = "so100_sim"
    joint_names = SO100_JOINTS

    def __init__(self, config: SO100SimConfig, clock: Clock | None = None) -> None:
        """Loads nothing yet. Raises ConfigError for a camera that is not simulated, or a clock or a moving block together with `through_bus`."""
        if config.through_bus and clock is not None:
            raise ConfigError("through_bus runs in real time and takes no clock of its own; leave one of the two out.")
        if config.through_bus and config.block_speed_m_s:
            raise ConfigError("the block does not move when the arm is driven through_bus; leave one of the two out.")
        for name, camera in config.cameras.items():
            _check_camera(name, camera)
        self.config = config
        self.joint_unit: JointUnit = "degrees" if config.use_degrees else "range_m100_100"
        self.cameras: Mapping[str, CameraSpec] = {
            name: CameraSpec(camera.width, camera.height, float(camera.fps)) for name, camera in config.cameras.items()
        }
        self.events: Counter[str] = Counter()
        self._clock = clock
        self._drive: Drive | None = None  # while connected
        self._limits: np.ndarray | None = None
        self._next_seed = 0
        self._played = False  # whether anything was sent since the scene was arranged
        self.episodes_solved = 0  # of those that are over
        self._landing: LandingReport | None = None

    @property
    def joint_limits(self) -> np.ndarray:
        """(6, 2) lowest and highest target in `joint_unit`. Raises RobotError before `connect`."""
        if self._limits is None:
            raise RobotError("the simulated arm has no joint limits yet. Call connect() first.")
        return self._limits

    @property
    def units_per_deg(self) -> np.ndarray:
        """(6,) how much each joint's reading changes when its shaft turns by a degree."""
        return units_per_deg(self.joint_unit)

    def keep_alive(self) -> None:
        """Nothing is powered that could outlive the program."""

    @property
    def simulation(self) -> Simulation:
        """The world behind the arm, for scoring and for pictures beyond the cameras. It changes with each `reset` when `through_bus` is set."""
        return self._connected("look at the scene").simulation

    @property
    def success(self) -> bool:
        """Whether the task is solved now (see Simulation)."""
        return self.simulation.success

    def connect(self) -> None:
        """Build the world and switch torque on; each camera draws once, so that the first tick is as quick as the next.

        Raises RobotError when connected already, MissingExtraError without MuJoCo (or lerobot, with `through_bus`).
        """
        if self._drive is not None:
            raise RobotError("the simulated arm is already connected. Call land() before connecting again.")
        self._landing = None
        if self.config.through_bus:
            self._drive = BusDrive(self.config, self.events)
        else:
            self._drive = DirectDrive(self.config, self.joint_unit, self._clock)
        try:
            self.reset()
            self._limits = self._drive.limits()
            self._frames(self._drive.simulation)
            self._next_seed = 0
        except BaseException:
            self.land()
            raise

    def reset(self, seed: int | None = None) -> None:
        """Put the arm in its home pose and the objects where `seed` says; without a seed, the one after the last (the first is 0)."""
        drive, seed = self._connected("reset"), self._next_seed if seed is None else seed
        self._end_episode(drive)
        drive.begin(seed)
        self._next_seed = seed + 1

    def observe(self, with_frames: bool = True) -> Observation:
        """Joints (6,) in `joint_unit` and a freshly drawn frame of each camera. `with_frames=False` leaves `frames` empty. Raises RobotError."""
        drive = self._connected("observe")
        joints, time_s = drive.read()
        return Observation(joints, self._frames(drive.simulation) if with_frames else {}, time_s)

    def send(self, targets: np.ndarray) -> None:
        """Send goal positions (6,) in `joint_unit`; the servos clamp them to the calibrated range. Raises RobotError."""
        drive = self._connected("send")
        try:
            checked = check_joints(targets, "targets")
        except ConfigError as error:
            raise RobotError(f"cannot send a goal to the simulated arm: {error}. The arm keeps its last goal.") from error
        drive.send(checked)
        self._played = True

    def land(self) -> LandingReport:
        """Torque off (or held, as configured). Never raises; a second call returns the first report."""
        if self._landing is None:
            drive, self._drive = self._drive, None
            if drive is not None:
                self._end_episode(drive)
            self._landing = LandingReport(port_closed=True, cameras_closed=True) if drive is None else drive.end()
        return self._landing

    def _end_episode(self, drive: Drive) -> None:
        self.episodes_solved += self._played and drive.simulation.success
        self._played = False

    def _connected(self, doing: str) -> Drive:
        if self._drive is None:
            raise RobotError(f"cannot {doing}: the simulated arm is not connected. Call connect() first.")
        return self._drive

    def _frames(self, simulation: Simulation) -> dict[str, np.ndarray]:
        return {name: simulation.render(camera.view, camera.width, camera.height) for name, camera in self.config.cameras.items()}


def _check_camera(name: str, camera: CameraConfig) -> None:
    if not isinstance(camera, SimCameraConfig):
        raise ConfigError(
            f"camera '{name}' is of type {type(camera).__name__}, but the simulated arm only has rendered ones. "
            "Use {type: sim, view: front, width: 640, height: 480, fps: 30}."
        )
    if camera.view not in CAMERA_VIEWS:
        raise ConfigError(f"camera '{name}': view must be one of {', '.join(CAMERA_VIEWS)}, but it is '{camera.view}'.")
    if not (0 < camera.width <= 4096 and 0 < camera.height <= 4096):
        raise ConfigError(f"camera '{name}': width and height must be within 1..4096 pixels, but they are {camera.width}x{camera.height}.")
