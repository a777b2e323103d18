"""`--robot.type=so100_sim`: the simulated arm as a Robot; and the rendered cameras of a real one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, CameraSpec, Clock, JointUnit, LandingReport, Observation
from gr00t_fast.errors import CameraError, ConfigError, RobotError
from gr00t_fast.robots.config import CameraConfig, SimCameraConfig, SO100SimConfig
from gr00t_fast.robots.sim.scene import LIMITS_DEG, check_joints, from_degrees, to_degrees, units_per_deg
from gr00t_fast.robots.sim.simulation import HOME_DEG, Simulation, check_picture

LONGEST_DRAWING_S = 2.0  # a busy machine draws for a second
MAX_CATCH_UP_S = 10.0  # after a longer pause (a debugger, a suspended machine) the arm continues from here; it came to rest long before


class SimArm:
    """`contracts.Robot` for the simulated arm. Time passes in it as on `clock` (default: real time): physics is advanced to the clock's present
    whenever the arm is read or told something, so that whatever takes time between two calls, such as inference, lets the old targets act on."""

    name = "so100_sim"
    joint_names = SO100_JOINTS
    rest_pose = max_step = None  # nothing breaks when it falls
    stays_powered = False

    def __init__(self, config: SO100SimConfig, clock: Clock | None = None) -> None:
        """Loads nothing yet. Raises ConfigError for a camera that is not simulated."""
        for name, camera in config.cameras.items():
            _check_camera(name, camera)
        self.config = config
        self.joint_unit: JointUnit = "degrees" if config.use_degrees else "range_m100_100"
        self.cameras: Mapping[str, CameraSpec] = {
            name: CameraSpec(camera.width, camera.height, float(camera.fps)) for name, camera in config.cameras.items()
        }
        self.events: Counter[str] = Counter()
        self._clock = clock
        self._simulation: Simulation | None = None  # while connected
        self._last_s = 0.0  # when physics was last advanced, on the clock
        self._next_seed = 0
        self._played = False  # whether anything was sent since the scene was arranged
        self.episodes_solved = 0  # of those that are over
        self._solved = False  # of the last one that is
        self._landing: LandingReport | None = None
        self.check_stop: Callable[[], object] = lambda: None  # nothing here waits

    @property
    def joint_limits(self) -> np.ndarray:
        """(6, 2) lowest and highest target in `joint_unit`."""
        return from_degrees(LIMITS_DEG.T, self.joint_unit).T

    @property
    def units_per_deg(self) -> np.ndarray:
        """(6,) how much each joint's reading changes when its shaft turns by a degree."""
        return units_per_deg(self.joint_unit)

    def keep_alive(self) -> None:
        """Nothing is powered that could outlive the program."""

    @property
    def simulation(self) -> Simulation:
        """The world behind the arm, for scoring and for pictures beyond the cameras. Raises RobotError before `connect`."""
        if self._simulation is None:
            raise RobotError("the simulated arm is not connected. Call connect() first.")
        return self._simulation

    @property
    def success(self) -> bool:
        """Whether the task is solved now (see Simulation), or was when the arm landed."""
        return self._solved if self._simulation is None else self._simulation.success

    def connect(self) -> None:
        """Build the world and switch torque on; each camera draws once, so that the first tick is as quick as the next.

        Raises RobotError when connected already, MissingExtraError without MuJoCo.
        """
        if self._simulation is not None:
            raise RobotError("the simulated arm is already connected. Call land() before connecting again.")
        self._landing = None
        self._simulation = Simulation(self.config.task, 0, self.config.block_speed_m_s, self.config.servo_lag_ms)
        self.reset(0)
        self._frames()
        self._next_seed = 0

    def reset(self, seed: int | None = None) -> None:
        """Put the arm in its home pose and the objects where `seed` says; without a seed, the one after the last (the first is 0)."""
        seed = self._next_seed if seed is None else seed
        self._end_episode()
        self.simulation.reset(seed)
        self._last_s = self._now_s()
        self._next_seed = seed + 1

    def observe(self, with_frames: bool = True) -> Observation:
        """Joints (6,) in `joint_unit` and a freshly drawn frame of each camera. `with_frames=False` leaves `frames` empty. Raises RobotError."""
        self._catch_up()
        joints = from_degrees(self.simulation.joints_deg, self.joint_unit)
        return Observation(joints, self._frames() if with_frames else {}, self._last_s)

    def send(self, targets: np.ndarray) -> None:
        """Send goal positions (6,) in `joint_unit`; the servos clamp them to the calibrated range. Raises RobotError."""
        self._catch_up()
        try:
            checked = check_joints(targets, "targets")
        except ConfigError as error:
            raise RobotError(f"cannot send a goal to the simulated arm: {error}. The arm keeps its last goal.") from error
        self.simulation.set_targets(to_degrees(checked, self.joint_unit))
        self._played = True

    def land(self, as_found: bool = False) -> LandingReport:
        """Torque off (or held, as configured). Never raises; a second call returns the first report."""
        if self._landing is None:
            self._landing = LandingReport(port_closed=True, cameras_closed=True)
            if self._simulation is not None:
                self._end_episode()
                holds = not self.config.disable_torque_on_disconnect
                self._simulation.set_torque(holds)
                self._landing.torque = dict.fromkeys(SO100_JOINTS, "held" if holds else "off")
                self._simulation = None
        return self._landing

    def _now_s(self) -> float:
        return time.perf_counter() if self._clock is None else self._clock.now_s()

    def _catch_up(self) -> None:
        now_s = self._now_s()
        self.simulation.advance(min(max(0.0, now_s - self._last_s), MAX_CATCH_UP_S))
        self._last_s = now_s

    def _end_episode(self) -> None:
        self._solved = self.simulation.success
        self.episodes_solved += self._played and self._solved
        self._played = False

    def _frames(self) -> dict[str, np.ndarray]:
        return {name: self.simulation.render(camera.view, camera.width, camera.height) for name, camera in self.config.cameras.items()}


