"""`--controller=auto`: infer while the arm moves where that helps and a chunk bridges it, else wait for each inference.

Chosen after warm-up, from how long an inference takes, and again when inferences take longer than a tick after all. A run whose inferences turn out
too long for its chunks goes over to waiting, and back when they are bridged again.
Time is counted in control ticks; H is the number of actions of a chunk that may play.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gr00t_fast.contracts import ActionChunk, Observation
from gr00t_fast.control.controller import Controller, SyncController, TickNote
from gr00t_fast.control.threaded import ThreadedController
from gr00t_fast.errors import InferenceTooLongError

_MEASURED_DELAYS = 3  # so many late ones in a row are no spike
# To go back takes so many inferences in a row that are well within what a chunk bridges; each time twice as many, so that a machine that is busy now
# and then does not change the way the arm moves again and again.
_BRIDGED_INFERENCES, _WELL_WITHIN = 4, 0.75


def _bridged_ticks(horizon: int) -> int:
    """The longest inference that chunks of `horizon` actions bridge: as many actions are over when a chunk arrives as play until the next does."""
    return horizon // 2


class AutoController:
    """A Controller that passes every call on to one of two. Both use the same worker, so that the policy stays in one thread."""

    def __init__(
        self,
        waiting: SyncController,
        moving: ThreadedController,
        fps: float,
        horizon: int,
        trained_horizon: int,
        echo: Callable[[str], None],
        overlap_asked: str | None = None,
    ) -> None:
        """`horizon`: actions of a chunk that may play; `trained_horizon`: that could. `overlap_asked`: the flag, if any, that only means something
        while inference and motion overlap: the choice is made then. `echo` is told the choice and its reason, one line."""
        self._waiting, self._moving, self._fps, self._echo = waiting, moving, fps, echo
        self._horizon, self._trained_horizon, self._overlap_asked = horizon, trained_horizon, overlap_asked
        self._chosen: Controller = waiting
        self._reason = ""
        self._bridged, self._bridged_needed = 0, _BRIDGED_INFERENCES  # inferences in a row, while waiting for them
        self._pausing_ms: list[float] | None = None  # inferences in a row that took longer than a tick, where there was to be no pause

    @property
    def overlaps(self) -> bool:
        """Whether inference goes on while the arm moves."""
        return self._chosen is self._moving

    def _choose(self, controller: Controller, reason: str) -> None:
        self._chosen, self._reason, self._pausing_ms = controller, reason, None
        does = "the arm moves while the next chunk is computed" if self.overlaps else "the arm waits for each inference"
        self._echo(f"controller: {does}, because {reason} (--controller=auto)")

    def warm_up(self) -> Mapping[str, float]:
        timing_ms = self._moving.warm_up()
        self._waiting.expect(timing_ms.get("total", 0.0) / 1000)
        self._choose_by(timing_ms.get("total"), "took", "at warm-up")
        return timing_ms

    def _choose_by(self, inference_ms: float | None, takes: str, when: str) -> None:
        self._choose(*self._choice(inference_ms, takes, when))
        short = inference_ms is not None and inference_ms <= 1000 / self._fps
        self._pausing_ms = [] if short and not self.overlaps else None

    def _choice(self, inference_ms: float | None, takes: str, when: str) -> tuple[Controller, str]:
        if self._overlap_asked is not None:
            return self._moving, f"--{self._overlap_asked} asks for it"
        if inference_ms is None:
            return self._moving, "how long an inference takes is not known yet; should chunks come too late, the arm will wait for them"
        tick_ms, ticks = 1000 / self._fps, math.ceil(inference_ms / 1000 * self._fps)
        takes = f"an inference {takes} {inference_ms:.0f} ms {when}"
        if inference_ms <= tick_ms:
            return self._waiting, f"{takes}, less than a tick of {tick_ms:.0f} ms: no pause is to be expected"
        if ticks <= _bridged_ticks(self._horizon):
            return self._moving, f"{takes}, longer than a tick of {tick_ms:.0f} ms, and {self._horizon} actions per chunk bridge it"
        return self._waiting, f"{takes}, which {self._too_short(ticks)}"

    def _too_short(self, ticks: int) -> str:
        short = f"a chunk of {self._horizon} actions does not bridge ({ticks} ticks; {2 * ticks} actions would)"
        return f"{short}; leave out --action_horizon" if ticks <= _bridged_ticks(self._trained_horizon) else short

    # The Controller protocol

    @property
    def note(self) -> TickNote:
        return self._chosen.note

    @property
    def needs_observation(self) -> bool:
        return self._chosen.needs_observation

    @property
    def instruction(self) -> str:
        return self._chosen.instruction

    def instruct(self, instruction: str, keep_alive: Callable[[], None] = lambda: None) -> None:
        for controller in (self._moving, self._waiting):  # the choice may still change
            controller.instruct(instruction, keep_alive)

    def reset(self) -> None:
        self._chosen.reset()

    def plan(self, observation: Observation, keep_alive: Callable[[], None] = lambda: None) -> ActionChunk | None:
        try:
            chunk = self._chosen.plan(observation, keep_alive)
        except InferenceTooLongError as error:
            self._choose(self._waiting, f"an inference took {error.ticks} ticks, which {self._too_short(error.ticks)}")
            chunk = self._waiting.plan(observation, keep_alive)
        if not self.overlaps:
            self._move_again(chunk)
        return chunk

    def _move_again(self, chunk: ActionChunk | None) -> None:
        """After a chunk that the arm waited for (None: it failed)."""
        takes_ticks = 0.0 if chunk is None else chunk.inference_ms / 1000 * self._fps
        if self._pausing_ms is not None and chunk is not None:
            self._pausing_ms = [*self._pausing_ms, chunk.inference_ms] if takes_ticks > 1 else []
            if len(self._pausing_ms) == _MEASURED_DELAYS:
                self._choose_by(max(self._pausing_ms), "takes up to", "in this run")
                if self.overlaps:
                    self._moving.take_over(chunk)
            return
        bridged = 1 < takes_ticks <= math.ceil(_WELL_WITHIN * _bridged_ticks(self._horizon))  # within a tick there is no pause to be saved
        self._bridged = self._bridged + 1 if bridged else 0
        if chunk is not None and self._bridged == self._bridged_needed:
            reason = f"the last {self._bridged} inferences were short enough for {self._horizon} actions per chunk to bridge"
            self._bridged, self._bridged_needed = 0, 2 * self._bridged_needed
            self._moving.take_over(chunk)
            self._choose(self._moving, reason)

    def see(self, observation: Observation, tick: int) -> None:
        self._chosen.see(observation, tick)

    def next_target(self, tick: int) -> np.ndarray:
        target = self._chosen.next_target(tick)
        if self.overlaps and self._overlap_asked is None and self._moving.note.starved:
            ticks = self._moving.usual_delay_ticks(_MEASURED_DELAYS)
            if ticks > _bridged_ticks(self._horizon):
                self._waiting.take_over(target)
                self._choose(self._waiting, f"inferences take {ticks} ticks, which {self._too_short(ticks)}")
        return target

    def summary(self) -> dict[str, Any]:
        return {**self._chosen.summary(), "chosen_because": self._reason}

    def close(self, timeout_s: float) -> bool:
        return self._chosen.close(timeout_s)
