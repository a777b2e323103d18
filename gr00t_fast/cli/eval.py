"""`gr00t-fast eval`: does the checkpoint predict what was recorded, and if not, is it the model, the units, the cameras, the rate or the timing?

No arm moves. An inference every --action_horizon frames of a LeRobotDataset (v3); its actions are compared with the recorded ones in joint units, as
NVIDIA's eval_policy does (MSE is the figure that it prints). Beside each error stand `hold`, the error of keeping the state that the chunk began
from, and `replay`, that of playing the mean of the data set's other episodes without looking. A policy at the level of hold is worth nothing, one at
the level of replay does not use its camera. An open-loop error has no floor: demonstrations differ among themselves.

The rules of the verdict, in this order; the first that holds is it, all evidence is told:
1. joints are off by a constant, and without that the predictions are good: units/calibration. Or shifted in time they are good, and better: timing;
2. the error is well below that of holding still and no joint's is large, or all are small: nothing is wrong here, suspect the loop;
3. the recording contradicts the checkpoint's units, order or ranges: units/calibration;
4. pictures are flat, distorted, mirrored or exchanged, or other frames' pictures do as well: cameras;
5. another rate than in training: rate;
6. otherwise: the model.
Large and small are shares of the range that a joint had in training: degrees, per cent and radians are judged alike.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.cli.main import EXIT_OK, Command, show
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import OutputFlags, PolicyFlags, check_at_least_one
from gr00t_fast.console import Progress
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.preflight import ASPECT_TOLERANCE, FPS_TOLERANCE, NORMALISED_LIMIT, RADIANS_LIMIT, SATURATED_EXTREMES, SATURATION_TOLERANCE
from gr00t_fast.dataset import LeRobotFrames
from gr00t_fast.errors import CheckpointError, ConfigError
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.measurement import percentiles, provenance

if TYPE_CHECKING:
    from gr00t_fast.contracts import PartStatistics, PolicyMetadata

UNITS, CAMERAS, RATE, TIMING, MODEL, FINE = "units/calibration", "cameras", "rate", "timing", "model", "looks fine: suspect the loop"
ADVICE = {
    FINE: "The checkpoint predicts what was recorded. If the arm still misbehaves: its calibration and cameras now (--dry_run compares them), the "
    "rate of the loop, the light, --action_horizon, the delay of inference.",
    UNITS: "Recording and checkpoint count joints differently. Compare the ranges; check use_degrees, the calibration and meta/modality.json.",
    CAMERAS: "Compare the pictures with those of the training data: which camera is which (--camera_map), its place, mirroring, colours.",
    TIMING: "The recorded actions belong to other frames than their states and pictures. Each row must hold the state and the pictures from just "
    "before its action was sent; look for dropped or queued frames, and for training data with actions ahead of the joints.",
    RATE: "Recording and training ran at different rates. Use a recording at the checkpoint's rate.",
    MODEL: "The recording fits the checkpoint and is predicted poorly: train longer or on more data, or check instruction and checkpoint.",
}
# Chosen figures. The demo's trained network is at 0.5 of the error of holding still with 8 actions per chunk, random weights are beyond 5.
GOOD_RATIO = 0.7
SMALL_SHARE, POOR_SHARE = 0.02, 0.05  # of a joint's trained range: no task notices; not hidden by the other joints
STILL_SHARE = 0.01  # hardly anything moves where holding still errs by no more; elsewhere it must not be the better policy
BIAS_SHARE, SAME_SIGN, BIAS_SPREAD = 0.05, 0.9, 0.4  # a constant offset: so large, so often on one side, its spread so small beside it
UNDONE, SHIFT_HELPS = 0.7, 0.8  # what undoing a mistake must leave of the error to be the verdict, and a shift to be told
MOST_SHIFT = 8  # frames looked at in both directions
# Settings of a run's file that mean something else here, or that the recording tells.
_NOT_OF_A_RUN = ("seed", "episodes", "action_horizon", "lang_instruction", "camera_map")
FOREIGN_SHARE, DECISIVE_SHARE = 0.1, 0.3  # of values outside the trained range: told, and reason enough
SLACK_UNITS, SLACK_SHARE = 2.0, 0.05  # beyond the trained range that still count as inside
FRACTION_LIMIT, PERCENT_LIMIT = 1.5, 10.0  # a gripper that never exceeds the first is a fraction; one beyond the second is in per cent
FLAT_LEVELS = 4.0  # standard deviation of a picture, of 255 levels, below which there is nothing to see
NO_WORSE, FOLLOWS = 1.1, 0.3  # other frames' pictures: error at most so much larger, though they moved the predictions by so much of the error
PROBED_FRAMES, ENOUGH_EPISODES = 12, 5


@dataclass(kw_only=True)
class EvalConfig(OutputFlags, PolicyFlags):
    """Compare a checkpoint's actions with those of a recorded data set, joint by joint, and say what is wrong where they differ.

        gr00t-fast eval --model_path=./gr00t-n1.5-so100-finetuned --dataset=./my-lerobot-dataset --episodes 0 3

    A good result on the training data says that units and cameras are right, not that the policy generalises: use held-out episodes.
    """

    dataset: Path  # directory of a LeRobotDataset v3
    episodes: list[str] = field(default_factory=lambda: ["0"])  # their numbers, or 'all'
    action_horizon: int = 8  # actions executed per inference
    lang_instruction: str | None = None  # default: the recording's own task text
    camera_map: dict[str, str] = field(default_factory=dict)  # which camera of the data set is which of the checkpoint: "{front: webcam}"
    seed: int = 0  # of the noise
    out: Path = Path("outputs/eval")  # directory for eval.json, eval.md and eval.csv, which are replaced

    def check(self) -> None:
        """Raises UsageError."""
        super().check()
        check_at_least_one(self, "action_horizon")
        if not (self.dataset / "meta" / "info.json").is_file():
            what = "is no LeRobotDataset: meta/info.json is missing" if self.dataset.is_dir() else "does not exist"
            raise ConfigError(f"--dataset: '{self.dataset}' {what}. Expected the directory of a LeRobotDataset v3, as lerobot-record leaves it.")
        if self.out.is_file():
            raise ConfigError(f"--out={self.out}: expected a directory to write to, but it is a file.")


# --- what was recorded --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episode:
    """states and actions float64 (T, J), in the data's units; row `first_row` of the data set is frame 0."""

    number: int
    first_row: int
    states: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True)
