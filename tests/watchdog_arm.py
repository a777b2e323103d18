"""Runs on the virtual servo bus that end badly: `python watchdog_arm.py` reads one scenario a line (JSON) and forks a run for each, for the driver
takes seconds to import. Says `pid N` for each, and the run itself `ready` once it is moving the arm.

    {"port": .., "directory": .., "controller": "sync"|"threaded", "phase": .., "trouble": .., "options": {..}}

trouble: native (a call that never returns), gil (the same without giving up the interpreter lock), segfault, none (runs on and on).
phase, where it happens: infer, observe, send, wait, engage, land.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot.robots.so_follower  # noqa: F401 - before the fork
import scservo_sdk  # noqa: F401
from control_fakes import FakeClock, FakePolicy

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import ChunkController, ControllerOptions
from gr00t_fast.control.limits import Poses
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock
from gr00t_fast.robots.config import SO100FollowerConfig
from gr00t_fast.robots.so100 import SO100FollowerArm

READY_AFTER = 10  # targets


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the runs inherit it, and under nohup it is ignored
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                status = run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


def run(port: str, directory: str, controller: str, phase: str, trouble: str, options: dict[str, Any], timeout_s: float | None = None) -> int:
    clock = MonotonicClock()
    arm = SO100FollowerArm(SO100FollowerConfig(port=port, id="test", calibration_dir=Path(directory), **options))
    policy = FakePolicy(FakeClock(), cameras=())
    sent = 0

    def troubled(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal sent
            result = None if name == "land" else method(*arguments, **named)
            sent += name == "send"
            if name == "send" and sent == READY_AFTER:
                print("ready", flush=True)
            if name == phase and (sent >= READY_AFTER or name in ("engage", "land")):
                happen(trouble)
            return method(*arguments, **named) if name == "land" else result

        return wrapped

    policy.get_action = troubled("infer", policy.get_action)
    arm.observe, arm.send, arm.reset, arm.land = (
        troubled(name, getattr(arm, method)) for name, method in (("observe", "observe"), ("send", "send"), ("engage", "reset"), ("land", "land"))
    )
    clock.sleep_until_s = troubled("wait", clock.sleep_until_s)
    binding = RobotBinding(policy.get_modality_config(), policy.metadata.state_widths, policy.metadata.action_widths, SO100_JOINTS, {})
    source = ChunkController(policy, binding, "go", clock, 30.0, ControllerOptions(controller, action_horizon=8 if controller == "sync" else None))
    source.warm_up()
    loop = ControlLoop(arm, source, LoopOptions(30.0, timeout_s=timeout_s, poses=Poses(home_speed_deg_s=180.0)), clock, echo=lambda line: None)
    loop.run()
    return 0 if loop.trace.landing.safe else 3


def happen(trouble: str) -> None:
    if trouble == "native":
        ctypes.CDLL(None).sleep(60)
    elif trouble == "gil":
        ctypes.PyDLL(None).sleep(60)
    elif trouble == "segfault":
        ctypes.string_at(0)


if __name__ == "__main__":
    main()
