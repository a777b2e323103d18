"""Training samples of `reach`: a picture, the joints, and what the expert would do, at random states around its ways.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1

A state needs no roll-out: the arm is put there, the front camera looks, and inverse kinematics knows the expert's next actions (`expert_chunk`).
States lie on the expert's way to the block (with joint noise), at its end, and on the way to where a block is not, so that the network learns
to come back. Layouts are drawn from seeds at and above FIRST_LAYOUT_SEED; evaluation uses those below. The same command continues an
interrupted run, and a higher --count adds to it; a directory holds samples of one seed.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from gr00t_fast.base.errors import ConfigError, RobotError, check_ranges, require
from gr00t_fast.base.files import atomic_write
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.cli.main import Command
from gr00t_fast.model.vision import pixel_values
from gr00t_fast.virtual.sim.expert import GraspKinematics
from gr00t_fast.virtual.sim.scene import GRIPPER, LIMITS_DEG, PAN_AXIS_XY_M, degrees_to_radians
from gr00t_fast.virtual.sim.simulation import FIRST_LAYOUT_SEED, HOME_DEG, Simulation

# --- labels: what the expert would do next ------------------------------------------------------------------------------------------------------

HORIZON = 16  # actions in a chunk, as the published network
FPS = 30
HOVER_M, REACH_M = 0.062, 0.012  # above the block's centre: where the expert turns downwards, and where it holds
_HOVER_TOLERANCE_M = 0.012  # at the rim of the workspace the hover pose tilts instead
_OPEN_PERCENT = 55.0
_STEP = np.array([4.0] * GRIPPER + [8.0])  # largest change of a target per tick: 120 degrees per second, jaw in per cent
_NEAR_DEG = 12.0  # this close to the line from hover to goal, the way down is free
# A servo in motion trails its target by about three ticks. A chunk that began at the measured joints would brake the arm at every
# inference: with a new one every 8 ticks, 18.5 ticks to success instead of 14.9.
_LEAD_TICKS = 2


@dataclass(frozen=True)
class Waypoints:
    """Joints (J,) in degrees, jaw open: above the block, and at it."""

    hover: np.ndarray
    goal: np.ndarray


def waypoints(simulation: Simulation, kinematics: GraspKinematics) -> Waypoints:
    """Of the block where it lies now. The search starts at the home pose turned towards the block, so equal blocks have equal poses.

    Raises RobotError when the block is out of reach.
    """
    block = simulation.block_m
    x, y = block[:2] - PAN_AXIS_XY_M
    start = HOME_DEG.copy()
    start[0] = np.rad2deg(np.arctan2(x, -y))
    hover = kinematics.solve(block + [0, 0, HOVER_M], None, start, _HOVER_TOLERANCE_M)
    goal = kinematics.solve(block + [0, 0, REACH_M], None, hover)
    hover[GRIPPER] = goal[GRIPPER] = _OPEN_PERCENT
    return Waypoints(hover, goal)


def expert_chunk(joints_deg: np.ndarray, points: Waypoints, horizon: int = HORIZON) -> np.ndarray:
    """Targets (H, J) in degrees from `joints_deg` (J,) on: straight lines in joint space at limited speed, then hold."""
    joints, targets = np.array(joints_deg, np.float64), []
    for _ in range(horizon + _LEAD_TICKS):
        joints = _step(joints, points.goal if _way_down_is_free(joints, points) else points.hover)
        targets.append(joints)
    return np.array(targets[_LEAD_TICKS:])


def _step(joints: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """One tick towards `goal`, all body joints in proportion; the jaw opens at its own speed."""
    away = goal - joints
    ratio = max(1.0, float(np.max(np.abs(away[:GRIPPER]) / _STEP[:GRIPPER])))
    moved = joints + away / ratio
    moved[GRIPPER] = joints[GRIPPER] + np.clip(away[GRIPPER], -_STEP[GRIPPER], _STEP[GRIPPER])
    return moved


def _way_down_is_free(joints: np.ndarray, points: Waypoints) -> bool:
    """Whether the body joints are near the line from hover to goal; from elsewhere the fingers would push the block away."""
    line = (points.goal - points.hover)[:GRIPPER]
    along = float(np.clip((joints - points.hover)[:GRIPPER] @ line / max(line @ line, 1e-9), 0, 1))
    return bool(np.abs(joints[:GRIPPER] - points.hover[:GRIPPER] - along * line).max() < _NEAR_DEG)


# --- samples ------------------------------------------------------------------------------------------------------------------------------------

RESOLUTION = (640, 480)  # width, height of the camera
IMAGE_SIZE = 112  # side of the picture the network sees
_SHARD = 500  # samples per file; what an interruption can lose
_STATES_PER_LAYOUT = 2
_LOWEST_TCP_M, _DEEPEST_CONTACT_M = 0.008, 0.001  # states below the table or inside the block are drawn again
_CROP_SCALE = 0.95  # of model.vision.pixel_values: the part of the frame that the network sees


@dataclass(frozen=True)
class Samples:
    """pictures uint8 (N, side, side, 3) as the network sees them; joints float32 (N, 6); chunks float32 (N, 16, 6), both in degrees; block float32
    (N, 2): where its centre is in the picture, 0 to 1 from left and from top."""

    pictures: np.ndarray
    joints: np.ndarray
    chunks: np.ndarray
    block: np.ndarray

    def __len__(self) -> int:
        return len(self.joints)


class Sampler:
    """Draws samples. Deterministic per seed."""

    def __init__(self, seed: int) -> None:
        self._mujoco = require("mujoco", "sim")
        self._rng = np.random.default_rng([seed, 7])
        self._simulation = Simulation("reach", 0)
        self._kinematics = GraspKinematics(self._simulation)
        self._elsewhere: Waypoints | None = None  # of the layout before

    def draw(self, count: int, stop: StopSignals | None = None) -> Samples:
        """Raises KeyboardInterrupt at the layout after a Ctrl-C that `stop` took note of: raised inside an import or a C library, it can be lost."""
        rows: list[tuple[np.ndarray, ...]] = []
        while len(rows) < count:
            if stop and stop.reason:
                raise KeyboardInterrupt
            points = self._new_layout()
            for _ in range(_STATES_PER_LAYOUT if points is not None else 0):
                rows.append(self._sample(points))
        columns = [np.stack(column) for column in zip(*rows[:count], strict=True)]
        return Samples(columns[0], *(column.astype(np.float32) for column in columns[1:]))

    def _new_layout(self) -> Waypoints | None:
        """None where the expert could not reach either."""
        self._simulation.reset(FIRST_LAYOUT_SEED + int(self._rng.integers(2**31)))
        try:
            points = waypoints(self._simulation, self._kinematics)
        except RobotError:
            return None
        self._other, self._elsewhere = self._elsewhere or points, points
        return points

    def _sample(self, points: Waypoints) -> tuple[np.ndarray, ...]:
        while not self._put(joints := self._state(points)):
            pass
        picture = as_the_network_sees(self._simulation.render("front", *RESOLUTION))
        return picture, joints, expert_chunk(joints, points, HORIZON), self._block_in_picture()

    def _state(self, points: Waypoints) -> np.ndarray:
        """Joints (6,): 55 % on the way, 20 % at its end, 25 % on the way to another place; noise of 0.3 to 8 degrees."""
        kind = self._rng.random()
        if kind < 0.2:
            joints, noise = points.goal.copy(), self._rng.uniform(0.2, 3)
        else:
            joints = self._on_the_way(points if kind < 0.75 else self._other)
            noise = 0.3 * 27 ** self._rng.random()
        return np.clip(joints + self._rng.normal(0, noise, 6), *LIMITS_DEG.T)

    def _on_the_way(self, points: Waypoints) -> np.ndarray:
        """Uniform in time along home, hover, goal; body joints ahead of or behind the jaw, as it comes."""
        down = np.abs(points.goal - points.hover)[:GRIPPER].max()
        across = np.abs(points.hover - HOME_DEG)[:GRIPPER].max()
        way = self._rng.uniform(0, across + down)
        if way < across:
            joints = HOME_DEG + (points.hover - HOME_DEG) * way / across
        else:
            joints = points.hover + (points.goal - points.hover) * (way - across) / down
        joints[GRIPPER] = np.clip(HOME_DEG[GRIPPER] + 2 * way + self._rng.normal(0, 10), HOME_DEG[GRIPPER], points.goal[GRIPPER])
        return joints

    def _put(self, joints_deg: np.ndarray) -> bool:
        """Put the arm there; False when it would be in the table or in the block."""
        simulation = self._simulation
        simulation.data.qpos[:6] = degrees_to_radians(joints_deg)
        self._mujoco.mj_forward(simulation.model, simulation.data)
        depths = simulation.data.contact.dist[: simulation.data.ncon]
        return simulation.tcp_m[2] > _LOWEST_TCP_M and bool((depths > -_DEEPEST_CONTACT_M).all())

    def _block_in_picture(self) -> np.ndarray:
        camera = self._simulation.camera("front", *RESOLUTION)
        x, y, z = camera.to_camera(self._simulation.block_m[None])[0]
        return np.array([x, y]) / z * camera.focal_px / (_CROP_SCALE * np.array(RESOLUTION)) + 0.5


def as_the_network_sees(frame: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) -> uint8 (side, side, 3) through the policy's own transform."""
    values = pixel_values(torch.from_numpy(frame[None]), IMAGE_SIZE)[0]  # (3, side, side) in [-1, 1], made from bytes
    return (values * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def load_samples(places: list[Path]) -> Samples:
    """All shards of these files and directories, in memory (38 kB per sample). Raises ConfigError when there are none."""
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("shard_*.npz")))]
    if not files:
        raise ConfigError(f"no shard_*.npz in {', '.join(map(str, places))}. Make samples with training/samples.py first.")
    shards = [np.load(file) for file in files]
    return Samples(**{name: np.concatenate([shard[name] for shard in shards]) for name in Samples.__annotations__})


