"""Success in the simulated arm: what denoising steps, chunk length, controller, latency and number format cost.

    python benchmarks/evaluate.py                                        # latency and controllers on 20 layouts, minutes
    python benchmarks/evaluate.py --full                                 # all studies on 200 layouts, an hour of two cores
    python benchmarks/evaluate.py --controllers sync threaded --latency_ms 100 --action_horizon 8 16 --scenes moving

It plays one-camera networks (data_config so100) that were trained in this simulator, as the demo's was; networks of other cameras are refused.
The policy drives the arm through the product's own loop and controllers. Time is simulated: it passes by the injected latency while the network
computes, so the figures do not depend on the machine. A scene that lies still hides latency, so the block also moves, and success is also counted
within deadlines. Every cell meets the same layouts and the same noise. Episodes are kept in OUT/episodes.jsonl: a run that was stopped goes on from
there.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import cv2
import numpy as np

from benchmarks.closed_loop import (
    FACTORS,
    SCENES,
    STUDIES,
    Cell,
    ControllerName,
    Outcome,
    Report,
    Scene,
    Settings,
    cells_of_studies,
    check,
    check_playable,
    jobs_of,
    product_of,
    references_of,
    reports,
    runner_of,
)
from benchmarks.lib.program import drawing, figure, finish, markdown_table, provenance, read_flags, write_csv
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine.manifest import sha256
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.flags import setting
from gr00t_fast.measurement import git_commit, wilson_interval
from gr00t_fast.robots.sim.rendering import write_video
from gr00t_fast.robots.sim.scene import scene_xml
from gr00t_fast.robots.sim.simulation import MAX_BLOCK_SPEED_M_S, Simulation
from training.samples import FIRST_LAYOUT_SEED


class EpisodeLog:
    """DIRECTORY/episodes.jsonl: its first line says under which conditions the episodes were played; the others are one episode each,
    or the commit of a run that began there."""

    def __init__(self, directory: Path, conditions: Mapping[str, Any], commit: str | None = None) -> None:
        """Reads what is there. Raises ConfigError when it was played under other conditions, or is damaged before its last line."""
        self.path = directory / "episodes.jsonl"
        self._outcomes: dict[Cell, dict[int, Outcome]] = defaultdict(dict)
        self.refused: dict[Cell, str] = {}
        self.commits: list[str | None] = []  # under which the episodes were played, oldest first
        if self.path.exists():
            self._read(dict(conditions))
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"conditions": dict(conditions)}) + "\n", encoding="utf-8")
        self._commit = commit

    def missing(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[tuple[Cell, list[int]]]:
        """What has yet to be played."""
        wanted = [(cell, [seed for seed in seeds if seed not in self._outcomes[cell]]) for cell in cells if cell not in self.refused]
        return [(cell, left) for cell, left in wanted if left]

    def outcomes(self, cell: Cell, seeds: Sequence[int]) -> list[Outcome]:
        return [self._outcomes[cell][seed] for seed in seeds if seed in self._outcomes[cell]]

    def add(self, report: Report) -> None:
        lines = report.lines()
        if self._commit not in self.commits:
            self.commits.append(self._commit)
            lines.insert(0, {"commit": self._commit})
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        self._note(report)

    def _note(self, report: Report) -> None:
        if report.refused is not None:
            self.refused.setdefault(report.cell, report.refused)
        self._outcomes[report.cell].update({outcome.seed: outcome for outcome in report.outcomes})

    def _read(self, conditions: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the run was killed while it wrote: that episode is played again
            self.path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines = lines[:-1]
        try:
            found, *entries = [json.loads(line) for line in lines]
            played = found["conditions"]
            for entry in entries:
                if "commit" in entry:
                    self.commits.append(entry["commit"])
                    continue
                cell = Cell(**entry["cell"])
                outcomes = (Outcome(**entry["outcome"]),) if "outcome" in entry else ()
                self._note(Report(cell, outcomes, entry.get("refused")))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is damaged ({type(error).__name__}: {error}). Remove it, or choose another --out.") from error
        if played != conditions:
            changed = [name for name in conditions if played.get(name) != conditions[name]]
            raise ConfigError(f"{self.path} holds episodes played with other {', '.join(changed)}. Remove it, or choose another --out.")


_RESAMPLES = 4000


def figures_of(outcomes: Sequence[Outcome], episode_s: float, deadlines_s: Sequence[float]) -> dict[str, Any]:
    """Success within the episode and within each deadline, time to success, smoothness. JSON-ready.

    mean_time_s counts an episode without success as the whole episode (a restricted mean), so that slow and failed ones both show and none is left
    out; median_time_s is None where half the episodes or more fail.
    """
    times_s = times_of(outcomes, math.inf)
    bounded_s = np.minimum(times_s, episode_s)
    median_s = float(np.median(times_s))
    return {
        "episodes": len(outcomes),
        "success": rate_of(np.isfinite(times_s)),
        "within": {f"{deadline_s:g}": rate_of(times_s <= deadline_s) for deadline_s in deadlines_s},
        "mean_time_s": round(float(bounded_s.mean()), 3),
        "mean_time_95_s": _bootstrapped_mean(bounded_s),
        "median_time_s": round(median_s, 3) if math.isfinite(median_s) else None,
        **_jerk_of(outcomes),
        "median_end_distance_mm": round(1000 * float(np.median([outcome.end_distance_m for outcome in outcomes])), 1),
        "median_tip_path_m": round(float(np.median([outcome.tip_path_m for outcome in outcomes])), 3),
        "mean_inferences": round(float(np.mean([outcome.inferences for outcome in outcomes])), 2),
        "mean_starved_ticks": round(float(np.mean([outcome.starved_ticks for outcome in outcomes])), 2),
        "failed_seeds": [outcome.seed for outcome in outcomes if outcome.solved_s is None],
    }


def _jerk_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    noted = [outcome.jerk_rms_deg_s3 for outcome in outcomes if outcome.jerk_rms_deg_s3 is not None]
    return {"median_jerk_deg_s3": round(float(np.median(noted)), 1) if noted else None, "episodes_with_jerk": len(noted)}


def times_of(outcomes: Sequence[Outcome], without: float) -> np.ndarray:
    """(n,) seconds to success, by seed; `without` where there was none."""
    return np.array([without if outcome.solved_s is None else outcome.solved_s for outcome in sorted(outcomes, key=lambda outcome: outcome.seed)])


def rate_of(solved: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(solved.sum()), len(solved))
    return {"successes": int(solved.sum()), "rate": round(float(solved.mean()), 4), "wilson_95": [round(low, 4), round(high, 4)]}


def difference(outcomes: Sequence[Outcome], reference: Sequence[Outcome], episode_s: float) -> dict[str, Any] | None:
    """`outcomes` minus `reference` on the seeds that both have: success rate (Newcombe's interval for paired rates), and mean time."""
    both = {outcome.seed for outcome in outcomes} & {outcome.seed for outcome in reference}
    if not both:
        return None
    ours, theirs = (times_of([outcome for outcome in arm if outcome.seed in both], math.inf) for arm in (outcomes, reference))
    lost, won = int((np.isinf(ours) & np.isfinite(theirs)).sum()), int((np.isfinite(ours) & np.isinf(theirs)).sum())
    seconds = np.minimum(ours, episode_s) - np.minimum(theirs, episode_s)
    low, high = newcombe_interval(int(np.isfinite(ours).sum()), int(np.isfinite(theirs).sum()), lost, won, len(both))
    return {
        "seeds": len(both),
        "rate": round((won - lost) / len(both), 4),
        "rate_95": [round(low, 4), round(high, 4)],
        "lost": lost,
        "won": won,
        "mean_time_s": round(float(seconds.mean()), 3),
        "mean_time_95_s": _bootstrapped_mean(seconds),
    }


def newcombe_interval(ours: int, theirs: int, lost: int, won: int, trials: int) -> tuple[float, float]:
    """95 % interval of a difference of paired rates (Newcombe 1998, method 10). ours, theirs: successes of `trials`; lost, won: pairs in which only
    they, only we succeeded. The correlation is corrected for continuity, so that the interval has a width also where no pair differs."""
    rates = ours / trials, theirs / trials
    intervals = wilson_interval(ours, trials), wilson_interval(theirs, trials)
    both, neither = ours - won, trials - ours - lost
    spread = math.sqrt(ours * (trials - ours) * theirs * (trials - theirs))
    agreement = both * neither - won * lost
    corrected = agreement if agreement < 0 else max(agreement - trials / 2, 0.0)
    correlation = corrected / spread if spread else 0.0
    below, above = [(rate - low, high - rate) for rate, (low, high) in zip(rates, intervals, strict=True)]

    def apart(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))

    centre = rates[0] - rates[1]
    return centre - apart(below[0], above[1]), centre + apart(below[1], above[0])


