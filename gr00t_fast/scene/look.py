"""Live pictures and the arm's pose against a card: which camera is which, what was moved, the light, and what of it forbids a run.

A finding is (kind, text) as those of the pre-flight: a problem contradicts the data set, a warning is for the user to judge, a note says what is so.
Nothing is refused for want of evidence. Axis alphabet: J joints, H and W height and width of registration.SIZE.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal

import numpy as np

from gr00t_fast.scene.card import Card, Trained, measured
from gr00t_fast.scene.registration import IDENTITY, LEAST_BLOCKS, View, agreement, blurred, candidates, register, roughly, shrunk, warped

Finding = tuple[Literal["problem", "warning", "note"], str]
ASSUMED_VIEW_DEG = 60.0  # across the picture: webcams have 55 to 75
ASSUMED_DISTANCE_M = 0.5  # from camera to scene, for a way in centimetres
# What a shift of so many pixels of 640 cost the demo's network, of blocks reached (benchmarks/results/scene/success.json: moved to the right).
_DEMO = ((8.4, "19 of 20 blocks"), (25.2, "3 of 20 blocks"), (83.9, "1 of 20 blocks"))
FLOOR = {"shift": 2.0, "light": 0.15, "colour": 0.12, "covered": 0.08, "sharp": 0.6}  # less is not told
_TIMES = 1.5  # as much as the episodes vary by
_MUCH_LIGHT, _MUCH_COLOUR, _MUCH_COVERED, _MUCH_BLUR = (
    1.05,
    0.7,
    0.3,
    0.2,
)  # from here on a warning, not a note
_SURE = 0.3  # of the way from the score of chance to that of an episode: from here on it is the same scene
_SURER = 0.7  # the same of a camera whose own place could not be looked at
_MARGIN = 0.15  # by so much must another order of the cameras, or a turned picture, agree better
_ALIEN, _SOME = 0.1, 0.15  # another scene: no more than so much above chance, and a smaller share of the blocks the same
_APART = 0.2  # by so much must episodes agree better than chance, or nothing can be told by them
_BLACK, _BLIND = 12, 0.1  # mean level of 255, usable share: less shows nothing
_POSE_DEG = 5.0  # from where episodes begin, beyond what they vary by
_MOUNTED_DEG = 2.0  # the same for a camera that moves with the arm: more, and its picture is another one
_ASPECT = 0.02
_WIDE = 24.0  # pixels: colours that vary over more are those of the light
_LEAST_AREA = 0.25  # of a picture that was zoomed
_TURNS = {90: ("turned a quarter", -90), 180: ("upside down", 180), 270: ("turned a quarter", 90)}  # clockwise; lerobot's way back


@dataclass(frozen=True)
class Place:
    """How a live picture fits a trained one best."""

    score: float
    place: np.ndarray
    mirrored: bool
    turn: int  # 0, 90, 180 or 270 degrees

    @property
    def straight(self) -> bool:
        return not self.mirrored and not self.turn


@dataclass
class Look:
    """findings in the order of their weight. For each camera: measures (card.measured), its place (3, 3) upon the recorded picture, and uint8 RGB
    (H, 3 W, 3): the recorded picture, the live one, their difference."""

    findings: list[Finding] = field(default_factory=list)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    places: dict[str, np.ndarray] = field(default_factory=dict)


def look(card: Card, frames: Mapping[str, np.ndarray], camera_map: Mapping[str, str], joints: np.ndarray | None = None, led: bool = False) -> Look:
    """frames: the robot's camera -> uint8 RGB (height, width, 3) of any size. camera_map: {robot camera: policy camera}. joints (J,) in the units of
    the card; None: not known. led: the arm is moved slowly to where it begins."""
    found, away = Look([("note", f"the recordings {card.name}: {note}.") for note in card.notes]), None
    if joints is not None and joints.shape == card.begin.shape:
        away = np.maximum(np.abs(joints - card.begin) - card.begin_spread, 0)
        found.findings += _pose(card, joints, away, led)
    views, judged = dict[str, View](), dict[str, Trained]()
    robots = [name for name in frames if name in camera_map] or list(frames)
    for robot in robots:
        camera = of_policy(card, camera_map.get(robot, robot), len(robots) == 1)
        if why := _unfit(card, camera, frames[robot], away):
            found.findings.append(("note", f"camera '{robot}' cannot be compared with the recordings: {why}."))
        elif camera is not None:
            views[robot], judged[robot] = View.of(shrunk(frames[robot])), camera
    pool = ThreadPoolExecutor(2)  # OpenCV lets other threads run meanwhile
    places = dict(zip(((robot, robot) for robot in judged), pool.map(_best, judged.values(), views.values()), strict=True))
    slots = [robot for robot in judged if places[robot, robot][0].score <= 1 - _MARGIN]
    asked = [robot for robot in frames if robot in slots or robot not in judged] if slots else []  # also one that cannot be judged at its own place
    others = {robot: views.get(robot) or View.of(shrunk(frames[robot])) for robot in asked}
    pairs = [(robot, slot) for robot in others for slot in slots if robot != slot]
    places |= zip(pairs, pool.map(lambda pair: _best(judged[pair[1]], others[pair[0]]), pairs), strict=True)
    moved = _exchanged(places, judged, slots, list(others))
    own = [robot for robot in judged if robot not in moved]
    for findings in pool.map(lambda robot: [*_judge(robot, judged[robot], views[robot], places[robot, robot], found)], own):
        found.findings += findings
    pool.shutdown()
    found.pictures |= {robot: side_by_side(judged[robot], views[robot]) for robot in moved}
    if moved:
        right = {robot: policy for robot, policy in camera_map.items() if robot not in {*moved, *moved.values()}}
        new = {robot: camera_map.get(slot, slot) for slot, robot in moved.items()}
        which = ", ".join(f"'{robot}' shows what the policy knows as '{new[robot]}'" for robot in frames if robot in new)
        left = [camera_map[robot] for robot in new if robot in camera_map and camera_map[robot] not in new.values()]
        new |= zip([slot for slot in moved if slot not in new], left, strict=False)  # of a pair of which one alone could be judged
        whole = {robot: (right | new)[robot] for robot in frames if robot in right | new}
        found.findings.append(("problem", f"cameras are exchanged: {which}. Use {_camera_map_flag(whole)}."))
    found.findings.sort(key=lambda each: ("problem", "warning", "note").index(each[0]))
    return found


def of_policy(card: Card, name: str, alone: bool) -> Trained | None:
    """The data set's camera that the policy calls `name`. alone: the robot has no other one, and a single camera on both sides needs no name."""
    cameras = list(card.cameras.values())
    named = [camera for camera in cameras if camera.policy == name] + [camera for camera in cameras if camera.name == name]
    return next(iter(named or (cameras if alone and len(cameras) == 1 else ())), None)


