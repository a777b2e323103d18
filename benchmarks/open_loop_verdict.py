"""The parts of open_loop.py that judge: recorded episodes as arrays, the policy's answers to them, figures in joint units,
what is checked of the recording, questions asked about poor predictions, and the verdict.

The verdict says what the figures mean: the model, units or calibration, the cameras, the rate, the timing, or none of these.

The rules, in this order; the first that holds is the verdict, all evidence is told:
1. joints are off by a constant, and without that the predictions are good: units/calibration;
2. the error is well below that of holding still and no joint's is large, or all are small: nothing is wrong here, suspect the loop;
3. undoing one common mistake makes the predictions good: units/calibration or cameras, as the mistake is;
4. the recording contradicts the checkpoint's units, order or ranges: units/calibration;
5. pictures are flat or distorted, or the predictions follow the pictures and are no better for it: cameras;
6. another rate than in training: rate;
7. otherwise: the model.

Timing stands beside 1 and 3: where the predictions become good once they are shifted in time, and that leaves less of the error than 1 or 3 would,
the actions were recorded late or early: timing (unless the rate is another one, which shifts them too). Any other shift that helps is told as a hint.
Large and small are shares of the range that a joint had in training: degrees, per cent and radians are judged alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.lib.program import show_progress
from gr00t_fast.contracts import SO100_JOINTS, PartStatistics, PolicyMetadata
from gr00t_fast.control.preflight import ASPECT_TOLERANCE, FPS_TOLERANCE, NORMALISED_LIMIT, RADIANS_LIMIT, SATURATED_EXTREMES, SATURATION_TOLERANCE
from gr00t_fast.dataset import LeRobotFrames
from gr00t_fast.errors import CheckpointError, ConfigError
from gr00t_fast.measurement import percentiles


@dataclass(frozen=True)
class Layout:
    """Parts of the action in order, and the joints they make up. `names` are the data set's own."""

    widths: Mapping[str, int]
    names: tuple[str, ...]

    def joined(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """part -> (..., D) to (..., J)."""
        return np.concatenate([parts[part] for part in self.widths], axis=-1)

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """(..., J) to part -> (..., D)."""
        ends = np.cumsum(list(self.widths.values()))
        return dict(zip(self.widths, np.split(values, ends[:-1], axis=-1), strict=True))

    def statistics(self, parts: Mapping[str, PartStatistics], name: str) -> np.ndarray:
        """(J,): `min`, `max`, `q01` or `q99` of the checkpoint's training data."""
        return np.concatenate([getattr(parts[part], name) for part in self.widths])


@dataclass(frozen=True)
class Episode:
    """states and actions float64 (T, J), in the data's units; row `first_row` of the data set is frame 0."""

    number: int
    first_row: int
    states: np.ndarray
    actions: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Recorded:
    """Every episode of a data set, without its pictures."""

    layout: Layout
    episodes: Sequence[Episode]

    @property
    def states(self) -> np.ndarray:
        return np.concatenate([episode.states for episode in self.episodes])

    @property
    def actions(self) -> np.ndarray:
        return np.concatenate([episode.actions for episode in self.episodes])

    def replay(self, number: int) -> np.ndarray | None:
        """(T, J): the mean of the OTHER episodes' recorded actions at the same frame, an ended one held; None when there is no other."""
        others = [episode.actions for episode in self.episodes if episode.number != number]
        if not others:
            return None
        frames = np.arange(len(self.episodes[number]))
        return np.mean([actions[np.minimum(frames, len(actions) - 1)] for actions in others], axis=0)


def load(frames: LeRobotFrames, metadata: PolicyMetadata) -> Recorded:
    """Raises ConfigError when the policy's actions are not targets of the joints in its state, or the data set holds NaN."""
    absent = {part: width for part, width in metadata.action_widths.items() if metadata.state_widths.get(part) != width}
    if absent:
        raise ConfigError(
            f"the policy's action parts {dict(metadata.action_widths)} are not its state parts {dict(metadata.state_widths)}. The dry run compares "
            "targets with positions of the same joints, and cannot judge this checkpoint."
        )
    names = frames.names("action")
    layout = Layout(metadata.action_widths, tuple(name for part in metadata.action_widths for name in names[part]))
    episodes = []
    for number, rows in enumerate(frames.episodes):
        states, actions = (layout.joined(frames.columns(kind, rows)) for kind in ("state", "action"))
        if not (np.isfinite(states).all() and np.isfinite(actions).all()):
            raise ConfigError(f"episode {number} holds NaN or infinite joint values. Remove it from the data set; lerobot-edit-dataset does.")
        episodes.append(Episode(number, rows.start, states, actions))
    if not episodes:
        raise ConfigError("the data set has no episodes.")
    return Recorded(layout, episodes)


def choose(recorded: Recorded, wanted: Sequence[str]) -> list[Episode]:
    """`["all"]`, or numbers of episodes in any order. Raises ConfigError for others."""
    if list(wanted) == ["all"]:
        return list(recorded.episodes)
    count = len(recorded.episodes)
    wrong = [word for word in wanted if not (word.isdecimal() and int(word) < count)]
    if wrong:
        raise ConfigError(f"--episodes: there is no episode '{wrong[0]}'. The data set has {count}, from 0 to {count - 1}; 'all' takes every one.")
    numbers = [int(word) for word in wanted]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--episodes: an episode is named twice in {', '.join(wanted)}.")
    return [recorded.episodes[number] for number in numbers]


def describe(recorded: Recorded, metadata: PolicyMetadata) -> dict[str, Any]:
    """joint -> ranges of the recording (1 to 99 % and all) and of the checkpoint, and how much of the recording lies outside."""
    found: dict[str, Any] = {name: {} for name in recorded.layout.names}
    for kind, values, parts in (("state", recorded.states, metadata.state_statistics), ("action", recorded.actions, metadata.action_statistics)):
        low, high = (recorded.layout.statistics(parts, name) for name in ("min", "max"))
        share, spread = outside_share(values, low, high), np.quantile(values, (0, 0.01, 0.99, 1), axis=0)
        typical = [recorded.layout.statistics(parts, name) for name in ("q01", "q99")]
        for joint, name in enumerate(recorded.layout.names):
            found[name][kind] = {
                "recorded": _rounded(spread[[0, 3], joint]),
                "recorded_q01_q99": _rounded(spread[[1, 2], joint]),
                "checkpoint": _rounded([low[joint], high[joint]]),
                "checkpoint_q01_q99": _rounded([bound[joint] for bound in typical]),
                "share_outside": round(float(share[joint]), 3),
            }
    return found


SLACK_UNITS, SLACK_SHARE = 2.0, 0.05  # beyond the trained range that still count as inside: degrees or per cent, and share of the range


def outside_share(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(J,): the part of the (T, J) values that lie outside the training range and some slack."""
    slack = np.maximum(SLACK_UNITS, SLACK_SHARE * (high - low))
    return ((values < low - slack) | (values > high + slack)).mean(axis=0)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 2) for value in values]


Observation = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """What the policy said at frame `start`: targets float64 (trained horizon, J)."""

    episode: Episode
    start: int
    targets: np.ndarray
    inference_ms: float


class Rollout:
    """Asks the policy at recorded frames. The noise of a frame depends on the seed and its row alone: equal for all settings that are compared."""

    def __init__(
        self, policy: Any, frames: LeRobotFrames, recorded: Recorded, noise_shape: tuple[int, int], seed: int, instruction: str | None
    ) -> None:
        """noise_shape: trained horizon and padded action width. `instruction` None: the data set's own."""
        self.policy, self.recorded = policy, recorded
        self._frames, self._noise_shape, self._seed = frames, noise_shape, seed
        self._instruction = instruction
        self.language_key = policy.get_modality_config()["language"].modality_keys[0]

    def observation(self, episode: Episode, frame: int) -> Observation:
        """The policy's own dictionary. Raises ConfigError when a picture cannot be decoded."""
        found = self._frames[episode.first_row + frame]
        return found if self._instruction is None else found | {self.language_key: [self._instruction]}

    def with_joints(self, observation: Observation, joints: np.ndarray) -> Observation:
        """The same with the state (J,) replaced."""
        return observation | {f"state.{part}": values[None] for part, values in self.recorded.layout.split(joints).items()}

    def targets(self, observation: Observation, episode: Episode, frame: int) -> np.ndarray:
        """(trained horizon, J). Raises CheckpointError when they are not finite."""
        noise = np.random.default_rng([self._seed, episode.first_row + frame]).standard_normal((1, *self._noise_shape), np.float32)
        actions = self.policy.get_action(observation, noise=noise)
        found = self.recorded.layout.joined({part: actions[f"action.{part}"] for part in self.recorded.layout.widths}).astype(np.float64)
        if not np.isfinite(found).all():
            raise CheckpointError(f"the policy answers NaN or infinity to frame {frame} of episode {episode.number}. Try --precision=fp32.")
        return found

    def chunks(self, episodes: Sequence[Episode], starts: Callable[[Episode], Sequence[int]], steps: Sequence[int]) -> dict[int, list[Chunk]]:
        """Denoising steps -> chunks. Each frame is read once, and the step counts take turns on it."""
        found: dict[int, list[Chunk]] = {count: [] for count in steps}
        places = [(episode, start) for episode in episodes for start in starts(episode)]
        for number, (episode, start) in enumerate(places):
            observation = self.observation(episode, start)
            turn = number % len(steps)  # whoever comes first after a picture was decoded finds the caches full of it
            for count in (*steps[turn:], *steps[:turn]):
                self.policy.denoising_steps = count
                began_s = time.perf_counter()
                targets = self.targets(observation, episode, start)
                found[count].append(Chunk(episode, start, targets, 1000 * (time.perf_counter() - began_s)))
            show_progress("frames", number + 1, len(places))
        return found


_STILL = 1e-6  # variance below which a joint did not move
MOST_SHIFT = 8  # frames looked at in both directions
_SHIFT_SHARE, _NEARLY = 0.8, 1.1  # what a shift must lower the error to; of those nearly as good as the best the shortest is taken


@dataclass(frozen=True)
class Compared:
    """One row per predicted action that has a recorded one. (N, J): predicted, recorded, held (the state at the chunk's start), state (at the frame
    itself), replayed (None with a single episode). (N,): episode, frame, lead (rows into the chunk)."""

    predicted: np.ndarray
    recorded: np.ndarray
    held: np.ndarray
    state: np.ndarray
    replayed: np.ndarray | None
    episode: np.ndarray
    frame: np.ndarray
    lead: np.ndarray

    @property
    def error(self) -> np.ndarray:
        return self.predicted - self.recorded


def compare(recorded: Recorded, chunks: Sequence[Chunk], horizon: int) -> Compared:
    """The first `horizon` rows of each chunk against the recording, as far as it goes."""
    columns: list[list[np.ndarray]] = [[] for _ in range(8)]
    replays = {number: recorded.replay(number) for number in {chunk.episode.number for chunk in chunks}}
    for chunk in chunks:
        episode, rows = chunk.episode, min(horizon, len(chunk.targets), len(chunk.episode) - chunk.start)
        span, replay = slice(chunk.start, chunk.start + rows), replays[episode.number]
        held = np.broadcast_to(episode.states[chunk.start], (rows, episode.states.shape[1]))
        poses = (chunk.targets[:rows], episode.actions[span], held, episode.states[span], None if replay is None else replay[span])
        counts = (np.full(rows, episode.number), np.arange(span.start, span.stop), np.arange(rows))
        for column, values in zip(columns, (*poses, *counts), strict=True):
            if values is not None:
                column.append(values)
    return Compared(*(np.concatenate(column) if column else None for column in columns))


def summary(compared: Compared, names: Sequence[str], trained_range: np.ndarray) -> dict[str, Any]:
    """All joints together, and each, with the width (J,) that it had in training. MSE over all joints is what NVIDIA's eval_policy prints."""
    return {
        "frames": len(compared.frame),
        **_errors(compared, slice(None)),
        "worst": worst(compared, names),
        "joints": {name: _errors(compared, [joint]) | {"trained_range": _figure(trained_range[joint])} for joint, name in enumerate(names)},
    }


def _errors(compared: Compared, joints: slice | list[int]) -> dict[str, float | None]:
    recorded = compared.recorded[:, joints]
    error, hold, replay = (
        None if values is None else np.abs(values[:, joints] - recorded) for values in (compared.predicted, compared.held, compared.replayed)
    )
    mse, variance = (error**2).mean(), recorded.var(axis=0).mean()
    return {
        "mae": _figure(error.mean()),
        "mse": _figure(mse),
        "hold_mae": _figure(hold.mean()),
        "replay_mae": None if replay is None else _figure(replay.mean()),
        "ratio_to_hold": ratio(error.mean(), hold.mean()),
        "ratio_to_replay": None if replay is None else ratio(error.mean(), replay.mean()),
        "r2": _figure(1 - mse / variance) if variance > _STILL else None,  # share of the variance that is explained, where they vary
    }


def ratio_by_episode(compared: Compared) -> dict[str, Any]:
    """`ratio_to_hold` of each episode, by its number, and their spread: one episode says little about the next. None where nothing moved."""
    found = {}
    for number in dict.fromkeys(compared.episode.tolist()):
        rows = compared.episode == number
        found[str(number)] = ratio(np.abs(compared.error[rows]).mean(), np.abs((compared.held - compared.recorded)[rows]).mean())
    moved = [value for value in found.values() if value is not None]
    spread = dict(zip(("min", "median", "max"), map(_figure, np.quantile(moved, (0, 0.5, 1))), strict=True)) if moved else None
    return {"episodes": found, "spread": spread}


def worst(compared: Compared, names: Sequence[str]) -> dict[str, Any]:
    """The largest error of any joint at any frame."""
    row, joint = np.unravel_index(int(np.abs(compared.error).argmax()), compared.error.shape)
    return {
        "episode": int(compared.episode[row]),
        "frame": int(compared.frame[row]),
        "row_of_chunk": int(compared.lead[row]),
        "joint": names[joint],
        "predicted": _figure(compared.predicted[row, joint]),
        "recorded": _figure(compared.recorded[row, joint]),
    }


def by_lead(compared: Compared) -> dict[str, list[Any]]:
    """Row k of each list: the mean over joints and chunks of the error k frames after the observation, and how many chunks reach so far."""
    leads = np.unique(compared.lead)
    chosen = [compared.lead == lead for lead in leads]
    return {
        "chunks": [int(rows.sum()) for rows in chosen],
        "mae": [_figure(np.abs(compared.error[rows]).mean()) for rows in chosen],
        "hold_mae": [_figure(np.abs((compared.held - compared.recorded)[rows]).mean()) for rows in chosen],
    }


def best_shift(chunks: Sequence[Chunk], horizon: int) -> dict[str, Any]:
    """Frames by which the predictions run ahead of the recording (negative: behind) where that shift in time cuts the error by a fifth; else 0."""
    found = {shift: np.mean([_shifted_error(chunk, horizon, shift) for chunk in chunks]) for shift in range(-MOST_SHIFT, MOST_SHIFT + 1)}
    least = min(found.values())
    shift = min((shift for shift in found if found[shift] <= _NEARLY * least), key=abs) if least < _SHIFT_SHARE * found[0] else 0
    return {"frames": shift, "mae": _figure(found[shift])}


def _shifted_error(chunk: Chunk, horizon: int, shift: int) -> float:
    """Of the rows that the recording has unshifted; before its begin and after its end, its first and last actions hold."""
    actions = chunk.episode.actions
    rows = np.arange(min(horizon, len(chunk.targets), len(actions) - chunk.start))
    return float(np.abs(chunk.targets[rows] - actions[np.clip(chunk.start + rows + shift, 0, len(actions) - 1)]).mean())


def boundary_jumps(compared: Compared) -> dict[str, Any]:
    """Where a chunk follows another: the change of target across the boundary, largest joint, and the recording's own change at the same frames."""
    follows = (compared.lead[1:] == 0) & (compared.episode[1:] == compared.episode[:-1])
    told = {"predicted": compared.predicted, "recorded": compared.recorded}
    return {name: percentiles(np.abs(np.diff(values, axis=0)).max(axis=1)[follows]) for name, values in told.items()}


def offsets(compared: Compared, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """joint -> bias: median of predicted - recorded; spread: median distance from it; same_sign: share of frames on the bias's side;
    first_action_recorded, first_action_predicted: median of the first action of a chunk less the state it began from."""
    first = compared.lead == 0
    error, start = compared.error, compared.state[first]
    bias = np.median(error, axis=0)
    columns = {
        "bias": bias,
        "spread": np.median(np.abs(error - bias), axis=0),
        "same_sign": (np.sign(error) == np.sign(bias)).mean(axis=0),
        "mae_without_bias": np.abs(error - bias).mean(axis=0),
        "first_action_recorded": np.median(compared.recorded[first] - start, axis=0),
        "first_action_predicted": np.median(compared.predicted[first] - start, axis=0),
    }
    return {name: {key: _figure(values[joint]) for key, values in columns.items()} for joint, name in enumerate(names)}


def ratio(error: float, baseline: float) -> float | None:
    """None where the baseline makes no error: nothing moved."""
    return _figure(error / baseline) if baseline > 1e-9 else None


def _figure(value: float) -> float:
    return round(float(value), 3)


UNITS, CAMERAS, RATE, TIMING = "units/calibration", "cameras", "rate", "timing"
# Share of a joint's values outside the trained range from which that is told; share of values, or of flat pictures, that explains poor predictions.
_FOREIGN_SHARE, _DECISIVE_SHARE = 0.1, 0.3
_FRACTION_LIMIT, _PERCENT_LIMIT = 1.5, 10.0  # a gripper that never exceeds the first is a fraction; one beyond the second is in per cent
_NARROW_SHARE = 0.1  # a joint that hardly moved in training is measured by this part of the widest range
_FLAT_LEVELS = 4.0  # standard deviation of a picture, of 255 levels, below which there is nothing to see


@dataclass(frozen=True)
class Finding:
    """`kind` is what it hints at: UNITS, CAMERAS, RATE or TIMING. One that does not decide is told, and no reason for a verdict by itself."""

    kind: str
    text: str
    decides: bool = True


def static_findings(recorded: Recorded, metadata: PolicyMetadata, frames: LeRobotFrames) -> list[Finding]:
    return [*_units(recorded, metadata), *_order(recorded), *_ranges(recorded, metadata), *_rate(frames, metadata), *_cameras(frames, metadata)]


def _trained(recorded: Recorded, metadata: PolicyMetadata) -> np.ndarray:
    """(2, J): lowest and highest value of states and actions together."""
    both = (metadata.state_statistics, metadata.action_statistics)
    low = np.min([recorded.layout.statistics(parts, "min") for parts in both], axis=0)
    return np.stack([low, np.max([recorded.layout.statistics(parts, "max") for parts in both], axis=0)])


def trained_range(recorded: Recorded, metadata: PolicyMetadata) -> np.ndarray:
    """(J,): the width of what is large or small for each joint, in the checkpoint's units."""
    low, high = _trained(recorded, metadata)
    return np.maximum(high - low, _NARROW_SHARE * (high - low).max())


def _units(recorded: Recorded, metadata: PolicyMetadata) -> Iterator[Finding]:
    """Radians, fractions, and lerobot's normalised range. The last joint is the gripper where it is called so."""
    values = np.concatenate([recorded.states, recorded.actions])
    body = np.array([name != "gripper" for name in recorded.layout.names])
    trained, here = np.abs(_trained(recorded, metadata)), np.abs(np.stack([values.min(axis=0), values.max(axis=0)]))
    if body.any():
        most, trained_most = here[:, body].max(), trained[:, body].max()
        if most <= RADIANS_LIMIT < trained_most:
            yield Finding(UNITS, f"no body joint of the recording exceeds {most:.2f}, those of the checkpoint reach {trained_most:.0f}: radians?")
        if _normalised(here[:, body]) and trained_most > NORMALISED_LIMIT:
            yield Finding(UNITS, f"the recording ends at exactly 100, the checkpoint's joints reach {trained_most:.0f}: -100..100 against degrees?")
        if _normalised(trained[:, body]) and most > NORMALISED_LIMIT:
            yield Finding(UNITS, f"the checkpoint's ranges end at exactly 100, the recording reaches {most:.0f}: degrees against -100..100?")
    if (~body).any() and here[:, ~body].max() <= _FRACTION_LIMIT and trained[:, ~body].max() >= _PERCENT_LIMIT:
        yield Finding(
            UNITS, f"the gripper never exceeds {here[:, ~body].max():.2f}, the checkpoint's reaches {trained[:, ~body].max():.0f}: a fraction?"
        )


def _normalised(extremes: np.ndarray) -> bool:
    """lerobot clamps its normalised range, which leaves extremes at exactly 100."""
    saturated = int((np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum())
    return saturated >= SATURATED_EXTREMES and bool(extremes.max() <= NORMALISED_LIMIT)


def _order(recorded: Recorded) -> Iterator[Finding]:
    names = recorded.layout.names
    if set(names) == set(SO100_JOINTS) and names != SO100_JOINTS:
        yield Finding(UNITS, f"the recording's joints come as {', '.join(names)}; an SO-100 has them as {', '.join(SO100_JOINTS)}")


def _ranges(recorded: Recorded, metadata: PolicyMetadata) -> Iterator[Finding]:
    for kind, values, parts in (("state", recorded.states, metadata.state_statistics), ("action", recorded.actions, metadata.action_statistics)):
        low, high = (recorded.layout.statistics(parts, name) for name in ("min", "max"))
        share = outside_share(values, low, high)
        foreign = [int(joint) for joint in np.flatnonzero(share > _FOREIGN_SHARE)]
        for joint in foreign:
            yield Finding(
                UNITS,
                f"{kind} of {recorded.layout.names[joint]}: {100 * share[joint]:.0f} % of the recording lies outside the checkpoint's "
                f"{low[joint]:.0f} to {high[joint]:.0f} (recorded: {values[:, joint].min():.0f} to {values[:, joint].max():.0f})",
                decides=bool(share[joint] > _DECISIVE_SHARE),
            )
        for one, other in combinations(foreign, 2):
            if _fits_exchanged(values, low, high, one, other):
                yield Finding(UNITS, f"{kind}: {recorded.layout.names[one]} and {recorded.layout.names[other]} would both fit if they were exchanged")


def _fits_exchanged(values: np.ndarray, low: np.ndarray, high: np.ndarray, one: int, other: int) -> bool:
    share = outside_share(values[:, [other, one]], low[[one, other]], high[[one, other]])
    return bool((share <= _FOREIGN_SHARE).all())


def _rate(frames: LeRobotFrames, metadata: PolicyMetadata) -> Iterator[Finding]:
    if frames.fps and metadata.fps and abs(frames.fps / metadata.fps - 1) > FPS_TOLERANCE:
        yield Finding(
            RATE,
            f"recorded at {frames.fps:g} frames/s, trained at {metadata.fps:g}: one action is {metadata.fps / frames.fps:.2f} frames, "
            "and errors far ahead are those of the clock",
        )


def _cameras(frames: LeRobotFrames, metadata: PolicyMetadata) -> Iterator[Finding]:
    for key, camera in frames.cameras.items():
        trained = metadata.resolutions.get(key.split(".", 1)[1])
        if trained is None or camera.size is None:
            continue
        (width, height), (trained_width, trained_height) = camera.size, trained
        if abs(width * trained_height / (height * trained_width) - 1) > ASPECT_TOLERANCE:
            yield Finding(
                CAMERAS,
                f"{camera.feature} has {width}x{height}, {key} was trained with {trained_width}x{trained_height}: another aspect ratio, "
                "the picture is distorted",
            )


def picture_findings(looked_at: Iterable[tuple[int, int, Mapping[str, Any]]], frames: LeRobotFrames) -> list[Finding]:
    """Of (episode, frame, observation): a covered or dead camera, also one that died on the way. Holds one observation at a time."""
    levels: dict[str, list[tuple[int, int, float]]] = {key: [] for key in frames.cameras}
    for episode, frame, observation in looked_at:
        for key in levels:
            levels[key].append((episode, frame, float(observation[key].std())))
    found = []
    for key, seen in levels.items():
        if flat := [one for one in seen if one[2] < _FLAT_LEVELS]:
            episode, frame, level = flat[0]
            text = f"{frames.cameras[key].feature} shows nothing in {len(flat)} of {len(seen)} pictures, first in episode {episode} at frame {frame} "
            text += f"(standard deviation {level:.1f} of 255): covered, or not recorded"
            found.append(Finding(CAMERAS, text, decides=len(flat) / len(seen) > _DECISIVE_SHARE))
    return found


_MOST_SUSPECTS = 4  # joints: six pairs to exchange, four signs to turn


@dataclass(frozen=True)
class Place:
    """A frame that questions are put to, and what the policy is shown there."""

    episode: Episode
    start: int
    observation: Observation


@dataclass(frozen=True)
class Question:
    """`pictures` changes the observation's pictures, `joints` (..., J) states and recorded actions alike."""

    what: str
    kind: str
    pictures: Callable[[Observation], Observation] = lambda observation: observation
    joints: Callable[[np.ndarray], np.ndarray] = lambda values: values


@dataclass(frozen=True)
class Answer:
    """mae: with the change; moved: how far the change moved the predictions, mean over joints and rows."""

    question: Question
    mae: float
    moved: float


def questions(cameras: Sequence[str], names: Sequence[str], suspects: Sequence[int]) -> list[Question]:
    """What is commonly wrong: pictures exchanged, turned or in other colours, joints exchanged or turned. `suspects`: poor joints, worst first."""
    found = list(_about_cameras(cameras))
    suspects = list(suspects)[:_MOST_SUSPECTS]
    found += [Question(f"{names[a]} and {names[b]} exchanged", UNITS, joints=_exchange(a, b, len(names))) for a, b in combinations(suspects, 2)]
    return found + [Question(f"the sign of {names[joint]} turned", UNITS, joints=_turn(joint, len(names))) for joint in suspects]


def _about_cameras(cameras: Sequence[str]) -> Iterator[Question]:
    for one, other in combinations(cameras, 2):
        what = f"the pictures of {one} and {other} exchanged"
        yield Question(what, CAMERAS, lambda o, one=one, other=other: o | {one: o[other], other: o[one]})
    for key in cameras:  # (1, H, W, 3)
        yield Question(f"{key} mirrored", CAMERAS, lambda o, key=key: o | {key: np.ascontiguousarray(o[key][:, :, ::-1])})
        yield Question(f"{key} upside down", CAMERAS, lambda o, key=key: o | {key: np.ascontiguousarray(o[key][:, ::-1, ::-1])})
        yield Question(f"red and blue of {key} exchanged", CAMERAS, lambda o, key=key: o | {key: np.ascontiguousarray(o[key][..., ::-1])})


def _exchange(one: int, other: int, joints: int) -> Callable[[np.ndarray], np.ndarray]:
    order = np.arange(joints)
    order[[one, other]] = other, one
    return lambda values: values[..., order]


def _turn(joint: int, joints: int) -> Callable[[np.ndarray], np.ndarray]:
    sign = np.where(np.arange(joints) == joint, -1.0, 1.0)
    return lambda values: values * sign


def places(rollout: Rollout, episodes: Sequence[Episode], horizon: int, count: int) -> list[Place]:
    """At most `count` frames, spread evenly over those at which a whole chunk can be compared."""
    candidates = [(episode, start) for episode in episodes for start in range(0, max(1, len(episode) - horizon + 1), max(1, horizon // 2))]
    chosen = np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))
    return [Place(*candidates[index], rollout.observation(*candidates[index])) for index in chosen]


class Interview:
    """Puts questions to the policy at the same places. `as_is` is the error without any change; `foreign` with pictures that do not belong."""

    def __init__(self, rollout: Rollout, where: Sequence[Place], horizon: int, asked: Sequence[Question]) -> None:
        self._rollout, self._where, self._horizon = rollout, where, horizon
        self._plain = [self._targets(place, place.observation, Question("", "")) for place in where]
        self.as_is = float(np.mean([np.abs(p - self._actions(place)).mean() for place, p in zip(where, self._plain, strict=True)]))
        self.hold = float(np.mean([np.abs(place.episode.states[place.start] - self._actions(place)).mean() for place in where]))
        self.answers: list[Answer] = []
        self.foreign = self._ask_foreign()
        for number, question in enumerate(asked):
            self.answers.append(self._ask(question, [place.observation for place in where]))
            show_progress("questions", number + 1, len(asked))

    def _ask_foreign(self) -> Answer:
        """Pictures of the place half the way further on: another episode wherever there are several."""
        cameras, half = [key for key in self._where[0].observation if key.startswith("video.")], len(self._where) // 2
        others = [self._where[(index + half) % len(self._where)].observation for index in range(len(self._where))]
        shown = [place.observation | {key: other[key] for key in cameras} for place, other in zip(self._where, others, strict=True)]
        return self._ask(Question("pictures of other frames", CAMERAS), shown)

    def _ask(self, question: Question, observations: Sequence[Observation]) -> Answer:
        errors, moves = [], []
        for place, observation, plain in zip(self._where, observations, self._plain, strict=True):
            predicted = self._targets(place, question.pictures(observation), question)
            errors.append(np.abs(predicted - question.joints(self._actions(place))).mean())
            moves.append(np.abs(predicted - question.joints(plain)).mean())
        return Answer(question, float(np.mean(errors)), float(np.mean(moves)))

    def _targets(self, place: Place, observation: Observation, question: Question) -> np.ndarray:
        shown = self._rollout.with_joints(observation, question.joints(place.episode.states[place.start]))
        return self._rollout.targets(shown, place.episode, place.start)[: len(self._actions(place))]

    def _actions(self, place: Place) -> np.ndarray:
        return place.episode.actions[place.start : place.start + self._horizon]


MODEL, FINE = "model", "looks fine: suspect the loop"
# Chosen figures. The demo's trained network is at 0.5 with 8 actions per chunk, networks with random weights beyond 5.
GOOD_RATIO = 0.7  # of the error of holding the chunk's first state
# Shares of a joint's trained range; an SO-100's shoulder turns through about 140 degrees.
SMALL_SHARE = 0.02  # an error that no task notices; holding still can be as good where hardly anything moves
_STILL_SHARE = 0.01  # hardly anything moves where holding still errs by no more; elsewhere it must not be the better policy
_POOR_SHARE = 0.05  # one joint that is off by more, and worse than holding still, is not hidden by the others
_BIAS_SHARE, _SAME_SIGN, _BIAS_SPREAD = 0.05, 0.9, 0.4  # a constant offset: so large, so often on one side, its spread so small beside it
ENOUGH_EPISODES = 5  # chosen: with fewer the spread over episodes says nothing
_UNDONE = 0.7  # a mistake counts as undone when the error falls to this part
_NO_BETTER, _FOLLOWS = 1.1, 0.3  # foreign pictures: error at most this much larger, though predictions moved by this part of the error


@dataclass(frozen=True)
class Verdict:
    kind: str
    advice: str
    evidence: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "advice": self.advice, "evidence": list(self.evidence)}


@dataclass(frozen=True)
class _Explanation:
    """`left`: the part of the error that remains once it is undone."""

    findings: Sequence[Finding]
    left: float


def is_good(summary: Mapping[str, Any], findings: Sequence[Finding]) -> bool:
    """Whether the predictions need no explanation."""
    ratio, joints = summary["ratio_to_hold"], list(summary["joints"].values())
    poor = any(joint["mae"] > _POOR_SHARE * joint["trained_range"] and (joint["ratio_to_hold"] or 2.0) > 1 for joint in joints)
    contradicted = any(finding.kind == UNITS and finding.decides for finding in findings)  # shares of a range in other units say nothing
    return (ratio is not None and ratio <= GOOD_RATIO and not poor) or (not contradicted and _is_small(ratio, joints))


def _is_small(ratio: float | None, joints: Sequence[Mapping[str, Any]]) -> bool:
    still = all(joint["hold_mae"] <= _STILL_SHARE * joint["trained_range"] for joint in joints)
    return (still or (ratio is not None and ratio <= 1)) and all(joint["mae"] <= SMALL_SHARE * joint["trained_range"] for joint in joints)


def suspects(summary: Mapping[str, Any]) -> list[int]:
    """Joints that are little or no better than holding still, worst first."""
    poor = [(joint["ratio_to_hold"] or 0.0, index) for index, joint in enumerate(summary["joints"].values())]
    return [index for found, index in sorted(poor, reverse=True) if found > GOOD_RATIO]


def judge(
    summary: Mapping[str, Any], offsets: Mapping[str, Any], findings: Sequence[Finding], interview: Interview | None, shift: Mapping[str, Any]
) -> Verdict:
    """`interview` is None where the predictions are good or nothing was to be asked; `shift` is what metrics.best_shift found."""
    ratio, constant, timing = summary["ratio_to_hold"], _constant_offsets(summary, offsets), _timing(summary, shift, findings)
    decisive = [one for one in timing if one.findings[0].decides]
    offset = [one for one in constant if all(one.left <= other.left for other in decisive)]  # a steady motion makes a delay look like an offset
    if is_good(summary, findings) and not offset:
        told = [*findings, *(finding for one in timing for finding in one.findings)]
        return Verdict(FINE, _ADVICE[FINE], (_how_good(summary), *(finding.text for finding in told)))
    explained = sorted([*(constant or _mended(interview)), *decisive], key=lambda one: one.left)
    looks = [] if explained else _looks_in_vain(interview)
    hints = [finding for one in timing if one not in decisive for finding in one.findings]
    evidence = [*(finding for one in explained for finding in one.findings), *findings, *looks, *hints]
    hinted = {finding.kind for finding in evidence if finding.decides}
    reasons = [one.findings[0].kind for one in explained] or [kind for kind in (UNITS, CAMERAS, RATE) if kind in hinted]
    kind = reasons[0] if reasons else MODEL
    how = f"error {'?' if ratio is None else f'{ratio:.2f}'} times that of holding still"
    return Verdict(kind, _ADVICE[kind], (how, *(finding.text for finding in evidence)))


def rests_on(compared: Compared) -> dict[str, Any]:
    """How much was looked at; `warning` says when that is little."""
    episodes = len(np.unique(compared.episode))
    few = f"Fewer than {ENOUGH_EPISODES} episodes: another one may well give another verdict. Look at more before you rely on it (--episodes all)"
    return {
        "episodes": episodes,
        "chunks": int((compared.lead == 0).sum()),
        "frames": len(compared.frame),
        "warning": few if episodes < ENOUGH_EPISODES else None,
    }


def _how_good(summary: Mapping[str, Any]) -> str:
    ratio = summary["ratio_to_hold"]
    if ratio is not None and ratio <= GOOD_RATIO:
        return f"error {ratio:.2f} times that of holding still (good is up to {GOOD_RATIO})"
    return (
        f"every joint within {100 * SMALL_SHARE:g} % of its trained range; but holding still would do about as well, so little moves: judge on a "
        "livelier episode or with a longer --action_horizon"
    )


def _constant_offsets(summary: Mapping[str, Any], offsets: Mapping[str, Any]) -> list[_Explanation]:
    """Joints that are off by a constant, if the policy is good apart from that: a poor model is off in every way."""
    shifted = [
        name
        for name, joint in offsets.items()
        if abs(joint["bias"]) >= _BIAS_SHARE * summary["joints"][name]["trained_range"]
        and joint["same_sign"] >= _SAME_SIGN
        and joint["spread"] <= _BIAS_SPREAD * abs(joint["bias"])
    ]
    left = [offsets[name]["mae_without_bias"] if name in shifted else joint["mae"] for name, joint in summary["joints"].items()]
    hold = sum(joint["hold_mae"] for joint in summary["joints"].values())
    if not shifted or sum(left) > GOOD_RATIO * hold:
        return []
    found = [
        Finding(
            UNITS,
            f"{name}: predictions are off by {offsets[name]['bias']:+.1f} (median; {100 * offsets[name]['same_sign']:.0f} % of frames on that side), "
            f"and by {offsets[name]['mae_without_bias']:.1f} without that: another zero point?",
        )
        for name in shifted
    ]
    return [_Explanation(found, sum(left) / sum(joint["mae"] for joint in summary["joints"].values()))]


def _timing(summary: Mapping[str, Any], shift: Mapping[str, Any], findings: Sequence[Finding]) -> list[_Explanation]:
    """A shift in time that helps; it decides if it makes the predictions good."""
    frames, mae, shifted_mae = shift["frames"], summary["mae"], shift["mae"]
    if not frames:
        return []
    count = f"{abs(frames)} frame{'s' if abs(frames) > 1 else ''}{' or more' if abs(frames) == MOST_SHIFT else ''}"
    recorded, trained = ("late", "ahead of") if frames > 0 else ("early", "behind")
    finding = Finding(
        TIMING,
        f"predictions run {trained} the recorded actions by {count}: shifted so, the error falls from {mae:.1f} to {shifted_mae:.1f}. "
        f"Actions recorded {recorded}, or a network that was trained with actions {trained} those of this recording",
    )
    another_rate = any(other.kind == RATE and other.decides for other in findings)
    decides = shifted_mae <= _UNDONE * mae and shifted_mae <= GOOD_RATIO * summary["hold_mae"] and not another_rate
    return [_Explanation([replace(finding, decides=decides)], shifted_mae / mae)]


def _mended(interview: Interview | None) -> list[_Explanation]:
    """The change that helps most, if it makes the predictions good."""
    if interview is None or not interview.answers:
        return []
    best = min(interview.answers, key=lambda answer: answer.mae)
    if best.mae >= _UNDONE * interview.as_is or best.mae > GOOD_RATIO * interview.hold:
        return []
    finding = Finding(best.question.kind, f"with {best.question.what} the error falls from {interview.as_is:.1f} to {best.mae:.1f}")
    return [_Explanation([finding], best.mae / interview.as_is)]


def _looks_in_vain(interview: Interview | None) -> list[Finding]:
    if interview is None:
        return []
    foreign = interview.foreign
    if foreign.mae > _NO_BETTER * interview.as_is or foreign.moved < _FOLLOWS * interview.as_is:
        return []
    return [
        Finding(
            CAMERAS,
            f"predictions follow the pictures (other frames' pictures move them by {foreign.moved:.1f}) and are no better for the right ones "
            f"(error {interview.as_is:.1f}, with other frames' {foreign.mae:.1f}): another view than in training?",
        )
    ]


_ADVICE = {
    FINE: (
        "the checkpoint predicts what was recorded. If the arm still misbehaves, look at what the recording does not have: the arm's calibration and "
        "cameras now (--dry_run compares them), the rate of the loop, the light, --action_horizon and the delay of inference."
    ),
    UNITS: "recording and checkpoint count joints differently. Compare the ranges above; check use_degrees, the calibration and meta/modality.json.",
    CAMERAS: "compare the pictures in the plot with those of the training data: which camera is which (--camera_map), its place, mirroring, colours.",
    TIMING: (
        "the recorded actions belong to other frames than their states and pictures. Check that each row holds the state and the pictures from just "
        "before its action was sent, that no frames were dropped or queued while recording, the delay of the cameras, and whether the checkpoint's "
        "training data had its actions ahead of the measured joints."
    ),
    RATE: "recording and training ran at different rates. Use a recording at the checkpoint's rate.",
    MODEL: "the recording fits the checkpoint and is predicted poorly: train longer or on more data, or check instruction and checkpoint.",
}
