"""Predicted against recorded actions, in joint units (degrees; gripper: per cent in lerobot's data).

Axis alphabet: N compared frames, J joints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.open_loop_study.recorded import Recorded
from benchmarks.open_loop_study.rollout import Chunk
from gr00t_fast.measurement import percentiles

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


def compare(recorded: Recorded, chunks: Iterable[Chunk], horizon: int) -> Compared:
    """The first `horizon` rows of each chunk against the recording, as far as it goes."""
    columns: list[list[np.ndarray]] = [[] for _ in range(7)]
    replays: dict[int, np.ndarray | None] = {}
    for chunk in chunks:
        episode, rows = chunk.episode, min(horizon, len(chunk.targets), len(chunk.episode) - chunk.start)
        span = slice(chunk.start, chunk.start + rows)
        frames = np.arange(span.start, span.stop)
        if episode.number not in replays:
            replays[episode.number] = recorded.replay(episode.number)
        replay = replays[episode.number]
        held = np.broadcast_to(episode.states[chunk.start], (rows, episode.states.shape[1]))
        new = (chunk.targets[:rows], episode.actions[span], held, episode.states[span], None if replay is None else replay[span])
        for column, values in zip(columns, (*new, np.full(rows, episode.number), frames), strict=True):
            if values is not None:
                column.append(values)
    joined = [np.concatenate(column) if column else None for column in columns]
    lead = np.concatenate([np.arange(min(horizon, len(c.targets), len(c.episode) - c.start)) for c in chunks])
    return Compared(*joined, lead)


def summary(compared: Compared, names: Sequence[str], trained_range: np.ndarray) -> dict[str, Any]:
    """All joints together, and each, with the width (J,) that it had in training. MSE over all joints is what NVIDIA's eval_policy prints."""
    error, hold = np.abs(compared.error), np.abs(compared.held - compared.recorded)
    replay = None if compared.replayed is None else np.abs(compared.replayed - compared.recorded)
    variance = compared.recorded.var(axis=0)
    total = {
        "frames": len(error),
        "mae": _figure(error.mean()),
        "mse": _figure((compared.error**2).mean()),
        "hold_mae": _figure(hold.mean()),
        "replay_mae": None if replay is None else _figure(replay.mean()),
        "ratio_to_hold": ratio(error.mean(), hold.mean()),
        "ratio_to_replay": None if replay is None else ratio(error.mean(), replay.mean()),
        "r2": _r2((compared.error**2).mean(), variance.mean()),
        "worst": worst(compared, names),
    }
    total["joints"] = {
        name: {
            "mae": _figure(error[:, joint].mean()),
            "mse": _figure((compared.error[:, joint] ** 2).mean()),
            "hold_mae": _figure(hold[:, joint].mean()),
            "replay_mae": None if replay is None else _figure(replay[:, joint].mean()),
            "ratio_to_hold": ratio(error[:, joint].mean(), hold[:, joint].mean()),
            "r2": _r2((compared.error[:, joint] ** 2).mean(), variance[joint]),
            "trained_range": _figure(trained_range[joint]),
        }
        for joint, name in enumerate(names)
    }
    return total


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
    changes = {name: np.abs(np.diff(values, axis=0)).max(axis=1)[follows] for name, values in vars(compared).items() if name in _JUMPING}
    return {name: percentiles(values) for name, values in changes.items()}


_JUMPING = ("predicted", "recorded")


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


def _r2(mse: float, variance: float) -> float | None:
    """Share of the recorded actions' variance that the prediction explains; None where they do not vary."""
    return _figure(1 - mse / variance) if variance > _STILL else None


def _figure(value: float) -> float:
    return round(float(value), 3)
