"""`--robot.type=so100_sim`: the simulated arm as a Robot, with cameras that look at the scene.

Two drives move its motors: straight into the physics, or through lerobot's driver and a virtual servo bus.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, CameraSpec, Clock, JointUnit, LandingReport, Observation
from gr00t_fast.errors import ConfigError, RobotError
from gr00t_fast.robots.config import CameraConfig, SimCameraConfig, SO100FollowerConfig, SO100SimConfig
from gr00t_fast.robots.sim.scene import LIMITS_DEG, check_joints, from_degrees, to_degrees, units_per_deg
from gr00t_fast.robots.sim.simulation import CAMERA_VIEWS, ScenePlant, Simulation

if TYPE_CHECKING:
    from gr00t_fast.robots.so100 import SO100FollowerArm
    from gr00t_fast.robots.virtual_bus import VirtualBus
    from gr00t_fast.robots.virtual_bus.servo import Calibration

# --- drives -------------------------------------------------------------------------------------------------------------------------------------

MAX_CATCH_UP_S = 10.0  # after a longer pause (a debugger, a suspended machine) the arm continues from here; it came to rest long before


class Drive(Protocol):
    """Motors of one episode after another. `begin` first; `end` last."""

    simulation: Simulation

    def begin(self, seed: int) -> None:
        """A fresh scene from `seed`, torque on."""

    def limits(self) -> np.ndarray:
        """(6, 2) in the configured unit."""

    def read(self) -> tuple[np.ndarray, float]:
        """Joints (6,) in the configured unit, and the time of the reading (s)."""

    def send(self, targets: np.ndarray) -> None:
        """Goal positions (6,) in the configured unit."""

    def end(self) -> LandingReport:
        """Release or hold, as configured. Does not raise."""


class WallClock:
    """Real time; `contracts.Clock`."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        return time.perf_counter()

    def sleep_until_s(self, deadline_s: float) -> None:
        """Wait coarsely."""
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


class DirectDrive:
    """Targets go straight to the simulated motors. Physics is advanced to the clock's present whenever the arm is read or told something,
    so that whatever takes time between two calls, such as inference, lets the old targets act on."""

    def __init__(self, config: SO100SimConfig, unit: JointUnit, clock: Clock | None) -> None:
        self._hold, self._unit, self._clock = not config.disable_torque_on_disconnect, unit, clock or WallClock()
        self.simulation = Simulation(config.task, 0, config.block_speed_m_s, config.servo_lag_ms)

    def begin(self, seed: int) -> None:
        self.simulation.reset(seed)
        self._last_s = self._clock.now_s()

    def limits(self) -> np.ndarray:
        return from_degrees(LIMITS_DEG.T, self._unit).T

    def read(self) -> tuple[np.ndarray, float]:
        self._catch_up()
        return from_degrees(self.simulation.joints_deg, self._unit), self._last_s

    def send(self, targets: np.ndarray) -> None:
        self._catch_up()
        self.simulation.set_targets(to_degrees(targets, self._unit))

    def end(self) -> LandingReport:
        if not self._hold:
            self.simulation.set_torque(False)
        return LandingReport(dict.fromkeys(SO100_JOINTS, "held" if self._hold else "off"), port_closed=True, cameras_closed=True)

    def _catch_up(self) -> None:
        now_s = self._clock.now_s()
        self.simulation.advance(min(max(0.0, now_s - self._last_s), MAX_CATCH_UP_S))
        self._last_s = now_s


