"""What a run says on the terminal while it goes on: what is about to happen, how far it is, and what a dry run would have sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gr00t_fast.contracts import Clock
from gr00t_fast.control.pacer import Pacer
from gr00t_fast.control.trace import RunTrace

PROGRESS_EVERY_S = 5.0  # often enough to see that it lives, seldom enough to leave the warnings in sight
_WIDTH = 16


class Progress:
    """A line every few seconds, whatever the controller: one that infers while the arm moves has no other sign of life."""

    def __init__(self, trace: RunTrace, pacer: Pacer, clock: Clock, echo: Callable[[str], None]) -> None:
        self._trace, self._pacer, self._clock, self._echo = trace, pacer, clock, echo
        self._due_s = clock.now_s() + PROGRESS_EVERY_S

    def begin(self) -> None:
        """The arm begins to move now."""
        self._due_s = self._clock.now_s() + PROGRESS_EVERY_S

    def __call__(self) -> None:
        """After each tick; says something when it is time."""
        now_s = self._clock.now_s()
        if now_s >= self._due_s:
            self._due_s = now_s + PROGRESS_EVERY_S
            self._echo(self._line(now_s))

    def _line(self, now_s: float) -> str:
        trace = self._trace
        last = f", the last took {trace.chunks[-1].inference_ms:.0f} ms" if trace.chunks else ""
        ticks = f"{len(trace)} ticks ({self._pacer.missed_ticks} missed, {self._pacer.waiting_ticks} waiting for inference)"
        return f"{now_s - trace.began_s:.0f} s: {ticks}, {len(trace.chunks)} inferences{last}"


def dry_run_table(names: Sequence[str], present: np.ndarray, wanted: np.ndarray, sent: np.ndarray) -> str:
    """The first target by joint, each array (J,): where the arm stands, what the policy asked for, and what clamping and step limit make of it."""
    lines = ["Dry run: nothing was sent. By joint: the pose now, the policy's first target, and what would have been sent."]
    lines.append(f"{'':<{_WIDTH}}{'present':>12}{'policy':>12}{'to be sent':>12}")
    rows = zip(names, present, wanted, sent, strict=True)
    return "\n".join(lines + [f"{name:<{_WIDTH}}{now:>12.1f}{target:>12.1f}{limited:>12.1f}" for name, now, target, limited in rows])


def summary(policy: Any, robot_name: str, fps: float, action_horizon: int | None, instruction: str) -> str:
    """One line about what is going to run. A policy in this process tells more of itself than a server's."""
    what = []
    if hasattr(policy, "engine"):
        what = [f"{policy.engine.name} on {policy.device}", str(policy.dtype).removeprefix("torch."), f"{policy.denoising_steps} denoising steps"]
    trained = policy.facts.trained_horizon
    played = action_horizon or getattr(policy, "action_horizon", trained)  # the policy's own, when its data config has fewer indices
    what += [f"{played} of {trained} actions per inference", f"{fps:g} Hz", f"{robot_name}, instruction: {instruction!r}"]
    return "ready: " + ", ".join(what)
