"""Ways to run the network: over the plain torch model, or over files exported from it. Same noise, same actions."""

from gr00t_fast.engine.base import AnyEngine, Engine, FrameEngine, warming_up
from gr00t_fast.engine.continuation import Goal, soft_mask
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.select import (
    CALIBRATED,
    ENGINES,
    EXPORTED,
    check_engine,
    make_engine,
    open_engine,
    prepare_engine,
    runs_from_files,
    select_device,
    select_precision,
)
from gr00t_fast.engine.static_call import RawInputs

__all__ = [
    "CALIBRATED",
    "ENGINES",
    "EXPORTED",
    "AnyEngine",
    "Engine",
    "FrameEngine",
    "Goal",
    "RawInputs",
    "Target",
    "check_engine",
    "make_engine",
    "open_engine",
    "prepare_engine",
    "runs_from_files",
    "select_device",
    "select_precision",
    "soft_mask",
    "warming_up",
]
