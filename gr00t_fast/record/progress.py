"""What a run says on the terminal while it goes on: what is about to happen, how far it is, and what a dry run would have sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from gr00t_fast.base.contracts import Observation, Policy
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord

PROGRESS_EVERY_S = 5.0  # often enough to see that it lives, seldom enough to leave the warnings in sight
_WIDTH = 16


class Progress:
    """An observer that says a line every few seconds, and one about each inference that the arm stood still for."""

    def __init__(self, echo: Callable[[str], None], now_s: Callable[[], float] = time.monotonic, tell_inferences: bool = True) -> None:
        self._echo, self._now_s, self._tell_inferences = echo, now_s, tell_inferences
        self._due_s = now_s()
        self._inferences = self._held = self._episode = 0

    def see(self, observation: Observation, tick: TickRecord | None = None, mode: Mode = Mode.HOLD) -> None:
        """After each tick; says something when it is time."""
        now_s = self._now_s()
        if tick is None:
            return
        if tick.number == 0 or tick.episode != self._episode:  # the arm begins to move now
            self._episode, self._due_s = tick.episode, now_s + PROGRESS_EVERY_S
        self._held += tick.underrun
        if tick.inferences != self._inferences:
            self._inferences = tick.inferences
            if self._tell_inferences and tick.stood:
                self._echo(f"Direct inference time: {tick.inference_ms / 1000:.3f}s")
        if now_s >= self._due_s:
            self._due_s = now_s + PROGRESS_EVERY_S
            last = f", the last took {tick.inference_ms:.0f} ms" if tick.inferences else ""
            ticks = f"{tick.number + 1} ticks ({tick.missed_ticks} missed, {self._held} waiting for inference)"
            self._echo(f"{tick.time_s:.0f} s: {ticks}, {tick.inferences} inferences{last}")


def dry_run_table(names: Sequence[str], present: np.ndarray, wanted: np.ndarray, sent: np.ndarray) -> str:
    """The first target by joint, each array (J,): where the arm stands, what the policy asked for, and what clamping and step limit make of it."""
    lines = ["Dry run: nothing was sent. By joint: the pose now, the policy's first target, and what would have been sent."]
    lines.append(f"{'':<{_WIDTH}}{'present':>12}{'policy':>12}{'to be sent':>12}")
    rows = zip(names, present, wanted, sent, strict=True)
    return "\n".join(lines + [f"{name:<{_WIDTH}}{now:>12.1f}{target:>12.1f}{limited:>12.1f}" for name, now, target, limited in rows])


def summary(policy: Policy, robot_name: str, fps: float, action_horizon: int | None, instruction: str) -> str:
    """One line about what is going to run."""
    trained = policy.metadata.trained_horizon  # type: ignore[union-attr]  # known once a run has its policy
    played = action_horizon or policy.action_horizon or trained
    inference = [f"{played} of {trained} actions per inference"] if policy.computes else []
    what = [*policy.describe(), *inference, f"{fps:g} Hz", f"{robot_name}, instruction: {instruction!r}"]
    return "ready: " + ", ".join(what)
