"""The simulated arm and its scene: targets in, physics, joints and pictures out; and the same as the mechanics behind a servo bus, as the arm
`--robot.type=so100_sim`, and as the rendered cameras of a real arm."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.contracts import SO100_JOINTS, CameraSpec, Clock, JointUnit, LandingReport, Observation
from gr00t_fast.base.errors import CameraError, ConfigError, RobotError, require
from gr00t_fast.robots import CameraConfig, SimCameraConfig, SO100SimConfig
from gr00t_fast.virtual.sim.rendering import Pinhole, SceneRenderer
from gr00t_fast.virtual.sim.scene import (
    BLOCK_HALF_M,
    BOWL_HEIGHT_M,
    BOWL_RADIUS_M,
    LIMITS_DEG,
    TIMESTEP_S,
    Layout,
    Task,
    block_path,
    check_joints,
    degrees_to_radians,
    from_degrees,
    radians_to_degrees,
    sample_layout,
    scene_xml,
    to_degrees,
    units_per_deg,
)

# Where an episode starts, lerobot degrees: gripper over the table, camera on the far side of the fingers, jaw a little open.
HOME_DEG = np.array([0.0, -20.0, 20.0, 75.0, -90.0, 10.0])

FIRST_LAYOUT_SEED = 1_000_000  # of training and of recorded data; layouts below are held out for evaluation
TICK_S = 1 / 30  # success is judged at the datasets' rate
REACH_M, REACH_TICKS = 0.03, 5
_RELEASED_M = 0.02  # more than this from the block to the nearest finger pad is not holding it
_RELAXED_DAMPING = 0.3  # of the powered servo's: what the gear train resists without torque
MAX_BLOCK_SPEED_M_S = 1.0
CAMERA_VIEWS = ("front", "wrist")
LONGEST_DRAWING_S = 2.0  # a busy machine draws for a second
MAX_CATCH_UP_S = 10.0  # after a longer pause (a debugger, a suspended machine) the arm continues from here; it came to rest long before


class Simulation:
    """An SO-100 before a block and, for `place`, a bowl. Joints are lerobot degrees, the gripper 0..100 per cent open.

    Deterministic per seed and sequence of calls. Safe to use from several threads: pictures are drawn from a snapshot outside the lock.
    With a block speed the block of `reach` is carried to and fro, as on a belt that nothing stops, see `scene.block_path`.
    `servo_lag_ms`: by how much a joint in motion trails its target. None: as the model's motors do, 90 to 103 ms. More: targets pass a first-order
    low-pass before the motors. A real SO-101 had 133 to 200 ms (public recording, 4 episodes at 30 Hz: 4 to 6 ticks between commanded
    and measured joints); first order because lerobot halves the servos' proportional gain (P_Coefficient 16), which rounds motions off.
    `watch` is called at each tick of TICK_S, after `success` has been judged.
    Raises ConfigError (task, view, values), MissingExtraError (MuJoCo is not installed).
    """

    def __init__(self, task: Task = "place", seed: int = 0, block_speed_m_s: float = 0.0, servo_lag_ms: float | None = None) -> None:
        if not 0 <= block_speed_m_s <= MAX_BLOCK_SPEED_M_S or (block_speed_m_s and task != "reach"):
            raise ConfigError(
                f"the block's speed must be 0 to {MAX_BLOCK_SPEED_M_S} m/s, and 0 unless the task is 'reach'; it is {block_speed_m_s} in '{task}'."
            )
        self._block_speed_m_s = block_speed_m_s
        self.watch: Callable[[], None] | None = None
        self._mujoco = require("mujoco", "sim")
        self.task, self.xml = task, scene_xml(task, servo_lag_ms)
        self.model = self._mujoco.MjModel.from_xml_string(self.xml)
        self.data = self._mujoco.MjData(self.model)
        self.lock = threading.RLock()
        self._render_lock = threading.Lock()
        self._gain, self._bias = self.model.actuator_gainprm.copy(), self.model.actuator_biasprm.copy()
        self._limits_rad = degrees_to_radians(LIMITS_DEG.T)  # (2,6)
        self._tcp = self.model.site("tcp").id
        self._pads = [i for i in range(self.model.ngeom) if "_pad" in self.model.geom(i).name]
        self._renderer: SceneRenderer | None = None
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begin an episode: objects placed from `seed`, arm at HOME_DEG and holding it."""
        layout = sample_layout(self.task, seed)
        with self.lock:
            self._mujoco.mj_resetData(self.model, self.data)
            self.seed, self.layout = seed, layout
            self.data.qpos[:6] = degrees_to_radians(HOME_DEG)
            self._place_objects(layout)
            self.data.ctrl[:] = self.data.qpos[:6]
            self.data.act[:] = self.data.qpos[: len(self.data.act)]  # the low-pass of servo_lag_ms, where there is one
            self.set_torque(True)
            self._owed_s, self._tick_due_s, self._near_ticks, self.success = 0.0, TICK_S, 0, False
            self._mujoco.mj_forward(self.model, self.data)

    def _place_objects(self, layout: Layout) -> None:
        half = layout.block_yaw_rad / 2
        self.data.joint("block").qpos[:] = [*layout.block_xy_m, BLOCK_HALF_M, np.cos(half), 0, 0, np.sin(half)]
        if layout.bowl_xy_m is not None:
            self.data.joint("bowl").qpos[:] = [*layout.bowl_xy_m, 0, 1, 0, 0, 0]

    # --- arm ---------------------------------------------------------------------------------------------------------------------------

    @property
    def joints_deg(self) -> np.ndarray:
        """Joint positions (6,), lerobot degrees and per cent."""
        with self.lock:
            return radians_to_degrees(self.data.qpos[:6])

    def place_arm(self, joints_deg: np.ndarray) -> None:
        """Put the arm into a pose (6,) by hand, without physics; objects stay where they are."""
        with self.lock:
            self.data.qpos[:6] = degrees_to_radians(check_joints(joints_deg, "joints"))
            self._update_poses()

    def set_targets(self, targets_deg: np.ndarray) -> None:
        """Goal positions (6,); like the servos, clamped to the calibrated range. They act where torque is on."""
        targets = degrees_to_radians(check_joints(targets_deg, "targets"))
        with self.lock:
            self.data.ctrl[:] = np.clip(targets, *self._limits_rad)

    @property
    def targets_deg(self) -> np.ndarray:
        """Goal positions in force (6,)."""
        with self.lock:
            return radians_to_degrees(self.data.ctrl)

    def set_torque(self, on: bool | Sequence[bool]) -> None:
        """Switch the motors, all or one by one. A motor that comes on holds where it is until a target arrives; off, the joint sags."""
        switched = np.broadcast_to(np.asarray(on, dtype=bool), 6)
        with self.lock:
            comes_on = switched & ~self.torque_on
            self.data.ctrl[comes_on] = self.data.qpos[:6][comes_on]
            if self.data.act.size:
                self.data.act[comes_on] = self.data.qpos[:6][comes_on]
            self.model.actuator_gainprm[:] = np.where(switched[:, None], self._gain, 0)
            relaxed = self._bias * [0, 0, _RELAXED_DAMPING, *[0] * (self._bias.shape[1] - 3)]
            self.model.actuator_biasprm[:] = np.where(switched[:, None], self._bias, relaxed)

    @property
    def torque_on(self) -> np.ndarray:
        """Which motors pull, bool (6,)."""
        with self.lock:
            return self.model.actuator_gainprm[:, 0] != 0

    # --- time --------------------------------------------------------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since `reset`."""
        return float(self.data.time)

    def advance(self, dt_s: float) -> None:
        """Let time pass, in whole steps of the physics; the remainder is owed to the next call. `success` is judged on the way."""
        if not dt_s >= 0:
            raise ConfigError(f"time to advance must be a number of seconds >= 0, but it is {dt_s!r}")
        with self.lock:
            self._owed_s += dt_s
            while self._owed_s >= TIMESTEP_S - 1e-9:
                self._mujoco.mj_step(self.model, self.data)
                self._owed_s -= TIMESTEP_S
                if self._block_speed_m_s:
                    self._carry_block()
                if self.data.time >= self._tick_due_s:
                    self._tick_due_s += TICK_S
                    self._judge()
                    if self.watch:
                        self.watch()
            self._update_poses()

    def _carry_block(self) -> None:
        block, half = self.data.joint("block"), self.layout.block_yaw_rad / 2
        (x, y), velocity = block_path(self.layout, self.seed, self._block_speed_m_s, self.time_s)
        block.qpos[:] = [x, y, BLOCK_HALF_M, np.cos(half), 0, 0, np.sin(half)]
        block.qvel[:] = [*velocity, 0, 0, 0, 0]

    def _update_poses(self) -> None:
        """A step of MuJoCo leaves the poses of the step before; whoever looks, by number or by picture, shall see the present."""
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    # --- task --------------------------------------------------------------------------------------------------------------------------

    @property
    def tcp_m(self) -> np.ndarray:
        """The point between the finger tips, world (3,)."""
        return self.data.site_xpos[self._tcp].copy()

    @property
    def block_m(self) -> np.ndarray:
        """Centre of the block, world (3,)."""
        return self.data.body("block").xpos.copy()

    @property
    def block_yaw_rad(self) -> float:
        """Turn of the block about the vertical, modulo a quarter turn, in [-pi/4, pi/4): which way its sides face, whatever side it lies on."""
        axes = self.data.body("block").xmat.reshape(3, 3)
        level = axes[:, np.argmin(np.abs(axes[2]))]
        return float((np.arctan2(level[1], level[0]) + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    @property
    def bowl_m(self) -> np.ndarray | None:
        """Bottom centre of the bowl, world (3,); None where the task has no bowl."""
        return self.data.body("bowl").xpos.copy() if self.task == "place" else None

    def _judge(self) -> None:
        if self.task == "reach":
            near = np.linalg.norm(self.tcp_m - self.block_m) < REACH_M
            self._near_ticks = self._near_ticks + 1 if near else 0
            self.success = self.success or self._near_ticks >= REACH_TICKS
        else:
            self.success = self.block_in_bowl and self.block_released

    @property
    def block_in_bowl(self) -> bool:
        """The block's centre is inside the bowl's ring and below its rim."""
        if self.bowl_m is None:
            return False
        apart = self.block_m - self.bowl_m
        return bool(np.hypot(*apart[:2]) < BOWL_RADIUS_M and 0 < apart[2] < BOWL_HEIGHT_M)

    @property
    def block_released(self) -> bool:
        """No finger pad is close to the block's surface."""
        pads = self.data.geom_xpos[self._pads]
        return bool(np.linalg.norm(pads - self.block_m, axis=1).min() > BLOCK_HALF_M + _RELEASED_M)

    # --- pictures ----------------------------------------------------------------------------------------------------------------------

    def render(self, view: str = "front", width: int = 640, height: int = 480, samples: int = 1) -> np.ndarray:
        """What a camera sees now, uint8 RGB (height, width, 3). samples=2 smooths edges at four times the cost."""
        check_picture(view, width, height)
        with self.lock:
            positions, rotations = self.data.xpos.copy(), self.data.xmat.reshape(-1, 3, 3).copy()
            camera = self.camera(view, width, height)
        with self._render_lock:
            if self._renderer is None:
                bodies = [self.model.body(i).name for i in range(self.model.nbody)]
                self._renderer = SceneRenderer(bodies, with_bowl=self.task == "place")
            return self._renderer.draw(positions, rotations, camera, view, samples)

    def camera(self, view: str, width: int, height: int) -> Pinhole:
        index = self.model.camera(view).id
        axes = self.data.cam_xmat[index].reshape(3, 3) * [1, -1, -1]  # MuJoCo: right, up, backward
        return Pinhole(self.data.cam_xpos[index].copy(), axes, float(self.model.cam_fovy[index]), width, height)


def check_picture(view: str, width: int, height: int, name: str = "a picture") -> None:
    """Raises ConfigError for what `Simulation.render` cannot draw."""
    if view not in CAMERA_VIEWS or not (0 < width <= 4096 and 0 < height <= 4096):
        raise ConfigError(f"{name} takes a view of {', '.join(CAMERA_VIEWS)}, width and height of 1 to 4096 pixels, got '{view}', {width}x{height}.")


# --- the mechanics behind a servo bus -----------------------------------------------------------------------------------------------------------


class ScenePlant:
    """What `VirtualBus(plant=...)` drives: servos' set-points in, the positions physics makes of them out.

    `simulation` may be drawn from another thread meanwhile. Positions and targets are lerobot degrees, the gripper 0..100.
    """

    def __init__(self, task: Task = "place", seed: int = 0, servo_lag_ms: float | None = None) -> None:
        self.simulation = Simulation(task, seed, servo_lag_ms=servo_lag_ms)
        self.simulation.set_torque(False)  # a servo comes up without torque

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Let `dt_s` pass while each motor pulls towards its target (None: torque off). Returns the six positions."""
        simulation = self.simulation
        pulls = [target is not None for target in targets_deg]
        with simulation.lock:
            if pulls != simulation.torque_on.tolist():
                simulation.set_torque(pulls)
            held = simulation.targets_deg
            simulation.set_targets(np.array([held[i] if target is None else target for i, target in enumerate(targets_deg)]))
            simulation.advance(dt_s)
            return simulation.joints_deg.tolist()


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
        self._clock = clock or MonotonicClock()
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

    def lower_if_killed(self, pose: Sequence[float] | None) -> None:
        """It is gone with the program."""

    def reset(self, seed: int | None = None) -> None:
        """Put the arm in its home pose and the objects where `seed` says; without a seed, the one after the last (the first is 0)."""
        seed = self._next_seed if seed is None else seed
        self._end_episode()
        self.simulation.reset(seed)
        self._last_s = self._clock.now_s()
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

    def _catch_up(self) -> None:
        now_s = self._clock.now_s()
        self.simulation.advance(min(max(0.0, now_s - self._last_s), MAX_CATCH_UP_S))
        self._last_s = now_s

    def _end_episode(self) -> None:
        self._solved = self.simulation.success
        self.episodes_solved += self._played and self._solved
        self._played = False

    def _frames(self) -> dict[str, np.ndarray]:
        cameras: Mapping[str, Any] = self.config.cameras
        return {name: self.simulation.render(camera.view, camera.width, camera.height) for name, camera in cameras.items()}


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
