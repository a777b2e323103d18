"""Recorded episodes as arrays, joints in one order, and what a policy that looks at nothing would have done.

Axis alphabet of this file: E episodes, T frames, J joints, D joint values of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.contracts import PartStatistics, PolicyFacts
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.observations import LeRobotFrames


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


def load(frames: LeRobotFrames, facts: PolicyFacts) -> Recorded:
    """Raises ConfigError when the policy's actions are not targets of the joints in its state, or the data set holds NaN."""
    absent = {part: width for part, width in facts.action_widths.items() if facts.state_widths.get(part) != width}
    if absent:
        raise ConfigError(
            f"the policy's action parts {dict(facts.action_widths)} are not its state parts {dict(facts.state_widths)}. The dry run compares "
            "targets with positions of the same joints, and cannot judge this checkpoint."
        )
    names = frames.names("action")
    layout = Layout(facts.action_widths, tuple(name for part in facts.action_widths for name in names[part]))
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


def describe(recorded: Recorded, facts: PolicyFacts) -> dict[str, Any]:
    """joint -> ranges of the recording (1 to 99 % and all) and of the checkpoint, and how much of the recording lies outside."""
    found: dict[str, Any] = {name: {} for name in recorded.layout.names}
    for kind, values, parts in (("state", recorded.states, facts.state_statistics), ("action", recorded.actions, facts.action_statistics)):
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
