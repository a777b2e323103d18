"""`python -m gr00t_fast.robots.so100_sim --out DIR`: watch the scripted expert solve a scene, as a video and a still picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from gr00t_fast.errors import ConfigError, Gr00tFastError
from gr00t_fast.optional import require
from gr00t_fast.robots.so100_sim.expert import expert
from gr00t_fast.robots.so100_sim.scene import Task
from gr00t_fast.robots.so100_sim.simulation import TICK_S, Simulation
from gr00t_fast.robots.so100_sim.video import write_video


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gr00t_fast.robots.so100_sim", description="Renders an episode of the scripted expert: TASK_SEED.mp4 or .gif, and .png."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--task", default="place", choices=get_args(Task), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="where the objects lie (default: %(default)s)")
    parser.add_argument("--format", default="mp4", choices=("mp4", "gif", "both"), help="default: %(default)s")
    parser.add_argument("--height", type=int, default=360, help="of the video in pixels; both cameras side by side (default: %(default)s)")
    parser.add_argument("--xml", action="store_true", help="also write the scene as MuJoCo XML, for MuJoCo's own viewer")
    args = parser.parse_args(argv)
    if not 48 <= args.height <= 1080 or args.height % 6:
        parser.error(f"--height must be 48..1080 and divisible by 6 (4:3 pictures of even width), but it is {args.height}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, but it is {args.seed}")
    return args


def play(simulation: Simulation, height: int) -> Iterator[np.ndarray]:
    """One picture (height, 8/3 height, 3) per tick: front and wrist camera side by side, smoothed edges."""
    width = height * 4 // 3
    for targets in expert(simulation):
        simulation.set_targets(targets)
        simulation.advance(TICK_S)
        yield np.hstack([simulation.render(view, width, height, samples=2) for view in ("front", "wrist")])


def run(args: argparse.Namespace) -> int:
    """Play, draw and write. Returns the exit code: 0 when the expert solved the scene."""
    progress, imageio = require("tqdm", "sim").tqdm, require("imageio.v3", "sim")
    simulation = Simulation(args.task, args.seed)
    frames, still, solved_s = [], None, None
    for frame in progress(play(simulation, args.height), desc=f"{args.task}, seed {args.seed}", unit=" frames"):
        frames.append(frame)
        if simulation.success and solved_s is None:
            solved_s, still = simulation.time_s, frame
    name = f"{args.task}_{args.seed}"
    written = [args.out / f"{name}.{ending}" for ending in (("mp4", "gif") if args.format == "both" else (args.format,))]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for path in written:
            write_video(path, frames)
        imageio.imwrite(args.out / f"{name}.png", frames[-1] if still is None else still)
        if args.xml:
            (args.out / f"{name}.xml").write_text(simulation.scene.xml)
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be written: {error}. Choose another directory.") from error
    verdict = f"solved after {solved_s:.1f} s" if solved_s else "NOT solved"
    print(f"{verdict}: {', '.join(map(str, written))}, {args.out / name}.png")
    return 0 if solved_s else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; explained errors become one line and exit code 2."""
    try:
        return run(parse_args(argv))
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
