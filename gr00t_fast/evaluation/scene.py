"""The scene card of a data set, made or found, and what a look at the arm's cameras says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, Gr00tFastError, MissingExtraError
from gr00t_fast.inputs.dataset import RecordedPictures, Recordings, read_recordings
from gr00t_fast.scene.card import CARD_NAME, MOST_EPISODES, Card, Trained, learn, load_card, with_chance
from gr00t_fast.scene.registration import shrunk

_FILMED_LATER = 6  # episodes of which a later frame says whether the camera moves


def card_path(directory: Path) -> Path:
    """Where the card of a data set lies."""
    return directory / "meta" / CARD_NAME


def card_of(source: Path, joint_names: tuple[str, ...], tell: Callable[[str], None]) -> Card:
    """A file of a card, or a data set -> the card that lies in it, or one that is made now, in seconds. Raises ConfigError where there is neither,
    or one of another arm; MissingExtraError without pyarrow."""
    if source.is_dir():
        recordings = read_recordings(source, joint_names)
        if (path := card_path(source)).is_file() and (card := load_card(path)).episodes == recordings.episodes:
            return card
        tell(f"looking at the pictures of {source}; `gr00t-fast scene --dataset={source}` keeps what they say for the next time ...")
        return build_card(source, recordings)
    if not source.is_file():
        raise ConfigError(f"--recordings={source}: nothing is there. Name the directory of a LeRobotDataset, or a card of `gr00t-fast scene`.")
    card = load_card(source)
    if card.joints != joint_names:
        told = f"the card has joints {', '.join(card.joints)}, the arm {', '.join(joint_names)}"
        raise ConfigError(f"--recordings={source}: {told}. Name recordings of this kind of arm.")
    return card


def build_card(directory: Path, recordings: Recordings | None = None, joint_names: tuple[str, ...] = SO100_JOINTS) -> Card:
    """Decodes a frame or two of up to MOST_EPISODES episodes; what cannot be decoded is among the card's notes. Raises ConfigError where there is no
    data set of this arm, MissingExtraError without pyarrow."""
    recordings = recordings or read_recordings(directory, joint_names)
    pictures, notes, cameras = RecordedPictures(directory), list[str](), dict[str, Trained]()
    chosen = np.unique(np.linspace(0, recordings.episodes - 1, MOST_EPISODES).round().astype(int)).tolist()
    with progress_bar("pictures of the recordings", len(pictures.cameras) * 2 * len(chosen)) as tick:
        for name, camera in pictures.cameras.items():
            first, later, damaged = list[np.ndarray](), list[np.ndarray](), list[Gr00tFastError]()
            for episode in chosen:
                try:
                    begun = shrunk(pictures.picture(name, episode, 0))
                    if len(later) < _FILMED_LATER:
                        later.append(shrunk(pictures.picture(name, episode, recordings.lengths[episode] // 2)))
                    first.append(begun)
                except (ConfigError, MissingExtraError) as error:
                    damaged.append(error)
                tick()
            notes += [f"camera '{name}': {len(damaged)} of {len(chosen)} episodes could not be decoded: {damaged[0]}"] if damaged else []
            if first:
                cameras[name] = learn(name, camera.size, first, later, camera.policy, tick)
    cameras = with_chance(cameras)
    notes += [] if cameras else ["no pictures: only speeds and the arm's pose can be compared"]
    notes += ["a single episode does not say how much episodes vary: fixed limits judge small changes"] if len(chosen) == 1 else []
    notes += [f"camera '{name}' moves during episodes: it is compared where they begin" for name, camera in cameras.items() if camera.moves]
    begin, offset = recordings.begin, np.median(recordings.actions - recordings.states, axis=0)
    spread = np.abs(recordings.states - begin).max(axis=0)
    facts = (directory.absolute().name, recordings.episodes, joint_names, begin, spread, recordings.fastest_units_s, offset)
    return Card(*facts, cameras, tuple(notes))


def as_lines(card: Card) -> list[str]:
    """What a card says, for people."""

    def joints(values: np.ndarray) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in zip(card.joints, values, strict=True))

    lines = [f"{card.name}: {card.episodes} episodes", f"they begin at {joints(card.begin)}", f"differing by up to {joints(card.begin_spread)}"]
    lines += [f"leader less follower there: {joints(card.rest_offset)}"]
    for camera in card.cameras.values():
        known = f"as the policy's '{camera.policy}', " if camera.policy else ""
        moved = f"episodes vary by {camera.varies['shift']:.1f} pixels" if camera.varies else "one episode"
        lines += [f"camera '{camera.name}' {known}{camera.size[0]}x{camera.size[1]}: {moved}, {camera.steady.mean():.0%} of the picture is steady"]
    return [*lines, *(f"note: {note}" for note in card.notes)]


def told(measures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """JSON-ready figures of a look."""
    return {camera: {name: round(value, 4) for name, value in row.items()} for camera, row in measures.items()}
