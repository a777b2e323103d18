"""A dry run on recorded data: does the checkpoint predict what was recorded, and if not, is it the model, the units, or the cameras?

    python benchmarks/open_loop.py --model_path=DIR --dataset=MY_LEROBOT_DATASET --episodes 0 3
    python benchmarks/open_loop.py --model_path=DIR --dataset=MY_LEROBOT_DATASET --episodes all --denoising_steps 1 2 4 --stride=1

No arm moves. Recorded observations of a LeRobotDataset (v3) go through the policy, and its actions are compared with the recorded ones, in joint
units. Two protocols, which answer different questions:

* chunks: one inference every --action_horizon frames; its first --action_horizon actions against the recorded ones, end to end. It is what NVIDIA's
  eval_policy does; MSE is the figure that it prints. Says how well the checkpoint does in the way it is used.
* by lead: an inference every --stride frames; the error of each row of the chunk, also of those beyond --action_horizon. Says whether the
  predictions are bad at once, or only far ahead.

Next to each error stand, on the same frames: `hold`, the error of keeping the state that the chunk began from (a policy at its level is worth
nothing); `replay`, that of playing the mean of the data set's other episodes without looking (a policy at its level does not use its camera); and
R2, against the mean recorded action. All step counts get the same frames and noise. Where the predictions are poor, common mistakes are undone on
--probe_frames frames, one at a time (exchanged or mirrored cameras, exchanged or turned joints), to see whether that mends them; the verdict says
what was found. An open-loop error has no floor: demonstrations differ among themselves. A good one on the training data says that units and
cameras are right, not that the policy generalises: use held-out episodes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks import open_loop_verdict as study
from benchmarks.lib.program import PolicyFlags, Result, check_counts, conditions, count_of, figure, finish, markdown_table, provenance, read_flags
from benchmarks.lib.program import write_csv as write_table
from benchmarks.open_loop_verdict import Chunk, Compared, Episode, Finding, Recorded, Rollout, Verdict
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.dataset import LeRobotFrames
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.measurement import percentiles
from gr00t_fast.policy import Gr00tPolicy, load_policy

_MOST_FRAMES_DRAWN = 900  # beyond, chunks are too narrow to be seen; the CSV has all

_MOST_NAMED = 12  # episodes


def as_table(result: Result) -> str:
    """Markdown."""
    data, lines = result["dataset"], []
    lines += [
        f"{result['checkpoint']} on {data['name']}: {data['frames']} frames of episode{'s' if len(data['episodes']) > 1 else ''} "
        f"{_numbers(data['episodes'])} ({data['of']} in all), {result['engine']}, {result['precision']}, "
        f"the first {result['action_horizon']} of {result['trained_horizon']} actions of each chunk.",
        f"Cameras: {'; '.join(_camera(*item) for item in data['cameras'].items())}. Instruction: {' | '.join(data['instructions'])}.",
        *_recorded_by(data),
        "Joint units are the recording's: degrees, and per cent for the gripper, in lerobot's SO-100 data.",
        "",
    ]
    for steps, run in result["runs"].items():
        lines += [f"**Denoising steps: {steps}.** {_headline(run)}", "", _joints(run, data["ranges"]), ""]
    lines += [*_leads(result), "", *_verdict(result)]
    return "\n".join(lines)


def _recorded_by(data: Mapping[str, Any]) -> Iterator[str]:
    """Which layouts of the simulation these are, where the data set says it."""
    if told := data["recording"]:
        layouts = ", ".join(str(told["layouts"][episode]) for episode in data["episodes"][:_MOST_NAMED])
        yield f"Recorded by {told['program']}, layouts {layouts}; training/samples.py draws layouts from {told['training_layouts_from']} on."


def _numbers(episodes: Sequence[int]) -> str:
    listed = list(map(str, episodes))
    return ", ".join(listed if len(listed) <= _MOST_NAMED else [*listed[:_MOST_NAMED], "..."])


def _camera(key: str, camera: Mapping[str, Any]) -> str:
    size = f", {camera['size'][0]}x{camera['size'][1]}" if camera["size"] else ""
    return f"{key} is {camera['feature']}{size} (by {camera['chosen_by']})"


def _headline(run: Mapping[str, Any]) -> str:
    chunks, jumps, times = run["chunks"], run["boundary_jumps"], run["inference_ms"]
    worst = chunks["worst"]
    said = [
        f"MAE {chunks['mae']:.2f}, MSE {chunks['mse']:.2f}; holding still {chunks['hold_mae']:.2f}"
        + ("" if chunks["replay_mae"] is None else f", replaying the other episodes' mean {chunks['replay_mae']:.2f}")
        + f"; ratio to holding {figure(chunks['ratio_to_hold'])}; R2 {figure(chunks['r2'])}.",
        f"Worst: {worst['joint']} at episode {worst['episode']} frame {worst['frame']}, predicted {worst['predicted']:.1f}, "
        f"recorded {worst['recorded']:.1f}.",
    ]
    if jumps["predicted"]:
        said.append(
            f"Change of target across a chunk boundary, largest joint: p50 {jumps['predicted']['p50']:.1f}, p95 {jumps['predicted']['p95']:.1f} "
            f"(recorded there: {jumps['recorded']['p50']:.1f}, {jumps['recorded']['p95']:.1f})."
        )
    if frames := run["best_shift"]["frames"]:
        way = "ahead of" if frames > 0 else "behind"
        said.append(f"Predictions run {way} the recording: shifted by {abs(frames)} frames, MAE {run['best_shift']['mae']:.2f}.")
    return " ".join([*said, f"Inference p50 {times['p50']:.1f} ms."])


def _joints(run: Mapping[str, Any], ranges: Mapping[str, Any]) -> str:
    told = {"MAE": "mae", "MSE": "mse", "holding still": "hold_mae", "replay": "replay_mae", "ratio": "ratio_to_hold", "R2": "r2"}
    rows = []
    for name, joint in run["chunks"]["joints"].items():
        offset, span = run["offsets"][name], ranges[name]["state"]
        first = f"{offset['first_action_recorded']:.1f}, {offset['first_action_predicted']:.1f}"
        spans = f"{_span(span['recorded'])}, {_span(span['checkpoint'])}"
        rows.append((name, *(figure(joint[key]) for key in told.values()), figure(offset["bias"]), first, spans))
    columns = ("joint", *told, "bias", "first action less state: recorded, predicted", "state: recorded, checkpoint")
    return markdown_table(columns, rows)


def _span(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.0f} to {bounds[1]:.0f}"


def _leads(result: Result) -> Iterator[str]:
    """One column per row of the chunk, at most eight."""
    runs = list(result["runs"].items())
    rows = len(runs[0][1]["leads"]["mae"])
    shown = sorted(set(np.linspace(0, rows - 1, min(rows, 8)).round().astype(int)) | {min(result["action_horizon"], rows) - 1})
    yield f"Error by how far ahead (frames after the observation), over all {rows} rows of the chunk, with --stride={result['stride']}:"
    yield ""
    leads = {f"steps: {steps}": run["leads"]["mae"] for steps, run in runs} | {"holding still": runs[0][1]["leads"]["hold_mae"]}
    yield markdown_table(("MAE", *shown), [(name, *(f"{errors[row]:.2f}" for row in shown)) for name, errors in leads.items()])


def _verdict(result: Result) -> Iterator[str]:
    verdict = result["verdict"]
    yield f"**Verdict (denoising steps: {verdict['denoising_steps']}): {verdict['kind']}.** {verdict['advice'][0].upper()}{verdict['advice'][1:]}"
    yield ""
    basis, spread = verdict["rests_on"], result["runs"][str(verdict["denoising_steps"])]["ratio_by_episode"]["spread"]
    counted = ", ".join(count_of(basis[f"{what}s"], what) for what in ("episode", "chunk", "frame"))
    told = f"; ratio to holding by episode: {spread['min']:.2f} to {spread['max']:.2f}, median {spread['median']:.2f}" if spread else ""
    yield f"- This rests on {counted}{told if basis['episodes'] > 1 else ''}."
    if basis["warning"]:
        yield f"- {basis['warning']}."
    yield from (f"- {text}" for text in verdict["evidence"])


def write_csv(compared: Mapping[int, Compared], names: Sequence[str], path: Path) -> None:
    """One row per frame and step count: what was recorded, predicted and measured of each joint."""
    columns = (
        "denoising_steps",
        "episode",
        "frame",
        "row_of_chunk",
        *(f"{name}_{kind}" for name in names for kind in ("recorded", "predicted", "state")),
    )
    rows = []
    for steps, c in compared.items():
        values = np.stack([c.recorded, c.predicted, c.state], axis=-1).reshape(len(c.frame), -1).round(4)
        rows += [(steps, *counts, *row) for *counts, row in zip(c.episode, c.frame, c.lead, values, strict=True)]
    write_table(path, columns, rows)


@dataclass(frozen=True)
class Drawing:
    """What the plot needs beyond the result. pictures: policy's camera -> uint8 (H, W, 3) of the first frame."""

    compared: Compared
    names: Sequence[str]
    pictures: Mapping[str, np.ndarray]


