"""Does the checkpoint predict what was recorded, and if not, is it the model, the units, the cameras, the rate or the timing?

No arm moves. An inference every --action_horizon frames of a LeRobotDataset (v3); its actions are compared with the recorded ones in joint units, as
NVIDIA's eval_policy does (MSE is the figure that it prints). Beside each error stand `hold`, the error of keeping the state that the chunk began
from, and `replay`, that of playing the mean of the data set's other episodes without looking. A policy at the level of hold is worth nothing, one at
the level of replay does not use its camera. An open-loop error has no floor: demonstrations differ among themselves.

The rules of the verdict, in this order; the first that holds is the verdict, and all evidence is shown:
1. joints are off by a constant, and without that the predictions are good: units/calibration. Or shifted in time they are good, and better: timing;
2. the error is well below that of holding still and no joint's is large, or all are small: nothing is wrong here, suspect the loop;
3. the recording contradicts the checkpoint's units, order or ranges: units/calibration;
4. pictures are flat, distorted, mirrored or exchanged, or other frames' pictures do as well: cameras;
5. another rate than in training: rate;
6. otherwise: the model.
Large and small are shares of the range that a joint had in training: degrees, per cent and radians are judged alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import CheckpointError, ConfigError
from gr00t_fast.base.measurement import percentiles, provenance
from gr00t_fast.control.preflight import ASPECT_TOLERANCE, FPS_TOLERANCE, NORMALISED_LIMIT, RADIANS_LIMIT, SATURATED_EXTREMES, SATURATION_TOLERANCE
from gr00t_fast.inputs.dataset import LeRobotFrames
from gr00t_fast.options import PolicyOptions

if TYPE_CHECKING:
    from gr00t_fast.base.contracts import PolicyMetadata

RADIANS, GRIPPER = "radians", SO100_JOINTS[-1]
UNITS, CAMERAS, RATE, TIMING, MODEL, FINE = "units/calibration", "cameras", "rate", "timing", "model", "looks fine: suspect the loop"
ADVICE = {
    FINE: "If the arm still misbehaves: its calibration and cameras now (--dry_run compares them), the loop's rate, the light, --action_horizon.",
    UNITS: "Recording and checkpoint count joints differently. Compare the ranges; check use_degrees, the calibration and meta/modality.json.",
    CAMERAS: "Compare the pictures with those of the training data: which camera is which (--camera_map), its place, mirroring, colours.",
    TIMING: "Actions belong to other frames than their states and pictures: look for dropped or queued frames, in the training data too.",
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
FOREIGN_SHARE, DECISIVE_SHARE = 0.1, 0.3  # of values outside the trained range: told, and reason enough
SLACK_UNITS, SLACK_SHARE = 2.0, 0.05  # beyond the trained range that still count as inside
FRACTION_LIMIT, PERCENT_LIMIT = 1.5, 10.0  # a gripper that never exceeds the first is a fraction; one beyond the second is in per cent
FLAT_LEVELS = 4.0  # standard deviation of a picture, of 255 levels, below which there is nothing to see
NO_WORSE, FOLLOWS = 1.1, 0.3  # other frames' pictures: error at most so much larger, though they moved the predictions by so much of the error
PROBED_FRAMES, ENOUGH_EPISODES = 12, 5


@dataclass(kw_only=True)
class EvalOptions(PolicyOptions):
    """What is compared with what."""

    dataset: Path  # directory of a LeRobotDataset v3
    episodes: list[str] = field(default_factory=lambda: ["0"])  # their numbers, or 'all'
    action_horizon: int = 8  # actions executed per inference
    lang_instruction: str | None = None  # default: the recording's own task text
    recordings: Path | None = None  # LeRobotDataset that the checkpoint was trained on, or its scene card: what the cameras saw
    camera_map: dict[str, str] = field(default_factory=dict)  # which camera of the data set is which of the checkpoint: "{front: webcam}"
    seed: int = 0  # of the noise

    def check(self) -> None:
        super().check()
        if not (self.dataset / "meta" / "info.json").is_file():
            what = "is no LeRobotDataset: meta/info.json is missing" if self.dataset.is_dir() else "is no directory"
            raise ConfigError(f"--dataset: '{self.dataset}' {what}. Expected the directory of a LeRobotDataset v3, as lerobot-record leaves it.")


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
    """The joints of every episode of a data set. widths: parts of the action in order; names (J,) are the data set's own; trained: `states` and
    `actions`, lowest and highest of each joint in the checkpoint's training data (2, J)."""

    widths: Mapping[str, int]
    names: tuple[str, ...]
    episodes: Sequence[Episode]
    trained: Mapping[str, np.ndarray]

    def values(self, kind: str) -> np.ndarray:
        """`states` or `actions` of all episodes (T, J)."""
        return np.concatenate([getattr(episode, kind) for episode in self.episodes])

    def replay(self, number: int) -> np.ndarray:
        """(T, J): the mean of the OTHER episodes' recorded actions at the same frame, an ended one held; NaN when there is no other."""
        others = [episode.actions for episode in self.episodes if episode.number != number]
        own = self.episodes[number].actions
        frames = np.arange(len(own))
        return np.mean([actions[np.minimum(frames, len(actions) - 1)] for actions in others], axis=0) if others else np.full_like(own, np.nan)


