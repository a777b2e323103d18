"""Which control architecture keeps an arm moving while its policy thinks, and how well it follows.

    python benchmarks/control_architectures.py                          # a made-up recording, 0 and 800 ms, moving and still scene
    python benchmarks/control_architectures.py --recording=DATASET --episode=3 --latency_ms 0 measured:bench_policy.json

A recording is the task; a policy that knows it by heart answers each observation with the next actions, after a delay and with an error of its own
per chunk (replay.py). The product's control loop, pacer and controllers move an arm with a first-order lag. Architectures: `sync`,
`threaded`, `server` (threaded, the policy in another process behind ZeroMQ), `threaded_resume` (--when_late=resume) and the baseline `naive_async`
(a FIFO of chunks, each played from its first action). `floor` is the recording itself sent to the same arm: no delay, no error.

What comparisons of this kind commonly get wrong, and what is done here: one trial (here several, seeds paired, architectures taking turns,
confidence intervals); stale chunks played from index 0 (here a baseline that is called so); an invented fixed delay (here also measured
distributions); errors at equal instants only, which charge a delay as an error (here also with the tracking delay taken out); one kind of scene
(in a moving one a pause is an error, in a still one it costs time).
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib.latency import Latency, needed_actions, parse_latency
from benchmarks.lib.program import Flags, check_counts, count_of, drawing, finish, in_processes, markdown_table, provenance, read_flags, show_progress
from benchmarks.replay import ARCHITECTURES, DEFAULT_TIME_CONSTANT_S, Architecture, Cell, Motion, SceneKind, Setup, load_recording, run_trial
from gr00t_fast.errors import ConfigError
from gr00t_fast.flags import setting as flag

_LAG_STEP_S = 0.01
_ONE_TICK = 1.5  # a step of more than this many periods in the recording leaves something out; less is the jitter of the ticks
_LONGEST_LAG = 0.5  # of the motion; beyond, too little is left to compare
# Two-sided 95 % quantiles of Student's t for 1, 2, .. 30 degrees of freedom (any table of statistics), and of the normal distribution.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95 = 1.960


def measure(motion: Motion) -> dict[str, Any]:
    """All figures of one trial. `mae` and `rmse` are dicts by joint; "raw" compares equal instants, "aligned" after taking the delay out."""
    body = [index for index, name in enumerate(motion.joint_names) if "gripper" not in name]
    delay_s = tracking_delay_s(motion)
    gaps = {kind: np.subtract(*aligned(motion, by_s)) for kind, by_s in (("raw", 0.0), ("aligned", delay_s))}
    return {
        "frozen_ticks": frozen_ticks(motion),
        "freeze_s": freeze_s(motion),
        **boundary_jumps(motion, body),
        "jerk_rms_deg_s3": jerk_rms(motion, body),
        "tracking_delay_s": delay_s,
        "target_lag_s": float(np.median(motion.sent_s - motion.played_s)),
        "went_back_s": float(np.maximum(-np.diff(motion.played_s), 0).sum()),
        "never_played_s": never_played_s(motion),
        "duration_s": float(motion.sent_s[-1] + motion.period_s),
        "finished": float(motion.finished),
        "missed_ticks": float(motion.missed_ticks),
        "speed_limited": float(motion.speed_limited),
        **{f"mae_{kind}": float(np.abs(gap).mean()) for kind, gap in gaps.items()},
        "joints": {
            f"{name}_{kind}": dict(zip(motion.joint_names, values.tolist(), strict=True))
            for kind, gap in gaps.items()
            for name, values in (("mae", np.abs(gap).mean(0)), ("rmse", np.sqrt((gap**2).mean(0))))
        },
    }


def never_played_s(motion: Motion) -> float:
    """How much of the recording was jumped over, forward."""
    steps_s = np.diff(motion.played_s)
    return float((steps_s - motion.period_s)[steps_s > _ONE_TICK * motion.period_s].sum())


def _gaps(motion: Motion) -> np.ndarray:
    """(N,) ticks from the target before; 1 for the first."""
    steps = np.diff(motion.sent_s, prepend=motion.sent_s[0] - motion.period_s) / motion.period_s
    return np.maximum(1, np.rint(steps)).astype(np.int64)


def _waits(motion: Motion) -> np.ndarray:
    """Indices of the targets that the arm stood still for, without the first chunk's: nothing had moved yet."""
    return motion.entries[motion.waited & (motion.entries > 0)]


