"""The simulated arm and its scene: targets in, physics, joints and pictures out; and the same as the mechanics behind a servo bus."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from gr00t_fast.errors import ConfigError, require
from gr00t_fast.robots.sim.rendering import Pinhole, SceneRenderer
from gr00t_fast.robots.sim.scene import (
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
    radians_to_degrees,
    sample_layout,
    scene_xml,
)

# Where an episode starts, lerobot degrees: gripper over the table, camera on the far side of the fingers, jaw a little open.
HOME_DEG = np.array([0.0, -20.0, 20.0, 75.0, -90.0, 10.0])

TICK_S = 1 / 30  # success is judged at the datasets' rate
REACH_M, REACH_TICKS = 0.03, 5
_RELEASED_M = 0.02  # more than this from the block to the nearest finger pad is not holding it
_RELAXED_DAMPING = 0.3  # of the powered servo's: what the gear train resists without torque
MAX_BLOCK_SPEED_M_S = 1.0
CAMERA_VIEWS = ("front", "wrist")


class Simulation:
    """An SO-100 before a block and, for `place`, a bowl. Joints are lerobot degrees, the gripper 0..100 per cent open.

    Deterministic per seed and sequence of calls. Safe to use from several threads: pictures are drawn from a snapshot outside the lock.
    With a block speed the block of `reach` is carried to and fro, as on a belt that nothing stops, see `scene.block_path`.
    `servo_lag_ms`: by how much a joint in motion trails its target. None: as the model's motors do, 90 to 103 ms. More: targets pass a first-order
    low-pass before the motors. Of a real SO-101 133 to 200 ms were measured (public recording, 4 episodes at 30 Hz: 4 to 6 ticks between commanded
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
            camera = self._camera(view, width, height)
        with self._render_lock:
            if self._renderer is None:
                bodies = [self.model.body(i).name for i in range(self.model.nbody)]
                self._renderer = SceneRenderer(bodies, with_bowl=self.task == "place")
            return self._renderer.draw(positions, rotations, camera, view, samples)

    def _camera(self, view: str, width: int, height: int) -> Pinhole:
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