def joined(parts: Mapping[str, np.ndarray], order: Iterable[str]) -> np.ndarray:
    """part -> (..., D) to (..., J)."""
    return np.concatenate([parts[part] for part in order], axis=-1)


def read_recorded(frames: LeRobotFrames, metadata: PolicyMetadata) -> Recorded:
    """Raises ConfigError when the policy's actions are not targets of the joints in its state, or the data set holds NaN."""
    widths = metadata.action_widths
    if any(metadata.state_widths.get(part) != width for part, width in widths.items()):
        raise ConfigError(f"the policy's action parts {dict(widths)} are not its state parts {dict(metadata.state_widths)}: nothing to compare with.")
    names, episodes = frames.names("action"), []
    for number, rows in enumerate(frames.episodes):
        states, actions = (joined(frames.columns(kind, rows), widths) for kind in ("state", "action"))
        if not (np.isfinite(states).all() and np.isfinite(actions).all()):
            raise ConfigError(f"episode {number} holds NaN or infinite joint values. Remove it from the data set; lerobot-edit-dataset does.")
        episodes.append(Episode(number, rows.start, states, actions))
    trained = {
        kind: np.stack([joined({part: getattr(of[part], name) for part in widths}, widths) for name in ("min", "max")])
        for kind, of in (("states", metadata.state_statistics), ("actions", metadata.action_statistics))
    }
    return Recorded(widths, tuple(name for part in widths for name in names[part]), episodes, trained)


def chosen(recorded: Recorded, wanted: Sequence[str]) -> list[Episode]:
    """Raises ConfigError."""
    if list(wanted) == ["all"]:
        return list(recorded.episodes)
    count = len(recorded.episodes)
    if wrong := [word for word in wanted if not (word.isdecimal() and int(word) < count)]:
        raise ConfigError(f"--episodes: there is no episode '{wrong[0]}'. The data set has {count}, from 0 to {count - 1}; 'all' takes every one.")
    return [recorded.episodes[number] for number in dict.fromkeys(map(int, wanted))]


# --- what the policy says -----------------------------------------------------------------------------------------------------------------


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
class Asked:
    """The policy at recorded frames. The noise of a frame depends on the seed and its row alone."""

    policy: Any
    frames: LeRobotFrames
    order: Iterable[str]  # of the parts
    options: EvalOptions

    def observation(self, episode: Episode, frame: int) -> dict[str, Any]:
        """Raises ConfigError when a picture cannot be decoded."""
        found, said = self.frames[episode.first_row + frame], self.options.lang_instruction
        return found if said is None else found | {self.policy.get_modality_config()["language"].modality_keys[0]: [said]}

    def chunk(self, episode: Episode, frame: int, observation: dict[str, Any]) -> Chunk:
        """Raises CheckpointError when the answer is not finite."""
        random = np.random.default_rng([self.options.seed, episode.first_row + frame])
        actions = self.policy.get_action(observation, noise=random.standard_normal((1, *self.policy.chunk_shape), np.float32))
        targets: np.ndarray = joined({part: actions[f"action.{part}"] for part in self.order}, self.order).astype(np.float64)
        if not np.isfinite(targets).all():
            raise CheckpointError(f"the policy answers NaN or infinity to frame {frame} of episode {episode.number}. Try --precision=fp32.")
        return Chunk(episode, frame, targets, self.policy.last_timing["total"])