def _bootstrapped_mean(values: np.ndarray) -> list[float]:
    """Percentile bootstrap over episodes; the same resamples for the same number of episodes."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return [round(float(bound), 3) for bound in np.percentile(values[picks].mean(axis=1), (2.5, 97.5))]


Result = Mapping[str, Any]
_SETTING = ("block", "controller", "latency ms", "steps", "actions", "engine")


def as_table(result: Result) -> str:
    deadlines = result["deadlines_s"]
    within = (f"within {deadline:g} s" for deadline in deadlines)
    compared = ("against", "success, points (95 %)", "time s (95 %)")
    columns = (*_SETTING, "success % (95 %)", *within, "mean time s (95 %)", *compared, "jerk 1000 deg/s^3", "inferences")
    table = markdown_table(columns, [_line(row, deadlines) for row in result["rows"]], len(columns))
    return "\n".join([_preface(result), "", table, "", *_notes(result)])


def _preface(result: Result) -> str:
    return (
        f"Reach, {result['seeds']} layouts unseen in training, the same layouts and noise in every row; {result['episode_s']:g} s at "
        f"30 Hz; the moving block goes {100 * result['block_speed_m_s']:g} cm/s; joints trail their targets by {_lag(result)}. Simulated time: an "
        "inference takes the latency given and nothing more."
    )


def _lag(result: Result) -> str:
    return "90 to 103 ms, the motors' own" if result["servo_lag_ms"] is None else f"{result['servo_lag_ms']:g} ms"


def _line(row: Result, deadlines: Sequence[float]) -> list[object]:
    setting = [row["scene"], row["controller"], row["latency_ms"], row["denoising_steps"], row["action_horizon"], row["engine"].partition("=")[0]]
    if "refused" in row:
        return [*setting, "cannot run", *["-"] * (len(deadlines) + 6)]
    low, high = row["mean_time_95_s"]
    jerk = row["median_jerk_deg_s3"]
    return [
        *setting,
        _rate(row["success"]),
        *(_rate(row["within"][f"{deadline:g}"]) for deadline in deadlines),
        f"{row['mean_time_s']:.2f} ({low:.2f}-{high:.2f})",
        *_against(row),
        figure(jerk and jerk / 1000, 1),
        f"{row['mean_inferences']:.1f}",
    ]


def _against(row: Result) -> list[str]:
    """What is compared, and the differences of success and of mean time, paired by layout."""
    against = row["against"]
    if against is None:
        return ["-", "-", "-"]
    low, high = against["rate_95"]
    faster, slower = against["mean_time_95_s"]
    return [
        f"{against['controller']}, {against['action_horizon']} actions, {against['latency_ms']} ms",
        f"{100 * against['rate']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{against['mean_time_s']:+.2f} ({faster:+.2f} to {slower:+.2f})",
    ]


def _rate(rate: Result) -> str:
    low, high = rate["wilson_95"]
    return f"{100 * rate['rate']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _notes(result: Result) -> list[str]:
    notes = [
        f"Mean time counts an episode without success as {result['episode_s']:g} s. Against: the same layouts, 4 steps, fp32. "
        f"Jerk: median over {_jerk_episodes(result)} episodes, while the arm moves, at 30 Hz, without the gripper."
    ]
    reasons = dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row)
    notes += [f"Cannot run: {reason}" for reason in reasons]
    if any(row["controller"] == "server" for row in result["rows"]):
        notes.append(
            "server: threaded, each observation and chunk over ZeroMQ to another process. The transport's own time is not simulated time, so "
            "this row shows that the way through a server changes no action; what it costs in time, ab_server measures."
        )
    if any(row["controller"] == "rtc" for row in result["rows"]):
        notes.append("rtc: real-time chunking at the latency given; its denoising steps cost more than plain ones, which is not charged here.")
    return notes


def _jerk_episodes(result: Result) -> str:
    counts = sorted({row["episodes_with_jerk"] for row in result["rows"] if "refused" not in row})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)


_COLOURS = {"sync": "C3", "threaded": "C0", "auto": "C5", "resume": "C4", "rtc": "C1", "server": "C2"}
_MARKS = {4: "v", 8: "o", 16: "s"}
Row = Mapping[str, Any]


def plot_latency(result: Row, path: Path) -> None:
    """Success within a deadline and time to success against latency, a column per scene; nothing where the rows hold fewer than two latencies."""
    rows, deadline_s = result["rows"], result["deadlines_s"][0]
    like = max(rows, key=lambda row: _latencies_of(rows, row))
    rows = [row for row in rows if all(row[name] == like[name] for name in ("denoising_steps", "engine"))]
    arms = dict.fromkeys((row["controller"], row["action_horizon"]) for row in rows if _latencies_of(rows, row) > 1)
    lines = {}
    for controller, horizon in arms:
        longest = horizon == max(h for c, h in arms if c == controller)
        style = {"color": _COLOURS[controller], "marker": _MARKS.get(horizon, "o"), "ls": "-" if longest else "--"}
        mine = [row for row in rows if (row["controller"], row["action_horizon"]) == (controller, horizon)]
        lines[f"{controller}, {horizon} actions"] = mine, style
    across = ("latency_ms", "latency of an inference (ms)")
    _plot_grid(result, lines, across, lambda row: row["within"][f"{deadline_s:g}"], f"success within {deadline_s:g} s (%)", path)


def plot_steps(result: Row, path: Path) -> None:
    """Success and time to success against denoising steps, a line per horizon; nothing where the rows hold fewer than two step counts."""
    rows = [row for row in result["rows"] if row["controller"] == "sync" and row["latency_ms"] == 0 and row["engine"] == result["rows"][0]["engine"]]
    lines = {}
    for index, horizon in enumerate(sorted({row["action_horizon"] for row in rows})):
        mine = [row for row in rows if row["action_horizon"] == horizon]
        lines[f"{horizon} actions"] = mine, {"color": f"C{index}", "marker": _MARKS.get(horizon, "o")}
    said = f"success within {result['episode_s']:g} s (%)"
    _plot_grid(result, lines, ("denoising_steps", "denoising steps"), lambda row: row["success"], said, path)


def _plot_grid(
    result: Row,
    lines: Mapping[str, tuple[Sequence[Row], Mapping[str, Any]]],
    across: tuple[str, str],
    rate_of_row: Callable[[Row], Row],
    said: str,
    path: Path,
) -> None:
    """Success above, time to success below, a column per scene. lines: rows and look of each; across: factor and label."""
    rows, (factor, label) = [row for mine, _ in lines.values() for row in mine], across
    values, scenes = sorted({row[factor] for row in rows}), list(dict.fromkeys(row["scene"] for row in rows))
    if len(values) < 2:
        return
    engine = rows[0]["engine"].partition("=")[0]
    title = f"{result['checkpoint']}, {engine} in simulated time, n = {result['seeds']} layouts per point, 95 % intervals"
    with drawing(path, title, 2, len(scenes), (6 * len(scenes), 7), sharex=True, sharey="row") as axes:
        for column, scene in enumerate(scenes):
            for index, (name, (mine, look)) in enumerate(lines.items()):
                points = {row[factor]: row for row in mine if row["scene"] == scene}
                shift = 0.06 * (index - (len(lines) - 1) / 2)  # bars of different arms beside each other
                style = {"ms": 4, "capsize": 2, "lw": 1, **look}
                _draw(axes[0][column], values, points, shift, name, style, lambda row: _rate_points(rate_of_row(row)))
                _draw(axes[1][column], values, points, shift, name, style, lambda row: (row["mean_time_s"], *row["mean_time_95_s"]))
            axes[0][column].set_title(f"{scene} block")
            axes[1][column].set_xticks(range(len(values)), [str(value) for value in values])
            axes[1][column].set_xlabel(label)
        axes[0][0].set_ylabel(said)
        axes[0][0].set_ylim(-3, 103)
        axes[1][0].set_ylabel(f"mean time to success (s; {result['episode_s']:g} without)")
        axes[1][0].set_ylim(bottom=0)
        axes[0][0].legend(fontsize=8, loc="lower left")


def _latencies_of(rows: Iterable[Row], like: Row) -> int:
    same = ("scene", "controller", "action_horizon", "denoising_steps", "engine")
    return len({row["latency_ms"] for row in rows if all(row[name] == like[name] for name in same)})


def _rate_points(rate: Mapping[str, Any]) -> tuple[float, float, float]:
    return 100 * rate["rate"], 100 * rate["wilson_95"][0], 100 * rate["wilson_95"][1]


def _draw(axis: Any, places: Sequence[int], rows: Mapping[int, Row], shift: float, label: str, style: Mapping[str, Any], value_of: Any) -> None:
    """One line with 95 % intervals; where an arm cannot run at all, its line ends."""
    found = [(index + shift, *value_of(rows[place])) for index, place in enumerate(places) if place in rows and "refused" not in rows[place]]
    if found:
        xs, ys, lows, highs = zip(*found, strict=True)
        below, above = [y - low for y, low in zip(ys, lows, strict=True)], [high - y for y, high in zip(ys, highs, strict=True)]
        axis.errorbar(xs, ys, yerr=(below, above), label=label, **style)
    axis.grid(alpha=0.3)


_WIDTH, _HEIGHT, _COLUMNS = 320, 240, 3
_WHITE, _GREEN = (255, 255, 255), (60, 230, 60)


class _Camera:
    """Draws the scene at every tick, and says from when on the task was solved."""

    def __init__(self, title: str) -> None:
        self._title = title
        self.frames: list[np.ndarray] = []

    def __call__(self, simulation: Simulation) -> None:
        frame = np.ascontiguousarray(simulation.render("front", _WIDTH, _HEIGHT, samples=2))
        _write(frame, self._title, 18, _WHITE)
        reached = simulation.success
        _write(frame, f"{simulation.time_s:.1f} s" + (" reached" if reached else ""), _HEIGHT - 10, _GREEN if reached else _WHITE)
        self.frames.append(frame)


def _write(frame: np.ndarray, text: str, row: int, colour: tuple[int, int, int]) -> None:
    cv2.putText(frame, text, (8, row), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)


def write_videos(settings: Settings, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> Iterator[Path]:
    """One mp4 per scene, latency, step count and seed; its panels are the controllers, horizons and engines. Yields each as it is written."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.scene, cell.latency_ms, cell.denoising_steps), []).append(cell)
    for (scene, latency_ms, steps), members in groups.items():
        for seed in seeds:
            panels = [frames for cell in members if (frames := _film(settings, cell, seed))]
            if panels:
                path = out / f"{scene}_{latency_ms}ms_{steps}steps_seed{seed}.mp4"
                write_video(path, list(_side_by_side(panels)))
                yield path


