"""Runs on the virtual servo bus that end badly: `python watchdog_arm.py` reads one scenario a line (JSON) and forks a run for each, for the driver
takes seconds to import. Says `pid N` for each, and the run itself `ready` once it is moving the arm.

    {"port": .., "directory": .., "controller": "sync"|"threaded", "phase": .., "trouble": .., "options": {..}}

trouble: native (a call that never returns), gil (the same without giving up the interpreter lock), segfault, none (runs on and on).
phase, the method in which it happens: get_action, send, reset, land.
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
from arm_bench import real_time_loop

from gr00t_fast.base.signals import StopSignals
from gr00t_fast.control.limits import Poses
from gr00t_fast.robots import SO100FollowerConfig
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
    arm = SO100FollowerArm(SO100FollowerConfig(port=port, id="test", calibration_dir=Path(directory), **options))
    loop_options = {"timeout_s": timeout_s, "poses": Poses(home_speed_deg_s=180.0)}
    loop, policy = real_time_loop(arm, controller, loop_options, stop := StopSignals(), echo=lambda line: None)
    sent = 0

    def troubled(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal sent
            result = None if name == "land" else method(*arguments, **named)
            sent += name == "send"
            if name == "send" and sent == READY_AFTER:
                print("ready", flush=True)
            if name == phase and (sent >= READY_AFTER or name in ("reset", "land")):
                happen(trouble)
            return method(*arguments, **named) if name == "land" else result

        return wrapped

    for owner, name in ((policy, "get_action"), (arm, "send"), (arm, "reset"), (arm, "land")):
        setattr(owner, name, troubled(name, getattr(owner, name)))
    with stop:
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