@dataclass(frozen=True)
class Compared:
    """One row per predicted action that has a recorded one. (N, J): predicted, recorded, held (the state at the chunk's start), replayed (NaN with a
    single episode). (N,): lead (rows into the chunk)."""

    predicted: np.ndarray
    recorded: np.ndarray
    held: np.ndarray
    replayed: np.ndarray
    lead: np.ndarray


def compare(recorded: Recorded, chunks: Sequence[Chunk], rows: int) -> Compared:
    """The first `rows` of each chunk against the recording, as far as it goes."""
    replays = {number: recorded.replay(number) for number in {chunk.episode.number for chunk in chunks}}

    def columns(chunk: Chunk) -> tuple[np.ndarray, ...]:
        actions = chunk.actions(rows)
        lead = np.arange(len(actions))
        held = np.broadcast_to(chunk.episode.states[chunk.start], actions.shape)
        return chunk.targets[: len(actions)], actions, held, replays[chunk.episode.number][chunk.start + lead], lead

    return Compared(*map(np.concatenate, zip(*map(columns, chunks), strict=True)))


# --- figures ------------------------------------------------------------------------------------------------------------------------------


def figures(compared: Compared, names: Sequence[str], trained_range: np.ndarray) -> dict[str, Any]:
    """All joints together, and each."""
    error = compared.predicted - compared.recorded
    bias = np.median(error, axis=0)
    joints = {}
    for joint, name in enumerate(names):
        off = error[:, joint] - bias[joint]
        joints[name] = _errors(compared, [joint]) | {
            "trained_range": _figure(trained_range[joint]),
            "bias": _figure(bias[joint]),
            "bias_spread": _figure(np.median(np.abs(off))),
            "mae_without_bias": _figure(np.abs(off).mean()),
            "same_sign": _figure((np.sign(error[:, joint]) == np.sign(bias[joint])).mean()),
        }
    return {**_errors(compared, slice(None)), "joints": joints}


def _errors(compared: Compared, joints: slice | list[int]) -> dict[str, float | None]:
    recorded = compared.recorded[:, joints]
    error, hold, replay = (values[:, joints] - recorded for values in (compared.predicted, compared.held, compared.replayed))
    mae, held, mse, variance = np.abs(error).mean(), np.abs(hold).mean(), (error**2).mean(), recorded.var(axis=0).mean()
    return {
        "mae": _figure(mae),
        "mse": _figure(mse),
        "hold_mae": _figure(held),
        "replay_mae": _figure(np.abs(replay).mean()),
        "ratio_to_hold": _figure(mae / held if held > 1e-9 else np.nan),  # nothing moved
        "r2": _figure(1 - mse / variance if variance > 1e-6 else np.nan),
    }


def _figure(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)


def best_shift(chunks: Sequence[Chunk], rows: int) -> dict[str, Any]:
    """Frames by which the predictions run ahead of the recording (negative: behind) where that shift in time cuts the error by a fifth; else 0."""

    def mae(shift: int) -> float:
        recorded = [chunk.actions(rows, shift) for chunk in chunks]
        return float(np.mean([np.abs(chunk.targets[: len(each)] - each).mean() for chunk, each in zip(chunks, recorded, strict=True)]))

    found = {shift: mae(shift) for shift in range(-MOST_SHIFT, MOST_SHIFT + 1)}
    least = min(found.values())  # of those nearly as good as the best the shortest is taken
    shift = min((shift for shift in found if found[shift] <= 1.1 * least), key=abs) if least < SHIFT_HELPS * found[0] else 0
    return {"frames": shift, "mae": _figure(found[shift])}


