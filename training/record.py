"""Record episodes of the scripted expert as a LeRobotDataset v3, in the form that a teleoperated arm leaves.

    python training/record.py --episodes=20 --out=outputs/reach/dataset

For tools that read data sets (lerobot's training, a dry run of a policy on recorded data). Needs the `robot` extra. Each row: joints in degrees
(`observation.state`), the frame of the front camera, and the target that the expert wanted at that tick (`action`). What was sent is that target plus
a drift that changes at every tick (`--noise_deg`, 0.5 by default), so that states off the expert's way are recorded too; with `--noise_deg=0` the
target itself was sent. `meta/modality.json` names the parts as NVIDIA's data configuration `so100` does; `meta/recording.json` says which layouts
were recorded. The directory appears when the data set is whole: an interrupt or a failure leaves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import ConfigError, attempt
from gr00t_fast.optional import require
from gr00t_fast.robots.so100_sim.expert import expert
from gr00t_fast.robots.so100_sim.scene import Task
from gr00t_fast.robots.so100_sim.simulation import TICK_S, Simulation
from training.labels import FPS, GRIPPER
from training.samples import FIRST_LAYOUT_SEED, RESOLUTION
from training.session import StopRequest

INSTRUCTION_OF = {"reach": "Reach the block", "place": "Place the block in the bowl"}
RECORDING = "meta/recording.json"
_CAMERA = "front"


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


def create(out: Path, resolution: tuple[int, int]) -> Any:
    """An empty LeRobotDataset in `out`, which must not be there. Raises MissingExtraError without lerobot."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local data set has no business on the hub
    joints = {"dtype": "float32", "shape": (len(SO100_JOINTS),), "names": [f"{joint}.pos" for joint in SO100_JOINTS]}
    picture = {"dtype": "video", "shape": (resolution[1], resolution[0], 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": joints, "action": joints, f"observation.images.{_CAMERA}": picture}
    dataset = require("lerobot.datasets.lerobot_dataset", "robot").LeRobotDataset
    return dataset.create(f"local/{out.name}", FPS, features, root=out, robot_type="so100_follower")


def write_modality(out: Path) -> None:
    parts = {"single_arm": {"start": 0, "end": GRIPPER}, "gripper": {"start": GRIPPER, "end": GRIPPER + 1}}
    video = {"webcam": {"original_key": f"observation.images.{_CAMERA}"}}
    annotation = {"human.task_description": {"original_key": "task_index"}}
    modality = {"state": parts, "action": parts, "video": video, "annotation": annotation}
    (out / "meta" / "modality.json").write_text(json.dumps(modality, indent=2) + "\n")


def write_recording(out: Path, arguments: argparse.Namespace, layouts: Sequence[int]) -> None:
    """`layouts`: seed of each episode's layout. With `training_layouts_from` it shows whether a network that was trained here can know them."""
    names = ("task", "episodes", "seed", "noise_deg", "resolution")
    flags = {name: getattr(arguments, name) for name in names} | {"first_layout": first_layout(arguments)}
    told = {"program": "training/record.py", "flags": flags, "layouts": list(layouts), "training_layouts_from": FIRST_LAYOUT_SEED}
    (out / RECORDING).write_text(json.dumps(told, indent=2) + "\n")


def first_layout(arguments: argparse.Namespace) -> int:
    """Seed of the first episode's layout: as asked, or among those that training draws from."""
    return FIRST_LAYOUT_SEED + arguments.seed * 100_003 if arguments.first_layout is None else arguments.first_layout


def record(arguments: argparse.Namespace) -> int:
    """Returns how many episodes were written; those in which the expert fails are left out.

    Raises ConfigError for flags that make no sense, when --out is there already, or when the expert failed in all layouts.
    """
    if arguments.episodes < 1 or min(arguments.seed, arguments.noise_deg, first_layout(arguments)) < 0:
        raise ConfigError("--episodes must be at least 1; --seed, --noise_deg and --first_layout not negative.")
    out: Path = arguments.out
    _refuse_present(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop, tempfile.TemporaryDirectory(prefix=f"{out.name}.unfinished-", dir=out.parent) as beside:
        half_written = Path(beside) / out.name
        layouts = fill(create(half_written, tuple(arguments.resolution)), arguments, stop)
        if not layouts:
            raise ConfigError(
                f"the expert solved none of the {arguments.episodes} layouts; nothing was written. Choose others: --seed, --first_layout."
            )
        write_modality(half_written)
        write_recording(half_written, arguments, layouts)
        _refuse_present(out)  # somebody else's by now
        half_written.rename(out)
    return len(layouts)


def _refuse_present(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} is there already; a data set is written once. Choose another --out, or remove it.")


def fill(dataset: Any, arguments: argparse.Namespace, stop: StopRequest) -> list[int]:
    """Play the episodes, and close the data set however that ends: Arrow aborts the process where a file is still open at its exit.

    Returns the layouts that were solved. Raises KeyboardInterrupt at the tick after a Ctrl-C, never inside lerobot, which would be left half written.
    """
    simulation, rng, layouts = Simulation(arguments.task, 0), np.random.default_rng(arguments.seed), []
    with require("tqdm", "sim").tqdm(total=arguments.episodes, unit=" episodes") as bar, _finalized(dataset):
        for layout in range(first_layout(arguments), first_layout(arguments) + arguments.episodes):
            simulation.reset(layout)
            for row in rows(simulation, tuple(arguments.resolution), arguments.noise_deg, rng):
                if stop.reason:
                    raise KeyboardInterrupt
                dataset.add_frame({**row, "task": INSTRUCTION_OF[arguments.task]})
            if simulation.success:
                with usual_priority():
                    dataset.save_episode()
                layouts.append(layout)
            else:
                dataset.clear_episode_buffer()
            bar.update()
    return layouts


@contextlib.contextmanager
def _finalized(dataset: Any) -> Iterator[None]:
    try:
        yield
    finally:
        dataset.finalize()


@contextlib.contextmanager
def usual_priority() -> Iterator[None]:
    """Run by root, as in many containers, the AV1 encoder (SVT-AV1) gives the thread that calls it a real-time priority above everything else, for
    good; threads and programs that are started later inherit it, and nothing they wait for gets a processor while they are busy."""
    if not hasattr(os, "sched_getscheduler"):  # Linux has it
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--task", default="reach", choices=get_args(Task), help="(default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--resolution", type=int, nargs=2, default=RESOLUTION, metavar=("WIDTH", "HEIGHT"), help="(default: %(default)s)")
    parser.add_argument("--noise_deg", type=float, default=0.5, help="disturbance of the arm, not of the labels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first_layout", type=int, help=f"seed of the first layout; training never sees those below {FIRST_LAYOUT_SEED} (default: above, by --seed)"
    )
    arguments = parser.parse_args(argv)
    written, code = attempt(lambda: record(arguments), "interrupted: nothing was written")
    if written is not None:
        print(f"{arguments.out}: {written} of {arguments.episodes} episodes, in which the expert solved the task")
    return code


if __name__ == "__main__":
    sys.exit(main())