class Recorded:
    """The joints of every episode of a data set. widths: parts of the action in order; names (J,) are the data set's own."""

    widths: Mapping[str, int]
    names: tuple[str, ...]
    episodes: Sequence[Episode]

    def joined(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """part -> (..., D) to (..., J)."""
        return np.concatenate([parts[part] for part in self.widths], axis=-1)

    def values(self, kind: str) -> np.ndarray:
        """`states` or `actions` of all episodes (T, J)."""
        return np.concatenate([getattr(episode, kind) for episode in self.episodes])

    def bounds(self, statistics: Mapping[str, PartStatistics]) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest of the checkpoint's training data, each (J,)."""
        low, high = (self.joined({part: getattr(statistics[part], name) for part in self.widths}) for name in ("min", "max"))
        return low, high

    def trained(self, metadata: PolicyMetadata) -> np.ndarray:
        """(2, J): lowest and highest of states and actions together."""
        bounds = [self.bounds(statistics) for statistics in (metadata.state_statistics, metadata.action_statistics)]
        return np.stack([np.min([low for low, _ in bounds], axis=0), np.max([high for _, high in bounds], axis=0)])

    def replay(self, number: int) -> np.ndarray | None:
        """(T, J): the mean of the OTHER episodes' recorded actions at the same frame, an ended one held; None when there is no other."""
        others = [episode.actions for episode in self.episodes if episode.number != number]
        frames = np.arange(len(self.episodes[number].actions))
        return np.mean([actions[np.minimum(frames, len(actions) - 1)] for actions in others], axis=0) if others else None


def read_recorded(frames: LeRobotFrames, metadata: PolicyMetadata) -> Recorded:
    """Raises ConfigError when the policy's actions are not targets of the joints in its state, or the data set holds NaN."""
    widths = metadata.action_widths
    if any(metadata.state_widths.get(part) != width for part, width in widths.items()):
        raise ConfigError(f"the policy's action parts {dict(widths)} are not its state parts {dict(metadata.state_widths)}: nothing to compare with.")
    names = frames.names("action")
    recorded = Recorded(widths, tuple(name for part in widths for name in names[part]), episodes := [])
    for number, rows in enumerate(frames.episodes):
        states, actions = (recorded.joined(frames.columns(kind, rows)) for kind in ("state", "action"))
        if not (np.isfinite(states).all() and np.isfinite(actions).all()):
            raise ConfigError(f"episode {number} holds NaN or infinite joint values. Remove it from the data set; lerobot-edit-dataset does.")
        episodes.append(Episode(number, rows.start, states, actions))
    return recorded


def chosen(recorded: Recorded, wanted: Sequence[str]) -> list[Episode]:
    """Raises ConfigError."""
    if list(wanted) == ["all"]:
        return list(recorded.episodes)
    count = len(recorded.episodes)
    if wrong := [word for word in wanted if not (word.isdecimal() and int(word) < count)]:
        raise ConfigError(f"--episodes: there is no episode '{wrong[0]}'. The data set has {count}, from 0 to {count - 1}; 'all' takes every one.")
    return [recorded.episodes[number] for number in dict.fromkeys(map(int, wanted))]


# --- what the policy says -----------------------------------------------------------------------------------------------------------------


class Asked:
    """The policy at recorded frames. The noise of a frame depends on the seed and its row alone."""

    def __init__(self, policy: Any, frames: LeRobotFrames, recorded: Recorded, config: EvalConfig) -> None:
        self.policy, self.recorded, self._frames, self._config = policy, recorded, frames, config
        self._language = policy.get_modality_config()["language"].modality_keys[0]

    def observation(self, episode: Episode, frame: int) -> dict[str, Any]:
        """Raises ConfigError when a picture cannot be decoded."""
        told = {} if self._config.lang_instruction is None else {self._language: [self._config.lang_instruction]}
        return self._frames[episode.first_row + frame] | told

    def targets(self, observation: dict[str, Any], episode: Episode, frame: int) -> np.ndarray:
        """(trained horizon, J). Raises CheckpointError when they are not finite."""
        random = np.random.default_rng([self._config.seed, episode.first_row + frame])
        actions = self.policy.get_action(observation, noise=random.standard_normal((1, *self.policy.chunk_shape), np.float32))
        found: np.ndarray = self.recorded.joined({part: actions[f"action.{part}"] for part in self.recorded.widths}).astype(np.float64)
        if not np.isfinite(found).all():
            raise CheckpointError(f"the policy answers NaN or infinity to frame {frame} of episode {episode.number}. Try --precision=fp32.")
        return found


@dataclass(frozen=True)
class Chunk:
    """What the policy said at frame `start`: targets (trained horizon, J)."""

    episode: Episode
    start: int
    targets: np.ndarray
    inference_ms: float = 0.0

    def actions(self, rows: int, shift: int = 0) -> np.ndarray:
        """The recorded ones of the first rows, as far as the recording goes; shifted, its first and last actions hold."""
        recorded = self.episode.actions
        frames: np.ndarray = self.start + np.arange(min(rows, len(self.targets), len(recorded) - self.start))
        return recorded[np.clip(frames + shift, 0, len(recorded) - 1)]


@dataclass(frozen=True)
class Compared:
    """One row per predicted action that has a recorded one. (N, J): predicted, recorded, held (the state at the chunk's start), replayed (None with a
    single episode). (N,): episode, frame, lead (rows into the chunk)."""

    predicted: np.ndarray
    recorded: np.ndarray
    held: np.ndarray
    replayed: np.ndarray | None
    episode: np.ndarray
    frame: np.ndarray
    lead: np.ndarray


def compare(recorded: Recorded, chunks: Sequence[Chunk], rows: int) -> Compared:
    """The first `rows` of each chunk against the recording, as far as it goes."""
    replays = {number: recorded.replay(number) for number in {chunk.episode.number for chunk in chunks}}
    columns: list[list[Any]] = [[] for _ in range(7)]
    for chunk in chunks:
        actions = chunk.actions(rows)
        count, replay = len(actions), replays[chunk.episode.number]
        frames: np.ndarray = chunk.start + np.arange(count)
        held = np.broadcast_to(chunk.episode.states[chunk.start], actions.shape)
        found = (chunk.targets[:count], actions, held, None if replay is None else replay[frames])
        for column, values in zip(columns, (*found, np.full(count, chunk.episode.number), frames, np.arange(count)), strict=True):
            column.append(values)
    joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Compared(*joined)


# --- figures ------------------------------------------------------------------------------------------------------------------------------


def figures(compared: Compared, names: Sequence[str], trained_range: np.ndarray) -> dict[str, Any]:
    """All joints together, and each."""
    error = compared.predicted - compared.recorded
    bias = np.median(error, axis=0)
    joints = {}
    for joint, name in enumerate(names):
        off = error[:, joint]
        joints[name] = _errors(compared, [joint]) | {"trained_range": _figure(trained_range[joint]), "bias": _figure(bias[joint])}
        joints[name] |= {"bias_spread": _figure(np.median(np.abs(off - bias[joint]))), "mae_without_bias": _figure(np.abs(off - bias[joint]).mean())}
        joints[name]["same_sign"] = _figure((np.sign(off) == np.sign(bias[joint])).mean())
    ratios = [_errors(compared, slice(None), compared.episode == number)["ratio_to_hold"] for number in np.unique(compared.episode)]
    moved = [each for each in ratios if each is not None]
    return {**_errors(compared, slice(None)), "ratio_by_episode": [min(moved), max(moved)] if moved else None, "joints": joints}


def _errors(compared: Compared, joints: slice | list[int], rows: Any = slice(None)) -> dict[str, float | None]:
    recorded = compared.recorded[rows][:, joints]
    error, hold = (values[rows][:, joints] - recorded for values in (compared.predicted, compared.held))
    mse, variance, held = (error**2).mean(), recorded.var(axis=0).mean(), np.abs(hold).mean()
    return {
        "mae": _figure(np.abs(error).mean()),
        "mse": _figure(mse),
        "hold_mae": _figure(held),
        "replay_mae": None if compared.replayed is None else _figure(np.abs(compared.replayed[rows][:, joints] - recorded).mean()),
        "ratio_to_hold": _figure(np.abs(error).mean() / held) if held > 1e-9 else None,  # None: nothing moved
        "r2": _figure(1 - mse / variance) if variance > 1e-6 else None,
    }


def _figure(value: Any) -> float:
    return round(float(value), 3)


def best_shift(chunks: Sequence[Chunk], rows: int) -> dict[str, Any]:
    """Frames by which the predictions run ahead of the recording (negative: behind) where that shift in time cuts the error by a fifth; else 0."""

    def mae(shift: int) -> float:
        recorded = [chunk.actions(rows, shift) for chunk in chunks]
        return float(np.mean([np.abs(chunk.targets[: len(each)] - each).mean() for chunk, each in zip(chunks, recorded, strict=True)]))

    found = {shift: mae(shift) for shift in range(-MOST_SHIFT, MOST_SHIFT + 1)}
    least = min(found.values())  # of those nearly as good as the best the shortest is taken
    shift = min((shift for shift in found if found[shift] <= 1.1 * least), key=abs) if least < SHIFT_HELPS * found[0] else 0
    return {"frames": shift, "mae": _figure(found[shift])}


def by_lead(compared: Compared) -> dict[str, list[float]]:
    """Mean error of all joints so many frames after the observation, and that of holding still."""
    told = {"mae": compared.predicted, "hold_mae": compared.held}
    leads = [compared.lead == lead for lead in np.unique(compared.lead)]
    return {name: [_figure(np.abs(values[rows] - compared.recorded[rows]).mean()) for rows in leads] for name, values in told.items()}


# --- what is wrong ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What it hints at, and whether it is reason enough for the verdict where predictions are poor. left: the part of the error that remains once it
    is undone, where that is known."""

    kind: str
    text: str
    decides: bool = True
    left: float | None = None


def findings_of_recording(recorded: Recorded, metadata: PolicyMetadata, frames: LeRobotFrames) -> list[Finding]:
    return [*_units(recorded, metadata), *_ranges(recorded, metadata), *_rate_and_cameras(frames, metadata)]


def _units(recorded: Recorded, metadata: PolicyMetadata) -> Iterator[Finding]:
    """Radians, fractions, lerobot's normalised range, and the order of joints."""
    values = np.concatenate([recorded.values("states"), recorded.values("actions")])
    here, trained = np.abs([values.min(axis=0), values.max(axis=0)]), np.abs(recorded.trained(metadata))
    body = np.array([name != "gripper" for name in recorded.names])
    if body.any():
        most, trained_most = here[:, body].max(), trained[:, body].max()
        if most <= RADIANS_LIMIT < trained_most:
            yield Finding(UNITS, f"no body joint of the recording exceeds {most:.2f}, those of the checkpoint reach {trained_most:.0f}: radians?")
        if _normalised(here[:, body]) and trained_most > NORMALISED_LIMIT:
            yield Finding(UNITS, f"the recording ends at exactly 100, the checkpoint's joints reach {trained_most:.0f}: -100..100 against degrees?")
        if _normalised(trained[:, body]) and most > NORMALISED_LIMIT:
            yield Finding(UNITS, f"the checkpoint's ranges end at exactly 100, the recording reaches {most:.0f}: degrees against -100..100?")
    if (~body).any() and here[:, ~body].max() <= FRACTION_LIMIT and trained[:, ~body].max() >= PERCENT_LIMIT:
        yield Finding(UNITS, f"the gripper never exceeds {here[:, ~body].max():.2f}, the checkpoint's {trained[:, ~body].max():.0f}: a fraction?")
    if set(recorded.names) == set(SO100_JOINTS) and recorded.names != SO100_JOINTS:
        yield Finding(UNITS, f"the recording's joints come as {', '.join(recorded.names)}; an SO-100 has them as {', '.join(SO100_JOINTS)}")


def _normalised(extremes: np.ndarray) -> bool:
    """lerobot clamps its normalised range, which leaves extremes at exactly 100."""
    saturated = int((np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum())
    return saturated >= SATURATED_EXTREMES and bool(extremes.max() <= NORMALISED_LIMIT)


def _ranges(recorded: Recorded, metadata: PolicyMetadata) -> Iterator[Finding]:
    for kind, statistics in (("states", metadata.state_statistics), ("actions", metadata.action_statistics)):
        values, (low, high) = recorded.values(kind), recorded.bounds(statistics)
        slack = np.maximum(SLACK_UNITS, SLACK_SHARE * (high - low))
        share = ((values < low - slack) | (values > high + slack)).mean(axis=0)
        for joint in np.flatnonzero(share > FOREIGN_SHARE):
            spans = f"{low[joint]:.0f} to {high[joint]:.0f} (recorded: {values[:, joint].min():.0f} to {values[:, joint].max():.0f})"
            text = f"{kind} of {recorded.names[joint]}: {share[joint]:.0%} of the recording lies outside the checkpoint's {spans}"
            yield Finding(UNITS, text, decides=bool(share[joint] > DECISIVE_SHARE))


def _rate_and_cameras(frames: LeRobotFrames, metadata: PolicyMetadata) -> Iterator[Finding]:
    if frames.fps and metadata.fps and abs(frames.fps / metadata.fps - 1) > FPS_TOLERANCE:
        yield Finding(RATE, f"recorded at {frames.fps:g} frames/s, trained at {metadata.fps:g}")
    for key, camera in frames.cameras.items():
        trained = metadata.resolutions.get(key.split(".", 1)[1])
        if trained is None or camera.size is None:
            continue
        (width, height), (trained_width, trained_height) = camera.size, trained
        if abs(width * trained_height / (height * trained_width) - 1) > ASPECT_TOLERANCE:
            sizes = f"{width}x{height}, {key} was trained with {trained_width}x{trained_height}"
            yield Finding(CAMERAS, f"{camera.feature} has {sizes}: another aspect ratio, the picture is distorted")


def findings_of_pictures(asked: Asked, chunks: Sequence[Chunk], rows: int, names: Sequence[str]) -> Iterator[Finding]:
    """Cameras that show nothing, and predictions that are no better for their own pictures than for those of other frames."""
    places = [chunks[index] for index in np.unique(np.linspace(0, len(chunks) - 1, PROBED_FRAMES).round().astype(int))]
    seen = [asked.observation(place.episode, place.start) for place in places]
    for key in names:
        flat = [place for place, observation in zip(places, seen, strict=True) if observation[key].std() < FLAT_LEVELS]
        if flat:
            first = f"first in episode {flat[0].episode.number} at frame {flat[0].start}"
            text = f"{key} shows nothing in {len(flat)} of {len(seen)} pictures, {first}: covered, or not recorded"
            yield Finding(CAMERAS, text, decides=len(flat) / len(seen) > DECISIVE_SHARE)
    own = float(np.mean([np.abs(place.targets[: len(actions)] - actions).mean() for place in places for actions in [place.actions(rows)]]))

    def asked_with(shown: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """The error with these observations instead, and how far they moved the predictions."""
        errors, moves = [], []
        for place, observation in zip(places, shown, strict=True):
            actions = place.actions(rows)
            predicted = asked.targets(observation, place.episode, place.start)[: len(actions)]
            errors.append(np.abs(predicted - actions).mean())
            moves.append(np.abs(predicted - place.targets[: len(actions)]).mean())
        return float(np.mean(errors)), float(np.mean(moves))

    for what, change in _mistakes_with_cameras(names):
        error, _ = asked_with([observation | change(observation) for observation in seen])
        if error <= UNDONE * own:
            yield Finding(CAMERAS, f"with {what} the error falls from {own:.1f} to {error:.1f}", left=error / own)
    others = [seen[(index + len(seen) // 2) % len(seen)] for index in range(len(seen))]  # of another episode wherever there are several
    error, moved = asked_with([own_view | {key: other[key] for key in names} for own_view, other in zip(seen, others, strict=True)])
    if error <= NO_WORSE * own and moved >= FOLLOWS * own:
        errors = f"(error {own:.1f}, with other frames' {error:.1f})"
        yield Finding(CAMERAS, f"predictions follow the pictures and are no better for the right ones {errors}: another view than in training?")


def _mistakes_with_cameras(names: Sequence[str]) -> Iterator[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]]:
    """What is commonly wrong, and what undoes it: pictures (1, H, W, 3) mirrored, and those of two cameras exchanged."""

    def mirrored(key: str, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {key: np.ascontiguousarray(seen[key][:, :, ::-1])}

    def exchanged(one: str, other: str, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {one: seen[other], other: seen[one]}

    for key in names:
        yield f"{key} mirrored", partial(mirrored, key)
    for one, other in combinations(names, 2):
        yield f"{one} and {other} exchanged", partial(exchanged, one, other)


def is_good(found: Mapping[str, Any], findings: Sequence[Finding]) -> bool:
    """Whether the predictions need no explanation."""
    ratio, joints = found["ratio_to_hold"], list(found["joints"].values())
    poor = any(joint["mae"] > POOR_SHARE * joint["trained_range"] and (joint["ratio_to_hold"] or 2.0) > 1 for joint in joints)
    if ratio is not None and ratio <= GOOD_RATIO and not poor:
        return True
    if any(finding.kind == UNITS and finding.decides for finding in findings):  # shares of a range in other units say nothing
        return False
    still = all(joint["hold_mae"] <= STILL_SHARE * joint["trained_range"] for joint in joints)
    return (still or (ratio is not None and ratio <= 1)) and all(joint["mae"] <= SMALL_SHARE * joint["trained_range"] for joint in joints)


def offset_of(found: Mapping[str, Any]) -> list[Finding]:
    """Joints that are off by a constant, if the policy is good apart from that: a poor model is off in every way."""
    joints = found["joints"]
    shifted = [
        name
        for name, joint in joints.items()
        if abs(joint["bias"]) >= BIAS_SHARE * joint["trained_range"]
        and joint["same_sign"] >= SAME_SIGN
        and joint["bias_spread"] <= BIAS_SPREAD * abs(joint["bias"])
    ]
    left = sum(joint["mae_without_bias" if name in shifted else "mae"] for name, joint in joints.items()) / len(joints)
    if left > GOOD_RATIO * found["hold_mae"]:
        return []
    told = {name: f"off by {joints[name]['bias']:+.1f} (median), and by {joints[name]['mae_without_bias']:.1f} without that" for name in shifted}
    return [Finding(UNITS, f"{name}: predictions are {text}: another zero point?", left=left / found["mae"]) for name, text in told.items()]


def timing_of(found: Mapping[str, Any], shift: Mapping[str, Any], findings: Sequence[Finding]) -> list[Finding]:
    """A shift in time that helps; it decides if it makes the predictions good."""
    frames, mae = shift["frames"], shift["mae"]
    if not frames:
        return []
    recorded, trained = ("late", "ahead of") if frames > 0 else ("early", "behind")
    count = f"{abs(frames)} frame{'s' if abs(frames) > 1 else ''}{' or more' if abs(frames) == MOST_SHIFT else ''}"
    text = f"predictions run {trained} the recorded actions by {count}: shifted so, the error falls from {found['mae']:.1f} to {mae:.1f}. "
    text += f"Actions recorded {recorded}, or a network that was trained with actions {trained} those of this recording"
    decides = mae <= UNDONE * found["mae"] and mae <= GOOD_RATIO * found["hold_mae"] and not any(each.kind == RATE for each in findings)
    return [Finding(TIMING, text, decides, mae / found["mae"])]


def judge(found: Mapping[str, Any], shift: Mapping[str, Any], findings: Sequence[Finding]) -> tuple[str, list[Finding]]:
    """The verdict, and the evidence."""
    timing = timing_of(found, shift, findings)
    deciding = [each for each in timing if each.decides]
    # a steady motion makes a delay look like an offset: what leaves less of the error is believed
    offset = [each for each in offset_of(found) if all((each.left or 0) <= (other.left or 0) for other in deciding)]
    if is_good(found, findings) and not offset:
        return FINE, [*findings, *timing]
    explained = sorted([*offset, *deciding], key=lambda each: each.left or 0)
    kinds = [each.kind for each in findings if each.decides]
    first = next((kind for kind in (*(each.kind for each in explained), *(kind for kind in (UNITS, CAMERAS, RATE) if kind in kinds))), MODEL)
    return first, [*explained, *findings, *(each for each in timing if each not in deciding)]


# --- the command --------------------------------------------------------------------------------------------------------------------------


def run(config: EvalConfig) -> int:
    """Raises Gr00tFastError."""
    result, compared, names = evaluate(config)
    table, verdict = as_table(result), result["verdict"]
    judged = f"Verdict: {verdict['kind']}. {verdict['advice']}"
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "eval.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "eval.md").write_text(f"{table}\n\n{judged}\n", encoding="utf-8")
    write_csv(compared, names, config.out / "eval.csv")
    show(result, table + "\n", judged, config)
    return EXIT_OK


def evaluate(config: EvalConfig) -> tuple[dict[str, Any], Compared, Sequence[str]]:
    """The result, the rows behind it, and the names of the joints. The recording is looked at before weights are read. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import read_policy_metadata

    metadata = read_policy_metadata(config.model_path, config.embodiment_tag, config.data_config, config.revision, config.letterbox)
    frames = LeRobotFrames(config.dataset, load_data_config(config.data_config), metadata, config.camera_map)
    recorded = read_recorded(frames, metadata)
    episodes = chosen(recorded, config.episodes)
    texts = [config.lang_instruction] if config.lang_instruction is not None else _instructions(frames, episodes)
    chunks, asked = _chunks(config, frames, recorded, episodes)
    compared = compare(recorded, chunks, config.action_horizon)
    trained = recorded.trained(metadata)
    width = trained[1] - trained[0]
    found = figures(compared, recorded.names, np.maximum(width, 0.1 * width.max()))  # one that hardly moved is measured by the widest
    shift, findings = best_shift(chunks, config.action_horizon), findings_of_recording(recorded, metadata, frames)
    if not is_good(found, findings):
        findings += findings_of_pictures(asked, chunks, config.action_horizon, list(frames.cameras))
    kind, evidence = judge(found, shift, findings)
    few = len(episodes) < ENOUGH_EPISODES
    basis = {"episodes": len(episodes), "chunks": len(chunks), "frames": len(compared.frame), "few": few}
    result = {
        "program": "eval",
        "checkpoint": Path(config.model_path).name,
        "dataset": {"name": Path(frames.name).name, "episodes": [each.number for each in episodes], "of": len(recorded.episodes), "fps": frames.fps},
        "instructions": texts,
        "cameras": {key: {"feature": camera.feature, "chosen_by": camera.chosen_by} for key, camera in frames.cameras.items()},
        "engine": asked.policy.engine.name,
        "precision": asked.policy.precision,
        "denoising_steps": asked.policy.denoising_steps,
        "action_horizon": config.action_horizon,
        **found,
        "leads": by_lead(compare(recorded, chunks, len(chunks[0].targets))),
        "best_shift": shift,
        "inference_ms": percentiles(chunk.inference_ms for chunk in chunks),
        "verdict": {"kind": kind, "advice": ADVICE[kind], "evidence": [asdict(each) for each in evidence], "rests_on": basis},
        **provenance(),
        "seed": config.seed,
    }
    return result, compared, recorded.names


def _instructions(frames: LeRobotFrames, episodes: Sequence[Episode]) -> list[str]:
    """What the policy will be told, each once. Raises ConfigError when the recording does not say it."""
    told = {episode.number: frames.tasks_of(episode.number) for episode in episodes}
    if silent := [number for number, texts in told.items() if not texts]:
        raise ConfigError(f"episode {silent[0]} of the data set has no task text. Give what the policy was trained to hear: --lang_instruction=...")
    return list(dict.fromkeys(text for texts in told.values() for text in texts))


def _chunks(config: EvalConfig, frames: LeRobotFrames, recorded: Recorded, episodes: Sequence[Episode]) -> tuple[list[Chunk], Asked]:
    from gr00t_fast.policy import load_policy

    policy = load_policy(config.model_path, **config.policy_options())
    policy.action_horizon = None  # it was checked; every row is looked at
    policy.warm_up()
    asked, chunks = Asked(policy, frames, recorded, config), []
    places = [(episode, start) for episode in episodes for start in range(0, len(episode.actions), config.action_horizon)]
    with Progress().bar("inferences", len(places)) as tick:
        for episode, start in places:
            targets = asked.targets(asked.observation(episode, start), episode, start)
            chunks.append(Chunk(episode, start, targets, policy.last_timing["total"]))
            tick()
    return chunks, asked


def as_table(result: Mapping[str, Any]) -> str:
    data, verdict = result["dataset"], result["verdict"]
    basis, shown = verdict["rests_on"], ("mae", "mse", "hold_mae", "replay_mae", "ratio_to_hold", "r2", "bias")

    def row(name: str, values: Mapping[str, Any]) -> str:
        return f"| {name} | " + " | ".join("-" if values.get(key) is None else f"{values[key]:.2f}" for key in shown) + " |"

    first = f"{result['checkpoint']} on {data['name']}: {basis['frames']} frames of {basis['episodes']} episodes ({data['of']} in all)"
    lines = [
        f"{first}, {result['engine']}, {result['precision']}, {result['denoising_steps']} steps, {result['action_horizon']} actions of each chunk.",
        "Joint units are the recording's: degrees, and per cent for the gripper, in lerobot's SO-100 data.",
        "Cameras: " + "; ".join(f"{key} is {camera['feature']} (by {camera['chosen_by']})" for key, camera in result["cameras"].items()) + ".",
        "",
        "| joint | MAE | MSE | holding still | replay | ratio to holding | R2 | bias |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        row("all", result),
        *(row(name, joint) for name, joint in result["joints"].items()),
        "",
        f"Error by how far ahead: {', '.join(f'{each:.2f}' for each in result['leads']['mae'])}",
        f"Holding still:          {', '.join(f'{each:.2f}' for each in result['leads']['hold_mae'])}",
        "",
    ]
    if spread := result["ratio_by_episode"]:
        lines.append(f"Ratio to holding by episode: {spread[0]:.2f} to {spread[1]:.2f}.")
    if basis["few"]:
        lines.append(f"Fewer than {ENOUGH_EPISODES} episodes: another one may well give another verdict (--episodes all).")
    return "\n".join([*lines, *(f"- {each['text']}" for each in verdict["evidence"])])


def write_csv(compared: Compared, names: Sequence[str], path: Path) -> None:
    """One row per frame: what was recorded and predicted of each joint."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["episode", "frame", "row_of_chunk", *(f"{name}_{kind}" for name in names for kind in ("recorded", "predicted"))])
        values = np.stack([compared.recorded, compared.predicted], axis=-1).reshape(len(compared.frame), -1).round(4)
        writer.writerows([*counts, *row] for *counts, row in zip(compared.episode, compared.frame, compared.lead, values, strict=True))


main = Command(
    EvalConfig,
    run,
    "usage: gr00t-fast eval --model_path=DIR --dataset=DIR [--episodes 0 3 | all] [--flag=value ...]",
    "exit codes: 0 compared, 1 error, 2 bad flag, 130 interrupted",
    "interrupted: no result",
    file_of=RunConfig,
    not_from_file=_NOT_OF_A_RUN,
)
