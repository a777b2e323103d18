"""`gr00t-fast demo`: a simulated SO-100 reaches for blocks, driven from its camera by a small trained network that comes with the package."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from gr00t_fast.cli.main import EXIT_OK, Command
from gr00t_fast.cli.run import EXITS, RunConfig, run, voice

_FILES = Path(__file__).resolve().parents[1] / "demo"  # in a clone links to checkpoints/ and configs/, in a wheel the files themselves
NETWORK, SETTINGS = _FILES / "so100-sim-reach", _FILES / "configs" / "so100_sim.yaml"
_AS_RUN = (f"--config_path={SETTINGS}", f"--model_path={NETWORK}", "--timeout=3", "--episodes=3", "--seed=0", "--out=outputs/demo", "--overwrite")


def work(config: RunConfig) -> int:
    """Run, and name what it left. Raises Gr00tFastError."""
    say = voice(config)
    say("gr00t-fast run " + shlex.join(_AS_RUN))
    if config.video is None and config.out is not None and not config.dry_run:
        config = replace(config, video=config.out / "demo.mp4")
    code = run(config)
    left = {"picture": config.out and config.out / "joints.png", "video": config.video, "report": config.out and config.out / "report.html"}
    for name, file in left.items() if code == EXIT_OK else ():
        if file is not None and file.is_file():
            say(f"{name + ':':<9}{file}")
    return code


main = Command(
    RunConfig,
    work,
    "usage: gr00t-fast demo [--page] [--out=DIR] [--flag=value of gr00t-fast run ...]",
    EXITS,
    drives_arm=True,
    before=_AS_RUN,
)
