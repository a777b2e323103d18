"""Whole commands on the virtual servo bus, with the flags that a user gives and no others: `python default_arm.py` reads one scenario a line (JSON)
and forks a process for each, for the driver takes seconds to import. Says `pid N NAME` for each and `ended STATUS N`; several run at a time.

    {"name": .., "argv": [COMMAND, ..], "inference_s": .., "answer": "towards"|"nan"|"raises"|"hangs", "log": FILE}

COMMAND is run or replay. A checkpoint is stood in for by a policy whose inference takes `inference_s` and leads to REACHED; with `answer` the
first inference that begins a second after the first chunk does something else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

import numpy as np
from control_fakes import FakeClock, FakePolicy, modality_config

from gr00t_fast.base.contracts import Robot
from gr00t_fast.cli import replay
from gr00t_fast.cli import run as run_command
from gr00t_fast.cli.main import Command

if __name__ == "__main__":  # before the fork, and not in the processes beside a run
    import lerobot.robots.so_follower  # noqa: F401
    import scservo_sdk  # noqa: F401

REACHED = np.array([25.0, -45.0, 20.0, 45.0, -60.0, 40.0])
STEP = 1.5  # degrees a row: 45 a second
ODD_AFTER_S = 1.0  # after the first chunk


class Standing(FakePolicy):
    """Stands for a checkpoint."""

    def __init__(self, inference_s: float, answer: str) -> None:
        self.action_horizon = max(16, math.ceil(2.5 * 30 * inference_s))
        super().__init__(FakeClock(), horizon=self.action_horizon, cameras=())
        self.metadata = dataclasses.replace(self.metadata, resolutions={}, trained_horizon=self.action_horizon)
        self._inference_s, self._answer, self._first_s = inference_s, answer, math.inf

    def get_modality_config(self) -> dict[str, Any]:
        return modality_config(())

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        odd = self._answer if time.monotonic() > self._first_s + ODD_AFTER_S else "towards"
        time.sleep(self._inference_s)
        self._first_s = min(self._first_s, time.monotonic())
        if odd == "raises":
            raise ValueError("a bug of the policy")
        time.sleep(60.0 if odd == "hangs" else 0.0)
        here = np.concatenate([observation["state.single_arm"][0], observation["state.gripper"][0]])
        rows = np.arange(1, self.horizon + 1)[:, None]
        targets = (here + np.sign(REACHED - here) * np.minimum(rows * STEP, np.abs(REACHED - here))).astype(np.float32)
        targets[:] = np.nan if odd == "nan" else targets
        return {"action.single_arm": targets[:, :5], "action.gripper": targets[:, 5:]}

    def warm_up(self, instruction: str | None = None, continuing: bool = False) -> dict[str, float]:
        return {"total": 1000 * self._inference_s}


def ended(scenario: dict[str, Any]) -> int:
    """The command's exit code."""
    command, *argv = scenario["argv"]
    if command == "replay":
        return replay.main(argv)

    def load(robot: Robot, stop: Any) -> Standing:
        return Standing(scenario.get("inference_s", 0.01), scenario.get("answer", "towards"))

    def work(config: run_command.RunConfig) -> int:
        return run_command.drive(config, load, run_command.RecordedFacts({}))

    return Command(run_command.RunConfig, work, "", drives_arm=True)(argv)


def child(scenario: dict[str, Any]) -> int:
    log = os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, stream)
    try:
        return ended(scenario)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    for number in (signal.SIGHUP, signal.SIGQUIT):  # the runs inherit it, and under nohup it is ignored
        signal.signal(number, signal.SIG_DFL)
    running, buffer, more = set[int](), b"", True
    while more or running:
        if more and select.select([0], [], [], 0.05)[0]:
            data = os.read(0, 65536)
            more, buffer = bool(data), buffer + data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                scenario = json.loads(line)
                if (pid := os.fork()) == 0:
                    status = 1
                    try:
                        status = child(scenario)
                    finally:
                        os._exit(status)
                running.add(pid)
                print(f"pid {pid} {scenario['name']}", flush=True)
        elif not more:
            time.sleep(0.05)
        for pid in [*running]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.discard(pid)
                print(f"ended {os.waitstatus_to_exitcode(status)} {pid}", flush=True)


if __name__ == "__main__":
    main()
