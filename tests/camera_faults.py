"""Run by test_so100_follower.py in a process of its own (OpenCV looks for video plugins only once): real OpenCV cameras on the arm, and their faults.

Prints one JSON line: scenario -> what happened.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from arm_bench import assert_landed, make_arm
from virtual_camera import READS_FAIL, READS_HANG, RUNNING, SLOW, set_state, write_camera

from gr00t_fast.errors import Gr00tFastError
from gr00t_fast.robots.config import CameraConfig, OpenCVCameraConfig
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.robots.virtual_bus import VirtualBus

BLUE_BGR = np.zeros((48, 64, 3), np.uint8)
BLUE_BGR[..., 0] = 250


def camera(**options: object) -> OpenCVCameraConfig:
    return OpenCVCameraConfig(**{"width": 64, "height": 48, "fps": 30, "index_or_path": 0, "warmup_s": 0, **options})


def scenario(cameras: dict[str, CameraConfig], between: Callable[[SO100FollowerArm], None] | None = None) -> dict:
    """Connect, observe, let something happen, observe for a second, land. Returns what was seen."""
    seen: dict = {"error": None, "oldest_s": 0.0}
    with VirtualBus() as bus, tempfile.TemporaryDirectory() as directory:
        arm = make_arm(bus, Path(directory), cameras=cameras)
        try:
            arm.connect()
            seen["torque_after_connect"] = sum(bus.torque().values())
            frame = arm.observe().frames["front"]
            seen["frame"] = [list(frame.shape), str(frame.dtype), frame[0, 0].tolist()]
            if between is not None:
                between(arm)
                end_s = time.monotonic() + 1.5
                while time.monotonic() < end_s:
                    observation = arm.observe()
                    seen["oldest_s"] = max(seen["oldest_s"], observation.frame_ages_s["front"])
                    arm.send(observation.joints)
                    time.sleep(0.02)
        except Gr00tFastError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        report = arm.land()
        assert_landed(bus, arm, report)
        seen["safe"] = report.safe
        seen["threads"] = [thread.name for thread in threading.enumerate() if "OpenCVCamera" in thread.name]
    return seen


def main(cameras: Path) -> None:
    write_camera(cameras, 0, BLUE_BGR)

    def fall(state: int) -> Callable[[SO100FollowerArm], None]:
        return lambda arm: set_state(cameras, 0, state)

    def close(arm: SO100FollowerArm) -> None:
        arm._follower.cameras["front"].disconnect()

    results = {
        "good": scenario({"front": camera()}),
        "turned": scenario({"front": camera(rotation=90, width=48, height=64)}),
        "missing": scenario({"front": camera(), "wrist": camera(index_or_path=7)}),
        "wrong size": scenario({"front": camera(width=1280, height=720)}),
        "wrong rate": scenario({"front": camera(fps=60)}),
        "closed": scenario({"front": camera()}, close),
        "failing": scenario({"front": camera()}, fall(READS_FAIL)),
    }
    set_state(cameras, 0, RUNNING)
    results["slow"] = scenario({"front": camera()}, fall(SLOW))
    set_state(cameras, 0, RUNNING)
    results["frozen"] = scenario({"front": camera()}, fall(READS_HANG))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