def by_lead(compared: Compared) -> dict[str, list[float | None]]:
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


def findings_of_recording(recorded: Recorded, metadata: PolicyMetadata, frames: LeRobotFrames) -> Iterator[Finding]:
    """Units, order, ranges, rate and shape of the pictures that contradict what the checkpoint says of its training data."""
    values = np.concatenate([recorded.values("states"), recorded.values("actions")])
    trained = np.concatenate([recorded.trained["states"], recorded.trained["actions"]])
    here, there = (np.abs([each.min(axis=0), each.max(axis=0)]) for each in (values, trained))
    grips = np.array([name == GRIPPER for name in recorded.names])
    units, trained_units = _unit_of(here[:, ~grips]), _unit_of(there[:, ~grips])
    if units != trained_units and (RADIANS in (units, trained_units) or "" not in (units, trained_units)):
        reach = f"{here[:, ~grips].max():.4g}, those of the checkpoint {there[:, ~grips].max():.4g}"
        yield Finding(UNITS, f"body joints of the recording reach {reach}: {units or 'other units'} against {trained_units or 'other units'}?")
    if grips.any() and here[:, grips].max() <= FRACTION_LIMIT and there[:, grips].max() >= PERCENT_LIMIT:
        yield Finding(UNITS, f"the gripper never exceeds {here[:, grips].max():.2f}, the checkpoint's {there[:, grips].max():.0f}: a fraction?")
    if set(recorded.names) == set(SO100_JOINTS) and recorded.names != SO100_JOINTS:
        yield Finding(UNITS, f"the recording's joints come as {', '.join(recorded.names)}; an SO-100 has them as {', '.join(SO100_JOINTS)}")
    for kind, (low, high) in recorded.trained.items():
        yield from _outside(kind, recorded, low, high)
    if frames.fps and metadata.fps and abs(frames.fps / metadata.fps - 1) > FPS_TOLERANCE:
        yield Finding(RATE, f"recorded at {frames.fps:g} frames/s, trained at {metadata.fps:g}")
    for key, camera in frames.cameras.items():
        size, trained_size = camera.size, metadata.resolutions.get(key.split(".", 1)[1])
        if size and trained_size and abs(size[0] * trained_size[1] / (size[1] * trained_size[0]) - 1) > ASPECT_TOLERANCE:
            sizes = "{}x{}, {} was trained with {}x{}".format(*size, key, *trained_size)
            yield Finding(CAMERAS, f"{camera.feature} has {sizes}: another aspect ratio, the picture is distorted")