class BusDrive:
    """lerobot's unmodified driver on one end of a pseudo-terminal, six virtual servos that move the simulated arm on the other.

    The bus runs in its own thread and in real time. Each episode begins with a power cycle: between episodes the joints
    change without motion, which a connected driver treats as a fault.
    """

    def __init__(self, config: SO100SimConfig, events: Counter[str]) -> None:
        self._config, self._events = config, events
        self._arm: SO100FollowerArm | None = None
        self._bus: VirtualBus | None = None
        self._directory: tempfile.TemporaryDirectory | None = None
        self.simulation = Simulation(config.task, 0)  # replaced by that of each episode's plant

    def begin(self, seed: int) -> None:
        from gr00t_fast.robots.so100 import SO100FollowerArm
        from gr00t_fast.robots.virtual_bus import VirtualBus, save_calibration

        self._close()
        plant = ScenePlant(self._config.task, seed, self._config.servo_lag_ms)
        calibration = self._calibration()
        self._directory = tempfile.TemporaryDirectory(prefix="so100_sim_")
        save_calibration(calibration, Path(self._directory.name) / "so100_sim.json")
        self.simulation = plant.simulation
        self._bus = VirtualBus(calibration, plant)
        self._bus.start()
        self._arm = SO100FollowerArm(
            SO100FollowerConfig(
                id="so100_sim",
                calibration_dir=Path(self._directory.name),
                port=self._bus.port,
                use_degrees=self._config.use_degrees,
                disable_torque_on_disconnect=self._config.disable_torque_on_disconnect,
                watchdog_s=None,  # nothing of this bus outlives the program
            )
        )
        self._arm.events = self._events  # one count over all episodes
        self._arm.connect()

    def limits(self) -> np.ndarray:
        return self._connected().joint_limits

    def read(self) -> tuple[np.ndarray, float]:
        observation = self._connected().observe()
        return observation.joints, observation.time_s

    def send(self, targets: np.ndarray) -> None:
        self._connected().send(targets)

    def end(self) -> LandingReport:
        return self._close()

    def _connected(self) -> SO100FollowerArm:
        if self._bus is not None and self._bus.failure is not None:
            raise RobotError(f"the virtual servo bus stopped: {self._bus.failure}. This is a bug in the simulation.") from self._bus.failure
        if self._arm is None:
            raise RobotError("the simulated arm is not connected. Call connect() first.")
        return self._arm

    def _calibration(self) -> Calibration:
        from gr00t_fast.robots.virtual_bus import default_calibration, load_calibration

        if (self._config.id is None) != (self._config.calibration_dir is None):
            raise ConfigError("a calibration for the simulated servos needs both --robot.id and --robot.calibration_dir; give both or neither.")
        if self._config.id is None or self._config.calibration_dir is None:
            return default_calibration()
        return load_calibration(self._config.calibration_dir / f"{self._config.id}.json")

    def _close(self) -> LandingReport:
        arm, bus, directory = self._arm, self._bus, self._directory
        self._arm = self._bus = self._directory = None
        report = arm.land() if arm is not None else LandingReport(port_closed=True, cameras_closed=True)
        try:
            if bus is not None:
                bus.close()
                # The bus's thread may have stopped before the physics took a step with the last registers written.
                self.simulation.set_torque([bool(register) for register in bus.torque().values()])
            if directory is not None:
                directory.cleanup()
        except OSError as error:
            report.problems.append(f"closing the virtual servo bus: {error}")
        return report


# --- robot --------------------------------------------------------------------------------------------------------------------------------------


class SimArm:
    """`contracts.Robot` for the simulated arm. Time passes in it as on `clock` (default: real time), so slow inference has consequences.

    With `config.through_bus` the motors are driven by lerobot's driver over a virtual servo bus; that works in real time only.
    """

    name = "so100_sim"
    joint_names = SO100_JOINTS
    rest_pose = None  # nothing breaks when it falls

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
        self._solved = False  # of the last one that is
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
        """Whether the task is solved now (see Simulation), or was when the arm landed."""
        return self._solved if self._drive is None else self._drive.simulation.success

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

    def land(self, as_found: bool = False) -> LandingReport:
        """Torque off (or held, as configured). Never raises; a second call returns the first report."""
        if self._landing is None:
            drive, self._drive = self._drive, None
            if drive is not None:
                self._end_episode(drive)
            self._landing = LandingReport(port_closed=True, cameras_closed=True) if drive is None else drive.end()
        return self._landing

    def _end_episode(self, drive: Drive) -> None:
        self._solved = drive.simulation.success
        self.episodes_solved += self._played and self._solved
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
