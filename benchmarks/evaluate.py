"""Success in the simulated arm: what denoising steps, chunk length, controller, latency and number format cost.

    python benchmarks/evaluate.py                                        # latency and controllers on 20 layouts, minutes
    python benchmarks/evaluate.py --full                                 # all studies on 200 layouts, an hour of two cores
    python benchmarks/evaluate.py --controllers sync threaded --latency_ms 100 --action_horizon 8 16 --scenes moving

It plays one-camera networks (data_config so100) that were trained in this simulator, as the demo's was; networks of other cameras are refused.
The policy drives the arm through the product's own loop and controllers. Time is simulated: it passes by the injected latency while the network
computes, so the figures do not depend on the machine. A scene that lies still hides latency, so the block also moves, and success is also counted
within deadlines. Every cell meets the same layouts and the same noise. Episodes are kept in OUT/episodes.jsonl: a run that was stopped goes on from
there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.closed_loop import cells as grid
from benchmarks.closed_loop.cells import FACTORS, STUDIES, Cell
from benchmarks.closed_loop.episode_log import EpisodeLog
from benchmarks.closed_loop.pictures import plot_latency, plot_steps
from benchmarks.closed_loop.statistics import difference, figures_of
from benchmarks.closed_loop.table import as_table
from benchmarks.closed_loop.videos import write_videos
from benchmarks.closed_loop.workers import Settings, check_playable, jobs_of, reports
from benchmarks.program import make_directory, provenance
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine.digests import sha256
from gr00t_fast.errors import ConfigError, MissingExtraError, attempt
from gr00t_fast.measurement import git_commit
from gr00t_fast.optional import require
from gr00t_fast.robots.so100_sim.simulation import MAX_BLOCK_SPEED_M_S
from training.samples import FIRST_LAYOUT_SEED

ROOT = Path(__file__).resolve().parent.parent
_SEEDS, _SEEDS_FULL = 20, 200
_LEAST_EPISODE_S, _LONGEST_EPISODE_S = 0.5, 600.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    result, code = attempt(lambda: run(arguments), f"interrupted: what was played is in {arguments.out}; the same command goes on from there")
    if result is None:
        return code
    print(as_table(result))
    write(result, arguments.out)
    print(json.dumps(result))
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    cells, seeds = cells_of(arguments), seeds_of(arguments)
    settings = Settings(
        str(arguments.model_path), arguments.lang_instruction, arguments.block_speed_m_s, arguments.episode_s, arguments.seed, arguments.device
    )
    check_playable(settings.model_path)
    make_directory(arguments.out)
    log = EpisodeLog(arguments.out, {**asdict(settings), "model_path": digests_of(arguments.model_path)}, git_commit())
    jobs = jobs_of(settings, log.missing(cells, seeds))
    bar = require("tqdm", "sim").tqdm(total=sum(len(job.seeds) for job in jobs), unit=" episodes")
    with bar:
        for report in reports(jobs, arguments.jobs, arguments.ray):
            log.add(report)
            bar.update(len(report.outcomes))
    if arguments.videos:
        playable = [cell for cell in cells if cell not in log.refused]
        for path in write_videos(settings, playable, seeds[: arguments.videos], arguments.out):
            print(f"wrote {path}", file=sys.stderr)
    return {
        "benchmark": "evaluate",
        "checkpoint": arguments.model_path.name,
        "seeds": len(seeds),
        "first_seed": seeds[0],
        "episode_s": arguments.episode_s,
        "deadlines_s": arguments.deadlines_s,
        "block_speed_m_s": arguments.block_speed_m_s,
        "instruction": arguments.lang_instruction,
        "rows": rows_of(cells, seeds, log, arguments),
        "episodes_played_by": log.commits,
        **provenance(arguments.seed),
    }


def digests_of(model_path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that decides about its actions, by name."""
    directory = open_checkpoint(model_path).path
    files = sorted(file for file in directory.rglob("*") if file.suffix in (".json", ".safetensors") and "exports" not in file.parts)
    return {str(file.relative_to(directory)): sha256(file) for file in files}


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """The product of the settings given, or the cells of the studies. Raises ConfigError."""
    given = {factor: getattr(arguments, factor) for factor in FACTORS}
    studies = arguments.study or (STUDIES if arguments.full else ())
    settings = [factor for factor in FACTORS if factor != "scene" and given[factor]]
    scenes = given["scene"] or grid.SCENES
    if studies and set(settings) - {"engine"}:
        raise ConfigError("a study has settings of its own; leave out --study and --full, or the settings. --scenes and --engines go with both.")
    if studies or not settings:
        cells = grid.cells_of_studies(studies or STUDIES[:1], scenes, given["engine"] or ())
    else:
        cells = grid.product_of(given | {"scene": scenes})
    grid.check(cells, open_checkpoint(arguments.model_path).config.head.action_horizon)
    return cells


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    count = arguments.seeds if arguments.seeds is not None else _SEEDS_FULL if arguments.full else _SEEDS
    if count < 1 or not 0 <= arguments.first_seed <= FIRST_LAYOUT_SEED - count:
        raise ConfigError(f"layouts are held out below seed {FIRST_LAYOUT_SEED}; got {count} from {arguments.first_seed} on.")
    if not _LEAST_EPISODE_S <= arguments.episode_s <= _LONGEST_EPISODE_S or not all(0 < s <= arguments.episode_s for s in arguments.deadlines_s):
        raise ConfigError(
            f"--episode_s must be from {_LEAST_EPISODE_S:g} to {_LONGEST_EPISODE_S:g} and --deadlines_s above 0 and at most as long; "
            f"got {arguments.episode_s} and {arguments.deadlines_s}."
        )
    if min(arguments.jobs - 1, arguments.videos, arguments.seed) < 0:
        raise ConfigError("--jobs must be at least 1, --videos and --seed not negative.")
    if not 0 < arguments.block_speed_m_s <= MAX_BLOCK_SPEED_M_S:
        raise ConfigError(f"--block_speed_m_s must be above 0 and at most {MAX_BLOCK_SPEED_M_S}; got {arguments.block_speed_m_s}.")
    return list(range(arguments.first_seed, arguments.first_seed + count))


