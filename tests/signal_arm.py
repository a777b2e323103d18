"""A run with a fake arm that a test ends with signals: `python signal_arm.py LOG MODE`. Writes what happens, with times, to LOG.

MODE: `infer` (a three-second inference in small steps, as a network on a CPU), `land` (landing takes 0.6 s), `send` (each transfer takes
0.4 s).
"""

from __future__ import annotations

import sys
import time

from control_fakes import FakeClock, FakePolicy, FakeRobot

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import ChunkController, ControllerOptions
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import MonotonicClock, StopSignals


def main(path: str, mode: str) -> int:
    log = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the process

    def note(event: str) -> None:
        log.write(f"{time.time():.4f} {event}\n")

    clock = MonotonicClock()
    policy, robot = FakePolicy(FakeClock()), FakeRobot(FakeClock())

    def infer(targets):
        note("infer")
        for _ in range(3000 if mode == "infer" else 1):
            time.sleep(0.001)
        note("inferred")
        return targets

    def send() -> None:
        note("send")
        time.sleep(0.4 if mode == "send" else 0.0)
        note("sent")

    land = robot.land

    def slow_land(*_):
        note("landing")
        time.sleep(0.6 if mode == "land" else 0.0)
        note("landed")
        return land()

    policy.on_action, robot.on_send, robot.land = infer, send, slow_land
    binding = RobotBinding(
        policy.get_modality_config(), policy.metadata.state_widths, policy.metadata.action_widths, SO100_JOINTS, {"front": "webcam"}
    )
    with StopSignals() as stop:
        loop = ControlLoop(robot, ChunkController(policy, binding, "go", clock, 30.0, ControllerOptions("sync")), LoopOptions(30.0), clock, stop)
        trace = loop.run()
    note(f"ended by {trace.ended_by}")
    return stop.exit_code or 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