def _camera_map_flag(names: Mapping[str, str]) -> str:
    """As it can be pasted into a shell: YAML and the shell each read some characters as their own."""
    import yaml

    text = yaml.safe_dump(dict(names), default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False).strip()
    return "--camera_map=" + (shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"')


def _unfit(card: Card, camera: Trained | None, frame: np.ndarray, away: np.ndarray | None) -> str:
    """Why a camera cannot be judged; empty where it can. away (J,): how far each joint is from where episodes begin; None: not known."""
    if camera is None:
        return f"the data set has {', '.join(card.cameras) or 'no pictures'}, and which of them this is is not known"
    if abs(frame.shape[1] * camera.size[1] / (frame.shape[0] * camera.size[0]) - 1) > _ASPECT:
        return f"it delivers {frame.shape[1]}x{frame.shape[0]}, the data set has {camera.size[0]}x{camera.size[1]}: another aspect ratio"
    if camera.moves and (away is None or away.max() > _MOUNTED_DEG):
        off = "how the arm stands is not known" if away is None else f"{card.joints[int(away.argmax())]} is {away.max():.0f} off"
        return f"it moves during the recordings, and {off}: move the arm to where they begin, and look again"
    if agreement(camera.view, camera.view, IDENTITY)[1].sum() < LEAST_BLOCKS:
        return "nearly all of its picture varies from episode to episode, or is plain"
    if camera.varies.get("score", 1.0) < camera.chance + _APART:
        return "its episodes agree among themselves hardly better than with a picture turned over: it was moved between them, or they vary"
    return ""


def _best(trained: Trained, live: View) -> list[Place]:
    """The best place of each kind, as it is or turned, mirrored or not, the best first; up to one that no other could better by the margin."""
    found: dict[tuple[bool, int], Place] = {}
    for mirrored, view in ((False, live), (True, live.mirrored())):
        for begun in candidates(trained.view, view):
            score, place = roughly(trained.view, view, begun)
            if not _LEAST_AREA < np.linalg.det(place[:2, :2]) < 1 / _LEAST_AREA:
                continue  # turned inside out, as wood grain may be matched: the mirrored picture is looked at, too; or shrunk to nothing
            turn = round(np.rad2deg(np.arctan2(place[1, 0] - place[0, 1], place[0, 0] + place[1, 1])) / 90) % 4 * 90
            if (kind := (mirrored, turn)) not in found or score > found[kind].score:
                found[kind] = Place(score, place, mirrored, turn)
            if score > 1 - _MARGIN:
                break
        else:
            continue
        break
    return sorted(found.values(), key=lambda each: -each.score)


def _sure(trained: Trained, share: float = _SURE) -> float:
    """The score from which on a picture is certainly of this camera's scene."""
    return trained.chance + share * (trained.varies.get("score", 1.0) - trained.chance)


def _exchanged(places: Mapping[tuple[str, str], list[Place]], judged: Mapping[str, Trained], slots: list[str], robots: list[str]) -> dict[str, str]:
    """Robot camera -> the one that shows what it should; only where each of these agrees clearly better."""
    orders = [dict(zip(slots, order, strict=True)) for order in permutations(robots, len(slots))]
    best = max(orders, key=lambda order: sum(places[robot, slot][0].score for slot, robot in order.items()))
    moved = {slot: robot for slot, robot in best.items() if slot != robot}
    sure = {slot: _sure(judged[slot], _SURE if robot in judged else _SURER) for slot, robot in moved.items()}
    least = {slot: max(places[slot, slot][0].score + _MARGIN, sure[slot]) for slot in moved}
    return moved if all(places[robot, slot][0].score > least[slot] for slot, robot in moved.items()) else {}


def _judge(robot: str, trained: Trained, live: View, places: list[Place], found: Look) -> Iterator[Finding]:
    """One camera, at its own place."""
    best = max(places, key=lambda each: each.score + _MARGIN * each.straight)
    what = f"camera '{robot}'"
    if best.mirrored:
        live = live.mirrored()
    place = found.places[robot] = register(trained.view, live, best.place) if best.score > trained.chance else best.place
    seen = found.measures[robot] = measured(trained, live, place)
    if live.picture.max(-1).mean() < _BLACK or live.usable.mean() < _BLIND:
        yield "warning", f"{what} is black or white nearly everywhere: covered, or without light. It cannot be compared with the recordings."
    elif max(best.score, seen["score"]) < _sure(trained):
        if trained.varies and max(best.score, seen["score"]) <= trained.chance + _ALIEN and seen["same"] < _SOME:
            text = f"{what} shows another scene than the recordings, or was moved far: it agrees with them no better than a picture turned over"
            yield "problem", f"{text}. Compare the pictures; put the camera where it was, or give the recordings of this scene."
        else:
            text = f"{what} agrees poorly with the recordings ({seen['score']:.2f}, episodes {trained.varies.get('score', 1):.2f})"
            yield "warning", f"{text}: moved far, covered in part, or another scene. Compare the pictures."
    elif not best.straight:
        how = " and ".join([*(["mirrored"] if best.mirrored else []), *([_TURNS[best.turn][0]] if best.turn else [])])
        turn = f"Set rotation: {_TURNS[best.turn][1]} in --robot.cameras (added to what is set there)" if best.turn else ""
        flip = "Switch mirroring off in the camera's driver (v4l2-ctl --set-ctrl=horizontal_flip=0)" if best.mirrored else ""
        yield "problem", f"{what} is {how}. {'. '.join(filter(None, (turn, flip)))}."
    elif _colours_exchanged(trained, live, place):
        yield "problem", f"{what} has red and blue exchanged. Set its color_mode to the other one, rgb or bgr, in --robot.cameras."
    else:
        yield from _moved(what, trained, seen)
        yield from _light(what, trained, seen)
    found.pictures[robot] = side_by_side(trained, live)


def _limit(trained: Trained, measure: str, floor: float) -> float:
    return max(floor, _TIMES * trained.varies.get(measure, 0.0))


def most_shift(trained: Trained) -> float:
    """By how many pixels of its own size a camera's picture may be off without a finding."""
    return _limit(trained, "shift", FLOOR["shift"] * trained.size[0] / 640)


def _moved(what: str, trained: Trained, seen: Mapping[str, float]) -> Iterator[Finding]:
    if seen["shift"] <= most_shift(trained):
        return
    varied = f"episodes vary by {trained.varies['shift']:.1f}" if trained.varies else "of one episode it is not known how much they vary"
    off = f"off by {seen['shift']:.0f} pixels ({varied}), {seen['shift'] * _degrees(trained):.1f} degrees if the lens sees {ASSUMED_VIEW_DEG:.0f}"
    lost = [rate for pixels, rate in _DEMO if seen["shift"] * 640 / trained.size[0] >= pixels][-1:]
    told = f" So far off sideways, the demo's network reached {lost[0]}." if lost else ""
    yield "warning", f"{what} was moved, turned or zoomed: its picture is {off}.{told} Back: {'; '.join(ways_back(trained, seen))}."


def ways_back(trained: Trained, seen: Mapping[str, float]) -> list[str]:
    """What to do with a camera that was moved, as seen from behind it, the largest part first. seen: as Look.measures has it."""
    corner = np.hypot(*trained.size) / 2

    def turned(pixels: float, arrow: str, way: str) -> str:
        angle = abs(pixels) * _degrees(trained)
        return f"{arrow} turn it {angle:.1f} degrees {way}, or move it {100 * ASSUMED_DISTANCE_M * np.tan(np.deg2rad(angle)):.1f} cm {way}"

    parts = {
        turned(seen["right"], *("→", "to the right") if seen["right"] > 0 else ("←", "to the left")): abs(seen["right"]),
        turned(seen["down"], *("↓", "down") if seen["down"] > 0 else ("↑", "up")): abs(seen["down"]),
        f"{'↻' if seen['roll'] > 0 else '↺'} roll it {abs(seen['roll']):.1f} degrees {'' if seen['roll'] > 0 else 'counter'}clockwise": (
            np.deg2rad(abs(seen["roll"])) * corner
        ),
        f"{'⊖ move it away' if seen['zoom'] > 0 else '⊕ move it nearer'} by {abs(seen['zoom']):.1%}": abs(seen["zoom"]) * corner,
    }
    most = max(parts.values())
    return [text for text, size in sorted(parts.items(), key=lambda each: -each[1]) if size >= max(1.0, most / 3)]


def _degrees(trained: Trained) -> float:
    """A pixel in the middle of the picture."""
    return ASSUMED_VIEW_DEG / trained.size[0]


def _light(what: str, trained: Trained, seen: Mapping[str, float]) -> Iterator[Finding]:
    kind: Literal["warning", "note"]
    light, factor = abs(seen["light"]), float(np.exp(seen["light"]))
    if light > _limit(trained, "light", FLOOR["light"]):
        text = f"{what} is {'brighter' if factor > 1 else 'darker'} than in the recordings: {factor:.2f} times"
        yield "warning" if light > _MUCH_LIGHT else "note", f"{text}. Check lamps, daylight and exposure."
    tint = {name: seen[name] for name in ("red", "blue") if abs(seen[name]) > _limit(trained, name, FLOOR["colour"])}
    if tint:
        said = ", ".join(f"{name} {np.exp(value):.2f} times" for name, value in tint.items())
        kind = "warning" if max(map(abs, tint.values())) > _MUCH_COLOUR else "note"
        yield kind, f"{what} has other colours: {said}. Check lamps and white balance."
    if seen["shift"] > most_shift(trained):  # these are then of other parts of the scene
        return
    if seen["sharp"] < FLOOR["sharp"] * trained.varies.get("sharp", 1.0):
        kind = "warning" if seen["sharp"] < _MUCH_BLUR else "note"
        yield kind, f"{what} is out of focus: {seen['sharp']:.0%} of the fine detail is there. Check focus and lens."
    if seen["covered"] > _limit(trained, "covered", 0) + FLOOR["covered"]:
        kind = "warning" if seen["covered"] > _MUCH_COVERED else "note"
        yield kind, f"{what}: about {seen['covered']:.0%} of it shows something else: something before the lens, new things, the arm elsewhere."


def _colours_exchanged(trained: Trained, live: View, place: np.ndarray) -> bool:
    """Whether red and blue vary over the picture as they did, one for the other; their ratio alone would be the colour of the light."""
    both = trained.view.usable & warped(live.usable, place)
    upon = warped(live.picture, place)
    both &= blurred(((upon > 8) & (upon < 245)).all(-1), 2) > 0.95
    if both.sum() < 0.3 * trained.view.usable.sum():  # in a glaring light only grey things keep their colours
        return False
    ratios = [blurred(log[..., 0] - log[..., 2], 2) for log in (np.log(each.astype(np.float32) + 8) for each in (trained.median, upon))]
    fine = [ratio - blurred(ratio, _WIDE) for ratio in ratios]  # without lamps and windows that colour one side of the picture
    pairs = [(one[both], other[both]) for one, other in (ratios, fine)]
    return all(float(one.std()) > 0.05 and float(np.corrcoef(one, other)[0, 1]) < -0.15 for one, other in pairs)


def _pose(card: Card, joints: np.ndarray, away: np.ndarray, led: bool) -> Iterator[Finding]:
    far = [f"{name} at {joints[n]:.0f}, recordings begin at {card.begin[n]:.0f}" for n, name in enumerate(card.joints) if away[n] > _POSE_DEG]
    if far:
        way = "It is led there slowly" if led else "Let it be led there: --home=recordings"
        yield "note" if led else "warning", f"the arm does not stand where the recordings begin: {'; '.join(far)}. {way}."


def side_by_side(trained: Trained, live: View) -> np.ndarray:
    """uint8 RGB (H, 3 W, 3): training's median, the live picture, and where they differ at the same mean brightness."""
    gain = (trained.median.mean() + 1) / (live.picture.mean() + 1)
    away = np.abs(trained.median.astype(np.float32) - live.picture * gain)
    return np.hstack([trained.median, live.picture, np.clip(2 * away, 0, 255).astype(np.uint8)])
