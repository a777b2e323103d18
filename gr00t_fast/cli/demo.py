"""`gr00t-fast demo`: a simulated SO-100 reaches for blocks, driven from its camera by a small trained network that comes with the package."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from gr00t_fast.cli import run
from gr00t_fast.cli.run import RunConfig

_FILES = Path(__file__).resolve().parents[1] / "demo"  # in a clone links to checkpoints/ and configs/, in a wheel the files themselves
_CHECKPOINT = [f"--config_path={_FILES / 'configs' / 'so100_sim.yaml'}", f"--model_path={_FILES / 'so100-sim-reach'}"]
_AS_RUN = [*_CHECKPOINT, "--timeout=3", "--episodes=3", "--seed=0", "--out=outputs/demo", "--overwrite"]


def work(config: RunConfig) -> int:
    """A run, with a video. Raises Gr00tFastError."""
    if not config.quiet:
        print("the demo is this run, and your flags after it: gr00t-fast run", shlex.join(_AS_RUN), file=sys.stderr)
    return run.run(replace(config, video=config.video or (None if config.out is None or config.dry_run else config.out / "demo.mp4")))


_USAGE = f"""usage: gr00t-fast demo [--page] [--out=DIR] [--flag=value of gr00t-fast run ...]
It gives itself the checkpoint, the file of its arm and {shlex.join(_AS_RUN[len(_CHECKPOINT) :])}; your flags win."""
main = replace(run.main, work=work, usage=_USAGE, before=_AS_RUN)