def _check_camera(name: str, camera: CameraConfig) -> None:
    if not isinstance(camera, SimCameraConfig):
        raise ConfigError(
            f"camera '{name}' is of type {type(camera).__name__}, but the simulated arm only has rendered ones. "
            "Use {type: sim, view: front, width: 640, height: 480, fps: 30}."
        )
    check_picture(camera.view, camera.width, camera.height, f"camera '{name}'")


# `type: sim` cameras of a real (or virtual) servo bus: pictures for an arm that has no camera, so that a whole run can be tried on a desk.


class RenderedCameras:
    """Draws the simulated scene with its arm in the pose that the servos report. The objects on the table stay where they are: no physics runs
    here, and nothing of the real surroundings is in the picture."""

    def __init__(self, cameras: Mapping[str, SimCameraConfig], unit: JointUnit) -> None:
        """Loads the scene, and draws once so that the first tick is as quick as the next. Raises MissingExtraError without MuJoCo, ConfigError for
        a picture size or view that cannot be drawn."""
        self._cameras, self._unit = cameras, unit
        self._simulation = Simulation("place", 0)
        self._drawing: Future[dict[str, np.ndarray]] = Future()
        self._draw(HOME_DEG, self._drawing)
        self._drawing.result()

    def frames(self, joints: np.ndarray, while_drawing: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Camera name -> uint8 RGB (height, width, 3), of the arm with these joints (6,) in its unit. `while_drawing` is called several times
        meanwhile. Raises CameraError when that takes longer than LONGEST_DRAWING_S, and whatever drawing raises."""
        self._wait(while_drawing)  # for an earlier one that took too long
        self._drawing = Future()
        arguments = (to_degrees(joints, self._unit), self._drawing)
        threading.Thread(target=self._draw, args=arguments, name="gr00t_fast-drawing", daemon=True).start()  # one that hangs ends with the program
        self._wait(while_drawing)
        return self._drawing.result()

    def _wait(self, while_drawing: Callable[[], None]) -> None:
        give_up_s = time.monotonic() + LONGEST_DRAWING_S
        while not wait([self._drawing], timeout=0.1).done:
            if time.monotonic() > give_up_s:
                raise CameraError(
                    f"the cameras of `type: sim` were not drawn within {LONGEST_DRAWING_S:g} s. The arm stops without them: use smaller or fewer "
                    "pictures, or end what else keeps this machine busy."
                )
            while_drawing()

    def _draw(self, joints_deg: np.ndarray, drawing: Future[dict[str, np.ndarray]]) -> None:
        try:
            self._simulation.place_arm(joints_deg)
            views = self._cameras.items()
            drawing.set_result({name: self._simulation.render(camera.view, camera.width, camera.height) for name, camera in views})
        except Exception as error:  # noqa: BLE001 - raised where the pictures are waited for
            drawing.set_exception(error)
