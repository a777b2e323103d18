"""Record episodes of the scripted expert as a LeRobotDataset v3, in the form that a teleoperated arm leaves.

    python training/record.py --episodes=20 --out=outputs/reach/dataset

For tools that read data sets (lerobot's training, a dry run of a policy on recorded data). Needs the `robot` extra. Each row: joints in degrees
(`observation.state`), the frame of the front camera, and the target that the expert wanted at that tick (`action`). What was sent is that target plus
a drift that changes at every tick (`--noise_deg`, 0.5 by default), so that states off the expert's way are recorded too; with `--noise_deg=0` the
target itself was sent. `meta/modality.json` names the parts as NVIDIA's data configuration `so100` does. The directory appears when the data set is
whole: an interrupt or a failure leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, check_ranges, require
from gr00t_fast.base.flags import size_of
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.cli.main import Command
from gr00t_fast.record.recorder import MODALITY, features, modality_of
from gr00t_fast.virtual.sim.expert import expert
from gr00t_fast.virtual.sim.scene import GRIPPER, INSTRUCTION_OF, Task
from gr00t_fast.virtual.sim.simulation import FIRST_LAYOUT_SEED, TICK_S, Simulation
from training.samples import FPS, RESOLUTION

os.environ |= {"SVT_LOG": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # errors alone of the encoder, and no bar for each episode
_CAMERA = "front"
_PARTS = {"single_arm": GRIPPER, "gripper": 1}


def rows(simulation: Simulation, resolution: tuple[int, int], noise_deg: float, rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """One per tick of the expert. With noise the arm is sent off the target at every tick, but `action` stays what the expert wanted."""
    drift = np.zeros(len(SO100_JOINTS))
    for targets in expert(simulation):
        yield {
            "observation.state": simulation.joints_deg.astype(np.float32),
            f"observation.images.{_CAMERA}": simulation.render(_CAMERA, *resolution),
            "action": targets.astype(np.float32),
        }
        drift = 0.8 * drift + rng.normal(0, noise_deg, len(drift)) * (np.arange(len(drift)) != GRIPPER)
        simulation.set_targets(targets + drift)
        simulation.advance(TICK_S)


def record(config: RecordConfig) -> int:
    """Returns how many episodes were written; those in which the expert fails are left out.

    Raises ConfigError for flags that make no sense, ConfigError when --out is there already, or when the expert failed in all layouts.
    """
    check_ranges(config, episodes=(1, math.inf))
    check_ranges(config, **dict.fromkeys(("seed", "noise_deg", "first_layout"), (0, math.inf)))
    out, resolution = config.out, size_of(config.resolution, least=1)
    if out.exists():
        raise ConfigError(f"{out} is there already; a data set is written once. Choose another --out, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with StopSignals() as stop, tempfile.TemporaryDirectory(prefix=f"{out.name}.unfinished-", dir=out.parent) as beside:
        half_written = Path(beside) / out.name
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local data set has no business on the hub
        columns = features(SO100_JOINTS, {_CAMERA: resolution[::-1]})
        empty = require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDataset.create
        dataset = empty(f"local/{out.name}", FPS, columns, root=half_written, robot_type="so100_follower")
        written = fill(dataset, config, resolution, stop)
        if not written:
            raise ConfigError(f"the expert solved none of the {config.episodes} layouts; nothing was written. Choose others: --seed, --first_layout.")
        modality = modality_of(_PARTS, _PARTS, SO100_JOINTS, {_CAMERA: "webcam"})
        (half_written / MODALITY).write_text(json.dumps(modality, indent=2) + "\n")
        half_written.rename(out)
    return written


def fill(dataset: Any, config: RecordConfig, resolution: tuple[int, int], stop: StopSignals) -> int:
    """Play the episodes, and close the data set however that ends: Arrow aborts the process where a file is still open at its exit.

    Returns how many layouts were solved. Raises KeyboardInterrupt at the tick after a Ctrl-C, never inside lerobot, which would be left half written.
    """
    simulation, rng, written = Simulation(config.task, 0), np.random.default_rng(config.seed), 0
    first = FIRST_LAYOUT_SEED + config.seed * 100_003 if config.first_layout is None else config.first_layout
    with require("tqdm", "sim").tqdm(total=config.episodes, unit=" episodes") as bar, contextlib.ExitStack() as closing:
        closing.callback(dataset.finalize)
        for layout in range(first, first + config.episodes):
            simulation.reset(layout)
            for row in rows(simulation, resolution, config.noise_deg, rng):
                if stop.reason:
                    raise KeyboardInterrupt
                dataset.add_frame({**row, "task": INSTRUCTION_OF[config.task]})
            if simulation.success:
                _save_episode(dataset)
                written += 1
            else:
                dataset.clear_episode_buffer()
            bar.update()
    return written


def _save_episode(dataset: Any) -> None:
    """Run by root, as in many containers, the AV1 encoder (SVT-AV1) gives the thread that calls it a real-time priority above everything else, for
    good; what is started later inherits it, and nothing it waits for gets a processor meanwhile. So the usual one is put back."""
    scheduled = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None  # Linux has it
    dataset.save_episode()
    if scheduled:
        os.sched_setscheduler(0, *scheduled)


@dataclass
class RecordConfig:
    out: Path  # directory to create
    task: Task = "reach"
    episodes: int = 20
    resolution: str = "x".join(map(str, RESOLUTION))  # of the pictures, WIDTHxHEIGHT
    noise_deg: float = 0.5  # disturbance of the arm, not of the labels
    seed: int = 0
    first_layout: int | None = None  # seed of the first layout; training never sees those below 1000000; default: above, by --seed


def run(config: RecordConfig) -> int:
    print(f"{config.out}: {record(config)} of {config.episodes} episodes, in which the expert solved the task")
    return 0


main = Command(RecordConfig, run, __doc__.strip(), interrupted="interrupted: nothing was written")

if __name__ == "__main__":
    sys.exit(main())
