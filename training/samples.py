"""Training samples of `reach`: a picture, the joints, and what the expert would do, at random states around its ways.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1

A state needs no roll-out: the arm is put there, the front camera looks, and inverse kinematics knows the expert's next actions (labels.py).
States lie on the expert's way to the block (with joint noise), at its end, and on the way to where a block is not, so that the network learns
to come back. Layouts are drawn from seeds at and above FIRST_LAYOUT_SEED; evaluation uses those below. The same command continues an
interrupted run, and a higher --count adds to what is there; a directory holds samples of one seed only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from gr00t_fast.errors import ConfigError, RobotError, attempt
from gr00t_fast.optional import require
from gr00t_fast.robots.so100_sim.kinematics import GraspKinematics
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, Simulation
from gr00t_fast.robots.so100_sim.units import LIMITS_DEG, degrees_to_radians
from gr00t_fast.transforms import pixel_values
from training.labels import GRIPPER, HORIZON, Waypoints, expert_chunk, waypoints
from training.session import load_undisturbed

FIRST_LAYOUT_SEED = 1_000_000
RESOLUTION = (640, 480)  # width, height of the camera
IMAGE_SIZE = 112  # side of the picture the network sees
_SHARD = 500  # samples per file; what an interruption can lose
_STATES_PER_LAYOUT = 2
_LOWEST_TCP_M, _DEEPEST_CONTACT_M = 0.008, 0.001  # states below the table or inside the block are drawn again
_CROP_SCALE = 0.95  # of transforms.pixel_values: the part of the frame that the network sees


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

    def draw(self, count: int) -> Samples:
        rows: list[tuple[np.ndarray, ...]] = []
        while len(rows) < count:
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
        joints = joints + self._rng.normal(0, noise, 6)
        return np.clip(joints, *LIMITS_DEG.T)

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
        camera = self._simulation._camera("front", *RESOLUTION)
        x, y, z = camera.to_camera(self._simulation.block_m[None])[0]
        return np.array([x, y]) / z * camera.focal_px / (_CROP_SCALE * np.array(RESOLUTION)) + 0.5


def as_the_network_sees(frame: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) -> uint8 (side, side, 3) through the policy's own transform."""
    values = pixel_values(torch.from_numpy(frame[None]), IMAGE_SIZE)[0]  # (3, side, side) in [-1, 1], made from bytes
    return (values * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def load_samples(directories: list[Path]) -> Samples:
    """All shards of the directories, in memory (38 kB per sample). Raises ConfigError when there are none."""
    files = sorted(file for directory in directories for file in directory.rglob("shard_*.npz"))
    if not files:
        raise ConfigError(f"no shard_*.npz in {', '.join(map(str, directories))}. Make samples with training/samples.py first.")
    shards = [np.load(file) for file in files]
    lengths = [len(shard["joints"]) for shard in shards]
    columns = {name: np.empty((sum(lengths), *shards[0][name].shape[1:]), shards[0][name].dtype) for name in Samples.__annotations__}
    for shard, end, length in zip(shards, np.cumsum(lengths), lengths, strict=True):
        for name, column in columns.items():  # one shard at a time in memory besides the whole
            column[end - length : end] = shard[name]
        shard.close()
    return Samples(**columns)


def write_shards(out: Path, count: int, seed: int, progress: Any) -> None:
    """Shard i of seed s always begins with the same samples, so whole ones are skipped, and the short one of a smaller count is made anew.

    Raises ConfigError for numbers that make no sense, and for a directory that holds other samples, or more of them.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"--count must be at least 1 and --seed not negative; got --count={count} --seed={seed}.")
    sizes = [min(_SHARD, count - start) for start in range(0, count, _SHARD)]
    _claim(out, sizes, seed)
    for index, size in enumerate(sizes):
        path = _shard(out, index)
        if not path.exists() or _length(path) < size:
            samples = Sampler(seed * 100_003 + index).draw(size)
            half_written = path.with_suffix(".tmp")
            with half_written.open("wb") as file:
                np.savez(file, **vars(samples))
            half_written.replace(path)
        progress.update(size)


def _claim(out: Path, sizes: list[int], seed: int) -> None:
    """Note in about.json what the directory holds. Raises ConfigError when samples of something else are there."""
    out.mkdir(parents=True, exist_ok=True)
    about = {"seed": seed, "resolution": list(RESOLUTION), "image_size": IMAGE_SIZE}
    there = {file: _length(file) for file in sorted(out.glob("shard_*.npz"))}
    if there and (told := _told(out / "about.json", about)) != about:
        raise ConfigError(
            f"{out} holds samples of {told}, asked for were {about}. Choose another --out, give the same --seed, or remove the directory."
        )
    most = {_shard(out, index): size for index, size in enumerate(sizes)}
    if any(length > most.get(file, 0) for file, length in there.items()):
        raise ConfigError(f"{out} holds {sum(there.values())} samples, more than --count={sum(sizes)} keeps. Ask for more, or choose another --out.")
    (out / "about.json").write_text(json.dumps({**about, "count": sum(sizes)}) + "\n")


def _told(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """What about.json says under these names; None where it says nothing, as when somebody removed it."""
    try:
        told = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON as this program writes it ({error}). Remove its directory, or choose another --out.") from error
    return {name: told.get(name) for name in names}


def _shard(out: Path, index: int) -> Path:
    return out / f"shard_{index:04d}.npz"


def _length(shard: Path) -> int:
    with np.load(shard) as columns:
        return len(columns["joints"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="directory to create or to continue")
    parser.add_argument("--count", type=int, default=20_000, help="samples to have in the end (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other samples (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    _, code = attempt(lambda: run(arguments), f"interrupted: the same command goes on from the files of {_SHARD} samples that are in {arguments.out}")
    return code


def run(arguments: argparse.Namespace) -> None:
    load_undisturbed("mujoco", "sim")
    with require("tqdm", "sim").tqdm(total=arguments.count, unit=" samples", mininterval=1) as progress:
        write_shards(arguments.out, arguments.count, arguments.seed, progress)


if __name__ == "__main__":
    sys.exit(main())