def _unit_of(extremes: np.ndarray) -> str:
    """The unit of body joints; empty where it may be degrees or lerobot's normalised range, which is clamped: that leaves extremes at exactly 100."""
    if extremes.max(initial=0) <= RADIANS_LIMIT:
        return RADIANS
    if extremes.max() > NORMALISED_LIMIT:
        return "degrees"
    return "-100..100" if (np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum() >= SATURATED_EXTREMES else ""


def _outside(kind: str, recorded: Recorded, low: np.ndarray, high: np.ndarray) -> Iterator[Finding]:
    """Joints of which much of the recording lies beyond the training data's lowest and highest, each (J,)."""
    values, slack = recorded.values(kind), np.maximum(SLACK_UNITS, SLACK_SHARE * (high - low))
    share = ((values < low - slack) | (values > high + slack)).mean(axis=0)
    for joint in np.flatnonzero(share > FOREIGN_SHARE):
        spans = f"{low[joint]:.0f} to {high[joint]:.0f} (recorded: {values[:, joint].min():.0f} to {values[:, joint].max():.0f})"
        text = f"{kind} of {recorded.names[joint]}: {share[joint]:.0%} of the recording lies outside the checkpoint's {spans}"
        yield Finding(UNITS, text, decides=bool(share[joint] > DECISIVE_SHARE))


def findings_of_pictures(asked: Asked, chunks: Sequence[Chunk], rows: int, keys: Sequence[str]) -> Iterator[Finding]:
    """Cameras that show nothing, and predictions that are no better for their own pictures than for those of other frames."""
    places = [chunks[index] for index in np.unique(np.linspace(0, len(chunks) - 1, PROBED_FRAMES).round().astype(int))]
    seen = [asked.observation(place.episode, place.start) for place in places]
    for key in keys:
        flat = [place for place, observation in zip(places, seen, strict=True) if observation[key].std() < FLAT_LEVELS]
        if flat:
            first = f"first in episode {flat[0].episode.number} at frame {flat[0].start}"
            text = f"{key} shows nothing in {len(flat)} of {len(seen)} pictures, {first}: covered, or not recorded"
            yield Finding(CAMERAS, text, decides=len(flat) / len(seen) > DECISIVE_SHARE)

    def error_of(others: Sequence[Chunk]) -> float:
        return float(np.mean([np.abs(each.targets[: len(actions)] - actions).mean() for each in others for actions in [each.actions(rows)]]))

    def shown(pictures: Iterable[dict[str, Any]]) -> list[Chunk]:
        """What the policy says with these pictures in place of its own (1, H, W, 3)."""
        return [asked.chunk(at.episode, at.start, own | other) for at, own, other in zip(places, seen, pictures, strict=True)]

    own = error_of(places)
    mistakes = {f"{key} mirrored": [{key: np.ascontiguousarray(each[key][:, :, ::-1])} for each in seen] for key in keys}
    for one, other in combinations(keys, 2):
        mistakes[f"{one} and {other} exchanged"] = [{one: each[other], other: each[one]} for each in seen]
    for what, pictures in mistakes.items():
        if (error := error_of(shown(pictures))) <= UNDONE * own:
            yield Finding(CAMERAS, f"with {what} the error falls from {own:.1f} to {error:.1f}", left=error / own)
    half = len(seen) // 2  # of another episode wherever there are several
    elsewhere = shown({key: other[key] for key in keys} for other in [*seen[half:], *seen[:half]])
    moved = np.mean([np.abs(new.targets - old.targets)[: len(old.actions(rows))].mean() for new, old in zip(elsewhere, places, strict=True)])
    if (error := error_of(elsewhere)) <= NO_WORSE * own and moved >= FOLLOWS * own:
        errors = f"(error {own:.1f}, with other frames' {error:.1f})"
        yield Finding(CAMERAS, f"predictions follow the pictures and are no better for the right ones {errors}: another view than in training?")


def findings_of_scene(source: Path, frames: LeRobotFrames, episodes: Sequence[Episode], names: tuple[str, ...]) -> Iterator[Finding]:
    """The episodes' first pictures against those of the training data. Raises ConfigError for what is no data set, and no card, of this arm."""
    from gr00t_fast.evaluation.scene import card_of
    from gr00t_fast.scene.look import look

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    card, seen = card_of(source, names, tell), [frames[episode.first_row] for episode in episodes[:ENOUGH_EPISODES]]
    pictures = {key.split(".", 1)[1]: np.median([each[key][0] for each in seen], axis=0).astype(np.uint8) for key in frames.cameras}
    joints = np.median([episode.states[0] for episode in episodes], axis=0)
    for kind, text in look(card, pictures, {name: name for name in pictures}, joints).findings:
        if "camera" in text:
            yield Finding(CAMERAS, f"against {card.name}: {text}", decides=kind == "problem")


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
        return FINE, [*findings, *(replace(each, text=f"good, and could be better: {each.text}") for each in timing)]
    explained = sorted([*offset, *deciding], key=lambda each: each.left or 0)
    kinds = [each.kind for each in findings if each.decides]
    first = next((kind for kind in (*(each.kind for each in explained), *(kind for kind in (UNITS, CAMERAS, RATE) if kind in kinds))), MODEL)
    return first, [*explained, *findings, *(each for each in timing if each not in deciding)]


# --- the whole ------------------------------------------------------------------------------------------------------------------------------


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """The recording is looked at before weights are read. Raises Gr00tFastError."""
    from gr00t_fast.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.model_path, with_weights=False, revision=options.revision, letterbox=options.letterbox)
    embodiment = checkpoint.embodiment(options.embodiment_tag, options.data_config)
    metadata = embodiment.metadata
    frames = LeRobotFrames(options.dataset, embodiment.data_config, metadata, options.camera_map)
    recorded = read_recorded(frames, metadata)
    episodes = chosen(recorded, options.episodes)
    texts = [options.lang_instruction] if options.lang_instruction is not None else _instructions(frames, episodes)
    chunks, asked = _chunks(options, frames, recorded, episodes)
    compared = compare(recorded, chunks, options.action_horizon)
    width = np.ptp(np.concatenate([*recorded.trained.values()]), axis=0)
    found = figures(compared, recorded.names, np.maximum(width, 0.1 * width.max()))  # one that hardly moved is measured by the widest
    shift, findings = best_shift(chunks, options.action_horizon), [*findings_of_recording(recorded, metadata, frames)]
    if options.recordings is not None:
        findings += findings_of_scene(options.recordings, frames, episodes, recorded.names)
    if not is_good(found, findings):
        findings += findings_of_pictures(asked, chunks, options.action_horizon, list(frames.cameras))
    kind, evidence = judge(found, shift, findings)
    few = len(episodes) < ENOUGH_EPISODES
    basis = {"episodes": len(episodes), "chunks": len(chunks), "frames": len(compared.lead), "few": few}
    return {
        "program": "eval",
        "checkpoint": Path(options.model_path).name,
        "dataset": {"name": Path(frames.name).name, "episodes": [each.number for each in episodes], "of": len(recorded.episodes), "fps": frames.fps},
        "instructions": texts,
        "cameras": {key: {"feature": camera.feature, "chosen_by": camera.chosen_by} for key, camera in frames.cameras.items()},
        "engine": asked.policy.engine.name,
        "precision": asked.policy.precision,
        "denoising_steps": asked.policy.denoising_steps,
        "action_horizon": options.action_horizon,
        **found,
        "leads": by_lead(compare(recorded, chunks, len(chunks[0].targets))),
        "best_shift": shift,
        "inference_ms": percentiles(chunk.inference_ms for chunk in chunks),
        "verdict": {"kind": kind, "advice": ADVICE[kind], "evidence": [asdict(each) for each in evidence], "rests_on": basis},
        **provenance(),
        "seed": options.seed,
    }