def rows_of(cells: Sequence[Cell], seeds: Sequence[int], log: EpisodeLog, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cell; `against` compares it, layout by layout, with `reference_of` it, if that was played."""
    rows = []
    for cell in cells:
        row = asdict(cell)
        if cell in log.refused:
            rows.append(row | {"refused": log.refused[cell]})
            continue
        other = grid.reference_of(cell)
        outcomes, reference = log.outcomes(cell, seeds), [] if other == cell else log.outcomes(other, seeds)
        row |= figures_of(outcomes, arguments.episode_s, arguments.deadlines_s)
        against = difference(outcomes, reference, arguments.episode_s)
        rows.append(row | {"against": against and {**asdict(other), **against}})
    return rows


def write(result: dict[str, Any], out: Path) -> None:
    """evaluate.json, .md and .csv, and the plots for which there are enough settings."""
    (out / "evaluate.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "evaluate.md").write_text(as_table(result) + "\n")
    with open(out / "evaluate.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*FACTORS, "episodes", "successes", "mean_time_s", "median_time_s", "median_jerk_deg_s3"])
        for row in (row for row in result["rows"] if "refused" not in row):
            figures = [row["episodes"], row["success"]["successes"], row["mean_time_s"], row["median_time_s"], row["median_jerk_deg_s3"]]
            writer.writerow([*(row[factor] for factor in FACTORS), *figures])
    rows, deadlines = result["rows"], result["deadlines_s"]
    for name in ("latency.png", "steps.png"):  # of an earlier run with other settings
        (out / name).unlink(missing_ok=True)
    try:
        plot_latency(rows, deadlines[0], result["episode_s"], out / "latency.png")
        plot_steps(rows, result["episode_s"], out / "steps.png")
    except MissingExtraError as error:
        print(f"no plots: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path",
        type=Path,
        default=ROOT / "checkpoints" / "so100-sim-reach",
        help="directory of a one-camera network trained in this simulator (default: the demo's)",
    )
    parser.add_argument("--full", action="store_true", help=f"all studies, {_SEEDS_FULL} layouts unless said otherwise")
    parser.add_argument("--study", nargs="+", choices=STUDIES, help="(default: latency, where no setting is given)")
    parser.add_argument("--seeds", type=int, help=f"layouts per setting (default: {_SEEDS})")
    parser.add_argument("--first_seed", type=int, default=0, help="of the layouts; training used other ones")
    parser.add_argument("--scenes", dest="scene", nargs="+", choices=grid.SCENES, help="(default: both)")
    parser.add_argument("--controllers", dest="controller", nargs="+", choices=grid.CONTROLLERS)
    parser.add_argument("--latency_ms", type=int, nargs="+", help="injected into every inference")
    parser.add_argument("--denoising_steps", type=int, nargs="+")
    parser.add_argument("--action_horizon", type=int, nargs="+", help="actions of a chunk that may play")
    parser.add_argument(
        "--engines",
        dest="engine",
        nargs="+",
        help="NAME[:PRECISION][=DIRECTORY], as in openvino:int8=outputs/exports/int8; another export, another --out",
    )
    parser.add_argument("--block_speed_m_s", type=float, default=0.06, help="of the moving block (default: %(default)s)")
    parser.add_argument("--episode_s", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--deadlines_s", type=float, nargs="+", default=[1.0, 2.0], help="the first is plotted (default: 1 2)")
    parser.add_argument("--lang_instruction", default="Reach the block", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--ray", metavar="ADDRESS", help="play on the machines of a Ray cluster; local: a Ray of its own on this one")
    parser.add_argument("--videos", type=int, default=0, metavar="N", help="film the first N layouts, all arms of a setting side by side")
    parser.add_argument("--device", default="cpu", help="of the torch engines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "evaluate", help="directory (default: outputs/evaluate)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
