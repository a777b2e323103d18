"""A simulated SO-100 on a table: physics by MuJoCo, pictures by numpy, no hardware and no OpenGL.

Importing this package loads neither; what it exports is looked up when first used. To look at it:

    python -m gr00t_fast.robots.so100_sim --out DIR
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr00t_fast.robots.so100_sim.robot import SimArm
    from gr00t_fast.robots.so100_sim.scene import build_scene
    from gr00t_fast.robots.so100_sim.scripted_expert import expert, run_expert
    from gr00t_fast.robots.so100_sim.simulation import ScenePlant, Simulation

_HOME = {
    "Simulation": "simulation",
    "SimArm": "robot",
    "ScenePlant": "simulation",
    "build_scene": "scene",
    "expert": "scripted_expert",
    "run_expert": "scripted_expert",
}
__all__ = ["ScenePlant", "SimArm", "Simulation", "build_scene", "expert", "run_expert"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
