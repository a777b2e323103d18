"""Which control architecture keeps an arm moving while its policy thinks, and how well it follows.

    python benchmarks/control_architectures.py                          # a made-up recording, 0 and 0.8 s, moving and still scene
    python benchmarks/control_architectures.py --recording=DATASET --episode=3 --delays 0 measured:bench_policy.json

A recording is the task; a policy that knows it by heart answers each observation with the next actions, after a delay and with an error of its own
per chunk (replay_study/policy.py). The product's control loop, pacer and controllers move an arm with a first-order lag. Architectures: `sync`,
`threaded`, `server` (threaded, the policy in another process behind ZeroMQ), `threaded_resume` (--when_late=resume) and the baseline `naive_async`
(a FIFO of chunks, each played from its first action). `floor` is the recording itself sent to the same arm: no delay, no error.

What comparisons of this kind commonly get wrong, and what is done here: one trial (here several, seeds paired, architectures taking turns,
confidence intervals); stale chunks played from index 0 (here a baseline that is called so); an invented fixed delay (here also measured
distributions); errors at equal instants only, which charge a delay as an error (here also with the tracking delay taken out); one kind of scene
(in a moving one a pause is an error, in a still one it costs time). The last line is JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.program import provenance, show_progress
from benchmarks.replay_study.delay import Delay, parse_delay
from benchmarks.replay_study.follower import DEFAULT_TIME_CONSTANT_S
from benchmarks.replay_study.metrics import measure, summarise
from benchmarks.replay_study.needs import needed_actions
from benchmarks.replay_study.plots import plot_all_joints, plot_errors, plot_one_joint, setting
from benchmarks.replay_study.recording import Recording, load_recording
from benchmarks.replay_study.table import as_table, notes_on
from benchmarks.replay_study.trial import ARCHITECTURES, Cell, Motion, Setup, run_trial
from gr00t_fast.errors import ConfigError, Gr00tFastError, MissingExtraError

Motions = dict[tuple[Cell, int], Motion]


def cells_of(arguments: argparse.Namespace, delays: list[Delay]) -> list[Cell]:
    """Every architecture at every delay with the first chunk length; with longer ones where the length before is too short to bridge the delay.

    `threaded_resume` differs from `threaded` only where the chunk is too short, and is run there.
    """
    cells = []
    for scene in arguments.scenes:
        for delay in delays:
            for index, horizon in enumerate(arguments.actions_per_chunk):
                before = arguments.actions_per_chunk[index - 1] if index else 0
                if before >= needed_actions(delay.ticks(arguments.fps)):
                    continue
                too_short = horizon < needed_actions(delay.ticks(arguments.fps))
                cells += [Cell(scene, name, horizon, delay) for name in arguments.architectures if name != "threaded_resume" or too_short]
    if not cells:
        raise ConfigError("nothing to run: threaded_resume alone differs from threaded only where a chunk is shorter than twice the delay.")
    return cells


def play_all(setup: Setup, cells: list[Cell], trials: int, jobs: int) -> Motions:
    """All trials; several at a time, in an order in which the architectures take turns. Raises what a trial raises."""
    work = [(cell, trial) for trial in range(trials) for cell in _shuffled(cells, setup.seed + trial)]
    motions: Motions = {}
    for done, (key, motion) in enumerate(_played(setup, work, jobs), 1):
        motions[key] = motion
        show_progress("trial", done, len(work))
    return motions


def _shuffled(cells: list[Cell], seed: int) -> list[Cell]:
    return random.Random(seed).sample(cells, len(cells))


def _played(setup: Setup, work: list[tuple[Cell, int]], jobs: int) -> Iterator[tuple[tuple[Cell, int], Motion]]:
    if jobs == 1 or setup.virtual:
        for cell, trial in work:
            yield (cell, trial), run_trial(setup, cell, trial)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run_trial, setup, cell, trial): (cell, trial) for cell, trial in work}
        try:
            for future in concurrent.futures.as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def floor_of(setup: Setup, scene: str) -> Motion:
    """The recording itself, tick by tick, to the same arm: what no architecture can beat."""
    perfect = dataclasses.replace(setup, chunk_noise_deg=0.0, virtual=True)
    return run_trial(perfect, Cell(scene, "sync", max(2, round(setup.fps)), parse_delay("0")), 0)


def rows_of(setup: Setup, cells: list[Cell], motions: Motions, trials: int) -> list[dict[str, Any]]:
    """One row of figures per cell, and one per scene for the floor."""
    rows = []
    for scene in dict.fromkeys(cell.scene for cell in cells):
        floor = summarise([measure(floor_of(setup, scene))])
        rows.append({"scene": scene, "architecture": "floor", "setting": "no delay, no error", "trials": 1, "figures": floor})
        for cell in (cell for cell in cells if cell.scene == scene):
            figures = summarise([measure(motions[cell, trial]) for trial in range(trials)])
            rows.append(
                {
                    "scene": scene,
                    "architecture": cell.architecture,
                    "setting": setting(cell),
                    "delay": cell.delay.label,
                    "delay_ticks": cell.delay.ticks(setup.fps),
                    "actions_per_chunk": cell.horizon,
                    "needed_actions_per_chunk": needed_actions(cell.delay.ticks(setup.fps)),
                    "trials": trials,
                    "figures": figures,
                }
            )
    return rows


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Motions]:
    recording = load_recording(arguments.recording, arguments.episode, arguments.column, arguments.topic, arguments.seed)
    recording = recording.cut(arguments.start_s, arguments.seconds)
    setup = _setup(arguments, recording)
    cells = cells_of(arguments, [parse_delay(text) for text in arguments.delays])
    began_s = time.monotonic()
    motions = play_all(setup, cells, arguments.trials, arguments.jobs)
    rows = rows_of(setup, cells, motions, arguments.trials)
    return {
        "benchmark": "control_architectures",
        "recording": {"source": recording.source, "seconds": round(recording.duration_s, 3), "joints": list(recording.joint_names)},
        "fps": arguments.fps,
        "chunk_size_threshold": arguments.chunk_size_threshold,
        "smoothing": arguments.smoothing,
        "when_late": arguments.when_late,
        "chunk_noise_deg": arguments.chunk_noise_deg,
        "arm_time_constant_s": arguments.arm_time_constant_s,
        "max_speed_deg_s": arguments.max_speed_deg_s,
        "time": "virtual" if arguments.virtual else f"real, {arguments.jobs} trials at a time",
        "trials": arguments.trials,
        "rows": rows,
        "notes": notes_on(rows, arguments.fps),
        "took_s": round(time.monotonic() - began_s, 1),
        **provenance(arguments.seed),
    }, motions


def _setup(arguments: argparse.Namespace, recording: Recording) -> Setup:
    return Setup(
        recording,
        arguments.fps,
        arguments.chunk_size_threshold,
        arguments.smoothing,
        arguments.when_late,
        arguments.chunk_noise_deg,
        arguments.arm_time_constant_s,
        arguments.max_speed_deg_s,
        arguments.seed,
        arguments.virtual,
    )


def write(result: dict[str, Any], motions: Motions, out: Path) -> None:
    """results.json, table.md, org.csv and infer.csv of every run, and three pictures where matplotlib is installed."""
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "table.md").write_text(as_table(result) + "\n")
    for (cell, trial), motion in motions.items():
        delay = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in cell.delay.label)
        folder = out / "runs" / f"{cell.scene}-{cell.architecture}-{cell.horizon}-delay_{delay}" / f"trial{trial}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("org.csv", motion.reference), ("infer.csv", motion.arm)):
            header = ",".join(("time_s", *motion.joint_names))
            np.savetxt(folder / name, np.column_stack([motion.grid_s, values]), "%.4f", ",", header=header, comments="")
    try:
        first = {cell: motion for (cell, trial), motion in motions.items() if trial == 0}
        ordered = dict(sorted(first.items(), key=lambda item: ARCHITECTURES.index(item[0].architecture), reverse=True))
        plot_all_joints(ordered, out / "all_joints_comparison.png")
        plot_one_joint(ordered, out / "comparison_joints.png")
        plot_errors(result["rows"], out / "comparison_errors.png")
    except MissingExtraError as error:  # the figures are what counts
        print(f"no plots: {error}", file=sys.stderr)


def without_joints(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its figures by joint, which are a hundred thousand characters and in results.json."""
    rows = [{**row, "figures": {name: value for name, value in row["figures"].items() if name != "joints"}} for row in result["rows"]]
    return {**result, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        arguments.out.mkdir(parents=True, exist_ok=True)
        result, motions = run(arguments)
        write(result, motions, arguments.out)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_table(result))
    print(json.dumps(without_joints(result)))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that contradict each other; fills the architectures in."""
    if arguments.virtual and "server" in (arguments.architectures or ()):
        raise ConfigError("a server in another process runs in real time only: leave out --virtual, or server.")
    arguments.architectures = arguments.architectures or [name for name in ARCHITECTURES if not (arguments.virtual and name == "server")]
    if min(arguments.trials, arguments.jobs, *arguments.actions_per_chunk) < 1 or arguments.fps <= 0 or arguments.arm_time_constant_s <= 0:
        raise ConfigError("--trials, --jobs, --actions_per_chunk, --fps and --arm_time_constant_s must be positive.")
    if arguments.when_late == "resume" and arguments.smoothing != "none":
        raise ConfigError("--smoothing=ensemble averages actions that are due at the same tick; with --when_late=resume they are not. Leave one out.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--recording", type=Path, help="LeRobotDataset directory (v3), .csv (time_s and joints, degrees) or ROS 1 .bag; default: made up"
    )
    parser.add_argument("--episode", type=int, default=0, help="of a LeRobotDataset")
    parser.add_argument("--column", default="action", help="of a LeRobotDataset: action or observation.state; taken as degrees")
    parser.add_argument("--topic", help="of a bag: a topic of sensor_msgs/JointState; default: the only one")
    parser.add_argument("--start_s", type=float, default=0.0, help="where in the recording to begin")
    parser.add_argument("--seconds", type=float, default=10.0, help="how much of the recording to play, at most")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="default: all (with --virtual: all but server)")
    parser.add_argument(
        "--scenes", nargs="+", choices=("moving", "still"), default=["moving", "still"], help="moves on by itself, or waits for the arm"
    )
    parser.add_argument(
        "--delays", nargs="+", default=["0", "0.8"], help="seconds per inference, or measured:FILE[#PLACE] (percentiles in ms in a JSON)"
    )
    parser.add_argument("--fps", type=float, default=50.0)
    parser.add_argument(
        "--actions_per_chunk", type=int, nargs="+", default=[50, 100], help="the further ones run where the one before cannot bridge the delay"
    )
    parser.add_argument("--chunk_size_threshold", type=float, default=0.5, help="think again when this part of a chunk is left (threaded, server)")
    parser.add_argument("--when_late", choices=("hold", "resume"), default="hold", help="for threaded and server, see ChunkBuffer")
    parser.add_argument("--smoothing", choices=("none", "ensemble"), default="none", help="for threaded and server")
    parser.add_argument(
        "--chunk_noise_deg", type=float, default=1.0, help="standard deviation of a chunk's error at its end (a choice, not measured)"
    )
    parser.add_argument("--arm_time_constant_s", type=float, default=DEFAULT_TIME_CONSTANT_S, help="of the arm's first-order lag")
    parser.add_argument("--max_speed_deg_s", type=float, default=300.0, help="the loop's own limit; 6 degrees per tick at 50 Hz")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=4, help="trials at the same time; more than the machine can bear shows as missed ticks")
    parser.add_argument("--virtual", action="store_true", help="virtual time: seconds instead of minutes, exact; without the server")
    parser.add_argument("--device", default="cpu", choices=("cpu",), help="no network runs here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/control_architectures"), help="directory for tables, pictures and runs/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