def frozen_ticks(motion: Motion) -> int:
    """Deadlines after the first target at which the arm got nothing new because the network was not ready; missed ones are counted apart."""
    return int(motion.starved.sum() + (_gaps(motion)[_waits(motion)] - 1).sum())


def freeze_s(motion: Motion) -> float:
    """The same in seconds: held ticks, and what the pauses lasted beyond one period."""
    waits = _waits(motion)
    pauses_s = motion.sent_s[waits] - motion.sent_s[waits - 1] - motion.period_s
    return float(motion.starved.sum() * motion.period_s + np.maximum(pauses_s, 0).sum())


def per_tick(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Targets (K, J) at every deadline, those of pauses held, and boundary (K,)."""
    gaps = _gaps(motion)
    ticks = np.cumsum(gaps) - 1  # of each target
    targets = np.repeat(motion.targets, np.append(gaps[1:], 1), axis=0)  # (K, J)
    boundary = np.zeros(len(targets), bool)
    boundary[ticks[motion.entries[motion.entries > 0]]] = True
    freeze_begins = motion.starved & ~np.roll(motion.starved, 1)
    boundary[ticks[freeze_begins]] = True
    waits = _waits(motion)
    boundary[ticks[waits - 1][gaps[waits] > 1] + 1] = True
    return targets, boundary


def boundary_jumps(motion: Motion, body: Sequence[int]) -> dict[str, float]:
    """The largest change of a joint's commanded velocity at a boundary, and the largest step there in one tick.

    The tick after a boundary counts as well: a jump's way back is part of it."""
    targets, boundary = per_tick(motion)
    at = np.flatnonzero(boundary)
    at = np.unique(np.concatenate([at, at + 1]))
    at = at[(at >= 2) & (at < len(targets))]
    if not at.size:
        return {"boundary_jump_deg_s": 0.0, "boundary_step_deg": 0.0}
    step = np.diff(targets[:, body], axis=0)  # (K - 1, J): entry k is the step into tick k + 1
    change = np.abs(step[at - 1] - step[at - 2]) / motion.period_s
    return {"boundary_jump_deg_s": float(change.max()), "boundary_step_deg": float(np.abs(step[at - 1]).max())}


def jerk_rms(motion: Motion, body: Sequence[int]) -> float:
    """Root mean square over instants and joints of the third difference of the arm's pose at the control rate, in degrees per second cubed."""
    if len(motion.arm) < 4:
        return math.nan
    return float(np.sqrt((np.diff(motion.arm[:, body], 3, axis=0) ** 2).mean()) / motion.period_s**3)


def aligned(motion: Motion, delay_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Arm and reference, (G', J) each, the reference taken `delay_s` earlier; instants before that are left out."""
    grid_s = motion.grid_s[motion.grid_s >= delay_s - 1e-9]
    reference = np.stack([np.interp(grid_s - delay_s, motion.grid_s, column) for column in motion.reference.T], axis=1)
    return motion.arm[-len(grid_s) :], reference


def tracking_delay_s(motion: Motion) -> float:
    """The delay at which arm and reference correlate best (cross-correlation, mean over the joints that move), from 0 to half the motion."""
    moving = np.flatnonzero((motion.reference.std(0) > 1e-6) & (motion.arm.std(0) > 1e-6))
    if not moving.size:
        return 0.0

    def correlation(delay_s: float) -> float:
        arm, reference = (poses[:, moving] - poses[:, moving].mean(0) for poses in aligned(motion, delay_s))
        power = np.sqrt((arm**2).sum(0) * (reference**2).sum(0))
        return float(((arm * reference).sum(0) / np.maximum(power, 1e-12)).mean())

    return float(max(np.arange(0.0, _LONGEST_LAG * motion.grid_s[-1], _LAG_STEP_S), key=correlation, default=0.0))


def summarise(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over trials of every figure, and half the width of its 95 % confidence interval (Student's t; None with a single trial)."""
    return {key: _summary([trial[key] for trial in trials]) for key in trials[0]}


def t95(freedom: int) -> float:
    """Beyond the table linear in 1 / freedom down to the normal quantile, as tables of statistics recommend: right to 0.001."""
    return _T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95 + (_T95[-1] - _NORMAL95) * len(_T95) / freedom


def _summary(values: list[Any]) -> dict[str, Any]:
    if isinstance(values[0], dict):
        return {key: _summary([value[key] for value in values]) for key in values[0]}
    count, mean = len(values), float(np.mean(values))
    half = None
    if count > 1:
        half = round(t95(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count), 4)
    return {"mean": round(mean, 4), "ci95": half, "max": round(float(np.max(values)), 4)}


_NOTEWORTHY_S = 0.5
_TOLERABLE_MISSED = 1.0
_COLUMNS = (  # heading, figure, digits
    ("frozen ticks", "frozen_ticks", 1),
    ("freeze, s", "freeze_s", 2),
    ("boundary jump, deg/s", "boundary_jump_deg_s", 0),
    ("step there, deg", "boundary_step_deg", 1),
    ("jerk, 1000 deg/s^3", "jerk_rms_deg_s3", 1),
    ("target lag, s", "target_lag_s", 2),
    ("tracking delay, s", "tracking_delay_s", 2),
    ("MAE, same instant", "mae_raw", 2),
    ("MAE, delay out", "mae_aligned", 2),
    ("went back, s", "went_back_s", 2),
    ("never played, s", "never_played_s", 2),
    ("took, s", "duration_s", 1),
    ("missed ticks", "missed_ticks", 1),
)


def as_table(result: Mapping[str, Any]) -> str:
    """Markdown: one row per setting and architecture, means over the trials, +- half a 95 % confidence interval where it is not 0."""
    recording = result["recording"]
    regime = (
        f"Recording: {recording['source']}, {recording['seconds']:.1f} s, {len(recording['joints'])} joints. {result['fps']:g} Hz, "
        f"chunk error {result['chunk_noise_deg']:g} deg, arm time constant "
        f"{result['arm_time_constant_s']:g} s, {result['trials']} trials, {result['time']}."
    )
    columns = ("scene", "delay", "actions per chunk", "architecture", *(heading for heading, _, _ in _COLUMNS))
    notes = "\n".join(f"* {note}" for note in result["notes"])
    return "\n\n".join([regime, markdown_table(columns, [_line(row) for row in result["rows"]], 4), notes])


def _line(row: Mapping[str, Any]) -> list[object]:
    figures = row["figures"]
    texts = {name: _cell(figures[name], digits, 1000 if "jerk" in name else 1) for _, name, digits in _COLUMNS}
    if row["scene"] == "still":  # its time is the arm's own: a lag behind it has no meaning
        texts["target_lag_s"] = texts["tracking_delay_s"] = ""
    if not figures["finished"]["mean"]:
        texts["duration_s"] = "not done"
    return [row["scene"], row.get("delay", ""), row.get("actions_per_chunk", ""), row["architecture"], *texts.values()]


def _cell(figure: Mapping[str, Any], digits: int, unit: float) -> str:
    half = f" +- {figure['ci95'] / unit:.{digits}f}" if figure["ci95"] and round(figure["ci95"] / unit, digits) else ""
    return f"{figure['mean'] / unit:.{digits}f}{half}"


def notes_on(rows: Sequence[Mapping[str, Any]], fps: float) -> list[str]:
    """What the figures show, and what they cannot."""
    return [*dict.fromkeys(_bridges(rows, fps)), *_frozen(rows), *_leaps(rows), *_caveats(rows)]


def _bridges(rows: Sequence[Mapping[str, Any]], fps: float) -> Iterator[str]:
    for row in rows:
        if row["architecture"] in ("threaded", "server") and row["actions_per_chunk"] < row["needed_actions_per_chunk"]:
            left = max(0, row["actions_per_chunk"] - row["delay_ticks"])
            yield (
                f"With {row['actions_per_chunk']} actions at {fps:g} Hz, a delay of {row['delay_ticks']} ticks leaves {left} actions per chunk, "
                f"fewer than the {row['delay_ticks']} ticks until the next one: a controller that drops elapsed actions must starve. It need not "
                f"from {row['needed_actions_per_chunk']} actions on: twice the delay, and a margin."
            )


def _frozen(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in ("sync", "threaded", "server", "threaded_resume"):
        own = [row for row in rows if row["architecture"] == name]
        if not own:
            continue
        enough = [row for row in own if row["actions_per_chunk"] >= row["needed_actions_per_chunk"]]
        if name in ("threaded", "server") and enough:
            worst = max(row["figures"]["frozen_ticks"]["max"] for row in enough)
            yield f"{name}, wherever a chunk is long enough: {worst:g} frozen ticks after the first chunk in the worst trial."
        else:
            worst = max(own, key=lambda row: row["figures"]["frozen_ticks"]["mean"])
            mean = worst["figures"]["frozen_ticks"]["mean"]
            yield f"{name}: at most {mean:.1f} frozen ticks after the first chunk on average ({worst['scene']} scene, {worst['setting']})."


def _leaps(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Controllers of gr00t_fast that did not play a still scene's recording from begin to end."""
    for row in rows:
        if row["scene"] != "still" or row["architecture"] in ("floor", "naive_async"):
            continue
        back, over = (row["figures"][name]["mean"] for name in ("went_back_s", "never_played_s"))
        if max(back, over) > _NOTEWORTHY_S:
            done = "" if row["figures"]["finished"]["mean"] == 1 else "; it did not get to the end"
            yield f"{row['architecture']} in a still scene, {row['setting']}: went back {back:.1f} s and jumped over {over:.1f} s in all{done}."


def _caveats(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    missed = sum(row["figures"]["missed_ticks"]["mean"] for row in rows) / len(rows)
    if missed > _TOLERABLE_MISSED:
        yield f"The machine was busy: it missed {missed:.1f} ticks per trial. Jumps, jerk and single frozen ticks are partly its own; see --virtual."
    yield "The policy replays a recording and waits: it stands for a network's delay and for chunks that disagree, not for a network's mistakes."
    if any(row["scene"] == "still" for row in rows):
        yield (
            "In the still scene the task waits for the arm, so a pause costs time, not accuracy: compare `took`. Errors there are against the "
            "recording at the moment the arm had come to."
        )
    if any(row["architecture"] == "naive_async" for row in rows):
        yield "naive_async is a baseline with known mistakes (first in, first out, from index 0); no controller of gr00t_fast works like that."


_COLOURS = {"sync": "C3", "threaded": "C0", "server": "C2", "threaded_resume": "C4", "naive_async": "C1", "floor": "0.5"}
FirstTrials = Mapping[Cell, Motion]
Motions = dict[tuple[Cell, int], Motion]


def setting(cell: Cell) -> str:
    return f"delay {cell.delay.label}, {cell.horizon} actions per chunk"


def plot_joints(panels: Sequence[Sequence[tuple[str, FirstTrials, int]]], said: str, path: Path) -> None:
    """Rows of panels, each with its title, its motions and the joint that is drawn."""
    size = (7 * len(panels[0]), 2.2 * len(panels))
    with drawing(path, said, len(panels), len(panels[0]), size, sharex="col") as axes:
        for axis, (title, motions, joint) in zip(axes.flat, (panel for line in panels for panel in line), strict=True):
            _draw_joint(axis, motions, joint)
            axis.set_title(title, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("time since the first target (s)")
        axes[0][0].legend(fontsize=7, ncol=3)


def plot_all(result: Mapping[str, Any], motions: Motions, out: Path) -> None:
    """First trials: every joint in the hardest setting, and the joint that moves most in every setting, a column per scene; and the errors."""
    first = {cell: motion for (cell, trial), motion in motions.items() if trial == 0}
    first = dict(sorted(first.items(), key=lambda item: ARCHITECTURES.index(item[0].architecture), reverse=True))
    scenes = list(dict.fromkeys(cell.scene for cell in first))
    settings = list(dict.fromkeys(setting(cell) for cell in sorted(first, key=_hardness)))
    names, reference = (getattr(next(iter(first.values())), name) for name in ("joint_names", "reference"))
    said = (
        f"{result['recording']['source']}: first of {count_of(result['trials'], 'trial')}, {result['fps']:g} Hz, {result['time'].split(',')[0]} time"
    )

    def of(scene: str, text: str) -> FirstTrials:
        return {cell: motion for cell, motion in first.items() if (cell.scene, setting(cell)) == (scene, text)}

    hardest = {scene: setting(max((cell for cell in first if cell.scene == scene), key=_hardness)) for scene in scenes}
    all_joints = [[(f"{name}, {s} scene, {hardest[s]}", of(s, hardest[s]), joint) for s in scenes] for joint, name in enumerate(names)]
    plot_joints(all_joints, f"{said}; degrees", out / "all_joints_comparison.png")
    most = int(np.ptp(reference, axis=0).argmax())
    one_joint = [[(f"{scene} scene, {text}", of(scene, text), most) for scene in scenes] for text in settings]
    plot_joints(one_joint, f"{said}; {names[most]}, degrees", out / "comparison_joints.png")
    plot_errors(result["rows"], out / "comparison_errors.png")


def _hardness(cell: Cell) -> tuple[int, int]:
    """The longer the delay and the shorter the chunk, the harder."""
    return cell.delay.ticks(1000), -cell.horizon


def plot_errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """MAE and RMSE by joint, mean over the trials with 95 % confidence intervals, delay taken out; a column per setting of the first scene."""
    rows = [row for row in rows if row["scene"] == rows[0]["scene"] and row["architecture"] != "floor"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    said = f"{rows[0]['scene']} scene; whiskers: 95 % confidence interval over {count_of(rows[0]['trials'], 'trial')}"
    with drawing(path, said, 4, len(settings), (4.6 * len(settings), 9.5), sharey="row") as axes:
        for column, text in enumerate(settings):
            for line, figure_name in enumerate(("mae_raw", "mae_aligned", "rmse_raw", "rmse_aligned")):
                _draw_bars(axes[line][column], [row for row in rows if row["setting"] == text], figure_name)
                kind, _, alignment = figure_name.partition("_")
                told = f"{kind.upper()}, {'same instant' if alignment == 'raw' else 'delay taken out'}\n(degrees; gripper: per cent)"
                axes[line][column].set_ylabel(told, fontsize=7)
            axes[0][column].set_title(text, fontsize=9)
        handles = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[0][0].legend(handles.values(), handles.keys(), fontsize=7)


def _draw_joint(axis: Any, motions: FirstTrials, joint: int) -> None:
    if not motions:
        axis.axis("off")
        return
    moving = next((motion for cell, motion in motions.items() if cell.scene == "moving"), None)
    if moving is not None:  # a still scene has no time of its own
        axis.plot(moving.grid_s, moving.reference[:, joint], "k", linewidth=2.2, alpha=0.45, label="recording")
    for cell, motion in motions.items():
        style = {"linestyle": (0, (4, 4)), "zorder": 3} if cell.architecture == "server" else {}  # it lies on `threaded`
        axis.plot(motion.grid_s, motion.arm[:, joint], color=_COLOURS[cell.architecture], linewidth=1.1, label=cell.architecture, **style)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=7)


def _draw_bars(axis: Any, rows: Sequence[Mapping[str, Any]], figure_name: str) -> None:
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        joints = row["figures"]["joints"][figure_name]
        means, halves = ([entry[key] or 0.0 for entry in joints.values()] for key in ("mean", "ci95"))
        places = np.arange(len(joints)) + number * width - 0.4 + width / 2
        axis.bar(places, means, width, yerr=halves, color=_COLOURS[row["architecture"]], label=row["architecture"], error_kw={"elinewidth": 0.8})
        axis.set_xticks(range(len(joints)), joints, rotation=20, fontsize=7)
    axis.grid(alpha=0.25, axis="y")
    axis.tick_params(axis="y", labelsize=7)


def cells_of(arguments: Config, latencies: list[Latency]) -> list[Cell]:
    """Every architecture at every delay with the first chunk length; with longer ones where the length before is too short to bridge the delay.

    `threaded_resume` differs from `threaded` only where the chunk is too short, and is run there.
    """
    cells = []
    for scene in arguments.scenes:
        for delay in latencies:
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
    work = [(cell, trial) for trial in range(trials) for cell in random.Random(setup.seed + trial).sample(cells, len(cells))]
    motions: Motions = {}
    for done, (key, motion) in enumerate(_played(setup, work, jobs), 1):
        motions[key] = motion
        show_progress("trial", done, len(work))
    return motions


def _played(setup: Setup, work: list[tuple[Cell, int]], jobs: int) -> Iterator[tuple[tuple[Cell, int], Motion]]:
    if jobs == 1 or setup.virtual:
        yield from (((cell, trial), run_trial(setup, cell, trial)) for cell, trial in work)
        return
    for (_, cell, trial), motion in in_processes(run_trial, [(setup, *each) for each in work], jobs):
        yield (cell, trial), motion


def floor_of(setup: Setup, scene: str) -> Motion:
    """The recording itself, tick by tick, to the same arm: what no architecture can beat."""
    perfect = replace(setup, chunk_noise_deg=0.0, virtual=True)
    return run_trial(perfect, Cell(scene, "sync", max(2, round(setup.fps)), parse_latency("0")), 0)


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


def run(arguments: Config) -> tuple[dict[str, Any], Motions]:
    arguments = checked(arguments)
    recording = load_recording(arguments.recording, arguments.episode, arguments.column, arguments.topic, arguments.seed)
    recording = recording.cut(arguments.start_s, arguments.seconds)
    settings = {each.name: getattr(arguments, each.name) for each in fields(Setup) if each.name != "recording"}
    setup = Setup(recording, **settings)
    cells = cells_of(arguments, [parse_latency(text) for text in arguments.latency_ms])
    began_s = time.monotonic()
    motions = play_all(setup, cells, arguments.rounds, arguments.jobs)
    rows = rows_of(setup, cells, motions, arguments.rounds)
    write_motions(motions, arguments.out)
    return {
        "benchmark": "control_architectures",
        "recording": {"source": recording.source, "seconds": round(recording.duration_s, 3), "joints": list(recording.joint_names)},
        **settings,
        "time": "virtual" if arguments.virtual else f"real, {arguments.jobs} trials at a time",
        "trials": arguments.rounds,
        "rows": rows,
        "notes": notes_on(rows, arguments.fps),
        "took_s": round(time.monotonic() - began_s, 1),
        **provenance(arguments.seed),
    }, motions


def write_motions(motions: Motions, out: Path) -> None:
    """org.csv and infer.csv of every run: the recording, and the arm."""
    for (cell, trial), motion in motions.items():
        delay = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in cell.delay.label)
        folder = out / "runs" / f"{cell.scene}-{cell.architecture}-{cell.horizon}-delay_{delay}" / f"trial{trial}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("org.csv", motion.reference), ("infer.csv", motion.arm)):
            header = ",".join(("time_s", *motion.joint_names))
            np.savetxt(folder / name, np.column_stack([motion.grid_s, values]), "%.4f", ",", header=header, comments="")


def without_joints(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its figures by joint, which are a hundred thousand characters and in results.json."""
    rows = [{**row, "figures": {name: value for name, value in row["figures"].items() if name != "joints"}} for row in result["rows"]]
    return {**result, "rows": rows}


@dataclass
class Config(Flags):
    device: Literal["cpu"] = "cpu"  # no network runs here
    recording: Path | None = None  # LeRobotDataset directory (v3), .csv (time_s and joints, degrees) or ROS 1 .bag; default: made up
    episode: int = 0  # of a LeRobotDataset
    column: str = "action"  # of a LeRobotDataset: action or observation.state; taken as degrees
    topic: str | None = None  # of a bag: a topic of sensor_msgs/JointState; default: the only one
    start_s: float = 0.0  # where in the recording to begin
    seconds: float = 10.0  # how much of the recording to play, at most
    architectures: list[Architecture] | None = None  # default: all (with --virtual: all but server)
    scenes: list[SceneKind] = field(default_factory=lambda: ["moving", "still"])  # moves on by itself, or waits for the arm
    latency_ms: list[str] = field(default_factory=lambda: ["0", "800"])  # of an inference, or measured:FILE[#PLACE] (percentiles in ms in a JSON)
    fps: float = 50.0  # control rate
    actions_per_chunk: list[int] = field(default_factory=lambda: [50, 100])  # the further ones run where the one before cannot bridge the latency
    when_late: Literal["hold", "resume"] = "hold"  # for threaded and server, see ChunkBuffer
    chunk_noise_deg: float = 1.0  # standard deviation of a chunk's error at its end (a choice, not measured)
    arm_time_constant_s: float = DEFAULT_TIME_CONSTANT_S  # of the arm's first-order lag
    max_speed_deg_s: float = 300.0  # the loop's own limit; 6 degrees per tick at 50 Hz
    rounds: int = flag(4, former=("trials",))  # trials of each setting, with seeds of their own
    jobs: int = 4  # trials at the same time; more than the machine can bear shows as missed ticks
    virtual: bool = False  # virtual time: seconds instead of minutes, exact; without the server
    out: Path = Path("outputs/control_architectures")  # directory for tables, pictures and runs/


def main(argv: Sequence[str] | None = None) -> int:
    motions: Motions = {}

    def play(config: Config) -> dict[str, Any]:
        result, played = run(config)
        motions.update(played)
        return result

    def plot(result: dict[str, Any], path: Path) -> None:
        plot_all(result, motions, path.parent)

    config = read_flags(Config, argv, __doc__)
    return finish("results", config, play, as_table, plot, table_file="table.md", told=without_joints)


def checked(config: Config) -> Config:
    """With its architectures filled in. Raises ConfigError for flags that contradict each other."""
    if config.virtual and "server" in (config.architectures or ()):
        raise ConfigError("a server in another process runs in real time only: leave out --virtual, or server.")
    check_counts(config, "rounds", "jobs", "actions_per_chunk")
    if config.fps <= 0 or config.arm_time_constant_s <= 0:
        raise ConfigError("--fps and --arm_time_constant_s must be positive.")
    default = [name for name in ARCHITECTURES if not (config.virtual and name == "server")]
    return replace(config, architectures=config.architectures or default)


if __name__ == "__main__":
    sys.exit(main())
