"""Videos that show what the figures count: the arms of one setting side by side, the same block and the same noise, in simulated time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.closed_loop.cells import Cell
from benchmarks.closed_loop.workers import Settings, runner_of
from gr00t_fast.errors import ConfigError
from gr00t_fast.robots.so100_sim.simulation import Simulation
from gr00t_fast.robots.so100_sim.video import write_video

_WIDTH, _HEIGHT, _COLUMNS = 320, 240, 3
_WHITE, _GREEN = (255, 255, 255), (60, 230, 60)


class _Camera:
    """Draws the scene at every tick, and says from when on the task was solved."""

    def __init__(self, title: str) -> None:
        self._title = title
        self.frames: list[np.ndarray] = []

    def __call__(self, simulation: Simulation) -> None:
        frame = np.ascontiguousarray(simulation.render("front", _WIDTH, _HEIGHT, samples=2))
        _write(frame, self._title, 18, _WHITE)
        reached = simulation.success
        _write(frame, f"{simulation.time_s:.1f} s" + (" reached" if reached else ""), _HEIGHT - 10, _GREEN if reached else _WHITE)
        self.frames.append(frame)


def _write(frame: np.ndarray, text: str, row: int, colour: tuple[int, int, int]) -> None:
    cv2.putText(frame, text, (8, row), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)


def write_videos(settings: Settings, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> Iterator[Path]:
    """One mp4 per scene, latency, step count and seed; its panels are the controllers, horizons and engines. Yields each as it is written."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.scene, cell.latency_ms, cell.denoising_steps), []).append(cell)
    for (scene, latency_ms, steps), members in groups.items():
        for seed in seeds:
            panels = [frames for cell in members if (frames := _film(settings, cell, seed))]
            if panels:
                path = out / f"{scene}_{latency_ms}ms_{steps}steps_seed{seed}.mp4"
                write_video(path, list(_side_by_side(panels)))
                yield path


def _film(settings: Settings, cell: Cell, seed: int) -> list[np.ndarray]:
    policies, runner = runner_of(settings)
    camera = _Camera(f"{cell.controller}, {cell.action_horizon} actions, {cell.latency_ms} ms, {cell.engine.partition('=')[0]}")
    try:
        runner.play(policies.of(cell), cell, seed, settings.noise_seed, camera)
    except ConfigError:  # the table says why this arm cannot run
        return []
    return camera.frames


def _side_by_side(panels: Sequence[list[np.ndarray]]) -> Iterator[np.ndarray]:
    """Pictures of all panels; one that is over keeps its last."""
    blank = np.zeros_like(panels[0][0])
    columns = min(_COLUMNS, len(panels))
    for tick in range(max(map(len, panels))):
        now = [frames[min(tick, len(frames) - 1)] for frames in panels]
        now += [blank] * (-len(now) % columns)
        yield np.vstack([np.hstack(now[row : row + columns]) for row in range(0, len(now), columns)])