def _film(settings: Settings, cell: Cell, seed: int) -> list[np.ndarray]:
    policies, runner = runner_of(settings)
    camera = _Camera(f"{cell.controller}, {cell.action_horizon} actions, {cell.latency_ms} ms, {cell.engine.partition('=')[0]}")
    try:
        runner.play(policies.of(cell), cell, seed, settings.noise_seed, camera)
    except ConfigError:  # the table says why this arm cannot run
        return []
    return camera.frames


def _side_by_side(panels: Sequence[list[np.ndarray]]) -> Iterator[np.ndarray]:
    """Pictures of all panels; one that is over keeps its last."""
    blank = np.zeros_like(panels[0][0])
    columns = min(_COLUMNS, len(panels))
    for tick in range(max(map(len, panels))):
        now = [frames[min(tick, len(frames) - 1)] for frames in panels]
        now += [blank] * (-len(now) % columns)
        yield np.vstack([np.hstack(now[row : row + columns]) for row in range(0, len(now), columns)])


ROOT = Path(__file__).resolve().parent.parent
_SEEDS, _SEEDS_FULL = 20, 200
_LEAST_EPISODE_S, _LONGEST_EPISODE_S = 0.5, 600.0


@dataclass
class Config:
    model_path: Path = ROOT / "checkpoints" / "so100-sim-reach"  # a one-camera network trained in this simulator; default: the demo's
    full: bool = False  # all studies, 200 layouts unless said otherwise
    study: list[Literal["latency", "steps", "precision"]] | None = None  # default: latency, where no setting is given
    episodes: int | None = setting(None, former=("seeds",))  # layouts per setting; default: 20
    first_seed: int = 0  # of the layouts; training used other ones
    scenes: list[Scene] | None = None  # default: both
    controllers: list[ControllerName] | None = None  # who drives the arm
    latency_ms: list[int] | None = None  # injected into every inference
    denoising_steps: list[int] | None = None  # from noise to action
    action_horizon: list[int] | None = None  # actions of a chunk that may play
    engines: list[str] | None = None  # NAME[:PRECISION][=DIRECTORY], as in openvino:int8=outputs/exports/int8; another export, another --out
    block_speed_m_s: float = 0.06  # of the moving block
    servo_lag_ms: float | None = None  # how far a moving joint trails its target; default: the motors' 90 to 103; a real SO-101: 133 to 200
    episode_s: float = 10.0  # length of an episode
    deadlines_s: list[float] = field(default_factory=lambda: [1.0, 2.0])  # success is also counted within these; the first is plotted
    lang_instruction: str = "Reach the block"  # what the policy is told
    jobs: int = os.cpu_count() or 1  # processes; default: one per core
    ray: str | None = None  # address: play on the machines of a Ray cluster; local: a Ray of its own on this one
    videos: int = 0  # film the first N layouts, all arms of a setting side by side
    device: str = "cpu"  # of the torch engines
    seed: int = 0  # of the noise
    json: bool = False  # also print the result as one line of JSON, the last of the output
    out: Path = ROOT / "outputs" / "evaluate"  # directory for episodes, JSON, tables and plots

    def factors(self) -> dict[str, list[Any] | None]:
        """What was given of each factor of a cell."""
        given = (self.scenes, self.controllers, self.latency_ms, self.denoising_steps, self.action_horizon, self.engines)
        return dict(zip(FACTORS, given, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    interrupted = f"interrupted: what was played is in {config.out}; the same command goes on from there"
    return finish("evaluate", config, run, as_table, plot, interrupted=interrupted)


def run(arguments: Config) -> dict[str, Any]:
    cells, seeds = cells_of(arguments), seeds_of(arguments)
    settings = Settings(
        str(arguments.model_path),
        arguments.lang_instruction,
        arguments.block_speed_m_s,
        arguments.episode_s,
        arguments.seed,
        arguments.device,
        arguments.servo_lag_ms,
    )
    check_playable(settings.model_path)
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
    rows = rows_of(cells, seeds, log, arguments)
    write_rows(rows, arguments.out / "evaluate.csv")
    return {
        "benchmark": "evaluate",
        "checkpoint": arguments.model_path.name,
        "seeds": len(seeds),
        "first_seed": seeds[0],
        "episode_s": arguments.episode_s,
        "deadlines_s": arguments.deadlines_s,
        "block_speed_m_s": arguments.block_speed_m_s,
        "servo_lag_ms": arguments.servo_lag_ms,
        "instruction": arguments.lang_instruction,
        "rows": rows,
        "episodes_played_by": log.commits,
        **provenance(arguments.seed),
    }


def digests_of(model_path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that decides about its actions, by name."""
    directory = open_checkpoint(model_path).path
    files = sorted(file for file in directory.rglob("*") if file.suffix in (".json", ".safetensors") and "exports" not in file.parts)
    return {str(file.relative_to(directory)): sha256(file) for file in files}


def cells_of(arguments: Config) -> list[Cell]:
    """The product of the settings given, or the cells of the studies. Raises ConfigError."""
    given = arguments.factors()
    studies = arguments.study or (STUDIES if arguments.full else ())
    settings = [factor for factor in FACTORS if factor != "scene" and given[factor]]
    scenes = given["scene"] or SCENES
    if studies and set(settings) - {"engine"}:
        raise ConfigError("a study has settings of its own; leave out --study and --full, or the settings. --scenes and --engines go with both.")
    if studies or not settings:
        cells = cells_of_studies(studies or STUDIES[:1], scenes, given["engine"] or ())
    else:
        cells = product_of(given | {"scene": scenes})
    check(cells, open_checkpoint(arguments.model_path).config.head.action_horizon)
    return cells


def seeds_of(arguments: Config) -> list[int]:
    count = arguments.episodes if arguments.episodes is not None else _SEEDS_FULL if arguments.full else _SEEDS
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
    if arguments.servo_lag_ms is not None:
        scene_xml("reach", arguments.servo_lag_ms)  # before processes begin
    return list(range(arguments.first_seed, arguments.first_seed + count))


def rows_of(cells: Sequence[Cell], seeds: Sequence[int], log: EpisodeLog, arguments: Config) -> list[dict[str, Any]]:
    """A row per cell; `against` compares it, layout by layout, with the first of `references_of` it that was played."""
    rows = []
    for cell in cells:
        row = asdict(cell)
        if cell in log.refused:
            rows.append(row | {"refused": log.refused[cell]})
            continue
        outcomes = log.outcomes(cell, seeds)
        other = next((other for other in references_of(cell) if other != cell and log.outcomes(other, seeds)), None)
        row |= figures_of(outcomes, arguments.episode_s, arguments.deadlines_s)
        against = difference(outcomes, log.outcomes(other, seeds), arguments.episode_s) if other else None
        rows.append(row | {"against": against and {**asdict(other), **against}})
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    figures = ("mean_time_s", "median_time_s", "median_jerk_deg_s3")
    columns = (*FACTORS, "episodes", "successes", *figures)
    found = (row for row in rows if "refused" not in row)
    write_csv(
        path,
        columns,
        [(*(row[each] for each in FACTORS), row["episodes"], row["success"]["successes"], *(row[each] for each in figures)) for row in found],
    )


def plot(result: Result, path: Path) -> None:
    """Those for which there are enough settings."""
    for name, draw in (("latency.png", plot_latency), ("steps.png", plot_steps)):
        path.with_name(name).unlink(missing_ok=True)  # of an earlier run with other settings
        draw(result, path.with_name(name))


if __name__ == "__main__":
    sys.exit(main())
