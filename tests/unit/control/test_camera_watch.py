"""Cameras that deliver pictures without information."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from control_fakes import TICK_S, Bench

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import RobotError
from gr00t_fast.control.camera_watch import CameraWatch

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:240, :320]
SCENE = np.stack([X * 0.5 + 40, Y * 0.7 + 20, (X + Y) * 0.3], -1)  # (240, 320, 3)


def sensor(noise: float = 4.0, level: float = 1.0) -> np.ndarray:
    """A picture as a real camera makes it: never twice the same."""
    return np.clip(SCENE * level + RNG.normal(0, noise, SCENE.shape), 0, 255).astype(np.uint8)


def watch(frame: Callable[[int], np.ndarray], moving: bool = True, ticks: int = 150, action: str = "warn") -> tuple[list[str], dict[str, int]]:
    said: list[str] = []
    cameras = CameraWatch(action, said.append)
    for tick in range(ticks):
        joints = np.full(6, 0.5 * tick if moving else 0.0)
        cameras(Observation(joints, {"front": frame(tick)}, 100 + tick * TICK_S))
    return said, dict(cameras.events)


STILL = sensor()


def with_a_mover(tick: int) -> np.ndarray:
    picture = STILL.copy()
    picture[101:113, 37 + tick : 77 + tick] = 250
    return picture


FAULTS = {
    "blank": lambda tick: RNG.integers(0, 20, SCENE.shape, np.uint8),
    "dead green": lambda tick: np.array([0, 135, 0], np.uint8) + RNG.integers(0, 2, SCENE.shape, np.uint8),
    "noise": lambda tick: RNG.integers(0, 256, SCENE.shape, np.uint8),
    "frozen": lambda tick: STILL,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_blind_camera_is_said_once(fault: str) -> None:
    said, events = watch(lambda tick: sensor() if tick < 30 else FAULTS[fault](tick))
    assert events == {f"camera_{fault if fault in ('noise', 'frozen') else 'blank'}": 1}
    assert len(said) == 1
    assert "front" in said[0]
    with pytest.raises(RobotError, match="front"):
        watch(FAULTS[fault], action="land")


def pattern(bright: np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda tick: np.repeat((bright * 255)[..., None].astype(np.uint8), 3, 2) - np.uint8(tick % 3)


ORDINARY = {
    "ordinary": lambda tick: sensor(),
    "grainy": lambda tick: sensor(noise=25.0),
    "dim": lambda tick: sensor(level=0.2),
    "a white wall": lambda tick: (240 - 0.03 * SCENE + RNG.integers(0, 3, SCENE.shape)).astype(np.uint8),
    "a drawn scene at rest": lambda tick: STILL,
    "a hand before the lens": lambda tick: FAULTS["blank"](tick) if tick % 30 < 20 else sensor(),
    "two pictures a second": lambda tick: np.roll(STILL, tick // 15, axis=1),
    "a drawn mover": with_a_mover,
    "stripes": pattern((X // 3) % 2),
    "a fine checker": pattern((X + Y) % 2),
}


@pytest.mark.parametrize("what", ORDINARY)
def test_an_ordinary_camera_is_not_suspected(what: str) -> None:
    assert watch(ORDINARY[what], moving=what != "a drawn scene at rest") == ([], {})


@pytest.mark.parametrize("rate_hz", [30, 15, 10, 4, 3])
def test_a_camera_that_is_slower_than_the_arm_is_said_once_and_its_age_reported(rate_hz: int) -> None:
    bench = Bench(timeout_s=8.0)
    seen = bench.robot.observe
    bench.robot.observe = lambda *_: replace(seen(), frame_ages_s={"front": bench.clock.now_s() % (1 / rate_hz)})
    bench.loop.run()
    too_slow = rate_hz <= 4
    assert bench.loop.trace.events.get("camera_old", 0) == too_slow
    assert sum("front" in line and "0.15 s" in line for line in bench.said) == too_slow
    assert max(bench.loop.trace.stages_ms["frame age/front"]) == pytest.approx(1000 / rate_hz, abs=1000 * TICK_S)


@pytest.mark.parametrize("action", ["warn", "land"])
def test_the_loop_says_it_and_counts_it_and_lands_by_choice(action: str) -> None:
    bench = Bench(timeout_s=4.0, camera_fault=action)
    seen = bench.robot.observe
    bench.robot.observe = lambda *_: replace(seen(), frames={"front": np.zeros((96, 128, 3), np.uint8)})
    with pytest.raises(RobotError, match="camera 'front'") if action == "land" else contextlib.nullcontext():
        bench.loop.run()
    assert bench.robot.calls[-1] == "land"
    assert bench.loop.trace.events["camera_blank"] == 1
    assert sum("camera 'front'" in line for line in bench.said) == (action == "warn"), "an error is said by the program's end"