def draw(result: Result, drawn: Drawing, path: Path) -> None:
    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    joints = len(drawn.names)
    figure = plt.figure(figsize=(12, 1.5 * joints + 3.5), layout="constrained")
    grid = figure.add_gridspec(joints + 2, 1 + len(drawn.pictures), width_ratios=[2, *[1] * len(drawn.pictures)])
    shared = None
    for joint in range(joints):
        shared = axis = figure.add_subplot(grid[joint, :], sharex=shared)
        _draw_joint(axis, drawn, joint)
    axis.set_xlabel("frame; episodes " + _numbers(result["dataset"]["episodes"]) + " one after the other")
    _draw_leads(figure.add_subplot(grid[joints:, 0]), result)
    for column, (key, picture) in enumerate(drawn.pictures.items(), 1):
        axis = figure.add_subplot(grid[joints:, column])
        axis.imshow(picture)
        axis.set_title(f"{key}, first frame", fontsize=8)
        axis.axis("off")
    verdict = result["verdict"]
    said = f"{result['checkpoint']} on {result['dataset']['name']}: {verdict['kind']}"
    told = f"{verdict['denoising_steps']} denoising steps, {conditions(result)}, n = {verdict['rests_on']['frames']} frames"
    figure.suptitle(f"{said}\n{told}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_joint(axis: Any, drawing: Drawing, joint: int) -> None:
    c, drawn = drawing.compared, min(len(drawing.compared.frame), _MOST_FRAMES_DRAWN)
    begins = [0, *(np.flatnonzero(np.diff(c.episode[:drawn])) + 1), drawn]
    for begin, end in itertools.pairwise(begins):
        hidden = "_" if begin else ""  # a label that begins so is left out of the legend
        places = np.arange(begin, end)
        axis.plot(places, c.state[begin:end, joint], color="0.6", lw=1, label=hidden + "state")
        axis.plot(places, c.recorded[begin:end, joint], color="k", lw=1.2, label=hidden + "recorded action")
        starts = [*(begin + np.flatnonzero(c.lead[begin:end] == 0)), end]
        for one, other in itertools.pairwise(starts):
            label = ("_" if one else "") + "predicted chunk"
            axis.plot(np.arange(one, other), c.predicted[one:other, joint], color="C1", lw=1.4, label=label)
            axis.plot(one, c.predicted[one, joint], "o", color="C1", ms=3)
        if begin:
            axis.axvline(begin - 0.5, color="0.8", lw=0.8)
    axis.set_ylabel(drawing.names[joint], fontsize=8)
    axis.tick_params(labelsize=7, labelbottom=joint == len(drawing.names) - 1)
    if joint == 0:
        axis.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def _draw_leads(axis: Any, result: Result) -> None:
    for steps, run in result["runs"].items():
        axis.plot(run["leads"]["mae"], marker=".", label=f"denoising steps: {steps}")
    axis.plot(next(iter(result["runs"].values()))["leads"]["hold_mae"], "k--", lw=1, label="holding still")
    axis.axvline(result["action_horizon"] - 0.5, color="0.7", lw=0.8)
    axis.set_xlabel("frames after the observation (line: end of what is executed)", fontsize=8)
    axis.set_ylabel("MAE, all joints", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)


_ACTION_HORIZON = 8  # what the README's run plays of each chunk


def run(arguments: Config) -> tuple[Result, Drawing]:
    """Raises Gr00tFastError."""
    check_counts(arguments, "action_horizon", "stride", "denoising_steps")
    check_counts(arguments, "probe_frames", least=0)
    check_directory(arguments.dataset)
    metadata = read_policy_metadata(arguments.model_path, arguments.embodiment_tag, arguments.data_config)
    frames = LeRobotFrames(arguments.dataset, load_data_config(arguments.data_config), metadata, arguments.camera_map)
    recorded = study.load(frames, metadata)
    episodes, instructions = study.choose(recorded, arguments.episodes), arguments.lang_instruction
    texts = _instructions(frames, episodes, instructions)
    policy = _load(arguments)  # gigabytes of weights: once the recording is known to be fit
    rollout = Rollout(policy, frames, recorded, policy.chunk_shape, arguments.seed, instructions)
    horizon, stride = arguments.action_horizon, arguments.stride or arguments.action_horizon
    steps = list(dict.fromkeys(arguments.denoising_steps or [policy.denoising_steps]))
    policy.warm_up()
    chunks = rollout.chunks(episodes, lambda episode: sorted({*range(0, len(episode), horizon), *range(0, len(episode), stride)}), steps)
    compared = {count: study.compare(recorded, _every(found, horizon), horizon) for count, found in chunks.items()}
    write_csv(compared, recorded.layout.names, arguments.out / "open_loop.csv")
    spans = study.trained_range(recorded, policy.metadata)
    runs = {str(count): _figures(recorded, chunks[count], compared[count], horizon, stride, spans) for count in steps}
    ends = [(episode, frame) for episode in episodes for frame in (0, len(episode) - 1)]
    looked_at = ((episode.number, frame, rollout.observation(episode, frame)) for episode, frame in ends)
    findings = [*study.static_findings(recorded, policy.metadata, frames), *study.picture_findings(looked_at, frames)]
    policy.denoising_steps = judged = min(steps, key=lambda count: runs[str(count)]["chunks"]["mae"])
    verdict = _judge(runs[str(judged)], findings, rollout, episodes, arguments)
    first = rollout.observation(episodes[0], 0)
    drawing = Drawing(compared[judged], recorded.layout.names, {key: first[key][0] for key in frames.cameras})
    return {
        "benchmark": "open_loop",
        "checkpoint": Path(arguments.model_path).name,
        "dataset": _about(frames, recorded, policy, episodes, texts) | {"recording": _recording(arguments.dataset)},
        "engine": policy.engine.name,
        "device": str(policy.device),
        "precision": str(policy.dtype).removeprefix("torch."),
        "action_horizon": horizon,
        "trained_horizon": policy.metadata.trained_horizon,
        "stride": stride,
        "runs": runs,
        "verdict": {**verdict.describe(), "denoising_steps": judged, "rests_on": study.rests_on(compared[judged])},
        **provenance(arguments.seed),
    }, drawing


def _judge(figures: Mapping[str, Any], findings: Sequence[Finding], rollout: Rollout, episodes: Sequence[Episode], arguments: Config) -> Verdict:
    """Asks further only where the predictions are poor."""
    interview, summary = None, figures["chunks"]
    if not study.is_good(summary, findings) and arguments.probe_frames:
        where = study.places(rollout, episodes, arguments.action_horizon, arguments.probe_frames)
        cameras = [key for key in where[0].observation if key.startswith("video.")]
        asked = study.questions(cameras, rollout.recorded.layout.names, study.suspects(summary))
        interview = study.Interview(rollout, where, arguments.action_horizon, asked)
    return study.judge(summary, figures["offsets"], findings, interview, figures["best_shift"])


def check_directory(path: Path) -> None:
    """Raises ConfigError when there is no LeRobotDataset."""
    if not (path / "meta" / "info.json").is_file():
        what = "is no LeRobotDataset: meta/info.json is missing" if path.is_dir() else "does not exist"
        raise ConfigError(f"--dataset: '{path}' {what}. Expected the directory of a LeRobotDataset v3, as lerobot-record leaves it.")


def _load(arguments: Config) -> Gr00tPolicy:
    steps = arguments.denoising_steps or [None]
    options = arguments.options() | {"denoising_steps": steps[0], "prompt_style": arguments.prompt_style}
    policy = load_policy(arguments.model_path, action_horizon=arguments.action_horizon, **options)
    for count in steps[1:]:
        policy.denoising_steps = count  # refused now rather than after the first frames
    policy.action_horizon = None  # checked above; every row is looked at
    return policy


def _instructions(frames: LeRobotFrames, episodes: Sequence[Episode], given: str | None) -> list[str]:
    """What the policy will be told, each once. Raises ConfigError when neither the recording nor the user says it."""
    if given is not None:
        return [given]
    told = {episode.number: frames.tasks_of(episode.number) for episode in episodes}
    if silent := [number for number, texts in told.items() if not texts]:
        raise ConfigError(f"episode {silent[0]} of the data set has no task text. Give what the policy was trained to hear: --lang_instruction=...")
    return list(dict.fromkeys(text for texts in told.values() for text in texts))


def _every(chunks: Sequence[Chunk], frames: int) -> list[Chunk]:
    """Those of one protocol."""
    return [chunk for chunk in chunks if chunk.start % frames == 0]


def _figures(recorded: Recorded, chunks: Sequence[Chunk], compared: Compared, horizon: int, stride: int, spans: np.ndarray) -> dict[str, Any]:
    rows = len(chunks[0].targets)
    return {
        "chunks": study.summary(compared, recorded.layout.names, spans),
        "ratio_by_episode": study.ratio_by_episode(compared),
        "best_shift": study.best_shift(_every(chunks, horizon), horizon),
        "boundary_jumps": study.boundary_jumps(compared),
        "offsets": study.offsets(compared, recorded.layout.names),
        "leads": study.by_lead(study.compare(recorded, _every(chunks, stride), rows)),
        "inference_ms": percentiles(chunk.inference_ms for chunk in chunks),
    }


def _about(frames: LeRobotFrames, recorded: Recorded, policy: Gr00tPolicy, episodes: Sequence[Episode], texts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": Path(frames.name).name,
        "fps": frames.fps,
        "checkpoint_fps": policy.metadata.fps,
        "of": len(recorded.episodes),
        "episodes": [episode.number for episode in episodes],
        "frames": sum(map(len, episodes)),
        "instructions": list(texts),
        "cameras": {key: {"feature": c.feature, "chosen_by": c.chosen_by, "size": c.size and list(c.size)} for key, c in frames.cameras.items()},
        "ranges": study.describe(recorded, policy.metadata),
    }


def _recording(dataset: Path) -> dict[str, Any] | None:
    """What training/record.py says about itself, the layouts among it; None for a data set of another origin."""
    file = dataset / "meta" / "recording.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON as training/record.py writes it, got something else ({error}). Remove the file.") from error


