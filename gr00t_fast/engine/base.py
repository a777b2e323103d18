"""What an engine is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from gr00t_fast.engine.continuation import Goal
from gr00t_fast.engine.static_call import RawInputs, ToJoints
from gr00t_fast.model import ModelInputs
from gr00t_fast.timing import StageTimer


class Engine(Protocol):
    """Runs the network for one batch. Stages are timed under the names vision, language, refine, denoise."""

    name: str
    continues: bool  # whether `run` takes a goal

    def run(self, inputs: ModelInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> Tensor:
        """noise (B, H, A), fp32 or the model's dtype -> normalised actions (B, H, A) on the model's device; with `goal` a chunk that continues
        another one, in fp32."""

    def synchronise(self) -> None:
        """Wait until everything submitted has finished; nothing to do on a CPU."""


@runtime_checkable
class FrameEngine(Protocol):
    """An engine that makes the pixels too, and joint units of the actions: bytes go in, so that all that follows can be one submission."""

    name: str
    continues: bool  # whether `run_raw` takes a goal
    to_joints: ToJoints | None  # given before the first call; without it actions come out normalised

    def run_raw(self, raw: RawInputs, noise: Tensor, denoising_steps: int, timer: StageTimer, goal: Goal | None = None) -> np.ndarray:
        """noise fp32 (B, H, A) and `goal` on the host -> actions float32 (B, H, A) on the host; those of the padding stay normalised."""

    def synchronise(self) -> None:
        """As `Engine.synchronise`."""


AnyEngine = Engine | FrameEngine


@runtime_checkable
class Prepares(Protocol):
    """An engine that takes seconds or more to prepare what it has not met yet: a prompt of another length, another step count."""

    name: str
    warming_up: bool  # set by the policy


def tell_new(log: logging.Logger, engine: Prepares, what: str) -> None:
    """That `engine` prepares `what` now: aloud, unless it is warming up, because the arm waits for it."""
    if engine.warming_up:
        log.info("preparing %s for %s", engine.name, what)
    else:
        log.warning("%s meets %s for the first time: no actions until it is prepared. Warm up with the instructions to come.", engine.name, what)


@contextmanager
def warming_up(engine: AnyEngine) -> Iterator[None]:
    """Inside, `engine` prepares what is new to it without a warning."""
    if not isinstance(engine, Prepares):
        yield
        return
    engine.warming_up = True
    try:
        yield
    finally:
        engine.warming_up = False
