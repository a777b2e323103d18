"""Does the recording fit the checkpoint? Units, joint order, ranges, rate and cameras, before anything is predicted.

What is found is evidence, not proof: it decides only where the predictions are poor. Axis alphabet: J joints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.open_loop_study.recorded import Recorded, outside_share
from gr00t_fast.contracts import SO100_JOINTS, PolicyFacts
from gr00t_fast.control.preflight import ASPECT_TOLERANCE, FPS_TOLERANCE, NORMALISED_LIMIT, RADIANS_LIMIT, SATURATED_EXTREMES, SATURATION_TOLERANCE
from gr00t_fast.export.observations import LeRobotFrames

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


def static_findings(recorded: Recorded, facts: PolicyFacts, frames: LeRobotFrames) -> list[Finding]:
    return [*_units(recorded, facts), *_order(recorded), *_ranges(recorded, facts), *_rate(frames, facts), *_cameras(frames, facts)]


def _trained(recorded: Recorded, facts: PolicyFacts) -> np.ndarray:
    """(2, J): lowest and highest value of states and actions together."""
    both = (facts.state_statistics, facts.action_statistics)
    low = np.min([recorded.layout.statistics(parts, "min") for parts in both], axis=0)
    return np.stack([low, np.max([recorded.layout.statistics(parts, "max") for parts in both], axis=0)])


def trained_range(recorded: Recorded, facts: PolicyFacts) -> np.ndarray:
    """(J,): the width of what is large or small for each joint, in the checkpoint's units."""
    low, high = _trained(recorded, facts)
    return np.maximum(high - low, _NARROW_SHARE * (high - low).max())


def _units(recorded: Recorded, facts: PolicyFacts) -> Iterator[Finding]:
    """Radians, fractions, and lerobot's normalised range. The last joint is the gripper where it is called so."""
    values = np.concatenate([recorded.states, recorded.actions])
    body = np.array([name != "gripper" for name in recorded.layout.names])
    trained, here = np.abs(_trained(recorded, facts)), np.abs(np.stack([values.min(axis=0), values.max(axis=0)]))
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


def _ranges(recorded: Recorded, facts: PolicyFacts) -> Iterator[Finding]:
    for kind, values, parts in (("state", recorded.states, facts.state_statistics), ("action", recorded.actions, facts.action_statistics)):
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


def _rate(frames: LeRobotFrames, facts: PolicyFacts) -> Iterator[Finding]:
    if frames.fps and facts.fps and abs(frames.fps / facts.fps - 1) > FPS_TOLERANCE:
        yield Finding(
            RATE,
            f"recorded at {frames.fps:g} frames/s, the checkpoint was trained at {facts.fps:g}: one action is {facts.fps / frames.fps:.2f} frames, "
            "and errors far ahead are those of the clock",
        )


def _cameras(frames: LeRobotFrames, facts: PolicyFacts) -> Iterator[Finding]:
    for key, camera in frames.cameras.items():
        trained = facts.resolutions.get(key.split(".", 1)[1])
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
