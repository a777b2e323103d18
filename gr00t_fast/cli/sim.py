"""`gr00t-fast sim`: watch the scripted expert solve a scene, as a video and a still picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gr00t_fast.base.errors import AT_LEAST_0, ConfigError, check_ranges, require
from gr00t_fast.base.files import check_kept
from gr00t_fast.base.flags import Flags
from gr00t_fast.cli.main import Command
from gr00t_fast.virtual.sim.expert import expert
from gr00t_fast.virtual.sim.rendering import write_video
from gr00t_fast.virtual.sim.scene import Task
from gr00t_fast.virtual.sim.simulation import TICK_S, Simulation


@dataclass(kw_only=True)
class SimConfig(Flags):
    """Watch the scripted expert solve a scene: TASK_SEED.mp4 or .gif, and .png."""

    out: Path  # directory for the files
    overwrite: bool = False  # replace the files of an earlier run
    task: Task = "place"  # what stands on the table
    seed: int = 0  # where the objects lie
    video_format: Literal["mp4", "gif", "both"] = "mp4"  # of the video
    height: int = 360  # of the video in pixels; both cameras side by side
    xml: bool = False  # also write the scene as MuJoCo XML, for MuJoCo's own viewer
    verbose: bool = False  # full tracebacks

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if not 48 <= self.height <= 1080 or self.height % 6:
            raise ConfigError(f"--height={self.height} must be 48 to 1080 and divisible by 6 (4:3 pictures of even width).")
        check_ranges(self, seed=AT_LEAST_0)


def play(simulation: Simulation, height: int) -> Iterator[np.ndarray]:
    """One picture (height, 8/3 height, 3) per tick: front and wrist camera side by side, smoothed edges."""
    width = height * 4 // 3
    for targets in expert(simulation):
        simulation.set_targets(targets)
        simulation.advance(TICK_S)
        yield np.hstack([simulation.render(view, width, height, samples=2) for view in ("front", "wrist")])


def run(config: SimConfig) -> int:
    """Play, draw and write. Returns the exit code: 0 when the expert solved the scene. Raises ConfigError."""
    name = f"{config.task}_{config.seed}"
    written = [config.out / f"{name}.{ending}" for ending in (("mp4", "gif") if config.video_format == "both" else (config.video_format,))]
    picture, scene = config.out / f"{name}.png", config.out / f"{name}.xml"
    check_kept([*written, picture, *([scene] if config.xml else [])], "--out", config.overwrite)
    progress, imageio = require("tqdm", "sim").tqdm, require("imageio.v3", "sim")
    simulation = Simulation(config.task, config.seed)
    frames, still, solved_s = [], None, None
    for frame in progress(play(simulation, config.height), desc=f"{config.task}, seed {config.seed}", unit=" frames"):
        frames.append(frame)
        if simulation.success and solved_s is None:
            solved_s, still = simulation.time_s, frame
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        for path in written:
            write_video(path, frames)
        imageio.imwrite(picture, frames[-1] if still is None else still)
        if config.xml:
            scene.write_text(simulation.xml)
    except OSError as error:
        raise ConfigError(f"--out {config.out} cannot be written: {error}. Choose another directory.") from error
    verdict = f"solved after {solved_s:.1f} s" if solved_s else "NOT solved"
    print(f"{verdict}: {', '.join(map(str, [*written, picture]))}")
    return 0 if solved_s else 1


main = Command(
    SimConfig,
    run,
    "usage: gr00t-fast sim --out=DIR [--task=reach] [--flag=value ...]",
    "exit codes: 0 the expert solved the scene, 1 it did not, or an error; 2 bad flag",
)