@dataclass
class SamplesConfig:
    out: Path  # directory to create or to continue
    count: int = 20_000  # samples to have in the end
    seed: int = 0  # another seed, other samples


def run(config: SamplesConfig) -> int:
    """Whole shards are skipped, a shorter one is made anew and begins with the same samples. Raises ConfigError for samples of another seed."""
    check_ranges(config, count=(1, math.inf))
    check_ranges(config, seed=(0, math.inf))
    torch.set_num_threads(1)
    require("mujoco", "sim")  # before anything is written
    config.out.mkdir(parents=True, exist_ok=True)
    about, note = {"seed": config.seed, "resolution": list(RESOLUTION), "image_size": IMAGE_SIZE}, config.out / "about.json"
    if note.exists() and (told := json.loads(note.read_text())) != about:
        raise ConfigError(f"{config.out} holds samples of {told}, asked for were {about}. Choose another --out, the same --seed, or remove it.")
    with StopSignals() as stop, require("tqdm", "sim").tqdm(total=config.count, unit=" samples", mininterval=1) as progress:
        note.write_text(json.dumps(about) + "\n")
        for index, start in enumerate(range(0, config.count, _SHARD)):
            path, size = config.out / f"shard_{index:04d}.npz", min(_SHARD, config.count - start)
            if not path.exists() or len(load_samples([path])) < size:
                with atomic_write(path) as partial, partial.open("wb") as file:
                    np.savez(file, **vars(Sampler(config.seed * 100_003 + index).draw(size, stop)))
            progress.update(size)
    print(f"{config.out}: {config.count} samples")
    return 0


main = Command(SamplesConfig, run, __doc__.strip(), interrupted="interrupted: the same command goes on from the whole files in --out")

if __name__ == "__main__":
    sys.exit(main())
