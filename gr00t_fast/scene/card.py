"""The card of a data set: what its cameras saw, and where its arm stood, when the episodes began. One small file, without pickle.

How far episodes differ among themselves is measured on each episode against the card of the others; by that a live picture is judged.
Axis alphabet: E episodes, J joints, H and W height and width of registration.SIZE, N blocks of a picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.scene.registration import CENTRES, IDENTITY, SIZE, View, agreeing, agreement, at, blurred, register, roughly, score, shift_of, warped

CARD_NAME, VERSION = "scene_card.npz", 1
MAX_BYTES = 1_000_000
MOST_EPISODES = 40  # spread over the data set: more cost time and tell little
_STEADY_SHARE, _STEADY_LEVELS = 1.5, 4.0  # a pixel varies that differs by more than so many times the usual, and so many levels of 255
_SAME = 0.6  # correlation of a block; chance seldom reaches it
_SAME_BLOCK, _SAME_SHARE = 0.5, 0.5  # a camera that stands still shows most of its picture unchanged in the middle of an episode


@dataclass(frozen=True)
class Trained:
    """A camera of the data set. size: width and height of its pictures. median uint8 (H, W, 3), steady bool (H, W): where episodes do not vary.
    moves: the camera moves within an episode, as one on the wrist does. policy: its name in the checkpoint, where the data set says it."""

    name: str
    size: tuple[int, int]
    median: np.ndarray
    steady: np.ndarray
    moves: bool | None = None
    policy: str = ""
    varies: Mapping[str, float] = field(default_factory=dict)  # by measure, the most but one of twenty episodes; empty for a single episode
    chance: float = 0.0  # the best score of its picture turned, mirrored, or of another camera

    @cached_property
    def view(self) -> View:
        whole = View.of(self.median)
        return View(self.median, whole.usable & self.steady)

    @property
    def scale(self) -> float:
        """Pixels of the camera per pixel of the card."""
        return float(np.hypot(*self.size) / np.hypot(*SIZE))


@dataclass(frozen=True)
class Card:
    """begin (J,): median of the first measured joints; begin_spread (J,): their largest distance from it; fastest_units_s (J,): the largest change of
    a target; rest_offset (J,): median of first target minus first measured joint, by which the leader is off the follower at rest."""

    name: str
    episodes: int
    joints: tuple[str, ...]
    begin: np.ndarray
    begin_spread: np.ndarray
    fastest_units_s: np.ndarray
    rest_offset: np.ndarray
    cameras: Mapping[str, Trained]
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be written."""
        import cv2

        facts: dict[str, Any] = {"version": VERSION, "name": self.name, "episodes": self.episodes, "joints": self.joints, "notes": self.notes}
        arrays = {name: getattr(self, name) for name in ("begin", "begin_spread", "fastest_units_s", "rest_offset")}
        facts["cameras"] = [{k: v for k, v in asdict(camera).items() if k not in ("median", "steady")} for camera in self.cameras.values()]
        for number, camera in enumerate(self.cameras.values()):
            for what, picture in (("median", camera.median[..., ::-1]), ("steady", camera.steady.astype(np.uint8) * 255)):
                arrays[f"{what}{number}"] = cv2.imencode(".png", np.ascontiguousarray(picture), [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
        file = io.BytesIO()
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)
        if file.tell() > MAX_BYTES:
            raise ConfigError(f"{path}: the card of {len(self.cameras)} cameras takes {file.tell()} bytes, more than {MAX_BYTES}. Leave some out.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}. Name another file with --out.") from error


def load_card(path: Path) -> Card:
    """Raises ConfigError for a file that is no card."""
    import cv2

    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes")
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            if facts.pop("version") != VERSION:
                raise ValueError("a card of another version")
            cameras = {}
            for number, told in enumerate(facts.pop("cameras")):
                median = cv2.imdecode(file[f"median{number}"], cv2.IMREAD_COLOR)[..., ::-1]
                steady = cv2.imdecode(file[f"steady{number}"], cv2.IMREAD_GRAYSCALE) > 0
                if median.shape != (*SIZE[::-1], 3) or steady.shape != SIZE[::-1]:
                    raise ValueError(f"a picture of {median.shape}")
                told |= {"size": tuple(map(int, told["size"])), "chance": float(told["chance"])}
                told["varies"] = {measure: float(value) for measure, value in told["varies"].items()}
                figures, known = [told["chance"], *told["varies"].values()], not told["varies"] or {"shift", "score"} <= told["varies"].keys()
                if len(told["size"]) != 2 or min(told["size"]) < 1 or not (known and np.isfinite(figures).all()):
                    raise ValueError(f"camera '{told['name']}' has figures that cannot be")
                cameras[told["name"]] = Trained(median=np.ascontiguousarray(median), steady=steady, **told)
            arrays = {name: np.asarray(file[name], np.float64) for name in ("begin", "begin_spread", "fastest_units_s", "rest_offset")}
            card = Card(**facts | {name: tuple(facts[name]) for name in ("joints", "notes")}, cameras=cameras, **arrays)
    except Exception as error:  # the readers of zip, npy, JSON and PNG raise many kinds for a file that is damaged
        why = f"{type(error).__name__}: {str(error)[:80]}"
        raise ConfigError(f"{path} is no scene card of this version ({why}). Make one: gr00t-fast scene --dataset=DIR") from error
    if any(array.shape != (len(card.joints),) or not np.isfinite(array).all() for array in arrays.values()):
        raise ConfigError(f"{path}: joints are missing or not finite. Make the card again: gr00t-fast scene --dataset=DIR")
    return card


def learn(
    name: str,
    size: tuple[int, int],
    first: Sequence[np.ndarray],
    later: Sequence[np.ndarray],
    policy: str = "",
    tick: Callable[[], None] = lambda: None,
) -> Trained:
    """A camera from the first pictures of E episodes, and later ones of the first few of these; uint8 (H, W, 3). `tick` after each episode."""
    stack = np.stack(first)
    camera, ordered, half = _median_of(name, size, stack, policy), np.sort(stack, axis=0), (len(first) - 1) // 2
    same = []
    for begun, after in zip(first, later, strict=False):
        correlation, tells = agreement(View.of(begun), View.of(after), IDENTITY)
        same += [(correlation[tells] > _SAME_BLOCK).mean()] if tells.any() else []
    moves = bool(np.median(same) < _SAME_SHARE) if same else None
    rows = []
    for picture in first:
        if len(first) > 1:
            others = replace(camera, median=np.where(picture <= ordered[half], ordered[half + 1], ordered[half]))  # without this picture
            rows.append(measured(others, View.of(picture), register(others.view, View.of(picture), IDENTITY)))
        tick()
    varies = {key: float(np.quantile([abs(row[key]) for row in rows], 0.95)) for key in (rows[0] if rows else ())}
    if rows:
        varies["score"] = float(np.quantile([row["score"] for row in rows], 0.05))
    return Trained(name, size, camera.median, camera.steady, moves, policy, varies)


def with_chance(cameras: Mapping[str, Trained]) -> dict[str, Trained]:
    """The cameras, each with the score that pictures get which are certainly wrong."""
    found = {}
    for name, camera in cameras.items():
        turned = View.of(np.ascontiguousarray(camera.median[::-1, ::-1]))
        wrong = [turned, View.of(camera.median).mirrored(), *(View.of(other.median) for other in cameras.values() if other is not camera)]
        scores = [roughly(camera.view, each, IDENTITY)[0] for each in wrong]
        found[name] = replace(camera, chance=max(0.0, *scores))
    return found


def _median_of(name: str, size: tuple[int, int], stack: np.ndarray, policy: str) -> Trained:
    """stack uint8 (E, H, W, 3). Episodes in another light count as the same: what varies is judged at the same mean."""
    median = np.median(stack, axis=0).astype(np.uint8)
    gains = (median.mean((0, 1)) + 1) / (stack.mean((1, 2)) + 1)  # (E, 3)
    away = np.abs(stack * gains[:, None, None] - median).max(-1)  # (E, H, W)
    away = blurred(np.quantile(away, 0.9, axis=0), 1.5)
    return Trained(name, size, median, away <= _STEADY_SHARE * np.median(away) + _STEADY_LEVELS, policy=policy)


def measured(trained: Trained, live: View, place: np.ndarray) -> dict[str, float]:
    """A live picture at its place against the card. shift in pixels of the camera and its parts (registration.shift_of), of blocks that agree; light,
    red, blue: natural logarithms of how much brighter, and redder and bluer than green; sharp: share of the fine detail that is there; covered: share
    of the blocks that show something else, same: that surely show the same; score."""
    correlation, tells = agreement(trained.view, live, place)
    shift, parts = shift_of(at(place, CENTRES), agreeing(trained.view, live, place))
    best = score(trained.view, live, place)
    ways = {"right": parts["right"] * trained.scale, "down": parts["down"] * trained.scale, "roll": parts["roll"], "zoom": parts["zoom"]}
    upon, usable = warped(live.picture, place), warped(live.usable, place)
    both = usable & trained.view.usable & ~((upon >= 250).any(-1) & (trained.median < 250).all(-1))
    if both.sum() < 500:
        both = usable & trained.view.usable
    away = np.log(upon.astype(np.float32) + 4) - np.log(trained.median.astype(np.float32) + 4)
    red, green, blue = (float(np.median(away[..., channel][both])) if both.any() else 0.0 for channel in range(3))
    covered, same = (float((correlation[tells] < best / 2).mean()), float((correlation[tells] > _SAME).mean())) if tells.any() else (1.0, 0.0)
    colour = {"light": green, "red": red - green, "blue": blue - green}
    return {
        "shift": shift * trained.scale,
        **ways,
        **colour,
        "sharp": _sharpness(trained, upon, both),
        "covered": covered,
        "same": same,
        "score": best,
    }


def _sharpness(trained: Trained, upon: np.ndarray, both: np.ndarray) -> float:
    """Fine detail by coarse detail that the live picture shares with the trained one; noise, which shares nothing, does not count."""

    def shares(narrow: float, wide: float) -> float:
        one, other = (blurred(grey, narrow) - blurred(grey, wide) for grey in (trained.median.mean(-1), upon.mean(-1)))
        return float((one * other)[both].sum() / max((one * one)[both].sum(), 1e-6))

    return shares(0.5, 1.0) / max(shares(2.0, 4.0), 0.05)
