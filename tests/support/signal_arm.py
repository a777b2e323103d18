"""A run with a fake arm that a test ends with signals: `python signal_arm.py LOG MODE`. Writes what happens to LOG.

MODE: `infer` (an inference of a minute in small steps, as a network on a CPU), `send` (each transfer takes 0.4 s).
"""

from __future__ import annotations

import sys
import time

from control_fakes import Bench

from gr00t_fast.base.clock import MonotonicClock


def main(path: str, mode: str) -> int:
    log = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the process

    def note(event: str) -> None:
        log.write(f"{event}\n")

    bench = Bench(clock=MonotonicClock(), timeout_s=None)
    policy, robot = bench.policy, bench.robot

    def infer(targets):
        note("infer")
        for _ in range(60_000 if mode == "infer" else 1):
            time.sleep(0.001)
        note("inferred")
        return targets

    def send() -> None:
        note("send")
        time.sleep(0.4 if mode == "send" else 0.0)
        note("sent")

    land = robot.land

    policy.on_action, robot.on_send, robot.land = infer, send, lambda *_: (note("landed"), land())[1]
    with bench.stop:
        trace = bench.loop.run()
    note(f"ended by {trace.ended_by}")
    return bench.stop.exit_code or 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
