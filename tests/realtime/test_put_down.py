"""Where the arm is when its torque goes off: a real driver on the virtual bus, behind it a simulated arm that gravity pulls down. Real time.

In virtual time, tests/unit/control/test_homing.py shows more of what ends a run.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")
pytest.importorskip("mujoco")

from arm_bench import OFF, Camera, make_arm, real_time_loop, true_joints
from waiting import until

from gr00t_fast.base.errors import CameraError, InferenceTimeoutError, RobotError
from gr00t_fast.base.signals import FURTHER_AFTER_S, StopSignals
from gr00t_fast.control.limits import Poses, SafetyOptions
from gr00t_fast.robots.calibration import to_units
from gr00t_fast.robots.feetech import Register
from gr00t_fast.virtual.bus import VirtualBus
from gr00t_fast.virtual.sim.simulation import ScenePlant

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

REACHED = np.array([25.0, -45.0, 20.0, 45.0, -60.0, 40.0])  # where the policy takes the arm: high above the table
NEAR_DEG = 5.0
PLAYED_S = 0.8  # until something happens; by then the arm is well away from where it lay


class Stand:
    """A run on an arm that lies on its table. `lay`: where; `let_go`: where it is when the landing begins; both (6,) lerobot degrees."""

    def __init__(self, directory: Path, controller: str = "sync", **options: Any) -> None:
        plant = ScenePlant("reach")
        for _ in range(200):  # four seconds without torque
            plant.step([None] * 6, 0.02)
        self.bus = VirtualBus(plant=plant, goal_enables_torque=False)
        self.bus.start()
        self.lay = true_joints(self.bus)
        self.arm, self.camera, self.stop, self.over = make_arm(self.bus, directory), Camera(), StopSignals(), threading.Event()
        self.said: list[str] = []
        self.answer: Callable[[np.ndarray], np.ndarray] = lambda targets: targets
        loop = {"poses": Poses(home_speed_deg_s=60.0), "timeout_s": 6.0, **options}
        self.loop, policy = real_time_loop(self.arm, controller, loop, self.stop, self._connected, echo=self.said.append)
        policy.on_action = lambda targets: self.answer(self._towards(targets[0]))
        self.land, self.arm.land = self.arm.land, self._land
        self.let_go, self.let_go_s = np.full(6, np.nan), 0.0

    def _connected(self, observation: Any) -> None:
        self.arm.follower.cameras["front"] = self.camera

    @staticmethod
    def _towards(here: np.ndarray) -> np.ndarray:
        """Sixteen rows of three degrees."""
        rows = [here]
        for _ in range(16):
            rows.append(rows[-1] + np.clip(REACHED - rows[-1], -3, 3))
        return np.array(rows[1:])

    def _land(self, as_found: bool = False) -> Any:
        if not self.let_go_s:
            self.let_go, self.let_go_s = true_joints(self.bus), time.monotonic()
        return self.land(as_found)

    def run(self, act: Callable[[Stand], None], after_s: float = PLAYED_S) -> Exception | None:
        """`act` happens in another thread once the arm has moved for so long. Returns what the run raised."""

        def wait_and_act() -> None:
            while not self.loop.trace.moved and not self.loop.trace.landing:
                time.sleep(0.01)
            time.sleep(after_s)
            if not self.loop.trace.landing:
                act(self)

        actor = threading.Thread(target=wait_and_act, daemon=True)
        actor.start()
        try:
            with self.stop:
                self.loop.run()
        except Exception as error:  # noqa: BLE001 - the outcome, which the caller judges
            return error
        finally:
            self.over.set()
            actor.join(10)
        return None

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.land()
        self.bus.close()

    @property
    def away_deg(self) -> np.ndarray:
        """(6,) from where it lay, when the landing began."""
        return np.abs(self.let_go - self.lay)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def cable_out_and_stop(stand: Stand, for_s: float) -> None:
    stand.bus.inject(f"unplug:for_s={for_s}")
    time.sleep(0.3)
    send(signal.SIGINT)


def held_down(stand: Stand) -> None:
    """Ctrl-C, as a keyboard repeats it."""
    send(signal.SIGINT)
    time.sleep(0.5)
    for _ in range(45):
        if not stand.let_go_s:
            send(signal.SIGINT)
        time.sleep(0.033)


def stop_and_hang_up(stand: Stand) -> None:
    send(signal.SIGINT)
    time.sleep(1.2)
    if not stand.let_go_s:
        send(signal.SIGHUP)


def hangs(stand: Stand) -> None:
    stand.answer = lambda targets: (stand.over.wait(60), targets)[1]


PUT_DOWN: dict[str, tuple[Callable[[Stand], None], dict[str, Any], type[Exception] | int]] = {  # what happens, options, raised or exit code
    "bad line": (lambda stand: stand.bus.inject("flip:rate=0.005"), {"timeout_s": 1.5}, 0),
    "a stop while the cable is out": (lambda stand: cable_out_and_stop(stand, 0.6), {"controller": "threaded"}, 130),
    "an inference that hangs": (hangs, {"controller": "threaded"}, InferenceTimeoutError),
    "a camera": (lambda stand: stand.camera.disconnect(), {}, CameraError),
}
RANDOM: dict[str, Callable[[Stand], None]] = {
    "an inference that hangs": hangs,
    "a camera": lambda stand: stand.camera.disconnect(),
    "Ctrl-C held down": held_down,
    "Ctrl-C, and the terminal closes": stop_and_hang_up,
    **{number.name: functools.partial(lambda number, stand: send(number), number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
}
AT_ONCE: dict[str, Callable[[Stand], None]] = {
    "servo silent": lambda stand: stand.bus.inject("silent:servo=3"),
    "servo without torque": lambda stand: stand.bus.servos[1].write(Register.TORQUE_ENABLE, b"\0"),
}


@pytest.mark.parametrize("fault", [pytest.param(name, marks=pytest.mark.slow) if "hangs" in name else name for name in PUT_DOWN])
def test_the_arm_is_where_it_lay_when_its_torque_goes_off(fault: str, tmp_path: Path) -> None:
    act, options, expected = PUT_DOWN[fault]
    with Stand(tmp_path, **options) as stand:
        error = stand.run(act)
        assert (type(error) if error else stand.stop.exit_code or 0) == expected, (error, stand.said)
        assert stand.loop.trace.moved
        assert stand.away_deg.max() < NEAR_DEG, stand.said
        assert stand.bus.torque() == OFF
        assert stand.loop.trace.landing.safe
        time.sleep(0.5)
        assert np.abs(true_joints(stand.bus) - stand.let_go).max() < NEAR_DEG, "it does not fall from there"


@pytest.mark.slow
@pytest.mark.parametrize("fault", AT_ONCE)
def test_what_forbids_a_move_takes_the_torque_off_at_once(fault: str, tmp_path: Path) -> None:
    with Stand(tmp_path) as stand:
        error = stand.run(AT_ONCE[fault])
        assert isinstance(error, RobotError), (error, stand.said)
        assert stand.away_deg.max() > NEAR_DEG, "it does not take the time to move"
        assert stand.bus.torque() == OFF


def test_a_joint_that_is_blocked_on_the_way_down_is_not_pushed(tmp_path: Path) -> None:
    """Also where the run itself has no such protection: nobody may be looking."""
    pushes: list[float] = []

    def act(stand: Stand) -> None:
        stand.bus.inject("blocked:servo=3,side=1")
        stand.stop.request("Esc")
        while not stand.loop.trace.landing:
            goal_deg = to_units("elbow_flex", stand.bus.calibration["elbow_flex"], stand.bus.servos[2].word(Register.GOAL_POSITION))
            pushes.append(abs(goal_deg - true_joints(stand.bus)[2]))
            time.sleep(0.02)

    with Stand(tmp_path, safety=SafetyOptions(stall_after_s=None, max_following_error_deg=None)) as stand:
        assert stand.run(act) is None
        assert [line for line in stand.said if "elbow_flex is blocked" in line]
        assert "servo_overload" not in stand.arm.events
        assert pushes[-5] < 3, "held where it stands"
        assert stand.away_deg[[0, 1, 3, 4, 5]].max() < NEAR_DEG, "the others go on"
        assert stand.bus.torque() == OFF


def test_a_second_stop_does_not_wait_for_a_cable(tmp_path: Path) -> None:
    at_s: list[float] = []

    def act(stand: Stand) -> None:
        cable_out_and_stop(stand, 30.0)
        until(lambda: stand.stop.shutting_down)
        time.sleep(1.5 * FURTHER_AFTER_S)
        send(signal.SIGINT)
        at_s.append(time.monotonic())

    with Stand(tmp_path) as stand:
        stand.arm.config.reconnect_s = 20.0
        assert stand.run(act) is None
        assert stand.let_go_s - at_s[0] < 10.0, "the cable may take twenty seconds"
        assert stand.stop.exit_code == 130


def test_random_stops_find_the_arm_where_it_lay(tmp_path: Path) -> None:
    """`GR00T_FAST_STOPS=200 pytest tests/realtime/test_put_down.py -k random -s`"""
    rng = random.Random(1)
    for number in range(int(os.environ.get("GR00T_FAST_STOPS", "1"))):
        fault, after_s = rng.choice([*RANDOM]), rng.uniform(0, 2.5)
        with Stand(tmp_path, controller=rng.choice(["sync", "threaded"])) as stand:
            stand.run(RANDOM[fault], after_s)
            print(f"{fault} after {after_s:.2f} s: {stand.away_deg.max():.1f} deg from where it lay")
            assert stand.away_deg.max() < NEAR_DEG, (number, fault, after_s, stand.said)
            assert stand.bus.torque() == OFF, (number, fault, after_s)
            time.sleep(0.2)
            assert stand.bus.torque() == OFF, (number, fault, after_s)