def _instructions(frames: LeRobotFrames, episodes: Sequence[Episode]) -> list[str]:
    """What the policy will be told, each once. Raises ConfigError when the recording does not say it."""
    told = {episode.number: frames.tasks_of(episode.number) for episode in episodes}
    if silent := [number for number, texts in told.items() if not texts]:
        raise ConfigError(f"episode {silent[0]} of the data set has no task text. Give what the policy was trained to hear: --lang_instruction=...")
    return list(dict.fromkeys(text for texts in told.values() for text in texts))


def _chunks(options: EvalOptions, frames: LeRobotFrames, recorded: Recorded, episodes: Sequence[Episode]) -> tuple[list[Chunk], Asked]:
    from gr00t_fast.policy import load_policy

    policy = load_policy(options.model_path, **options.policy_options())
    policy.action_horizon = None  # it was checked; every row is looked at
    policy.warm_up()
    asked, chunks = Asked(policy, frames, recorded.widths, options), list[Chunk]()
    places = [(episode, start) for episode in episodes for start in range(0, len(episode.actions), options.action_horizon)]
    with progress_bar("inferences", len(places)) as tick:
        for episode, start in places:
            chunks.append(asked.chunk(episode, start, asked.observation(episode, start)))
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
    if basis["few"]:
        lines.append(f"Fewer than {ENOUGH_EPISODES} episodes: another one may well give another verdict (--episodes all).")
    return "\n".join([*lines, *(f"- {each['text']}" for each in verdict["evidence"])])
