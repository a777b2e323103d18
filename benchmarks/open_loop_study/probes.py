"""What if? Poor predictions are made again with one thing changed: a mistake that is undone that way is found.

Each question is put to the same few frames with the same noise. Axis alphabet: J joints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.open_loop_study.checks import CAMERAS, UNITS
from benchmarks.open_loop_study.recorded import Episode
from benchmarks.open_loop_study.rollout import Observation, Rollout
from benchmarks.program import show_progress

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
