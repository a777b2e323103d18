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
cameras are right, not that the policy generalises: use held-out episodes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import yaml

from benchmarks.open_loop_study import metrics, report
from benchmarks.open_loop_study.checks import Finding, picture_findings, static_findings, trained_range
from benchmarks.open_loop_study.metrics import Compared
from benchmarks.open_loop_study.probes import Interview, places, questions
from benchmarks.open_loop_study.recorded import Episode, Recorded, choose, describe, load
from benchmarks.open_loop_study.rollout import Chunk, Rollout
from benchmarks.open_loop_study.verdict import Verdict, is_good, judge, rests_on, suspects
from benchmarks.program import finish, provenance
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.observations import LeRobotFrames
from gr00t_fast.facts import read_facts
from gr00t_fast.measurement import percentiles
from gr00t_fast.policy import Gr00tPolicy, load_policy
from gr00t_fast.prompt import PROMPT_STYLES

_ACTION_HORIZON = 8  # what the README's run plays of each chunk


class OpenLoop:
    """One dry run. `run` leaves in `drawing` what `plot` needs besides the result."""

    def __init__(self) -> None:
        self.drawing: report.Drawing | None = None

    def run(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Raises Gr00tFastError."""
        _check_numbers(arguments)
        check_directory(arguments.dataset)
        facts = read_facts(arguments.model_path, arguments.embodiment_tag, arguments.data_config)
        frames = LeRobotFrames(arguments.dataset, load_data_config(arguments.data_config), facts, arguments.camera_map)
        recorded = load(frames, facts)
        episodes, instructions = choose(recorded, arguments.episodes), arguments.lang_instruction
        texts = _instructions(frames, episodes, instructions)
        policy = _load(arguments)  # gigabytes of weights: once the recording is known to be fit
        rollout = Rollout(policy, frames, recorded, _noise_shape(arguments), arguments.seed, instructions)
        horizon, stride = arguments.action_horizon, arguments.stride or arguments.action_horizon
        steps = list(dict.fromkeys(arguments.denoising_steps or [policy.denoising_steps]))
        policy.warm_up()
        chunks = rollout.chunks(episodes, lambda episode: _starts(episode, horizon, stride), steps)
        compared = {count: metrics.compare(recorded, _every(found, horizon), horizon) for count, found in chunks.items()}
        write_to = arguments.out / "open_loop.csv"
        report.write_csv(compared, recorded.layout.names, write_to)
        spans = trained_range(recorded, policy.facts)
        runs = {str(count): _figures(recorded, chunks[count], compared[count], horizon, stride, spans) for count in steps}
        ends = [(episode, frame) for episode in episodes for frame in (0, len(episode) - 1)]
        looked_at = ((episode.number, frame, rollout.observation(episode, frame)) for episode, frame in ends)
        findings = [*static_findings(recorded, policy.facts, frames), *picture_findings(looked_at, frames)]
        judged = min(steps, key=lambda count: runs[str(count)]["chunks"]["mae"])
        policy.denoising_steps = judged
        verdict = self._verdict(runs[str(judged)], findings, rollout, episodes, arguments)
        first = rollout.observation(episodes[0], 0)
        pictures = {key: first[key][0] for key in frames.cameras}
        self.drawing = report.Drawing(compared[judged], recorded.layout.names, pictures)
        return {
            "benchmark": "open_loop",
            "checkpoint": Path(arguments.model_path).name,
            "dataset": _about(frames, recorded, policy, episodes, texts) | {"recording": _recording(arguments.dataset)},
            "engine": policy.engine.name,
            "device": str(policy.device),
            "precision": str(policy.dtype).removeprefix("torch."),
            "action_horizon": horizon,
            "trained_horizon": policy.facts.trained_horizon,
            "stride": stride,
            "runs": runs,
            "verdict": {**verdict.describe(), "denoising_steps": judged, "rests_on": rests_on(compared[judged])},
            **provenance(arguments.seed),
        }

    def _verdict(
        self, figures: Mapping[str, Any], findings: Sequence[Finding], rollout: Rollout, episodes: Sequence[Episode], arguments: argparse.Namespace
    ) -> Verdict:
        """Asks further only where the predictions are poor."""
        interview, summary = None, figures["chunks"]
        if not is_good(summary, findings) and arguments.probe_frames:
            where = places(rollout, episodes, arguments.action_horizon, arguments.probe_frames)
            cameras = [key for key in where[0].observation if key.startswith("video.")]
            asked = questions(cameras, rollout.recorded.layout.names, suspects(summary))
            interview = Interview(rollout, where, arguments.action_horizon, asked)
        return judge(summary, figures["offsets"], findings, interview, figures["best_shift"])

    def plot(self, result: dict[str, Any], path: Path) -> None:
        report.plot(result, self.drawing, path)


def check_directory(path: Path) -> None:
    """Raises ConfigError when there is no LeRobotDataset."""
    if not (path / "meta" / "info.json").is_file():
        what = "is no LeRobotDataset: meta/info.json is missing" if path.is_dir() else "does not exist"
        raise ConfigError(f"--dataset: '{path}' {what}. Expected the directory of a LeRobotDataset v3, as lerobot-record leaves it.")


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("action_horizon", "stride"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.probe_frames < 0:
        raise ConfigError(f"--probe_frames must not be negative, got {arguments.probe_frames}.")


def _load(arguments: argparse.Namespace) -> Gr00tPolicy:
    steps = arguments.denoising_steps or [None]
    policy = load_policy(
        arguments.model_path,
        arguments.embodiment_tag,
        arguments.data_config,
        denoising_steps=steps[0],
        action_horizon=arguments.action_horizon,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        engine_path=arguments.engine_path,
        processor_path=arguments.processor_path,
        prompt_style=arguments.prompt_style,
        seed=arguments.seed,
    )
    for count in steps[1:]:
        policy.denoising_steps = count  # refused now rather than after the first frames
    policy.action_horizon = None  # checked above; every row is looked at
    return policy


def _noise_shape(arguments: argparse.Namespace) -> tuple[int, int]:
    head = open_checkpoint(arguments.model_path, with_weights=False).config.head
    return head.action_horizon, head.action_dim


def _instructions(frames: LeRobotFrames, episodes: Sequence[Episode], given: str | None) -> list[str]:
    """What the policy will be told, each once. Raises ConfigError when neither the recording nor the user says it."""
    if given is not None:
        return [given]
    told = {episode.number: frames.tasks_of(episode.number) for episode in episodes}
    if silent := [number for number, texts in told.items() if not texts]:
        raise ConfigError(f"episode {silent[0]} of the data set has no task text. Give what the policy was trained to hear: --lang_instruction=...")
    return list(dict.fromkeys(text for texts in told.values() for text in texts))


def _starts(episode: Episode, horizon: int, stride: int) -> list[int]:
    """Frames at which the policy is asked: those of both protocols."""
    return sorted({*range(0, len(episode), horizon), *range(0, len(episode), stride)})


def _every(chunks: Sequence[Chunk], frames: int) -> list[Chunk]:
    """Those of one protocol."""
    return [chunk for chunk in chunks if chunk.start % frames == 0]


def _figures(recorded: Recorded, chunks: Sequence[Chunk], compared: Compared, horizon: int, stride: int, spans: np.ndarray) -> dict[str, Any]:
    rows = len(chunks[0].targets)
    return {
        "chunks": metrics.summary(compared, recorded.layout.names, spans),
        "ratio_by_episode": metrics.ratio_by_episode(compared),
        "best_shift": metrics.best_shift(_every(chunks, horizon), horizon),
        "boundary_jumps": metrics.boundary_jumps(compared),
        "offsets": metrics.offsets(compared, recorded.layout.names),
        "leads": metrics.by_lead(metrics.compare(recorded, _every(chunks, stride), rows)),
        "inference_ms": percentiles(chunk.inference_ms for chunk in chunks),
    }


def _about(frames: LeRobotFrames, recorded: Recorded, policy: Gr00tPolicy, episodes: Sequence[Episode], texts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": Path(frames.name).name,
        "fps": frames.fps,
        "checkpoint_fps": policy.facts.fps,
        "of": len(recorded.episodes),
        "episodes": [episode.number for episode in episodes],
        "frames": sum(map(len, episodes)),
        "instructions": list(texts),
        "cameras": {key: {"feature": c.feature, "chosen_by": c.chosen_by, "size": c.size and list(c.size)} for key, c in frames.cameras.items()},
        "ranges": describe(recorded, policy.facts),
    }


def _recording(dataset: Path) -> dict[str, Any] | None:
    """What training/record.py says about itself, the layouts among it; None for a data set of another origin."""
    file = dataset / "meta" / "recording.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON as training/record.py writes it, got something else ({error}). Remove the file.") from error


def main(argv: list[str] | None = None) -> int:
    program = OpenLoop()
    return finish("open_loop", _parser().parse_args(argv), program.run, report.as_table, program.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", required=True, help="directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("--dataset", type=Path, required=True, help="directory of a LeRobotDataset v3")
    parser.add_argument("--episodes", nargs="+", default=["0"], metavar="N", help="numbers of episodes in any order, or 'all' (default: 0)")
    parser.add_argument("--action_horizon", type=int, default=_ACTION_HORIZON, help="actions executed per inference (default: %(default)s)")
    parser.add_argument("--denoising_steps", type=int, nargs="+", metavar="N", help="one or more, compared; default: the checkpoint's own")
    parser.add_argument("--stride", type=int, help="frames from one inference to the next when looking by lead; default: as --action_horizon")
    parser.add_argument("--lang_instruction", help="default: the recording's own task text")
    parser.add_argument("--camera_map", type=_mapping, default={}, help='which camera of the data set is which of the checkpoint: "{front: webcam}"')
    parser.add_argument("--probe_frames", type=int, default=12, help="frames for the questions asked about poor predictions; 0: none (default: 12)")
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100", help="so100, so100_dualcam, or module:ClassName of your own")
    parser.add_argument("--engine", default="auto", help="auto is eager; the others are in the README")
    parser.add_argument("--engine_path", type=Path, help="directory of the export; default: exports/<engine> in the checkpoint's directory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--processor_path", type=Path, help="directory with the Eagle tokenizer files; default: looked up")
    parser.add_argument("--prompt_style", choices=PROMPT_STYLES, default="plain")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("outputs/open_loop"), help="directory for JSON, table, CSV and plot")
    return parser


def _mapping(text: str) -> dict[str, str]:
    found = yaml.safe_load(text)
    if not isinstance(found, dict) or not all(isinstance(word, str) for pair in found.items() for word in pair):
        raise argparse.ArgumentTypeError(f"expected {{<data set camera>: <checkpoint camera>}}, got {json.dumps(text)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
