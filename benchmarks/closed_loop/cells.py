"""What is compared: one cell per combination of settings, and the studies that are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from gr00t_fast.errors import ConfigError, closest

Scene = Literal["still", "moving"]
ControllerName = Literal["sync", "threaded", "resume", "rtc", "server"]
SCENES: tuple[Scene, ...] = get_args(Scene)
CONTROLLERS: tuple[ControllerName, ...] = get_args(ControllerName)
LATENCIES_MS = (0, 50, 200, 800)
STEPS = (1, 2, 4, 8)
HORIZONS = (4, 8, 16)
DEFAULT_ENGINE = "eager:fp32"


@dataclass(frozen=True, order=True)
class Cell:
    """One setting. action_horizon: actions of a chunk that may play. latency_ms is injected, and all there is: computing takes no simulated time.

    engine: NAME[:PRECISION][=DIRECTORY of an export], as in `eager:bf16` or `openvino:int8=outputs/exports/int8`.
    """

    scene: Scene = "still"
    controller: ControllerName = "sync"
    latency_ms: int = 0
    denoising_steps: int = 4
    action_horizon: int = 8
    engine: str = DEFAULT_ENGINE

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())


FACTORS = tuple(field.name for field in fields(Cell))


def product_of(factors: dict[str, Sequence[Any]]) -> list[Cell]:
    """Every combination of the values given; a factor without any stays at its default."""
    named = {name: values for name, values in factors.items() if values}
    return [Cell(**dict(zip(named, values, strict=True))) for values in itertools.product(*named.values())]


def latency_study(scenes: Sequence[Scene]) -> list[Cell]:
    """Who hides latency? A loop that waits plays 8 or 16 actions per inference; those that think ahead need all 16 to bridge the wait.

    server, resume and rtc could differ from threaded only where chunks come late or overlap for long, and are run there.
    """
    arms = [("sync", 8, LATENCIES_MS), ("sync", 16, LATENCIES_MS), ("threaded", 16, LATENCIES_MS), ("server", 16, LATENCIES_MS[2:3])]
    arms += [("resume", 16, LATENCIES_MS[2:]), ("rtc", 16, LATENCIES_MS[2:3])]
    return [
        Cell(scene, controller, latency_ms, action_horizon=horizon)
        for scene in scenes
        for controller, horizon, latencies_ms in arms
        for latency_ms in latencies_ms
    ]


def steps_study(scenes: Sequence[Scene]) -> list[Cell]:
    """What do fewer denoising steps cost, and longer chunks?"""
    return [Cell(scene, "sync", 0, steps, horizon) for scene in scenes for steps in STEPS for horizon in HORIZONS]


def precision_study(scenes: Sequence[Scene], engines: Sequence[str]) -> list[Cell]:
    """What does a number format cost? The same noise in every engine."""
    return [Cell(scene, "sync", 0, 4, 8, engine) for scene in scenes for engine in dict.fromkeys((DEFAULT_ENGINE, "eager:bf16", *engines))]


STUDIES = ("latency", "steps", "precision")


def cells_of_studies(studies: Iterable[str], scenes: Sequence[Scene], engines: Sequence[str]) -> list[Cell]:
    """The cells of all studies, each once."""
    made = {"latency": lambda: latency_study(scenes), "steps": lambda: steps_study(scenes), "precision": lambda: precision_study(scenes, engines)}
    return list(dict.fromkeys(cell for study in studies for cell in made[study]()))


def split_engine(engine: str) -> tuple[str, str, str | None]:
    """`NAME[:PRECISION][=DIRECTORY]` -> name, precision (`auto` unless given; exports bring their own), directory. Raises ConfigError."""
    words, _, directory = engine.partition("=")
    name, _, precision = words.partition(":")
    if not name:
        raise ConfigError(f"--engines: '{engine}' names no engine. Expected NAME[:PRECISION][=DIRECTORY], as in eager:bf16.")
    return name, precision if precision and not directory else "auto", directory or None


def check(cells: Sequence[Cell], trained_horizon: int) -> None:
    """Raises ConfigError for values that no run can have; what a policy or controller cannot do shows when it is asked."""
    if not cells:
        raise ConfigError("nothing to run: no study and no setting was given.")
    for cell in cells:
        if cell.controller not in CONTROLLERS:
            suggestion = closest(cell.controller, CONTROLLERS)
            raise ConfigError(f"unknown controller '{cell.controller}'.{suggestion} Expected one of {', '.join(CONTROLLERS)}.")
        if min(cell.latency_ms, cell.denoising_steps - 1, cell.action_horizon - 1) < 0:
            raise ConfigError(f"latencies must not be negative, steps and horizons at least 1; got {cell.key}.")
        if cell.action_horizon > trained_horizon:
            raise ConfigError(f"this checkpoint predicts {trained_horizon} actions; {cell.action_horizon} of them cannot play.")
        split_engine(cell.engine)


def reference_of(cell: Cell) -> Cell:
    """The cell that `cell` is compared with, layout by layout: a loop that thinks ahead with one that waits as long, others with the defaults."""
    if cell.controller != "sync":
        return Cell(cell.scene, "sync", cell.latency_ms)
    return Cell(cell.scene)