@dataclass
class Config(PolicyFlags):
    model_path: str | None = None  # directory of a GR00T checkpoint, or its name on the Hugging Face hub; required
    dataset: Path | None = None  # directory of a LeRobotDataset v3; required
    episodes: list[str] = field(default_factory=lambda: ["0"])  # numbers of episodes in any order, or 'all'
    action_horizon: int = _ACTION_HORIZON  # actions executed per inference
    denoising_steps: list[int] | None = None  # one or more, compared; default: the checkpoint's own
    stride: int | None = None  # frames from one inference to the next when looking by lead; default: as --action_horizon
    lang_instruction: str | None = None  # default: the recording's own task text
    camera_map: dict[str, str] = field(default_factory=dict)  # which camera of the data set is which of the checkpoint: "{front: webcam}"
    probe_frames: int = 12  # frames for the questions asked about poor predictions; 0: none
    processor_path: Path | None = None  # directory with the tokenizer's files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: the reference's bracketed list
    out: Path = Path("outputs/open_loop")  # directory for JSON, table, CSV and plot


def main(argv: Sequence[str] | None = None) -> int:
    drawn: list[Drawing] = []

    def play(config: Config) -> Result:
        result, drawing = run(config)
        drawn.append(drawing)
        return result

    config = read_flags(Config, argv, __doc__, required=("model_path", "dataset"))
    return finish("open_loop", config, play, as_table, lambda result, path: draw(result, drawn[0], path))


if __name__ == "__main__":
    sys.exit(main())
