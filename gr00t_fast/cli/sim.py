"""`gr00t-fast sim`: watch the scripted expert solve a scene, as a video and a still picture, or live with `--page`.

On the page it is a run like any other: the control loop, its limits and its keys, with the expert in place of a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import AT_LEAST_0, AT_LEAST_1, ConfigError, check_ranges, require
from gr00t_fast.base.files import check_kept
from gr00t_fast.base.flags import Flags, setting
from gr00t_fast.cli.main import Command
from gr00t_fast.cli.replay import PlayedRows
from gr00t_fast.cli.run import RecordedFacts, RunConfig, drive
from gr00t_fast.record.page import BARE, page_address
from gr00t_fast.robots import CameraConfig, SimCameraConfig, SO100SimConfig
from gr00t_fast.virtual.sim.expert import expert
from gr00t_fast.virtual.sim.rendering import write_video
from gr00t_fast.virtual.sim.scene import GRIPPER, INSTRUCTION_OF, Task
from gr00t_fast.virtual.sim.simulation import TICK_S, Simulation

_SCENE_S = 7.0  # on the page; the expert needs up to 4, and the speed limit grows from slow at the start
_APPROACH_DEG_S = 90.0


@dataclass(kw_only=True)
class SimConfig(Flags):
    """Watch the scripted expert solve a scene: TASK_SEED.mp4 or .gif, and .png; or live in a browser."""

    out: Path | None = None  # directory for the files
    page: str | None = setting(None, bare=BARE)  # live in a browser, scene after scene: at HOST:PORT, or `open` for one here
    episodes: int = 20  # with --page: how many scenes
    overwrite: bool = False  # replace the files of an earlier run
    task: Task = "place"  # what stands on the table
    seed: int = 0  # where the objects lie
    video_format: Literal["mp4", "gif", "both"] = "mp4"  # of the video
    height: int = 360  # of the video in pixels; both cameras side by side
    xml: bool = False  # also write the scene as MuJoCo XML, for MuJoCo's own viewer
    verbose: bool = False  # full tracebacks

    def missing(self) -> Iterator[tuple[str, str]]:
        yield from super().missing()
        if self.out is None and page_address(self.page) is None:
            yield "out", "the directory for video and picture; or give --page to watch live in a browser"

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if page_address(self.page) is not None and self.out is not None:
            raise ConfigError("--out and --page exclude each other: a video is made as fast as it can be, the page shows real time.")
        if not 48 <= self.height <= 1080 or self.height % 6:
            raise ConfigError(f"--height={self.height} must be 48 to 1080 and divisible by 6 (4:3 pictures of even width).")
        check_ranges(self, seed=AT_LEAST_0, episodes=AT_LEAST_1)


def play(simulation: Simulation, height: int) -> Iterator[np.ndarray]:
    """One picture (height, 8/3 height, 3) per tick: front and wrist camera side by side, smoothed edges."""
    width = height * 4 // 3
    for targets in expert(simulation):
        simulation.set_targets(targets)
        simulation.advance(TICK_S)
        yield np.hstack([simulation.render(view, width, height, samples=2) for view in ("front", "wrist")])


class Expert(PlayedRows):
    """The expert's way through the scene that stands before the simulated arm, found on a copy of it."""

    def __init__(self, robot: Any, task: Task, seed: int) -> None:
        """robot: a SimArm."""
        super().__init__("the scripted expert", INSTRUCTION_OF[task], 1 / TICK_S, robot, lambda: None, _APPROACH_DEG_S)
        self._copy, self._arm, self._seed = Simulation(task, seed), robot, seed
        self._solve()

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        if prefix is None and self._arm.simulation.seed != self._seed:
            self._seed = self._arm.simulation.seed
            self._copy.reset(self._seed)
            self._solve()
        return super().get_action(observation, noise, prefix)

    def _solve(self) -> None:
        rows = []
        for targets in expert(self._copy):
            rows.append(targets)
            self._copy.set_targets(targets)
            self._copy.advance(TICK_S)
        padded = np.stack([*rows, *[rows[-1]] * (round(_SCENE_S / TICK_S) - len(rows))])
        parts = {"single_arm": padded[:, :GRIPPER], "gripper": padded[:, GRIPPER:]}
        self._play(parts, parts)


def show(config: SimConfig) -> int:
    """The expert in real time, scene after scene. Returns the exit code of a run."""
    cameras: dict[str, CameraConfig] = {"front": SimCameraConfig(), "wrist": SimCameraConfig(view="wrist")}
    robot = SO100SimConfig(task=config.task, cameras=cameras)
    as_run = RunConfig(model_path="the scripted expert", lang_instruction=INSTRUCTION_OF[config.task], robot=robot, controller="sync")
    as_run = replace(as_run, page=config.page, episodes=config.episodes, timeout=_SCENE_S, seed=config.seed, verbose=config.verbose)
    return drive(as_run, lambda arm, stop: Expert(arm, config.task, config.seed), RecordedFacts({}))


def run(config: SimConfig) -> int:
    """Play, draw and write. Returns the exit code: 0 when the expert solved the scene. Raises ConfigError."""
    if config.out is None:
        return show(config)
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
    "usage: gr00t-fast sim --out=DIR [--task=reach] [--flag=value ...]\n       gr00t-fast sim --page[=HOST:PORT]",
    "exit codes: 0 the expert solved the scene, 1 it did not, or an error; 2 bad flag",
)
